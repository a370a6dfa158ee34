"""What every manifest must say, whoever wrote it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from composer.errors import VerifyError
from composer.model.manifest import Manifest, parse_manifest

TARGET = {"sm": "80 90", "isa": "avx2", "cuda": "12.8", "python": "3.12", "machine": "x86_64"}
SMALL = Manifest(
    name="small", fingerprint="", composer="0", recipe={"name": "small", "version": "1.0"}, lock="", target=TARGET,
    python="3.12", interpreter="host", torch="", serve=None, floors={}, checks=[], left_out=[], warnings=[], layers=[],
)  # fmt: skip


def parsed(**changes: Any) -> Manifest:
    return parse_manifest(msgspec.json.encode(msgspec.structs.replace(SMALL, **changes)), "small.tar.zst")


def test_a_whole_one_is_read_as_it_was() -> None:
    assert msgspec.json.encode(parsed()) == msgspec.json.encode(SMALL)
    assert parsed().sms == (80, 90)


@pytest.mark.parametrize(("changes", "why"), [
    ({"target": {}}, "target.sm, target.isa, target.cuda, target.python, target.machine"),
    ({"target": {name: text for name, text in TARGET.items() if name != "isa"}}, "it lacks target.isa"),
    ({"recipe": {"name": "small"}}, "it lacks recipe.version"),
    *(({"target": TARGET | {"sm": sm}}, "its SMs are") for sm in ("", "x", "90a", "80,90", " 90", "9" * 5000)),
])  # fmt: skip
def test_one_that_does_not_say_what_it_is_for_is_damaged(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(VerifyError, match="does not say what the bundle is for") as fault:
        parsed(**changes)
    assert why in str(fault.value)


def test_another_schema_is_told_before_all_else() -> None:
    with pytest.raises(VerifyError, match="schema 99 is not"):
        parsed(schema=99, target={})


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_damaged(data: bytes) -> None:
    with pytest.raises(VerifyError, match="the manifest is damaged"):
        parse_manifest(data, "small.tar.zst")

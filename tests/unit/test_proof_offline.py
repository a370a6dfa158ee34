"""What is made at first use: which rows count, what a bundle holds of what they need, and the rows of this project."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from composer.model._strict import convert
from composer.model.runtime import RuntimeWork, runtime_faults
from composer.proofs.offline import check_offline

ROOT = Path(__file__).resolve().parents[2]
SITE = "lib/python3.12/site-packages/"
ROW = RuntimeWork(what="kernels", of="app", reason="each one", needs=("nvcc", "ninja", "app/tool"), cache="APP_CACHE")
HELD = ("bin/nvcc", "bin/ninja", f"{SITE}app/tool")


def change(**values):
    return msgspec.structs.replace(ROW, **values)


def check(row, *paths, stack=("app",), sm=90):
    return [(one.id, one.severity, one.subject, one.evidence) for one in
            check_offline([row], set(paths), stack, sms=[sm], python="3.12")]  # fmt: skip


def test_what_is_made_with_what_is_there():
    evidence = "kernels: made at first use with nvcc, ninja, app/tool, kept in APP_CACHE; each one"
    assert check(ROW, *HELD) == [("offline.compiles", "note", "app", evidence)]


def test_of_several_sms_one_that_needs_it_is_enough():
    row = change(sm=(90,))
    assert [len(check_offline([row], (), ("app",), sms=sms, python="3.12")) for sms in ([80], [80, 90])] == [0, 1]
    row = change(sm_not=(90,))
    assert [len(check_offline([row], (), ("app",), sms=sms, python="3.12")) for sms in ([90], [80, 90])] == [0, 1]


def test_what_plain_serving_needs_and_does_not_have():
    evidence = "kernels: made at first use with app/tool and nvcc, which the bundle does not hold; each one"
    assert check(ROW, "bin/ninja", f"{SITE}bin/nvcc", "app/tool") == [("offline.needs", "error", "app", evidence)]
    (finding,) = check_offline([ROW], (), ("app",), sms=[90], python="3.12")
    assert finding.fix == "Patch it, or drop the distribution."
    (finding,) = check_offline([change(unless=("app/ahead/*.so",))], (), ("app",), sms=[90], python="3.12")
    assert finding.fix == "Add what has it made ahead: app/ahead/*.so."


def test_what_is_only_made_for_who_asks():
    ((name, severity, _, evidence),) = check(change(asked_by="--fast"))
    assert (name, severity) == ("offline.on-request", "note")
    assert evidence.endswith("kept in APP_CACHE; only for --fast: each one")


def test_a_download_needs_a_network_that_no_bundle_holds():
    ((name, severity, _, evidence),) = check(change(needs=("network",)), "bin/network")
    assert (name, severity) == ("offline.needs", "error")
    assert "with network, which the bundle does not hold" in evidence


def test_rows_that_do_not_count():
    assert check(ROW, stack=("other",)) == []
    assert check(change(sm=(80,))) == []
    assert check(change(sm_not=(90,))) == []
    assert len(check(change(sm=(80,)), sm=80)) == len(check(change(sm_not=(90,)), sm=80)) == 1


def test_what_was_made_ahead():
    row = change(unless=("app/ahead/**/*.so",))
    assert check(row, f"{SITE}app/ahead/x/y.so") == []
    assert len(check(row, "app/ahead/x/y.so", f"{SITE}app/ahead/x/y.txt")) == 1


@pytest.mark.parametrize(
    ("key", "value"), [("of", "A_b"), ("needs", ()), ("unless", ("a", "b/[z-a]")), ("cache", "a b"), ("cache", "lower")]
)
def test_rows_that_cannot_be_meant(key, value):
    ((found, _),) = runtime_faults(change(**{key: value}))
    assert found.partition("[")[0] == key
    assert list(runtime_faults(ROW)) == []


def test_the_rows_of_this_project():
    """Each is sound, and what it makes lands in a folder that the bundle chooses (etc/env)."""
    data = tomllib.loads((ROOT / "recipes/components/runtime.toml").read_text())
    rows = [convert(row, RuntimeWork, "runtime.toml") for row in data["runtime"]]
    assert [fault for row in rows for fault in runtime_faults(row)] == []
    environment = (ROOT / "composer/runtime/launch/env").read_text()
    assert [row.what for row in rows if row.cache is None or f"\n{row.cache}?=" not in environment] == []


def test_another_way_to_serve_makes_it_a_warning() -> None:
    row = RuntimeWork(what="kernels", of="stack", needs=("nvcc",), reason="by default", instead="--backend triton")
    (found,) = check_offline([row], set(), {"stack"}, sms=[80], python="3.12")
    assert (found.id, found.severity, found.fix) == ("offline.needs", "warning", None)
    assert found.evidence.endswith("by default; --backend triton serves without")

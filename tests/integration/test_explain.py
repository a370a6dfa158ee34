"""`compose explain` on the small stack, packed and unpacked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from composer.cli.explain import explain_library
from composer.errors import VerifyError
from composer.steps.tree import read_tree
from tests.bundles import make_bundle
from tests.integration.conftest import First
from tests.shared_objects import library, retag
from tests.stack import SITE


def explained(name: str, path: Path, *words: str) -> Result:
    return CliRunner().invoke(explain_library, [name, str(path), *words])


def test_a_bundle_and_its_folder_are_the_same_tree(first: First, tree: Path) -> None:
    packed, unpacked = read_tree(first.stack.bundle, jobs=2), read_tree(tree, jobs=1)
    assert packed == unpacked
    assert any(path.startswith("bin/python3") for path in packed[1].objects)


def test_who_needs_a_library_and_how_it_is_found(first: First, tree: Path) -> None:
    packed, unpacked = explained("libcore.so", first.stack.bundle), explained("libcore.so", tree)
    assert packed.output == unpacked.output
    assert packed.output.splitlines() == [
        "libcore.so",
        f"  provided by {SITE}/core_lib/lib/libcore.so, to 1 object",
        f"  needed by {SITE}/native_ext/libext.so",
        "    found by $ORIGIN/../core_lib/lib, in its RPATH",
    ]


def test_a_library_that_only_others_can_load(tmp_path: Path) -> None:
    plain = library(tmp_path / "plain")
    objects = {
        "libend.so": retag(plain, tmp_path / "end", soname="libend.so"),
        "libmid.so": retag(plain, tmp_path / "mid", soname="libmid.so", needed=["libend.so"]),
        "libuser.so": retag(plain, tmp_path / "user", needed=["libmid.so"], tag="rpath", entries="$ORIGIN"),
    }
    bundle = tmp_path / "small.tar.zst"
    files = {f"lib/{name}": path.read_bytes() for name, path in objects.items()}
    make_bundle(bundle, {"one": files}, store=tmp_path / "store")
    assert explained("libend.so", bundle).output.splitlines() == [
        "libend.so",
        "  provided by lib/libend.so, to 1 object",
        "  needed by lib/libmid.so",
        "    not found when it is loaded by itself",
        "  needed by lib/libmid.so",
        "    found by $ORIGIN, in the RPATH of lib/libuser.so; when loaded by lib/libuser.so",
    ]


def test_as_data(tree: Path) -> None:
    found = json.loads(explained("libc.so.6", tree, "--json").output)
    assert (found["name"], found["host"]) == ("libc.so.6", "glibc")
    assert {need["rule"] for need in found["needs"]} == {"host"}


def test_what_nobody_knows_is_refused_with_what_was_meant(tree: Path) -> None:
    fault = explained("libcore.so.1", tree).exception
    assert isinstance(fault, VerifyError)
    assert fault.fix == "Did you mean libcore.so?"


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="not an unpacked bundle"):
        read_tree(tmp_path, jobs=1)
    (tmp_path / "file").write_bytes(b"no bundle")
    with pytest.raises(VerifyError):
        read_tree(tmp_path / "file", jobs=1)

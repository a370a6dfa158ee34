"""`verify` of a bundle whose manifest and content disagree, in each of its ways of looking."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from composer.events import silent
from composer.steps.verify import verify
from composer.store import Store
from tests.bundles import make_bundle


@pytest.mark.parametrize("imports", [False, True], ids=["as it is packed", "unpacked for imports"])
def test_the_digest_of_every_file_is_compared(tmp_path: Path, imports: bool) -> None:
    bundle = tmp_path / "small.tar.zst"
    files = {"bin/a": b"#!/bin/sh\n", "lib/f.txt": b"content"}
    make_bundle(bundle, {"one": files}, store=tmp_path / "store", lie=lambda entry: msgspec.structs.replace(
        entry, sha256="0" * 64) if entry.path == "lib/f.txt" else entry)  # fmt: skip
    _, found = verify(bundle, Store(tmp_path / "store"), imports=imports, jobs=1, listener=silent)
    assert [(one.subject, one.severity) for one in found if one.id == "content"] == [("lib/f.txt", "error")]

"""Loose cubins of a wheel: those that the target cannot run are left out of a bundle, and of a wheel made for it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.fatbins import cubin
from tests.integration.conftest import First, cold
from tests.servers import Index
from tests.stack import SITE, Stack, serve, wheels
from tests.wheels import build_wheel, metadata_text, wheel_filename

FOLDER = "kernels/cubins"
LISTED = {
    "80": cubin(80), "90": cubin(90, size=3000), "90a": cubin(90, "a", size=700), "100": cubin(100, size=800),
    "100a": cubin(100, "a", size=64), "103a": cubin(103, "a", size=900),
}  # fmt: skip
CUBINS = {f"{FOLDER}/deep/{name}.cubin": data for name, data in LISTED.items()}
CHECKSUMS = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}.cubin\n" for name, data in LISTED.items()).encode()
FILES = {
    **CUBINS, f"{FOLDER}/checksums.txt": CHECKSUMS, f"{FOLDER}/broken.cubin": b"\x7fELF", "kernels/__init__.py": b"",
    f"{FOLDER}/other.bin": cubin(80),
}  # fmt: skip
METADATA = metadata_text("kernels", "1.0").rstrip(b"\n") + b"\nLicense: MIT\n"
FILENAME = wheel_filename("kernels", "1.0")
WHEEL = build_wheel("kernels", "1.0", FILES, dist_info={"METADATA": METADATA})
COMPONENT = f"""[[component]]
name = "kernels"
version = "1.0"
imports = ["kernels"]

[component.slim]
files = ["kernels/cubins/**.cubin"]
licence = "MIT"
text = "METADATA"
sha256 = "{hashlib.sha256(METADATA).hexdigest()}"

"""
REST = '[[component]]\nname = "hook"'


@pytest.fixture(scope="module")
def built(first: First, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """A bundle for SM 90 with the wheel of cubins."""
    with Index() as index:
        serve(index, {**wheels(), FILENAME: WHEEL})
        folder = tmp_path_factory.mktemp("cubins")
        stack = cold(first.stack, folder).fresh(folder, index_url=index.url)
        shutil.copytree(first.stack.store, stack.store)
        stack.edit(REST, COMPONENT + REST)
        stack.compose("lock", str(stack.recipe)).ok()
        stack.build().ok()
    return stack


def layer(stack: Stack) -> dict[str, Any]:
    manifest = json.loads(stack.compose("inspect", "--json", str(stack.bundle)).ok().out)
    return next(one for one in manifest["layers"] if one["name"] == "kernels")


def test_only_what_the_target_runs_is_in_the_bundle(built: Stack) -> None:
    entries = {entry["path"].removeprefix(f"{SITE}/"): entry for entry in layer(built)["entries"]}
    gone = {f"{FOLDER}/deep/{name}.cubin" for name in ("80", "100", "100a", "103a")}
    assert FILES.keys() - entries.keys() == gone
    for path in FILES.keys() - gone:
        assert entries[path]["sha256"] == hashlib.sha256(FILES[path]).hexdigest()
        assert "original" not in entries[path]


def test_the_ledger_has_a_line_for_each_architecture(built: Stack) -> None:
    changes = layer(built)["changes"]
    assert [(one["path"], one["detail"]) for one in changes["files"]] == [
        (f"{SITE}/{FOLDER}/broken.cubin", "left alone: truncated (16 bytes wanted at offset 0, the file has 4)")
    ]
    runs = "code, which no GPU of SM 90 runs"
    assert {(one["pattern"], one["reason"], one["files"], one["size"]) for one in changes["pruned"]} == {
        ("kernels/cubins/**.cubin", f"sm_80 {runs}", 1, 500), ("kernels/cubins/**.cubin", f"sm_100 {runs}", 1, 800),
        ("kernels/cubins/**.cubin", f"sm_100a {runs}", 1, 64), ("kernels/cubins/**.cubin", f"sm_103a {runs}", 1, 900),
    }  # fmt: skip
    out = built.compose("inspect", str(built.bundle)).ok().out
    assert f"kernels: kernels/cubins/**.cubin: 1 file, 0.0 MB left out (sm_103a {runs})" in out


def test_what_is_left_is_sound_and_runs(built: Stack, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    assert "sound" in built.compose("verify", str(built.bundle)).ok().out
    built.compose("unpack", str(built.bundle), str(tree)).ok()
    assert "sound" in built.compose("verify", str(tree)).ok().out
    record = (tree / SITE / "kernels-1.0.dist-info/RECORD").read_text()
    assert {row[0] for row in csv.reader(io.StringIO(record)) if row[0].endswith("0.cubin")} == {
        f"{FOLDER}/deep/90.cubin"
    }
    assert (tree / SITE / FOLDER / "checksums.txt").read_bytes() == CHECKSUMS
    listed = json.loads(built.compose("gpu-code", "--json", "--sm", "90", str(built.bundle)).ok().out)
    (folder,) = (one for one in listed if one["path"].endswith("deep/*.cubin"))
    assert folder["selected"]["dropped"] == 0
    assert folder["size"] == 3700


def test_nothing_is_left_out_without_slimming(built: Stack, tmp_path: Path) -> None:
    whole = built.fresh(tmp_path, store=built.store)
    whole.build("--slim", "none", "--offline").ok()
    assert {f"{SITE}/{path}" for path in CUBINS} <= {entry["path"] for entry in layer(whole)["entries"]}
    assert layer(whole)["changes"]["pruned"] == []


def test_another_licence_leaves_nothing_out(built: Stack, tmp_path: Path) -> None:
    other = cold(built, tmp_path).fresh(tmp_path, home=tmp_path / "recipe", store=built.store)
    other.edit(hashlib.sha256(METADATA).hexdigest(), "0" * 64)
    other.build("--offline").refused(2, "component kernels: slim", "METADATA has sha256")


@pytest.mark.parametrize(
    ("sm", "stays"), [("90", {"90", "90a"}), ("100,103", {"100", "100a", "103a"}), ("75", set()), ("all", set(LISTED))]
)
def test_a_wheel_by_itself(sm: str, stays: set[str], built: Stack, tmp_path: Path) -> None:
    """Here no recipe names files: every cubin is looked at, whatever its name."""
    (tmp_path / FILENAME).write_bytes(WHEEL)
    done = built.compose("slim", "--sm", sm, "-o", str(tmp_path / "out"), str(tmp_path / FILENAME)).ok()
    (path,) = (tmp_path / "out").iterdir()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    gone = {f"{FOLDER}/deep/{name}.cubin" for name in LISTED.keys() - stays}
    gone |= {f"{FOLDER}/other.bin"} if "80" not in stays else set()
    kept = {name: data for name, data in files.items() if name.startswith("kernels/")}
    assert kept == {name: data for name, data in FILES.items() if name not in gone}
    (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    rows = {row[0]: row[1:] for row in csv.reader(io.StringIO(files[f"{info}/RECORD"].decode()))}
    assert rows.keys() == files.keys()
    for name, (digest, size) in rows.items():
        if not name.endswith("/RECORD"):
            found = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={found}", len(files[name]))
    ledger = json.loads(files[f"{info}/compose-slim.json"])
    assert sum(one["files"] for one in ledger["left_out"]) == len(gone)
    assert sum(one["size"] for one in ledger["left_out"]) == sum(len(FILES[name]) for name in gone)
    assert ("nothing could be cut" in done.out) == (not gone)
    assert done.out.count("0.0 MB left out (sm_") == len(LISTED) - len(stays)

"""The README's command on the real stack: about 5 GB of wheels, fetched once into the default store."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = REPOSITORY / "scripts/compose"
TARGET = ("--sm", "90", "--isa", "avx512")


def compose(*words: str | Path) -> str:
    """Standard output of a command that succeeds."""
    done = subprocess.run([COMPOSE, *words], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Built:
    path: Path
    out: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    folder = tmp_path_factory.mktemp("dist")
    out = compose("build", *TARGET, "-o", folder)
    (path,) = folder.glob("*.tar.zst")
    yield Built(path=path, out=out)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prefix(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("the host's") / "prefix"
    folder.mkdir()
    subprocess.run(["tar", "--zstd", "-xf", built.path, "-C", folder], check=True)
    yield folder
    shutil.rmtree(folder)


def on_host(prefix: Path, code: str) -> str:
    """What the bundle's Python prints, with nothing of this machine's environment."""
    words = [prefix / "bin/python", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env={"PATH": os.defpath}, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_bundle_has_its_name_and_digest(built: Built) -> None:
    assert re.fullmatch(r"sglang-python3\d\d-cuda12_8-sm90-avx512\.tar\.zst", built.path.name)
    with built.path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    assert digest in built.out
    assert built.path.with_name(f"{built.path.name}.sha256").read_text() == f"{digest}  {built.path.name}\n"


def test_a_second_run_has_nothing_to_do(built: Built) -> None:
    before = built.path.stat().st_mtime_ns
    assert "up to date" in compose("build", *TARGET, "-o", built.path.parent)
    assert built.path.stat().st_mtime_ns == before


def test_packing_again_gives_the_same_bytes(built: Built, tmp_path: Path) -> None:
    compose("build", *TARGET, "-j1", "-o", tmp_path)
    again = tmp_path / built.path.name
    sums = [path.with_name(f"{path.name}.sha256").read_text() for path in (built.path, again)]
    assert sums[0] == sums[1]
    shutil.rmtree(tmp_path)


def test_inspect_lists_the_pinned_versions(built: Built) -> None:
    manifest = json.loads(compose("inspect", "--json", built.path))
    versions = {layer["name"]: layer["version"] for layer in manifest["layers"]}
    pins = {"sglang": "0.5.9", "torch": "2.9.1", "sgl-kernel": "0.3.21", "flashinfer-python": "0.6.5",
            "xgrammar": "0.1.27", "apache-tvm-ffi": "0.1.9"}  # fmt: skip
    assert {name: versions.get(name) for name in pins} == pins
    assert manifest["target"]["sm"] == "90"


def test_the_unpacked_bundle_verifies_with_its_imports(prefix: Path) -> None:
    assert ": sound;" in compose("verify", prefix)


def test_the_unpacked_bundle_imports_torch(prefix: Path) -> None:
    assert on_host(prefix, "import torch; print(torch.__version__.split('+')[0])") == "2.9.1"
    out = on_host(prefix, "import torch; print(torch.arange(6.).reshape(2, 3).mm(torch.ones(3, 1)).tolist())")
    assert out == "[[3.0], [12.0]]"


def test_it_still_verifies_and_runs_after_a_move(prefix: Path, tmp_path: Path) -> None:
    moved = tmp_path / "somewhere else"
    prefix.rename(moved)
    try:
        assert on_host(moved, "import sys, xgrammar; print(sys.prefix)") == str(moved)
        assert ": sound;" in compose("verify", "--no-imports", moved)
    finally:
        moved.rename(prefix)

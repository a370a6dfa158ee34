"""xgrammar's real sdist, built once per instruction set: the flags arrive, and nothing else does.

Measured on two cores of a Zen 4 with g++ 12.2, shared with other work: about 100 CPU seconds and 8.5 MB for each.
"""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.real

COMPOSE = Path(__file__).resolve().parents[2] / "scripts/compose"
#: zmm instructions in the extension; upstream's wheel and every instruction set without AVX-512 have none.
ZMM = {"avx512": 127, "avx2": 0}
RECIPE = """
schema = 1
name = "source"
version = "1.0"
summary = "xgrammar from its sdist"
cuda = "12.8"
pythons = ["3.12", "3.11"]
as-of = 2026-03-10T00:00:00Z
sm = [90]

[[component]]
name = "xgrammar"
version = "0.1.27"

[component.build]
sdist = true
requires = ["scikit-build-core==0.11.6", "nanobind==2.5.0", "ninja==1.13.0", "cmake==4.1.2"]
disk = 1_000_000_000

[component.build.environment]
CFLAGS = "{isa.flags} -ffile-prefix-map={folder}=."
CXXFLAGS = "{isa.flags} -ffile-prefix-map={folder}=."
"""


def wheel(folder: Path, isa: str) -> dict[str, Any]:
    """What `compose wheel --json` says."""
    recipe = folder / "source.toml"
    if not recipe.exists():
        recipe.write_text(RECIPE)
    words = [COMPOSE, "wheel", "xgrammar", "--recipe", recipe, "--sm", "90", "--isa", isa, "--json"]
    done = subprocess.run(["nice", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.mark.parametrize("isa", ZMM)
def test_the_instruction_set_of_the_extension(isa: str, folder: Path, tmp_path: Path) -> None:
    built = wheel(folder, isa)
    print(f"{built['filename']}: {built['size']} bytes, {built['seconds']} s with {built['jobs']} jobs")
    assert built["filename"].startswith(f"xgrammar-0.1.27+{isa}-cp31")
    with zipfile.ZipFile(built["path"]) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".so"))
        library = archive.extract(name, tmp_path)
    shown = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    counts = {register: len(re.findall(rf"^.*%{register}.*$", shown, re.MULTILINE)) for register in ("ymm", "zmm")}
    print(counts)
    assert counts["zmm"] == ZMM[isa]
    assert counts["ymm"] > 0
    assert Path(built["path"]).parents[4].as_posix().encode() not in Path(library).read_bytes()


def test_a_second_run_builds_nothing(folder: Path) -> None:
    first = wheel(folder, "avx512")
    assert wheel(folder, "avx512") == {**first, "cached": True}

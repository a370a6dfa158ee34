"""The sources of flashinfer-jit-cache: which modules are chosen, how they are compiled and packed, and bad settings.

FlashInfer's place is taken by a distribution with the same interface whose modules are C++, so that no CUDA is needed.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from composer.formats.elf import read_elf
from composer.formats.wheel import read_wheel, verified_stream
from tests.wheels import build_wheel

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = REPOSITORY / "sources/flashinfer-jit-cache"
LIBRARY = "flashinfer_jit_cache/jit_cache/{0}/{0}.so"
BACKEND = """
import json, sys
import flashinfer_aot
from flashinfer_aot.selection import SelectionError
hook, settings = sys.argv[1], json.loads(sys.argv[2])
try:
    print(getattr(flashinfer_aot, hook)("out", settings))
except SelectionError as fault:
    sys.exit(f"refused: {fault}")
"""
# What the backend uses of flashinfer 0.6.5. A module is compiled by rules that write down each file first.
AOT = """
import dataclasses, json, os, pathlib
import torch
from flashinfer import env as jit_env

TRACE = pathlib.Path(os.environ["TRACE"])
(pathlib.Path(__file__).parent / "data").mkdir(exist_ok=True)


@dataclasses.dataclass
class JitSpec:
    name: str
    sources: list
    extra_ldflags: list | None = None

    @property
    def jit_library_path(self):
        return jit_env.FLASHINFER_JIT_DIR / self.name / f"{self.name}.so"

    @property
    def ninja_path(self):
        return jit_env.FLASHINFER_JIT_DIR / self.name / "build.ninja"

    def write_ninja(self):
        folder = self.ninja_path.parent
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{one.stem}.o") for one in self.sources]
        flags = os.environ["FLASHINFER_EXTRA_CFLAGS"]
        lines = ["rule cc", f"  command = echo $in >> {TRACE} && c++ {flags} -fPIC -c $in -o $out", "rule link",
                 f"  command = c++ -shared $in {' '.join(self.extra_ldflags)} -o $out"]
        lines += [f"build {made}: cc {one}" for made, one in zip(objects, self.sources)]
        text = "\\n".join([*lines, f"build {self.jit_library_path}: link {' '.join(objects)}", ""])
        if not self.ninja_path.exists() or self.ninja_path.read_text() != text:
            self.ninja_path.write_text(text)


def get_cuda_version():
    return os.environ["CUDA"]


def detect_sm_capabilities():
    return {"sm90": os.environ["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a"}


def gen_all_modules(f16, f8, fa2, fa3, window, cap, sms, **parts):
    asked = [repr([f16, f8, fa2, fa3, window, cap, sms]), parts]
    pathlib.Path(os.environ["ASKED"]).write_text(json.dumps(asked))
    source = pathlib.Path(__file__).parent / "data"
    names = {"page": ["page_a.cc", "page_b.cc"], "norm": ["norm.cc"], "rope": ["rope.cc"]}
    return [JitSpec(name, [source / one for one in files]) for name, files in names.items()]
"""
ENV = """
import os, pathlib
FLASHINFER_JIT_DIR = pathlib.Path(os.environ["FLASHINFER_WORKSPACE_BASE"]) / "cached_ops"
"""
FILES = {
    "flashinfer/__init__.py": b"raise SystemExit('imported all of FlashInfer')\n",
    "flashinfer/aot.py": AOT.encode(), "flashinfer/env.py": ENV.encode(),
    "flashinfer/data/page_a.cc": b'extern "C" const char *page() { return __FILE__; }\n',
    "flashinfer/data/page_b.cc": b'extern "C" int two() { return 2; }\n',
    "flashinfer/data/norm.cc": b'extern "C" int norm() { return 3; }\n',
    "flashinfer/data/rope.cc": b'extern "C" int rope() { return 4; }\n',
    "tvm_ffi.py": b"import importlib.util\nassert importlib.util.find_spec('torch') is None\n",
    "flashinfer_python-9.8.7.dist-info/licenses/LICENSE": b"You may.\n",
}  # fmt: skip
needs_tools = pytest.mark.skipif(
    shutil.which("ninja") is None or shutil.which("c++") is None, reason="the stand-in is compiled by ninja and c++"
)


@dataclass(frozen=True)
class Bench:
    """A copy of the sources, and an environment with the stand-in for FlashInfer."""

    home: Path

    @property
    def site(self) -> Path:
        return self.home / "site-packages"

    def call(self, hook: str, cuda: str = "12.8", **settings: str) -> subprocess.CompletedProcess[str]:
        given = {key.replace("_", "-"): value for key, value in settings.items()}
        environ = {
            "PATH": os.environ["PATH"], "PYTHONPATH": f"{self.site}:{self.home / 'source/backend'}", "CUDA": cuda,
            "TRACE": str(self.home / "trace"), "ASKED": str(self.home / "asked"), "MAX_JOBS": "1",
        }  # fmt: skip
        words = [sys.executable, "-S", "-c", BACKEND, hook, json.dumps(given)]
        return subprocess.run(words, cwd=self.home / "source", env=environ, capture_output=True, text=True)

    def build(self, **settings: str) -> Path:
        done = self.call("build_wheel", **{"arch": "9.0a", **settings})
        assert done.returncode == 0, done.stderr
        return self.home / "source/out" / done.stdout.splitlines()[-1]

    def compiled(self) -> list[str]:
        """The files that were compiled since this was asked last."""
        trace = self.home / "trace"
        found = trace.read_text().split() if trace.exists() else []
        trace.unlink(missing_ok=True)
        return [Path(one).name for one in found]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    shutil.copytree(SOURCES, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "source/out").mkdir()
    wheel = tmp_path / "flashinfer.whl"
    wheel.write_bytes(build_wheel("flashinfer-python", "9.8.7", FILES))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site-packages")
    return Bench(tmp_path)


# --- what is made -----------------------------------------------------------------------------------------------------


@needs_tools
def test_a_wheel_that_flashinfer_can_use(bench: Bench, tmp_path: Path) -> None:
    wheel = bench.build(set="full")
    assert wheel.name == f"flashinfer_jit_cache-9.8.7+cu12.sm90-py3-none-linux_{os.uname().machine}.whl"
    found = read_wheel(wheel.read_bytes(), wheel.name)
    for member in found.members.values():
        for _ in verified_stream(wheel.read_bytes(), found, member):
            pass
    assert b"\nLicense-File: LICENSE\n" in found.metadata
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    ask = "import flashinfer_jit_cache as cache; print(cache.get_jit_cache_dir(), cache.__version__, *cache.MODULES)"
    done = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path / "unpacked", capture_output=True, text=True)
    folder, version, *modules = done.stdout.split()
    assert (version, modules) == ("9.8.7", ["norm", "page", "rope"])
    assert ctypes.CDLL(f"{folder}/norm/norm.so").norm() == 3


@needs_tools
@pytest.mark.parametrize(("cuda", "folder"), [("12.4", "nvidia/cuda_runtime/lib"), ("13.0", "nvidia/cu13/lib")])
def test_modules_find_the_cuda_runtime_of_the_environment(bench: Bench, cuda: str, folder: str) -> None:
    wheel = bench.build(set="full", only='["page"]', cuda=cuda)
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(LIBRARY.format("page"))
    assert read_elf(data, "page.so").runpath == (f"$ORIGIN/../../../{folder}",)
    assert str(bench.home).encode() not in data
    assert b"./flashinfer/data/page_a.cc" in data


@needs_tools
def test_the_same_inputs_give_the_same_bytes(bench: Bench) -> None:
    first = bench.build(set="full", build_dir="one").read_bytes()
    assert bench.build(set="full", build_dir="two").read_bytes() == first
    assert bench.build(set="full", build_dir="two", exclude='["rope"]').read_bytes() != first


@needs_tools
def test_a_build_that_failed_goes_on(bench: Bench) -> None:
    source = bench.site / "flashinfer/data/page_b.cc"
    good = source.read_text()
    source.write_text("this is no C++\n")
    failed = bench.call("build_wheel", arch="9.0a", set="full", build_dir="kept")
    assert failed.returncode != 0
    assert "CalledProcessError" in failed.stderr
    assert not list((bench.home / "source/out").iterdir())
    before = bench.compiled()
    source.write_text(good)
    bench.build(set="full", build_dir="kept")
    after = bench.compiled()
    assert "page_b.cc" in after
    assert sorted({*before, *after}) == ["norm.cc", "page_a.cc", "page_b.cc", "rope.cc"]
    assert len(before) + len(after) == 5
    bench.build(set="full", build_dir="kept")
    assert bench.compiled() == []


def test_metadata_is_known_before_anything_is_compiled(bench: Bench) -> None:
    done = bench.call("prepare_metadata_for_build_wheel", arch="12.0f", cuda="12.9")
    assert done.returncode == 0, done.stderr
    folder = bench.home / "source/out" / done.stdout.strip()
    assert folder.name == "flashinfer_jit_cache-9.8.7+cu12.sm120.dist-info"
    assert (folder / "licenses/LICENSE").read_text() == "You may.\n"
    assert bench.compiled() == []


# --- what is chosen ---------------------------------------------------------------------------------------------------


@needs_tools
def test_a_set_and_what_changes_it_reach_the_generator(bench: Bench) -> None:
    wheel = bench.build(set="smoke", f16='["float16"]', fa3_head_dims="[[192, 128]]", exclude='["no*"]')
    types, parts = json.loads((bench.home / "asked").read_text())
    assert types == "[[torch.float16], [], [(128, 128)], [(192, 128)], [False], [False], {'sm90': True}]"
    assert {name for name, wanted in parts.items() if wanted} == {"add_act", "add_misc"}
    with zipfile.ZipFile(wheel) as archive:
        libraries = [one for one in archive.namelist() if one.endswith(".so")]
    assert libraries == [LIBRARY.format("page")]


def test_the_sets_are_about_the_same_keys() -> None:
    sets = tomllib.loads((SOURCES / "modules.toml").read_text())
    assert set(sets) == {"full", "trimmed", "smoke"}
    assert sets["full"]["exclude"] == sets["full"]["only"] == []
    for one in sets.values():
        assert one.keys() == sets["full"].keys()
        for key in one.keys() - {"only", "exclude"}:
            assert all(value in sets["full"][key] for value in one[key]), key


def test_only_the_names_of_torch_that_are_needed_are_there(bench: Bench) -> None:
    (bench.site / "flashinfer/aot.py").write_text("import torch\ntorch.linalg\n")
    done = bench.call("prepare_metadata_for_build_wheel", arch="9.0a")
    assert "AttributeError: module 'torch' has no attribute 'linalg'" in done.stderr


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "arch: '' is not one architecture, such as 8.0 or 9.0a"),
        ({"arch": "8.0;9.0a"}, "arch: '8.0;9.0a' is not one architecture"),
        ({"arch": "sm_90"}, "arch: 'sm_90' is not one architecture"),
        ({"arch": "9.0a", "sets": "full"}, "unknown: sets; there are arch, set, build-dir, f16,"),
        ({"arch": "9.0a", "set": "huge"}, "set: there is no 'huge', only full, trimmed, smoke"),
        ({"arch": "9.0a", "f16": "bfloat16"}, "f16: 'bfloat16' is not a value of TOML"),
        ({"arch": "9.0a", "f16": '["bfloat32"]'}, "f16: 'bfloat32' is none of float16, bfloat16"),
        ({"arch": "9.0a", "f16": "[]"}, "f16: [] is not a list of at least one of str"),
        ({"arch": "9.0a", "sliding-window": "[0]"}, "sliding-window: [0] is not a list of at least one of bool"),
        ({"arch": "9.0a", "fa2-head-dims": "[128]"}, "fa2-head-dims: [128] is not a list of pairs of numbers"),
        ({"arch": "9.0a", "fa2-head-dims": "[[64, 0]]"}, "fa2-head-dims: [[64, 0]] is not a list of pairs of numbers"),
        ({"arch": "9.0a", "parts": '["all"]'}, "parts: 'all' is none of comm, gemma, oai_oss, moe, act, misc, xqa"),
        ({"arch": "9.0a", "only": '["pages"]'}, "none of the 3 modules is selected"),
        ({"arch": "9.0a", "build-dir": "/a b"}, "/a b: FlashInfer's rules for ninja take no path with a space"),
    ],
)
def test_settings_that_cannot_be_meant(bench: Bench, settings: dict[str, str], told: str) -> None:
    done = bench.call("build_wheel", **settings)
    assert done.returncode == 1
    assert f"refused: {told}" in done.stderr
    assert bench.compiled() == []

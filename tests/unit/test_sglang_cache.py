"""The sources of sglang-jit-cache: what a module's key covers and what it does not, and the list of modules."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "sources/sglang-jit-cache"


@dataclass(frozen=True)
class Spec:
    """What the key reads of SGLang's `BuildSpec`."""

    sources: tuple[str, ...]
    include_paths: tuple[str, ...]
    module_name: str = "sgl_kernel_jit_rope_128"
    module_args: tuple[str, ...] = ("rope", "128")
    cpp_wrappers: tuple[tuple[str, str], ...] = ()
    cuda_wrappers: tuple[tuple[str, str], ...] = (("run", "Rope<128>::run"),)
    cflags: tuple[str, ...] = ("-O3",)
    cuda_cflags: tuple[str, ...] = ("-DSGL_CUDA_ARCH=900", "-O3")
    ldflags: tuple[str, ...] = ("-L/usr/local/cuda/lib64/stubs", "-lcuda")
    header_only: bool = True


def installed(site: Path, text: str = "__global__ void rope();") -> Spec:
    """SGLang in a folder, and the description of one of its modules."""
    source = site / "sglang/kernels/jit/csrc/rope.cuh"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(text)
    return Spec(sources=(str(source),), include_paths=(str(site / "sglang/kernels/jit/include"),))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ModuleType]:
    """The package with what a build for SM 90 adds."""
    folder = tmp_path / "package/sglang_jit_cache"
    folder.mkdir(parents=True)
    for path in (SOURCES / "sglang_jit_cache").glob("*.py"):
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "_build.py").write_text('__version__ = "0.5.23"\nARCHES = ("9.0a",)\nCUDA = "13.0"\n')
    (folder / "modules").mkdir()
    spec = importlib.util.spec_from_file_location("sglang_jit_cache", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sglang_jit_cache"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [one for one in sys.modules if one.partition(".")[0] == "sglang_jit_cache"]:
        del sys.modules[name]


def test_the_key_is_the_same_in_another_folder_and_beside_another_toolkit(cache: ModuleType, tmp_path: Path) -> None:
    here, there = tmp_path / "a", tmp_path / "b c"
    key = cache.keys.key(installed(here), "9.0a", here)
    moved = replace(installed(there), ldflags=("-L/opt/cuda-13.0/lib64/stubs", "-lcuda"))
    assert cache.keys.key(moved, "9.0a", there) == key
    assert len(key) == 16


@pytest.mark.parametrize(
    "changed",
    [
        {"module_args": ("rope", "64")},
        {"cuda_wrappers": (("run", "Rope<64>::run"),)},
        {"cpp_wrappers": (("run", "rope"),)},
        {"cflags": ("-O2",)},
        {"cuda_cflags": ("-DSGL_CUDA_ARCH=900", "-O3", "--use_fast_math")},
        {"ldflags": ()},
        {"include_paths": ()},
        {"header_only": False},
    ],
    ids=lambda one: next(iter(one)),
)
def test_the_key_covers(cache: ModuleType, tmp_path: Path, changed: dict[str, Any]) -> None:
    spec = installed(tmp_path)
    assert cache.keys.key(replace(spec, **changed), "9.0a", tmp_path) != cache.keys.key(spec, "9.0a", tmp_path)


def test_the_key_covers_the_architecture_and_the_bytes_of_a_source(cache: ModuleType, tmp_path: Path) -> None:
    keys = [cache.keys.key(installed(tmp_path), arch, tmp_path) for arch in ("9.0a", "9.0", "10.0a")]
    keys.append(cache.keys.key(installed(tmp_path, "__global__ void rope2();"), "9.0a", tmp_path))
    assert len(set(keys)) == 4


def test_a_module_is_found_for_its_gpu_only(cache: ModuleType, tmp_path: Path) -> None:
    spec = installed(tmp_path)
    assert cache.find(spec, "9.0a", tmp_path) is None
    (cache.folder() / f"{spec.module_name}.{cache.keys.key(spec, '9.0a', tmp_path)}.so").touch()
    found = cache.find(spec, "9.0a", tmp_path)
    assert found is not None
    assert found.parent == cache.folder()
    assert cache.find(spec, "10.0a", tmp_path) is None
    assert cache.find(replace(spec, module_args=("rope", "96")), "9.0a", tmp_path) is None


def test_every_row_says_how_it_is_called_and_why() -> None:
    rows = tomllib.loads((SOURCES / "modules.toml").read_text())["module"]
    assert len({row["factory"] for row in rows}) == len(rows)
    for row in rows:
        assert row.keys() == {"factory", "arguments", "reason"}
        assert row["reason"]
        assert row["factory"].count(":") == 1
        calls = [tuple(given) for given in row["arguments"]]
        assert calls
        assert len(set(calls)) == len(calls), row["factory"]


def test_what_both_caches_repeat_is_the_same() -> None:
    """A source that is built by itself has no module of another, so each carries its own writer of wheels."""
    first, second = sorted(SOURCES.parent.glob("*/backend/*/wheel.py"))
    assert first.read_bytes() == second.read_bytes()

"""What unzstd is made from, and what is said when it cannot be made."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import pytest

from composer.errors import FetchError, HostError, RecipeError
from composer.model.lock import LockedPackage, parse_lock
from composer.steps.decompressor import TRIPLES, decompressor_sources, make_decompressor
from composer.steps.load import data_root
from composer.store import Store

LOCKS = sorted((data_root() / "recipes").glob("pylock.*.toml"))


def sources() -> dict[str, LockedPackage]:
    return {one.name: one for one in decompressor_sources()}


def test_the_decoder_is_the_zstd_that_compressed() -> None:
    assert sources()["zstandard"].version == version("zstandard")


def test_the_compiler_is_the_one_that_recipes_lock() -> None:
    locks = [parse_lock(path.read_text(), path.name) for path in LOCKS if "-build-" not in path.name]
    locked = {
        artifact
        for lock in locks
        for package in lock.packages if package.name == "ziglang"
        for artifact in package.artifacts if platform.machine() in artifact.filename
    }  # fmt: skip
    assert locked == {*sources()["ziglang"].artifacts}


def test_every_machine_that_composes_has_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compilers = []
    for machine in TRIPLES:
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        (artifact,) = sources()["ziglang"].artifacts
        assert machine in artifact.filename
        compilers.append(sources()["ziglang"].version)
    assert len(set(compilers)) == 1  # the key of the program has this version and not the wheel


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(HostError, match="riscv64: no compiler is pinned"):
        decompressor_sources()


def test_a_program_for_an_unknown_machine(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no unzstd for 'riscv64'"):
        make_decompressor("riscv64", Store(tmp_path))


def test_offline_both_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FetchError) as caught:
        make_decompressor("x86_64", Store(tmp_path), offline=True)
    assert all(one.artifacts[0].filename in str(caught.value) for one in decompressor_sources())

"""`compose estimate`, and whether a build is started unasked: real recipes, a real source, records of its builds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composer.interpreter import choose_python
from composer.model.target import Target
from composer.steps.budget import consider, records_here, share_done, within_budget
from composer.steps.load import load_recipe
from composer.steps.locks import LockOptions
from composer.steps.source import BuiltWheel, Job, Request, prepare_build
from composer.store import Store
from tests.servers import File, Index
from tests.sources import NAME, offer, write_recipe
from tests.stack import COMPOSE, PYTHON, TARGET, Stack
from tests.wheels import build_wheel, wheel_filename

needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="the small source is built by ninja")
SHIPPED = ("estimate", *TARGET, "--python", f"host:{PYTHON}", "--offline")


@pytest.fixture
def index() -> Iterator[Index]:
    """The small source, and a wheel of it, which a stack is resolved with."""
    with Index() as server:
        offer(server)
        data = build_wheel(NAME, "1.0", {"small_ext.txt": b"a prebuilt library"})
        server.add(NAME, File(filename=wheel_filename(NAME, "1.0"), data=data))
        yield server


@pytest.fixture
def small(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """The recipe of the small source; this process sees its index, too."""
    stack = write_recipe(tmp_path, index.url)
    for name in set(os.environ) - set(stack.environ):
        monkeypatch.delenv(name)
    for name, value in stack.environ.items():
        monkeypatch.setenv(name, value)
    return stack


def job(small: Stack, **lock: Any) -> Job:
    loaded = load_recipe(str(small.recipe))
    target = Target(sms=(90,), isa="avx512", cuda="12.8", python=PYTHON)
    request = Request(loaded=loaded, component=loaded.recipe.component_of(NAME), target=target, flags=("-mavx512f",),
                      python=choose_python((PYTHON,)), lock=LockOptions(**lock))  # fmt: skip
    return prepare_build(request, Store(small.store))


def remember(small: Stack, key: str, **took: Any) -> None:
    """What an earlier build took, as the store keeps it."""
    values = {"cpu_seconds": 600.0, "memory": 3 * 10**8, "disk": 10**6, **took}
    filename = values.pop("filename", "small_ext-1.0+avx512-py3-none-linux_x86_64.whl")
    inputs = {"machine": "x86_64", "tools": {}, "environment": values.pop("environment", {}), "config": {}}
    wheel = BuiltWheel(filename=filename, size=1, sha256="0" * 64, key=key, seconds=400.0, jobs=2, inputs=inputs,
                       **values)  # fmt: skip
    Store(small.store).save("source", key, wheel)


def estimated(small: Stack, *more: str) -> dict[str, Any]:
    words = [*COMPOSE, "estimate", "--recipe", str(small.recipe), *TARGET, "--json", *more]
    found: dict[str, Any] = json.loads(small.run(words).ok().out)
    return found


def shipped(folder: Path, *more: str) -> Any:
    """The shipped recipe with a store that holds nothing."""
    stack = Stack(home=folder, index_url="http://localhost:9/", store=folder / "store", output=folder / "out")
    done = stack.compose(*SHIPPED, *more)
    return json.loads(done.ok().out) if "--json" in more else done


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_shipped_recipe_with_nothing_at_hand(tmp_path: Path) -> None:
    found = shipped(tmp_path, "--json")
    assert [one["step"] for one in found["steps"]] == ["compose all layers", "pack the bundle"]
    assert {one["basis"] for one in found["steps"]} == {"measured"}
    assert 4e9 < found["download"] < 7e9
    assert 100 < found["total"]["cpu_seconds"] < 1000
    assert found["total"]["disk"] > found["download"]
    assert found["longest"] == "compose all layers"
    assert not list((tmp_path / "store" / "artifacts").iterdir())


def test_a_larger_machine_takes_as_much_of_less_time(tmp_path: Path) -> None:
    small, large = (shipped(tmp_path, "--json", "--on", machine) for machine in ("2:16", "64:256"))
    assert small["total"]["cpu_seconds"] == large["total"]["cpu_seconds"]
    assert large["total"]["seconds"] < small["total"]["seconds"] / 3
    assert large["machine"] == {"cores": 64, "memory": 256 * 10**9, "disk": None}
    jobs = shipped(tmp_path, "--json", "--on", "64:256", "-j", "2")
    assert jobs["total"]["seconds"] == small["total"]["seconds"]


def test_a_builder_is_everything_from_source(tmp_path: Path) -> None:
    """For a machine that nobody has, whatever this one can build."""
    named = shipped(tmp_path, "--json", "--on", "64:256", "--no-binary", "torch", "--no-binary", "flashinfer-jit-cache")
    assert shipped(tmp_path, "--json", "--on", "64:256", "--recipe", "sglang-builder")["steps"] == named["steps"]
    assert {"build torch 2.9.1", "build flashinfer-jit-cache 0.6.5+cu128"} <= {one["step"] for one in named["steps"]}


def test_a_machine_that_is_too_small(tmp_path: Path) -> None:
    assert shipped(tmp_path, "--json", "--on", "2:1")["lacks"] == ["too little memory: 1.0 of 2.5 GB"]


def test_for_a_person_every_figure_has_its_source(tmp_path: Path) -> None:
    out = shipped(tmp_path, "--on", "8:32").ok().out
    assert "on a machine with 8 cores, 32.00 GB of memory" in out
    assert "measured [1]" in out
    assert "[1] measured: `compose plan`" in out
    assert "to download" in out
    assert "most of the time: compose all layers" in out


def test_what_nobody_measured_is_no_number(tmp_path: Path) -> None:
    found = shipped(tmp_path, "--json", "--compress", "max")
    assert found["steps"][0]["cpu_seconds"] is None
    assert found["total"]["at_least"]
    assert "no record" in shipped(tmp_path, "--compress", "max").ok().out


@pytest.mark.parametrize("machine", ["64", "0:8", "8:0", "8GB", "8:32:1"])
def test_a_machine_that_cannot_be_meant(tmp_path: Path, machine: str) -> None:
    shipped(tmp_path, "--on", machine).refused(2, "is not a number of cores and GB of memory")


def test_a_source_that_the_recipe_does_not_have(tmp_path: Path) -> None:
    shipped(tmp_path, "--on", "8:32", "--no-binary", "tqdm").refused(2, "does not say how 'tqdm' is built")


def test_a_source_without_a_record_and_then_with_one(small: Stack) -> None:
    first = estimated(small)
    assert first["steps"][0]["step"] == f"build {NAME} 1.0"
    assert first["steps"][0]["cpu_seconds"] is None
    remember(small, "a" * 64)
    second = estimated(small)["steps"][0]
    assert (second["cpu_seconds"], second["basis"]) == (600.0, "here")
    assert estimated(small, "--on", "60:480", "--no-binary", NAME)["steps"][0]["seconds"] == 10.0


@pytest.fixture
def cuda(small: Stack, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """The small source as if it were CUDA's, with no toolkit named."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    small.edit("sdist = true", "sdist = true\ncuda = true\nwhen = 'asked'")
    return small


def test_a_toolchain_that_has_to_be_made(cuda: Stack) -> None:
    cuda.edit('cuda = "12.8"', 'cuda = "13.0"')
    made, built, *_ = estimated(cuda, "--on", "8:64", "--no-binary", NAME)["steps"]
    assert (made["step"], made["basis"]) == ("make cuda13.0", "measured")
    assert made["disk"] > 10**9
    assert (built["step"], built["jobs"]) == (f"build {NAME} 1.0", 8)


def test_a_toolchain_that_cannot_be_had_here_does_not_matter_there(cuda: Stack) -> None:
    cuda.edit('cuda = "12.8"', 'cuda = "10.0"')
    found = estimated(cuda, "--on", "8:64", "--no-binary", NAME)
    assert found["steps"][0]["step"] == f"build {NAME} 1.0"
    assert f"build {NAME} 1.0: CUDA 10.0 has no code for sm_90 on this machine" in found["notes"]


@needs_ninja
def test_what_was_made_is_no_work(small: Stack) -> None:
    small.build().ok()
    words = ("-o", str(small.output))
    done = small.run([*COMPOSE, "estimate", "--recipe", str(small.recipe), *TARGET, *words]).ok()
    assert "built before" in done.out
    assert "is up to date" in done.out
    found = estimated(small, *words)
    assert (found["total"]["cpu_seconds"], found["download"]) == (0, 0)
    other = estimated(small, *words, "--no-bytecode")
    assert [one["step"] for one in other["steps"]][-1] == "pack the bundle"


# --- what builds here took --------------------------------------------------------------------------------------------


def test_of_builds_of_one_kind_the_longest_counts(small: Stack) -> None:
    remember(small, "a" * 64, cpu_seconds=600.0)
    remember(small, "b" * 64, cpu_seconds=2.0)
    remember(small, "c" * 64, cpu_seconds=0.0)
    remember(small, "d" * 64, cpu_seconds=7.0, filename="small_ext-1.0+all.avx512-py3-none-linux_x86_64.whl")
    remember(small, "e" * 64, cpu_seconds=8.0, filename="small_ext-1.0+sm80.sm90-py3-none-linux_x86_64.whl")
    found = {one.gpus: one for one in records_here(Store(small.store))}
    assert {gpus: one.cpu_seconds for gpus, one in found.items()} == {None: 600.0, 2: 8.0}
    assert (found[None].versions, found[None].job_memory, found[None].disk) == ("==1.0", 3 * 10**8, 10**6)


def test_records_that_are_damaged_do_not_count(small: Stack) -> None:
    path = Store(small.store).path("source", "a" * 64, ".json")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert records_here(Store(small.store)) == ()


@needs_ninja
def test_a_real_build_leaves_a_record(small: Stack) -> None:
    small.compose("wheel", NAME, "--recipe", str(small.recipe), *TARGET).ok()
    (found,) = records_here(Store(small.store))
    assert (found.name, found.basis, found.versions) == (NAME, "here", "==1.0")
    assert found.cpu_seconds
    assert 0 < found.cpu_seconds < 60
    assert found.job_memory
    assert found.disk


def test_what_an_interrupted_run_did(small: Stack) -> None:
    one = job(small)
    assert share_done(one) == 0.0
    one.folder.mkdir(parents=True)
    one.log.parent.mkdir(parents=True, exist_ok=True)
    one.log.write_text("  [1/40] cc a.c\n  [30/40] cc b.c\nkilled\n")
    assert share_done(one) == 0.75
    one.log.write_text("  [30/40] cc b.c\nkilled\n  [5/10] cc c.c\n")
    assert share_done(one) == 0.875
    one.log.write_text("nothing yet\n")
    assert share_done(one) == 0.0


# --- the decision -----------------------------------------------------------------------------------------------------


def test_without_a_record_nothing_is_started(small: Stack) -> None:
    assert within_budget(job(small), 1e9) == "no record says how long it takes"


def test_within_the_budget_and_not(small: Stack) -> None:
    remember(small, "a" * 64, cpu_seconds=7200.0 * len(os.sched_getaffinity(0)))
    decision = consider(job(small), 3 * 3600)
    assert (decision.build, decision.reason) == (True, "estimated 2 h, within the budget of 3 h")
    assert decision.expected
    assert within_budget(job(small), 3 * 3600) is None
    assert within_budget(job(small), 3600) == "estimated 2 h is more than the budget of 1 h"
    assert within_budget(job(small), 0) == "estimated 2 h is more than the budget of 0 s"


@pytest.mark.parametrize(("what", "told"), [("memory", "too little memory: "), ("disk", "too little disk to build")])
def test_a_machine_without_room(small: Stack, what: str, told: str) -> None:
    remember(small, "a" * 64)
    small.edit("sdist = true", f"sdist = true\n{what} = {10**16}")
    reason = within_budget(job(small), 1e9)
    assert reason
    assert reason.startswith(told)
    assert "10000000.0" in reason


def test_memory_for_one_compiler_is_asked_of_the_record(small: Stack) -> None:
    remember(small, "a" * 64, memory=10**15)
    assert str(within_budget(job(small), 1e9)).startswith("too little memory: ")


def test_a_source_that_cannot_be_reached(small: Stack, index: Index) -> None:
    remember(small, "a" * 64)
    assert within_budget(job(small), 1e9) is None
    index.down = True
    assert within_budget(job(small), 1e9) == "its source cannot be reached"
    assert within_budget(job(small, offline=True), 1e9) == f"offline, and not at hand: {NAME}, tiny-build"


def test_time_is_looked_at_before_a_server_is_asked(small: Stack, index: Index) -> None:
    remember(small, "a" * 64)
    one = job(small)
    asked = len(index.requests)
    assert "more than the budget" in str(within_budget(one, 1))
    assert len(index.requests) == asked


@needs_ninja
def test_what_was_built_before_needs_no_budget(small: Stack) -> None:
    small.compose("wheel", NAME, "--recipe", str(small.recipe), *TARGET).ok()
    loaded = load_recipe(str(small.recipe))
    flags = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma")
    target = Target(sms=(90,), isa="avx512", cuda="12.8", python=PYTHON)
    request = Request(loaded=loaded, component=loaded.recipe.component_of(NAME), target=target, flags=flags,
                      python=choose_python((PYTHON,)))  # fmt: skip
    decision = consider(prepare_build(request, Store(small.store)), 0)
    assert (decision.build, decision.reason) == (True, "it was built before")

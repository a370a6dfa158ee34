"""Estimates from records: which record counts, what it gives, and what stays unknown."""

from __future__ import annotations

from typing import Any

import pytest

from composer.errors import RecipeError
from composer.model.estimate import Estimate, Machine, Record, Step, Work, estimate, parse_records, spoken_time
from composer.model.source import Build
from composer.steps.budget import load_records

GB = 10**9
TWO = Machine(cores=2, memory=16 * GB, disk=100 * GB)
CUDA = Build(requires=(), sdist=True, cuda=True)


def record(**values: Any) -> Record:
    return Record(**{"name": "thing", "basis": "measured", "by": "somebody", "how": "somehow", **values})


def work(**values: Any) -> Work:
    return Work(**{"name": "thing", "what": "build thing", "version": "1.0", "build": CUDA, "cuda": True, **values})


def step(*records: Record, machine: Machine = TWO, **values: Any) -> Step:
    (found,) = estimate(records, [work(**values)], machine).steps
    return found


def whole(*works: Work, records: tuple[Record, ...], machine: Machine = TWO, download: int = 0) -> Estimate:
    return estimate(records, works, machine, download=download)


def test_once_per_architecture_and_per_gb() -> None:
    known = record(cpu_seconds=100, cpu_seconds_per_sm=20, cpu_seconds_per_gb=3)
    assert step(known, sms=(80, 90), size=2 * GB).cpu_seconds == 146


def test_wall_time_follows_the_jobs_that_memory_allows() -> None:
    assert step(record(cpu_seconds=120)).seconds == 60
    assert step(record(cpu_seconds=120), machine=Machine(cores=64, memory=80 * GB)).jobs == 10
    assert step(record(cpu_seconds=120), machine=Machine(cores=64, memory=80 * GB)).seconds == 12
    assert step(record(cpu_seconds=120), jobs=1).seconds == 120


def test_one_core_does_the_serial_share() -> None:
    assert step(record(cpu_seconds=100, serial=0.5)).seconds == 75


def test_a_step_of_composer_takes_all_cores() -> None:
    machine = Machine(cores=64, memory=8 * GB)
    assert step(record(cpu_seconds=64), machine=machine, build=None).jobs == 64
    assert step(record(cpu_seconds=64), machine=machine).jobs == 1


@pytest.mark.parametrize("better", ["here", "measured", "scaled"])
def test_the_best_known_record_counts(better: str) -> None:
    worse = {"here": "measured", "measured": "scaled", "scaled": "reported"}[better]
    best = record(basis=better, cpu_seconds=1)
    found = step(best, record(basis=worse, cpu_seconds=2, versions="==1.0", sm=(90,)), sms=(90,))
    assert (found.cpu_seconds, found.basis) == (1, better)
    assert [one.basis for one in found.also] == [worse]


def test_of_two_the_narrower_and_then_the_later_counts() -> None:
    assert step(record(cpu_seconds=2, sm=(90,)), record(cpu_seconds=1), sms=(90,)).cpu_seconds == 2
    assert step(record(cpu_seconds=2), record(cpu_seconds=1)).cpu_seconds == 1


@pytest.mark.parametrize(
    "other",
    [{"name": "other"}, {"versions": ">=2"}, {"cuda": False}, {"machine": "aarch64"}, {"sm": (80,)}, {"gpus": 2},
     {"settings": {"set": "full"}}],
)  # fmt: skip
def test_a_record_of_other_work_says_nothing(other: dict[str, Any]) -> None:
    found = step(record(cpu_seconds=1, **other), sms=(90,), machine=TWO, settings={"set": "trimmed"})
    assert (found.cpu_seconds, found.seconds, found.basis, found.records, found.also) == (None, None, None, (), ())


def test_a_setting_that_follows_the_target_is_no_other_work() -> None:
    known = record(cpu_seconds=1, settings={"arch": "8.0", "set": "full"})
    assert step(known, settings={"arch": "{sm.specific}", "set": "full"}).cpu_seconds == 1
    assert step(known, settings={"arch": "9.0a", "set": "full"}).cpu_seconds is None


def test_local_labels_are_one_release() -> None:
    assert step(record(cpu_seconds=1, versions="==2.9.1"), version="2.9.1+cu128").cpu_seconds == 1
    assert step(record(cpu_seconds=1, versions=">=2.9"), version="2.10.0rc1").cpu_seconds == 1


def test_each_quantity_has_its_own_best_record() -> None:
    time = record(basis="scaled", cpu_seconds=1, job_memory=3 * GB)
    disk = record(basis="reported", cpu_seconds=9, disk=20 * GB)
    found = step(disk, time)
    assert (found.cpu_seconds, found.memory, found.disk) == (1, 6 * GB, 20 * GB)
    assert (found.records, found.also, found.basis) == ((time, disk), (), "scaled")


def test_what_a_recipe_asks_for_counts_if_it_is_more() -> None:
    found = step(record(cpu_seconds=1, memory=GB, disk=GB), memory=5 * GB, disk=GB // 2)
    assert (found.memory, found.disk) == (5 * GB, GB)
    assert step().memory is None
    assert step(disk=GB).disk == GB


def test_what_is_done_is_not_done_again() -> None:
    found = step(record(cpu_seconds=100, disk=GB), done=0.75)
    assert (found.cpu_seconds, found.seconds, found.disk) == (25, 12.5, GB)
    assert step(record(cpu_seconds=100), done=1.0).cpu_seconds == 0


def test_sums_say_what_is_not_in_them() -> None:
    known = record(cpu_seconds=100, memory=GB)
    assert not whole(work(), records=(known,)).at_least
    assert whole(work(), work(name="other"), records=(known,)).at_least
    assert whole(work(), records=(record(cpu_seconds=1, at_least="without tests"),)).at_least
    found = whole(work(), work(name="other"), records=(known,))
    assert (found.cpu_seconds, found.seconds, found.memory) == (100, 50, GB)


def test_disk_is_what_stays_and_the_largest_folder_at_a_time() -> None:
    records = (record(name="a", disk=10), record(name="b", disk=6, keeps=0.5), record(name="c", disk=4, keeps=1.0))
    works = [work(name=name) for name in "abc"]
    assert whole(*works, records=records, download=100).disk == 100 + 10
    assert whole(works[1], works[2], records=records).disk == 3 + 4
    assert whole(works[2], works[0], records=records).disk == 4 + 10


def test_what_a_machine_lacks() -> None:
    small = Machine(cores=1, memory=GB, disk=GB)
    found = whole(work(), records=(record(memory=2 * GB, disk=3 * GB),), machine=small)
    assert found.lacks == ("too little memory: 1.0 of 2.0 GB", "too little disk: 1.0 of 3.0 GB")
    assert whole(work(), records=(record(disk=3 * GB),), machine=Machine(cores=1, memory=GB)).lacks == ()


def test_the_longest_step() -> None:
    records = (record(name="a", cpu_seconds=10), record(name="b", cpu_seconds=9, serial=1.0))
    longest = whole(work(name="a"), work(name="b"), records=records).longest
    assert longest
    assert longest.work.name == "b"
    assert whole(work(name="c"), records=records).longest is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (94.4, "94 s"), (599, "599 s"), (600, "10 min"), (3600, "1 h"), (15120, "4.2 h"), (360000, "100 h")],
)
def test_durations_for_a_person(seconds: float, text: str) -> None:
    assert spoken_time(seconds) == text


ROW = {"name": "thing", "basis": "measured", "by": "somebody", "how": "somehow", "cpu-seconds": 1}


@pytest.mark.parametrize(
    ("fault", "told"),
    [({"cpu-seconds": -1}, "cpu-seconds: must not be negative"), ({"serial": 1.5}, "serial: must be a share"),
     ({"versions": "new"}, "not a version specifier"), ({"basis": "here"}, "this machine's own"),
     ({"basis": "guessed"}, "basis"), ({"cpu-second": 1}, "unknown key 'component[0].cpu-second'")],
)  # fmt: skip
def test_faults_of_a_row(fault: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_records({"component": [{**ROW, **fault}], "step": []}, "measured.toml")
    assert told in str(caught.value)
    assert "component[0]" in str(caught.value)


def test_two_faults_are_told_together() -> None:
    rows = [{**ROW, "keeps": -1}, {**ROW, "disk": -1}]
    with pytest.raises(RecipeError, match="2 faults"):
        parse_records({"component": [], "step": rows}, "measured.toml")


def test_shipped_records_say_how_they_are_known() -> None:
    records = load_records()
    assert {one.name for one in records} >= {"torch", "flashinfer-jit-cache", "xgrammar", "compose", "pack"}
    for one in records:
        assert one.by
        assert one.how
        assert one.basis != "measured" or one.date
        assert one.basis != "scaled" or one.cpu_seconds


def test_pytorch_for_more_architectures_takes_longer() -> None:
    torch: dict[str, Any] = {"name": "torch", "version": "2.9.1", "settings": {"USE_CUDA": "1"}}
    one, two = (step(*load_records(), sms=sms, **torch) for sms in ((90,), (90, 120)))
    assert one.cpu_seconds
    assert two.cpu_seconds
    assert 0 < two.cpu_seconds - one.cpu_seconds < one.cpu_seconds
    assert (one.basis, bool(one.at_least)) == ("scaled", True)
    assert any(record.basis == "reported" for record in (*one.records, *one.also))

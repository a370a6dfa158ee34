"""What becomes of a target when a step fails that others need, too: at once, before it asked, or only in part.

Steps are performed by real processes; what they do is said by the recipe that their target names.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import pytest

from composer.errors import BuildError, FetchError, RecipeError
from composer.farm.drive import drive
from composer.farm.local import LocalPool
from composer.model.plan import WheelPlan
from composer.remote import Traffic
from composer.steps.build import Settings
from composer.steps.matrix import Aim, _Run
from composer.steps.matrix_report import Report
from composer.steps.matrix_step import Lack, Made, Order, Outcome, Packed, Planned, PlannedLayer
from composer.steps.outline import Request
from composer.steps.plan import Options
from composer.store import Store

PATIENCE = 20.0


def performed(task, _listener):
    """A step, as the words of its target's recipe say. Performed in other processes."""
    folder, words = task.order.output, (task.order.request.recipe or "").split()
    return Outcome(value=STEPS[task.step](task, folder, words), traffic=Traffic(fetched=1, fetched_bytes=10))


def planned(task, folder, words):
    """`fetch:x` lacks a file, `survey:k` a step; `layer:l` needs a layer. It is asked again until it has them all."""
    for word in words:
        kind, _, name = word.partition(":")
        if kind == "after":
            wait(folder / name)
    lacks = [Lack(step="fetch", key=name, subject=name, size=1) for kind, name in parts(words) if kind == "fetch"
             and not (folder / name).exists()]  # fmt: skip
    lacks += [Lack(step="survey", key=name, subject=name, size=1) for kind, name in parts(words) if kind == "survey"]
    if left := tuple(one for one in lacks if one.key not in task.tried):
        return left
    (folder / f"planned {task.subject}").touch()
    layers = [PlannedLayer(key=name, plan=wheel(name), size=1, known=None) for kind, name in parts(words)
              if kind == "layer"]  # fmt: skip
    names = [name for kind, name in parts(words) if kind == "name"]
    return Planned(name=names[0] if names else task.subject, layers=tuple(layers))


def wheel(name):
    return WheelPlan(name=name, version="1.0", filename="", artifact="", python="3.12",
                     bytecode=None, level=3, mtime=0)  # fmt: skip


def parts(words):
    return [tuple(word.split(":", 1)) for word in words if ":" in word]


def wait(path):
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def fetched(task, folder, _words):
    """Files are made; one that is called bad cannot be had. `late` comes when a second target waits for it."""
    if "late" in task.digests:
        wait(folder / "shared")
    for digest in task.digests - {"bad"}:
        (folder / digest).touch()
    if "bad" in task.digests:
        raise FetchError("no such file", where="bad")
    return Made(size=1)


def refused_if_bad(task, _folder, _words):
    if task.key == "bad":
        time.sleep(0.5)  # longer than it takes to see that no core is left for another step
        raise BuildError("cannot be made", where=task.key)
    return Made(size=1)


def packed(task, folder, _words):
    return Packed(path=folder / task.subject, sha256="0" * 64, size=1, up_to_date=False, parts={}, proving=0.0,
                  findings=())  # fmt: skip


STEPS = {"plan": planned, "fetch": fetched, "survey": refused_if_bad, "layer": refused_if_bad, "pack": packed}


@dataclass
class Matrix:
    """Targets that are words, and how they are built."""

    folder: Path
    told: list = field(default_factory=list)

    def run(self, *recipes: str, cores: int = 1, keep_going: bool = True) -> Report:
        common = Order(request=Request(), options=Options(), settings=Settings(jobs=1), output=self.folder)
        run = _Run([self.aim(common, number, words) for number, words in enumerate(recipes)], self.hear)
        results = SimpleQueue()
        pool = LocalPool(performed, results, cores=cores, memory=1 << 40)
        run.begin(remote=False, store=Store(self.folder / "store"))
        drive(run.graph, run, results, here=pool, there=pool, keep_going=keep_going)
        run.end()
        return run.board.report(1.0)

    def aim(self, common: Order, number: int, words: str) -> Aim:
        order = Order(request=Request(recipe=words), options=common.options, settings=common.settings,
                      output=common.output)  # fmt: skip
        return Aim(name=f"target{number}", order=order, recipe=words, sms=(90,), isa="avx2")

    def hear(self, change, board) -> None:
        self.told.append(change)
        if (change.kind, change.step) == ("started", "fetch"):
            (self.folder / "fetching").touch()
        if any(one.step == "fetch" and len(one.owners) > 1 for one in board.records.values()):
            (self.folder / "shared").touch()


@pytest.fixture
def matrix(tmp_path: Path) -> Matrix:
    return Matrix(tmp_path)


def fates(report):
    return [one.fate for one in report.targets]


@pytest.mark.parametrize("words", ["survey:bad", "layer:bad", "fetch:bad"])
def test_a_step_that_failed_before_a_target_asked_for_it_fails_that_one_for_the_same_reason(matrix, words):
    """With one core the first target is done before the second is planned."""
    report = matrix.run(words, words, "layer:good")
    assert fates(report) == ["failed", "failed", "built"]
    first, second, _ = report.targets
    assert first.reason == second.reason != ""
    assert first.exit_code == second.exit_code == (FetchError if "fetch" in words else BuildError).exit_code
    told = [(change.targets, change.text) for change in matrix.told if change.kind == "failed"]
    assert told == [(("target0",), first.reason), (("target1",), first.reason)]
    assert not (matrix.folder / "planned target1").exists() or words == "layer:bad"


def test_without_keep_going_what_was_not_begun_is_given_up(matrix):
    report = matrix.run("layer:bad", "layer:bad", keep_going=False)
    assert fates(report) == ["failed", "given up"]
    assert "--keep-going" in report.targets[1].reason


def test_a_file_that_cannot_be_had_fails_only_who_needs_it(matrix):
    """The second asks while the first one's download is under way, for one of its files, which arrives."""
    report = matrix.run("fetch:bad fetch:late", "fetch:late after:fetching layer:good", cores=2)
    assert fates(report) == ["failed", "built"]
    # What the first target's failed download brought is not fetched again.
    assert [change.subject for change in matrix.told if (change.kind, change.step) == ("started", "fetch")] == [
        "2 files"
    ]


def test_who_shares_the_file_that_cannot_be_had_asks_once_more_and_fails(matrix):
    report = matrix.run("fetch:bad fetch:late", "fetch:late fetch:bad fetch:more after:fetching", cores=2)
    assert fates(report) == ["failed", "failed"]
    assert report.targets[0].reason == report.targets[1].reason
    assert (matrix.folder / "more").exists()


def test_two_targets_of_one_name_are_one_bundle_and_one_fault(matrix):
    report = matrix.run("name:twin layer:good", "name:twin layer:good", "layer:good")
    assert fates(report) == ["built", "failed", "built"]
    assert (report.remote.fetched, report.remote.fetched_bytes) == (6, 60)
    assert "its bundle would be twin, as that of target0" in report.targets[1].reason
    assert report.targets[1].exit_code == RecipeError.exit_code

"""Steps in processes of this machine: bounded by cores and memory, and one that is killed runs again."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import pytest

from composer.errors import BuildError, RecipeError
from composer.events import Event
from composer.farm.drive import STARTS, drive
from composer.farm.graph import Cost, Graph, Node
from composer.farm.local import LocalPool


def act(work, listener):
    """What a step does, by the first word of its work. Performed in other processes."""
    deed, _, word = work.partition(" ")
    if deed == "say":
        listener(Event(step="say", subject=word, note="heard"))
        return word
    if deed == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "die-once" and not Path(word).exists():
        Path(word).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "refuse":
        raise RecipeError("cannot be", where=word, fix="Mend it.")
    if deed == "break":
        raise ZeroDivisionError(word)
    if deed == "span":
        begun = time.monotonic()
        time.sleep(0.2)
        return begun, time.monotonic()
    if deed == "hang":
        Path(word).touch()
        time.sleep(60)
    return os.getpid()


@dataclass
class Told:
    """Everything that the owner of steps is told."""

    values: dict = field(default_factory=dict)
    faults: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    begun: list = field(default_factory=list)

    def started(self, node):
        self.begun.append(node.key)

    def finished(self, node, done):
        self.values[node.key] = done.value
        if done.value == "nonsense":
            raise RecipeError("makes no sense")
        return True

    def failed(self, node, fault):
        self.faults[node.key] = fault

    def settled(self):
        pass

    def noted(self, text):
        self.notes.append(text)

    def idle(self):
        pass


@dataclass
class Bench:
    """A graph of steps that are words, and how it is run."""

    graph: Graph = field(default_factory=Graph)
    told: Told = field(default_factory=Told)
    heard: list = field(default_factory=list)

    def add(self, key, work, needs=(), **cost):
        self.graph.add(Node(key=key, name=key, work=work, cost=Cost(**cost)), needs)

    def run(self, *, cores=2, memory=100, keep_going=False):
        results = SimpleQueue()
        pool = LocalPool(act, results, cores=cores, memory=memory, listener=self.heard.append)
        drive(self.graph, self.told, results, here=pool, there=pool, keep_going=keep_going)
        return self.told


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_steps_return_values_and_are_heard(bench):
    bench.add("a", "say something")
    bench.add("b", "say more", ["a"])
    assert bench.run(cores=1).values == {"a": "something", "b": "more"}
    assert [event.subject for event in bench.heard] == ["something", "more"]


def test_a_killed_step_runs_again_and_costs_no_other(bench, tmp_path):
    bench.add("a", f"die-once {tmp_path / 'died'}")
    bench.add("b", "span")
    told = bench.run()
    assert set(told.values) == {"a", "b"}
    assert sorted(told.begun) == ["a", "a", "b"]
    assert told.notes == ["a: its process was ended (signal 9); it is started again"]


def test_a_step_that_kills_every_process_fails(bench):
    bench.add("a", "die")
    bench.add("b", "say never", ["a"])
    told = bench.run()
    assert told.begun == ["a"] * STARTS
    assert isinstance(told.faults["a"], BuildError)
    assert bench.graph.cause("b") == "a"
    assert not told.values


def test_a_value_that_its_owner_refuses_is_a_failure(bench):
    bench.add("a", "say nonsense")
    bench.add("b", "say never", ["a"])
    bench.add("c", "say well")
    told = bench.run(cores=1, keep_going=True)
    assert (set(told.faults), bench.graph.state("b"), bench.graph.state("c")) == ({"a"}, "skipped", "done")


def test_a_fault_arrives_whole(bench):
    bench.add("a", "refuse recipe.toml")
    fault = bench.run().faults["a"]
    assert (type(fault), str(fault)) == (RecipeError, "recipe.toml: cannot be\n  fix: Mend it.")


def test_a_bug_of_a_step_is_a_fault_that_says_where(bench):
    bench.add("a", "break this")
    fault = bench.run().faults["a"]
    assert fault.what == "ZeroDivisionError: this"
    assert "in act" in fault.why


@pytest.mark.parametrize(("keep_going", "done"), [(False, set()), (True, {"other"})])
def test_a_failure_stops_the_rest_unless_told_to_go_on(bench, keep_going, done):
    bench.add("bad", "refuse it")
    bench.add("other", "say well")
    told = bench.run(cores=1, keep_going=keep_going)
    assert set(told.values) == done


def overlap(told):
    (first, second) = sorted(told.values.values())
    return second[0] < first[1]


@pytest.mark.parametrize(("cores", "cost", "together"), [
    (2, {}, True), (1, {}, False), (2, {"memory": 60}, False), (2, {"memory": 50}, True), (2, {"cores": 9}, False),
])  # fmt: skip
def test_cores_and_memory_bound_what_runs_together(bench, cores, cost, together):
    bench.add("warm up", "say hello")
    bench.add("a", "span", ["warm up"], **cost)
    bench.add("b", "span", ["warm up"], **cost)
    told = bench.run(cores=cores)
    del told.values["warm up"]
    assert len(told.values) == 2
    if not together:
        assert not overlap(told)


def test_closing_ends_what_is_under_way(tmp_path):
    pool = LocalPool(act, SimpleQueue(), cores=1, memory=1)
    started = tmp_path / "started"
    pool.start(Node(key="a", name="a", work=f"hang {started}"))
    while not started.exists():
        time.sleep(0.01)
    (child,) = (child for child, _ in pool._busy.values())
    begun = time.monotonic()
    pool.close()
    assert time.monotonic() - begun < 5
    assert child._process.exitcode is not None


def test_small_steps_do_not_overtake_a_large_one_for_ever(bench):
    bench.add("first", "span")
    bench.graph.add(Node(key="large", name="large", work="span", cost=Cost(cores=2), rank=(0.0,)))
    for number in range(4):
        bench.graph.add(Node(key=str(number), name=str(number), work="span", rank=(1.0,)))
    told = bench.run()
    assert told.begun[:2] == ["first", "large"]
    assert len(told.values) == 6

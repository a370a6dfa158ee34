"""What may start, what waits, what is never run: the bookkeeping of a graph of steps."""

from __future__ import annotations

import random

import pytest

from composer.farm.graph import Graph, Node


def node(key, *rank):
    return Node(key=key, name=key, work=key, rank=tuple(map(float, rank)))


def made(*edges):
    """A graph of `key needs...` lines."""
    graph = Graph()
    for line in edges:
        key, *needs = line.split()
        graph.add(node(key), needs)
    return graph


def ready(graph):
    return [one.key for one in graph.ready()]


def run(graph, key):
    graph.start(key)
    graph.finish(key)


def run_into_failure(graph, key):
    graph.start(key)
    graph.fail(key)


def test_a_step_waits_for_what_it_needs():
    graph = made("a", "b a", "c a b")
    assert ready(graph) == ["a"]
    run(graph, "a")
    assert ready(graph) == ["b"]
    graph.start("b")
    assert ready(graph) == []
    graph.finish("b")
    assert ready(graph) == ["c"]


def test_a_key_that_is_there_is_shared():
    graph = made("a")
    assert graph.add(node("b"), ["a"])
    assert not graph.add(node("b"))
    assert ready(graph) == ["a"]


def test_the_least_rank_starts_first():
    graph = Graph()
    for key, *rank in (("late", 1, 0), ("small", 0, 1, -5), ("large", 0, 1, -9)):
        graph.add(node(key, *rank))
    assert ready(graph) == ["large", "small", "late"]


def test_a_running_step_may_turn_out_to_need_more():
    graph = made("plan", "pack plan")
    graph.start("plan")
    graph.add(node("survey"))
    graph.require("plan", ["survey"])
    graph.again("plan")
    graph.change("plan", "another work")
    assert ready(graph) == ["survey"]
    run(graph, "survey")
    (plan,) = graph.ready()
    assert (plan.key, plan.work) == ("plan", "another work")
    graph.start("plan")
    assert graph.starts("plan") == 2


def test_a_failure_ends_what_needs_it_and_nothing_else():
    graph = made("a", "x", "b a", "c b x", "y x")
    graph.start("a")
    graph.fail("a")
    assert [graph.state(key) for key in "abcxy"] == ["failed", "skipped", "skipped", "waiting", "waiting"]
    assert [graph.cause(key) for key in "abcxy"] == ["a", "a", "a", None, None]
    assert ready(graph) == ["x"]


def test_what_comes_to_need_a_failed_step_is_never_run():
    graph = made("a", "b", "c b")
    graph.start("a")
    graph.fail("a")
    graph.require("b", ["a"])
    assert (graph.state("b"), graph.state("c")) == ("skipped", "skipped")
    graph.add(node("d"), ["c"])
    assert graph.state("d") == "skipped"
    assert graph.cause("d") == "a"
    assert graph.ended


def test_a_running_step_that_turns_out_to_need_a_failed_one_is_never_run_again():
    graph = made("shared", "plan", "pack plan")
    run_into_failure(graph, "shared")
    graph.start("plan")
    graph.require("plan", ["shared"])
    assert graph.running == ["plan"]
    graph.again("plan", anew=True)
    assert [graph.state(key) for key in ("plan", "pack")] == ["skipped", "skipped"]
    assert graph.cause("pack") == "shared"
    assert graph.ended


def test_what_fails_while_a_step_runs_that_needs_it_is_noticed_when_it_waits_again():
    graph = made("shared", "plan", "pack plan")
    graph.start("plan")
    graph.require("plan", ["shared"])
    run_into_failure(graph, "shared")
    assert graph.state("pack") == "waiting"
    graph.again("plan")
    assert graph.cause("pack") == "shared"


@pytest.mark.parametrize("end", [run, lambda graph, key: run_into_failure(graph, key)])
def test_a_step_that_follows_waits_for_an_end_of_any_kind(end):
    graph = made("other", "a", "b a")
    graph.follow("a", ["other"])
    assert ready(graph) == ["other"]
    end(graph, "other")
    assert ready(graph) == ["a"]
    run(graph, "a")
    assert ready(graph) == ["b"]


@pytest.mark.parametrize("wait", [Graph.require, Graph.follow])
@pytest.mark.parametrize("need", ["a", "b", "c", "d"])
def test_a_circle_is_refused(need, wait):
    graph = made("a", "b a", "c b", "d")
    graph.follow("d", ["c"])
    with pytest.raises(ValueError, match="which needs it"):
        wait(graph, "a", [need])


def test_an_unknown_need_is_refused():
    with pytest.raises(KeyError):
        made("a nowhere")


@pytest.mark.parametrize("seed", range(20))
def test_every_order_of_ends_runs_each_step_once_after_its_needs(seed):
    chance = random.Random(seed)
    needs = {str(number): [str(other) for other in range(number) if chance.random() < 0.2] for number in range(30)}
    graph = made(*(" ".join([key, *found]) for key, found in needs.items()))
    done, running = [], []
    while not graph.ended:
        for one in graph.ready():
            graph.start(one.key)
            running.append(one.key)
        assert sorted(graph.running) == sorted(running)
        ended = running.pop(chance.randrange(len(running)))
        assert set(needs[ended]) <= set(done)
        graph.finish(ended)
        done.append(ended)
    assert sorted(done) == sorted(needs)


def test_asking_again_is_not_losing_a_worker():
    graph = made("plan")
    graph.start("plan")
    graph.again("plan", anew=True)
    graph.start("plan")
    assert graph.starts("plan") == 1
    graph.again("plan")
    graph.start("plan")
    assert graph.starts("plan") == 2

"""A matrix on a real dask.distributed cluster on loopback: a scheduler and workers that are processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock

from tests.integration.conftest import First
from tests.integration.test_matrix import performed, read, words
from tests.stack import Stack

distributed = pytest.importorskip("distributed")

#: Seconds for anything of the cluster to happen.
PATIENCE = 60.0


@dataclass(frozen=True)
class Cluster:
    """A scheduler, whom workers are added to. Its processes end with the block that it is used in."""

    folder: Path
    processes: list[subprocess.Popen[str]]

    @property
    def address(self) -> str:
        """HOST:PORT."""
        found = json.loads((self.folder / "scheduler.json").read_text())["address"]
        return found.removeprefix("tcp://")

    def start(self, program: str, *options: str, environ: dict[str, str]) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *options]
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(command, env=environ, cwd=self.folder, stdout=log, stderr=log, text=True)
        self.processes.append(process)
        return process

    def worker(self, stack: Stack, *options: str) -> subprocess.Popen[str]:
        """A worker with one thread, in the world of a stack."""
        return self.start("worker", f"tcp://{self.address}", "--nthreads", "1", "--no-nanny", "--no-dashboard",
                          "--host", "127.0.0.1", *options, environ=stack.environ)  # fmt: skip


def until(found, what: str):
    """The first thing that is found, or a failure that says what was waited for."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {PATIENCE} s")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler without workers."""
    made = Cluster(tmp_path / "cluster", [])
    made.folder.mkdir()
    file = made.folder / "scheduler.json"
    try:
        made.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file),
                   environ=dict(os.environ))  # fmt: skip
        until(lambda: file.exists() and file.read_text().endswith("}"), "scheduler")
        yield made
    finally:
        for process in made.processes:
            process.kill()
        for process in made.processes:
            process.wait()


def layer_of(store: Path, name: str) -> str:
    """The key of a layer that an earlier build made."""
    for path in (store / "objects/layer").rglob("*.json"):
        if msgspec.json.decode(path.read_bytes())["name"] == name:
            return path.stem
    raise AssertionError(f"no layer of {name}")


def test_the_step_of_a_killed_worker_is_done_by_another(warm: Stack, first: First, cluster: Cluster) -> None:
    workers = {process.pid: process for process in (cluster.worker(warm), cluster.worker(warm))}
    with distributed.Client(f"tcp://{cluster.address}", set_as_default=False) as client:
        client.wait_for_workers(2, timeout=PATIENCE)
        pids = client.run(os.getpid)
        assert set(pids.values()) == workers.keys()
        # Whoever composes this layer waits in the middle of it, until this is released.
        held = FileLock(warm.store / "locks" / f"layer-{layer_of(first.stack.store, 'core-lib')}.lock")
        with held:
            process = warm.start(words(warm, "--on", f"dask://{cluster.address}"))

            def owner() -> str:
                under_way = client.processing().items()
                return next((one for one, keys in under_way if any(k.startswith("layer-core-lib") for k in keys)), "")

            victim = until(owner, "worker that composes the layer")
            workers[pids[victim]].send_signal(signal.SIGKILL)
            survivor = until(lambda: (now := owner()) != victim and now, "worker that takes the layer over")
            assert workers[pids[survivor]].poll() is None
        done = warm.end(process).ok()
    changes, report = read(done)
    assert [one["fate"] for one in report["targets"]] == ["built", "built"]
    assert warm.digest() == first.digest
    assert performed(changes)["layer"].count("core-lib") == 1
    assert f"worker {victim} is gone; what it was doing is done elsewhere" in [change["text"] for change in changes]
    columns = [target["columns"]["layers"] for target in report["targets"]]
    assert [(one["steps"] + one["known"], one["shared"]) for one in columns] == [(4, 0), (0, 4)]


def test_a_worker_with_another_store_is_refused(stack: Stack, cluster: Cluster) -> None:
    cluster.worker(stack.fresh(cluster.folder))
    done = stack.run(words(stack, "--on", f"dask://{cluster.address}"))
    done.refused(10, "cannot work with this machine", "a store with what is put into this one", "WHEEL_COMPOSER_STORE")
    assert not stack.output.exists()


def test_workers_with_stores_of_their_own_share_a_remote(warm: Stack, first: First, cluster: Cluster) -> None:
    remote = {"WHEEL_COMPOSER_REMOTE": (cluster.folder / "remote").as_uri()}
    shutil.copytree(warm.store, cluster.folder / "store")
    cluster.worker(warm.fresh(cluster.folder, extra=remote))
    done = warm.fresh(warm.output, store=warm.store, extra=remote)
    changes, report = read(done.run(words(done, "--on", f"dask://{cluster.address}", sm="90")).ok())
    assert report["targets"][0]["fate"] == "built"
    assert done.digest() == first.digest
    assert sorted(performed(changes)["layer"]) == ["app", "core-lib", "hook", "native-ext"]
    made, fetched = (set((store / "objects/blob").rglob("*.zst")) for store in (cluster.folder / "store", warm.store))
    assert {path.name for path in made} == {path.name for path in fetched} != set()
    assert {path.stat().st_ino for path in made}.isdisjoint(path.stat().st_ino for path in fetched)


def test_a_large_step_asks_for_memory_that_a_worker_declares(cluster: Cluster, stack: Stack) -> None:
    from queue import SimpleQueue

    from composer.farm.cluster import LARGE, ClusterPool
    from composer.farm.graph import Cost, Node

    cluster.worker(stack)
    large = cluster.worker(stack, "--resources", f"MEMORY={LARGE}")
    results = SimpleQueue()
    pool = ClusterPool(f"dask://{cluster.address}", pid_of, results)
    try:
        until(lambda: (pool.watch(), len(pool._workers) == 2)[1], "second worker")
        for key, memory in (("a", LARGE), ("b", LARGE), ("c", LARGE + 1)):
            pool.start(Node(key=key, name=key, work=None, cost=Cost(memory=memory)))
        found = {(one := results.get(timeout=PATIENCE)).key: one for _ in range(3)}
    finally:
        pool.close()
    assert (found["a"].value, found["b"].value) == (large.pid, large.pid)
    assert found["c"].fault.what == "no worker has the memory for it"
    assert f"--resources MEMORY={LARGE + 1}" in found["c"].fault.fix


def test_two_farms_on_one_scheduler_get_their_own_steps_done(cluster: Cluster, stack: Stack) -> None:
    from queue import SimpleQueue

    from composer.farm.cluster import ClusterPool
    from composer.farm.graph import Node

    cluster.worker(stack)
    farms = {}
    try:
        for word in ("one", "two"):
            results: SimpleQueue = SimpleQueue()
            farms[word] = ClusterPool(f"dask://{cluster.address}", word_of, results), results
            farms[word][0].start(Node(key="plan of 0", name="plan small", work=word))
        assert {word: results.get(timeout=PATIENCE).value for word, (_, results) in farms.items()} == {
            "one": "one", "two": "two",
        }  # fmt: skip
    finally:
        for pool, _ in farms.values():
            pool.close()


def test_two_matrices_on_one_cluster_make_every_layer_once(
    warm: Stack, first: First, cluster: Cluster, tmp_path: Path
) -> None:
    for _ in range(2):
        cluster.worker(warm)
    both = [warm, warm.fresh(tmp_path / "other", store=warm.store)]
    before = set((warm.store / "objects/layer").rglob("*.zst"))
    runs = [one.start(words(one, "--on", f"dask://{cluster.address}", sm="90")) for one in both]
    for one, run in zip(both, runs, strict=True):
        read(one.end(run).ok())
        assert one.digest() == first.digest
    assert len(set((warm.store / "objects/layer").rglob("*.zst")) - before) == 4


def test_a_scheduler_that_dies_ends_the_run(stack: Stack, cluster: Cluster) -> None:
    cluster.worker(stack)
    process = stack.start(words(stack, "--on", f"dask://{cluster.address}", sm="90"))
    assert process.stdout
    for line in process.stdout:
        if json.loads(line)["change"]["kind"] == "started":
            break
    cluster.processes[0].kill()
    stack.end(process).refused(10, "its scheduler does not answer any more", cluster.address)


def pid_of(_work, _listener):
    return os.getpid()


def word_of(work, _listener):
    return work


@pytest.mark.parametrize(("on", "text"), [("dask://127.0.0.1:9", "no scheduler answers"), ("slurm", "is no cluster")])
def test_a_cluster_that_is_none_is_refused(stack: Stack, on: str, text: str) -> None:
    stack.run(words(stack, "--on", on)).refused(10, text, on)

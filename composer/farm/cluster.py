"""Perform steps on an existing dask.distributed cluster (https://distributed.dask.org).

Its scheduler gives the step of a lost worker to another one, so a step may run twice; each leaves what it made in the
store, whole or not at all, under a key that only depends on its inputs.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from composer.errors import BuildError, ComposerError, HostError
from composer.events import silent
from composer.farm.drive import STARTS, no_workers
from composer.farm.graph import Cost, Node
from composer.farm.pool import Done, Perform, Timed, timed

if TYPE_CHECKING:
    from distributed import Client, Future

SCHEME = "dask://"
#: The resource of a worker that large steps ask for, in bytes: `dask worker --resources MEMORY=64e9`.
MEMORY = "MEMORY"
#: Bytes from which a step is large. Smaller ones also run where no memory is declared.
LARGE = 4 << 30
_CONNECT = 5.0
#: Seconds that a cluster may be without any worker, as when a job queue is about to start them.
_PATIENCE = 60.0
#: Steps sent ahead for each thread, so that none waits for the way to the driver and back.
_AHEAD = 2


class ClusterPool:
    """The workers of a cluster, through its scheduler."""

    def __init__(self, address: str, perform: Perform, results: SimpleQueue[Done]) -> None:
        """HostError when dask is not installed here, or nothing answers at `dask://HOST:PORT`."""
        self._address = address
        self._perform = perform
        self._results = results
        self._client = _connected(address)
        self._futures: dict[str, Future[Timed]] = {}
        self._name = uuid.uuid4().hex
        self._sent = 0
        self._alone_since: float | None = None
        self._workers = self._look()

    def ask_all(self, question: Callable[..., Any], *words: Any) -> Mapping[str, Any]:  # noqa: ANN401
        """What each worker answers now, by its address. HostError when one cannot be asked, or there is none."""
        self._wait_for_one()
        try:
            return dict(self._client.run(question, *words))
        except ComposerError:
            raise
        except Exception as fault:
            raise HostError("a worker cannot be asked", where=self._address, why=f"{type(fault).__name__}: {fault}",
                            fix="Install the same composer on all workers as here.") from fault  # fmt: skip

    def fits(self, cost: Cost) -> bool:
        """Whether the scheduler has less than it could soon begin; it knows what fits which worker."""
        del cost
        threads = sum(int(one["nthreads"]) for one in self._workers.values())
        return len(self._futures) < max(1, _AHEAD * threads)

    def start(self, node: Node) -> None:
        """Send a step."""
        self._sent += 1
        asked = {MEMORY: node.cost.memory} if self._is_reserved(node.cost) else None
        if asked and not any(self._memory(one) >= node.cost.memory for one in self._workers.values()):
            self._results.put(Done(key=node.key, fault=_too_large(self._address, node)))
            return
        with _told(self._address):
            future = self._client.submit(timed, self._perform, node.work, silent, key=self._key(node),
                                         priority=-self._sent, resources=asked, pure=False)  # fmt: skip
        self._futures[node.key] = future
        future.add_done_callback(lambda ended: self._end(node, ended))

    def watch(self) -> Sequence[str]:
        """Which workers came and went. HostError when there was none for a minute."""
        before, self._workers = self._workers, self._look()
        if self._workers:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
        elif time.monotonic() - self._alone_since > _PATIENCE:
            raise no_workers(self._address, _PATIENCE)
        left = [f"worker {one} is gone; what it was doing is done elsewhere" for one in before.keys() - self._workers]
        return [*left, *(f"worker {one} is new" for one in self._workers.keys() - before)]

    def close(self) -> None:
        """Give up what is under way, and leave the cluster as it was."""
        futures = list(self._futures.values())
        self._futures.clear()
        with contextlib.suppress(Exception):  # of a scheduler that is gone, there is nothing to give back
            self._client.cancel(futures)
        with contextlib.suppress(Exception):
            self._client.close()

    def _look(self) -> dict[str, dict[str, Any]]:
        with _told(self._address):
            return dict(self._client.scheduler_info(n_workers=-1)["workers"])

    def _wait_for_one(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=_PATIENCE)
        except OSError as fault:
            raise no_workers(self._address, _PATIENCE) from fault
        self._workers = self._look()

    def _key(self, node: Node) -> str:
        """Dask groups by what precedes the first part that is no word, and forgets nothing of a key that was there.

        Its scheduler takes equal keys of two drivers for one step, whatever each of them wants done.
        """
        return f"{node.name.replace(' ', '-')}-{node.key[:16]}-{self._name}-{self._sent}"

    def _is_reserved(self, cost: Cost) -> bool:
        """Whether a step asks for memory: it is large, and workers say how much they have."""
        return cost.memory >= LARGE and any(self._memory(one) for one in self._workers.values())

    @staticmethod
    def _memory(worker: Mapping[str, Any]) -> float:
        return float(worker.get("resources", {}).get(MEMORY, 0))

    def _end(self, node: Node, future: Future[Timed]) -> None:
        if self._futures.pop(node.key, None) is None:
            return
        if future.status == "finished":
            self._results.put(future.result().done(node.key))
        elif future.status == "error":
            self._results.put(_broken(node, future.exception()))
        else:
            self._results.put(Done(key=node.key, lost=f"the cluster gave it up ({future.status})"))


@contextlib.contextmanager
def _told(address: str) -> Iterator[None]:
    """Translate whatever a client raises that lost its scheduler: Dask has no class of its own for all of that."""
    try:
        yield
    except Exception as fault:
        raise HostError("its scheduler does not answer any more", where=address, why=f"{type(fault).__name__}: {fault}",
                        fix="Run the same command again: what is done stays done.") from fault  # fmt: skip


def _connected(address: str) -> Client:
    try:
        from distributed import Client
    except ImportError as fault:
        raise HostError("a cluster is reached through dask.distributed, which is not installed", where="--on",
                        why=str(fault), fix="pip install 'wheel-composer[farm]'") from fault  # fmt: skip
    try:
        return Client("tcp://" + address.removeprefix(SCHEME), timeout=_CONNECT, set_as_default=False)
    except (OSError, ValueError) as fault:
        raise HostError("no scheduler answers", where=address, why=str(fault) or None,
                        fix="Give the address that it prints, as dask://HOST:PORT.") from fault  # fmt: skip


def _broken(node: Node, fault: BaseException | None) -> Done:
    from distributed import KilledWorker

    if isinstance(fault, KilledWorker):
        return Done(key=node.key, fault=BuildError(
            "lost its worker each time", where=node.name, why=f"at least {STARTS} workers were lost",
            fix="It may need more memory than they have: see their logs."))  # fmt: skip
    return Done(key=node.key, fault=HostError(
        "a worker could not run it", where=node.name, why=f"{type(fault).__name__}: {fault}",
        fix="Install the same composer on all workers as here."))  # fmt: skip


def _too_large(address: str, node: Node) -> HostError:
    return HostError("no worker has the memory for it", where=node.name,
                     why=f"it takes about {node.cost.memory / 1e9:.1f} GB, and no worker of {address} declares as much",
                     fix=f"Start one with --resources {MEMORY}={node.cost.memory}.")  # fmt: skip

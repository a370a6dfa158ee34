"""A whole matrix of targets as one graph of steps: what targets share is done once, and what the store has is not done.

The graph grows while it runs. A plan says what it lacks (downloads, surveys, shared objects to be read); that becomes
steps of its own, and then the plan is asked again. Its layers are steps, too, and the bundle waits for them. The key of
a step is the store's key of what it makes, so two targets, or two plans, that need the same wait for the same.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from composer.errors import ComposerError, HostError, RecipeError
from composer.events import Listener, silent
from composer.farm.cluster import SCHEME, ClusterPool
from composer.farm.drive import drive
from composer.farm.graph import Cost, Graph, Node
from composer.farm.local import LocalPool
from composer.farm.pool import Done, Pool
from composer.model.target import Targets, parse_gpu, parse_isa, parse_sms, sm_label, tried
from composer.model.variant import parse_variants
from composer.steps.inputs import read_inputs
from composer.steps.load import LoadedRecipe, load_recipe, load_targets
from composer.steps.matrix_report import Board, Record, Report, Row
from composer.steps.matrix_step import (
    MEETING,
    Lack,
    Made,
    Order,
    Outcome,
    Packed,
    Planned,
    Step,
    Task,
    meet,
    perform,
)
from composer.steps.outline import DEFAULT_RECIPE, Request, draft
from composer.steps.source_machine import memory_here
from composer.store import Store, key_of

#: Bytes that a step holds beside the wheel that it maps. With the SGLang stack 150 MB to plan and 500 MB for torch's
#: layer were seen; packing imports SGLang in two processes.
_PLAN_MEMORY = 400 << 20
_LAYER_MEMORY = 600 << 20
_PACK_MEMORY = 2 << 30
_OTHER_MEMORY = 300 << 20
#: What of one target starts first: the later a step is on the way to its bundle, the sooner.
_ORDER: tuple[Step, ...] = ("pack", "layer", "objects", "survey", "interpreter", "source", "fetch", "plan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What the user wants: every SM and GPU with every instruction set of every recipe, and every variant.

    order: what all have in common; its request's recipe, sm, gpus, isa and variant are not looked at. sms: each an SM,
    several that share a bundle (`80+90`), or `all`, which is each of them. gpus, variants: names. recipes: of no name
    is the default one. shard: only every n-th target, from the i-th (i, n), of those that are not refused.
    """

    order: Order
    recipes: Sequence[str] = ()
    sms: Sequence[str] = ()
    gpus: Sequence[str] = ()
    isas: Sequence[str] = ()
    variants: Sequence[str] = ()
    shard: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where to work. cores, memory: what steps here may take together, memory in bytes. on: `dask://HOST:PORT`.

    keep_going: a step that fails ends only what depends on it.
    """

    cores: int
    memory: int
    on: str | None = None
    keep_going: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """One target of a matrix. name: what it is called until its bundle has a name. recipe: as `--recipe` spells it.

    sms: ascending; none where a variant is refused that is for all. python: as it is asked for, or the recipe's first.
    refused: why it cannot be built; nothing for one that is.
    """

    name: str
    order: Order
    recipe: str
    sms: tuple[int, ...]
    isa: str
    python: str = ""
    refused: tuple[RecipeError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happened: to a step, a target, or a worker; `tick` when nothing did for a second.

    text: of a fault, a reason or a note. targets: their names. bytes: of what the step made.
    """

    kind: Literal["refused", "started", "done", "failed", "target", "note", "tick"]
    step: str = ""
    subject: str = ""
    targets: tuple[str, ...] = ()
    seconds: float = 0.0
    bytes: int = 0
    text: str = ""


Told = Callable[[Change, Board], None]


# --- which targets ----------------------------------------------------------------------------------------------------


def aims(ask: Ask) -> list[Aim]:
    """The targets in the order in which they were named, each once, and those that are refused with their reason.

    RecipeError for names that are not known, for SMs or GPUs without an instruction set or the other way round, and
    when every target is refused.
    """
    targets = load_targets()
    found = [*_combined(ask, targets), *_named(ask, targets)]
    if all(one.refused for one in found):
        RecipeError.collect(list({str(fault): fault for one in found for fault in one.refused}.values()))
    distinct: dict[tuple[object, ...], Aim] = {}
    for one in found:
        distinct.setdefault((one.recipe, one.sms, one.isa, one.python, one.name if one.refused else ""), one)
    part, parts = ask.shard
    chosen = [one for one in distinct.values() if not one.refused][part - 1 :: parts]
    return [one for one in distinct.values() if one.refused or one in chosen]


def _combined(ask: Ask, targets: Targets) -> Iterator[Aim]:
    """Every SM and GPU with every instruction set of every recipe."""
    faults: list[RecipeError] = []
    parsed = [
        one for text in ask.sms if (sms := tried(parse_sms, text, targets, faults)) is not None
        for one in ([sms] if sms else [(int(sm),) for sm in sorted(targets.sm, key=int)])
    ]  # fmt: skip
    gpus = [gpu for text in ask.gpus if (gpu := tried(parse_gpu, text, targets, faults))]
    isas = [isa for text in ask.isas if (isa := tried(parse_isa, text, targets, faults))]
    RecipeError.collect([*faults, *_missing(ask)])
    places = [(sm_label(sms), Request(sm="+".join(map(str, sms)))) for sms in parsed]
    places += [(gpu.name, Request(gpus=(gpu.name,))) for gpu in gpus]
    machines = list(dict.fromkeys(targets.isa[isa].machine for isa in isas))
    for name in ask.recipes or ([DEFAULT_RECIPE] if places else []):
        loaded = {one: load_recipe(name, ask.order.request.overlays, one) for one in machines}
        for isa, (place, asked) in itertools.product(isas, places):
            recipe = loaded[targets.isa[isa].machine]
            order = _order(ask, recipe=name, sm=asked.sm, gpus=asked.gpus, isa=isa)
            yield _aim(f"{Path(name).name.removesuffix('.toml')} {place} {isa}", order, targets, recipe)


def _missing(ask: Ask) -> Iterator[RecipeError]:
    """Half of a target. Variants name both halves themselves."""
    halves = {"--sm or --gpu": ask.sms or ask.gpus, "--isa": ask.isas}
    if ask.variants and not any(halves.values()):
        return
    for option, given in halves.items():
        if not given:
            yield RecipeError(f"missing {option}", where="target", fix="Give both, or --variant alone.")


def _named(ask: Ask, targets: Targets) -> Iterator[Aim]:
    """The variants, each of the recipe that is asked for of its name and CUDA, or else of a shipped one."""
    for one in parse_variants(ask.variants, targets):
        machine = targets.isa[one.isa].machine
        offered = {name: load_recipe(name, (), machine).recipe for name in ask.recipes}
        own = [name for name, recipe in offered.items() if (recipe.name, recipe.cuda) == (one.stack, one.cuda)]
        order = _order(ask, recipe=next(iter(own), None), sm=None, gpus=(), isa=None, variant=one.name)
        yield _aim(one.name, order, targets)


def _order(ask: Ask, **target: Any) -> Order:  # noqa: ANN401
    return replace(ask.order, request=replace(ask.order.request, **{"variant": None, **target}))


def _aim(name: str, order: Order, targets: Targets, loaded: LoadedRecipe | None = None) -> Aim:
    """A target, and why it cannot be built, as far as that is known without looking for anything."""
    try:
        drafted = draft(order.request, targets, loaded)
    except RecipeError as fault:
        return Aim(name=name, order=order, recipe=order.request.recipe or "", sms=(), isa="", refused=(fault,))
    # Every plan reads them; here a fault is told once, and at once.
    read_inputs(drafted.loaded.recipe, order.request.inputs)
    return Aim(name=name, order=order, recipe=order.request.recipe or drafted.loaded.spelling,
               sms=drafted.served.sms or drafted.target.sms, isa=drafted.target.isa,
               python=drafted.request.python or drafted.target.python, refused=drafted.served.reasons)  # fmt: skip


# --- the run ----------------------------------------------------------------------------------------------------------


def compose_matrix(aimed: Sequence[Aim], store: Store, site: Site, told: Told = lambda _change, _board: None,
                   listener: Listener = silent) -> Report:  # fmt: skip
    """Build every target that is not refused. What fails is in the report; what was done stays in the store.

    told: is called with every change. listener: hears how far downloads and layers are that are made here.

    HostError when workers are missing, or not fit for this.
    """
    started = time.monotonic()
    run = _Run(aimed, told)
    results: SimpleQueue[Done] = SimpleQueue()
    here = LocalPool(perform, results, cores=site.cores, memory=site.memory, listener=listener)
    there: Pool = _cluster(site.on, results, store, aimed[0].order) if site.on and aimed else here
    run.begin(remote=there is not here, store=store)
    drive(run.graph, run, results, here=here, there=there, keep_going=site.keep_going)
    run.end()
    return run.board.report(time.monotonic() - started)


def memory_for_steps() -> int:
    """Bytes that steps may take together on this machine: nine tenths of what this process may use."""
    return memory_here() * 9 // 10


def _cluster(address: str, results: SimpleQueue[Done], store: Store, order: Order) -> ClusterPool:
    """The workers, who were all met: one that would make other things, or put them elsewhere, is refused now."""
    if not address.startswith(SCHEME):
        raise HostError(f"{address!r} is no cluster", where="--on", fix=f"Give {SCHEME}HOST:PORT.")
    pool = ClusterPool(address, perform, results)
    try:
        _meet_all(pool, store, order)
    except BaseException:
        pool.close()
        raise
    return pool


def _meet_all(pool: ClusterPool, store: Store, order: Order) -> None:
    key = key_of(MEETING, 1, token=uuid.uuid4().hex)
    store.save(MEETING, key, key)
    store.finish()
    place = (order.remote, order.remote_key)
    wanted = (*meet(key, *place)[:2], True)
    names = ("composer", "SOURCE_DATE_EPOCH", "a store with what is put into this one")
    try:
        HostError.collect([
            HostError("cannot work with this machine", where=worker,
                      why=f"{name}: {theirs!r} there, {mine!r} here",
                      fix="Install the same composer everywhere, and let all workers share this store: through "
                          "WHEEL_COMPOSER_STORE, a folder that all see, or --remote.")
            for worker, answer in sorted(pool.ask_all(meet, key, *place).items())
            for name, theirs, mine in zip(names, answer, wanted, strict=True) if theirs != mine
        ])  # fmt: skip
    finally:
        store.forget(MEETING, key)


@dataclass(slots=True)
class _Run:
    """The graph of a matrix: what each step leads to."""

    aimed: Sequence[Aim]
    told: Told
    graph: Graph = field(default_factory=Graph)
    board: Board = field(init=False)
    _fetched_by: dict[str, str] = field(default_factory=dict)
    _named: dict[str, int] = field(default_factory=dict)
    _faults: dict[str, ComposerError] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        rows = [Row(name=one.name, recipe=one.recipe, sms=one.sms, isa=one.isa) for one in self.aimed]
        self.board = Board(rows)
        for row, one in zip(rows, self.aimed, strict=True):
            if one.refused:
                row.fate, row.reason = "refused", "; ".join(map(_reason, one.refused))
                self._tell(Change(kind="refused", targets=(row.name,), text=row.reason))

    def begin(self, *, remote: bool, store: Store) -> None:
        """The plan of every target. remote: workers have stores of their own."""
        root = None if remote else store.root
        for number, one in enumerate(self.aimed):
            if not one.refused:
                order = replace(one.order, store=root)
                plan = Task(step="plan", subject=one.name, key=_plan_key(number), order=order)
                self._add(number, plan, Cost(memory=_PLAN_MEMORY))
                local = replace(order, store=store.root)
                pack = Task(step="pack", subject=one.name, key=_pack_key(number), order=local)
                self._add(number, pack, Cost(memory=_PACK_MEMORY), needs=[plan.key], here=True)

    def end(self) -> None:
        """Targets that something else kept from being built."""
        for row in self.board.rows:
            if row.fate in ("waiting", "working"):
                row.fate, row.reason = "given up", row.reason or "another target failed (see --keep-going)"

    # --- what the pools tell

    def started(self, node: Node) -> None:
        """A step begins, maybe again."""
        record = self.board.records[node.key]
        record.state, record.begun = "running", time.monotonic()
        for owner in record.owners:
            if self.board.rows[owner].fate == "waiting":
                self.board.rows[owner].fate = "working"
        self._tell(self._change("started", record))

    def finished(self, node: Node, done: Done) -> bool:
        """A step returned; False when a plan must wait for what it lacks."""
        record = self.board.records[node.key]
        record.seconds += done.seconds
        record.cpu += done.cpu
        record.memory = max(record.memory, done.memory)
        outcome: Outcome = done.value
        self.board.traffic += outcome.traffic
        if isinstance(outcome.value, tuple):
            record.state = "waiting"
            self._supply(record.owners[0], node.work, outcome.value)
            return False
        self._settle(node.work, record, outcome.value)
        self._tell(self._change("done", record))
        return True

    def failed(self, node: Node, fault: ComposerError) -> None:
        """A step failed."""
        record = self.board.records[node.key]
        record.state = "failed"
        self._faults[node.key] = fault
        if record.step == "fetch":
            self._release(node.work, record)
        self._tell(self._change("failed", record, str(fault)))

    def settled(self) -> None:
        """With a step that failed, now or before a target asked for it, that target fails, for the same reason."""
        for number, row in enumerate(self.board.rows):
            if row.fate not in ("waiting", "working") or not (cause := self.graph.cause(_pack_key(number))):
                continue
            fault = self._faults[cause]
            row.fate, row.reason, row.exit_code = "failed", str(fault), fault.exit_code
            row.after = time.monotonic() - self._started
            for key in (_plan_key(number), _pack_key(number)):
                if self.graph.state(key) == "skipped":
                    self.board.records[key].state = "skipped"

    def noted(self, text: str) -> None:
        """Something happened to workers."""
        self._tell(Change(kind="note", text=text))

    def idle(self) -> None:
        """Nothing happened for a second."""
        self._tell(Change(kind="tick"))

    # --- how the graph grows

    def _supply(self, owner: int, plan: Task, lacks: Sequence[Lack]) -> None:
        """Steps for what a plan lacks."""
        self._fetch(owner, plan, [one for one in lacks if one.step == "fetch"])
        for one in lacks:
            if one.step != "fetch":
                task = Task(step=one.step, subject=one.subject, key=one.key, order=plan.order)
                self._add(owner, task, _cost(one, plan.order.settings.jobs), size=one.size)
                self.graph.require(plan.key, [one.key])
        self.graph.change(plan.key, replace(plan, tried=plan.tried | {one.key for one in lacks}))

    def _fetch(self, owner: int, plan: Task, lacks: Sequence[Lack]) -> None:
        """One step for all downloads that no other target asked for; those of the targets that did are waited for."""
        fresh = [one for one in lacks if one.key not in self._fetched_by]
        asked = {key for one in lacks if (key := self._fetched_by.get(one.key))}
        for key in sorted(asked):
            record = self.board.records[key]
            self.board.claim(owner, key, record.step, record.subject)
        self.graph.follow(plan.key, asked)
        if fresh:
            key = key_of("matrix-fetch", 1, digests=sorted(one.key for one in fresh))
            task = Task(step="fetch", subject=f"{len(fresh)} files", key=key, order=plan.order,
                        digests=frozenset(one.key for one in fresh))  # fmt: skip
            if self._add(owner, task, Cost(memory=_OTHER_MEMORY), size=sum(one.size for one in fresh)):
                self._fetched_by |= dict.fromkeys(task.digests, key)
            self.graph.require(plan.key, [key])

    def _release(self, fetch: Task, record: Record) -> None:
        """Of a fetch that failed others may need only what can be had: they ask again for what is missing now."""
        for digest in fetch.digests:
            del self._fetched_by[digest]
        for owner in record.owners[1:]:
            key = _plan_key(owner)
            plan = self.graph.work(key)
            self.graph.change(key, replace(plan, tried=plan.tried - fetch.digests))
        self.board.release(record.key, record.owners[1:])

    def _settle(self, task: Task, record: Record, value: object) -> None:
        """Take in what a step made."""
        record.state = "done"
        if isinstance(value, Made):
            record.size, record.state = value.size, "known" if value.known else "done"
        elif isinstance(value, Planned):
            self._planned(record.owners[0], task, value)
        elif isinstance(value, Packed):
            record.size = value.size
            self._packed(record.owners[0], value)

    def _planned(self, owner: int, task: Task, planned: Planned) -> None:
        key = _pack_key(owner)
        if (first := self._named.setdefault(planned.name, owner)) != owner:
            raise RecipeError(f"its bundle would be {planned.name}, as that of {self.aimed[first].name}",
                              where=self.aimed[owner].name, fix="Build them one by one, into two folders.")  # fmt: skip
        self.board.rows[owner].name = planned.name
        for layer in planned.layers:
            if layer.known is None:
                made = Task(step="layer", subject=layer.plan.name, key=layer.key, order=task.order, plan=layer.plan)
                self._add(owner, made, Cost(memory=_LAYER_MEMORY), size=layer.size)
                self.graph.require(key, [layer.key])
            elif layer.key not in self.graph:
                record = self.board.claim(owner, layer.key, "layer", layer.plan.name)
                record.state, record.size = "known", layer.known
            else:
                self.board.claim(owner, layer.key, "layer", layer.plan.name)

    def _packed(self, owner: int, packed: Packed) -> None:
        row = self.board.rows[owner]
        row.fate = "up to date" if packed.up_to_date else "built"
        row.path, row.sha256, row.size = str(packed.path), packed.sha256, packed.size
        row.parts, row.proving = packed.parts, packed.proving
        row.after = time.monotonic() - self._started
        self._tell(Change(kind="target", targets=(row.name,), seconds=row.after, bytes=row.size, text=row.fate))

    def _add(self, owner: int, task: Task, cost: Cost, *, needs: Sequence[str] = (), size: int = 0,
             here: bool = False) -> bool:  # fmt: skip
        """A step that a target needs; whether nobody had asked for it. One that failed before is told once more."""
        record = self.board.claim(owner, task.key, task.step, task.subject)
        rank = (float(owner), float(_ORDER.index(task.step)), -float(size))
        node = Node(key=task.key, name=f"{task.step} {task.subject}", work=task, cost=cost, rank=rank, here=here)
        new = self.graph.add(node, needs)
        if fault := self._faults.get(task.key):
            self._tell(replace(self._change("failed", record, str(fault)), targets=(self.board.rows[owner].name,)))
        return new

    def _change(self, kind: Literal["started", "done", "failed"], record: Record, text: str = "") -> Change:
        names = tuple(self.board.rows[owner].name for owner in sorted(record.owners))
        return Change(kind=kind, step=record.step, subject=record.subject, targets=names, text=text,
                      seconds=0.0 if kind == "started" else record.seconds, bytes=record.size)  # fmt: skip

    def _tell(self, change: Change) -> None:
        self.told(change, self.board)


def _plan_key(number: int) -> str:
    return f"plan of {number}"


def _pack_key(number: int) -> str:
    return f"pack of {number}"


def _reason(fault: RecipeError) -> str:
    """In one line."""
    return " ".join((f"{fault.what}: {fault.why}" if fault.why else fault.what).split())


def _cost(lack: Lack, cores: int) -> Cost:
    """A build from source takes all cores; all else is one thread."""
    if lack.step == "source":
        return Cost(cores=cores, memory=lack.memory)
    return Cost(memory=_OTHER_MEMORY + lack.memory)

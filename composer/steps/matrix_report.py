"""How far a matrix is, and what came of it: values that a table is drawn from, without a look at the clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from composer.remote import Traffic

#: The columns of the table, in the order of the work. `imports` is a part of packing: only what it proves is kept.
COLUMNS = ("fetch", "source", "interpreter", "survey", "plan", "layers", "pack", "imports")
_COLUMN = {"objects": "survey", "layer": "layers"}

Fate = Literal["refused", "waiting", "working", "built", "up to date", "failed", "given up"]


def column_of(step: str) -> str:
    """The column of a step."""
    return _COLUMN.get(step, step)


@dataclass(slots=True, kw_only=True)
class Record:
    """One step. owners: the targets that need it, by number. begun: when it was started last. size: bytes.

    state: `known` was in the store before. seconds, cpu: of the worker's time, and of its processor's.
    """

    key: str
    step: str
    subject: str
    owners: list[int]
    state: Literal["waiting", "running", "done", "known", "failed", "skipped"] = "waiting"
    begun: float = 0.0
    seconds: float = 0.0
    cpu: float = 0.0
    size: int = 0
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One column of one target. total, done, running, known, shared, broken: steps; the shared ones count elsewhere.

    seconds, size: of the steps that count here. begun: when the oldest one under way began.
    """

    total: int = 0
    done: int = 0
    running: int = 0
    known: int = 0
    shared: int = 0
    broken: int = 0
    seconds: float = 0.0
    size: int = 0
    begun: float | None = None


@dataclass(slots=True, kw_only=True)
class Row:
    """One target. name: as it was asked for, and then of its bundle. after: seconds from the start to its end."""

    name: str
    recipe: str
    sms: tuple[int, ...]
    isa: str
    fate: Fate = "waiting"
    reason: str = ""
    exit_code: int = 0
    path: str = ""
    sha256: str = ""
    size: int = 0
    after: float = 0.0
    proving: float = 0.0
    parts: Mapping[str, int] = field(default_factory=dict)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One column of a finished target: steps done for it, steps shared with an earlier one, steps known before."""

    steps: int
    shared: int
    known: int
    seconds: float
    bytes: int


class TargetReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one target.

    seconds, cpu: of workers for it, and of their processors; what it shares counts for the first that needed it.
    relative: its `cpu`, to that of the first built target. after: seconds from the start of the run to its end.
    """

    name: str
    recipe: str
    sms: tuple[int, ...]
    isa: str
    fate: Fate
    reason: str
    exit_code: int
    path: str
    sha256: str
    bytes: int
    seconds: float
    cpu: float
    relative: float | None
    after: float
    columns: Mapping[str, Figures]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a matrix.

    seconds: from start to end. work, cpu: of all workers, and of their processors. memory: the most that the process of
    a worker held, by step, with what it had mapped. bundles, stored: bytes of all bundles' layers, with what they share
    counted each time, and once. remote: what went to and from it.
    """

    targets: Sequence[TargetReport]
    seconds: float
    work: float
    cpu: float
    memory: Mapping[str, int]
    bundles: int
    stored: int
    remote: Traffic


@dataclass(slots=True)
class Board:
    """The rows, the record of every step, and what went to and from a remote."""

    rows: list[Row]
    records: dict[str, Record] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    _cells: dict[tuple[int, str], list[Record]] = field(default_factory=dict)

    def claim(self, owner: int, key: str, step: str, subject: str) -> Record:
        """The record of a step that a target needs."""
        record = self.records.setdefault(key, Record(key=key, step=step, subject=subject, owners=[]))
        if owner not in record.owners:
            record.owners.append(owner)
            self._cells.setdefault((owner, column_of(step)), []).append(record)
        return record

    def release(self, key: str, owners: Sequence[int]) -> None:
        """These targets do without a step after all."""
        record = self.records[key]
        record.owners = [one for one in record.owners if one not in owners]
        for owner in owners:
            self._cells[owner, column_of(record.step)].remove(record)

    def cell(self, owner: int, column: str) -> Cell:
        """One cell of the table."""
        proving = self.rows[owner].proving
        if column == "imports":
            return Cell(total=1, done=1, seconds=proving) if proving else Cell()
        return _cell(owner, self._cells.get((owner, column), []), less=proving if column == "pack" else 0.0)

    def used(self) -> list[str]:
        """The columns in which there is something to see; `source` only where something is built from it."""
        there = {column_of(one.step) for one in self.records.values()}
        return [one for one in COLUMNS if one in there or one != "source"]

    def report(self, seconds: float) -> Report:
        """The end of it."""
        built = [number for number, row in enumerate(self.rows) if row.fate in ("built", "up to date")]
        first = sum(one.cpu for one in self._paid(built[0])) if built else 0.0
        merged: dict[str, int] = {}
        memory: dict[str, int] = {}
        for row in self.rows:
            merged.update(row.parts)
        for one in self.records.values():
            memory[one.step] = max(memory.get(one.step, 0), one.memory)
        return Report(
            targets=[self._target(number, first if number in built else 0.0) for number in range(len(self.rows))],
            seconds=round(seconds, 2), work=round(sum(one.seconds for one in self.records.values()), 2),
            cpu=round(sum(one.cpu for one in self.records.values()), 2), memory=memory,
            bundles=sum(sum(row.parts.values()) for row in self.rows), stored=sum(merged.values()),
            remote=self.traffic,
        )  # fmt: skip

    def _paid(self, number: int) -> list[Record]:
        """The steps that count for a target."""
        return [one for one in self.records.values() if min(one.owners) == number]

    def _target(self, number: int, first: float) -> TargetReport:
        row, paid = self.rows[number], self._paid(number)
        cpu = sum(one.cpu for one in paid)
        return TargetReport(
            name=row.name, recipe=row.recipe, sms=row.sms, isa=row.isa, fate=row.fate, reason=row.reason,
            exit_code=row.exit_code, path=row.path, sha256=row.sha256, bytes=row.size,
            seconds=round(sum(one.seconds for one in paid), 2), cpu=round(cpu, 2),
            relative=round(cpu / first, 3) if first else None, after=round(row.after, 2),
            columns=dict(self._figures(number)),
        )  # fmt: skip

    def _figures(self, number: int) -> Iterator[tuple[str, Figures]]:
        for column in self.used():
            cell = self.cell(number, column)
            if cell.total:
                yield column, Figures(steps=cell.done - cell.shared - cell.known, shared=cell.shared, known=cell.known,
                                      seconds=round(cell.seconds, 2), bytes=cell.size)  # fmt: skip


def _cell(owner: int, records: Sequence[Record], *, less: float) -> Cell:
    own = [one for one in records if min(one.owners) == owner]
    return Cell(
        total=len(records), done=_count(records, "done", "known"), running=_count(records, "running"),
        known=_count(own, "known"), broken=_count(records, "failed", "skipped"),
        shared=_count([one for one in records if one not in own], "done", "known"),
        seconds=sum(one.seconds for one in own) - less, size=sum(one.size for one in own),
        begun=min((one.begun for one in records if one.state == "running"), default=None),
    )  # fmt: skip


def _count(records: Iterable[Record], *states: str) -> int:
    return sum(one.state in states for one in records)

"""Slimming, library by library: bytes before and after, speed and memory; and a layer that is made a second time.

What is measured, and how to read the result: bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
from measure import environ, machine_facts, measured, read_into_page_cache, scratch_folder, today
from slim_worker import WORKS, YARDSTICKS

import composer
from composer._fs import write_atomic
from composer.cli.progress import drawn
from composer.errors import ComposerError, FetchError, HostError
from composer.formats.elf import Readable
from composer.formats.slim import Slimmed, slim
from composer.formats.zip import Member
from composer.model.globs import matches
from composer.model.gpu import Selection
from composer.model.layer import Layer
from composer.model.plan import SlimEdit, WheelPlan
from composer.steps.build import Settings, at_hand, fetch_all
from composer.steps.edit import Tools, write_wheel
from composer.steps.layer import FRAME, LayerWriter, compressor, find_layer, stored_layer
from composer.steps.locks import LockOptions
from composer.steps.outline import Request, outline
from composer.steps.plan import Options, draft_wheels, wheel_key
from composer.steps.survey import SurveyedFile, WheelFile, mapped, survey_wheels
from composer.store import Store

ROOT = Path(__file__).resolve().parents[1]
_SAMPLE_MS = 5
_MOST_MEMORY = 1.2  # of the largest file


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """An object of a wheel that `--slim all` may change, and how."""

    wheel: Path
    distribution: str
    member: Member
    edit: SlimEdit

    @property
    def name(self) -> str:
        """Its path below site-packages."""
        return self.member.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of one form of a library, and at the level of a bundle; 0 when that was not asked for."""

    raw: int
    compressed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """One piece of work once: seconds without the start of Python, and its process' peak memory in bytes."""

    wall: float
    cpu: float
    resident: int
    anonymous: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A library before, without foreign GPU code (gpu), and as a bundle has it (built): without debug symbols as well
    where its licence allows that.
    """

    how: str
    before: Sizes
    gpu: Sizes
    built: Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was measured of a library. laps: by work; none for what is small or stays as it is."""

    library: Library
    weights: Weights
    laps: Mapping[str, Sequence[Lap]]

    @property
    def size(self) -> int:
        """Its bytes before."""
        return self.weights.before.raw


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """A layer that was made, and asked for again: seconds, and the bytes of its compressed form."""

    name: str
    made: float
    found: float
    bytes: int


# --- what is measured -------------------------------------------------------------------------------------------------


def _plans(options: argparse.Namespace) -> Iterator[tuple[WheelPlan, Path, Sequence[SurveyedFile]]]:
    """The plan, the wheel and the files of each distribution that `--slim all` edits. Nothing is downloaded."""
    store, settings = Store(), Settings(jobs=2, offline=True)
    asked = Request(recipe=options.recipe, sm=options.sm, isa="avx512", python=options.python,
                    lock=LockOptions(mode="auto", offline=True))  # fmt: skip
    decided = outline(asked, store)
    if not at_hand(decided, store, settings):
        raise FetchError("not every wheel is at hand", where=decided.lock.filename,
                         fix="Run `compose fetch` for the same recipe and target.")  # fmt: skip
    with drawn(quiet=True) as listener:
        paths = fetch_all(decided, store, settings, listener).paths
        present = tuple(one for one in decided.packages if one.artifacts[0].sha256 in paths)
        digests = {one.name: one.artifacts[0].sha256 for one in present}
        wheels = {name: WheelFile(path=paths[digest], sha256=digest) for name, digest in digests.items()}
        surveys = survey_wheels(store, wheels, decided.target.python, jobs=2, listener=listener)
    wanted = Options(bytecode=False, slim="all", accept_licence_modification=True)
    for plan in draft_wheels(replace(decided, packages=present), surveys, wanted, None):
        if plan.slim:
            yield plan, wheels[plan.name].path, surveys[plan.name].files


def _libraries(options: argparse.Namespace) -> list[Library]:
    """The objects that slimming looks at, the largest first; what a recipe leaves out is measured, too."""
    found = [
        Library(wheel=path, distribution=plan.name, member=file.member, edit=plan.slim)
        for plan, path, files in _plans(options)
        for file in files
        if plan.slim and file.is_elf and not file.cubin and plan.slim.covers(file.path)
        and file.member.size >= options.at_least * 1e6 and matches(file.member.path, options.library)
    ]  # fmt: skip
    if not found:
        raise HostError("no library", where="--library", why=options.library)
    return sorted(found, key=lambda one: (-one.member.size, one.name))


@contextlib.contextmanager
def _unpacked(library: Library, scratch: Path) -> Iterator[Path]:
    path = scratch / "before.so"
    with zipfile.ZipFile(library.wheel) as archive, archive.open(library.name) as stream, path.open("wb") as out:
        shutil.copyfileobj(stream, out, 1 << 20)
    yield path
    path.unlink()


def _timed(library: Library, scratch: Path, options: argparse.Namespace) -> dict[str, list[Lap]]:
    """Every piece of work on one library, in turn; nothing for what is small or stays as it is."""
    if library.member.size < options.timed * 1e6:
        return {}
    laps: dict[str, list[Lap]] = {work: [] for work in WORKS}
    with _unpacked(library, scratch) as source:
        with mapped(source) as view:
            if (
                slim(view, source.name, Selection(sms=tuple(library.edit.sms)), debug=library.edit.debug).how
                == "unchanged"
            ):
                return {}
        for work in [work for _ in range(options.rounds) for work in WORKS]:
            laps[work].append(_lap(work, source, scratch / "after.so", library.edit))
    return laps


def _weighed(library: Library, scratch: Path, options: argparse.Namespace) -> Weights:
    with _unpacked(library, scratch) as source, mapped(source) as view, ThreadPoolExecutor(2) as pool:
        selection = Selection(sms=tuple(library.edit.sms))
        gpu = slim(view, source.name, selection)
        built = slim(view, source.name, selection, debug=True) if library.edit.debug else gpu
        before = Sizes(raw=len(view), compressed=_compressed(view, pool, options))
        only = before if gpu.how == "unchanged" else _packed(gpu, pool, options)
        last = only if built is gpu else before if built.how == "unchanged" else _packed(built, pool, options)
    print(f"{library.name}: {built.how}, {before.raw / 1e6:.1f} -> {last.raw / 1e6:.1f} MB", file=sys.stderr)
    return Weights(how=built.how, before=before, gpu=only, built=last)


def _packed(slimmed: Slimmed, pool: ThreadPoolExecutor, options: argparse.Namespace) -> Sizes:
    return Sizes(raw=slimmed.size, compressed=_compressed(slimmed.content, pool, options))


def _compressed(content: Readable, pool: ThreadPoolExecutor, options: argparse.Namespace) -> int:
    """Bytes of a file in the frames of a layer, at the default level."""
    if not options.compressed:
        return 0
    level = Options().level
    starts = range(0, len(content), FRAME)
    return sum(pool.map(lambda at: len(compressor(level).compress(content[at : at + FRAME])), starts))


def _lap(work: str, source: Path, into: Path, edit: SlimEdit) -> Lap:
    into.unlink(missing_ok=True)
    read_into_page_cache([source])
    log = source.with_name("lap.log")
    program = str(ROOT / "bench/slim_worker.py")
    argv = [sys.executable, program, work, str(source), str(into), msgspec.json.encode(edit).decode()]
    usage = measured(argv, env=environ(PYTHONPATH=str(ROOT)), log=log, every_ms=_SAMPLE_MS)
    took = json.loads(log.read_text())
    return Lap(wall=took["wall"], cpu=took["cpu"], resident=usage.peak.resident, anonymous=usage.peak.anonymous)


def _again(options: argparse.Namespace, scratch: Path) -> Again:
    """Make the layer of one wheel in a store that has nothing, then ask for it as the next run does."""
    plans = {plan.name: (plan, path) for plan, path, _ in _plans(options)}
    if options.again not in plans:
        raise HostError("not a distribution that slimming edits", where="--again", why=options.again)
    plan, path = plans[options.again]
    store, tools = Store(scratch / "store"), Tools(python=None, patches={})
    read_into_page_cache([path])
    started = time.perf_counter()

    def fill(writer: LayerWriter) -> Layer:
        return write_wheel(writer, plan, path, tools, scratch, lambda _told: None)

    layer = stored_layer(store, wheel_key(plan), fill, level=plan.level, mtime=plan.mtime)
    made = time.perf_counter()
    found = find_layer(Store(scratch / "store"), wheel_key(plan))
    ended = time.perf_counter()
    if found != layer:
        raise HostError("the store does not have the layer that was just made", where=plan.name)
    return Again(name=plan.name, made=made - started, found=ended - made,
                 bytes=sum(part.compressed for part in layer.parts))  # fmt: skip


# --- the result -------------------------------------------------------------------------------------------------------


def _median(result: Result, work: str, what: Literal["cpu", "wall"]) -> float:
    laps = result.laps[work]
    return statistics.median(lap.cpu if what == "cpu" else lap.wall for lap in laps)


def _speeds(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """By work: GB of input per CPU second and per second, and the CPU seconds of yardsticks that it took."""
    timed = [one for one in results if one.laps]
    size = sum(one.size for one in timed) / 1e9
    cpu = {work: sum(_median(one, work, "cpu") for one in timed) for work in WORKS}
    wall = {work: sum(_median(one, work, "wall") for one in timed) for work in WORKS}
    return {
        work: {"gb_per_cpu_second": size / cpu[work], "gb_per_second": size / wall[work],
               **{f"cpu_over_{yard}": cpu[work] / cpu[yard] for yard in YARDSTICKS}}
        for work in WORKS if timed
    }  # fmt: skip


def _peaks(results: Sequence[Result]) -> tuple[int, int]:
    """The highest peaks of slimming with its proof: all of the resident pages, and the anonymous ones."""
    laps = [lap for one in results for lap in one.laps["proven"]]
    return max(lap.resident for lap in laps), max(lap.anonymous for lap in laps)


def _memory(results: Sequence[Result]) -> dict[str, float]:
    """Peaks in bytes, and what that is of the largest file."""
    timed = [one for one in results if one.laps]
    if not timed:
        return {}
    largest = max(one.size for one in timed)
    resident, anonymous = _peaks(timed)
    return {"largest_file": largest, "resident": resident, "anonymous": anonymous, "ratio": resident / largest}


_COLUMNS = ("before", "GPU", "built")


def _table(results: Sequence[Result]) -> Iterator[str]:
    heads = "".join(f"{head:>8}" for head in (*_COLUMNS, *_COLUMNS))
    yield f"{'MB, raw and compressed':<46}{heads}"
    for one in results:
        yield _row(one.library.name, [one.weights])
    yield _row("total", [one.weights for one in results])
    yield ""
    heads = "".join(f"{head:>8}" for head in (*WORKS, "peak MB", "anon MB", "/ file"))
    yield f"{'MB of input per CPU second; memory':<46}{heads}"
    yield from (_timed_row(one) for one in results if one.laps)


def _row(name: str, weights: Sequence[Weights]) -> str:
    forms = [[one.before for one in weights], [one.gpu for one in weights], [one.built for one in weights]]
    sums = [sum(one.raw for one in form) for form in forms] + [sum(one.compressed for one in form) for form in forms]
    return f"{name[-45:]:<46}" + "".join(f"{value / 1e6:>8.1f}" for value in sums)


def _timed_row(one: Result) -> str:
    speeds = "".join(f"{one.size / 1e6 / _median(one, work, 'cpu'):>8.0f}" for work in WORKS)
    resident, anonymous = _peaks([one])
    memory = f"{resident / 1e6:>8.0f}{anonymous / 1e6:>8.0f}{resident / one.size:>8.2f}"
    return f"{one.library.name[-45:]:<46}{speeds}{memory}"


def _summary(report: Mapping[str, Any]) -> Iterator[str]:
    for work, speed in report["speed"].items():
        ratios = ", ".join(f"{speed[f'cpu_over_{yard}']:.2f} x {yard}" for yard in YARDSTICKS)
        yield (f"{work}: {speed['gb_per_cpu_second']:.2f} GB per CPU second, {speed['gb_per_second']:.2f} GB/s; "
               f"CPU time {ratios}")  # fmt: skip
    if memory := report["memory"]:
        resident, anonymous = memory["resident"] / 1e6, memory["anonymous"] / 1e6
        yield (f"memory of slimming and proof: {resident:.0f} MB, anonymous at most {anonymous:.0f}: "
               f"{memory['ratio']:.2f} x the largest file (goal {_MOST_MEMORY})")  # fmt: skip
    again = report["again"]
    yield (f"layer of {again['name']}: {again['made']:.2f} s, the second time {again['found'] * 1e3:.1f} ms "
           f"({again['made'] / again['found']:.0f} x)")  # fmt: skip
    yield ", ".join(f"{name} {value}" for name, value in report["machine"].items())


def _report(options: argparse.Namespace, machine: Mapping[str, Any], results: Sequence[Result],
            again: Again) -> dict[str, Any]:  # fmt: skip
    return {
        "benchmark": "slim", "date": today(), "speed": _speeds(results), "memory": _memory(results),
        "again": asdict(again), "machine": machine,
        "tools": {"compose": composer.__version__, "python": platform.python_version()},
        "options": {"recipe": options.recipe, "sm": options.sm, "level": Options().level, "rounds": options.rounds},
        "libraries": [
            {"name": one.library.name, "distribution": one.library.distribution, "licence": one.library.edit.licence,
             **asdict(one.weights), "laps": {work: [asdict(lap) for lap in laps] for work, laps in one.laps.items()}}
            for one in results
        ],
    }  # fmt: skip


# --- the command line -------------------------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench slim", description=__doc__)
    parser.add_argument("--recipe", default="sglang", help="a shipped recipe, or the path of one")
    parser.add_argument("--sm", default="90")
    parser.add_argument("--python", help="minor version, or the path of a CPython: whose wheels")
    parser.add_argument("--library", default="**", metavar="GLOB", help="below site-packages (default: all)")
    parser.add_argument("--at-least", type=float, default=1, metavar="MB", help="smaller files are passed over")
    parser.add_argument("--timed", type=float, default=20, metavar="MB", help="smaller files are not timed")
    parser.add_argument("--rounds", type=int, default=3, help="how often each piece of work is timed")
    parser.add_argument(
        "--no-compressed", dest="compressed", action="store_false", help="raw sizes only (minutes less)"
    )
    parser.add_argument("--again", default="nvidia-nccl-cu12", metavar="DISTRIBUTION", help="whose layer is made twice")
    parser.add_argument("--work", type=Path, help="a folder for scratch (default: the store)")
    parser.add_argument("--output", type=Path, default=ROOT / f"bench/results/{today()}-slim.json")
    options = parser.parse_args()
    options.rounds = max(1, options.rounds)
    return options


def bench(options: argparse.Namespace) -> None:
    """Measure everything, print the tables and write the report."""
    machine = machine_facts()
    libraries = _libraries(options)
    with scratch_folder(options.work) as scratch:
        laps = [_timed(library, scratch, options) for library in libraries]
        again = _again(options, scratch)
        machine["load_after"] = round(os.getloadavg()[0], 2)
        weights = [_weighed(library, scratch, options) for library in libraries]
    results = [
        Result(library=library, weights=weight, laps=lap)
        for library, weight, lap in zip(libraries, weights, laps, strict=True)
    ]
    report = _report(options, machine, results, again)
    write_atomic(options.output, json.dumps(report, indent=1).encode() + b"\n")
    print("\n".join([*_table(results), "", *_summary(report), "", str(options.output)]))


def main() -> None:
    """Run, or say what is missing; the work folder goes in any case."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        bench(_options())
    except ComposerError as fault:
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

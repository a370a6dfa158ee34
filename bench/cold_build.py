"""A cold build against its peers: the same locked wheels, the same machine, one run, in alternating order.

What is compared, and how to read the result: bench/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomlkit
from measure import (
    COMPOSE,
    Usage,
    environ,
    link_files,
    machine_facts,
    measured,
    read_into_page_cache,
    scratch_folder,
    today,
)
from packaging.utils import canonicalize_name

import composer
from composer._fs import write_atomic
from composer._proc import run
from composer.cli.progress import drawn
from composer.errors import ComposerError, FetchError, HostError, RecipeError
from composer.interpreter import find_pythons
from composer.model.lock import LockedPackage
from composer.steps.build import Settings, at_hand, fetch_all, sources
from composer.steps.load import load_recipe
from composer.steps.locks import LockOptions
from composer.steps.outline import Outline, Request, outline
from composer.store import Store

ROOT = Path(__file__).resolve().parents[1]
UV = "uv==0.13.8"
ARCHIVE = ("tar", "-I", "zstd -3 -T0", "-cf")
# A small wheel, and the one that takes the longest to compose. The files are real and nothing needs them.
_CHANGES = ("tqdm=tqdm/completion.sh", "torch=torch/share/**")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One measured command."""

    label: str
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One contestant in one round. cold: what its figure is the sum of; warm: further builds in the same place."""

    contestant: str
    round: int
    cold: Sequence[Step]
    size: int
    warm: Sequence[Step] = field(default_factory=tuple)

    @property
    def total(self) -> Usage:
        """All cold steps, one after the other."""
        first, *others = [step.usage for step in self.cold]
        for usage in others:
            first = first.then(usage)
        return first


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What all contestants share. packages: the set, each at hand in the store; python: who makes the peers' venvs."""

    options: argparse.Namespace
    store: Store
    decided: Outline
    packages: Sequence[LockedPackage]
    wheels: Sequence[Path]
    files: Sequence[Path]
    python: Path
    uv: Path

    @property
    def names(self) -> set[str]:
        """The distributions of the set."""
        return {package.name for package in self.packages}


# --- the contestants: each works in an empty folder of its own and leaves nothing behind ------------------------------


def compose_unslimmed(match: Match, folder: Path, number: int) -> Outcome:
    """What the peers do: every library as it is, at their zstd level."""
    return _composed(match, folder, number, "compose", ["--compress", "fast", "--slim", "none", "--no-imports"])


def compose_as_shipped(match: Match, folder: Path, number: int) -> Outcome:
    """What a user gets without options: code for other GPUs cut out, and a higher zstd level."""
    return _composed(match, folder, number, "compose, slimmed", [])


def _composed(match: Match, folder: Path, number: int, contestant: str, words: Sequence[str]) -> Outcome:
    """`compose build` from an empty store that holds the artifacts; then again, unchanged and with a changed wheel."""
    store = folder / "store"
    link_files(match.store.root, store, match.files)
    recipe = match.options.recipe
    cold, plan, _ = _build(match, folder, recipe, "compose build", words)
    _check_set(match, {layer["name"] for layer in plan["layers"] if not layer["cached"]}, "compose build")
    size = _size(folder / "dist", "*.tar.zst")
    unchanged, _, result = _build(match, folder, recipe, "nothing changed", words)
    if not result["up_to_date"]:
        raise HostError("a second build found something to do", where="compose build", why=json.dumps(result))
    warm = [unchanged]
    for name, glob in match.options.change:
        changed = _changed_recipe(recipe, folder / f"recipe-{name}", name, glob)
        step, plan, _ = _build(match, folder, str(changed), f"{name} changed", words)
        todo = [layer["name"] for layer in plan["layers"] if not layer["cached"]]
        if todo != [name]:
            raise HostError(f"the change of {name} lets {todo or 'nothing'} be composed anew", where="--change",
                            fix="Give a glob of files that only this distribution has a use for.")  # fmt: skip
        warm.append(step)
    return Outcome(contestant=contestant, round=number, cold=[cold], size=size, warm=warm)


def _build(match: Match, folder: Path, recipe: str, label: str,
           words: Sequence[str]) -> tuple[Step, dict[str, Any], dict[str, Any]]:  # fmt: skip
    """One `compose build`: what it took, the plan that it showed and its result."""
    options = match.options
    argv = [
        sys.executable, "-c", COMPOSE, "build", "--recipe", recipe, "--sm", options.sm, "--isa", options.isa,
        *words, "--bytecode" if options.bytecode else "--no-bytecode", "--offline", "--json",
        "--output", str(folder / "dist"), *(("--python", options.python) if options.python else ()),
    ]  # fmt: skip
    env = environ(WHEEL_COMPOSER_STORE=str(folder / "store"), PYTHONPATH=str(ROOT))
    log = folder / f"{label.replace(' ', '-')}.log"
    usage = measured(argv, env=env, log=log)
    plan, result = (json.loads(line) for line in log.read_text().splitlines())
    return Step(label=label, usage=usage), plan, result


def _changed_recipe(recipe: str, folder: Path, name: str, glob: str) -> Path:
    """A copy of a recipe, with its includes and locks, that prunes `glob` from one distribution besides."""
    original = load_recipe(recipe)
    shutil.copytree(original.path.parent, folder, ignore=shutil.ignore_patterns("patches"))
    if original.patches.parent == original.path.parent:
        (folder / "patches").symlink_to(original.patches)
    rule = {"paths": [glob], "reason": "a benchmark"}
    for path in (folder / include for include in (*original.recipe.include, original.path.name)):
        document = tomlkit.parse(path.read_text())
        for component in document.get("component", ()):
            if component["name"] == name:
                component["prune"] = [*component.get("prune", ()), rule]
                path.write_text(tomlkit.dumps(document))
                return folder / original.path.name
    entry = {"component": [{"name": name, "prune": [rule]}]}
    path.write_text(f"{path.read_text()}\n{tomlkit.dumps(entry)}")  # the last one is the recipe itself
    return path


def uv_and_tar(match: Match, folder: Path, number: int) -> Outcome:
    """`uv venv --relocatable`, `uv pip install` with a cold cache, and tar."""
    uv, venv = [str(match.uv), "--no-config", "--offline", "--cache-dir", str(folder / "cache")], folder / "venv"
    install: list[str | Path] = [
        *uv, "pip", "install", "--python", venv / "bin/python", "--no-deps", "--no-index", "--link-mode", "copy",
        *(["--compile-bytecode"] if match.options.bytecode else []), *match.wheels,
    ]  # fmt: skip
    made = [
        _peer(folder, "uv venv", [*uv, "venv", "--relocatable", "--python", match.python, venv]),
        _peer(folder, "uv pip install", install),
    ]
    return _archived(match, folder, number, "uv", made)


def pip_and_tar(match: Match, folder: Path, number: int) -> Outcome:
    """`python -m venv`, `pip install` and tar."""
    venv = folder / "venv"
    install: list[str | Path] = [
        venv / "bin/python", "-m", "pip", "--isolated", "install", "--disable-pip-version-check", "--no-deps",
        "--no-index", *([] if match.options.bytecode else ["--no-compile"]), *match.wheels,
    ]  # fmt: skip
    made = [
        _peer(folder, "python -m venv", [match.python, "-m", "venv", venv]),
        _peer(folder, "pip install", install),
    ]
    return _archived(match, folder, number, "pip", made)


def _peer(folder: Path, label: str, argv: Sequence[str | Path]) -> Step:
    log = folder / f"{label.replace(' ', '-')}.log"
    return Step(label=label, usage=measured(argv, env=environ(TMPDIR=str(folder)), log=log))


def _archived(match: Match, folder: Path, number: int, name: str, made: Sequence[Step]) -> Outcome:
    """Check what a peer installed, and pack it."""
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    installed = importlib.metadata.distributions(path=[str(site)])
    seeded = {"pip", "setuptools"} - match.names  # by `python -m venv`
    _check_set(match, {str(canonicalize_name(one.name)) for one in installed} - seeded, name)
    packed = _peer(folder, "tar", [*ARCHIVE, folder / "venv.tar.zst", "-C", folder / "venv", "."])
    return Outcome(contestant=f"{name} + tar", round=number, cold=[*made, packed],
                   size=_size(folder, "venv.tar.zst"))  # fmt: skip


def _check_set(match: Match, found: set[str], where: str) -> None:
    """A contestant that installs another set wins or loses for the wrong reason."""
    if found != match.names:
        raise HostError("not the locked set", where=where, why=", ".join(sorted(found ^ match.names)))


def _size(folder: Path, pattern: str) -> int:
    (path,) = folder.glob(pattern)
    return path.stat().st_size


# --- before the start -------------------------------------------------------------------------------------------------


def _match(options: argparse.Namespace, scratch: Path) -> Match:
    """Find the set, the interpreter and the tools. Nothing is downloaded but uv, when this machine has none."""
    store = Store()
    lock = LockOptions(mode="auto", offline=True)
    decided = outline(Request(recipe=options.recipe, sm=options.sm, isa=options.isa, python=options.python, lock=lock),
                      store)  # fmt: skip
    settings = Settings(jobs=1, offline=True)
    if not at_hand(decided, store, settings):
        raise FetchError("not every wheel is at hand", where=decided.lock.filename,
                         fix="Run `compose fetch` for the same recipe and target.")  # fmt: skip
    with drawn(quiet=True) as listener:
        paths = fetch_all(decided, store, settings, listener).paths
    packages = [one for one in decided.packages if one.artifacts[0].sha256 in paths]
    unknown = {name for name, _ in options.change} - {one.name for one in packages}
    if unknown:
        raise RecipeError(f"{', '.join(sorted(unknown))} not in {decided.lock.filename}", where="--change")
    present = [one for source in sources(decided) for one in source.artifacts if one.sha256 in paths]
    return Match(
        options=options, store=store, decided=decided, packages=packages,
        wheels=[paths[one.artifacts[0].sha256] for one in packages], files=[paths[one.sha256] for one in present],
        python=_python(decided.target.python, options.python), uv=_uv(scratch),
    )  # fmt: skip


def _python(minor: str, asked: str | None) -> Path:
    if asked and "/" in asked:
        return Path(asked).absolute()
    found = find_pythons([minor])
    if not found:
        raise HostError(f"no CPython {minor} on this machine for the peers' venvs", fix="Give --python PATH.")
    return found[0].path


def _uv(scratch: Path) -> Path:
    """uv from PATH, or a pinned one in an environment of its own."""
    found = shutil.which("uv")
    if found:
        return Path(found)
    place = scratch / "uv"
    print(f"no uv on PATH: installing {UV}", file=sys.stderr)
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run([sys.executable, "-m", "venv", place], timeout=120, error=HostError)
    run([place / "bin/python", "-m", "pip", "install", "--quiet", UV], timeout=600, error=HostError, env=env,
        fix="Put uv on PATH, or let pip reach an index.")  # fmt: skip
    return place / "bin/uv"


def _check_tools() -> None:
    missing = [name for name in ("tar", "zstd") if not shutil.which(name)]
    if missing:
        raise HostError(f"{' and '.join(missing)} not found on PATH", where="the peers", fix="Install: tar, zstd.")


def _check_room(match: Match, scratch: Path) -> None:
    """The largest contestant is uv: its cache and its venv both hold the unpacked set, and then comes the archive."""
    packed = sum(path.stat().st_size for path in match.wheels)
    wanted = 2 * _unpacked(match.wheels) + packed
    free = shutil.disk_usage(scratch).free
    if free < wanted:
        raise HostError(f"{free / 1e9:.0f} GB are free and {wanted / 1e9:.0f} GB are needed", where=str(scratch),
                        fix="Give another --work folder.")  # fmt: skip


def _unpacked(wheels: Sequence[Path]) -> int:
    total = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            total += sum(member.file_size for member in archive.infolist())
    return total


# --- the rounds -------------------------------------------------------------------------------------------------------


def _rounds(match: Match, scratch: Path) -> Iterator[Outcome]:
    contestants = [
        compose_unslimmed,
        compose_as_shipped,
        uv_and_tar,
        *([pip_and_tar] if match.options.with_pip else []),
    ]
    for number in range(match.options.rounds):
        for contestant in contestants if number % 2 == 0 else reversed(contestants):
            print(f"round {number + 1} of {match.options.rounds}: {contestant.__name__}", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                read_into_page_cache(match.files)
                yield contestant(match, Path(folder), number)


# --- the result -------------------------------------------------------------------------------------------------------


def _ratios(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Every ratio by its name, one value per round; all are better the larger they are, but that of the sizes."""
    ours = {one.round: one for one in outcomes if one.contestant == "compose"}
    ratios: dict[str, list[float]] = {}
    for one in outcomes:
        base = ours[one.round]
        if one.warm:
            pairs = {f"{one.contestant}: cold / {step.label}": one.total.seconds / step.usage.seconds
                     for step in one.warm}  # fmt: skip
        else:
            pairs = {f"seconds: {one.contestant} / compose": one.total.seconds / base.total.seconds,
                     f"bytes: compose / {one.contestant}": base.size / one.size}  # fmt: skip
        for name, value in pairs.items():
            ratios.setdefault(name, []).append(value)
    return dict(sorted(ratios.items(), key=lambda item: (not item[0].startswith("seconds"), item[0])))


def _table(ratios: Mapping[str, Sequence[float]], outcomes: Sequence[Outcome], machine: Mapping[str, Any]) -> str:
    lines = [f"{'ratio (median of the rounds)':<44}{'':>10}  range"]
    for name, values in ratios.items():
        lines.append(f"{name:<44}{statistics.median(values):>10.2f}  {min(values):.2f} - {max(values):.2f}")
    lines += ["", f"{'round, contestant, step':<44}{'s':>10}{'user':>9}{'system':>9}{'flush':>9}{'peak MB':>10}"
                  f"{'anon MB':>10}{'out MB':>10}"]  # fmt: skip
    for one in outcomes:
        lines.append(_row(f"{one.round + 1} {one.contestant}", one.total) + f"{one.size / 1e6:>10.1f}")
        steps = [*(one.cold if len(one.cold) > 1 else ()), *one.warm]
        lines += [_row(f"    {step.label}", step.usage) for step in steps]
    lines += ["", ", ".join(f"{name} {value}" for name, value in machine.items())]
    return "\n".join(lines)


def _row(label: str, usage: Usage) -> str:
    times = "".join(f"{value:>9.2f}" for value in (usage.user, usage.system, usage.flush))
    peaks = "".join(f"{value / 1e6:>10.0f}" for value in (usage.peak.resident, usage.peak.anonymous))
    return f"{label:<44}{usage.seconds:>10.2f}{times}{peaks}"


def _tools(match: Match) -> dict[str, str]:
    asked: dict[str, list[str | Path]] = {
        "uv": [match.uv, "--version"], "tar": ["tar", "--version"], "zstd": ["zstd", "--version"],
        "python": [match.python, "--version"], "pip": [match.python, "-m", "pip", "--version"],
    }  # fmt: skip
    if not match.options.with_pip:
        del asked["pip"]
    said = {name: run(argv, timeout=60, error=HostError).decode().splitlines()[0] for name, argv in asked.items()}
    return {"compose": composer.__version__, **{name: line.partition(" from ")[0] for name, line in said.items()}}


def _report(match: Match, machine: Mapping[str, Any], ratios: Mapping[str, Sequence[float]],
            outcomes: Sequence[Outcome]) -> dict[str, Any]:  # fmt: skip
    options, decided = match.options, match.decided
    return {
        "benchmark": "cold-build", "date": today(),
        "ratios": {name: {"median": round(statistics.median(values), 3), "rounds": [round(one, 3) for one in values]}
                   for name, values in ratios.items()},
        "machine": machine, "tools": _tools(match),
        "options": {"sm": options.sm, "isa": options.isa, "bytecode": options.bytecode,
                    "rounds": options.rounds, "change": [f"{name}={glob}" for name, glob in options.change]},
        "set": {"recipe": f"{decided.recipe.name} {decided.recipe.version}", "lock": decided.lock.filename,
                "interpreter": decided.interpreter.label, "wheels": len(match.wheels),
                "bytes": sum(path.stat().st_size for path in match.wheels), "unpacked": _unpacked(match.wheels)},
        "outcomes": [_described(one) for one in outcomes],
    }  # fmt: skip


def _described(one: Outcome) -> dict[str, Any]:
    steps = {name: [{"label": step.label, **step.usage.as_dict()} for step in steps]
             for name, steps in (("cold", one.cold), ("warm", one.warm))}  # fmt: skip
    return {"contestant": one.contestant, "round": one.round + 1, "bytes": one.size, "total": one.total.as_dict(),
            **steps}  # fmt: skip


# --- the command line -------------------------------------------------------------------------------------------------


def _change(text: str) -> tuple[str, str]:
    name, separator, glob = text.partition("=")
    if not (name and separator and glob):
        raise argparse.ArgumentTypeError(f"{text!r} is not DISTRIBUTION=GLOB")
    return canonicalize_name(name), glob


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--recipe", default="sglang", help="a shipped recipe, or the path of one")
    parser.add_argument("--sm", default="90")
    parser.add_argument("--isa", default="avx512")
    parser.add_argument("--python", help="minor version, or the path of a CPython, for all contestants")
    parser.add_argument("--bytecode", action="store_true", help="every contestant compiles modules ahead of time")
    parser.add_argument("--with-pip", action="store_true", help="also against python -m venv and pip")
    parser.add_argument("--rounds", type=int, default=1, help="how often; the order is reversed every other time")
    parser.add_argument("--change", type=_change, action="append", metavar="DISTRIBUTION=GLOB",
                        help=f"rebuild without these files; repeatable (default: {', '.join(_CHANGES)})")  # fmt: skip
    parser.add_argument("--work", type=Path, help="a folder on the store's file system (default: the store itself)")
    parser.add_argument("--output", type=Path, default=ROOT / f"bench/results/{today()}-cold-build.json")
    options = parser.parse_args()
    options.change = options.change or [_change(text) for text in _CHANGES]
    options.rounds = max(1, options.rounds)
    return options


def bench(options: argparse.Namespace) -> None:
    """Run all rounds, print the table and write the report."""
    _check_tools()
    with scratch_folder(options.work) as scratch:
        match = _match(options, scratch)
        _check_room(match, scratch)
        machine = machine_facts()
        outcomes = list(_rounds(match, scratch))
        ratios = _ratios(outcomes)
        report = _report(match, machine, ratios, outcomes)
    write_atomic(options.output, json.dumps(report, indent=1).encode() + b"\n")
    print(f"{_table(ratios, outcomes, machine)}\n\n{options.output}")


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

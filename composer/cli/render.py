"""What the commands print on standard output, for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from composer.model.finding import SEVERITIES, Finding
from composer.model.input import InputFacts
from composer.model.layer import Changes
from composer.model.lock import Lock
from composer.model.manifest import Floor, Manifest
from composer.model.plan import BuiltFacts, PlannedWheel, Summary
from composer.steps.artifact import artifact_path
from composer.steps.build import Built, built_facts
from composer.steps.decompressor import Unpacker
from composer.steps.fetch import Fetched
from composer.steps.outline import Outline
from composer.store import Store

_LARGEST = 15


def size(count: int) -> str:
    """Bytes in MB (10^6), or GB from a thousand of those."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def counted(count: int, what: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def console() -> Console:
    """Standard output; as wide as a screen where it is none."""
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=160)


def table(*columns: str) -> Table:
    """Names to the left, numbers (columns that start with `#`) to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column.lstrip("#"), justify="right" if column.startswith("#") else "left", overflow="fold")
    return made


def notes(warnings: Sequence[str], left_out: Sequence[str], stubs: Sequence[str] = (),
          not_served: Mapping[int, str] | None = None) -> None:  # fmt: skip
    """The lines below a plan: SMs that are not served, stubs, what was left out, warnings."""
    for sm, why in (not_served or {}).items():
        click.echo(f"without:  SM {sm}: {why}")
    for line in stubs:
        click.echo(f"stub:     {line}")
    for line in left_out:
        click.echo(f"left out: {line}")
    for line in warnings:
        click.echo(f"warning:  {line}")


def outline(decided: Outline, output: Path, store: Store, *, as_json: bool) -> None:
    """A plan made before the wheels are here: what would be downloaded."""
    local = {digest for digest, file in decided.local_files().items() if file.path.is_file()}
    rows = [
        PlannedWheel(name=one.name, version=one.version, size=artifact.size or 0,
                     fetched=artifact.sha256 in local or artifact_path(store.root, artifact).is_file())
        for one in decided.packages for artifact in one.artifacts
    ]  # fmt: skip
    missing = sorted((row for row in rows if not row.fetched), key=lambda row: -row.size)
    stubs = [one.summary for one in decided.recipe.stub]
    inputs = [one.facts for one in decided.inputs]
    if as_json:
        click.echo(msgspec.json.encode({
            "name": decided.name, "lock": decided.lock.filename, "interpreter": decided.interpreter.label,
            "torch": decided.torch, "built": built_facts(decided), "wheels": rows, "stubs": stubs, "inputs": inputs,
            "not_served": decided.not_served, "left_out": decided.left_out,
            "warnings": decided.warnings, "output": str(output),
        }))  # fmt: skip
        return
    _head(decided.name, decided.interpreter.label, decided.torch, decided.lock.filename, inputs)
    rows_shown = table("wheel", "version", "#MB", "state")
    for row in missing[:_LARGEST]:
        rows_shown.add_row(row.name, row.version, f"{row.size / 1e6:.1f}", "to download")
    console().print(rows_shown)
    total = sum(row.size for row in missing)
    click.echo(f"{len(missing)} of {len(rows)} wheels to download, {size(total)}; edits are planned once they are here")
    _from_source(built_facts(decided))
    left_out = [f"{one.name} {one.version}: {one.reason}" for one in decided.left_out]
    notes(decided.warnings, left_out, stubs, decided.not_served)
    click.echo(f"output:   {output}")


def _from_source(built: Sequence[BuiltFacts]) -> None:
    for one in built:
        click.echo(f"source:   {one.name} {one.version} from {one.source[:19]}..., build {one.key[:12]}")


def _head(name: str, interpreter: str, torch: str, lock: str, inputs: Sequence[InputFacts]) -> None:
    click.echo(f"{name}\n  interpreter: {interpreter}\n  torch:       {torch}\n  lock:        {lock}")
    for one in inputs:
        click.echo(f"  input:       {_input(one)}")


def _input(one: InputFacts) -> str:
    much = f"{counted(one.files, 'file')}, {counted(one.size, 'byte')}"
    return f"{one.name}, {much}, sha256 {one.sha256[:12]}, as {one.variable}"


def plan(summary: Summary, *, as_json: bool) -> None:
    """A complete plan: layers to make, edits, what was left out."""
    if as_json:
        click.echo(msgspec.json.encode(summary))
        return
    _head(summary.name, summary.interpreter, summary.torch, summary.lock, summary.inputs)
    todo = [layer for layer in summary.layers if not layer.cached]
    shown = [layer for layer in summary.layers if layer.edits or not layer.cached]
    rows_shown = table("distribution", "version", "#wheel MB", "state", "edits")
    for layer in sorted(shown, key=lambda layer: -layer.size)[:_LARGEST]:
        state = "cached" if layer.cached else "to compose"
        rows_shown.add_row(layer.name, layer.version, f"{layer.size / 1e6:.1f}", state, ", ".join(layer.edits))
    console().print(rows_shown)
    click.echo(
        f"{len(todo)} of {len(summary.layers)} layers to compose ({size(sum(one.size for one in todo))} of wheels)"
    )
    _from_source(summary.built)
    left_out = [f"{one.name} {one.version}: {one.reason}" for one in summary.left_out]
    notes(summary.warnings, left_out, summary.stubs, summary.not_served)
    click.echo("output is up to date" if summary.up_to_date else f"output:   {summary.output}")


def built(result: Built, seconds: float, known: Sequence[Finding], offered: Unpacker | None, *,
          as_json: bool) -> None:  # fmt: skip
    """The end of a build: what it made and what to do with it. known: findings that were shown with the plan."""
    manifest, path = result.manifest, result.path
    unpacked = sum(layer.size for layer in manifest.layers)
    if as_json:
        click.echo(msgspec.json.encode({
            "path": str(path), "sha256": result.digest, "size": path.stat().st_size, "unpacked": unpacked,
            "fingerprint": manifest.fingerprint, "seconds": round(seconds, 2), "up_to_date": result.up_to_date,
            "warnings": manifest.warnings, "findings": result.findings,
            "unzstd": str(offered.path) if offered and not offered.lacking else None,
        }))  # fmt: skip
        return
    for one in result.findings:
        if one.severity == "warning" and one not in known:
            finding(one)
    floors = ", ".join(_floor(name, floor) for name, floor in manifest.floors.items())
    click.echo(
        f"{'up to date' if result.up_to_date else 'built'} in {seconds:.1f} s\n"
        f"  bundle:  {path}\n"
        f"  size:    {size(path.stat().st_size)} ({size(unpacked)} unpacked)\n"
        f"  sha256:  {result.digest}\n"
        f"  host:    {floors}; NVIDIA driver\n"
        f"  proofs:  {tally(result.findings)} (compose verify --notes {path.name})\n"
        f"on the host:\n"
        f"  mkdir {manifest.name} && tar --zstd -xf {path.name} -C {manifest.name}\n"
        f"{_without_zstd(offered, f'{path.name} -C {manifest.name}')}"
        f"  {(manifest.serve or '{prefix}/bin/python').replace('{prefix}', manifest.name)}\n"
        f"{manifest.torch}"
    )


def _without_zstd(offered: Unpacker | None, rest: str) -> str:
    """What to type where there is no zstd program."""
    if offered is None:
        return ""
    if offered.lacking:
        return f"  (no {offered.path.name} beside it, for hosts without zstd: {offered.lacking})\n"
    return f"  (without a zstd program there: tar -I ./{offered.path.name} -xf {rest})\n"


def _floor(name: str, floor: Floor) -> str:
    """What a host needs: an SM is a kind, and so are a CPU's features; all others are least versions."""
    if name == "SM":
        return f"a GPU of SM {' or '.join(floor.version.split())}"
    return f"a CPU with {floor.version}" if name == "CPU" else f"{name} {floor.version} or newer"


def locked(lock: Lock, path: Path) -> None:
    """One line per lock, and what the closure leaves out."""
    total = sum(artifact.size or 0 for package in lock.packages for artifact in package.artifacts)
    click.echo(f"{path}: {len(lock.packages)} distributions, {size(total)}; {len(lock.excluded)} requirements left out")


def exported(paths: Sequence[Path], folder: Path) -> None:
    """After `fetch -o`."""
    click.echo(f"{len(paths)} files in {folder}")


def fetched(result: Fetched) -> None:
    """After `fetch`."""
    for one in result.missing:
        click.echo(f"left out: {one.package}: {one.reason}")
    total = sum(path.stat().st_size for path in result.paths.values())
    click.echo(f"{len(result.paths)} files at hand, {size(total)}")


def findings(manifest: Manifest, found: Sequence[Finding], *, notes: bool, as_json: bool) -> None:
    """The findings of a verification, the worst first; notes one by one only if they are asked for."""
    if as_json:
        click.echo(msgspec.json.encode({"name": manifest.name, "findings": found}))
        return
    for one in sorted(found, key=lambda one: SEVERITIES.index(one.severity)):
        if notes or one.severity != "note":
            finding(one)
    counts = Counter(one.id for one in found if one.severity == "note")
    if counts and not notes:
        rows = table("notes", "#count")
        for name, count in sorted(counts.items()):
            rows.add_row(name, str(count))
        console().print(rows)
    files = sum(len(layer.entries) for layer in manifest.layers)
    verdict = "not sound" if any(one.severity == "error" for one in found) else "sound"
    click.echo(f"{manifest.name}: {verdict}; {counted(files, 'file')}, {tally(found)}")


def finding(one: Finding) -> None:
    """One finding and what to do about it."""
    click.echo(f"{one.severity}: {one.id}: {one.subject}: {one.evidence}")
    if one.fix:
        click.echo(f"  fix: {one.fix}")


def tally(found: Sequence[Finding]) -> str:
    """`0 errors, 1 warning, 2 notes`."""
    counts = Counter(one.severity for one in found)
    return ", ".join(counted(counts[severity], severity) for severity in SEVERITIES)


def manifest(shown: Manifest, path: Path) -> None:
    """A bundle's summary, its largest layers, and every edit."""
    compressed, unpacked = (sum(values) for values in zip(*((x.compressed, x.size) for x in shown.layers), strict=True))
    target = ", ".join(f"{key} {value}" for key, value in shown.target.items())
    click.echo(
        f"{shown.name}\n  target:      {target}\n  recipe:      {_recipe(shown)}\n"
        f"  interpreter: {shown.interpreter}\n  torch:       {shown.torch}\n"
        f"  size:        {size(compressed)} ({size(unpacked)} unpacked), {path}\n  fingerprint: {shown.fingerprint}"
    )
    for one in shown.built:
        click.echo(f"  from source: {one.name} {one.version} ({one.source}, build {one.key[:12]})")
    for given in shown.inputs:
        click.echo(f"  input:       {_input(given)}")
    for name, floor in shown.floors.items():
        click.echo(f"  needs:       {_floor(name, floor)}, because of {floor.because}")
    rows_shown = table("layer", "version", "#MB", "#unpacked MB", "#files")
    for layer in sorted(shown.layers, key=lambda layer: -layer.compressed)[:_LARGEST]:
        rows_shown.add_row(layer.name, layer.version, f"{layer.compressed / 1e6:.1f}", f"{layer.size / 1e6:.1f}",
                      str(len(layer.entries)))  # fmt: skip
    screen = console()
    screen.print(rows_shown)
    click.echo(f"{len(shown.layers)} layers; edits:")
    for layer in shown.layers:
        _changes(layer.name, layer.changes)
    notes(shown.warnings, [f"{one.name} {one.version}: {one.reason}" for one in shown.left_out])


def _recipe(shown: Manifest) -> str:
    overlays = shown.recipe.get("overlays")
    return f"{shown.recipe['name']} {shown.recipe['version']}{f' with {overlays}' if overlays else ''}"


def _changes(name: str, changes: Changes) -> None:
    for line in changes.requires:
        click.echo(f"  {name}: {line.was} -> {line.now or 'dropped'} ({line.reason})")
    for one in changes.pruned:
        click.echo(f"  {name}: {one.pattern}: {counted(one.files, 'file')}, {size(one.size)} left out ({one.reason})")
    for edit in changes.files:
        click.echo(f"  {name}: {edit.kind} {edit.path.rpartition('/')[2]}: {edit.detail}")

"""The commands of `compose`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

import composer
from composer.cli import options, render
from composer.cli.check import check
from composer.cli.delta import apply, delta
from composer.cli.detect import detect
from composer.cli.diff import diff
from composer.cli.estimate import estimate
from composer.cli.explain import explain_library
from composer.cli.gpu import gpu_code
from composer.cli.graph import graph
from composer.cli.isa import isa
from composer.cli.k8s import k8s
from composer.cli.lanes import lanes
from composer.cli.lock import lock
from composer.cli.matrix import matrix
from composer.cli.model import model
from composer.cli.profile import profile
from composer.cli.progress import drawn
from composer.cli.push import pull, push
from composer.cli.remote import REMOTE, remote, store_with, told
from composer.cli.select import select
from composer.cli.service import service
from composer.cli.slim import slim
from composer.cli.targets import targets
from composer.cli.toolchain import toolchain
from composer.cli.unpack import prune, rollback, unpack
from composer.cli.unzstd import unzstd
from composer.cli.wheel import wheel
from composer.errors import VerifyError
from composer.steps.build import at_hand, build_sources, fetch_all, prepare, sources, summarise
from composer.steps.build import build as run_build
from composer.steps.decompressor import decompressor_sources, offer_decompressor
from composer.steps.fetch import export_wheelhouse
from composer.steps.outline import Outline, outline
from composer.steps.tree import read_manifest
from composer.steps.verify import verify as run_verify
from composer.store import Store


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(composer.__version__, prog_name="compose")
def compose() -> None:
    """Compose CUDA wheels into one relocatable bundle for a GPU architecture, or several, and a CPU instruction set."""


compose.add_command(gpu_code)
compose.add_command(pull)
compose.add_command(push)
compose.add_command(remote)


def _bundle_path(decided: Outline, folder: Path) -> Path:
    return folder.absolute() / f"{decided.name}.tar.zst"


@compose.command()
@options.with_options(options.TARGET, options.SHAPE, options.WORK, REMOTE)
@click.option(
    "--imports/--no-imports",
    default=True,
    show_default=True,
    help="Import the recipe's modules from the finished bundle, which is unpacked for that.",
)
@options.UNZSTD
@click.option("--dry-run", is_flag=True, help="Show the plan and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan, and then the result, as JSON.")
def build(*, unpacker: bool, dry_run: bool, as_json: bool, remote_url: str | None = None,
          remote_key: Path | None = None, **kwargs: Any) -> None:  # noqa: ANN401  # fmt: skip
    """Build a bundle: NAME.tar.zst and NAME.tar.zst.sha256, and once beside all bundles what unpacks them."""
    started = time.monotonic()
    settings, shape = options.settings(kwargs), options.shape(kwargs)
    with drawn(quiet=as_json) as listener:
        # A plan downloads nothing.
        store = Store() if dry_run else store_with(remote_url, remote_key, listener)
        decided = outline(options.request(kwargs), store)
        output = _bundle_path(decided, kwargs["output"])
        if dry_run and not at_hand(decided, store, settings):
            render.outline(decided, output, store, as_json=as_json)
            return
        prepared = prepare(decided, store, replace(settings, offline=settings.offline or dry_run), shape, listener)
        render.plan(summarise(prepared, output), as_json=as_json)
        if dry_run:
            return
        built = run_build(prepared, store, settings, output, listener)
        seconds = time.monotonic() - started
        offered = offer_decompressor(
            decided.target.machine, output.parent, store, offline=settings.offline, wheelhouses=settings.wheelhouses,
            listener=listener,
        ) if unpacker else None  # fmt: skip
        traffic = store.finish()
    if not as_json:
        told(traffic)
    render.built(built, seconds, prepared.plan.findings, offered, as_json=as_json)


@compose.command()
@options.with_options(options.TARGET, options.SHAPE, options.WORK)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plan(context: click.Context, /, **kwargs: Any) -> None:  # noqa: ANN401
    """Show what a build would do: `build --dry-run`. Nothing is downloaded."""
    context.invoke(build, dry_run=True, **kwargs)


@compose.command()
@options.with_options(options.TARGET, options.WORK)
@click.option(
    "--output", "-o", type=options.PATH, help="Also put every file into this folder, for --wheelhouse elsewhere."
)
def fetch(*, output: Path | None, **kwargs: Any) -> None:  # noqa: ANN401
    """Download everything that a build needs."""
    store = Store()
    decided = outline(options.request(kwargs), store)
    with drawn() as listener:
        # A site may do without unzstd, and an index without what it is made from.
        unpacker = [replace(one, optional=True) for one in decompressor_sources()]
        more = [*build_sources(decided), *unpacker]
        fetched = fetch_all(decided, store, options.settings(kwargs), listener, more)
    if output:
        # By digest: the compiler of unzstd is one of the recipe's tools, too.
        artifacts = {one.sha256: one for package in (*sources(decided), *more) for one in package.artifacts}
        render.exported(export_wheelhouse(artifacts.values(), fetched, output), output)
    render.fetched(fetched)


@compose.command()
@click.argument("bundle", type=options.PATH)
@click.option("--imports/--no-imports", default=True, show_default=True, help="Import modules in a child process.")
@click.option("--notes", is_flag=True, help="List the notes, too, not only how many there are.")
@options.JOBS
@click.option("--json", "as_json", is_flag=True, help="Print findings as JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def verify(*, bundle: Path, imports: bool, notes: bool, jobs: int, as_json: bool,
           debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Check a bundle, or the folder it was unpacked into, against its manifest."""
    with drawn(quiet=as_json) as listener:
        manifest, findings = run_verify(bundle, Store(), imports=imports, jobs=jobs, listener=listener)
    render.findings(manifest, findings, notes=notes, as_json=as_json)
    errors = sum(one.severity == "error" for one in findings)
    if errors:
        raise VerifyError(render.counted(errors, "fault"), where=str(bundle), fix="See the findings above.")


@compose.command()
@click.argument("bundle", type=options.PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def inspect(*, bundle: Path, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Show what a bundle, packed or unpacked, holds and what was changed in it."""
    manifest, data = read_manifest(bundle)
    if as_json:
        click.echo(msgspec.json.format(data).decode())
    else:
        render.manifest(manifest, bundle)


compose.add_command(apply)
compose.add_command(check)
compose.add_command(delta)
compose.add_command(detect)
compose.add_command(diff)
compose.add_command(estimate)
compose.add_command(explain_library)
compose.add_command(graph)
compose.add_command(isa)
compose.add_command(k8s)
compose.add_command(lanes)
compose.add_command(lock)
compose.add_command(matrix)
compose.add_command(model)
compose.add_command(profile)
compose.add_command(prune)
compose.add_command(rollback)
compose.add_command(select)
compose.add_command(service)
compose.add_command(slim)
compose.add_command(targets)
compose.add_command(toolchain)
compose.add_command(unpack)
compose.add_command(unzstd)
compose.add_command(wheel)

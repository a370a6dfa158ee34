"""`compose detect`: what this host is."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from composer.cli import render
from composer.host.detect import survey
from composer.runtime.host.detect import host_rows, size


@click.command("detect")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for `compose select --host` elsewhere.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def detect(*, as_json: bool, debug: bool) -> None:  # noqa: ARG001
    """Show what this host is, as far as bundles care: GPUs, driver, CPU, C library, memory and limits.

    A bundle's bin/compose-detect shows the same where compose is not installed. No GPU is initialised, and nothing is
    asked of the network.
    """
    found = survey()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    if found["gpus"]:
        _show_gpus(found)
    rows = {**dict(host_rows(found)), "microarchitecture": f"{found['cpu']['microarchitecture']} (archspec)"}
    for name, value in rows.items():
        click.echo(f"{name:<19}{value}")
    for note in found["notes"]:
        click.echo(f"note: {note}")


def _show_gpus(found: dict[str, Any]) -> None:
    shown = render.table("GPU", "name", "#SM", "#memory", "#free", "#°C", "#% busy", "PCI", "seen by CUDA")
    for gpu in found["gpus"]:
        visible = "yes" if gpu["index"] in found["visible"] else "no"
        shown.add_row(
            str(gpu["index"]), _mig(gpu), _known(gpu["sm"]),
            size(gpu["memory_bytes"], "?"), size(gpu["free_bytes"], "?"),
            _known(gpu["temperature_c"]), _known(gpu["utilization"]), _known(gpu["pci"]), visible,
        )  # fmt: skip
    render.console().print(shown)


def _mig(gpu: dict[str, Any]) -> str:
    parts = "" if gpu["mig"] is None else f", {render.counted(len(gpu['mig']), 'MIG instance')}"
    return f"{gpu['name'] or 'unknown'}{parts}"


def _known(value: object) -> str:
    return "?" if value is None else str(value)

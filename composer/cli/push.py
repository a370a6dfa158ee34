"""`compose push` and `compose pull`: bundles to and from OCI registries."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from composer.cli import options, render
from composer.cli.progress import drawn
from composer.host.index import SCHEMA, Index, read_bundle
from composer.steps.oci import Pushed
from composer.steps.oci import pull as run_pull
from composer.steps.oci import push as run_push
from composer.store import Store

_PLAIN_HTTP = click.option("--plain-http", is_flag=True,
                           help="Ask without encryption; a registry on this machine always is.")  # fmt: skip


@click.command()
@click.argument("bundle", type=options.PATH)
@click.argument("address", metavar="oci://REGISTRY/REPOSITORY[:TAG]")
@_PLAIN_HTTP
@options.JOBS
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def push(*, bundle: Path, address: str, plain_http: bool, jobs: int, as_json: bool,
         debug: bool) -> None:  # noqa: ARG001  # fmt: skip
    """Put a bundle into a registry. Layers that it has, of any bundle, are not sent again.

    Without TAG the bundle's name is the tag. Logins are Docker's: `docker login REGISTRY`, ~/.docker/config.json.
    """
    with drawn(quiet=as_json) as listener:
        pushed = run_push(bundle, address, Store(), index_of=lambda sha256: _index(bundle, sha256), jobs=jobs,
                          listener=listener, plain_http=plain_http)  # fmt: skip
    if as_json:
        click.echo(msgspec.json.encode({
            "reference": str(pushed.reference), "digest": pushed.digest, "uploaded": pushed.uploaded,
            "present": pushed.present, "mounted": pushed.mounted,
        }))  # fmt: skip
        return
    click.echo(f"{pushed.reference}@{pushed.digest}")
    click.echo(f"  {_sent(pushed)}")


def _index(bundle: Path, sha256: str) -> str:
    facts = msgspec.structs.replace(read_bundle(bundle), sha256=sha256)
    return msgspec.json.encode(Index(schema=SCHEMA, bundles=(facts,))).decode()


def _sent(pushed: Pushed) -> str:
    words = {"uploaded": pushed.uploaded, "there before": pushed.present, "from other repositories": pushed.mounted}
    return ", ".join(f"{render.size(sum(sizes))} {how} ({render.counted(len(sizes), 'blob')})"
                     for how, sizes in words.items() if sizes)  # fmt: skip


@click.command()
@click.argument("address", metavar="oci://REGISTRY/REPOSITORY:TAG|@sha256:...")
@click.option("--output", "-o", type=options.PATH, default=Path(), help="Folder of the bundle. Default: this one.")
@_PLAIN_HTTP
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def pull(*, address: str, output: Path, plain_http: bool, debug: bool) -> None:  # noqa: ARG001
    """Get a bundle out of a registry, byte by byte as it was pushed, with its .sha256.

    A tag may be moved by who may write to the registry; a digest, as `compose push` prints it, may not.
    """
    with drawn() as listener:
        pulled = run_pull(address, output.absolute(), listener=listener, plain_http=plain_http)
    click.echo(f"{pulled.path}{'' if pulled.fresh else ' (was here already)'}")
    click.echo(f"  sha256 {pulled.sha256}")

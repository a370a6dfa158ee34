"""The remote behind the store: its options, what is told of it, and `compose remote`."""

from __future__ import annotations

from pathlib import Path

import click

from composer.cli import render
from composer.cli.progress import drawn
from composer.errors import FetchError, RecipeError
from composer.events import Listener, silent
from composer.remote import SHARED, Remote, Traffic, open_remote
from composer.store import Store

#: For every command that composes.
REMOTE = (
    click.option("--remote", "remote_url", metavar="URL", envvar="WHEEL_COMPOSER_REMOTE",
                 help="Share what is composed: s3://BUCKET/PREFIX, file:///FOLDER, any URL of fsspec."),
    click.option("--remote-key", metavar="FILE", envvar="WHEEL_COMPOSER_REMOTE_KEY",
                 type=click.Path(path_type=Path), help="Sign what is shared with this secret, and take nothing else."),
)  # fmt: skip


def store_with(url: str | None, key: Path | None, listener: Listener = silent) -> Store:
    """The store, with the remote that the options name. RecipeError for a key without a remote."""
    if url is None and key is not None:
        raise RecipeError("a key, but no remote", where="--remote-key", fix="Give --remote, too.")
    return Store(remote=open_remote(url, key=key, listener=listener) if url else None)


def told(traffic: Traffic) -> None:
    """One line of what went to and from the remote, if anything did. Warnings were told when they came up."""
    words = [
        f"{render.counted(count, 'object')} {how} ({render.size(size)})"
        for count, size, how in ((traffic.fetched, traffic.fetched_bytes, "fetched"),
                                 (traffic.stored, traffic.stored_bytes, "stored")) if count
    ]  # fmt: skip
    if words:
        click.echo(f"remote: {', '.join(words)}")


@click.group("remote")
def remote() -> None:
    """Fill and check a store that machines share."""


@remote.command()
@click.argument("url", envvar="WHEEL_COMPOSER_REMOTE")
@REMOTE[1]
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def fill(*, url: str, remote_key: Path | None, debug: bool) -> None:  # noqa: ARG001
    """Upload everything of this machine's store that may be shared and is not at URL.

    Exit status: 4 when something could not be uploaded.
    """
    with drawn() as listener:
        store = store_with(url, remote_key, listener)
        missing = store.share()
        traffic = store.finish()
    told(traffic)
    if traffic.stored < missing:
        raise FetchError(f"{render.counted(missing - traffic.stored, 'object')} could not be uploaded", where=url,
                         fix="See the warnings above; the same command goes on from here.")  # fmt: skip
    click.echo(f"{render.counted(missing, 'object')} were missing there")


@remote.command()
@click.argument("url", envvar="WHEEL_COMPOSER_REMOTE")
@REMOTE[1]
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def check(*, url: str, remote_key: Path | None, debug: bool) -> None:  # noqa: ARG001
    """Read everything at URL and compare it with its digests, and with the key if there is one.

    Exit status: 4 when something there is damaged.
    """
    with drawn() as listener:
        there = open_remote(url, key=remote_key, listener=listener)
        found = list(there.keys())
        sound = sum(_is_sound(there, kind, key) for kind, key in found)
    if sound < len(found):
        raise FetchError(f"{len(found) - sound} of {render.counted(len(found), 'object')} are not sound", where=url,
                         fix="Nothing uses them; the next machine that makes one of them replaces it.")  # fmt: skip
    click.echo(f"{render.counted(len(found), 'object')}, all sound ({render.size(there.finish().fetched_bytes)})")


def _is_sound(there: Remote, kind: str, key: str) -> bool:
    if kind not in SHARED:
        return True
    record = there.find(kind, key)
    if record is None:
        return False
    with Store().scratch() as folder:
        return there.fetch(record, folder) is not None

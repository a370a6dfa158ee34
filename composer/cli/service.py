"""`compose service`: the bundle's own `compose-service`, for a bundle in any place."""

from __future__ import annotations

import click

from composer.runtime.service import cli as runtime


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def service(context: click.Context, *, arguments: tuple[str, ...]) -> None:
    """Run a bundle's server as a service. `compose service --help` lists all; --prefix names the bundle."""
    context.exit(runtime.run(arguments, "compose service", None))

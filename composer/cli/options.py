"""Options that several commands have, and what they mean."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from composer.cli.duration import Duration
from composer.errors import RecipeError
from composer.steps.build import Settings
from composer.steps.locks import LockOptions, Mode
from composer.steps.outline import Request
from composer.steps.plan import LEVELS, SLIM, Options

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
#: Threads of a command that needs no more than their number.
JOBS = click.option("--jobs", "-j", type=click.IntRange(1), default=lambda: len(os.sched_getaffinity(0)),
                    help="Threads. Default: the cores this process may use.")  # fmt: skip

UNZSTD = click.option("--unzstd/--no-unzstd", "unpacker", default=True, show_default=True,
                      help="Put unzstd-MACHINE beside the bundle, for hosts without a zstd program.")  # fmt: skip


class _NamedPath(click.ParamType[tuple[str, Path]]):
    """`NAME=PATH`."""

    name = "input"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:  # noqa: ANN401
        """The name, and the path as it holds in every folder, for steps that run elsewhere."""
        if isinstance(value, tuple):
            return value
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            self.fail(f"{value!r} is not NAME=PATH", param, ctx)
        return name, Path(path).absolute()


#: What the stack is made from.
STACK = (
    click.option("--python", metavar="VERSION|PATH|host[:VERSION]",
                 help="Minor version, path of a CPython to bundle, or none: the host's. Default: the recipe's order."),
    click.option("--overlay", "overlays", multiple=True, metavar="NAME|PATH",
                 help="Change the recipe: `lean` leaves out what serving text models never calls."),
    click.option("--input", "inputs", type=_NamedPath(), multiple=True, metavar="NAME=PATH",
                 help="A file or folder of your own that the recipe or an overlay takes; the bundle carries it."),
    click.option("--torch", metavar="auto|wheel|source|PATH", default="auto", show_default=True,
                 help="How PyTorch is had: auto builds it if that is possible here within the budget."),
    click.option("--torch-budget", "budget", type=Duration(), default="1h", show_default=True,
                 help="How long a build may take that was not asked for by name: 90m, 2h, 0 for none."),
    click.option("--no-binary", multiple=True, metavar="NAME",
                 help="Build this component from source, instead of taking its wheel."),
)  # fmt: skip
#: What is composed, for which target.
TARGET = (
    click.option("--recipe", help="A shipped recipe, or the path of one. Default: sglang, or that of --variant."),
    click.option("--sm", help="GPU architecture: 90, sm90 or 9.0; several in one bundle: 80,90 or 80+90; or all that "
                              "the recipe serves."),
    click.option("--gpu", "gpus", multiple=True, metavar="NAME",
                 help="The same by a GPU's name: H100, 'RTX 5090'; repeatable."),
    click.option("--isa", help="CPU instruction set: avx2, avx512, ..."),
    click.option("--variant", metavar="NAME",
                 help="All at once: sglang-python312-cuda12_8-sm90-avx512. `compose targets` tells which there are."),
    *STACK,
)  # fmt: skip
#: How to work, which does not change the result.
WORK = (
    click.option("--offline", is_flag=True, help="Ask no index; use the store and --wheelhouse."),
    click.option("--wheelhouse", "wheelhouses", type=PATH, multiple=True, help="A folder of wheels to use first."),
    click.option("--locked", is_flag=True, help="Fail when the recipe changed after it was locked."),
    click.option("--frozen", is_flag=True, help="Use the lock as it is, without a look at the recipe."),
    click.option("--jobs", "-j", type=click.IntRange(1),
                 help="Threads, and compilers at a time. Default: the cores this process may use."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)  # fmt: skip
#: What shapes the bundle.
SHAPE = (
    click.option("--compress", type=click.Choice(list(LEVELS)), default="default", show_default=True,
                 help="fast: zstd 3; default: zstd 9; max: zstd 19. All match over 64 MiB."),
    click.option("--bytecode/--no-bytecode", default=True, show_default=True, help="Compile modules ahead of time."),
    click.option("--slim", type=click.Choice(SLIM), default=SLIM[0], show_default=True,
                 help="Cut code for other GPUs from libraries: those whose licence allows it, all, or none."),
    click.option("--keep-ptx", is_flag=True, help="Keep the newest PTX, which the driver compiles for later GPUs."),
    click.option("--accept-license-modification", "accept_licence_modification", is_flag=True,
                 help="With --slim all: modify what may only be passed on unmodified. The bundle stays in your house."),
    click.option("--output", "-o", type=PATH, default=Path("dist"), show_default=True, help="Folder of the bundle."),
)  # fmt: skip


def with_options(*groups: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """Several groups of options as one decorator."""

    def decorate(function: F) -> F:
        options = [option for group in groups for option in group]
        return functools.reduce(lambda done, option: option(done), reversed(options), function)

    return decorate


def lock_options(kwargs: dict[str, Any]) -> LockOptions:
    """What --locked, --frozen and --offline say. RecipeError for the first two together."""
    if kwargs["locked"] and kwargs["frozen"]:
        raise RecipeError("--locked and --frozen contradict each other", fix="Give one of them.")
    mode: Mode = "locked" if kwargs["locked"] else "frozen" if kwargs["frozen"] else "auto"
    return LockOptions(mode=mode, offline=kwargs["offline"])


def request(kwargs: dict[str, Any]) -> Request:
    """What the user asked for. Threads are as many as there are cores; compilers only if the user says how many."""
    return Request(
        recipe=kwargs["recipe"], sm=kwargs["sm"], gpus=kwargs["gpus"], isa=kwargs["isa"], variant=kwargs["variant"],
        python=kwargs["python"], torch=kwargs["torch"],
        no_binary=kwargs["no_binary"], budget=kwargs["budget"], jobs=kwargs["jobs"],
        lock=lock_options(kwargs),
        wheelhouses=kwargs["wheelhouses"], private=kwargs.get("slim") == "all", overlays=kwargs["overlays"],
        inputs=kwargs["inputs"],
    )  # fmt: skip


def threads(kwargs: dict[str, Any]) -> int:
    """--jobs, or the cores that this process may use."""
    return kwargs["jobs"] or len(os.sched_getaffinity(0))


def settings(kwargs: dict[str, Any]) -> Settings:
    """How to work."""
    return Settings(jobs=threads(kwargs), offline=kwargs["offline"], wheelhouses=kwargs["wheelhouses"],
                    imports=kwargs.get("imports", True))  # fmt: skip


def shape(kwargs: dict[str, Any]) -> Options:
    """What shapes the bundle."""
    return Options(**{one.name: kwargs[one.name] for one in fields(Options)})

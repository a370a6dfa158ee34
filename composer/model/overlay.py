"""An overlay: a change to a recipe that a user asks for. Most alter what is composed of the locked distributions and
share the recipe's lock; one that asks for other versions has a lock of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from composer.errors import RecipeError
from composer.model._strict import Record, convert
from composer.model.input import Input
from composer.model.recipe import (
    SCHEMA,
    Component,
    Link,
    Prune,
    PthFile,
    Recipe,
    Refusal,
    RequiresEdit,
    RpathRule,
    Stub,
    check_recipe,
)

#: It becomes a part of the bundle's name, which its own hyphens separate.
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_]{0,30}")
#: Further parts of a bundle's name: it carries no Python; it must not be passed on.
HOST_PYTHON, PRIVATE = "hostpython", "private"
_LISTS: Final = ("patches", "prune", "links", "rpath", "pth", "imports")


class OverlayComponent(Record, frozen=True, kw_only=True):
    """What an overlay adds to the edits of a distribution; the keys mean what they mean in a component.

    version: takes the place of the recipe's.
    """

    name: str
    version: str | None = None
    patches: tuple[str, ...] = ()
    prune: tuple[Prune, ...] = ()
    links: tuple[Link, ...] = ()
    rpath: tuple[RpathRule, ...] = ()
    pth: tuple[PthFile, ...] = ()
    imports: tuple[str, ...] = ()


class Overlay(Record, frozen=True, kw_only=True):
    """Additions to a recipe, and values that replace the recipe's own: of variables, and of `serve`.

    sm: the only targets that it is meant for; empty for all of the recipe's. requires: edits that take the place of
    those that the recipe has for the same requirement.
    """

    schema: int
    summary: str
    sm: tuple[int, ...] = ()
    requires: tuple[RequiresEdit, ...] = ()
    component: tuple[OverlayComponent, ...] = ()
    stub: tuple[Stub, ...] = ()
    input: tuple[Input, ...] = ()
    environment: Mapping[str, str] = {}
    serve: str | None = None

    @property
    def relocks(self) -> bool:
        """Whether it changes which distributions are locked."""
        return bool(self.requires) or any(one.version for one in self.component)


def parse_overlay(data: Mapping[str, Any], recipe: Recipe, where: str) -> Overlay:
    """An overlay from TOML data, checked by the rules for recipes; RecipeError has paths within the overlay."""
    if data.get("schema") != SCHEMA:
        raise RecipeError(f"overlay schema {data.get('schema')!r} is not {SCHEMA}", where=f"{where}: schema",
                          fix="Use the version of compose that this overlay was written for.")  # fmt: skip
    overlay = convert(data, Overlay, where)
    alone = msgspec.structs.replace(
        recipe, component=tuple(map(_component, overlay.component)), stub=overlay.stub, native=(),
        requires=overlay.requires, input=overlay.input, environment=overlay.environment,
    )  # fmt: skip
    check_recipe(alone, where)
    return overlay


def overlaid(recipe: Recipe, overlays: Mapping[str, Overlay]) -> Recipe:
    """The recipe with overlays, by name, which are a set: their order does not matter.

    RecipeError when a name cannot be a part of a file name, when two overlays give a value differently or replace the
    same library, and when the result contradicts itself.
    """
    ordered = sorted(overlays.items())
    RecipeError.collect([*_bad_names(overlays), *_contradictions(ordered)])
    values = {name: value for _, one in ordered for name, value in one.environment.items()}
    serves = [one.serve for _, one in ordered if one.serve is not None]
    result = msgspec.structs.replace(
        recipe,
        component=_components(recipe.component, [entry for _, one in ordered for entry in one.component]),
        requires=_requires(recipe.requires, [edit for _, one in ordered for edit in one.requires]),
        stub=(*recipe.stub, *(stub for _, one in ordered for stub in one.stub)),
        input=_inputs(recipe.input, [one for _, overlay in ordered for one in overlay.input]),
        environment={**recipe.environment, **values},
        serve=serves[0] if serves else recipe.serve,
        **_targets(recipe, ordered),
    )
    check_recipe(result, " with ".join([recipe.name, *(name for name, _ in ordered)]))
    return result


def _component(entry: OverlayComponent) -> Component:
    return Component(name=entry.name, version=entry.version, **{key: getattr(entry, key) for key in _LISTS})


def _components(components: Sequence[Component], entries: Sequence[OverlayComponent]) -> tuple[Component, ...]:
    found = {one.name: one for one in components}
    for entry in entries:
        own = found.get(entry.name, Component(name=entry.name))
        more = {key: (*getattr(own, key), *getattr(entry, key)) for key in _LISTS}
        found[entry.name] = msgspec.structs.replace(own, version=entry.version or own.version, **more)
    return tuple(found.values())


def _requires(edits: Sequence[RequiresEdit], more: Sequence[RequiresEdit]) -> tuple[RequiresEdit, ...]:
    """Of two overlays that agree on an edit one is taken."""
    replaced = {(one.name, one.of): one for one in more}
    return (*(one for one in edits if (one.name, one.of) not in replaced), *replaced.values())


def _inputs(inputs: Sequence[Input], more: Sequence[Input]) -> tuple[Input, ...]:
    """Of two overlays that agree on an input one is taken."""
    return (*inputs, *{one.name: one for one in more}.values())


def _targets(recipe: Recipe, overlays: Sequence[tuple[str, Overlay]]) -> dict[str, Any]:
    """The targets that every overlay is meant for, and why the recipe's others are refused."""
    served, refusals = recipe.sm, recipe.refuse
    for name, overlay in overlays:
        if lost := tuple(sm for sm in served if overlay.sm and sm not in overlay.sm):
            meant = ", ".join(map(str, overlay.sm))
            refusals = (*refusals, Refusal(sm=lost, reason=f"the overlay {name!r} is meant for SM {meant} only"))
            served = tuple(sm for sm in served if sm not in lost)
    if not served:
        raise RecipeError(f"no target of {recipe.name} is left", where="--overlay",
                          why="; ".join(one.reason for one in refusals[len(recipe.refuse) :]))  # fmt: skip
    return {"sm": served, "refuse": refusals}


def _bad_names(names: Mapping[str, Overlay]) -> Iterator[RecipeError]:
    for name in names:
        if not _NAME.fullmatch(name):
            yield RecipeError(f"{name!r} cannot be an overlay's name", where="--overlay",
                              fix="Name its file with letters, digits and underscores only.")  # fmt: skip
        elif name in (HOST_PYTHON, PRIVATE):
            yield RecipeError(f"{name!r} has another meaning in a bundle's name", where="--overlay",
                              fix="Give its file another name.")  # fmt: skip


def _contradictions(overlays: Sequence[tuple[str, Overlay]]) -> Iterator[RecipeError]:
    """Values that two overlays give differently."""
    first: dict[str, tuple[str, object]] = {}
    for name, overlay in overlays:
        for path, value in _values(overlay):
            other, given = first.setdefault(path, (name, value))
            if given != value:
                yield RecipeError(f"overlays {other!r} and {name!r} contradict each other", where=path,
                                  why=f"{given!r} and {value!r}", fix="Choose one of them.")  # fmt: skip


def _values(overlay: Overlay) -> Iterator[tuple[str, object]]:
    """(dotted path, value) of all that can be given once."""
    for name, value in overlay.environment.items():
        yield f"environment.{name}", value
    if overlay.serve is not None:
        yield "serve", overlay.serve
    for stub in overlay.stub:
        yield f"stub {stub.library}", stub
    for one in overlay.input:
        yield f"input {one.name}", one
    for edit in overlay.requires:
        yield f"requires {edit.name}{f' of {edit.of}' if edit.of else ''}", edit.to
    for component in overlay.component:
        if component.version is not None:
            yield f"component {component.name}.version", component.version

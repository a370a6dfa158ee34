"""Whether a recipe composes a target, and every reason why not; and so for all targets and recipes: the matrix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from composer.errors import RecipeError
from composer.model.recipe import Recipe
from composer.model.target import Gpu, Target, Targets, gpu_faults, target_faults
from composer.model.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """On a variant. recipe: that composes it, as `--recipe` spells it; empty where none does, for these `reasons`.

    sms: what it is composed for. left_out: why a variant for all that a recipe serves is without an architecture.
    """

    variant: Variant
    recipe: str = ""
    sms: tuple[int, ...] = ()
    reasons: tuple[RecipeError, ...] = ()
    left_out: Mapping[int, tuple[RecipeError, ...]]

    @property
    def plannable(self) -> bool:
        """Whether a recipe composes it."""
        return bool(self.recipe)


def judge(variant: Variant, recipes: Mapping[str, Recipe], targets: Targets) -> Verdict:
    """Which of the recipes (by their spelling) composes a variant: those of its name, on its CUDA."""
    offered = {
        one: recipe for one, recipe in recipes.items() if (recipe.name, recipe.cuda) == (variant.stack, variant.cuda)
    }
    if not offered:
        own = target_faults(variant.target(targets), targets)
        return Verdict(variant=variant, reasons=_once([_not_offered(variant, recipes), *own]), left_out={})
    verdicts = [_judge(variant, spelling, recipe, targets) for spelling, recipe in offered.items()]
    refused = Verdict(variant=variant, reasons=_once(fault for one in verdicts for fault in one.reasons), left_out={})
    return next((one for one in verdicts if one.plannable), refused)


def recipe_for(variant: Variant, recipes: Mapping[str, Recipe], targets: Targets) -> str:
    """The spelling of the recipe that composes a variant. RecipeError with every reason where none does."""
    verdict = judge(variant, recipes, targets)
    RecipeError.collect(verdict.reasons)
    return verdict.recipe


def _judge(variant: Variant, spelling: str, recipe: Recipe, targets: Targets) -> Verdict:
    found = serving(recipe, variant.target(targets), targets)
    if found.reasons:
        return Verdict(variant=variant, reasons=found.reasons, left_out={})
    return Verdict(variant=variant, recipe=spelling, sms=found.sms, left_out=found.left_out)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Which of a target's architectures a recipe composes in one bundle; none, for these `reasons`.

    left_out: where the target is for all that the recipe serves, why the others are not among them.
    """

    sms: tuple[int, ...] = ()
    reasons: tuple[RecipeError, ...] = ()
    left_out: Mapping[int, tuple[RecipeError, ...]]


def serving(recipe: Recipe, target: Target, targets: Targets) -> Serving:
    """What a recipe composes of a target: all of its architectures or none; without any, all that the recipe serves."""
    wanted = target.sms or tuple(sorted({*map(int, targets.sm), *recipe.sm}))
    faults = {sm: _once(faults_of(recipe, replace(target, sms=(sm,)), targets)) for sm in wanted}
    served = tuple(sm for sm in wanted if not faults[sm])
    refused = {sm: found for sm, found in faults.items() if found}
    if not served or (target.sms and refused):
        # Of an architecture that the recipe does not claim, nothing is told that is not asked for.
        told = target.sms or recipe.sm
        return Serving(reasons=_once(one for sm in told for one in faults[sm]), left_out={})
    return Serving(sms=served, left_out=refused)


def faults_of(recipe: Recipe, target: Target, targets: Targets) -> Iterator[RecipeError]:
    """Every reason why a recipe does not compose a target: contradictions of the target, and refusals of the recipe."""
    yield from target_faults(target, targets)
    yield from recipe.target_faults(target)


def _once(faults: Iterable[RecipeError]) -> tuple[RecipeError, ...]:
    return tuple({str(one): one for one in faults}.values())


def _not_offered(variant: Variant, recipes: Mapping[str, Recipe]) -> RecipeError:
    releases = sorted({recipe.cuda for recipe in recipes.values() if recipe.name == variant.stack})
    if releases:
        return RecipeError(f"{variant.stack} is not offered on CUDA {variant.cuda}", where="--variant",
                           fix=f"Offered: {', '.join(releases)}.")  # fmt: skip
    names = sorted({recipe.name for recipe in recipes.values()})
    near = difflib.get_close_matches(variant.stack, names, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names) or 'none'}."
    return RecipeError(f"no recipe {variant.stack!r}", where="--variant", fix=fix)


def names(recipes: Mapping[str, Recipe], targets: Targets) -> tuple[str, ...]:
    """The names of the variants that recipes are for."""
    return tuple(
        Variant(stack=recipe.name, python=python, cuda=recipe.cuda, sms=sms, isa=isa).name
        for recipe in recipes.values() for python in recipe.pythons for sms in ((), *((sm,) for sm in recipe.sm))
        for isa, row in targets.isa.items() if row.machine in recipe.machines
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A recipe on an architecture. recipe: as `--recipe` spells it. machines: where it is composed; else `reasons`."""

    recipe: str
    name: str
    version: str
    cuda: str
    machines: tuple[str, ...]
    reasons: tuple[RecipeError, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An architecture, or one GPU of it. codes: what toolkits emit, by CUDA. drivers: the oldest, by its major."""

    sm: int
    gpu: Gpu | None
    codes: Mapping[str, tuple[str, ...]]
    drivers: Mapping[str, str]
    offers: tuple[Offer, ...]


def matrix(recipes: Mapping[str, Recipe], targets: Targets, gpus: Sequence[Gpu] = ()) -> tuple[Row, ...]:
    """All architectures, ascending, and what becomes of each in every recipe; or only those of some GPUs."""
    asked: list[tuple[int, Gpu | None]] = [(gpu.sm, gpu) for gpu in gpus]
    return tuple(
        Row(sm=sm, gpu=gpu, codes={cuda: targets.codes(sm, cuda) for cuda in targets.cuda},
            drivers=_drivers(sm, targets),
            offers=tuple(_offer(sm, gpu, spelling, recipe, targets) for spelling, recipe in recipes.items()))
        for sm, gpu in asked or ((sm, None) for sm in sorted(map(int, targets.sm)))
    )  # fmt: skip


def _drivers(sm: int, targets: Targets) -> dict[str, str]:
    """By the oldest release of each major that emits code for it."""
    oldest = {cuda.partition(".")[0]: cuda for cuda in reversed(targets.releases(sm))}
    found = {major: targets.oldest_driver(sm, cuda) for major, cuda in sorted(oldest.items())}
    return {major: branch for major, branch in found.items() if branch}


def _offer(sm: int, gpu: Gpu | None, spelling: str, recipe: Recipe, targets: Targets) -> Offer:
    made = [Target(sms=(sm,), isa=name, cuda=recipe.cuda, python=recipe.pythons[0], machine=isa.machine)
            for name, isa in targets.isa.items() if isa.machine in recipe.machines]  # fmt: skip
    faults = [(target.machine, _once(_target_faults(recipe, target, gpu, targets))) for target in made]
    machines = tuple(dict.fromkeys(machine for machine, found in faults if not found))
    # Which instruction set it is makes no difference to a reason, but in its words.
    reasons = {fault.why or fault.what: fault for _, found in faults for fault in found}
    return Offer(recipe=spelling, name=recipe.name, version=recipe.version, cuda=recipe.cuda, machines=machines,
                 reasons=() if machines else tuple(reasons.values()))  # fmt: skip


def _target_faults(recipe: Recipe, target: Target, gpu: Gpu | None, targets: Targets) -> Iterator[RecipeError]:
    yield from faults_of(recipe, target, targets)
    yield from gpu_faults(gpu, target.isa, targets) if gpu else ()

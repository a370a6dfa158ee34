"""Names of variants, `sglang-python312-cuda12_8-sm90-avx512`, and what wheel variants call a target (PEP 825)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from composer.errors import RecipeError
from composer.model.target import (
    Isa,
    Target,
    Targets,
    gpu_faults,
    parse_gpu,
    parse_isa,
    parse_sm,
    parse_sms,
    sm_label,
    sm_text,
    tried,
)

T = TypeVar("T")

#: The SM of a name that is for all that its recipe serves.
ALL = "all"
_NAME = re.compile(
    r"(?P<stack>[a-z0-9][a-z0-9._-]*)-python(?P<python>\d{2,3})-cuda(?P<cuda>\d{1,2}_\d{1,2})"
    r"-(?P<sm>all|sm\d{2,3}(?:_\d{2,3})*)-(?P<isa>[a-z0-9._-]+)",
    re.ASCII,
)
_EXAMPLE = "sglang-python312-cuda12_8-sm90-avx512"
#: What is longer is not compared with known names, which takes time.
_LONGEST = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What a name says: those of bundles, and of the variants of flox/build-sglang and flox/build-vllm.

    stack: a recipe's name. cuda, python: `major.minor`. sms: ascending; none is all that the recipe serves.
    """

    stack: str
    python: str
    cuda: str
    sms: tuple[int, ...]
    isa: str

    @property
    def name(self) -> str:
        """`sglang-python312-cuda12_8-sm90-avx512`; several SMs are `sm80_86`, and all are `all`."""
        sms = sm_label(self.sms) if self.sms else ALL
        cuda = self.cuda.replace(".", "_")
        return f"{self.stack}-python{self.python.replace('.', '')}-cuda{cuda}-{sms}-{self.isa}"

    def target(self, targets: Targets) -> Target:
        """The target, for no architecture yet if it is for all. KeyError for an instruction set that is not known."""
        machine = targets.isa[self.isa].machine
        return Target(sms=self.sms, isa=self.isa, cuda=self.cuda, python=self.python, machine=machine)


def parse_variant(text: str, targets: Targets, known: Collection[str] = ()) -> Variant:
    """The variant of a name. RecipeError names everything in it that is not known, with the nearest spelling.

    known: names to compare with a text that has no such form.
    """
    return parse_variants([text], targets, known)[0]


def parse_variants(texts: Iterable[str], targets: Targets, known: Collection[str] = ()) -> tuple[Variant, ...]:
    """The variants of several names; RecipeError as of `parse_variant`, for all together."""
    faults: list[RecipeError] = []
    found = [_variant(text.strip(), targets, known, faults) for text in texts]
    RecipeError.collect(faults)
    return tuple(found)


def _variant(text: str, targets: Targets, known: Collection[str], faults: list[RecipeError]) -> Variant:
    """Of a name; what is not known in it is left out, and adds to `faults`."""
    found = _NAME.fullmatch(text)
    if not found:
        faults.append(RecipeError(f"not the name of a variant: {text!r}", where="--variant", fix=_nearest(text, known)))
        return Variant(stack="", python="", cuda="", sms=(), isa="")
    own: list[RecipeError] = []
    sms = found["sm"].removeprefix("sm").split("_") if found["sm"] != ALL else []
    known_sms = {tried(parse_sm, sm, targets, own) or 0 for sm in sms}
    isa = tried(parse_isa, found["isa"], targets, own) or ""
    faults += [RecipeError(fault.what, where=text, fix=fault.fix) for fault in own]
    python = found["python"]
    return Variant(stack=found["stack"], python=f"{python[0]}.{python[1:]}", cuda=found["cuda"].replace("_", "."),
                   sms=tuple(sorted(known_sms)), isa=isa)  # fmt: skip


def _nearest(text: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(text, known, n=1) if len(text) <= _LONGEST else []
    return f"Did you mean {near[0]!r}?" if near else f"Names look like {_EXAMPLE}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A target as a command line spells it, as far as it does. python: a minor version."""

    sm: str | None = None
    gpus: Sequence[str] = ()
    isa: str | None = None
    python: str | None = None
    variant: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was asked for. sms: ascending; none is all that the recipe serves. variant: of a name that was given."""

    sms: tuple[int, ...]
    isa: str
    variant: Variant | None = None


def choose(asked: Asked, targets: Targets) -> Choice:
    """What the options of a command line mean together.

    RecipeError lists every unknown name and every contradiction: of options with each other, and of a GPU with the CPU.
    """
    faults: list[RecipeError] = []
    variant = _variant(asked.variant.strip(), targets, (), faults) if asked.variant is not None else None
    gpus = tuple(gpu for text in asked.gpus if (gpu := tried(parse_gpu, text, targets, faults)))
    sms = tried(parse_sms, asked.sm, targets, faults) if asked.sm is not None else None
    isa = tried(parse_isa, asked.isa, targets, faults) if asked.isa is not None else None
    RecipeError.collect(faults)
    stated_sms = {"--sm": sms, "--gpu": tuple(sorted({gpu.sm for gpu in gpus})) or None,
                  "--variant": variant.sms if variant else None}  # fmt: skip
    stated_isas = {"--isa": isa, "--variant": variant.isa if variant else None}
    stated_pythons = {"--python": asked.python, "--variant": variant.python if variant else None}
    chosen_sms = _agreed(stated_sms, faults, _shown_sms)
    chosen_isa = _agreed(stated_isas, faults, str)
    _agreed(stated_pythons, faults, str, optional=True)
    faults += [fault for gpu in gpus if chosen_isa for fault in gpu_faults(gpu, chosen_isa, targets)]
    RecipeError.collect(faults)
    return Choice(sms=chosen_sms or (), isa=chosen_isa or "", variant=variant)


def _agreed(stated: dict[str, T | None], faults: list[RecipeError], show: Callable[[T], str], *,
            optional: bool = False) -> T | None:  # fmt: skip
    """What all options say that say something; a fault where they differ, or where none does."""
    said = {option: value for option, value in stated.items() if value is not None}
    if not said and not optional:
        faults.append(RecipeError(f"missing {' or '.join(stated)}", where="target", fix="Give one of them."))
    values = list(said.values())
    if any(value != values[0] for value in values):
        texts = [f"{option} says {show(value)}" for option, value in said.items()]
        faults.append(RecipeError("options contradict each other", where=" and ".join(said), why=", ".join(texts),
                                  fix="Give one of them."))  # fmt: skip
    return values[0] if values else None


def _shown_sms(sms: tuple[int, ...]) -> str:
    return sm_text(sms) if sms else ALL


def variant_properties(sms: Sequence[int], cuda: str, isa: Isa | None) -> tuple[str, ...]:
    """What a wheel variant for this target would declare, sorted: `nvidia :: sm_arch :: 90_real`.

    A host must meet one value of each feature (PEP 825). The names and values are those of the providers
    nvidia-variant-provider, provider-variant-x86-64 and provider-variant-aarch64; PEP 850 leaves them to providers.
    isa: what the objects need of every CPU; None where they choose their code when they run, as their property would
    keep the bundle from hosts that it serves. PTX is not declared: a bundle does not have the same in all libraries.
    """
    return tuple(sorted({*_nvidia(sms, cuda), *(_cpu(isa) if isa else ())}))


def _nvidia(sms: Sequence[int], cuda: str) -> Iterator[str]:
    yield f"nvidia :: cuda_version_lower_bound :: {cuda}"
    yield from (f"nvidia :: sm_arch :: {sm}_real" for sm in sms)


def _cpu(isa: Isa) -> Iterator[str]:
    properties = isa.properties or dict.fromkeys(isa.features, "on")
    yield from (f"{isa.machine} :: {name} :: {value}" for name, value in properties.items())

"""Say what a host is in place of what was found: for a host without a driver, or for another one.

Command line before environment, and NVIDIA's variables before conda's. The variables mean what they mean to those who
introduced them: CONDA_OVERRIDE_CUDA and NV_VARIANT_PROVIDER_FORCE_CUDA_DRIVER_VERSION the newest CUDA that the driver
supports, CONDA_OVERRIDE_CUDA_ARCH and NV_VARIANT_PROVIDER_FORCE_SM_ARCH a compute capability (`9.0`). Empty is absent
for conda (CEP 30 and 46) and unset for NVIDIA's provider of wheel variants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from composer.errors import RecipeError
from composer.host.detect import Cpu, Driver, Gpu, Host
from composer.model.target import Targets, parse_gpus, parse_isa
from composer.runtime.host.detect import runnable

_NV_CUDA, _NV_SM = "NV_VARIANT_PROVIDER_FORCE_CUDA_DRIVER_VERSION", "NV_VARIANT_PROVIDER_FORCE_SM_ARCH"
_CUDA, _SM, _GLIBC = "CONDA_OVERRIDE_CUDA", "CONDA_OVERRIDE_CUDA_ARCH", "CONDA_OVERRIDE_GLIBC"
_VERSION = re.compile(r"\d{1,3}(?:\.\d{1,3}){0,3}\Z")
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)\Z")
# What every CPU that has one instruction set has, too: all with AVX2, FMA and F16C are of level 3, and so on.
_WITHIN = {
    "avx2": "x86-64-v3", "avx512": "x86-64-v4", "avx512vnni": "x86-64-v4", "avx512bf16": "x86-64-v4",
    "armv9": "armv8_2",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A fact that was stated: what it is about, its value, and who says so (a variable or an option)."""

    fact: str
    value: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """What a command line says of a host. sms: its GPUs. isa: of targets.toml."""

    sms: tuple[int, ...] = ()
    gpus: tuple[str, ...] = ()
    isa: str | None = None


def overridden(host: Host, stated: Stated, environ: Mapping[str, str],
               targets: Targets) -> tuple[Host, tuple[Override, ...]]:  # fmt: skip
    """The host as it is said to be, and what was said. RecipeError for every value that cannot be meant, together."""
    made: list[Override] = []
    faults: list[RecipeError] = []
    for change in (_glibc, _cuda, _gpus, _cpu):
        try:
            host, one = change(host, stated, environ, targets)
        except RecipeError as fault:
            faults.append(fault)
        else:
            made += one
    RecipeError.collect(faults)
    return host, tuple(made)


_Changed = tuple[Host, list[Override]]


def _glibc(host: Host, _stated: Stated, environ: Mapping[str, str], _targets: Targets) -> _Changed:
    version = environ.get(_GLIBC)
    if version is None:
        return host, []
    _require(_VERSION, version, _GLIBC, "a version, as in 2.28")
    return msgspec.structs.replace(host, glibc=version), [Override(fact="glibc", value=version, source=_GLIBC)]


def _cuda(host: Host, _stated: Stated, environ: Mapping[str, str], targets: Targets) -> _Changed:
    source, version = (_NV_CUDA, environ[_NV_CUDA]) if environ.get(_NV_CUDA) else (_CUDA, environ.get(_CUDA))
    if version is None:
        return host, []
    if not version:
        made = Override(fact="CUDA", value="none", source=source)
        return msgspec.structs.replace(host, driver=None, gpus=(), visible=()), [made]
    _require(_VERSION, version, source, "a version of CUDA, as in 12.8")
    driver = Driver(version=_oldest_driver(version, targets), cuda=version)
    return msgspec.structs.replace(host, driver=driver), [Override(fact="CUDA", value=version, source=source)]


def _oldest_driver(cuda: str, targets: Targets) -> str | None:
    """The oldest branch that supports a CUDA fully: what a host with it has at least."""
    wanted = _numbers(cuda)
    native = {_numbers(version): branch for version, branch in targets.driver.native.items()}
    known = [version for version in native if version[0] == wanted[0] and version <= wanted]
    return native[max(known)] if known else targets.driver.compatible.get(str(wanted[0]))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _gpus(host: Host, stated: Stated, environ: Mapping[str, str], targets: Targets) -> _Changed:
    if stated.sms or stated.gpus:
        named = [(gpu.sm, text) for gpu, text in zip(parse_gpus(stated.gpus, targets), stated.gpus, strict=True)]
        return _with_gpus(host, [*((sm, None) for sm in stated.sms), *named], "command line")
    source, text = (_NV_SM, environ[_NV_SM]) if environ.get(_NV_SM) else (_SM, environ.get(_SM))
    if text is None:
        return host, []
    if not text:
        return _with_gpus(host, [], source)
    # conda allows a build string after the version.
    capability = text.partition("=")[0] if source == _SM else text
    major, minor = _require(_CAPABILITY, capability, source, "a compute capability, as in 9.0").groups()
    return _with_gpus(host, [(int(major + minor), None)], source)


def _with_gpus(host: Host, gpus: Sequence[tuple[int, str | None]], source: str) -> _Changed:
    made = tuple(Gpu(index=index, sm=sm, name=name) for index, (sm, name) in enumerate(gpus))
    shown = ", ".join(str(sm) for sm, _ in gpus) or "none"
    # The one that was found says nothing of a host with such GPUs.
    host = msgspec.structs.replace(host, gpus=made, visible=tuple(gpu.index for gpu in made), l4t="")
    return host, [Override(fact="SM", value=shown, source=source)]


def _cpu(host: Host, stated: Stated, _environ: Mapping[str, str], targets: Targets) -> _Changed:
    if stated.isa is None:
        return host, []
    name = parse_isa(stated.isa, targets)
    machine = targets.isa[name].machine
    features = {one for isa in (name, _WITHIN.get(name, name)) for one in targets.isa[isa].features}
    cpu = Cpu(model="stated", features=tuple(sorted(features)), isa=tuple(runnable(machine, features)))
    return msgspec.structs.replace(host, cpu=cpu, machine=machine), [
        Override(fact="ISA", value=name, source="command line")
    ]


def _require(pattern: re.Pattern[str], text: str, where: str, wanted: str) -> re.Match[str]:
    found = pattern.match(text)
    if not found:
        raise RecipeError(f"{text!r} is not {wanted}", where=where)
    return found


def shown(overrides: Iterable[Override]) -> list[str]:
    """`SM 90 (CONDA_OVERRIDE_CUDA_ARCH)`."""
    return [f"{one.fact} {one.value} ({one.source})" for one in overrides]

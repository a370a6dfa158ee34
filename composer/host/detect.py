"""What a host is: this one, or another by what `compose-detect --json` wrote there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from composer.errors import RecipeError
from composer.runtime.host import detect

#: What `compose-detect --json` writes is some KB; a limit so that another file costs nothing.
MAX_BYTES = 1 << 20

# Another host's words are shown on this one's screen, and a UUID in a line for its shell.
Text = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00-\x1f\x7f-\x9f]*\Z", max_length=200)]
_Uuid = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Za-z/_-]+\Z", max_length=100)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU. sm: ten times its compute capability; memory in bytes; None for what was not found out."""

    index: _Count
    sm: _Count | None
    name: Text | None = None
    uuid: _Uuid | None = None
    memory_bytes: _Count | None = None

    @property
    def kind(self) -> str:
        """`NVIDIA H100 PCIe (SM 90)`."""
        return f"{self.name or 'a GPU'} (SM {self.sm or 'not known'})"


class Cpu(msgspec.Struct, frozen=True, kw_only=True):
    """A CPU. features: as in /proc/cpuinfo. isa: the instruction sets of targets.toml that it runs."""

    features: tuple[Text, ...]
    isa: tuple[Text, ...]
    model: Text | None = None


class Driver(msgspec.Struct, frozen=True, kw_only=True):
    """NVIDIA's driver. cuda: the newest CUDA that it fully supports."""

    version: Text | None
    cuda: Text | None


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What decides whether a bundle runs on a host. visible: indices of GPUs, by CUDA_VISIBLE_DEVICES.

    l4t: the release of Jetson Linux; None where there is none, empty where it is not known.
    """

    schema: int
    machine: Text
    kernel: Text | None
    glibc: Text | None
    libstdcxx: Text | None
    cpu: Cpu
    driver: Driver | None
    gpus: tuple[Gpu, ...]
    visible: tuple[_Count, ...]
    l4t: Text | None = None

    @property
    def visible_gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that a CUDA program sees."""
        return tuple(gpu for gpu in self.gpus if gpu.index in self.visible)


def survey() -> dict[str, Any]:
    """This host as `composer.runtime.host.detect` gives it, and archspec's name for its CPU.

    That is the most special microarchitecture of which the CPU has every feature: in a virtual machine that hides some
    it is a generic one (`x86_64_v4`), and says less than `features`.
    """
    import archspec.cpu  # takes longer to import than all of the rest

    found = detect.detect()
    found["cpu"]["microarchitecture"] = archspec.cpu.host().name
    return found


def parse_host(data: bytes | Mapping[str, Any], where: str) -> Host:
    """A host from JSON, or from what `survey` gave. RecipeError for anything else."""
    if len(data) > MAX_BYTES:
        raise RecipeError("too large for the description of a host", where=where)
    try:
        host = msgspec.json.decode(data, type=Host) if isinstance(data, bytes) else msgspec.convert(data, Host)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise RecipeError("not the description of a host", where=where, why=str(fault),
                          fix="Give what `compose-detect --json` wrote on it.") from fault  # fmt: skip
    if host.schema != detect.SCHEMA:
        raise RecipeError(f"describes a host by schema {host.schema}, not {detect.SCHEMA}", where=where,
                          fix="Use the compose-detect of a bundle that this version of compose made.")  # fmt: skip
    return host

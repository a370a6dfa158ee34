"""CUDA toolkits that are installed on this machine: where they are and what they say of themselves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from composer._proc import clean_environ, run
from composer.errors import ComposerError, HostError
from composer.formats.nvcc import HostLimits, parse_gpu_codes, parse_host_limits, parse_release
from composer.model.toolchain import release_key

#: What names a toolkit's folder.
VARIABLES = ("CUDA_HOME", "CUDA_PATH")

_LIMITS = "crt/host_config.h"
_LIBRARIES = "cublas_v2.h"
_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolkit:
    """A toolkit that answers. root: its CUDA_HOME. cuda: `12.4`, version: nvcc's, `12.4.131`. origin: how it was found.

    sms: what `nvcc --list-gpu-code` lists. limits: the host compilers that it takes. libraries: whether NVIDIA's
    libraries can be compiled against, as cuBLAS shows.
    """

    root: Path
    nvcc: Path
    cuda: str
    version: str
    sms: tuple[int, ...]
    limits: HostLimits
    libraries: bool
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusable:
    """A folder that should be a toolkit and is none, and why."""

    root: Path
    origin: str
    reason: str


def installed_toolkits(environ: Mapping[str, str], base: Path = Path("/")) -> list[Toolkit | Unusable]:
    """Those that CUDA_HOME and CUDA_PATH name, then those in the usual places below `base`, the newest first.

    The usual places are usr/local/cuda-X.Y, opt/cuda, Debian's nvidia-cuda-toolkit (which has no folder of its own:
    its CUDA_HOME is usr) and the toolkit of the nvcc in PATH. Each folder counts once, however it is reached.
    """
    found: dict[Path, Toolkit | Unusable] = {}
    for root, origin in _places(environ, base):
        if (real := root.resolve()) not in found:
            try:
                found[real] = read_toolkit(root, origin)
            except ComposerError as fault:
                found[real] = Unusable(root=root, origin=origin, reason=f"{fault.what}: {fault.where}")
    named = [one for one in found.values() if one.origin in VARIABLES]
    others = [one for one in found.values() if one.origin not in VARIABLES]
    return [*named, *sorted(others, key=_newest_first)]


def _newest_first(one: Toolkit | Unusable) -> tuple[bool, int, int]:
    if isinstance(one, Unusable):
        return True, 0, 0
    major, minor = release_key(one.cuda)
    return False, -major, -minor


def _places(environ: Mapping[str, str], base: Path) -> Iterator[tuple[Path, str]]:
    for variable in VARIABLES:
        if environ.get(variable):
            yield Path(environ[variable]).absolute(), variable
    local = base / "usr/local"
    for root in [*sorted(local.glob("cuda-*")), local / "cuda", base / "opt/cuda"]:
        if (root / "bin/nvcc").exists():
            yield root, "installed"
    if (base / "usr/lib/nvidia-cuda-toolkit/bin/nvcc").exists():
        yield base / "usr", "Debian's nvidia-cuda-toolkit"
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    # A wrapper in PATH belongs to no toolkit; what it starts is in one of the places above.
    if nvcc and _find(root := Path(nvcc).resolve().parents[1], _LIMITS):
        yield root, "PATH"


def read_toolkit(root: Path, origin: str) -> Toolkit:
    """What the toolkit at `root` says of itself; HostError if it has no nvcc that answers or lacks its headers."""
    nvcc, header = root / "bin" / "nvcc", _find(root, _LIMITS)
    if not nvcc.is_file():
        raise HostError("has no bin/nvcc", where=str(root), fix="Set CUDA_HOME to the folder of a CUDA toolkit.")
    if header is None:
        raise HostError(f"has no include/{_LIMITS}", where=str(root),
                        fix="Install the rest of the toolkit (Debian: nvidia-cuda-dev).")  # fmt: skip
    try:
        limits = parse_host_limits(header.read_text("utf-8", "replace"), str(header))
    except OSError as fault:
        raise HostError("cannot be read", where=str(header), why=str(fault)) from fault
    release = parse_release(_ask(nvcc, "--version"), str(nvcc))
    return Toolkit(
        root=root, nvcc=nvcc, cuda=release.cuda, version=release.version, origin=origin, limits=limits,
        libraries=_find(root, _LIBRARIES) is not None, sms=parse_gpu_codes(_ask(nvcc, "--list-gpu-code"), str(nvcc)),
    )  # fmt: skip


def _find(root: Path, header: str) -> Path | None:
    folders = [root / "include", *sorted((root / "targets").glob("*-linux/include"))]
    return next((path for folder in folders if (path := folder / header).is_file()), None)


def _ask(nvcc: Path, option: str) -> str:
    return run([nvcc, option], env=clean_environ(), timeout=_TIMEOUT, error=HostError).decode(errors="replace")

"""Choose, make and prove the compiler that CUDA sources are built with.

`choose_toolchain` downloads nothing: what a pinned toolchain can do is data, what an installed one can do is asked of
its nvcc. `ensure_toolchain` then makes the choice usable and compiles a kernel with it.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from composer._fs import host_errors
from composer._proc import clean_environ, run
from composer.errors import BuildError, HostError, RecipeError
from composer.events import Event, Listener, silent
from composer.formats.gpu_code import read_gpu_code
from composer.formats.nvcc import HostLimits
from composer.model.toolchain import Span, Toolchains, code_name, parse_toolchains, release_key
from composer.steps.host_compiler import HostCompiler, find_host_compiler
from composer.steps.load import _parse, _read, data_root
from composer.steps.survey import mapped
from composer.steps.toolkit import VARIABLES, Toolkit, Unusable, installed_toolkits
from composer.steps.toolkit_wheels import WheelToolkit, limits_of, make_toolkit, toolchain_lock
from composer.store import Store, key_of

_PROOF_VERSION = 1
_TIMEOUT = 300.0
_NO_WHEELS = "No package index has a compiler for CUDA 12: its wheels lack nvcc and cicc."

_KERNEL = """\
#include <cuda_fp16.h>
#include <cuda_runtime.h>
__global__ void proof(__half *out, int n) {
#if __CUDA_ARCH__ == 900
    asm volatile("wgmma.fence.sync.aligned;");
#endif
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __hadd(out[i], __float2half(1.0f));
}
extern "C" int launch(__half *out, int n) {
    proof<<<(n + 127) / 128, 128>>>(out, n);
    return static_cast<int>(cudaGetLastError());
}
"""
_DRIVER = """\
#include <cuda.h>
extern "C" int driver() { return static_cast<int>(cuInit(0)); }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """A compiler that works. root: its CUDA_HOME. cuda: `13.0`, version: nvcc's, `13.0.88`. sms: what it emits."""

    name: str
    cuda: str
    version: str
    root: Path
    nvcc: Path
    host_compiler: HostCompiler
    sms: tuple[int, ...]

    def environ(self) -> dict[str, str]:
        """What a build needs to find it; PATH is left to the build, which may put `nvcc.parent` there."""
        return environ_of(self.root, self.nvcc, self.host_compiler)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A toolchain that is known, made or not.

    origin: `wheels`, or how it was found on the machine. root: its CUDA_HOME, now or once it is made. made: whether it
    is there. libraries: whether NVIDIA's libraries (cuBLAS and so on) are in it. wheels: what it is made of.
    """

    name: str
    cuda: str
    version: str
    sms: tuple[int, ...]
    limits: HostLimits
    origin: str
    root: Path
    made: bool
    libraries: bool
    wheels: WheelToolkit | None = None

    @property
    def identity(self) -> str:
        """What objects compiled with it depend on: its wheels, or the version of what is installed."""
        return f"wheels {self.wheels.key}" if self.wheels else f"nvcc {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A candidate that fits, and the host compiler for it."""

    candidate: Candidate
    host_compiler: HostCompiler


class _Proof(msgspec.Struct, frozen=True, kw_only=True):
    """Written when a toolchain compiled what it should; for which architecture."""

    sm: int


def environ_of(root: Path, nvcc: Path, compiler: HostCompiler) -> dict[str, str]:
    """The variables by which build systems find a toolchain."""
    return {"CUDA_HOME": str(root), "CUDACXX": str(nvcc), **compiler.environ()}


def load_toolchains() -> Toolchains:
    """The toolchains that are known by name."""
    path = data_root() / "recipes" / "toolchains" / "toolchains.toml"
    return parse_toolchains(_parse(_read(path), path), path.name)


def candidates(store: Store, machine: str, environ: Mapping[str, str] | None = None,
               base: Path = Path("/")) -> tuple[list[Candidate], list[Unusable]]:  # fmt: skip
    """Every toolchain for this machine, pinned ones first, and the folders that should be toolkits and are none.

    environ: where CUDA_HOME, PATH and so on are looked up; default: this process's. base: see `installed_toolkits`.
    """
    here = os.environ if environ is None else environ
    found = installed_toolkits(here, base) if machine == platform.machine() else []
    pinned = list(_pinned(store, machine))
    installed = [one for one in found if isinstance(one, Toolkit)]
    return [*pinned, *_installed(installed)], [one for one in found if isinstance(one, Unusable)]


def _pinned(store: Store, machine: str) -> Iterator[Candidate]:
    for name, spec in load_toolchains().toolchain.items():
        lock = toolchain_lock(name, spec, machine)
        if lock is None:
            continue
        for label, compiler_only in ((name, False), (f"{name}-compiler", True)):
            wheels = WheelToolkit(name=label, spec=spec, lock=lock, compiler_only=compiler_only)
            yield Candidate(
                name=label, cuda=spec.cuda, version=wheels.version, sms=spec.sms, limits=limits_of(spec),
                origin="wheels", root=wheels.root(store), made=wheels.is_made(store), libraries=not compiler_only,
                wheels=wheels,
            )  # fmt: skip


def _installed(toolkits: Sequence[Toolkit]) -> Iterator[Candidate]:
    """Named `installed12.4`, and by the folder where another one of that release comes first."""
    taken: set[str] = set()
    for one in toolkits:
        name = f"installed{one.cuda}"
        yield Candidate(name=str(one.root) if name in taken else name, cuda=one.cuda, version=one.version, sms=one.sms,
                        limits=one.limits, origin=one.origin, root=one.root, made=True,
                        libraries=one.libraries)  # fmt: skip
        taken.add(name)


# --- choosing --------------------------------------------------------------------------------------------------------


def choose_toolchain(cuda: str, sms: Sequence[int], machine: str, store: Store, *, libraries: bool = True,
                     environ: Mapping[str, str] | None = None, base: Path = Path("/")) -> Choice:  # fmt: skip
    """The toolchain for sources of a stack on CUDA `cuda` (`major.minor`) and the architectures `sms`.

    One of that release: what CUDA_HOME names, else pinned wheels, else an installed one; else the newest older one of
    the same major version, whose objects run with newer libraries (CUDA's minor version compatibility). libraries:
    whether the sources need NVIDIA's. Nothing is downloaded. RecipeError for an architecture that the release cannot
    emit and for a CUDA_HOME that is none, HostError where nothing fits, with what each candidate lacks, or where the
    host compiler does not.
    """
    here = os.environ if environ is None else environ
    if machine != platform.machine():
        raise HostError(f"CUDA sources for {machine} are not compiled on {platform.machine()}", where="machine",
                        fix=f"Build on a machine of {machine}, or take prebuilt wheels.")  # fmt: skip
    _check_release(cuda, sms, load_toolchains().sm)
    known, unusable = candidates(store, machine, here, base)
    RecipeError.collect([_bad_name(one) for one in unusable if one.origin in VARIABLES])
    fitting = [one for one in known if not _lacks(one, cuda, sms, libraries=libraries)]
    if not fitting:
        raise _nothing_fits(cuda, sms, known, unusable, libraries=libraries)
    best = min(fitting, key=lambda one: _order(one, cuda))
    return Choice(candidate=best, host_compiler=find_host_compiler(best.limits, here))


def _check_release(cuda: str, sms: Sequence[int], spans: Mapping[str, Span]) -> None:
    faults = [
        RecipeError(f"CUDA {cuda} has no code for sm_{sm}", where="--sm", why=f"sm_{sm} needs {span}",
                    fix="Choose a recipe on such a release, or another architecture.")
        for sm in sms if (span := spans.get(str(sm))) and not span.has(cuda)
    ]  # fmt: skip
    RecipeError.collect(faults)


def _bad_name(one: Unusable) -> RecipeError:
    return RecipeError("names no CUDA toolkit", where=f"{one.origin}={one.root}", why=one.reason,
                       fix=f"Correct {one.origin}, or unset it.")  # fmt: skip


def _lacks(one: Candidate, cuda: str, sms: Sequence[int], *, libraries: bool) -> str | None:
    """Why a candidate does not do."""
    wanted, has = release_key(cuda), release_key(one.cuda)
    if has[0] != wanted[0] or has > wanted:
        return f"it is CUDA {one.cuda}"
    if missing := sorted(set(sms) - set(one.sms)):
        return f"CUDA {one.cuda} without {', '.join(f'sm_{sm}' for sm in missing)}: only {', '.join(map(str, one.sms))}"
    return "it has none of NVIDIA's libraries" if libraries and not one.libraries else None


def _order(one: Candidate, cuda: str) -> tuple[bool, int, int, bool, bool, int]:
    """Smaller is better: the release, what the user named, what is pinned, and of those what is made, or small."""
    major, minor = release_key(one.cuda)
    size = sum(artifact.size for artifact in one.wheels.artifacts) if one.wheels else 0
    return (one.cuda != cuda, -major, -minor, one.origin not in VARIABLES, one.wheels is None, 0 if one.made else size)


def _nothing_fits(cuda: str, sms: Sequence[int], known: Sequence[Candidate], unusable: Sequence[Unusable], *,
                  libraries: bool) -> HostError:  # fmt: skip
    lines = [f"- {one.name} ({one.root if one.wheels is None else one.origin}): "
             f"{_lacks(one, cuda, sms, libraries=libraries)}" for one in known]  # fmt: skip
    lines += [f"- {one.root} ({one.origin}): {one.reason}" for one in unusable]
    what = f"no toolchain for CUDA {cuda} and {', '.join(f'sm_{sm}' for sm in sms)}"
    return HostError(what, where=platform.machine(), why="\n".join(["", *lines]) if lines else "none is installed",
                     fix=_install(cuda))  # fmt: skip


def _install(cuda: str) -> str:
    note = f" {_NO_WHEELS}" if release_key(cuda)[0] == 12 else ""
    package = f"cuda-toolkit-{cuda.replace('.', '-')}"
    return f"Install NVIDIA's {package} (below /usr/local/cuda-{cuda}) or set CUDA_HOME to one.{note}"


def find_candidate(name: str, store: Store, *, environ: Mapping[str, str] | None = None,
                   base: Path = Path("/")) -> Candidate:  # fmt: skip
    """The candidate of a name, or of the path of an installed toolkit. HostError says which there are."""
    known, unusable = candidates(store, platform.machine(), environ, base)
    for one in known:
        if name == one.name or Path(name) == one.root:
            return one
    for bad in unusable:
        if Path(name) == bad.root:
            raise HostError("not usable as a toolchain", where=name, why=bad.reason)
    cuda = name.removeprefix("cuda").removeprefix("installed")
    fix = f"Known: {', '.join(one.name for one in known) or 'none'}."
    if cuda.replace(".", "", 1).isdecimal() and "." in cuda:
        fix = f"{_install(cuda)} {fix}"
    raise HostError(f"no toolchain {name!r}", where=platform.machine(), fix=fix)


# --- making and proving ----------------------------------------------------------------------------------------------


def ensure_toolchain(choice: Choice, store: Store, *, offline: bool = False, wheelhouses: Sequence[Path] = (),
                     listener: Listener = silent) -> Toolchain:  # fmt: skip
    """The chosen toolchain, made if it is not there yet, and proven once per host compiler by compiling a kernel.

    offline: ask no index; wheelhouses: folders to take wheels from first. Raises what `make_toolkit` raises, and
    BuildError with the compiler's messages when it does not compile.
    """
    one, compiler = choice.candidate, choice.host_compiler
    if one.wheels is not None:
        make_toolkit(one.wheels, compiler, store, offline=offline, wheelhouses=wheelhouses, listener=listener)
    toolchain = Toolchain(name=one.name, cuda=one.cuda, version=one.version, root=one.root,
                          nvcc=one.root / "bin" / "nvcc", host_compiler=compiler, sms=one.sms)  # fmt: skip
    key = key_of("toolchain-proof", _PROOF_VERSION, toolchain=_identity(one, toolchain.nvcc),
                 cxx=str(compiler.cxx), compiler=compiler.version)  # fmt: skip
    with store.lock(f"toolchain-proof-{key}"):
        if store.load("toolchain-proof", key, _Proof) is None:
            listener(Event(step="toolchain", subject=one.name, note=f"compiling a kernel with {compiler}"))
            sm = prove(toolchain, store, driver=one.wheels is not None)
            store.save("toolchain-proof", key, _Proof(sm=sm))
    return toolchain


def _identity(one: Candidate, nvcc: Path) -> str:
    """What a proof holds for: the wheels, or an installed compiler as it is now."""
    if one.wheels is not None:
        return one.wheels.key
    with host_errors(nvcc):
        found = nvcc.stat()
    return f"{one.root.resolve()} {one.version} {found.st_size} {found.st_mtime_ns}"


def prove(toolchain: Toolchain, store: Store, *, driver: bool) -> int:
    """Compile and link a kernel and read what came out; gives back the architecture, 90 where it can be.

    driver: also link with the toolkit's libcuda. BuildError when it fails or holds other code than was asked for.
    """
    sm = 90 if 90 in toolchain.sms else max(toolchain.sms)
    name = code_name(sm)
    with store.scratch() as folder, host_errors(folder):
        source, library = folder / "proof.cu", folder / "proof.so"
        source.write_text(_KERNEL + (_DRIVER if driver else ""))
        run(
            [toolchain.nvcc, "-ccbin", toolchain.host_compiler.cxx, "-shared", "-Xcompiler", "-fPIC", "-gencode",
             f"arch=compute_{name},code=sm_{name}", source, "-o", library, *(["-lcuda"] if driver else [])],
            env=clean_environ(TMPDIR=str(folder)), cwd=folder, timeout=_TIMEOUT, error=BuildError,
            fix="The toolkit is not complete, or its host compiler is not: `compose toolchain show` names both.",
        )  # fmt: skip
        with mapped(library) as view:
            code = read_gpu_code(view, library.name)
    found = {f"{one.kind} {one.sm}{one.variant}" for region in code.regions for box in region.containers
             for one in box.entries}  # fmt: skip
    if found != {f"elf {name}"}:
        raise BuildError("the compiler made other code than it was asked for", where=str(toolchain.nvcc),
                         why=f"asked for sm_{name}, got {', '.join(sorted(found)) or 'none'}")  # fmt: skip
    return sm

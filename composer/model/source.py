"""How a distribution is built from source, as data: `[component.build]` of a recipe, and what follows from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import Version

from composer.model._strict import Record

#: What a CUDA compiler needs per job: 4.5 to 7.6 GB measured for attention and MoE kernels.
CUDA_JOB_BYTES = 8 * 10**9

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What build systems are told by their environment. Everything else could change which programs run, or where to.
_ALLOWED = re.compile(
    r"CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|CUDAFLAGS|CUDACXX|CUDAHOSTCXX|CUDA_HOME|MAX_JOBS|NVCC_[A-Z_]+|BLAS"
    r"|(USE|BUILD|FORCE|WITH|INSTALL|CMAKE|SKBUILD|TORCH|PYTORCH|ATEN|TH|SETUPTOOLS_SCM)_[A-Z0-9_]+|_GLIBCXX_USE_CXX11_ABI"
)
# CMake refuses to build PyTorch with the first; the others name programs to run around every compiler.
_REFUSED = re.compile(r"CMAKE_INSTALL_PREFIX|CMAKE_[A-Z]+_COMPILER_LAUNCHER")


class Build(Record, frozen=True, kw_only=True):
    """A source and how to make a wheel of it.

    The source is one of: `sdist` (of the component's version, from its index), `url` with `sha256`, `git` with the
    `commit` (40 hex digits; submodules come along), or `path` (a folder, or an archive; relative to the recipe).
    patches: applied exactly, below patches/. requires: everything that must be installed to build; locked with hashes.
    environment: values may hold `{isa.flags}`, `{sm.arch_list}`, `{jobs}` and `{folder}`. config: settings of the build
    backend (PEP 517), with the same. subdirectory: where its pyproject.toml is. cuda: jobs need 8 GB each. disk,
    memory: bytes needed.
    """

    requires: tuple[str, ...]
    sdist: bool = False
    url: str | None = None
    git: str | None = None
    path: str | None = None
    sha256: str | None = None
    size: int | None = None
    commit: str | None = None
    subdirectory: str | None = None
    patches: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    config: Mapping[str, str] = {}
    cuda: bool = False
    disk: int = 0
    memory: int = 0

    def uses(self, what: str) -> bool:
        """Whether a value of the environment or the settings depends on `isa` or `sm`."""
        values = (*self.environment.values(), *self.config.values())
        return any(name.partition(".")[0] == what for value in values for name in _PLACEHOLDER.findall(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What placeholders stand for. flags: of the compiler, for the CPU. arch_list: as PyTorch spells GPUs.

    folder: of the build. The wheel must not depend on it, nor on the jobs.
    """

    flags: tuple[str, ...]
    arch_list: str
    jobs: int
    folder: str

    def fill(self, text: str) -> str:
        """`text` with its placeholders replaced."""
        known = self.known()
        return _PLACEHOLDER.sub(lambda found: known[found[1]], text)

    def known(self) -> dict[str, str]:
        """Replacement by name."""
        return {
            "isa.flags": " ".join(self.flags), "sm.arch_list": self.arch_list, "jobs": str(self.jobs),
            "folder": self.folder,
        }  # fmt: skip


_NAMES = Values(flags=(), arch_list="", jobs=0, folder="").known().keys()


def arch_list(sm: int) -> str:
    """An SM as TORCH_CUDA_ARCH_LIST spells it: 90 is `9.0`, 120 is `12.0`."""
    return f"{sm // 10}.{sm % 10}"


def jobs_for(build: Build, *, cores: int, memory: int, wanted: int | None) -> int:
    """How many compilers may run at a time. memory: bytes of RAM available. wanted: MAX_JOBS, which only lowers it."""
    most = min(cores, memory // CUDA_JOB_BYTES) if build.cuda else cores
    return max(1, min(most, wanted) if wanted is not None else most)


def local_version(version: str, build: Build, *, sm: int, isa: str) -> Version:
    """The version of the built wheel: `0.1.27+avx512`, `2.9.1+sm90.avx512`; `+source` if it is for any target."""
    old = Version(version)
    parts = [f"sm{sm}"] * build.uses("sm") + [isa.replace("-", ".")] * build.uses("isa")
    label = ".".join(parts) or "source"
    return old if old.local == label else Version(f"{old}{'.' if old.local else '+'}{label}")


def build_faults(name: str, version: str | None, build: Build) -> Iterator[tuple[str, str]]:
    """(key, fault) of every value that has the right type and cannot be meant, but for urls and paths."""
    if version is None:
        yield "", "needs the component's version"
    yield from _source_faults(build)
    for number, text in enumerate(build.requires):
        if fault := _requirement_fault(text):
            yield f"requires[{number}]", fault
    for variable, value in build.environment.items():
        if not _is_allowed(variable, name):
            yield f"environment.{variable}", "is not a variable that a recipe may set for a build"
        yield from ((f"environment.{variable}", fault) for fault in _value_faults(value))
    for key, value in build.config.items():
        if not _KEY.fullmatch(key):
            yield f"config.{key}", "is not a plain key"
        yield from ((f"config.{key}", fault) for fault in _value_faults(value))
    for key in ("disk", "memory"):
        if getattr(build, key) < 0:
            yield key, "must be a number of bytes"


def _source_faults(build: Build) -> Iterator[tuple[str, str]]:
    given = [key for key in ("sdist", "url", "git", "path") if getattr(build, key)]
    if len(given) != 1:
        yield "", f"needs one source: sdist, url, git or path, and not {' and '.join(given) or 'none'}"
    if build.url is not None and not build.sha256:
        yield "sha256", "must be the 64 hex digits of what the url serves"
    if build.sha256 is not None and not _SHA256.fullmatch(build.sha256):
        yield "sha256", "must be 64 hex digits"
    if build.sha256 is not None and not (build.url or build.path):
        yield "sha256", "is only meant beside a url or a path"
    if build.size is not None and (build.url is None or build.size < 1):
        yield "size", "is only meant beside a url, as its number of bytes"
    if (build.git is None) != (build.commit is None):
        yield "commit", "and git are only meant together"
    if build.commit is not None and not _COMMIT.fullmatch(build.commit):
        yield "commit", f"{build.commit!r} is not 40 hex digits: a tag or a branch can move"


def _requirement_fault(text: str) -> str | None:
    try:
        wanted = Requirement(text)
    except InvalidRequirement as fault:
        return f"{text!r} is not a requirement (PEP 508): {str(fault).splitlines()[0]}"
    return f"{text!r}: a URL is not allowed here" if wanted.url else None


def _is_allowed(variable: str, name: str) -> bool:
    """Also what begins with the distribution's own name, in capitals."""
    own = variable.startswith(name.upper().replace("-", "_").replace(".", "_") + "_") and variable.isupper()
    plain = re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable) is not None and not variable.startswith(("LD_", "PYTHON"))
    return plain and not _REFUSED.fullmatch(variable) and (own or _ALLOWED.fullmatch(variable) is not None)


def _value_faults(value: str) -> Iterator[str]:
    if not value.isprintable():
        yield "must be one printable line"
    for name in _PLACEHOLDER.findall(value):
        if name not in _NAMES:
            yield f"{{{name}}} is not a placeholder; known: {', '.join(f'{{{one}}}' for one in sorted(_NAMES))}"
    if set(_PLACEHOLDER.sub("", value)) & set("{}"):
        yield "has a brace that belongs to no placeholder"

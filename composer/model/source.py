"""How a distribution is built from source, as data: `[component.build]` of a recipe, and what follows from it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import is_normalized_name
from packaging.version import Version

from composer.model._strict import Record
from composer.model.toolchain import code_name

#: What a CUDA compiler needs per job: 4.5 to 7.6 GB measured for attention and MoE kernels.
CUDA_JOB_BYTES = 8 * 10**9

#: Name, in the folder of a build, of the link to its environment's site-packages: the same for all Pythons.
SITE = "site"

_RELEASE = "{release}"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What build systems are told by their environment. Everything else could change which programs run, or where to.
_ALLOWED = re.compile(
    r"CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS|CUDAFLAGS|MAX_JOBS|BLAS|_GLIBCXX_USE_CXX11_ABI"
    r"|(USE|BUILD|FORCE|WITH|INSTALL|CMAKE|SKBUILD|TORCH|PYTORCH|ATEN|TH|SETUPTOOLS_SCM)_[A-Z0-9_]+"
    r"|(NVCC|CUDNN|CUPTI|NCCL|NVSHMEM|CUSPARSELT)_[A-Z0-9_]+"
)
# CMake refuses to build PyTorch with the first; the others name programs to run around every compiler. Where the
# CUDA compiler is (CUDA_HOME, CUDACXX, CUDAHOSTCXX) is decided by the toolchain.
_REFUSED = re.compile(r"CMAKE_INSTALL_PREFIX|CMAKE_[A-Z]+_COMPILER_LAUNCHER")


class Without(Record, frozen=True, kw_only=True):
    """Distributions that a bundle leaves out because the wheel that was built does not need them."""

    names: tuple[str, ...]
    reason: str


class Variant(Record, frozen=True, kw_only=True):
    """What is different for some targets: those of these SMs and these ISAs (empty: all)."""

    reason: str
    sm: tuple[int, ...] = ()
    isa: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    without: tuple[Without, ...] = ()

    def applies(self, sms: Sequence[int], isa: str) -> bool:
        """Whether it is meant for a build: for all of its SMs, and its ISA."""
        return (not self.sm or set(sms) <= set(self.sm)) and (not self.isa or isa in self.isa)


class Build(Record, frozen=True, kw_only=True):
    """A source and how to make a wheel of it.

    The source is one of: `sdist` (of the component's version, from its index), `url` with `sha256`, `git` with the
    `commit` (40 hex digits; submodules come along), `path` (a folder, or an archive; relative to the recipe), or
    `shipped`, a folder below composer's sources/.
    releases: sha256 by version, instead of one sha256, for a url with `{release}` in the place of the version.
    when: whether a bundle takes it instead of the wheel of the lock. `always`; `asked`: by `--no-binary`; `auto`: when
    it can be built here within the budget; `fallback`: so, and when the wheel cannot be had.
    prebuilt: an index has a wheel, too; without one a bundle with `auto` does without what cannot be built here.
    patches: applied exactly, below patches/. requires: everything that must be installed to build; locked with hashes.
    unneeded: what these require and the build does without. glibc: N of the newest 2.N that their wheels may be for.
    environment: values may hold placeholders (`Values`). config: settings of the build backend (PEP 517), with the
    same. variant: additions for some targets. without: what the bundle leaves out. subdirectory: where its
    pyproject.toml is. all: the SMs of `--sm all`. cuda: jobs need 8 GB each, and a CUDA toolchain; cuda_libraries: with
    NVIDIA's libraries. shared: folder of objects, below the source, that builds for other Pythons go on with. disk,
    memory: bytes needed.
    """

    requires: tuple[str, ...]
    unneeded: tuple[str, ...] = ()
    glibc: int = 28
    when: Literal["always", "asked", "auto", "fallback"] = "always"
    prebuilt: bool = True
    sdist: bool = False
    url: str | None = None
    git: str | None = None
    path: str | None = None
    shipped: str | None = None
    sha256: str | None = None
    releases: Mapping[str, str] = {}
    size: int | None = None
    commit: str | None = None
    subdirectory: str | None = None
    patches: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    config: Mapping[str, str] = {}
    variant: tuple[Variant, ...] = ()
    without: tuple[Without, ...] = ()
    all: tuple[int, ...] = ()
    cuda: bool = False
    cuda_libraries: bool = True
    shared: str | None = None
    disk: int = 0
    memory: int = 0

    def release(self, version: str) -> tuple[str, str]:
        """Address and sha256 of a version's archive."""
        assert self.url is not None
        return self.url.replace(_RELEASE, version), self.releases.get(version) or self.sha256 or ""

    def for_target(self, sms: Sequence[int], isa: str) -> Build:
        """This build with the variants for a target; of two that give a variable, the later one counts."""
        chosen = [one for one in self.variant if one.applies(sms, isa)]
        environment = dict(self.environment)
        for one in chosen:
            environment |= one.environment
        without = (*self.without, *(each for one in chosen for each in one.without))
        return msgspec.structs.replace(self, variant=(), environment=environment, without=without)

    def uses(self, what: str) -> bool:
        """Whether the wheel depends on the target's `isa` or `sm`: by a value, or by a variant."""
        values = (*self.environment.values(), *self.config.values(),
                  *(value for one in self.variant for value in one.environment.values()))  # fmt: skip
        named = any(name.partition(".")[0] == what for value in values for name in _PLACEHOLDER.findall(value))
        return named or any(getattr(one, what) and one.environment for one in self.variant)


def arch_list(sms: Sequence[int]) -> str:
    """SMs as TORCH_CUDA_ARCH_LIST spells them: 90 is `9.0`, 80 and 120 are `8.0;12.0`."""
    return ";".join(_dotted(str(sm)) for sm in sms)


def _dotted(name: str) -> str:
    """`90a` as a compute capability: `9.0a`."""
    digits = name.rstrip("af")
    return f"{digits[:-1]}.{digits[-1]}{name.removeprefix(digits)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What placeholders stand for. flags: of the compiler, for the CPU. sms: GPU architectures. cuda: `12.8`.

    version: of the wheel, with its label. folder: of the build, site: site-packages of its environment; on these two,
    and on the jobs, the wheel must not depend.
    """

    flags: tuple[str, ...]
    sms: tuple[int, ...]
    cuda: str
    version: str
    jobs: int
    folder: str

    def fill(self, text: str) -> str:
        """`text` with its placeholders replaced."""
        known = self.known()
        return _PLACEHOLDER.sub(lambda found: known[found[1]], text)

    def known(self) -> dict[str, str]:
        """Replacement by name."""
        return {
            "isa.flags": " ".join(self.flags), "sm.arch_list": arch_list(self.sms),
            "sm.specific": ";".join(_dotted(code_name(sm)) for sm in self.sms),
            "sm.nvcc": ";".join(code_name(sm) for sm in self.sms),
            "cuda": self.cuda, "version": self.version, "jobs": str(self.jobs),
            "folder": self.folder, "site": f"{self.folder}/{SITE}",
        }  # fmt: skip


_NAMES = Values(flags=(), sms=(), cuda="", version="", jobs=0, folder="").known().keys()


def jobs_for(build: Build, *, cores: int, memory: int, wanted: int | None) -> int:
    """How many compilers may run at a time. memory: bytes of RAM available. wanted: MAX_JOBS, which only lowers it."""
    most = min(cores, memory // CUDA_JOB_BYTES) if build.cuda else cores
    return max(1, min(most, wanted) if wanted is not None else most)


def local_version(version: str, build: Build, *, sms: Sequence[int], isa: str) -> Version:
    """The version of the built wheel: `0.1.27+avx512`, `2.9.1+sm90.avx512`; `+source` if it is for any target.

    For the SMs that are all it is `2.9.1+all.avx512`.
    """
    old = Version(version)
    gpus = ["all"] if len(sms) > 1 and set(sms) == set(build.all) else [f"sm{sm}" for sm in sms]
    parts = gpus * build.uses("sm") + [isa.replace("-", ".")] * build.uses("isa")
    label = ".".join(parts) or "source"
    return old if old.local == label else Version(f"{old}{'.' if old.local else '+'}{label}")


def build_faults(name: str, version: str | None, build: Build) -> Iterator[tuple[str, str]]:
    """(key, fault) of every value that has the right type and cannot be meant, but for urls and paths."""
    if version is None:
        yield "", "needs the component's version"
    yield from _source_faults(build)
    yield from _release_faults(version, build)
    for number, text in enumerate(build.requires):
        if fault := _requirement_fault(text):
            yield f"requires[{number}]", fault
    yield from _environment_faults("", name, build.environment)
    for number, one in enumerate(build.variant):
        yield from _environment_faults(f"variant[{number}].", name, one.environment)
    yield from _config_faults(build.config)
    yield from _name_faults(build)
    if not build.prebuilt and build.when not in ("always", "auto"):
        yield "when", "must be 'always' or 'auto' where there is no prebuilt wheel to take instead"
    for key in ("disk", "memory"):
        if getattr(build, key) < 0:
            yield key, "must be a number of bytes"


def _name_faults(build: Build) -> Iterator[tuple[str, str]]:
    rules = (*build.without, *(each for one in build.variant for each in one.without))
    names = [("unneeded", one) for one in build.unneeded] + [("without", one) for rule in rules for one in rule.names]
    yield from ((key, f"{name!r} is not a normalised name") for key, name in names if not is_normalized_name(name))


def _config_faults(config: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if not _KEY.fullmatch(key):
            yield f"config.{key}", "is not a plain key"
        yield from ((f"config.{key}", fault) for fault in _value_faults(value))


def _environment_faults(where: str, name: str, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for variable, value in environment.items():
        if not _is_allowed(variable, name):
            yield f"{where}environment.{variable}", "is not a variable that a recipe may set for a build"
        yield from ((f"{where}environment.{variable}", fault) for fault in _value_faults(value))


def _source_faults(build: Build) -> Iterator[tuple[str, str]]:
    given = [key for key in ("sdist", "url", "git", "path", "shipped") if getattr(build, key)]
    if len(given) != 1:
        yield "", f"needs one source: sdist, url, git, path or shipped, and not {' and '.join(given) or 'none'}"
    if build.url is not None and not (build.sha256 or build.releases):
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


def _release_faults(version: str | None, build: Build) -> Iterator[tuple[str, str]]:
    if not build.releases:
        return
    if build.sha256 or _RELEASE not in (build.url or ""):
        yield "releases", f"is meant for a url with {_RELEASE}, instead of one sha256"
    elif version is not None and version not in build.releases:
        yield "releases", f"does not hold {version}; it has {', '.join(build.releases)}"
    for name, digest in build.releases.items():
        if not _SHA256.fullmatch(digest):
            yield f"releases.{name}", "must be 64 hex digits"


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

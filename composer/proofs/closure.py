"""Prove that all that a tree loads is inside the tree, or among the few libraries that every host has.

That is every DT_NEEDED, and every name that an object is known to open at run time: by its own notes, or by a recipe.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from posixpath import dirname
from types import MappingProxyType

from composer.formats.dlopen import Dlopen
from composer.formats.elf import Elf
from composer.formats.loader import Loader, Lookup, Tree, entries, lexical
from composer.model.dlopen import DlopenRule
from composer.model.finding import Finding
from composer.proofs._answers import Answers

# glibc's own libraries that a minimal installation has; libcrypt and libnsl are separate packages by now.
GLIBC_LIBRARIES = frozenset(
    {
        "ld-linux*.so.*", "libanl.so.1", "libc.so.6", "libdl.so.2", "libm.so.6", "libmvec.so.1", "libpthread.so.0",
        "libresolv.so.2", "librt.so.1", "libutil.so.1",
    }
)  # fmt: skip
# Installed with the kernel driver, which a bundle can neither hold nor replace.
DRIVER_LIBRARIES = frozenset(
    {
        "libcuda.so.1", "libcudadebugger.so.1", "libnvcuvid.so.1", "libnvidia-encode.so.1", "libnvidia-ml.so.1",
        "libnvidia-nvvm.so.4", "libnvidia-opticalflow.so.1", "libnvidia-ptxjitcompiler.so.1", "libnvoptix.so.1",
    }
)  # fmt: skip
HOST_LIBRARIES = GLIBC_LIBRARIES | DRIVER_LIBRARIES
# In every process of a bundle: its interpreter loads them when it starts (composer/runtime/launch).
LOADED_AT_START = ("libgcc_s.so.1", "libstdc++.so.6", "libz.so.1")
# Needed only by plugins that are opened where the host has the fabric: the RDMA and MPI parts of NVSHMEM and cuFile.
PLUGIN_LIBRARIES = frozenset(
    {
        "libfabric.so.*", "libibverbs.so.*", "libmlx5.so.*", "libmpi.so.*", "liboshmem.so.*", "libpmix.so.*",
        "librdmacm.so.*", "libucp.so.*", "libucs.so.*", "libuct.so.*",
    }
)  # fmt: skip

# glibc gives this version to objects with relative relocations packed, and defines it since 2.36.
_NAMED_GLIBC = {"GLIBC_ABI_DT_RELR": (2, 36)}
_VERSION = re.compile(r"(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)*)\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """The highest symbol version that a tree wants of one family, and the objects that want it."""

    version: tuple[int, ...]
    setters: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True, slots=True, kw_only=True)
class Floors:
    """What a host, or a bundled libstdc++, must at least define; None where nothing is wanted."""

    glibc: Floor | None
    glibcxx: Floor | None
    cxxabi: Floor | None


def floors(elfs: Mapping[str, Elf]) -> Floors:
    """The highest GLIBC, GLIBCXX and CXXABI version that any of the objects needs, compared as numbers."""
    found: dict[str, dict[tuple[int, ...], list[str]]] = {"GLIBC": {}, "GLIBCXX": {}, "CXXABI": {}}
    for path in sorted(elfs):
        for name in sorted(set().union(*elfs[path].versions_needed.values())):
            family, version = _numbered(name)
            if version:
                found[family].setdefault(version, []).append(path)
    return Floors(**{family.lower(): _highest(versions) for family, versions in found.items()})


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name or path matches any of the shell patterns (`*` also matches `/`)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def program_of(tree: Tree, python: str) -> str | None:
    """The program that loads a bundle's objects; None where bin/pythonX.Y is a launcher of the host's.

    What the host's needs and where it looks is not known then: every object must be found without it.
    """
    program = f"bin/python{python}"
    return program if program in tree.objects else None


def host_libraries(tree: Tree, opened: Mapping[str, Sequence[Dlopen]] = MappingProxyType({})) -> dict[str, str]:
    """What a bundle takes from its host beside glibc, by name: of the `driver`, or as a `plugin` that may be absent.

    opened: as in `check_closure`. The driver's come first.
    """
    names = {name for elf in tree.objects.values() for name in elf.needed}
    names |= {name for each in opened.values() for one in each for name in one.names}
    own = {elf.soname for elf in tree.objects.values()}
    kinds = (("driver", DRIVER_LIBRARIES), ("plugin", PLUGIN_LIBRARIES))
    return {name: kind for kind, patterns in kinds for name in sorted(names - own) if matches(name, patterns)}


def dlopened(rules: Iterable[DlopenRule], paths: Iterable[str]) -> dict[str, tuple[Dlopen, ...]]:
    """What objects open by the rules of a recipe, by their paths below the prefix, as `check_closure` takes it."""
    rules = tuple(rules)
    found = {
        path: tuple(
            Dlopen(names=(name,), required=not rule.optional, why=rule.reason)
            for rule in rules if rule.covers(path) for name in rule.names
        )
        for path in paths
    }  # fmt: skip
    return {path: opened for path, opened in found.items() if opened}


def check_bundle(
    tree: Tree, python: str, opened: Mapping[str, Sequence[Dlopen]] = MappingProxyType({})
) -> tuple[Finding, ...]:
    """`check_closure` of a bundle with its own program, or the host's."""
    host = HOST_LIBRARIES.union(left_to_host(tree))
    return check_closure(tree, host=host, program=program_of(tree, python), preloaded=LOADED_AT_START, opened=opened)


def left_to_host(tree: Tree) -> tuple[str, ...]:
    """What a bundle needs of LOADED_AT_START and has no copy of, for hosts without: every host must have it."""
    own = {elf.soname for elf in tree.objects.values()}
    needed = {name for elf in tree.objects.values() for name in elf.needed}
    return tuple(name for name in LOADED_AT_START if name in needed - own)


def check_runtime(tree: Tree) -> tuple[Finding, ...]:
    """A warning about what a bundle leaves to its hosts that not all have, as one for another machine must."""
    names = left_to_host(tree)
    users = sorted(path for path, elf in tree.objects.items() if not set(names).isdisjoint(elf.needed))
    return tuple(
        Finding(
            id="closure.host-runtime", severity="warning", subject=path,
            evidence=f"{', '.join(names)} must be the host's: the bundle has no copy for a host without",
            fix="Install it there (Debian and Ubuntu: libstdc++6, libgcc-s1, zlib1g).",
        )
        for path in users[:1]
    )  # fmt: skip


def check_closure(
    tree: Tree,
    *,
    host: Collection[str] = HOST_LIBRARIES,
    plugins: Collection[str] = PLUGIN_LIBRARIES,
    program: str | None = None,
    preloaded: Collection[str] = (),
    opened: Mapping[str, Sequence[Dlopen]] = MappingProxyType({}),
) -> tuple[Finding, ...]:
    """What keeps the tree from being closed, in a stable order; no finding of severity `error` means that it is.

    Every dynamic object is loaded on its own, and so is judged both as a root and below each of its dependents.

    Parameters
    ----------
    host: patterns of names that may come from the host.
    plugins: patterns of names whose absence only disables the object that wants them.
    program: the executable in the tree that loads the others; what it needs is in the process from its start.
    preloaded: further names that are known to be in the process beforehand; nothing else is assumed to be.
    opened: what objects open by name at run time, by their paths, beside what their own notes say.
    """
    loader = Loader(tree, program=program, preloaded=preloaded, opened=opened)
    verdicts: dict[tuple[str, str], _Verdict] = {}
    loaded: set[str] = set()
    answers = Answers(tree, preloaded)
    for root in sorted(path for path, elf in tree.objects.items() if elf.dynamic):
        for lookup in loader.load(root):
            if not matches(lookup.needed, host):
                verdicts.setdefault((lookup.subject, lookup.needed), _Verdict()).add(lookup)
                answers.add(lookup)
            if lookup.provider is not None:
                loaded.add(lookup.provider)
    found = [
        finding
        for (subject, needed), verdict in verdicts.items()
        for finding in _judge(tree, loader, subject, needed, verdict, plugins=plugins, loaded=subject in loaded)
    ]
    found += [finding for path, elf in tree.objects.items() for finding in _outside(path, elf)]
    found += answers.findings(loader)
    return tuple(sorted(found, key=lambda each: (each.subject, each.id, each.evidence)))


class _Verdict:
    """What became of one DT_NEEDED name of one object, over all the ways in which that object is loaded."""

    __slots__ = ("alone", "below", "needed", "opened", "providers", "runpath", "unusable")

    def __init__(self) -> None:
        self.alone = False  # unanswered when the object is loaded by itself
        self.needed = False  # it is a DT_NEEDED
        self.opened: Dlopen | None = None  # it is opened at run time, and for what
        self.below: list[Lookup] = []  # unanswered when something else loads it
        self.providers: set[str] = set()
        self.runpath = False  # at least once answered by DT_RUNPATH
        self.unusable: set[str] = set()

    def add(self, lookup: Lookup) -> None:
        self.needed |= lookup.opened is None
        if lookup.opened and not (self.opened and self.opened.required):
            self.opened = lookup.opened
        self.runpath |= lookup.how == "runpath"
        if lookup.provider is not None:
            self.providers.add(lookup.provider)
        elif lookup.how == "unusable":
            self.unusable.add(lookup.found or "")
        elif lookup.how == "absent" and len(lookup.chain) == 1:
            self.alone = True
        elif lookup.how == "absent":
            self.below.append(lookup)


def _judge(
    tree: Tree, loader: Loader, subject: str, needed: str, verdict: _Verdict, *, plugins: Collection[str], loaded: bool
) -> Iterator[Finding]:
    for path in verdict.unusable:
        yield Finding(
            id="closure.unusable", severity="error", subject=subject, evidence=f"{needed} is found at {path}, which is "
            "no shared object", fix="Remove that file, or put the folder of the library before it in the RPATH.",
        )  # fmt: skip
    if verdict.runpath:
        yield Finding(
            id="closure.runpath", severity="note", subject=subject,
            evidence=f"{needed} is found by DT_RUNPATH, before which a host's LD_LIBRARY_PATH would be searched",
            fix="Clear LD_LIBRARY_PATH where the bundle is started.",
        )  # fmt: skip
    for provider in verdict.providers:
        yield from _versions(tree, subject, needed, provider)
    if verdict.below or (verdict.alone and not loaded):
        yield _missing(tree, loader, subject, needed, verdict, plugins)
    elif verdict.alone:
        yield Finding(
            id="closure.loaded-alone", severity="note", subject=subject,
            evidence=f"{needed} is found only when another object of the tree loads this one",
        )  # fmt: skip


def _missing(
    tree: Tree, loader: Loader, subject: str, needed: str, verdict: _Verdict, plugins: Collection[str]
) -> Finding:
    opened = None if verdict.needed else verdict.opened
    if matches(needed, plugins):
        return Finding(
            id="closure.plugin", severity="note", subject=subject,
            evidence=f"{needed} comes from the host, if it has it",
        )  # fmt: skip
    if opened and not opened.required:
        unless = " unless another object has loaded it" if verdict.providers else ""
        return Finding(
            id="closure.optional", severity="note", subject=subject,
            evidence=f"{' or '.join(opened.names)}, which it opens for {opened.why}, is not found{unless}",
        )  # fmt: skip
    elf = tree.objects[subject]
    places = loader.places(needed, elf)
    via = " <- ".join(verdict.below[0].chain[1:]) if verdict.below else ""
    asked = f"{' or '.join(opened.names)}, which it opens for {opened.why}," if opened else needed
    parts = [f"{asked} is not found"]
    parts += [f"when loaded by {via}"] if via else []
    parts += [f"though it is in {', '.join(places)}"] if places else []
    parts += ["and a DT_RUNPATH keeps the RPATH of what loads it from being used"] if elf.runpath else []
    fix = f"Bundle {needed}, or drop this object."
    if places:
        fix = (
            f"Add an RPATH rule for it ({places[0] or '.'}), or let the program need {needed} where it must not change."
        )
    return Finding(id="closure.missing", severity="error", subject=subject, evidence=", ".join(parts), fix=fix)


def _versions(tree: Tree, subject: str, needed: str, provider: str) -> Iterator[Finding]:
    """glibc refuses a library that defines versions, but not the wanted one; one that defines none passes."""
    defined = tree.objects[provider].versions_defined
    lacking = tree.objects[subject].versions_needed.get(needed, frozenset()) - defined
    if defined and lacking:
        yield Finding(
            id="closure.version", severity="error", subject=subject,
            evidence=f"{provider} does not define {', '.join(sorted(lacking))}", fix=f"Bundle a newer {needed}.",
        )  # fmt: skip


def _outside(path: str, elf: Elf) -> Iterator[Finding]:
    outside = [entry for entry in entries(elf) if lexical(entry, dirname(path)) is None]
    if outside:
        yield Finding(
            id="closure.outside", severity="warning", subject=path,
            evidence=f"the loader would also look in {', '.join(map(_folder, outside))}, which is not in the bundle",
            fix="Rewrite its RPATH, unless its licence forbids a change.",
        )  # fmt: skip


def _folder(entry: str) -> str:
    return repr(entry) if entry else "the current folder (an empty entry)"


def _numbered(name: str) -> tuple[str, tuple[int, ...]]:
    if name in _NAMED_GLIBC:
        return "GLIBC", _NAMED_GLIBC[name]
    found = _VERSION.match(name)
    return (found[1], tuple(map(int, found[2].split(".")))) if found else ("", ())


def _highest(versions: Mapping[tuple[int, ...], list[str]]) -> Floor | None:
    if not versions:
        return None
    top = max(versions)
    return Floor(version=top, setters=tuple(dict.fromkeys(versions[top])))

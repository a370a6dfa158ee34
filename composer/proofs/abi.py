"""Prove that every symbol that an object of a tree wants is defined by something that is loaded with it.

The loader looks for a symbol in what the program has loaded, and then in what is loaded together with the object: the
one that `dlopen` was called for, and everything that it needs (glibc's `elf/dl-lookup.c` and `dl-open.c`). CPython
opens its extension modules, and `ctypes` its libraries, with RTLD_NOW: there every symbol must be found at once, also
of functions that nobody calls. Other libraries are opened by libraries, lazily as a rule.

Only what is in the tree can be looked into. The names of libraries that stay with the host are taken on trust: with a
version by the library that it is of (the floors tell which release that takes), without one by what such a library is
known to define.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from posixpath import basename, dirname
from typing import Literal

from composer.formats.dlopen import Dlopen
from composer.formats.linkage import Linkage, Wanted
from composer.formats.loader import Tree
from composer.model.finding import Finding
from composer.proofs._scopes import C10, Scopes
from composer.proofs.closure import (
    HOST_LIBRARIES,
    LOADED_AT_START,
    check_bundle,
    check_runtime,
    left_to_host,
    program_of,
)

Kind = Literal["stable-abi", "bound to this libtorch"]

_LIBTORCH = ("libtorch*.so", "libc10*.so")
# What PyTorch promises to keep from release to release: torch/csrc/stable, torch/csrc/inductor/aoti_torch/c/shim.h.
_STABLE = ("aoti_torch_", "torch_")
_OF_TORCH = re.compile(r"_Z\w*?(?:2at|3c10|5torch)")
# An object that registers operators is opened by torch.ops.load_library, that is, by ctypes.
_REGISTERS = re.compile(r"_ZN?[RO]?5torch7Library|torch_library_init_|aoti_torch_library_")
_TAG = re.compile(r"cpython-(?P<python>\d+[a-z]*)(?:-(?P<machine>\w+)-.*)?")
_OTHERS = ("pypy", "graalpy")
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """What one extension module, or library of operators, uses of PyTorch.

    cxx: symbols of libtorch and libc10 beside the stable ones, which change from release to release; stable: functions
    of the stable C ABI. wanted: all symbols that it wants of anybody.
    """

    path: str
    cxx: int
    stable: int
    wanted: int

    @property
    def kind(self) -> Kind:
        """`stable-abi` also where it uses nothing of PyTorch."""
        return "bound to this libtorch" if self.cxx else "stable-abi"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abi:
    """What was found, in a stable order. bindings: of every extension module and every library that needs PyTorch."""

    findings: tuple[Finding, ...]
    bindings: tuple[Binding, ...]


def check_abi(
    tree: Tree,
    linkage: Mapping[str, Linkage],
    python: str,
    *,
    program: str | None = None,
    host: Collection[str] = HOST_LIBRARIES,
    preloaded: Collection[str] = LOADED_AT_START,
) -> Abi:
    """Resolve every symbol of the tree; no finding of severity `error` means that what Python opens can be loaded.

    Parameters
    ----------
    linkage: of the objects of `tree`, by path; those that are not given are not looked into.
    python: the minor version of the interpreter, such as `3.12`.
    program, host, preloaded: as in `check_closure`. Without a program CPython's own symbols are taken on trust.
    """
    linkage = {path: one for path, one in linkage.items() if tree.objects[path].dynamic}
    scopes = Scopes(tree, linkage, program=program, host=host, preloaded=preloaded)
    foreign = {path: fault for path in linkage if (fault := _foreign(tree, path, linkage[path], python))}
    opened = _opened(tree, {path: one for path, one in linkage.items() if path not in foreign})
    roots = [*opened, program] if program in linkage else opened
    reached = {path for root in roots for path in scopes.scope(root)}
    others = sorted(linkage.keys() - reached - foreign.keys())
    bindings = _bindings(scopes, opened)
    findings = [
        *_of_others(linkage, foreign),
        *_missing(scopes, roots),
        *(finding for path in others for finding in _alone(scopes, path, others)),
        *(_bound(binding) for binding in bindings if binding.cxx or binding.stable),
    ]
    return Abi(findings=tuple(sorted(findings, key=lambda one: (one.subject, one.id))), bindings=bindings)


def check_loading(tree: Tree, linkage: Mapping[str, Linkage], python: str,
                  opened: Mapping[str, Sequence[Dlopen]]) -> Iterator[Finding]:  # fmt: skip
    """All findings about what the loader does with a bundle: libraries first (`check_closure`), then symbols.

    opened: what objects open by name (`dlopened`).
    """
    yield from check_runtime(tree)
    yield from check_bundle(tree, python, opened)
    host = HOST_LIBRARIES.union(left_to_host(tree))
    yield from check_abi(tree, linkage, python, program=program_of(tree, python), host=host).findings


def _is_extension(path: str, linkage: Linkage) -> bool:
    return basename(path).partition(".")[0] in linkage.modules


def _opened(tree: Tree, linkage: Mapping[str, Linkage]) -> list[str]:
    """What Python itself opens, sorted: extension modules, and those that register operators and nobody needs."""
    needed = {name for elf in tree.objects.values() for name in elf.needed}
    return [
        path for path, one in sorted(linkage.items())
        if _is_extension(path, one)
        or (basename(path) not in needed and any(_REGISTERS.match(want.name) for want in one.wanted))
    ]  # fmt: skip


def _foreign(tree: Tree, path: str, linkage: Linkage, python: str) -> str | None:
    """What an extension module is for, if not for this Python and for what its own code is for."""
    tag = basename(path).partition(".")[2].removesuffix("so").rstrip(".")
    if not _is_extension(path, linkage) or not tag.startswith(("cpython-", *_OTHERS)):
        return None
    found = _TAG.fullmatch(tag)
    if found is None or found["python"] != python.replace(".", ""):
        return tag
    machine = tree.objects[path].machine
    return tag if found["machine"] not in (None, machine) else None


def _of_others(linkage: Mapping[str, Linkage], foreign: Mapping[str, str]) -> Iterator[Finding]:
    """A note where a module of the same name is there for this Python, too."""
    own = {(dirname(path), basename(path).partition(".")[0]) for path in linkage.keys() - foreign.keys()}
    for path, tag in foreign.items():
        spare = (dirname(path), basename(path).partition(".")[0]) in own
        yield Finding(
            id="abi.tag", severity="note" if spare else "warning", subject=path,
            evidence=f"an extension module for {tag}, which this bundle's Python never imports",
            fix="Prune it, or take the wheel for this Python.",
        )  # fmt: skip


def _missing(scopes: Scopes, roots: Sequence[str]) -> Iterator[Finding]:
    """One error for each object that leaves a symbol open under anything that Python opens."""
    missing: defaultdict[str, dict[Wanted, str]] = defaultdict(dict)
    for root in roots:
        for path in scopes.scope(root) & scopes.linkage.keys():
            for want in scopes.below(path, root):
                missing[path].setdefault(want, root)
    for path, wants in missing.items():
        users = sorted(set(wants.values()) - {path})
        via = f" when {users[0]} loads it" if path not in wants.values() and users else ""
        yield Finding(
            id="abi.missing", severity="error", subject=path, evidence=_evidence(scopes, path, tuple(wants), via),
            fix=_fix(scopes, tuple(wants)),
        )  # fmt: skip


def _alone(scopes: Scopes, path: str, others: Sequence[str]) -> Iterator[Finding]:
    """What no object that Python opens loads: a program, or what a library opens, if ever."""
    users = [path, *(one for one in others if one != path and path in scopes.scope(one))]
    wants = min((scopes.below(path, user) for user in users), key=len)
    now = tuple(want for want in wants if not want.lazy)
    if now:
        yield Finding(
            id="abi.unloadable", severity="warning", subject=path, evidence=_evidence(scopes, path, now, ""),
            fix=_fix(scopes, now),
        )  # fmt: skip
    elif wants:
        yield Finding(
            id="abi.lazy", severity="note", subject=path,
            evidence=f"{_evidence(scopes, path, wants, '')}; each is looked for at its first call, if there is one",
        )  # fmt: skip


def _evidence(scopes: Scopes, path: str, wants: Sequence[Wanted], via: str) -> str:
    names = sorted(f"{want.name}@{want.version}" if want.version else want.name for want in wants)
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    total = len(scopes.linkage[path].wanted)
    return f"{len(names)} of the {total} symbols that it wants are defined by nothing that is loaded{via}: {shown}"


def _fix(scopes: Scopes, wants: Sequence[Wanted]) -> str:
    if any(_OF_TORCH.match(want.name) for want in wants):
        return "Compose it with the PyTorch that it was built for, or build it from source for this one."
    places = sorted(set[str]().union(*map(scopes.definers, wants)))
    if places:
        return f"Let it need {basename(places[0])}, which defines some."
    return "Bundle the release of the library that it was built for, or drop this object."


def _bindings(scopes: Scopes, opened: Sequence[str]) -> tuple[Binding, ...]:
    objects = scopes.tree.objects
    homes = {dirname(path) for path in objects if basename(path) == C10}
    libtorch = frozenset(path for path in objects if dirname(path) in homes and _is_libtorch(basename(path)))
    own = tuple(f"{dirname(home)}/" for home in homes)
    users = {path for path in scopes.linkage if any(map(_is_libtorch, objects[path].needed))}
    paths = sorted(path for path in users.union(opened) if not path.startswith(own))
    return tuple(_binding(scopes, path, libtorch) for path in paths)


def _is_libtorch(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _LIBTORCH)


def _binding(scopes: Scopes, path: str, libtorch: frozenset[str]) -> Binding:
    """A symbol is PyTorch's where nothing else that is loaded defines it; of C++, if its name says so, too.

    libtorch also exports some of the templates of the C++ library that it was compiled with.
    """
    wanted = scopes.linkage[path].wanted
    scope = scopes.scope(path)
    used = [
        want.name for want in wanted
        if (found := scopes.definers(want) & scope) and found <= libtorch
        and (_OF_TORCH.match(want.name) or not want.name.startswith("_Z"))
    ]  # fmt: skip
    used += [want.name for want in scopes.alone(path) if _OF_TORCH.match(want.name)]
    stable = sum(name.startswith(_STABLE) for name in used)
    return Binding(path=path, cxx=len(used) - stable, stable=stable, wanted=len(wanted))


def _bound(binding: Binding) -> Finding:
    parts = [f"{binding.cxx} of its {binding.wanted} symbols are PyTorch's C++"] if binding.cxx else []
    parts += [f"{binding.stable} are of PyTorch's stable C ABI"] if binding.stable else []
    return Finding(id="abi.torch", severity="note", subject=binding.path,
                   evidence=f"{binding.kind}: {', '.join(parts)}")  # fmt: skip

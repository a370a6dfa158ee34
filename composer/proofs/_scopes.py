"""Which objects are loaded together, and which symbols that leaves open."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache, cached_property
from itertools import takewhile
from posixpath import basename

from composer.formats.linkage import DIGEST, Linkage, Wanted
from composer.formats.loader import Loader, Tree
from composer.proofs.closure import GLIBC_LIBRARIES, matches

#: In the process once anything of PyTorch is.
C10 = "libc10.so"
_GLOBAL_DEPS = "libtorch_global_deps.so"
# What some libraries define, as far as a reference without a version tells. Of the C++ runtime's templates those for
# PyTorch's types are not.
_NOT_TORCH, _STD = r"(?!\w*(?:2at|3c10|5torch))", r"(?:S[tabsiod]|10__cxxabiv1|9__gnu_cxx)\w*"
_RUNTIME = rf"_Z{_NOT_TORCH}(?:T[VTIS])?(?:N[KVRO]*)?{_STD}|_Z[nd][alw]\w*"
_KNOWN = {
    "libcuda.so.1": re.compile(r"cu(?!File)[A-Z]\w*", re.ASCII),
    "libnvidia-ml.so.1": re.compile(r"nvml[A-Z]\w*", re.ASCII),
    "libstdc++.so.6": re.compile(rf"{_RUNTIME}|_ZT[IS]P?K?[a-z]|__cxa_\w+|__gxx_personality_v0|__once_proxy", re.ASCII),
    "libgcc_s.so.1": re.compile(r"_Unwind_\w+|__\w+[sdtx]f\d?", re.ASCII),
}
_OF_PYTHON = re.compile(r"_?_?Py[A-Z_]\w*", re.ASCII)
# The functions of <math.h> (C11, 7.12); which of them are instructions differs from machine to machine.
_MATH = (
    "a?(?:cos|sin|tan)h?", "atan2", "cbrt", "ceil", "copysign", "erfc?", "exp2?", "expm1", "fabs", "fdim", "floor",
    "fm(?:a|ax|in|od)", "frexp", "hypot", "ilogb", "ldexp", "lgamma", "l?l?r(?:int|ound)", "log(?:10|1p|2|b)?", "modf",
    "nan", "nearbyint", "next(?:after|toward)", "pow", "rem(?:ainder|quo)", "scalbl?n", "sqrt", "tgamma", "trunc",
)  # fmt: skip
# Some objects do not say that they need libdl, libpthread or libm: CPython has loaded them already.
_OF_GLIBC = re.compile(
    rf"(?:dl(?:open|close|v?sym|error|mopen|addr1?|info)|(?:pthread|sem)_\w+|(?:{'|'.join(_MATH)})[fl]?)", re.ASCII
)


class Scopes:
    """The symbols of a tree, resolved as the loader would.

    Arguments as for `composer.proofs.abi.check_abi`.
    """

    def __init__(
        self, tree: Tree, linkage: Mapping[str, Linkage], *, program: str | None, host: Collection[str],
        preloaded: Collection[str],
    ) -> None:  # fmt: skip
        self.tree = tree
        self.linkage = linkage
        self._loader = Loader(tree, program=program, preloaded=preloaded)
        self._trusts_python = program is None
        names = frozenset(preloaded)
        copies = (path for path, elf in tree.objects.items() if not names.isdisjoint((elf.soname, basename(path))))
        self._always = frozenset(self._loader.running).union(copies)
        self._is_host = cache(lambda library: matches(library, host))
        self._is_glibc = cache(lambda library: matches(library, GLIBC_LIBRARIES))
        self._of_glibc = frozenset(
            want.name for one in linkage.values() for want in one.wanted
            if want.library and self._is_glibc(want.library)
        )  # fmt: skip
        self._definers = _definers(linkage, {key for one in linkage.values() for key in self._keys(one.wanted)})
        self._loads: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self._alone: dict[str, tuple[Wanted, ...]] = {}

    def scope(self, root: str) -> frozenset[str]:
        """The objects in which a symbol is looked for once `root` is opened."""
        return self._load(root)[0]

    def alone(self, path: str) -> tuple[Wanted, ...]:
        """What nothing defines when an object is opened by itself."""
        if path not in self._alone:
            self._alone[path] = self._open(path, path, self.linkage[path].wanted)
        return self._alone[path]

    def below(self, path: str, root: str) -> tuple[Wanted, ...]:
        """What of an object nothing defines when `root`, which loads it, is opened."""
        less = self.scope(path) <= self.scope(root)
        return self._open(path, root, self.alone(path) if less else self.linkage[path].wanted)

    def definers(self, want: Wanted) -> frozenset[str]:
        """All objects of the tree that define it."""
        first, second = want.keys
        return self._definers.get(first, frozenset()) | self._definers.get(second, frozenset())

    def _load(self, root: str) -> tuple[frozenset[str], frozenset[str]]:
        """The objects of the tree, and the names of what is not in the tree, that are loaded with one."""
        if root not in self._loads:
            # What is opened at run time is in a scope of its own, and comes last.
            lookups = [*takewhile(lambda lookup: lookup.opened is None, self._loader.load(root))]
            loaded = {root, *(one.provider for one in lookups if one.provider is not None)}
            if self.tree.objects[root].kind != "executable":
                loaded |= self._always
                loaded |= self._with_torch if any(basename(path) == C10 for path in loaded) else set()
            self._loads[root] = frozenset(loaded), frozenset(one.needed for one in lookups if one.provider is None)
        return self._loads[root]

    @cached_property
    def _with_torch(self) -> set[str]:
        """What `import torch` loads for everybody, by RTLD_GLOBAL: the CUDA libraries that its libraries need."""
        roots = (path for path in self.tree.objects if basename(path) == _GLOBAL_DEPS)
        return {one.provider for root in roots for one in self._loader.load(root) if one.provider is not None}

    def _keys(self, wanted: Iterable[Wanted]) -> Iterable[bytes]:
        return (key for want in wanted if not (want.library and self._is_host(want.library)) for key in want.keys)

    def _open(self, path: str, root: str, wanted: Iterable[Wanted]) -> tuple[Wanted, ...]:
        scope, outside = self._load(root)
        return tuple(
            want for want in wanted
            if not (want.library and self._is_host(want.library)) and scope.isdisjoint(self.definers(want))
            and not self._is_trusted(want, path, outside)
        )  # fmt: skip

    def _is_trusted(self, want: Wanted, path: str, outside: frozenset[str]) -> bool:
        """Whether a library outside the tree will define it, as far as names can tell."""
        name = want.name
        if want.version is not None:
            return want.library in outside
        known = (pattern for library, pattern in _KNOWN.items() if library in outside)
        return (
            name in self._of_glibc
            or any(pattern.fullmatch(name) for pattern in (_OF_GLIBC, *known))
            or (self._trusts_python and _OF_PYTHON.fullmatch(name) is not None)
            or (not name.startswith("_Z") and self._needs_unknown(path, outside))
        )

    def _needs_unknown(self, path: str, outside: frozenset[str]) -> bool:
        """Whether an object needs a library of which no name is known; glibc's are, where they have their versions."""
        versioned = any(want.version is not None for want in self.linkage[path].wanted)
        needed = outside.intersection(self.tree.objects[path].needed) - _KNOWN.keys()
        return any(not (versioned and self._is_glibc(name)) for name in needed)


def _definers(linkage: Mapping[str, Linkage], keys: Collection[bytes]) -> dict[bytes, frozenset[str]]:
    """The objects that define what any of these digests stands for."""
    found: dict[bytes, set[str]] = {}
    for path, one in linkage.items():
        defined = one.defined
        for at in range(0, len(defined), DIGEST):
            key = defined[at : at + DIGEST]
            if key in keys:
                found.setdefault(key, set()).add(path)
    return {key: frozenset(paths) for key, paths in found.items()}

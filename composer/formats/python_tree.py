"""Which modules an interpreter finds among the files of a prefix: its standard library, site-packages, `.pth` folders.

Source: the import system of CPython (`importlib.machinery`): a package's folder, an extension module of this Python's
ABI, a source, bytecode without a source, and any folder as a namespace package (PEP 420).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from posixpath import dirname, join, normpath
from typing import Final

# Compiled into the interpreter by some builds, files in lib-dynload by others. Names with an underscore are all taken
# for such: nothing but the standard library imports them.
_BUILT_IN: Final = frozenset(
    {
        "array", "atexit", "binascii", "builtins", "cmath", "errno", "faulthandler", "fcntl", "gc", "grp", "itertools",
        "marshal", "math", "mmap", "posix", "pwd", "pyexpat", "readline", "resource", "select", "sys", "syslog",
        "termios", "time", "unicodedata", "zlib",
    }
)  # fmt: skip
#: What left the standard library, by the minor version of Python 3 that was the first without it (PEP 594, PEP 632).
_REMOVED: Final[Mapping[int, frozenset[str]]] = {
    12: frozenset({"asynchat", "asyncore", "distutils", "imp", "smtpd"}),
    13: frozenset({
        "aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "lib2to3", "mailcap", "nis", "nntplib",
        "ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib",
    }),
}  # fmt: skip
_FOREIGN: Final = frozenset({"msvcrt", "nt", "winreg", "winsound"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonTree:
    """Modules of a prefix by their dotted names.

    files: the file of each (a package's `__init__`). folders: packages, with an `__init__` or without. host: what the
    interpreter has beside them. paths: all files.
    """

    files: Mapping[str, str]
    folders: frozenset[str]
    host: frozenset[str]
    paths: frozenset[str] = field(repr=False)

    def has(self, module: str) -> bool:
        """Whether an import of this name finds something."""
        return module in self.files or module in self.folders or module.partition(".")[0] in self.host

    def is_package(self, module: str) -> bool:
        """Whether it can have submodules that are files."""
        return module in self.folders


def python_tree(paths: Iterable[str], python: str, machine: str, pth: Mapping[str, bytes] | None = None) -> PythonTree:
    """The modules among `paths`, all files below the prefix, for CPython `python` (`3.12`) on `machine`.

    pth: content of the `.pth` files of site-packages, whose folders are searched, too. A prefix without a standard
    library of its own is used with a host's whole one.
    """
    known = frozenset(paths)
    library = f"lib/python{python}/"
    site = f"{library}site-packages/"
    roots = [library, f"{library}lib-dynload/", site, *_folders_of(pth or {}, site)]
    suffixes = _suffixes(python, machine)
    files: dict[str, str] = {}
    folders: set[str] = set()
    for path in sorted(known):
        if "/__pycache__/" in path:
            continue
        root = max((root for root in roots if path.startswith(root)), key=len, default=None)
        name = _module(path.removeprefix(root), suffixes) if root else None
        if name:
            folders.update(_above(name))
            files.setdefault(name.removesuffix(".__init__"), path)
    own = f"{library}os.py" in known
    return PythonTree(files=files, folders=frozenset(folders), host=_host(python, own=own), paths=known)


def standard_library(python: str) -> frozenset[str]:
    """The top-level modules of CPython `python` on Linux, as this interpreter knows them."""
    minor = int(python.split(".")[1])
    names = sys.stdlib_module_names.union({"__main__"}, *_REMOVED.values()) - _FOREIGN
    return names.difference(*(gone for since, gone in _REMOVED.items() if since <= minor))


def _host(python: str, *, own: bool) -> frozenset[str]:
    names = standard_library(python)
    return frozenset(name for name in names if name.startswith("_") or name in _BUILT_IN) if own else names


def _suffixes(python: str, machine: str) -> tuple[str, ...]:
    """Longest first, so that the module's own name is what is left."""
    return (f".cpython-{python.replace('.', '')}-{machine}-linux-gnu.so", ".abi3.so", ".so", ".py", ".pyc")


def _module(path: str, suffixes: tuple[str, ...]) -> str | None:
    """The dotted name of a module (of a package: with `.__init__`); None for any other file."""
    folder, _, name = path.rpartition("/")
    for suffix in suffixes:
        stem = name.removesuffix(suffix)
        if stem.isidentifier() and stem != name:
            return f"{folder}/{stem}".lstrip("/").replace("/", ".") if "." not in folder else None
    return None


def _above(name: str) -> Iterator[str]:
    """The packages that a module is in (itself, when its name ends in `.__init__`)."""
    while name := name.rpartition(".")[0]:
        yield name


def _folders_of(pth: Mapping[str, bytes], site: str) -> Iterator[str]:
    for path, content in pth.items():
        for line in content.decode("utf-8", "replace").splitlines():
            text = line.strip()
            if text and not text.startswith(("#", "import ", "import\t", "/")):
                folder = normpath(join(dirname(path), text))
                if folder.startswith(site):
                    yield f"{folder}/"

"""Which files of an installed CPython travel, and the texts in them that name its old place. Pure."""

from __future__ import annotations

import ast
from typing import Final

from composer.errors import HostError

# Tests, user interfaces that need Tk, pip's bundled wheel, link-time leftovers. pyc files are made for the bundle.
_FOLDERS: Final = frozenset({
    "__pycache__", "test", "tests", "idlelib", "turtledemo", "tkinter", "ensurepip", "site-packages", "dist-packages",
})  # fmt: skip
# Hooks and marks of the machine that it was installed on (Debian's distutils layout among them), and Tk again.
_FILES: Final = frozenset({
    "sitecustomize.py", "usercustomize.py", "EXTERNALLY-MANAGED", "_distutils_system_mod.py", "turtle.py",
})  # fmt: skip
_SUFFIXES: Final = (".pyc", ".pyo", ".a", ".o", ".exe")
# nis brings Kerberos and libcrypt the newest glibc version need of all (2.36); PEP 594 removed both from 3.13.
# _dbm and _gdbm bring libraries under the Sleepycat licence and the GPL; dbm.dumb and dbm.sqlite3 remain.
_EXTENSIONS: Final = (
    "_tkinter.", "_test", "_ctypes_test.", "_xxtestfuzz.", "xxlimited", "nis.", "_crypt.", "_dbm.", "_gdbm.",
)  # fmt: skip

_SYSCONFIG: Final = frozenset({"sysconfig.py", "sysconfig/__init__.py"})
_MARK: Final = "@PREFIX@"
_SHARED_PREFIXES: Final = frozenset({"/", "/usr", "/usr/local"})
_FOOTER: Final = f"""
import sys as _sys

build_time_vars = {{
    name: value.replace("{_MARK}", _sys.base_prefix) if isinstance(value, str) else value
    for name, value in build_time_vars.items()
}}
"""
# Debian's sysconfig uses upstream's install scheme in a virtual environment only.
_DEBIAN_TEST: Final = 'sys.base_prefix != sys.prefix or hasattr(sys, "real_prefix")'


def travels(path: str) -> bool:
    """Whether the file at `path`, relative to the standard library's folder, belongs in a bundle."""
    *folders, name = path.split("/")
    if any(folder in _FOLDERS or folder.startswith("config-") for folder in folders):
        return False
    if folders == ["lib-dynload"] and (not name.endswith(".so") or name.startswith(_EXTENSIONS)):
        return False
    return name not in _FILES and not name.endswith(_SUFFIXES)


def names_its_place(path: str) -> bool:
    """Whether the file at `path` of the standard library is one that `relocate_text` may change."""
    return path in _SYSCONFIG or (path.startswith("_sysconfigdata") and path.endswith(".py"))


def relocate_text(path: str, text: str, minor: str) -> str:
    """The text of such a file without its old place.

    Raises HostError where a file is not as known: a guess would give an interpreter that fails on the host.
    """
    return undo_debian_layout(text) if path in _SYSCONFIG else relocate_sysconfig(text, minor)


def undo_debian_layout(text: str) -> str:
    """Debian's `sysconfig` with upstream's install scheme; other builds' texts unchanged.

    `site` needs the same, but is frozen into the interpreter since 3.11: see composer/runtime/launch/debian_site.py.
    """
    if not is_debian(text):
        return text
    if text.count(_DEBIAN_TEST) != 1:
        raise HostError(
            "the distributor's patch of sysconfig is not one that is known",
            fix="Give --python another interpreter.",
        )
    return text.replace(_DEBIAN_TEST, "True")


def is_debian(text: str) -> bool:
    """Whether this site.py or sysconfig.py installs into dist-packages."""
    return "dist-packages" in text


def relocate_sysconfig(text: str, minor: str) -> str:
    """`_sysconfigdata*.py` with every path below the old prefix computed from sys.base_prefix at import.

    Folders that this layout fixes are set outright. Other mentions of the old prefix are replaced unless it is one that
    other software shares: `/usr/bin/install` and zoneinfo's `/usr/share/zoneinfo` are the host's.
    Raises HostError for a file that does not hold one literal dictionary.
    """
    data = build_settings(text)
    old = str(data.get("prefix", "/"))
    moved = {
        name: value.replace(old, _MARK) if isinstance(value, str) and old not in _SHARED_PREFIXES else value
        for name, value in data.items()
    }
    moved.update({name: value for name, value in _folders(minor).items() if name in data})
    rows = "".join(f"    {name!r}: {moved[name]!r},\n" for name in sorted(moved))
    return f"build_time_vars = {{\n{rows}}}\n{_FOOTER}"


def build_settings(text: str) -> dict[str, str | int]:
    """The variables in the text of a `_sysconfigdata*.py`; HostError unless it holds one literal dictionary."""
    try:
        statements = ast.parse(text).body
        value = next(node.value for node in statements if isinstance(node, ast.Assign))
        data = ast.literal_eval(value)
        return {str(name): item if isinstance(item, int) else str(item) for name, item in data.items()}
    except (SyntaxError, ValueError, StopIteration, AttributeError) as fault:
        raise HostError(
            "build settings of this Python cannot be read", where="_sysconfigdata", why=str(fault)
        ) from fault


def _folders(minor: str) -> dict[str, str]:
    library, include = f"{_MARK}/lib/python{minor}", f"{_MARK}/include"
    return {
        "prefix": _MARK, "exec_prefix": _MARK, "BINDIR": f"{_MARK}/bin", "LIBDIR": f"{_MARK}/lib",
        "SCRIPTDIR": f"{_MARK}/lib", "LIBDEST": library, "BINLIBDEST": library, "DESTLIB": library,
        "MACHDESTLIB": library, "DESTSHARED": f"{library}/lib-dynload", "INCLUDEDIR": include,
        "CONFINCLUDEDIR": include, "INCLUDEPY": f"{include}/python{minor}", "CONFINCLUDEPY": f"{include}/python{minor}",
        "EXENAME": f"{_MARK}/bin/python{minor}", "datarootdir": f"{_MARK}/share", "MANDIR": f"{_MARK}/share/man",
        "LIBPC": f"{_MARK}/lib/pkgconfig",
    }  # fmt: skip

"""The bundle's own CPython: found on this machine or in an archive, and made independent of where it lies."""

from composer.interpreter.find import Candidate, choose_python, find_pythons
from composer.interpreter.providers import ArchiveProvider, HostProvider, PathProvider, Provider
from composer.interpreter.tree import InterpreterTree, TreeEntry

__all__ = [
    "ArchiveProvider",
    "Candidate",
    "HostProvider",
    "InterpreterTree",
    "PathProvider",
    "Provider",
    "TreeEntry",
    "choose_python",
    "find_pythons",
]

"""Read the files of a site's own that a bundle is to carry, and refuse what its programs could not use."""

from __future__ import annotations

import difflib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.parsers import expat

from composer._fs import host_errors
from composer.errors import RecipeError
from composer.model.globs import matches
from composer.model.input import Given, Input
from composer.model.recipe import Recipe

#: What is larger is no setting, and is held in memory.
_MOST_BYTES = 16 << 20
_MOST_FILES = 10_000
_MOST_DEPTH = 32
#: Faults of one input that are told; of a wrong folder all files are wrong.
_MOST_FAULTS = 5
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}


def read_inputs(recipe: Recipe, given: Sequence[tuple[str, Path]]) -> tuple[Given, ...]:
    """The inputs that are given by their names, in the order of the names, each with its content.

    RecipeError with every name that the recipe does not have or that is given twice, and every file that is missing, of
    another kind, a link in a folder, too large, not of the recipe's names or not of its format; HostError for one that
    cannot be read.
    """
    known = {one.name: one for one in recipe.input}
    names = [name for name, _ in given]
    RecipeError.collect([*(_unknown(recipe, name) for name in names if name not in known),
                         *(_fault(name, "is given twice", "Give it once.") for name in dict.fromkeys(names)
                           if names.count(name) > 1)])  # fmt: skip
    faults: list[RecipeError] = []
    found = [_read(known[name], path, faults) for name, path in sorted(given)]
    RecipeError.collect(faults)
    return tuple(found)


def _unknown(recipe: Recipe, name: str) -> RecipeError:
    known = [one.name for one in recipe.input]
    near = difflib.get_close_matches(name, known, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else f"It takes: {', '.join(known)}." if known else "Leave it out."
    return _fault(name, f"{recipe.name} {recipe.version} takes no such input", fix)


def _fault(name: str, what: str, fix: str) -> RecipeError:
    return RecipeError(what, where=f"--input {name}", fix=fix)


def _read(declared: Input, path: Path, faults: list[RecipeError]) -> Given:
    """With what could be read; what could not adds to the faults."""
    own: list[tuple[Path, str]] = []
    content: dict[str, bytes] = {}
    size = 0
    with host_errors(path):
        for name, file in _files(declared, path, own):
            with file.open("rb") as stream:
                content[name] = stream.read(_MOST_BYTES + 1 - size)
            size += len(content[name])
            if size > _MOST_BYTES or len(content) > _MOST_FILES:
                own, content = [(path, f"has more than {_MOST_FILES} files or {_MOST_BYTES >> 20} MiB")], {}
                break
    own += [(path / name, fault) for name, data in content.items() for fault in _content_faults(declared, name, data)]
    if not own and not content:
        own.append((path, "holds no file"))
    faults += [
        _fault(declared.name, f"{file}: {what}", f"Give {_wanted(declared)}.") for file, what in own[:_MOST_FAULTS]
    ]
    if len(own) > _MOST_FAULTS:
        faults.append(_fault(declared.name, f"{len(own) - _MOST_FAULTS} more of {path}", "Look at the first ones."))
    return Given(declared=declared, content=content)


def _wanted(declared: Input) -> str:
    like = f" with files such as {', '.join(declared.files)}" if declared.files else ""
    form = f", in {declared.format.upper()}" if declared.format else ""
    return f"a {declared.kind}{like}{form}: {declared.reason}"


def _files(declared: Input, path: Path, faults: list[tuple[Path, str]]) -> Iterator[tuple[str, Path]]:
    """(path below the folder, file), sorted; nothing is opened that is no file."""
    kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode)) if path.exists() else "missing"
    if kind != declared.kind:
        faults.append((path, "is not there" if kind == "missing" else f"is a {kind}" if kind else "is no file"))
    elif kind == "file":
        yield "", path
    else:
        yield from _below(path, path, faults)


def _below(root: Path, folder: Path, faults: list[tuple[Path, str]]) -> Iterator[tuple[str, Path]]:
    for entry in sorted(os.scandir(folder), key=lambda one: one.name):
        path = Path(entry.path)
        if not entry.name.isprintable():
            faults.append((path, "has a name that cannot be printed"))
        elif entry.is_symlink():
            faults.append((path, "is a link: what it leads to may not be there when it is read"))
        elif entry.is_dir() and len(path.relative_to(root).parts) > _MOST_DEPTH:
            faults.append((path, f"lies more than {_MOST_DEPTH} folders deep"))
        elif entry.is_dir():
            yield from _below(root, path, faults)
        elif entry.is_file():
            yield path.relative_to(root).as_posix(), path
        else:
            faults.append((path, "is no file"))


def _content_faults(declared: Input, name: str, data: bytes) -> Iterator[str]:
    if declared.files and not any(matches(name, pattern) for pattern in declared.files):
        yield "has a name that nothing would look for"
    try:
        if declared.format == "json":
            json.loads(data)
        elif declared.format == "xml":
            expat.ParserCreate().Parse(data, True)
    except (ValueError, LookupError, RecursionError, expat.ExpatError) as fault:  # LookupError: an unknown encoding
        assert declared.format
        yield f"is no {declared.format.upper()}: {fault}"

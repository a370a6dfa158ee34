"""Files of a site's own that a recipe or overlay takes into a bundle: what it asks for, and what was given."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import msgspec

from composer.errors import RecipeError
from composer.model._strict import Record
from composer.model.globs import compile_glob

#: Where inputs are in a bundle, each under its name.
FOLDER: Final = "share/inputs"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,60}")


class Input(Record, frozen=True, kw_only=True):
    """A file or folder that a build may be given; without it the bundle does without.

    variable: of etc/env, which names its place in the bundle and is set only where it is there. files: globs, one of
    which every file of a folder must match: programs pass over what they would not look for. format: of every file.
    """

    name: str
    variable: str
    reason: str
    kind: Literal["file", "folder"] = "file"
    files: tuple[str, ...] = ()
    format: Literal["json", "xml"] | None = None

    @property
    def path(self) -> str:
        """Below the prefix."""
        return f"{FOLDER}/{self.name}"


class InputFacts(msgspec.Struct, frozen=True, kw_only=True):
    """An input that a bundle holds. files, size: how many, and their bytes.

    sha256: of the file, or of a folder's list: a line for each file with its sha256, two spaces and its path below the
    folder, in the order of the paths' bytes, as sha256sum(1) prints them.
    """

    name: str
    path: str
    variable: str
    sha256: str
    files: int
    size: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """An input and its content: by path below the folder, or under the empty path that of the file."""

    declared: Input
    content: Mapping[str, bytes]

    @property
    def files(self) -> dict[str, bytes]:
        """By path below the prefix."""
        return {"/".join(filter(None, (self.declared.path, path))): data for path, data in self.content.items()}

    @property
    def facts(self) -> InputFacts:
        """For the plan and the manifest."""
        declared, content = self.declared, self.content
        return InputFacts(name=declared.name, path=declared.path, variable=declared.variable, reason=declared.reason,
                          sha256=_digest(content), files=len(content),
                          size=sum(map(len, content.values())))  # fmt: skip


def _digest(content: Mapping[str, bytes]) -> str:
    if "" in content:
        return hashlib.sha256(content[""]).hexdigest()
    rows = sorted((path.encode(), hashlib.sha256(data).hexdigest().encode()) for path, data in content.items())
    return hashlib.sha256(b"".join(b"%s  %s\n" % (digest, path) for path, digest in rows)).hexdigest()


def variables(given: Sequence[Given]) -> dict[str, str]:
    """What etc/env says of inputs."""
    return {one.declared.variable: f"{{prefix}}/{one.declared.path}" for one in given}


def input_faults(inputs: Sequence[Input]) -> Iterator[tuple[str, str]]:
    """(dotted path, fault) of every value that has the right type and cannot be meant.

    Whether a bundle may set the variable is the recipe's to say.
    """
    for index, one in enumerate(inputs):
        path = f"input[{index}]"
        if not _NAME.fullmatch(one.name):
            yield f"{path}.name", f"{one.name!r} is not lower-case letters, digits and hyphens"
        if one.name in [other.name for other in inputs[:index]]:
            yield f"{path}.name", f"{one.name!r} is listed twice"
        if one.variable in [other.variable for other in inputs[:index]]:
            yield f"{path}.variable", f"{one.variable!r} is of another input, too"
        if one.files and one.kind == "file":
            yield f"{path}.files", "is only meant for a folder"
        for number, pattern in enumerate(one.files):
            try:
                compile_glob(pattern)
            except RecipeError as fault:
                yield f"{path}.files[{number}]", fault.what

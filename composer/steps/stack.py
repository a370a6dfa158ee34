"""What the stack of a bundle reads: the flags of its programs and the variables of its distributions.

The bundle is packed or unpacked, and nothing of it is run. Only the layers that a question concerns are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from composer._fs import host_errors
from composer.errors import VerifyError
from composer.formats.server_flags import Flag, quoted_names, read_flags, read_variables
from composer.model.layer import Entry
from composer.model.manifest import Manifest
from composer.proofs.launch import Readers, current_name
from composer.runtime.serve.quantization import MODULE, known_methods
from composer.steps.bundle import open_bundle
from composer.steps.tree import manifest_of

_CHUNK: Final = 4 << 20
#: No name of a variable is longer; so much of a chunk is looked at again with the next one.
_OVERLAP: Final = 256
_LETTERS: Final = frozenset(bytes([one]) for one in b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")
#: sglang/srt/environ.py of 0.5.9 copies every SGL_X to SGLANG_X when it is imported.
_RENAMES: Final = ('startswith("SGL_")', {"SGL_": "SGLANG_"})
_VENDOR: Final = re.compile(r"^nvidia-|-cu\d+$|-python$")


@dataclass(slots=True, kw_only=True)
class Stack:
    """The sources of a program in a bundle, and the bundle's manifest. What was read once is kept."""

    path: Path
    manifest: Manifest
    sources: Mapping[str, str]
    _flags: dict[str, tuple[Flag, ...]] = field(default_factory=dict)
    _quoted: set[str] = field(default_factory=set)

    def flags(self, module: str) -> tuple[Flag, ...]:
        """The flags of `python -m module`. VerifyError where they cannot be read."""
        if module not in self._flags:
            self._flags[module] = read_flags(self.sources.get, module)
        return self._flags[module]

    @property
    def quant_methods(self) -> Sequence[str]:
        """The quantisations that its SGLang knows, sorted; none where its sources were not opened, or do not tell."""
        return sorted(known_methods(self.sources.get(MODULE, "")))

    def readers(self, names: Iterable[str], owners: Mapping[str, str], package: str) -> Readers:
        """Who reads these variables. What belongs to no distribution of the bundle is left open."""
        environ = self.sources.get(f"{package}.srt.environ", "")
        renamed = _RENAMES[1] if _RENAMES[0] in environ else {}
        declared = {one.name: one for one in read_variables(environ, f"{package}.srt.environ")}
        if not self._quoted:
            self._quoted = {name for text in self.sources.values() for name in quoted_names(text.encode())}
        quoted = self._quoted | declared.keys()
        asked = {current_name(name, renamed): self._owner(name, owners) for name in names}
        elsewhere = {name: owner for name, owner in asked.items() if owner and name not in quoted}
        found = self._search({name: owner for name, owner in elsewhere.items() if owner != package})
        return Readers(
            declared=declared, read=frozenset(found | (quoted & asked.keys())), renamed=renamed,
            unread=frozenset(elsewhere.keys() - found), names=frozenset(quoted),
        )  # fmt: skip

    def _owner(self, name: str, owners: Mapping[str, str]) -> str | None:
        """The layer whose distribution a variable's first word names."""
        word = name.partition("_")[0]
        if word in owners:
            return owners[word]
        return next((one.name for one in self.manifest.layers if _VENDOR.sub("", one.name) == word.lower()), None)

    def _search(self, wanted: Mapping[str, str]) -> set[str]:
        """The names that the code of their own layer holds."""
        found: set[str] = set()
        for layer in sorted(set(wanted.values())):
            left = {name for name, owner in wanted.items() if owner == layer}
            for path, content in _files(self.path, self.manifest, layer, _is_code):
                here = _held(content, left, quoted=path.endswith(".py"))
                found |= here
                left -= here
                if not left:
                    break
        return found


def open_stack(path: Path, package: str | None) -> Stack:
    """The stack of a bundle file, or of the folder that one was unpacked into, with the sources of a package, if any.

    Raises VerifyError for what is no bundle, or has no such package; HostError for what cannot be read.
    """
    manifest = manifest_of(path) if path.is_dir() else open_bundle(path).manifest
    if package is None:
        return Stack(path=path, manifest=manifest, sources={})
    if package not in {one.name for one in manifest.layers}:
        raise VerifyError(f"holds no {package}", where=str(path), fix=f"Give a bundle that serves {package}.")
    site = f"lib/python{manifest.target['python']}/site-packages/"
    sources = {
        _module(name.removeprefix(site)): content.read().decode("utf-8", "replace")
        for name, content in _files(path, manifest, package, lambda entry: entry.path.endswith(".py"))
    }
    return Stack(path=path, manifest=manifest, sources=sources)


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _files(path: Path, manifest: Manifest, layer: str,
           chosen: Callable[[Entry], bool]) -> Iterator[tuple[str, IO[bytes]]]:  # fmt: skip
    """(path, content) of the chosen files of a layer; of an unpacked one the smallest first."""
    index = next(index for index, one in enumerate(manifest.layers) if one.name == layer)
    if path.is_dir():
        entries = sorted(filter(chosen, manifest.layers[index].entries), key=lambda entry: entry.size)
        yield from _opened(path, [entry.path for entry in entries if not entry.target])
        return
    for entry, content in open_bundle(path).entries(index):
        if content is not None and chosen(entry):
            yield entry.path, content


def _opened(prefix: Path, names: Sequence[str]) -> Iterator[tuple[str, IO[bytes]]]:
    for name in names:
        with ExitStack() as stack, host_errors(prefix / name):
            yield name, stack.enter_context((prefix / name).open("rb"))


def _is_code(entry: Entry) -> bool:
    return entry.path.endswith(".py") or ".so" in entry.path.rpartition("/")[2]


def _held(content: IO[bytes], names: Iterable[str], *, quoted: bool) -> set[str]:
    """The names that stand in a file: in quotes in a source, and as whole words in an object."""
    left, found, rest = set(names), set(), b""
    while left and (chunk := content.read(_CHUNK)):
        data = rest + chunk
        here = {name for name in left if _is_in(name.encode(), data, quoted=quoted)}
        found |= here
        left -= here
        rest = data[-_OVERLAP:]
    return found


def _is_in(name: bytes, data: bytes, *, quoted: bool) -> bool:
    if quoted:
        return b'"%b"' % name in data or b"'%b'" % name in data
    at = data.find(name)
    while at >= 0:
        end = at + len(name)
        if data[max(at - 1, 0) : at] not in _LETTERS and data[end : end + 1] not in _LETTERS:
            return True
        at = data.find(name, end)
    return False

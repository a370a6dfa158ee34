"""The ELF objects in a library, a wheel, a bundle or a folder. One at a time is in memory."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from composer._fs import host_errors
from composer.errors import ElfError, HostError, VerifyError
from composer.formats.cubin import Cubin, read_cubin
from composer.formats.elf import is_elf
from composer.formats.wheel import read_wheel
from composer.formats.zip import Member, stream
from composer.steps.bundle import Bundle, open_bundle
from composer.steps.survey import mapped

_HEAD = 64
_CHUNK = 1 << 20
_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"

#: Path, size, and the whole content or, of a loose cubin, its architecture.
Objects = Iterator[tuple[str, int, mmap.mmap | Cubin]]


def objects(path: Path) -> Objects:
    """Every object below `path`, in order. A content is valid until the next is asked for.

    Raises HostError for what cannot be read, WheelError and VerifyError for an unsound wheel or bundle.
    """
    if path.is_dir():
        return _in_folder(path)
    if path.suffix == ".whl":
        return _in_wheel(path)
    head = _head(path)
    if is_elf(head):
        return _in_file(path, path.name)
    if not head.startswith(_ZSTD_FRAME):
        raise VerifyError("neither a shared object, a wheel, a bundle nor a folder", where=str(path))
    return _in_bundle(open_bundle(path))


def _head(path: Path) -> bytes:
    """The first bytes of a file; none of what is no regular file, as reading it might never end."""
    with host_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with path.open("rb") as handle:
            return handle.read(_HEAD)


def _in_file(path: Path, name: str) -> Objects:
    with mapped(path) as view:
        size = len(view)
        yield name, size, _loose(view[:_HEAD], name) or view


def _in_folder(folder: Path) -> Objects:
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if not path.is_symlink() and len(head := _head(path)) == _HEAD and is_elf(head):
                yield from _in_file(path, path.relative_to(folder).as_posix())


def _refuse(fault: OSError) -> None:
    raise HostError(fault.strerror or "cannot be read", where=fault.filename) from fault


def _in_wheel(path: Path) -> Objects:
    with mapped(path) as view:
        for member in read_wheel(view, path.name).members.values():
            if member.size >= _HEAD:
                yield from _in_member(view, member, path.name)


def _in_member(view: mmap.mmap, member: Member, wheel: str) -> Objects:
    where = f"{wheel}: {member.path}"
    head = bytes(next(stream(view, member, _HEAD, where=where)))
    if not is_elf(head):
        return
    cubin = _loose(head, where)
    if cubin:
        yield member.path, member.size, cubin
        return
    with _room(member.size, where) as whole:
        for piece in stream(view, member, _CHUNK, where=where):
            whole.write(piece)
        yield member.path, member.size, whole


def _in_bundle(bundle: Bundle) -> Objects:
    for index, layer in enumerate(bundle.manifest.layers):
        if not any(entry.size >= _HEAD and _may_be_object(entry.path) for entry in layer.entries):
            continue
        for entry, content in bundle.entries(index):
            if content is not None and entry.size >= _HEAD and _may_be_object(entry.path):
                yield from _in_stream(content, entry.path, entry.size)


def _may_be_object(path: str) -> bool:
    name = path.rpartition("/")[2]
    return ".so" in name or name.endswith(".cubin")


def _in_stream(content: IO[bytes], path: str, size: int) -> Objects:
    head = content.read(_HEAD)
    if not is_elf(head):
        return
    cubin = _loose(head, path)
    if cubin:
        yield path, size, cubin
        return
    with _room(size, path) as whole:
        whole.write(head)
        while chunk := content.read(_CHUNK):
            whole.write(chunk)
        yield path, size, whole


def _room(size: int, where: str) -> mmap.mmap:
    try:
        return mmap.mmap(-1, size)
    except (OSError, OverflowError) as fault:
        raise HostError(f"no memory for {size} bytes", where=where, why=str(fault)) from fault


def _loose(head: bytes, where: str) -> Cubin | None:
    try:
        return read_cubin(head, where)
    except ElfError:
        return None  # too short for any object, which reading it will tell

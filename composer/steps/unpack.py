"""Unpack a bundle, its frames in parallel, every byte checked before the result becomes visible.

A frame is at most 64 MiB of a layer's tar stream, so several threads write one large file. What is checked: the sha256
of all compressed bytes, which the manifest holds; in each frame a checksum of the plain ones; and every tar header.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

from composer._fs import host_errors
from composer.errors import HostError, VerifyError
from composer.events import Event, Listener
from composer.formats import tar
from composer.formats.segment import Member, is_header
from composer.model.layer import Entry
from composer.model.manifest import FINGERPRINT_PATH, MANIFEST_PATH
from composer.proofs.floors import FLOORS_PATH, render_floors
from composer.steps.bundle import Bundle
from composer.steps.frames import Frame, Plain, check_span, frames_of, spans_of
from composer.steps.host import require_host
from composer.steps.staging import put_in_place, staging_folder

_FIX = "Do not unpack this bundle."
_CHUNK = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def unpack(bundle: Bundle, prefix: Path, *, jobs: int, listener: Listener, any_host: bool = False,
           durable: bool = False) -> bool:  # fmt: skip
    """Make `prefix` the unpacked bundle, whole or not at all; False when it was that already.

    It must not exist, be an empty folder, or be this very bundle.

    any_host: though this host is older than the bundle needs, which otherwise is a HostError before anything is made.
    durable: all of it is on the disk before it becomes visible, so that a power cut leaves no half of it either.
    VerifyError for content that is not the manifest's, HostError for a place that cannot be written, is in use or full.
    """
    if not any_host:
        require_host(bundle.manifest)
    with host_errors(prefix):
        if prefix.exists() and (not prefix.is_dir() or any(prefix.iterdir())):
            if is_unpacked(prefix, bundle.manifest.fingerprint):
                return False
            raise HostError("exists and is not empty", where=str(prefix), fix="Choose another folder, or remove it.")
    with staging_folder(prefix) as staging:
        _require_room(bundle, staging)
        unpack_into(bundle, staging, jobs=jobs, listener=listener)
        if durable:
            _sync(staging)
        put_in_place(staging, prefix)
    return True


def is_unpacked(prefix: Path, fingerprint: str) -> bool:
    """Whether `prefix` says that it is the unpacked bundle with this fingerprint; its files are not looked at."""
    try:
        return (prefix / FINGERPRINT_PATH).read_text("utf-8").strip() == fingerprint
    except (OSError, UnicodeDecodeError):
        return False


def _require_room(bundle: Bundle, folder: Path) -> None:
    with host_errors(folder):
        free = shutil.disk_usage(folder).free
    needed = sum(layer.size for layer in bundle.manifest.layers)
    if free < needed:
        raise HostError(f"{needed >> 20} MiB are needed, {free >> 20} MiB are free", where=str(folder.parent),
                        fix="Free some space, or choose another folder.")  # fmt: skip


def _sync(folder: Path) -> None:
    """Wait until the folder's file system is on its disk (syncfs(2), which Python lacks)."""
    with host_errors(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(handle):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
        finally:
            os.close(handle)


def unpack_into(bundle: Bundle, folder: Path, *, jobs: int, listener: Listener) -> None:
    """Write every file of the bundle into an existing empty folder that nobody else writes to."""
    with host_errors(bundle.path), bundle.path.open("rb") as stream, host_errors(folder):
        writer = _Writer(bundle, folder, stream.fileno(), listener)
        writer.make_folders()
        _run(writer.tasks(), jobs)
        writer.make_links()
        _write_own(bundle, folder)
    listener(Event(step="unpack", subject=bundle.path.name, finished=True))


def _run(tasks: Iterator[Callable[[], None]], jobs: int) -> None:
    """Run all tasks; after the first that fails, or ^C, no more are begun."""
    pool = ThreadPoolExecutor(jobs)
    try:
        for done in wait([pool.submit(task) for task in tasks], return_when=FIRST_EXCEPTION).done:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_own(bundle: Bundle, folder: Path) -> None:
    """What the manifest does not list: itself, and what programs read without parsing it."""
    manifest = bundle.manifest
    for path, data in (
        (MANIFEST_PATH, bundle.manifest_json), (FINGERPRINT_PATH, manifest.fingerprint.encode()),
        (FLOORS_PATH, render_floors(manifest.name, manifest.floors)),
    ):  # fmt: skip
        place = folder / path
        place.write_bytes(data)
        place.chmod(0o644)


class _Writer:
    """Writes the files of a bundle; its tasks may be run in any order and by any threads."""

    def __init__(self, bundle: Bundle, folder: Path, handle: int, listener: Listener) -> None:
        self._bundle, self._folder, self._handle, self._listener = bundle, folder, handle, listener
        self._entries = _entries(bundle)
        self._frames = sorted(frames_of(bundle), key=lambda frame: frame.rank)
        self._done, self._total = 0, sum(frame.compressed for frame in self._frames)
        self._lock = threading.Lock()
        # Of files that several frames fill: the kernel would let their writers wait for each other in a busy loop.
        self._locks: dict[str, threading.Lock] = {}

    def make_folders(self) -> None:
        """Make every folder, and the files that no frame holds whole."""
        for parent in sorted(_parents([*self._entries, MANIFEST_PATH])):
            (self._folder / parent).mkdir()
            (self._folder / parent).chmod(0o755)  # whatever the umask is, here and below
        for frame in self._frames:
            for member in frame.members:
                if self._is_wanted(member) and member.header >= frame.begin and member.end > frame.end:
                    os.close(self._open(member.entry, _NEW))
                    self._locks[member.entry.path] = threading.Lock()

    def tasks(self) -> Iterator[Callable[[], None]]:
        """Frames of all layers evenly mixed, because threads that write to the same file wait for each other."""
        for span in spans_of(self._bundle):
            yield functools.partial(check_span, self._handle, span, self._bundle.path.name)
        for frame in self._frames:
            yield functools.partial(self._write_frame, frame)

    def make_links(self) -> None:
        """Make the links; last, so that no file is ever written through one."""
        for path, entry in self._entries.items():
            if entry.target is not None:
                (self._folder / path).symlink_to(entry.target)

    def _is_wanted(self, member: Member) -> bool:
        """Whether it is a file, and the first of its path: layers may share a path, with equal content."""
        return member.entry.target is None and self._entries[member.entry.path] is member.entry

    def _write_frame(self, frame: Frame) -> None:
        plain = Plain(self._handle, frame, self._bundle.path.name)
        for member in frame.members:
            if member.header >= frame.begin:
                plain.skip_to(member.header)
                if not is_header(bytes(plain.take(tar.BLOCK)), member.entry):
                    where = f"{self._bundle.path.name}: {frame.layer}: {member.entry.path}"
                    raise VerifyError("is not as the manifest lists it", where=where, fix=_FIX)
            if self._is_wanted(member):
                self._write_content(member, frame, plain)
        plain.finish()
        with self._lock:
            self._done += frame.compressed
            self._listener(Event(step="unpack", subject=self._bundle.path.name, done=self._done, total=self._total))

    def _write_content(self, member: Member, frame: Frame, plain: Plain) -> None:
        """Write as much of a file as the frame holds."""
        whole = member.header >= frame.begin and member.end <= frame.end
        begin, end = max(member.start, frame.begin), min(member.end, frame.end)
        if not whole and begin >= end:
            return
        turn = contextlib.nullcontext() if whole else self._locks[member.entry.path]
        handle = self._open(member.entry, _NEW if whole else _OLD)
        try:
            while begin < end:
                taken = plain.take(end - begin)
                while taken:
                    with turn:
                        written = os.pwrite(handle, taken, begin - member.start)
                    taken, begin = taken[written:], begin + written
        finally:
            os.close(handle)

    def _open(self, entry: Entry, flags: int) -> int:
        handle = os.open(f"{self._folder}/{entry.path}", flags, entry.mode)
        if flags & os.O_CREAT and stat.S_IMODE(os.fstat(handle).st_mode) != entry.mode:  # for the umask
            os.fchmod(handle, entry.mode)
        return handle


def _entries(bundle: Bundle) -> dict[str, Entry]:
    """What is to be made, by path; the first where layers share a path.

    VerifyError for what could leave the folder or meet something else there.
    """
    found: dict[str, Entry] = {}
    for layer in bundle.manifest.layers:
        for entry in layer.entries:
            first = found.setdefault(entry.path, entry)
            if fault := _fault(entry, first):
                raise VerifyError(fault, where=f"{bundle.path.name}: {layer.name}: {entry.path!r}", fix=_FIX)
    for path in sorted(_parents(found)):
        if path in found:
            raise VerifyError("is a file or link, and a folder", where=f"{bundle.path.name}: {path!r}", fix=_FIX)
    return found


def _fault(entry: Entry, first: Entry) -> str:
    if not tar.is_inside(entry.path) or any(part in ("", ".", "..") for part in entry.path.split("/")):
        return "is no plain relative path"
    if entry.target is not None and not _leads_inside(entry.path, entry.target):
        return f"link to {entry.target!r} leaves the prefix"
    if entry.mode & ~0o777:
        return f"mode {entry.mode:o} has a set-id or sticky bit"
    if (entry.target, entry.mode, entry.sha256) != (first.target, first.mode, first.sha256):
        return "is in two layers with different content"
    return ""


def _leads_inside(path: str, target: str) -> bool:
    return not target.startswith("/") and tar.is_inside(f"{path}/../{target}", resolve=True)


def _parents(paths: Iterable[str]) -> set[str]:
    """Every folder that these paths are in."""
    found = {path.rpartition("/")[0] for path in paths}
    for path in tuple(found):
        while (path := path.rpartition("/")[0]) and path not in found:
            found.add(path)
    return found - {""}


def copy_hashed(content: IO[bytes], sink: Callable[[bytes], object]) -> str:
    """Pass all of `content` to `sink` and return its sha256."""
    digest = hashlib.sha256()
    while chunk := content.read(_CHUNK):
        digest.update(chunk)
        sink(chunk)
    return digest.hexdigest()

"""Make a delta between two bundles, and a bundle from an older one and a delta (`composer.model.delta`).

A delta holds bytes of the new bundle as they are: whatever applies it needs no compressor, and no version of one.
Layers are found again by the digests in the manifests, and changed ones block by block.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING

from composer._direct import CHUNK, read_directly
from composer._fs import atomic_file, host_errors, write_atomic
from composer.errors import HostError, RecipeError, VerifyError
from composer.events import Event, Listener
from composer.formats.zstd_blocks import blocks
from composer.model.delta import (
    FIRST_LINE,
    TRAILER,
    Chunk,
    Delta,
    Part,
    Sealed,
    header_size,
    parse_header,
    parts_of,
    render_header,
    shared,
)
from composer.steps.appender import Appender
from composer.steps.bundle import Bundle, open_bundle
from composer.steps.pack import checksum_path
from composer.steps.survey import mapped

if TYPE_CHECKING:
    from hashlib import _Hash

# Measured: 0.1 s for 1 GB; with 1 MiB the allocator maps and clears new pages each time, and it takes 1.2 s.
_COMPARED = 256 << 10
_NO_OLD = "Give the bundle's file; where it is gone, copy the whole new bundle instead."


def apply_script() -> str:
    """A POSIX shell script that applies deltas, for hosts without `compose`: OLD DELTA NEW are its arguments."""
    return (resources.files("composer") / "steps" / "apply.sh").read_text(encoding="ascii")


def make_delta(old: Path, new: Path, output: Path, *, listener: Listener) -> Delta:
    """Write what makes the bundle `new` out of the bundle `old`; returns the header.

    RecipeError for a folder in place of a bundle's file, and for an `output` that is one of them; VerifyError for what
    is no whole bundle; HostError for what cannot be read or written.
    """
    _require_apart(output, (old, new))
    sources = [open_bundle(_file(path)) for path in (old, new)]
    with mapped(old) as before, mapped(new) as after:
        parts = _parts(sources[0], before, sources[1], after)
        digests = _digests((before, after), _teller(listener, "delta", output, max(len(before), len(after))))
        end = len(before) - _end_of_layers(sources[0])
        sealed = [
            Sealed(name=source.manifest.name, size=len(view), sha256=digest)
            for source, view, digest in zip(sources, (before, after), digests, strict=True)
        ]
        delta = Delta(old=sealed[0], end=(end, hashlib.sha256(before[-end:]).hexdigest()), new=sealed[1], parts=parts)
    _write(delta, new, output, listener)
    listener(Event(step="delta", subject=output.name, finished=True))
    return delta


def _require_apart(output: Path, sources: Sequence[Path]) -> None:
    with host_errors(output):
        if any(output.exists() and path.exists() and output.samefile(path) for path in sources):
            raise RecipeError("would be overwritten while it is read", where=str(output), fix="Choose another output.")


def _file(path: Path) -> Path:
    """The path of a bundle's file. RecipeError for a folder, HostError for nothing."""
    if path.is_dir():
        raise RecipeError(
            "is a folder; a delta is made and applied between the files of bundles", where=str(path), fix=_NO_OLD,
            why="the compressed bytes of a bundle cannot be made again from the files that were unpacked from it",
        )  # fmt: skip
    if not path.exists():
        raise HostError("No such file or directory", where=str(path), fix=_NO_OLD)
    return path


# --- finding what is shared -------------------------------------------------------------------------------------------


def _parts(old: Bundle, before: mmap.mmap, new: Bundle, after: mmap.mmap) -> list[Part]:
    olds, news = _ranges(old, len(before)), _ranges(new, len(after))
    # What manifests say is no more than a hint where to look.
    same = [pair for pair in shared(olds, news) if _is_equal(before, pair[0], after, pair[1])]
    used = {old for old, _ in same}, {new for _, new in same}
    rest = shared(
        _blocks(before, [one for one in olds if one not in used[0]]),
        _blocks(after, [one for one in news if one not in used[1]]),
    )
    return parts_of([*same, *rest], len(after))


def _ranges(bundle: Bundle, size: int) -> list[Chunk]:
    """The parts of all layers by the manifest's digests, and what follows them, which has none."""
    found, at = [], 0
    for part in (part for layer in bundle.manifest.layers for part in layer.parts):
        found.append(Chunk(at, part.compressed, part.digest))
        at += part.compressed
    return [*found, Chunk(at, size - at, "")]


def _end_of_layers(bundle: Bundle) -> int:
    return sum(layer.compressed for layer in bundle.manifest.layers)


def _is_equal(before: mmap.mmap, old: Chunk, after: mmap.mmap, new: Chunk) -> bool:
    return old.size == new.size and all(
        before[old.offset + at : min(old.offset + at + _COMPARED, old.end)]
        == after[new.offset + at : min(new.offset + at + _COMPARED, new.end)]
        for at in range(0, new.size, _COMPARED)
    )


def _blocks(view: mmap.mmap, ranges: Sequence[Chunk]) -> Iterator[Chunk]:
    for one in ranges:
        begin = one.offset
        for end in blocks(view, one.offset, one.end):
            yield Chunk(begin, end - begin, hashlib.sha256(view[begin:end]).hexdigest())
            begin = end


def _digests(views: Sequence[mmap.mmap], progress: Callable[[int], None]) -> list[str]:
    """The sha256 of each, side by side."""
    found, longest = [hashlib.sha256() for _ in views], max(map(len, views))
    with contextlib.ExitStack() as stack:
        contents = [stack.enter_context(memoryview(view)) for view in views]
        pool = stack.enter_context(ThreadPoolExecutor(len(views)))
        for at in range(0, longest, CHUNK):
            pieces = [content[at : at + CHUNK] for content in contents]
            wait([pool.submit(one.update, piece) for one, piece in zip(found, pieces, strict=True)])
            progress(min(at + CHUNK, longest))
    return [one.hexdigest() for one in found]


def _write(delta: Delta, new: Path, output: Path, listener: Listener) -> None:
    header, digest, at = render_header(delta), hashlib.sha256(), 0
    total = len(header) + delta.stored + TRAILER
    with atomic_file(output) as out, Appender(out, _teller(listener, "store", output, total)) as appender:
        appender.append(iter([memoryview(header)]), [digest])
        for part in delta.parts:
            if part.offset is None:
                appender.append(read_directly(new, at, part.size), [digest])
            at += part.size
        appender.append(iter([memoryview(_trailer(digest))]))
        appender.finish()


def _trailer(digest: _Hash) -> bytes:
    return f"{digest.hexdigest()}\n".encode()


# --- applying ---------------------------------------------------------------------------------------------------------


def apply_delta(old: Path, delta: Path, output: Path, *, listener: Listener) -> Sealed:
    """Make the bundle that a delta is for, with its checksum file, whole or not at all; returns what it is.

    `output` may be `old` itself, which it then replaces.

    RecipeError for a folder in place of a bundle's file; VerifyError for another bundle than the delta starts from, and
    for a damaged one or a damaged delta; HostError for what cannot be read or written.
    """
    _require_apart(output, (delta,))
    header, start, trailer = _read_header(delta)
    _require_old(_file(old), header)
    with atomic_file(output) as out:
        _require_room(out, header.new.size, output)
        with Appender(out, _teller(listener, "apply", output, header.new.size)) as appender:
            made, read = _join(old, delta, header, start, appender)
        if (made, read) != (header.new.sha256, trailer):
            raise _blame(old, delta, header, is_delta_whole=read == trailer)
        open_bundle(Path(out.name))
        # As `pack` does: an older bundle's must not stay beside this one.
        checksum_path(output).unlink(missing_ok=True)
    write_atomic(checksum_path(output), f"{header.new.sha256}  {output.name}\n".encode())
    listener(Event(step="apply", subject=output.name, finished=True))
    return header.new


def _read_header(path: Path) -> tuple[Delta, bytes, str]:
    """The header, its bytes, and the digest at the end of the file."""
    with host_errors(path), path.open("rb") as stream:
        size = header_size(stream.read(FIRST_LINE), str(path))
        stream.seek(0)
        data = stream.read(size)
        header = parse_header(data, stream.seek(0, os.SEEK_END), str(path))
        stream.seek(-TRAILER, os.SEEK_END)
        return header, data, stream.read().decode("ascii", "replace").removesuffix("\n")


def _require_old(path: Path, header: Delta) -> None:
    size, digest = header.end
    with host_errors(path), path.open("rb") as stream:
        found = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, found - size))
        if found == header.old.size and hashlib.sha256(stream.read()).hexdigest() == digest:
            return
    raise VerifyError("is not the bundle that the delta starts from", where=str(path),
                      why=f"that is {header.old.name}, {header.old.size} bytes, sha256 {header.old.sha256}",
                      fix="Give that bundle, or make a delta from this one.")  # fmt: skip


def _require_room(out: IO[bytes], size: int, output: Path) -> None:
    disk = os.fstatvfs(out.fileno())
    free = disk.f_bavail * disk.f_frsize
    if free < size:
        raise HostError("not enough space for the new bundle", where=str(output.parent),
                        why=f"{free / 1e9:.2f} GB are free, {size / 1e9:.2f} GB are needed",
                        fix="Free some space, or choose another folder.")  # fmt: skip


def _join(old: Path, delta: Path, header: Delta, start: bytes, appender: Appender) -> tuple[str, str]:
    """Append all parts; returns the digests of what was made, and of what was read of the delta."""
    made, read, at = hashlib.sha256(), hashlib.sha256(start), len(start)
    for part in header.parts:
        if part.offset is None:
            appender.append(read_directly(delta, at, part.size), [made, read])
            at += part.size
        else:
            appender.append(read_directly(old, part.offset, part.size), [made])
    appender.finish()
    return made.hexdigest(), read.hexdigest()


def _blame(old: Path, delta: Path, header: Delta, *, is_delta_whole: bool) -> VerifyError:
    """Whose fault it is that something else came out. OLD is read whole only to answer that."""
    if not is_delta_whole:
        return VerifyError("is damaged", where=str(delta), why="its bytes do not have the sha256 at its end",
                           fix="Copy the delta again.")  # fmt: skip
    with host_errors(old), old.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != header.old.sha256:
        return VerifyError("is damaged", where=str(old), why=f"its sha256 is {found}, not {header.old.sha256}",
                           fix="Copy that bundle again, or the whole new one.")  # fmt: skip
    return VerifyError("does not make the bundle that it names", where=str(delta), fix="Make the delta again.")


def _teller(listener: Listener, step: str, output: Path, total: int) -> Callable[[int], None]:
    return lambda done: listener(Event(step=step, subject=output.name, done=done, total=total))

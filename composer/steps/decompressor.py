"""`unzstd`: a static program that decompresses bundles on hosts whose tar finds no zstd program to run.

It is made from zstd's own sources and the few lines of composer/native/unzstd, with the C compiler that recipes use for
their native modules, against the musl of that compiler: nothing of the build machine reaches its bytes, and it needs
nothing of the host. All inputs are pinned in composer/native/unzstd/pins.toml.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from composer._fs import host_errors, write_atomic
from composer._proc import clean_environ, run
from composer.errors import BuildError, ComposerError, HostError, RecipeError
from composer.events import Event, Listener, silent
from composer.model.lock import LockedPackage
from composer.steps.fetch import FetchEvent, fetch
from composer.steps.native import tar_member, unpack_zig
from composer.steps.pack import checksum_path
from composer.store import Store, key_of

#: The compiler's name of each machine that a program can be made for.
TRIPLES: Mapping[str, str] = {"x86_64": "x86_64-linux-musl", "aarch64": "aarch64-linux-musl"}

_SOURCES = Path(__file__).resolve().parents[1] / "native" / "unzstd"
_VERSION = 1
# No machine's own instructions (zstd looks for BMI2 when it runs), nothing that is not called (the compressor is in the
# same file), no debug information and no build id, which would hold paths.
_FLAGS = ("-std=c23", "-Wall", "-Wextra", "-Werror", "-mcpu=baseline", "-O3", "-g0", "-s", "-static",
          "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-Wl,--build-id=none")  # fmt: skip
# Seconds. It takes 70 of one core, most of them for the compiler's musl.
_TIMEOUT = 1200.0
_ZSTD_FILES = ("zstd.c", "zstd.h", "zstd_errors.h")
_MUSL_LICENCE, _ZIG_LICENCE = "lib/libc/musl/COPYRIGHT", "LICENSE"


class _Pins(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sources of zstd, and the compiler's wheel by the machine that it runs on."""

    zstd: LockedPackage
    compiler: Mapping[str, LockedPackage]


def decompressor_sources() -> list[LockedPackage]:
    """What making the program on this machine takes, as something to fetch. HostError if no compiler runs here."""
    pins = _pins()
    return [pins.zstd, _compiler(pins)]


def make_decompressor(machine: str, store: Store, *, offline: bool = False, wheelhouses: Sequence[Path] = (),
                      listener: Listener = silent) -> Path:  # fmt: skip
    """The program for `machine`, one of `TRIPLES`: from the store, or compiled now: each time to the same bytes.

    offline: ask no index. wheelhouses: folders to take sources from first. Raises RecipeError for another machine,
    FetchError for sources that cannot be had, BuildError with the compiler's messages, HostError if a file cannot be
    written or no compiler runs on this machine.
    """
    if machine not in TRIPLES:
        raise RecipeError(f"no unzstd for {machine!r}", where="--machine", fix=f"One of: {', '.join(TRIPLES)}.")
    key = _key(machine)
    path = store.path("native", key, ".bin")
    if path.is_file():
        return path
    fetched = fetch(
        decompressor_sources(), into=store.root, wheelhouse=wheelhouses, offline=offline,
        progress=functools.partial(_tell, listener),
    )  # fmt: skip
    zstd, compiler = (fetched.paths[one.artifacts[0].sha256] for one in decompressor_sources())
    subject = f"unzstd for {machine}"
    with store.lock(f"native-{key}"):
        if not path.is_file():
            listener(Event(step="source", subject=subject))
            with store.scratch() as work:
                _make(zstd, compiler, TRIPLES[machine], work, path)
            listener(Event(step="source", subject=subject, finished=True))
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacker:
    """The program beside bundles, or why it is not there."""

    path: Path
    lacking: str = ""


def offer_decompressor(machine: str, folder: Path, store: Store, *, offline: bool = False,
                       wheelhouses: Sequence[Path] = (), listener: Listener = silent) -> Unpacker:  # fmt: skip
    """Put `unzstd-MACHINE` and its .sha256 into a folder of bundles; one that is there and the same stays as it is.

    Bundles are whole without it, so what keeps it from being made is told and not raised.
    """
    path = folder / f"unzstd-{machine}"
    try:
        made = make_decompressor(machine, store, offline=offline, wheelhouses=wheelhouses, listener=listener)
        with host_errors(path):
            data = made.read_bytes()
            _keep(path, data, 0o755)
            _keep(checksum_path(path), f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode(), 0o644)
    except ComposerError as fault:
        return Unpacker(path=path, lacking=str(fault).partition("\n")[0])
    return Unpacker(path=path)


def _keep(path: Path, data: bytes, mode: int) -> None:
    """Write a file, unless it is there with this content and mode."""
    if not (path.is_file() and path.read_bytes() == data and path.stat().st_mode & 0o777 == mode):
        write_atomic(path, data, mode=mode)


def _pins() -> _Pins:
    path = _SOURCES / "pins.toml"
    with host_errors(path):
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), _Pins)


def _compiler(pins: _Pins) -> LockedPackage:
    here = platform.machine()
    if here not in pins.compiler:
        raise HostError("no compiler is pinned for this machine", where=here,
                        fix=f"Make unzstd on one of: {', '.join(pins.compiler)}.")  # fmt: skip
    return pins.compiler[here]


def _key(machine: str) -> str:
    """The store's key of the program. The compiler counts by its version: what it runs on does not reach the bytes."""
    pins = _pins()
    ours = {name: hashlib.sha256(data).hexdigest() for name, data in _own_files()}
    return key_of("unzstd", _VERSION, files=ours, zstd=pins.zstd.artifacts[0].sha256, zig=_compiler(pins).version,
                  triple=TRIPLES[machine], flags=_FLAGS)  # fmt: skip


def _own_files() -> Iterator[tuple[str, bytes]]:
    with host_errors(_SOURCES):
        yield from ((path.name, path.read_bytes()) for path in sorted(_SOURCES.glob("*.c")))


def _tell(listener: Listener, event: FetchEvent) -> None:
    listener(Event(step="fetch", subject=event.filename, done=event.done, total=event.size,
                   finished=event.state in ("present", "done")))  # fmt: skip


def _make(zstd: Path, compiler: Path, triple: str, work: Path, out: Path) -> None:
    """Compile into `work` and put the program at `out`, whole or not at all."""
    zig, source, result = unpack_zig(compiler, work, "musl"), work / "source", work / "unzstd"
    with host_errors(work):
        source.mkdir()
        for name, data in _sources(zstd, zig):
            (source / name).write_bytes(data)
        # Names relative to the working folder keep the folder's own path out of messages and symbols.
        run(
            [zig / "zig", "cc", "-target", triple, *_FLAGS, "-o", result,
             *(path.name for path in sorted(source.glob("*.c")))],
            env=clean_environ(ZIG_GLOBAL_CACHE_DIR=str(work / "cache"), ZIG_LOCAL_CACHE_DIR=str(work / "cache")),
            cwd=source, timeout=_TIMEOUT, error=BuildError,
        )  # fmt: skip
        write_atomic(out, result.read_bytes(), mode=0o755)


def _sources(zstd: Path, zig: Path) -> Iterator[tuple[str, bytes]]:
    """All files of the program in one flat folder. The licences are in it, because it prints them."""
    yield from _own_files()
    with host_errors(zstd):
        tarball = zstd.read_bytes()
    for name in _ZSTD_FILES:
        yield name, tar_member(tarball, f"zstd/{name}")
    yield "LICENSE.zstd", tar_member(tarball, "zstd/LICENSE")
    yield "COPYRIGHT.musl", (zig / _MUSL_LICENCE).read_bytes()
    yield "LICENSE.zig", (zig / _ZIG_LICENCE).read_bytes()

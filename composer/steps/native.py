"""Compile C sources for the target, on any machine, to the same bytes.

The compiler is `zig cc` from the PyPI wheel `ziglang`: a clang, a linker and the symbol lists of every glibc in one
folder, so that the build machine needs no compiler, and neither its libc nor its headers reach the result. Measured
with ziglang 0.15.2: the bytes do not depend on the folder, the cache or the machine's CPU.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from composer._fs import host_errors, write_atomic
from composer._proc import clean_environ, run
from composer.errors import BuildError
from composer.formats.wheel import read_wheel
from composer.formats.zip import read
from composer.steps.survey import mapped
from composer.store import key_of

# glibc 2.17 is the oldest that any wheel of the stack asks for (manylinux2014).
TRIPLES = {"x86_64": "x86_64-linux-gnu.2.17", "aarch64": "aarch64-linux-gnu.2.17"}

_NATIVE = Path(__file__).parent.parent / "native"
# `-mcpu=baseline` and not the build machine's; no debug information and no build id, which would hold paths.
_FLAGS = ("-mcpu=baseline", "-O2", "-fPIC", "-shared", "-g0", "-s", "-Wl,--build-id=none")
_TIMEOUT = 300.0
#: What a C library is called in the names of its targets.
_ABIS = {"glibc": "gnu", "musl": "musl"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLibrary:
    """One shared object to be: its source files by name, in one flat folder, and what to tell the compiler besides."""

    files: Mapping[str, bytes]
    flags: tuple[str, ...]
    libraries: tuple[str, ...] = ()

    @property
    def units(self) -> list[str]:
        """The files to compile; the others are included."""
        return sorted(name for name in self.files if name.endswith(".c"))


def own_library(source: Path) -> NativeLibrary:
    """The library that a folder of C files below composer/native is: ours, so held to every warning.

    `triton_launch` is Triton's driver utilities and one launcher for every kernel; with patches/triton it goes to
    `triton/backends/nvidia/_composer_launch.abi3.so` and serves any CPython from 3.10 on. HostError if unreadable.
    """
    with host_errors(source):
        files = {path.name: path.read_bytes() for path in sorted(source.glob("*.[ch]"))}
    if not files:
        raise BuildError("no C sources here", where=str(source))
    return NativeLibrary(
        files=files,
        flags=("-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
        libraries=("-lm", "-ldl"),
    )


_NUMACTL_UNITS = ("affinity.c", "distance.c", "libnuma.c", "rtnetlink.c", "syscall.c", "sysfs.c")
_NUMACTL_HEADERS = (
    "affinity.h",
    "numa.h",
    "numacompat1.h",
    "numaif.h",
    "numaint.h",
    "rtnetlink.h",
    "sysfs.h",
    "util.h",
)


def libnuma(tarball: bytes) -> NativeLibrary:
    """`libnuma.so.1` (LGPL-2.1) from the source release of numactl 2.0.16, given as a .tar.gz.

    Its symbols and their versions are those of Debian's build, whose glibc floor is 2.33; this one's is 2.14. Raises
    BuildError if `tarball` is another thing.
    """
    wanted = (*_NUMACTL_UNITS, *_NUMACTL_HEADERS, "versions.ldscript")
    config = (_NATIVE / "numactl" / "config.h").read_bytes()
    return NativeLibrary(
        files={"config.h": config, **{name: tar_member(tarball, name) for name in wanted}},
        flags=("-w", "-Wl,-soname,libnuma.so.1", "-Wl,--version-script,versions.ldscript"),
    )


def tar_member(tarball: bytes, name: str) -> bytes:
    """The file `name` of a source release's single top folder; BuildError if there is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
            for entry in archive:
                if entry.isfile() and entry.name.partition("/")[2] == name and (stream := archive.extractfile(entry)):
                    return stream.read()
    except (tarfile.TarError, OSError, EOFError) as fault:
        raise BuildError("not a source archive", where=name, why=str(fault)) from fault
    raise BuildError("not in the source archive", where=name)


def unpack_zig(wheel: Path, folder: Path, libc: Literal["glibc", "musl"]) -> Path:
    """The compiler's folder out of its wheel, with what it makes C programs for Linux from, and no other C library.

    WheelError for a wheel that breaks its specification, HostError if a file cannot be written.
    """
    foreign = re.compile(
        r"ziglang/(?:doc|lib/docs|lib/libcxx|lib/libcxxabi|lib/libtsan|lib/libunwind)/"
        rf"|ziglang/lib/libc/(?!{libc}/|include/(?:generic-{libc}|[a-z0-9_]+-linux-(?:any|{_ABIS[libc]}))/)[^/]+/"
    )
    with mapped(wheel) as view, host_errors(folder):
        for member in read_wheel(view, wheel.name).members.values():
            if foreign.match(member.path):
                continue
            path = folder / member.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read(view, member))
            path.chmod(member.mode)
    return folder / "ziglang"


def library_key(library: NativeLibrary, *, zig_version: str, triple: str) -> str:
    """The store's key of a build: the sources' names and bytes, the compiler, the target and the flags."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(library.files.items())}
    flags = [*_FLAGS, *library.flags, *library.libraries]
    return key_of("native", 1, files=digests, zig=zig_version, triple=triple, flags=flags)


def build_library(library: NativeLibrary, *, zig: Path, triple: str, out: Path) -> None:
    """Compile `library` to the shared object `out`, which appears whole or not at all.

    `zig` is the unpacked `ziglang` folder of the wheel, beside which the compiler keeps what it makes of glibc for a
    further library; `triple` is one of the values of `TRIPLES`. Raises BuildError with the compiler's messages,
    HostError if a file cannot be written.
    """
    cache = zig.resolve().parent / "zig-cache"
    with host_errors(out), tempfile.TemporaryDirectory(prefix="compose-native-") as scratch:
        source, result = Path(scratch, "source"), Path(scratch, "result.so")
        source.mkdir()
        for name, data in library.files.items():
            (source / name).write_bytes(data)
        # Names relative to the working folder keep the folder's own path out of messages and symbols.
        run(
            [_compiler(zig), "cc", "-target", triple, *_FLAGS, *library.flags, "-o", result,
             *library.units, *library.libraries],
            env=clean_environ(ZIG_GLOBAL_CACHE_DIR=str(cache), ZIG_LOCAL_CACHE_DIR=str(cache)),
            cwd=source, timeout=_TIMEOUT, error=BuildError,
        )  # fmt: skip
        data = result.read_bytes()
    write_atomic(out, data, mode=0o755)


def _compiler(zig: Path) -> Path:
    program = zig.resolve() / "zig"
    if not program.is_file():
        raise BuildError("no zig compiler here", where=str(zig), fix="Fetch the wheel `ziglang` of the lock file.")
    if not os.access(program, os.X_OK):  # unpacked without its mode
        program.chmod(0o755)
    return program

"""GPU code for tests: fat binaries made here, and real shared objects around them by real linkers.

Payloads are not code: nobody reads them. An object can be loaded, and its function `container(i)` gives the address
that the i-th wrapper holds, `item(i)` and `item_end(i)` those that delimit the i-th item of `.cask_resource`.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_KINDS = {"ptx": 1, "elf": 2, "lto": 8, "other": 64}
_VARIANTS = {"": 0, "a": 0x100000, "f": 0x200000}
_COMPRESSIONS = {"none": 0, "lz4": 0x2000, "zstd": 0x8000}


def image(kind: str = "elf", sm: int = 90, variant: str = "", *, payload: bytes = b"", compression: str = "none",
          header: int = 64) -> bytes:  # fmt: skip
    """One entry. The payload defaults to 93 bytes that tell kind, SM and variant, and is padded to whole words."""
    payload = payload or f"{kind}_{sm}{variant}.".encode().ljust(93, b"\xcd")
    packed = len(payload) if compression != "none" else 0
    flags = 0x11 | _VARIANTS[variant] | _COMPRESSIONS[compression]
    payload += bytes(-len(payload) % 8)
    plain = len(payload) * 4 if packed else 0
    fields = (_KINDS[kind], 0x0101, header, len(payload), packed, 0, 7, 1, sm, 0, 0, flags, 0, plain)
    return struct.pack("<HHIQIIHHIIIQQQ", *fields).ljust(header, b"\0") + payload


def container(*images: bytes) -> bytes:
    """A fat binary of these entries."""
    body = b"".join(images)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def images(*names: str) -> bytes:
    """A container of `ptx80`, `elf90a`, ... in this order."""
    return container(*(image(name[:3], int(name[3:].rstrip("af")), name[3:].lstrip("0123456789")) for name in names))


def cubin(sm: int, variant: str = "", *, size: int = 500) -> bytes:
    """A loose cubin of which only the ELF header is one: in the newer form from SM 100 on, else in the older."""
    abi, flags = (8, sm << 8 | (0xA if variant == "a" else 0x2)) if sm >= 100 else (7, sm | (0x800 if variant else 0))
    head = struct.pack("<4s5B7x2HI3QI12x", b"\x7fELF", 2, 1, 1, 65, abi, 2, 190, 128, 0, 0, 0, flags)
    return head.ljust(size, b"\xcd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an object holds.

    fatbins: containers of `.nv_fatbin`; relinkable: of `__nv_relfatbin`; both with a wrapper each, in this order, those
    at the places `device_linked` with version 2. items: of `.cask_resource`, each gets its tail of 8 zero bytes.
    unwrapped: indices of wrappers to leave out. align: of each container, in bytes: 8, or 256 on AArch64. before: bytes
    of `.rodata` ahead of the GPU code. extra: assembly; `fatbin_N`, `relinkable_N`, `wrapper_N`, `item_N` and
    `before_0` are labels there.
    """

    fatbins: Sequence[bytes] = ()
    relinkable: Sequence[bytes] = ()
    device_linked: Sequence[int] = ()
    items: Sequence[bytes] = ()
    unwrapped: Sequence[int] = ()
    align: int = 8
    before: bytes = b""
    extra: str = ""


def gpu_library(path: Path, parts: Parts, *words: str, machine: str = "x86_64") -> Path:
    """Link a shared object; `words` go to the compiler, such as `-Wl,-z,pack-relative-relocs`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".s")
    source.write_text(_assembly(parts, path))
    compiler = ["gcc"]
    if machine != "x86_64":
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu", "-Wl,--no-gc-sections"]
    functions = path.with_suffix(".c")
    functions.write_text(_FUNCTIONS)
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-O1", "-nostdlib", "-o", path, functions, source, *words],
        check=True, capture_output=True,
    )  # fmt: skip
    return path


def held(path: Path, count: int) -> list[bytes]:
    """Load an object and give the bytes of the container behind each of its first `count` wrappers."""
    library = ctypes.CDLL(str(path))
    library.container.restype = ctypes.c_void_p
    found = []
    for index in range(count):
        address = library.container(index)
        size = struct.unpack_from("<Q", ctypes.string_at(address, 16), 8)[0]
        found.append(ctypes.string_at(address, 16 + size))
    return found


_FUNCTIONS = """
struct wrapper { unsigned magic, version; void *data, *list; };
extern struct wrapper gpu_wrappers[] __attribute__((visibility("hidden")));
extern void *gpu_items[] __attribute__((visibility("hidden")));
void *container(int index) { return gpu_wrappers[index].data; }
void *item(int index) { return gpu_items[2 * index + 1]; }
void *item_end(int index) { return gpu_items[2 * index]; }
"""


def _assembly(parts: Parts, path: Path) -> str:
    lines = [".p2align 3"]
    if parts.before:
        lines += ['.section .rodata,"a",%progbits', ".p2align 5", "before_0:", _bytes(parts.before, path, "before")]
    labels = []
    for name, section, contents in (("relinkable", "__nv_relfatbin", parts.relinkable),
                                    ("fatbin", ".nv_fatbin", parts.fatbins)):  # fmt: skip
        if contents:
            lines += [f'.section {section},"a",%progbits', ".p2align 3"]
        for index, content in enumerate(contents):
            lines += [f".balign {parts.align}", f"{name}_{index}:", _bytes(content, path, f"{name}{index}")]
    labels = [f"fatbin_{index}" for index in range(len(parts.fatbins))]
    labels += [f"relinkable_{index}" for index in range(len(parts.relinkable))]
    lines += _resource(parts, path)
    lines += ['.section .nvFatBinSegment,"aw",%progbits', ".p2align 3", "gpu_wrappers:", ".hidden gpu_wrappers",
              ".global gpu_wrappers"]  # fmt: skip
    for index, label in enumerate(labels):
        if index not in parts.unwrapped:
            version = 2 if index in parts.device_linked else 1
            lines += [f"wrapper_{index}:", f".4byte 0x466243b1, {version}", f".8byte {label}, 0"]
    return "\n".join([*lines, parts.extra, '.section .note.GNU-stack,"",%progbits', ""])


def _resource(parts: Parts, path: Path) -> list[str]:
    lines = []
    if parts.items:
        lines += ['.section .cask_resource,"a",%progbits', ".p2align 3"]
        for index, content in enumerate(parts.items):
            lines += [f"item_{index}:", _bytes(content + bytes(-len(content) % 8 + 8), path, f"item{index}")]
        lines += [f"item_{len(parts.items)}:"]
    lines += [".data", ".p2align 3", ".hidden gpu_items", ".global gpu_items", "gpu_items:"]
    lines += [f".8byte item_{index + 1}, item_{index}" for index in range(len(parts.items))]
    return [*lines, ".8byte 0"]


def _bytes(content: bytes, path: Path, name: str) -> str:
    file = path.with_name(f"{path.name}.{name}.bin")
    file.write_bytes(content)
    return f'.incbin "{file}"'

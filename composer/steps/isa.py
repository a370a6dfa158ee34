"""Count CPU instructions in the libraries of a file, a wheel, a bundle or a folder, and judge an instruction set by it.

The parts of one library are counted in threads: disassembling holds no lock of the interpreter.
"""

from __future__ import annotations

import mmap
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import msgspec

from composer.errors import ElfError
from composer.formats.cubin import Cubin
from composer.formats.isa import count_piece, pieces, read_code
from composer.model.isa import Judgement, Role, Seen, judge
from composer.model.target import Isa
from composer.steps.objects import objects

_BATCH = 64
# A word of CXX_FLAGS that every build of PyTorch has, in the library that prints them; the longest seen is 1 kB.
_CONFIGURED, _MARK, _MOST_FLAGS = "libtorch_cpu.so", b"-fvisibility-inlines-hidden", 1 << 14


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """The instructions of one object.

    counts: by kind, none that is 0; kinds overlap. undecoded: bytes of code that are no instruction. asks: it can know
    what the CPU has. build_flags: the CXX_FLAGS of `torch.__config__.show()`, in libtorch_cpu.so. fault: why it could
    not be counted.
    """

    path: str
    size: int
    machine: str = ""
    role: Role = "plain"
    instructions: int = 0
    undecoded: int = 0
    asks: bool = False
    counts: dict[str, int] = {}
    build_flags: str | None = None
    fault: str | None = None


def list_instructions(path: Path) -> Iterator[Library]:
    """Every object below `path` that is for x86-64 or AArch64.

    Raises HostError for what cannot be read and where capstone 5 is missing, WheelError and VerifyError for an unsound
    wheel or bundle. What is wrong with a library alone is its `fault`.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for name, size, content in objects(path):
            if isinstance(content, Cubin):
                continue
            try:
                found = _library(name, size, content, threads)
            except ElfError as fault:
                found = Library(path=name, size=size, fault=fault.what)
            if found:
                yield found


def judge_libraries(libraries: Sequence[Library], isa: Isa) -> Judgement:
    """The verdict for an instruction set of targets.toml."""
    seen = [
        Seen(path=one.path, machine=one.machine, counts=one.counts, asks=one.asks) for one in libraries if one.machine
    ]
    return judge(seen, isa.flags, isa.machine)


def _library(name: str, size: int, content: mmap.mmap, threads: ThreadPoolExecutor) -> Library | None:
    code = read_code(content, name)
    if code is None:
        return None
    counts: Counter[str] = Counter()
    parts = pieces(code)
    while batch := list(islice(parts, _BATCH)):
        for found in threads.map(lambda part: count_piece(content, part, code.machine), batch):
            counts.update(found)
    instructions, undecoded = counts.pop("instructions", 0), counts.pop("undecoded", 0)
    asks = code.asks or counts["cpuid"] > 0
    present = {kind: number for kind, number in sorted(counts.items()) if number}
    return Library(
        path=name, size=size, machine=code.machine, instructions=instructions, undecoded=undecoded, counts=present,
        asks=asks, role=Seen(path=name, machine=code.machine, counts=present, asks=asks).role,
        build_flags=_build_flags(content) if name.rpartition("/")[2] == _CONFIGURED else None,
    )  # fmt: skip


def _build_flags(content: mmap.mmap) -> str | None:
    """The NUL-terminated string around the mark."""
    at = content.find(_MARK, 0)  # by default it looks from where the map was written last
    if at < 0:
        return None
    around = content[max(0, at - _MOST_FLAGS) : at], content[at : at + _MOST_FLAGS]
    text = around[0].rpartition(b"\0")[2] + around[1].partition(b"\0")[0]
    return re.sub(r"\s+", " ", text.decode("ascii", "replace")).strip()

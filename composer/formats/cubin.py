"""Loose cubins: ELF objects of device code in files of their own, which a program hands to the driver one by one."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from composer.errors import ElfError

#: Bytes at a file's start that tell all that is read here.
HEAD = 64
_HEADER = struct.Struct("<8xB9xH28xI12x")
_EM_CUDA, _ABI_SECOND_BYTE = 190, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cubin:
    """A loose GPU binary; a file of the family-specific form is not told from the plain one."""

    sm: int
    variant: Literal["", "a"]
    kind: Literal["elf"] = "elf"


def read_cubin(head: bytes, where: str) -> Cubin | None:
    """The architecture of a loose cubin by the first 64 bytes of its file; None for another ELF object.

    Until ABI version 7 the lowest byte of e_flags is the SM and 0x800 says arch-specific; from 8 on (CUDA 13, and 12.8
    for SM 100 and later) the second byte is the SM, and 8 says it. Measured on the images inside fat binaries, whose
    headers tell the same, and on the 9,262 files of flashinfer-cubin 0.6.5, whose names do. Raises ElfError where the
    header is truncated.
    """
    if len(head) < _HEADER.size:
        raise ElfError("truncated", where=where)
    abi, machine, flags = _HEADER.unpack_from(head)
    if machine != _EM_CUDA:
        return None
    sm, specific = (flags >> 8 & 0xFF, flags & 0x8) if abi >= _ABI_SECOND_BYTE else (flags & 0xFF, flags & 0x800)
    return Cubin(sm=sm, variant="a" if specific else "")

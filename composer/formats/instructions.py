"""Which of given addresses the instructions of a shared object compute relative to themselves.

Code is not decoded: every byte, or word, at which the instruction could start counts. So bytes that only look like it
may be taken for one, but nothing that computes an address in the way of a compiler is missed. Sources: Intel's manual
(LEA with RIP-relative addressing), Arm's (ADR, ADRP, ADD immediate).
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from composer.errors import ElfError
from composer.formats.sections import SectionTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Signed = NDArray[np.int64]

_PIECE = 1 << 23
_MOST_ADDRESS = 1 << 62
_PAGE = 4096
#: An ADD that completes an ADRP may be scheduled some instructions behind it.
_REACH = 32


def computed_addresses(buffer: bytes | memoryview | mmap.mmap, sections: SectionTable, machine: str,
                       addresses: Collection[int], where: str) -> frozenset[int]:  # fmt: skip
    """Those of `addresses` that an executable section of an `x86_64` or `aarch64` object computes.

    On aarch64 an address is composed of a page and an offset; where the offset is not found nearby, every address in
    the page counts. ElfError when there is no code to look at, or its address is none.
    """
    wanted = np.array(sorted(addresses), np.int64)
    code = [one for one in sections.sections if one.executable and one.allocated and one.end > one.offset]
    if not code or any(one.address + one.size >= _MOST_ADDRESS for one in code):
        raise ElfError("no section header tells where its code is", where=where)
    scan, ahead = (_lea, 8) if machine == "x86_64" else (_adrp, 4 * _REACH)
    found: set[int] = set()
    for section in code if len(wanted) else ():
        for start in range(0, section.size, _PIECE):
            size = min(_PIECE + ahead, section.size - start)
            piece = np.frombuffer(buffer, np.uint8, size, section.offset + start)
            found.update(scan(piece, section.address + start, wanted).tolist())
    return frozenset(found)


def _lea(code: Bytes, address: int, wanted: Signed) -> Signed:
    """`lea r64, [rip + disp32]`: REX.W or REX.WR, 8D, ModRM with mod 00 and r/m 101, then the displacement."""
    at = np.flatnonzero(code[1:-5] == 0x8D) + 1
    at = at[((code[at + 1] & 0xC7) == 0x05) & ((code[at - 1] & 0xFB) == 0x48)]
    displacement: Signed = code[at[:, None] + np.arange(2, 6)].view("<i4")[:, 0].astype(np.int64)
    return _among(displacement + at + (address + 6), wanted)


def _among(values: Signed, wanted: Signed) -> Signed:
    near: Signed = values[(values >= wanted[0]) & (values <= wanted[-1])]
    found: Signed = near[wanted[np.searchsorted(wanted, near)] == near]  # they are sorted
    return found


def _adrp(code: Bytes, address: int, wanted: Signed) -> Signed:
    """ADR, and ADRP with each ADD (immediate) to the same register that follows soon."""
    words = code[: len(code) // 4 * 4].view("<u4").astype(np.int64)
    at = np.flatnonzero((words & 0x1F000000) == 0x10000000)
    word = words[at]
    distance = ((word >> 5 & 0x7FFFF) << 2 | word >> 29 & 3) << 43 >> 43  # 21 bits, with their sign
    place = address + at * 4
    is_page = (word >> 31).astype(np.bool_)
    pages = np.where(is_page, (place & -_PAGE) + (distance << 12), 0)
    near = is_page & (pages >= wanted[0] & -_PAGE) & (pages <= wanted[-1])
    direct = _among((place + distance)[~is_page], wanted)
    return np.concatenate([direct, _completed(words, at[near], pages[near], wanted)])


def _completed(words: Signed, at: NDArray[np.intp], pages: Signed, wanted: Signed) -> Signed:
    """The wanted addresses that ADDs complete the ADRPs at `at` to."""
    alone = np.ones(len(at), np.bool_)
    found = []
    for ahead in range(1, _REACH + 1):
        inside = at + ahead < len(words)
        add = words[np.where(inside, at + ahead, 0)]
        fits = inside & ((add & 0xFF800000) == 0x91000000) & ((add >> 5 & 31) == (words[at] & 31))
        amount = (add >> 10 & 0xFFF) << np.where(add >> 22 & 1, 12, 0)
        found.append(_among((pages + amount)[fits], wanted))
        alone &= ~fits
    found.append(wanted[np.isin(wanted & -_PAGE, pages[alone])])
    return np.concatenate(found)

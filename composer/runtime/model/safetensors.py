"""Read and check the header of a safetensors file; no tensor's bytes are read.

A file is the header's length (8 bytes, little endian), the header as JSON, and the tensors' bytes, which the header
must describe without gap or overlap. Source: the format section of safetensors' README.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

# Bits of an element. A dtype that is not here is left to the program that loads the file.
_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# What the reference implementation accepts.
_LONGEST_HEADER = 100_000_000
_LENGTH = struct.Struct("<Q")


def tensor_names(path: Path) -> frozenset[str]:
    """The names of the tensors that the file holds whole.

    ValueError, with what is wrong, for a file that is cut short or not safetensors; OSError for one that is not to be
    read.
    """
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < _LENGTH.size:
            raise ValueError(f"has {size} bytes, too few for a safetensors file")
        (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
        if length > min(_LONGEST_HEADER, size - _LENGTH.size):
            raise ValueError(f"its header would have {length} bytes: it is cut short or no safetensors file")
        header = _parse(stream.read(length))
    header.pop("__metadata__", None)
    _check_extents(header, size - _LENGTH.size - length)
    return frozenset(header)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except RecursionError as fault:
        raise ValueError("its header is nested too deeply") from fault
    except ValueError as fault:
        raise ValueError(f"its header is damaged: {fault}") from fault
    if not isinstance(header, dict):
        raise ValueError("its header is damaged: not an object")  # noqa: TRY004
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _check_extents(header: dict[str, Any], size: int) -> None:
    """ValueError unless the tensors fill `size` bytes one after another."""
    end = 0
    for begin, stop, name in sorted((*_extent(name, one), name) for name, one in header.items()):
        if begin != end:
            raise ValueError(f"tensor {name!r} begins at {begin}, where {end} is expected: a gap or an overlap")
        end = stop
    if end != size:
        raise ValueError(f"its tensors need {end} bytes and it has {size}: it is {_misfit(end, size)}")


def _misfit(wanted: int, has: int) -> str:
    return "cut short" if has < wanted else "too long"


def _extent(name: str, tensor: Any) -> tuple[int, int]:  # noqa: ANN401
    """Where a tensor begins and ends among the tensors' bytes; ValueError unless its shape and dtype fill that."""
    try:
        (begin, end), shape, dtype = tensor["data_offsets"], tensor["shape"], tensor["dtype"]
        sound = all(type(number) is int and number >= 0 for number in (begin, end, *shape)) and isinstance(dtype, str)
    except (KeyError, TypeError, ValueError) as fault:
        raise ValueError(f"tensor {name!r} is not described") from fault
    if not sound or end < begin:
        raise ValueError(f"tensor {name!r} has impossible numbers")
    if dtype in _BITS and 8 * (end - begin) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"tensor {name!r} has {end - begin} bytes, which are not {shape} of {dtype}")
    return begin, end

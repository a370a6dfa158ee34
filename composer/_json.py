"""Typed values from JSON, in any thread.

msgspec 0.22.0 learns the fields of a Struct when it is first asked to decode one, and publishes what it learns before
it is complete: a second thread that decodes the same type meanwhile reads a null pointer, and the process ends with
SIGSEGV. Here one thread at a time learns a type, and all decode.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_learning = threading.Lock()
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def decode(data: bytes, into: type[T]) -> T:
    """As `msgspec.json.decode(data, type=into)`, whose errors it raises."""
    decoder = _decoders.get(into)
    if decoder is None:
        with _learning:
            decoder = _decoders.setdefault(into, msgspec.json.Decoder(into))
    found: T = decoder.decode(data)
    return found

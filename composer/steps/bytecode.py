"""Compile modules to bytecode ahead of time, the same bytes on every machine.

The bundle's prefix may be read-only, and compiling SGLang's stack takes 10 s of every start (measured 27 -> 16 s). The
`.pyc` files are of the *unchecked hash* kind (PEP 552): they hold no time and are never compared with their source.
One fresh interpreter compiles one distribution, in sorted order, with a fixed hash seed: marshal's output depends on
which strings were interned before (python/cpython#78274).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from composer._proc import clean_environ, run
from composer.errors import BuildError
from composer.steps import _bytecode_worker

_LENGTH = struct.Struct("<Q")
_TIMEOUT = 1800.0


def compile_sources(python: Path, sources: Mapping[str, bytes], tag: str) -> dict[str, bytes]:
    """Bytecode of each source, by the path it belongs at: `a/b.py` gives `a/__pycache__/b.cpython-312.pyc`.

    python: an interpreter of the target's minor version; tag: its cache tag, `cpython-312`. Sources that do not
    compile (templates, Python 2) are left out, as compileall does. BuildError when the interpreter fails.
    """
    paths = sorted(path for path in sources if path.endswith(".py"))
    if not paths:
        return {}
    request = b"".join(_packed(path.encode()) + _packed(sources[path]) for path in paths)
    worker = Path(_bytecode_worker.__file__)
    # Not -I: it would ignore the hash seed, and with it the order of frozen sets in the bytecode.
    environ = clean_environ(PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1")
    reply = run([python, "-s", "-S", worker], stdin=request, env=environ, timeout=_TIMEOUT)
    codes = list(_unpacked(reply, python))
    if len(codes) != len(paths):
        raise BuildError(f"returned {len(codes)} results for {len(paths)} modules", where=str(python))
    return {_cached_path(path, tag): code for path, code in zip(paths, codes, strict=True) if code}


def _cached_path(path: str, tag: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"{folder}/__pycache__/{name[:-3]}.{tag}.pyc".lstrip("/")


def _packed(data: bytes) -> bytes:
    return _LENGTH.pack(len(data)) + data


def _unpacked(data: bytes, where: Path) -> Iterator[bytes]:
    offset = 0
    while offset < len(data):
        try:
            (length,) = _LENGTH.unpack_from(data, offset)
        except struct.error as fault:
            raise BuildError("returned a cut-off result", where=str(where)) from fault
        offset += _LENGTH.size
        yield data[offset : offset + length]
        offset += length

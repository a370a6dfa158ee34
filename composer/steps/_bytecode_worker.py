"""Runs under the target's interpreter: (path, source) pairs on standard input, one `.pyc` each on standard output.

Every item is an unsigned 64-bit little-endian length and that many bytes. A source that does not compile gives an
empty reply. Standard library only, Python 3.10 to 3.13.
"""

import _imp
import importlib._bootstrap_external as bootstrap
import struct
import sys
import warnings


def main() -> None:
    """Answer every pair until standard input ends."""
    warnings.simplefilter("ignore")
    pairs, out = sys.stdin.buffer, sys.stdout.buffer
    while head := pairs.read(8):
        path = pairs.read(*struct.unpack("<Q", head)).decode()
        source = pairs.read(*struct.unpack("<Q", pairs.read(8)))
        reply = compile_one(path, source)
        out.write(struct.pack("<Q", len(reply)) + reply)
    out.flush()


def compile_one(path: str, source: bytes) -> bytes:
    """An unchecked hash-based `.pyc` (PEP 552), or nothing for a source that does not compile."""
    try:
        code = compile(source, path, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last is how the parser says: nested too deeply
        return b""
    digest = _imp.source_hash(bootstrap._RAW_MAGIC_NUMBER, source)  # type: ignore[attr-defined]
    return bytes(bootstrap._code_to_hash_pyc(code, digest, False))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()

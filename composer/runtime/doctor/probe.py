"""Run by the doctor as a program of its own: what this host's libraries and its CUDA driver do when they are used.

    python -S probe.py [LIBRARY ...]

A damaged or mismatched library ends the process that loads it. Prints one JSON object per line, `{"library", "path",
"error"}` for each, in order, and then `{"cuda": STATUS, "version": CUDA, "gpus": COUNT}` if libcuda.so.1 is among them.
Standard library only, and no other module of this package.
"""

import ctypes
import json
import sys

_CUDA = "libcuda.so.1"


def main() -> None:
    """Load all; then start CUDA."""
    names = sys.argv[1:]
    loaded = {name: _load(name) for name in names}
    if loaded.get(_CUDA):
        print(json.dumps(_start(loaded[_CUDA])), flush=True)


def _load(name: str) -> ctypes.CDLL | None:
    before = _mapped()
    try:
        library = ctypes.CDLL(name)
    except OSError as fault:
        print(json.dumps({"library": name, "path": None, "error": str(fault)}), flush=True)
        return None
    stem = name.partition(".so")[0] + ".so"
    paths = sorted(path for path in _mapped() - before if path.rpartition("/")[2].startswith(stem))
    print(json.dumps({"library": name, "path": paths[0] if paths else None, "error": None}), flush=True)
    return library


def _mapped() -> set[str]:
    with open("/proc/self/maps", errors="surrogateescape") as lines:  # noqa: PTH123
        return {line.rstrip("\n").split(maxsplit=5)[5] for line in lines if "/" in line}


def _start(cuda: ctypes.CDLL | None) -> dict[str, object]:
    """cuInit, and what it sees. The CUDA driver API: cuda.h."""
    assert cuda is not None
    version, count = ctypes.c_int(), ctypes.c_int()
    status = cuda.cuInit(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if not status:
        cuda.cuDeviceGetCount(ctypes.byref(count))
    return {"cuda": status, "version": version.value, "gpus": count.value}


if __name__ == "__main__":
    main()

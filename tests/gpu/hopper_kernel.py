"""Run the kernel of a wheel that `compose wheel` built, on a GPU host, with nothing but a Python and the driver.

    python3 tests/gpu/hopper_kernel.py WHEEL [OTHER]

WHEEL holds code for the host's GPU: its products are compared with exact ones. OTHER, the same package for another
architecture, must be refused by CUDA. Prints one JSON line per check, {"check", "ok", ...}; exit status 1 if one
failed.
"""

import ctypes
import json
import operator
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from array import array
from pathlib import Path

LIBRARY = "hopper_kernel/libhopper_kernel.so"
SIZE = 64
DISTINCT = 40
COUNT = 33 * DISTINCT  # ten blocks for each multiprocessor of an H200
NO_DEVICE, NO_IMAGE = "cudaErrorNoDevice", "cudaErrorNoKernelImageForDevice"
#: As a child of this program: what a library answers where no GPU is to be seen.
PROBE = "-probe"


class Library:
    """The library of a wheel."""

    def __init__(self, path):
        self.calls = ctypes.CDLL(str(path))
        for name in ("hopper_error_name", "hopper_error_text"):
            getattr(self.calls, name).restype = ctypes.c_char_p

    def told(self, status):
        """A cudaError_t in words: `cudaErrorNoDevice: no CUDA-capable device is detected`."""
        parts = (self.calls.hopper_error_name(status), self.calls.hopper_error_text(status))
        return ": ".join(part.decode() for part in parts)

    def device(self):
        text = ctypes.create_string_buffer(512)
        status = self.calls.hopper_device(text, len(text))
        return status, text.value.decode()

    def product(self, a, b, count):
        out = array("f", bytes(4 * count * SIZE * SIZE))
        pointers = [one.buffer_info()[0] for one in (a, b, out)]
        return self.calls.hopper_product(*map(ctypes.c_void_p, pointers), count), out


def matrices(seed):
    """Numbers of which bfloat16 holds each exactly, and float32 each sum of products, in any order."""
    numbers = random.Random(seed)
    return [[numbers.randint(-32, 32) / 4 for _ in range(SIZE * SIZE)] for _ in range(DISTINCT)]


def bfloat16(values):
    return array("H", (bits >> 16 for (bits,) in (struct.unpack("I", struct.pack("f", value)) for value in values)))


def rows(matrix):
    return [matrix[start : start + SIZE] for start in range(0, SIZE * SIZE, SIZE)]


def exact(a, b):
    """a times the transpose of b."""
    return [sum(map(operator.mul, row, column)) for row in rows(a) for column in rows(b)]


def driver():
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.exists() else "none"


def tell(check, ok, **facts):
    print(json.dumps({"check": check, "ok": ok, **facts}), flush=True)
    return ok


def check_device(library):
    status, text = library.device()
    return tell("device", status == 0, device=text or library.told(status), driver=driver())


def check_product(library):
    left, right = matrices(1), matrices(2)
    repeats = COUNT // DISTINCT
    a, b = (bfloat16(value for matrix in one for value in matrix) * repeats for one in (left, right))
    wanted = array("f", (value for pair in zip(left, right, strict=True) for value in exact(*pair))) * repeats
    seconds = []
    for _ in range(2):  # the first call also sets CUDA up
        start = time.perf_counter()
        status, found = library.product(a, b, COUNT)
        seconds.append(round(time.perf_counter() - start, 4))
        if status:
            return tell("product", False, fault=library.told(status))
    wrong = sum(map(operator.ne, found, wanted))
    extremes = [min(found), max(found)]
    return tell("product", not wrong, matrices=COUNT, wrong=wrong, of=len(wanted), extremes=extremes, seconds=seconds)


def check_refused(library):
    """Code for another GPU only: the launch must fail, and say why."""
    zeros = bfloat16([0.0] * SIZE * SIZE)
    status, _ = library.product(zeros, zeros, 1)
    answer = library.told(status)
    return tell("another_gpu", answer.startswith(f"{NO_IMAGE}:"), answer=answer)


def check_hidden(path):
    words = [sys.executable, __file__, PROBE, str(path)]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # the driver may be found through LD_LIBRARY_PATH
    done = subprocess.run(words, env=environ, stdout=subprocess.PIPE, check=False)
    answer = done.stdout.decode().strip()
    return tell("no_gpu", answer.startswith(f"{NO_DEVICE}:"), answer=answer)


def main(words):
    if words[:1] == [PROBE]:
        library = Library(words[1])
        print(library.told(library.device()[0]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, wheel in enumerate(words):
            with zipfile.ZipFile(wheel) as archive:
                paths.append(archive.extract(LIBRARY, Path(folder, str(number))))
        library = Library(paths[0])
        results = [check_device(library), check_product(library), check_hidden(paths[0])]
        results += [check_refused(Library(path)) for path in paths[1:]]
    return 0 if all(results) else 1


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))

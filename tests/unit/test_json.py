"""Values from JSON in several threads at once: types that nobody has decoded before are learned by one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from composer._json import decode

#: Several threads decode each of many fresh types at the same moment. Structs within Structs take long to learn.
RACE = """
import sys, threading, types
from composer._json import decode

sys.setswitchinterval(1e-6)
FIELDS = 30

def fresh(number):
    inner = "".join(f"    a{one}: int | None = None\\n" for one in range(FIELDS))
    outer = "".join(f"    b{one}: Sequence[Inner] = ()\\n" for one in range(FIELDS))
    text = "from __future__ import annotations\\nimport msgspec\\nfrom typing import Sequence\\n"
    module = types.ModuleType(f"fresh{number}")
    sys.modules[module.__name__] = module
    exec(f"{text}class Inner(msgspec.Struct):\\n{inner}class Outer(msgspec.Struct):\\n{outer}", vars(module))
    return module.Outer

def work(kind, start):
    start.wait()
    found.append(decode(DATA, kind).b3[0].a3)

DATA = ("{" + ",".join(f'"b{one}": [{{"a{one}": {one}}}]' for one in range(FIELDS)) + "}").encode()
found = []
for number in range(100):
    kind, start = fresh(number), threading.Barrier(4)
    threads = [threading.Thread(target=work, args=(kind, start)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
assert found == [3] * 400, found
"""


def test_types_are_learned_once() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", RACE], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class Point(msgspec.Struct):
    x: int


def test_values_and_faults_are_msgspecs() -> None:
    assert decode(b'{"x": 1}', Point) == Point(x=1)
    assert decode(b'[{"x": 1}]', tuple[Point, ...]) == (Point(x=1),)
    with pytest.raises(msgspec.ValidationError):
        decode(b'{"x": "1"}', Point)
    with pytest.raises(msgspec.DecodeError):
        decode(b"{", Point)

"""The instructions of the real wheels, as binutils 2.40 counts them too."""

from __future__ import annotations

import time

import pytest

from composer.model.isa import CANARIES
from composer.steps.isa import Library, judge_libraries, list_instructions
from composer.steps.load import load_targets
from composer.store import Store

pytestmark = pytest.mark.real

#: Seconds on two cores for a whole wheel, of which PyTorch's took 30, on cores shared with others.
MOST = 120

# Library: instructions, VEX, EVEX, ymm, zmm.
MEASURED = {
    "libtorch_cpu.so": (58_378_258, 4_094_480, 2_739_251, 2_091_004, 2_464_403),
    "libc10.so": (159_834, 0, 0, 0, 0),
    "libc10_cuda.so": (80_719, 0, 0, 0, 0),
    "libtorch_python.so": (3_285_394, 0, 0, 0, 0),
    "libscipy_openblas64_-ff84a88b.so": (4_674_752, 353_353, 43_523, 101_664, 39_456),
    "_multiarray_umath.cpython-312-x86_64-linux-gnu.so": (1_761_228, 283_869, 172_035, 187_729, 156_529),
    "xgrammar_bindings.cpython-312-x86_64-linux-gnu.so": (200_753, 0, 0, 0, 0),
}
WHEELS = ("torch-2.9.1-cp312", "numpy-2.4.3-cp312", "xgrammar-0.1.27-cp312")


@pytest.fixture(scope="module")
def libraries() -> dict[str, Library]:
    found: dict[str, Library] = {}
    for wheel in WHEELS:
        paths = sorted(Store().artifacts.glob(f"*/*/{wheel}-*x86_64.whl"))
        assert paths, f"no {wheel} wheel in the store: run `compose fetch --sm 90 --isa avx512 --python 3.12`"
        start = time.monotonic()
        found |= {one.path.rpartition("/")[2]: one for one in list_instructions(paths[0])}
        assert time.monotonic() - start < MOST
    return found


@pytest.mark.parametrize("name", MEASURED)
def test_counts(libraries: dict[str, Library], name: str) -> None:
    one = libraries[name]
    assert (one.instructions, *(one.counts.get(kind, 0) for kind in ("vex", "evex", "ymm", "zmm"))) == MEASURED[name]


def test_the_kernels_of_libtorch_cpu(libraries: dict[str, Library]) -> None:
    counts = libraries["libtorch_cpu.so"].counts
    kinds = ("fma", "avx512vnni", "avx512bf16", "avx512fp16", "amx")
    assert [counts[kind] for kind in kinds] == [1_149_742, 672, 5_072, 219, 491]
    assert "-DUSE_FBGEMM" in (libraries["libtorch_cpu.so"].build_flags or "")
    assert "-mavx" not in (libraries["libtorch_cpu.so"].build_flags or "")


@pytest.mark.parametrize("isa", ["avx", "avx2", "avx512", "avx512bf16", "avx512vnni", "x86-64-v3", "x86-64-v4"])
def test_the_official_build_is_for_none(libraries: dict[str, Library], isa: str) -> None:
    assert {name for name, one in libraries.items() if one.role == "canary"} == CANARIES
    judgement = judge_libraries(list(libraries.values()), load_targets().isa[isa])
    assert judgement.verdict == "run-time dispatch only"

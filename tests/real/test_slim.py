"""Each shared object of the real wheels in the store, slimmed for each target, proven, and of the size known for it.

The sizes were measured with another program than this one (an early prototype), so they check the rules too.
"""

from __future__ import annotations

import mmap
import random
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from composer.errors import ComposerError
from composer.formats.slim import Slimmed, slim
from composer.model.gpu import Selection
from composer.proofs._slim_reader import SHT_NOBITS, Object
from composer.proofs.slimmed import prove_slimmed
from composer.steps.slim_check import check_listing, cuobjdump, loadable
from composer.store import Store

pytestmark = pytest.mark.real

TARGETS = (61, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
# MB (10^6 bytes) of each library that has GPU code, for each of TARGETS.
SIZES = """
torch/lib/libtorch_cuda.so                                108  204  237  235  108  236  249  271  271  108  264  264
sgl_kernel/flash_ops.abi3.so                               60   60  306  306   60  306  360   60   60   60   60   60
nvidia/cublas/lib/libcublasLt.so.12                       361  367  372  372  348  380  459  479  365  348  376  385
nvidia/cudnn/lib/libcudnn_engines_precompiled.so.9        106  110  111  114   69  114  121  150  149   69  130  130
nvidia/cusparselt/lib/libcusparseLt.so.0                  151  151  145  148  154  148  301  232  147  146  161  155
nvidia/nccl/lib/libnccl.so.2                               38   36   36   36   20   36   50   54   54   20   50   50
nvidia/cusparse/lib/libcusparse.so.12                      51   52   54   56   29   56   52   55   55   55   53   53
sgl_kernel/sm100/common_ops.abi3.so                         8    8   66   66    8   62  129   71    8    8   76    8
sgl_kernel/sm90/common_ops.abi3.so                          8    8   64   64    8   60  125   68    8    8   73    8
nvidia/cudnn/lib/libcudnn_adv.so.9                         17   37   41   40    8   40   43   52   52    8   49   49
nvidia/cufft/lib/libcufft.so.11                           279  279  279  279  279  279  279  279  279  279  279  279
nvidia/cusolver/lib/libcusolver.so.11                      28   27   29   29   19   29   30   32   32   33   33   33
nvidia/cusolver/lib/libcusolverMg.so.11                    15   15   17   17   12   17   17   19   19   20   20   20
nvidia/nvshmem/lib/libnvshmem_host.so.3                     5   14   13   13    5   14   15   16   16    6   15   15
nvidia/curand/lib/libcurand.so.10                          49   49   49   49   43   49   50   53   53   58   58   58
nvidia/cudnn/lib/libcudnn_ops.so.9                         17   16   15   15    4   15   16   20   20    4   19   19
torch/lib/libtorch_cuda_linalg.so                          37   35   35   35   23   35   35   39   39   23   40   40
nvidia/cublas/lib/libcublas.so.12                          21   19   19   19    7   19   20   17   17    7   17   17
nvidia/cudnn/lib/libcudnn_engines_runtime_compiled.so.9    20   20   21   21   20   21   21   21   21   20   21   21
torch/lib/libtorch_nvshmem.so                               1    1    1    1    1    1    1    2    2    3    2    2
sgl_kernel/flashmla_ops.abi3.so                             1    1    1    1    1    1    2    5    1    1    1    1
nvidia/cudnn/lib/libcudnn_cnn.so.9                          3    4    3    2    2    2    3    3    3    2    3    3
lib/mscclpp_nccl.so.0.6.0                                   1    1    3    3    2    3    3    2    2    2    2    2
_mscclpp.cpython-310-x86_64-linux-gnu.so                    1    1    2    2    1    2    2    1    1    1    1    1
lib/mscclpp.so.0.6.0                                        1    1    2    2    1    2    2    1    1    1    1    1
nvidia/cufile/lib/libcufile.so.0                            3    3    3    3    3    3    3    3    3    3    3    3
nvidia/cufft/lib/libcufftw.so.11                            2    2    2    2    2    2    2    2    2    2    2    2
"""
# Without GPU code that a target decides, so of the same size for each; with those above they make the totals.
OTHERS = """
torch/lib/libtorch_cpu.so torch/lib/libtorch_python.so torch/lib/libc10.so
nvidia/cuda_nvrtc/lib/libnvrtc.so.12 nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.8
nvidia/nvjitlink/lib/libnvJitLink.so.12 nvidia/cudnn/lib/libcudnn_heuristic.so.9 nvidia/cudnn/lib/libcudnn_graph.so.9
nvidia/cuda_cupti/lib/libnvperf_host.so nvidia/cuda_cupti/lib/libnvperf_target.so nvidia/cuda_cupti/lib/libcupti.so.12
nvidia/cuda_cupti/lib/libcheckpoint.so nvidia/nvshmem/lib/nvshmem_transport_ibdevx.so.3
nvidia/nvshmem/lib/nvshmem_transport_ibgda.so.3 nvidia/nvshmem/lib/nvshmem_transport_ibrc.so.3
nvidia/nvshmem/lib/nvshmem_transport_libfabric.so.3
"""
TOTALS = (2173, 2302, 2708, 2714, 2021, 2714, 3173, 2790, 2461, 2081, 2591, 2458)
EXPECTED = {name: tuple(map(int, sizes)) for name, *sizes in map(str.split, SIZES.strip().splitlines())}
WHEELS = {
    "torch": "torch-2.9.1-*.whl",
    "sgl-kernel": "sgl_kernel-0.3.21-*.whl",
    "nvidia": "nvidia_*_cu12-*.whl",
}


def wheels(pattern: str) -> list[Path]:
    """The wheels of the store; a test without them has nothing to test."""
    found = sorted(Store().artifacts.glob(f"*/*/{pattern}"))
    if not found:
        pytest.skip(f"no {pattern} in the store")
    return found


def wheel_of(name: str) -> str:
    """Which wheel has a library of EXPECTED."""
    if name.startswith("torch/"):
        return WHEELS["torch"]
    return f"nvidia_{name.split('/')[1]}_cu12-*.whl" if name.startswith("nvidia/") else WHEELS["sgl-kernel"]


def stored_size(name: str) -> int:
    (wheel,) = wheels(wheel_of(name))
    with zipfile.ZipFile(wheel) as archive:
        return archive.getinfo(name).file_size


@contextmanager
def unpacked(wheel: Path, name: str, folder: Path) -> Iterator[Path]:
    path = folder / Path(name).name
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    try:
        yield path
    finally:
        path.unlink()


@contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield view


def slimmed_file(path: Path, sm: int, folder: Path, *, debug: bool) -> tuple[Path, Slimmed]:
    """A slimmed copy, written as a build writes it."""
    after = folder / f"slimmed-{path.name}"
    with mapped(path) as view, after.open("wb") as stream:
        slimmed = slim(view, path.name, Selection(sms=(sm,)), debug=debug)
        for piece in slimmed.pieces():
            stream.write(piece)
    assert after.stat().st_size == slimmed.size
    return after, slimmed


def proven_file(path: Path, sm: int, folder: Path, *, debug: bool) -> Slimmed:
    """Slim into a file and let everything that can judge it do so."""
    after, slimmed = slimmed_file(path, sm, folder, debug=debug)
    try:
        with mapped(path) as old, mapped(after) as new:
            prove_slimmed(old, new, path.name, (sm,), keep_ptx=False, debug=debug)
        loadable(after)
        if (program := cuobjdump()) and slimmed.kept.images:
            check_listing(path, after, program)
    finally:
        after.unlink()
    return slimmed


@pytest.mark.parametrize("name", EXPECTED)
def test_a_library_with_gpu_code(name: str, tmp_path: Path) -> None:
    (wheel,) = wheels(wheel_of(name))
    with unpacked(wheel, name, tmp_path) as path:
        slimmed = proven_file(path, 90, tmp_path, debug=False)
        # What cuFFT has for this target is LTO-IR in .ldata, and one pinned container.
        assert slimmed.how == ("unchanged" if "cufft" in name else "shrunk"), slimmed.why
        with mapped(path) as view:
            for target, expected in zip(TARGETS, EXPECTED[name], strict=True):
                slimmed = slim(view, name, Selection(sms=(target,)))
                prove_slimmed(view, slimmed.content, name, (target,), keep_ptx=False, debug=False)
                assert slimmed.size / 1e6 == pytest.approx(expected, rel=0.02, abs=1.0), target


def test_the_totals_are_those_known(tmp_path: Path) -> None:
    """By itself and not from the sizes of the tests above, which may run in other processes."""
    totals = dict.fromkeys(TARGETS, sum(stored_size(name) for name in OTHERS.split()))
    for name in EXPECTED:
        (wheel,) = wheels(wheel_of(name))
        with unpacked(wheel, name, tmp_path) as path, mapped(path) as view:
            for target in TARGETS:
                totals[target] += slim(view, name, Selection(sms=(target,))).size
    for target, total in zip(TARGETS, TOTALS, strict=True):
        assert totals[target] / 1e6 == pytest.approx(total, rel=0.02), target


@pytest.mark.parametrize("kind", WHEELS)
def test_every_object_of_the_wheels_without_debug_symbols(kind: str, tmp_path: Path) -> None:
    for wheel in wheels(WHEELS[kind]):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.search(r"\.so(\.\d+)*$", name)]
        for name in names:
            with unpacked(wheel, name, tmp_path) as path:
                proven_file(path, 90, tmp_path, debug=True)


def proven_or_left(before: bytes, *, debug: bool) -> str:
    """What becomes of a damaged library: `refused`, `unchanged`, `refuted`, or that it was slimmed and is proven."""
    try:
        slimmed = slim(before, "x.so", Selection(sms=(90,)), debug=debug)
        after = b"".join(slimmed.pieces())
        if slimmed.how == "unchanged":
            assert after == before
            return "unchanged"
    except ComposerError:
        return "refused"
    try:
        prove_slimmed(before, after, "x.so", (90,), keep_ptx=False, debug=debug)
    except ComposerError:
        return "refuted"
    return "proven"


@pytest.mark.parametrize(
    "name",
    [
        "nvidia/cufile/lib/libcufile.so.0",
        "nvidia/cudnn/lib/libcudnn_cnn.so.9",
        "sgl_kernel/flashmla_ops.abi3.so",
        "torch/lib/libtorch_nvshmem.so",
    ],
)
def test_a_damaged_library_is_never_broken_silently(name: str, tmp_path: Path) -> None:
    (wheel,) = wheels(wheel_of(name))
    with unpacked(wheel, name, tmp_path) as path:
        data = path.read_bytes()
    chance = random.Random(name)
    elf = Object(data, name)
    spots = [(0, 64), (elf.phoff, 56 * elf.phnum), (elf.shoff, 64 * elf.shnum)]
    spots += [(one.offset, one.size) for one in elf.sections if one.size and one.kind != SHT_NOBITS]
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        before = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 4))):
            start, size = chance.choice([*spots, *spots[:3] * 4])
            before[start + chance.randrange(size)] ^= 1 << chance.randrange(8)
        outcomes[proven_or_left(bytes(before), debug=chance.random() < 0.5)] += 1
    assert outcomes["proven"] > 100, outcomes
    # Damaged headers that slimming does not look at: the proof stops these, and the original stays as it was.
    assert outcomes["refuted"] < 20, outcomes

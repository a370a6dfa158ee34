"""The GPU code of the real wheels: what was measured once, library by library, by other means."""

from __future__ import annotations

import pytest

from composer.model.gpu import Selection
from composer.steps.gpu_code import Library, list_gpu_code
from composer.store import Store

pytestmark = pytest.mark.real

TARGETS = (61, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def gpu_code(project: str, selection: Selection) -> dict[str, Library]:
    wheels = sorted(Store().artifacts.glob(f"*/*/{project}-*.whl"))
    assert wheels, f"no {project} wheel in the store: run `compose fetch --sm 90 --isa avx512`"
    return {one.path.rpartition("/")[2]: one for one in list_gpu_code(wheels[0], selection)}


@pytest.fixture(scope="module")
def sm90() -> dict[str, Library]:
    projects = ("torch", "nvidia_cublas_cu12", "nvidia_cusparselt_cu12", "nvidia_nccl_cu12", "nvidia_nvshmem_cu12",
                "nvidia_cufft_cu12", "nvidia_cusparse_cu12")  # fmt: skip
    found: dict[str, Library] = {}
    for project in projects:
        found |= gpu_code(project, Selection(sms=(90,)))
    return found


# Library: binaries, MB of all images, MB that SM 90 keeps, containers without anything for SM 90.
MEASURED = {
    "libtorch_cuda.so": (2787, 914.6, 140.4, 0),
    "libtorch_cuda_linalg.so": (856, 104.0, 11.4, 0),
    "libtorch_nvshmem.so": (29, 8.2, 0.1, 0),
    "libcublas.so.12": (1610, 108.9, 12.9, 5),
    "libcublasLt.so.12": (5732 + 443, 403.6, 111.2, 1327),
    "libcusparseLt.so.0": (955 + 263, 317.0, 166.3, 682),
    "libnccl.so.2": (100 + 1016, 409.1, 29.6, 4),
    "libnvshmem_host.so.3": (6 + 158, 139.5, 10.4, 0),
    "libcufft.so.11": (1, 0.0, 0.0, 1),
    "libcusparse.so.12": (1439, 360.7, 24.8, 23),
}


@pytest.mark.parametrize("name", MEASURED)
def test_libraries(sm90: dict[str, Library], name: str) -> None:
    found = sm90[name]
    assert found.doubts == ()
    assert found.selected is not None
    binaries, stored, kept, without = MEASURED[name]
    assert sum(one.count for one in found.images if one.kind == "elf") == binaries
    assert sum(one.size for one in found.images) / 1e6 == pytest.approx(stored, abs=0.06)
    assert found.selected.kept / 1e6 == pytest.approx(kept, abs=0.06)
    assert found.selected.without == {90: without}


def test_what_is_elsewhere(sm90: dict[str, Library]) -> None:
    assert sm90["libcufft.so.11"].elsewhere == {".ldata": 259320600}
    assert sm90["libcusparse.so.12"].elsewhere == {".rodata": 11013936}
    assert [name for name, one in sm90.items() if one.pinned] == ["libcufft.so.11", "libcufftw.so.11",
                                                                  "libcusparse.so.12"]  # fmt: skip


def test_every_target_of_sgl_kernel() -> None:
    """Which GPUs the wheel of SGLang's kernels has nothing for: the table that a build's coverage check rests on."""
    found = gpu_code("sgl_kernel", Selection(sms=TARGETS))
    missing = {}
    for name in ("flash_ops.abi3.so", "flashmla_ops.abi3.so", "common_ops.abi3.so"):
        selected = found[name].selected
        assert selected is not None
        missing[name] = {sm for sm, count in selected.without.items() if count}
    assert missing == {
        "flash_ops.abi3.so": {61, 75, 87, 100, 103, 110, 120, 121},
        "flashmla_ops.abi3.so": {61, 75, 80, 86, 87, 89, 103, 110, 120, 121},
        "common_ops.abi3.so": {61, 75, 87, 103, 110, 121},
    }

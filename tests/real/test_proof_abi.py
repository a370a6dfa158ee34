"""Symbols of the real stack: nothing is missing with the PyTorch that it is composed with, much with a later one."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from composer.formats.dlopen import Dlopen
from composer.formats.elf import Elf, read_elf
from composer.formats.linkage import DIGEST, Linkage, Wanted, read_linkage
from composer.formats.loader import Tree
from composer.model._strict import convert
from composer.model.dlopen import DlopenRule
from composer.model.manifest import Manifest
from composer.proofs.abi import Abi, check_abi
from composer.proofs.closure import check_bundle, dlopened, program_of
from composer.proofs.explain import explain
from composer.steps.objects import objects
from composer.steps.rpath import edited_tree, plan_rpaths
from composer.steps.tree import read_bundle, tree_of
from composer.store import Store

pytestmark = pytest.mark.real

SITE = "lib/python3.12/site-packages"
REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = REPOSITORY / "scripts/compose"
#: PyTorch 2.13.0 of PyPI: 526 MB, downloaded into the store once.
LATER = "torch-2.13.0-cp312-cp312-manylinux_2_28_x86_64.whl"
LATER_SHA256 = "796633c4cdf0fe2cdced72d8f88f22e73dbcfce83132763162f6d4bff13b820b"
#: Symbols of sgl-kernel 0.3.21 that PyTorch 2.13.0 does not define, and those of them in the namespaces c10 and at.
MISSING = {
    "deep_gemm/deep_gemm_cpp.abi3.so": (3, 1),
    "sgl_kernel/flash_ops.abi3.so": (3, 2),
    "sgl_kernel/flashmla_ops.abi3.so": (4, 3),
    "sgl_kernel/sm100/common_ops.abi3.so": (7, 5),
    "sgl_kernel/sm90/common_ops.abi3.so": (7, 5),
    "sgl_kernel/spatial_ops.abi3.so": (1, 0),
}
#: Seconds of one core for all symbols of the bundle, read and resolved.
MOST = 5.0

Facts = Mapping[str, tuple[Elf, Linkage]]


def read(content: memoryview, path: str) -> tuple[Elf, Linkage]:
    return read_elf(content, path), read_linkage(content, path)


def in_wheel(path: Path) -> Facts:
    return {
        f"{SITE}/{name}": read(memoryview(content), name) for name, _, content in objects(path)  # type: ignore[arg-type]
        if re.search(r"\.so(\.\d+)*$", name)
    }  # fmt: skip


def stored(name: str) -> Path:
    found = sorted(Store().artifacts.glob(f"*/*/{name}"))
    assert found, f"no {name} in the store: run `compose fetch --sm 90 --isa avx512 --python 3.12`"
    return found[0]


def later_torch() -> Path:
    folder = Store().artifacts / LATER_SHA256[:2] / LATER_SHA256
    if not (folder / LATER).is_file():
        words = [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--python-version",
            "3.12",
            "--platform",
            "manylinux_2_28_x86_64",
        ]
        subprocess.run([sys.executable, "-m", "pip", "download", *words, "-d", folder, "torch==2.13.0"], check=True)
    return folder / LATER


def composed(*wheels: Facts) -> Abi:
    """The verdict on wheels that are installed together, with the RPATHs that composer would give them."""
    facts = {path: fact for wheel in wheels for path, fact in wheel.items()}
    tree = Tree(objects={path: elf for path, (elf, _) in facts.items()})
    return check_abi(edited_tree(tree, plan_rpaths(tree)), {path: one for path, (_, one) in facts.items()}, "3.12")


@pytest.fixture(scope="module")
def kernels() -> Facts:
    return in_wheel(stored("sgl_kernel-0.3.21-cp310-abi3-*x86_64.whl"))


def test_nothing_is_missing_with_torch_2_9_1(kernels: Facts) -> None:
    abi = composed(in_wheel(stored("torch-2.9.1-cp312-*x86_64.whl")), kernels)
    assert [one for one in abi.findings if one.severity == "error"] == []
    bound = {one.path.removeprefix(f"{SITE}/"): one.cxx for one in abi.bindings if one.cxx}
    assert bound.keys() >= MISSING.keys()
    assert bound["sgl_kernel/sm90/common_ops.abi3.so"] == 120
    # Of another Python; the recipe leaves it out.
    assert [one.subject for one in abi.findings if one.id == "abi.tag"] == [
        f"{SITE}/_mscclpp.cpython-310-x86_64-linux-gnu.so"
    ]


def test_what_is_missing_with_torch_2_13(kernels: Facts) -> None:
    abi = composed(in_wheel(later_torch()), kernels)
    errors = {one.subject.removeprefix(f"{SITE}/"): one for one in abi.findings if one.severity == "error"}
    counts = {path: int(one.evidence.partition(" ")[0]) for path, one in errors.items()}
    assert counts == {path: total for path, (total, _) in MISSING.items()}
    assert {one.fix for one in errors.values()} == {
        "Compose it with the PyTorch that it was built for, or build it from source for this one."
    }


def test_what_the_namespaces_of_the_missing_are(kernels: Facts) -> None:
    defined = [one.defined for _, one in in_wheel(later_torch()).values()]
    keys = {table[at : at + DIGEST] for table in defined for at in range(0, len(table), DIGEST)}
    for path, (_, expected) in MISSING.items():
        names = [one.name for one in kernels[f"{SITE}/{path}"][1].wanted if keys.isdisjoint(one.keys)]
        assert len([name for name in names if re.match(r"_ZNK?(3c10|2at)", name)]) == expected


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bundle")
    subprocess.run([COMPOSE, "build", "--sm", "90", "--isa", "avx512", "--torch", "wheel", "-o", folder], check=True)
    (path,) = folder.glob("*.tar.zst")
    prefix = folder / "prefix"
    prefix.mkdir()
    subprocess.run(["tar", "--zstd", "-xf", path, "-C", prefix], check=True)
    path.unlink()
    yield prefix
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def tree(bundle: Path) -> tuple[Manifest, Tree]:
    manifest, elves = read_bundle(bundle, read_elf, jobs=1)
    return manifest, tree_of(manifest, elves)


def test_the_whole_bundle_in_time_and_without_a_false_alarm(bundle: Path, tree: tuple[Manifest, Tree]) -> None:
    manifest, shape = tree
    start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    _, linkage = read_bundle(bundle, read_linkage, jobs=1)
    abi = check_abi(shape, linkage, manifest.target["python"], program=program_of(shape, manifest.target["python"]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - start < MOST
    assert [one for one in abi.findings if one.severity != "note"] == []
    assert len(abi.bindings) > 150
    lazy = {one.subject.rpartition("/")[2] for one in abi.findings if one.id == "abi.lazy"}
    # Add-ons for PyTorch 2.4 and 2.5, of which torch_c_dlpack_ext opens the one for the PyTorch that it finds.
    assert lazy == {
        f"libtorch_c_dlpack_addon_torch{version}-{device}.so" for version in (24, 25) for device in ("cpu", "cuda")
    }


def test_one_symbol_less_is_found(bundle: Path, tree: tuple[Manifest, Tree]) -> None:
    manifest, shape = tree
    site = f"lib/python{manifest.target['python']}/site-packages"
    _, linkage = read_bundle(bundle, read_linkage, jobs=1)
    symbol = "_ZN3c104impl3cow23materialize_cow_storageERNS_11StorageImplE"
    users = {path for path, one in linkage.items() if symbol in {want.name for want in one.wanted}}
    broken = {**linkage, f"{site}/torch/lib/libc10.so": without(linkage[f"{site}/torch/lib/libc10.so"], symbol)}
    abi = check_abi(shape, broken, manifest.target["python"], program=program_of(shape, manifest.target["python"]))
    errors = [one for one in abi.findings if one.severity == "error"]
    assert all(one.evidence.startswith("1 of ") and one.evidence.endswith(symbol) for one in errors)
    assert {one.subject for one in errors} <= users
    assert f"{site}/sgl_kernel/flash_ops.abi3.so" in {one.subject for one in errors}


def without(linkage: Linkage, symbol: str) -> Linkage:
    keys = (linkage.defined[at : at + DIGEST] for at in range(0, len(linkage.defined), DIGEST))
    return msgspec.structs.replace(linkage, defined=b"".join(key for key in keys if key not in Wanted(symbol).keys))


def test_what_is_opened_by_name_is_there(tree: tuple[Manifest, Tree]) -> None:
    manifest, shape = tree
    found = check_bundle(shape, manifest.target["python"], opened(shape))
    assert [one for one in found if one.severity == "error"] == []
    assert {one.id for one in found if one.severity == "warning"} <= {"closure.outside"}
    names = {one.evidence.partition(" ")[0] for one in found if one.id == "closure.ambiguous"}
    assert {"libcudart.so.12", "libstdc++.so.6"} <= names


def test_one_library_less_is_found(tree: tuple[Manifest, Tree]) -> None:
    manifest, shape = tree
    gone = f"lib/python{manifest.target['python']}/site-packages/nvidia/cudnn/lib/libcudnn_graph.so.9"
    broken = replace(shape, objects={path: elf for path, elf in shape.objects.items() if path != gone})
    found = check_bundle(broken, manifest.target["python"], opened(shape))
    errors = [one for one in found if one.severity == "error"]
    assert {one.id for one in errors} == {"closure.missing"}
    assert all("libcudnn_graph.so.9" in one.evidence for one in errors)
    assert gone.replace("_graph", "") in {one.subject for one in errors}


def test_who_needs_nvrtc_and_how_it_is_found(tree: tuple[Manifest, Tree]) -> None:
    manifest, shape = tree
    site = f"lib/python{manifest.target['python']}/site-packages"
    found = explain(shape, "libnvrtc.so.12", program=program_of(shape, manifest.target["python"]))
    assert [one.path for one in found.providers] == [f"{site}/nvidia/cuda_nvrtc/lib/libnvrtc.so.12"]
    needs = {one.subject: one for one in found.needs}
    rules = {path: (one.rule, one.owner, one.entry) for path, one in needs.items()}
    path = f"{site}/sgl_kernel/flash_ops.abi3.so"
    assert rules[path] == ("rpath", path, "$ORIGIN/../nvidia/cuda_nvrtc/lib")


def opened(tree: Tree) -> dict[str, tuple[Dlopen, ...]]:
    data = tomllib.loads((REPOSITORY / "recipes/components/dlopen.toml").read_text())
    rules = [convert(row, DlopenRule, "dlopen.toml") for row in data["dlopen"]]
    for rule in rules:
        assert any(map(rule.covers, tree.objects)), rule
    return dlopened(rules, tree.objects)

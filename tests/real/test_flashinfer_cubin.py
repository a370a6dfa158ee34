"""The loose cubins of flashinfer-cubin 0.6.5: a target keeps what FlashInfer asks for on it, and its loader agrees.

The loader is FlashInfer's own file with the recipe's patch. Its neighbours import PyTorch, so stand-ins give it what it
takes from them; a module `requests` that ends the program tells whether it tried to download.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from composer.formats.cubin import read_cubin
from composer.formats.patch import apply_patch
from composer.formats.wheel import read_wheel
from composer.model.plan import SlimEdit
from composer.steps.load import load_recipe
from composer.steps.survey import loose_cubin, mapped
from composer.store import Store

pytestmark = pytest.mark.real

REPOSITORY = Path(__file__).resolve().parents[2]
PATCH = REPOSITORY / "patches/flashinfer-python/0.6.5/0001-no-download-of-cubins.patch"
FMHA = "e86f0e45764555d070c3d143b4caaea61a45b777/fmha/trtllm-gen"
BMM = "b55211623be7f5697c5262ffd8361fc06c147bc9/batched_gemm-b3c1646-c111d7c"
CUBINS = "flashinfer_cubin/cubins/"
# include/flashinfer/trtllm/fmha/fmhaKernels.cuh, isSMCompatible: which kernels FlashInfer takes on which GPU.
ROUTING = {100: {"kSM_100f", "kSM_100"}, 103: {"kSM_100f", "kSM_103"}, 90: set(), 120: set()}


def wheel(project: str) -> Path:
    found = sorted(Store().artifacts.glob(f"*/*/{project}-0.6.5-*.whl"))
    if not found:
        pytest.skip(f"no {project} 0.6.5 in the store: run `compose fetch --sm 100 --isa avx512`")
    return found[0]


@pytest.fixture(scope="module")
def rule() -> SlimEdit:
    """The recipe's, for SM 100."""
    slim = load_recipe("sglang").recipe.component_of("flashinfer-cubin").slim
    assert slim is not None
    return SlimEdit(files=slim.files, sms=(100,), licence=slim.licence, gpu=True, keep_ptx=False, debug=True)


def kept(sm: int, rule: SlimEdit) -> set[str]:
    edit = SlimEdit(files=rule.files, sms=(sm,), licence=rule.licence, gpu=True, keep_ptx=False, debug=True)
    with mapped(path := wheel("flashinfer_cubin")) as view:
        return {
            name.removeprefix(CUBINS) for name, member in read_wheel(view, path.name).members.items()
            if (cubin := loose_cubin(view, member)) and edit.why_left_out(f"lib/site-packages/{name}", cubin) is None
        }  # fmt: skip


@pytest.mark.parametrize(("sm", "count"), [(90, 0), (100, 8120), (103, 9064), (120, 0)])
def test_a_target_keeps_what_flashinfer_asks_for(sm: int, count: int, rule: SlimEdit) -> None:
    found = kept(sm, rule)
    assert len(found) == count
    with zipfile.ZipFile(wheel("flashinfer_cubin")) as archive:
        table = archive.read(f"{CUBINS}{FMHA}/include/flashInferMetaInfo.h").decode()
    kernels = re.findall(r'(kSM_\w+), nullptr, 0, "(\w+)"', table)
    assert len(kernels) == 198 + 6182 + 1142
    wanted = {f"{FMHA}/{name}.cubin" for tag, name in kernels if tag in ROUTING[sm]}
    assert {name for name in found if name.startswith(FMHA)} == wanted
    # The other kernels are all for the family, and named so, or those of DeepGEMM.
    assert all("sm100f" in name or "/deep-gemm/" in name for name in found - wanted)


FAMILY = "fmhaSm100fKernel_QkvE4m3OE4m3H256PackedQkvDenseVarSeqQ128Kv128StaticContext.cubin"
OTHER = "fmhaSm103aKernel_QkvBfloat16OBfloat16H128PackedQkvCausalVarSeqQ128Kv128PersistentContext.cubin"
HEADER = "include/trtllmGen_bmm_export/Enums.h"
PACKAGED = (f"{FMHA}/{FAMILY}", f"{FMHA}/{OTHER}", f"{FMHA}/checksums.txt", f"{BMM}/checksums.txt", f"{BMM}/{HEADER}")
STAND_INS = {
    "flashinfer/__init__.py": "", "flashinfer/jit/__init__.py": "",
    "flashinfer/jit/core.py": "import logging\nlogger = logging.getLogger()\nlogging.basicConfig()\n",
    "flashinfer/jit/utils.py": "def write_if_different(path, content):\n    path.write_text(content)\n",
    "flashinfer/jit/env.py": "import pathlib\nFLASHINFER_CUBIN_DIR = pathlib.Path('cubins')\n"
    "def has_flashinfer_cubin():\n    return True\n",
    "requests.py": "import os\nclass Session:\n    def get(self, *_, **__):\n        os._exit(9)\n",
}  # fmt: skip
ASK = """
import json, sys
from flashinfer.jit import cubin_loader as loader
folder, checksums, family, other, header, header_digest = sys.argv[1:]
table = loader.get_cubin(f"{folder}/checksums.txt", checksums).decode()
rows = dict(reversed(line.split()) for line in table.splitlines())
print(json.dumps([
    len(loader.get_cubin(f"{folder}/{family}", rows[family])),
    len(loader.get_file(header, header_digest, "elsewhere/header.h")),
    len(loader.get_cubin(f"{folder}/{other}", rows[other])),
    len(loader.get_cubin(f"{folder}/{family}", rows[other])),
]))
"""


def ask(folder: Path, rule: SlimEdit, *, patched: bool = True, **environ: str) -> subprocess.CompletedProcess[str]:
    """Ask for a cubin that an SM 100 bundle has, a header, a cubin that it lacks, and the first with another digest."""
    with zipfile.ZipFile(wheel("flashinfer_python")) as archive:
        loader = archive.read("flashinfer/jit/cubin_loader.py")
        artifacts = archive.read("flashinfer/artifacts.py").decode()
    if patched:
        loader = apply_patch(PATCH.read_bytes(), lambda _: loader)["flashinfer/jit/cubin_loader.py"]
    with zipfile.ZipFile(wheel("flashinfer_cubin")) as archive:
        packaged = {name: archive.read(CUBINS + name) for name in PACKAGED}
    for name in (FAMILY, OTHER):
        cubin = read_cubin(packaged[f"{FMHA}/{name}"], name)
        if cubin and rule.why_left_out(f"lib/site-packages/{CUBINS}{FMHA}/{name}", cubin):
            del packaged[f"{FMHA}/{name}"]
    files = {name: text.encode() for name, text in STAND_INS.items()} | {"flashinfer/jit/cubin_loader.py": loader}
    files |= {f"cubins/{name}": data for name, data in packaged.items()}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (checksums,) = re.findall(r'class CheckSumHash.*?TRTLLM_GEN_FMHA: str = \(\s*"(\w{64})"', artifacts, re.DOTALL)
    (digest,) = re.findall(r"(\w{64})  \S*/Enums\.h$", packaged[f"{BMM}/checksums.txt"].decode(), re.MULTILINE)
    words = [sys.executable, "-c", ASK, FMHA, checksums, FAMILY, OTHER, f"{BMM}/{HEADER}", digest]
    environ |= {"PYTHONPATH": "."}
    return subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, check=False)


def test_what_is_kept_is_found_and_what_is_not_is_named_without_a_download(tmp_path: Path, rule: SlimEdit) -> None:
    done = ask(tmp_path, rule)
    assert done.returncode == 0, done.stderr
    family, header, other, damaged = json.loads(done.stdout)
    assert family > 10_000
    assert header == (tmp_path / "elsewhere/header.h").stat().st_size > 0
    assert (other, damaged) == (0, 0)
    assert f"{OTHER} is missing or damaged in cubins" in done.stderr
    assert f"{FAMILY} is missing or damaged in cubins" in done.stderr
    assert "Nothing is downloaded unless FLASHINFER_CUBINS_REPOSITORY" in done.stderr


def test_a_repository_that_the_user_names_is_asked(tmp_path: Path, rule: SlimEdit) -> None:
    with zipfile.ZipFile(wheel("flashinfer_cubin")) as archive:
        for name in (FAMILY, OTHER):
            path = tmp_path / "repository" / FMHA / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(f"{CUBINS}{FMHA}/{name}"))
    done = ask(tmp_path, rule, FLASHINFER_CUBINS_REPOSITORY=str(tmp_path / "repository"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[2] == path.stat().st_size


def test_without_the_patch_it_downloads(tmp_path: Path, rule: SlimEdit) -> None:
    assert ask(tmp_path, rule, patched=False).returncode == 9

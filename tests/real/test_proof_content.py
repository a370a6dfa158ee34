"""The proofs of a bundle's texts on the real stack: what they say of it as it is, and of it with one thing gone.

WHEEL_COMPOSER_TREE: an unpacked bundle for SM 90, to save building one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from composer.formats.python_imports import _of_module, source_imports
from composer.formats.python_tree import python_tree
from composer.model._strict import convert
from composer.model.finding import Finding
from composer.model.runtime import RuntimeWork
from composer.proofs.content import Composed
from composer.proofs.ledger import check_requirements, left_out
from composer.proofs.modules import Left, check_losses
from tests.bundle_facts import as_composed, replace_file, without

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "scripts/compose"
#: What plain serving starts beyond the modules that the recipe names.
SERVER = ("sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler")
HOOKS = ("_cuda_bindings_redirector.pth", "distutils-precedence.pth")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if given := os.environ.get("WHEEL_COMPOSER_TREE"):
        yield Path(given)
        return
    folder = tmp_path_factory.mktemp("bundle")
    subprocess.run([COMPOSE, "build", "--sm", "90", "--isa", "avx512", "-o", folder], check=True)
    subprocess.run([COMPOSE, "unpack", *folder.glob("*.tar.zst"), folder / "prefix"], check=True)
    yield folder / "prefix"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def made(prefix: Path) -> Composed:
    """As the manifest has it, with the server's own modules to reach: digests are another proof's."""
    found = as_composed(prefix, *HOOKS)
    return replace(found, roots=(*found.roots, *SERVER))


def counted(findings: Iterable[Finding]) -> Counter[tuple[str, str]]:
    return Counter((one.id, one.severity) for one in findings)


def test_the_stack_as_it_is(made):
    """Nothing but the ledger: no requirement is unmet, no import missing, no file odd."""
    begun = time.process_time()
    findings = made.check()
    assert counted(findings) == {("ledger.dropped", "note"): 36, ("ledger.violated", "note"): 1}
    (violated,) = [one for one in findings if one.id == "ledger.violated"]
    assert violated.evidence.startswith("sglang requires flashinfer_python==0.6.3; the bundle has 0.6.5: ")
    assert len(made.rows) == 77
    assert time.process_time() - begun < 10


def test_what_is_made_where_it_serves(made):
    data = tomllib.loads((ROOT / "recipes/components/runtime.toml").read_text())
    rows = [convert(row, RuntimeWork, "runtime.toml") for row in data["runtime"]]
    found = [one for one in replace(made, runtime=rows).check() if one.id.startswith("offline.")]
    assert counted(found) == {("offline.compiles", "note"): 2, ("offline.on-request", "note"): 5}


def test_what_leaving_out_distributions_costs(made, prefix):
    tree = python_tree(made.entries, "3.12", "x86_64")
    sources = [path for path in tree.files.values() if "/site-packages/" in path and path.endswith(".py")]
    scans = {path: source_imports((prefix / path).read_bytes()) for path in sources}
    notes = check_losses(tree, scans, Left(dropped=left_out(made.rows), pruned={}))
    assert len(notes) == 17
    assert any(
        "sglang/srt/models/midashenglm.py cannot be imported without torchaudio" in one.evidence for one in notes
    )


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("einops", "einops"), ("dill", "dill"), ("jsonschema", "jsonschema"), ("openai", "openai"),
        ("ipython", "IPython"), ("pillow", "PIL"), ("loguru", "loguru"), ("uvloop", "uvloop"),
        ("sentencepiece", "sentencepiece"),
        ("setproctitle", "setproctitle"), ("partial-json-parser", "partial_json_parser"),
    ],
)  # fmt: skip
def test_a_distribution_that_somebody_drops(made, name, module):
    """By hand, each takes a crash to be found."""
    found = [one for one in without(made, name).check() if one.id == "imports.missing"]
    assert [one.evidence.split()[0] for one in found] == [module]
    assert f"({name}?)" in found[0].fix


def pip_check(prefix: Path) -> list[str]:
    words = [sys.executable, "-m", "pip", "--python", prefix / "bin/python", "check"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()


def test_pip_agrees(made, prefix, tmp_path):
    """On the stack as it is, and with two lines that are not met, which upstream's METADATA has."""
    assert pip_check(prefix) == ["No broken requirements found."]
    copy = tmp_path / "prefix"
    shutil.copytree(prefix, copy, symlinks=True, copy_function=os.link)
    path = next(one.path for one in made.stack if one.name == "sglang")
    text = (copy / path).read_text().replace("\nRequires-Dist:", "\nRequires-Dist: scipy\nRequires-Dist:", 1)
    replace_file(copy / path, text.replace("flashinfer-python==0.6.5", "flashinfer_python==0.6.3").encode())
    assert sorted(pip_check(copy)) == [
        "sglang 0.5.9 has requirement flashinfer_python==0.6.3, but you have flashinfer-python 0.6.5.",
        "sglang 0.5.9 requires scipy, which is not installed.",
    ]
    found = as_composed(copy)
    assert sorted(one.evidence for one in check_requirements(found.stack, found.environment)) == [
        "sglang 0.5.9 requires flashinfer_python==0.6.3; the bundle has 0.6.5",
        "sglang 0.5.9 requires scipy; the bundle does not have it",
    ]


def test_sources_are_cut_without_loss(made, prefix):
    """Each thirtieth source of the stack, against the whole syntax tree."""
    paths = sorted(path for path in made.entries if "/site-packages/" in path and path.endswith(".py"))[::30]
    assert len(paths) > 300
    for path in paths:
        data = (prefix / path).read_bytes()
        assert source_imports(data).imports == tuple(_of_module(data)), path

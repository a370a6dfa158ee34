"""`compose toolchain` as a person or a script runs it; nothing is downloaded here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toolkits import write_toolkit

COMPOSE = [sys.executable, "-c", "from composer.cli.main import main; main()", "toolchain"]


def compose(store: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_PATH", "CXX", "CC", "CUDAHOSTCXX")}
    here = kept | {"WHEEL_COMPOSER_STORE": str(store), "CUDA_HOME": "", **environ}
    return subprocess.run([*COMPOSE, *words], env=here, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    return write_toolkit(tmp_path / "cuda", "12.8.93", (75, 90), gcc=99)


def test_list(tmp_path, toolkit):
    done = compose(tmp_path / "store", "list", "--json", CUDA_HOME=str(toolkit))
    known = {one["name"]: one for one in json.loads(done.stdout)["toolchains"]}
    assert known["cuda13.0"]["state"] == known["cuda13.0-compiler"]["state"] == "to download"
    assert 90 in known["cuda13.0"]["sms"]
    assert known["cuda13.0"]["size"] > known["cuda13.0-compiler"]["size"] > 10**8
    found = known["installed12.8"]
    assert (found["state"], found["origin"], found["root"]) == ("installed", "CUDA_HOME", str(toolkit))
    text = compose(tmp_path / "store", "list", CUDA_HOME=str(tmp_path)).stdout
    assert "cuda13.0: to download, 1.29 GB of wheels" in text or "1.39 GB" in text
    assert f"not usable: {tmp_path} (CUDA_HOME): has no bin/nvcc" in text


def test_show(tmp_path, toolkit):
    done = compose(tmp_path / "store", "show", str(toolkit), "--json", CUDA_HOME=str(toolkit))
    shown = json.loads(done.stdout)
    assert shown["environ"]["CUDA_HOME"] == str(toolkit)
    assert shown["environ"]["CUDACXX"] == str(toolkit / "bin/nvcc")
    assert Path(shown["environ"]["CUDAHOSTCXX"]).is_file()
    assert shown["packages"] == []
    text = compose(tmp_path / "store", "show", "cuda13.0", CXX="nothing-here").stdout
    assert "host compiler: no such compiler: CXX=nothing-here" in text
    assert "nvidia-cuda-nvcc 13.0.88, " in text


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["ensure", "cuda12.8"], 10, "cuda-toolkit-12-8"),
        (["show", "no-such"], 10, "Known: cuda13.0, cuda13.0-compiler"),
        (["ensure", "cuda13.0", "--offline"], 4, "-o WHEELHOUSE"),
        (["lock", "cuda12.8"], 2, "no pinned toolchain"),
    ],
)
def test_errors_are_one_that_says_what_to_do(tmp_path, words, status, says):
    done = compose(tmp_path / "store", *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.count("error: ") == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr

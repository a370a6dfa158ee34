"""A real PyTorch, for CPUs, built with AVX-512 by the source step: configured, killed, resumed, and checked when done.

Measured with g++ 12.2: 1782 steps, configured in 38 s; killed at [30/1782], it went on with [1/1752]. A build
takes about 2.7 CPU hours.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from email.parser import BytesParser
from pathlib import Path

import pytest

from composer.model.isa import CANARIES
from composer.steps.isa import list_instructions
from composer.store import default_root
from tests.real.debian_pytorch import make

pytestmark = pytest.mark.real

COMPOSE = Path(__file__).resolve().parents[2] / "scripts/compose"
#: Seconds for the configuration and the first steps, on cores shared with others.
MOST = 1800
#: Seconds that a run goes on with the build in the user's own store; what it compiles is there for the next.
SHARE = float(os.environ.get("COMPOSE_TEST_PYTORCH_SECONDS", "600"))
STEPS = re.compile(rb"^\s*\[(\d+)/(\d+)\]", re.MULTILINE)
FLAGS = "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma"


class Build:
    """`compose wheel torch` in the background. log: of the build, from where it stood before this run."""

    def __init__(self, recipe: Path, store: Path, out: Path) -> None:
        self.logs, self.out = store / "logs", out
        self.start = {path: path.stat().st_size for path in self.logs.glob("torch-2.6.0*")}
        words: list[str | Path] = [
            COMPOSE,
            "wheel",
            "torch",
            "--recipe",
            recipe,
            "--sm",
            "90",
            "--isa",
            "avx512",
            "--json",
        ]
        with out.open("wb") as stream:
            self.process = subprocess.Popen(
                ["nice", *words], stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "WHEEL_COMPOSER_STORE": str(store)},
            )  # fmt: skip

    @property
    def log(self) -> bytes:
        paths = self.logs.glob("torch-2.6.0*")
        return b"".join(path.read_bytes()[self.start.get(path, 0) :] for path in paths)

    @property
    def steps(self) -> tuple[int, int]:
        """(done, all) of ninja's last line but for its own small calls, else zeros."""
        found = [(int(done), int(total)) for done, total in STEPS.findall(self.log) if int(total) > 4]
        return found[-1] if found else (0, 0)

    def wait(self, enough: Callable[[], bool], seconds: float) -> bool:
        """Whether `enough` came to be true in time, before the build ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if enough():
                return True
            time.sleep(0.2)
        return enough()

    def end(self, number: signal.Signals) -> int:
        """Send a signal to everything that was started here, and wait."""
        os.killpg(self.process.pid, number)
        return self.process.wait()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pytorch"))


def test_a_killed_build_goes_on(recipe: Path, tmp_path: Path) -> None:
    first = Build(recipe, tmp_path, tmp_path / "first")
    assert first.wait(lambda: first.steps[0] >= 30, MOST), first.out.read_text()
    first.end(signal.SIGKILL)
    time.sleep(2)  # its compilers are ended by the kernel's word, not by the signal
    done, total = first.steps
    assert first.log.count(b"-- Configuring done") == 1
    assert total > 1700
    second = Build(recipe, tmp_path, tmp_path / "second")
    assert second.wait(lambda: second.steps[0] >= 5, MOST), second.out.read_text()
    second.end(signal.SIGINT)
    print(f"killed at [{done}/{total}], went on with [1/{second.steps[1]}]")
    assert b"-- Configuring done" not in second.log
    assert total - done <= second.steps[1] <= total - done + 4  # those that were cut off


@pytest.fixture(scope="module")
def wheel(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel from the user's store, after at most SHARE seconds more of its build."""
    build = Build(recipe, default_root(), tmp_path_factory.mktemp("wheel") / "out")
    try:
        build.process.wait(SHARE)
    except subprocess.TimeoutExpired:
        done, total = build.steps
        build.end(signal.SIGINT)
        pytest.skip(f"{total - done} of its steps are left; run it again to go on")
    assert build.process.returncode == 0, build.out.read_text()
    text = build.out.read_text()
    found = json.loads(text[text.index("{") :])
    print(f"{found['filename']}: {found['size']} bytes, {found['seconds']} s with {found['jobs']} jobs")
    return Path(found["path"])


def test_the_metadata(wheel: Path) -> None:
    assert re.fullmatch(r"torch-2\.6\.0\+avx512-cp31[12]-cp31[12]-linux_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        metadata = BytesParser().parsebytes(archive.read("torch-2.6.0+avx512.dist-info/METADATA"))
        ledger = json.loads(archive.read("torch-2.6.0+avx512.dist-info/compose-source.json"))
    assert metadata["Version"] == "2.6.0+avx512"
    assert not [one for one in metadata.get_all("Requires-Dist", []) if one.startswith("nvidia")]
    assert ledger["environment"]["CXXFLAGS"].startswith(FLAGS)


def test_the_instructions(wheel: Path) -> None:
    libraries = {one.path.rpartition("/")[2]: one for one in list_instructions(wheel)}
    counts = {name: libraries[name].counts.get("zmm", 0) for name in ("libc10.so", "libtorch_python.so")}
    print(counts, libraries["libtorch_cpu.so"].counts)
    assert all(counts.values())
    assert counts.keys() <= CANARIES
    assert FLAGS in (libraries["libtorch_cpu.so"].build_flags or "")


def test_it_computes(wheel: Path, tmp_path: Path) -> None:
    minor = re.findall(r"-cp3(\d+)-", wheel.name)[0]
    subprocess.run([f"python3.{minor}", "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel, "numpy==2.2.6"], check=True)
    program = "import torch; print(torch.ones(3, 3).mm(torch.ones(3, 3)).sum().item()); print(torch.__config__.show())"
    shown = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    print(shown)
    assert shown.startswith("27.0\n")
    assert FLAGS in shown
    assert str(default_root()) not in shown

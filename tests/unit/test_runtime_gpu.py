"""The check for foreign GPUs in real interpreters, with an NVML of our own in the place of the driver's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.shared_objects import library

_SOURCE = Path(__file__).resolve().parents[2] / "composer/runtime/gpu.py"
_H100, _A100, _RTX = ("NVIDIA H100", 90), ("NVIDIA A100-SXM4", 80), ("NVIDIA GeForce RTX 4090", 89)
_TORCH = 'import sys\nsys.stderr.write("torch runs\\n")\n'
_NVML = """
typedef struct { const char *name; int sm; } gpu;
static gpu gpus[] = { @GPUS@ { 0, 0 } };
int puts(const char *);
int nvmlInit_v2(void) { puts("asked"); return @INIT@; }
int nvmlShutdown(void) { puts("let go"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { for (*count = 0; gpus[*count].name; ++*count); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, gpu **found) { *found = &gpus[index]; return gpus[index].sm == 1; }
int nvmlDeviceGetName(gpu *one, char *name, unsigned size) {
    for (unsigned i = 0; i < size; i++) if (!(name[i] = one->name[i])) return 0;
    return 7;
}
"""
_CAPABILITY = """
int nvmlDeviceGetCudaComputeCapability(gpu *one, int *major, int *minor) {
    *major = one->sm / 10, *minor = one->sm % 10;
    return one->sm == 2;
}
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    def passes(self) -> None:
        assert (self.code, self.err) == (0, "torch runs\n")

    def is_refused(self, *words: str) -> None:
        """The process ends with our code and message, and no line of torch's has run."""
        assert self.code == 10, self.err
        assert "Traceback" not in self.err
        assert "torch runs" not in self.err
        assert [word for word in words if word not in self.err] == [], self.err


@dataclass(frozen=True)
class Bundle:
    """A prefix with the check in its site-packages, a torch, and a folder for the driver's library."""

    prefix: Path

    @property
    def site(self) -> Path:
        return self.prefix / "lib/python3.X/site-packages"

    def target(self, **facts: Any) -> None:
        known = {"name": "small-sm90", "sm": [90], "ptx": False}
        path = self.prefix / "share/compose/target.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**known, **facts}))

    def driver(self, gpus: Sequence[tuple[str, int]], init: int = 0, capability: str = _CAPABILITY) -> None:
        rows = "".join(f'{{ "{name}", {sm} }},' for name, sm in gpus)
        source = _NVML.replace("@GPUS@", rows).replace("@INIT@", str(init)) + capability
        library(self.prefix / "driver/libnvidia-ml.so.1", source, "-Wno-unused-result")

    def run(self, code: str = "import torch", **environ: str) -> Done:
        """Start an interpreter that reads our .pth line, as one of the bundle does at its start."""
        start = f"import sys; sys.path.insert(0, {str(self.site)!r})\nimport _compose.gpu\n{code}\n"
        environ = {"LD_LIBRARY_PATH": str(self.prefix / "driver"), "PATH": "/usr/bin:/bin", **environ}
        found = subprocess.run([sys.executable, "-I", "-S", "-c", start], env=environ, capture_output=True, text=True,
                               check=False, timeout=60)  # fmt: skip
        return Done(found.returncode, found.stdout, found.stderr)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    made = Bundle(tmp_path / "pre fix")
    made.site.mkdir(parents=True)
    shutil.copytree(_SOURCE.parent, made.site / "_compose")
    (made.site / "torch.py").write_text(_TORCH)
    made.target()
    return made


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_foreign_gpu_is_refused_before_torch_runs(bundle: Bundle) -> None:
    bundle.driver([_A100])
    done = bundle.run()
    done.is_refused(
        "small-sm90", "built for SM 90", "NVIDIA A100-SXM4 (SM 80)", "--sm 80", "WHEEL_COMPOSER_GPU_CHECK=off"
    )
    assert done.out.split("\n")[:2] == ["asked", "let go"]


def test_equal_gpus_are_named_once(bundle: Bundle) -> None:
    bundle.driver([_A100] * 8 + [_RTX])
    done = bundle.run()
    done.is_refused("this host has NVIDIA A100-SXM4 (SM 80), NVIDIA GeForce RTX 4090 (SM 89)\n")


def test_a_bundle_for_several(bundle: Bundle) -> None:
    bundle.target(sm=[90, 100])
    bundle.driver([_A100])
    bundle.run().is_refused("built for SM 90, SM 100;")


@pytest.mark.parametrize(
    "code",
    ["import importlib.util; importlib.util.find_spec('torch')", "import torch.nn", "from torch import nn",
     "try:\n    import torch\nexcept Exception:\n    print('caught')"],
)  # fmt: skip
def test_every_way_to_look_for_torch(bundle: Bundle, code: str) -> None:
    bundle.driver([_A100])
    done = bundle.run(code)
    done.is_refused("SM 80")
    assert "caught" not in done.out


def test_a_bundle_without_torch(bundle: Bundle) -> None:
    """Who looks for torch and finds none is told of the GPU, too."""
    (bundle.site / "torch.py").unlink()
    bundle.driver([_A100])
    bundle.run().is_refused("SM 80")


@pytest.mark.parametrize(
    ("sm", "built", "ptx", "runs"),
    [
        (90, 90, False, True), (80, 80, False, True), (75, 75, False, True), (121, 121, False, True),
        (86, 80, False, True), (89, 80, False, True), (89, 86, False, True),  # the same major, and newer
        (80, 86, False, False), (86, 89, False, False),
        (87, 80, False, False), (87, 86, False, False), (89, 87, False, False), (87, 87, False, True),  # Jetson Orin
        (90, 80, False, False), (75, 80, False, False), (80, 75, False, False),
        (103, 100, False, False), (121, 120, False, False), (100, 90, False, False),
        (100, 90, True, True), (121, 120, True, True), (90, 80, True, True),
        (80, 90, True, False), (86, 89, True, False),
    ],
)  # fmt: skip
def test_what_runs_where(bundle: Bundle, sm: int, built: int, ptx: bool, runs: bool) -> None:
    bundle.target(sm=[built], ptx=ptx)
    bundle.driver([("GPU", sm)])
    done = bundle.run()
    if runs:
        done.passes()
    else:
        done.is_refused(f"SM {sm}")


# --- what passes ------------------------------------------------------------------------------------------------------


def test_no_driver(bundle: Bundle) -> None:
    bundle.run().passes()


def test_one_that_fits_is_enough(bundle: Bundle) -> None:
    """Which of them a program will use is not known yet."""
    bundle.driver([_A100, _H100, _RTX])
    bundle.run().passes()


def test_no_gpu(bundle: Bundle) -> None:
    bundle.driver([])
    bundle.run().passes()


def _no_init(bundle: Bundle) -> None:
    bundle.driver([_A100], init=9)  # NVML_ERROR_DRIVER_NOT_LOADED


def _old(bundle: Bundle) -> None:
    bundle.driver([_A100], capability="")


def _not_a_library(bundle: Bundle) -> None:
    path = bundle.prefix / "driver/libnvidia-ml.so.1"
    path.parent.mkdir()
    path.write_text("INPUT ( libnvidia-ml.so )")


def _mute(bundle: Bundle) -> None:
    bundle.driver([("no handle", 1), ("no capability", 2)])


@pytest.mark.parametrize("breaks", [_no_init, _old, _not_a_library, _mute])
def test_a_driver_that_does_not_answer(bundle: Bundle, breaks: Callable[[Bundle], None]) -> None:
    breaks(bundle)
    done = bundle.run()
    assert (done.code, done.err.count("Traceback")) == (0, 0), done.err


@pytest.mark.parametrize(
    "environ",
    [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"WHEEL_COMPOSER_GPU_CHECK": "off"}],
    ids=["none", "minus one", "off"],
)
def test_who_hides_the_gpus_is_not_asked(bundle: Bundle, environ: dict[str, str]) -> None:
    bundle.driver([_A100])
    done = bundle.run(**environ)
    done.passes()
    assert done.out == ""


@pytest.mark.parametrize("environ", [{"CUDA_VISIBLE_DEVICES": "0"}, {"WHEEL_COMPOSER_GPU_CHECK": "on"}])
def test_other_values_change_nothing(bundle: Bundle, environ: dict[str, str]) -> None:
    bundle.driver([_A100])
    bundle.run(**environ).is_refused()


@pytest.mark.parametrize("text", [None, "", "{", "\xff"])
def test_no_target_no_check(bundle: Bundle, text: str | None) -> None:
    path = bundle.prefix / "share/compose/target.json"
    path.unlink()
    if text is not None:
        path.write_text(text, encoding="latin-1")
    bundle.driver([_A100])
    bundle.run().passes()


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_programs_without_torch_pay_nothing(bundle: Bundle) -> None:
    """No driver is asked and no module loaded: of an interpreter's start, the check is a list entry."""
    bundle.driver([_A100])
    before = "import sys; before = set(sys.modules)\n"
    code = "import sys, colorsys; print(sorted({'json', 'ctypes', 'typing'} & set(sys.modules)))"
    done = bundle.run(before + code)
    assert (done.code, done.out, done.err) == (0, "[]\n", "")


def test_who_does_not_listen_is_refused_again(bundle: Bundle) -> None:
    bundle.driver([_A100])
    bundle.run("try:\n    import torch\nexcept SystemExit:\n    pass\nimport torch").is_refused("SM 80")


def test_it_asks_once_a_process(bundle: Bundle) -> None:
    bundle.driver([_H100])
    code = "import importlib.util\nfor _ in range(3): importlib.util.find_spec('torch')\nimport torch"
    done = bundle.run(code)
    done.passes()
    assert done.out.count("asked") == 1


def test_finders_behind_it_are_not_skipped(bundle: Bundle) -> None:
    """An editable install, a profiler: whoever else is in sys.meta_path sees torch, too."""
    code = """
import sys
class Other:
    def find_spec(self, name, path=None, target=None):
        print("other saw", name)
sys.meta_path.insert([type(one).__name__ for one in sys.meta_path].index("_Gate") + 1, Other())
import torch
"""
    done = bundle.run(code)
    done.passes()
    assert "other saw torch" in done.out.splitlines()


def test_a_child_may_fork_and_spawn(bundle: Bundle) -> None:
    bundle.driver([_H100])
    code = "import os, torch\nif os.fork(): sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\nimport json"
    bundle.run(code).passes()


def test_threads_that_look_at_once(bundle: Bundle) -> None:
    bundle.driver([_H100])
    code = """
import importlib.util, threading
threads = [threading.Thread(target=importlib.util.find_spec, args=("torch",)) for _ in range(8)]
[one.start() for one in threads]; [one.join() for one in threads]
import torch
"""
    bundle.run(code).passes()

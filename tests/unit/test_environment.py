"""The bundle's start-up hook, run by a real interpreter in the places where frameworks fail without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HOOK = Path(__file__).parents[2] / "composer" / "runtime" / "environment.py"
NAMES = {
    "CUDA_CACHE_PATH": "nv",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "SGLANG_CACHE_DIR": "sglang",
    "SGLANG_DG_CACHE_DIR": "deep_gemm",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TVM_FFI_CACHE_DIR": "tvm-ffi",
}
# Imports first: a process that gives up its user may no longer read its own standard library.
CHILD = """
import json, os, pwd, runpy, stat, sys, types
os.umask(0o022)
uid = int(sys.argv[3])
if uid:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
source = open(0).read()
sys.modules["_compose"] = package = types.ModuleType("_compose")
package.PREFIX = sys.argv[1]
before = dict(os.environ)
exec(compile(source, "environment.py", "exec"), {"__name__": "_compose.environment"})
print(json.dumps({name: value for name, value in os.environ.items() if before.get(name) != value}))
"""


def changes(tmp_path: Path, *, uid: int = 0, **env: str) -> dict[str, str]:
    """What the hook adds to the environment `env`, in a bundle below `tmp_path`."""
    prefix = tmp_path / "bundle"
    (prefix / "share/compose").mkdir(parents=True, exist_ok=True)
    (prefix / "share/compose/fingerprint").write_text("0123456789abcdef0123\n")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CHILD, prefix, "-", str(uid)], input=HOOK.read_text(),
        capture_output=True, text=True, env=env, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def below(root: Path) -> dict[str, str]:
    return {name: str(root / "0123456789abcdef" / folder) for name, folder in NAMES.items()}


def test_a_usual_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert changes(tmp_path, HOME=str(home), USER="me") == below(home / ".cache/compose")


def test_xdg_and_our_own_variable(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "USER": "me", "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert changes(tmp_path, **env) == below(tmp_path / "xdg/compose")
    assert changes(tmp_path, **env, WHEEL_COMPOSER_CACHE=str(tmp_path / "own")) == below(tmp_path / "own")


def test_what_is_set_stays(tmp_path: Path) -> None:
    found = changes(tmp_path, HOME=str(tmp_path), USER="me", TRITON_CACHE_DIR="/elsewhere", SGLANG_CACHE_DIR="")
    assert "TRITON_CACHE_DIR" not in found
    assert "SGLANG_CACHE_DIR" not in found
    assert "TVM_FFI_CACHE_DIR" in found


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])
def test_no_writable_home(tmp_path: Path, home: str) -> None:
    found = changes(tmp_path, HOME=home, USER="me", TMPDIR=str(tmp_path))
    root = tmp_path / f"compose-{os.getuid()}"
    assert found == below(root) | {"HF_HOME": str(root / "0123456789abcdef/huggingface")}
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_temporary_folder_that_is_not_ours_alone(tmp_path: Path) -> None:
    root = tmp_path / f"compose-{os.getuid()}"
    (tmp_path / "victim").mkdir()
    root.symlink_to(tmp_path / "victim")
    env = {"HOME": "/proc/nowhere", "USER": "me", "TMPDIR": str(tmp_path)}
    assert changes(tmp_path, **env) == {}
    assert list((tmp_path / "victim").iterdir()) == []
    root.unlink()
    root.mkdir()
    root.chmod(0o777)
    assert changes(tmp_path, **env) == {}


def test_nothing_writable_at_all(tmp_path: Path) -> None:
    assert changes(tmp_path, HOME="/proc/nowhere", USER="me", TMPDIR="/proc/nowhere") == {}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_a_uid_without_a_name() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "scratch").mkdir()
        root.chmod(0o755)
        (root / "scratch").chmod(0o1777)
        found = changes(root, uid=54321, TMPDIR=str(root / "scratch"))
        cache = root / "scratch" / "compose-54321" / "0123456789abcdef"
        assert found == below(root / "scratch" / "compose-54321") | {
            "USER": "uid54321", "HOME": str(cache / "home"), "HF_HOME": str(cache / "huggingface")
        }  # fmt: skip
        assert cache.stat().st_uid == 54321


def test_it_is_quick(tmp_path: Path) -> None:
    code = """
import os, sys, time, types
source = compile(open(0).read(), "environment.py", "exec")
os.environ["USER"] = "me"
sys.modules["_compose"] = package = types.ModuleType("_compose")
package.PREFIX = "/nonexistent"
loaded = set(sys.modules)
times = []
for _ in range(20):
    start = time.perf_counter()
    exec(source, {"__name__": "_compose.environment"})
    times.append(time.perf_counter() - start)
assert set(sys.modules) == loaded, set(sys.modules) - loaded
print(min(times))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], input=HOOK.read_text(), capture_output=True, text=True,
        env={"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.001

"""The bundle's start-up hook, run by a real interpreter in the places where frameworks fail without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from composer.launchers import ENVIRONMENT_PTH, env_file
from composer.runtime import environment

RUNTIME = Path(environment.__file__).parent
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
KEY = "0123456789abcdef"
CACHES = {
    "CUDA_CACHE_PATH": "nv",
    "CUTE_DSL_CACHE_DIR": "cute-dsl",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "NUMBA_CACHE_DIR": "numba",
    "OUTLINES_CACHE_DIR": "outlines",
    "PYTORCH_KERNEL_CACHE_PATH": "torch-kernels",
    "QUACK_CACHE_DIR": "quack",
    "SGLANG_CACHE_DIR": "sglang",
    "SGLANG_DG_CACHE_DIR": "deep_gemm",
    "SGLANG_DIFFUSION_CACHE_ROOT": "sglang-diffusion",
    "TILELANG_CACHE_DIR": "tilelang",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch-extensions",
    "TRITON_CACHE_DIR": "triton",
    "TVM_FFI_CACHE_DIR": "tvm-ffi",
}
HOMELESS = {
    "HF_HOME": "huggingface",
    "HF_MODULES_CACHE": "huggingface/modules",
    "IPYTHONDIR": "ipython",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": "xdg",
}
JIT = ("CUDA_HOME", "CPATH", "LIBRARY_PATH")
# Imports first: a process that gives up its user may no longer read its own standard library.
CHILD = """
import json, os, pwd, stat, sys
os.umask(0o022)
uid = int(sys.argv[2])
if uid:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
before = dict(os.environ)
sys.path.insert(0, sys.argv[1])
import _compose.environment
names = sorted({*before, *os.environ})
print(json.dumps({name: os.environ.get(name) for name in names if before.get(name) != os.environ.get(name)}))
"""


def make(prefix: Path, *, key: str = KEY, recipe: dict[str, str] | None = None) -> Path:
    """A bundle of this machine's Python: the hook, etc/env and a pyvenv.cfg, which makes the folder its prefix."""
    site = prefix / "lib" / PYTHON / "site-packages"
    shutil.copytree(RUNTIME, site / "_compose", ignore=shutil.ignore_patterns("__pycache__", "launch"))
    (site / "_compose_environment.pth").write_bytes(ENVIRONMENT_PTH)
    for path, data in {
        "etc/env": env_file(recipe or {}),
        "share/compose/fingerprint": f"{key}0123\n".encode(),
        "share/compose/target.json": b'{"sm":[90]}',
        "pyvenv.cfg": f"home = {Path(sys.executable).resolve().parent}\n".encode(),
    }.items():
        (prefix / path).parent.mkdir(parents=True, exist_ok=True)
        (prefix / path).write_bytes(data)
    (prefix / "bin").mkdir()
    (prefix / "bin/python3").symlink_to(Path(sys.executable).resolve())
    return prefix


def changes(prefix: Path, *, uid: int = 0, **env: str) -> dict[str, str | None]:
    """What the hook of the bundle at `prefix` changes in the environment `env`, but for what all have."""
    site = prefix / "lib" / PYTHON / "site-packages"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", CHILD, site, str(uid)],
        capture_output=True, text=True, env={"CUDA_HOME": ""} | env, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def below(prefix: Path, root: Path, *, homeless: bool = False, key: str = KEY) -> dict[str, str | None]:
    """What every bundle changes, with its cache in `root`."""
    folders = CACHES | HOMELESS if homeless else CACHES
    return {
        "COMPOSE_PREFIX": str(prefix), "COMPOSE_CACHE": str(root / key), "PYTHONNOUSERSITE": "1",
        **{name: str(root / key / folder) for name, folder in folders.items()},
    }  # fmt: skip


def start(prefix: Path, code: str, *options: str, **env: str) -> str:
    """What the bundle's Python prints, started as a user does."""
    argv = [prefix / "bin/python3", *options, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, env={"USER": "me"} | env, timeout=30, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return make(tmp_path / "bundle")


def toolkit(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/nvcc").write_text("#!/bin/sh\n")
    (folder / "bin/nvcc").chmod(0o755)
    return folder


def test_a_usual_home(prefix: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    assert changes(prefix, HOME=str(home), USER="me") == below(prefix, home / ".cache/compose")


def test_xdg_and_our_own_variable(prefix: Path, tmp_path: Path) -> None:
    env = {"HOME": "/proc/nowhere", "USER": "me", "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert changes(prefix, **env) == below(prefix, tmp_path / "xdg/compose")
    assert changes(prefix, **env, WHEEL_COMPOSER_CACHE=str(tmp_path / "own")) == below(prefix, tmp_path / "own")


def test_what_is_set_stays(prefix: Path, tmp_path: Path) -> None:
    found = changes(prefix, HOME=str(tmp_path), USER="me", TRITON_CACHE_DIR="/elsewhere", SGLANG_CACHE_DIR="")
    assert "TRITON_CACHE_DIR" not in found
    assert "SGLANG_CACHE_DIR" not in found
    assert "TVM_FFI_CACHE_DIR" in found


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])
def test_no_writable_home(prefix: Path, tmp_path: Path, home: str) -> None:
    root = tmp_path / f"compose-{os.getuid()}"
    assert changes(prefix, HOME=home, USER="me", TMPDIR=str(tmp_path)) == below(prefix, root, homeless=True)
    assert root.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_models_in_a_home_that_is_read_only_are_still_found() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        prefix = make(root / "bundle")
        (root / "home/.cache/huggingface").mkdir(parents=True)
        (root / "scratch").mkdir()
        (root / "scratch").chmod(0o1777)
        found = changes(prefix, uid=54321, HOME=str(root / "home"), USER="me", TMPDIR=str(root / "scratch"))
        assert found["HF_HOME"] == str(root / "home/.cache/huggingface")
        assert found["HF_MODULES_CACHE"] == str(root / "scratch/compose-54321" / KEY / "huggingface/modules")


def test_a_temporary_folder_that_is_not_ours_alone(prefix: Path, tmp_path: Path) -> None:
    root = tmp_path / f"compose-{os.getuid()}"
    (tmp_path / "victim").mkdir()
    root.symlink_to(tmp_path / "victim")
    env = {"HOME": "/proc/nowhere", "USER": "me", "TMPDIR": str(tmp_path)}
    nothing = {"COMPOSE_PREFIX": str(prefix), "PYTHONNOUSERSITE": "1"}
    assert changes(prefix, **env) == nothing
    assert list((tmp_path / "victim").iterdir()) == []
    root.unlink()
    root.mkdir()
    root.chmod(0o777)
    assert changes(prefix, **env) == nothing


def test_nothing_writable_at_all(prefix: Path) -> None:
    found = changes(prefix, HOME="/proc/nowhere", USER="me", TMPDIR="/proc/nowhere")
    assert found == {"COMPOSE_PREFIX": str(prefix), "PYTHONNOUSERSITE": "1"}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_a_uid_without_a_name() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prefix = make(root / "bundle")
        (root / "scratch").mkdir()
        root.chmod(0o755)
        (root / "scratch").chmod(0o1777)
        found = changes(prefix, uid=54321, TMPDIR=str(root / "scratch"))
        cache = root / "scratch" / "compose-54321" / KEY
        assert found == below(prefix, cache.parent, homeless=True) | {"USER": "uid54321", "HOME": str(cache / "home")}
        assert cache.stat().st_uid == 54321
        # A child has the same folders, not ones below the home that its parent was given.
        child = {name: value for name, value in found.items() if value} | {"TMPDIR": str(root / "scratch")}
        assert changes(prefix, uid=54321, **child) == {}


def test_a_child_finds_everything_as_it_should_be(prefix: Path, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "USER": "me"}
    child = {name: value for name, value in changes(prefix, **env).items() if value}
    assert changes(prefix, **env, **child) == {}
    # What was said since then counts.
    assert changes(prefix, **env, **child | {"TRITON_CACHE_DIR": child["COMPOSE_CACHE"] + "/mine"}) == {}


def test_another_bundle_s_folders_are_replaced_and_the_users_are_not(prefix: Path, tmp_path: Path) -> None:
    first = make(tmp_path / "first", key="f" * 16)
    toolkit(first / "jit")
    env = {"HOME": str(tmp_path), "USER": "me", "TRITON_CACHE_DIR": "/elsewhere", "CUDA_PATH": ""}
    left = env | {name: value for name, value in changes(first, **env).items() if value}
    left |= {"CUDA_HOME": f"{first}/jit", "CPATH": f"{first}/jit/include", "LIBRARY_PATH": "/elsewhere"}
    wanted = below(prefix, tmp_path / ".cache/compose") | {"CUDA_HOME": None, "CPATH": None}
    del wanted["TRITON_CACHE_DIR"], wanted["PYTHONNOUSERSITE"]
    found = changes(prefix, **left)
    if (system := Path("/usr/local/cuda/bin/nvcc")).exists():
        assert found["CUDA_HOME"] == str(system.parents[1])
        wanted |= {name: found[name] for name in ("CUDA_HOME", "CPATH")}
    assert found == wanted


def test_another_bundle_s_folders_go_even_where_nothing_can_take_their_place(prefix: Path) -> None:
    env = {"HOME": "/proc/nowhere", "USER": "me", "TMPDIR": "/proc/nowhere", "PYTHONNOUSERSITE": "1"}
    left = {"COMPOSE_CACHE": "/gone", "TRITON_CACHE_DIR": "/gone/triton", "TVM_FFI_CACHE_DIR": "/gone-not"}
    found = changes(prefix, **env, **left)
    assert found == {"COMPOSE_PREFIX": str(prefix), "COMPOSE_CACHE": None, "TRITON_CACHE_DIR": None}


def test_an_upgrade_in_place_gets_a_cache_of_its_own(prefix: Path, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "USER": "me"}
    left = {name: value for name, value in changes(prefix, **env).items() if value}
    (prefix / "share/compose/fingerprint").write_text("e" * 16)
    found = changes(prefix, **env, **left)
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / ".cache/compose" / ("e" * 16) / "triton")
    assert set(found) == {"COMPOSE_CACHE", *CACHES}


def test_pythonpath_is_dropped_unless_it_was_set_inside(prefix: Path, tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path), "USER": "me", "PYTHONPATH": "/foreign", "PYTHONHOME": "/foreign"}
    found = changes(prefix, **env)
    assert (found["PYTHONPATH"], found["PYTHONHOME"]) == (None, None)
    (tmp_path / "current").symlink_to(prefix)
    assert "PYTHONPATH" not in changes(prefix, **env, COMPOSE_PREFIX=str(tmp_path / "current"))
    assert "PYTHONPATH" in changes(prefix, **env, COMPOSE_PREFIX=str(tmp_path))


def test_modules_of_elsewhere_do_not_shadow_the_bundle_s(prefix: Path, tmp_path: Path) -> None:
    user = tmp_path / ".local/lib" / PYTHON / "site-packages"
    for folder in (user, tmp_path / "foreign"):
        folder.mkdir(parents=True)
        (folder / "numpy.py").write_text("raise SystemExit('shadowed')")
    with (prefix / "pyvenv.cfg").open("a") as stream:
        stream.write("include-system-site-packages = true\n")
    site = prefix / "lib" / PYTHON / "site-packages"
    (site / "numpy.py").write_text("")
    code = "import numpy, os; print(numpy.__file__, os.environ.get('PYTHONPATH'))"
    foreign = f"{tmp_path / 'foreign'}:{site}::{prefix}/lib"
    out = start(prefix, code, HOME=str(tmp_path), PYTHONPATH=foreign)
    assert out == f"{site}/numpy.py None"
    assert "shadowed" not in start(prefix, "import numpy; print('fine')", HOME=str(tmp_path))
    # Who asks for them inside, or for the home folder's, gets them.
    done = start(prefix, "import sys; print(*sys.path)", HOME=str(tmp_path), PYTHONPATH=foreign,
                 COMPOSE_PREFIX=str(prefix), PYTHONNOUSERSITE="")  # fmt: skip
    assert {str(tmp_path / "foreign"), str(user)} <= set(done.split())


def jit(folder: Path | str) -> dict[str, str]:
    return {
        "CUDA_HOME": str(folder), "CPATH": f"{folder}/include:{folder}/include/cccl",
        "LIBRARY_PATH": f"{folder}/lib64:{folder}/lib64/stubs:{folder}/lib",
    }  # fmt: skip


def compiler(prefix: Path, **env: str) -> dict[str, str | None]:
    found = changes(prefix, USER="me", HOME=str(prefix.parent), **env)
    return {name: found[name] for name in JIT if name in found}


def test_the_toolkit_of_the_bundle_comes_before_the_host_s(prefix: Path, tmp_path: Path) -> None:
    toolkit(prefix / "jit")
    host = toolkit(tmp_path / "host")
    code = f"import os; print(*[os.environ.get(name) for name in {JIT}])"
    assert start(prefix, code, HOME=str(tmp_path), PATH=f"{host}/bin") == " ".join(jit(prefix / "jit").values())


@pytest.mark.parametrize("has_layer", [False, True])
def test_the_toolkit_that_the_user_names_wins(prefix: Path, tmp_path: Path, has_layer: bool) -> None:
    if has_layer:
        toolkit(prefix / "jit")
    host = toolkit(tmp_path / "host")
    rest = {name: value for name, value in jit(host).items() if name != "CUDA_HOME"}
    assert compiler(prefix, CUDA_HOME=str(host)) == rest
    assert compiler(prefix, CUDA_HOME=str(host), CPATH="/mine") == {"LIBRARY_PATH": rest["LIBRARY_PATH"]}
    assert compiler(prefix, CUDA_HOME=str(tmp_path / "nowhere")) == {}
    assert compiler(prefix, CUDA_HOME="") == {}


def test_the_toolkit_on_path_is_found_through_links(prefix: Path, tmp_path: Path) -> None:
    host = toolkit(tmp_path / "cuda 12.8")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").symlink_to(host / "bin/nvcc")
    code = "import os; print(os.environ.get('CUDA_HOME'), os.environ['PATH'], sep='|')"
    out = start(prefix, code, HOME=str(tmp_path), PATH=f"/nowhere:relative::{tmp_path}/bin")
    assert out == f"{host}|/nowhere:relative::{tmp_path}/bin:{prefix}/bin"
    out = start(prefix, code, HOME=str(tmp_path), CUDA_PATH=str(host), PATH=f"{prefix}/bin:/bin")
    assert out == f"{host}|{prefix}/bin:/bin"


def test_no_toolkit_no_variables(prefix: Path, tmp_path: Path) -> None:
    code = "import os; print([name for name in ('CUDA_HOME', 'CPATH', 'LIBRARY_PATH') if name in os.environ])"
    wanted = list(JIT) if os.access("/usr/local/cuda/bin/nvcc", os.X_OK) else []
    assert start(prefix, code, HOME=str(tmp_path), PATH="/nowhere") == str(wanted)


def test_a_recipe_s_variables_and_odd_lines(tmp_path: Path) -> None:
    recipe = {"PLACE": "{prefix}/lib {unknown} {", "TRITON_CACHE_DIR": "{cache}/own", "SET": "x", "SIGNS": "a=b?=+=#"}
    prefix = make(tmp_path / "a {cache} b", recipe=recipe)
    with (prefix / "etc/env").open("ab") as stream:
        stream.write(b"\n=nothing\nno sign\n#X=1\nBYTES=\xff\nA B=1\nC-D?=1\n2E+=1\nF$(x)=1\nunset G H\nI'=1\n")
    found = changes(prefix, HOME=str(tmp_path), USER="me", SET="mine", **{"G H": "kept"})
    assert (found["PLACE"], found["SIGNS"], found["BYTES"]) == (f"{prefix}/lib {{unknown}} {{", "a=b?=+=#", "\udcff")
    assert found["TRITON_CACHE_DIR"] == f"{found['COMPOSE_CACHE']}/own"
    assert not {"SET", "#X", "X", "", "no sign"} & set(found)
    assert all(name.isidentifier() for name in found)


def test_a_bundle_without_etc_env_starts(prefix: Path, tmp_path: Path) -> None:
    (prefix / "etc/env").unlink()
    assert changes(prefix, HOME=str(tmp_path), USER="me") == {}


def test_the_cache_folder_can_be_asked_for(prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHEEL_COMPOSER_CACHE", str(tmp_path / "cache"))
    before = dict(os.environ)
    assert environment.cache_folder(str(prefix)) == str(tmp_path / "cache" / KEY)
    assert dict(os.environ) == before
    code = "from _compose import environment; print(environment.cache_folder())"
    assert start(prefix, code, HOME=str(tmp_path)) == str(tmp_path / ".cache/compose" / KEY)
    monkeypatch.setenv("WHEEL_COMPOSER_CACHE", "/dev/null")
    assert environment.cache_folder(str(prefix)) == ""


def files(prefix: Path) -> set[str]:
    return {str(path) for path in prefix.rglob("*")}


MODULES = "import sys, example; print(sys.pycache_prefix, sys.dont_write_bytecode, example.__cached__)"


def test_a_start_adds_no_file_to_a_bundle_without_bytecode(prefix: Path, tmp_path: Path) -> None:
    (prefix / "lib" / PYTHON / "site-packages/example.py").write_text("")
    before = files(prefix)
    where = tmp_path / ".cache/compose" / KEY / "bytecode"
    written, keeps, cached = start(prefix, MODULES, HOME=str(tmp_path)).split()
    assert (written, keeps) == (str(where), "False")
    assert Path(cached).is_relative_to(where)
    assert Path(cached).is_file()
    assert start(prefix, MODULES, HOME="/proc/nowhere", TMPDIR="/proc/nowhere").split()[0] == "/dev/null"
    assert start(prefix, MODULES, "-B", HOME=str(tmp_path)).split()[1] == "True"
    mine = start(prefix, MODULES, HOME=str(tmp_path), PYTHONPYCACHEPREFIX=str(tmp_path / "mine")).split()
    assert mine[:2] == [str(tmp_path / "mine"), "False"]
    assert files(prefix) == before


def test_bytecode_of_the_bundle_is_used(prefix: Path, tmp_path: Path) -> None:
    site = prefix / "lib" / PYTHON / "site-packages"
    (site / "example.py").write_text("")
    subprocess.run([sys.executable, "-m", "compileall", "-q", "--invalidation-mode=unchecked-hash", site], check=True)
    before = files(prefix)
    assert start(prefix, MODULES, HOME=str(tmp_path)).split()[:2] == ["None", "False"]
    # With -O the interpreter would not read it, and add its own.
    optimised = start(prefix, MODULES, "-O", HOME=str(tmp_path)).split()
    assert optimised[0] == str(tmp_path / ".cache/compose" / KEY / "bytecode")
    assert files(prefix) == before


def test_it_is_quick(prefix: Path, tmp_path: Path) -> None:
    code = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import _compose
source = compile(open(_compose.__path__[0] + "/environment.py").read(), "environment.py", "exec")
loaded = set(sys.modules)
clean = dict(os.environ)
times = []
for _ in range(20):
    for name in set(os.environ) - set(clean):
        del os.environ[name]
    start = time.perf_counter()
    exec(source, {"__name__": "_compose.environment", "__package__": "_compose", "__spec__": _compose.__spec__})
    times.append(time.perf_counter() - start)
assert set(sys.modules) == loaded, set(sys.modules) - loaded
assert "TRITON_CACHE_DIR" in os.environ
print(min(times))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", code, prefix / "lib" / PYTHON / "site-packages"],
        capture_output=True, text=True, env={"HOME": str(tmp_path), "USER": "me", "PATH": ":".join(["/usr/bin"] * 20)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.001

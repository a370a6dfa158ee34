"""Imports by a real interpreter: modules that fail, exit, crash, hang, ask the network and need the driver."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from composer.model.manifest import Check
from composer.proofs.imports import check_imports, driver_functions

MODULES = {
    "good": "import json",
    "raises": "raise RuntimeError('first line\\nsecond line')",
    "surrogate": "raise OSError('\\udc80 is no text')",
    "absent_module": "import no_such_module.part",
    "absent_library": "import ctypes; ctypes.CDLL('libabsent.so.3')",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "exits": "import sys; sys.exit(0)",
    "exits_at_once": "import os; os._exit(0)",
    "aborts": "import os; os.abort()",
    "hangs": "import time; time.sleep(60)",
    "leaves_a_child": "import subprocess; subprocess.Popen(['/bin/sleep', '5'])",
    "prints": "print('[' * 100_000); import sys; sys.stderr.write('x' * 1_000_000)",
    "loads_driver": "import ctypes; assert ctypes.CDLL('libcuda.so.1').cuInit(0) == 100",
}
ENVIRONMENT = """
import os, pathlib, sys
home, prefix = pathlib.Path.home(), sys.prefix
assert {name for name in os.environ if name not in ("LC_CTYPE", "__PYVENV_LAUNCHER__")} == {
    "HOME", "TMPDIR", "WHEEL_COMPOSER_CACHE", "PATH", "LC_ALL", "PYTHONDONTWRITEBYTECODE",
    "WHEEL_COMPOSER_GPU_CHECK", "CUDA_VISIBLE_DEVICES", "CUDA_HOME"}, os.environ
assert os.environ["PATH"] == os.path.join(prefix, "bin")
assert str(home) == os.environ["TMPDIR"] and os.getcwd() == str(home)
assert str(home) not in sys.path and "" not in sys.path and sys.dont_write_bytecode and sys.flags.isolated
assert os.getuid() == UID
(home / "writable").write_text("")
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefix with space")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    for name, text in MODULES.items():
        (site(folder) / f"{name}.py").write_text(text)
    return folder


def site(folder):
    return next(folder.glob("lib/python3*/site-packages"))


def check(prefix, *modules, driver=(), **options):
    checks = [Check(module=name, needs_driver=name in driver) for name in modules]
    return [finding for finding in check_imports(prefix, checks, **options) if finding.severity == "error"]


def notes(prefix):
    return check_imports(prefix, [Check(module="good", needs_driver=False)])


def test_a_module_that_imports_is_not_mentioned(prefix):
    assert check(prefix, "good", "prints", "leaves_a_child") == []


def test_nothing_to_check_starts_nothing(tmp_path):
    assert check_imports(tmp_path / "absent", []) == ()


def test_a_relative_prefix(prefix, monkeypatch):
    monkeypatch.chdir(prefix.parent)
    assert check(Path(prefix.name), "good", "loads_driver", driver=["loads_driver"]) == []


@pytest.mark.parametrize(
    ("module", "evidence", "fix"),
    [
        ("raises", "RuntimeError: first line | second line", "bin/python3 -c 'import raises'"),
        ("surrogate", "OSError: \\udc80 is no text", "bin/python3 -c 'import surrogate'"),
        ("absent_module", "ModuleNotFoundError: No module named 'no_such_module'", "that has no_such_module"),
        ("absent_library", "libabsent.so.3: cannot open shared object file", "Add libabsent.so.3"),
        ("loads_driver", "libcuda.so.1: cannot open shared object file", "Say in the recipe"),
        ("crashes", "killed by SIGSEGV | File ", "bin/python3 -X faulthandler"),
        ("aborts", "killed by SIGABRT | File ", "bin/python3 -X faulthandler"),
        ("exits", "SystemExit: 0", "bin/python3 -c 'import exits'"),
        ("exits_at_once", "exit status 0", "faulthandler"),
        ("not.there", "No module named 'not'", "that has not"),
        ("nul\0", "", "nul"),
        ("-c", "No module named '-c'", "that has -c"),
    ],
)
def test_each_failure_is_explained(prefix, module, evidence, fix):
    (finding,) = check(prefix, module)
    assert (finding.id, finding.subject) == ("import", module)
    assert evidence in finding.evidence
    assert "\n" not in finding.evidence
    assert fix in finding.fix


def test_one_dead_process_hides_nothing_after_it(prefix):
    modules = ["good", "crashes", "raises", "prints", "exits_at_once", "aborts", "absent_module"]
    blamed = [finding.subject for finding in check(prefix, *modules)]
    assert blamed == ["crashes", "raises", "exits_at_once", "aborts", "absent_module"]


def test_a_module_that_hangs_is_named_with_its_place(prefix):
    hanging, failing = check(prefix, "good", "hangs", "raises", timeout=1.0)
    assert (hanging.subject, failing.subject) == ("hangs", "raises")
    assert hanging.evidence.startswith("not imported in time | File ")
    assert "hangs.py" in hanging.evidence


def test_the_driver_is_there_for_those_that_need_it_only(prefix):
    assert check(prefix, "good", "loads_driver", driver=["loads_driver"], jobs=2) == []
    (finding,) = check(prefix, "loads_driver", "good", driver=["good"])
    assert finding.subject == "loads_driver"


def test_the_environment_is_clean(prefix, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nonexistent")
    (site(prefix) / "environment.py").write_text(ENVIRONMENT.replace("UID", str(os.getuid())))
    assert check(prefix, "environment") == []


def test_nothing_is_left_in_the_prefix_or_the_temporary_folder(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(prefix.rglob("*"))
    check(prefix, "good", "crashes", "loads_driver", driver=["loads_driver"])
    assert sorted(prefix.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_a_prefix_whose_interpreter_does_not_start(tmp_path):
    (finding,) = check(tmp_path, "good", "raises")
    assert (finding.id, finding.subject) == ("import.interpreter", "bin/python3")
    assert "No such file" in finding.evidence


def test_the_network_is_cut(prefix):
    if notes(prefix):
        pytest.skip("this kernel lets nobody cut the network")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        (site(prefix) / "connects.py").write_text(f"import socket; socket.create_connection({address!r}, 5)")
        (finding,) = check(prefix, "connects")
    assert "Network is unreachable" in finding.evidence
    assert "must not use the network" in finding.fix


FALLBACK = """
import sys; from pathlib import Path
from composer.model.manifest import Check; from composer.proofs.imports import check_imports
for finding in check_imports(Path(sys.argv[1]), [Check(module=name, needs_driver=False) for name in sys.argv[2:]]):
    print(finding.id, finding.severity, finding.subject, finding.evidence, sep="|")
"""


def without_namespaces(shell, prefix, *modules):
    """The findings where the kernel allows no further namespaces, or less than the caller's rights."""
    if subprocess.run(["unshare", "-r", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this kernel lets nobody make a user namespace")
    words = ["unshare", "-r", "sh", "-c", f'{shell} "$@"', "sh", sys.executable, "-c", FALLBACK, prefix, *modules]
    root = Path(__file__).parents[2]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=root, env=environ)
    return done.stdout.splitlines()


def test_a_kernel_that_refuses_is_mentioned_and_proxies_refuse(prefix):
    (site(prefix) / "fetches.py").write_text("import urllib.request as r; r.urlopen('http://192.0.2.1/', timeout=5)")
    limit = "echo 0 >/proc/sys/user/max_user_namespaces; echo 0 >/proc/sys/user/max_net_namespaces; exec"
    note, error = without_namespaces(limit, prefix, "good", "fetches")
    assert note.startswith("import.network|note|bin/python3|the network was not cut (")
    assert error.startswith("import|error|fetches|")
    assert "Connection refused" in error


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv")
def test_a_user_without_rights_cuts_it_in_a_namespace_of_their_own(prefix):
    (site(prefix) / "mapped.py").write_text("import os; assert os.getuid() == os.getgid() == 0")
    assert without_namespaces("exec setpriv --bounding-set=-sys_admin", prefix, "good", "mapped") == []


C_DRIVER = "int cuInit(int flags) { return 0; } int cuOnlyHere_v2(void) { return 0; } int cudaThing(void) { return 0; }"
C_RUNTIME = "int cudaThing(void) { return 7; }"
C_USER = """
int cuInit(int), cuOnlyHere_v2(void), cudaThing(void);
int sum(void) { return cuInit(0) + cuOnlyHere_v2() + cudaThing(); }
"""


def compile_library(path, code, *options):
    path.with_suffix(".c").write_text(code)
    words = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, path.with_suffix(".c"), *options]
    subprocess.run(words, check=True)


def test_a_library_linked_to_the_driver_loads_with_all_its_symbols_bound(prefix, tmp_path):
    """The stub precedes the runtime in the search order, and must leave the runtime's own names alone."""
    compile_library(tmp_path / "libcuda.so.1", C_DRIVER)
    folder = site(prefix)
    compile_library(folder / "libruntime.so", C_RUNTIME)
    compile_library(
        folder / "libuser.so", C_USER, "-Wl,-z,now", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN",
        tmp_path / "libcuda.so.1", folder / "libruntime.so",
    )  # fmt: skip
    (folder / "linked.py").write_text(
        textwrap.dedent("""
            import ctypes, pathlib
            assert ctypes.CDLL(pathlib.Path(__file__).with_name("libuser.so")).sum() == 100 + 100 + 7
        """)
    )
    (folder / "libdamaged.so").write_bytes(b"\x7fELF damaged")
    (folder / "libdangling.so").symlink_to("nowhere")
    assert check(prefix, "linked", driver=["linked"]) == []


def test_driver_functions_are_the_drivers_only():
    found = driver_functions([["cuLaunchKernel", "cudaMalloc", "cublasCreate_v2", "cudnnCreate"], ["cuFileOpen", "cu"]])
    assert "cuLaunchKernel" in found
    assert {"cuInit", "cuGetProcAddress_v2", "cuDriverGetVersion"} <= set(found)
    assert not {"cudaMalloc", "cublasCreate_v2", "cudnnCreate", "cuFileOpen", "cu"} & set(found)
    assert list(found) == sorted(set(found))

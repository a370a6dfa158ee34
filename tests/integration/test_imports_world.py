"""What a module tries when it is imported, and gets over: compilers, programs, other machines; and a moved tree."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from composer.errors import HostError
from composer.model.manifest import Check
from composer.proofs.imports import check_imports

TRIES = """
import contextlib, os, socket, subprocess
with contextlib.suppress(Exception):
    {}
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "prefix"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    write(folder, "good", "import json")
    return folder


def write(prefix, name, text):
    (next(prefix.glob("lib/python3*/site-packages")) / f"{name}.py").write_text(text)


def findings(prefix, *modules, driver=(), **options):
    checks = [Check(module=name, needs_driver=name in driver) for name in modules]
    found = check_imports(prefix, checks, **options)
    return [(one.id, one.severity, one.subject, one.evidence) for one in found if one.id != "import.network"]


@pytest.mark.parametrize(
    ("code", "program"),
    [
        ("subprocess.run(['nvcc', '--version'])", "nvcc"), ("subprocess.run(['/usr/bin/c++', 'x'])", "/usr/bin/c++"),
        ("os.system('gcc-12 -o x x.c')", "gcc-12 -o x x.c"), ("os.posix_spawn('/bin/ninja', ['ninja'], {})", "ninja"),
        ("subprocess.run([b'/\\xff/clang++-18'])", "clang++-18"),
        ("subprocess.Popen('x86_64-linux-gnu-g++ x', shell=True)", None),
    ],
)  # fmt: skip
def test_a_compiler_that_is_asked_for(prefix, code, program):
    write(prefix, "tries", TRIES.format(code))
    ((name, severity, subject, evidence),) = findings(prefix, "good", "tries")
    expected = ("import.compiles", "warning") if program else ("import.program", "note")
    assert (name, severity, subject) == (*expected, "tries")
    assert (program or "/bin/sh") in evidence


def test_no_compiler_of_this_machine_is_on_path(prefix):
    write(
        prefix, "looks", "import shutil; assert not any(map(shutil.which, ['cc', 'gcc', 'nvcc', 'ninja', 'ld', 'sh']))"
    )
    assert findings(prefix, "looks") == []


@pytest.mark.parametrize(
    ("code", "host"),
    [
        ("socket.create_connection(('files.example.org', 443))", "files.example.org"),
        ("socket.socket().connect(('192.0.2.7', 80))", "192.0.2.7"),
        ("socket.gethostbyname('files.example.org')", "files.example.org"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.7', 53))", "192.0.2.7"),
        ("import urllib.request; urllib.request.urlopen('http://files.example.org/x')", "files.example.org"),
    ],
)  # fmt: skip
def test_a_download_that_nobody_misses(prefix, code, host):
    write(prefix, "tries", TRIES.format(code))
    found = findings(prefix, "tries")
    assert ("import.reaches", "warning", "tries", f"tries to reach {host} when it is imported") in found
    assert {one[0] for one in found} == {"import.reaches"}


@pytest.mark.parametrize(
    "code",
    [
        "socket.socketpair()", "socket.socket(socket.AF_UNIX).connect('/nonexistent')", "socket.getaddrinfo(None, 80)",
        "socket.create_connection(('127.0.0.1', 9))", "socket.getaddrinfo('localhost', 80)",
        "socket.gethostbyname(socket.gethostname())", "socket.socket(socket.AF_UNIX).connect(b'\\0abstract')",
    ],
)  # fmt: skip
def test_what_stays_on_the_machine(prefix, code):
    write(prefix, "tries", TRIES.format(code))
    assert findings(prefix, "tries") == []


def test_a_tree_that_may_be_moved(prefix):
    write(prefix, "driver", "import ctypes; assert ctypes.CDLL('libcuda.so.1').cuInit(0) == 100")
    before = sorted(prefix.parent.rglob("*"))
    assert findings(prefix, "good", "driver", driver=["driver"], moved=True) == []
    assert sorted(prefix.parent.rglob("*")) == before


def test_a_tree_that_may_not(prefix):
    write(prefix, "stays", f"import pathlib; assert pathlib.Path({str(prefix)!r}).exists()")
    assert findings(prefix, "good", "stays") == []
    ((name, severity, subject, evidence),) = findings(prefix, "good", "stays", moved=True)
    assert (name, severity, subject) == ("import.moved", "error", "stays")
    assert evidence.startswith("imported where it was, and not after a move: ")
    assert evidence.endswith("AssertionError")
    assert prefix.is_dir()


def test_a_fault_is_not_told_twice(prefix):
    write(prefix, "fails", "raise RuntimeError('always')")
    write(prefix, "tries", TRIES.format("subprocess.run(['nvcc'])"))
    assert [one[0] for one in findings(prefix, "fails", "tries", moved=True)] == ["import", "import.compiles"]


def test_what_was_only_odd_before_may_be_wrong_after(prefix):
    text = TRIES.format("subprocess.run(['nvcc'])") + f"assert os.path.exists({str(prefix)!r})"
    write(prefix, "both", text)
    assert [one[0] for one in findings(prefix, "both", moved=True)] == ["import.compiles", "import.moved"]


def test_a_tree_that_is_gone(tmp_path):
    with pytest.raises(HostError):
        check_imports(tmp_path / "absent", [Check(module="x", needs_driver=False)], moved=True)
    assert list(tmp_path.iterdir()) == []


def test_the_tree_returns_when_the_second_pass_fails(prefix, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prefix, copy, symlinks=True)
    write(
        copy, "destroys", "import pathlib, shutil, sys\nif ' moved ' in sys.prefix: shutil.rmtree(sys.prefix + '/bin')"
    )
    found = findings(copy, "good", "destroys", moved=True)
    assert [one for one in found if one[1] == "error"] == []
    assert copy.is_dir()
    assert not (copy / "bin").exists()


SLOW = """
import pathlib, time
pathlib.Path({!r}).touch()
time.sleep(60)
"""
CHECK = """
import sys
from pathlib import Path
from composer.model.manifest import Check; from composer.proofs.imports import check_imports
check_imports(Path(sys.argv[1]), [Check(module=name, needs_driver=False) for name in ("slow", "good", "good2")])
"""


@pytest.mark.parametrize("group", [False, True], ids=["the process alone", "its whole group, as a terminal does"])
def test_an_interrupt_ends_it_at_once(prefix, tmp_path, group):
    """Not after the module that is under way, and not after those that follow."""
    write(prefix, "slow", SLOW.format(str(tmp_path / "begun")))
    write(prefix, "good2", "")
    child = subprocess.Popen([sys.executable, "-c", CHECK, prefix], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 40
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "begun").exists()
    (os.killpg if group else os.kill)(child.pid, signal.SIGINT)
    assert child.wait(20) != 0

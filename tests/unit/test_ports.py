"""Who listens on a port, with real sockets and processes."""

from __future__ import annotations

import json
import os
import pwd
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from composer.runtime.host.ports import bind_fault, owner

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a listener of this process on the address that is the test's parameter."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family) as one:
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, request.param == "::1")
        one.bind((request.param, 0))
        one.listen()
        yield one.getsockname()[1]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("port", "host", "meets"),
    [
        ("127.0.0.1", "127.0.0.1", True), ("127.0.0.1", "0.0.0.0", True), ("127.0.0.1", "", True),
        ("127.0.0.1", "localhost", True), ("127.0.0.1", "127.0.0.2", False), ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "0.0.0.0", True), ("127.0.0.1", "::", True), ("127.0.0.1", "::1", False),
        ("::1", "::1", True), ("::1", "::", True), ("::", "::1", True), ("::1", "127.0.0.1", False),
        ("::", "0.0.0.0", True), ("::ffff:127.0.0.1", "127.0.0.1", True), ("127.0.0.1", "no such host", False),
    ],
    indirect=["port"],
)  # fmt: skip
def test_who_is_in_the_way(port: int, host: str, meets: bool) -> None:
    found = owner(port, host)
    assert (found is not None) == meets
    if found:
        assert (found.pid, found.port, found.uid) == (os.getpid(), port, os.getuid())
        assert found.user == pwd.getpwuid(os.getuid()).pw_name
        assert Path(sys.executable).name in found.command


def test_a_process_of_another_parent() -> None:
    code = (
        "import socket; one = socket.create_server(('127.0.0.1', 0)); print(one.getsockname()[1], flush=True); input()"
    )
    words = [sys.executable, "-IS", "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = owner(int(process.stdout.readline()), "")
        process.communicate("\n")
    assert found
    assert (found.pid, found.command) == (process.pid, shlex.join(words))


@pytest.mark.parametrize("port", ["127.0.0.1"], indirect=True)
def test_another_port_and_an_open_connection_are_in_nobodys_way(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        assert owner(client.getsockname()[1], "0.0.0.0") is None
    assert owner(free_port(), "0.0.0.0") is None


def test_the_same_family_comes_first() -> None:
    with socket.create_server(("127.0.0.1", 0)) as four:
        port = four.getsockname()[1]
        with socket.create_server(("::1", port), family=socket.AF_INET6):
            assert [found.address for host in ("127.0.0.1", "::1") if (found := owner(port, host))] == [
                "127.0.0.1",
                "::1",
            ]


def test_a_socket_that_children_inherited_is_the_parents() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        child = subprocess.Popen(["/bin/sleep", "60"], pass_fds=[one.fileno()])
        try:
            found = owner(one.getsockname()[1], "127.0.0.1")
        finally:
            child.kill()
            child.wait()
        assert found
        assert found.pid == min(os.getpid(), child.pid)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be another user")
def test_another_users_process_has_a_user_and_no_number() -> None:
    """Read by `nobody` from sources that it may read; root's socket shows its uid to all."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
        code = f"{(_ROOT / 'composer/runtime/host/ports.py').read_text()}\nimport json\n" \
               f"from dataclasses import asdict\nprint(json.dumps(asdict(owner({port}, '127.0.0.1'))))"  # fmt: skip
        done = subprocess.run(["/usr/bin/env", "python3", "-IS", "-"], input=code, capture_output=True, text=True,
                              user=65534, cwd="/", check=False, env={"PATH": "/usr/bin:/bin"})  # fmt: skip
    if done.returncode == 127:
        pytest.skip("no python3 that another user may run")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"address": "127.0.0.1", "port": port, "uid": 0, "user": "root", "pid": None,
                                       "command": ""}  # fmt: skip


@pytest.mark.parametrize("port", ["127.0.0.1"], indirect=True)
def test_binding(port: int) -> None:
    faults = {host: bind_fault(port, host) for host in ("127.0.0.1", "0.0.0.0", "localhost", "127.0.0.2", "::1")}
    assert {host: fault.strerror for host, fault in faults.items() if fault} == dict.fromkeys(
        ["127.0.0.1", "0.0.0.0", "localhost"], "Address already in use")  # fmt: skip


def test_binding_ipv6_is_not_in_the_way_of_ipv4() -> None:
    with socket.create_server(("0.0.0.0", 0)) as one:
        assert bind_fault(one.getsockname()[1], "::") is None


def test_binding_where_nobody_can() -> None:
    port = free_port()
    assert bind_fault(port, "0.0.0.0") is None
    assert "Cannot assign" in str(bind_fault(port, "192.0.2.1"))
    assert isinstance(bind_fault(port, "no such host"), socket.gaierror)
    assert isinstance(bind_fault(port, "x" * 300), socket.gaierror)

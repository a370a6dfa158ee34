"""Services without systemd, with real processes: a small server takes the place of SGLang's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from composer.runtime.service import cli, supervisor
from composer.runtime.service.health import credentials
from composer.runtime.service.spec import SYSTEM, Places, Service
from composer.runtime.service.systemd import Systemd
from composer.runtime.service.unit import unit

ROOT = Path(__file__).resolve().parents[2]
#: Starts two children, one in a session of its own, and then listens. All say who they are in MARKS.
SERVER = """
import http.server, os, signal, subprocess, sys, time
marks = os.environ["MARKS"]
open(os.path.join(marks, str(os.getpid())), "w").close()
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "fork" in sys.argv:
    for session in (False, True):
        code = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);" \\
               "open(os.path.join(sys.argv[1], str(os.getpid())), 'w').close(); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code, marks], start_new_session=session)
if "die" in sys.argv:
    print("dying", flush=True)
    sys.exit(int(os.environ["STATUS"]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(os.environ.get("HEALTH", "200")))
        self.end_headers()
    def log_message(self, *_): pass
print("value", os.environ.get("VALUE"), flush=True)
port = sys.argv[sys.argv.index("--port") + 1] if "--port" in sys.argv else os.environ["SGLANG_PORT"]
http.server.HTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


#: Where it would listen is told by the real sglang-serve.
PROGRAM = """\
#!/bin/sh
if [ "$1" = --dry-run ]; then exec "{python}" -m composer.runtime.serve.cli "$@"; fi
exec "{python}" "{root}/server.py" "$@"
"""


CLI = "import sys; from composer.runtime.service.cli import run; sys.exit(run(None, 'compose-service', None))"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Host:
    """A home folder, a bundle in it, and what runs `compose-service` there."""

    def __init__(self, root: Path) -> None:
        self.root, self.marks = root, root / "marks"
        self.prefix = root / "my bundle%n"
        (self.prefix / "bin").mkdir(parents=True)
        self.marks.mkdir()
        (root / "server.py").write_text(SERVER)
        for name in ("sglang-serve", "compose-service"):
            program = self.prefix / "bin" / name
            program.write_text(PROGRAM.format(python=sys.executable, root=root))
            program.chmod(0o755)
        self.port = free_port()
        self.env = {
            "PATH": os.environ["PATH"], "HOME": str(root), "PYTHONPATH": str(ROOT), "MARKS": str(self.marks),
        }  # fmt: skip

    def service(self, *words: str, check: int | None = 0, **variables: str) -> str:
        command = [sys.executable, "-c", CLI, "--prefix", str(self.prefix), *words]
        env = {**self.env, **variables}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)
        assert check in (None, done.returncode), done.stderr + done.stdout
        return done.stdout + done.stderr

    def install(self, *arguments: str, **variables: str) -> None:
        pairs = {"SGLANG_PORT": str(self.port), **variables}
        words = [word for name, value in pairs.items() for word in ("--set", f"{name}={value}")]
        self.service("--plain", "install", "--stop-timeout", "1", *words, "--", *arguments)
        self.change_plan(settle=0.1)

    def change_plan(self, **changes: float) -> None:
        plan = json.loads((self.folder / "service.json").read_text())
        plan["plan"] |= changes
        (self.folder / "service.json").write_text(json.dumps(plan))

    def status(self) -> tuple[dict, int]:
        code = "import sys; from composer.runtime.service.cli import run; sys.exit(run(None, 'x', '/'))"
        done = subprocess.run([sys.executable, "-c", code, "status", "--json"], env=self.env, capture_output=True,
                              text=True, check=False)  # fmt: skip
        return json.loads(done.stdout), done.returncode

    def state(self) -> dict:
        """What the supervisor wrote, without another process."""
        return supervisor.read_state(str(self.folder)) or {"state": "stopped"}

    @property
    def folder(self) -> Path:
        return self.root / ".local/state/compose/sglang"

    def pids(self) -> set[int]:
        """Every process that the server was, and its children."""
        return {int(path.name) for path in self.marks.iterdir()}

    def living(self) -> set[int]:
        return {pid for pid in self.pids() if supervisor.identify(pid)}

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    yield made
    made.service("stop", check=None)
    state = supervisor.read_state(str(made.folder))
    for who in supervisor.marked(state["mark"]) if state else []:
        supervisor.send(who, signal.SIGKILL)


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.03)
    return found


def test_the_life_of_a_service(host):
    assert host.status()[1] == 4
    host.install(VALUE='$(touch x) "quoted" `b` 漢')
    assert host.status()[0]["state"] == "stopped"
    assert host.status()[1] == 3
    host.service("start")
    host.service("--name", "sglang", "wait", "--timeout", "8")
    facts, code = host.status()
    assert (facts["state"], facts["health"], code) == ("running", "healthy", 0)
    assert facts["address"] == f"http://127.0.0.1:{host.port}"
    assert 'value $(touch x) "quoted" `b` 漢' in host.service("logs")
    assert "runs already" in host.service("start", check=1)
    first = facts["pid"]
    host.service("restart")
    assert until(lambda: host.state().get("program"))["pid"] != first
    host.service("stop")
    assert host.status()[1] == 3
    host.service("stop")
    host.service("uninstall")
    assert host.status()[1] == 4
    assert (host.root / ".config/compose/sglang.env").stat().st_mode & 0o777 == 0o600


def test_it_outlives_the_terminal_and_is_nobodys_child(host):
    host.install()
    host.service("start")
    state = supervisor.read_state(str(host.folder))
    pid = state["supervisor"]["pid"]
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    assert int(fields[3]) == pid  # a session of its own
    assert fields[4] == "0"  # and no terminal
    os.kill(pid, signal.SIGHUP)
    time.sleep(0.2)
    assert supervisor.lives(supervisor.identity_in(state, "supervisor"))


def test_a_stop_ends_children_that_ignore_it_and_those_that_left(host):
    host.install("stubborn", "fork")
    host.service("start")
    until(lambda: len(host.living()) == 3)
    started = time.monotonic()
    host.service("stop")
    assert 1 <= time.monotonic() - started < 5
    assert not host.living()
    assert "the grace time is over: SIGKILL" in host.log()


def test_children_end_with_a_server_that_dies(host):
    host.install("fork")
    host.service("start")
    until(lambda: len(host.living()) == 3)
    old = host.living()
    os.kill(host.state()["program"]["pid"], signal.SIGKILL)
    until(lambda: not old & host.living() and len(host.living()) == 3)
    assert host.status()[0]["failures"] == 1
    assert "killed by SIGKILL" in host.log()


@pytest.mark.parametrize(("status", "starts"), [("2", 1), ("12", 1), ("0", 1)])
def test_an_end_that_no_start_can_change_is_final(host, status, starts):
    host.install("die", STATUS=status)
    host.service("start", check=None)
    until(lambda: host.state()["state"] in ("failed", "stopped"))
    assert host.log().count("dying") == starts
    assert host.status()[1] == (3 if status == "0" else 1)


def test_a_start_tells_how_it_began(host):
    host.install("die", STATUS="2")
    host.change_plan(settle=20)
    for action in ("start", "restart"):
        assert "sglang has ended at once: exit status 2\n  fix: See `compose-service logs`" in host.service(
            action, check=1
        )
    host.install("die", STATUS="7")
    host.change_plan(settle=20, first=60)
    assert host.service("restart") == "sglang: waiting, failures: 1, last end: exit status 7\n"
    host.service("stop")
    host.install()
    host.service("uninstall")
    host.install()
    assert host.service("start").startswith("sglang: running, process ")


def test_starts_again_with_growing_pauses_and_then_gives_up(host):
    host.install("die", STATUS="7")
    host.change_plan(first=0.1, failures=4)
    host.service("start")
    until(lambda: host.state()["state"] == "failed")
    assert host.log().count("dying") == 4
    pauses = [line.split()[-2] for line in host.log().splitlines() if "starting again" in line]
    assert pauses == ["0.1", "0.2", "0.4"]
    facts, code = host.status()
    assert (facts["why"], code) == ("exit status 7", 1)
    host.service("start")
    until(lambda: host.log().count("dying") == 8)


def test_running_but_not_healthy_is_told_apart(host):
    host.install(HEALTH="503")
    host.service("start")
    until(lambda: host.status()[0]["health"] == "not ready")
    assert host.status()[1] == 150
    assert "no healthy server" in host.service("--name", "sglang", "wait", "--timeout", "0.2", check=1)


def test_what_a_killed_supervisor_left_is_found_and_ended(host):
    host.install("stubborn", "fork")
    host.service("start")
    until(lambda: len(host.living()) == 3)
    os.kill(supervisor.read_state(str(host.folder))["supervisor"]["pid"], signal.SIGKILL)
    facts, code = host.status()
    assert (facts["state"], facts["why"], code) == ("failed", "its supervisor was killed", 1)
    assert "runs already" in host.service("start", check=1)
    host.service("stop")
    assert not host.living()
    host.service("start")
    until(lambda: host.state()["state"] == "running")


def test_a_process_with_a_number_that_was_used_before_is_not_ended(host):
    host.install()
    host.service("start")
    until(lambda: host.living())
    state = supervisor.read_state(str(host.folder))
    host.service("stop")
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        for role in ("supervisor", "program"):
            state[role]["pid"] = stranger.pid
        (host.folder / "state.json").write_text(json.dumps(state))
        assert host.status()[0]["pid"] is None
        host.service("stop")
        time.sleep(0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_only_one_supervisor_to_a_folder(host):
    host.install()
    host.service("start")
    command = [sys.executable, "-I", supervisor.__file__, str(host.folder)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    assert (second.returncode, second.stdout) == (1, "it is supervised already\n")
    assert host.state()["state"] == "running"


def test_two_services_have_their_own_settings(host):
    host.install(VALUE="one")
    host.service("--plain", "--name", "second", "install", "--set", f"SGLANG_PORT={host.port}", "--set", "VALUE=two")
    settings = host.root / ".config/compose"
    assert 'VALUE="one"' in (settings / "sglang.env").read_text()
    assert 'VALUE="two"' in (settings / "second.env").read_text()
    host.service("--name", "second", "uninstall")
    assert host.status()[0]["state"] == "stopped"


def test_installing_again_keeps_settings_made_by_hand(host):
    host.install()
    settings = host.root / ".config/compose/sglang.env"
    settings.write_text(settings.read_text() + "# mine\nSGLANG_MODEL=/srv/m\n")
    host.install(VALUE="new")
    text = settings.read_text()
    assert "# mine\nSGLANG_MODEL=/srv/m\n" in text
    assert 'VALUE="new"' in text


@pytest.mark.parametrize(("words", "status", "text"), [
    (["--plain", "install", "--program", "/none"], 1, "/none is no program"),
    (["--plain", "install", "--program", "none"], 2, "--program is no absolute path"),
    (["--plain", "install", "--run-as", "x"], 1, "without systemd"),
    (["--plain", "install", "--set", "x"], 2, "NAME=VALUE"),
    (["--plain", "install", "--set", "a b=x"], 2, "--set: a b='x' cannot be a line of a settings file\n  fix: A"),
    (["--plain", "install", "--set", "SGLANG_PORT=x"], 2, "--set SGLANG_PORT: 'x' is no port"),
    (["--plain", "install", "--set", "SGLANG_PREFLIGHT=perhaps"], 2, "is neither yes nor no\n  fix: Use 1"),
    (["--name", "../x", "status"], 2, "cannot be the name"),
    (["--plain", "--prefix", "/none", "install"], 1, "this bundle has no sglang-serve: name the server with --program"),
    (["start"], 1, "no service sglang is installed"),
])  # fmt: skip
def test_faults_are_told_in_words(host, words, status, text):
    told = host.service(*words, check=status)
    assert text in told
    assert not (host.root / ".config").exists()
    assert "Traceback" not in told


@pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="would install a service on this host")
@pytest.mark.parametrize("scope", ["--system", "--user"])
def test_nothing_is_written_for_a_systemd_that_does_not_run(host, scope):
    assert "no systemd runs here" in host.service(scope, "--name", "compose-test", "install", check=1)
    assert not Path("/etc/systemd/system/compose-test.service").exists()
    assert not (host.root / ".config").exists()


def test_limits_are_raised_as_far_as_allowed(host):
    host.install()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        host.service("start")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    program = until(lambda: host.state().get("program"))
    soft, hard = resource.prlimit(program["pid"], resource.RLIMIT_NOFILE)
    assert soft == min(hard, 1 << 20) > 256
    ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{program['pid']}/status").read_text())[1]
    assert not int(ignored, 16) & (1 << (signal.SIGHUP - 1))


def test_the_tool_calls_the_same(host):
    words = ["--prefix", str(host.prefix), "--name", "other", "status", "--json"]
    done = subprocess.run([sys.executable, "-c", "from composer.cli.service import service; service()", *words],
                          env=host.env, capture_output=True, text=True, check=False)  # fmt: skip
    assert (json.loads(done.stdout), done.returncode) == ({"name": "other", "state": "not installed"}, 4)
    asked = subprocess.run([sys.executable, "-c", "from composer.cli.service import service; service()", "--help"],
                           env=host.env, capture_output=True, text=True, check=False)  # fmt: skip
    assert "usage: compose service" in asked.stdout


def test_a_dry_run_writes_nothing(host):
    before = sorted(host.root.rglob("*"))
    for scope in ("--system", "--user", "--plain"):
        assert str(host.prefix / "bin" / "sglang-serve").replace(
            "%", "%%" if scope != "--plain" else "%"
        ) in host.service(scope, "install", "--dry-run")
    assert sorted(host.root.rglob("*")) == before


def test_followed_logs_go_on_in_the_next_file(host):
    host.install()
    log = host.folder / "log"
    log.write_text("".join(f"line {number}\n" for number in range(300)))
    code = "import sys; from composer.runtime.service.cli import run; sys.exit(run(None, 'x', '/'))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, "logs", "-f", "-n", "2"], env=host.env, stdout=subprocess.PIPE
    )
    with contextlib.ExitStack() as stack:
        stack.callback(child.wait)
        stack.callback(child.kill)
        assert [child.stdout.readline() for _ in range(2)] == [b"line 298\n", b"line 299\n"]
        time.sleep(0.3)
        written = supervisor.Log(str(log), 4096, 2)
        for number in range(300, 900):
            written.write(f"line {number}\n".encode())
            time.sleep(0.001)
        assert [child.stdout.readline() for _ in range(600)] == [
            f"line {number}\n".encode() for number in range(300, 900)
        ]


def test_logs_end_quietly_with_their_reader_and_with_an_interruption(host):
    host.install()
    (host.folder / "log").write_text("line\n" * 100_000)
    code = "import sys; from composer.runtime.service.cli import run; sys.exit(run(None, 'x', '/'))"
    command = [sys.executable, "-c", code, "logs", "-n", "90000"]
    child = subprocess.Popen(command, env=host.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 0)
    child = subprocess.Popen([*command, "-f"], env=host.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(90_000):
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert (child.communicate()[1], child.returncode) == (b"", 130)


def test_a_log_keeps_its_limits_and_its_lines(tmp_path):
    log = supervisor.Log(str(tmp_path / "log"), 100, 2)
    written = b"".join(f"{number:09d}\n".encode() for number in range(100))
    for start in range(0, len(written), 7):
        log.write(written[start : start + 7])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log", "log.1", "log.2"]
    texts = [(tmp_path / name).read_bytes() for name in ("log.2", "log.1", "log")]
    lines = b"".join(texts).splitlines()
    assert lines == [f"{number:09d}".encode() for number in range(100 - len(lines), 100)]
    assert all(len(text) <= 117 and text.endswith(b"\n") for text in texts)


def test_a_line_without_end_does_not_fill_the_disk(tmp_path):
    log = supervisor.Log(str(tmp_path / "log"), 100, 1)
    for _ in range(1000):
        log.write(b"xxxxxxx")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 500


def test_a_wait_ends_with_the_main_process_of_its_unit(host):
    main = subprocess.Popen(["sleep", "1"])
    started = time.monotonic()
    variables = {"MAINPID": str(main.pid), "SGLANG_PORT": str(host.port)}
    assert "the server has ended" in host.service("wait", "--timeout", "20", check=1, **variables)
    assert 1 <= time.monotonic() - started < 8
    main.wait()
    assert "the server has ended" in host.service("wait", "--timeout", "20", check=1, **variables)


def test_a_wait_goes_on_while_the_main_process_lives(host):
    told = host.service("wait", "--timeout", "0.5", check=1, MAINPID=str(os.getpid()), SGLANG_PORT=str(host.port))
    assert "no healthy server" in told


def test_a_port_of_its_arguments_is_found(host):
    other, words = str(free_port()), ("--preflight", "--", "--port")
    host.install(*words, other)
    host.service("start")
    host.service("--name", "sglang", "wait", "--timeout", "8")
    assert host.status()[0]["address"] == f"http://127.0.0.1:{other}"
    command = [str(host.prefix / "bin/sglang-serve"), *words, other]
    host.service("wait", "--timeout", "8", "--", *command, SGLANG_PORT=str(host.port), SGLANG_PREFLIGHT="1")


def test_a_port_of_further_flags_is_found(host):
    other = free_port()
    host.install(SGLANG_EXTRA_ARGS=f"--host 127.0.0.2 --port {other}", SGLANG_MODEL="none/such", HF_HUB_OFFLINE="1")
    host.service("start")
    until(lambda: host.state().get("program"))
    assert host.status()[0]["address"] == f"http://127.0.0.2:{other}"


#: Becomes nobody's, and notes who is asked where it would listen, and with what of the environment.
NOSY = """\
#!/bin/sh
if [ "$1" != --dry-run ]; then exec setpriv --reuid=65534 --regid=65534 --groups=65533 sleep 600; fi
echo "$(id -u) $(id -G) ${{SECRET-none}} ${{HOME-none}}" >> "{marks}/asked"
echo '{{"port": {{"host": "127.0.0.2", "port": {port}}}}}'
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_root_asks_another_users_service_as_that_user():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is root's alone
        host = Host(Path(folder))
        Path(folder).chmod(0o755)
        host.marks.chmod(0o777)
        (host.prefix / "bin/sglang-serve").write_text(NOSY.format(marks=host.marks, port=host.port))
        host.install()
        host.service("start")
        try:
            until(lambda: credentials(host.status()[0]["pid"] or 1).uid)
            (host.marks / "asked").unlink(missing_ok=True)
            host.env["SECRET"] = "of root"
            assert host.status()[0]["address"] == f"http://127.0.0.2:{host.port}"
            host.service("--name", "sglang", "wait", "--timeout", "0", check=1)
            assert (host.marks / "asked").read_text() == "65534 65534 65533 none none\n" * 2
        finally:
            host.service("stop")


@pytest.mark.skipif(os.geteuid() != 0, reason="of root")
@pytest.mark.parametrize("pid", [None, 1 << 30])
def test_root_does_not_run_what_is_of_an_unknown_user(host, pid):
    """A service of the system that does not run, or no longer."""
    program = host.prefix / "bin/sglang-serve"
    program.write_text(NOSY.format(marks=host.marks, port=host.port))
    found = Places(units=str(host.root), settings=str(host.root), state="")
    made = Service(name="sglang", prefix=str(host.prefix), program=str(program))
    (host.root / "sglang.service").write_text(unit(made, "sglang.env", user=False, version=250))
    (host.root / "sglang.env").write_text(f"SGLANG_PORT={host.port}\n")
    keeper = Systemd(SYSTEM, found)
    assert keeper.command("sglang") == [str(program)]
    assert cli._address(keeper, "sglang", pid) == ("127.0.0.1", host.port)
    assert not list(host.marks.iterdir())


def test_the_callers_settings_are_not_the_services(host):
    host.install()
    settings = host.root / ".config/compose/sglang.env"
    assert "SGLANG_DTYPE" not in settings.read_text()
    host.service("start", SGLANG_DTYPE="half", SGLANG_ANY="1", OTHER="1")
    pid = until(lambda: host.state().get("program"))["pid"]
    names = {pair.partition("=")[0] for pair in Path(f"/proc/{pid}/environ").read_text().split("\0")}
    assert {"SGLANG_PORT", "OTHER"} <= names
    assert not {"SGLANG_DTYPE", "SGLANG_ANY"} & names
    host.env["SGLANG_HOST"] = "192.0.2.1"
    assert host.status()[0]["address"] == f"http://127.0.0.1:{host.port}"


def test_the_supervisor_writes_no_bytecode(host):
    host.install()
    host.service("start")
    pid = supervisor.read_state(str(host.folder))["supervisor"]["pid"]
    assert "-B" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def test_a_damaged_plan_does_not_keep_it_from_being_stopped(host):
    host.install()
    host.service("start")
    until(lambda: host.living())
    (host.folder / "service.json").write_text("{")
    assert host.status()[0]["state"] == "running"
    host.service("stop")
    assert not host.living()


@pytest.mark.parametrize("count", ["-1", "x", "²"])
def test_a_number_of_lines_is_one(host, count):
    host.install()
    assert "is no number of lines" in host.service("logs", "-n", count, check=2)
    host.service("logs", "-n", "9" * 30)


@pytest.mark.parametrize("words", [
    ["wait", "--timeout", "nan"], ["wait", "--timeout", "-1"], ["wait", "--timeout", "x"],
    ["install", "--start-timeout", "0"], ["install", "--stop-timeout", "-5"], ["install", "--stop-timeout", "1.5"],
])  # fmt: skip
def test_a_number_of_seconds_is_one(host, words):
    assert f"'{words[-1]}' is no number of seconds" in host.service("--plain", *words, check=2)

"""The text of units, judged by systemd's own tools."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from composer.runtime.service.spec import PLAIN, Service, ServiceError, check_name, check_path, places, stable_prefix
from composer.runtime.service.unit import MARK, command, program, unit, word

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="needs systemd-analyze")
#: 0 is a service that can do nothing, 10 one that may do all.
EXPOSURE = 2.5


@pytest.fixture
def bundle(tmp_path):
    """A bundle in a folder with everything that a unit could misread."""
    prefix = tmp_path / "a b%n$HOME é"
    (prefix / "bin").mkdir(parents=True)
    for name in ("sglang-serve", "compose-service"):
        (prefix / "bin" / name).write_text("#!/bin/sh\n")
        (prefix / "bin" / name).chmod(0o755)
    return Service(name="sglang", prefix=str(prefix), program=str(prefix / "bin" / "sglang-serve"))


def analyze(tmp_path, text, *words):
    path = tmp_path / "sglang.service"
    path.write_text(text)
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)}
    return subprocess.run([ANALYZE, *words, path], env=env, capture_output=True, text=True, check=False)


@needs_systemd
@pytest.mark.parametrize("user", [False, True], ids=["system", "user"])
def test_systemd_accepts_the_unit_and_finds_the_programs(tmp_path, bundle, user):
    service = replace(bundle, arguments=("--x", 'a "q" $b %c \\d é'), writable=("/srv/my models",))
    text = unit(service, "/etc/compose/sglang.env", user=user, version=252, modprobe=shutil.which("true"))
    verified = analyze(tmp_path, text, "verify", *(["--user"] if user else []))
    assert (verified.returncode, verified.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("broken", [
    ("%%", "%"), ("KillMode=mixed", "KillMode=mix"), ("[Service]", "[Servic]"), ("bin/sglang-serve", "bin/other"),
    ("AF_IB", "AF_NONE"), ("=~@clock", "=~@none"),
])  # fmt: skip
def test_systemd_would_tell_of_a_broken_unit(tmp_path, bundle, broken):
    text = unit(bundle, "/etc/compose/sglang.env", user=False, version=252)
    assert broken[0] in text
    verified = analyze(tmp_path, text.replace(*broken), "verify")
    assert verified.returncode or verified.stderr


@needs_systemd
def test_the_sandbox_is_as_tight_as_cuda_allows(tmp_path, bundle):
    text = unit(bundle, "/etc/compose/sglang.env", user=False, version=252)
    done = analyze(tmp_path, text, "security", "--offline=true", "--json=short")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    left = {name for name, row in rows.items() if not row["set"]}
    assert not any(name.startswith(("CapabilityBoundingSet", "Restrict")) and "AF_" not in name and "sockets" not in
                   rows[name]["description"] for name in left)  # fmt: skip
    assert {"PrivateDevices=", "MemoryDenyWriteExecute="} <= left
    overall = analyze(tmp_path, text, "security", "--offline=true", "--no-pager").stdout
    found = re.search(r"exposure level for \S+ ([0-9.]+)", overall)
    assert found
    assert float(found[1]) <= EXPOSURE


def test_what_a_server_with_gpus_needs(bundle):
    lines = unit(bundle, "/etc/compose/a%b.env", user=False, version=254).splitlines()
    assert lines[0] == MARK
    assert {
        "LimitMEMLOCK=infinity", "LimitSTACK=64M", "LimitNOFILE=1048576", "Restart=on-failure", "KillMode=mixed",
        "RestartSteps=5", "TimeoutStartSec=1800", "TimeoutStopSec=120", "DeviceAllow=char-nvidia* rw",
        "EnvironmentFile=/etc/compose/a%%b.env", "RestartPreventExitStatus=2 6 10 11 12 13 14 15 16", "DynamicUser=yes",
    } <= set(lines)  # fmt: skip
    # The device class must exist before the service is let near it.
    assert any(line.startswith("After=") and "modprobe@nvidia_uvm.service" in line for line in lines)
    assert not any(line.startswith(("PrivateDevices", "MemoryDenyWriteExecute")) for line in lines)
    assert not any("RestartSteps" in line for line in unit(bundle, "/e", user=False, version=253).splitlines())


def test_five_slow_failures_count_as_five(bundle):
    text = unit(replace(bundle, start=3600), "/e", user=False, version=252)
    assert int(re.search(r"StartLimitIntervalSec=(\d+)", text)[1]) > 5 * 3600


@pytest.mark.parametrize("character", ["'", '"', "\\"])
def test_a_path_that_systemd_runs_nothing_from_is_refused(bundle, character):
    service = replace(bundle, program=f"/srv/a{character}b/serve")
    with pytest.raises(ServiceError, match="systemd runs no program"):
        unit(service, "/e", user=False, version=252)


def test_a_named_user_takes_the_place_of_a_made_one(bundle):
    text = unit(replace(bundle, run_as="llm"), "/e", user=False, version=252)
    assert "User=llm\n" in text
    assert "DynamicUser" not in text


def test_quoting_for_command_lines():
    assert program('a b%"\\$x') == '"a b%%\\"\\\\$x"'
    assert word("$x") == '"$$x"'


def test_a_link_named_current_is_kept_for_upgrades(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to("one")
    assert stable_prefix(str(tmp_path / "one")) == str(tmp_path / "current")
    assert stable_prefix(str(tmp_path / "current")) == str(tmp_path / "current")
    assert stable_prefix(str(tmp_path / "two")) == str(tmp_path / "two")


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a b", "a@b", "%n", "é", "x" * 65, ".."])
def test_names_that_are_no_file_or_unit_names(name):
    with pytest.raises(ServiceError, match="cannot be the name"):
        check_name(name)


@pytest.mark.parametrize("path", ["relative", "/a\nb", "", "/a\x1b"])
def test_paths_that_no_line_can_hold(path):
    with pytest.raises(ServiceError, match="no absolute path"):
        check_path(path, "--prefix")


def test_the_command_is_read_from_a_unit_again(bundle):
    service = replace(bundle, arguments=("--", "--x", '{"a": "$b %c $$ %%"}', "\\d é'", ""))
    text = unit(service, "/e", user=False, version=252)
    assert command(text) == [service.program, *service.arguments]
    assert command("[Unit]\n") == command('ExecStart="/a') == []


def test_the_wait_of_a_unit_is_told_the_command(bundle):
    text = unit(replace(bundle, arguments=("--profile", "p")), "/e", user=False, version=252)
    (post,) = [line for line in text.splitlines() if line.startswith("ExecStartPost=")]
    assert post.endswith(f'/bin/compose-service" wait -- {word(bundle.program)} "--profile" "p"')


def test_the_place_of_a_user_without_home_outlives_an_upgrade():
    found = {places(PLAIN, {"HOME": f"/c/{key}/home", "COMPOSE_CACHE": f"/c/{key}"}) for key in ("one", "two")}
    assert {(one.settings, one.state) for one in found} == {("/c/home/.config/compose", "/c/home/.local/state/compose")}
    assert places(PLAIN, {"HOME": "/home/ada", "COMPOSE_CACHE": "/c/one"}).settings == "/home/ada/.config/compose"

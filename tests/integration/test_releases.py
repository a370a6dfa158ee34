"""Unpack bundles in parallel, whole or not at all; several side by side; switch, roll back and prune."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from composer.cli import unpack as commands
from composer.errors import ComposerError
from composer.events import Event
from composer.model.layer import Entry
from composer.model.manifest import Floor
from composer.steps import layer as layers
from composer.steps.bundle import open_bundle
from composer.steps.unpack import unpack
from tests.bundles import Files, make_bundle

_randomness = random.Random(0)
BIG = _randomness.randbytes(700_001)
FILES: dict[str, Files] = {
    "first": {
        "bin/program": b"#!/bin/sh\nexec sleep 60\n", "lib/empty": b"", "lib/exact": bytes(512), "lib/big": BIG,
        "lib/shared": b"the same", f"lib/{'long/' * 30}name": b"deep", "lib/\u00fcml\u00e4ut": b"unicode",
        "lib/link": "big", "lib/dir-link": "long", "lib/tail": _randomness.randbytes(70_000),
    },
    "second": {"lib/shared": b"the same", "share/blob": _randomness.randbytes(300_000), "share/after": b"x"},
    "third": {f"many/{index // 50}/{index}": b"%d" % index * index for index in range(400)},
    "none": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that small files fill, so that files begin and end in all sorts of places of them."""
    monkeypatch.setattr(layers, "FRAME", 64 << 10)
    monkeypatch.setattr(layers, "BLOB", 200 << 10)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "stack.tar.zst", FILES, store=tmp_path / "store")
    return tmp_path / "stack.tar.zst"


def run(name: str, *words: object) -> Result:
    return CliRunner().invoke(getattr(commands, name), [str(word) for word in words])


def done(result: Result) -> str:
    assert result.exception is None, result.exception
    return result.stdout


def refused(result: Result, code: int, *words: str) -> None:
    assert isinstance(result.exception, ComposerError), (result.exception, result.output)
    assert result.exception.exit_code == code
    for word in words:
        assert word in str(result.exception)


def listing(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Mode and content of everything but folders."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if path.is_symlink():
            found[str(path.relative_to(folder))] = (0, str(path.readlink()))
        elif not path.is_dir():
            found[str(path.relative_to(folder))] = (stat.S_IMODE(mode), path.read_bytes())
    return found


def hidden(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.name.startswith(".") and one.name != ".lock"]


@pytest.mark.parametrize("jobs", [1, 5])
def test_the_same_as_tar(bundle: Path, tmp_path: Path, jobs: int) -> None:
    events: list[Event] = []
    old = os.umask(0o077)
    try:
        assert unpack(open_bundle(bundle), tmp_path / "ours", jobs=jobs, listener=events.append)
    finally:
        os.umask(old)
    (tmp_path / "tars").mkdir()
    subprocess.run(["tar", "--zstd", "-xf", bundle, "-C", tmp_path / "tars"], check=True)
    assert listing(tmp_path / "ours") == listing(tmp_path / "tars")
    assert len(listing(tmp_path / "ours")) == 8 + 2 + 2 + 400 + 3
    assert events[-1].finished
    assert events[-2].done == events[-2].total > 0
    assert {stat.S_IMODE(one.stat().st_mode) for one in (tmp_path / "ours").rglob("*") if one.is_dir()} == {0o755}
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o755
    assert hidden(tmp_path) == []


def test_beside_the_bundle_by_its_name(bundle: Path, tmp_path: Path) -> None:
    assert done(run("unpack", bundle)) == f"unpacked into {tmp_path / 'stack'}\n"
    assert done(run("unpack", bundle)) == f"already unpacked in {tmp_path / 'stack'}\n"
    make_bundle(bundle, {"other": {"a": b"another"}}, store=tmp_path / "store")
    refused(run("unpack", bundle), 10, "exists and is not empty")
    odd = bundle.rename(tmp_path / "bundle.bin")
    refused(run("unpack", odd), 2, "Give the folder")
    refused(run("unpack", odd, tmp_path / "x", "--releases", tmp_path / "y"), 2, "contradict")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("parts", [7])
def test_no_damage_goes_unnoticed(bundle: Path, tmp_path: Path, parts: int) -> None:
    good = bundle.read_bytes()
    end = sum(layer.compressed for layer in open_bundle(bundle).manifest.layers)
    for place in range(end // (2 * parts), end, end // parts):
        bundle.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        refused(run("unpack", bundle, tmp_path / "out"), 9)
    bundle.write_bytes(good[:-1])
    refused(run("unpack", bundle, tmp_path / "out"), 9)
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == []


def lying(**changes: object) -> Callable[[Entry], Entry]:
    """The entry lib/tail is described in another way."""
    return lambda entry: msgspec.structs.replace(entry, **changes) if entry.path == "lib/tail" else entry


LIES = {
    "other name": lying(path="lib/liar"),
    "other mode": lying(mode=0o755),
    "other size": lying(size=69_999),
    "much shorter": lying(size=1),
    "a link": lying(target="big", size=0),
    "up": lying(path="../evil"),
    "absolute": lying(path="/tmp/evil"),
    "dot": lying(path="lib/./tail"),
    "set-id": lying(mode=0o4755),
    "in a file": lying(path="lib/big/tail"),
    "in a link": lying(path="lib/dir-link/tail"),
    "twice": lying(path="lib/big"),
    "link up": lying(target="../../evil", size=0),
    "link to the root": lying(target="/etc", size=0),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies(tmp_path: Path, lie: str) -> None:
    make_bundle(tmp_path / "stack.tar.zst", FILES, store=tmp_path / "store", lie=LIES[lie])
    refused(run("unpack", tmp_path / "stack.tar.zst", tmp_path / "in/out"), 9)
    assert hidden(tmp_path / "in") == [] if (tmp_path / "in").exists() else True
    assert not (tmp_path / "in/out").exists()
    assert not (tmp_path / "evil").exists()


def test_floors_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_bundle(tmp_path / "new.tar.zst", FILES, store=tmp_path / "store",
                floors={"kernel": Floor(version="99.0", because="lib/big")})  # fmt: skip
    refused(run("unpack", tmp_path / "new.tar.zst", "--releases", tmp_path / "root"), 10, "needs Linux 99.0")
    refused(run("unpack", tmp_path / "new.tar.zst"), 10, "needs Linux 99.0")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["new.tar.zst", "new.tar.zst.sha256", "store"]
    done(run("unpack", tmp_path / "new.tar.zst", "--any-host"))


def test_the_hosts_own_cxx_runtime_is_asked(tmp_path: Path) -> None:
    for version, code in (("3.4.1", 0), ("3.4.999", 10)):
        make_bundle(tmp_path / f"{version}.tar.zst", FILES, store=tmp_path / "store",
                    floors={"libstdc++ GLIBCXX": Floor(version=version, because="lib/big")})  # fmt: skip
        result = run("unpack", tmp_path / f"{version}.tar.zst")
        if code and shutil.which("ldconfig", path="/sbin:/usr/sbin"):
            refused(result, code, "this host has 3.4.")
        else:
            done(result)


@pytest.fixture
def releases(tmp_path: Path) -> list[Path]:
    """Three bundles with the same name."""
    found = []
    for index in range(3):
        found.append(tmp_path / str(index) / "stack.tar.zst")
        found[-1].parent.mkdir()
        files = {**FILES, "own": {"share/number": b"%d" % index}}
        make_bundle(found[-1], files, store=tmp_path / "store")
    return found


def number(root: Path, link: str = "current") -> int:
    return int((root / link / "share/number").read_text())


def present(root: Path) -> set[int]:
    return {int((one / "share/number").read_text()) for one in (root / "releases").iterdir()}


def test_side_by_side(releases: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "opt dir"
    first = releases[0]
    assert f"{root / 'current'} leads to it" in done(run("unpack", first, "--releases", root))
    refused(run("rollback", root), 10, "no previous release")
    for bundle in releases[1:]:
        done(run("unpack", bundle, "--releases", root))
    assert (number(root), number(root, "previous"), present(root)) == (2, 1, {0, 1, 2})
    assert not (root / "current").readlink().is_absolute()
    assert "leads to stack-" in done(run("rollback", root))
    assert (number(root), number(root, "previous")) == (1, 2)
    done(run("rollback", root))
    assert (number(root), number(root, "previous")) == (2, 1)
    oldest = next(one.name for one in (root / "releases").iterdir() if (one / "share/number").read_text() == "0")
    done(run("rollback", root, "--to", oldest))
    assert (number(root), number(root, "previous")) == (0, 2)
    refused(run("rollback", root, "--to", oldest), 10, "is the current release already")
    refused(run("rollback", root, "--to", "../.."), 10, "has no release", oldest)
    done(run("unpack", releases[1], "--releases", root))
    assert (number(root), number(root, "previous")) == (1, 0)
    root.rename(tmp_path / "moved")
    assert number(tmp_path / "moved") == 1


def test_prune(releases: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    refused(run("prune", root), 10, "holds no releases")
    for bundle in releases:
        done(run("unpack", bundle, "--releases", root))
    (root / "releases/mine").mkdir()
    done(run("rollback", root))
    assert "would remove stack-" in done(run("prune", root, "--keep", 2, "--dry-run"))
    assert len(list((root / "releases").iterdir())) == 4
    assert done(run("prune", root, "--keep", 2)).count("removed") == 1
    (root / "releases/mine").rmdir()
    assert present(root) == {1, 2}
    done(run("prune", root, "--keep", 1))
    assert (number(root), present(root)) == (1, {1})
    assert not os.path.lexists(root / "previous")
    assert "nothing to remove" in done(run("prune", root, "--keep", 1))
    refused(run("rollback", root), 10, "no previous release")


@pytest.fixture
def started() -> Iterator[Callable[..., None]]:
    """Start a process that stays until the end of the test."""
    processes = []

    def start(*words: object, **how: object) -> None:
        processes.append(subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, **how))
        processes[-1].stdout.readline()

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


_MAPPING = """
import mmap, sys, time
with open(sys.argv[1], "rb") as stream:
    held = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
"""
_SAY = "print('ready', flush=True); time.sleep(60)"


@pytest.mark.parametrize("way", ["working folder", "mapped file", "mapped by another path", "program"])
def test_what_a_process_uses_stays(releases: list[Path], tmp_path: Path, way: str,
                                   started: Callable[..., None]) -> None:  # fmt: skip
    root = tmp_path / "root"
    done(run("unpack", releases[0], "--releases", root))
    used = (root / "current").resolve()
    if way == "working folder":
        started(sys.executable, "-c", f"import time; {_SAY}", cwd=used / "lib")
    elif way == "mapped file":
        started(sys.executable, "-c", _MAPPING + _SAY, root / "current/lib/big")
    elif way == "mapped by another path":  # as in a container
        os.link(used / "lib/big", tmp_path / "elsewhere")
        started(sys.executable, "-c", _MAPPING + _SAY, tmp_path / "elsewhere")
    else:
        shutil.copy(shutil.which("tail") or "", used / "bin/tail")
        (tmp_path / "text").write_text("ready\n")
        started(used / "bin/tail", "-f", tmp_path / "text")
    for bundle in releases[1:]:
        done(run("unpack", bundle, "--releases", root))
    output = done(run("prune", root, "--keep", 1))
    assert f"kept {used.name}: used by process" in output
    assert present(root) == {0, 2}


def test_by_hand(releases: list[Path], tmp_path: Path) -> None:
    """What a host without `compose` does, and both understand each other."""
    root = tmp_path / "root"
    done(run("unpack", releases[0], "--releases", root))
    script = """
    set -e
    mkdir "$2/releases/.new"
    tar --zstd -xf "$1" -C "$2/releases/.new"
    name=by-hand-$(cut -c 1-12 "$2/releases/.new/share/compose/fingerprint")
    mv -T "$2/releases/.new" "$2/releases/$name"
    ln -sfn "$(readlink "$2/current")" "$2/.previous.new" && mv -T "$2/.previous.new" "$2/previous"
    ln -sfn "releases/$name" "$2/.current.new" && mv -T "$2/.current.new" "$2/current"
    """
    subprocess.run(["sh", "-c", script, "sh", releases[1], root], check=True)
    assert (number(root), number(root, "previous")) == (1, 0)
    done(run("rollback", root))
    assert (number(root), number(root, "previous")) == (0, 1)
    done(run("unpack", releases[2], "--releases", root))
    done(run("prune", root, "--keep", 2))
    assert present(root) == {0, 2}


_UNPACK = "from composer.cli.unpack import unpack; unpack()"


def test_killed_at_any_time(releases: list[Path], tmp_path: Path) -> None:
    """`current` always leads to a whole release, and the next run leaves nothing of the killed one."""
    root = tmp_path / "root"
    done(run("unpack", releases[0], "--releases", root))
    whole = listing((root / "current").resolve())
    seen = 0
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02):
        words = [sys.executable, "-c", _UNPACK, str(releases[1]), "--releases", str(root)]
        with subprocess.Popen(words) as process:
            while process.poll() is None and not hidden(root / "releases"):
                time.sleep(0.0005)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        seen += bool(hidden(root / "releases"))
        assert listing((root / "current").resolve()).keys() == whole.keys()
    assert seen
    done(run("unpack", releases[2], "--releases", root))
    assert number(root) == 2
    assert hidden(root) == hidden(root / "releases") == []


def test_two_at_once(releases: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "root"
    words = [[sys.executable, "-c", _UNPACK, str(one), "--releases", str(root)] for one in (*releases, releases[0])]
    for process in [subprocess.Popen(one, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for one in words]:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert present(root) == {0, 1, 2}
    assert number(root) != number(root, "previous")


def test_a_full_disk_is_told_before(bundle: Path, tmp_path: Path) -> None:
    """A bundle that says it needs more room than any disk has."""
    make_bundle(bundle, FILES, store=tmp_path / "store", lie=lying(size=1 << 60))
    refused(run("unpack", bundle), 10, "MiB are needed")
    assert not hidden(tmp_path)


def test_a_place_that_cannot_be_written(bundle: Path) -> None:
    refused(run("unpack", bundle, bundle / "below a file"), 10)
    refused(run("unpack", bundle, "--releases", bundle), 10)

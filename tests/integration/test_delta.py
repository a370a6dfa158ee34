"""Bundles are compared; a delta makes the new one of the old one, or nothing: by compose, and by the shell script."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from composer.cli import delta as commands
from composer.cli.diff import diff as diff_command
from composer.errors import ComposerError
from composer.events import Event, silent
from composer.model.delta import TRAILER, Delta, header_size, parse_header
from composer.model.manifest import Floor
from composer.steps import layer as layers
from composer.steps.bundle import open_bundle
from composer.steps.delta import apply_delta, apply_script, make_delta
from composer.steps.unpack import unpack
from tests.bundles import Files, make_bundle

#: Runs the shell script with these arguments.
Script = Callable[..., subprocess.CompletedProcess[str]]
_randomness = random.Random(0)
NOISE = [_randomness.randbytes(300_000) for _ in range(4)]
OLD: dict[str, Files] = {
    "first": {"lib/a": NOISE[0], "lib/only-old": b"x" * 100, "bin/run": b"#!/bin/sh\n"},
    "second": {"lib/b": NOISE[1] + b"the end"},
    "third": {"lib/c": NOISE[2]},
}
NEW: dict[str, Files] = {
    "third": OLD["third"], "second": {"lib/b": NOISE[1] + b"THE END"},
    "first": {"lib/a": NOISE[0], "lib/new": b"y" * 100, "bin/run": b"#!/bin/sh\n"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and frames that small files fill."""
    monkeypatch.setattr(layers, "BLOB", 300_000)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both bundles and the delta between them. Tests get copies."""
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "BLOB", 300_000)
        for name, files in (("old", OLD), ("new", NEW)):
            make_bundle(folder / f"{name}.tar.zst", files, store=folder / "store")
    make_delta(folder / "old.tar.zst", folder / "new.tar.zst", folder / "d.delta", listener=silent)
    return folder


@pytest.fixture
def old(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(originals / "old.tar.zst", tmp_path))


@pytest.fixture
def new(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(originals / "new.tar.zst", tmp_path))


@pytest.fixture
def delta(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(originals / "d.delta", tmp_path))


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A folder with the programs of busybox, if there is one."""
    folder = tmp_path_factory.mktemp("busybox")
    found = shutil.which("busybox")
    if not found or subprocess.run([found, "--install", "-s", folder], check=False).returncode:
        return None
    return folder


@pytest.fixture(params=["sh", "busybox"])
def script(request: pytest.FixtureRequest, tmp_path: Path, busybox: Path | None) -> Script:
    """Runs the shell script with a host's programs, or with nothing but busybox."""
    if request.param == "busybox" and busybox is None:
        pytest.skip("no busybox")
    path = tmp_path / "apply.sh"
    path.write_text(apply_script())
    folder = busybox if request.param == "busybox" else None
    shell = str(folder / "sh") if folder else "sh"
    environ = {"PATH": str(folder)} if folder else {"PATH": os.environ["PATH"]}

    def run(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([shell, path, *map(str, words)], env=environ, text=True, capture_output=True, check=False,
                              cwd=tmp_path, **more)  # fmt: skip

    return run


def run(command: object, *words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def done(result: Result) -> str:
    assert result.exception is None, result.exception
    return result.output


def refused(result: Result, code: int, *words: str) -> None:
    assert isinstance(result.exception, ComposerError), (result.exception, result.output)
    assert result.exception.exit_code == code
    for word in words:
        assert word in str(result.exception)


def header(delta: Path) -> Delta:
    data = delta.read_bytes()
    return parse_header(data[: header_size(data, "x")], len(data), "x")


def sealed(header: bytes, stored: bytes = b"") -> bytes:
    """A delta of these bytes, with the digest that they have."""
    return header + stored + hashlib.sha256(header + stored).hexdigest().encode() + b"\n"


def changed(delta: Path, old: str, new: str) -> None:
    """Replace text of the header, so that only its meaning is wrong."""
    data = delta.read_bytes()
    size = header_size(data, "x")
    first, _, body = data[:size].decode().partition("\n")
    assert old in body
    body = body.replace(old, new, 1)
    delta.write_bytes(sealed(f"{first.rpartition(' ')[0]} {len(body)}\n{body}".encode(), data[size:-TRAILER]))


def hidden(folder: Path) -> list[str]:
    return [one.name for one in folder.iterdir() if one.name.startswith(".") or ".part." in one.name]


# --- delta and apply --------------------------------------------------------------------------------------------------


def test_the_very_bytes_that_were_built(old: Path, new: Path, tmp_path: Path) -> None:
    told = done(run(commands.delta, old, new, "-o", tmp_path / "d.delta"))
    assert hashlib.sha256(new.read_bytes()).hexdigest() in told
    found = header(tmp_path / "d.delta")
    assert found.stored < 50_000, "the layers that did not change, and most of one that did, are copied"
    assert sum(part.offset is not None for part in found.parts) >= 3
    made = tmp_path / "elsewhere/made.tar.zst"
    assert found.new.sha256 in done(run(commands.apply, old, tmp_path / "d.delta", "-o", made))
    assert made.read_bytes() == new.read_bytes()
    subprocess.run(["sha256sum", "-c", "made.tar.zst.sha256"], cwd=made.parent, check=True)
    assert hidden(tmp_path) == hidden(made.parent) == []


def test_the_same_delta_again(delta: Path, old: Path, new: Path, tmp_path: Path) -> None:
    make_delta(old, new, tmp_path / "again.delta", listener=silent)
    assert (tmp_path / "again.delta").read_bytes() == delta.read_bytes()


def test_progress_ends_with_all(old: Path, new: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    make_delta(old, new, tmp_path / "d.delta", listener=events.append)
    apply_delta(old, tmp_path / "d.delta", tmp_path / "made", listener=events.append)
    last = {event.step: event for event in events if event.total}
    assert set(last) == {"delta", "store", "apply"}
    assert all(event.done == event.total for event in last.values())
    assert (last["store"].total, last["apply"].total) == ((tmp_path / "d.delta").stat().st_size, new.stat().st_size)
    assert [event.step for event in events if event.finished] == ["delta", "apply"]


def test_equal_bundles(old: Path, tmp_path: Path) -> None:
    make_delta(old, old, tmp_path / "d.delta", listener=silent)
    assert header(tmp_path / "d.delta").stored == 0
    apply_delta(old, tmp_path / "d.delta", tmp_path / "made", listener=silent)
    assert (tmp_path / "made").read_bytes() == old.read_bytes()


def test_bundles_with_nothing_in_common(old: Path, tmp_path: Path, script: Script) -> None:
    other = tmp_path / "other.tar.zst"
    make_bundle(other, {"other": {"share/d": NOISE[3]}}, store=tmp_path / "store")
    make_delta(old, other, tmp_path / "d.delta", listener=silent)
    found = header(tmp_path / "d.delta")
    assert found.stored > 0.9 * other.stat().st_size
    apply_delta(old, tmp_path / "d.delta", tmp_path / "made", listener=silent)
    assert not script(old, tmp_path / "d.delta", tmp_path / "made2").returncode
    assert (tmp_path / "made").read_bytes() == (tmp_path / "made2").read_bytes() == other.read_bytes()


def test_the_old_bundle_may_be_replaced_and_nothing_else_that_is_read(old: Path, new: Path, delta: Path) -> None:
    wanted = new.read_bytes()
    refused(run(commands.apply, old, delta, "-o", delta), 2, "overwritten")
    refused(run(commands.delta, old, new, "-o", new), 2, "overwritten")
    assert new.read_bytes() == wanted
    done(run(commands.apply, old, delta, "-o", old))
    assert old.read_bytes() == wanted


def test_a_manifest_that_lies_of_its_layers_misleads_nobody(old: Path, new: Path, tmp_path: Path) -> None:
    """Its digests are a hint: bytes are compared."""
    liar = bytearray(new.read_bytes())
    liar[liar.index(NOISE[2][1000:2000])] ^= 1
    new.write_bytes(liar)
    make_delta(old, new, tmp_path / "d.delta", listener=silent)
    apply_delta(old, tmp_path / "d.delta", tmp_path / "made", listener=silent)
    assert (tmp_path / "made").read_bytes() == liar


def test_folders_and_nothing(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    unpack(open_bundle(old), tmp_path / "tree", jobs=1, listener=silent)
    for words in ((tmp_path / "tree", new), (old, tmp_path / "tree")):
        refused(run(commands.delta, *words, "-o", tmp_path / "x"), 2, "is a folder", "cannot be made again")
    refused(run(commands.apply, tmp_path / "tree", delta, "-o", tmp_path / "x"), 2, "copy the whole new bundle")
    refused(run(commands.apply, tmp_path / "gone", delta, "-o", tmp_path / "x"), 10, "copy the whole new bundle")
    refused(run(commands.apply, old, tmp_path / "gone", "-o", tmp_path / "x"), 10, "gone")
    refused(run(commands.delta, delta, new, "-o", tmp_path / "x"), 9, "not a bundle")
    assert not (tmp_path / "x").exists()


def test_whose_fault_it_is(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    made, data = tmp_path / "made", bytearray(old.read_bytes())
    refused(run(commands.apply, new, delta, "-o", made), 9, "not the bundle that the delta starts from", "old, ")
    at = data.index(NOISE[0][1000:2000])
    data[at] ^= 1
    old.write_bytes(data)
    refused(run(commands.apply, old, delta, "-o", made), 9, f"{old}: is damaged")
    data[at] ^= 1
    old.write_bytes(data)
    sent = bytearray(delta.read_bytes())
    sent[-TRAILER - 10] ^= 1
    delta.write_bytes(sent)
    refused(run(commands.apply, old, delta, "-o", made), 9, f"{delta}: is damaged")
    sent[-TRAILER - 10] ^= 1
    delta.write_bytes(sent)
    changed(delta, header(delta).new.sha256, "0" * 64)
    refused(run(commands.apply, old, delta, "-o", made), 9, "does not make the bundle that it names")
    assert not made.exists()
    assert hidden(tmp_path) == []


def test_damage_where_nothing_is_copied_does_not_matter(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    data, copied = bytearray(old.read_bytes()), set()
    for part in header(delta).parts:
        copied |= set() if part.offset is None else set(range(part.offset, part.offset + part.size))
    data[next(at for at in range(len(data)) if at not in copied)] ^= 1
    old.write_bytes(data)
    apply_delta(old, delta, tmp_path / "made", listener=silent)
    assert (tmp_path / "made").read_bytes() == new.read_bytes()


def test_every_flipped_bit_and_every_cut_is_refused(old: Path, delta: Path, tmp_path: Path) -> None:
    good = delta.read_bytes()
    spots = [*range(0, header_size(good, "x"), 23), *range(header_size(good, "x"), len(good), 1801)]
    damaged = [good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :] for at in spots]
    damaged += [good[:at] for at in spots] + [good + b"\0", b"", b"\0" * 1000]
    for data in damaged:
        delta.write_bytes(data)
        with pytest.raises(ComposerError):
            apply_delta(old, delta, tmp_path / "made", listener=silent)
    assert not (tmp_path / "made").exists()
    assert hidden(tmp_path) == []


HOSTILE = [
    ("copy ", "copy 99999999999", "beyond|what the old bundle|list of parts"),
    ("copy ", "copy 9999999999999999999999", "list of parts|its parts"),
    ("store ", "store 0\nstore ", "its parts"),
    ("store ", "store 999999999999999\nstore ", "its parts|instead of"),
    ("new ", "new 9", "its parts"),
    (" old\n", " ../old\n", "header"),
    (" new\n", " $(touch${IFS}owned)\n", "header"),
    (" new\n", " \x1b[2J\n", "header"),
    ("copy ", "exec ", "parts"),
    ("old-end ", "old-end 1", "header|longer than|not the bundle"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "words"), HOSTILE)
def test_hostile_deltas(old: Path, delta: Path, tmp_path: Path, script: Script, before: str, after: str,
                        words: str) -> None:  # fmt: skip
    """Their digest is right: whoever made them meant it."""
    changed(delta, before, after)
    with pytest.raises(ComposerError, match=words) as caught:
        apply_delta(old, delta, tmp_path / "made", listener=silent)
    assert caught.value.exit_code == 9
    ran = script(old, delta, tmp_path / "made")
    assert ran.returncode == 9
    assert "error: " in ran.stderr
    assert "\x1b" not in ran.stderr
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "owned").exists()
    assert hidden(tmp_path) == []


def test_bytes_that_are_copied_twice_are_refused(old: Path, delta: Path, tmp_path: Path,
                                                 script: Script) -> None:  # fmt: skip
    """So no delta makes more than it and the old bundle hold."""
    size = old.stat().st_size
    changed(delta, f"new {header(delta).new.size} ", f"new {header(delta).new.size + 1000 * size} ")
    changed(delta, "copy ", f"copy 0 {size}\n" * 1000 + "copy ")
    refused(run(commands.apply, old, delta, "-o", tmp_path / "made"), 9, "twice")
    assert "twice" in script(old, delta, tmp_path / "made").stderr
    assert hidden(tmp_path) == []


def test_a_delta_to_something_that_is_no_bundle(old: Path, tmp_path: Path) -> None:
    data, end = b"no bundle", old.read_bytes()[-20:]
    body = (f"old {old.stat().st_size} {hashlib.sha256(old.read_bytes()).hexdigest()} old\nold-end 20 "
            f"{hashlib.sha256(end).hexdigest()}\nnew 9 {hashlib.sha256(data).hexdigest()} new\nstore 9\n")  # fmt: skip
    (tmp_path / "d.delta").write_bytes(sealed(f"compose-delta 1 {len(body)}\n{body}".encode(), data))
    refused(run(commands.apply, old, tmp_path / "d.delta", "-o", tmp_path / "made"), 9, "not a bundle")
    assert not (tmp_path / "made").exists()


def test_what_has_no_room_is_not_begun(tmp_path: Path) -> None:
    size, end = 10**13, hashlib.sha256(bytes(20)).hexdigest()
    sparse, made = tmp_path / "sparse", tmp_path / "made"
    with sparse.open("wb") as stream:
        stream.truncate(size)
    body = f"old {size} {'0' * 64} old\nold-end 20 {end}\nnew {size} {'1' * 64} new\ncopy 0 {size}\n"
    (tmp_path / "d.delta").write_bytes(sealed(f"compose-delta 1 {len(body)}\n{body}".encode()))
    refused(run(commands.apply, sparse, tmp_path / "d.delta", "-o", made), 10, "not enough space", "10000.00 GB")
    assert hidden(tmp_path) == []


def in_child(code: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60, **more)


def test_killed_or_out_of_space_it_leaves_nothing(old: Path, new: Path, delta: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    code = f"""if True:
        import os, signal
        from pathlib import Path
        from composer.steps.delta import apply_delta
        def listener(event): KILL
        apply_delta(Path({str(old)!r}), Path({str(delta)!r}), Path({str(made)!r}), listener=listener)"""
    limit = (resource.RLIMIT_FSIZE, (100_000, 100_000))
    full = in_child(code.replace("KILL", "pass"), preexec_fn=lambda: resource.setrlimit(*limit))
    assert b"HostError" in full.stderr
    assert hidden(tmp_path) == []
    killed = in_child(code.replace("KILL", "os.kill(os.getpid(), signal.SIGKILL)"))
    assert killed.returncode == -signal.SIGKILL
    assert not made.exists()
    assert len(hidden(tmp_path)) == 1
    apply_delta(old, delta, made, listener=silent)
    assert made.read_bytes() == new.read_bytes()
    assert hidden(tmp_path) == []


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_script_makes_the_same(old: Path, new: Path, delta: Path, tmp_path: Path,
                                   script: Script) -> None:  # fmt: skip
    odd = tmp_path / "-odd $name*"
    old.rename(odd)
    (tmp_path / "made").write_bytes(b"what was there")
    ran = script(odd.name, delta, "made")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert header(delta).new.sha256 in ran.stdout
    assert (tmp_path / "made").read_bytes() == new.read_bytes()
    subprocess.run(["sha256sum", "-c", "made.sha256"], cwd=tmp_path, check=True)
    assert hidden(tmp_path) == []


def test_the_script_tells_what_is_wrong(old: Path, new: Path, delta: Path, tmp_path: Path,
                                        script: Script) -> None:  # fmt: skip
    def fails(code: int, word: str, *words: object) -> None:
        ran = script(*words)
        assert (ran.returncode, word in ran.stderr) == (code, True), ran.stderr

    fails(2, "usage", old, delta)
    fails(9, "not the bundle", new, delta, "made")
    fails(2, "the folder it was unpacked into", tmp_path, delta, "made")
    fails(2, "is a folder", old, delta, tmp_path)
    fails(10, "is no file", old, "gone", "made")
    fails(9, "is no delta", old, new, "made")
    fails(10, "cannot be written", old, delta, "no/such/folder")
    data = bytearray(old.read_bytes())
    data[data.index(NOISE[0][1000:2000])] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    fails(9, "is damaged", "damaged", delta, "made")
    (tmp_path / "cut").write_bytes(delta.read_bytes()[:-1])
    fails(9, "sha256 at its end", old, "cut", "made")
    (tmp_path / "short").write_bytes(delta.read_bytes()[:100])
    fails(9, "cut short", old, "short", "made")
    assert not (tmp_path / "made").exists()
    assert hidden(tmp_path) == []


def test_the_script_out_of_space_leaves_nothing(old: Path, delta: Path, tmp_path: Path,
                                                script: Script) -> None:  # fmt: skip
    limit = (resource.RLIMIT_FSIZE, (100_000, 100_000))
    ran = script(old, delta, "made", preexec_fn=lambda: resource.setrlimit(*limit))
    assert ran.returncode == 10
    assert "cannot be written" in ran.stderr
    assert not (tmp_path / "made").exists()
    assert hidden(tmp_path) == []


def test_the_script_terminated_leaves_nothing(old: Path, delta: Path, tmp_path: Path) -> None:
    """In the midst of its work: a slow disk, which is a dd that waits when the new bundle is under way."""
    slow = tmp_path / "slow/dd"
    slow.parent.mkdir()
    slow.write_text(
        f"#!/bin/sh\nls {tmp_path}/made.part.* >/dev/null 2>&1 && : > {tmp_path}/waits && sleep 60\n"
        f'exec {shutil.which("dd")} "$@"\n'
    )
    slow.chmod(0o755)
    (tmp_path / "apply.sh").write_text(apply_script())
    environ = {**os.environ, "PATH": f"{slow.parent}:{os.environ['PATH']}"}
    child = subprocess.Popen(["sh", tmp_path / "apply.sh", old, delta, tmp_path / "made"], env=environ,
                             start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "waits").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert hidden(tmp_path)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(50) == 143
    assert not (tmp_path / "made").exists()
    assert hidden(tmp_path) == []


def test_the_script_is_printed() -> None:
    assert done(run(commands.delta, "--script")) == apply_script()


# --- diff -------------------------------------------------------------------------------------------------------------


def different(*words: object) -> str:
    result = run(diff_command, *words)
    assert result.exit_code == 1, result.exception
    return result.output


def test_diff_of_files_and_folders(old: Path, new: Path, tmp_path: Path) -> None:
    unpack(open_bundle(old), tmp_path / "tree", jobs=1, listener=silent)
    assert "the same" in done(run(diff_command, old, tmp_path / "tree"))
    shown = different(tmp_path / "tree", new)
    assert "name: old -> new" in shown
    assert "layers: 1 of 3 are in both" in shown
    assert "1 added (0.0 MB), 1 removed (0.0 MB), 1 changed" in shown
    assert "lib/b" not in shown
    listed = different(old, new, "--files")
    for line in ("+ lib/new (added, 100 bytes)", "- lib/only-old (removed, 100 bytes)",
                 "~ lib/b (content, 300007 -> 300007 bytes)"):  # fmt: skip
        assert line in listed


def test_diff_as_json(old: Path, new: Path) -> None:
    same = json.loads(done(run(diff_command, old, old, "--json")))
    assert (same["same"], same["facts"], same["distributions"], same["files"]) == (True, [], [], [])
    found = json.loads(different(old, new, "--json"))
    assert not found["same"]
    assert (found["old"]["name"], found["new"]["name"], found["files"]) == ("old", "new", [])
    assert {one["name"]: (one["added"], one["removed"], one["changed"]) for one in found["distributions"]} == {
        "first": (1, 1, 0), "second": (0, 0, 1),
    }  # fmt: skip
    assert found["shared"]["bytes"] < found["shared"]["of_bytes"]
    listed = json.loads(different(old, new, "--json", "--files"))["files"]
    assert {one["path"]: one["what"] for one in listed} == {
        "lib/new": "added", "lib/only-old": "removed", "lib/b": "content",
    }  # fmt: skip


def test_diff_tells_only_floors_and_hides_what_a_terminal_would_obey(old: Path, tmp_path: Path) -> None:
    newer = tmp_path / "old2/old.tar.zst"
    floors = {"glibc": Floor(version="2.38", because="lib/\x1b[2J")}
    make_bundle(newer, OLD, store=tmp_path / "store", floors=floors)
    shown = different(old, newer)
    assert shown.splitlines()[0] == "+ floor glibc: 2.38 (because of lib/\ufffd[2J)"
    assert "layers: 3 of 3" in shown
    refused(run(diff_command, old, tmp_path), 9, "not an unpacked bundle")
    refused(run(diff_command, tmp_path / "gone", old), 9, "gone")

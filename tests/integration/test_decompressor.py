"""unzstd as a host without zstd runs it: the real program, compiled into the store the first time."""

from __future__ import annotations

import io
import json
import os
import platform
import random
import shutil
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
import zstandard
from click.testing import CliRunner

from composer.cli.unzstd import unzstd
from composer.steps.decompressor import TRIPLES, decompressor_sources, make_decompressor
from composer.steps.fetch import fetch
from composer.steps.layer import compressor
from composer.store import Store
from tests.stack import COMPOSE, NAME, Stack

HERE = platform.machine()
MACHINES = {"x86_64": 62, "aarch64": 183}  # EM_X86_64, EM_AARCH64
INPUT = 128 << 10  # what the program reads at a time
OUTPUT = 256 << 10  # and decodes at a time


@pytest.fixture(scope="module")
def program() -> Path:
    return make_decompressor(HERE, Store())


def run(program: Path, data: bytes, *args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([program, *args], input=data, capture_output=True, timeout=60, env={})


def refused(program: Path, data: bytes, code: int = 1) -> str:
    done = run(program, data)
    assert done.returncode == code
    return done.stderr.decode()


def frame(content: bytes, level: int = 3) -> bytes:
    """One frame as layers have them: streamed, so that its size is not known, with a checksum."""
    stream = compressor(level).compressobj()
    return stream.compress(content) + stream.flush()


def skippable(content: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A5E, len(content)) + content


def empty_frame(window_log: int) -> bytes:
    """A frame of one empty raw block that wants this window (RFC 8878, 3.1.1)."""
    return struct.pack("<IBB", zstandard.MAGIC_NUMBER, 0, (window_log - 10) << 3) + (1).to_bytes(3, "little")


def noise(size: int, seed: int = 7) -> bytes:
    return random.Random(seed).randbytes(size)


# --- the program -----------------------------------------------------------------------------------------------------


def elf_facts(data: bytes) -> tuple[int, set[int]]:
    """e_machine, and the types of all program headers."""
    machine, phoff = struct.unpack_from("<H", data, 18)[0], struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    return machine, {struct.unpack_from("<I", data, phoff + size * index)[0] for index in range(count)}


def check_static(data: bytes, machine: str) -> None:
    found, headers = elf_facts(data)
    assert found == MACHINES[machine]
    assert not headers & {2, 3}  # PT_DYNAMIC, PT_INTERP
    assert len(data) < 500_000
    assert b"/tmp" not in data
    assert str(Path.home()).encode() not in data


def test_it_needs_nothing_of_the_host(program: Path) -> None:
    check_static(program.read_bytes(), HERE)
    assert stat.S_IMODE(program.stat().st_mode) == 0o755


def test_once_made_it_needs_no_sources(program: Path, tmp_path: Path) -> None:
    there = tmp_path / program.relative_to(Store().root)
    there.parent.mkdir(parents=True)
    shutil.copy(program, there)
    assert make_decompressor(HERE, Store(tmp_path), offline=True) == there


def test_the_command_writes_an_executable(program: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "unzstd"
    done = CliRunner().invoke(unzstd, ["-o", str(out), "--offline"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "tar -I ./unzstd -xf" in done.output
    assert out.read_bytes() == program.read_bytes()
    assert os.access(out, os.X_OK)


@pytest.mark.real
@pytest.mark.parametrize("machine", TRIPLES)
def test_made_again_elsewhere_it_has_the_same_bytes(machine: str, tmp_path: Path) -> None:
    first = make_decompressor(machine, Store()).read_bytes()
    check_static(first, machine)
    fetched = fetch(decompressor_sources(), into=Store().root)
    folders = [path.parent for path in fetched.paths.values()]
    again = make_decompressor(machine, Store(tmp_path / "another"), offline=True, wheelhouses=folders)
    assert again.read_bytes() == first


def test_it_tells_its_version_and_the_licences_of_what_is_in_it(program: Path) -> None:
    assert ".".join(map(str, zstandard.ZSTD_VERSION)) in run(program, b"", "--version").stdout.decode()
    text = run(program, b"", "--licence").stdout.decode()
    assert text == run(program, b"", "--license").stdout.decode()
    for holder in ("Meta Platforms, Inc.", "Rich Felker", "Zig contributors"):
        assert holder in text


# --- what it decodes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [3, 9, 19])
def test_matches_as_far_back_as_the_compressor_finds_them(program: Path, level: int) -> None:
    part = noise(1 << 20)
    content = part + bytes(60 << 20) + part
    data = frame(content, level)
    assert zstandard.get_frame_parameters(data).window_size == 64 << 20
    assert len(data) < len(part) * 3 // 2  # the second part was found
    assert run(program, data, "-d").stdout == content


def test_frames_follow_one_another_and_skippable_ones_hold_nothing(program: Path) -> None:
    plain = zstandard.ZstdCompressor(level=1, write_checksum=False, write_content_size=True)
    parts = [noise(1000, 1), b"", noise(OUTPUT, 2), noise(3 * OUTPUT + 1, 3)]
    data = skippable(b"first") + b"".join(frame(one) for one in parts) + plain.compress(b"plain") + skippable(bytes(9))
    done = run(program, data)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"".join(parts) + b"plain"


@pytest.mark.parametrize("more", [b"", frame(b"more")])
@pytest.mark.parametrize("last", ["frame", "skippable"])
def test_a_frame_may_end_where_a_read_ends(program: Path, tmp_path: Path, last: str, more: bytes) -> None:
    body = frame(noise(1000))
    filler = skippable(bytes(INPUT - len(body) - 8))
    head = filler + body if last == "frame" else body + filler
    assert len(head) == INPUT
    (tmp_path / "data").write_bytes(head + more)
    with (tmp_path / "data").open("rb") as stream:
        done = subprocess.run([program], stdin=stream, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, noise(1000) + (b"more" if more else b""))


def test_input_in_small_pieces(program: Path) -> None:
    content = noise(5000) * 3
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as child:
        assert child.stdin
        assert child.stdout
        data = frame(content) + skippable(b"x" * 7) + frame(content)
        for at in range(0, len(data), 97):
            child.stdin.write(data[at : at + 97])
        child.stdin.close()
        assert child.stdout.read() == content * 2
    assert child.returncode == 0


@pytest.mark.parametrize("how", ["-I", "pipe", "--zstd"])
def test_tar_unpacks_with_it(program: Path, tmp_path: Path, how: str) -> None:
    content, plain = noise(1 << 20), io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, mode in (("bin/tool", 0o755), ("lib/data", 0o644)):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    half = len(plain.getvalue()) // 2
    bundle, dest = tmp_path / "b.tar.zst", tmp_path / "dest"
    bundle.write_bytes(frame(plain.getvalue()[:half]) + frame(plain.getvalue()[half:]) + skippable(b"seek table"))
    dest.mkdir()
    tar = shutil.which("tar")
    command = {
        "-I": f"{tar} -I {program} -xf {bundle} -C {dest}",
        "pipe": f"{program} < {bundle} | {tar} -xf - -C {dest}",
        "--zstd": f"{tar} --zstd -xf {bundle} -C {dest}",
    }
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "zstd").symlink_to(program)
    env = {"PATH": str(tmp_path / "path") if how == "--zstd" else "/nonexistent"}
    subprocess.run(["/bin/sh", "-c", command[how]], check=True, timeout=60, env=env)
    assert (dest / "lib/data").read_bytes() == (dest / "bin/tool").read_bytes() == content
    assert os.access(dest / "bin/tool", os.X_OK)


@pytest.mark.parametrize("args", [["-d"], ["-dc", "-q"], ["--decompress", "--stdout", "--quiet"]])
def test_who_takes_it_for_zstd_is_served(program: Path, args: list[str]) -> None:
    assert run(program, frame(b"content"), *args).stdout == b"content"


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [-1, 40], ids=["checksum", "content"])
def test_damage_is_named_with_its_frame(program: Path, at: int) -> None:
    first, second = frame(noise(2000, 1)), bytearray(frame(noise(2000, 2)))
    second[at] ^= 1
    done = run(program, first + second + frame(b"third"))
    assert done.returncode == 1
    said = done.stderr.decode()
    assert f"damaged in frame 2, which begins at byte {len(first)}: " in said
    assert "checksum" in said
    assert "compare its SHA-256" in said
    assert done.stdout.startswith(noise(2000, 1))
    assert b"third" not in done.stdout


def test_tar_fails_when_the_bundle_is_damaged(program: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("file"))
    data = bytearray(frame((tmp_path / "b.tar").read_bytes()))
    data[-1] ^= 1
    (tmp_path / "b.tar.zst").write_bytes(data)
    command = ["tar", f"-I{program}", "-xf", f"{tmp_path}/b.tar.zst", "-C", f"{tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "unzstd: the input is damaged in frame 1" in done.stderr


@pytest.mark.parametrize("where", ["magic", "header", "content", "checksum", "skippable"])
def test_a_cut_is_named(program: Path, where: str) -> None:
    first, second, table = frame(noise(2000, 1)), frame(noise(2000, 2)), skippable(bytes(100))
    at = {"magic": 2, "header": 5, "content": 900, "checksum": len(second) - 1, "skippable": len(second) + 50}[where]
    said = refused(program, (first + second + table)[: len(first) + at])
    number = 3 if where == "skippable" else 2
    assert f"ends at byte {len(first) + at}, within frame {number}: it was cut off" in said


@pytest.mark.parametrize(("data", "said"), [
    (b"", "the input is empty"),
    (b"\x1f\x8b" + bytes(100), "the input is not zstd data"),
    (frame(b"content") + bytes(100), "damaged in frame 2, which begins at byte "),
    (empty_frame(28), "frame 1, at byte 0, needs a window of more than 128 MiB"),
], ids=["empty", "gzip", "garbage after a frame", "window"])  # fmt: skip
def test_other_input(program: Path, data: bytes, said: str) -> None:
    assert said in refused(program, data)


def test_the_largest_window_that_zstd_accepts(program: Path) -> None:
    assert run(program, empty_frame(27)).returncode == 0


@pytest.mark.parametrize(("args", "said"), [
    (["bundle.tar.zst"], "bundle.tar.zst: files are not opened"),
    (["-x"], "usage: unzstd"),
])  # fmt: skip
def test_usage(program: Path, args: list[str], said: str) -> None:
    done = run(program, frame(b"content"), *args)
    assert (done.returncode, done.stdout) == (2, b"")
    assert said in done.stderr.decode()


def test_a_terminal_is_refused(program: Path) -> None:
    ours, theirs = os.openpty()
    done = subprocess.run([program], stdin=subprocess.PIPE, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2
    assert b"standard output is a terminal" in done.stderr


def test_what_the_host_refuses(program: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([program], input=frame(b"content"), stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 3
    assert b"cannot write standard output: No space left on device" in done.stderr
    folder = os.open(tmp_path, os.O_RDONLY)
    done = subprocess.run([program], stdin=folder, capture_output=True, timeout=60)
    os.close(folder)
    assert done.returncode == 3
    assert b"cannot read standard input: Is a directory" in done.stderr


def test_a_reader_that_went_away_ends_it_quietly(program: Path) -> None:
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.close()
        child.stdin.write(frame(noise(4 << 20))[: 1 << 20])
        child.stdin.close()
        assert child.stderr
        assert child.stderr.read() == b""
    assert child.returncode == -13


# --- beside a bundle --------------------------------------------------------------------------------------------------

BESIDE = f"unzstd-{HERE}"


@pytest.fixture
def able(program: Path, stack: Stack) -> Stack:
    """The small stack, with the program in its store."""
    there = stack.store / program.relative_to(Store().root)
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, there)
    return stack


def test_the_line_that_a_build_prints_unpacks_without_a_zstd_program(able: Stack, tmp_path: Path) -> None:
    out = able.build("--unzstd").ok().out
    line = next(line for line in out.splitlines() if "without a zstd program" in line)
    command = line.partition(": ")[2].rstrip(")")
    assert command == f"tar -I ./{BESIDE} -xf {able.bundle.name} -C {NAME}"
    (tmp_path / "bin").mkdir()
    for name in ("mkdir", "sha256sum", "sh", "tar"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    steps = f"sha256sum --quiet -c {BESIDE}.sha256 && mkdir {NAME} && {command}"
    subprocess.run(["/bin/sh", "-c", steps], cwd=able.output, env={"PATH": str(tmp_path / "bin")}, check=True)
    assert (able.output / NAME / "share/compose/manifest.json").is_file()


def test_a_second_build_leaves_it_and_mends_it(able: Stack) -> None:
    result = json.loads(able.build("--unzstd", "--json").ok().out.splitlines()[-1])
    files = [able.output / BESIDE, able.output / f"{BESIDE}.sha256"]
    assert result["unzstd"] == str(files[0])
    before = [path.stat().st_ino for path in files]
    assert "up to date" in able.build("--unzstd").ok().out
    assert [path.stat().st_ino for path in files] == before
    for path in files:
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        able.build("--unzstd").ok()
        assert path.read_bytes() == good
    files[0].chmod(0o644)
    able.build("--unzstd").ok()
    assert os.access(files[0], os.X_OK)


@pytest.mark.parametrize("words", [("--no-unzstd",), ("--unzstd", "--offline")])
def test_a_bundle_without_it_is_whole(stack: Stack, words: tuple[str, ...]) -> None:
    done = stack.build(*words).ok()
    assert (f"no {BESIDE} beside it, for hosts without zstd: " in done.out) == ("--unzstd" in words)
    assert stack.leftovers() == []
    assert stack.digest() in done.out
    result = json.loads(stack.build(*words, "--json").ok().out.splitlines()[-1])
    assert result["unzstd"] is None


def test_a_matrix_has_it_once_for_all_its_bundles(able: Stack) -> None:
    words = [*COMPOSE, "matrix", "--recipe", str(able.recipe), "--sm", "90,100", "--isa", "avx512", "--no-imports",
             "-o", str(able.output)]  # fmt: skip
    assert f"{BESIDE}: for hosts without a zstd program" in able.run(words).ok().err
    names = sorted(path.name for path in able.output.iterdir())
    assert names[-2:] == [BESIDE, f"{BESIDE}.sha256"]
    assert len(names) == 6

"""A model becomes an archive, and the archive a model in a bundle's folder; hostile archives become nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from composer.cli.model import model as command
from composer.errors import ComposerError
from composer.runtime.model import cli as runtime
from composer.runtime.model.archive import HUB
from composer.runtime.model.snapshot import faults
from tests.models import COMMIT, NAME, cached, write_llama

FOLDER = "models--tiny--llama"
FIRST = "model-00001-of-00002.safetensors"
SNAPSHOT = f"{HUB}/{FOLDER}/snapshots/{COMMIT}"


def compose(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def done(result: Result) -> str:
    assert result.exception is None, result.exception
    return result.output


def refused(result: Result, code: int, *words: str) -> None:
    assert isinstance(result.exception, ComposerError), result.output
    assert result.exception.exit_code == code
    for word in words:
        assert word in str(result.exception)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model bundle. Tests do not change it."""
    folder = tmp_path_factory.mktemp("archive")
    done(compose("bundle", cached(folder / "hub"), "-o", folder / "llama.tar"))
    return folder / "llama.tar"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """What looks like an unpacked bundle."""
    (tmp_path / "prefix/share/compose").mkdir(parents=True)
    (tmp_path / "prefix/share/compose/fingerprint").write_text("0" * 64)
    return tmp_path / "prefix"


def visible(prefix: Path) -> list[str]:
    """Everything in the models' folder."""
    return sorted(str(one.relative_to(prefix / HUB)) for one in (prefix / HUB).rglob("*"))


@pytest.mark.parametrize("suffix", [".tar", ".tar.zst"])
def test_round_trip(tmp_path: Path, prefix: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the cache's name for it, through both programs that add, and found again by name."""
    snapshot = cached(tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    packed = tmp_path / f"llama{suffix}"
    assert f"{NAME} {COMMIT[:12]}, 6 files" in done(compose("bundle", NAME, "-o", packed))
    assert "added tiny/llama" in done(compose("add", packed, prefix))
    assert "already there" in done(compose("add", packed, prefix))
    placed = prefix / SNAPSHOT
    assert faults(str(placed), deep=True) == []
    assert (prefix / HUB / FOLDER / "refs/main").read_text() == COMMIT
    for path in snapshot.iterdir():
        assert (placed / path.name).read_bytes() == path.read_bytes()
        assert not (placed / path.name).is_symlink()
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=placed, check=True)
    assert runtime.main(["add", str(packed), "--hub", str(tmp_path / "other")]) == 0
    assert visible(prefix) == sorted(
        str(one.relative_to(tmp_path / "other")) for one in (tmp_path / "other").rglob("*")
    )


def test_tar_alone_does_it_too(archive: Path, prefix: Path) -> None:
    subprocess.run(["tar", "-xf", archive, "-C", prefix], check=True)
    assert faults(str(prefix / SNAPSHOT), deep=True) == []
    assert runtime.main(["verify", NAME, "--hub", str(prefix / HUB)]) == 0


@pytest.mark.parametrize("suffix", [".tar", ".tar.zst"])
def test_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    """Whatever the folder is called, when its files were written, and how many threads there are."""
    write_llama(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b c", copy_function=shutil.copyfile)
    for path in (tmp_path / "b c").iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    for folder, jobs in (("a", 1), ("b c", 3)):
        done(compose("bundle", tmp_path / folder, "--name", NAME, "-j", jobs, "-o", tmp_path / f"{folder}{suffix}"))
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b c{suffix}").read_bytes()


def test_what_cannot_be_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    out = tmp_path / "m.tar"
    refused(
        compose("bundle", "some/model", "-o", out), 10, "is not in the Hugging Face cache", "hf download some/model"
    )
    refused(compose("bundle", "../..x", "-o", out), 2, "neither a folder nor a model's name")
    refused(compose("bundle", "some/model", "-o", tmp_path / "m.zip"), 2, "*.tar or *.tar.zst")
    folder = write_llama(tmp_path / "plain")
    refused(compose("bundle", folder, "--name", NAME, "-o", tmp_path / "typo/m.tar"), 10, "there is no such folder")
    assert not (tmp_path / "typo").exists()
    refused(compose("bundle", folder, "-o", out), 2, "the model has no name")
    refused(compose("bundle", folder, "--name", "../up", "-o", out), 2, "is no name of a model")
    (folder / FIRST).unlink()
    (folder / "tokenizer.json").unlink()
    refused(
        compose("bundle", folder, "--name", NAME, "-o", out), 9, "2 faults", f"{FIRST}: is not there", "no tokenizer"
    )
    snapshot = cached(tmp_path / "home/hub")
    blob = (snapshot / FIRST).resolve()
    blob.write_bytes(blob.read_bytes()[:-4] + bytes(4))
    refused(compose("bundle", NAME, "-o", out), 9, FIRST, "its digest is")
    assert not out.exists()
    assert not list(tmp_path.glob(".m.tar*"))


def test_everybody_may_read_it(archive: Path, prefix: Path) -> None:
    old = os.umask(0o077)
    try:
        done(compose("add", archive, prefix))
    finally:
        os.umask(old)
    found = [prefix / "share/models", prefix / HUB, prefix / HUB / FOLDER, *(prefix / HUB / FOLDER).rglob("*")]
    assert {(one.is_dir(), stat.S_IMODE(one.stat().st_mode)) for one in found} == {(True, 0o755), (False, 0o644)}


def test_where_to_add_must_be_said(archive: Path, tmp_path: Path) -> None:
    refused(compose("add", archive), 2, "is not said")
    refused(compose("add", archive, tmp_path), 10, "is no unpacked bundle")
    refused(compose("add", tmp_path / "absent.tar", "--hub", tmp_path), 10, "absent.tar")


Members = list[tuple[tarfile.TarInfo, bytes]]


def members(archive: Path) -> Members:
    with tarfile.open(archive) as opened:
        return [(info, opened.extractfile(info).read()) for info in opened]


def file(name: str, data: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def odd(kind: bytes, name: str, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def listed(path: str, data: bytes = b"x") -> Callable[[Members], Members]:
    """The manifest lists one more file, and here it is."""

    def change(good: Members) -> Members:
        line = f"{hashlib.sha256(data).hexdigest()}  {path}\n".encode()
        return [file(good[0][0].name, good[0][1] + line), file(f"{SNAPSHOT}/{path}", data), *good[1:]]

    return change


HOSTILE: dict[str, Callable[[Members], Members]] = {
    "nothing": lambda good: [],
    "no manifest": lambda good: good[1:],
    "manifest later": lambda good: [*good[1:], good[0]],
    "manifest twice": lambda good: [good[0], *good],
    "file twice": lambda good: [*good, good[1]],
    "file missing": lambda good: [*good[:2], *good[3:]],
    "not listed": lambda good: [*good, file(f"{SNAPSHOT}/evil.py")],
    "another place": lambda good: [*good, file("bin/sglang")],
    "up": lambda good: [*good, file(f"{SNAPSHOT}/../../../../../../bin/sglang")],
    "listed up": listed("../../../../../../evil"),
    "listed absolute": listed("/tmp/evil"),
    "listed empty part": listed("a//b"),
    "listed line": listed("a\rb"),
    "absolute": lambda good: [*good, file(f"/{SNAPSHOT}/config.json")],
    "another model": lambda good: [*good, file(f"{HUB}/models--other--one/refs/main", COMMIT.encode())],
    "model named up": lambda good: [file(f"{HUB}/models--../snapshots/{COMMIT}/SHA256SUMS"), *good],
    "another revision": lambda good: [*good, file(f"{HUB}/{FOLDER}/refs/main", b"1" * 40)],
    "link": lambda good: [*good, odd(tarfile.SYMTYPE, f"{SNAPSHOT}/link", "/etc/passwd")],
    "hard link": lambda good: [*good, odd(tarfile.LNKTYPE, f"{SNAPSHOT}/link", "/etc/passwd")],
    "linked folder": lambda good: [good[0], odd(tarfile.SYMTYPE, f"{SNAPSHOT}/sub", "/tmp"), *good[1:]],
    "device": lambda good: [*good, odd(tarfile.CHRTYPE, f"{SNAPSHOT}/null")],
    "pipe": lambda good: [*good, odd(tarfile.FIFOTYPE, f"{SNAPSHOT}/pipe")],
    "folder": lambda good: [*good, odd(tarfile.DIRTYPE, f"{SNAPSHOT}/sub")],
    "file and folder": lambda good: listed("config.json/sub")(good),
    "other content": lambda good: [good[0], *((one, data[:-1] + b"!" if one.name.endswith(FIRST) else data)
                                              for one, data in good[1:])],
    "no whole model": lambda good: [
        file(good[0][0].name, b"".join(row for row in good[0][1].splitlines(keepends=True) if b"tokenizer" not in row)),
        *(one for one in good[1:] if "tokenizer" not in one[0].name),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(archive: Path, prefix: Path, tmp_path: Path, name: str,
                          capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    path = tmp_path / "hostile.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        for info, data in HOSTILE[name](members(archive)):
            out.addfile(info, io.BytesIO(data))
    (tmp_path / "before").mkdir()
    refused(compose("add", path, prefix), 9, "no model bundle, or a damaged one")
    assert visible(prefix) == []
    assert runtime.main(["add", str(path), "--hub", str(prefix / HUB)]) == runtime.REFUSED
    assert str(path) in capsys.readouterr().err
    assert visible(prefix) == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["before", "hostile.tar", "prefix"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.zst"])
def test_every_cut_and_some_flipped_bits(tmp_path: Path, prefix: Path, suffix: str) -> None:
    packed = tmp_path / f"llama{suffix}"
    done(compose("bundle", cached(tmp_path / "hub"), "-o", packed))
    good, bad = packed.read_bytes(), tmp_path / "bad"
    ends = range(0, len(good) - 3000, len(good) // 9)
    for end in ends:
        bad.write_bytes(good[:end])
        assert runtime.main(["add", str(bad), "--hub", str(prefix / HUB)]) == runtime.REFUSED, end
        refused(compose("add", bad, prefix), 9)
    for place in range(5, len(good) - 3000, len(good) // 9):
        bad.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        result = compose("add", bad, prefix)
        if result.exception:
            refused(result, 9)
            assert visible(prefix) == []
        else:  # a bit that means nothing, such as one of a header's time
            assert faults(str(prefix / SNAPSHOT), deep=True) == []
            shutil.rmtree(prefix / HUB)
    assert visible(prefix) == []


def test_a_revision_with_other_content_is_not_replaced(archive: Path, prefix: Path) -> None:
    done(compose("add", archive, prefix))
    (prefix / SNAPSHOT / "SHA256SUMS").write_text("mine")
    refused(compose("add", archive, prefix), 9, "there already, and not from this archive")
    assert (prefix / SNAPSHOT / "SHA256SUMS").read_text() == "mine"


def test_links_in_the_models_folder_are_not_followed(archive: Path, prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (prefix / HUB).mkdir(parents=True)
    (prefix / HUB / FOLDER).symlink_to(tmp_path / "elsewhere")
    refused(compose("add", archive, prefix), 9, "is a link")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_killed_run_leaves_nothing_visible_and_the_next_one_sweeps(archive: Path, prefix: Path) -> None:
    """Killed in the midst of a file: its archive comes through a pipe that has no end yet."""
    words = [sys.executable, "-m", "composer.runtime.model.cli", "add", "-", "--hub", str(prefix / HUB)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        process.stdin.write(archive.read_bytes()[:20_000])
        process.stdin.flush()
        while not list((prefix / HUB).glob(f".*/{COMMIT}/SHA256SUMS")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not list((prefix / HUB).glob("models*"))
    assert list((prefix / HUB).glob(".*"))
    done(compose("add", archive, prefix))
    assert [one.name for one in (prefix / HUB).iterdir()] == [FOLDER]


def test_list_and_verify(archive: Path, prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub = str(prefix / HUB)
    assert runtime.main(["list", "--hub", hub, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    done(compose("add", archive, prefix))
    assert runtime.main(["list", "--hub", hub, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["revision"], row["main"], row["whole"]) == (NAME, COMMIT, True, True)
    assert runtime.main(["list", "--hub", hub]) == 0
    assert f"{NAME}  {COMMIT[:12]}  0.00 GB  whole  main" in capsys.readouterr().out
    assert runtime.main(["verify", "--hub", hub]) == 0
    assert runtime.main(["verify", "other/one", "--hub", hub]) == runtime.USAGE
    weights = prefix / SNAPSHOT / FIRST
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert runtime.main(["verify", NAME, "--quick", "--hub", hub]) == 0
    capsys.readouterr()
    assert runtime.main(["verify", str(prefix / SNAPSHOT), "--hub", hub, "--json"]) == runtime.FAULTY
    (row,) = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in row["findings"]] == ["model.digest"]


def test_without_zstd(tmp_path: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch,
                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    done(compose("bundle", cached(tmp_path / "hub"), "-o", tmp_path / "llama.tar.zst"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.main(["add", str(tmp_path / "llama.tar.zst"), "--hub", str(prefix / HUB)]) == runtime.FAILED
    assert "decompress it elsewhere" in capsys.readouterr().err

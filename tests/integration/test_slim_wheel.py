"""`compose slim` on real wheels: installed by pip and loaded, or refused with nothing left behind."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import gpu_wheels
from tests.fatbins import container, held
from tests.gpu_wheels import KERNELS, LARGE, MIT, QUIET, TAG, VENDOR, fatbin, libraries
from tests.stack import COMPOSE, REPOSITORY
from tests.wheels import Entry, build_wheel, wheel_filename, write_zip

_NEW = KERNELS.replace("-1.0-", "-1.0+sm90-")
_FREE = "License-Expression: MIT"


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a run of `compose slim` ended."""

    code: int
    out: str
    err: str

    def ok(self) -> Done:
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int, *words: str) -> Done:
        assert self.code == code, f"exit {self.code} instead of {code}\n{self.out}\n{self.err}"
        assert [word for word in words if word not in self.err] == [], self.err
        return self


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A folder with wheels, an output folder and a store."""

    home: Path

    @property
    def out(self) -> Path:
        return self.home / "out"

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY), "WHEEL_COMPOSER_STORE": str(self.home / "store")}

    def wheel(self, filename: str, data: bytes) -> Path:
        path = self.home / filename
        path.write_bytes(data)
        return path

    def words(self, *wheels: Path | str, sm: str = "90", more: tuple[str, ...] = ()) -> list[str]:
        return [*COMPOSE, "slim", "--sm", sm, "-o", str(self.out), *more, *map(str, wheels)]

    def slim(self, *wheels: Path | str, sm: str = "90", more: tuple[str, ...] = (), before: Any = None) -> Done:
        """Run; whatever happens, nobody is shown a traceback and no scratch is left."""
        done = subprocess.run(self.words(*wheels, sm=sm, more=more), env=self.environ, preexec_fn=before, check=False,
                              cwd=self.home, capture_output=True, text=True, timeout=120)  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert list((self.home / "store/tmp").glob("*")) == []
        return Done(code=done.returncode, out=done.stdout, err=done.stderr)

    def made(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("*")) if self.out.is_dir() else []


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(home=tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """`kernels`, slimmed. Tests do not change it."""
    desk = Desk(home=tmp_path_factory.mktemp("done"))
    desk.slim(desk.wheel(KERNELS, gpu_wheels.kernels())).ok()
    return desk


def _read(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {one.filename: archive.read(one) for one in archive.infolist()}


def _ledger(path: Path) -> dict[str, Any]:
    (found,) = [data for name, data in _read(path).items() if name.endswith(".dist-info/compose-slim.json")]
    ledger: dict[str, Any] = json.loads(found)
    return ledger


def _sample(version: str, files: Mapping[str, bytes], name: str = "sample", **more: Any) -> tuple[str, bytes]:
    """The name and bytes of a free wheel."""
    metadata = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{_FREE}\n\n"
    texts = {"METADATA": metadata.encode(), **more.pop("dist_info", {})}
    data = build_wheel(name, version, files, tag=TAG, dist_info=texts, **more)
    return wheel_filename(name, version, TAG), data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the new wheel ----------------------------------------------------------------------------------------------------


def test_what_is_cut_and_what_stays(done: Desk) -> None:
    old, new = _read(done.home / KERNELS), _read(done.out / _NEW)
    assert len(new["kernels/lib/libfat.so"]) < len(old["kernels/lib/libfat.so"]) - 100_000
    same = [name for name in old if name.startswith("kernels/") and old[name] == new[name]]
    assert same == ["kernels/__init__.py", "kernels/lib/libodd.so", "kernels/lib/libplain.so", "kernels/data/odd.bin",
                    "kernels/_vendor/other-1.0.dist-info/licenses/LICENSE"]  # fmt: skip
    assert new["kernels-1.0+sm90.dist-info/licenses/LICENSE"] == MIT
    assert new["kernels-1.0+sm90.dist-info/WHEEL"] == old["kernels-1.0.dist-info/WHEEL"]
    metadata = old["kernels-1.0.dist-info/METADATA"].replace(b"Version: 1.0\n", b"Version: 1.0+sm90\n")
    assert new["kernels-1.0+sm90.dist-info/METADATA"] == metadata
    assert not [name for name in new if name.startswith("kernels-1.0.dist-info")]


def test_record_lists_every_file_with_its_digest(done: Desk) -> None:
    files = _read(done.out / _NEW)
    record = "kernels-1.0+sm90.dist-info/RECORD"
    rows = {name: (digest, size) for name, digest, size in csv.reader(io.StringIO(files[record].decode()))}
    assert rows.pop(record) == ("", "")
    assert rows == {
        name: (f"sha256={_digest(data)}", str(len(data)))
        for name, data in files.items() if name != record
    }  # fmt: skip
    assert list(files)[-1] == record


def test_the_ledger_tells_the_original(done: Desk) -> None:
    ledger = _ledger(done.out / _NEW)
    assert (ledger["wheel"], ledger["sha256"]) == (KERNELS, _sha256((done.home / KERNELS).read_bytes()))
    assert (ledger["sms"], ledger["keep_ptx"], ledger["redistributable"]) == ([90], False, True)
    (file,) = ledger["files"]
    assert file["path"] == "kernels/lib/libfat.so"
    assert file["original_sha256"] == _sha256(libraries()["libfat.so"])
    assert file["original_size"] == len(libraries()["libfat.so"])
    new = _read(done.out / _NEW)[file["path"]]
    assert (file["sha256"], file["size"]) == (_sha256(new), len(new))
    assert "1 of 5 images kept for SM 90" in file["detail"]
    why = ledger["left_alone"]
    assert sorted(why) == ["kernels/data/odd.bin", "kernels/lib/libodd.so"]
    assert all(text.startswith("left alone: ") for text in why.values())


@pytest.fixture(scope="module")
def environment(done: Desk, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with both wheels, slimmed, installed by pip. Tests do not change it."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    done.slim(done.wheel(VENDOR, gpu_wheels.vendor()), more=("--accept-license-modification",)).ok()
    subprocess.run(
        [*_pip(folder), "install", "--no-deps", "--no-index", *map(str, sorted(done.out.glob("*.whl")))],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return folder


def _pip(environment: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "--isolated",
            "--disable-pip-version-check"]  # fmt: skip


def _python(environment: Path, code: str, *words: str, **environ: str) -> str:
    found = subprocess.run([environment / "bin/python", "-c", code, *words], check=False, capture_output=True,
                           text=True, env=environ)  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_pip_installs_it_and_finds_nothing_missing(environment: Path) -> None:
    """A requirement of the plain version is met by one with a local label (PEP 440)."""
    found = subprocess.run([*_pip(environment), "check"], check=False, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "No broken requirements found.\n")
    listed = subprocess.run(
        [*_pip(environment), "list", "--format", "freeze"], check=True, capture_output=True, text=True
    ).stdout
    assert {"kernels==1.0+sm90", "nvidia-vendor==12.0+sm90"} <= set(listed.split())
    assert (environment / "bin/kernels-hello").is_file()


def test_it_loads_where_it_is_installed(environment: Path) -> None:
    (site,) = environment.glob("lib/python*/site-packages")
    code = "import kernels; print(kernels.library.container(0) != 0)"
    assert _python(environment, code, LD_LIBRARY_PATH=str(site / "nvidia/vendor/lib")) == "True\n"
    assert held(site / "nvidia/vendor/lib/libvendor.so.12", 2) == [fatbin("elf90"), container()]


def test_installed_files_have_the_digests_of_record(environment: Path) -> None:
    code = """
import base64, hashlib, importlib.metadata, sys
checked = 0
for name in sys.argv[1:]:
    for file in importlib.metadata.files(name):
        if file.hash:
            found = hashlib.new(file.hash.mode, file.read_binary()).digest()
            assert file.hash.value == base64.urlsafe_b64encode(found).rstrip(b"=").decode(), file
            checked += 1
print(checked > 10)
"""
    assert _python(environment, code, "kernels", "nvidia-vendor") == "True\n"


def test_the_same_bytes_twice_and_with_other_umasks(done: Desk, desk: Desk) -> None:
    desk.slim(desk.wheel(KERNELS, gpu_wheels.kernels()), before=lambda: os.umask(0o077)).ok()
    assert (desk.out / _NEW).read_bytes() == (done.out / _NEW).read_bytes()
    desk.slim(desk.home / KERNELS).ok()  # over the one that is there
    assert (desk.out / _NEW).read_bytes() == (done.out / _NEW).read_bytes()
    assert desk.made() == [_NEW]


def test_the_original_and_its_hard_links_stay(desk: Desk) -> None:
    """In the original's own folder, and where a file with the new name is linked to from elsewhere."""
    path = desk.wheel(KERNELS, gpu_wheels.kernels())
    link, known, elsewhere = desk.home / "link", desk.home / _NEW, desk.home / "elsewhere"
    os.link(path, link)
    known.write_bytes(b"an older one")
    os.link(known, elsewhere)
    before = path.stat()
    done = subprocess.run([*COMPOSE, "slim", "--sm", "90", "-o", ".", path.name], env=desk.environ, cwd=desk.home,
                          check=False, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == link.read_bytes() == gpu_wheels.kernels()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (elsewhere.read_bytes(), known.stat().st_size > 1000) == (b"an older one", True)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "sm", "label"),
    [
        ("1.0", "90", "1.0+sm90"), ("1.0", "100,90", "1.0+sm90.sm100"), ("1.0", "all", "1.0+slim"),
        ("2.9.1+cu128", "9.0", "2.9.1+cu128.sm90"), ("1!2.0rc1.post3.dev4", "90", "1!2.0rc1.post3.dev4+sm90"),
    ],
)  # fmt: skip
def test_the_version_gets_a_local_label(desk: Desk, version: str, sm: str, label: str) -> None:
    filename, data = _sample(version, {"sample/libvendor.so": libraries()["libvendor.so.12"]})
    desk.slim(desk.wheel(filename, data), sm=sm).ok()
    assert desk.made() == [wheel_filename("sample", label, TAG)]
    files = _read(desk.out / desk.made()[0])
    assert f"\nVersion: {label}\n".encode() in files[f"sample-{label}.dist-info/METADATA"]


def test_a_build_tag_and_data_folders_follow(desk: Desk) -> None:
    files = {"sample/__init__.py": b"", "sample-1.0.data/scripts/hello": b"#!python\n",
             "sample-1.0.data/platlib/sample/libvendor.so": libraries()["libvendor.so.12"]}  # fmt: skip
    filename, data = _sample("1.0", files, executable=["sample-1.0.data/scripts/hello"])
    filename = filename.replace("-1.0-", "-1.0-3-")
    desk.slim(desk.wheel(filename, data)).ok()
    assert desk.made() == [f"sample-1.0+sm90-3-{TAG}.whl"]
    with zipfile.ZipFile(desk.out / desk.made()[0]) as archive:
        modes = {one.filename: one.external_attr >> 16 for one in archive.infolist()}
    assert modes["sample-1.0+sm90.data/scripts/hello"] == 0o100755
    assert modes["sample/__init__.py"] == 0o100644
    assert "sample-1.0+sm90.data/platlib/sample/libvendor.so" in modes


def test_a_project_whose_folder_has_a_hyphen(desk: Desk) -> None:
    """As old tools wrote it; the name of the wheel has an underscore."""
    _, data = _sample("1.0", {"a/libvendor.so": libraries()["libvendor.so.12"]}, name="my-sample")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    entries = [
        Entry(name=name.replace("my_sample-", "my-sample-"), data=text.replace(b"my_sample-1.0", b"my-sample-1.0"))
        for name, text in members.items()
    ]
    desk.slim(desk.wheel(wheel_filename("my_sample", "1.0", TAG), write_zip(entries))).ok()
    files = _read(desk.out / f"my_sample-1.0+sm90-{TAG}.whl")
    assert "my-sample-1.0+sm90.dist-info/RECORD" in files


def test_signatures_of_the_old_record_go(desk: Desk) -> None:
    folder = "sample-1.0.dist-info"
    rows = f"a/libvendor.so,sha256={_digest(libraries()['libvendor.so.12'])},\n"
    metadata = f"Metadata-Version: 2.4\nName: sample\nVersion: 1.0\n{_FREE}\n\n".encode()
    wheel = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: false\nTag: py3-none-manylinux_2_17_x86_64\n"
    rows += f"{folder}/METADATA,sha256={_digest(metadata)},\n{folder}/WHEEL,sha256={_digest(wheel)},\n"
    rows += f"{folder}/RECORD,,\n{folder}/RECORD.jws,,\n"
    entries = [
        Entry(name="a/libvendor.so", data=libraries()["libvendor.so.12"]),
        Entry(name=f"{folder}/METADATA", data=metadata), Entry(name=f"{folder}/WHEEL", data=wheel),
        Entry(name=f"{folder}/RECORD", data=rows.encode()), Entry(name=f"{folder}/RECORD.jws", data=b"{}"),
    ]  # fmt: skip
    filename = wheel_filename("sample", "1.0", TAG)
    desk.slim(desk.wheel(filename, write_zip(entries))).ok()
    files = _read(desk.out / wheel_filename("sample", "1.0+sm90", TAG))
    assert [name for name in files if "RECORD" in name] == ["sample-1.0+sm90.dist-info/RECORD"]


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sm", "more", "kept"),
    [
        ("80", (), ("elf80",)), ("90,80", (), ("elf80", "elf90")), ("90", ("--keep-ptx",), ("elf90", "ptx90")),
        ("120", (), ("ptx90",)), ("all", (), ("elf80", "elf90", "elf100", "ptx90")),
    ],
)  # fmt: skip
def test_what_is_kept_for_whom(desk: Desk, sm: str, more: tuple[str, ...], kept: tuple[str, ...]) -> None:
    filename, data = _sample("1.0", {"sample/libvendor.so": libraries()["libvendor.so.12"]})
    desk.slim(desk.wheel(filename, data), sm=sm, more=more).ok()
    path = desk.home / "libvendor.so"
    path.write_bytes(_read(desk.out / desk.made()[0])["sample/libvendor.so"])
    assert held(path, 1) == [fatbin(*kept)]
    sections = subprocess.run(["readelf", "-SW", path], check=True, capture_output=True, text=True).stdout
    assert ".debug_info" not in sections


def test_debug_symbols_can_be_kept(desk: Desk) -> None:
    filename, data = _sample("1.0", {"sample/libvendor.so": libraries()["libvendor.so.12"]})
    told = desk.slim(desk.wheel(filename, data), sm="all", more=("--keep-debug",)).ok()
    assert "nothing could be cut" in told.out
    (new,) = desk.made()
    assert _read(desk.out / new)["sample/libvendor.so"] == libraries()["libvendor.so.12"]


def test_a_wheel_without_objects(desk: Desk) -> None:
    filename, data = _sample("1.0", {"sample/__init__.py": b"", "sample/empty": b""})
    assert "nothing could be cut" in desk.slim(desk.wheel(filename, data)).ok().out
    assert _ledger(desk.out / desk.made()[0])["files"] == []


def test_programs_keep_their_execute_bit_and_run(desk: Desk) -> None:
    program = desk.home / "program"
    subprocess.run(["gcc", "-g", "-x", "c", "-", "-o", program], input=b"int main(void) { return 7; }", check=True)
    filename, data = _sample("1.0", {"sample/program": program.read_bytes()}, executable=["sample/program"])
    desk.slim(desk.wheel(filename, data)).ok()
    with zipfile.ZipFile(desk.out / desk.made()[0]) as archive:
        assert archive.getinfo("sample/program").external_attr >> 16 == 0o100755
        new = archive.read("sample/program")
    assert len(new) < program.stat().st_size
    program.write_bytes(new)
    assert subprocess.run([program], check=False).returncode == 7


# --- what is told -----------------------------------------------------------------------------------------------------


def test_what_a_person_is_told(desk: Desk) -> None:
    told = desk.slim(desk.wheel(KERNELS, gpu_wheels.kernels())).ok()
    lines = told.out.splitlines()
    assert lines[0].startswith(f"{desk.out / _NEW}: 0.")
    assert lines[1].startswith("  kernels/lib/libfat.so: 0.2 -> 0.0 MB; 1 of 5 images kept for SM 90; 0.0 MB of debug")
    assert [line.partition(":")[0] for line in lines[2:]] == ["  kernels/data/odd.bin", "  kernels/lib/libodd.so"]
    assert told.err == "slimming\n"


def test_what_a_program_is_told(desk: Desk) -> None:
    told = desk.slim(desk.wheel(KERNELS, gpu_wheels.kernels()), more=("--json",)).ok()
    (found,) = json.loads(told.out)
    assert found.pop("path") == str(desk.out / _NEW)
    assert found == _ledger(desk.out / _NEW)
    assert told.err == ""


def test_on_a_terminal_the_bar_goes_away(desk: Desk) -> None:
    words = " ".join(f"'{word}'" for word in desk.words(desk.wheel(KERNELS, gpu_wheels.kernels())))
    done = subprocess.run(["script", "-qec", words, "/dev/null"], env={**desk.environ, "TERM": "xterm"}, check=True,
                          capture_output=True, text=True, cwd=desk.home, stdin=subprocess.DEVNULL)  # fmt: skip
    last = done.stdout.rpartition("\x1b")[2]
    assert f"{_NEW}: 0." in last
    assert [line for line in done.stdout.splitlines() if line.strip() == "slim"] == []


# --- licences ---------------------------------------------------------------------------------------------------------


def test_a_licence_that_forbids_it(desk: Desk) -> None:
    path = desk.wheel(VENDOR, gpu_wheels.vendor())
    desk.slim(path).refused(2, VENDOR, "License.txt says: may not copy", "--accept-license-modification")
    assert desk.made() == []
    told = desk.slim(path, more=("--accept-license-modification",)).ok()
    assert "must not be passed on" in told.out
    assert _ledger(desk.out / VENDOR.replace("-12.0-", "-12.0+sm90-"))["redistributable"] is False


def test_a_licence_beside_the_library_counts(desk: Desk) -> None:
    """As in nvidia-cusparselt-cu12 0.7.1."""
    filename, data = _sample("1.0", {"sample/LICENSE.txt": gpu_wheels.EULA})
    desk.slim(desk.wheel(filename, data)).refused(2, "sample/LICENSE.txt says: may not copy")


def test_a_wheel_that_says_nothing(desk: Desk) -> None:
    path = desk.wheel(QUIET, gpu_wheels.quiet())
    desk.slim(path).refused(2, "neither METADATA nor a licence file")
    desk.slim(path, more=("--accept-license-modification",)).ok()


def test_accepting_does_not_make_a_free_one_private(desk: Desk) -> None:
    told = desk.slim(desk.wheel(KERNELS, gpu_wheels.kernels()), more=("--accept-license-modification",)).ok()
    assert "passed on" not in told.out
    assert _ledger(desk.out / _NEW)["redistributable"] is True


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sm", "words"), [("90", "for SM 90"), ("100", "for SM 90"), ("all", "for SM 90")])
def test_a_slimmed_wheel_is_not_slimmed_again(done: Desk, desk: Desk, sm: str, words: str) -> None:
    original = _sha256((done.home / KERNELS).read_bytes())
    desk.slim(done.out / _NEW, sm=sm).refused(2, _NEW, "slimmed already", words, KERNELS, original)
    assert desk.made() == []


def test_a_damaged_ledger(desk: Desk) -> None:
    filename, data = _sample("1.0", {"sample/__init__.py": b""}, dist_info={"compose-slim.json": b'{"schema": "x"'})
    desk.slim(desk.wheel(filename, data)).refused(6, filename, "compose-slim.json is damaged")


def test_what_is_no_wheel(desk: Desk) -> None:
    (desk.home / "folder-1.0-py3-none-any.whl").mkdir()
    cases = {
        "missing-1.0-py3-none-any.whl": (10, "No such file"),
        "folder-1.0-py3-none-any.whl": (10, "Is a directory"),
        "empty-1.0-py3-none-any.whl": (4, "empty file"),
        "notes.txt": (6, "not the file name of a wheel"),
        "text-1.0-py3-none-any.whl": (6, "no end record"),
    }
    (desk.home / "empty-1.0-py3-none-any.whl").touch()
    for name in ("notes.txt", "text-1.0-py3-none-any.whl"):
        (desk.home / name).write_text("not a zip\n" * 10)
    for name, (code, words) in cases.items():
        desk.slim(desk.home / name).refused(code, name, words)
    assert desk.made() == []


def test_damaged_wheels(desk: Desk) -> None:
    data = gpu_wheels.kernels()
    where = data.index(b"kernels/lib/libfat.so") + 120
    flipped = data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]
    desk.slim(desk.wheel(KERNELS, flipped)).refused(6, f"{KERNELS}: kernels/lib/libfat.so")
    desk.slim(desk.wheel(KERNELS, data[: len(data) // 2])).refused(6, KERNELS)
    filename, other = _sample("1.0", {"sample/a.bin": b"x" * 100})
    with zipfile.ZipFile(io.BytesIO(other)) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    members["sample/a.bin"] = b"y" * 100  # not what RECORD says
    changed = write_zip([Entry(name=name, data=text) for name, text in members.items()])
    desk.slim(desk.wheel(filename, changed)).refused(6, f"{filename}: sample/a.bin", "digest in RECORD")
    assert desk.made() == []


def test_of_several_the_first_is_whole_when_the_second_is_bad(desk: Desk, done: Desk) -> None:
    good, third = desk.wheel(KERNELS, gpu_wheels.kernels()), desk.wheel(VENDOR, gpu_wheels.vendor())
    bad = desk.wheel(QUIET, gpu_wheels.quiet()[:500])
    told = desk.slim(good, bad, third).refused(6, QUIET)
    assert told.out.startswith(f"{desk.out / _NEW}: ")
    assert desk.made() == [_NEW]
    assert (desk.out / _NEW).read_bytes() == (done.out / _NEW).read_bytes()
    (desk.out / _NEW).unlink()
    found = json.loads(desk.slim(good, bad, third, more=("--json",)).refused(6, QUIET).out)
    assert [one["wheel"] for one in found] == [KERNELS]


@pytest.mark.parametrize("sm", ["", "91", "90,", "all,90", "sm-90"])
def test_an_unknown_sm(desk: Desk, sm: str) -> None:
    desk.slim(desk.wheel(KERNELS, gpu_wheels.kernels()), sm=sm).refused(2, "unknown GPU architecture")
    assert not desk.out.exists()


def test_no_wheel_and_no_folder_are_said(desk: Desk) -> None:
    desk.slim().refused(2, "WHEEL")
    done = subprocess.run([*COMPOSE, "slim", "--sm", "90", KERNELS], env=desk.environ, check=False, capture_output=True)
    assert (done.returncode, b"--output" in done.stderr) == (2, True)


def test_where_nothing_can_be_written(desk: Desk) -> None:
    path = desk.wheel(KERNELS, gpu_wheels.kernels())
    desk.out.touch()
    desk.slim(path).refused(10, str(desk.out))
    desk.out.unlink()
    desk.out.mkdir(mode=0o555)
    if os.geteuid():
        desk.slim(path).refused(10, "Permission denied")
    (desk.out / _NEW).mkdir()
    desk.slim(path).refused(10, _NEW)
    assert desk.made() == [_NEW]
    assert list((desk.out / _NEW).iterdir()) == []


def test_missing_folders_are_made(desk: Desk) -> None:
    deep = desk.home / "a b/ü"
    words = [*COMPOSE, "slim", "--sm", "90", "-o", str(deep), str(desk.wheel(KERNELS, gpu_wheels.kernels()))]
    subprocess.run(words, env=desk.environ, check=True, capture_output=True)
    assert [path.name for path in deep.iterdir()] == [_NEW]


@pytest.mark.parametrize("limit", [60_000, LARGE])
def test_no_room(desk: Desk, limit: int) -> None:
    """For the copy to edit, or for the new wheel: the disk is full (here: a limit on the size of files)."""
    incompressible = os.urandom(LARGE + 1)
    filename, data = _sample("1.0", {"sample/libfat.so": libraries()["libfat.so"], "sample/noise": incompressible})
    path = desk.wheel(filename, data)
    desk.slim(path, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))).refused(
        10, "File too large"
    )
    assert desk.made() == []
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted(desk: Desk, sent: signal.Signals, code: int) -> None:
    """Nothing appears at the output, and the next run is none the wiser."""
    path = desk.wheel(KERNELS, gpu_wheels.kernels(large=True))
    process = subprocess.Popen(desk.words(path), env=desk.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while process.poll() is None and not list((desk.home / "store/tmp").glob("*/object")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert [name for name in desk.made() if not name.endswith(".tmp")] == []
    assert path.read_bytes() == gpu_wheels.kernels(large=True)
    desk.slim(path).ok()
    assert desk.made() == [_NEW]


# --- a failed proof ---------------------------------------------------------------------------------------------------

# The writer is right as far as we know, so a fault is put between it and the disk: one byte of a kept image flips.
_FLIP = """
import sys
from composer.steps import slim
write = slim._write
def flipped(done, into):
    write(done, into)
    data = bytearray(into.read_bytes())
    where = data.rindex(b"\\x01\\x02\\x03\\x04")
    data[where] ^= 1
    into.write_bytes(data)
slim._write = flipped
from composer.cli.main import main
main()
"""


def test_a_failed_proof_leaves_nothing(desk: Desk) -> None:
    path = desk.wheel(KERNELS, gpu_wheels.kernels())
    words = [sys.executable, "-c", _FLIP, *desk.words(path)[len(COMPOSE) :]]
    done = subprocess.run(words, env=desk.environ, check=False, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert f"{KERNELS}: kernels/lib/libfat.so" in done.stderr
    assert "Traceback" not in done.stderr
    assert desk.made() == []
    assert path.read_bytes() == gpu_wheels.kernels()
    assert list((desk.home / "store/tmp").glob("*")) == []

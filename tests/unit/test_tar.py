"""Tar segments: what is written unpacks everywhere, and a hostile or damaged archive is refused member by member."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from composer.errors import VerifyError
from composer.formats import tar

MTIME = tar.DEFAULT_MTIME
LONG = "/".join(["kernels", "x" * 90, "y" * 95, "z" * 97, "k"])
FILES = {
    "bin/run": (b"#!/bin/sh\n", 0o755),
    "lib/empty": (b"", 0o644),
    "lib/block": (b"b" * tar.BLOCK, 0o644),
    "lib/odd": (b"o" * (3 * tar.BLOCK + 1), 0o644),
    f"lib/{LONG}": (b"far", 0o644),
    "lib/ünï côdé 漢": (b"named", 0o644),
}
LINKS = {"bin/again": "run", "lib/up": "../bin/run", "lib/long": LONG}


def file_member(path: str, data: bytes, mode: int = 0o644) -> bytes:
    return tar.file_header(path, size=len(data), mode=mode, mtime=MTIME) + data + tar.padding(len(data))


def segment() -> bytes:
    files = [file_member(path, data, mode) for path, (data, mode) in FILES.items()]
    return b"".join([*files, *(tar.link_header(path, target=to, mtime=MTIME) for path, to in LINKS.items())])


def read(data: bytes) -> dict[str, bytes | str]:
    members = tar.read_members(io.BytesIO(data), "x.tar")
    return {info.name: content.read() if content else info.linkname for info, content in members}


def hostile(name: str = "a", *, content: bytes = b"", pax: dict[str, str] | None = None, **fields: object) -> bytes:
    """An archive of one member as an attacker would write it."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    info.pax_headers = pax or {}
    return info.tobuf(tarfile.PAX_FORMAT) + content + tar.padding(len(content)) + tar.END_OF_ARCHIVE


def test_reads_back_equal_with_and_without_an_end() -> None:
    expected = {path: data for path, (data, _) in FILES.items()} | LINKS
    assert read(segment()) == read(segment() + tar.END_OF_ARCHIVE) == expected
    assert read(segment() + file_member("more", b"1")) == expected | {"more": b"1"}


def test_the_long_path_is_as_long_as_the_longest_real_one() -> None:
    assert len(f"lib/{LONG}") >= 294


@pytest.mark.parametrize("tool", ["gnu", "python"])
def test_other_tools_unpack_the_same(tool: str, tmp_path: Path) -> None:
    archive = tmp_path / "x.tar"
    archive.write_bytes(segment() + tar.END_OF_ARCHIVE)
    out = tmp_path / "out"
    out.mkdir()
    if tool == "gnu":
        done = subprocess.run(["tar", "-xf", archive, "-C", out], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    else:
        with tarfile.open(archive) as opened:
            opened.extractall(out, filter="data")
    for path, (data, mode) in FILES.items():
        assert (out / path).read_bytes() == data
        assert (out / path).stat().st_mode & 0o100 == mode & 0o100
        assert (out / path).stat().st_mtime == MTIME
    assert {path: str((out / path).readlink()) for path in LINKS} == LINKS


def test_nothing_of_this_machine_is_written() -> None:
    with tarfile.open(fileobj=io.BytesIO(segment() + tar.END_OF_ARCHIVE)) as opened:
        for info in opened:
            assert (info.uid, info.gid, info.uname, info.gname, info.mtime) == (0, 0, "", "", MTIME)
            assert not info.pax_headers.keys() - {"path", "linkpath"}


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 2**33 + 5])
def test_padding_fills_the_block(size: int) -> None:
    assert (size + len(tar.padding(size))) % tar.BLOCK == 0
    assert len(tar.padding(size)) < tar.BLOCK


def test_a_file_of_more_than_8_gib_has_its_size() -> None:
    header = tar.file_header("big", size=2**33 + 5, mode=0o644, mtime=MTIME)
    assert len(header) % tar.BLOCK == 0
    assert b"=8589934597\n" in header or tarfile.TarInfo.frombuf(header[-512:], "utf-8", "strict").size == 2**33 + 5


HOSTILE = {
    "up": hostile("../a"),
    "up inside": hostile("a/../../b"),
    "any dots": hostile("a/../b"),
    "absolute": hostile("/etc/passwd"),
    "absolute twice": hostile("//etc/passwd"),
    "newline": hostile("a\nb"),
    "pax path up": hostile("good", pax={"path": "../bad"}),
    "pax path nul": hostile("good", pax={"path": "a\0b"}),
    "pax path empty": hostile("good", pax={"path": ""}),
    "link up": hostile(type=tarfile.SYMTYPE, linkname="../x"),
    "link absolute": hostile(type=tarfile.SYMTYPE, linkname="/etc"),
    "link out and in": hostile("a/b", type=tarfile.SYMTYPE, linkname="../../a/b"),
    "link by pax": hostile(type=tarfile.SYMTYPE, linkname="b", pax={"linkpath": "../../b"}),
    "hard link": hostile(type=tarfile.LNKTYPE, linkname="b"),
    "folder": hostile(type=tarfile.DIRTYPE),
    "fifo": hostile(type=tarfile.FIFOTYPE),
    "character device": hostile(type=tarfile.CHRTYPE),
    "block device": hostile(type=tarfile.BLKTYPE),
    "unknown type": hostile(type=b"V"),
    "set-uid": hostile(mode=0o4755),
    "set-gid": hostile(mode=0o2755),
    "sticky": hostile(mode=0o1755),
    "old sparse": hostile(type=tarfile.GNUTYPE_SPARSE),
    "sparse that reads as 100 TB": hostile(pax={"GNU.sparse.map": "0,10", "GNU.sparse.size": "9" * 14}),
    "sparse without a map": hostile(pax={"GNU.sparse.size": "100"}),
    "sparse 1.0": hostile(pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 15}),
    "sparse map that is none": hostile(pax={"GNU.sparse.map": "x"}),
    "size of 30 digits": hostile(content=b"x", pax={"size": "9" * 30}),
    "negative size": hostile(content=b"x" * 512, pax={"size": "-512"}),
    "size past the end": hostile(size=10**9),
    "an attribute header alone": hostile(type=tarfile.XHDTYPE),
    "a long name without a member": hostile(type=tarfile.GNUTYPE_LONGNAME),
    "empty": b"",
    "noise": b"noise" * 400,
    "gzip": b"\x1f\x8b\x08" + bytes(2000),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused(case: str) -> None:
    with pytest.raises(VerifyError):
        read(HOSTILE[case])


@pytest.mark.parametrize("case", [case for case in HOSTILE if case not in ("empty", "noise", "gzip")])
def test_also_behind_a_good_member(case: str) -> None:
    members = tar.read_members(io.BytesIO(file_member("first", b"1") + HOSTILE[case]), "x.tar")
    info, content = next(members)
    assert content is not None
    assert (info.name, content.read()) == ("first", b"1")
    with pytest.raises(VerifyError) as caught:
        [rest.read() for _, rest in members if rest]
    assert str(caught.value.where).startswith("x.tar")


def test_the_message_shows_no_control_characters() -> None:
    with pytest.raises(VerifyError) as caught:
        read(hostile("../\x1b[2J"))
    assert "\x1b" not in str(caught.value)


def test_a_cut_is_found_unless_it_is_between_members() -> None:
    data = segment()
    whole = list(read(data).items())
    ends = [0]
    for path, (content, mode) in FILES.items():
        ends.append(ends[-1] + len(file_member(path, content, mode)))
    for path, to in LINKS.items():
        ends.append(ends[-1] + len(tar.link_header(path, target=to, mtime=MTIME)))
    assert ends[-1] == len(data)
    for end in {*range(0, len(data), tar.BLOCK), *range(1, len(data), 101)}:
        if end in ends[1:]:
            assert list(read(data[:end]).items()) == whole[: ends.index(end)]
        else:
            with pytest.raises(VerifyError):
                read(data[:end])


def test_content_that_is_not_read_is_passed_over() -> None:
    assert [info.name for info, _ in tar.read_members(io.BytesIO(segment()), "x")] == [*FILES, *LINKS]


@pytest.mark.parametrize(
    ("path", "plain", "resolved"),
    [
        ("a", True, True), ("a/b", True, True), ("a//b", True, True), ("./a", True, True), ("..a/b..", True, True),
        ("", False, False), ("/", False, False), ("..", False, False), ("a/..", False, True), ("a/../b", False, True),
        ("a/../../b", False, False), ("./..", False, False), ("a\0", False, False), ("a\n", False, False),
    ],
)  # fmt: skip
def test_is_inside(path: str, plain: bool, resolved: bool) -> None:
    assert (tar.is_inside(path), tar.is_inside(path, resolve=True)) == (plain, resolved)

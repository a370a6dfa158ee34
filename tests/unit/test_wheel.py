"""Every hostile wheel of the test matrix (ids Z01 to Z48), good wheels, and damage at any place."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import mmap
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.tags import Tag
from packaging.version import Version

from composer.errors import WheelError
from composer.formats import zip as zip_reader
from composer.formats.record import RecordRow, row_of
from composer.formats.wheel import (
    EntryPoint,
    Wheel,
    entry_points,
    install_path,
    parse_wheel_name,
    read,
    read_wheel,
    stream,
    verified_stream,
)
from tests.wheels import (
    DEVICE,
    FIFO,
    LINK,
    STORED,
    Entry,
    build_wheel,
    deflate,
    metadata_text,
    record_entry,
    record_rows,
    wheel_entries,
    wheel_filename,
    wheel_text,
    write_zip,
)

NAME = wheel_filename("demo", "1.0")
INFO = "demo-1.0.dist-info"
RECORD = f"{INFO}/RECORD"
FILES = {"demo/__init__.py": b"x = 1\n", "demo/data.bin": bytes(range(256)) * 40}


def drain(data: bytes, filename: str = NAME) -> tuple[Wheel, dict[str, bytes]]:
    """Read a wheel and prove every member of it, as a build does."""
    wheel = read_wheel(data, filename)
    return wheel, {path: b"".join(verified_stream(data, wheel, m)) for path, m in wheel.members.items()}


def wheel(**options: object) -> bytes:
    return build_wheel("demo", "1.0", FILES, **options)  # type: ignore[arg-type]


def with_entries(*extra: Entry) -> bytes:
    return wheel(extra=extra)


def with_name(*names: str | bytes) -> bytes:
    return with_entries(*(Entry(name=name, data=b"y = 2\n") for name in names))


def with_text(text: str, content: bytes) -> bytes:
    return wheel(dist_info={text: content})


def with_record(change: Callable[[list[tuple[str, ...]]], list[tuple[str, ...]]]) -> bytes:
    entries = wheel_entries("demo", "1.0", FILES)
    return write_zip([*entries, record_entry(RECORD, change(list(record_rows(entries, RECORD))))])


def with_module(**changes: object) -> bytes:
    """The good wheel with fields of its first entry changed, RECORD as for the unchanged one."""
    entries = wheel_entries("demo", "1.0", FILES)
    record = record_entry(RECORD, record_rows(entries, RECORD))
    return write_zip([dataclasses.replace(entries[0], **changes), *entries[1:], record])  # type: ignore[arg-type]


def without(text: str) -> bytes:
    entries = [entry for entry in wheel_entries("demo", "1.0", FILES) if entry.name != f"{INFO}/{text}"]
    rows = [] if text == "RECORD" else [record_entry(RECORD, record_rows(entries, RECORD))]
    return write_zip([*entries, *rows])


def swap(row: int, column: int, cell: str) -> bytes:
    def change(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        cells = list(rows[row])
        cells[column] = cell
        return [*rows[:row], tuple(cells), *rows[row + 1 :]]

    return with_record(change)


def raw_record(content: bytes) -> bytes:
    return write_zip([*wheel_entries("demo", "1.0", FILES), Entry(name=RECORD, data=content)])


def lying(size: int) -> bytes:
    """The first member claims another size, and RECORD none."""
    entries = wheel_entries("demo", "1.0", FILES)
    rows = [(path, digest, "") for path, digest, _ in record_rows(entries, RECORD)]
    return write_zip([dataclasses.replace(entries[0], size=size), *entries[1:], record_entry(RECORD, rows)])


def overlapping() -> bytes:
    """Two directory rows that share one payload, as the classic overlap bomb does."""
    entries = wheel_entries("demo", "1.0", FILES)
    twin = dataclasses.replace(entries[0], name="demo/twin.py", offset=0)
    rows = record_rows([*entries, twin], RECORD)
    return write_zip([*entries, twin, record_entry(RECORD, rows)])


def scripts(line: str, group: str = "console_scripts") -> bytes:
    return wheel(entry_points=f"[{group}]\n{line}\n".encode())


def descriptor(**local: int) -> bytes:
    crc32 = binascii.crc32(FILES["demo/__init__.py"])
    size = len(FILES["demo/__init__.py"])
    tail = struct.pack("<4sLLL", b"PK\7\x08", crc32, size, size)
    zeros = {"crc32": 0, "size": 0, "compressed_size": 0}
    return with_module(method=STORED, flags=8, descriptor=tail, local={**zeros, **local})


BOMB = deflate(bytes(70 << 20))
ZIP64_EXTRA = struct.pack("<HHQQ", 1, 16, 6, 6)

# id, what is wrong, the wheel, a word of the message
HOSTILE: list[tuple[str, str, Callable[[], bytes], str]] = [
    ("Z01", "parent", lambda: with_name("demo/../../evil.py"), "'..'"),
    ("Z02", "absolute", lambda: with_name("/etc/evil.py"), "absolute"),
    ("Z02", "drive", lambda: with_name("C:/evil.py"), "absolute"),
    ("Z03", "data-parent", lambda: with_name("demo-1.0.data/scripts/../../evil"), "'..'"),
    ("Z04", "data-over-purelib", lambda: with_name("demo-1.0.data/purelib/demo/__init__.py"), "installed as"),
    ("Z04", "dot", lambda: with_name("demo/./evil.py"), "component"),
    ("Z04", "empty", lambda: with_name("demo//evil.py"), "component"),
    ("Z05", "backslash", lambda: with_name("demo\\evil.py"), "backslash"),
    ("Z06", "symlink", lambda: with_module(mode=LINK), "link"),
    ("Z07", "setuid", lambda: with_module(mode=0o104755), "setuid"),
    ("Z08", "duplicate", lambda: with_name("demo/__init__.py"), "2 times"),
    ("Z09", "case", lambda: with_name("demo/A.py", "demo/a.py"), "case"),
    ("Z10", "unicode", lambda: with_name("demo/\u00e9.py", "demo/e\u0301.py"), "Unicode"),
    ("Z11", "file-and-folder", lambda: with_name("demo/data.bin/evil.py"), "file and a folder"),
    ("Z11", "file-and-folder-entry", lambda: with_entries(Entry(name="demo/data.bin/")), "file and a folder"),
    ("Z12", "record-missing", lambda: without("RECORD"), "no RECORD"),
    ("Z13", "record-wrong-hash", lambda: swap(0, 1, "sha256=" + "A" * 43), "digest in RECORD"),
    ("Z13", "record-wrong-hash-metadata", lambda: swap(2, 1, "sha256=" + "A" * 43), "METADATA does not have"),
    ("Z13", "record-wrong-size", lambda: swap(0, 2, "7"), "in RECORD"),
    ("Z14", "record-extra-row", lambda: with_record(lambda rows: [*rows, ("gone.py", "", "")]), "not there"),
    ("Z15", "record-row-absent", lambda: with_record(lambda rows: rows[1:]), "no digest"),
    ("Z15", "record-no-hash", lambda: swap(0, 1, ""), "no digest"),
    ("Z16", "record-weak-hash", lambda: swap(0, 1, "md5=" + "A" * 22), "digest by 'md5'"),
    ("Z16", "record-sha1", lambda: swap(0, 1, "sha1=" + "A" * 27), "digest by 'sha1'"),
    ("Z16", "record-short-hash", lambda: swap(0, 1, "sha256=AAAA"), "malformed digest"),
    ("Z16", "record-padded-hash", lambda: swap(0, 1, "sha256=" + "A" * 43 + "="), "malformed digest"),
    ("Z16", "record-no-base64", lambda: swap(0, 1, "sha256=\u00e9!"), "malformed digest"),
    ("Z16", "record-size-word", lambda: swap(0, 2, "-1"), "size"),
    ("Z17", "record-twice", lambda: with_record(lambda rows: [*rows, rows[0]]), "listed twice"),
    ("Z17", "record-columns", lambda: with_record(lambda rows: [*rows, ("a", "b")]), "2 columns"),
    ("Z17", "record-endless", lambda: raw_record(b"".join(b"%d,,\n" % n for n in range(100_002))), "given up"),
    ("Z17", "record-quote", lambda: raw_record(b'"demo'), "not CSV"),
    ("Z17", "record-utf8", lambda: raw_record(b"\xff,,\n"), "not UTF-8"),
    ("Z18", "device", lambda: with_module(mode=DEVICE), "device"),
    ("Z19", "fifo", lambda: with_module(mode=FIFO), "special file"),
    ("Z20", "socket", lambda: with_module(mode=0o140644), "special file"),
    (
        "Z20",
        "folder-with-content",
        lambda: with_entries(Entry(name="demo/sub/", data=b"x", mode=0o040755)),
        "with content",
    ),
    ("Z21", "bomb", lambda: with_entries(Entry(name="zeros", data=bytes(70 << 20), payload=BOMB)), "times"),
    ("Z22", "longer-than-said", lambda: lying(size=5), "longer than the declared"),
    ("Z22", "shorter-than-said", lambda: lying(size=7), "shorter than the declared"),
    ("Z22", "overlap", overlapping, "overlaps"),
    ("Z22", "stored-sizes", lambda: with_module(method=STORED, size=99), "sizes differ"),
    ("Z22", "too-many", lambda: write_zip([Entry(name="a")], zip64=True, count=100_001), "more than"),
    ("Z23", "trailing", lambda: wheel() + b"x", "end record"),
    ("Z23", "comment", lambda: write_zip([], comment=b"hello"), "end record"),
    ("Z23", "comment-that-ends", lambda: wheel()[:-2] + b"\x01\x00", "comment"),
    ("Z24", "prefix", lambda: b"#!/bin/sh\n" + wheel(), "directory does not end"),
    ("Z25", "concatenated", lambda: wheel() + wheel(), "directory does not end"),
    ("Z25", "junk-before-members", lambda: prefixed(), "before the first member"),
    ("Z26", "local-name", lambda: with_module(local={"name": b"demo/__evil__.py"}), "contradicts"),
    ("Z26", "local-size", lambda: with_module(local={"size": 3}), "contradicts"),
    ("Z26", "local-method", lambda: with_module(local={"method": STORED}), "contradicts"),
    ("Z26", "local-crc-with-descriptor", lambda: descriptor(crc32=5), "contradicts"),
    ("Z26", "descriptor-missing", lambda: with_module(flags=8), "overlaps"),
    ("Z26", "descriptor-unannounced", lambda: with_module(descriptor=b"PK\7\x08" + bytes(12)), "overlaps"),
    ("Z27", "crc", lambda: with_module(crc32=1), "CRC-32"),
    ("Z27", "not-deflate", lambda: with_module(payload=b"\xff" * 9), "deflate"),
    ("Z27", "more-input", lambda: with_module(payload=deflate(FILES["demo/__init__.py"]) + b"x"), "more input"),
    ("Z27", "deflate-ends", lambda: with_module(payload=deflate(FILES["demo/__init__.py"])[:-1]), "deflate stream"),
    ("Z28", "truncated", lambda: wheel()[:-30], "truncated"),
    ("Z28", "empty", lambda: b"", "truncated"),
    ("Z29", "two-dist-info", lambda: with_name("other-1.0.dist-info/METADATA"), "2 .dist-info"),
    ("Z29", "smuggled-dist-info", lambda: with_name("demo-1.0.data/purelib/o-1.dist-info/METADATA"), "2 .dist-info"),
    ("Z29", "no-dist-info", lambda: write_zip([Entry(name="a.py")]), "0 .dist-info"),
    ("Z30", "other-name", lambda: with_text("METADATA", metadata_text("other", "1.0")), "METADATA is of other"),
    ("Z30", "other-folder", lambda: build_wheel("other", "1.0", FILES), "does not belong"),
    ("Z30", "no-version-in-folder", lambda: build_wheel("demo", "x", FILES), "does not belong"),
    ("Z31", "other-version", lambda: with_text("METADATA", metadata_text("demo", "1.1")), "METADATA is of demo 1.1"),
    ("Z32", "script-path", lambda: scripts("../../evil = demo:main"), "cannot become a command"),
    ("Z32", "script-absolute", lambda: scripts("/bin/evil = demo:main", "gui_scripts"), "cannot become a command"),
    ("Z32", "script-option", lambda: scripts("-evil = demo:main"), "cannot become a command"),
    ("Z32", "script-no-attribute", lambda: scripts("evil = demo"), "cannot become a command"),
    ("Z32", "script-twice", lambda: scripts("a = demo:b\na = demo:c"), "listed twice"),
    ("Z33", "script-code", lambda: scripts("evil = os;print(1):main"), "not an entry point"),
    ("Z33", "script-number", lambda: scripts("evil = demo.1x:main"), "not an object reference"),
    ("Z33", "no-group", lambda: wheel(entry_points=b"a = demo:main\n"), "not an entry point"),
    ("Z33", "not-utf8", lambda: wheel(entry_points=b"[a]\n\xff = demo:main\n"), "not UTF-8"),
    ("Z36", "nul", lambda: with_name("demo/evil\0.py"), "control character"),
    ("Z37", "newline", lambda: with_name("demo/evil\n.py"), "control character"),
    ("Z38", "escape", lambda: with_name("demo/\x1b[31mevil.py"), "control character"),
    ("Z38", "right-to-left", lambda: with_name("demo/\u202eyp.evil"), "control character"),
    ("Z39", "long-path", lambda: with_name("a/" * 2048 + "b"), "longer"),
    ("Z40", "long-component", lambda: with_name("demo/" + "a" * 256), "longer"),
    ("Z41", "encrypted", lambda: with_module(flags=1), "encrypted"),
    ("Z41", "patched-data", lambda: with_module(flags=0x20), "flags"),
    ("Z41", "method", lambda: with_module(method=12, payload=b""), "method 12"),
    ("Z41", "other-disk", lambda: on_another_disk(), "another disk"),
    ("Z42", "carriage-return", lambda: with_text("METADATA", injected(b"\rRequires-Dist: evil")), "control character"),
    ("Z42", "two-names", lambda: with_text("METADATA", injected(b"\nName: evil")), "2 headers 'Name'"),
    ("Z42", "no-header", lambda: with_text("METADATA", injected(b"\nhello")), "not a header"),
    ("Z42", "bad-requirement", lambda: with_text("METADATA", metadata_text("demo", "1.0", ["a b"])), "malformed"),
    ("Z42", "bad-name", lambda: with_text("METADATA", metadata_text("-demo-", "1.0")), "not valid"),
    ("Z43", "metadata-utf8", lambda: with_text("METADATA", injected(b" \xff")), "not UTF-8"),
    ("Z43", "metadata-huge", lambda: with_text("METADATA", bytes((4 << 20) + 1)), "more than"),
    ("Z43", "name-encoding", lambda: with_name(b"demo/\xe9.py"), "neither ASCII"),
    ("Z43", "name-not-marked", lambda: with_entries(Entry(name="demo/\u00e9.py", flags=0)), "neither ASCII"),
    ("Z43", "second-name", lambda: with_module(extra=struct.pack("<HHH", 0x7075, 2, 0)), "second name"),
    ("Z44", "wheel-version-2", lambda: with_text("WHEEL", wheel_text(version="2.0")), "Wheel-Version '2.0'"),
    ("Z44", "wheel-version-none", lambda: with_text("WHEEL", b"Tag: py3-none-any\n"), "Wheel-Version"),
    ("Z44", "wheel-garbage", lambda: with_text("WHEEL", b"hello\n"), "not a header"),
    ("Z45", "metadata-missing", lambda: without("METADATA"), "no METADATA"),
    ("Z45", "wheel-missing", lambda: without("WHEEL"), "no WHEEL"),
    ("Z47", "unknown-scheme", lambda: with_name("demo-1.0.data/evil/x"), "known scheme"),
    ("Z48", "foreign-data", lambda: with_name("other-1.0.data/scripts/x"), "known scheme"),
    ("Z48", "data-file", lambda: with_name("demo-1.0.data/scripts"), "known scheme"),
    ("ZIP64", "extra-cut", lambda: with_module(extra=b"\1\0\x10"), "malformed extra"),
    ("ZIP64", "extra-long", lambda: with_module(extra=b"\1\0\x10\0"), "malformed extra"),
    ("ZIP64", "extra-twice", lambda: with_module(extra=ZIP64_EXTRA * 2), "malformed extra"),
    ("ZIP64", "field-missing", lambda: with_module(size=2**32 - 1), "ZIP64 field"),
    ("ZIP64", "other-disks", lambda: damaged(wheel(), -18, b"\x01"), "several disks"),
    ("ZIP64", "contradiction", lambda: damaged(wheel(zip64=True), -12, b"\x01\x00\x00\x00"), "contradicts"),
    ("ZIP64", "moved", lambda: damaged(wheel(zip64=True), -34, b"\x00"), "ZIP64"),
    ("ZIP64", "disks", lambda: damaged(wheel(zip64=True), -26, b"\x07"), "not where and what"),
    ("ZIP64", "rows-left", lambda: write_zip([Entry(name="a"), Entry(name="b")], count=1), "more or less"),
]


def prefixed() -> bytes:
    """A prefix that the directory knows of: all offsets are right, and nobody owns the first bytes."""
    entries = wheel_entries("demo", "1.0", FILES)
    return write_zip([dataclasses.replace(entries[0], offset=4), *entries[1:]])


def on_another_disk() -> bytes:
    data = wheel()
    return damaged(data, data.index(b"PK\1\2") + 34 - len(data), b"\x01")


def injected(text: bytes) -> bytes:
    return b"Metadata-Version: 2.1\nName: demo\nVersion: 1.0\nSummary: s" + text + b"\n\nbody\n"


def damaged(data: bytes, position: int, patch: bytes) -> bytes:
    position += len(data)
    return data[:position] + patch + data[position + len(patch) :]


@pytest.mark.parametrize(
    ("make", "message"), [case[2:] for case in HOSTILE], ids=[f"{case[0]}-{case[1]}" for case in HOSTILE]
)
def test_hostile_wheel_is_refused(make: Callable[[], bytes], message: str) -> None:
    with pytest.raises(WheelError) as caught:
        drain(make())
    assert message in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable(), "control characters reach the terminal"


def test_good_wheel_gives_its_values() -> None:
    data = wheel(
        requires=["numpy>=2"],
        entry_points={"console_scripts": {"demo": "demo.cli:main"}, "demo.plugins": {"a": "demo", "b c": "demo:x.y"}},
        executable=["demo/data.bin"],
        extra=[Entry(name="demo/empty.txt", method=STORED), Entry(name="demo/sub/", mode=0o040755)],
    )
    read_back, contents = drain(data)
    assert {path: contents[path] for path in FILES} == FILES
    assert "demo/sub/" not in read_back.members
    assert list(read_back.members)[:3] == ["demo/__init__.py", "demo/data.bin", "demo/empty.txt"]
    assert [read_back.members[path].mode for path in FILES] == [0o644, 0o755]
    assert read_back.dist_info == INFO
    assert (read_back.name.name, read_back.name.version) == ("demo", Version("1.0"))
    assert read_back.tags == {Tag("py3", "none", "any")}
    assert read_back.record["demo/__init__.py"] == row_of(FILES["demo/__init__.py"])
    assert read_back.record[RECORD] == RecordRow()
    assert (read_back.pth_files, read_back.warnings) == ((), ())
    assert b"Requires-Dist: numpy>=2" in read_back.metadata
    assert entry_points(read_back) == (
        EntryPoint(group="console_scripts", name="demo", module="demo.cli", attribute="main"),
        EntryPoint(group="demo.plugins", name="a", module="demo", attribute=""),
        EntryPoint(group="demo.plugins", name="b c", module="demo", attribute="x.y"),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: wheel(zip64=True),
        lambda: descriptor(),
        lambda: with_module(method=STORED, size=2**32 - 1, compressed_size=2**32 - 1, extra=ZIP64_EXTRA),
        lambda: with_module(extra=struct.pack("<HHBL", 0x5455, 5, 1, 0)),
        lambda: with_name("demo/\u00e9.py"),
        lambda: with_name("demo/a b,\"c'.py"),
        lambda: with_entries(Entry(name=f"{INFO}/RECORD.jws", data=b"{}")),
        lambda: wheel(entry_points=b"# note\n\n[demo]\n  indented = demo:x [extra]\n"),
        lambda: swap(0, 2, ""),
    ],
    ids=["zip64", "descriptor", "zip64-sizes", "timestamps", "utf8", "csv-quotes", "signature", "indented", "no-size"],
)
def test_unusual_but_valid_wheel_is_read(make: Callable[[], bytes]) -> None:
    _, contents = drain(make())
    assert contents["demo/__init__.py"] == FILES["demo/__init__.py"]


@pytest.mark.parametrize("algorithm", ["sha384", "sha512"])
def test_stronger_digest_is_checked(algorithm: str) -> None:
    def cell(content: bytes) -> str:
        raw = hashlib.new(algorithm, content).digest()
        return f"{algorithm}=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    read_back, _ = drain(swap(0, 1, cell(FILES["demo/__init__.py"])))
    assert read_back.record["demo/__init__.py"].sha256 is None
    with pytest.raises(WheelError, match="digest in RECORD"):
        drain(swap(0, 1, cell(b"other")))


def test_all_faults_are_listed_together() -> None:
    with pytest.raises(WheelError) as caught:
        drain(
            wheel(extra=[Entry(name="../a"), Entry(name="b", mode=LINK)], dist_info={"WHEEL": wheel_text(version="2")})
        )
    assert all(word in str(caught.value) for word in ("3 faults", "'../a'", "'b' is a link", "Wheel-Version"))


def test_very_many_faults_are_counted() -> None:
    with pytest.raises(WheelError, match="80 more faults"):
        drain(with_entries(*(Entry(name=f"x{number}", mode=LINK) for number in range(100))))
    with pytest.raises(WheelError, match="given up at row 26"):
        drain(with_record(lambda rows: [*rows, *(("a",) for _ in range(100))]))


def test_error_names_the_wheel_and_the_member() -> None:
    with pytest.raises(WheelError) as caught:
        drain(with_module(crc32=1))
    assert caught.value.where == f"{NAME}: demo/__init__.py"


def test_tags_that_differ_are_a_warning() -> None:
    read_back, _ = drain(with_text("WHEEL", wheel_text("cp312-abi3-linux_x86_64") + b"Tag: x\n"))
    assert read_back.warnings == (
        "WHEEL has the malformed tag 'x'",
        "WHEEL is tagged cp312-abi3-linux_x86_64, the file name py3-none-any",
    )


def test_z34_pth_files_are_named_and_nested_ones_are_not() -> None:
    names = ("a.pth", "demo-1.0.data/purelib/b.pth", "demo/c.pth", "demo-1.0.data/data/d.pth", "demo.pth/e.py")
    read_back, _ = drain(with_name(*names))
    assert read_back.pth_files == ("a.pth", "demo-1.0.data/purelib/b.pth")


@pytest.mark.parametrize(
    ("path", "landing"),
    [
        ("demo/__init__.py", "lib/python3.13/site-packages/demo/__init__.py"),
        ("demo-1.0.data/purelib/a/b.py", "lib/python3.13/site-packages/a/b.py"),
        ("demo-1.0.data/platlib/a.so", "lib/python3.13/site-packages/a.so"),
        ("demo-1.0.data/scripts/run", "bin/run"),
        ("demo-1.0.data/data/share/man/x", "share/man/x"),
        ("demo-1.0.data/headers/x.h", "include/python3.13/demo/x.h"),
    ],
)
def test_install_path(path: str, landing: str) -> None:
    read_back, _ = drain(wheel())
    assert install_path(read_back, path, "3.13") == landing


@pytest.mark.parametrize("filename", ["demo.whl", "demo-1.0.zip", "demo-x!-py3-none-any.whl", "a\x1b-1-p-n-a.whl", ""])
def test_bad_file_name_is_refused(filename: str) -> None:
    with pytest.raises(WheelError) as caught:
        parse_wheel_name(filename)
    assert "\x1b" not in str(caught.value)


def test_file_name_parts() -> None:
    name = parse_wheel_name("Demo_Pkg-1.0+cu128-7b-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl")
    assert (name.name, str(name.version), name.build, len(name.tags)) == ("demo-pkg", "1.0+cu128", (7, "b"), 2)


@pytest.mark.parametrize("method", [STORED, 8])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 300_000])
@pytest.mark.parametrize("kind", ["zeros", "random"])
def test_stream_pieces_are_bounded_and_complete(method: int, size: int, kind: str) -> None:
    content = bytes(size) if kind == "zeros" else random.Random(size).randbytes(size)
    data = write_zip([Entry(name="a", data=content, method=method)])
    (member,), faults = zip_reader.read_members(data, "a.zip")
    pieces = [bytes(piece) for piece in stream(data, member, 4096)]
    assert not faults
    assert b"".join(pieces) == content == read(data, member)
    assert all(0 < len(piece) <= 4096 for piece in pieces)


def test_bomb_is_never_inflated_beyond_its_declared_size() -> None:
    data = write_zip([Entry(name="a", data=bytes(70 << 20), payload=BOMB, size=10_000)])
    (member,), _ = zip_reader.read_members(data, "a.zip")
    pieces = stream(data, member, 4096)
    assert [len(next(pieces)) for _ in range(3)] == [4096, 4096, 10_000 - 2 * 4096]
    with pytest.raises(WheelError, match="longer than"):
        next(pieces)


def test_stored_member_of_a_map_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(write_zip([Entry(name="a", data=b"content", method=STORED)]))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        (member,), _ = zip_reader.read_members(mapped, "a.zip")
        pieces = list(stream(mapped, member))
        assert [type(piece) for piece in pieces] == [memoryview]
        assert bytes(pieces[0]) == b"content"
        pieces.clear()


def test_member_beyond_a_shorter_buffer_is_refused() -> None:
    data = write_zip([Entry(name="a", data=b"content")])
    (member,), _ = zip_reader.read_members(data, "a.zip")
    with pytest.raises(WheelError, match="truncated"):
        read(data[:5], member)


def only_wheel_errors(data: bytes) -> bool:
    """Whether the wheel is refused, and in less than a second."""
    begin = time.perf_counter()
    try:
        drain(data)
        return False
    except WheelError:
        return True
    finally:
        assert time.perf_counter() - begin < 1


def test_truncation_at_every_third_byte_is_refused() -> None:
    data = wheel(entry_points={"console_scripts": {"demo": "demo:main"}})
    assert all(only_wheel_errors(data[:size]) for size in range(0, len(data), 3))


def test_no_bit_flip_changes_what_is_installed() -> None:
    """A flip is refused, or hits what nobody reads (dates, versions of the writer): the contents stay the same."""
    data = wheel(entry_points={"console_scripts": {"demo": "demo:main"}})
    expected = drain(data)
    chance = random.Random(20)
    for position in chance.sample(range(len(data)), 500):
        flipped = damaged(data, position - len(data), bytes([data[position] ^ 1 << chance.randrange(8)]))
        if not only_wheel_errors(flipped):
            read_back, contents = drain(flipped)
            assert contents == expected[1]
            assert read_back.record == expected[0].record


def test_real_pip_installs_what_the_reader_sees(tmp_path: Path) -> None:
    """The builder's good wheels are good by an independent reader, and land where `install_path` says."""
    files = {**FILES, "demo-1.0.data/scripts/run": b"#!python\n", "demo-1.0.data/data/share/x": b"x"}
    data = build_wheel("demo", "1.0", files, entry_points={"console_scripts": {"demo": "demo:main"}})
    path = tmp_path / NAME
    path.write_bytes(data)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--ignore-installed"]
    subprocess.run([*command, "--prefix", tmp_path / "p", path], check=True, capture_output=True, timeout=60)
    read_back, contents = drain(data)
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for member, content in contents.items():
        installed = tmp_path / "p" / install_path(read_back, member, python)
        assert installed.is_file(), installed
        if not member.endswith(("RECORD", "run")):  # pip rewrites these two
            assert installed.read_bytes() == content
    assert (tmp_path / "p" / "bin" / "demo").is_file()

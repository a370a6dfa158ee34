"""Core metadata: what is read, what is refused, and edits that keep every other byte; RECORD rendering."""

from __future__ import annotations

import email
import hashlib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from composer.errors import RecipeError, WheelError
from composer.formats.metadata import (
    AppliedEdit,
    DropRequirement,
    Edit,
    ReplaceRequirement,
    edit_requires,
    headers,
    name_and_version,
    requires_dist,
)
from composer.formats.record import RecordRow, parse_record, render_record, row_of

METADATA = b"""\
Metadata-Version: 2.4
Name: Demo.Pkg
Version: 1.0
requires-dist: NumPy>=2
Requires-Dist: torch==2.9.1
License: one
        two
Requires-Dist: decord2 ; (platform_machine
   == "x86_64") and extra == "video"
Requires-Dist:  flashinfer_python ==0.6.3; extra == "all"
Requires-Dist: flashinfer-python==0.6.3

Requires-Dist: not-a-header
Name: neither
"""


def drop(name: str) -> DropRequirement:
    return DropRequirement(name=name, reason="test")


def replace(name: str, to: str) -> ReplaceRequirement:
    return ReplaceRequirement(name=name, to=to, reason="test")


def test_requirements_are_read_in_order_and_unfolded() -> None:
    assert requires_dist(METADATA) == (
        Requirement("numpy>=2"),
        Requirement("torch==2.9.1"),
        Requirement('decord2; platform_machine == "x86_64" and extra == "video"'),
        Requirement('flashinfer_python==0.6.3; extra == "all"'),
        Requirement("flashinfer-python==0.6.3"),
    )
    assert name_and_version(METADATA) == ("demo-pkg", Version("1.0"))


def test_headers_agree_with_the_standard_parser() -> None:
    parsed = email.message_from_bytes(METADATA)
    theirs = [(name.lower(), " ".join(line.strip() for line in value.split("\n"))) for name, value in parsed.items()]
    assert list(headers(METADATA)) == theirs


def test_drop_removes_every_line_of_a_name_and_nothing_else() -> None:
    edited, applied = edit_requires(METADATA, [drop("Flashinfer.Python"), drop("decord2")])
    lines = METADATA.splitlines(keepends=True)
    assert edited == b"".join(lines[:7] + lines[11:])
    assert [len(edit.matched) for edit in applied] == [2, 1]
    assert applied[0].matched[0] == 'flashinfer_python ==0.6.3; extra == "all"'


def test_replace_keeps_the_marker_of_each_line() -> None:
    edited, _ = edit_requires(METADATA, [replace("flashinfer-python", "flashinfer-python>=0.6.3")])
    assert b'\nRequires-Dist: flashinfer-python>=0.6.3 ; extra == "all"\n' in edited
    assert b"\nRequires-Dist: flashinfer-python>=0.6.3\n\n" in edited
    assert edited.startswith(METADATA[: METADATA.index(b"Requires-Dist:  flash")])


def test_replace_with_a_marker_takes_that_marker() -> None:
    edited, _ = edit_requires(METADATA, [replace("decord2", "decord ; extra == 'x'")])
    assert b"\nRequires-Dist: decord ; extra == 'x'\n" in edited
    assert b"platform_machine" not in edited


def test_replace_with_a_direct_reference_keeps_the_marker_apart_from_the_url() -> None:
    edited, _ = edit_requires(METADATA, [replace("decord2", "decord2 @ https://example.org/d.whl")])
    (requirement,) = (found for found in requires_dist(edited) if found.name == "decord2")
    assert requirement.url == "https://example.org/d.whl"
    assert "extra" in str(requirement.marker)


def test_replace_by_the_same_requirement_keeps_the_bytes() -> None:
    assert edit_requires(METADATA, [replace("numpy", "NumPy >= 2")])[0] == METADATA


def test_edit_that_matches_nothing_is_reported() -> None:
    edit = drop("absent")
    assert edit_requires(METADATA, [edit]) == (METADATA, (AppliedEdit(edit=edit, matched=()),))


def test_crlf_is_kept() -> None:
    crlf = METADATA.replace(b"\n", b"\r\n")
    edits: list[Edit] = [drop("torch"), replace("numpy", "numpy<3")]
    edited, _ = edit_requires(crlf, edits)
    assert edited == edit_requires(METADATA, edits)[0].replace(b"\n", b"\r\n")
    assert requires_dist(edited) == requires_dist(edited.replace(b"\r\n", b"\n"))


@pytest.mark.parametrize("tail", [b"", b"\n"])
def test_file_without_a_body(tail: bytes) -> None:
    edited, _ = edit_requires(b"Name: a\nVersion: 1\nRequires-Dist: b" + tail, [replace("b", "b>1")])
    assert edited == b"Name: a\nVersion: 1\nRequires-Dist: b>1\n"


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([drop("a"), drop("A")], "two edits"),
        ([replace("a", "b"), drop("b")], "another edit"),
        ([replace("a", "a b c")], "not a requirement"),
        ([replace("a", "a>1\nRequires-Dist: evil")], "line break"),
        ([drop("../a")], "not the name"),
    ],
)
def test_edit_that_cannot_be_meant_is_refused(edits: list[Edit], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        edit_requires(METADATA, edits)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff: a\n", "not UTF-8"),
        (b"\xef\xbb\xbfName: a\n", "not a header"),
        (b" Name: a\n", "not a header"),
        (b"A: b\n" * 20_001, "more than 20000 lines"),
        (b"Name a\n", "not a header"),
        (b"Name: a\rName: b\n", "control character"),
        (b"Name: a\0\n", "control character"),
        (b"Name: a\n \x1b[31m\n", "control character"),
    ],
)
def test_malformed_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(WheelError, match=message):
        headers(data)


@pytest.mark.parametrize(
    "data",
    [
        b"Name: a\n",
        b"Version: 1\n",
        b"Name: a\nName: a\nVersion: 1\n",
        b"Name: a\nVersion: x\n",
        b"Name: -\nVersion: 1",
    ],
)
def test_name_and_version_must_be_there_once_and_valid(data: bytes) -> None:
    with pytest.raises(WheelError):
        name_and_version(data)


def test_bad_requirement_is_refused() -> None:
    with pytest.raises(WheelError, match="Requires-Dist 'a b' is malformed"):
        requires_dist(b"Requires-Dist: a b\n")


def test_record_is_rendered_sorted_and_read_back() -> None:
    content = hashlib.sha512(b"x").digest()
    rows = {
        "b.py": row_of(b"hello\n"),
        'a,"q".py': row_of(b""),
        "Z/RECORD": RecordRow(),
        "c.py": RecordRow(stronger=("sha512", content), size=1),
    }
    rendered = render_record(rows)
    assert rendered.splitlines()[:3] == [
        b"Z/RECORD,,",
        b'"a,""q"".py",sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0',
        b"b.py,sha256=WJG1tSLV3whtD_CxEPvZ0hu0_HFjrzTQgoai6Eb2vgM,6",
    ]
    assert b"\r" not in rendered
    assert parse_record(rendered) == rows
    assert render_record(dict(reversed(rows.items()))) == rendered

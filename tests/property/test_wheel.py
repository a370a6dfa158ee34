"""Properties of the wheel reader and of metadata edits, for files and damage that nobody thought of."""

from __future__ import annotations

import contextlib
import string

from hypothesis import given, settings
from hypothesis import strategies as st

from composer.errors import WheelError
from composer.formats.metadata import DropRequirement, Edit, ReplaceRequirement, edit_requires, requires_dist
from composer.formats.record import RecordRow, parse_record, render_record
from composer.formats.wheel import entry_points, install_path, read_wheel, verified_stream
from tests.wheels import build_wheel, wheel_filename

NAME = wheel_filename("demo", "1.0")
FILES = {
    "demo/__init__.py": b"x = 1\n",
    "demo/a.bin": bytes(range(256)) * 8,
    "demo-1.0.data/scripts/run": b"#!python\n",
}
WHEEL = build_wheel("demo", "1.0", FILES, requires=["numpy"], entry_points={"console_scripts": {"demo": "demo:main"}})

steps = st.text(string.ascii_lowercase + string.digits + " ,\"'-", min_size=1, max_size=12)
paths = st.lists(steps, min_size=1, max_size=4).map(lambda parts: "/".join(["demo", *parts, "end.py"]))
names = st.sampled_from(["numpy", "torch", "flashinfer-python", "Flashinfer_Python", "cuda.bindings"])
requirements = st.builds(
    "{}{}{}".format, names, st.sampled_from(["", ">=1", "==2.0"]), st.sampled_from(["", "; extra == 'a'"])
)
lines = st.one_of(
    requirements.map("Requires-Dist: {}".format),
    requirements.map("requires-dist:\n  {}".format),
    st.just("License: a\n\tb"),
    st.just("Requires-Python: >=3"),
)


def drain(data: bytes) -> dict[str, bytes]:
    wheel = read_wheel(data, NAME)
    entry_points(wheel)
    return {path: b"".join(verified_stream(data, wheel, member)) for path, member in wheel.members.items()}


EXPECTED = drain(WHEEL)
cuts = st.tuples(st.integers(0, len(WHEEL)), st.integers(0, 40), st.binary(max_size=40))


@settings(max_examples=200, deadline=5000)
@given(st.lists(cuts, min_size=1, max_size=4))
def test_mutant_is_refused_or_reads_the_same(mutations: list[tuple[int, int, bytes]]) -> None:
    data = WHEEL
    for position, removed, inserted in mutations:
        data = data[:position] + inserted + data[position + removed :]
    try:
        contents = drain(data)
    except WheelError:
        return
    assert contents == EXPECTED


@settings(max_examples=100, deadline=5000)
@given(st.dictionaries(paths, st.binary(max_size=200), max_size=8), st.booleans())
def test_any_good_wheel_is_read_back(files: dict[str, bytes], zip64: bool) -> None:
    data = build_wheel("demo", "1.0", files, zip64=zip64)
    wheel = read_wheel(data, NAME)
    contents = drain(data)
    assert {path: contents[path] for path in files} == files
    assert all(install_path(wheel, path) == f"lib/python3.12/site-packages/{path}" for path in files)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(lines, max_size=8), st.sets(names.map(str.lower), max_size=2), st.text(), st.sampled_from(["\n", "\r\n"])
)
def test_edits_touch_nothing_else_and_are_idempotent(heads: list[str], dropped: set[str], body: str, end: str) -> None:
    text = "\n".join(["Name: demo", "Version: 1", *heads, "", ""]).replace("\n", end)
    metadata = text.encode() + body.encode()
    edits: list[Edit] = [
        ReplaceRequirement(name="cuda-bindings", to="cuda-python>=13", reason="r"),
        *(DropRequirement(name=n, reason="r") for n in {n.replace("_", "-") for n in dropped} - {"cuda.bindings"}),
    ]
    edited, applied = edit_requires(metadata, edits)
    assert edit_requires(edited, edits)[0] == edited
    assert edited.endswith(body.encode())
    gone = {edit.edit.name for edit in applied if isinstance(edit.edit, DropRequirement)}
    assert not gone & {found.name.lower().replace("_", "-") for found in requires_dist(edited)}
    assert others(edited, body, end) == others(metadata, body, end)


def others(metadata: bytes, body: str, end: str) -> list[str]:
    """The header lines that are no requirement."""
    lines = metadata[: len(metadata) - len(body.encode())].decode().split(end)
    return [line for line in lines if not line.lower().startswith(("requires-dist:", "  "))]


rows = st.builds(
    RecordRow,
    sha256=st.one_of(st.none(), st.binary(min_size=32, max_size=32)),
    size=st.one_of(st.none(), st.integers(0, 2**60)),
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), rows, max_size=6))
def test_record_round_trips(table: dict[str, RecordRow]) -> None:
    assert parse_record(render_record(table)) == table


@settings(max_examples=200, deadline=5000)
@given(st.binary(max_size=200))
def test_parsers_raise_wheel_error_alone(data: bytes) -> None:
    for parse in (parse_record, requires_dist):
        with contextlib.suppress(WheelError):
            parse(data)

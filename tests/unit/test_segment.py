"""Where members lie is computed from the manifest alone, and is where the tar writer puts them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.formats import tar
from composer.formats.segment import is_header, members, padded_end
from composer.model.layer import Entry

_PART = st.text(st.characters(codec="utf-8", exclude_characters="/\0\n\r"), min_size=1, max_size=60)
_PATHS = st.lists(_PART, min_size=1, max_size=4).map("/".join)
_ENTRIES = st.one_of(
    st.builds(Entry, path=_PATHS, mode=st.sampled_from([0o644, 0o755, 0o600]), size=st.integers(0, 9_000_000_000)),
    st.builds(Entry, path=_PATHS, mode=st.just(0o777), target=_PATHS),
)


def header(entry: Entry) -> bytes:
    if entry.target is not None:
        return tar.link_header(entry.path, target=entry.target, mtime=315_532_800)
    return tar.file_header(entry.path, size=entry.size, mode=entry.mode, mtime=315_532_800)


@given(st.lists(_ENTRIES, max_size=6))
def test_members_lie_where_they_are_written(entries: list[Entry]) -> None:
    position = 0
    for entry, member in zip(entries, members(entries), strict=True):
        written = header(entry)
        assert member.start == position + len(written)
        assert is_header(written[-tar.BLOCK :], entry)
        position += len(written) + entry.size + len(tar.padding(entry.size))
        assert padded_end(member) == position


@pytest.mark.parametrize(
    "other",
    [
        Entry(path="lib/b", size=5), Entry(path="lib/a", size=6), Entry(path="lib/a", size=5, mode=0o755),
        Entry(path="lib/a", size=5, target="b"),
    ],
)  # fmt: skip
def test_the_header_of_another_entry(other: Entry) -> None:
    block = header(Entry(path="lib/a", size=5))
    assert is_header(block, Entry(path="lib/a", size=5))
    assert not is_header(block, other)
    assert not is_header(block[:100], Entry(path="lib/a", size=5))

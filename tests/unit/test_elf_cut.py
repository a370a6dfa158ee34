from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats.elf_cut import Cut, Span, cut
from tests.elf_memory import call, memory, readelf, sections, segments
from tests.shared_objects import gcc, library

_PAGE = 4096
_LOAD, _NOTE, _RELRO, _PHDR = 1, 4, 0x6474E552, 6
_BLOB = 10 * _PAGE + 40

# A section of known bytes in the middle of the read-only data, and data, zeroed memory and relocations behind it.
_SOURCE = """
__asm__(".section .blob,\\"a\\",@progbits\\n.global blob\\n.hidden blob\\nblob:\\n"
        ".rept 41000\\n.byte 0xAB\\n.endr\\n.text");
extern const unsigned char blob[];
static int values[3] = {40, 1, 1};
int *pointers[2] = {values, values + 2};
static char zeroed[9000];
_Thread_local int local = 7;
int answer(void) { return *pointers[0] + *pointers[1] + blob[0] - 0xAB + zeroed[8999] + local - 6; }
"""
assert _BLOB == 41000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cut")


@pytest.fixture(scope="module")
def path(folder: Path) -> Path:
    return library(folder / "libblob.so", _SOURCE, "-g", "-Wl,-z,max-page-size=4096")


@pytest.fixture(scope="module")
def data(path: Path) -> bytes:
    return path.read_bytes()


def _blob(data: bytes) -> Span:
    row = sections(data)[".blob"]
    return Span(row[4], row[4] + row[5])


def _bytes(result: Cut) -> bytes:
    data = b"".join(result.pieces())
    assert len(data) == len(result) == result.size
    return data


def _without(data: bytes, free: Span) -> dict[int, int]:
    """The memory of an object less what a file range holds, and with nothing that says where its headers are."""
    shift = next(
        row[3] - row[2] for row in segments(data) if row[0] == _LOAD and row[2] <= free.start < row[2] + row[5]
    )
    taken = range(free.start + shift, free.end + shift)
    return {address: byte for address, byte in memory(data).items() if address not in taken and not address < 0x400}


def test_nothing_to_do(data: bytes) -> None:
    assert _bytes(cut(data, [], {}, "x.so")) == data


def test_whole_pages_leave_and_addresses_stay(folder: Path, data: bytes) -> None:
    blob = _blob(data)
    free = Span(blob.start + 1000, blob.end)
    new = _bytes(cut(data, [free], {}, "x.so"))
    assert len(data) - len(new) in (9 * _PAGE, 10 * _PAGE)
    now = memory(new)
    assert {address: now.get(address) for address in _without(data, free)} == _without(data, free)
    assert len(memory(data)) - len(now) == len(data) - len(new)
    assert len(segments(new)) == len(segments(data)) + 1
    assert sections(new)[".blob"][5] == 1000
    changed = folder / "libcut.so"
    changed.write_bytes(new)
    assert call(changed) == 42 == call(folder / "libblob.so")
    assert readelf(changed).count(" LOAD ") == readelf(folder / "libblob.so").count(" LOAD ") + 1


def test_the_grown_table_is_mapped_behind_what_stays(data: bytes) -> None:
    blob = _blob(data)
    new = _bytes(cut(data, [(blob.start + 1001, blob.end)], {}, "x.so"))
    (at,) = struct.unpack_from("<Q", new, 32)
    _, kept, *_ = (sections(new)[".blob"][4], sections(new)[".blob"][4] + 1001)
    assert kept <= at < kept + 8
    inside = [
        row
        for row in segments(new)
        if row[0] == _LOAD and row[2] <= at and at + 56 * len(segments(new)) <= row[2] + row[5]
    ]
    assert len(inside) == 1


def test_less_than_a_page_becomes_zeros(data: bytes) -> None:
    blob = _blob(data)
    new = _bytes(cut(data, [(blob.end - 500, blob.end)], {}, "x.so"))
    assert len(new) == len(data)
    assert new[blob.start : blob.end] == data[blob.start : blob.end - 500] + bytes(500)
    assert sections(new)[".blob"][5] == _BLOB - 500
    assert segments(new) == segments(data)


def test_zeroed_ranges_stay_in_the_file(data: bytes) -> None:
    blob = _blob(data)
    new = _bytes(cut(data, [], {}, "x.so", zero=[(blob.start + 8, blob.end)]))
    assert len(new) == len(data)
    assert new[blob.start : blob.end] == b"\xab" * 8 + bytes(_BLOB - 8)
    assert sections(new)[".blob"][5] == 8


def test_debug_sections_leave(folder: Path, data: bytes) -> None:
    found = {name: row for name, row in sections(data).items() if name.startswith(".debug_")}
    assert found
    free = [(row[4], row[4] + row[5]) for row in found.values()]
    numbers = [list(sections(data)).index(name) for name in found]
    new = _bytes(cut(data, free, {}, "x.so", drop_sections=numbers))
    assert list(sections(new)) == [name for name in sections(data) if name not in found]
    assert memory(new).keys() == memory(data).keys()
    assert abs(len(data) - len(new) - sum(row[5] for row in found.values()) - 64 * len(found)) < 32
    changed = folder / "libnodebug.so"
    changed.write_bytes(new)
    assert call(changed) == 42
    before, after = readelf(folder / "libblob.so"), readelf(changed)
    assert [line for line in after.splitlines() if " answer" in line] == [
        line for line in before.splitlines() if " answer" in line
    ]
    assert sections(new)[".symtab"][6] == list(sections(new)).index(".strtab")


def test_overlays_of_bytes_and_of_spans(data: bytes) -> None:
    blob = _blob(data)
    text = Span(*(sections(data)[".text"][4] + step for step in (0, 16)))
    overlays = {blob.start + 3: b"here", blob.start + 16: text}
    new = _bytes(cut(data, [(blob.start + 64, blob.end)], overlays, "x.so"))
    start = sections(new)[".blob"][4]
    assert new[start : start + 64] == b"\xab" * 3 + b"here" + b"\xab" * 9 + data[text.start : text.end] + b"\xab" * 32


def test_slices_of_the_result(data: bytes) -> None:
    blob = _blob(data)
    result = cut(data, [(blob.start + 64, blob.end)], {blob.start + 3: b"here"}, "x.so")
    whole = _bytes(result)
    for start, stop in ((0, 10), (blob.start, blob.start + 9), (blob.start - 5, len(whole) + 9), (9, 9), (-7, None)):
        assert result[start:stop] == whole[start:stop]


@pytest.mark.parametrize("linker", ["-Wl,-z,max-page-size=0x200000", "-Wl,-z,noseparate-code", "-Wl,-z,separate-code"])
def test_other_layouts_load(folder: Path, linker: str) -> None:
    path = library(folder / "layout" / "lib.so", _SOURCE, linker, "-g")
    data = path.read_bytes()
    blob = _blob(data)
    new = _bytes(cut(data, [(blob.start + 10, blob.end)], {}, "x.so"))
    assert len(data) - len(new) >= 9 * _PAGE
    changed = path.with_name("libnew.so")
    changed.write_bytes(new)
    assert call(changed) == 42
    readelf(changed)
    for kind, _, offset, address, _, _, _, align in segments(new):
        assert kind != _LOAD or (address - offset) % align == 0


def test_aarch64_is_cut_in_its_largest_pages(folder: Path) -> None:
    path = folder / "arm" / "lib.so"
    path.parent.mkdir()
    source = path.with_suffix(".s")
    source.write_text('.section .blob,"a",%progbits\n.rept 300000\n.byte 0xAB\n.endr\n.data\n.8byte 1\n')
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu"]
    subprocess.run([*compiler, "-shared", "-nostdlib", "-o", path, source], check=True, capture_output=True)
    data = path.read_bytes()
    blob = _blob(data)
    new = _bytes(cut(data, [(blob.start + 10, blob.end)], {}, "x.so"))
    assert (len(data) - len(new)) // 65536 in (3, 4)
    assert (len(data) - len(new)) % 65536 == 0
    for kind, _, offset, address, *_ in segments(new):
        assert kind != _LOAD or (address - offset) % 65536 == 0
    path.write_bytes(new)
    readelf(path)


def _range(data: bytes, name: str) -> Span:
    row = sections(data)[name]
    return Span(row[4], row[4] + row[5])


@pytest.mark.parametrize("name", [".dynamic", ".dynsym", ".rela.dyn", ".symtab", ".tdata"])
def test_what_the_loader_reads_is_not_free(data: bytes, name: str) -> None:
    with pytest.raises(ElfError, match=r"a free range holds a part of"):
        cut(data, [_range(data, name)], {}, "x.so")


def test_headers_are_not_free(data: bytes) -> None:
    for start in (0, 63, 64, struct.unpack_from("<Q", data, 40)[0]):
        with pytest.raises(ElfError, match=r"x\.so: a free range holds a part of the .* headers?"):
            cut(data, [(start, start + 1)], {}, "x.so")


def test_a_section_gets_no_hole(data: bytes) -> None:
    blob = _blob(data)
    with pytest.raises(ElfError, match="a hole in a section"):
        cut(data, [(blob.start + 10, blob.end - 10)], {}, "x.so")


def test_a_range_outside_the_file(data: bytes) -> None:
    with pytest.raises(ElfError, match="not inside the file"):
        cut(data, [(len(data) - 1, len(data) + 1)], {}, "x.so")


def test_changes_must_be_apart(data: bytes) -> None:
    blob = _blob(data)
    for overlays in (
        {blob.end - 4: b"abcd"},
        {blob.start: b"abcd", blob.start + 3: b"e"},
        {2: b"x"},
        {len(data): b"x"},
    ):
        with pytest.raises(ElfError, match=r"a change "):
            cut(data, [(blob.start + 64, blob.end)], overlays, "x.so")


def _number(data: bytes, name: str) -> int:
    return list(sections(data)).index(name)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (".text", "in memory"),
        (".shstrtab", "cannot be dropped"),
        (".strtab", "refers to one that is dropped"),
    ],
)
def test_sections_that_others_need(data: bytes, name: str, fault: str) -> None:
    with pytest.raises(ElfError, match=fault):
        cut(data, [], {}, "x.so", drop_sections=[_number(data, name)])


def test_a_symbol_behind_a_dropped_section(data: bytes) -> None:
    """.comment comes before .debug_*, whose section symbols are in .symtab as long as an object is relocatable."""
    numbers = list(sections(data))
    table = _range(data, ".symtab")
    changed = bytearray(data)
    struct.pack_into("<H", changed, table.start + 24 * 3 + 6, len(numbers) - 1)
    with pytest.raises(ElfError, match="names a section behind a dropped one"):
        cut(bytes(changed), [], {}, "x.so", drop_sections=[_number(data, ".comment")])
    struct.pack_into("<H", changed, table.start + 24 * 3 + 6, 0xFFFF)
    with pytest.raises(ElfError, match="does not fit 16 bits"):
        cut(bytes(changed), [], {}, "x.so", drop_sections=[_number(data, ".comment")])


def test_a_programs_headers_do_not_move(folder: Path) -> None:
    path = folder / "program"
    gcc("-pie", "-fPIE", "-nostdlib", "-o", path, source=_SOURCE.replace("_Thread_local ", "") + "void _start(void) {}")
    data = path.read_bytes()
    blob = _blob(data)
    with pytest.raises(ElfError, match="of a program cannot move"):
        cut(data, [(blob.start + 10, blob.end)], {}, "x")


def test_the_table_takes_what_could_leave(folder: Path) -> None:
    """The only whole page of the free range holds the program headers, so nothing leaves; the rest is zeroed."""
    data = library(folder / "tight.so", _SOURCE).read_bytes()
    blob = _blob(data)
    start = blob.start + _PAGE + -blob.start % _PAGE
    changed = bytearray(data)
    row = struct.unpack_from("<Q", data, 40)[0] + 64 * _number(data, ".blob")
    struct.pack_into("<Q", changed, row + 32, start + _PAGE - blob.start)
    new = _bytes(cut(bytes(changed), [(start, start + _PAGE)], {}, "x.so"))
    assert len(new) == len(data)
    size = 56 * len(segments(new))
    assert struct.unpack_from("<Q", new, 32) == (start,)
    assert new[start + size : start + _PAGE] == bytes(_PAGE - size)


def test_the_table_must_be_readable(data: bytes) -> None:
    blob = _blob(data)
    changed = bytearray(data)
    for index, row in enumerate(segments(data)):
        if row[0] == _LOAD and row[2] <= blob.start < row[2] + row[5]:
            struct.pack_into("<I", changed, 64 + 56 * index + 4, 1)
    with pytest.raises(ElfError, match="no room for more program headers"):
        cut(bytes(changed), [(blob.start + 1000, blob.end)], {}, "x.so")


def test_phdr_follows_the_table(data: bytes) -> None:
    """GNU ld gives libraries none: the note's header becomes one."""
    changed = bytearray(data)
    at = next(64 + 56 * index for index, row in enumerate(segments(data)) if row[0] == _NOTE)
    struct.pack_into("<2I6Q", changed, at, _PHDR, 4, 64, 64, 64, 56 * len(segments(data)), 56 * len(segments(data)), 8)
    blob = _blob(data)
    new = _bytes(cut(bytes(changed), [(blob.start + 1000, blob.end)], {}, "x.so"))
    row = next(row for row in segments(new) if row[0] == _PHDR)
    assert row[2] == struct.unpack_from("<Q", new, 32)[0]
    assert row[5] == row[6] == 56 * len(segments(new))
    assert bytes(memory(new)[row[3] + index] for index in range(row[5])) == new[row[2] : row[2] + row[5]]


def test_objects_that_are_not_cut(data: bytes, folder: Path) -> None:
    relocatable = folder / "one.o"
    gcc("-c", "-o", relocatable, source="int one;")
    for bad, fault in (
        (b"", "not an ELF object"),
        (data[:64], "outside the file"),
        (relocatable.read_bytes(), "not a shared object"),
        (data[:18] + b"\x28\0" + data[20:], "not an ELF64 little-endian object"),
        (data[:54] + b"\x20\0" + data[56:], "no readable program header table"),
        (data[:58] + b"\x20\0" + data[60:], "no readable section header table"),
        (data[:60] + b"\0\0" + data[62:], "too many sections"),
    ):
        with pytest.raises(ElfError, match=fault):
            cut(bad, [], {}, "x.so")


def test_segments_out_of_order(data: bytes) -> None:
    places = [64 + 56 * index for index, row in enumerate(segments(data)) if row[0] == _LOAD]
    changed = bytearray(data)
    first, second = (data[at : at + 56] for at in places[1:3])
    changed[places[1] : places[1] + 56], changed[places[2] : places[2] + 56] = second, first
    with pytest.raises(ElfError, match="is not above the one at"):
        cut(bytes(changed), [], {}, "x.so")

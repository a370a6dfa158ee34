from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats.gpu_code import read_gpu_code
from composer.formats.sections import read_sections
from composer.formats.slim import Slimmed, Tally, slim
from composer.model.gpu import Selection
from composer.proofs.slimmed import prove_slimmed
from tests.elf_memory import sections
from tests.fatbins import Parts, container, gpu_library, image, images
from tests.shared_objects import gcc, library

_SM90 = Selection(sms=(90,))
_BIG = b"\x5a" * 20_000


def _fat(*names: str, payload: bytes = _BIG) -> bytes:
    """A container with images large enough for whole pages to become free."""
    return container(
        *(image(name[:3], int(name[3:].rstrip("af")), name[3:].lstrip("0123456789"), payload=payload) for name in names)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slim")


@pytest.fixture(scope="module")
def data(folder: Path) -> bytes:
    parts = Parts(fatbins=[_fat("elf80", "elf90", "ptx90"), _fat("elf75"), _fat("elf90", "elf90a", "elf100")])
    return gpu_library(folder / "lib.so", parts).read_bytes()


def _bytes(result: Slimmed) -> bytes:
    data = b"".join(result.pieces())
    assert len(data) == result.size
    return data


def _kept(data: bytes) -> list[list[str]]:
    code = read_gpu_code(data, "x.so")
    assert code.doubts == ()
    return [
        [f"{one.kind}{one.sm}{one.variant}" for one in fatbin.entries]
        for region in code.regions
        for fatbin in region.containers
    ]


def test_only_the_selection_stays(data: bytes) -> None:
    result = slim(data, "x.so", _SM90)
    assert (result.how, result.why, result.debug) == ("shrunk", None, 0)
    size = 64 + len(_BIG)
    assert (result.kept, result.dropped) == (Tally(3, 3 * size), Tally(4, 4 * size))
    assert 0 <= len(data) - result.size - 3 * size < size
    new = _bytes(result)
    assert _kept(new) == [["elf90"], [], ["elf90", "elf90a"]]
    assert sections(new)[".nv_fatbin"][5] == 3 * size + 3 * 16


def test_every_image_that_stays_is_the_same(data: bytes) -> None:
    new = _bytes(slim(data, "x.so", _SM90))
    before, after = (read_gpu_code(one, "x.so") for one in (data, new))
    old = [
        one for fatbin in before.regions[0].containers for one in fatbin.entries if one.sm == 90 and one.kind == "elf"
    ]
    now = [one for fatbin in after.regions[0].containers for one in fatbin.entries]
    assert [data[one.start : one.end] for one in old] == [new[one.start : one.end] for one in now]


def test_aligned_containers_stay_aligned(folder: Path) -> None:
    """On AArch64 nvcc aligns each to 256 bytes, with zeros between them."""
    parts = Parts(fatbins=[_fat("elf80", "elf90"), _fat("elf75"), _fat("elf80"), _fat("elf90", "elf90a")], align=256)
    data = gpu_library(folder / "aligned.so", parts).read_bytes()
    new = _bytes(slim(data, "x.so", _SM90))
    prove_slimmed(data, new, "x.so", (90,), keep_ptx=False, debug=False)
    assert _kept(new) == [["elf90"], [], [], ["elf90", "elf90a"]]
    (region,) = read_gpu_code(new, "x.so").regions
    assert {(one.start - region.offset + region.address) % 256 for one in region.containers} == {0}
    assert len(new) < len(data) - 2 * len(_BIG)
    assert slim(new, "x.so", _SM90).how == "unchanged"


def test_containers_that_lost_their_alignment_are_not_proven(folder: Path) -> None:
    data = gpu_library(
        folder / "tight.so", Parts(fatbins=[_fat("elf80", "elf90"), _fat("elf90")], align=256)
    ).read_bytes()
    table = read_sections(data, "x.so")
    number = next(at for at, one in enumerate(table.sections) if one.name == ".nv_fatbin")
    place = table.start + 64 * number + 48  # sh_addralign
    believes_8 = data[:place] + struct.pack("<Q", 8) + data[place + 8 :]
    new = bytearray(_bytes(slim(believes_8, "x.so", _SM90)))
    with pytest.raises(ElfError, match="is not aligned to 256 bytes"):
        prove_slimmed(data, bytes(new), "x.so", (90,), keep_ptx=False, debug=False)


def test_all_targets_change_nothing(data: bytes) -> None:
    result = slim(data, "x.so", Selection())
    assert (result.how, result.why, result.dropped) == ("unchanged", None, Tally(0, 0))
    assert _bytes(result) == data


def test_a_selection_that_keeps_everything_changes_nothing(folder: Path) -> None:
    data = gpu_library(folder / "same.so", Parts(fatbins=[images("elf90"), images("elf90a", "elf90")])).read_bytes()
    result = slim(data, "x.so", _SM90)
    assert (result.how, result.kept.images, result.dropped) == ("unchanged", 3, Tally(0, 0))
    assert _bytes(result) == data


def test_slimming_twice_changes_nothing(data: bytes) -> None:
    new = _bytes(slim(data, "x.so", _SM90))
    again = slim(new, "x.so", _SM90)
    assert (again.how, again.kept.images) == ("unchanged", 3)


def test_no_gpu_code(folder: Path) -> None:
    data = library(folder / "plain.so").read_bytes()
    result = slim(data, "x.so", _SM90)
    assert (result.how, result.why, result.kept, result.dropped) == ("unchanged", None, Tally(0, 0), Tally(0, 0))
    assert _bytes(result) == data


def test_debug_symbols_and_gpu_code_in_one_pass(folder: Path) -> None:
    parts = Parts(fatbins=[_fat("elf80", "elf90")])
    data = gpu_library(folder / "debug.so", parts, "-g").read_bytes()
    result = slim(data, "x.so", _SM90, debug=True)
    assert (result.how, result.why) == ("shrunk", None)
    assert result.debug > 300
    assert not {".symtab", ".debug_info"} & set(sections(_bytes(result)))
    only = slim(data, "x.so", Selection(), debug=True)
    assert (only.how, only.dropped, only.debug) == ("shrunk", Tally(0, 0), result.debug)


def test_symbols_that_stay_follow_their_code(folder: Path) -> None:
    parts = Parts(fatbins=[_fat("elf80", "elf90"), _fat("elf90")])
    data = gpu_library(folder / "symbols.so", parts).read_bytes()
    new = _bytes(slim(data, "x.so", _SM90))
    assert _symbol(data, "fatbin_1") - _symbol(data, "fatbin_0") == 2 * (64 + len(_BIG)) + 16
    assert _symbol(new, "fatbin_1") - _symbol(new, "fatbin_0") == 64 + len(_BIG) + 16
    assert _symbol(new, "wrapper_1") == _symbol(data, "wrapper_1")


def _symbol(data: bytes, name: str) -> int:
    table, strings = sections(data)[".symtab"], sections(data)[".strtab"]
    for at in range(table[4], table[4] + table[5], 24):
        text, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, at)
        if data[strings[4] + text :].startswith(name.encode() + b"\0"):
            return value
    raise AssertionError(name)


def test_doubts_leave_the_code_alone(folder: Path) -> None:
    extra = '.data\n.8byte fatbin_0 + 40\n.section .debug_x,"",%progbits\n.ascii "symbols"'
    parts = Parts(fatbins=[_fat("elf80", "elf90")], extra=extra)
    data = gpu_library(folder / "doubt.so", parts).read_bytes()
    result = slim(data, "x.so", _SM90)
    assert (result.how, result.kept.images, result.dropped) == ("unchanged", 2, Tally(0, 0))
    assert re.fullmatch(r"the GPU code stays: something points into \.nv_fatbin, at .*0x.*", result.why or "")
    assert _bytes(result) == data
    cut = slim(data, "x.so", _SM90, debug=True)
    assert (cut.how, cut.why, cut.dropped) == ("shrunk", result.why, Tally(0, 0))
    assert ".debug_x" not in sections(_bytes(cut))


def test_pinned_containers_stay_where_they_are(folder: Path) -> None:
    """And so does what comes before them."""
    fatbins = [_fat("elf80", "elf90"), _fat("elf80", "elf90"), _fat("elf80", "elf90")]
    data = gpu_library(folder / "pinned.so", Parts(fatbins=fatbins, unwrapped=[1])).read_bytes()
    code = read_gpu_code(data, "x.so")
    (pinned,) = code.pinned
    new = _bytes(slim(data, "x.so", _SM90))
    assert _kept(new) == [["elf80", "elf90"], ["elf80", "elf90"], ["elf90"]]
    after = read_gpu_code(new, "x.so")
    region, before = after.regions[0], code.regions[0]
    assert after.pinned == {pinned - before.offset + region.offset}
    assert region.containers[1].end - region.offset == before.containers[1].end - before.offset


def test_items_keep_their_order_and_their_other_data(folder: Path) -> None:
    items = [b"data ahead", _fat("elf100"), _fat("elf90", "elf100"), b"data behind"]
    data = gpu_library(folder / "items.so", Parts(fatbins=[_fat("elf90")], items=items)).read_bytes()
    new = _bytes(slim(data, "x.so", _SM90))
    code = read_gpu_code(new, "x.so")
    region = next(one for one in code.regions if one.name == ".cask_resource")
    assert code.doubts == ()
    found = [(new[item.start : item.end], item.container) for item in region.items]
    assert [content[:11].rstrip(b"\0") for content, one in found if not one] == [items[0], items[3]]
    assert [[entry.sm for entry in one.entries] for _, one in found if one] == [[], [90]]
    assert [len(content) for content, one in found if one] == [16 + 8, 16 + 64 + len(_BIG) + 8]


@pytest.mark.parametrize("debug", [False, True])
def test_where_nothing_can_leave_it_is_zeroed(folder: Path, debug: bool) -> None:
    """The program headers of what has an interpreter cannot move, so that no segment can be split."""
    parts = Parts(
        fatbins=[_fat("elf80", "elf90"), _fat("elf90")],
        extra='.section .interp,"a",%progbits\n.asciz "/lib64/ld-linux-x86-64.so.2"',
    )
    data = gpu_library(folder / "interp.so", parts, "-g").read_bytes()
    result = slim(data, "x.so", _SM90, debug=debug)
    assert result.why == "the program headers of a program cannot move"
    assert result.dropped.images == 1
    new = _bytes(result)
    assert _kept(new) == [["elf90"], ["elf90"]]
    row, old = sections(new)[".nv_fatbin"], sections(data)[".nv_fatbin"]
    assert new[row[4] + row[5] : row[4] + old[5]] == bytes(old[5] - row[5])
    assert (result.how, result.debug > 0) == (("shrunk", True) if debug else ("compacted", False))


def test_debug_symbols_that_cannot_leave(folder: Path) -> None:
    parts = Parts(fatbins=[_fat("elf80", "elf90")])
    data = gpu_library(folder / "relocs.so", parts, "-Wl,--emit-relocs").read_bytes()
    result = slim(data, "x.so", _SM90, debug=True)
    assert (result.how, result.dropped.images, result.debug) == ("shrunk", 1, 0)
    assert "refers to .symtab" in (result.why or "")


def test_not_an_object() -> None:
    with pytest.raises(ElfError, match=r"x\.so: not an ELF object"):
        slim(b"#!/bin/sh\necho hello\n", "x.so", _SM90, debug=True)


# --- damaged objects --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_symbols(folder: Path) -> bytes:
    fat = _fat("elf80", "elf90", payload=_BIG[:5000])
    parts = Parts(fatbins=[fat, fat], relinkable=[fat], device_linked=[0])
    return gpu_library(folder / "symbols.so", parts, "-g", "-Wl,-z,pack-relative-relocs").read_bytes()


def _damaged(data: bytes, at: int, number: int, size: int = 8) -> bytes:
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def _header(data: bytes, name: str) -> int:
    """Offset of the section header."""
    return int.from_bytes(data[40:48], "little") + 64 * list(sections(data)).index(name)


def _load(data: bytes) -> int:
    """Offset of the program header of the last PT_LOAD."""
    rows = [64 + 56 * index for index in range(int.from_bytes(data[56:58], "little"))]
    return max(at for at in rows if data[at : at + 4] == b"\1\0\0\0")


def _value_at(data: bytes, table: str, number: int) -> int:
    """Offset of a symbol's value."""
    return sections(data)[table][4] + 24 * number + 8


def _tag(data: bytes, tag: int) -> int:
    """Offset of a dynamic entry's value."""
    row = sections(data)[".dynamic"]
    places = range(row[4], row[4] + row[5], 16)
    return next(at for at in places if int.from_bytes(data[at : at + 8], "little") == tag) + 8


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: _damaged(data, _load(data) + 48, 1 << 21), id="p_align that is not congruent"),
        pytest.param(lambda data: _damaged(data, _load(data) + 48, 0), id="no p_align"),
        pytest.param(lambda data: _damaged(data, 32, 64 + 4), id="e_phoff"),
        pytest.param(lambda data: _damaged(data, _load(data) - 56 + 40, 0x50000), id="p_memsz up to the next"),
        pytest.param(lambda data: _damaged(data, _load(data) + 32, 16), id="p_filesz without its sections"),
        pytest.param(lambda data: _damaged(data, _header(data, ".data") + 32, 0x500), id="sh_size into others"),
        pytest.param(lambda data: _damaged(data, _header(data, ".comment") + 32, 0x100), id="sh_size into what is cut"),
        pytest.param(lambda data: _damaged(data, _value_at(data, ".symtab", 3), 0x3000), id="a symbol inside an image"),
        pytest.param(lambda data: _damaged(data, _value_at(data, ".dynsym", 0), 0x3000), id="a value without a symbol"),
        pytest.param(lambda data: _damaged(data, _tag(data, 7), 1 << 40), id="DT_RELA"),
        pytest.param(lambda data: _damaged(data, _tag(data, 36), 1 << 40), id="DT_RELR"),
    ],
)
def test_a_damaged_object_is_refused_or_what_is_made_of_it_is_proven(
    with_symbols: bytes, damage: Callable[[bytes], bytes], debug: bool
) -> None:
    data = damage(with_symbols)
    assert data != with_symbols
    try:
        result = slim(data, "x.so", _SM90, debug=debug)
    except ElfError:
        return
    if result.how != "unchanged":
        prove_slimmed(data, _bytes(result), "x.so", (90,), keep_ptx=False, debug=debug)


def test_a_relative_relocation_that_names_a_symbol(data: bytes) -> None:
    rela = sections(data)[".rela.dyn"][4]
    with pytest.raises(ElfError, match="a relative relocation names a symbol"):
        slim(_damaged(data, rela + 12, 1, 4), "x.so", _SM90, debug=True)


def test_a_damaged_object_says_what_is_wrong(with_symbols: bytes) -> None:
    result = slim(_damaged(with_symbols, _load(with_symbols) + 48, 0), "x.so", _SM90, debug=True)
    assert result.how == "unchanged"
    assert result.why is not None
    assert re.fullmatch(r"it is damaged \(segment at 0x[0-9a-f]+ has no alignment\)", result.why)


def test_debug_symbols_of_a_relocatable_object(folder: Path) -> None:
    path = folder / "one.o"
    gcc("-c", "-o", path, source="int one;")
    result = slim(path.read_bytes(), "one.o", _SM90, debug=True)
    assert (result.how, result.why) == ("unchanged", "not a shared object")

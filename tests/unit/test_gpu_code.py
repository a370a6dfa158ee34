"""Where real objects, made by real linkers, keep GPU code: what is proven, and what is doubted."""

from __future__ import annotations

import resource
import struct
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats import instructions, references
from composer.formats.cubin import read_cubin
from composer.formats.gpu_code import GpuCode, kept_entries, read_gpu_code
from composer.formats.sections import read_sections
from composer.model.gpu import Selection
from tests.fatbins import Parts, container, gpu_library, held, image, images

PARTS = Parts(
    fatbins=[images("elf80", "elf90", "elf90a", "ptx90"), images("elf100", "ptx120"), images("ptx52")],
    relinkable=[images("elf80", "elf90")],
    device_linked=[1],
    items=[b"no container", images("elf100a"), b"8 bytes.", images("elf100a", "elf120")],
    before=b"other data " * 100,
)
RELR = "-Wl,-z,pack-relative-relocs"


def make(folder: Path, parts: Parts, *words: str, machine: str = "x86_64") -> bytes:
    return gpu_library(folder / "lib.so", parts, *words, machine=machine).read_bytes()


def code_of(folder: Path, parts: Parts, *words: str, machine: str = "x86_64") -> GpuCode:
    return read_gpu_code(make(folder, parts, *words, machine=machine), "lib.so")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("gpu"), PARTS)


@pytest.mark.parametrize(
    ("words", "machine"),
    [((), "x86_64"), ((RELR,), "x86_64"), (("-Wl,-z,max-page-size=0x200000",), "x86_64"), ((), "aarch64")],
)
def test_everything_is_found_and_proven(tmp_path: Path, words: tuple[str, ...], machine: str) -> None:
    data = make(tmp_path, PARTS, *words, machine=machine)
    code = read_gpu_code(data, "lib.so")
    assert (code.machine, code.doubts, code.pinned, code.elsewhere) == (machine, (), frozenset(), ())
    regions = {one.name: one for one in code.regions}
    assert [len(regions[name].containers) for name in (".nv_fatbin", "__nv_relfatbin", ".cask_resource")] == [3, 1, 2]
    for wrapper, content in zip(code.wrappers, [*PARTS.fatbins, *PARTS.relinkable], strict=True):
        assert data[wrapper.container : wrapper.container + len(content)] == content
        assert (wrapper.pointer.row is None) == (RELR in words)
        assert wrapper.pointer.offset == wrapper.offset + 8
        if wrapper.pointer.row is not None:
            row = struct.unpack_from("<QQQ", data, wrapper.pointer.row)
            assert (row[0], row[2]) == (wrapper.pointer.word, wrapper.pointer.target)
    assert [one.version for one in code.wrappers] == [1, 2, 1, 1]


@pytest.mark.parametrize("words", [(), (RELR,)])
def test_items(tmp_path: Path, words: tuple[str, ...]) -> None:
    data = make(tmp_path, PARTS, *words)
    (region,) = (one for one in read_gpu_code(data, "lib.so").regions if one.name == ".cask_resource")
    assert [one.container is not None for one in region.items] == [False, True, False, True]
    for item, content in zip(region.items, PARTS.items, strict=True):
        assert data[item.start : item.end] == content + bytes(-len(content) % 8 + 8)
        assert [one.target - region.address + region.offset for one in (*item.starts, *item.ends)] == [
            item.start, item.end,
        ]  # fmt: skip
    assert region.containers == tuple(one.container for one in region.items if one.container)


def test_the_test_library_is_what_a_program_sees(tmp_path: Path) -> None:
    assert held(gpu_library(tmp_path / "lib.so", PARTS), 4) == [*PARTS.fatbins, *PARTS.relinkable]


def test_what_a_selection_keeps(library: bytes) -> None:
    code = read_gpu_code(library, "lib.so")
    kept = kept_entries(code, Selection(sms=(90,)))
    named = {one.container: sorted(kept[one.container]) for one in code.wrappers}
    # The device-linked container has nothing for 90, so what can be linked again for it stays.
    assert list(named.values()) == [[1, 2], [], [0], [1]]
    kept = kept_entries(code, Selection(sms=(100,)))
    assert [sorted(kept[one.container]) for one in code.wrappers] == [[3], [0], [0], []]
    assert [sorted(kept[one.start]) for one in code.regions[2].containers] == [[0], [0]]
    kept = kept_entries(code, Selection())
    assert all(len(kept[one.start]) == len(one.entries) for region in code.regions for one in region.containers)


def test_no_gpu_code(tmp_path: Path) -> None:
    code = code_of(tmp_path, Parts())
    assert (code.regions, code.wrappers, code.doubts) == ((), (), ())


def test_another_machine(tmp_path: Path) -> None:
    data = bytearray(make(tmp_path, PARTS))
    struct.pack_into("<H", data, 18, 243)
    assert read_gpu_code(bytes(data), "lib.so") == GpuCode(machine="riscv")


def test_no_section_headers(library: bytes) -> None:
    data = bytearray(library)
    struct.pack_into("<Q", data, 40, 0)
    assert read_gpu_code(bytes(data), "lib.so").regions == ()


def test_a_container_without_a_wrapper_stays(tmp_path: Path) -> None:
    code = code_of(tmp_path, replace(PARTS, unwrapped=[0]))
    assert code.pinned == {code.regions[0].containers[0].start}
    assert not code.doubts
    kept = kept_entries(code, Selection(sms=(120,)))
    assert kept[code.regions[0].containers[0].start] == {0, 1, 2, 3}


@pytest.mark.parametrize("words", [(), (RELR,)])
@pytest.mark.parametrize(
    "extra",
    [
        ".data\n.p2align 3\n.8byte fatbin_1",
        ".text\nleaq fatbin_1(%rip), %rax",
        ".text\nleaq fatbin_1(%rip), %r12",
        ".globl known\n.type known, %object\n.set known, fatbin_1",
    ],
)
def test_a_container_that_something_else_refers_to_stays(tmp_path: Path, words: tuple[str, ...], extra: str) -> None:
    code = code_of(tmp_path, replace(PARTS, extra=extra), *words)
    assert code.pinned == {code.regions[0].containers[1].start}
    assert not code.doubts


def test_a_symbolic_relocation_pins(tmp_path: Path) -> None:
    # The symbol is elsewhere; only with its addend does the word point at a container.
    extra = ".globl near\n.set near, fatbin_1-64\n.data\n.p2align 3\n.8byte near+64"
    parts = replace(PARTS, fatbins=[container(image(payload=bytes(8))), *PARTS.fatbins[1:]], extra=extra)
    code = code_of(tmp_path, parts)
    assert code.regions[0].containers[1].start in code.pinned


@pytest.mark.parametrize(
    "extra",
    [
        ".text\nadrp x3, fatbin_1\nadd x3, x3, :lo12:fatbin_1",
        ".text\nadrp x3, fatbin_1\nnop\nnop\nadd x9, x9, 8\nadd x5, x3, :lo12:fatbin_1",
        ".text\nadr x3, fatbin_1",
        ".data\n.p2align 3\n.8byte fatbin_1",
    ],
)
def test_aarch64_code_pins(tmp_path: Path, extra: str) -> None:
    code = code_of(tmp_path, replace(PARTS, extra=extra), machine="aarch64")
    assert code.pinned == {code.regions[0].containers[1].start}
    assert not code.doubts


def test_an_aarch64_page_without_an_offset_pins_what_begins_there(tmp_path: Path) -> None:
    big = container(image(payload=bytes(3 * 4096)))
    parts = Parts(fatbins=[big, big, images("elf80")], extra=".text\nadrp x3, fatbin_1\nldr x4, [x3, 8]")
    code = code_of(tmp_path, parts, machine="aarch64")
    assert code.pinned == {code.regions[0].containers[1].start}


def test_bytes_that_look_like_code_inside_an_image_are_none(tmp_path: Path) -> None:
    assert code_of(tmp_path, replace(PARTS, extra=".text\nleaq fatbin_1+40(%rip), %rax")).pinned == frozenset()


WRAPPER = '.section .nvFatBinSegment,"aw",%progbits\n'


@pytest.mark.parametrize("words", [(), (RELR,)])
@pytest.mark.parametrize(
    ("extra", "doubt"),
    [
        (WRAPPER + ".4byte 0x466243b1, 1\n.8byte fatbin_0, 0", "several wrappers lead to the container"),
        (WRAPPER + ".4byte 0x466243b1, 1\n.8byte fatbin_0+16, 0", "does not lead to a container"),
        (WRAPPER + ".4byte 0x466243b1, 1\n.8byte gpu_items, 0", "does not lead to a container"),
        (WRAPPER + ".4byte 0x466243b1, 1\n.8byte 0, 0", "does not lead to a container"),
        (WRAPPER + ".4byte 0x466243b2, 1\n.8byte fatbin_0, 0", "an unknown wrapper"),
        (WRAPPER + ".4byte 0x466243b1, 3\n.8byte fatbin_0, 0", "an unknown wrapper"),
        (WRAPPER + ".8byte 0", "not a whole number of wrappers"),
        (WRAPPER + ".4byte 0x466243b1, 2\n.8byte 0, fatbin_0+16", "does not lead to a container"),
        (".data\n.p2align 3\n.8byte fatbin_1+24", "something points into .nv_fatbin"),
        (".globl inside\n.set inside, relinkable_0+8", "something points into __nv_relfatbin"),
        (".data\n.p2align 3\n.8byte item_1", "something points into .cask_resource"),
        (".data\n.p2align 3\n.8byte 0, item_1+8", "something points into .cask_resource"),
        (".data\n.p2align 3\n.8byte 0, item_2, item_0", "do not divide it"),
        (".data\n.p2align 3\n.8byte 0, item_2+8, item_1", "do not divide it"),
        (".text\nleaq item_1(%rip), %rax", "something points into .cask_resource"),
        ('.section .nv_fatbin,"a",%progbits\n.8byte 1', "truncated|not a container"),
        ('.section .cask_resource,"a",%progbits\n.8byte 1', "do not divide it"),
    ],
)
def test_doubts(tmp_path: Path, words: tuple[str, ...], extra: str, doubt: str) -> None:
    code = code_of(tmp_path, replace(PARTS, extra=extra), *words)
    assert any(doubt_part in one for one in code.doubts for doubt_part in doubt.split("|")), code.doubts


def test_a_relocation_that_writes_into_gpu_code(tmp_path: Path) -> None:
    extra = '.section .nv_fatbin,"a",%progbits\n.8byte fatbin_0'
    code = code_of(tmp_path, replace(PARTS, extra=extra), "-Wl,-z,notext")
    assert any("a relocation writes into GPU code" in one for one in code.doubts)


def test_two_relocations_for_one_word(library: bytes) -> None:
    first, second = (one.pointer for one in read_gpu_code(library, "lib.so").wrappers[:2])
    data = bytearray(library)
    struct.pack_into("<Q", data, second.row or 0, first.word)
    assert any("2 relocations for one word" in one for one in read_gpu_code(bytes(data), "lib.so").doubts)


def test_a_wrapper_may_lead_to_a_container_that_is_elsewhere(tmp_path: Path) -> None:
    parts = replace(PARTS, before=images("elf80"), extra=WRAPPER + ".4byte 0x466243b1, 1\n.8byte before_0, 0")
    code = code_of(tmp_path, parts)
    assert not code.doubts
    (elsewhere,) = code.elsewhere
    assert (elsewhere.section, len(elsewhere.containers)) == (".rodata", 1)
    assert code.wrappers[-1].container == elsewhere.containers[0].start
    assert elsewhere.containers[0].start not in kept_entries(code, Selection(sms=(90,)))


def test_an_object_that_is_not_linked(tmp_path: Path) -> None:
    gpu_library(tmp_path / "lib.so", PARTS)
    subprocess.run(["gcc", "-c", "-o", tmp_path / "lib.o", tmp_path / "lib.s"], check=True)
    code = read_gpu_code((tmp_path / "lib.o").read_bytes(), "lib.o")
    assert any("relocatable" in one for one in code.doubts)


def patched_section(data: bytes, name: str, field: int, layout: str, change: int) -> bytes:
    table = read_sections(data, "lib.so")
    index = [one.name for one in table.sections].index(name)
    changed = bytearray(data)
    place = table.start + index * 64 + field
    struct.pack_into(layout, changed, place, struct.unpack_from(layout, data, place)[0] + change)
    return bytes(changed)


@pytest.mark.parametrize(
    ("field", "change", "doubt"),
    [(16, 4096, "not where its header says"), (24, -64, "overlap"), (32, 64, "overlap"), (32, -64, "outside its")],
)
def test_section_headers_that_lie(library: bytes, field: int, change: int, doubt: str) -> None:
    code = read_gpu_code(patched_section(library, ".nv_fatbin", field, "<Q", change), "lib.so")
    assert any(doubt in one for one in code.doubts), code.doubts


@pytest.mark.parametrize(("field", "change"), [(24, 1 << 40), (32, 1 << 62), (0, 1 << 20)])
def test_section_headers_outside_the_file(library: bytes, field: int, change: int) -> None:
    layout = "<Q" if field else "<I"
    with pytest.raises(ElfError):
        read_gpu_code(patched_section(library, ".text", field, layout, change), "lib.so")


def test_an_address_that_no_program_has(library: bytes) -> None:
    data = patched_section(library, ".text", 16, "<Q", 1 << 63)
    assert any("no program" in one for one in read_gpu_code(data, "lib.so").doubts)


def test_no_code_to_look_at(library: bytes) -> None:
    data = patched_section(library, ".text", 8, "<Q", -4)
    assert any("where its code is" in one for one in read_gpu_code(data, "lib.so").doubts)


def test_pieces_hide_nothing(tmp_path: Path, library: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result when tables and code are read in the smallest pieces."""
    lea = make(
        tmp_path, replace(PARTS, extra=".text\n" + "leaq fatbin_1(%rip), %rax\n" * 9 + "leaq fatbin_2(%rip), %rdx")
    )
    plain = read_gpu_code(library, "lib.so"), read_gpu_code(lea, "lib.so")
    monkeypatch.setattr(references, "_ROWS", 1)
    monkeypatch.setattr(references, "_RELR_ROWS", 1)
    monkeypatch.setattr(instructions, "_PIECE", 16)
    assert (read_gpu_code(library, "lib.so"), read_gpu_code(lea, "lib.so")) == plain
    assert len(plain[1].pinned) == 2


def bounded(data: bytes, fault: str) -> None:
    """The fault is named soon, and in little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    try:
        doubts = read_gpu_code(data, "lib.so").doubts
    except ElfError as error:
        doubts = (error.what,)
    assert any(fault in one for one in doubts), doubts
    assert time.monotonic() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_section_of_empty_containers(tmp_path: Path) -> None:
    bounded(make(tmp_path, Parts(fatbins=[container() * (1 << 18)])), f"more than {1 << 17}")


@pytest.mark.parametrize("words", [(), (RELR,)])
def test_a_table_of_nothing_but_pointers_to_gpu_code(tmp_path: Path, words: tuple[str, ...]) -> None:
    extra = ".data\n.p2align 3\n.rept 0x11000\n.8byte fatbin_1\n.endr"
    bounded(make(tmp_path, replace(PARTS, extra=extra), *words), "more references than can be real")


def test_relr_that_lists_more_than_the_file_holds(tmp_path: Path) -> None:
    """Every bitmap full, and the table in other data: 63 words for every 8 bytes of it."""
    data = bytearray(make(tmp_path, replace(PARTS, before=bytes(8) + b"\xff" * 80_000), RELR))
    (rodata,) = read_sections(data, "lib.so").named(".rodata")
    (dynamic,) = read_sections(data, "lib.so").named(".dynamic")
    for place in range(dynamic.offset, dynamic.end, 16):
        tag = struct.unpack_from("<Q", data, place)[0]
        if tag in (35, 36):  # DT_RELRSZ, DT_RELR
            struct.pack_into("<Q", data, place + 8, 80_008 if tag == 35 else rodata.address)
    bounded(bytes(data), "more relocated words than fit")


def test_sections_on_top_of_each_other(library: bytes) -> None:
    table = read_sections(library, "lib.so")
    data = bytearray(library)
    for index in range(len(table.sections) - 1):
        struct.pack_into("<QQ", data, table.start + index * 64 + 24, 0, len(library))
    bounded(bytes(data), "larger than the file")


def cubin_header(abi: int, flags: int, machine: int = 190) -> bytes:
    return struct.pack("<4s5B7x2HI3QI12x", b"\x7fELF", 2, 1, 1, 51, abi, 2, machine, 128, 0, 0, 0, flags)


@pytest.mark.parametrize(
    ("abi", "flags", "sm", "variant"),
    [
        (7, 0x500550, 80, ""), (7, 0x5A055A, 90, ""), (7, 0x5A0D5A, 90, "a"),
        (8, 0x6006402, 100, ""), (8, 0x600640A, 100, "a"), (8, 0x6006702, 103, ""), (8, 0x600780A, 120, "a"),
    ],
)  # fmt: skip
def test_loose_cubins(abi: int, flags: int, sm: int, variant: str) -> None:
    found = read_cubin(cubin_header(abi, flags), "k.cubin")
    assert found is not None
    assert (found.sm, found.variant) == (sm, variant)


def test_what_is_no_cubin() -> None:
    assert read_cubin(cubin_header(7, 90, machine=62), "lib.so") is None
    with pytest.raises(ElfError, match="truncated"):
        read_cubin(cubin_header(7, 90)[:63], "k.cubin")

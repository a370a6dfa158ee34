"""The proof on real shared objects with GPU code: it takes what was slimmed, and nothing that differs from it."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats.slim import slim
from composer.model.gpu import Selection
from composer.proofs._slim_code import read_code
from composer.proofs._slim_reader import PT_LOAD, Container, Object, Segment, read_container
from composer.proofs.slimmed import kept_images, prove_slimmed
from composer.steps.slim_check import check_listing, loadable
from tests.fatbins import Parts, container, gpu_library, image
from tests.shared_objects import PATCHELF

_WORDS = {
    "x86_64": (),
    "x86_64 RELR": ("-Wl,-z,pack-relative-relocs",),
    "x86_64 huge pages": ("-Wl,-z,max-page-size=0x200000",),
    "x86_64 patchelf": (),
    "aarch64": (),
}
SMS = (90,)


def images(chance: random.Random, *names: str) -> bytes:
    """A container with payloads of several pages that nothing can confuse."""
    rows = ((name[:3], name[3:].rstrip("af"), name[3:].lstrip("0123456789")) for name in names)
    return container(*(image(kind, int(sm), variant, payload=chance.randbytes(40000)) for kind, sm, variant in rows))


def parts() -> Parts:
    chance = random.Random(3)
    return Parts(
        fatbins=[
            images(chance, "elf80", "elf90", "elf90a", "elf100", "ptx120"),
            images(chance, "elf80", "elf86", "ptx80"),
            images(chance, "elf70", "elf100f"),
            images(chance, "elf80", "elf90"),
        ],
        relinkable=[images(chance, "elf80", "elf90"), images(chance, "elf90", "ptx90")],
        device_linked=[3],
        items=[b"opaque" * 100, images(chance, "elf100"), images(chance, "elf90", "elf100"), images(chance, "elf120")],
        before=chance.randbytes(3000),
        extra=".text\n.global stay\nstay: ret\n",
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An object, and the same slimmed to SMS."""

    before: bytes
    after: bytes

    def faults(self, after: bytes, *, sms: Sequence[int] = SMS, debug: bool = False) -> str:
        """What the proof says of another file in place of the slimmed one; nothing when it holds."""
        try:
            prove_slimmed(self.before, after, "x.so", sms, keep_ptx=False, debug=debug)
        except ElfError as fault:
            return str(fault)
        return ""

    @property
    def new(self) -> Object:
        return Object(self.after, "x.so")

    def containers(self) -> list[tuple[int, Container]]:
        """The offset of the word that leads to it, and each wrapped container of the slimmed file, as they were."""
        wrapped = read_code(Object(self.before, "x.so")).wrapped
        slots = [offset_of(self.new, one.pointer.slot) for one in wrapped]
        return [(slot, read_container(self.new, *struct.unpack_from("<Q", self.after, slot))) for slot in slots]

    def changed(self, offset: int, data: bytes) -> bytes:
        return self.after[:offset] + data + self.after[offset + len(data) :]

    def flipped(self, offset: int) -> bytes:
        return self.changed(offset, bytes([self.after[offset] ^ 0x10]))

    def section(self, name: str) -> int:
        """The offset of a section's first byte."""
        return next(section.offset for section in self.new.sections if section.name == name)

    def load(self, index: int) -> tuple[int, Segment]:
        """The offset of the header of a PT_LOAD, and the segment."""
        new = self.new
        rows = [(new.phoff + 56 * at, one) for at, one in enumerate(new.segments) if one.kind == PT_LOAD]
        return rows[index]


def offset_of(elf: Object, address: int) -> int:
    offset = elf.offset_of(address, 1)
    assert offset is not None
    return offset


def compacted(before: bytes, sms: Sequence[int]) -> bytes:
    """Slimmed by hand, in a file of the same size: each region's containers with just what has the SM, and zeros."""
    old = Object(before, "x.so")
    code = read_code(old)
    data = bytearray(before)
    for region in code.open:
        at = region.address
        wrapped = [one for one in code.wrapped if one.region == region.name]
        if wrapped:
            data[region.offset : region.offset + region.size] = bytes(region.size)
        for one in sorted(wrapped, key=lambda one: one.container.start):
            kept = [old.at(entry.start, entry.end - entry.start) for entry in one.container.entries if entry.sm in sms]
            body = container(*kept)
            data[offset_of(old, at) : offset_of(old, at) + len(body)] = body
            struct.pack_into("<Q", data, offset_of(old, one.pointer.slot), at)
            at += len(body)
    return bytes(data)


@pytest.fixture(scope="module", params=_WORDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slimmed") / "x.so"
    gpu_library(path, parts(), *_WORDS[request.param], machine=request.param.split()[0])
    if "patchelf" in request.param:  # which adds a segment, and puts the section headers into it
        subprocess.run([PATCHELF, "--set-rpath", "$ORIGIN/../a/long/way", path], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def pair(library: Path) -> Pair:
    before = library.read_bytes()
    slimmed = slim(before, "x.so", Selection(sms=SMS))
    assert slimmed.how == "shrunk"
    return Pair(before=before, after=b"".join(slimmed.pieces()))


@pytest.mark.parametrize("sms", [(), (75,), (80,), (90,), (103,), (121,), (80, 90, 120)])
@pytest.mark.parametrize("debug", [False, True])
def test_what_is_slimmed_is_proven_and_can_be_loaded(
    library: Path, sms: tuple[int, ...], debug: bool, tmp_path: Path
) -> None:
    before, after = library.read_bytes(), tmp_path / "y.so"
    after.write_bytes(b"".join(slim(before, "x.so", Selection(sms=sms), debug=debug).pieces()))
    prove_slimmed(before, after.read_bytes(), "x.so", sms, keep_ptx=False, debug=debug)
    assert loadable(after) == loadable(library)


def test_what_is_kept_is_listed(pair: Pair) -> None:
    assert kept_images(pair.before, pair.after, "x.so") == ("sm_90", "sm_90a", "sm_90")


def test_an_object_is_itself(pair: Pair) -> None:
    assert not pair.faults(pair.before, sms=())
    assert not pair.faults(pair.before)


def test_the_same_size_with_zeros_behind_is_proven(pair: Pair) -> None:
    after = compacted(pair.before, (90, 80))
    assert not pair.faults(after, sms=(80, 90))
    assert "has lost elf 86" in pair.faults(after, sms=(86,))


def kept_payload(pair: Pair) -> bytes:
    entry = next(one for _, one in pair.containers() if one.entries).entries[0]
    return pair.flipped(offset_of(pair.new, entry.end - 1000))


def machine_code(pair: Pair) -> bytes:
    return pair.flipped(pair.section(".text") + 2)


def constant(pair: Pair) -> bytes:
    return pair.flipped(pair.section(".rodata") + 1234)


def dynamic(pair: Pair) -> bytes:
    return pair.flipped(pair.section(".dynamic") + 8)


def dynamic_symbol(pair: Pair) -> bytes:
    return pair.flipped(pair.section(".dynsym") + 24 + 8)


def pointer(pair: Pair) -> bytes:
    slot, found = pair.containers()[0]
    return pair.changed(slot, struct.pack("<Q", found.start + 4))


def far_pointer(pair: Pair) -> bytes:
    return pair.changed(pair.containers()[0][0], struct.pack("<Q", 1 << 60))


def wrapper_version(pair: Pair) -> bytes:
    return pair.flipped(pair.section(".nvFatBinSegment") + 4)


def swapped_wrappers(pair: Pair) -> bytes:
    (one, _), *_, (other, _) = pair.containers()
    data = pair.changed(one, pair.after[other : other + 8])
    return data[:other] + pair.after[one : one + 8] + data[other + 8 :]


def two_wrappers_for_one(pair: Pair) -> bytes:
    (one, _), *_, (other, _) = pair.containers()
    return pair.changed(other, pair.after[one : one + 8])


def emptied(pair: Pair) -> bytes:
    found = next(one for _, one in pair.containers() if one.entries)
    return pair.changed(offset_of(pair.new, found.start), container() + bytes(found.end - found.start - 16))


def without_last_entry(pair: Pair) -> bytes:
    found = next(one for _, one in pair.containers() if len(one.entries) > 1)
    start, last = offset_of(pair.new, found.start), found.entries[-1]
    size = found.end - found.start - 16 - (last.end - last.start)
    data = pair.changed(start + 8, struct.pack("<Q", size))
    return data[: start + 16 + size] + bytes(last.end - last.start) + data[start + 16 + size + last.end - last.start :]


def entry_of_another(pair: Pair) -> bytes:
    one, other = [found for _, found in pair.containers() if found.entries and found.entries[-1].kind == "elf"][:2]
    size = one.entries[-1].end - one.entries[-1].start
    assert size == other.entries[-1].end - other.entries[-1].start
    stolen = pair.new.at(one.entries[-1].start, size)
    return pair.changed(offset_of(pair.new, other.entries[-1].start), stolen)


def left_over(pair: Pair) -> bytes:
    new = pair.new
    section = next(one for one in new.sections if one.name == ".nv_fatbin")
    used = max(one.end for _, one in pair.containers() if section.address <= one.start < section.address + (1 << 30))
    assert used <= section.end or section.end <= used
    return pair.flipped(offset_of(new, max(used, section.end) + 56 * new.phnum + 16))


def shifted_address(pair: Pair) -> bytes:
    row, load = pair.load(-1)
    return pair.changed(row + 16, struct.pack("<Q", load.address + max(load.align, 0x10000)))


def lost_page(pair: Pair) -> bytes:
    row, load = max((pair.load(at) for at in range(4)), key=lambda one: one[1].stored)
    return pair.changed(row + 32, struct.pack("<QQ", load.stored - 0x1000, load.size - 0x1000))


def lost_bytes(pair: Pair) -> bytes:
    row, load = pair.load(-1)
    return pair.changed(row + 32, struct.pack("<QQ", load.stored - 16, load.size - 16))


def lost_segment(pair: Pair) -> bytes:
    row, _ = pair.load(-1)
    return pair.changed(row, struct.pack("<I", 0))


def rights(pair: Pair) -> bytes:
    row, load = pair.load(0)
    return pair.changed(row + 4, struct.pack("<I", load.flags | 2))


def alignment(pair: Pair) -> bytes:
    row, _ = pair.load(0)
    return pair.changed(row + 48, struct.pack("<Q", 0x800))


def other_offset(pair: Pair) -> bytes:
    row, load = pair.load(-1)
    return pair.changed(row + 8, struct.pack("<Q", load.offset - 0x1000))


def truncated(pair: Pair) -> bytes:
    new = pair.new
    ends = [new.shoff + 64 * new.shnum, *(load.offset + load.stored for load in new.loads)]
    return pair.after[: max(ends) - 1]


def truncated_by_half(pair: Pair) -> bytes:
    return pair.after[: len(pair.after) // 2]


def section_names(pair: Pair) -> bytes:
    return pair.flipped(pair.section(".shstrtab") + 3)


def another_table_of_names(pair: Pair) -> bytes:
    return pair.changed(62, struct.pack("<H", 1))


def fewer_sections(pair: Pair) -> bytes:
    return pair.changed(60, struct.pack("<H", pair.new.shnum - 1))


def section_size(pair: Pair) -> bytes:
    return pair.flipped(pair.new.shoff + 64 * 2 + 32)


def symbols(pair: Pair) -> bytes:
    return pair.flipped(pair.section(".symtab") + 24 * 3 + 8)


def machine(pair: Pair) -> bytes:
    return pair.changed(18, struct.pack("<H", 21))


def entry_point(pair: Pair) -> bytes:
    return pair.flipped(25)


def moved_headers(pair: Pair) -> bytes:
    new = pair.new
    table = pair.after[new.phoff : new.phoff + 56 * new.phnum]
    return pair.changed(32, struct.pack("<Q", len(pair.after))) + table


_EDITS: dict[Callable[[Pair], bytes], str] = {
    kept_payload: "holds an image that is not its own",
    machine_code: "memory differs",
    constant: "memory differs",
    dynamic: "",
    dynamic_symbol: "memory differs",
    pointer: "now leads to",
    far_pointer: "now leads to",
    wrapper_version: "memory differs",
    swapped_wrappers: "holds an image that is not its own",
    two_wrappers_for_one: "overlap",
    emptied: "has lost elf 90",
    without_last_entry: "has lost elf 90a",
    entry_of_another: "holds an image that is not its own",
    left_over: "left over",
    shifted_address: "is not part of one of the original",
    lost_page: "not mapped from the file",
    lost_bytes: "no longer mapped",
    lost_segment: "the kinds of program headers differ",
    rights: "with the same rights",
    alignment: "is not aligned",
    other_offset: "",
    truncated: "not inside the file",
    truncated_by_half: "not inside the file",
    section_names: "is gone",
    another_table_of_names: "",
    fewer_sections: "",
    section_size: "",
    symbols: "section '.symtab' has another content",
    machine: "another machine",
    entry_point: "another entry",
    moved_headers: "the program headers are not mapped",
}


@pytest.mark.parametrize("edit", _EDITS, ids=lambda edit: edit.__name__)
def test_what_was_changed_is_not_proven(pair: Pair, edit: Callable[[Pair], bytes]) -> None:
    after = edit(pair)
    assert after != pair.after
    faults = pair.faults(after)
    assert faults
    assert _EDITS[edit] in faults


def test_debug_symbols_stay_unless_asked(library: Path) -> None:
    before = library.read_bytes()
    after = b"".join(slim(before, "x.so", Selection(sms=SMS), debug=True).pieces())
    found = Pair(before=before, after=after)
    assert not found.faults(after, debug=True)
    assert "section '.symtab' is gone" in found.faults(after)


def test_all_faults_are_told(pair: Pair) -> None:
    data = bytearray(machine_code(pair))
    data[pair.section(".rodata")] ^= 1
    data[pair.containers()[0][0]] ^= 4
    faults = pair.faults(bytes(data))
    assert faults.count("memory differs") == 2
    assert "now leads to" in faults


def test_a_container_that_code_reaches_must_stay(tmp_path: Path) -> None:
    extra = ".text\n.global reach\nreach: lea fatbin_1(%rip), %rax\nret\n"
    path = gpu_library(tmp_path / "x.so", Parts(fatbins=parts().fatbins, extra=extra))
    before = path.read_bytes()
    after = compacted(before, (90, 80))
    assert Pair(before=before, after=before).faults(after, sms=(90,))
    slimmed = b"".join(slim(before, "x.so", Selection(sms=SMS)).pieces())
    assert not Pair(before=before, after=before).faults(slimmed)


def test_a_container_without_a_wrapper_must_stay(tmp_path: Path) -> None:
    path = gpu_library(tmp_path / "x.so", Parts(fatbins=parts().fatbins, unwrapped=[1]))
    before = path.read_bytes()
    slimmed = b"".join(slim(before, "x.so", Selection(sms=SMS)).pieces())
    found = Pair(before=before, after=slimmed)
    assert not found.faults(slimmed)
    (pinned,) = read_code(Object(before, "x.so")).pinned
    assert "no wrapper alone" in found.faults(found.flipped(offset_of(found.new, pinned.end - 100)))


def test_the_loader_refuses_what_it_cannot_map(library: Path, tmp_path: Path) -> None:
    if not loadable(library):
        pytest.skip("for another machine")
    pair = Pair(before=library.read_bytes(), after=library.read_bytes())
    row, load = pair.load(1)
    (tmp_path / "y.so").write_bytes(pair.changed(row + 8, struct.pack("<Q", load.offset + 8)))
    with pytest.raises(ElfError, match="the loader refuses it"):
        loadable(tmp_path / "y.so")


def test_another_listing_is_an_error(pair: Pair, tmp_path: Path) -> None:
    before, after, program = tmp_path / "before.so", tmp_path / "after.so", tmp_path / "cuobjdump"
    before.write_bytes(pair.before)
    after.write_bytes(pair.after)
    program.write_text("#!/bin/sh\nfor sm in 90 90a 90; do echo ELF file 1: x.1.sm_$sm.cubin; done\n")
    program.chmod(0o755)
    check_listing(before, after, program)
    program.write_text("#!/bin/sh\nfor sm in 90 90a 80; do echo ELF file 1: x.1.sm_$sm.cubin; done\n")
    with pytest.raises(ElfError, match="lists other GPU code"):
        check_listing(before, after, program)
    assert subprocess.run([program], check=False).returncode == 0

"""Random GPU code in a real shared object: what is slimmed is proven, and no changed byte of it is."""

from __future__ import annotations

import tempfile
from datetime import timedelta
from functools import cache
from pathlib import Path

from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from composer.errors import ElfError
from composer.formats.slim import slim
from composer.model.gpu import Selection
from composer.proofs._slim_reader import SHT_NOBITS, Object
from composer.proofs.slimmed import prove_slimmed
from tests.fatbins import Parts, container, gpu_library, image, images

_SMS = (50, 61, 62, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121)
_NAMES = st.builds(
    lambda kind, sm, variant: f"{kind}{sm}{variant if sm >= 90 else ''}",
    st.sampled_from(["elf", "elf", "elf", "ptx", "lto"]), st.sampled_from(_SMS), st.sampled_from(["", "", "a", "f"]),
)  # fmt: skip
_CONTAINERS = st.lists(_NAMES, max_size=7).map(lambda names: images(*names))
_PARTS = st.builds(
    lambda fatbins, relinkable, items, linked, before: Parts(
        fatbins=fatbins, relinkable=relinkable, items=items, device_linked=[linked % len(fatbins)] * bool(relinkable),
        before=before,
    ),
    st.lists(_CONTAINERS, min_size=1, max_size=12), st.lists(_CONTAINERS, max_size=3),
    st.lists(_CONTAINERS, max_size=3),
    st.integers(0, 11), st.binary(max_size=40),
)  # fmt: skip
_SLOW = settings(
    max_examples=20,
    deadline=timedelta(seconds=20),
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)


def linked(parts: Parts) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return gpu_library(Path(folder) / "x.so", parts).read_bytes()


@_SLOW
@given(_PARTS, st.lists(st.lists(st.sampled_from(_SMS), min_size=1, max_size=3, unique=True), min_size=4, max_size=8))
def test_what_is_slimmed_is_proven(parts: Parts, targets: list[list[int]]) -> None:
    before = linked(parts)
    for sms in targets:
        slimmed = slim(before, "x.so", Selection(sms=tuple(sms)))
        prove_slimmed(before, b"".join(slimmed.pieces()), "x.so", sms, keep_ptx=False, debug=False)


@cache
def slimmed_pair() -> tuple[bytes, bytes]:
    names = (("elf80", "elf90", "elf90a", "ptx90"), ("elf70", "elf100"), ("elf90", "ptx80"))
    rows = [
        container(*(image(name[:3], int(name[3:5]), payload=name.encode() * 3000) for name in row)) for row in names
    ]
    before = linked(Parts(fatbins=rows, relinkable=rows[:1], device_linked=[0], items=rows, before=b"constant" * 90))
    return before, b"".join(slim(before, "x.so", Selection(sms=(90,))).pieces())


@settings(max_examples=400, deadline=timedelta(seconds=5), derandomize=True)
@given(st.data())
def test_no_changed_byte_is_proven(data: st.DataObject) -> None:
    before, after = slimmed_pair()
    new = Object(after, "x.so")
    ranges = [(one.offset, one.size) for one in new.sections if one.size and one.kind != SHT_NOBITS]
    # Section headers, but for the empty first one; what the ELF header says, but for its own size.
    ranges += [(new.shoff + 64, 64 * (new.shnum - 1)), (0, 52), (54, 10)]
    start, size = data.draw(st.sampled_from(ranges))
    at = start + data.draw(st.integers(0, size - 1))
    # The offset of a section without bytes in the file means nothing.
    assume(not any(one.kind == SHT_NOBITS and new.shoff + 64 * number + 24 <= at < new.shoff + 64 * number + 32
                   for number, one in enumerate(new.sections)))  # fmt: skip
    changed = bytearray(after)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        prove_slimmed(before, bytes(changed), "x.so", (90,), keep_ptx=False, debug=False)
    except ElfError:
        return
    raise AssertionError(f"a change at offset {at:#x} was not noticed")


@settings(max_examples=200, deadline=timedelta(seconds=5), derandomize=True)
@given(st.data())
def test_a_damaged_object_is_refused_left_alone_or_slimmed_with_proof(data: st.DataObject) -> None:
    good, _ = slimmed_pair()
    changed = bytearray(good)
    elf = Object(good, "x.so")
    ranges = [(0, 64), (elf.phoff, 56 * elf.phnum), (elf.shoff, 64 * elf.shnum)]
    ranges += [(one.offset, min(one.size, 400)) for one in elf.sections if one.size and one.kind != SHT_NOBITS]
    for _ in range(data.draw(st.integers(1, 3))):
        start, size = data.draw(st.sampled_from(ranges))
        changed[start + data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    before, debug = bytes(changed), data.draw(st.booleans())
    try:
        slimmed = slim(before, "x.so", Selection(sms=(90,)), debug=debug)
    except ElfError:
        return
    after = b"".join(slimmed.pieces())
    if slimmed.how != "unchanged":
        prove_slimmed(before, after, "x.so", (90,), keep_ptx=False, debug=debug)
    else:
        assert after == before


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_any_bytes_are_judged(before: bytes, after: bytes) -> None:
    for data in ((before, after), (b"\x7fELF\x02\x01\x01" + before, b"\x7fELF\x02\x01\x01" + after)):
        try:
            prove_slimmed(*data, "x.so", (90,), keep_ptx=False, debug=True)
        except ElfError:
            continue
        raise AssertionError("there is nothing that could be loaded")

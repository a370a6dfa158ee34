"""Undefined symbols of objects from the real compiler, compared with what it was told to leave open."""

from __future__ import annotations

import random
import struct
import subprocess

import pytest

from composer.errors import ElfError
from composer.formats.stublib import render_stub
from composer.formats.symbols import undefined_symbols
from tests.shared_objects import PATCHELF

SOURCE = """
extern int open_one(void), open_two(void);
extern int open_weak(void) __attribute__((weak));
extern int open_data;
%s int user(void) { return open_one() + open_two() + open_data + (open_weak ? open_weak() : 0); }
"""
WANTED = {"open_one", "open_two", "open_weak", "open_data"}
HIDDEN = "static int user(void); __attribute__((constructor)) static void start(void) { user(); }\n"


def build(folder, *options, exports=True):
    source, target = folder / "user.c", folder / "libuser.so"
    source.write_text((SOURCE % "") if exports else HIDDEN + SOURCE % "static")
    subprocess.run(["gcc", "-shared", "-fPIC", "-nostdlib", *options, "-o", target, source], check=True)
    return target


@pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
@pytest.mark.parametrize("exports", [True, False], ids=["exports", "exports-nothing"])
def test_every_hash_style(tmp_path, style, exports):
    target = build(tmp_path, f"-Wl,--hash-style={style}", exports=exports)
    assert {name for name in undefined_symbols(target.read_bytes(), "x") if name.startswith("open_")} == WANTED


@pytest.mark.parametrize("exports", [True, False], ids=["exports", "exports-nothing"])
def test_after_patchelf_moved_the_strings(tmp_path, exports):
    target = build(tmp_path, "-Wl,--hash-style=gnu", exports=exports)
    before = undefined_symbols(target.read_bytes(), "x")
    subprocess.run([PATCHELF, "--force-rpath", "--set-rpath", "$ORIGIN/" + "long" * 50, target], check=True)
    assert undefined_symbols(target.read_bytes(), "x") == before


def test_without_sections(tmp_path):
    target = build(tmp_path)
    before = undefined_symbols(target.read_bytes(), "x")
    data = bytearray(target.read_bytes())
    data[40:48] = bytes(8)  # e_shoff
    data[58:64] = bytes(6)  # e_shentsize, e_shnum, e_shstrndx
    assert undefined_symbols(bytes(data), "x") == before


def test_an_object_without_a_dynamic_section_leaves_nothing_open(tmp_path):
    source, target = tmp_path / "a.c", tmp_path / "a.o"
    source.write_text(SOURCE % "")
    subprocess.run(["gcc", "-c", "-o", target, source], check=True)
    assert undefined_symbols(target.read_bytes(), "x") == frozenset()


def test_a_32_bit_object_is_refused():
    stub = bytearray(render_stub("libx.so", [], 0, "x86_64"))
    stub[4] = 1
    with pytest.raises(ElfError, match="here: not a 64-bit object"):
        undefined_symbols(bytes(stub), "here")


def test_damage_gives_an_elf_error_or_an_answer(tmp_path):
    target = build(tmp_path, "-Wl,--hash-style=gnu", exports=False)
    chance, refused = random.Random(0), 0
    for whole in (target.read_bytes(), render_stub("libx.so", ["a", "b"], 0, "x86_64")):
        places = range(0, 1024) if len(whole) > 8192 else range(len(whole))
        for _ in range(1500):
            data = bytearray(whole)
            at = chance.choice(places) & ~7
            data[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 0xFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
            try:
                undefined_symbols(bytes(data), "x")
            except ElfError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("length", [0, 3, 63, 64, 300, 4096])
def test_a_cut_off_object_is_refused(length):
    with pytest.raises(ElfError):
        undefined_symbols(render_stub("libx.so", ["a"], 0, "x86_64")[:length], "x")

"""The stub is loaded by the real loader and read by the real readelf."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from composer.errors import ElfError
from composer.formats.elf import load_faults, read_elf
from composer.formats.stublib import render_stub
from composer.formats.symbols import undefined_symbols

NAMES = [f"cuFunction{number}" for number in range(700)]
CALL_ALL = """
import ctypes, json, sys
library = ctypes.CDLL(sys.argv[1])
answers = {name: getattr(library, name)(1, 2, 3) for name in json.load(sys.stdin)}
print(json.dumps([answers, hasattr(library, "cuAbsent"), hasattr(library, "cuFunction")]))
"""
MACHINES = pytest.mark.parametrize("machine", ["x86_64", "aarch64"])


def readelf(path, *options):
    return subprocess.run(["readelf", *options, "-W", path], capture_output=True, text=True, check=True)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no stub for this machine")
@pytest.mark.parametrize("result", [-65536, -1, 0, 100, 65535])
def test_every_function_returns_the_result_and_no_other_name_is_found(tmp_path, result):
    stub = tmp_path / "libcuda.so.1"
    stub.write_bytes(render_stub("libcuda.so.1", NAMES, result, platform.machine()))
    done = subprocess.run(
        [sys.executable, "-c", CALL_ALL, stub], input=json.dumps(NAMES), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [dict.fromkeys(NAMES, result), False, False]


@MACHINES
def test_readelf_has_nothing_to_object(tmp_path, machine):
    stub = tmp_path / "libx.so"
    stub.write_bytes(render_stub("libx.so.7", NAMES, 1, machine))
    seen = readelf(stub, "-a")
    assert seen.stderr == ""
    assert "Warning" not in seen.stdout
    assert "Library soname: [libx.so.7]" in seen.stdout
    # The histogram is empty unless buckets and chains lead to every symbol.
    assert "total of 701 buckets" in seen.stdout
    assert "100.0%" in seen.stdout


@MACHINES
def test_readelf_finds_the_functions(tmp_path, machine):
    stub = tmp_path / "libx.so"
    stub.write_bytes(render_stub("libx.so.7", NAMES, 1, machine))
    rows = readelf(stub, "--use-dynamic", "--syms").stdout.splitlines()
    assert sorted(row.split()[-1] for row in rows if " FUNC " in row) == sorted(NAMES)


@MACHINES
@pytest.mark.parametrize("names", [[], ["one"], ["two", "one"], NAMES])
def test_our_own_reader_agrees(machine, names):
    stub = render_stub("libx.so.7", names, 1, machine)
    elf = read_elf(stub, "stub")
    assert (elf.machine, elf.kind, elf.soname, elf.needed) == (machine, "shared", "libx.so.7", ())
    assert load_faults(elf) == ()
    assert undefined_symbols(stub, "stub") == frozenset()


def test_order_and_repetition_do_not_matter():
    assert render_stub("l", ["b", "a", "b"], 1, "x86_64") == render_stub("l", ["a", "b"], 1, "x86_64")


@MACHINES
@pytest.mark.parametrize("result", [-65537, 65536])
def test_a_result_that_no_instruction_holds_is_refused(machine, result):
    with pytest.raises(ElfError, match="from -65536 to 65535"):
        render_stub("libx.so", [], result, machine)


def test_the_aarch64_code_is_what_an_assembler_makes_of_it():
    """`movz w0, #100; ret` by GNU as: 52800c80 d65f03c0, at the address that every symbol has."""
    stub = render_stub("libx.so", ["one"], 100, "aarch64")
    address = int.from_bytes(stub[(at := stub.index(b"\x12\0\x01\0") + 4) : at + 8], "little")
    assert stub[address : address + 8] == bytes.fromhex("800c8052c0035fd6")

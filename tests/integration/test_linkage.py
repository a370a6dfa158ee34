"""The symbols of objects from the real compiler, and what the real loader makes of them."""

from __future__ import annotations

import ctypes
import itertools
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats.elf import read_elf
from composer.formats.linkage import DIGEST, Linkage, Wanted, digest, read_linkage
from composer.formats.stublib import render_stub
from tests.shared_objects import PATCHELF, library

USER = """
extern int called(void), taken(void), maybe(void) __attribute__((weak)), unused(void);
extern int data;
int (*table[])(void) = { taken };
int user(void) { return called() + data + (maybe ? maybe() : 0) + table[0](); }
"""


def keys(linkage: Linkage) -> set[bytes]:
    return {linkage.defined[at : at + DIGEST] for at in range(0, len(linkage.defined), DIGEST)}


def of(*names: str) -> set[bytes]:
    """As objects without versions have them."""
    return {digest(f"{name}@@".encode()) for name in names}


def read(path: Path) -> Linkage:
    return read_linkage(path.read_bytes(), path.name)


def wanted(linkage: Linkage) -> dict[str, bool]:
    return {want.name: want.lazy for want in linkage.wanted}


@pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
def test_only_what_must_be_found_is_wanted(tmp_path: Path, style: str) -> None:
    linkage = read(library(tmp_path / "u.so", USER, f"-Wl,--hash-style={style}", "-Wl,-z,lazy"))
    assert wanted(linkage) == {"called": True, "taken": False, "data": False}
    assert of("user", "table") <= keys(linkage)
    assert keys(linkage).isdisjoint(of("called", "data", "maybe", "unused"))


@pytest.mark.parametrize("words", [["-Wl,-z,now"], ["-fno-plt", "-Wl,-z,lazy"]], ids=["bind-now", "no-plt"])
def test_calls_that_are_looked_for_at_once(tmp_path: Path, words: list[str]) -> None:
    assert not any(wanted(read(library(tmp_path / "u.so", USER, *words))).values())


def test_an_object_that_defines_nothing(tmp_path: Path) -> None:
    source = "extern int called(void); __attribute__((constructor)) static void start(void) { called(); }"
    linkage = read(library(tmp_path / "u.so", source, "-Wl,--hash-style=gnu", "-Wl,-z,lazy"))
    assert (linkage.defined, wanted(linkage)) == (b"", {"called": True})


def test_modules_of_python(tmp_path: Path) -> None:
    path = library(tmp_path / "u.so", "void *PyInit_one(void) { return 0; } void *PyInit_two(void) { return 0; }")
    assert sorted(read(path).modules) == ["one", "two"]


def test_names_that_are_not_for_others(tmp_path: Path) -> None:
    source = '__attribute__((visibility("hidden"))) int inner(void) { return 1; } int outer(void) { return inner(); }'
    assert keys(read(library(tmp_path / "u.so", source))) == of("outer")


def test_without_sections_and_after_patchelf(tmp_path: Path) -> None:
    path = library(tmp_path / "u.so", USER, "-Wl,-z,lazy")
    before = read(path)
    data = bytearray(path.read_bytes())
    data[40:48] = bytes(8)  # e_shoff
    data[58:64] = bytes(6)  # e_shentsize, e_shnum, e_shstrndx
    assert read_linkage(data, "x") == before
    subprocess.run([PATCHELF, "--force-rpath", "--set-rpath", "$ORIGIN/" + "long" * 50, path], check=True)
    after = read(path)
    assert (keys(after), wanted(after)) == (keys(before), wanted(before))


def test_a_stub_that_composer_writes_has_what_the_program_asks_of_it(tmp_path: Path) -> None:
    linkage = read_linkage(render_stub("libx.so", ["f", "g"], 0, "x86_64"), "x")
    assert of("f", "g") <= keys(linkage)


_SOURCE = "int f(void) { return 1; }"
_OLD = """
__asm__(".symver old, f@V1"); int old(void) { return 1; }
__asm__(".symver new, f@@V2"); int new(void) { return 2; }
"""
_LIBRARIES = {
    "none": (_SOURCE, ""),
    "one": (_SOURCE, "V1 { f; };"),
    "two": (_SOURCE, "V2 { f; };"),
    "both": (_OLD, "V1 { local: old; new; }; V2 { } V1;"),
    "beside": ("int f(void) { return 1; } int g(void) { return 1; }", "V1 { g; };"),
    "lost": ("int g(void) { return 1; }", "V1 { g; };"),
}


def _versioned(folder: Path, name: str) -> Path:
    source, script = _LIBRARIES[name]
    (folder / "versions").write_text(script)
    words = [f"-Wl,--version-script={folder / 'versions'}"] if script else []
    return library(folder / "libv.so", source, "-Wl,-soname,libv.so", *words)


@pytest.mark.parametrize(("linked", "given"), [*itertools.product(["none", "one", "two"], _LIBRARIES)])
def test_the_loader_agrees_about_versions(tmp_path: Path, linked: str, given: str) -> None:
    for folder in ("linked", "given"):
        (tmp_path / folder).mkdir()
    first = _versioned(tmp_path / "linked", linked)
    second = _versioned(tmp_path / "given", given)
    user = library(
        tmp_path / "given/user.so", "int f(void); int user(void) { return f(); }", first, "-Wl,-rpath,$ORIGIN"
    )
    (want,) = read(user).wanted
    versions = {"none": None, "one": "V1", "two": "V2"}
    assert want == Wanted("f", versions[linked], versions[linked] and "libv.so", want.lazy)
    # A whole version that is missing is refused before any symbol is looked for; that is the proof of closure's.
    defined = read_elf(second.read_bytes(), "given").versions_defined
    served = not keys(read(second)).isdisjoint(want.keys) and (not defined or want.version in {None, *defined})
    code = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
    done = subprocess.run([sys.executable, "-S", "-c", code, user], capture_output=True, text=True)
    assert (done.returncode == 0) == served, done.stderr


def test_the_hosts_own_libraries_have_what_they_are_asked_for() -> None:
    with Path("/proc/self/maps").open() as maps:
        paths = {Path(line.split()[-1]) for line in maps if ".so" in line}
    ctypes.CDLL("libm.so.6")
    facts = [read_linkage(path.read_bytes(), str(path)) for path in sorted(paths) if path.is_file()]
    defined = set().union(*map(keys, facts))
    program = read_linkage(Path(sys.executable).resolve().read_bytes(), "python")
    defined |= keys(program)
    wants = [want for one in (*facts, program) for want in one.wanted]
    assert len(wants) > 500
    assert [want for want in wants if defined.isdisjoint(want.keys)] == []


def test_damage_gives_an_elf_error_or_an_answer(tmp_path: Path) -> None:
    whole, chance, refused = library(tmp_path / "u.so", USER).read_bytes(), random.Random(0), 0
    for _ in range(2000):
        data = bytearray(whole)
        at = chance.choice([chance.randrange(0, 1024), chance.randrange(len(whole) - 8)]) & ~7
        data[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 0xFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
        try:
            read_linkage(bytes(data), "x")
        except ElfError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("length", [0, 3, 63, 64, 300, 4096])
def test_a_cut_off_object_is_refused(length: int) -> None:
    with pytest.raises(ElfError):
        read_linkage(render_stub("libx.so", ["a"], 0, "x86_64")[:length], "x")


@pytest.mark.parametrize(("bits", "order"), [(1, 1), (1, 2), (2, 2)])
def test_of_objects_for_other_kinds_of_machine_nothing_is_told(bits: int, order: int) -> None:
    ident = b"\x7fELF" + bytes([bits, order, 1]) + bytes(9)
    assert read_linkage(ident + bytes(48), "x") == Linkage()

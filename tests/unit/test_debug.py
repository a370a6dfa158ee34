from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats.debug import find_debug
from composer.formats.elf_cut import cut
from tests.elf_memory import call, memory, readelf, sections
from tests.shared_objects import gcc, library

_SOURCE = "static int hidden(int x) { return x + 41; } int answer(void) { return hidden(1); }"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return library(tmp_path_factory.mktemp("debug") / "lib.so", _SOURCE, "-g", "-Wl,--build-id")


def _names(data: bytes) -> set[str]:
    names = list(sections(data))
    return {names[number] for number in find_debug(data, "x.so").sections}


def test_all_that_strip_removes_goes(path: Path) -> None:
    data = path.read_bytes()
    found = find_debug(data, "x.so")
    assert found.why_kept is None
    result = cut(data, found.ranges, {}, "x.so", drop_sections=found.sections)
    new = path.with_name("new.so")
    new.write_bytes(b"".join(result.pieces()))
    stripped = path.with_name("stripped.so")
    subprocess.run(["strip", "--strip-unneeded", "-o", stripped, path], check=True)
    assert set(sections(new.read_bytes())) == set(sections(stripped.read_bytes()))
    assert abs(new.stat().st_size - stripped.stat().st_size) < 200
    assert found.size == sum(span.end - span.start for span in found.ranges) > 500
    assert memory(new.read_bytes()).keys() == memory(data).keys()
    assert call(new) == 42
    readelf(new)


def test_what_is_debug(path: Path) -> None:
    assert _names(path.read_bytes()) == {
        ".debug_aranges", ".debug_info", ".debug_abbrev", ".debug_line", ".debug_str", ".debug_line_str",
        ".symtab", ".strtab",
    }  # fmt: skip


def test_nothing_to_cut(path: Path) -> None:
    stripped = path.with_name("bare.so")
    subprocess.run(["strip", "-o", stripped, path], check=True)
    found = find_debug(stripped.read_bytes(), "x.so")
    assert (found.sections, found.ranges, found.size, found.why_kept) == ((), (), 0, None)


def test_other_forms(path: Path) -> None:
    """Compressed sections, a debug link (kept: it leads to what was cut elsewhere), and sections of other tools."""
    other = path.with_name("forms.so")
    library(other, _SOURCE, "-g", "-gz=zlib")
    linked = path.with_name("linked.so")
    subprocess.run(["objcopy", f"--add-gnu-debuglink={path}", other, linked], check=True)
    extra = path.with_name("extra")
    extra.write_bytes(b"extra")
    subprocess.run(
        [
            "objcopy",
            *(f"--add-section={name}={extra}" for name in (".gdb_index", ".gnu_debugaltlink", ".mine")),
            linked,
        ],
        check=True,
    )
    names = _names(linked.read_bytes())
    assert {".debug_info", ".gdb_index", ".gnu_debugaltlink"} <= names
    assert not {".gnu_debuglink", ".mine", ".comment", ".shstrtab", ".text"} & names


def test_relocations_kept_for_code_keep_the_symbols(path: Path) -> None:
    """--emit-relocs leaves relocations of .text, too, and they need .symtab."""
    data = library(
        path.with_name("relocs.so"), _SOURCE + " int other(void) { return answer(); }", "-Wl,-q"
    ).read_bytes()
    assert ".rela.text" in sections(data)
    found = find_debug(data, "x.so")
    assert found.why_kept is not None
    assert ".symtab" in found.why_kept
    assert found.ranges == ()


def test_bytes_that_others_use(path: Path) -> None:
    data = bytearray(path.read_bytes())
    table = struct.unpack_from("<Q", data, 40)[0]
    row = table + 64 * list(sections(data)).index(".debug_line")
    struct.pack_into("<Q", data, row + 24, sections(data)[".text"][4])
    found = find_debug(bytes(data), "x.so")
    assert found.why_kept == ".debug_line shares its bytes with segment 1"
    assert not found.sections


def test_what_is_no_shared_object(path: Path) -> None:
    relocatable = path.with_name("one.o")
    gcc("-c", "-g", "-o", relocatable, source="int one;")
    with pytest.raises(ElfError, match="not a shared object"):
        find_debug(relocatable.read_bytes(), "one.o")

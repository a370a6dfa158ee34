"""The pure parts of composer.interpreter, and its reading of hostile archives."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
import zstandard

from composer.errors import ElfError, HostError, IntegrityError
from composer.formats.elf import Elf
from composer.interpreter.archive import unpack
from composer.interpreter.find import find_pythons, inspect_python
from composer.interpreter.licences import notices
from composer.interpreter.objects import foreign, glibc_floor, is_glibc, read_object, search_path, version_key
from composer.interpreter.stdlib import (
    is_debian,
    names_its_place,
    relocate_sysconfig,
    relocate_text,
    travels,
    undo_debian_layout,
)
from composer.interpreter.tree import file_entry, link_entry, tree_digest


@pytest.mark.parametrize(
    "path",
    [
        "os.py", "encodings/utf_8.py", "LICENSE.txt", "lib-dynload/_ssl.cpython-312-x86_64-linux-gnu.so",
        "unittest/case.py", "doctest.py", "sysconfig/__init__.py", "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "lib-dynload/_datetime.cpython-312-x86_64-linux-gnu.so", "lib2to3/Grammar.txt", "venv/scripts/common/activate",
    ],
)  # fmt: skip
def test_what_a_server_may_import_travels(path):
    assert travels(path)


@pytest.mark.parametrize(
    "path",
    [
        "test/test_os.py", "unittest/test/test_case.py", "lib2to3/tests/data/x.py", "idlelib/run.py", "turtle.py",
        "ensurepip/_bundled/pip-23.whl", "__pycache__/os.cpython-312.pyc", "os.pyc", "site-packages/pip/__init__.py",
        "dist-packages/README", "config-3.12-x86_64-linux-gnu/Makefile", "config-3.12-x86_64-linux-gnu/libpython3.12.a",
        "lib-dynload/_tkinter.cpython-312-x86_64-linux-gnu.so", "lib-dynload/nis.cpython-312-x86_64-linux-gnu.so",
        "lib-dynload/_testcapi.cpython-312-x86_64-linux-gnu.so", "lib-dynload/notes.txt", "sitecustomize.py",
        "EXTERNALLY-MANAGED", "distutils/command/wininst-14.0.exe",
    ],
)  # fmt: skip
def test_what_no_server_imports_stays_behind(path):
    assert not travels(path)


DATA = """# generated
build_time_vars = {'prefix': '/home/me/py', 'LIBDIR': '/home/me/py/lib64/deep', 'LDFLAGS': '-L/home/me/py/lib -O2',
 'INCLUDEPY': '/home/me/py/include/python3.12', 'SIZEOF_LONG': 8, 'CC': 'gcc', 'TZPATH': '/usr/share/zoneinfo'}
"""


def variables(text: str) -> dict:
    names: dict = {}
    exec(text, names)
    return names["build_time_vars"]


def test_build_settings_follow_the_live_prefix(monkeypatch):
    monkeypatch.setattr("sys.base_prefix", "/new place/x")
    found = variables(relocate_sysconfig(DATA, "3.12"))
    assert found == {
        "prefix": "/new place/x", "LIBDIR": "/new place/x/lib", "LDFLAGS": "-L/new place/x/lib -O2",
        "INCLUDEPY": "/new place/x/include/python3.12", "SIZEOF_LONG": 8, "CC": "gcc", "TZPATH": "/usr/share/zoneinfo",
    }  # fmt: skip


def test_relocated_build_settings_name_no_old_place_and_do_not_depend_on_order():
    text = relocate_sysconfig(DATA, "3.12")
    assert "/home/me" not in text
    rows = DATA.replace("'CC': 'gcc', ", "").replace("'prefix'", "'CC': 'gcc', 'prefix'")
    assert relocate_sysconfig(rows, "3.12") == text


def test_a_prefix_that_other_software_shares_is_not_replaced_in_tools(monkeypatch):
    monkeypatch.setattr("sys.base_prefix", "/new")
    text = "build_time_vars = {'prefix': '/usr', 'INSTALL': '/usr/bin/install', 'LIBDIR': '/usr/lib/x86_64-linux-gnu'}"
    assert variables(relocate_sysconfig(text, "3.11")) == {
        "prefix": "/new", "INSTALL": "/usr/bin/install", "LIBDIR": "/new/lib",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["", "build_time_vars = open('x')", "build_time_vars = [1]", "x = (", "import os", "build_time_vars = {}['a']"],
)
def test_build_settings_that_are_no_literal_are_refused(text):
    with pytest.raises(HostError, match="build settings"):
        relocate_sysconfig(text, "3.12")


DEBIAN = """
        'purelib': '{base}/lib/python3/dist-packages',
    if sys.base_prefix != sys.prefix or hasattr(sys, "real_prefix"):
        prefix_scheme = 'posix_prefix'
"""


def test_debian_scheme_becomes_upstreams():
    assert is_debian(DEBIAN)
    assert "    if True:\n" in undo_debian_layout(DEBIAN)
    assert relocate_text("sysconfig.py", DEBIAN, "3.11") == undo_debian_layout(DEBIAN)
    assert relocate_text("sysconfig/__init__.py", "upstream", "3.13") == "upstream"
    assert not names_its_place("os.py")
    assert names_its_place("_sysconfigdata__linux_x86_64-linux-gnu.py")


@pytest.mark.parametrize("text", ["dist-packages", DEBIAN * 2])
def test_unknown_patch_of_a_distributor_is_refused(text):
    with pytest.raises(HostError, match="patch"):
        undo_debian_layout(text)


def elf(*needed: str, versions: dict | None = None, interpreter: str | None = None) -> Elf:
    return Elf(
        machine="x86_64", bits=64, kind="shared", needed=needed, versions_needed=versions or {}, size=1,
        interpreter=interpreter,
    )  # fmt: skip


def test_floor_compares_versions_as_numbers():
    objects = [
        elf(versions={"libc.so.6": frozenset({"GLIBC_2.9", "GLIBC_PRIVATE"}), "libm.so.6": frozenset({"GLIBC_2.35"})}),
        elf(versions={"libssl.so.3": frozenset({"OPENSSL_3.0.0"}), "libstdc++.so.6": frozenset({"GLIBCXX_3.4.99"})}),
    ]
    assert glibc_floor(objects) == "2.35"
    assert glibc_floor([]) == "2.5"
    assert glibc_floor([elf(versions={"libc.so.6": frozenset({"GLIBC_ABI_DT_RELR"})})]) == "2.36"
    assert version_key("2.9") < version_key("2.36")


def test_glibc_is_told_from_its_former_parts():
    assert all(map(is_glibc, ("libc.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "libnsl.so.1", "libresolv.so.2")))
    assert not any(map(is_glibc, ("libcrypt.so.1", "libnsl.so.2", "libgcc_s.so.1", "libcom_err.so.2", "libm.so")))
    assert foreign(elf("libm.so.6", "libz.so.1", "libc.so.6")) == ("libz.so.1",)


@pytest.mark.parametrize(
    ("place", "item", "expected"),
    [
        ("lib/python3.12/lib-dynload/_ssl.so", elf("libssl.so.3", "libc.so.6"), "$ORIGIN/../.."),
        ("lib/python3.12/lib-dynload/math.so", elf("libm.so.6"), ""),
        ("lib/libssl.so.3", elf("libcrypto.so.3"), "$ORIGIN"),
        ("bin/python3.12", elf("libc.so.6", interpreter="/lib64/ld-linux-x86-64.so.2"), "$ORIGIN/../lib"),
    ],
)
def test_search_path_leads_to_lib_where_it_is_needed(place, item, expected):
    assert search_path(place, item) == expected


@pytest.mark.parametrize("content", [b"", b"text", b"\x7fELF"])
def test_a_file_that_is_no_object_is_an_elf_error(content, tmp_path):
    (tmp_path / "x.so").write_bytes(content)
    with pytest.raises(ElfError):
        read_object(tmp_path / "x.so")
    with pytest.raises(HostError):
        read_object(tmp_path / "absent.so")


def test_digest_knows_path_mode_kind_and_content_but_no_order_or_place(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    base = [file_entry("a", b"1"), link_entry("b", "a")]
    assert tree_digest(base) == tree_digest([link_entry("b", "a"), file_entry("a", tmp_path / "a")])
    others = [
        [file_entry("a", b"2"), base[1]],
        [file_entry("c", b"1"), base[1]],
        [file_entry("a", b"1", mode=0o755), base[1]],
        [base[0], link_entry("b", "c")],
        [base[0], file_entry("b", b"a", mode=0o777)],
        [base[0]],
    ]
    assert len({tree_digest(entries) for entries in [base, *others]}) == 7


def test_entry_of_a_file_that_vanished_is_a_host_error(tmp_path):
    with pytest.raises(HostError):
        file_entry("a", tmp_path / "absent")


def test_notices_are_found_by_package_on_a_merged_usr(tmp_path):
    packages, documents = tmp_path / "info", tmp_path / "doc"
    packages.mkdir()
    (documents / "libx1").mkdir(parents=True)
    (documents / "libx1" / "copyright").write_text("yours")
    (packages / "libx1:amd64.list").write_text("/.\n/usr/lib/libx.so.1\n")
    (packages / "liby1.list").write_text("/lib/liby.so.1\n")
    libraries = {"libx.so.1": Path("/lib/libx.so.1"), "liby.so.1": Path("/lib/liby.so.1"), "libz": Path("/opt/libz")}
    assert notices(libraries, packages, documents) == {"libx.so.1": documents / "libx1" / "copyright"}
    assert notices(libraries, tmp_path / "absent", documents) == {}


def member(
    name: str, kind: bytes = tarfile.REGTYPE, target: str = "", data: bytes = b""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(data)
    return info, data


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


HOSTILE = {
    "parent": [member("../x")],
    "inner parent": [member("a/../../x")],
    "absolute": [member("/tmp/x")],
    "backslash": [member("a\\..\\x")],
    "link out": [member("a", tarfile.SYMTYPE, "../x")],
    "absolute link": [member("a", tarfile.SYMTYPE, "/etc/passwd")],
    "link out through a link": [
        member("x/l", tarfile.SYMTYPE, ".."),
        member("y/z/m", tarfile.SYMTYPE, "../../x/l/../q"),
    ],
    "write through a link": [member("a", tarfile.SYMTYPE, "b"), member("a/c")],
    "link below a link": [member("b/d"), member("a", tarfile.SYMTYPE, "b"), member("a/c", tarfile.SYMTYPE, "d")],
    "hard link": [member("a"), member("b", tarfile.LNKTYPE, "a")],
    "device": [member("a", tarfile.CHRTYPE)],
    "fifo": [member("a", tarfile.FIFOTYPE)],
    "twice": [member("a"), member("a")],
    "twice by another spelling": [member("a/b"), member("a/./b")],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_and_writes_nothing_outside(case, tmp_path):
    path = packed(tmp_path / "hostile.tar.gz", *HOSTILE[case])
    with pytest.raises(IntegrityError):
        unpack(path, tmp_path / "inner" / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["hostile.tar.gz", "inner"]
    assert [each.name for each in (tmp_path / "inner").iterdir()] == ["out"]


def test_sound_archive_is_unpacked_by_either_compression(tmp_path):
    program, data = member("python/bin/python3.12", data=b"#!")
    program.mode = 0o755
    members = [
        member("python", tarfile.DIRTYPE),
        (program, data),
        member("python/bin/python3", tarfile.SYMTYPE, "python3.12"),
    ]
    path = packed(tmp_path / "a.tar.gz", *members)
    plain = gzip.decompress(path.read_bytes())
    other = tmp_path / "a.tar.zst"
    other.write_bytes(zstandard.compress(plain[:1024]) + zstandard.compress(plain[1024:]))
    for index, archive in enumerate((path, other)):
        unpack(archive, tmp_path / str(index))
        found = tmp_path / str(index) / "python" / "bin" / "python3"
        assert found.read_bytes() == b"#!"
        assert os.access(found, os.X_OK)


@pytest.mark.parametrize("cut", [0, 3, 20, 60])
@pytest.mark.parametrize("compress", ["gz", "zst"])
def test_damaged_archive_is_an_integrity_error(cut, compress, tmp_path):
    path = packed(tmp_path / "a.tar.gz", member("a", data=os.urandom(5000)))
    if compress == "zst":
        path.write_bytes(zstandard.compress(gzip.decompress(path.read_bytes())))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(IntegrityError):
        unpack(path, tmp_path / "out")


def test_archive_that_claims_more_than_a_python_holds_is_refused_unread(tmp_path):
    info, _ = member("huge")
    info.size = 3 << 30
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(info.tobuf()))
    with pytest.raises(IntegrityError, match="huge"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


def test_absent_archive_is_a_host_error(tmp_path):
    with pytest.raises(HostError):
        unpack(tmp_path / "absent.tar.gz", tmp_path / "out")


ANSWER = """#!/bin/sh
echo '{"implementation": "cpython", "minor": "3.12", "version": "3.12.1", "program": "%s", "stdlib": "/x",
"dynload": "/x", "include": "/x", "platform_include": "/x", "library_folder": "lib", "debug": false,
"free_threaded": false, "abi": "cpython-312"}'
""".replace('\n"', ' "')


@pytest.mark.parametrize(
    ("was", "now", "reason"),
    [
        ('"debug": false', '"debug": true', "debug"),
        ('"free_threaded": false', '"free_threaded": true', "free-threaded"),
        ('"implementation": "cpython"', '"implementation": "pypy"', "pypy"),
        ('"library_folder": "lib"', '"library_folder": "lib64"', "lib64"),
        ('"abi": "cpython-312"', '"abi": "cpython-312-x86_64-linux-musl"', "musl"),
        ('"debug": false', '"debug": 3', "answer"),
    ],
)
def test_python_that_cannot_travel_is_refused_by_reason_and_passed_over(was, now, reason, tmp_path):
    program = tmp_path / "python3.12"
    program.write_text((ANSWER % program).replace(was, now))
    program.chmod(0o755)
    with pytest.raises(HostError) as caught:
        inspect_python(program)
    assert reason in str(caught.value)
    assert program not in [
        each.path for each in find_pythons(["3.12"], {"PATH": str(tmp_path), "HOME": "/nonexistent"})
    ]

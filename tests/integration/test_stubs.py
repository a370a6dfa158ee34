"""Stubs in the place of real libraries: under real clients, and in a bundle that an overlay changes."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from composer.errors import ElfError
from composer.formats.elf import load_faults, read_elf
from composer.formats.stubcode import write_code
from composer.formats.stublib import Answer, Machine, render_library
from composer.formats.symbols import Definition, defined_symbols
from tests.integration.conftest import First
from tests.shared_objects import gcc
from tests.stack import NAME, SITE, Stack

X86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="runs generated x86-64 code")
MESSAGE = "BUNDLE: {name} is not in this bundle"
LIBRARY = """
struct pair { int first; int second; };
int vendor_plain(int x) { return x; }
long vendor_long(void) { return 1; }
struct pair vendor_pair(void) { struct pair both = {0, 0}; return both; }
int vendor_old(void) { return 1; }
__asm__(".symver vendor_old,vendor_moved@VENDOR_1");
int vendor_new(void) { return 2; }
__asm__(".symver vendor_new,vendor_moved@@VENDOR_2");
int vendor_table[1000] = {1};
__attribute__((weak)) int vendor_weak(void) { return 3; }
__attribute__((visibility("hidden"))) int vendor_hidden(void) { return 4; }
static int local_resolved(void) { return 5; }
static void *resolve(void) { return local_resolved; }
int vendor_chosen(void) __attribute__((ifunc("resolve")));
__thread int vendor_thread;
"""
VERSIONS = """
VENDOR_1 { global: vendor_plain; vendor_moved; vendor_table; vendor_weak; vendor_chosen; vendor_thread; local: *; };
VENDOR_2 { global: vendor_long; vendor_pair; vendor_moved; } VENDOR_1;
"""
CLIENT = """
#include <stdio.h>
struct pair { int first; int second; };
int vendor_plain(int); long vendor_long(void); struct pair vendor_pair(void); int vendor_moved(void);
extern int vendor_table[1000];
int main(void) {
    struct pair both = vendor_pair();
    int sum = 0;
    for (int i = 0; i < 1000; i++) sum += vendor_table[i] = i;
    printf("[%d, %ld, %d, %d, %d, %d]", vendor_plain(3), vendor_long(), both.first, both.second, vendor_moved(), sum);
    return 0;
}
"""


def real_library(folder: Path, *options: str, versions: str | None = VERSIONS, source: str = LIBRARY) -> Path:
    path = folder / "libvendor.so.1"
    words = [*options]
    if versions:
        (folder / "versions").write_text(versions)
        words.append(f"-Wl,--version-script={folder / 'versions'}")
    gcc("-shared", "-fPIC", "-O1", "-Wl,-soname,libvendor.so.1", "-o", path, *words, source=source)
    return path


def client(folder: Path) -> Path:
    """A program linked with the real library, all of whose references are resolved at its start."""
    path = folder / "client"
    gcc("-no-pie", "-o", path, "-Wl,-z,now", f"-Wl,-rpath,{folder / 'used'}", folder / "libvendor.so.1", source=CLIENT)
    (folder / "used").mkdir()
    return path


def symbols(library: Path) -> list[Definition]:
    return [one for one in defined_symbols(library.read_bytes(), "real") if one.kind != "thread-local"]


def use(folder: Path, answer: Answer) -> None:
    stub = render_library("libvendor.so.1", symbols(folder / "libvendor.so.1"), answer, "x86_64")
    (folder / "used/libvendor.so.1").write_bytes(stub)


def call(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program], capture_output=True, text=True)


# --- what is read of the real library ---------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
def test_all_definitions_are_read_with_their_versions(tmp_path: Path, style: str) -> None:
    found = {
        (one.name, one.version, one.default): one.kind
        for one in defined_symbols(real_library(tmp_path, f"-Wl,--hash-style={style}").read_bytes(), "x")
    }
    assert found == {
        ("vendor_plain", "VENDOR_1", True): "function", ("vendor_long", "VENDOR_2", True): "function",
        ("vendor_pair", "VENDOR_2", True): "function", ("vendor_moved", "VENDOR_1", False): "function",
        ("vendor_moved", "VENDOR_2", True): "function", ("vendor_table", "VENDOR_1", True): "object",
        ("vendor_weak", "VENDOR_1", True): "function", ("vendor_chosen", "VENDOR_1", True): "function",
        ("vendor_thread", "VENDOR_1", True): "thread-local",
    }  # fmt: skip


@pytest.mark.parametrize("style", ["gnu", "sysv"])
def test_a_library_without_versions(tmp_path: Path, style: str) -> None:
    source = "int one(void) { return 1; } int two = 2; __attribute__((weak)) int three(void) { return 3; }"
    library = real_library(tmp_path, f"-Wl,--hash-style={style}", "-nostdlib", versions=None, source=source)
    found = {one.name: (one.kind, one.version, one.default) for one in defined_symbols(library.read_bytes(), "x")}
    kinds = {"one": "function", "two": "object", "three": "function"}
    assert {name: found[name] for name in kinds} == {name: (kind, None, True) for name, kind in kinds.items()}


def test_the_stubs_definitions_are_those_of_the_real_library(tmp_path: Path) -> None:
    real = symbols(real_library(tmp_path))
    stub = render_library("libvendor.so.1", real, Answer(status=1, message=MESSAGE), "x86_64")
    read = {(one.name, one.kind, one.version, one.default) for one in defined_symbols(stub, "stub")}
    assert read == {(one.name, one.kind, one.version, one.default) for one in real}
    sizes = {one.name: one.size for one in defined_symbols(stub, "stub") if one.kind == "object"}
    assert sizes == {"vendor_table": 4000}


@pytest.mark.parametrize("cut", range(64, 1000, 97))
def test_a_cut_library_is_refused(tmp_path: Path, cut: int) -> None:
    with pytest.raises(ElfError):
        defined_symbols(real_library(tmp_path).read_bytes()[:cut], "cut")


@pytest.mark.parametrize("style", ["gnu", "sysv"])
def test_a_damaged_library_is_read_or_refused(tmp_path: Path, style: str) -> None:
    data = real_library(tmp_path, f"-Wl,--hash-style={style}").read_bytes()
    chance = random.Random(1)
    end = next(load.filesz for load in read_elf(data, "real").loads)
    for _ in range(3000):
        mutant = bytearray(data)
        for _ in range(chance.choice((1, 4))):
            mutant[chance.randrange(64, end)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        with contextlib.suppress(ElfError):
            assert len(defined_symbols(bytes(mutant), "mutant")) < len(data)


# --- under a client that was linked with the real one -----------------------------------------------------------------


@X86_64
@pytest.mark.parametrize("status", [0, 16, -5007, -65536, 65535])
def test_every_function_returns_the_status_and_the_first_says_so(tmp_path: Path, status: int) -> None:
    real_library(tmp_path)
    program = client(tmp_path)
    shutil.copy(tmp_path / "libvendor.so.1", tmp_path / "used")
    assert call(program).stdout == "[3, 1, 0, 0, 2, 499500]"
    use(tmp_path, Answer(status=status, message=MESSAGE))
    done = call(program)
    low, high = status % 2**32, (status % 2**64) >> 32
    signed = [value - 2**32 if value >= 2**31 else value for value in (low, high)]
    assert done.returncode == 0
    assert json.loads(done.stdout) == [signed[0], status, *signed, signed[0], 499500]
    assert done.stderr == "BUNDLE: vendor_pair is not in this bundle\n"


@X86_64
def test_without_a_message_nothing_is_written(tmp_path: Path) -> None:
    real_library(tmp_path)
    program = client(tmp_path)
    use(tmp_path, Answer(status=7))
    done = call(program)
    assert (done.stdout, done.stderr) == ("[7, 7, 7, 0, 7, 499500]", "")


@X86_64
def test_a_version_that_the_real_library_lacks_is_missing_in_the_stub(tmp_path: Path) -> None:
    real_library(tmp_path)
    program = client(tmp_path)
    first = [one for one in symbols(tmp_path / "libvendor.so.1") if one.version == "VENDOR_1"]
    stub = render_library("libvendor.so.1", first, Answer(status=7), "x86_64")
    (tmp_path / "used/libvendor.so.1").write_bytes(stub)
    assert "version `VENDOR_2' not found" in call(program).stderr


TEXT_LIBRARY = 'int vendor_make(void) { return 0; } const char *vendor_text(int status) { return "real"; }'
TEXT_CLIENT = """
#include <stdio.h>
int vendor_make(void); const char *vendor_text(int status);
int main(void) { printf("%s", vendor_text(vendor_make())); return 0; }
"""


@X86_64
def test_a_function_that_returns_a_text_returns_the_message(tmp_path: Path) -> None:
    library = real_library(tmp_path, versions=None, source=TEXT_LIBRARY)
    gcc("-o", tmp_path / "client", f"-Wl,-rpath,{tmp_path}", library, source=TEXT_CLIENT)
    assert call(tmp_path / "client").stdout == "real"
    answer = Answer(status=9, message=MESSAGE, text="not in the bundle", texts=frozenset({"vendor_text"}))
    library.write_bytes(render_library("libvendor.so.1", symbols(library), answer, "x86_64"))
    done = call(tmp_path / "client")
    assert (done.stdout, done.stderr) == ("not in the bundle", "BUNDLE: vendor_make is not in this bundle\n")


ABORT = """
import ctypes, signal, sys
{before}
library = ctypes.CDLL(sys.argv[1])
library.vendor_plain(1)
print("went on")
"""
BLOCKED = "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGABRT])"
HANDLED = "signal.signal(signal.SIGABRT, lambda *_: None)"


@X86_64
@pytest.mark.parametrize(
    ("before", "code"),
    [("", -signal.SIGABRT), ("import faulthandler; faulthandler.enable()", -signal.SIGABRT), (BLOCKED, 134),
     (HANDLED, 134)],
)  # fmt: skip
def test_abort_names_the_function_and_ends_the_process(tmp_path: Path, before: str, code: int) -> None:
    real_library(tmp_path)
    (tmp_path / "used").mkdir()
    use(tmp_path, Answer(message=MESSAGE))
    words = [sys.executable, "-c", ABORT.format(before=before), tmp_path / "used/libvendor.so.1"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("BUNDLE: vendor_plain is not in this bundle\n")


@X86_64
def test_a_closed_standard_error_does_not_matter(tmp_path: Path) -> None:
    real_library(tmp_path)
    program = client(tmp_path)
    use(tmp_path, Answer(status=7, message=MESSAGE))
    done = subprocess.run(["sh", "-c", f"{program} 2>&-"], capture_output=True, text=True)
    assert done.stdout == "[7, 7, 7, 0, 7, 499500]"


# --- the object itself ------------------------------------------------------------------------------------------------

SAMPLE = [
    *(Definition(name=f"f{number}", version="V1") for number in range(300)),
    Definition(name="f0", version="V2", default=False), Definition(name="plain"),
    Definition(name="data", kind="object", size=5000, version="V1"), Definition(name="byte", kind="object", size=1),
]  # fmt: skip
MACHINES = pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
ANSWERS = pytest.mark.parametrize(
    "answer",
    [Answer(status=3), Answer(status=-3, message=MESSAGE), Answer(message=MESSAGE)],
    ids=["quiet", "status", "abort"],
)


@MACHINES
@ANSWERS
def test_readelf_and_our_own_reader_agree(tmp_path: Path, machine: Machine, answer: Answer) -> None:
    stub = render_library("libx.so.7", SAMPLE, answer, machine)
    path = tmp_path / "libx.so.7"
    path.write_bytes(stub)
    seen = subprocess.run(["readelf", "-a", "-W", path], capture_output=True, text=True, check=True)
    assert (seen.stderr, "Warning" in seen.stdout) == ("", False)
    rows = subprocess.run(["readelf", "-D", "-s", "-W", path], capture_output=True, text=True, check=True).stdout
    assert sum(" FUNC " in row for row in rows.splitlines()) == 302
    elf = read_elf(stub, "stub")
    assert (elf.machine, elf.kind, elf.soname, elf.needed) == (machine, "shared", "libx.so.7", ())
    assert elf.versions_defined == {"V1", "V2"}
    assert load_faults(elf) == ()


@MACHINES
@ANSWERS
def test_order_and_repetition_do_not_matter(machine: Machine, answer: Answer) -> None:
    twice = [*reversed(SAMPLE), SAMPLE[0]]
    assert render_library("l", twice, answer, machine) == render_library("l", SAMPLE, answer, machine)


def test_a_thread_local_variable_is_refused() -> None:
    with pytest.raises(ElfError, match="thread-local"):
        render_library("l", [Definition(name="t", kind="thread-local")], Answer(status=1), "x86_64")


def test_a_line_too_long_for_one_instruction_is_refused() -> None:
    with pytest.raises(ElfError, match="line"):
        render_library("l", [Definition(name="n" * 70000)], Answer(status=1, message="{name}"), "aarch64")


FLAG = 0x12468
X86_64_CODE = """
.text
.globl shared
shared: {shared}
f0: lea f0_line(%rip), %rsi; movl $3, %edx; .byte 0xe9; .long shared - . - 4
told: lea told_text(%rip), %rax; ret; .fill 9, 1, 0xcc
f1: lea f1_line(%rip), %rsi; movl $4, %edx; .byte 0xe9; .long shared - . - 4
f0_line: .ascii "ab\\n"
told_text: .asciz "text"
f1_line: .ascii "abc\\n"
.org 0x12468
flag: .byte 0
"""
X86_64_STATUS = """
cmpb $0, flag(%rip); jne 1f; movb $1, flag(%rip); movl $2, %edi; movl $1, %eax; syscall
1: mov ${status}, %{register}; ret
"""
X86_64_ABORT = """
movl $2, %edi; movl $1, %eax; syscall
movl $39, %eax; syscall; movl %eax, %edi; movl $186, %eax; syscall; movl %eax, %esi; movl $6, %edx
movl $234, %eax; syscall; movl $134, %edi; movl $231, %eax; syscall
"""
AARCH64_CODE = """
.text
.globl shared
shared: {shared}
f0: adrp x1, f0_line; add x1, x1, :lo12:f0_line; mov w2, #3; b shared
told: adrp x0, told_text; add x0, x0, :lo12:told_text; ret; .inst 0
f1: adrp x1, f1_line; add x1, x1, :lo12:f1_line; mov w2, #4; b shared
f0_line: .ascii "ab\\n"
told_text: .asciz "text"
f1_line: .ascii "abc\\n"
.org 0x12468
flag: .byte 0
"""
AARCH64_STATUS = """
adrp x9, flag; add x9, x9, :lo12:flag; ldrb w10, [x9]; cbnz w10, 1f; mov w10, #1; strb w10, [x9]
mov w0, #2; mov w8, #64; svc #0; 1: mov {register}, #{status}; ret
"""
AARCH64_ABORT = """
mov w0, #2; mov w8, #64; svc #0
mov w8, #172; svc #0; mov w9, w0; mov w8, #178; svc #0; mov w1, w0; mov w0, w9; mov w2, #6
mov w8, #131; svc #0; mov w0, #134; mov w8, #94; svc #0
"""


def assembled(folder: Path, machine: Machine, source: str) -> tuple[int, bytes]:
    """The address at which the assembler and linker of ziglang put `source`, and what they make of it."""
    (folder / "code.s").write_text(source)
    environ = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(folder), "ZIG_LOCAL_CACHE_DIR": str(folder)}
    zig = [sys.executable, "-m", "ziglang"]
    for words in (
        ["cc", "-target", f"{machine}-linux-gnu", "-c", "-o", "code.o", "code.s"],
        ["ld.lld", "-e", "shared", "-o", "code", "code.o"],
    ):
        subprocess.run([*zig, *words], check=True, cwd=folder, env=environ, capture_output=True)
    data = (folder / "code").read_bytes()
    (entry,) = struct.unpack_from("<Q", data, 24)
    (load,) = (one for one in read_elf(data, "code").loads if one.vaddr <= entry < one.vaddr + one.filesz)
    return entry, data[load.offset + entry - load.vaddr : load.offset + load.filesz]


@pytest.mark.parametrize("status", [16, -5007, None])
@MACHINES
def test_the_code_is_what_an_assembler_makes_of_it(tmp_path: Path, machine: Machine, status: int | None) -> None:
    register = {"x86_64": ("eax", "rax"), "aarch64": ("w0", "x0")}[machine][status is not None and status < 0]
    shared, code = {
        "x86_64": (X86_64_ABORT if status is None else X86_64_STATUS, X86_64_CODE),
        "aarch64": (AARCH64_ABORT if status is None else AARCH64_STATUS, AARCH64_CODE),
    }[machine]
    at, made = assembled(tmp_path, machine, code.format(shared=shared.format(status=status, register=register)))
    answer = Answer(status=status, message="{name}", text="text", texts=frozenset({"told"}))
    ours = write_code(machine, answer, ["ab", "told", "abc"], at=at, flag=at + FLAG)
    assert ours.data == made[: len(ours.data)]


# --- in a bundle ------------------------------------------------------------------------------------------------------

OVERLAY = """
schema = 1
summary = "without the core"
[[stub]]
library = "core_lib/lib/libcore.so"
distribution = "core-lib"
symbols = ["core_*"]
status = -7
reason = "nobody asks it"
message = "compose it without --overlay bare"
[[component]]
name = "core-lib"
prune = [{ paths = ["core_lib/weights.bin"], reason = "weights of the core" }]
"""
LIBCORE = f"{SITE}/core_lib/lib/libcore.so"
LINE = f"{NAME}-bare: core_answer of libcore.so is not in this bundle: compose it without --overlay bare\n"


def _linked(path: str, to: str) -> str:
    """The component of the overlay with a link."""
    return f'name = "core-lib"\nlinks = [{{ path = "{path}", to = "{to}", reason = "a copy" }}]'


@pytest.fixture
def bare(stack: Stack) -> Stack:
    (stack.home / "overlays").mkdir()
    (stack.home / "overlays/bare.toml").write_text(OVERLAY)
    return stack


def unpacked(bare: Stack, folder: Path) -> Path:
    prefix = folder / "prefix"
    prefix.mkdir()
    bundle = bare.output / f"{NAME}-bare.tar.zst"
    subprocess.run(["tar", "--zstd", "-xf", bundle, "-C", prefix], check=True)
    return prefix


@X86_64
def test_a_bundle_with_a_stub_runs_and_says_what_it_lacks(bare: Stack, first: First, tmp_path: Path) -> None:
    out = bare.build("--overlay", "bare").ok().out
    assert "stub:     libcore.so of core-lib: nobody asks it" in out
    prefix = unpacked(bare, tmp_path)
    done = subprocess.run([prefix / "bin/app-hello"], capture_output=True, text=True, env={"PATH": os.defpath})
    assert (done.returncode, done.stdout, done.stderr) == (0, "patched -7\n", LINE)
    assert not (prefix / SITE / "core_lib/weights.bin").exists()
    (record,) = (prefix / SITE).glob("core_lib-*.dist-info/RECORD")
    assert "libcore.so" not in record.read_text()
    assert "sound" in bare.compose("verify", str(prefix)).ok().out
    assert bare.build("--overlay", "bare").ok().out.count("up to date") >= 1
    bare.build().ok()
    assert bare.digest() == first.digest


@X86_64
def test_the_manifest_tells_of_the_stub_and_of_the_overlay(bare: Stack, first: First) -> None:
    bare.build("--overlay", "bare").ok()
    manifest = json.loads(bare.compose("inspect", "--json", str(bare.output / f"{NAME}-bare.tar.zst")).ok().out)
    before = json.loads(bare.compose("inspect", "--json", str(first.stack.bundle)).ok().out)
    assert manifest["recipe"]["overlays"] == "bare"
    assert "overlays" not in before["recipe"]
    shown = bare.compose("inspect", str(bare.output / f"{NAME}-bare.tar.zst")).ok().out
    assert re.search(r"recipe: +small \S+ with bare\n", shown)
    assert manifest["recipe"]["sha256"] != before["recipe"]["sha256"]
    assert manifest["lock"] == before["lock"]
    layers = {layer["name"]: layer for layer in manifest["layers"]}
    (stub,) = layers["wheel-composer"]["changes"]["files"]
    assert (stub["kind"], stub["path"], stub["reason"]) == ("stub", LIBCORE, "nobody asks it")
    assert "1 functions return -7" in stub["detail"]
    assert LIBCORE in {entry["path"] for entry in layers["wheel-composer"]["entries"]}
    rules = {rule["pattern"]: rule["reason"] for rule in layers["core-lib"]["changes"]["pruned"]}
    assert rules["core_lib/lib/libcore.so"] == "a stub takes its place: nobody asks it"
    text = bare.compose("inspect", str(bare.output / f"{NAME}-bare.tar.zst")).ok().out
    assert "wheel-composer: stub libcore.so: generated, in place of the library of core-lib" in text
    untouched = {layer["name"]: layer["parts"] for layer in before["layers"] if layer["name"] in ("app", "hook")}
    assert untouched == {name: layers[name]["parts"] for name in untouched}


def test_a_plan_without_wheels_tells_of_stubs(bare: Stack, tmp_path: Path) -> None:
    cold = bare.fresh(tmp_path / "cold")
    plan = json.loads(cold.run(cold.words("--overlay", "bare", "--json", command="plan")).ok().out)
    assert plan["name"] == f"{NAME}-bare"
    assert plan["stubs"] == ["libcore.so of core-lib: nobody asks it"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('symbols = ["core_*"]', 'symbols = ["core_*", "cure_*"]', ("cure_*", "stub[0].symbols")),
        ("status = -7", 'status = -7\ntexts = ["core_text"]', ("core_text", "stub[0].texts")),
        ('library = "core_lib/lib/libcore.so"', 'library = "core_lib/lib/libno.so"', ("core_lib/lib/libno.so",)),
        ('library = "core_lib/lib/libcore.so"', 'library = "core_lib/__init__.py"', ("core_lib/__init__.py",)),
        ('distribution = "core-lib"', 'distribution = "no-lib"', ("no-lib", "stub[0].distribution")),
        ('name = "core-lib"', 'name = "core-lib"\nversion = "2.0"', ("contradicts the component's version 2.0",)),
        ('name = "core-lib"', _linked("core_lib/two", "core_lib/none"), ("cannot link to 'core_lib/none'", "links")),
        ('name = "core-lib"', _linked("core_lib/two", "core_lib/weights.bin"), ("or it is left out", "links")),
        ('name = "core-lib"', _linked("core_lib/__init__.py", "core_lib/__init__.py"), ("is there already",)),
    ],
)  # fmt: skip
def test_an_overlay_that_does_not_fit_is_refused(bare: Stack, old: str, new: str, words: tuple[str, ...]) -> None:
    path = bare.home / "overlays/bare.toml"
    assert old in OVERLAY
    path.write_text(OVERLAY.replace(old, new))
    bare.build("--overlay", "bare").refused(2, *words)
    assert bare.leftovers() == []


def test_a_link_where_another_distribution_has_a_file(bare: Stack) -> None:
    linked = _linked("app/core.py", "core_lib/__init__.py")
    (bare.home / "overlays/bare.toml").write_text(OVERLAY.replace('name = "core-lib"', linked))
    bare.build("--overlay", "bare").refused(8, "app/core.py", "owned by both app and core-lib")
    assert bare.leftovers() == []


def test_a_link_is_a_second_name(bare: Stack, tmp_path: Path) -> None:
    linked = _linked("core_lib/again/two.py", "core_lib/__init__.py")
    (bare.home / "overlays/bare.toml").write_text(OVERLAY.replace('name = "core-lib"', linked))
    bare.build("--overlay", "bare").ok()
    site = unpacked(bare, tmp_path) / SITE
    assert str((site / "core_lib/again/two.py").readlink()) == "../../core_lib/__init__.py"
    assert (site / "core_lib/again/two.py").read_bytes() == (site / "core_lib/__init__.py").read_bytes()
    assert "sound" in bare.compose("verify", "--no-imports", str(tmp_path / "prefix")).ok().out


def test_an_unknown_overlay_is_refused(bare: Stack) -> None:
    bare.build("--overlay", "bear").refused(2, "no overlay 'bear'", "Did you mean 'bare'?")

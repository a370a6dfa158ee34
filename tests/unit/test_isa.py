"""Counting instructions, compared with what an assembler was given and with what binutils reads."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from composer.errors import ElfError
from composer.formats.isa import count_piece, pieces, read_code
from composer.formats.sweep import sweep, vector_length
from composer.model.isa import Seen, features_of, judge
from composer.steps.load import load_targets
from tests.shared_objects import gcc, library

#: (instruction, what it counts as, besides `instructions`).
X86 = [
    ("addps %xmm1, %xmm0", ""),
    ("vaddps %xmm1, %xmm0, %xmm0", "vex avx"),
    ("vaddps %ymm1, %ymm0, %ymm0", "vex avx ymm"),
    ("vaddps %fs:(%rax), %ymm0, %ymm0", "vex avx ymm"),
    ("vzeroupper", "vex avx"),
    ("vzeroall", "vex avx"),
    ("vpaddd %ymm1, %ymm0, %ymm0", "vex avx2 ymm"),
    ("vpaddd %xmm1, %xmm0, %xmm0", "vex avx"),
    ("vpbroadcastd %xmm1, %xmm0", "vex avx2"),
    ("vbroadcastss (%rax), %ymm0", "vex avx ymm"),
    ("vbroadcastss %xmm1, %ymm0", "vex avx2 ymm"),
    ("vcvtpd2psy (%rax), %xmm0", "vex avx"),
    ("vfmadd231ps %ymm1, %ymm0, %ymm0", "vex fma ymm"),
    ("vcvtph2ps %xmm0, %ymm1", "vex f16c ymm"),
    ("shlx %rax, %rbx, %rcx", "vex bmi"),
    ("{vex} vpdpbusd %ymm1, %ymm0, %ymm0", "vex avxvnni ymm"),
    ("tileloadd (%rax,%rbx,1), %tmm0", "vex amx"),
    ("tdpbf16ps %tmm0, %tmm1, %tmm2", "vex amx"),
    ("tilerelease", "vex amx"),
    ("vaddps %zmm1, %zmm0, %zmm0", "evex avx512f zmm"),
    ("vaddps {rd-sae}, %zmm1, %zmm0, %zmm0", "evex avx512f zmm"),
    ("vaddss {rd-sae}, %xmm1, %xmm0, %xmm0", "evex avx512f"),
    ("vaddps %ymm17, %ymm0, %ymm0", "evex avx512f avx512vl ymm"),
    ("vaddps %xmm17, %xmm0, %xmm0", "evex avx512f avx512vl"),
    ("vmovd %eax, %xmm17", "evex avx512f"),
    ("vcvtpd2ps 4096(%rax){1to8}, %ymm0", "evex avx512f ymm"),
    ("vpaddb %zmm1, %zmm0, %zmm0", "evex avx512bw zmm"),
    ("vpmullq %zmm1, %zmm0, %zmm0", "evex avx512dq zmm"),
    ("vfpclasspsz $1, (%rax), %k1", "evex avx512dq"),
    ("vpconflictd %zmm1, %zmm0", "evex avx512cd zmm"),
    ("vpdpbusd %zmm1, %zmm0, %zmm0", "evex avx512vnni zmm"),
    ("vdpbf16ps 64(%rax), %zmm0, %zmm0", "evex avx512bf16 zmm"),
    ("vcvtneps2bf16 %zmm1, %ymm0", "evex avx512bf16 zmm"),
    ("vaddph %zmm1, %zmm0, %zmm0", "evex avx512fp16 zmm"),
    ("vcmpph $1, 256(%rax,%rbx,2), %zmm0, %k1", "evex avx512fp16 zmm"),
    ("vpermb %zmm1, %zmm0, %zmm0", "evex avx512other zmm"),
    ("vfmadd231ps (%rip), %zmm0, %zmm0", "evex avx512f fma zmm"),
    ("kmovw %k1, %eax", "vex avx512f"),
    ("kmovb %k1, %eax", "vex avx512dq"),
    ("kmovq %k1, %rax", "vex avx512bw"),
    ("kaddw %k1, %k2, %k3", "vex avx512dq"),
    ("kunpckbw %k1, %k2, %k3", "vex avx512f"),
    ("cpuid", "cpuid"),
]
ARM = [
    ("fadd v0.4s, v1.4s, v2.4s", ""),
    ("fadd v0.8h, v1.8h, v2.8h", "fp16"),
    ("fadd h0, h1, h2", "fp16"),
    ("fcvt s0, h1", ""),
    ("sdot v0.4s, v1.16b, v2.16b", "dotprod"),
    ("smmla v0.4s, v1.16b, v2.16b", "i8mm"),
    ("usdot v0.4s, v1.16b, v2.4b[1]", "i8mm"),
    ("bfdot v0.4s, v1.8h, v2.8h", "bf16"),
    ("bfcvt h0, s1", "bf16"),
    ("ldadd w0, w1, [x2]", "lse"),
    ("cas w0, w1, [x2]", "lse"),
    ("ldxr w0, [x1]", ""),
    ("add z0.s, z1.s, z2.s", "sve"),
    ("sdot z0.s, z1.b, z2.b", "sve"),
    ("bfmmla z0.s, z1.h, z2.h", "sve bf16"),
    ("sqdmulh z0.s, z1.s, z2.s", "sve sve2"),
    ("whilege p0.s, x0, x1", "sve sve2"),
    ("whilelt p0.s, x0, x1", "sve"),
]
NAMES = {flag for _, kinds in [*X86, *ARM] for flag in kinds.split()}


def assembly(*lines: str) -> str:
    body = "\\n".join(f"  {line}" for line in lines)
    return f'__asm__(".text\\n.globl start\\n.type start,@function\\nstart:\\n{body}\\n");'


def counted(data: bytes, where: str = "x.so") -> Counter[str]:
    code = read_code(data, where)
    assert code is not None
    total: Counter[str] = Counter()
    for part in pieces(code):
        total.update(count_piece(data, part, code.machine))
    return total


def objdump(path: Path) -> Counter[str]:
    """Instructions, and lines by encoding and by the longest register, as binutils disassembles them."""
    text = subprocess.run(["objdump", "-dw", path], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^ +[0-9a-f]+:\t([0-9a-f ]+?) *\t(.+)$", text, re.MULTILINE)
    found = Counter(instructions=len(rows))
    for code, line in rows:
        first = re.sub(r"^((64|65|67|2e|3e) )*", "", code)[:2]
        found["vex"] += first in ("c4", "c5")
        found["evex"] += first == "62"
        found["zmm"] += "%zmm" in line
        found["ymm"] += "%ymm" in line and "%zmm" not in line
    return found


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What gcc makes of loops for AVX-512."""
    source = """
    #define LOOP(T, NAME) void NAME(T *a, const T *b, const double *c, int n) \\
      { for (int i = 0; i < n; i++) a[i] = a[i] * b[i] + (T)c[i] + (b[i] > a[i] ? (T)3 : b[i]); }
    LOOP(float, f) LOOP(double, d) LOOP(int, i) LOOP(short, s) LOOP(unsigned char, c) LOOP(long, l) LOOP(unsigned, u)
    """
    path = tmp_path_factory.mktemp("isa") / "loops.so"
    return library(path, source, "-O3", "-march=x86-64-v4", "-mprefer-vector-width=512")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    source = folder / "arm.s"
    source.write_text(".text\n" + "".join(f"{line}\n" for line, _ in ARM))
    path = folder / "libarm.so"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu"]
    features = "-Wa,-march=armv8.6-a+fp16+dotprod+i8mm+bf16+lse+sve+sve2"
    subprocess.run([*compiler, features, "-shared", "-nostdlib", "-o", path, source], check=True, capture_output=True)
    return path


@pytest.mark.parametrize(("line", "kinds"), X86)
def test_each_instruction_counts_as_what_it_is(tmp_path: Path, line: str, kinds: str) -> None:
    path = library(tmp_path / "one.so", assembly(line))
    found = counted(path.read_bytes())
    assert found["undecoded"] == 0
    assert {name for name in NAMES if found[name]} == set(kinds.split())
    assert all(found[name] == 1 for name in kinds.split())


def test_all_together_agree_with_binutils(tmp_path: Path) -> None:
    path = library(tmp_path / "all.so", assembly(*(line for line, _ in X86)))
    found, expected = counted(path.read_bytes()), objdump(path)
    assert found["instructions"] == len(X86)
    assert {name: found[name] for name in expected} == expected


def test_compiled_loops_agree_with_binutils(vectors: Path) -> None:
    found, expected = counted(vectors.read_bytes()), objdump(vectors)
    assert expected["zmm"] > 50
    assert expected["vex"] > 10
    assert {name: found[name] for name in expected} == expected


def test_arm_words_count_as_what_they_are(arm: Path) -> None:
    expected = Counter(kind for _, kinds in ARM for kind in kinds.split())
    found = counted(arm.read_bytes())
    assert found["instructions"] == len(ARM)
    assert {name: found[name] for name in expected} == expected


def test_data_in_the_text_does_not_hide_a_function(tmp_path: Path) -> None:
    """The data ends with the first byte of a long instruction, which swallows the function's first."""
    head = [".byte 0x48, 0xb8", ".globl next", ".type next,@function", "next:"]
    lines = [*head, *["vaddps %zmm1, %zmm0, %zmm0"] * 3, "ret"]
    path = library(tmp_path / "data.so", assembly(*lines))
    assert counted(path.read_bytes())["zmm"] == 3


def test_unknown_bytes_are_counted_and_passed(tmp_path: Path) -> None:
    found = counted(library(tmp_path / "bad.so", assembly(".byte 6, 6, 6", "vaddps %ymm1, %ymm0, %ymm0")).read_bytes())
    assert (found["undecoded"], found["ymm"]) == (3, 1)


def test_an_object_without_sections_is_read_by_its_segments(vectors: Path) -> None:
    data = bytearray(vectors.read_bytes())
    whole = counted(bytes(data))
    struct.pack_into("<Q", data, 40, 0)
    struct.pack_into("<3H", data, 58, 0, 0, 0)
    found = counted(bytes(data))
    assert (found["zmm"], found["evex"]) == (whole["zmm"], whole["evex"])


def test_a_cut_object_is_refused_or_read(vectors: Path) -> None:
    data = vectors.read_bytes()
    for size in (0, 3, 63, 64, 200, *range(256, len(data), 997)):
        with pytest.raises(ElfError):
            counted(data[:size])


def test_damaged_headers_are_refused_or_read(vectors: Path) -> None:
    """Any byte of the headers may be any other: what comes is a count or an ElfError."""
    data = vectors.read_bytes()
    random = np.random.default_rng(4)
    table = struct.unpack_from("<Q", data, 40)[0]
    places = [*range(16, 64), *range(64, 64 + 56 * 8), *range(table, len(data))]
    for place in random.choice(places, 300):
        damaged = bytearray(data)
        damaged[place] = random.integers(256)
        try:
            counted(bytes(damaged))
        except ElfError:
            continue


@pytest.mark.parametrize("field", [16, 24, 32])
def test_code_at_no_address_is_refused(vectors: Path, field: int) -> None:
    """sh_addr, sh_offset and sh_size of the section that holds the code."""
    data = bytearray(vectors.read_bytes())
    start, size, count = (*struct.unpack_from("<Q", data, 40), *struct.unpack_from("<2H", data, 58))
    for row in range(start, start + size * count, size):
        if struct.unpack_from("<Q", data, row + 8)[0] & 4:
            struct.pack_into("<Q", data, row + field, 2**64 - 8)
    with pytest.raises(ElfError, match=r"outside the file"):
        counted(bytes(data))


def test_another_machine_has_no_code(vectors: Path) -> None:
    data = bytearray(vectors.read_bytes())
    struct.pack_into("<H", data, 18, 243)
    assert read_code(bytes(data), "x.so") is None


def test_pieces_are_all_of_the_code(tmp_path: Path) -> None:
    """Functions of more than a piece, and one that spans pieces."""
    lines = [".rept 90000", "vaddps %zmm1, %zmm0, %zmm0", ".endr", ".globl next", ".type next,@function", "next:"]
    data = library(tmp_path / "long.so", assembly(*lines, *lines[:3])).read_bytes()
    code = read_code(data, "x.so")
    assert code is not None
    parts = list(pieces(code))
    assert len(parts) == 2
    assert sum(one.size for one in parts) == sum(one.size for one in code.ranges)
    assert counted(data)["zmm"] == counted(data)["instructions"] == 180_000


def test_instructions_newer_than_the_disassembler_have_their_length(tmp_path: Path) -> None:
    lines = [line for line, kinds in X86 if {"avx512bf16", "avx512fp16", "amx"} & set(kinds.split())]
    path = tmp_path / "new.o"
    gcc("-c", "-o", path, source=assembly(*lines))
    text = subprocess.run(["objdump", "-dw", path], capture_output=True, text=True, check=True).stdout
    codes = [bytes.fromhex(one) for one in re.findall(r"^ +[0-9a-f]+:\t([0-9a-f ]+?) *\t", text, re.MULTILINE)]
    assert len(codes) == len(lines)
    for code in codes:
        assert vector_length(np.frombuffer(code + bytes(8), np.uint8), 0) == len(code)
        assert vector_length(np.frombuffer(code[:-1], np.uint8), 0) == 0


def test_without_the_disassembler_it_is_named() -> None:
    program = """
import sys
import numpy as np
sys.modules["capstone"] = None
from composer.errors import HostError
from composer.formats.sweep import sweep
try:
    sweep(np.zeros(9, np.uint8), np.zeros(1, np.int64))
except HostError as fault:
    print(fault)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "capstone is not installed" in done.stdout
    assert "pip install 'capstone>=5.0.9,<6'" in done.stdout


def test_an_empty_piece_has_no_instruction() -> None:
    assert sweep(np.empty(0, np.uint8), np.empty(0, np.int64)).starts.tolist() == []


TARGETS = load_targets()


def verdict(name: str, *seen: Seen) -> str:
    isa = TARGETS.isa[name]
    return judge(seen, isa.flags, isa.machine).verdict


def one(path: str, *kinds: str, machine: str = "x86_64", asks: bool = False) -> Seen:
    return Seen(path=path, machine=machine, counts=dict.fromkeys(kinds, 1), asks=asks)


STOCK = (one("lib/libc10.so", asks=True), one("lib/libtorch_cpu.so", "avx2", "avx512f", asks=True))


@pytest.mark.parametrize(("name", "seen", "expected"), [
    ("avx512", STOCK, "run-time dispatch only"),
    ("avx2", STOCK, "run-time dispatch only"),
    ("avx512", (one("libc10.so", "avx", "avx512vl", asks=True),), "applied"),
    ("avx2", (one("libc10.so", "avx", "avx512vl", asks=True),), "needs more than ISA"),
    ("avx2", (one("libc10.so", "avx", "fma"),), "applied"),
    ("avx512", (one("libc10.so", "avx", "fma"),), "not used"),
    ("avx", (one("libc10.so", "avx"),), "applied"),
    ("avx", (one("libc10.so", "avx", "bmi"),), "needs more than ISA"),
    ("x86-64-v3", (one("libc10.so", "avx", "bmi"),), "applied"),
    ("avx512", (one("libc10.so", "avx512f"), one("libtorch_python.so")), "not used"),
    ("avx512", (one("plain.so", "avx512f"), one("libtorch_python.so")), "not used"),
    ("avx512", (one("plain.so", "avx512f"),), "applied"),
    ("avx512", (one("plain.so", "avx512f", "avx512vnni"),), "needs more than ISA"),
    ("avx512vnni", (one("plain.so", "avx512f", "avx512vnni"),), "applied"),
    ("avx2", (one("libkernels_avx512.so", "avx512f"),), "not used"),
    ("avx2", (one("plain.so", "sve", machine="aarch64"),), "not used"),
    ("armv9", (one("libc10.so", "lse", "sve", machine="aarch64"),), "applied"),
    ("armv8_2", (one("libc10.so", "lse", "sve", machine="aarch64"),), "needs more than ISA"),
    ("armv8_2", (one("libc10.so", "lse", machine="aarch64"),), "not used"),
])  # fmt: skip
def test_verdicts(name: str, seen: tuple[Seen, ...], expected: str) -> None:
    assert verdict(name, *seen) == expected


@pytest.mark.parametrize("name", TARGETS.isa)
def test_every_flag_of_every_instruction_set_is_known(name: str) -> None:
    isa = TARGETS.isa[name]
    known = {"x86_64": {flag for _, kinds in X86 for flag in kinds.split()},
             "aarch64": {flag for _, kinds in ARM for flag in kinds.split()}}  # fmt: skip
    assert features_of(isa.flags) <= known[isa.machine]

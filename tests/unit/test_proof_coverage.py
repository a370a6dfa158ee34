"""Which GPU code a tree lacks for a target: rules over objects that real linkers made, and over plain facts."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from composer.formats.cubin import Cubin
from composer.formats.gpu_images import GpuImages, Image, ImageStream, Shape, cubin_images, read_images
from composer.model.coverage import Coverage, coverage_faults
from composer.model.finding import Finding
from composer.proofs.coverage import Cover, check_coverage, cover, coverage_table, needed_libraries
from tests.fatbins import Parts, container, gpu_library, images

SITE = "lib/python3.12/site-packages/"


def held(*containers: str, size: int = 1_000_000) -> GpuImages:
    """An object with a container for each text, such as `elf90a ptx80`; an empty one holds nothing."""
    return GpuImages(shapes=[
        Shape(images=[_image(name) for name in text.split()], count=1, sizes=[size] * len(text.split()))
        for text in containers
    ])  # fmt: skip


def _image(name: str) -> Image:
    return Image(kind=name[:3], sm=int(name[3:].rstrip("af")), variant=name[3:].lstrip("0123456789"))


def rule(*files: str, requires: str = "every", **fields: object) -> Coverage:
    return Coverage(files=files, requires=requires, reason="a test", **fields)  # type: ignore[arg-type]


def found(
    code: Mapping[str, GpuImages], rules: Sequence[Coverage], *sms: int, stubs: Sequence[str] = ()
) -> list[Finding]:
    tree = {SITE + path: one for path, one in code.items()}
    return list(check_coverage(tree, sms, rules, site=SITE, stubs={SITE + path for path in stubs}))


def told(code: Mapping[str, GpuImages], rules: Sequence[Coverage], *sms: int) -> list[tuple[str, str, str]]:
    return [(one.severity, one.id, one.subject.removeprefix(SITE)) for one in found(code, rules, *sms)]


# --- what is read of an object ----------------------------------------------------------------------------------------

PARTS = Parts(
    fatbins=[images("elf80", "elf90a", "ptx90"), images("elf80", "elf90a", "ptx90"), container()],
    relinkable=[images("elf70")],
    items=[b"no container", images("elf100a")],
    before=images("lto75"),
)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_container_but_those_to_link_again(tmp_path: Path, machine: str) -> None:
    data = gpu_library(tmp_path / "lib.so", PARTS, machine=machine).read_bytes()
    shapes = {
        tuple(f"{one.kind}{one.sm}{one.variant}" for one in shape.images): shape
        for shape in read_images(data, "x").shapes
    }
    assert {key: shape.count for key, shape in shapes.items()} == {
        ("elf80", "elf90a", "ptx90"): 2, ("elf100a",): 1, ("lto75",): 1, (): 1,
    }  # fmt: skip
    assert list(shapes["elf80", "elf90a", "ptx90"].sizes) == [2 * 96] * 3


def test_other_data_among_the_containers(tmp_path: Path) -> None:
    parts = Parts(fatbins=[images("elf90"), b"padding?" * 4, images("elf80")])
    data = gpu_library(tmp_path / "lib.so", parts).read_bytes()
    assert cover([read_images(data, "x")], 90) == Cover(native=1, nothing=1)


@pytest.mark.parametrize("cut", [100, 4000])
def test_a_damaged_object_is_told_and_raises_nothing(tmp_path: Path, cut: int) -> None:
    whole = gpu_library(tmp_path / "lib.so", PARTS).read_bytes()
    damaged = read_images(whole[:cut], "x")
    assert damaged.fault
    assert told({"a.so": damaged}, [rule("a.so")], 90) == [("warning", "coverage.unreadable", "a.so")]


def streamed(data: bytes, piece: int) -> GpuImages:
    passing = ImageStream(len(data), "x")
    for start in range(0, len(data), piece):
        passing.feed(memoryview(data)[start : start + piece])
    return passing.read(data)


MAGIC = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 160)


@pytest.mark.parametrize("piece", [1, 13, 64, 4096, 1 << 20])
@pytest.mark.parametrize(
    "parts",
    [
        PARTS, Parts(), Parts(before=b"12345678" + MAGIC[:8] + images("elf80") + b"tail"),  # of another version
        Parts(before=MAGIC + b"no image" * 100 + images("elf80")),
        Parts(fatbins=[*[container()] * 3, images("elf90"), images("elf80")[:-8]]),
    ],
    ids=["all", "none", "half a header", "no image", "a container that is cut"],
)  # fmt: skip
def test_an_object_that_streams_by(tmp_path: Path, parts: Parts, piece: int) -> None:
    data = gpu_library(tmp_path / "lib.so", parts).read_bytes()
    assert streamed(data, piece) == read_images(data, "x")


def test_what_streams_by_may_be_damaged(tmp_path: Path) -> None:
    whole = gpu_library(tmp_path / "lib.so", PARTS).read_bytes()
    assert streamed(whole[:4000], 64).fault == read_images(whole[:4000], "x").fault


def test_a_flood_of_containers_is_told() -> None:
    assert "more than" in (streamed(container() * ((1 << 18) + 1), 1 << 20).fault or "")


def test_an_object_without_gpu_code(tmp_path: Path) -> None:
    data = gpu_library(tmp_path / "lib.so", Parts()).read_bytes()
    assert read_images(data, "x") == GpuImages()


def test_a_loose_cubin() -> None:
    one = cubin_images(Cubin(sm=100, variant="a"), 500)
    assert [cover([one], sm).native for sm in (90, 100, 103)] == [0, 1, 0]


def test_facts_can_be_stored() -> None:
    one = held("elf90a ptx80", "")
    assert msgspec.json.decode(msgspec.json.encode(one), type=GpuImages) == GpuImages(
        shapes=[Shape(images=list(shape.images), count=1, sizes=list(shape.sizes)) for shape in one.shapes]
    )


# --- what becomes of containers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sm", "kind"),
    [
        ("elf90", 90, "native"), ("elf80", 86, "native"), ("elf86", 80, "nothing"), ("elf90a", 90, "native"),
        ("elf100a", 103, "nothing"), ("elf100f", 103, "native"), ("elf80", 87, "nothing"), ("ptx80", 90, "ptx"),
        ("ptx90a", 100, "nothing"), ("elf120 ptx80", 90, "ptx"), ("lto75", 90, "linked"), ("lto120", 90, "nothing"),
        ("", 90, "nothing"), ("elf101", 110, "native"),
    ],
)  # fmt: skip
def test_one_container(text: str, sm: int, kind: str) -> None:
    one = cover([held(text)], sm)
    assert (getattr(one, kind), one.total) == (1, 1)


def test_only_the_newest_ptx_is_compiled() -> None:
    assert cover([held("ptx70 ptx80 ptx100", "elf90 ptx80", "ptx90")], 90).compiled == 2_000_000


def test_the_table_joins_the_cubins_of_a_folder() -> None:
    code = {
        "a/lib.so": held("elf90"),
        "a/x.cubin": held("elf90"),
        "a/y.cubin": held("elf100"),
        "b/none.so": GpuImages(),
    }
    assert coverage_table(code, 90) == {"a/*.cubin": Cover(native=1, nothing=1), "a/lib.so": Cover(native=1)}


# --- rules ------------------------------------------------------------------------------------------------------------

ALL = held("elf90", "elf90 elf80")
PART = held("elf90", "elf80")


@pytest.mark.parametrize(
    ("code", "requires", "sm", "ids"),
    [
        (ALL, "every", 90, []), (PART, "every", 90, ["coverage.nothing"]), (PART, "some", 90, []),
        (PART, "some", 100, ["coverage.nothing"]), (PART, "none", 100, []),
        (GpuImages(), "some", 90, ["coverage.nothing"]),
        (GpuImages(), "every", 90, ["coverage.nothing"]), (held("elf80", "ptx80"), "every", 86, ["coverage.compiled"]),
        (held("elf80", "ptx80"), "some", 86, []), (held("elf70", "ptx80"), "some", 86, ["coverage.compiled"]),
        (held("elf70", "ptx80"), "every", 86, ["coverage.compiled", "coverage.nothing"]),
        (held("lto70"), "every", 86, []),
    ],
)  # fmt: skip
def test_what_a_rule_requires(code: GpuImages, requires: str, sm: int, ids: list[str]) -> None:
    assert [one.id for one in found({"a.so": code}, [rule("a.so", requires=requires)], sm)] == ids


def test_an_error_says_what_there_is() -> None:
    (one,) = found({"a.so": held("elf80 elf90a", "ptx120 lto70")}, [rule("a.so")], 75)
    assert one.evidence == "nothing for SM 75 in 1 of its 2 containers; it has 80, 90a, PTX 120, LTO 70 (a test)"
    assert (one.severity, one.subject) == ("error", f"{SITE}a.so")
    assert "for SM 75" in (one.fix or "")


def test_ptx_is_a_note_with_its_cost() -> None:
    (one,) = found({"a.so": held("ptx80", "elf90")}, [rule("a.so")], 90)
    assert one.severity == "note"
    assert one.evidence.startswith("for SM 90 it has only PTX in 1 of its 2 containers, 1.0 MB: the driver compiles")


ROUTES = [rule("k/sm90/ops.*", sm=(90,)), rule("k/sm100/ops.*", sm_not=(90,))]


@pytest.mark.parametrize(
    ("has", "sm", "expected"),
    [
        ("k/sm90/ops.so", 90, []), ("k/sm100/ops.so", 80, []),
        ("k/sm90/ops.so", 80, [("error", "coverage.absent", "k/sm100/ops.*")]),
        ("k/sm100/ops.so", 90, [("error", "coverage.absent", "k/sm90/ops.*")]),
    ],
)  # fmt: skip
def test_the_route_of_a_loader(has: str, sm: int, expected: list[tuple[str, str, str]]) -> None:
    """The other route's file may be there, or not; the target's own must."""
    assert told({has: held("elf80 elf90")}, ROUTES, sm) == expected


def test_a_file_of_another_route_needs_nothing() -> None:
    code = {"k/sm90/ops.so": held("elf90"), "k/sm100/ops.so": held("elf80")}
    assert told(code, ROUTES, 90) == []
    assert told(code, ROUTES, 100) == [("error", "coverage.nothing", "k/sm100/ops.so")]


def test_several_targets() -> None:
    assert [one[1] for one in told({"a.so": held("elf80"), "b.so": held("elf90")}, [rule("*.so")], 80, 90)] == [
        "coverage.nothing", "coverage.nothing",
    ]  # fmt: skip


CHAIN = rule("cubins/**/*.cubin", "cache/*.so", requires="some", otherwise="it is compiled with nvcc")


@pytest.mark.parametrize(
    ("code", "notes"),
    [
        ({"cubins/a/x.cubin": held("elf90"), "cubins/a/y.cubin": held("elf100")}, 0),
        ({"cubins/a/y.cubin": held("elf100"), "cache/a.so": held("elf90")}, 0),
        ({"cubins/a/y.cubin": held("elf100")}, 1), ({}, 1),
    ],
)  # fmt: skip
def test_providers_are_asked_in_turn(code: dict[str, GpuImages], notes: int) -> None:
    got = found(code, [CHAIN], 90)
    assert [(one.severity, one.id) for one in got] == [("note", "coverage.fallback")] * notes
    assert all("it is compiled with nvcc" in one.evidence for one in got)


def test_a_provider_with_ptx_only() -> None:
    code = {"cubins/a/y.cubin": held("elf100"), "cache/a.so": held("ptx80")}
    assert told(code, [CHAIN], 90) == [("note", "coverage.compiled", "cache/*.so")]


def test_a_stub_needs_no_code() -> None:
    code, rules = {"fft.so": GpuImages()}, [rule("fft.so", requires="some")]
    assert found(code, rules, 90, stubs=["fft.so"]) == []
    assert [one.id for one in found(code, rules, 90)] == ["coverage.nothing"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (held("elf90"), []), (held("elf80"), [("warning", "coverage.unlisted", "x/new.so")]), (GpuImages(), []),
        (held("ptx80"), [("note", "coverage.compiled", "x/new.so")]), (held("lto80"), []),
    ],
)  # fmt: skip
def test_a_library_that_no_rule_knows(code: GpuImages, expected: list[tuple[str, str, str]]) -> None:
    assert told({"x/new.so": code}, [], 90) == expected


def test_cubins_that_no_rule_knows_are_judged_by_the_folder() -> None:
    code = {"c/a.cubin": held("elf90"), "c/b.cubin": held("elf100"), "d/b.cubin": held("elf100")}
    assert told(code, [], 90) == [("warning", "coverage.unlisted", "d/*.cubin")]


def test_libraries_that_are_needed_and_whether_from_ptx() -> None:
    code = {
        "a.so": held("elf90 elf80"),
        "b.so": held("elf90"),
        "c.so": held("elf80 elf70 ptx80"),
        "d.so": held("elf90"),
    }
    rules = [rule("a.so"), rule("b.so"), rule("c.so"), rule("d.so", requires="none")]
    needed = needed_libraries({SITE + path: one for path, one in code.items()}, [90], rules, site=SITE)
    assert list(needed.items()) == [(f"{SITE}b.so", False), (f"{SITE}a.so", False), (f"{SITE}c.so", True)]


# --- rules that cannot be meant ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (rule(), "files"), (rule("a", sm=(90,), sm_not=(80,)), "sm-not"),
        (rule("a", requires="none", sm=(90,)), "requires"),
        (rule("a", requires="none", otherwise="x"), "requires"), (rule("a", otherwise=" "), "otherwise"),
        (rule("a", otherwise="two\nlines"), "otherwise"), (msgspec.structs.replace(rule("a"), reason=""), "reason"),
    ],
)  # fmt: skip
def test_contradictions(wrong: Coverage, key: str) -> None:
    assert [path for path, _ in coverage_faults([rule("a"), wrong])] == [f"coverage[1].{key}"]

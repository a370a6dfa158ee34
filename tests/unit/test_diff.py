"""Comparing two manifests: everything that they say is compared, and said of the right thing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from composer.formats.seekable import Frame
from composer.model.coverage import Coverage
from composer.model.diff import Comparison, Difference, compare
from composer.model.dlopen import DlopenRule
from composer.model.input import InputFacts
from composer.model.layer import Changes, Entry, FileChange, Layer, Part, PruneChange, RequiresChange
from composer.model.manifest import Check, Floor, Manifest
from composer.model.plan import BuiltFacts, LeftOut
from composer.model.runtime import RuntimeWork


def part(name: str, compressed: int) -> Part:
    return Part(digest=name * 64, frames=[Frame(compressed, 2 * compressed)])


CHANGES = Changes(
    requires=[RequiresChange(was="cupy==1", now=None, reason="unused")],
    pruned=[PruneChange(pattern="torch/test/**", reason="tests", files=3, size=30)],
    files=[FileChange(kind="rpath", path="lib/a.so", detail="$ORIGIN", reason="found there")],
)
TORCH = Layer(
    name="torch", version="2.9.1", parts=[part("a", 100), part("b", 10)], artifact="1" * 64, changes=CHANGES,
    entries=[Entry(path="lib/a.so", size=50, sha256="a"), Entry(path="lib/b", size=5, sha256="b"),
             Entry(path="lib/link", mode=0o777, target="b")],
)  # fmt: skip
NUMPY = Layer(name="numpy", version="2.4", parts=[part("c", 7)], entries=[Entry(path="lib/c", size=9, sha256="c")])
OLD = Manifest(
    name="stack-sm90", fingerprint="f", composer="0.1", recipe={"name": "stack", "version": "1"}, lock="pylock.toml",
    target={"sm": "90", "isa": "avx512"}, python="3.12", interpreter="CPython 3.12.1", torch="wheel", serve=None,
    built=[BuiltFacts(name="numa", version="2", key="k", source="s")],
    floors={"glibc": Floor(version="2.35", because="x")},
    coverage=[Coverage(files=("torch/*",), requires="every", reason="kernels")],
    dlopen=[DlopenRule(of="torch", files=("lib/*",), names=("libx.so",), reason="fast")],
    runtime=[RuntimeWork(what="kernels", of="triton", reason="each", needs=("a/b",))],
    checks=[Check(module="torch", needs_driver=True)], left_out=[LeftOut(name="cupy", version="1", reason="large")],
    warnings=["old"], layers=[TORCH, NUMPY],
)  # fmt: skip
#: Another value of each field, and what is said about it.
FIELDS: dict[str, tuple[Any, list[tuple[str, str, str | None, str | None]]]] = {
    "name": ("stack-sm120", [("name", "", "stack-sm90", "stack-sm120")]),
    "fingerprint": ("g", [("fingerprint", "", "f", "g")]),
    "composer": ("0.2", [("composer", "", "0.1", "0.2")]),
    "recipe": (
        {"name": "stack", "version": "2", "overlays": "lean"},
        [("recipe", "version", "1", "2"), ("recipe", "overlays", None, "lean")],
    ),
    "lock": ("b.toml", [("lock", "", "pylock.toml", "b.toml")]),
    "target": ({"sm": "120", "isa": "avx512"}, [("target", "sm", "90", "120")]),
    "python": ("3.13", [("python", "", "3.12", "3.13")]),
    "interpreter": ("host", [("interpreter", "", "CPython 3.12.1", "host")]),
    "torch": ("source", [("torch", "", "wheel", "source")]),
    "built": ([], [("built", "numa", "2 from s, build k", None)]),
    "slim": ("all", [("slim", "", "none", "all")]),
    "serve": ("bin/serve", [("serve", "", None, "bin/serve")]),
    "floors": (
        {"glibc": Floor(version="2.38", because="y")},
        [("floor", "glibc", "2.35 (because of x)", "2.38 (because of y)")],
    ),
    "properties": (["x86_64 :: level :: v3"], [("property", "x86_64 :: level :: v3", None, "")]),
    "as_of": ("2026-01-01", [("as_of", "", "", "2026-01-01")]),
    "host_libraries": ({"libcuda.so.1": "driver"}, [("host library", "libcuda.so.1", None, "driver")]),
    "coverage": (
        [],
        [("coverage", "torch/*", '{"files":["torch/*"],"requires":"every","reason":"kernels","sm":[],"sm-not":[],'
          '"machines":[],"otherwise":null}', None)],
    ),
    "dlopen": (
        [],
        [("dlopen", "libx.so of torch", '{"of":"torch","files":["lib/*"],"names":["libx.so"],"reason":"fast",'
          '"optional":false}', None)],
    ),
    "runtime": (
        [],
        [("runtime", "kernels", '{"what":"kernels","of":"triton","reason":"each","needs":["a/b"],"unless":[],'
          '"cache":null,"asked-by":null,"instead":null,"sm":[],"sm-not":[]}', None)],
    ),
    "inputs": (
        [InputFacts(name="graph", path="share/inputs/graph", variable="GRAPH", sha256="d1", files=1, size=9,
                    reason="r")],
        [("input", "graph", None, "sha256 d1, 1 files, 9 bytes")],
    ),
    "checks": (
        [Check(module="torch", needs_driver=False), Check(module="numpy", needs_driver=False)],
        [("check", "torch", "with a driver", "without a driver"), ("check", "numpy", None, "without a driver")],
    ),
    "left_out": ([], [("left out", "cupy", "1: large", None)]),
    "warnings": (["new"], [("warning", "old", "", None), ("warning", "new", None, "")]),
}  # fmt: skip


def against(**changed: Any) -> Comparison:
    return compare(OLD, msgspec.structs.replace(OLD, **changed))


def with_torch(**changed: Any) -> Comparison:
    return against(layers=[msgspec.structs.replace(TORCH, **changed), NUMPY])


def test_the_same() -> None:
    found = compare(OLD, msgspec.json.decode(msgspec.json.encode(OLD), type=Manifest))
    assert found.is_same
    assert (found.shared.layers, found.shared.of_layers) == (2, 2)
    assert (found.shared.bytes, found.shared.of_bytes) == (117, 117)


def test_every_field_is_compared() -> None:
    assert {*FIELDS, "schema", "layers"} == {field.name for field in msgspec.structs.fields(Manifest)}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field(field: str) -> None:
    value, said = FIELDS[field]
    found = against(**{field: value})
    assert not found.is_same
    assert [(one.kind, one.subject, one.old, one.new) for one in found.facts] == said
    assert not found.distributions
    assert not found.files


def test_distributions_added_and_removed() -> None:
    scipy = Layer(name="scipy", version="1", parts=[part("a", 100), part("d", 1)], entries=NUMPY.entries)
    found = against(layers=[TORCH, scipy])
    numpy, new = found.distributions
    assert (numpy.name, numpy.new, numpy.shared) == ("numpy", None, 0)
    assert (new.name, new.old, new.shared) == ("scipy", None, 100)
    assert new.new
    assert (new.new.version, new.new.compressed, new.new.size) == ("1", 101, 9)
    assert not found.files, "its file is the other's"
    assert (found.shared.layers, found.shared.bytes, found.shared.of_bytes) == (1, 210, 211)


def test_a_changed_version_and_its_files() -> None:
    entries = [
        Entry(path="lib/a.so", size=60, sha256="A"), Entry(path="lib/b", size=5, sha256="b", mode=0o755),
        Entry(path="lib/link", mode=0o777, target="a.so"), Entry(path="lib/new", size=1, sha256="n"),
    ]  # fmt: skip
    found = with_torch(version="2.9.2", parts=[part("e", 90), part("b", 10)], entries=entries)
    [torch] = found.distributions
    assert torch.old
    assert torch.new
    assert (torch.old.version, torch.new.version, torch.shared) == ("2.9.1", "2.9.2", 10)
    assert (torch.added, torch.removed, torch.changed) == (1, 0, 3)
    assert [(one.path, one.what, one.old, one.new, one.distribution) for one in found.files] == [
        ("lib/a.so", "content", 50, 60, "torch"), ("lib/b", "mode", 5, 5, "torch"), ("lib/link", "link", 0, 0, "torch"),
        ("lib/new", "added", None, 1, "torch"),
    ]  # fmt: skip
    [removed] = with_torch(entries=TORCH.entries[1:]).files
    assert (removed.path, removed.what, removed.old, removed.new) == ("lib/a.so", "removed", 50, None)


def test_the_same_files_compressed_otherwise() -> None:
    found = with_torch(parts=[part("e", 80)])
    assert not found.files
    assert [one.name for one in found.distributions] == ["torch"]
    assert found.shared.bytes == 7


def test_where_a_store_keeps_the_bytes_is_no_difference() -> None:
    assert with_torch(parts=[msgspec.structs.replace(one, blob="k" * 64) for one in TORCH.parts]).is_same


@pytest.mark.parametrize(
    ("changes", "kind", "subject", "old", "new"),
    [
        ({"requires": []}, "requires", "cupy==1", "dropped (unused)", None),
        ({"requires": [RequiresChange(was="cupy==1", now="cupy", reason="r")]}, "requires", "cupy==1",
         "dropped (unused)", "cupy (r)"),
        ({"pruned": []}, "pruned", "torch/test/**", "3 files, 30 bytes (tests)", None),
        ({"files": [*CHANGES.files, FileChange(kind="patch", path="lib/b", detail="0001", reason="r")]}, "patch",
         "lib/b", None, "0001 (r)"),
        ({"untouched": "licence"}, "untouched", "", None, "licence"),
    ],
)  # fmt: skip
def test_an_edit(changes: dict[str, Any], kind: str, subject: str, old: str | None, new: str | None) -> None:
    [torch] = with_torch(changes=msgspec.structs.replace(CHANGES, **changes)).distributions
    assert torch.edits == [Difference(kind=kind, subject=subject, old=old, new=new)]


def test_edits_of_the_same_subject_are_all_told() -> None:
    twice = [*CHANGES.files, FileChange(kind="rpath", path="lib/a.so", detail="/x", reason="y")]
    [torch] = with_torch(changes=msgspec.structs.replace(CHANGES, files=twice)).distributions
    assert torch.edits[0].new == "$ORIGIN (found there); /x (y)"

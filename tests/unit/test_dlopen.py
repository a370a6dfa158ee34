"""Libraries that are opened by name: what notes and recipes say, and what the proof of closure makes of it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from composer.formats.dlopen import Dlopen, dlopen_notes
from composer.formats.elf import Elf, read_elf
from composer.formats.loader import Loader, Tree
from composer.model.dlopen import DlopenRule, dlopen_faults
from composer.model.finding import Finding
from composer.proofs.closure import check_closure, dlopened
from tests.shared_objects import library


def elf(
    *needed: str, rpath: str = "$ORIGIN", runpath: str = "", soname: str | None = None,
    opens: tuple[Dlopen, ...] = (), defines: str = "", wants: dict[str, set[str]] | None = None,
) -> Elf:  # fmt: skip
    return Elf(
        machine="x86_64", bits=64, kind="shared", soname=soname, needed=needed, rpath=(rpath,) if rpath else (),
        runpath=(runpath,) if runpath else (), opens=opens, dynamic=True, size=1,
        versions_defined=frozenset(defines.split()),
        versions_needed={name: frozenset(each) for name, each in (wants or {}).items()},
    )  # fmt: skip


def opens(*names: str, required: bool = True) -> tuple[Dlopen, ...]:
    return (Dlopen(names=names, required=required, why="tests"),)


def findings(tree: Tree, **options: object) -> list[Finding]:
    return list(check_closure(tree, **options))  # type: ignore[arg-type]


def note(text: bytes, owner: bytes = b"FDO\0", kind: int = 0x407C0C0A, order: str = "<") -> bytes:
    padded = owner + bytes(-len(owner) % 4)
    return struct.pack(order + "3I", len(owner), len(text), kind) + padded + text + bytes(-len(text) % 4)


def entry(**fields: object) -> bytes:
    return json.dumps([fields]).encode()


# --- notes ---


def test_what_a_note_says() -> None:
    text = entry(soname=["liba.so.2", "liba.so.1"], feature="a", description="Support for a", priority="required")
    (found,) = dlopen_notes(note(b"x", owner=b"GNU\0", kind=1) + note(text + b"\0"), "<", 4)
    assert found == Dlopen(names=("liba.so.2", "liba.so.1"), required=True, why="Support for a")


@pytest.mark.parametrize("fields", [{}, {"priority": "recommended"}, {"priority": "suggested"}])
def test_only_what_is_required_is(fields: dict[str, str]) -> None:
    (found,) = dlopen_notes(note(entry(soname=["a"], feature="zip", **fields), order=">"), ">", 4)
    assert (found.required, found.why) == (False, "zip")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"[{}]", b'[{"soname": "a"}]', b'[{"soname": []}]', b'[{"soname": [1]}]', b"\xff", b"[" * 5000],
)
def test_a_note_that_cannot_be_understood_says_nothing(text: bytes) -> None:
    assert dlopen_notes(note(text), "<", 4) == ()


def test_a_note_that_is_cut_off_says_nothing() -> None:
    whole = note(entry(soname=["a"]))
    assert len(dlopen_notes(whole, "<", 4)) == 1
    assert [dlopen_notes(whole[:length], "<", 4) for length in range(len(whole) - 3)] == [()] * (len(whole) - 3)


def test_the_note_of_a_real_object(tmp_path: Path) -> None:
    text = r"[{\"soname\":[\"libzip.so.5\"],\"feature\":\"zip\",\"priority\":\"required\"}]"
    lines = [
        '.section .note.dlopen, "a", %note', ".balign 4", ".long 4, 1f - 0f, 0x407c0c0a", '.asciz "FDO"',
        f'0: .asciz "{text}"', "1: .balign 4", ".text",
    ]  # fmt: skip
    source = "__asm__(" + "".join(json.dumps(f"{line}\n") for line in lines) + "); int one(void) { return 1; }"
    data = library(tmp_path / "libz.so", source).read_bytes()
    assert read_elf(data, "x").opens == (Dlopen(names=("libzip.so.5",), required=True, why="zip"),)


# --- recipes ---


RULE = DlopenRule(of="dist", files=("pkg/*.so",), names=("libx.so", "liby.so"), reason="tests", optional=True)


def test_a_rule_is_about_the_objects_that_it_names() -> None:
    site = "lib/python3.12/site-packages"
    found = dlopened([RULE], [f"{site}/pkg/a.so", f"{site}/pkg/sub/b.so", "bin/python3.12"])
    expected = [Dlopen(names=(name,), required=False, why="tests") for name in RULE.names]
    assert found == {f"{site}/pkg/a.so": tuple(expected)}


def test_rules_that_cannot_be_meant() -> None:
    rules = [RULE, DlopenRule(of="Dist_1", files=(), names=("a/b.so", ""), reason=" "),
             DlopenRule(of="d", files=("f",), names=(), reason="why")]  # fmt: skip
    assert [key for key, _ in dlopen_faults(rules)] == [
        "dlopen[1].of", "dlopen[1].files", "dlopen[1].names", "dlopen[1].names", "dlopen[1].reason", "dlopen[2].names",
    ]  # fmt: skip


# --- closure ---


def test_what_is_required_and_missing_is_an_error() -> None:
    tree = Tree(objects={"a/top.so": elf(opens=opens("libx.so")), "b/libx.so": elf()})
    (found,) = findings(tree)
    assert (found.severity, found.id, found.subject) == ("error", "closure.missing", "a/top.so")
    assert found.evidence == "libx.so, which it opens for tests, is not found, though it is in b"


def test_what_is_optional_and_missing_is_a_note() -> None:
    (found,) = findings(Tree(objects={"top.so": elf(opens=opens("libx.so", "liby.so", required=False))}))
    assert (found.severity, found.id) == ("note", "closure.optional")
    assert found.evidence == "libx.so or liby.so, which it opens for tests, is not found"


def test_what_is_needed_is_not_optional() -> None:
    (found,) = findings(Tree(objects={"top.so": elf("libx.so", opens=opens("libx.so", required=False))}))
    assert (found.severity, found.id) == ("error", "closure.missing")


def test_any_of_several_names_will_do_and_the_host_has_its_own() -> None:
    tree = Tree(objects={"top.so": elf(opens=opens("libx.so", "liby.so") + opens("libcuda.so.1")), "liby.so": elf()})
    assert findings(tree) == []


def test_what_is_opened_has_needs_of_its_own() -> None:
    tree = Tree(objects={"top.so": elf(opens=opens("libx.so")), "libx.so": elf("libz.so", rpath="")})
    assert {(one.id, one.subject) for one in findings(tree)} == {("closure.missing", "libx.so")}
    tree = Tree(objects={**tree.objects, "libz.so": elf()})
    lookups = Loader(tree).load("top.so")
    assert [(one.subject, one.needed, one.provider) for one in lookups] == [
        ("top.so", "libx.so", "libx.so"), ("libx.so", "libz.so", "libz.so"),
    ]  # fmt: skip


def test_it_is_opened_when_all_else_is_loaded() -> None:
    objects = {"top.so": elf("liba.so", "libb.so"), "liba.so": elf(rpath="", opens=opens("libx.so")),
               "libb.so": elf("libx.so", rpath="$ORIGIN/sub"), "sub/libx.so": elf()}  # fmt: skip
    lookups = Loader(Tree(objects=objects)).load("top.so")
    assert [(one.subject, one.how) for one in lookups if one.needed == "libx.so"] == [
        ("libb.so", "rpath"), ("liba.so", "loaded"),
    ]  # fmt: skip


def test_a_recipe_says_it_too() -> None:
    tree = Tree(objects={"top.so": elf(), "other.so": elf()})
    found = findings(tree, opened={"top.so": opens("libx.so")})
    assert [(one.id, one.subject) for one in found] == [("closure.missing", "top.so")]


# --- two providers of one name ---


def test_the_one_that_is_found_wins() -> None:
    tree = Tree(objects={"top.so": elf("libx.so", rpath="$ORIGIN/b"), "b/libx.so": elf(soname="libx.so"),
                         "c/libx-1.so": elf(soname="libx.so")})  # fmt: skip
    (found,) = findings(tree)
    assert (found.severity, found.id, found.subject) == ("note", "closure.ambiguous", "b/libx.so")
    assert found.evidence == (
        "libx.so is b/libx.so for 1 object, by RPATH $ORIGIN/b of top.so; "
        "c/libx-1.so goes by this name, too, and is loaded by nothing"
    )


def test_two_that_are_each_found_by_somebody() -> None:
    users = {
        name: elf("libx.so", rpath=f"$ORIGIN/{folder}") for name, folder in zip(("1", "2", "3"), "bcc", strict=True)
    }
    tree = Tree(objects={**users, "b/libx.so": elf(), "c/libx.so": elf()})
    (found,) = findings(tree)
    assert found.evidence == (
        "libx.so is c/libx.so for 2 objects, by RPATH $ORIGIN/c of 2; "
        "b/libx.so goes by this name, too, and is it for 1 object"
    )


def test_a_warning_where_the_other_lacks_a_version_that_is_wanted() -> None:
    new, old = elf(soname="libx.so", defines="V1 V2"), elf(soname="libx.so", defines="V1")
    objects = {"top.so": elf("libx.so", rpath="$ORIGIN/b", wants={"libx.so": {"V2"}}), "b/libx.so": new}
    objects |= {"own.so": elf("libx-1.so", rpath="$ORIGIN/c"), "c/libx-1.so": old}
    (found,) = findings(Tree(objects=objects))
    assert (found.severity, found.subject) == ("warning", "b/libx.so")
    assert found.evidence.endswith("answers where it is loaded first; and does not define V2, which is wanted")


def test_nobody_asks_and_nobody_is_told() -> None:
    assert findings(Tree(objects={"a/libx.so": elf(soname="libx.so"), "b/libx.so": elf(soname="libx.so")})) == []


@pytest.mark.parametrize(("defines", "severity"), [("V1", "note"), ("V0", "warning")])
def test_the_hosts_own_comes_before_the_bundles(defines: str, severity: str) -> None:
    objects = {"top.so": elf("libz.so.1", wants={"libz.so.1": {"V1"}}), "fallback/libz.so.1": elf(defines=defines)}
    (found,) = findings(Tree(objects=objects), preloaded=["libz.so.1"])
    assert (found.severity, found.id, found.subject) == (severity, "closure.ambiguous", "fallback/libz.so.1")
    assert ("V1" in found.evidence) == (severity == "warning")

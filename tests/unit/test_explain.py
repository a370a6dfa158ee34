"""Who needs a library, who provides it, and by which rule."""

from __future__ import annotations

from composer.formats.dlopen import Dlopen
from composer.formats.loader import Tree
from composer.proofs.explain import Explanation, Provider, explain
from tests.unit.test_dlopen import elf

PROGRAM = "bin/python3.12"


def rows(found: Explanation) -> list[tuple[str, str, str | None, str | None]]:
    return [(one.subject, one.rule, one.owner, one.entry) for one in found.needs]


def test_by_its_own_rpath_and_by_that_of_what_loads_it() -> None:
    objects = {"top.so": elf("liba.so", rpath="$ORIGIN/x"), "x/liba.so": elf("libb.so", rpath=""), "x/libb.so": elf()}
    found = explain(Tree(objects=objects), "libb.so")
    assert rows(found) == [("x/liba.so", "absent", None, None), ("x/liba.so", "rpath", "top.so", "$ORIGIN/x")]
    assert found.needs[1].chain == ("top.so",)
    assert found.providers == (Provider(path="x/libb.so", names=("libb.so",), serves=1),)
    assert rows(explain(Tree(objects=objects), "liba.so")) == [("top.so", "rpath", "top.so", "$ORIGIN/x")]


def test_by_the_rpath_of_the_program() -> None:
    objects = {PROGRAM: elf(rpath="$ORIGIN/../lib"), "lib/libn.so": elf(), "sp/a.so": elf("libn.so", rpath="")}
    found = explain(Tree(objects=objects), "libn.so", program=PROGRAM)
    assert rows(found) == [("sp/a.so", "rpath", PROGRAM, "$ORIGIN/../lib")]


def test_by_runpath() -> None:
    objects = {"top.so": elf("liba.so", rpath="", runpath="$ORIGIN/x"), "x/liba.so": elf()}
    assert rows(explain(Tree(objects=objects), "liba.so")) == [("top.so", "runpath", "top.so", "$ORIGIN/x")]


def test_loaded_by_then() -> None:
    objects = {"top.so": elf("liba-1.so", "libb.so"), "liba-1.so": elf(soname="liba.so"), "libb.so": elf("liba.so")}
    found = explain(Tree(objects=objects), "liba.so")
    assert rows(found) == [("libb.so", "absent", None, None), ("libb.so", "loaded", "top.so", None)]
    assert found.providers == (Provider(path="liba-1.so", names=("liba-1.so", "liba.so"), serves=1),)


def test_loaded_with_the_program() -> None:
    objects = {PROGRAM: elf("libz.so", rpath="$ORIGIN/../lib"), "lib/libz.so": elf(soname="libz.so"),
               "a.so": elf("libz.so", rpath="", runpath="$ORIGIN")}  # fmt: skip
    found = explain(Tree(objects=objects), "libz.so", program=PROGRAM)
    assert ("a.so", "loaded", PROGRAM, None) in rows(found)


def test_left_to_the_host() -> None:
    tree = Tree(objects={"top.so": elf("libcuda.so.1", "libc.so.6", "libibverbs.so.1", "libz.so.1")})
    found = {name: explain(tree, name, preloaded=["libz.so.1"]) for name in tree.objects["top.so"].needed}
    assert [(one.host, one.needs[0].rule) for one in found.values()] == [
        ("driver", "host"), ("glibc", "host"), ("plugin", "host"), (None, "preloaded"),
    ]  # fmt: skip
    assert found["libz.so.1"].preloaded


def test_opened_at_run_time() -> None:
    opened = {"top.so": [Dlopen(names=("liba.so",), required=True, why="tests")]}
    found = explain(Tree(objects={"top.so": elf(), "liba.so": elf()}), "liba.so", opened=opened)
    assert [(one.subject, one.rule, one.opened) for one in found.needs] == [("top.so", "rpath", "tests")]


def test_ways_are_counted_and_the_shortest_is_told() -> None:
    objects = {"liba.so": elf("libb.so"), "libb.so": elf(), "one.so": elf("liba.so"), "two.so": elf("one.so")}
    (found,) = explain(Tree(objects=objects), "libb.so").needs
    assert (found.subject, found.chain, found.ways) == ("liba.so", (), 3)


def test_a_name_that_nobody_knows() -> None:
    found = explain(Tree(objects={"libnvrtc.so.12": elf(soname="libnvrtc.so.12"), "a.so": elf()}), "libnvrtc.so")
    assert (found.known, found.similar) == (False, ("libnvrtc.so.12",))

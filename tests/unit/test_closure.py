from __future__ import annotations

from collections.abc import Sequence

import pytest

from composer.formats.dlopen import Dlopen
from composer.formats.elf import Elf
from composer.formats.loader import Loader, Tree, lexical
from composer.model.finding import Finding
from composer.proofs.closure import Floor, check_bundle, check_closure, floors, host_libraries


def elf(
    *needed: str, rpath: str | None = None, runpath: str | None = None, soname: str | None = None,
    machine: str = "x86_64", kind: str = "shared", defines: Sequence[str] = (),
    wants: dict[str, set[str]] | None = None,
) -> Elf:  # fmt: skip
    return Elf(
        machine=machine, bits=64, kind=kind, soname=soname, needed=needed, dynamic=True, size=1,  # type: ignore[arg-type]
        rpath=tuple(rpath.split(":")) if rpath is not None else (),
        runpath=tuple(runpath.split(":")) if runpath is not None else (),
        versions_defined=frozenset(defines),
        versions_needed={name: frozenset(each) for name, each in (wants or {}).items()},
    )  # fmt: skip


def answers(tree: Tree, root: str, **options: str) -> dict[tuple[str, str], str | None]:
    lookups = Loader(tree, **options).load(root)  # type: ignore[arg-type]
    return {(each.subject, each.needed): each.provider for each in lookups}


def problems(tree: Tree, **options: object) -> list[tuple[str, str, str]]:
    return [(each.severity, each.id, each.subject) for each in check_closure(tree, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("entry", "folder"),
    [
        ("$ORIGIN", "a/b"), ("${ORIGIN}", "a/b"), ("$ORIGIN/", "a/b"), ("$ORIGIN/../c", "a/c"), ("$ORIGIN/../..", ""),
        ("$ORIGIN/./x//y", "a/b/x/y"), ("$ORIGIN/../../..", None), ("/usr/lib", None), ("lib", None), ("", None),
        ("$ORIGINAL", None), ("$ORIGIN/$LIB", None), ("$LIB", None), ("${ORIGIN}x", None), ("x/$ORIGIN", None),
    ],
)  # fmt: skip
def test_entries(entry: str, folder: str | None) -> None:
    assert lexical(entry, "a/b") == folder


def test_walk_as_the_kernel_does() -> None:
    tree = Tree(
        objects={"a/b/x.so": elf()},
        symlinks={
            "s": "a/b",
            "a/up": "..",
            "loop": "loop",
            "out": "../a",
            "abs": "/a",
            "a/y.so": "b/./x.so",
            "dead": "no",
        },
        files={"a/file"},
    )
    assert tree.walk("s/x.so") == "a/b/x.so"
    assert tree.walk("s/../file") == "a/file"
    assert tree.walk("a/up/a/y.so") == "a/b/x.so"
    assert tree.walk("") == ""
    for lost in ("loop", "out/b", "abs/b", "no/../a/file", "a/file/..", "a/file/x", "dead", "..", "a/../../a/file"):
        assert tree.walk(lost) is None, lost


def test_rpath_of_the_chain_is_inherited() -> None:
    tree = Tree(objects={"top.so": elf("a.so", rpath="$ORIGIN/x:$ORIGIN/y"), "x/a.so": elf("b.so"), "y/b.so": elf()})
    assert answers(tree, "top.so")["x/a.so", "b.so"] == "y/b.so"
    assert answers(tree, "x/a.so")["x/a.so", "b.so"] is None


def test_runpath_is_neither_inherited_nor_completed_by_the_chain() -> None:
    tree = Tree(objects={"top.so": elf("a.so", runpath="$ORIGIN/x:$ORIGIN/y"), "x/a.so": elf("b.so"), "y/b.so": elf()})
    assert answers(tree, "top.so") == {("top.so", "a.so"): "x/a.so", ("x/a.so", "b.so"): None}
    tree = Tree(
        objects={
            "top.so": elf("a.so", rpath="$ORIGIN/x:$ORIGIN/y"),
            "x/a.so": elf("b.so", runpath="$ORIGIN"),
            "y/b.so": elf(),
        }
    )
    assert answers(tree, "top.so")["x/a.so", "b.so"] is None


def test_an_object_with_both_has_no_rpath() -> None:
    tree = Tree(objects={"top.so": elf("a.so", rpath="$ORIGIN/x", runpath=""), "x/a.so": elf()})
    assert answers(tree, "top.so") == {("top.so", "a.so"): None}


def test_a_soname_in_the_process_answers() -> None:
    objects = {"top.so": elf("liba.hash.so", "b.so", rpath="$ORIGIN"), "liba.hash.so": elf(soname="liba.so")}
    tree = Tree(objects={**objects, "b.so": elf("liba.so", runpath="$ORIGIN/none")})
    assert answers(tree, "top.so")["b.so", "liba.so"] == "liba.hash.so"
    assert answers(tree, "b.so")["b.so", "liba.so"] is None


def test_the_origin_of_a_symlinked_file_is_where_the_link_is() -> None:
    tree = Tree(
        objects={
            "top.so": elf("a.so", rpath="$ORIGIN/links"),
            "real/a.so": elf("b.so", rpath="$ORIGIN"),
            "links/b.so": elf(),
        },
        symlinks={"links/a.so": "../real/a.so"},
    )
    assert answers(tree, "top.so")["real/a.so", "b.so"] == "links/b.so"


def test_another_machine_is_passed_over_and_a_text_file_is_an_error() -> None:
    top = elf("a.so", rpath="$ORIGIN/x:$ORIGIN/y")
    tree = Tree(objects={"top.so": top, "x/a.so": elf(machine="aarch64"), "y/a.so": elf()})
    assert answers(tree, "top.so") == {("top.so", "a.so"): "y/a.so"}
    tree = Tree(objects={"top.so": top, "y/a.so": elf()}, files={"x/a.so"})
    assert problems(tree) == [("error", "closure.unusable", "top.so")]


def test_a_name_with_a_slash() -> None:
    tree = Tree(objects={"top.so": elf("$ORIGIN/x/a.so", "x/a.so", "/x/a.so"), "x/a.so": elf()})
    assert answers(tree, "top.so") == {
        ("top.so", "$ORIGIN/x/a.so"): "x/a.so", ("top.so", "x/a.so"): None, ("top.so", "/x/a.so"): None,
    }  # fmt: skip


def test_the_program_gives_its_rpath_and_what_it_has_loaded() -> None:
    objects = {
        "bin/python": elf("libz.so.1", rpath="$ORIGIN/../lib", kind="executable"),
        "bin/other": elf("libz.so.1", kind="executable"),
        "lib/libz.so.1": elf(soname="libz.so.1"),
        "lib/libn.so": elf(),
        "sp/a.so": elf("libn.so"),
        "sp/b.so": elf("libz.so.1", runpath="$ORIGIN"),
        "sp/c.so": elf("libn.so", runpath="$ORIGIN"),
    }
    tree = Tree(objects=objects)
    assert answers(tree, "sp/a.so", program="bin/python") == {("sp/a.so", "libn.so"): "lib/libn.so"}
    assert answers(tree, "sp/b.so", program="bin/python") == {("sp/b.so", "libz.so.1"): "lib/libz.so.1"}
    assert problems(tree, program="bin/python") == [
        ("error", "closure.missing", "bin/other"), ("error", "closure.missing", "sp/c.so"),
    ]  # fmt: skip
    assert len(problems(tree)) == 4


def test_a_bundle_without_a_program_lends_no_object_its_rpath() -> None:
    objects = {"lib/libx.so": elf(soname="libx.so"), "a/y.so": elf("libx.so", "libz.so.1")}
    program = elf(rpath="$ORIGIN/../lib", kind="executable")
    assert check_bundle(Tree(objects={**objects, "bin/python3.12": program}), "3.12") == ()
    (missing,) = check_bundle(Tree(objects=objects, files={"bin/python3.12"}), "3.12")
    assert (missing.id, missing.subject) == ("closure.missing", "a/y.so")
    assert "libx.so is not found" in missing.evidence


def test_preloaded_is_only_what_is_stated() -> None:
    tree = Tree(objects={"a.so": elf("libtorch.so")})
    assert problems(tree) == [("error", "closure.missing", "a.so")]
    assert problems(tree, preloaded={"libtorch.so"}) == []


def test_the_host_has_glibc_and_the_driver() -> None:
    tree = Tree(
        objects={"a.so": elf("libc.so.6", "ld-linux-x86-64.so.2", "libcuda.so.1", "libstdc++.so.6", "libcrypt.so.1")}
    )
    assert [each.evidence for each in check_closure(tree)] == [
        "libcrypt.so.1 is not found",
        "libstdc++.so.6 is not found",
    ]
    assert check_closure(tree, host={"lib*", "ld-*"}) == ()


def test_what_is_taken_from_the_host_is_listed() -> None:
    tree = Tree(objects={
        "a.so": elf("libc.so.6", "libcuda.so.1", "libown.so"), "own.so": elf(soname="libown.so"),
        "p.so": elf("libucp.so.0", "libibverbs.so.1"),
    }, symlinks={}, files=frozenset())  # fmt: skip
    opened = {"a.so": (Dlopen(names=("libnvidia-ml.so.1", "libown.so"), required=False, why="x"),)}
    assert list(host_libraries(tree, opened).items()) == [
        ("libcuda.so.1", "driver"), ("libnvidia-ml.so.1", "driver"), ("libibverbs.so.1", "plugin"),
        ("libucp.so.0", "plugin"),
    ]  # fmt: skip


def test_a_plugin_may_miss_its_fabric() -> None:
    assert (
        problems(Tree(objects={"a.so": elf("libmlx5.so.1", "libmpi.so.40")}))
        == [("note", "closure.plugin", "a.so")] * 2
    )


def test_a_library_that_only_its_loaders_complete() -> None:
    tree = Tree(objects={"top.so": elf("a.so", rpath="$ORIGIN/x:$ORIGIN/y"), "x/a.so": elf("b.so"), "y/b.so": elf()})
    assert problems(tree) == [("note", "closure.loaded-alone", "x/a.so")]


def test_one_of_two_loaders_does_not_complete_it() -> None:
    tree = Tree(
        objects={
            "good.so": elf("a.so", rpath="$ORIGIN/x:$ORIGIN/y"),
            "bad.so": elf("a.so", rpath="$ORIGIN/x"),
            "x/a.so": elf("b.so"),
            "y/b.so": elf(),
        }
    )
    (finding,) = check_closure(tree)
    assert finding == Finding(
        id="closure.missing", severity="error", subject="x/a.so",
        evidence="b.so is not found, when loaded by bad.so, though it is in y",
        fix="Add an RPATH rule for it (y), or let the program need b.so where it must not change.",
    )  # fmt: skip


def test_runpath_is_told_of_twice() -> None:
    """It keeps the chain from helping, and LD_LIBRARY_PATH comes before it."""
    tree = Tree(objects={"a.so": elf("b.so", runpath="$ORIGIN/x"), "y/b.so": elf()})
    (finding,) = check_closure(tree)
    assert "a DT_RUNPATH keeps" in finding.evidence
    tree = Tree(objects={"a.so": elf("b.so", runpath="$ORIGIN"), "b.so": elf()})
    assert problems(tree) == [("note", "closure.runpath", "a.so")]


def test_a_search_outside_the_bundle() -> None:
    tree = Tree(
        objects={"a.so": elf(rpath="$ORIGIN:/usr/local/cuda/lib64:"), "b.so": elf(rpath=""), "c.so": elf(runpath="x")}
    )
    findings = check_closure(tree)
    assert [(each.severity, each.id, each.subject) for each in findings] == [
        ("warning", "closure.outside", "a.so"), ("warning", "closure.outside", "c.so"),
    ]  # fmt: skip
    assert "'/usr/local/cuda/lib64', the current folder (an empty entry)" in findings[0].evidence


def test_a_version_that_the_provider_lacks() -> None:
    wants = {"b.so": {"B_1", "B_2"}}
    objects = {"a.so": elf("b.so", rpath="$ORIGIN", wants=wants), "b.so": elf(defines=["B_1"])}
    (finding,) = check_closure(Tree(objects=objects))
    assert (finding.id, finding.evidence) == ("closure.version", "b.so does not define B_2")
    assert check_closure(Tree(objects={**objects, "b.so": elf()})) == ()


def test_floors_are_compared_as_numbers() -> None:
    elfs = {
        "a.so": elf(
            wants={"libc.so.6": {"GLIBC_2.9", "GLIBC_2.28"}, "libstdc++.so.6": {"GLIBCXX_3.4.9", "CXXABI_1.3.9"}}
        ),
        "b.so": elf(
            wants={"libm.so.6": {"GLIBC_2.28", "GLIBC_PRIVATE"}, "libstdc++.so.6": {"GLIBCXX_3.4.22", "CXXABI_TM_1"}}
        ),
        "c.so": elf(wants={"libx.so": {"X_9.9"}}),
    }
    found = floors(elfs)
    assert found.glibc == Floor(version=(2, 28), setters=("a.so", "b.so"))
    assert (str(found.glibcxx), str(found.cxxabi)) == ("3.4.22", "1.3.9")
    assert floors({"d.so": elf(wants={"libc.so.6": {"GLIBC_ABI_DT_RELR", "GLIBC_2.35"}})}).glibc == Floor(
        version=(2, 36), setters=("d.so",)
    )
    assert floors({}).glibcxx is None

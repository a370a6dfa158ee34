from __future__ import annotations

import pytest

from composer.errors import RecipeError
from composer.formats.loader import Tree
from composer.proofs.closure import check_closure
from composer.steps.rpath import RpathEdit, edited_tree, is_proprietary, plan_rpaths
from tests.unit.test_closure import elf

SP = "lib/python3.12/site-packages"


def plan(tree: Tree, **options: object) -> dict[str, tuple[str, ...]]:
    return {edit.path: edit.rpath for edit in plan_rpaths(tree, **options)}  # type: ignore[arg-type]


def test_what_resolves_is_left_alone() -> None:
    tree = Tree(
        objects={
            "a.so": elf("b.so", "libc.so.6", "nowhere.so", runpath="$ORIGIN"),
            "b.so": elf(),
            "c.so": elf("libc.so.6"),
        }
    )
    assert plan(tree) == {}


def test_the_smallest_set_in_order_of_preference() -> None:
    objects = {
        f"{SP}/k/ops.so": elf("libcudart.so.12", "libnvrtc.so.12", "libtorch.so", "libc10.so", "libnuma.so.1"),
        f"{SP}/nvidia/cuda_runtime/lib/libcudart.so.12": elf(),
        f"{SP}/nvidia/cuda_nvrtc/lib/libnvrtc.so.12": elf(),
        f"{SP}/torch/lib/libtorch.so": elf(),
        f"{SP}/torch/lib/libc10.so": elf(),
        f"{SP}/torch/lib/libcudart.so.12": elf(),
        "lib/libnuma.so.1": elf(),
        f"{SP}/torchvision.libs/libcudart.e8e8b82a.so.12": elf(soname="libcudart.so.12"),
    }
    (edit,) = plan_rpaths(Tree(objects=objects))
    nvidia = ("$ORIGIN/../nvidia/cuda_nvrtc/lib", "$ORIGIN/../nvidia/cuda_runtime/lib")
    assert edit.rpath == edit.added == (*nvidia, "$ORIGIN/../torch/lib", "$ORIGIN/../../..")
    assert edit.why[1] == f"$ORIGIN/../nvidia/cuda_runtime/lib: libcudart.so.12 (also in {SP}/torch/lib)"


def test_the_own_folder_wins_and_one_folder_serves_many() -> None:
    objects = {"a/top.so": elf("x.so"), "a/x.so": elf(), "lib/x.so": elf()}
    assert plan(Tree(objects=objects)) == {"a/top.so": ("$ORIGIN",)}
    objects = {"top.so": elf("x.so", "y.so"), "b/x.so": elf(), "c/x.so": elf(), "c/y.so": elf()}
    assert plan(Tree(objects=objects)) == {"top.so": ("$ORIGIN/c",)}


def test_upstream_entries_stay_first_and_those_outside_go() -> None:
    rpath = "/__w/_temp/lib:$ORIGIN/none:$ORIGIN/../..:$ORIGIN/c:"
    tree = Tree(objects={"a/top.so": elf("x.so", "y.so", rpath=rpath), "a/c/x.so": elf(), "lib/y.so": elf()})
    (edit,) = plan_rpaths(tree)
    dropped = ("/__w/_temp/lib", "$ORIGIN/../..", "")
    assert edit == RpathEdit(
        path="a/top.so", rpath=("$ORIGIN/none", "$ORIGIN/c", "$ORIGIN/../lib"),
        added=("$ORIGIN/../lib",), dropped=dropped,
        why=("$ORIGIN/../lib: y.so", *(f"{each}: outside the bundle" for each in dropped)),
    )  # fmt: skip
    assert plan(Tree(objects={"a.so": elf(runpath="/usr/lib")})) == {"a.so": ()}
    assert plan(Tree(objects={"a.so": elf(rpath="")})) == {}


def test_untouched_libraries_are_completed_by_what_loads_them() -> None:
    objects = {
        f"{SP}/k/ops.so": elf("libx.so"),
        f"{SP}/nvidia/x/lib/libx.so": elf("liby.so"),
        f"{SP}/nvidia/y/lib/liby.so": elf("libz.so"),
        "lib/libz.so": elf(),
    }
    tree = Tree(objects=objects)
    edits = plan_rpaths(tree)
    assert [edit.path for edit in edits] == [f"{SP}/k/ops.so"]
    assert edits[0].added == ("$ORIGIN/../nvidia/x/lib", "$ORIGIN/../nvidia/y/lib", "$ORIGIN/../../..")
    assert edits[0].why[1] == f"$ORIGIN/../nvidia/y/lib: liby.so for {SP}/nvidia/x/lib/libx.so"
    assert {each.id for each in check_closure(edited_tree(tree, edits))} == {"closure.loaded-alone"}


def test_a_runpath_below_cannot_be_completed() -> None:
    objects = {
        f"{SP}/k/ops.so": elf("libx.so"),
        f"{SP}/nvidia/x/lib/libx.so": elf("liby.so", runpath="$ORIGIN"),
        f"{SP}/nvidia/y/lib/liby.so": elf(),
    }
    tree = Tree(objects=objects)
    edits = plan_rpaths(tree)
    assert edits[0].added == ("$ORIGIN/../nvidia/x/lib",)
    (finding,) = check_closure(edited_tree(tree, edits))
    assert (finding.id, finding.subject) == ("closure.missing", f"{SP}/nvidia/x/lib/libx.so")
    assert "DT_RUNPATH" in finding.evidence


def test_touchable_libraries_are_completed_by_themselves() -> None:
    objects = {"top.so": elf("x.so"), "a/x.so": elf("y.so"), "b/y.so": elf()}
    assert plan(Tree(objects=objects)) == {"top.so": ("$ORIGIN/a",), "a/x.so": ("$ORIGIN/../b",)}


def test_the_program_spares_edits_but_not_to_other_programs() -> None:
    objects = {
        "bin/python": elf(rpath="$ORIGIN/../lib", kind="executable"),
        "bin/tool": elf("libz.so", kind="executable"),
        "sp/a.so": elf("libz.so"),
        "sp/b.so": elf("libz.so", runpath="$ORIGIN"),
        "lib/libz.so": elf(),
    }
    own = {"bin/tool": ("$ORIGIN/../lib",), "sp/b.so": ("$ORIGIN",)}
    assert plan(Tree(objects=objects), program="bin/python") == own
    alone = {"sp/a.so": ("$ORIGIN/../lib",), "sp/b.so": ("$ORIGIN", "$ORIGIN/../lib")}
    assert plan(Tree(objects=objects)) == {**own, **alone}


def test_a_runpath_becomes_an_rpath_where_that_serves_what_it_loads() -> None:
    objects = {
        "k.so": elf("libx.so", runpath="$ORIGIN/nvidia:$ORIGIN/z"),
        "nvidia/libx.so": elf("libz.so"),
        "z/libz.so": elf(),
    }
    (edit,) = plan_rpaths(Tree(objects=objects))
    assert (edit.rpath, edit.added) == (("$ORIGIN/nvidia", "$ORIGIN/z"), ())
    assert edit.why == ("DT_RUNPATH becomes DT_RPATH: libz.so",)


def test_rules_add_folders() -> None:
    tree = Tree(
        objects={"a/top.so": elf("x.so", rpath="$ORIGIN/k"), "b/x.so": elf(), "a/k/z.so": elf()}, files={"d/data"}
    )
    assert plan(tree, rules={"a/*": ("d", "b", "a/k")}) == {
        "a/top.so": ("$ORIGIN/k", "$ORIGIN/../d", "$ORIGIN/../b"),
        "a/k/z.so": ("$ORIGIN/../../d", "$ORIGIN/../../b", "$ORIGIN"),
    }
    with pytest.raises(RecipeError, match="2 faults") as caught:
        plan_rpaths(tree, rules={"nothing/*": ("b",), "a/*": ("nowhere",)})
    assert "nothing/*" in str(caught.value)
    assert "nowhere" in str(caught.value)


def test_a_rule_does_not_touch_the_untouched() -> None:
    tree = Tree(objects={f"{SP}/nvidia/x/lib/libx.so": elf()})
    with pytest.raises(RecipeError, match="matches no object"):
        plan_rpaths(tree, rules={"*libx.so": ("lib",)})


def test_a_second_plan_has_nothing_to_do() -> None:
    objects = {
        f"{SP}/k/ops.so": elf("libx.so", "libz.so", rpath="/out"),
        f"{SP}/nvidia/x/lib/libx.so": elf("libz.so"),
        "q/libz.so": elf(),
    }
    tree = Tree(objects=objects)
    assert plan_rpaths(edited_tree(tree, plan_rpaths(tree))) == ()


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        (f"{SP}/nvidia/cublas/lib/libcublas.so.12", True),
        (f"{SP}/triton/backends/nvidia/bin/ptxas", True),
        ("nvidia/x.so", True),
        (f"{SP}/nvidia/nccl/lib/libnccl.so.2", False),
        (f"{SP}/torch/lib/libtorch.so", False),
        (f"{SP}/nvidia_stub/x.so", False),
    ],
)
def test_nvidia_libraries_are_untouched(path: str, kept: bool) -> None:
    assert is_proprietary(path) is kept

"""Which loose cubins of a wheel a target needs."""

from __future__ import annotations

import pytest

from composer.formats.cubin import Cubin
from composer.formats.wheel import read_wheel
from composer.model.plan import SlimEdit
from composer.steps.survey import loose_cubin
from tests.fatbins import cubin
from tests.wheels import build_wheel

SITE = "lib/python3.12/site-packages/"


def edit(*sms: int, gpu: bool = True) -> SlimEdit:
    return SlimEdit(files=("k/*.so", "k/**/*.cubin"), sms=sms, licence="MIT", gpu=gpu, keep_ptx=True, debug=True)


@pytest.mark.parametrize(
    ("name", "runs_on"),
    [
        ("80", {80, 86, 89}),
        ("86", {86, 89}),
        ("90", {90}),
        ("90a", {90}),
        ("100", {100, 103}),  # also the form for a family, sm_100f, which cannot be told from it
        ("100a", {100}),
        ("103", {103}),
        ("103a", {103}),
        ("120", {120, 121}),
        ("120a", {120}),
        ("121", {121}),
        ("87", {87}),
        ("110", {110}),
        ("101", {110}),
    ],
)
def test_a_cubin_stays_where_it_runs(name: str, runs_on: set[int]) -> None:
    image = Cubin(sm=int(name.rstrip("a")), variant="a" if name.endswith("a") else "")
    path = f"{SITE}k/x/one.cubin"
    targets = {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}
    assert {sm for sm in targets if edit(sm).why_left_out(path, image) is None} == runs_on
    gone = targets - runs_on
    assert edit(*gone).why_left_out(path, image) is not None
    for sm in runs_on:
        assert edit(sm, *gone).why_left_out(path, image) is None  # for mixed hosts


def test_the_reason_says_what_it_is_and_what_for() -> None:
    image = Cubin(sm=103, variant="a")
    why = edit(90, 100).why_left_out(f"{SITE}k/x/one.cubin", image)
    assert why == "sm_103a code, which no GPU of SM 90, 100 runs"


@pytest.mark.parametrize(
    ("rule", "path"),
    [(edit(90), "other/x.cubin"), (edit(90), "k/x.bin"), (edit(), "k/x.cubin"), (edit(90, gpu=False), "k/x.cubin")],
    ids=["another distribution's", "not named", "all targets", "debug symbols only"],
)
def test_what_no_rule_is_for_stays(rule: SlimEdit, path: str) -> None:
    assert rule.why_left_out(SITE + path, Cubin(sm=80, variant="")) is None


def test_the_pattern_that_names_a_file() -> None:
    assert edit(90).pattern(f"{SITE}k/x/one.cubin") == "k/**/*.cubin"
    assert edit(90).pattern(f"{SITE}k/lib.so") == "k/*.so"
    assert edit(90).pattern(f"{SITE}k/x.py") is None


def test_what_is_a_loose_cubin() -> None:
    host = bytearray(cubin(90))
    host[18] = 62  # e_machine: x86-64
    files = {
        "k/plain.cubin": cubin(90), "k/specific.cubin": cubin(100, "a", size=64), "k/short.cubin": cubin(90)[:63],
        "k/empty.cubin": b"", "k/lib.so": bytes(host), "k/text.cubin": b"no object " * 10, "k/data.json": cubin(90),
    }  # fmt: skip
    view = build_wheel("k", "1.0", files)
    wheel = read_wheel(view, "k-1.0-py3-none-any.whl")
    found = {path: loose_cubin(view, wheel.members[path]) for path in files}
    assert {path: one for path, one in found.items() if one} == {
        "k/plain.cubin": Cubin(sm=90, variant=""), "k/specific.cubin": Cubin(sm=100, variant="a"),
    }  # fmt: skip

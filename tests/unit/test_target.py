"""Targets: every spelling that people use of an SM, a GPU and an instruction set, what contradicts itself, the slug."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from packaging.tags import compatible_tags

from composer.errors import RecipeError
from composer.model.target import (
    GLIBC_CEILING,
    MACHINES,
    Target,
    Targets,
    gpu_faults,
    parse_gpu,
    parse_gpus,
    parse_isa,
    parse_sm,
    parse_sms,
    parse_targets,
    sm_text,
    target_faults,
)
from composer.steps.load import load_targets
from composer.steps.toolchain import load_toolchains

DATA = {
    "sm": {"90": {"name": "Hopper", "gpus": ["H100"]}, "100": {"name": "Blackwell", "gpus": []}},
    "cuda": {},
    "isa": {
        "avx2": {"machine": "x86_64", "flags": ["-mavx2"], "features": ["avx2"], "cpus": "Haswell"},
        "avx512": {"machine": "x86_64", "flags": [], "features": [], "cpus": "Skylake"},
    },
    "driver": {"source": "a test", "compatible": {"12": "525"}, "native": {}},
}
TARGETS = parse_targets(DATA, "targets.toml")
SHIPPED = load_targets()
TARGET = Target(sms=(90,), isa="avx512", cuda="12.8", python="3.12")


@pytest.mark.parametrize(
    ("text", "sm"),
    [("90", 90), ("sm90", 90), ("sm_90", 90), ("SM_90", 90), ("9.0", 90), (" 90 ", 90), ("10.0", 100), ("sm100", 100)],
)
def test_spellings_of_an_sm(text: str, sm: int) -> None:
    assert parse_sm(text, TARGETS) == sm


@pytest.mark.parametrize(
    ("text", "sms"),
    [("90", (90,)), ("100,90", (90, 100)), ("9.0, sm_100 ,90", (90, 100)), ("100+90", (90, 100)),
     ("sm90 + 10.0,90", (90, 100)), ("all", ()), (" ALL\n", ())],
)  # fmt: skip
def test_several_sms(text: str, sms: tuple[int, ...]) -> None:
    assert parse_sms(text, TARGETS) == sms


@pytest.mark.parametrize("text", ["", ",", "90,", ",90", "90,,100", "90;100", "90 100", "all,90", "90,91", "none",
                                  "90++100", "+90", "90+all"])  # fmt: skip
def test_several_of_which_one_is_unknown(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown GPU architecture"):
        parse_sms(text, TARGETS)


def test_all_that_are_unknown_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match="2 faults") as caught:
        parse_sms("91+90,92", TARGETS)
    assert "'91'" in str(caught.value)
    assert "'92'" in str(caught.value)


def test_a_target_is_for_a_set_of_architectures() -> None:
    both = replace(TARGET, sms=(100, 90, 100))
    assert both.sms == (90, 100)
    assert both == replace(TARGET, sms=(90, 100))
    assert both.slug == "python312-cuda12_8-sm90_100-avx512"
    assert (sm_text(both.sms), sm_text([90])) == ("SM 90, 100", "SM 90")


@pytest.mark.parametrize("text", ["", "9", "91", "sm-90", "90a", "9.00", "-90", "90\n91", "9 0", "$(id)", "٩٠", "1000"])
def test_unknown_sm(text: str) -> None:
    with pytest.raises(RecipeError, match="unknown GPU architecture") as caught:
        parse_sm(text, TARGETS)
    assert repr(text) in str(caught.value)
    assert "Known: 90, 100" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("text", "near"),
    [("91", "90"), ("sm-90", "90"), ("90a", "90"), ("1000", "100"), ("sm 120", "120"), ("101", "110"),
     ("H100", "--gpu 'H100', which is of SM 90"), ("rtx4090", "--gpu 'RTX 4090', which is of SM 89")],
)  # fmt: skip
def test_unknown_sm_names_the_nearest(text: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_sm(text, SHIPPED)
    assert f"Did you mean {near}?" in str(caught.value.fix)


def test_nothing_is_near_to_no_number() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_sm("none", SHIPPED)
    assert str(caught.value.fix).startswith("Known: 61, 75, 80")


@pytest.mark.parametrize(
    ("text", "name"),
    [("AVX-512", "avx512"), ("avx512_bf16", "avx512bf16"), ("x86_64_v3", "x86-64-v3"), ("armv8.2", "armv8_2"),
     ("ARMv9", "armv9"), (" avx2 ", "avx2")],
)  # fmt: skip
def test_punctuation_of_an_isa(text: str, name: str) -> None:
    assert parse_isa(text, SHIPPED) == name


@pytest.mark.parametrize(("text", "near"), [("avx521", "avx512"), ("av2x", "avx2"), ("AVX5", "avx512")])
def test_unknown_isa_names_the_nearest(text: str, near: str) -> None:
    assert parse_isa(near.upper(), TARGETS) == near
    with pytest.raises(RecipeError) as caught:
        parse_isa(text, TARGETS)
    assert caught.value.fix == f"Did you mean {near!r}?"


def test_isa_like_no_other_lists_all() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_isa("; rm -rf /", TARGETS)
    assert caught.value.fix == "Known: avx2, avx512."


def test_slug() -> None:
    assert TARGET.slug == "python312-cuda12_8-sm90-avx512"


def test_platforms_are_those_of_pep_600() -> None:
    platforms = TARGET.platforms
    assert platforms[0] == f"manylinux_2_{GLIBC_CEILING}_x86_64"
    assert {"manylinux2014_x86_64", "manylinux1_x86_64", "manylinux_2_5_x86_64", "linux_x86_64"} < set(platforms)
    assert len(set(platforms)) == len(platforms)
    assert all(tag.platform in {"any", *platforms} for tag in compatible_tags((3, 12), platforms=platforms))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"sm": {"90a": {"name": "x", "gpus": []}}}, "sm.90a"),
        ({"sm": {"90": {"name": "x", "gpus": ["A1"]}, "100": {"name": "y", "gpus": ["a-1"]}}}, "sm.100.gpus"),
        ({"sm": {"90": {"name": "x", "gpus": ["A1"]}}, "other-gpus": {"A1": 70}}, "other-gpus.A1"),
        ({"sm": {"90": {"name": "x", "gpus": [], "own-cpu": {"A1": ["avx2"]}}}}, "sm.90.own-cpu"),
        ({"sm": {"90": {"name": "x", "gpus": ["A1"], "own-cpu": {"A1": ["avx3"]}}}}, "sm.90.own-cpu.A1"),
        ({"sm": {"90": {"name": "x", "gpus": ["A1"], "own-cpu": {"A1": []}}}}, "sm.90.own-cpu.A1"),
        ({"isa": {"z": {"machine": "riscv64", "flags": [], "features": [], "cpus": ""}}}, "isa.z.machine"),
        ({"cuda": {"12": {"emits": []}}}, "cuda.12"),
        ({"cuda": {"12.x": {"emits": []}}}, "cuda.12.x"),
        ({"driver": {"source": "a test", "compatible": {"12": "R525"}, "native": {}}}, "driver.compatible.12"),
        ({"driver": {"source": "a test", "compatible": {}, "native": {"12.8": ""}}}, "driver.native.12.8"),
        ({"sm": {"90": {"name": 5, "gpus": []}}}, "sm[...].name"),
        ({"sm": {"90": {"name": "x", "gpus": [], "gpu": []}}}, "sm.90.gpu"),
        ({"isa": {"avx2": {"machine": "x86_64", "cpus": ""}}}, "flags"),
        ({"isas": {}}, "isas"),
    ],
)
def test_a_wrong_vocabulary_names_the_place(change: dict[str, object], where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_targets(DATA | change, "targets.toml")
    assert where in str(caught.value)
    assert str(caught.value.where).startswith("targets.toml")


def test_the_shipped_vocabulary_makes_file_names() -> None:
    targets: Targets = SHIPPED
    assert sorted(map(int, targets.sm)) == [61, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121]
    assert set(targets.isa) == {
        "avx", "avx2", "avx512", "avx512bf16", "avx512vnni", "armv8_2", "armv9", "x86-64-v3", "x86-64-v4",
    }  # fmt: skip
    assert {isa.machine for isa in targets.isa.values()} == set(MACHINES)
    assert {"12.8", "12.9", "13.0"} <= targets.cuda.keys()
    for sm, isa in itertools.product(targets.sm, targets.isa):
        assert parse_sm(sm, targets) == int(sm)
        target = Target(sms=(int(sm),), isa=parse_isa(isa, targets), cuda="12.8", python="3.13")
        assert target.slug.replace("_", "").replace("-", "").isalnum()


# --- GPUs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sm", "isas"),
    [
        ("H100", 90, None), ("NVIDIA H100 80GB HBM3", 90, None), ("NVIDIA GH200 480GB", 90, ("armv8_2", "armv9")),
        ("L40S", 89, None), ("NVIDIA L40", 89, None), ("NVIDIA RTX 6000 Ada Generation", 89, None),
        ("Tesla T4", 75, None), ("Quadro RTX 6000", 75, None), ("NVIDIA A100-SXM4-80GB", 80, None),
        ("RTX A6000", 86, None), ("NVIDIA A10G", 86, None), ("Jetson AGX Orin", 87, ("armv8_2",)),
        ("NVIDIA Jetson Orin Nano Developer Kit", 87, ("armv8_2",)), ("B200", 100, None),
        ("GB200", 100, ("armv8_2", "armv9")), ("GB300 NVL72", 103, ("armv8_2", "armv9")), ("B300", 103, None),
        ("NVIDIA Thor", 110, ("armv8_2", "armv9")), ("RTX 5090", 120, None), ("rtx5090", 120, None),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 120, None), ("DGX Spark", 121, ("armv8_2", "armv9")),
        ("gb10", 121, ("armv8_2", "armv9")), ("GTX 1080 Ti", 61, None), ("p40", 61, None),
    ],
)  # fmt: skip
def test_gpus_by_name(name: str, sm: int, isas: tuple[str, ...] | None) -> None:
    found = parse_gpu(name, SHIPPED)
    assert (found.sm, found.isas) == (sm, isas)


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("H1000", "unknown GPU 'H1000'", "Did you mean 'H100'?"),
        ("RTX 5009", "unknown GPU", "Did you mean 'RTX 5090'?"),
        ("Radeon", "unknown GPU 'Radeon'", "Name its architecture: --sm 90."), ("", "unknown GPU ''", "--sm 90"),
        ("Tesla V100-SXM2-32GB", "V100 is of SM 70, which is no target", "Targets: SM 61, 75, 80"),
        ("Jetson Nano", "Jetson Nano is of SM 53", "Targets"), ("; rm -rf /", "unknown GPU", "--sm 90"),
    ],
)  # fmt: skip
def test_gpus_that_are_no_target(text: str, what: str, fix: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown GPU|no target") as caught:
        parse_gpu(text, SHIPPED)
    assert caught.value.what.startswith(what)
    assert fix in str(caught.value.fix)


def test_faults_of_several_gpus_are_told_together() -> None:
    assert [gpu.sm for gpu in parse_gpus(["L40S", "H100"], SHIPPED)] == [89, 90]
    with pytest.raises(RecipeError, match="2 faults") as caught:
        parse_gpus(["H1000", "H100", "V100"], SHIPPED)
    assert "H1000" in str(caught.value)
    assert "SM 70" in str(caught.value)


def test_every_shipped_name_is_found_by_itself_and_as_nvml_has_it() -> None:
    for sm, row in SHIPPED.sm.items():
        for name in row.gpus:
            for spelled in (name, name.lower(), f"NVIDIA {name} 96GB", name.replace(" ", "-"), name.replace(" ", "")):
                assert (parse_gpu(spelled, SHIPPED).name, parse_gpu(spelled, SHIPPED).sm) == (name, int(sm))


# --- what a toolkit emits, and for which driver -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sm", "cuda", "codes"),
    [
        (90, "12.8", ("90", "90a")), (100, "12.8", ("100", "100a")), (100, "12.9", ("100", "100a", "100f")),
        (103, "12.8", ()), (103, "12.9", ("103", "103a", "103f")), (61, "12.9", ("61",)), (61, "13.0", ()),
        (110, "12.9", ()), (110, "13.0", ("110", "110a", "110f")), (90, "11.0", ()),
    ],
)  # fmt: skip
def test_what_a_toolkit_emits(sm: int, cuda: str, codes: tuple[str, ...]) -> None:
    assert SHIPPED.codes(sm, cuda) == codes


def test_toolkits_agree_with_the_spans_of_toolchains() -> None:
    spans = load_toolchains().sm
    assert SHIPPED.sm.keys() <= spans.keys()
    for sm, cuda in itertools.product(SHIPPED.sm, SHIPPED.cuda):
        assert bool(SHIPPED.codes(int(sm), cuda)) == spans[sm].has(cuda), (sm, cuda)


@pytest.mark.parametrize(
    ("sm", "cuda", "branch"),
    [(80, "12.8", "525"), (90, "12.9", "525"), (100, "12.8", "570"), (120, "12.9", "570"), (103, "12.9", "575"),
     (121, "12.9", "575"), (80, "13.0", "580"), (103, "13.0", "580"), (110, "13.0", "580"), (80, "11.8", "450"),
     (80, "99.0", None)],
)  # fmt: skip
def test_the_oldest_driver(sm: int, cuda: str, branch: str | None) -> None:
    assert SHIPPED.oldest_driver(sm, cuda) == branch


# --- contradictions ---------------------------------------------------------------------------------------------------


def faults(sm: int, isa: str, cuda: str) -> list[tuple[str, str | None, str | None]]:
    target = Target(sms=(sm,), isa=isa, cuda=cuda, python="3.12", machine=SHIPPED.isa[isa].machine)
    return [(one.what, one.why, one.fix) for one in target_faults(target, SHIPPED)]


def test_a_cuda_that_does_not_know_the_gpu() -> None:
    assert faults(103, "avx512", "12.8") == [
        ("CUDA 12.8 emits no code for SM 103", None, "Choose a recipe of CUDA 12.9 or 13.0 or 13.1."),
    ]
    assert faults(61, "avx2", "13.0")[0][2] == "Choose a recipe of CUDA 12.6 or 12.8 or 12.9."


def test_jetson_is_not_x86_64() -> None:
    (cpu,) = faults(87, "avx2", "12.6")
    assert cpu == ("the CPU of Orin does not run avx2", "Orin has a CPU of its own: aarch64, with armv8_2",
                   "Choose --isa armv8_2.")  # fmt: skip
    assert faults(87, "armv8_2", "12.6") == []
    assert faults(87, "armv9", "12.6")[0][0] == "the CPU of Orin does not run armv9"


def test_both_faults_of_a_target_are_told() -> None:
    cpu, cuda = faults(110, "avx512", "12.8")
    assert cpu[0] == "the CPU of Thor does not run avx512"
    assert cuda[:2] == ("CUDA 12.8 emits no code for SM 110",
                        "CUDA 12.8 calls it sm_101; the first system for it has CUDA 13")  # fmt: skip


@pytest.mark.parametrize(("sm", "isa"), [(90, "armv9"), (100, "armv9"), (100, "avx512"), (75, "armv8_2"), (103, "avx")])
def test_cards_are_beside_any_cpu(sm: int, isa: str) -> None:
    assert faults(sm, isa, "12.9") == []


def test_a_cuda_and_an_sm_that_are_not_listed() -> None:
    assert faults(103, "avx2", "14.0") == []  # nobody knows
    assert faults(70, "avx2", "12.8")[0][0] == "unknown GPU architecture '70'"


def test_a_gpu_with_a_cpu_of_its_own() -> None:
    (fault,) = gpu_faults(parse_gpu("GB200", SHIPPED), "avx512", SHIPPED)
    assert fault.what == "the CPU of GB200 does not run avx512"
    assert fault.fix == "Choose --isa armv9 or armv8_2."
    assert not list(gpu_faults(parse_gpu("GB200", SHIPPED), "armv9", SHIPPED))
    assert not list(gpu_faults(parse_gpu("B200", SHIPPED), "avx512", SHIPPED))

"""Profiles: the shipped ones, what their references wrote, and what a bundle gets of them."""

from __future__ import annotations

import json

import msgspec
import pytest

from composer.errors import RecipeError
from composer.model.profile import flag_words, parse_profiles, render_profiles, render_rules
from composer.runtime.serve.profiles import ProfileError, profile, read
from composer.steps.advise import Command, find_profile, load_profiles, load_rules, of_profile

SHIPPED = load_profiles()
#: The commands that its reference gives in full, and those of them that argparse of sglang 0.5.9 refuses.
COMMANDS = [name for name, one in SHIPPED.items() if one.kind == "command" and one.reference == "SGLang on SM120 wiki"]
ONE = {"name": "one", "kind": "command", "title": "t", "model": "m/m"}


def parse(**changes):
    return parse_profiles({"p.toml": {"schema": 1, "reference": "r", "profile": [ONE | changes]}})


def test_all_16_profiles_are_here():
    assert len(SHIPPED) == 16
    assert len(COMMANDS) == 9
    assert {one.reference for one in SHIPPED.values()} == {"SGLang on SM120 wiki", "flox sglang-runtime"}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_for_sm120_turn_deepgemm_off_by_the_name_that_is_read(name):
    assert SHIPPED[name].sm == (120,)
    assert SHIPPED[name].environment["SGLANG_ENABLE_JIT_DEEPGEMM"] == "0"


@pytest.mark.parametrize("one", SHIPPED.values(), ids=lambda one: one.name)
def test_nothing_that_0_5_9_does_not_read_or_know_is_shipped(one):
    unread = {"SGLANG_DISABLE_DEEP_GEMM", "SGLANG_ENABLE_DEEP_GEMM", "SAFETENSORS_FAST_GPU"}
    assert not unread & one.environment.keys()
    assert "enable-pcie-oneshot-allreduce" not in one.flags
    assert one.flags.get("tool-call-parser") != "qwen3"
    assert not any(str(value).startswith(("/home", "/mnt")) for value in (one.model, *one.environment.values()))


@pytest.mark.parametrize("one", SHIPPED.values(), ids=lambda one: one.name)
def test_every_correction_has_a_reason_and_can_be_undone(one):
    assert all(len(change.why) > 10 for change in one.changes)
    reference = one.as_referenced()
    for change in one.changes:
        name = change.name
        there = (
            reference.model
            if name == "model"
            else {**{f"--{flag}": value for flag, value in reference.flags.items()}, **reference.environment}.get(name)
        )
        assert there == change.was
    assert (reference == one) == (not one.changes)


def test_the_references_own_words():
    glm = SHIPPED["glm5-nvfp4-mtp-8gpu"].as_referenced()
    assert glm.model == "/mnt/GLM-5-NVFP4-MTP"
    assert glm.argv()[-1] == "--enable-pcie-oneshot-allreduce"
    assert glm.environment["NCCL_GRAPH_FILE"] == "/mnt/nccl_graph_opt.xml"
    tuned = SHIPPED["qwen3.5-397b-nvfp4-4gpu-mtp-tuned"].as_referenced()
    assert tuned.flags["tool-call-parser"] == "qwen3"
    assert tuned.environment == {"NCCL_P2P_LEVEL": "4", "SGLANG_ENABLE_SPEC_V2": "1"}


def test_flags_as_words():
    flags = {"a": True, "b": 0.85, "c": 4, "d": {"x": True, "y": 16}, "e": ["p", 2], "f": "g h"}
    assert flag_words(flags) == ["--a", "--b", "0.85", "--c", "4", "--d", '{"x": true, "y": 16}', "--e", "p", "2",
                                 "--f", "g h"]  # fmt: skip


@pytest.mark.parametrize(("changes", "where", "what"), [
    ({"flags": {"--tp": 4}}, "p.toml: profile[0] (one).flags.--tp", "is no flag"),
    ({"flags": {"tp": False}}, "p.toml: profile[0] (one).flags.tp", "cannot be off"),
    ({"environment": {"a b": "1"}}, "p.toml: profile[0] (one).environment.a b", "is no variable"),
    ({"environment": {"A": 1}}, "p.toml: profile[0]: environment", "expected `str`"),
    ({"name": "One"}, "p.toml: profile[0] (One).name", "is no name"),
    ({"model": None}, "p.toml: profile[0] (one).model", "needs a model"),
    ({"kind": "magic"}, "p.toml: profile[0]: kind", "invalid enum value"),
    ({"flag": {}}, "p.toml: profile[0]", "unknown key 'flag'"),
    ({"flags": {"tp": 4}, "changes": [{"name": "--tp", "now": 8, "why": "w"}]}, "changes[0].now (--tp)", "4 is there"),
    ({"changes": [{"name": "X", "now": "1", "why": "w"}]}, "changes[0].now (X)", "None is there"),
])  # fmt: skip
def test_a_fault_names_the_profile_and_the_key(changes, where, what):
    with pytest.raises(RecipeError) as caught:
        parse(**changes)
    assert where in str(caught.value)
    assert what in str(caught.value)


def test_names_are_unique_and_the_schema_is_ours():
    with pytest.raises(RecipeError, match="2 faults"):
        parse_profiles({"p.toml": {"schema": 2, "reference": "r", "profile": [ONE, ONE]}})


def test_a_file_gives_its_profiles_what_they_lack():
    found = parse_profiles({"p.toml": {
        "schema": 1, "reference": "r", "sm": [120], "versions": ["1"],
        "profile": [ONE, ONE | {"name": "two", "sm": []}],
    }})  # fmt: skip
    assert [(one.sm, one.versions) for one in found.values()] == [((120,), ("1",)), ((), ("1",))]


@pytest.mark.parametrize(("sm", "count", "has", "lacks"), [
    (120, 13, "glm5-nvfp4-mtp-8gpu", "t4-phi3.5-awq"),
    (90, 4, "llama-70b-tp4", "glm5-nvfp4-mtp-8gpu"),
    (None, 14, "t4-phi3.5-awq", "dcp-kimi-k2.5"),
])  # fmt: skip
def test_a_bundle_gets_what_its_stack_and_its_gpu_serve(sm, count, has, lacks):
    found = json.loads(render_profiles(SHIPPED, stack="sglang", version="0.5.9", sms=[sm] if sm else []))
    assert len(found["profiles"]) == count
    assert has in found["profiles"]
    assert lacks not in found["profiles"]
    assert (found["schema"], found["stack"], found["sm"]) == (1, "sglang 0.5.9", sm)


def test_a_bundle_for_several_gets_what_any_of_them_serves_and_is_told_which():
    found = json.loads(render_profiles(SHIPPED, stack="sglang", version="0.5.9", sms=[90, 120]))
    assert found["sm"] == [90, 120]
    assert found["profiles"]["glm5-nvfp4-mtp-8gpu"]["sm"] == [120]
    assert "sm" not in found["profiles"]["llama-70b-tp4"]
    alone = json.loads(render_profiles(SHIPPED, stack="sglang", version="0.5.9", sms=[120]))
    assert not [one for one in alone["profiles"].values() if "sm" in one]


def test_another_version_of_the_stack_gets_none():
    assert json.loads(render_profiles(SHIPPED, stack="sglang", version="0.5.10", sms=[120]))["profiles"] == {}
    assert json.loads(render_profiles(SHIPPED, stack="vllm", version="0.5.9", sms=[120]))["profiles"] == {}


def test_rendering_does_not_depend_on_the_order_of_files():
    backwards = dict(reversed(SHIPPED.items()))
    render = [render_profiles(one, stack="sglang", version="0.5.9", sms=[120]) for one in (SHIPPED, backwards)]
    assert render[0] == render[1]


def test_the_bundle_gets_the_rules_that_a_host_has_to_do_with():
    found = json.loads(render_rules(load_rules()))
    phases = {one["phase"] for one in found["rules"]}
    assert phases == {"select", "install", "host", "launch", "k8s"}
    one = next(one for one in found["rules"] if one["id"] == "no-fa3-sm120")
    assert one["when"] == [["host.sm", ">=", 100]]
    assert one["must"] == [["flags.--attention-backend", "not_in", ["fa3"]]]
    assert found["tables"]["spellings"]["--tp"] == ["--tp-size", "--tensor-parallel-size"]


def test_a_fragment_is_added_to_nothing_or_to_a_command():
    fragment = SHIPPED["mtp-fragment"]
    assert of_profile(fragment).fragment
    found = of_profile(fragment, Command(argv=["--model-path", "m"], environment={"SGLANG_ENABLE_SPEC_V2": "0"}))
    assert not found.fragment
    assert found.argv[-2:] == ["--model-path", "m"]
    assert found.environment == {"SGLANG_ENABLE_SPEC_V2": "0"}


def test_an_unknown_profile_is_told_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'glm5-nvfp4-mtp-8gpu'"):
        find_profile("glm5-mtp-8gpu", SHIPPED)


@pytest.fixture
def prefix(tmp_path):
    folder = tmp_path / "a bundle" / "share" / "compose"
    folder.mkdir(parents=True)
    (folder / "profiles.json").write_bytes(render_profiles(SHIPPED, stack="sglang", version="0.5.9", sms=[120]))
    return tmp_path / "a bundle"


def test_a_bundle_reads_its_profiles(prefix):
    found = profile("glm5-nvfp4-mtp-8gpu", str(prefix))
    assert found["model"] == "festr2/GLM-5-NVFP4-MTP"
    assert ["--model-path", found["model"], *found["flags"]] == SHIPPED["glm5-nvfp4-mtp-8gpu"].argv()
    assert found["env"]["SGLANG_ENABLE_JIT_DEEPGEMM"] == "0"
    assert profile("mtp-fragment", str(prefix))["model"] is None
    assert len(read(str(prefix))["profiles"]) == 13


@pytest.mark.parametrize(("name", "says"), [
    ("glm5-mtp", "(sglang 0.5.9, SM 120); did you mean 'glm5-nvfp4-mtp-8gpu'?"),
    ("zzz", "it has: "),
])  # fmt: skip
def test_a_bundle_names_the_nearest_profile(prefix, name, says):
    with pytest.raises(ProfileError) as caught:
        profile(name, str(prefix))
    assert f"no profile {name!r}" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(("content", "says"), [
    (b"{", "is damaged"), (b"\xff", "is damaged"), (b"[]", "another schema"), (b'{"schema": 2}', "another schema"),
    (None, "has no profiles"),
])  # fmt: skip
def test_profiles_that_cannot_be_read(prefix, content, says):
    path = prefix / "share" / "compose" / "profiles.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ProfileError, match=says):
        profile("glm5-nvfp4-mtp-8gpu", str(prefix))


def test_profiles_travel_through_json_unchanged():
    encoded = msgspec.json.encode(list(SHIPPED.values()))
    assert len(msgspec.json.decode(encoded)) == 16

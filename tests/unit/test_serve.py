"""The server's command and environment, as the reference has them and where they differ on purpose."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from composer.model.profile import parse_profiles, render_profiles
from composer.runtime.model.place import Place
from composer.runtime.serve import options
from composer.runtime.serve.launch import Launch, planned
from composer.runtime.serve.options import DEFAULT_SAMPLING
from composer.runtime.serve.report import MODEL, USAGE, Refusal
from composer.runtime.serve.resolve import record, resolve
from tests.models import NEW_CLASS, model, snapshot

_ROOT = Path(__file__).resolve().parents[2]
_SAMPLING = ["--preferred-sampling-params", DEFAULT_SAMPLING]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A bundle without models, an empty cache folder, and a home without a Hugging Face cache."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "cache").mkdir()
    environ = {"HOME": str(tmp_path / "home"), "WHEEL_COMPOSER_GPU_CHECK": "off"}  # what hosts without a GPU are told
    return Place(prefix=tmp_path / "bundle", cache=tmp_path / "cache", environ=environ)


def plan(place: Place, *passed: str, **environ: str) -> Launch:
    found = Place(prefix=place.prefix, cache=place.cache, environ={**place.environ, **environ})
    return planned(found, passed=passed)


def words(place: Place, *passed: str, **environ: str) -> list[str]:
    """What follows `python3 -m sglang.launch_server`."""
    return plan(place, *passed, **environ).command[3:]


def refusal(place: Place, *passed: str, **environ: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        plan(place, *passed, **environ)
    return caught.value


# --- parity: every variable, its default and the order ----------------------------------------------------------------


def test_the_command_without_any_variable(place: Place) -> None:
    assert plan(place).command == [
        str(place.prefix / "bin/python3"), "-m", "sglang.launch_server",
        "--model-path", "microsoft/Phi-4-mini-instruct-FP8-TORCHAO", "--host", "0.0.0.0", "--port", "30000",
        "--served-model-name", "default", "--preferred-sampling-params",
        '{"max_new_tokens":512,"frequency_penalty":0.5,"presence_penalty":0.3}',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("SGLANG_MODEL", "org/name", ["--model-path", "org/name"]),
        ("SGLANG_HOST", "127.0.0.1", ["--host", "127.0.0.1"]),
        ("SGLANG_PORT", "8080", ["--port", "8080"]),
        ("SGLANG_SERVED_NAME", "my model", ["--served-model-name", "my model"]),
        ("SGLANG_ATTENTION_BACKEND", "triton", ["--attention-backend", "triton"]),
        ("SGLANG_DISABLE_CUDA_GRAPH", "1", ["--disable-cuda-graph"]),
        ("SGLANG_DTYPE", "float16", ["--dtype", "float16"]),
        ("SGLANG_TP_SIZE", "4", ["--tp-size", "4"]),
        ("SGLANG_PREFERRED_SAMPLING_PARAMS", '{"top_k": 1}', ["--preferred-sampling-params", '{"top_k": 1}']),
        ("SGLANG_EXTRA_ARGS", "--mem-fraction-static 0.80 --context-length 4096",
         ["--mem-fraction-static", "0.80", "--context-length", "4096"]),
    ],
)  # fmt: skip
def test_each_variable(place: Place, variable: str, value: str, expected: list[str]) -> None:
    without, found = words(place), words(place, **{variable: value})
    at = found.index(expected[0])
    assert found[at : at + len(expected)] == expected
    if expected[0] in without:  # in the place of the default
        start = without.index(expected[0])
        del without[start : start + 2]
    del found[at : at + len(expected)]
    assert found == without
    assert words(place, **{variable: ""}) == words(place)


def test_the_order_of_all(place: Place) -> None:
    found = words(
        place, SGLANG_MODEL="org/name", SGLANG_HOST="::", SGLANG_PORT="1", SGLANG_SERVED_NAME="n", SGLANG_DTYPE="half",
        SGLANG_ATTENTION_BACKEND="fa3", SGLANG_DISABLE_CUDA_GRAPH="1", SGLANG_TP_SIZE="1",
        SGLANG_PREFERRED_SAMPLING_PARAMS="{}", SGLANG_EXTRA_ARGS="--log-level info",
    )  # fmt: skip
    assert shlex.join(found) == (
        "--model-path org/name --host :: --port 1 --served-model-name n --attention-backend fa3 --disable-cuda-graph "
        "--dtype half --tp-size 1 --preferred-sampling-params '{}' --log-level info"
    )


def test_a_bundled_model_is_served_by_its_name_and_offline(place: Place) -> None:
    folder = snapshot(place.bundled, "org/name")
    launch = plan(place, SGLANG_MODEL="org/name")
    assert launch.command[3:11] == ["--model-path", str(folder), "--host", "0.0.0.0", "--port", "30000",
                                    "--served-model-name", "org/name"]  # fmt: skip
    assert launch.environ["HF_HUB_OFFLINE"] == "1"
    assert "SGLANG_BUNDLED_FROM" not in launch.environ
    assert plan(place, SGLANG_MODEL="org/name", SGLANG_SERVED_NAME="x").command[10] == "x"


def test_a_cached_model_is_served_offline_under_the_usual_name(place: Place, tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "hub", "org/name")
    launch = plan(place, SGLANG_MODEL="org/name", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert (launch.command[4], launch.command[10]) == (str(folder), "default")
    assert launch.environ["HF_HUB_OFFLINE"] == "1"


def test_a_download_is_not_offline(place: Place) -> None:
    assert "HF_HUB_OFFLINE" not in plan(place, SGLANG_MODEL="org/name").environ


# --- the reference's bugs ---------------------------------------------------------------------------------------------


def test_bug_a_the_file_of_an_old_model_does_not_win(place: Place, tmp_path: Path) -> None:
    old, new = model(tmp_path / "old"), model(tmp_path / "new")
    file = str(tmp_path / "model.env")
    given = Place(prefix=place.prefix, cache=place.cache, environ={**place.environ, "SGLANG_MODEL_ENV_FILE": file})
    record(resolve(str(old), given), given)
    launch = plan(place, SGLANG_MODEL=str(new), SGLANG_MODEL_ENV_FILE=file)
    assert launch.command[4] == str(new)
    assert launch.findings[0]["id"] == "serve.env-file"


def test_bug_b_a_model_that_is_a_command_is_not_run(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(place, SGLANG_MODEL="a/$(touch pwned)").status == USAGE
    folder = model(tmp_path / "$(touch pwned)")
    (tmp_path / "x.env").write_text(f'export SGLANG_MODEL="{folder}"\n')
    assert plan(place, SGLANG_MODEL_ENV_FILE="x.env").command[4] == str(folder)
    assert not (tmp_path / "pwned").exists()


def test_bug_c_links_to_a_removed_copy_are_not_served(place: Place, tmp_path: Path) -> None:
    for name in ("one", "two"):
        snapshot(tmp_path / name, "org/name", tokenizer_class=NEW_CLASS)
        served = plan(place, SGLANG_MODEL="org/name", HF_HUB_CACHE=str(tmp_path / name)).command[4]
        assert (Path(served) / "config.json").is_file()
        shutil.rmtree(tmp_path / name)


def test_bug_d_a_bundled_name_is_not_inherited(place: Place, tmp_path: Path) -> None:
    launch = plan(place, SGLANG_MODEL=str(model(tmp_path / "mine")), SGLANG_BUNDLED_FROM="org/other")
    assert launch.command[10] == "default"
    assert "HF_HUB_OFFLINE" not in launch.environ
    assert "SGLANG_BUNDLED_FROM" not in launch.environ


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--x * --y ?[x] --z $HOME `x` ~ a#b", ["--x", "*", "--y", "?[x]", "--z", "$HOME", "`x`", "~", "a#b"]),
        ("""--model-loader-extra-config '{"enable_multithread_load": true, "num_threads": 16}'""",
         ["--model-loader-extra-config", '{"enable_multithread_load": true, "num_threads": 16}']),
        ("""--x {"a": [1, "x y"]}   --y {"b":1} --z""", ["--x", '{"a": [1, "x y"]}', "--y", '{"b":1}', "--z"]),
        ("""--x={"a": 1} --y=[1, 2]""", ["--x", '{"a": 1}', "--y", "[1, 2]"]),
        ("--x {x --y [y --z {}z", ["--x", "{x", "--y", "[y", "--z", "{}z"]),
        (""" --x "x y"'z'\\ w --y '' """, ["--x", "x yz w", "--y", ""]),
        ("--x 1 -1 -.5 --y=-x", ["--x", "1", "-1", "-.5", "--y=-x"]), ("", []), (" \n\t", []),
    ],
)  # fmt: skip
def test_bug_e_extra_arguments_are_split_as_by_a_shell_and_expanded_never(
    place: Place, text: str, expected: list[str]
) -> None:
    assert words(place, SGLANG_EXTRA_ARGS=text)[10:] == expected


def test_bug_e_a_quote_without_its_end(place: Place) -> None:
    assert "No closing quotation" in refusal(place, SGLANG_EXTRA_ARGS="--a 'b").findings[0]["evidence"]
    assert "before any flag" in refusal(place, SGLANG_EXTRA_ARGS="a --b").findings[0]["evidence"]


@pytest.mark.parametrize("value", ["1", "true", "True", "YES", "on", "y", "T", " 1 "])
def test_bug_f_yes(place: Place, value: str) -> None:
    assert "--disable-cuda-graph" in words(place, SGLANG_DISABLE_CUDA_GRAPH=value)


@pytest.mark.parametrize("value", ["", "0", "false", "No", "off", "n", "F"])
def test_bug_f_no(place: Place, value: str) -> None:
    assert "--disable-cuda-graph" not in words(place, SGLANG_DISABLE_CUDA_GRAPH=value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SGLANG_DISABLE_CUDA_GRAPH", "2"), ("SGLANG_DISABLE_CUDA_GRAPH", "maybe"), ("SGLANG_PREFLIGHT", "x"),
        ("SGLANG_TP_SIZE", "foo"), ("SGLANG_TP_SIZE", "0"), ("SGLANG_TP_SIZE", "-1"), ("SGLANG_TP_SIZE", "1.5"),
        ("SGLANG_TP_SIZE", "٣"), ("SGLANG_TP_SIZE", "1 "), ("SGLANG_PORT", "0"), ("SGLANG_PORT", "65536"),
        ("SGLANG_PORT", "http"), ("SGLANG_PORT", "9" * 20), ("SGLANG_PREFERRED_SAMPLING_PARAMS", "{"),
        ("SGLANG_PREFERRED_SAMPLING_PARAMS", "[1]"), ("SGLANG_PREFERRED_SAMPLING_PARAMS", "[" * 100_000),
        ("SGLANG_MODEL", "-x"), ("SGLANG_MODEL", "a\nb"), ("SGLANG_HOST", "a\0b"),
    ],
)  # fmt: skip
def test_bug_f_values_that_cannot_be_meant(place: Place, variable: str, value: str) -> None:
    found = refusal(place, **{variable: value})
    assert (found.status, [one["subject"] for one in found.findings]) == (USAGE, [variable])


def test_all_faults_at_once(place: Place) -> None:
    found = refusal(place, "x", SGLANG_PORT="x", SGLANG_TP_SIZE="x", SGLANG_PREFLIGHT="x", SGLANG_EXTRA_ARGS="--port x")
    assert [one["subject"] for one in found.findings] == [
        "SGLANG_PORT", "SGLANG_TP_SIZE", "SGLANG_PREFLIGHT", "SGLANG_EXTRA_ARGS", "--"]  # fmt: skip


def test_bug_g_a_folder_without_config_is_no_repository(place: Place, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    assert refusal(place, SGLANG_MODEL=str(tmp_path / "org")).status == MODEL


def test_bug_h_each_model_has_its_file(place: Place) -> None:
    snapshot(place.bundled, "org/one")
    snapshot(place.bundled, "org/two")
    for name in ("org/one", "org/two"):
        record(resolve(name, place), place)
    assert [plan(place, SGLANG_MODEL=name).command[10] for name in ("org/one", "org/two")] == ["org/one", "org/two"]


# --- one flag, several sources ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--port 2", "--port=2"])
def test_the_later_source_wins_and_the_flag_is_said_once(place: Place, flag: str) -> None:
    launch = plan(place, SGLANG_PORT="1", SGLANG_EXTRA_ARGS=flag)
    assert launch.command.count("--port") == 1
    assert (launch.port, launch.command[7:9]) == (2, ["--port", "2"])
    assert [one["evidence"] for one in launch.findings] == [
        "--port 2 (SGLANG_EXTRA_ARGS) takes the place of --port 1 (SGLANG_PORT)"]  # fmt: skip
    launch = plan(place, "--port", "3", SGLANG_EXTRA_ARGS=flag)
    assert launch.port == 3
    assert [one["severity"] for one in launch.findings] == ["warning"]


@pytest.mark.parametrize("flag", ["--tp", "--tp-size", "--tensor-parallel-size"])
def test_other_names_of_a_flag(place: Place, flag: str) -> None:
    launch = plan(place, flag, "1", SGLANG_TP_SIZE="1")
    assert (launch.command[11:13], launch.findings) == (["--tp-size", "1"], [])


def test_a_second_separator_is_none_of_the_servers_flags(place: Place) -> None:
    launch = plan(place, "--", "--port", "8", "--", "--tp", "2", SGLANG_MODEL="a/b")
    assert launch.findings == []
    assert (launch.port, "--" in launch.command) == (8, False)


def test_a_flag_that_is_cut_short_is_left_to_the_server(place: Place) -> None:
    launch = plan(place, "--por", "2")
    assert (launch.port, launch.command[-2:]) == (30000, ["--por", "2"])
    assert [(one["severity"], one["evidence"]) for one in launch.findings] == [
        ("warning", "--por may be read as --port")
    ]


def test_to_say_the_same_twice_is_no_warning_and_defaults_are_overridden_silently(place: Place) -> None:
    assert plan(place, "--port", "1", SGLANG_PORT="1").findings == []
    assert plan(place, "--host", "::1", "--served-model-name", "n").findings == []


def test_the_graph_is_wanted_and_not(place: Place) -> None:
    launch = plan(place, SGLANG_DISABLE_CUDA_GRAPH="0", SGLANG_EXTRA_ARGS="--disable-cuda-graph")
    assert "--disable-cuda-graph" in launch.command
    assert [one["id"] for one in launch.findings] == ["serve.override"]


def test_a_model_behind_the_dashes_is_resolved(place: Place) -> None:
    folder = snapshot(place.bundled, "org/name")
    launch = plan(place, "--model", "org/name")
    assert (launch.command[4], launch.command[10]) == (str(folder), "org/name")
    assert refusal(place, "--model-path", "/no/such").status == MODEL


def test_flags_with_no_one_value(place: Place) -> None:
    assert "takes one value" in refusal(place, "--port").findings[0]["evidence"]
    assert "takes one value" in refusal(place, "--model-path", "a/b", "c/d").findings[0]["evidence"]
    assert words(place, "--cuda-graph-bs", "1", "2", "4")[-4:] == ["--cuda-graph-bs", "1", "2", "4"]


def test_a_revision_is_that_of_the_model(place: Place) -> None:
    snapshot(place.bundled, "org/name")
    record(resolve("org/name", place), place)
    assert plan(place, "--revision", "v2", SGLANG_MODEL="org/name").command[4] == "org/name"


def test_further_repositories(place: Place, tmp_path: Path) -> None:
    """One that is here is named by its folder; for one that is not, the network has to stay open."""
    snapshot(place.bundled, "org/name")
    draft = snapshot(place.bundled, "org/draft")
    launch = plan(place, "--speculative-draft-model-path", "org/draft", SGLANG_MODEL="org/name")
    assert launch.command[-1] == str(draft)
    assert launch.environ["HF_HUB_OFFLINE"] == "1"
    launch = plan(place, "--speculative-draft-model-path", "org/absent", SGLANG_MODEL="org/name")
    assert "HF_HUB_OFFLINE" not in launch.environ
    launch = plan(place, "--lora-paths", f"a={tmp_path}", "org/lora", SGLANG_MODEL="org/name")
    assert "HF_HUB_OFFLINE" not in launch.environ


def test_every_flag_of_ours_is_one_of_sglangs() -> None:
    """And no flag of sglang's but these is taken for one of ours."""
    lines = (_ROOT / "tests/sglang-0.5.9-flags.txt").read_text().splitlines()
    known = [line.split() for line in lines if line.startswith("--")]
    for name, aliases in options.MANAGED.items():
        assert {name, *aliases} - {"--tp"} in [set(names) for names in known]
    ours = {alias for name, aliases in options.MANAGED.items() for alias in (name, *aliases)}
    for name in {name for names in known for name in names} - ours:
        flags, findings = options.from_words([name, "x"], "--")
        assert ([flag.name for flag in flags], findings) == ([name], [])


# --- profiles ---------------------------------------------------------------------------------------------------------

_PROFILES = {
    "whole": {"kind": "command", "model": "org/name", "flags": {"tp-size": 1, "port": 8000, "log-level": "info",
              "disable-cuda-graph": True, "model-loader-extra-config": {"num_threads": 16}},
              "environment": {"NCCL_P2P_LEVEL": "4"}},
    "part": {"kind": "fragment", "flags": {"page-size": 64}},
    "hopper": {"kind": "fragment", "sm": [90]},
    "measure": {"kind": "tool", "module": "sglang.bench_one_batch_server"},
}  # fmt: skip


def write_profiles(place: Place, *sms: int) -> None:
    """Those of a bundle for these SMs."""
    rows = [{"name": key, "title": key, "reference": "a test", **row} for key, row in _PROFILES.items()]
    made = parse_profiles({"x.toml": {"schema": 1, "reference": "a test", "profile": rows}})
    path = place.prefix / "share/compose/profiles.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render_profiles(made, stack="sglang", version="0.5.9", sms=sms))


def with_profile(place: Place, name: str, *passed: str, **environ: str) -> Launch:
    write_profiles(place)
    found = Place(prefix=place.prefix, cache=place.cache, environ={**place.environ, **environ})
    return planned(found, profile=name, passed=passed)


def test_a_profile_is_a_command_of_its_own(place: Place) -> None:
    launch = with_profile(place, "whole")
    assert shlex.join(launch.command[3:]) == (
        "--model-path org/name --host 0.0.0.0 --port 8000 --served-model-name default --disable-cuda-graph --tp-size 1 "
        """--log-level info --model-loader-extra-config '{"num_threads": 16}'"""
    )
    assert (launch.environ["NCCL_P2P_LEVEL"], launch.findings) == ("4", [])


def test_what_is_set_comes_before_a_profile(place: Place) -> None:
    """With a note, as `--strict` is about what one says twice oneself."""
    snapshot(place.bundled, "org/mine")
    launch = with_profile(place, "whole", "--log-level", "debug", SGLANG_MODEL="org/mine", SGLANG_PORT="1",
                          SGLANG_DISABLE_CUDA_GRAPH="no", NCCL_P2P_LEVEL="")  # fmt: skip
    assert (launch.command[10], launch.port, launch.environ["NCCL_P2P_LEVEL"]) == ("org/mine", 1, "")
    assert "--disable-cuda-graph" not in launch.command
    assert launch.command[-2:] == ["--log-level", "debug"]
    assert [(one["severity"], one["subject"]) for one in launch.findings] == [
        ("note", name) for name in ("--model-path", "--port", "--disable-cuda-graph", "--log-level")]  # fmt: skip
    assert launch.findings[2]["evidence"] == (
        "nothing (SGLANG_DISABLE_CUDA_GRAPH) takes the place of --disable-cuda-graph (profile whole)"
    )


def test_a_part_of_a_command_is_added_to_the_usual_one(place: Place) -> None:
    assert with_profile(place, "part").command[3:] == [*words(place), "--page-size", "64"]


@pytest.mark.parametrize(("name", "says"), [("measure", "is no server"), ("hole", "did you mean 'whole'?")])
def test_what_is_no_profile_for_a_server(place: Place, name: str, says: str) -> None:
    with pytest.raises(Refusal) as caught:
        with_profile(place, name)
    assert (caught.value.status, says in str(caught.value)) == (USAGE, True)


# --- the environment --------------------------------------------------------------------------------------------------


def test_the_servers_environment(place: Place) -> None:
    """SGLANG_PORT above all: sglang 0.5.9 would bind it for its own messages, before it serves on it."""
    ours = {name: "1" for name in options.VARIABLES if name not in ("SGLANG_MODEL", "SGLANG_EXTRA_ARGS",
            "SGLANG_PREFERRED_SAMPLING_PARAMS", "SGLANG_MODEL_ENV_FILE")}  # fmt: skip
    launch = plan(place, **ours, SGLANG_MODEL="a/b", SGLANG_EXTRA_ARGS="--x", SGLANG_MODEL_ENV_FILE="/x", HF_TOKEN="t",
                  SGLANG_ENABLE_JIT_DEEPGEMM="0", HF_HUB_OFFLINE="")  # fmt: skip
    assert launch.environ == {"HOME": place.environ["HOME"], "HF_TOKEN": "t", "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
                              "HF_HUB_OFFLINE": "", "PYTHONSAFEPATH": "1",
                              "WHEEL_COMPOSER_GPU_CHECK": "off"}  # fmt: skip


@pytest.mark.parametrize(("value", "set_"), [("0", True), ("false", True), ("1", False), (None, False)])
def test_who_means_xet(place: Place, value: str | None, set_: bool) -> None:
    environ = {} if value is None else {"HF_HUB_ENABLE_HF_TRANSFER": value}
    assert (plan(place, **environ).environ.get("HF_HUB_DISABLE_XET") == "1") == set_


def test_what_the_user_says_of_the_network_holds(place: Place) -> None:
    snapshot(place.bundled, "org/name")
    assert plan(place, SGLANG_MODEL="org/name", HF_HUB_OFFLINE="0").environ["HF_HUB_OFFLINE"] == "0"
    assert refusal(place, SGLANG_MODEL="org/absent", HF_HUB_OFFLINE="1").status == MODEL


def test_kubernetes_has_a_service_named_sglang(place: Place) -> None:
    launch = plan(place, SGLANG_PORT="tcp://10.0.0.1:30000")
    assert (launch.port, [one["id"] for one in launch.findings]) == (30000, ["serve.service-link"])


# --- the file of sglang-resolve-model ---------------------------------------------------------------------------------


def test_the_file_names_the_model_where_no_variable_does(place: Place, tmp_path: Path) -> None:
    folder = snapshot(place.bundled, "org/name")
    file = str(tmp_path / "x.env")
    given = Place(prefix=place.prefix, cache=place.cache, environ={**place.environ, "SGLANG_MODEL_ENV_FILE": file})
    record(resolve("org/name", given), given)
    launch = plan(place, SGLANG_MODEL_ENV_FILE=file)
    assert (launch.command[4], launch.command[10], launch.findings) == (str(folder), "org/name", [])
    assert refusal(place, SGLANG_MODEL_ENV_FILE=str(tmp_path / "absent")).status == USAGE


def test_a_file_as_the_reference_writes_it(place: Place, tmp_path: Path) -> None:
    """It tells which model is meant; where that is, is found again."""
    folder = snapshot(place.bundled, "org/name")
    (tmp_path / "x.env").write_text('# generated by sglang-resolve-model\nexport SGLANG_MODEL="/nix/store/x"\n'
                                    'export SGLANG_BUNDLED_FROM="org/name"\nexport HF_HUB_OFFLINE=1\n')  # fmt: skip
    assert plan(place, SGLANG_MODEL_ENV_FILE=str(tmp_path / "x.env")).command[4] == str(folder)


# --- the program ------------------------------------------------------------------------------------------------------

_PYTHON = "#!{python} -IS\nimport json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\nsys.exit(42)\n"


@pytest.fixture
def site(place: Place) -> Path:
    """The site-packages of a bundle that holds the programs, and whose interpreter shows what it was started with."""
    found = place.prefix / "lib/python3.12/site-packages"
    found.mkdir(parents=True)
    (found / "_compose").symlink_to(_ROOT / "composer/runtime")
    python = place.prefix / "bin/python3"
    python.parent.mkdir()
    python.write_text(_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return found


def run(site: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path.insert(0, {str(site)!r})\nfrom _compose.serve.cli import main\nsys.exit(main())"
    root = site.parents[3]
    environ = {"PATH": "/usr/bin", "HOME": str(root / "home"), "WHEEL_COMPOSER_CACHE": str(root / "cache"),
               "SGLANG_MODEL": "org/name", "WHEEL_COMPOSER_GPU_CHECK": "off", **environ}  # fmt: skip
    return subprocess.run([sys.executable, "-IS", "-c", code, *arguments], env=environ, cwd=root, text=True,
                          capture_output=True, check=False, timeout=60)  # fmt: skip


def test_the_server_takes_the_place_of_the_program(site: Path, place: Place) -> None:
    folder = snapshot(place.bundled, "org/name")
    done = run(site, SGLANG_PORT="3000", SGLANG_TP_SIZE="1")
    assert done.returncode == 42
    argv, environ = json.loads(done.stdout)
    assert argv == [str(place.prefix / "bin/python3"), "-m", "sglang.launch_server", "--model-path", str(folder),
                    "--host", "0.0.0.0", "--port", "3000", "--served-model-name", "org/name", "--tp-size", "1",
                    *_SAMPLING]  # fmt: skip
    assert [name for name in environ if name.startswith("SGLANG_")] == []
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert done.stderr == "SGLang server starting\n  model: org/name (bundled)\n  host: 0.0.0.0  port: 3000\n"


def test_dry_run_and_print_cmd(site: Path) -> None:
    done = run(site, "--dry-run", SGLANG_SERVED_NAME="it's")
    python = site.parents[2] / "bin/python3"
    command = [str(python), "-m", "sglang.launch_server", "--model-path", "org/name", "--host", "0.0.0.0",
               "--port", "30000", "--served-model-name", "it's", *_SAMPLING]  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == ("SGLang server starting\n  model: org/name (will download from HF)\n"
                           f"  host: 0.0.0.0  port: 30000\nCMD: {shlex.join(command)}\n")  # fmt: skip
    printed = run(site, "--print-cmd", SGLANG_SERVED_NAME="it's")
    assert (printed.returncode, printed.stderr) == (42, done.stderr)
    assert json.loads(printed.stdout)[0] == command


def test_json(site: Path) -> None:
    done = run(site, "--dry-run", "--json", "--", "--port", "8", SGLANG_PORT="9", HF_TOKEN="secret")
    report = json.loads(done.stdout)
    assert report["command"][-1] == DEFAULT_SAMPLING
    assert report["environment"] == {"set": {"PYTHONSAFEPATH": "1"}, "removed": ["SGLANG_MODEL", "SGLANG_PORT"]}
    assert report["model"] == {"asked": "org/name", "source": "hub", "path": "org/name"}
    assert report["port"] == {"port": 8, "host": "0.0.0.0"}
    assert [one["id"] for one in report["findings"]] == ["serve.override"]
    assert (report["schema"], report["status"]) == (1, 0)
    assert "secret" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environ", "status", "words_"),
    [
        (["--foo", "x"], {}, 2, "ERROR: Unknown flag: --foo (all sglang options are set via env vars)\n"),
        (["--dry"], {}, 2, "ERROR: Unknown flag: --dry (all"), (["x"], {}, 2, "ERROR: Unknown flag: x (all"),
        (["--profile"], {}, 2, "ERROR: sglang-serve: argument --profile: expected one argument\n  fix: See sglang"),
        ([], {"SGLANG_TP_SIZE": "foo"}, 2, "ERROR: SGLANG_TP_SIZE: 'foo' is no number of GPUs: 1 or more\n"),
        (["--strict", "--", "--port", "1"], {"SGLANG_PORT": "2"}, 2, "ERROR: --port 1 (--) takes the place"),
        ([], {"SGLANG_MODEL": "/no/such"}, 6, "ERROR: /no/such: there is no such folder\n  fix: Name one that"),
        (["--preflight"], {"SGLANG_HOST": "192.0.2.1"}, 1, "ERROR: 192.0.2.1:30000: cannot be bound: Cannot assign"),
    ],
)  # fmt: skip
def test_statuses(site: Path, arguments: list[str], environ: dict[str, str], status: int, words_: str) -> None:
    done = run(site, "--json", *arguments, **environ)
    assert done.stderr.startswith(words_)
    report = json.loads(done.stdout)
    assert (done.returncode, report["status"], report["findings"][0]["severity"]) == (status, status, "error")


def test_no_interpreter(site: Path) -> None:
    (site.parents[2] / "bin/python3").unlink()
    done = run(site)
    assert done.returncode == 1
    assert "bin/python3: cannot be started: No such file" in done.stderr


@pytest.mark.parametrize("how", [{"arguments": ["--preflight"]}, {"SGLANG_PREFLIGHT": "true"}])
def test_preflight_names_who_has_the_port(site: Path, how: dict[str, str | list[str]]) -> None:
    arguments = list(how.pop("arguments", []))
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = str(one.getsockname()[1])
        done = run(site, "--json", *arguments, SGLANG_PORT=port, **{name: str(value) for name, value in how.items()})
        assert done.returncode == 5
        assert f"Port {port} is already in use (set SGLANG_PORT to use a different port); by process" in done.stderr
        owner = json.loads(done.stdout)["port"]["owner"]
        assert (owner["pid"], owner["address"]) == (os.getpid(), "127.0.0.1")
        assert run(site, "--dry-run", SGLANG_PORT=port).returncode == 0
    done = run(site, "--json", "--dry-run", "--preflight", SGLANG_PORT=port)
    assert (done.returncode, json.loads(done.stdout)["port"]["free"]) == (0, True)


def test_preflight_of_a_port_that_nobody_listens_on(site: Path) -> None:
    """Bound, but not listened on: /proc does not show it."""
    with socket.socket() as one:
        one.bind(("0.0.0.0", 0))
        done = run(site, "--preflight", SGLANG_PORT=str(one.getsockname()[1]))
    assert (done.returncode, "does not tell by whom" in done.stderr) == (4, True)


def test_preflight_of_a_port_of_another_user(site: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to be another user")
    code = (
        "import socket; one = socket.create_server(('127.0.0.1', 0)); print(one.getsockname()[1], flush=True); input()"
    )
    with subprocess.Popen(["/usr/bin/env", "python3", "-IS", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, user=65534, cwd="/", env={"PATH": "/usr/bin:/bin"}) as process:  # fmt: skip
        assert process.stdout
        port = process.stdout.readline().strip()
        if not port:
            pytest.skip("no python3 that another user may run")
        done = run(site, "--preflight", SGLANG_PORT=port)
        process.communicate("\n")
    assert done.returncode == 3
    assert f"by process {process.pid} of nobody" in done.stderr


def test_gpus_that_do_not_suffice(site: Path, place: Place, tmp_path: Path) -> None:
    """As nvidia-smi shows them; NVML is made unusable where there is one."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver/libnvidia-ml.so.1").write_text("no library")
    program = tmp_path / "driver/nvidia-smi"
    rows = [
        f"{index}, GPU-{index}, NVIDIA A100, 81920, 81000, 30, 0, 0:{index}:0.0, 570.86.15, 8.0" for index in (0, 1)
    ]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    program.chmod(0o755)
    environ = {"LD_LIBRARY_PATH": str(tmp_path / "driver"), "PATH": f"{tmp_path / 'driver'}:/usr/bin:/bin"}

    def findings(*words: str, **more: str) -> list[str]:
        report = json.loads(run(site, "--dry-run", "--json", *words, **environ, **more).stdout)
        return [one["evidence"] for one in report["findings"]]

    assert findings(SGLANG_TP_SIZE="2") == []
    assert findings(SGLANG_TP_SIZE="4") == ["4 GPUs are asked for by SGLANG_TP_SIZE, and 2 can be seen"]
    assert findings(SGLANG_TP_SIZE="2", CUDA_VISIBLE_DEVICES="1") == [
        "2 GPUs are asked for by SGLANG_TP_SIZE, and 1 can be seen"]  # fmt: skip
    assert findings(SGLANG_TP_SIZE="16", SGLANG_EXTRA_ARGS="--nnodes 8") == []
    assert findings(SGLANG_MODEL="") == ["its weights are FP8 and need SM 89 or newer; NVIDIA A100 has SM 80"]
    write_profiles(place, 80, 90)
    assert findings("--profile", "part") == []
    assert findings("--profile", "hopper") == ["is for SM 90; NVIDIA A100 has SM 80"]


def test_a_host_without_a_gpu(site: Path, tmp_path: Path) -> None:
    """One error before anything is imported, with a status of its own; a dry run only says so."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver/libnvidia-ml.so.1").write_text("no library")
    smi = tmp_path / "driver/nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    environ = {"LD_LIBRARY_PATH": str(tmp_path / "driver"), "PATH": f"{tmp_path / 'driver'}:/usr/bin:/bin",
               "WHEEL_COMPOSER_GPU_CHECK": ""}  # fmt: skip
    if Path("/proc/driver/nvidia/gpus").exists() or Path("/proc/device-tree").exists():
        pytest.skip("needs a host without a GPU")
    done = run(site, "--json", **environ)
    assert done.returncode == 7
    assert done.stderr.startswith("ERROR: no GPU was found: there is no NVIDIA driver")
    assert "\n  fix: Use a host with an NVIDIA GPU" in done.stderr
    assert [one["id"] for one in json.loads(done.stdout)["findings"]] == ["serve.gpu"]
    assert run(site, "--", "--device", "cpu", **environ).returncode == 42
    assert run(site, "--", "--device", "cuda", **environ).returncode == 7
    assert run(site, "--dry-run", **environ).stderr.startswith("SGLang server starting\n")
    dry = run(site, "--dry-run", SGLANG_TP_SIZE="8", **environ)
    assert (dry.returncode, dry.stderr.startswith("WARNING: no GPU was found")) == (0, True)
    smi.write_text("#!/bin/sh\necho '0, GPU-0, NVIDIA H200, 81920, 81000, 30, 0, 0:0:0.0, 570.86.15, 9.0'\n")
    assert run(site, **environ).returncode == 42
    hidden = run(site, **environ, CUDA_VISIBLE_DEVICES="")
    assert (hidden.returncode, "CUDA_VISIBLE_DEVICES: '' hides every GPU" in hidden.stderr) == (7, True)

"""Flags and variables as they are read out of the real stack's source, against the real stack itself.

WHEEL_COMPOSER_TREE: an unpacked bundle for SM 90, to save building one. WHEEL_COMPOSER_BUNDLE: the bundle file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composer.formats.server_flags import Flag
from composer.model.profile import SERVER
from composer.proofs.launch import check_flags
from composer.steps.advise import Command, Request, advise, load_profiles, load_rules, of_profile, open_for
from composer.steps.stack import Stack

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "scripts/compose"
PROFILES = load_profiles()
#: The wiki's nine commands, and those that the real argparse of 0.5.9 refuses.
COMMANDS = [one for one in PROFILES.values() if one.kind == "command" and one.sm == (120,)]
BROKEN = {"qwen3.5-397b-nvfp4-4gpu-mtp-tuned", "glm5-nvfp4-mtp-8gpu", "glm5-nvfp4-8gpu-nomtp"}
#: Answers, in the bundle's Python, with what its parser is made of and what it says to each command line.
ASK = """
import argparse, json, sys
from sglang.srt.server_args import ServerArgs

class Refused(Exception):
    pass

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(message)

def plain(value):
    return value if value is None or isinstance(value, (bool, int, float, str)) else [plain(one) for one in value]

parser = Parser()
ServerArgs.add_cli_args(parser)
actions = [
    {"names": one.option_strings, "nargs": one.nargs, "required": one.required,
     "choices": None if one.choices is None else sorted(map(str, one.choices)),
     "kind": getattr(one.type, "__name__", "str")}
    for one in parser._actions if "--help" not in one.option_strings
]
verdicts = []
for argv in json.load(sys.stdin):
    try:
        parser.parse_args(argv)
        verdicts.append(None)
    except Refused as fault:
        verdicts.append(str(fault))
from sglang.srt import environ
variables = {name: [type(one).__name__.removeprefix("Env"), one.default]
             for name, one in vars(environ.Envs).items() if isinstance(one, environ.EnvField)}
print(json.dumps({"actions": actions, "verdicts": verdicts, "variables": variables}, default=str))
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if given := os.environ.get("WHEEL_COMPOSER_TREE"):
        yield Path(given)
        return
    folder = tmp_path_factory.mktemp("bundle")
    subprocess.run([COMPOSE, "build", "--sm", "90", "--isa", "avx512", "-o", folder], check=True)
    subprocess.run([COMPOSE, "unpack", "--any-host", *folder.glob("*.tar.zst"), folder / "prefix"], check=True)
    yield folder / "prefix"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stack(prefix: Path) -> Stack:
    return open_for(prefix, Command())


def command_lines(flags: tuple[Flag, ...]) -> list[list[str]]:
    """The profiles as they are and as they were, and thousands of made up ones: right, abbreviated and wrong."""
    made = [one.argv() for profile in PROFILES.values() for one in (profile, profile.as_referenced())
            if profile.module == SERVER]  # fmt: skip
    luck = random.Random(59)
    names = [name for flag in flags for name in flag.names]
    values = ["1", "-1", "0.5", "auto", "triton", "fp8", "qwen3", "{}", "[1]", "two words", "-x", "--", ""]
    for name in names:
        made += [[name], [name, "1"], [f"{name}=1"], [name[: luck.randrange(3, len(name) + 1)], "1"]]
    for flag in flags:
        made += [[flag.names[0], str(one)] for one in flag.choices or ()]
    for _ in range(3000):
        made.append([luck.choice(values + names * 1) for _ in range(luck.randrange(1, 5))])
    return [["--model-path", "m", *argv] if argv[:1] not in (["--model-path"], ["--model"]) else argv for argv in made]


@pytest.fixture(scope="module")
def asked(prefix: Path, stack: Stack) -> tuple[list[list[str]], dict[str, Any]]:
    """Every command line, and what the stack's own parser says to it."""
    lines = command_lines(stack.flags(SERVER))
    environment = {"PATH": os.defpath, "WHEEL_COMPOSER_GPU_CHECK": "off", "WHEEL_COMPOSER_HOST_CHECK": "off"}
    done = subprocess.run([prefix / "bin/python3", "-c", ASK], input=json.dumps(lines), capture_output=True, text=True,
                          env=environment, cwd="/")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return lines, json.loads(done.stdout.splitlines()[-1])


def test_every_flag_is_read_as_it_is_built(stack: Stack, asked: tuple[list[list[str]], dict[str, Any]]) -> None:
    kinds = {"str": "str", "int": "int", "float": "float", "loads": "json", "json_list_type": "json",
             "nullable_str": "str"}  # fmt: skip
    read = [
        {"names": list(one.names), "nargs": one.nargs, "required": one.required, "kind": one.kind,
         "choices": None if one.choices is None else sorted(map(str, one.choices))}
        for one in stack.flags(SERVER)
    ]  # fmt: skip
    built = [one | {"kind": kinds[one["kind"]]} for one in asked[1]["actions"]]
    assert read == built
    assert len(read) == 331
    assert not any(one.open_choices or one.kind == "open" for one in stack.flags(SERVER))


def test_the_real_parser_agrees_on_every_command_line(
    stack: Stack, asked: tuple[list[list[str]], dict[str, Any]]
) -> None:
    lines, answers = asked
    flags = stack.flags(SERVER)
    wrong = [
        (argv, verdict, check_flags(argv, flags).findings)
        for argv, verdict in zip(lines, answers["verdicts"], strict=True)
        if bool(check_flags(argv, flags).findings) != (verdict is not None)
    ]
    assert not wrong, (len(wrong), wrong[:3])
    refused = sum(verdict is not None for verdict in answers["verdicts"])
    assert refused > 1000
    assert len(lines) - refused > 500


def test_every_variable_is_read_as_it_is_declared(stack: Stack, asked: tuple[list[list[str]], dict[str, Any]]) -> None:
    declared = stack.readers([], {}, "sglang").declared
    built = asked[1]["variables"]
    assert {name: one.type for name, one in declared.items()} == {name: kind for name, (kind, _) in built.items()}
    assert len(built) == 209


def test_three_of_the_nine_referenced_commands_are_broken(stack: Stack) -> None:
    flags = stack.flags(SERVER)
    assert len(COMMANDS) == 9
    assert {one.name for one in COMMANDS if check_flags(one.as_referenced().argv(), flags).findings} == BROKEN


@pytest.mark.parametrize("name", PROFILES)
def test_what_is_shipped_is_valid(stack: Stack, name: str) -> None:
    """No error of a flag, and no variable that nobody reads; rules that are errors hold on what it was made for."""
    one = PROFILES[name]
    given: dict[str, Any] = {"topo.gpus": one.gpus} if one.gpus else {}
    given |= {"host.sm": one.sm[0]} if one.sm else {}
    if one.stack != "sglang":
        return
    advice = advise(load_rules(), Request(stack=stack, command=of_profile(one), given=given, phases=["launch"]))
    assert not advice.findings
    assert advice.errors == 0


def test_who_reads_a_variable(stack: Stack) -> None:
    owners = load_rules().tables.owners
    unread = ["SGLANG_DISABLE_DEEP_GEMM", "SGLANG_ENABLE_DEEP_GEMM", "SGLANG_DCP", "SAFETENSORS_FAST_GPU",
              "FLASHINFER_JIT_DIR", "NCCL_NO_SUCH_NAME"]  # fmt: skip
    read = ["SGLANG_ENABLE_JIT_DEEPGEMM", "SGLANG_PORT", "NCCL_GRAPH_FILE", "NCCL_P2P_LEVEL", "NCCL_MIN_NCHANNELS",
            "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "FLASHINFER_WORKSPACE_BASE", "HF_HUB_OFFLINE"]  # fmt: skip
    found = stack.readers([*unread, *read], owners, "sglang")
    assert found.unread == set(unread)
    assert found.read >= set(read)


def test_the_packed_bundle_tells_the_same(stack: Stack) -> None:
    if not (given := os.environ.get("WHEEL_COMPOSER_BUNDLE")):
        pytest.skip("WHEEL_COMPOSER_BUNDLE is not set")
    packed = open_for(Path(given), Command())
    assert packed.flags(SERVER) == stack.flags(SERVER)
    names, owners = ["NCCL_P2P_LEVEL", "SAFETENSORS_FAST_GPU", "SGLANG_DCP"], load_rules().tables.owners
    assert packed.readers(names, owners, "sglang") == stack.readers(names, owners, "sglang")

"""A command line read out of a program's source, against the argparse that the same source builds."""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composer.errors import VerifyError
from composer.formats.server_flags import quoted_names, read_flags, read_variables
from composer.model.rule import Value
from composer.proofs.launch import Readers, check_flags, check_variables, read_plainly

SHARED = """
LEVELS = ["low", "high"]
class Parsers:
    Known: dict = {"a-one": Parser, "b-two": Parser}
"""
SERVER = """
import argparse, json
from app.shared import LEVELS as NAMES, Parsers

MORE = [*NAMES, "top"]
DTYPES = {"auto", "half"}

class Old(argparse.Action):
    def __init__(self, option_strings, dest, nargs=0, **kwargs):
        super().__init__(option_strings, dest, nargs=nargs, **kwargs)
    def __call__(self, parser, namespace, values, option_string=None):
        pass

class Keep(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)

class ServerArgs:
    port: int = 30000
    EXTRA = MORE + ["extra"]

    @staticmethod
    def add_cli_args(parser):
        parsers = list(Parsers.Known.keys())
        parser.add_argument("--model-path", "--model", type=str, required=True)
        parser.add_argument("--port", type=int, default=ServerArgs.port)
        parser.add_argument("--fraction", type=float)
        parser.add_argument("--tp-size", "--tensor-size", type=int)
        parser.add_argument("--pp-size", type=int)
        parser.add_argument("--pp-depth", type=int, choices=[1, 2])
        parser.add_argument("--level", choices=MORE)
        parser.add_argument("--extra", type=str, choices=ServerArgs.EXTRA)
        parser.add_argument("--dtype", type=str, choices=DTYPES)
        parser.add_argument("--tool-parser", choices=parsers)
        parser.add_argument("--config", type=json.loads)
        parser.add_argument("--sizes", type=int, nargs="+")
        parser.add_argument("--paths", type=str, nargs="*", action=Keep)
        parser.add_argument("--check", nargs="?", const="")
        parser.add_argument("--trust", action="store_true")
        parser.add_argument("--trust-remote", action="store_true")
        parser.add_argument("--old", action=Old, help="gone")

def prepare(argv):
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(argv)
"""
LAUNCH = "import sys\nfrom app.server import prepare\nif __name__ == '__main__':\n    prepare(sys.argv[1:])\n"
SOURCES = {"app.shared": SHARED, "app.server": SERVER, "app.launch": LAUNCH}
FLAGS = read_flags(SOURCES.get, "app.launch")
NAMES = [name for flag in FLAGS for name in flag.names]


class Refused(Exception):
    """argparse would exit."""


class Strict(argparse.ArgumentParser):
    """argparse that raises where it would exit, also after help."""

    def error(self, message):
        raise Refused(message)

    def exit(self, status=0, message=None):
        raise Refused("exit") if status else SystemExit(status)

    def print_help(self, file=None):
        pass


@pytest.fixture(scope="module")
def real():
    """The parser that the source builds when it runs."""
    shared = {"Parser": object}
    exec(SHARED, shared)
    sys.modules["app"], sys.modules["app.shared"] = SimpleNamespace(), SimpleNamespace(
        LEVELS=shared["LEVELS"], Parsers=shared["Parsers"])  # fmt: skip
    server: dict = {"__name__": "app.server"}
    exec(SERVER, server)
    del sys.modules["app"], sys.modules["app.shared"]
    parser = Strict()
    server["ServerArgs"].add_cli_args(parser)
    return parser


def test_what_is_read_is_what_is_built(real):
    built = [action for action in real._actions if action.dest != "help"]
    assert [flag.names for flag in FLAGS] == [tuple(one.option_strings) for one in built]
    assert [flag.choices and sorted(flag.choices) for flag in FLAGS] == [
        None if one.choices is None else sorted(one.choices) for one in built]  # fmt: skip
    assert [flag.nargs for flag in FLAGS] == [one.nargs for one in built]
    assert [flag.required for flag in FLAGS] == [one.required for one in built]
    assert not any(flag.open_choices for flag in FLAGS)
    assert {flag.names[0]: flag.kind for flag in FLAGS if flag.kind != "str"} == {
        "--port": "int", "--fraction": "float", "--tp-size": "int", "--pp-size": "int", "--pp-depth": "int",
        "--config": "json", "--sizes": "int"}  # fmt: skip


WORDS = st.one_of(
    st.sampled_from([*NAMES, "--tp", "--pp", "--pp-d", "--mod", "--trust", "--tr", "-h", "--nope", "--port=1", "--tp=x",
                     "--trust=1", "--sizes=3", "--check=", "--", "-", "", "-1", "-1.5", "-x", "-x y", "--a b", "4",
                     "1e3", "auto", "top", "a-one", "{}", '{"a": 1}', "two words", "1", "2"]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(words=st.lists(WORDS, max_size=7))
@example(words=["--tp", "8"])
@example(words=["--tp-size", "-1"])
@example(words=["--sizes", "1", "2", "--trust", "3"])
@example(words=["--paths", "--port", "1"])
@example(words=["--check", "x", "y"])
@example(words=["--old", "x"])
@example(words=["--sizes=3", "4"])
@example(words=["--model", "a", "--model-path", "b"])
def test_argparse_agrees(real, words):
    argv = ["--model", "m", *words]
    if any(word.startswith("-h") or ("--help".startswith(word.partition("=")[0]) and len(word) > 2) for word in words):
        return  # help ends the program at once, whatever follows
    found = check_flags(argv, FLAGS)
    try:
        built = vars(real.parse_args(argv))
    except Refused:
        assert found.findings, argv
        return
    assert not found.findings, argv
    for flag in FLAGS:
        if flag.names[0] in found.values and flag.names[0] != "--old":
            dest = flag.names[0][2:].replace("-", "_")
            value = "" if flag.nargs == "?" and found.values[flag.names[0]] is True else found.values[flag.names[0]]
            assert _as_given(built[dest], value) == value, argv


def _as_given(built: object, value: Value) -> object:
    return json.dumps(built) if isinstance(built, dict) and isinstance(value, str) else built


@pytest.mark.parametrize(("argv", "kind", "subject", "says"), [
    (["--prot", "1"], "flags.unknown", "--prot", "Did you mean --port?"),
    (["--pp", "1"], "flags.ambiguous", "--pp", "Write out --pp-size."),
    (["--level", "hihg"], "flags.choice", "--level", "Did you mean high?"),
    (["--dtype", "x"], "flags.choice", "--dtype", "Choose from auto, half."),
    (["--pp-depth", "3"], "flags.choice", "--pp-depth", "Choose from 1, 2."),
    (["--port", "http"], "flags.type", "--port", "a whole number"),
    (["--fraction", "most"], "flags.type", "--fraction", "a number"),
    (["--config", "{"], "flags.type", "--config", "JSON"),
    (["--port"], "flags.count", "--port", "one value"),
    (["--sizes"], "flags.count", "--sizes", "one value or more"),
    (["--trust=1"], "flags.count", "--trust", "no value"),
    (["--port", "1", "2"], "flags.stray", "2", "Quote"),
    (["--"], "flags.stray", "--", "Quote"),
])  # fmt: skip
def test_each_fault_has_a_name_and_a_fix(argv, kind, subject, says):
    (found,) = check_flags(["--model", "m", *argv], FLAGS).findings
    assert (found.id, found.severity, found.subject) == (kind, "error", subject)
    assert says in f"{found.fix}"


def test_all_faults_are_found_at_once():
    found = check_flags(["--nope", "--pp", "2", "--port", "x", "--level", "y"], FLAGS)
    assert [one.id for one in found.findings] == [
        "flags.unknown", "flags.ambiguous", "flags.type", "flags.choice", "flags.required"]  # fmt: skip


def test_values_stand_under_every_name_and_unknown_flags_too():
    found = check_flags(["--model", "m", "--tp", "8", "--sizes", "1", "2", "--trust", "--nope", "v", "--not"], FLAGS)
    assert found.values == {
        "--model": "m", "--model-path": "m", "--tp-size": 8, "--tensor-size": 8, "--sizes": [1, 2], "--trust": True,
        "--nope": "v", "--not": True,
    }  # fmt: skip


def test_without_a_parser_flags_are_read_plainly():
    assert read_plainly(["x", "--tp", "8", "--trust", "--a=b=c", "--e=", "--last"]) == {
        "--tp": "8", "--trust": True, "--a": "b=c", "--e": "", "--last": True}  # fmt: skip


def test_what_is_not_literal_is_left_open():
    text = SERVER.replace("choices=MORE)", "choices=compute())").replace("type=float", "type=fraction_of")
    flags = {flag.names[0]: flag for flag in read_flags((SOURCES | {"app.server": text}).get, "app.launch")}
    assert flags["--level"].open_choices
    assert flags["--fraction"].kind == "open"
    assert not check_flags(["--model", "m", "--level", "any", "--fraction", "x"], list(flags.values())).findings


def test_constants_that_refer_to_each_other_end():
    text = SERVER.replace('MORE = [*NAMES, "top"]', "MORE = LESS\nLESS = MORE")
    flags = {flag.names[0]: flag for flag in read_flags((SOURCES | {"app.server": text}).get, "app.launch")}
    assert flags["--level"].open_choices


@pytest.mark.parametrize(("sources", "module", "says"), [
    ({}, "app.launch", "is not in the bundle"),
    ({"app.launch": "print(1)"}, "app.launch", "builds no command line"),
    ({"app.launch": "def f(:"}, "app.launch", "is no Python source"),
    ({"app.launch": "x = 1\x00"}, "app.launch", "is no Python source"),
    ({"app.launch": f"x = {'-' * 200_000}1"}, "app.launch", "is no Python source"),
    ({"app.launch": "from app.server import A\nA.add_cli_args(p)", "app.server": "A = 1"}, "app.launch", "has no A."),
])  # fmt: skip
def test_a_source_that_cannot_be_read(sources, module, says):
    with pytest.raises(VerifyError, match=says):
        read_flags(sources.get, module)


ENVIRON = '''
"""SGLANG_IN_A_DOCSTRING"""
class Envs:
    SGLANG_ON = EnvBool(False)
    SGLANG_SIZE = EnvInt(2 ** 31)
    SGLANG_RATE = EnvFloat(0.7)
    SGLANG_DIR = EnvStr("/tmp")
    other = 1
'''


def test_variables_that_a_class_declares():
    found = {one.name: (one.type, one.default) for one in read_variables(ENVIRON, "environ")}
    assert found == {"SGLANG_ON": ("Bool", "False"), "SGLANG_SIZE": ("Int", "2 ** 31"),
                     "SGLANG_RATE": ("Float", "0.7"), "SGLANG_DIR": ("Str", "'/tmp'")}  # fmt: skip


def test_names_in_quotes():
    text = b'os.environ["AN_ENV"]; get(\'B_ENV\'); # C_ENV\n"D_ENV\'; \'lower\'; "E ENV"; f("F_ENV=1")'
    assert quoted_names(text) == {"AN_ENV", "B_ENV"}


def readers():
    declared = {one.name: one for one in read_variables(ENVIRON, "environ")}
    return Readers(declared=declared, read=frozenset({"NCCL_X", "SGLANG_ON"}), renamed={"SGL_": "SGLANG_"},
                   unread=frozenset({"SGLANG_SIEZ", "SAFETENSORS_FAST"}), names=frozenset(declared))  # fmt: skip


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("SGLANG_ON", "yes", []), ("SGLANG_ON", "FALSE", []), ("NCCL_X", "1", []), ("ELSEWHERE", "1", []),
    ("SGLANG_DIR", "", []), ("SGLANG_SIZE", " 12 ", []),
    ("SGLANG_SIEZ", "1", [("environment.unread", "warning", "Did you mean SGLANG_SIZE?")]),
    ("SGL_SIEZ", "1", [("environment.unread", "warning", "Did you mean SGLANG_SIZE?")]),
    ("SAFETENSORS_FAST", "1", [("environment.unread", "warning", "Drop it.")]),
    ("SGL_ON", "1", [("environment.renamed", "note", "Write SGLANG_ON.")]),
    ("SGLANG_ON", "maybe", [("environment.value", "warning", "Set it to one of true, 1, yes, y, false, 0, no, n.")]),
    ("SGLANG_SIZE", "1.5", [("environment.value", "warning", "Set it to a whole number.")]),
    ("SGLANG_RATE", "fast", [("environment.value", "warning", "Set it to a number.")]),
])  # fmt: skip
def test_a_variable(name, value, expected):
    found = check_variables({name: value}, readers())
    assert [(one.id, one.severity, one.fix) for one in found] == expected
    assert all(one.subject == name for one in found)

"""Flags that a class declares as fields: what is read of the source is what argparse gets when the source runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from composer.formats.server_flags import Flag, read_flags

#: As small as shows how SGLang 0.5.23 makes flags of fields.
UTILS = """
import argparse, json
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

A = Annotated

@dataclass
class Arg:
    help: str = ""
    choices: Any = None
    aliases: Any = None
    cli_name: Any = None
    type_parser: Any = None
    nargs: Any = None
    required: Any = None
    action: Any = None
    action_kwargs: Any = None
    no_cli: bool = False

class Keep(argparse.Action):
    def __init__(self, option_strings, dest, nargs=0, **kwargs):
        super().__init__(option_strings, dest, nargs=nargs, **kwargs)
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)

def collect_input_fields(sources):
    hints, defaults = {}, {}
    for source in sources:
        hints |= get_type_hints(source, include_extras=True)
        defaults |= {name: value for name, value in vars(source).items() if not name.startswith("__")}
    return hints, defaults

def add_cli_args_from_dataclass(parser, cls):
    for name, hint in cls.hints.items():
        kind, *said = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not said:
            continue
        arg = said[0] if isinstance(said[0], Arg) else Arg(help=said[0])
        if arg.no_cli:
            continue
        names = [arg.cli_name or "--" + name.replace("_", "-"), *(arg.aliases or [])]
        if arg.action:
            parser.add_argument(*names, action=arg.action, **(arg.action_kwargs or {}))
            continue
        others = [one for one in get_args(kind) if one is not type(None)]
        if type(None) in get_args(kind) and len(others) == 1:
            kind = others[0]
        told = lambda one: one if one in (str, int, float) else str
        if get_origin(kind) is Literal:
            parser.add_argument(*names, type=type(others[0]), choices=arg.choices or others)
        elif get_origin(kind) is list and arg.type_parser is None:
            more = {"choices": arg.choices} if arg.choices else {}
            parser.add_argument(*names, type=told(get_args(kind)[0]), nargs=arg.nargs or "+", **more)
        elif kind is bool:
            parser.add_argument(*names, action="store_true")
        else:
            more = {"nargs": arg.nargs} if arg.nargs else {}
            more["required"] = arg.required is True or (arg.required is None and name not in cls.defaults)
            parser.add_argument(*names, type=arg.type_parser or told(kind), choices=arg.choices, **more)
"""
FIELDS = """
import argparse, json
from typing import List, Literal, Optional, Union
from app.utils import A, Arg, Keep

LEVELS = ["low", "high"]

class Model:
    _PATH = "model"
    model_path: A[str, Arg(help="where", aliases=["--model"])]
    plain: int = 1
    count: A[int, "how many"] = 1
    rate: A[Optional[float], "how fast"] = None
    level: A[Union[str, None], Arg(help="which", choices=LEVELS)] = None
    other: A[str | None, "a text " + "in parts"] = None
    mixed: A[Union[int, str], "read as text"] = 0
    mode: A[Literal["a", "b"], Arg(help="which")] = "a"
    step: A[Literal[1, 2], "which number"] = 1

class Rest:
    on: A[bool, "a switch"] = False
    both: A[bool, Arg(help="two ways", action=argparse.BooleanOptionalAction)] = True
    kept: A[str, Arg(help="an action", action=Keep, action_kwargs={"nargs": "*"})] = None
    gone: A[str, Arg(help="an action with values of its own", action=Keep)] = None
    hidden: A[str, Arg(help="no flag", no_cli=True)] = ""
    tp_size: A[int, Arg(help="another name", cli_name="--tensor-size", aliases=["--tp-size"])] = 1
    sizes: A[Optional[List[int]], "several"] = None
    names: A[List[str], Arg(help="none or more", nargs="*", choices=LEVELS)] = None
    config: A[Optional[List[str]], Arg(help="as JSON", type_parser=json.loads)] = None
    optional: A[str, Arg(help="not needed", required=False)]
"""
SERVER = """
from app.fields import Model, Rest
from app.utils import Keep, add_cli_args_from_dataclass, collect_input_fields

class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        add_cli_args_from_dataclass(parser, ServerArgs)
        parser.add_argument("--old", action=Keep, help="gone")

_SPACES = [Model, Rest]
ServerArgs.hints, ServerArgs.defaults = collect_input_fields(_SPACES)
"""
LAUNCH = "from app.server import ServerArgs\nServerArgs.add_cli_args(None)\n"
SOURCES = {"app.utils": UTILS, "app.fields": FIELDS, "app.server": SERVER, "app.launch": LAUNCH}


@pytest.fixture
def built() -> Iterator[list[argparse.Action]]:
    """What argparse gets when the sources run."""
    names = ["app", *(name for name in SOURCES if name != "app.launch")]
    for name in names:
        sys.modules[name] = ModuleType(name)
        exec(SOURCES.get(name, ""), vars(sys.modules[name]))
    parser = argparse.ArgumentParser(add_help=False)
    sys.modules["app.server"].ServerArgs.add_cli_args(parser)  # type: ignore[attr-defined]
    yield parser._actions
    for name in names:
        del sys.modules[name]


def test_what_is_read_is_what_is_built(built: list[argparse.Action]) -> None:
    flags = read_flags(SOURCES.get, "app.launch")
    wanted = [(tuple(one.option_strings), one.nargs, one.choices and list(one.choices), one.required) for one in built]
    assert [(one.names, one.nargs, one.choices and list(one.choices), one.required) for one in flags] == wanted
    assert len(flags) == 18
    assert {one.names[0]: one.kind for one in flags if one.kind != "str"} == {
        "--count": "int", "--step": "int", "--rate": "float", "--tensor-size": "int", "--sizes": "int",
        "--config": "json",
    }  # fmt: skip


def flag(field: str) -> Flag:
    text = f"from app.utils import A, Arg\nclass Model:\n    {field}\nclass Rest:\n    pass\n"
    return read_flags((SOURCES | {"app.fields": text}).get, "app.launch")[0]


@pytest.mark.parametrize("field", [
    "x: int = 1", "x: A[int] = 1", "x: B[int, 'help'] = 1", "x: A[int, Other(help='')] = 1", "x = 1",
])  # fmt: skip
def test_what_is_no_flag(field: str) -> None:
    assert flag(field).names == ("--old",)


@pytest.mark.parametrize("field", [
    "x: A[()] = 1", "x: A[str, Arg(help='', cli_name=found())] = ''", "x: A[str, Arg(cli_name=found())]",
])  # fmt: skip
def test_a_flag_whose_name_cannot_be_read_is_not_told(field: str) -> None:
    assert flag(field).names == ("--old",)


@pytest.mark.parametrize("said", [
    "A[str, Arg(aliases=found())]", "A[str, Arg(aliases=None)]", "A[str, Arg(aliases=3)]", "A[Literal[()], Arg()]",
    "A[Optional[()], Arg()]",
])  # fmt: skip
def test_what_the_source_does_not_tell_is_passed_over(said: str) -> None:
    assert flag(f"x: {said} = ''").names == ("--x",)


@pytest.mark.parametrize("choices", ["found()", "3", "'ab'", "(*found(),)"])
def test_choices_that_are_no_list_are_left_open(choices: str) -> None:
    found = flag(f"x: A[str, Arg(choices={choices})] = ''")
    assert (found.choices, found.open_choices) == (None, True)


def test_a_name_that_two_modules_import_from_each_other_is_left_open() -> None:
    text = "from app.utils import A, Arg\nfrom app.rest import many\nclass Rest:\n    pass\nclass Model:\n    "
    circle = {"app.fields": f"{text}x: A[str, Arg(choices=many)] = ''\n", "app.rest": "from app.fields import many\n"}
    assert read_flags((SOURCES | circle).get, "app.launch")[0].open_choices


def test_what_is_not_literal_is_left_open() -> None:
    assert flag("x: A[str, Arg(help='', choices=found())] = ''").open_choices
    assert flag("x: A[str, Arg(help='', type_parser=own)] = ''").kind == "open"


def test_a_gathered_class_that_the_program_lacks_declares_nothing() -> None:
    sources = {name: text for name, text in SOURCES.items() if name != "app.fields"}
    assert [one.names for one in read_flags(sources.get, "app.launch")] == [("--old",)]

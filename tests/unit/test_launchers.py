"""Launchers and activate files, run by the shells that a host may have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from composer.errors import RecipeError, WheelError
from composer.launchers import activate_scripts, rewrite_script, script_launcher

SHOW = """
import json, os, sys
class Group:
    @staticmethod
    def main():
        names = ("PYTHONHOME", "PYTHONPATH", "PYTHONNOUSERSITE", "COLOUR", "PLACE", "PYTHONUTF8")
        print(json.dumps([sys.argv, {name: os.environ.get(name) for name in names}]))
        return 7
"""
SEARCH = "/usr/bin:/bin:/usr/sbin"
PLACES = ["plain", "with space and ünïcödé $HOME 'q\" `x`", "/".join(["deep" * 10] * 5)]


def bundle(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
    (folder / "bin" / "show_arguments.py").write_text(SHOW)
    return folder


def install(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o755)
    return path


def launch(*argv: str | Path, cwd: Path | None = None, **env: str) -> tuple[int, list, str]:
    done = subprocess.run([*map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True, timeout=20)
    return done.returncode, json.loads(done.stdout) if done.stdout else [], done.stderr


@pytest.fixture(params=PLACES, ids=["plain", "odd", "long"])
def prefix(request, tmp_path) -> Path:
    return bundle(tmp_path / request.param)


def test_script_runs_with_an_empty_environment_and_passes_everything_on(prefix):
    script = install(prefix / "bin" / "show", script_launcher("show_arguments", "Group.main"))
    code, (argv, _), _ = launch(script, "a b", "", "*", "-x")
    assert code == 7
    assert argv == [str(script), "a b", "", "*", "-x"]


def test_script_runs_through_links_and_by_a_relative_path(prefix, tmp_path):
    script = install(prefix / "bin" / "show", script_launcher("show_arguments", "Group.main"))
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "first").symlink_to(os.path.relpath(script, outside))
    (outside / "second").symlink_to("first")
    assert launch(outside / "second", PATH=SEARCH)[0] == 7
    assert launch("./show", cwd=script.parent)[0] == 7
    assert launch("sh", "show", cwd=script.parent, PATH=SEARCH)[0] == 7


def test_script_survives_a_move_of_its_tree(tmp_path):
    prefix = bundle(tmp_path / "first")
    install(prefix / "bin" / "show", script_launcher("show_arguments", "Group.main"))
    prefix.rename(tmp_path / "second one")
    assert launch(tmp_path / "second one" / "bin" / "show")[0] == 7


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox", "zsh"])
def test_script_text_is_good_for_every_sh(shell, tmp_path):
    program = shutil.which(shell)
    if not program:
        pytest.skip(f"no {shell}")
    script = install(bundle(tmp_path) / "bin" / "show", script_launcher("show_arguments", "Group.main"))
    words = [program, "sh"] if shell == "busybox" else [program]
    assert launch(*words, script)[0] == 7


def test_other_pythons_settings_do_not_reach_the_bundle(prefix):
    script = install(prefix / "bin" / "show", script_launcher("show_arguments", "Group.main"))
    _, (_, env), _ = launch(script, PYTHONHOME="/nonexistent", PYTHONPATH="/nonexistent", PYTHONUTF8="1")
    assert env["PYTHONHOME"] is None
    assert env["PYTHONPATH"] is None
    assert env["PYTHONNOUSERSITE"] == "1"
    assert env["PYTHONUTF8"] == "1"


def test_environment_is_a_default_that_the_caller_overrides(prefix):
    values = {"COLOUR": "it'''s $red & `x`", "PLACE": "{prefix}/lib"}
    script = install(prefix / "bin" / "show", script_launcher("show_arguments", "Group.main", values))
    _, (_, env), _ = launch(script)
    assert (env["COLOUR"], env["PLACE"]) == (values["COLOUR"], f"{prefix}/lib")
    _, (_, env), _ = launch(script, COLOUR="")
    assert env["COLOUR"] == ""


@pytest.mark.parametrize("place", ["a:b", "../x", "a b", "a;b", "", "class", "a..b", "a\nb"])
def test_entry_point_that_is_not_two_dotted_names_is_refused(place):
    with pytest.raises(WheelError, match="entry point"):
        script_launcher(place, "main")
    with pytest.raises(WheelError, match="entry point"):
        script_launcher("module", place)


@pytest.mark.parametrize("value", ["back\\slash", "line\nbreak", "nul\0"])
def test_environment_that_would_break_out_of_the_text_is_refused(value):
    with pytest.raises(RecipeError):
        script_launcher("module", "main", {"NAME": value})
    with pytest.raises(RecipeError):
        script_launcher("module", "main", {"NA ME": "value"})


@pytest.mark.parametrize(
    "shebang",
    [
        b"#!python", b"#!pythonw", b"#!/usr/bin/env python3", b"#!/usr/bin/env -S python3", b"#! /usr/bin/python3.12",
        b"#!/somebody's own/python", b'#!"/a folder/bin/python"', b"#!python\r",
    ],
)  # fmt: skip
def test_python_shebang_is_made_relative(shebang, tmp_path):
    body = b'"""Documented."""\nfrom __future__ import annotations\nfrom show_arguments import Group\nGroup.main()\n'
    script = install(bundle(tmp_path) / "bin" / "tool", rewrite_script(shebang + b"\n" + body))
    code, (argv, _), _ = launch(script, "x")
    assert (code, argv) == (0, [str(script), "x"])
    assert script.read_bytes().endswith(body)


def test_docstring_of_a_script_stays_part_of_its_documentation(tmp_path):
    text = b"#!python\n#: comment\n'Use me.'\nimport json\nprint(json.dumps(__doc__))\n"
    script = install(bundle(tmp_path) / "bin" / "tool", rewrite_script(text))
    assert launch(script)[1].endswith("Use me.")


def test_encoding_and_options_of_a_script_are_kept(tmp_path):
    text = "#!/usr/bin/python3 -u -B\n# -*- coding: latin-1 -*-\n\n# é\nimport sys\n"
    text += "print([ord('é'), sys.flags.dont_write_bytecode])\n"
    script = install(bundle(tmp_path) / "bin" / "tool", rewrite_script(text.encode("latin-1")))
    assert launch(script)[1] == [0xE9, 1]


@pytest.mark.parametrize(
    "content", [b"#!/bin/sh\necho\n", b"\x7fELF\x02", b"", b"print()\n", b"#!/usr/bin/perl\npython"]
)
def test_what_is_no_python_script_is_left_alone(content):
    assert rewrite_script(content) == content


@pytest.mark.parametrize("options", [b"-c 'import os'", b"-X dev", b"; rm -rf x", b"$(x)", b"--x"])
def test_options_that_would_be_words_of_a_command_are_refused(options):
    with pytest.raises(WheelError, match="options"):
        rewrite_script(b"#!/usr/bin/python " + options + b"\n")


VALUES = {"COLOUR": "it's $red & `x` !y \\z", "PLACE": "{prefix}/lib", "EMPTY": ""}
QUERY = '"$COLOUR|$PLACE|$PATH"'


def source(shell: list[str], text: str, prefix: Path, cwd: Path, **env: str) -> list[str]:
    for path, content in activate_scripts("stack-1.0", VALUES).items():
        (prefix / path).write_bytes(content)
    environ = {"PATH": SEARCH, "HOME": str(cwd), "TERM": "dumb", "COLOUR": "before", **env}
    done = subprocess.run([*shell, text], cwd=cwd, env=environ, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def expected(prefix: Path) -> list[str]:
    inside = f"it's $red & `x` !y \\z|{prefix}/lib|{prefix}/bin:{SEARCH}|unset|{prefix}/bin/python3"
    return [inside, f"before||{SEARCH}|/kept|None"]


def quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "'\\''") + "'"


SH_SHOW = """printf '%s|%s|%s|%s|%s\\n' "$COLOUR" "${PLACE-}" "$PATH" "${PYTHONPATH-unset}" "$(command -v python3)" """


@pytest.mark.parametrize("shell", ["bash", "zsh", "dash"])
def test_activate_and_deactivate_in_sh(shell, prefix, tmp_path):
    program = shutil.which(shell)
    if not program:
        pytest.skip(f"no {shell}")
    hint = {"COMPOSE_PREFIX": str(prefix)} if shell == "dash" else {}
    text = f". {quoted(prefix / 'bin' / 'activate')}\n{SH_SHOW}\ndeactivate\n{SH_SHOW}"
    options = ["-f"] if shell == "zsh" else []
    lines = source([program, *options, "-euc"], text, prefix, tmp_path, PYTHONPATH="/kept", **hint)
    assert lines[0] == expected(prefix)[0]
    assert lines[1].startswith(f"before||{SEARCH}|/kept|")
    assert str(prefix) not in lines[1]


def test_activate_twice_then_once_off_in_bash_leaves_nothing(prefix, tmp_path):
    text = (
        "before=$(set); cd bin; . ./activate; . ./activate; deactivate; compgen -v | grep -i compose; type deactivate"
    )
    lines = source(["bash", "-c"], f"{text} 2>&1 | tail -1", prefix, prefix)
    assert lines == ["bash: line 1: type: deactivate: not found"]


def test_activate_through_a_link_to_the_prefix_keeps_the_link(tmp_path):
    prefix = bundle(tmp_path / "releases" / "1")
    (tmp_path / "current").symlink_to("releases/1")
    (tmp_path / "on").symlink_to("current/bin/activate")
    lines = source(["bash", "-c"], f". {tmp_path}/current/bin/activate; echo $COMPOSE_PREFIX", prefix, tmp_path)
    assert lines == [f"{tmp_path}/current"]
    lines = source(["bash", "-c"], f". {tmp_path}/on; echo $COMPOSE_PREFIX", prefix, tmp_path)
    assert lines == [str(prefix)]


def test_dash_without_a_hint_says_what_to_do(tmp_path):
    if not shutil.which("dash"):
        pytest.skip("no dash")
    prefix = bundle(tmp_path / "bundle")
    lines = source(["dash", "-c"], f". {prefix}/bin/activate 2>&1 || echo $?", prefix, tmp_path)
    assert lines == [
        "activate: cannot tell where the bundle is: set COMPOSE_PREFIX to its folder and source this again",
        "1",
    ]


FISH_SHOW = """printf '%s|%s|%s|%s|%s\\n' "$COLOUR" "$PLACE" (string join : $PATH) \
(set -q PYTHONPATH; and echo $PYTHONPATH; or echo unset) (command -v python3; or echo None)"""


def test_activate_and_deactivate_in_fish(prefix, tmp_path):
    if not shutil.which("fish"):
        pytest.skip("no fish")
    path = "'" + str(prefix / "bin" / "activate.fish").replace("\\", "\\\\").replace("'", "\\'") + "'"
    text = f"source {path}\n{FISH_SHOW}\ndeactivate\n{FISH_SHOW}"
    lines = source(["fish", "--no-config", "-c"], text, prefix, tmp_path, PYTHONPATH="/kept")
    assert lines[0] == expected(prefix)[0]
    assert lines[1].startswith(f"before||{SEARCH}|/kept|")


CSH_SHOW = """printf '%s|%s|%s\\n' "$COLOUR:q" "$PATH:q" "`printenv PLACE; printenv PYTHONPATH`" """


@pytest.mark.parametrize("place", ["plain", "with space and ünïcödé"])
def test_activate_and_deactivate_in_csh(place, tmp_path):
    if not shutil.which("tcsh"):
        pytest.skip("no tcsh")
    prefix = bundle(tmp_path / place)
    text = f"source '{prefix}/bin/activate.csh'\n{CSH_SHOW}\ndeactivate\n{CSH_SHOW}\n"
    hint = {"COMPOSE_PREFIX": str(prefix), "PYTHONPATH": "/kept"}
    lines = source(["tcsh", "-f", "-c"], text, prefix, tmp_path, **hint)
    assert lines == [
        f"it's $red & `x` !y \\z|{prefix}/bin:{SEARCH}|{prefix}/lib",
        f"before|{SEARCH}|/kept",
    ]


@pytest.mark.parametrize("name", ["", "a b", "$(x)", "x'y", "-x", "a\nb"])
def test_name_that_a_prompt_could_run_is_refused(name):
    with pytest.raises(RecipeError):
        activate_scripts(name, {})
    with pytest.raises(RecipeError):
        activate_scripts("name", {"X": "line\nbreak"})

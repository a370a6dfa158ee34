"""Launchers, activate files and etc/env, run by the shells that a host may have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from composer.errors import RecipeError, WheelError
from composer.launchers import activate_scripts, env_file, rewrite_script, script_launcher

RUNTIME = Path(__file__).parents[2] / "composer/runtime"
MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"

SHOW = """
import json, os, sys
class Group:
    @staticmethod
    def main():
        names = ("PYTHONHOME", "PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONUTF8")
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


def test_only_a_program_that_tells_what_the_host_is_runs_below_the_floors(prefix):
    """With the real check of floors, as a .pth file runs it: compose-detect's output is what `compose select` wants."""
    site = prefix / "lib/site"
    shutil.copytree(RUNTIME, site / "_compose", ignore=shutil.ignore_patterns("__pycache__"))
    (prefix / "share/compose").mkdir(parents=True)
    (prefix / "share/compose/floors").write_text("small\nglibc\t9.99\tlibc.so.6\n")
    (prefix / "bin/floored.py").write_text(f"""
import sys; sys.path.insert(0, {str(site)!r})
import _compose
_compose.PREFIX = {str(prefix)!r}
import _compose.floors
from show_arguments import Group
""")
    detect = install(prefix / "bin/detect", script_launcher("floored", "Group.main", any_host=True))
    other = install(prefix / "bin/other", script_launcher("floored", "Group.main"))
    assert launch(detect, PATH=SEARCH)[0] == 7
    code, _, said = launch(other, PATH=SEARCH)
    assert (code, "needs glibc 9.99" in said) == (11, True)


@pytest.mark.parametrize("place", ["a:b", "../x", "a b", "a;b", "", "class", "a..b", "a\nb"])
def test_entry_point_that_is_not_two_dotted_names_is_refused(place):
    with pytest.raises(WheelError, match="entry point"):
        script_launcher(place, "main")
    with pytest.raises(WheelError, match="entry point"):
        script_launcher("module", place)


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


@pytest.mark.parametrize("value", ["line\nbreak", "nul\0", "escape\x1b"])
def test_value_that_is_no_line_is_refused(value):
    with pytest.raises(RecipeError):
        env_file({"NAME": value})
    with pytest.raises(RecipeError):
        env_file({"NA ME": "value"})


@pytest.mark.parametrize("name", ["", "a b", "$(x)", "x'y", "-x", "a\nb"])
def test_name_that_a_prompt_could_run_is_refused(name):
    with pytest.raises(RecipeError):
        activate_scripts(name, MINOR)


VALUES = {"COLOUR": 'it\'s  $red & `x` !y \\z "q" ', "PLACE": "{prefix}/lib", "EMPTY": "", "MINE": "not"}
SHELLS = {
    "bash": ["bash", "-euc"],
    "bash as sh": ["bash", "--posix", "-euc"],
    "zsh": ["zsh", "-feuc"],
    "zsh as sh": ["zsh", "--emulate", "sh", "-euc"],
    "zsh as ksh": ["zsh", "--emulate", "ksh", "-euc"],
    "dash": ["dash", "-euc"],
    "busybox": ["busybox", "sh", "-euc"],
    "fish": ["fish", "--no-config", "-c"],
    "tcsh": ["tcsh", "-f", "-c"],
}
# The environment as one line.
DUMP = "env -0 | tr '\\0' '\\1'; echo"


def activatable(folder: Path, key: str = "0" * 16, name: str = "stack-1.0") -> Path:
    """A bundle with all that activation needs."""
    prefix = bundle(folder)
    site = prefix / f"lib/python{MINOR}/site-packages/_compose"
    site.mkdir(parents=True)
    for module in ("__init__", "environment", "activation"):
        shutil.copy(RUNTIME / f"{module}.py", site)
    files = activate_scripts(name, MINOR) | {
        "etc/env": env_file(VALUES), "share/compose/fingerprint": key.encode(),
    }  # fmt: skip
    for path, content in files.items():
        (prefix / path).parent.mkdir(parents=True, exist_ok=True)
        (prefix / path).write_bytes(content)
    return prefix


def quoted(path: Path | str, shell: str = "sh") -> str:
    if shell == "fish":
        return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "'" + str(path).replace("'", "'\\''") + "'"


def suffix(shell: str) -> str:
    return {"fish": ".fish", "tcsh": ".csh"}.get(shell, "")


def source(shell: str, prefix: Path) -> str:
    """The command that activates the bundle at `prefix`."""
    word = "source" if shell in ("fish", "tcsh") else "."
    return f"{word} {quoted(prefix / 'bin' / ('activate' + suffix(shell)), shell)}"


def run(shell: str, lines: list[str], cwd: Path, **env: str) -> list[str]:
    """What `shell` prints for these lines."""
    argv = SHELLS[shell]
    if not shutil.which(argv[0]):
        pytest.skip(f"no {argv[0]}")
    environ = {"PATH": SEARCH, "HOME": str(cwd), "TERM": "dumb", "USER": "me", "CUDA_HOME": "", **env}
    done = subprocess.run([*argv, "\n".join(lines)], cwd=cwd, env=environ, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def parsed(line: str) -> dict[str, str]:
    """A line of DUMP, without what a shell itself keeps there."""
    pairs = (entry.split("=", 1) for entry in line.removesuffix("\1").split("\1"))
    return {name: value for name, value in pairs if name not in ("_", "PWD", "OLDPWD", "SHLVL")}


def dumps(shell: str, lines: list[str], cwd: Path, **env: str) -> list[dict[str, str]]:
    return [parsed(line) for line in run(shell, lines, cwd, **env)]


OUTSIDE = {"PYTHONPATH": "/kept:", "MINE": "mine", "HF_HOME": "", "TRITON_CACHE_DIR": "/else where", "CPATH": "a::b"}


@pytest.fixture(params=PLACES[1:], ids=["odd", "long"])
def active(request, tmp_path) -> Path:
    return activatable(tmp_path / request.param)


@pytest.mark.parametrize("shell", SHELLS)
def test_activate_obeys_etc_env_and_deactivate_restores_everything(shell, active, tmp_path):
    lines = [DUMP, source(shell, active), DUMP, "deactivate", DUMP]
    before, inside, after = dumps(shell, lines, tmp_path, **OUTSIDE)
    assert after == before
    changed = {name: inside.get(name) for name in {*before, *inside} if inside.get(name) != before.get(name)}
    cache = f"{tmp_path}/.cache/compose/{'0' * 16}"
    assert changed.items() >= {
        "PATH": f"{active}/bin:{SEARCH}", "COMPOSE_PREFIX": str(active), "COMPOSE_CACHE": cache, "PYTHONPATH": None,
        "COLOUR": VALUES["COLOUR"], "PLACE": f"{active}/lib", "EMPTY": "", "TVM_FFI_CACHE_DIR": f"{cache}/tvm-ffi",
    }.items()  # fmt: skip
    assert not {"TRITON_CACHE_DIR", "HF_HOME", "MINE", "CPATH", "CUDA_HOME"} & set(changed)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_line_of_etc_env_that_no_shell_can_set_is_passed_over(shell, tmp_path):
    prefix = activatable(tmp_path / "bundle")
    with (prefix / "etc/env").open("ab") as stream:
        stream.write(b"A B=1\nC-D=1\nunset E F\nLAST=here\n")
    (inside,) = dumps(shell, [source(shell, prefix), DUMP], tmp_path)
    assert inside["LAST"] == "here"
    assert "A B" not in inside


@pytest.mark.parametrize("shell", ["bash", "zsh", "dash", "busybox"])
def test_without_etc_env_activate_says_so(shell, tmp_path):
    prefix = activatable(tmp_path / "bundle")
    (prefix / "etc/env").unlink()
    said = run(shell, [f"set +e; {source(shell, prefix)} 2>&1; echo $?"], tmp_path)
    assert said == [f"activate: {prefix}/etc/env cannot be read: unpack the bundle again", "1"]


@pytest.mark.parametrize("shell", SHELLS)
def test_twice_on_is_once_off(shell, tmp_path):
    prefix = activatable(tmp_path / "bundle")
    lines = [DUMP, source(shell, prefix), DUMP, source(shell, prefix), DUMP, "deactivate", DUMP]
    before, inside, again, after = dumps(shell, lines, tmp_path, **OUTSIDE)
    assert (again, after) == (inside, before)


@pytest.mark.parametrize("shell", SHELLS)
def test_another_bundle_takes_the_place_of_the_first(shell, tmp_path):
    first, second = activatable(tmp_path / "1"), activatable(tmp_path / "2", key="f" * 16)
    lines = [DUMP, source(shell, second), DUMP, "deactivate"]
    before, alone = dumps(shell, lines, tmp_path)
    lines = [source(shell, first), source(shell, second), DUMP, "deactivate", DUMP]
    assert dumps(shell, lines, tmp_path) == [alone, before]
    # In a shell that a shell with the first one started, the values are inherited, and `deactivate` is not.
    (inherited,) = dumps(shell, [source(shell, first), DUMP], tmp_path)
    inside, after = dumps(shell, [source(shell, second), DUMP, "deactivate", DUMP], tmp_path, **inherited)
    assert after == inherited
    assert inside == alone | {"PATH": f"{second}/bin:{first}/bin:{SEARCH}"}


SHELL_VARIABLES = {"bash": "compgen -v", "zsh": "print -l ${(k)parameters}", "dash": "set", "fish": "set -n"}


@pytest.mark.parametrize("shell", SHELL_VARIABLES)
def test_nothing_of_ours_stays_in_the_shell(shell, tmp_path):
    prefix = activatable(tmp_path / "bundle")
    setting = "set -g TRITON_CACHE_DIR mine" if shell == "fish" else "TRITON_CACHE_DIR=mine"
    names = f"{SHELL_VARIABLES[shell]} | grep -i '^_*compose' | cat"
    lines = [setting, source(shell, prefix), "deactivate", 'echo "$TRITON_CACHE_DIR"', DUMP, names]
    name, environ, *rest = run(shell, lines, tmp_path)
    # Set but not exported before: so it is again.
    assert name == "mine"
    assert "TRITON_CACHE_DIR" not in parsed(environ)
    assert rest == []
    gone = "functions -q deactivate" if shell == "fish" else "command -v deactivate"
    lines = [source(shell, prefix), "deactivate", f"if {gone}; {'' if shell == 'fish' else 'then '}echo still; "]
    lines[-1] += "end" if shell == "fish" else "fi"
    assert run(shell, lines, tmp_path) == []


def test_universal_variables_of_fish_are_hidden_and_kept(tmp_path):
    if not shutil.which("fish"):
        pytest.skip("no fish")
    prefix = activatable(tmp_path / "bundle")
    lines = [
        "set -Ux PYTHONPATH /kept",
        "set -Ux COLOUR mine",
        "set -Ux COMPOSE_CACHE /x",
        DUMP,
        source("fish", prefix),
        DUMP,
        "deactivate",
        DUMP,
        "set -qg PYTHONPATH; and echo global; set -qU PYTHONPATH; and echo universal",
    ]
    environ = {"PATH": SEARCH, "HOME": str(tmp_path), "USER": "me", "CUDA_HOME": ""}
    done = subprocess.run(["fish", "-c", "\n".join(lines)], env=environ, capture_output=True, text=True, timeout=30)
    before, inside, after = (parsed(line) for line in done.stdout.splitlines()[:3])
    assert after == before
    assert (inside["PYTHONPATH"], inside["COLOUR"]) == ("", "mine")
    assert inside["COMPOSE_CACHE"] == f"{tmp_path}/.cache/compose/{'0' * 16}"
    assert done.stdout.splitlines()[3:] == ["universal"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "dash"])
def test_the_prompt_names_the_bundle_while_it_is_active(shell, tmp_path):
    prefix = activatable(tmp_path / "bundle")
    lines = ["PS1='$ '", source(shell, prefix), 'echo "$PS1"', "deactivate", 'echo "$PS1"']
    assert run(shell, lines, tmp_path) == ["(stack-1.0) $ ", "$ "]


def test_the_prompt_of_fish_and_csh(tmp_path):
    prefix = activatable(tmp_path / "bundle")
    lines = ["function fish_prompt; printf '> '; end", source("fish", prefix), "fish_prompt; echo", "deactivate"]
    assert run("fish", [*lines, "fish_prompt; echo"], tmp_path) == ["(stack-1.0) > ", "> "]
    lines = ["set prompt='% '", source("tcsh", prefix), "echo $prompt:q", "deactivate", "echo $prompt:q"]
    assert run("tcsh", lines, tmp_path) == ["(stack-1.0) % ", "% "]


@pytest.mark.parametrize("shell", ["bash", "zsh", "zsh as sh", "dash", "busybox"])
def test_activate_in_a_subshell_and_by_a_relative_path(shell, tmp_path):
    prefix = activatable(tmp_path / "bundle")
    lines = ["(. ./bin/activate; echo $COMPOSE_PREFIX)", "cd bin; . ./activate; echo $COMPOSE_PREFIX"]
    assert run(shell, lines, prefix) == [str(prefix), str(prefix)]


def test_activate_through_a_link_to_the_prefix_keeps_the_link(tmp_path):
    prefix = activatable(tmp_path / "releases" / "1")
    (tmp_path / "current").symlink_to("releases/1")
    (tmp_path / "on").symlink_to("current/bin/activate")
    assert run("bash", [f". {tmp_path}/current/bin/activate; echo $COMPOSE_PREFIX"], tmp_path) == [
        f"{tmp_path}/current"
    ]
    assert run("bash", [f". {tmp_path}/on; echo $COMPOSE_PREFIX"], tmp_path) == [str(prefix)]
    assert run("dash", [f". {tmp_path}/on; echo $COMPOSE_PREFIX"], tmp_path) == [str(prefix)]


def test_a_bundle_that_was_moved_while_active_can_be_left(tmp_path):
    prefix = activatable(tmp_path / "bundle")
    moved = tmp_path / "else where"
    lines = [DUMP, source("bash", prefix), f"mv {prefix} {quoted(moved)}", "deactivate", DUMP, source("bash", moved)]
    before, after, inside = dumps("bash", [*lines, DUMP], tmp_path)
    assert after == before
    assert inside["PLACE"] == f"{moved}/lib"


def test_a_virtual_environment_is_left_first(tmp_path):
    prefix = activatable(tmp_path / "bundle")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    lines = [DUMP, f". {tmp_path}/venv/bin/activate", source("bash", prefix), DUMP, "deactivate", DUMP]
    before, inside, after = dumps("bash", lines, tmp_path, VIRTUAL_ENV_DISABLE_PROMPT="1")
    assert "VIRTUAL_ENV" not in inside
    assert after == before


def test_activation_adds_no_file_to_the_bundle(tmp_path):
    prefix = activatable(tmp_path / "bundle")
    before = sorted(prefix.rglob("*"))
    run("bash", [source("bash", prefix), "deactivate"], tmp_path)
    assert sorted(prefix.rglob("*")) == before


@pytest.mark.parametrize("shell", SHELLS)
def test_a_bundle_whose_python_does_not_run_changes_nothing(shell, tmp_path):
    prefix = activatable(tmp_path / "bundle")
    (prefix / "bin/python3").unlink()
    install(prefix / "bin/python3", b"#!/bin/sh\necho 'no such CPU' >&2\nexit 127\n")
    failing = source(shell, prefix)
    if shell not in ("tcsh", "fish"):
        failing = f"set +e; {failing} 2>&1; echo $?"
    before, *said, after = run(shell, [DUMP, failing, DUMP], tmp_path)
    assert parsed(after) == parsed(before)
    if said:
        assert said == ["no such CPU", f"activate: {prefix}/bin/python3 does not run on this host", "1"]


def test_deactivate_can_be_sourced_and_says_so_when_it_is_run(tmp_path):
    prefix = activatable(tmp_path / "bundle")
    off = prefix / "bin/deactivate"
    before, after = dumps("dash", [DUMP, source("dash", prefix), f". {off}", DUMP], tmp_path)
    assert after == before
    assert run("zsh", [f"set +e; . {off} 2>&1; echo $?"], tmp_path)[-1] == "1"
    done = subprocess.run(["sh", off], capture_output=True, text=True, timeout=20)
    assert (done.returncode, "no bundle is active" in done.stderr) == (1, True)


def test_a_shell_that_cannot_tell_is_told_by_a_variable(tmp_path):
    """Without /proc, dash sees only COMPOSE_PREFIX; a file that is no bundle's stands for that here."""
    prefix = activatable(tmp_path / "bundle")
    elsewhere = tmp_path / "copied"
    shutil.copy(prefix / "bin/activate", elsewhere)
    said = run("dash", [f"set +e; . {elsewhere} 2>&1; echo $?"], tmp_path)
    assert said == [
        "activate: cannot tell where the bundle is: set COMPOSE_PREFIX to its folder and source this again", "1",
    ]  # fmt: skip
    lines = [f"COMPOSE_PREFIX={prefix}", f". {elsewhere}", "echo $PLACE"]
    assert run("dash", lines, tmp_path) == [f"{prefix}/lib"]

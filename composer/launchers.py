"""Text of the programs in a bundle's bin/: console scripts and activate files. Templates: composer/runtime/launch/.

Nothing here knows where a bundle will be unpacked; every text finds its own place when it runs.
"""

from __future__ import annotations

import functools
import keyword
import re
import shlex
from collections.abc import Callable, Mapping
from importlib import resources

from composer.errors import RecipeError, WheelError

# The shebang of a script in a wheel: `#!python` (binary distribution format) or a Python of the builder's machine.
_SHEBANG = re.compile(
    rb"#!\s*(?:\S*/env\s+(?:-S\s+)?)?(?:\"[^\"\n]*/|[^\n\"]*/)?pythonw?[0-9.]*\"?(?:[ \t]+(?P<options>[^\r\n]*))?\r?\n"
)
_OPTIONS = re.compile(r"(?:-[A-Za-z]+\s*)*\Z")
# Blank lines and comments, then perhaps a docstring.
_LEAD = re.compile(rb"(?:[ \t\f]*(?:#[^\n]*)?\r?\n)*")
_STRING = re.compile(rb"[rRuU]?[\"']")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z")


@functools.cache
def template(name: str) -> str:
    """The text of composer/runtime/launch/`name`."""
    return (resources.files("composer") / "runtime" / "launch" / name).read_text(encoding="utf-8")


def _fill(text: str, **values: str) -> bytes:
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text.encode()


def _dotted(text: str) -> bool:
    return all(part.isidentifier() and not keyword.iskeyword(part) for part in text.split("."))


def script_launcher(module: str, attribute: str, env: Mapping[str, str] | None = None) -> bytes:
    """A console script that calls `attribute` (dotted names allowed) of `module` with the bundle's own Python.

    The file is both a sh script and a Python module. It runs from any path (spaces, Unicode, longer than the kernel's
    127 characters for a shebang), through symbolic links, and needs no program but sh. It must lie in bin/ beside
    `python3`. PYTHONHOME and PYTHONPATH are removed and PYTHONNOUSERSITE set rather than `-I` or `-s -E` given to the
    interpreter: children inherit an environment, not options, and the user's other PYTHON* settings keep working.

    `env` is set where the caller has no value of that name; `{prefix}` in a value stands for the bundle's folder.

    Raises WheelError for a module or attribute that is not a dotted identifier (entry points specification), and
    RecipeError for an `env` that a shell cannot set.
    """
    if not (_dotted(module) and _dotted(attribute)):
        raise WheelError(
            "an entry point names a module and an attribute, both dotted identifiers",
            where=f"{module}:{attribute}",
            reference="https://packaging.python.org/specifications/entry-points/",
        )
    first = attribute.partition(".")[0]
    body = f'import sys\n\nfrom {module} import {first}\n\nif __name__ == "__main__":\n    sys.exit({attribute}())\n'
    return _header(env or {}) + body.encode()


def rewrite_script(content: bytes, env: Mapping[str, str] | None = None) -> bytes:
    """A wheel's `.data/scripts` file with a Python shebang made relative to its folder; any other file unchanged.

    Simple interpreter options (`-u`, `-Es`) and the encoding cookie are kept; `env` as in `script_launcher`. Raises
    WheelError for options that are not single letters: they would become words of a sh command.
    """
    shebang = _SHEBANG.match(content)
    if not shebang:
        return content
    options = (shebang["options"] or b"").decode("ascii", errors="replace").strip()
    if not _OPTIONS.match(options):
        raise WheelError("a script passes options to Python that cannot be kept", where=repr(options))
    first, launcher = _header(env or {}, options=f" {options}" if options else "").split(b"\n", 1)
    # Leading comments are comments to sh as well and stay on their lines, where PEP 263 looks for the encoding. Python
    # allows one string before `from __future__`: the script's docstring continues the launcher's.
    lead = _LEAD.match(content, shebang.end())
    assert lead is not None
    rest = content[lead.end() :]
    join = b" \\\n" if _STRING.match(rest) else b"\n"
    return first + b"\n" + lead[0] + launcher.rstrip(b"\n") + join + rest


def _header(env: Mapping[str, str], *, options: str = "") -> bytes:
    _check_env(env)
    lines = []
    if env:
        lines.append('COMPOSE_PREFIX=$(CDPATH= cd -- "${self%/*}/.." >/dev/null && pwd)')
    for variable, value in env.items():
        lines.append(f'if [ -z "${{{variable}+x}}" ]; then export {variable}={_sh_quote(value)}; fi')
    assignments = "".join(f"{line}\n" for line in lines)
    # The text is a Python string as well, in which a backslash would be read as an escape. Quotes are no danger:
    # shlex.quote never puts three of a kind side by side.
    if "\\" in assignments:
        raise RecipeError("a value in a script's environment holds a backslash", where=repr(dict(env)))
    return _fill(template("script.sh"), ENV=assignments, OPTIONS=options)


def _check_env(env: Mapping[str, str]) -> None:
    for variable, value in env.items():
        if not _VARIABLE.match(variable) or not value.isprintable():
            raise RecipeError("not an environment variable that every shell can set", where=f"{variable}={value!r}")


def activate_scripts(name: str, env: Mapping[str, str]) -> dict[str, bytes]:
    """Files for `source`: bin/activate (sh, bash, zsh, dash), bin/activate.fish, bin/activate.csh; by path.

    `name` is shown in the prompt. `env` is set while active and restored by `deactivate`; `{prefix}` in a value stands
    for the bundle's folder. Raises RecipeError for a name or a value that cannot be quoted in all of these shells.
    """
    if not _NAME.match(name):
        raise RecipeError("a bundle's name is letters, digits and . _ + -", where=repr(name))
    _check_env(env)
    shells = {
        "bin/activate": ("activate.sh", _sh_restore, _sh_set),
        "bin/activate.fish": ("activate.fish", _fish_restore, _fish_set),
        "bin/activate.csh": ("activate.csh", _csh_restore, _csh_set),
    }
    return {path: _activate(name, env, *shell) for path, shell in shells.items()}


def _activate(
    name: str,
    env: Mapping[str, str],
    file: str,
    restore: Callable[[str], str],
    assign: Callable[[str, str | None], str],
) -> bytes:
    # None: unset while active. A Python home or path of the user's would break the bundle's interpreter.
    values: dict[str, str | None] = {"PYTHONHOME": None, "PYTHONPATH": None, **env}
    separator = " " if file.endswith("csh") else "\n"
    return _fill(
        template(file),
        NAME=name,
        RESTORE=separator.join(restore(variable) for variable in values),
        SET="\n".join(assign(variable, value) for variable, value in values.items()),
    )


def _quote(value: str, quoted: Callable[[str], str], prefix: str) -> str:
    return prefix.join(quoted(part) if part else "" for part in value.split("{prefix}")) or quoted("")


def _sh_quote(value: str) -> str:
    return _quote(value, shlex.quote, '"$COMPOSE_PREFIX"')


def _sh_set(variable: str, value: str | None) -> str:
    keep = f'if [ -n "${{{variable}+x}}" ]; then _COMPOSE_OLD_{variable}=${variable}; fi'
    return f"{keep}\n" + (f"unset {variable}" if value is None else f"export {variable}={_sh_quote(value)}")


def _sh_restore(variable: str) -> str:
    old = f"_COMPOSE_OLD_{variable}"
    return f'    if [ -n "${{{old}+x}}" ]; then export {variable}="${old}"; unset {old}; else unset {variable}; fi'


def _fish_set(variable: str, value: str | None) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    keep = f"if set -q {variable}; set -g _compose_old_{variable} ${variable}; end\n"
    return keep + (
        f"set -e {variable}" if value is None else f"set -gx {variable} {_quote(value, quoted, '$COMPOSE_PREFIX')}"
    )


def _fish_restore(variable: str) -> str:
    old = f"_compose_old_{variable}"
    return f"    if set -q {old}; set -gx {variable} ${old}; set -e {old}; else; set -e {variable}; end"


def _csh_set(variable: str, value: str | None) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("'", "'\\''").replace("!", "\\!") + "'"

    # csh expands a variable even in the branch not taken of a one-line `if`; `&&` does not.
    keep = f'    test $?{variable} != 0 && set _COMPOSE_OLD_{variable}="${variable}:q"\n'
    return keep + (
        f"    unsetenv {variable}"
        if value is None
        else f"    setenv {variable} {_quote(value, quoted, chr(34) + '$COMPOSE_PREFIX' + chr(34))}"
    )


def _csh_restore(variable: str) -> str:
    old = f"_COMPOSE_OLD_{variable}"
    back = f'test $?{old} != 0 && setenv {variable} "${old}:q" && unset {old};'
    return f"test $?{old} = 0 && unsetenv {variable}; {back}"

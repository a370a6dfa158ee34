"""Tell a shell what to evaluate to enter the bundle, and to leave it again; bin/activate* ask.

What changes is what `environment` changes for the interpreter, and PATH. The shell itself keeps the values it had, so
that it gets back what a child cannot see, such as a variable that is set but not exported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from . import PREFIX, environment

#: value None: unset while active. `was`: the name is in the environment now.
_Writer = Callable[[str, "str | None", bool], tuple[str, str]]


def script(shell: str, prefix: str, environ: dict[str, str]) -> str:
    """Text for `eval` in `shell` (sh, fish or csh): it enters the bundle at `prefix` and defines `_compose_restore`.

    environ: the shell's environment. KeyError for another shell.
    """
    path = environ.get("PATH")
    inside = environ | {"PATH": f"{prefix}/bin:{path}" if path else f"{prefix}/bin"}
    wanted = environment.changes(prefix, inside, entered=False)
    wanted["PATH"] = inside["PATH"]
    write, join = _SHELLS[shell]
    parts = [write(name, value, name in environ) for name, value in wanted.items()]
    return join([enter for enter, _ in parts], [leave for _, leave in parts])


def _sh(name: str, value: str | None, was: bool) -> tuple[str, str]:
    old = f"_COMPOSE_OLD_{name}"
    enter = f"unset {name}" if value is None else f"export {name}={_sh_quote(value)}"
    if was:
        return f"{old}=${name}; {enter}", f'export {name}="${old}"; unset {old}'
    keep = f'if [ -n "${{{name}+x}}" ]; then {old}=${name}; fi'
    back = f'unset {name}; if [ -n "${{{old}+x}}" ]; then {name}=${old}; unset {old}; fi'
    return f"{keep}; {enter}", back


def _sh_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _sh_text(enter: Sequence[str], leave: Sequence[str]) -> str:
    return "\n".join([*enter, "_compose_restore() {", *leave, "}", ""])


def _fish(name: str, value: str | None, was: bool) -> tuple[str, str]:
    old = f"_compose_old_{name}"
    # A universal variable cannot be unset for one session, only hidden behind an empty one.
    hide = f"set -eg {name}; set -qU {name}; and set -gx {name}"
    quoted = "'" + (value or "").replace("\\", "\\\\").replace("'", "\\'") + "'"
    enter = hide if value is None else f"set -gx {name} {quoted}"
    keep = f"set -qg {name}; and set -g {old} ${name}"
    back = f"set -eg {name}; if set -qg {old}; set -g{'x' if was else 'u'} {name} ${old}; set -eg {old}; end"
    return f"{keep}; {enter}", back


def _fish_text(enter: Sequence[str], leave: Sequence[str]) -> str:
    return "\n".join([*enter, "function _compose_restore", *leave, "end", ""])


def _csh(name: str, value: str | None, was: bool) -> tuple[str, str]:
    old = f"_COMPOSE_OLD_{name}"
    enter = f"unsetenv {name}" if value is None else f"setenv {name} {_csh_quote(value)}"
    if was:
        return f'set {old}="${name}:q"; {enter}', f'setenv {name} "${old}:q"; unset {old}'
    return enter, f"unsetenv {name}"


def _csh_quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''").replace("!", "\\!") + "'"


def _csh_text(enter: Sequence[str], leave: Sequence[str]) -> str:
    # One line: a substitution in csh is cut at line ends.
    return "; ".join([*enter, f"alias _compose_restore {_csh_quote('; '.join(leave))}"]) + "\n"


_SHELLS: dict[str, tuple[_Writer, Callable[[Sequence[str], Sequence[str]], str]]] = {
    "sh": (_sh, _sh_text),
    "fish": (_fish, _fish_text),
    "csh": (_csh, _csh_text),
}


def write(shell: str, environ: dict[str, str]) -> None:
    """Write to standard output what `shell` is to evaluate. environ: as it was before this process prepared its own."""
    sys.stdout.buffer.write(os.fsencode(script(shell, PREFIX, environ)))

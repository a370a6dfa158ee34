"""Text of the programs in a bundle's bin/ (console scripts, activate files) and of its etc/env.

Templates: composer/runtime/launch/.

Nothing here knows where a bundle will be unpacked; every text finds its own place when it runs.
"""

from __future__ import annotations

import functools
import keyword
import re
from collections.abc import Mapping
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

#: The .pth file that prepares every start; in virtual environments, and bundles like them, site runs it twice. Bytecode
#: of the first module is not written: where there is none, `composer.runtime.environment` sends all that is written to
#: the cache folder, so that a start adds no file to the bundle.
ENVIRONMENT_PTH = (
    b"import sys; kept = sys.dont_write_bytecode; sys.dont_write_bytecode = True; import _compose.environment; "
    b"sys.dont_write_bytecode = kept; import _compose.gpu\n"
)
# What activate has Python run. No start-up file is: the host need not fit the bundle for the shell's sake.
_ENTER = (
    "import os, sys; before = dict(os.environ); sys.path.append(sys.argv[1]); "
    "from _compose.activation import write; write(sys.argv[2], before)"
)
_TEMPLATES = {"activate": "activate.sh", "deactivate": "deactivate.sh"}


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


def script_launcher(module: str, attribute: str, *, any_host: bool = False) -> bytes:
    """A console script that calls `attribute` (dotted names allowed) of `module` with the bundle's own Python.

    The file is both a sh script and a Python module. It runs from any path (spaces, Unicode, longer than the kernel's
    127 characters for a shebang), through symbolic links, and needs no program but sh. It must lie in bin/ beside
    `python3`. PYTHONHOME and PYTHONPATH are removed and PYTHONNOUSERSITE set rather than `-I` or `-s -E` given to the
    interpreter: children inherit an environment, not options, and the user's other PYTHON* settings keep working. The
    rest of etc/env is for the interpreter to read. any_host: a host below the bundle's floors is not refused, for a
    program that tells what the host is.

    Raises WheelError for a module or attribute that is not a dotted identifier (entry points specification).
    """
    if not (_dotted(module) and _dotted(attribute)):
        raise WheelError(
            "an entry point names a module and an attribute, both dotted identifiers",
            where=f"{module}:{attribute}",
            reference="https://packaging.python.org/specifications/entry-points/",
        )
    first = attribute.partition(".")[0]
    body = f'import sys\n\nfrom {module} import {first}\n\nif __name__ == "__main__":\n    sys.exit({attribute}())\n'
    return _header(exports=" WHEEL_COMPOSER_HOST_CHECK=off" if any_host else "") + body.encode()


def rewrite_script(content: bytes) -> bytes:
    """A wheel's `.data/scripts` file with a Python shebang made relative to its folder; any other file unchanged.

    Simple interpreter options (`-u`, `-Es`) and the encoding cookie are kept. Raises WheelError for options that
    are not single letters: they would become words of a sh command.
    """
    shebang = _SHEBANG.match(content)
    if not shebang:
        return content
    options = (shebang["options"] or b"").decode("ascii", errors="replace").strip()
    if not _OPTIONS.match(options):
        raise WheelError("a script passes options to Python that cannot be kept", where=repr(options))
    first, launcher = _header(f" {options}" if options else "").split(b"\n", 1)
    # Leading comments are comments to sh as well and stay on their lines, where PEP 263 looks for the encoding. Python
    # allows one string before `from __future__`: the script's docstring continues the launcher's.
    lead = _LEAD.match(content, shebang.end())
    assert lead is not None
    rest = content[lead.end() :]
    join = b" \\\n" if _STRING.match(rest) else b"\n"
    return first + b"\n" + lead[0] + launcher.rstrip(b"\n") + join + rest


def _header(options: str = "", exports: str = "") -> bytes:
    return _fill(template("script.sh"), OPTIONS=options, EXPORTS=exports)


def env_file(environment: Mapping[str, str]) -> bytes:
    """etc/env: what every program of the bundle finds in its environment. Read by composer.runtime.environment.

    environment: a recipe's own variables, each for where the user has set none of that name; `{prefix}`, `{cache}` and
    the other places of etc/env may stand in a value. They win over the lines that every bundle has. Raises RecipeError
    for a name or a value that not every shell can set.
    """
    for name, value in environment.items():
        if not _VARIABLE.match(name) or not value.isprintable():
            raise RecipeError("not an environment variable that every shell can set", where=f"{name}={value!r}")
    own = "".join(f"{name}?={value}\n" for name, value in environment.items())
    return (template("env") + (f"\n# Of the recipe.\n{own}" if own else "")).encode()


def activate_scripts(name: str, python: str) -> dict[str, bytes]:
    """Files for `source`: bin/activate and bin/deactivate (sh, bash, zsh, dash), bin/activate.fish, bin/activate.csh.

    name: shown in the prompt. python: the bundle's minor version, `3.12`. What they set is what etc/env says when they
    are sourced; `deactivate` restores all of it. Raises RecipeError for a name that a prompt could run.
    """
    if not _NAME.match(name):
        raise RecipeError("a bundle's name is letters, digits and . _ + -", where=repr(name))
    files = ("activate", "activate.fish", "activate.csh", "deactivate")
    values = {"NAME": name, "ENTER": _ENTER, "SITE": f"lib/python{python}/site-packages"}
    return {f"bin/{file}": _fill(template(_TEMPLATES.get(file, file)), **values) for file in files}

r"""Files of `NAME=value` lines as systemd reads them for `EnvironmentFile=` (systemd.exec(5)), read and written.

A value may be in quotes. In double quotes a backslash keeps `"`, `\`, `$` and a backquote from their meaning; in single
quotes nothing has one. Nothing is expanded, and no shell is asked. A line that systemd would skip is a fault here.
"""

import re
from collections.abc import Mapping

from .spec import ServiceError

_BLANK = re.compile(r"[ \t]*(?:[#;].*)?(?:\n|\Z)")
_NAME = re.compile(r"[ \t]*([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*")
# A quote is one only where a value, or the next part of it, begins; after any other character it stands for itself.
_QUOTED = re.compile(r"""[ \t]*(?:"((?:[^"\\]|\\[\s\S])*)"|'([^']*)')""")
_REST = re.compile(r"[ \t]*((?:[^\\\n]|\\(?:[\s\S]|\Z))*)")


def parse(text: str, where: str) -> dict[str, str]:
    """The variables of a file; ServiceError, with the line, for anything else."""
    found, place = {}, 0
    while place < len(text):
        if blank := _BLANK.match(text, place):
            place = blank.end()
            continue
        name = _NAME.match(text, place)
        if name is None:
            raise _fault("is not NAME=value", text, place, where)
        found[name[1]], place = _value(text, name.end(), where)
    return found


def _value(text: str, place: int, where: str) -> tuple[str, int]:
    """A value and where the next line begins. White space at the end of an unquoted value is not part of it."""
    value = ""
    while quoted := _QUOTED.match(text, place):
        value += quoted[2] if quoted[1] is None else re.sub(r'\\(?:(["\\`$])|\n)', _kept, quoted[1])
        place = quoted.end()
    rest = _REST.match(text, place)
    assert rest is not None
    if rest[1].startswith(("'", '"')):
        raise _fault("has a quote that does not end", text, place, where)
    return value + re.sub(r"\\(?:([^\n])|\n|\Z)", _kept, rest[1].rstrip(" \t")), rest.end() + 1


def _kept(escaped: re.Match[str]) -> str:
    return escaped[1] or ""


def _fault(what: str, text: str, place: int, where: str) -> ServiceError:
    number = text.count("\n", 0, place) + 1
    return ServiceError(f"{where}: line {number} {what}", 'Write NAME="value"; a line of its own starts with #.')


def render(variables: Mapping[str, str]) -> str:
    """Lines for variables. ServiceError for a name or a value that a line cannot hold."""
    lines = []
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not value.isprintable():
            raise ServiceError(f"{name}={value!r} cannot be a line of a settings file",
                               "A name is letters, digits and _, and a value has no control characters.")  # fmt: skip
        escaped = re.sub(r'(["\\`$])', r"\\\1", value)
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)


def update(text: str, variables: Mapping[str, str], where: str) -> str:
    """`text` with variables set: the line of one that it has is replaced, others are added. The rest stays as it is."""
    parse(text, where)
    left, lines, place = dict(variables), [], 0
    while place < len(text):
        start, name = place, _NAME.match(text, place)
        blank = _BLANK.match(text, place)
        place = blank.end() if blank else _value(text, name.end() if name else place, where)[1]
        if blank or name is None or name[1] not in variables:
            lines.append(text[start:place])
        elif name[1] in left:
            lines.append(render({name[1]: left.pop(name[1])}))
    kept = "".join(lines)
    return (kept + "\n" if kept and not kept.endswith("\n") else kept) + render(left)

"""entry_points.txt: the commands and plugins that a distribution offers.

Source: the entry points specification, https://packaging.python.org/en/latest/specifications/entry-points/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from composer.errors import WheelError

__all__ = ["SCRIPT_GROUPS", "EntryPoint", "parse_entry_points"]

SCRIPT_GROUPS = ("console_scripts", "gui_scripts")
"""The groups that become files in bin/."""

_COMMAND = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_REFERENCE = re.compile(r"(?P<module>[\w.]+)\s*(?::\s*(?P<attribute>[\w.]+))?\s*(?:\[[^\[\]]*\])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPoint:
    """One `name = module:attribute` of a group; `attribute` is empty where the object is the module itself."""

    group: str
    name: str
    module: str
    attribute: str


def parse_entry_points(data: bytes) -> tuple[EntryPoint, ...]:
    """Every entry point in the order of the file.

    Raises `WheelError` for what is not UTF-8 or not such a file, an object reference that is not dotted names, an
    entry listed twice, and a command whose name could leave bin/ or whose reference has no attribute.
    """
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as fault:
        raise WheelError("not UTF-8", where="entry_points.txt", why=str(fault)) from fault
    found: dict[tuple[str, str], EntryPoint] = {}
    group = ""
    for line in map(str.strip, lines):
        if not line or line.startswith(("#", ";")):
            continue
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
            continue
        entry = _entry(group, line)
        if (group, entry.name) in found:
            raise WheelError(f"{entry.name!r} is listed twice in {group!r}", where="entry_points.txt")
        found[group, entry.name] = entry
    return tuple(found.values())


def _entry(group: str, line: str) -> EntryPoint:
    name, equals, value = (part.strip() for part in line.partition("="))
    reference = _REFERENCE.fullmatch(value)
    if not (group and name and equals and reference and name.isprintable()):
        raise WheelError(f"{line!r:.200} in {group!r:.80} is not an entry point", where="entry_points.txt")
    module, attribute = reference["module"], reference["attribute"] or ""
    dotted = module.split(".") + (attribute.split(".") if attribute else [])
    if not all(map(str.isidentifier, dotted)):
        raise WheelError(f"{value!r:.200} is not an object reference", where="entry_points.txt")
    if group in SCRIPT_GROUPS and not (_COMMAND.fullmatch(name) and attribute):
        raise WheelError(f"{line!r:.200} cannot become a command", where="entry_points.txt")
    return EntryPoint(group=group, name=name, module=module, attribute=attribute)

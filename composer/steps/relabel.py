"""Write a built wheel again: with a local version label, and what it was built from."""

from __future__ import annotations

from pathlib import Path

from packaging.version import Version

from composer._fs import atomic_file
from composer.formats.wheel import read_wheel
from composer.formats.wheel_writer import WheelWriter
from composer.steps.survey import mapped

#: Beside METADATA: what the wheel was built from.
LEDGER = "compose-source.json"


def relabel_wheel(path: Path, target: Path, version: Version, ledger: bytes) -> None:
    """Write the wheel `path` as `target` with another version; its files stay as they are.

    `ledger` becomes a file of its `.dist-info`. WheelError for a wheel that breaks its specification, HostError if it
    cannot be written.
    """
    with mapped(path) as view, atomic_file(target, mode=0o444) as out:
        wheel = read_wheel(view, path.name)
        with WheelWriter(view, wheel, version, out) as writer:
            for member in writer.members():
                if member.path != f"{wheel.dist_info}/{LEDGER}":
                    writer.copy(member)
            writer.finish(LEDGER, ledger)


def labelled(filename: str, version: Version) -> str:
    """The file name of a wheel with another version."""
    name, _, *rest = filename.split("-")
    return "-".join([name, str(version), *rest])

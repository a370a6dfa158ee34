"""The models in a folder that is laid out as a Hugging Face cache: models--ORG--NAME/{refs,snapshots,blobs}."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .archive import repository
from .snapshot import model_files


@dataclass(frozen=True)
class Model:
    """One revision of a model. main: whether the name alone means it."""

    name: str
    revision: str
    folder: Path
    main: bool

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in model_files(self.folder).values() if path.is_file())


def models(hub: Path) -> Iterator[Model]:
    """Every revision of every model, by name; none where there is no such folder."""
    for folder in sorted(hub.glob("models--*")):
        main = main_revision(folder)
        for snapshot in sorted((folder / "snapshots").glob("[!.]*")):
            if snapshot.is_dir():
                yield Model(repository(folder.name), snapshot.name, snapshot, snapshot.name == main)


def main_revision(folder: Path) -> str:
    """The revision that a model's name alone means; nothing where that is not said."""
    try:
        return (folder / "refs" / "main").read_text("ascii").strip()
    except (OSError, ValueError):
        return ""

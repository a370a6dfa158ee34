"""The licence notices of libraries that are copied from this machine, from where Debian's packages keep them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from composer._fs import host_errors

_PACKAGES: Final = Path("/var/lib/dpkg/info")
_DOCUMENTS: Final = Path("/usr/share/doc")


def notices(libraries: Mapping[str, Path], packages: Path = _PACKAGES, documents: Path = _DOCUMENTS) -> dict[str, Path]:
    """The notice of each library's package, by library; one whose package or notice is not found is absent."""
    owners = _owners({form: name for name, path in libraries.items() for form in _forms(path)}, packages)
    found = {name: documents / package / "copyright" for name, package in owners.items()}
    return {name: found[name] for name in libraries if name in found and found[name].is_file()}


def _forms(path: Path) -> set[str]:
    """The paths that a package may list a file under: /lib is a link to /usr/lib on a merged-usr system."""
    paths = {str(path), str(path.resolve())}
    return paths | {text.removeprefix("/usr") for text in paths} | {f"/usr{text}" for text in paths}


def _owners(names: Mapping[str, str], packages: Path) -> dict[str, str]:
    owners: dict[str, str] = {}
    for listing in sorted(packages.glob("*.list")):
        with host_errors(listing):
            lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
        package = listing.stem.partition(":")[0]
        owners.update({names[line]: package for line in lines if line in names})
    return owners

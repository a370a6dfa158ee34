"""Read recipes from files. Included files are merged before anything is checked; nothing is executed."""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.errors import RecipeError
from composer.model.recipe import Recipe, parse_recipe
from composer.model.target import Targets, parse_targets

#: Larger files are not recipes; a limit so that a hostile one costs nothing.
_MAX_BYTES = 1 << 20
#: Keys whose lists an included file may add to.
_MERGED = ("component", "requires", "untouched", "native", "interpreter")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRecipe:
    """A recipe, the folder that its patches and locks are found from, and the digest of all files it was read from."""

    recipe: Recipe
    path: Path
    patches: Path
    digest: str

    def lock_path(self, python: str, machine: str) -> Path:
        """Where the committed lock for one Python and machine is: beside the recipe (name as in PEP 751)."""
        return self.path.parent / f"pylock.{self.path.stem}-py{python.replace('.', '')}-{machine}.toml"


def data_root() -> Path:
    """The folder that holds recipes/ and patches/: the checkout, or the installed package's own data."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "recipes").is_dir() else Path(__file__).resolve().parents[1] / "_data"


def load_recipe(name: str) -> LoadedRecipe:
    """A shipped recipe by name, or a recipe file by path (it ends in `.toml`)."""
    path = Path(name) if name.endswith(".toml") else data_root() / "recipes" / f"{name}.toml"
    if not path.is_file():
        known = sorted(one.stem for one in (data_root() / "recipes").glob("*.toml") if not _is_data(one))
        near = difflib.get_close_matches(name, known, n=1)
        raise RecipeError(f"no recipe {name!r}", where=str(path),
                          fix=f"Did you mean {near[0]!r}?" if near else f"Shipped: {', '.join(known)}.")  # fmt: skip
    digest = hashlib.sha256()
    recipe = parse_recipe(_merged(path, digest), path.name)
    beside = path.parent / "patches"
    patches = beside if beside.is_dir() else data_root() / "patches"
    return LoadedRecipe(recipe=recipe, path=path, patches=patches, digest=digest.hexdigest())


def load_targets() -> Targets:
    """The vocabulary of targets."""
    path = data_root() / "recipes" / "targets.toml"
    return parse_targets(_parse(_read(path), path), path.name)


def _is_data(path: Path) -> bool:
    return path.name == "targets.toml" or path.name.startswith("pylock.")


def _merged(path: Path, digest: Any) -> dict[str, Any]:  # noqa: ANN401  (hashlib has no public type)
    data = _digested(path, digest)
    names = data.get("include")
    for name in names if isinstance(names, list) else ():  # another type is reported with all other wrong types
        if not _is_below(name):
            raise RecipeError(f"{name!r} is not a file below the recipe's folder", where=f"{path.name}: include")
        _add(data, _digested(path.parent / name, digest), name)
    return data


def _digested(path: Path, digest: Any) -> dict[str, Any]:  # noqa: ANN401
    text = _read(path)
    digest.update(text)
    return _parse(text, path)


def _is_below(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and not name.startswith("/") and ".." not in Path(name).parts


def _add(data: dict[str, Any], included: Mapping[str, Any], name: str) -> None:
    for key, value in included.items():
        if key not in _MERGED or not isinstance(value, list):
            raise RecipeError(f"{key!r} is not allowed in an included file", where=name,
                              fix=f"Included files may hold: {', '.join(_MERGED)}.")  # fmt: skip
        if isinstance(own := data.get(key, []), list):
            data[key] = [*own, *value]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as handle:
            data = handle.read(_MAX_BYTES + 1)
    except OSError as fault:
        raise RecipeError(fault.strerror or "cannot be read", where=str(path)) from fault
    if len(data) > _MAX_BYTES:
        raise RecipeError(f"larger than {_MAX_BYTES} bytes", where=str(path), fix="Give the path of a recipe.")
    return data


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text.decode("utf-8"))
    except UnicodeDecodeError as fault:
        raise RecipeError("not UTF-8", where=str(path), why=str(fault)) from fault
    except (ValueError, RecursionError) as fault:  # the first is also a number of more than 4,300 digits
        raise RecipeError("not TOML", where=str(path), why=str(fault) or "nested too deeply") from fault

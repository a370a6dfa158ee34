"""Read recipes from files. Included files are merged before anything is checked; nothing is executed."""

from __future__ import annotations

import difflib
import hashlib
import posixpath
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from composer.errors import RecipeError
from composer.model.overlay import Overlay, overlaid, parse_overlay
from composer.model.recipe import Recipe, parse_recipe
from composer.model.target import Target, Targets, parse_targets

#: Larger files are not recipes; a limit so that a hostile one costs nothing.
_MAX_BYTES = 1 << 20
#: Behind a recipe's name: every component that says how it is built comes from source.
BUILDER = "-builder"
#: Keys whose lists an included file may add to.
_MERGED = ("component", "requires", "untouched", "native", "interpreter", "dlopen", "runtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A wheel that a recipe names by its path. key: where the recipe says so, for errors."""

    path: Path
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRecipe:
    """A recipe, the folder that its patches and locks are found from, and the digest of all files it was read from.

    overlays: the names of those that are in it, sorted; relocked: of those among them that ask for other versions.
    """

    recipe: Recipe
    path: Path
    patches: Path
    digest: str
    overlays: tuple[str, ...] = ()
    relocked: tuple[str, ...] = ()

    def bundle_name(self, target: Target) -> str:
        """`sglang-python312-cuda12_8-sm90-avx512-lean`: the recipe's name for it, and the overlays."""
        return "-".join([self.recipe.bundle_name(target), *self.overlays])

    def local_files(self) -> dict[str, LocalFile]:
        """The local files of the recipe by their sha256."""
        return {
            one.sha256 or "": LocalFile(path=self.path.parent / one.path,
                                        key=f"{self.path.name}: component[{index}].path ({one.name})")
            for index, one in enumerate(self.recipe.component) if one.path is not None
        }  # fmt: skip

    @property
    def spelling(self) -> str:
        """How the recipe is named on a command line."""
        return self.path.stem if self.path.parent == data_root() / "recipes" else str(self.path)

    @property
    def lock_command(self) -> str:
        """The command that makes its locks anew."""
        return " ".join(["compose lock", self.spelling, *(f"--overlay {name}" for name in self.relocked)])

    def lock_path(self, python: str, machine: str) -> Path:
        """Where the committed lock for one Python and machine is: beside the recipe (name as in PEP 751)."""
        stem = "-".join([self.path.stem, *self.relocked])
        return self.path.parent / f"pylock.{stem}-py{python.replace('.', '')}-{machine}.toml"


def data_root() -> Path:
    """The folder that holds recipes/ and patches/: the checkout, or the installed package's own data."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "recipes").is_dir() else Path(__file__).resolve().parents[1] / "_data"


def load_recipe(name: str, overlays: Iterable[str] = (), machine: str | None = None) -> LoadedRecipe:
    """A shipped recipe by name or as `STACK:VERSION`, or a recipe file by path (it ends in `.toml`), with overlays.

    `-builder` behind a name: every component that says how it is built comes from source, as by `--no-binary`.
    machine: decides where a version has a recipe for each machine. An overlay is `overlays/NAME.toml` beside the
    recipe, a shipped one, or a path.
    """
    found = load_named(name, overlays)
    fitting = [one for one in found if machine in one.recipe.machines] or found
    if len(fitting) > 1:
        raise RecipeError(
            f"{len(fitting)} recipes are {name}", where="--recipe", fix="Give one by its own name.",
            why=f"one for each machine: {', '.join(one.spelling for one in fitting)}",
        )  # fmt: skip
    return fitting[0]


def load_named(name: str, overlays: Iterable[str] = ()) -> list[LoadedRecipe]:
    """What a name stands for, as of `load_recipe`: one recipe, or those of a version for each machine."""
    chosen = tuple(overlays)
    return [_loaded(path, chosen, builder=name.endswith(BUILDER)) for path in _paths_of(name)]


def _paths_of(name: str) -> list[Path]:
    plain = plain_name(name)
    if ":" not in plain or plain.endswith(".toml"):
        return [_find(plain, [data_root() / "recipes"], "recipe")]
    stack, _, version = plain.partition(":")
    offered = {one.path: one.recipe for one in load_recipes().values() if one.recipe.name == stack}
    found = [path for path, recipe in offered.items() if recipe.version == version]
    if not found:
        known = sorted({f"{one.name}:{one.version}" for one in offered.values()})
        fix = f"Known: {', '.join(known)}." if known else _meant(stack)
        raise RecipeError(f"no recipe {plain!r}", where="--recipe", fix=fix)
    return found


def plain_name(name: str) -> str:
    """A recipe's name without BUILDER. A path has no such ending."""
    return name.removesuffix(BUILDER)


def _meant(stack: str) -> str:
    """Of a stack that no recipe is of."""
    known = sorted({one.recipe.name for one in load_recipes().values()})
    near = difflib.get_close_matches(stack, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}."


def _loaded(path: Path, overlays: Iterable[str], *, builder: bool = False) -> LoadedRecipe:
    digest = hashlib.sha256()
    recipe = parse_recipe(_merged(path, digest), path.name)
    chosen = _overlays(overlays, recipe, path.parent, digest)
    recipe = overlaid(recipe, chosen) if chosen else recipe
    beside = path.parent / "patches"
    patches = beside if beside.is_dir() else data_root() / "patches"
    return LoadedRecipe(recipe=_from_source(recipe) if builder else recipe, path=path, patches=patches,
                        digest=digest.hexdigest(), overlays=tuple(sorted(chosen)),
                        relocked=tuple(sorted(name for name, one in chosen.items() if one.relocks)))  # fmt: skip


def _from_source(recipe: Recipe) -> Recipe:
    """RecipeError where nothing says how it is built."""
    if not any(one.build for one in recipe.component):
        raise RecipeError(f"{recipe.name} {recipe.version} does not say how anything of it is built", where="--recipe",
                          fix=f"Leave {BUILDER} out.")  # fmt: skip
    always = [
        msgspec.structs.replace(one, build=msgspec.structs.replace(one.build, when="always")) if one.build else one
        for one in recipe.component
    ]
    return msgspec.structs.replace(recipe, component=tuple(always))


def _find(name: str, folders: Sequence[Path], what: str) -> Path:
    """The file of a recipe or overlay: a path that ends in `.toml`, or a name in the first folder that has it."""
    paths = [Path(name)] if name.endswith(".toml") else [folder / f"{name}.toml" for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    known = sorted({one.stem for folder in folders for one in folder.glob("*.toml") if not _is_data(one)})
    near = difflib.get_close_matches(name, known, n=1)
    fix = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}."
    raise RecipeError(f"no {what} {name!r}", where=str(paths[0]), fix=fix)


def _overlays(names: Iterable[str], recipe: Recipe, beside: Path, digest: Any) -> dict[str, Overlay]:  # noqa: ANN401
    """The overlays by name; each changes the digest, in an order that does not depend on the command line's."""
    folders = [beside / "overlays", data_root() / "recipes" / "overlays"]
    paths: dict[str, Path] = {}
    for path in (_find(name, folders, "overlay") for name in names):
        if path.stem in paths:
            raise RecipeError(f"overlay {path.stem!r} is given twice", where="--overlay", fix="Give it once.")
        paths[path.stem] = path
    return {name: parse_overlay(_digested(path, digest), recipe, path.name) for name, path in sorted(paths.items())}


def load_targets() -> Targets:
    """The vocabulary of targets."""
    path = data_root() / "recipes" / "targets.toml"
    return parse_targets(_parse(_read(path), path), path.name)


def load_recipes() -> dict[str, LoadedRecipe]:
    """All shipped recipes by the name that a command line has for them."""
    names = sorted(path.stem for path in (data_root() / "recipes").glob("*.toml") if not _is_data(path))
    return {name: _loaded(data_root() / "recipes" / f"{name}.toml", ()) for name in names}


def _is_data(path: Path) -> bool:
    return path.name in ("targets.toml", "measured.toml") or path.name.startswith("pylock.")


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
            data[key] = [*own, *(_rebased(one, Path(name).parent) if key == "component" else one for one in value)]


def _rebased(entry: Any, folder: Path) -> Any:  # noqa: ANN401
    """An included file's component with its local file's path relative to the recipe instead."""
    if isinstance(entry, Mapping) and isinstance(path := entry.get("path"), str) and path:
        return {**entry, "path": posixpath.join(folder.as_posix(), path)}
    return entry


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

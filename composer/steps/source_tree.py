"""The source of a build: fetched, identified by its digest, unpacked once, and patched exactly."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from composer._fs import host_errors
from composer._proc import clean_environ, run
from composer.errors import BuildError, FetchError, IntegrityError, RecipeError
from composer.formats.patch import apply_patch
from composer.interpreter.archive import unpack
from composer.model.lock import Artifact, Lock, LockedPackage
from composer.model.recipe import Component
from composer.model.source import Build
from composer.steps.load import LoadedRecipe, data_root
from composer.steps.source_lock import sdist_of

# PyTorch's release with all its submodules is the largest source that is built here.
_MEMBERS = 500_000
_BYTES = 16 << 30
_GIT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A patch of the recipe: its name below patches/, and its bytes."""

    name: str
    data: bytes

    @property
    def sha256(self) -> str:
        """Its digest in lower-case hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is unpacked. identity: what its bytes are known by. Of package, path and git one is given.

    package: to be fetched into the store. path: on this machine. size: bytes of it, as far as they are known.
    """

    identity: str
    size: int = 0
    package: LockedPackage | None = None
    path: Path | None = None
    git: str | None = None


def find_source(loaded: LoadedRecipe, component: Component, build: Build, lock: Lock) -> Source:
    """The source that a recipe names. FetchError for a local one that is not there, IntegrityError for another one."""
    if build.path is not None:
        return _local(loaded.path.parent / build.path, f"{loaded.path.name}: component {component.name}: build.path",
                      build.sha256)  # fmt: skip
    if build.shipped is not None:
        return _local(data_root() / "sources" / build.shipped,
                      f"{loaded.path.name}: component {component.name}: build.shipped", None)  # fmt: skip
    if build.git is not None:
        return Source(identity=f"git:{build.commit}", git=build.git)
    package = sdist_of(lock, component.name) if build.sdist else _released(component, build)
    if package is None:
        raise IntegrityError("the lock of this build holds no sdist", where=component.name,
                             fix="Run it again without --frozen: the lock is made anew.")  # fmt: skip
    artifact = package.artifacts[0]
    return Source(identity=f"sha256:{artifact.sha256}", size=artifact.size, package=package)


def find_patches(loaded: LoadedRecipe, build: Build) -> tuple[Patch, ...]:
    """The patches in the order of the recipe; RecipeError for those that are not there."""
    missing = [name for name in build.patches if not (loaded.patches / name).is_file()]
    RecipeError.collect([RecipeError("no such patch", where=str(loaded.patches / name)) for name in missing])
    with host_errors(loaded.patches):
        return tuple(Patch(name=name, data=(loaded.patches / name).read_bytes()) for name in build.patches)


def make_tree(source: Source, archive: Path | None, patches: Sequence[Patch], folder: Path) -> None:
    """Put the patched source into `folder`, which appears whole or not at all. archive: a fetched source's file.

    IntegrityError for an archive that is damaged or reaches outside, RecipeError for a patch that does not fit exactly,
    FetchError for a commit that cannot be had.
    """
    part = folder.with_name(f"{folder.name}.part")
    with host_errors(part):
        shutil.rmtree(part, ignore_errors=True)
    if source.git is not None:
        checkout(source.git, source.identity.removeprefix("git:"), part)
    elif source.path is not None and source.path.is_dir():
        with host_errors(part):
            shutil.copytree(source.path, part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        _refuse_changed(source, source.path, _tree_digest(part)[0])
    else:
        unpack(archive or source.path or Path(), part, members=_MEMBERS, size=_BYTES)
        if source.path is not None:
            with host_errors(source.path):
                _refuse_changed(source, source.path, _file_digest(source.path)[0])
    root = top_folder(part)
    for patch in patches:
        _patch(root, patch)
    with host_errors(folder):
        part.rename(folder)


def _refuse_changed(source: Source, path: Path, found: str) -> None:
    """A local source is known by its digest before it is copied, which may be long after."""
    if source.identity != f"sha256:{found}":
        raise IntegrityError("the local source changed while it was read", where=str(path), fix="Run it again.")


def top_folder(tree: Path) -> Path:
    """The single folder of a release's archive, or the tree itself."""
    with host_errors(tree):
        entries = list(tree.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() and not entries[0].is_symlink() else tree


def checkout(url: str, commit: str, folder: Path, *, protocols: str = "https") -> None:
    """A commit with its submodules, without history. git checks that the bytes are the commit's.

    Needs a `git` on PATH, and a server that gives out commits by their name. FetchError when that fails.
    """
    environ = clean_environ(GIT_TERMINAL_PROMPT="0", GIT_ALLOW_PROTOCOL=protocols, GIT_CONFIG_NOSYSTEM="1",
                            GIT_CONFIG_GLOBAL=os.devnull)  # fmt: skip
    with host_errors(folder):
        folder.mkdir(parents=True)
    for words in (
        ("init", "--quiet"),
        ("fetch", "--quiet", "--depth=1", url, commit),
        ("checkout", "--quiet", "--detach", commit),
        ("submodule", "--quiet", "update", "--init", "--recursive", "--depth=1"),
    ):
        run(["git", *words], cwd=folder, env=environ, timeout=_GIT_SECONDS, error=FetchError,
            fix="Install git, check the address and the commit, or use a release's archive.")  # fmt: skip


def _released(component: Component, build: Build) -> LockedPackage:
    url, sha256 = build.release(component.version or "")
    filename = unquote(urlsplit(url).path.rsplit("/", 1)[-1])
    artifact = Artifact(filename=filename, size=build.size or 0, sha256=sha256, url=url)
    return LockedPackage(name=component.name, version=component.version or "", index="url", artifacts=(artifact,))


def _local(path: Path, where: str, sha256: str | None) -> Source:
    if not path.exists():
        raise FetchError("the local source cannot be had", where=where, why=f"{path}: no such file or folder",
                         fix="Put it there, or correct the path.")  # fmt: skip
    with host_errors(path):
        found, size = _tree_digest(path) if path.is_dir() else _file_digest(path)
    if sha256 and sha256 != found:
        raise IntegrityError("the local source is not the one with this sha256", where=where,
                             why=f"expected {sha256}, got {found}",
                             fix="Put the right one there; if this is it, give its sha256 in the recipe.")  # fmt: skip
    return Source(identity=f"sha256:{found}", size=size, path=path)


def _file_digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()


def _tree_digest(folder: Path) -> tuple[str, int]:
    """sha256 over path, mode and content of everything below a folder, and the bytes of its files."""
    digest, total = hashlib.sha256(), 0
    for path in sorted(one for one in folder.rglob("*") if "__pycache__" not in one.parts):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            row = f"link {name}\0{path.readlink()}\0"
        elif path.is_file():
            found, size = _file_digest(path)
            total += size
            row = f"file {name}\0{path.stat().st_mode & 0o100}\0{found}\0"
        elif path.is_dir():
            row = f"folder {name}\0"
        else:
            raise IntegrityError("neither a file, a link nor a folder", where=str(path), fix="Remove it.")
        digest.update(row.encode("utf-8", "surrogateescape"))
    return digest.hexdigest(), total


def _patch(root: Path, patch: Patch) -> None:
    def read(name: str) -> bytes:
        path = root / name
        if not path.resolve().is_relative_to(root.resolve()):
            raise BuildError("reaches outside the source through a link", where=f"{patch.name}: {name}")
        return path.read_bytes()

    try:
        changed = apply_patch(patch.data, read)
    except RecipeError as fault:
        raise RecipeError(fault.what, where=f"{patch.name}: {fault.where}", why=fault.why, fix=fault.fix) from fault
    with host_errors(root):
        for name, data in changed.items():
            (root / name).write_bytes(data)

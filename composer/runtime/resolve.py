"""Find the model that SGLANG_MODEL names: here, in the bundle, in the Hugging Face cache, or leave it to a download.

    sglang-resolve-model [--json]

Writes what it found to a file for `sglang-serve` (SGLANG_MODEL_ENV_FILE, or one per model in the bundle's cache
folder, mode 0600). `sglang-serve` finds the model by itself if this did not run before.

Exit status: 0 (found, or to be downloaded), 1 the file cannot be written, 2 a command line or variable that cannot be
meant, 6 the model is not there or not whole.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from . import PREFIX, serve_files, serve_options, serve_record, serve_tokenizer
from .finding import Finding, error, warning
from .serve_report import MODEL, USAGE, Refusal, shown

_CHECK = "WHEEL_COMPOSER_MODEL_CHECK"
# A repository's name, as huggingface_hub allows it (utils/_validators.py), but for `--`, which its cache uses for `/`.
_PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?:{_PART}/)?{_PART}\Z")
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://")
_YES = ("1", "on", "yes", "true")  # what huggingface_hub takes for yes
#: Findings of a model's folder that do not matter with a flag.
_NEEDLESS = {
    "--tokenizer-path": {"model.tokenizer"}, "--skip-tokenizer-init": {"model.tokenizer"},
    "--load-format dummy": {"model.weights", "model.shard", "model.index"},
}  # fmt: skip

_Findings = tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where to look: the bundle's folder, a folder to write to (None: there is none), and the environment."""

    prefix: Path
    cache: Path | None
    environ: Mapping[str, str]

    @property
    def offline(self) -> bool:
        """Whether downloads are ruled out."""
        return (self.environ.get("HF_HUB_OFFLINE") or self.environ.get("TRANSFORMERS_OFFLINE") or "").lower() in _YES

    @property
    def online(self) -> bool:
        """Whether HF_HUB_OFFLINE says no in so many words: then the hub is asked, whatever the cache has."""
        return bool(self.environ.get("HF_HUB_OFFLINE")) and not self.offline

    @property
    def bundled(self) -> Path:
        """The bundle's models, laid out as a Hugging Face cache."""
        return self.prefix / "share" / "models" / "hub"

    @property
    def hub_cache(self) -> Path:
        """The Hugging Face cache, as huggingface_hub finds it (constants.py)."""
        environ = self.environ
        base = environ.get("XDG_CACHE_HOME") or "~/.cache"
        home = environ.get("HF_HOME") or f"{base}/huggingface"
        found = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
        return Path(os.path.expandvars(os.path.expanduser(found)))  # noqa: PTH111  # pathlib raises without a home


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A model, and what the server is to be told of it.

    asked: as it was asked for; a folder by its absolute path. source: `folder`, `file` (GGUF), `bundle`, `cache`, `hub`
    (to be downloaded), `remote` (a URL) or `name` (a word that is neither). folder: what was found; `path`: what the
    server is given, which is a folder of links where the tokenizer's class has to be another.
    """

    asked: str
    source: str
    folder: str
    path: str
    findings: _Findings = ()

    @property
    def local(self) -> bool:
        """Whether the server needs no network for the model itself, although a repository was asked for."""
        return self.source in ("bundle", "cache")


def identity(asked: str) -> str:
    """What a model is known by: a folder or file by its absolute path, everything else by its name."""
    return str(Path(asked).absolute()) if os.path.exists(asked) else asked  # noqa: PTH110  # takes any text


def resolve(asked: str, place: Place, *, revision: str = "", flags: Sequence[str] = ()) -> Resolved:
    """Find a model, check that it is whole, and mend its tokenizer's class where the bundle needs that.

    revision: a branch, tag or commit; of a repository's copies only that one will do. flags: those that the server will
    be given (`--flag`, `--flag value`); with some of them a model without tokenizer or weights is whole.

    Raises Refusal for a model that is not there or not whole, or whose name cannot be meant.
    """
    try:
        if identity(asked) != asked or asked.startswith("/"):
            found = _here(Path(asked).absolute(), place, flags)
        elif _REMOTE.match(asked):
            found = Resolved(asked=asked, source="remote", folder=asked, path=asked)
        else:
            found = _repository(asked, place, revision, flags)
    except OSError as fault:
        raise Refusal(MODEL, error("model.folder", asked, f"cannot be read: {fault.strerror}")) from None
    return mended(found, place)


def mended(found: Resolved, place: Place) -> Resolved:
    """The model with a tokenizer that the bundle's transformers can load. Raises Refusal without a cache folder."""
    folder = Path(found.folder)
    if found.source in ("folder", "bundle", "cache") and serve_tokenizer.is_needed(folder, place.prefix):
        return replace(found, path=str(serve_tokenizer.shadow(folder, place.cache)))
    return found


def located(name: str, place: Place) -> str:
    """The folder of a repository in the bundle or the cache; nothing where it is not. Nothing is checked."""
    if identity(name) != name or not _REPOSITORY.match(name):
        return ""
    found = _snapshot(place.bundled, name, "", any_=True) or _snapshot(place.hub_cache, name, "")
    return str(found or "")


def _here(path: Path, place: Place, flags: Sequence[str]) -> Resolved:
    if path.is_file():
        return Resolved(asked=str(path), source="file", folder=str(path), path=str(path))
    if not path.is_dir():
        raise Refusal(MODEL, error("model.folder", str(path), "there is no such folder", "Name one that is there."))
    if not (path / "config.json").is_file():
        # A folder `models--org--name` is often named in the place of its snapshot.
        inner = _snapshot(path.parent, path.name.removeprefix("models--"), "", any_=True)
        fix = f"Name the folder that holds config.json{f': {inner}' if inner else ''}."
        raise Refusal(MODEL, error("model.config", str(path), "is a folder without config.json, so no model", fix))
    return _whole(str(path), "folder", path, place, flags)


def _repository(asked: str, place: Place, revision: str, flags: Sequence[str]) -> Resolved:
    _check_name(asked)
    notes: list[Finding] = []
    bundled = _snapshot(place.bundled, asked, revision, any_=True)
    if bundled and (bundled / "config.json").is_file():
        return _whole(asked, "bundle", bundled, place, flags)
    if bundled:
        notes.append(warning("model.config", str(bundled), "holds no config.json: the bundle's copy is not used"))
    cached = None if place.online else _snapshot(place.hub_cache, asked, revision)
    if cached:
        try:
            return _whole(asked, "cache", cached, place, flags)
        except Refusal as refusal:  # a download completes it
            notes += [{**one, "severity": "note"} for one in refusal.findings]
    if place.offline:
        absent = error("model.absent", asked, "is neither in the bundle nor in the cache, and HF_HUB_OFFLINE is set",
                         f"Put it below {place.bundled}, name a folder, or unset HF_HUB_OFFLINE.")  # fmt: skip
        raise Refusal(MODEL, absent, *notes)
    source = "hub" if "/" in asked else "name"
    return Resolved(asked=asked, source=source, folder=asked, path=asked, findings=tuple(notes))


def _check_name(asked: str) -> None:
    if _REPOSITORY.match(asked):
        return
    if asked.startswith((".", "~")) or asked.count("/") > 1 or asked.endswith("/"):
        raise Refusal(MODEL, error("model.folder", asked, "there is no such folder", "Name one that is there."))
    raise Refusal(USAGE, error("model.name", repr(asked), "is no folder, and cannot be the name of a repository",
                                 "Give ORGANISATION/NAME or a folder."))  # fmt: skip


def _snapshot(hub: Path, name: str, revision: str, *, any_: bool = False) -> Path | None:
    """The folder of a revision (main) in a cache; with `any_` the first one where main is not there. Else None."""
    root = hub / f"models--{name.replace('/', '--')}"
    try:
        folders = {path.name: path for path in sorted((root / "snapshots").iterdir()) if path.is_dir()}
    except OSError:
        return None
    found = folders.get(_ref(root, revision or "main")) or folders.get(revision)
    return found or (next(iter(folders.values()), None) if any_ and not revision else None)


def _ref(root: Path, revision: str) -> str:
    try:
        with (root / "refs" / revision).open(encoding="ascii") as stream:
            return stream.read(200).strip()
    except (OSError, ValueError):
        return ""


def _whole(asked: str, source: str, folder: Path, place: Place, flags: Sequence[str]) -> Resolved:
    """The model in a folder, with what is odd about it. Raises Refusal for one that is damaged, unless switched off."""
    found: list[Finding] = []
    if place.environ.get(_CHECK) != "off":
        from .snapshot import faults

        needless = {id_ for flag in flags for id_ in _NEEDLESS.get(flag, ())}
        found = [{**one, "subject": os.path.normpath(folder / one["subject"])}
                 for one in faults(str(folder), deep=False) if one["id"] not in needless]  # fmt: skip
    errors = [one for one in found if one["severity"] == "error"]
    if errors:
        raise Refusal(MODEL, *errors)
    return Resolved(asked=asked, source=source, folder=str(folder), path=str(folder), findings=tuple(found))


def told(found: Resolved) -> str:
    """The lines that the reference's program says about a model."""
    lines = {
        "folder": f"[model] Using local model directory: {found.path}\n",
        "file": f"[model] Using local model file: {found.path}\n",
        "bundle": f"[model] Bundled: {found.asked} -> {found.path}\n",
        "cache": f"[model] Cached: {found.asked} -> {found.path}\n",
        "hub": f"[model] No bundled model found for {found.asked}; SGLang will download at runtime\n",
        "remote": f"[model] Remote: {found.asked}\n",
        "name": f"[model] SGLANG_MODEL={found.asked} (not an HF ID, not a local dir — passing through)\n",
    }
    shim = "  tokenizer compat: TokenizersBackend -> PreTrainedTokenizerFast (shadow)\n"
    return (shim if found.path != found.folder else "") + lines[found.source]


def record(found: Resolved, place: Place) -> Path:
    """Write what was found to the model's file and return its path. Raises Refusal where it cannot be written."""
    values = {"SGLANG_MODEL": found.path}
    if found.source == "bundle":
        values["SGLANG_BUNDLED_FROM"] = found.asked
    if found.local:
        values["HF_HUB_OFFLINE"] = place.environ.get("HF_HUB_OFFLINE") or "1"
    values |= {serve_record.ASKED: found.asked, serve_record.SOURCE: found.source,
               serve_record.FOLDER: found.folder, serve_record.BUNDLE: str(place.prefix)}  # fmt: skip
    path = serve_record.place(found.asked, place.cache, place.environ)
    if not path:
        raise serve_files.no_folder()
    with serve_files.locked(place.cache / "models") if place.cache else contextlib.nullcontext():
        serve_record.write(path, values)
    return path


def recalled(asked: str, place: Place) -> tuple[Resolved | None, list[Finding]]:
    """What `record` wrote about a model, if that still holds; None otherwise, and why if that needs a word."""
    known = identity(asked)
    path = serve_record.place(known, place.cache, place.environ)
    try:
        values, findings = serve_record.recall(path, known, place.prefix) if path else ({}, [])
    except OSError:  # the model's folder: `resolve` says more
        return None, []
    if not values:
        return None, findings
    folder, source = values[serve_record.FOLDER], values[serve_record.SOURCE]
    # Another revision may have come since, or the cache be another one, or not be wanted.
    if source != "folder" and (folder != located(known, place) or (source == "cache" and place.online)):
        return None, []
    found = Resolved(asked=known, source=values[serve_record.SOURCE], folder=folder, path=folder)
    return mended(found, place), findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Resolve SGLANG_MODEL and write the model's file."""
    parser = argparse.ArgumentParser("sglang-resolve-model", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was found as a JSON object")
    options = parser.parse_args(arguments)
    report: dict[str, object] = {"schema": 1, "status": 0}
    try:
        found, path = _run(place_here())
        report |= {"model": found.path, "asked": found.asked, "source": found.source, "env_file": str(path),
                   "findings": found.findings}  # fmt: skip
        sys.stderr.write(shown(found.findings) + told(found) + f"[model] Env file: {path}\n")
    except Refusal as refusal:
        report |= {"status": refusal.status, "findings": refusal.findings}
        sys.stderr.write(shown(refusal.findings))
    if options.json:
        print(json.dumps(report))
    return int(str(report["status"]))


def place_here() -> Place:
    """The bundle that this module is part of, and this process's environment."""
    from . import environment

    cache = environment.cache_folder()
    return Place(prefix=Path(PREFIX), cache=Path(cache) if cache else None, environ=os.environ)


def _run(place: Place) -> tuple[Resolved, Path]:
    flags, findings = serve_options.from_variables({"SGLANG_MODEL": place.environ.get("SGLANG_MODEL", "")})
    if findings:
        raise Refusal(USAGE, *findings)
    found = resolve(flags[0].value if flags else serve_options.DEFAULT_MODEL, place)
    return found, record(found, place)

"""Find the model that SGLANG_MODEL names: here, in the bundle, in the Hugging Face cache, or leave it to a download.

    sglang-resolve-model [--json]

Writes what it found to a file for `sglang-serve` (SGLANG_MODEL_ENV_FILE, or one per model in the bundle's cache
folder, mode 0600). `sglang-serve` finds the model by itself if this did not run before.

Exit status: 0 (found, or to be downloaded), 1 the file cannot be written, 2 a command line or variable that cannot be
meant, 6 the model is not there, not whole, or quantised in a way that the bundle's SGLang does not know.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..finding import Finding, error, warning
from ..model.place import Place, place_here
from . import env_file, files, options, quantization, tokenizer
from .report import MODEL, USAGE, Refusal, shown

_CHECK = "WHEEL_COMPOSER_MODEL_CHECK"
# The first bytes of every GGUF file (ggml's docs/gguf.md); sglang looks for them, too (check_gguf_file).
_GGUF = b"GGUF"
# A repository's name, as huggingface_hub allows it (utils/_validators.py), but for `--`, which its cache uses for `/`.
_PART = r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?:{_PART}/)?{_PART}\Z")
_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*://")
#: Findings of a model's folder that do not matter with a flag.
_NEEDLESS = {
    "--tokenizer-path": {"model.tokenizer"}, "--skip-tokenizer-init": {"model.tokenizer"},
    "--load-format dummy": {"model.weights", "model.shard", "model.index"},
    "--quantization": {"model.quantization"}, "--json-model-override-args": {"model.quantization"},
}  # fmt: skip

_Findings = tuple[Finding, ...]


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
    return mended(_loadable(found, place, flags), place)


def _loadable(found: Resolved, place: Place, flags: Sequence[str]) -> Resolved:
    """The model, unless the bundle's SGLang would end for its quantisation. Raises Refusal.

    Of what is yet to be downloaded only the name is known: a warning.
    """
    here = found.source in ("folder", "bundle", "cache")
    method = quantization.method_of(Path(found.folder)) if here else quantization.named_method(found.asked)
    if not method or place.environ.get(_CHECK) == "off" or "model.quantization" in _needless(flags):
        return found
    faults = quantization.faults(method, found.asked, place.prefix)
    if here and faults:
        raise Refusal(MODEL, *({**one, "fix": f"{one['fix']} {_CHECK}=off tries it all the same."} for one in faults))
    told = ({**one, "severity": "warning", "evidence": f"by its name {one['evidence']}"} for one in faults)
    return replace(found, findings=(*found.findings, *told))


def _needless(flags: Sequence[str]) -> set[str]:
    return {id_ for flag in flags for id_ in _NEEDLESS.get(flag, ())}


def mended(found: Resolved, place: Place) -> Resolved:
    """The model with a tokenizer that the bundle's transformers can load. Raises Refusal without a cache folder."""
    folder = Path(found.folder)
    if found.source in ("folder", "bundle", "cache") and tokenizer.is_needed(folder, place.prefix):
        return replace(found, path=str(tokenizer.shadow(folder, place.cache)))
    return found


def located(name: str, place: Place) -> str:
    """The folder of a repository in the bundle or the cache; nothing where it is not. Nothing is checked."""
    if identity(name) != name or not _REPOSITORY.match(name):
        return ""
    found = _snapshot(place.bundled, name, "", any_=True) or _snapshot(place.hub_cache, name, "")
    return str(found or "")


def _here(path: Path, place: Place, flags: Sequence[str]) -> Resolved:
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise Refusal(MODEL, error("model.folder", str(path), "there is no such folder", "Name one that is there."))
    if not (path / "config.json").is_file():
        # A folder `models--org--name` is often named in the place of its snapshot.
        inner = _snapshot(path.parent, path.name.removeprefix("models--"), "", any_=True)
        fix = f"Name the folder that holds config.json{f': {inner}' if inner else ''}."
        raise Refusal(MODEL, error("model.config", str(path), "is a folder without config.json, so no model", fix))
    return _whole(str(path), "folder", path, place, flags)


def _file(path: Path) -> Resolved:
    """A model of one file, which is GGUF: nothing else does sglang load that way. Raises Refusal."""
    with path.open("rb") as stream:
        if stream.read(len(_GGUF)) == _GGUF:
            return Resolved(asked=str(path), source="file", folder=str(path), path=str(path))
    beside = (path.parent / "config.json").is_file()
    fix = f"Name the folder: {path.parent}." if beside else "Name a folder that holds config.json, or a GGUF file."
    raise Refusal(MODEL, error("model.file", str(path), "is a file, and no GGUF file", fix))


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
        from ..model.snapshot import faults

        needless = _needless(flags)
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
    values |= {env_file.ASKED: found.asked, env_file.SOURCE: found.source,
               env_file.FOLDER: found.folder, env_file.BUNDLE: str(place.prefix)}  # fmt: skip
    path = env_file.place(found.asked, place.cache, place.environ)
    if not path:
        raise files.no_folder()
    with files.locked(place.cache / "models") if place.cache else contextlib.nullcontext():
        env_file.write(path, values)
    return path


def recalled(asked: str, place: Place, flags: Sequence[str] = ()) -> tuple[Resolved | None, list[Finding]]:
    """What `record` wrote about a model, if that still holds; None otherwise, and why if that needs a word.

    The model itself is looked at as `resolve` does, with the same `flags`: it may have been changed since.
    """
    known = identity(asked)
    path = env_file.place(known, place.cache, place.environ)
    try:
        values, findings = env_file.recall(path, known, place.prefix) if path else ({}, [])
    except OSError:  # the model's folder: `resolve` says more
        return None, []
    if not values:
        return None, findings
    folder, source = values[env_file.FOLDER], values[env_file.SOURCE]
    # Another revision may have come since, or the cache be another one, or not be wanted.
    if source != "folder" and (folder != located(known, place) or (source == "cache" and place.online)):
        return None, []
    try:
        found = _loadable(_whole(known, source, Path(folder), place, flags), place, flags)
    except (OSError, Refusal):  # `resolve` says more, or finds another
        return None, []
    return mended(found, place), findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Resolve SGLANG_MODEL and write the model's file."""
    parser = argparse.ArgumentParser("sglang-resolve-model", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was found as a JSON object")
    asked = parser.parse_args(arguments)
    report: dict[str, object] = {"schema": 1, "status": 0}
    try:
        found, path = _run(place_here())
        report |= {"model": found.path, "asked": found.asked, "source": found.source, "env_file": str(path),
                   "findings": found.findings}  # fmt: skip
        sys.stderr.write(shown(found.findings) + told(found) + f"[model] Env file: {path}\n")
    except Refusal as refusal:
        report |= {"status": refusal.status, "findings": refusal.findings}
        sys.stderr.write(shown(refusal.findings))
    if asked.json:
        print(json.dumps(report))
    return int(str(report["status"]))


def _run(place: Place) -> tuple[Resolved, Path]:
    flags, findings = options.from_variables({"SGLANG_MODEL": place.environ.get("SGLANG_MODEL", "")})
    if findings:
        raise Refusal(USAGE, *findings)
    found = resolve(flags[0].value if flags else options.DEFAULT_MODEL, place)
    return found, record(found, place)

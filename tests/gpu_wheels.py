"""Wheels with GPU code: real libraries around fat binaries made here, under licences that allow changes or forbid them.

`kernels` (MIT) needs a library of `nvidia-vendor` (proprietary) without saying where it is; it also brings a library
whose code must be left alone, one without GPU code, and what looks like an object and is none. `quiet` says nothing of
its licence.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.fatbins import Parts, container, gpu_library, image
from tests.shared_objects import library
from tests.wheels import build_wheel, wheel_filename

TAG = "py3-none-manylinux_2_17_x86_64"
MIT = b"MIT License\n\nPermission is hereby granted, free of charge, to use, copy, modify, merge, publish\n"
EULA = b"""End User License Agreement

Except as expressly provided in this Agreement, you may not copy, sell, rent,
sublicense, transfer, distribute, modify, or create derivative works of the SDK.
"""
KERNELS = wheel_filename("kernels", "1.0", TAG)
VENDOR = wheel_filename("nvidia-vendor", "12.0", TAG)
QUIET = wheel_filename("quiet", "1.0", TAG)
#: Bytes of the large library of `kernels`, all but a few of them code for SM 80.
LARGE = 24 << 20
_CODE = bytes(range(1, 201)) * 150
_INIT = (
    b'import ctypes\nimport pathlib\n\nlibrary = ctypes.CDLL(str(pathlib.Path(__file__).parent / "lib/libfat.so"))\n'
)


def fatbin(*names: str) -> bytes:
    """A container of `elf80`, `ptx90`, ... with 30 kB each."""
    return container(*(image(name[:3], int(name[3:].rstrip("af")), name[3:].lstrip("0123456789"), payload=_CODE)
                       for name in names))  # fmt: skip


#: What the fat libraries hold.
FATBINS = (fatbin("elf80", "elf90", "elf100", "ptx90"), fatbin("elf80"))


@functools.cache
def libraries() -> Mapping[str, bytes]:
    """The shared objects by name."""
    noise = random.Random(0).randbytes(LARGE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vendor = gpu_library(folder / "libvendor.so.12", Parts(fatbins=FATBINS), "-Wl,-soname,libvendor.so.12", "-g")
        needs = ("-g", "-Wl,--no-as-needed", str(vendor))
        gpu_library(folder / "libfat.so", Parts(fatbins=FATBINS), *needs, "-Wl,-soname,libfat.so")
        large = (container(image("elf", 80, payload=noise)), *FATBINS)
        gpu_library(folder / "liblarge.so", Parts(fatbins=large))
        gpu_library(folder / "libodd.so", Parts(fatbins=FATBINS, extra=".data\n.8byte fatbin_0 + 40"), "-s")
        library(folder / "libplain.so", "int one(void) { return 1; }", "-s")
        names = ("libvendor.so.12", "libfat.so", "liblarge.so", "libodd.so", "libplain.so")
        return {name: (folder / name).read_bytes() for name in names}


def kernels(*, licence: bytes = MIT, large: bool = False) -> bytes:
    """The wheel of `kernels`."""
    made = libraries()
    names = ["libfat.so", "libodd.so", "libplain.so", *(["liblarge.so"] if large else [])]
    files = {"kernels/__init__.py": _INIT, **{f"kernels/lib/{name}": made[name] for name in names}}
    files["kernels/data/odd.bin"] = b"\x7fELF of the tests"
    files["kernels/_vendor/other-1.0.dist-info/licenses/LICENSE"] = b"of something else"
    texts = {"METADATA": _metadata("kernels", "1.0", "License-Expression: MIT", "Requires-Dist: nvidia-vendor==12.0"),
             "licenses/LICENSE": licence}  # fmt: skip
    return build_wheel("kernels", "1.0", files, tag=TAG, dist_info=texts,
                       entry_points={"console_scripts": {"kernels-hello": "kernels:library"}})  # fmt: skip


def vendor() -> bytes:
    """The wheel of `nvidia-vendor`, whose METADATA and licence disagree, as those of nvidia-nvshmem-cu12 3.3.20 do."""
    files = {"nvidia/vendor/__init__.py": b"", "nvidia/vendor/lib/libvendor.so.12": libraries()["libvendor.so.12"]}
    texts = {"METADATA": _metadata("nvidia-vendor", "12.0", "License: BSD-3-Clause"), "License.txt": EULA}
    return build_wheel("nvidia-vendor", "12.0", files, tag=TAG, dist_info=texts)


def quiet() -> bytes:
    """The wheel of `quiet`."""
    return build_wheel("quiet", "1.0", {"quiet/libfat.so": libraries()["libvendor.so.12"]}, tag=TAG)


def _metadata(name: str, version: str, *lines: str) -> bytes:
    return "\n".join(["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines, "", ""]).encode()

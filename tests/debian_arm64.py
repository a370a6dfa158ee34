"""Debian's arm64 packages on this x86_64 machine: a CPython in the layout of an archive, and a root to run it in.

apt is asked through folders of its own, so nothing is installed and the system's list of architectures stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

#: Debian's package `qemu-user-static`: runs the programs of other machines.
QEMU = shutil.which("qemu-aarch64-static")
#: Of Debian 12.
MINOR = "3.11"
PYTHON = (
    "python3.11", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libpython3.11-dev",
    "libexpat1", "libffi8", "libbz2-1.0", "liblzma5", "libssl3", "libsqlite3-0", "libuuid1", "zlib1g",
)  # fmt: skip
#: What every host has, and the C++ runtime that most have.
HOST = ("libc6", "libgcc-s1", "libstdc++6", "zlib1g")
# A Neoverse N1. qemu-user shows this machine's file, and cpuinfo, which is part of PyTorch, crashes on x86's.
_CPUINFO = """\
processor\t: {}
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
_SOURCES = "deb http://deb.debian.org/debian bookworm main\n"


def root(folder: Path, packages: Sequence[str]) -> Path:
    """A folder with the files of arm64 packages, as on a host with a merged /usr."""
    made = folder / "root"
    (made / "usr/lib").mkdir(parents=True)
    (made / "lib").symlink_to("usr/lib")
    for package in _download(folder / "apt", packages):
        # dpkg-deb replaces the link by a folder; tar does not.
        files = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "--keep-directory-symlink", "-C", made], input=files, check=True)
    (made / "proc").mkdir()
    (made / "proc/cpuinfo").write_text("".join(map(_CPUINFO.format, range(os.cpu_count() or 1))))
    return made


def python_archive(folder: Path) -> Path:
    """An `install_only` archive, as of python-build-standalone, of Debian's CPython for arm64."""
    usr = root(folder, PYTHON) / "usr"
    path = folder / f"cpython-{MINOR}-aarch64-install_only.tar.gz"
    libraries = usr / "lib/aarch64-linux-gnu"
    wanted = {f"bin/python{MINOR}": usr / f"bin/python{MINOR}"}
    wanted |= {f"lib/{one.name}": one for one in sorted(libraries.glob("*.so.*")) if one.is_file()}
    trees = {f"lib/python{MINOR}": usr / f"lib/python{MINOR}", "include": usr / "include"}
    for name, tree in trees.items():
        wanted |= {f"{name}/{one.relative_to(tree)}": one for one in sorted(tree.rglob("*")) if one.is_file()}
    with tarfile.open(path, "w:gz", compresslevel=1, dereference=True) as tar:
        for name, source in wanted.items():
            tar.add(source, f"python/{name}", recursive=False)
    return path


def _download(folder: Path, packages: Sequence[str]) -> list[Path]:
    for name in ("lists/partial", "cache/archives/partial", "debs"):
        (folder / name).mkdir(parents=True)
    (folder / "sources.list").write_text(_SOURCES)
    settings = {
        "Dir::Etc::SourceList": folder / "sources.list", "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists", "Dir::State::Status": "/dev/null", "Dir::Cache": folder / "cache",
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "root",
    }  # fmt: skip
    options = [f"-o{name}={value}" for name, value in settings.items()]
    for words in (["update"], ["download", *packages]):
        subprocess.run(["apt-get", "-qq", *options, *words], check=True, cwd=folder / "debs", stdout=subprocess.DEVNULL)
    return sorted((folder / "debs").glob("*.deb"))


def emulated(host: Path, *words: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """A program of aarch64, run with the libraries of `host`, a folder that `root` made."""
    assert QEMU is not None
    # -E: a variable of the program and not of qemu, whose own loader would look into an LD_LIBRARY_PATH, too.
    settings = [word for name, value in environ.items() for word in ("-E", f"{name}={value}")]
    return subprocess.run([QEMU, "-cpu", "neoverse-n1", "-L", host, *settings, *words], capture_output=True, text=True,
                          cwd="/", timeout=900, env={"PATH": os.defpath})  # fmt: skip

"""PyTorch's source from where packages come from: the parts as Debian and PyPI have them, put together to one archive.

A release of PyTorch with its submodules is one archive on one host. Debian has the same code without the submodules,
and most of them as sources of their own; the others are parts of sdists. Every file is known by its sha256, and so is
the tree that they make. Only what a build without accelerators, distribution and quantised kernels needs is here.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

import zstandard

from composer._proc import run
from composer.errors import ComposerError, HostError, IntegrityError
from composer.model.lock import Artifact, LockedPackage
from composer.steps.fetch import fetch
from composer.store import Store

RECIPE = Path(__file__).with_name("data") / "pytorch-cpu.toml"
ARCHIVE = "pytorch-2.6.0-debian.tar.zst"
#: Of the tar inside: zstd may compress it in another way elsewhere.
TREE_SHA256 = "8873795c2aae3005b89e7f01c30acf2d0b3ec67ed9f384c2edd282eaf816de33"
_TOP = "pytorch-2.6.0"
_EPOCH = 1738108800  # the day 2.6.0 was released; the build system only asks whether files change
_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tree inside a source: its folder `inner` (below the archive's single one) becomes `into`.

    source: below `pool/main/` of a Debian mirror, or NAME==VERSION of an sdist. without: folders, below `into`.
    """

    source: str
    size: int
    sha256: str
    into: str
    inner: str = ""
    without: tuple[str, ...] = ()

    @property
    def is_sdist(self) -> bool:
        """Whether PyPI has it, and not Debian."""
        return "==" in self.source

    @property
    def artifact(self) -> Artifact:
        """The file of it."""
        name = self.source.replace("==", "-") + ".tar.gz" if self.is_sdist else self.source.rpartition("/")[2]
        return Artifact(filename=name, size=self.size, sha256=self.sha256)


PARTS = (
    Part(
        source="p/pytorch/pytorch_2.6.0+dfsg.orig.tar.xz", size=27212640,
        sha256="099a9601bc40d67656e75735c44abedb0fbe92d08817852ab7472eebb7e6ddff", into="",
    ),
    # Debian keeps Kineto beside its packaging; its headers are included without it, too.
    Part(
        source="p/pytorch/pytorch_2.6.0+dfsg-7.debian.tar.xz", size=216036,
        sha256="3290d4e5168b6e44191882213f61ad41c134a912fe11a44364c2e74f81f68af0", into="third_party/kineto",
        inner="kineto-338140f58a28d599da3434ced4fd2d75dd1a213d",
    ),
    Part(
        source="c/cpuinfo/cpuinfo_0.0~git20250905.877328f.orig.tar.xz", size=1765972,
        sha256="557ca404a3836b9f335a3a06b65ff9fe9dbaaefab7fb5c0185f53d9f33615a10", into="third_party/cpuinfo",
        without=("test",),
    ),
    Part(
        source="s/sleef/sleef_3.9.0.orig.tar.gz", size=1808220,
        sha256="b2a1acd3f1860299848b4e24238a4609fbb85761a1a85bac5573347b90d0440b", into="third_party/sleef",
    ),
    Part(
        source="p/protobuf/protobuf_3.21.12.orig.tar.gz", size=5141502,
        sha256="930c2c3b5ecc6c9c12615cf5ad93f1cd6e12d0aba862b572e076259970ac3a53", into="third_party/protobuf",
        without=("benchmarks", "csharp", "java", "js", "objectivec", "php", "python", "ruby"),
    ),
    Part(
        source="o/onnx/onnx_1.17.0.orig.tar.gz", size=12475304,
        sha256="8d5e983c36037003615e5a02d36b18fc286541bf52de1a78f6cf9f32005a820e", into="third_party/onnx",
        without=("docs", "onnx/backend/test/data"),
    ),
    Part(
        source="pybind11==2.13.6", size=218403,
        sha256="ba6af10348c12b24e92fa086b39cfba0eff619b61ac77c406167d813b096d39a", into="third_party/pybind11/include",
        inner="pybind11/include",
    ),
    Part(
        source="f/fmtlib/fmtlib_10.1.1+ds1.orig.tar.gz", size=329952,
        sha256="7000f214d2628f04174822f8048c573f1608194408d7931121595a03f1c18a17", into="third_party/fmt",
    ),
    Part(
        source="f/flatbuffers/flatbuffers_23.5.26+dfsg.orig.tar.xz", size=1372852,
        sha256="0d309fd2c47bbbebd450e68d1419c336d53d1b8f5ce47e1f1f7f28f452fc6f3b",
        into="third_party/flatbuffers/include", inner="include",
    ),
    Part(
        source="c/cpp-httplib/cpp-httplib_0.18.7.orig.tar.xz", size=711948,
        sha256="c88f6495da71e778c82c22995b547a92ceb41cc4016f9028df67106a24b9210d", into="third_party/cpp-httplib",
        without=("test",),
    ),
    Part(
        source="n/nlohmann-json3/nlohmann-json3_3.11.3.orig.tar.gz", size=8053705,
        sha256="0d8ef5af7f9794e3263480193c491549b2ba6cc74bb018906202ada498a79406",
        into="third_party/nlohmann/include", inner="include",
    ),
    Part(
        source="f/fp16/fp16_0.0~git20200514.4dfe081.orig.tar.xz", size=44692,
        sha256="7d7782b37b74136e0e12593a2a93ccbe7db831f4374cc408e44623d9b708b54e", into="third_party/FP16",
    ),
    Part(
        source="p/psimd/psimd_0.0~git20200517.072586a.orig.tar.xz", size=5824,
        sha256="32bbce81289866e3419e36cab6541bbddb6d45d3db10a7dcd2598dc9d0c8c6f4", into="third_party/psimd",
    ),
    Part(
        source="e/eigen3/eigen3_3.4.0.orig.tar.bz2", size=2143091,
        sha256="b4c198460eba6f28d34894e3a5710998818515104d6e74e5cc331ce31e46e626", into="third_party/eigen",
        without=("test", "doc", "bench"),
    ),
    Part(
        source="numpy==2.2.6", size=20276440,
        sha256="e29554e2bef54a90aa5cc07da6ce955accb83f21ab5de01a62c8478897b264fd", into="third_party/pocketfft",
        inner="numpy/fft/pocketfft",
    ),
)  # fmt: skip


def make(folder: Path) -> Path:
    """Put the archive and its recipe into a folder; the recipe's path is the result.

    FetchError for a part that can be had nowhere, IntegrityError for other bytes, and for another tree than the known.
    """
    archive, recipe = folder / ARCHIVE, folder / RECIPE.name
    folder.mkdir(parents=True, exist_ok=True)
    if not archive.is_file():
        paths = obtained(Store())
        part = archive.with_name(f".{ARCHIVE}.part")
        found = written(part, paths)
        if found != TREE_SHA256:
            part.unlink()
            raise IntegrityError("the parts make another tree", where=ARCHIVE, why=f"{found}, not {TREE_SHA256}")
        part.replace(archive)
    shutil.copyfile(RECIPE, recipe)
    return recipe


def obtained(store: Store) -> Mapping[str, Path]:
    """Every source by its sha256: from the store, this machine's Debian mirrors, or PyPI."""
    sites = debian_mirrors()
    urls = {part.sha256: [f"{site}/pool/main/{part.source}" for site in sites] for part in PARTS if not part.is_sdist}
    return fetch([_package(part, urls) for part in PARTS], into=store.root, alternatives=urls).paths


def debian_mirrors() -> list[str]:
    """The sites that apt is set up with on this machine. HostError without apt or without any."""
    fix = "Run it on Debian or Ubuntu, or bring the archive from there."
    answer = run(["apt-get", "indextargets", "--format", "$(SITE)"], timeout=_SECONDS, error=HostError, fix=fix)
    sites = [site.rstrip("/") for site in dict.fromkeys(answer.decode().split()) if site.startswith("http")]
    if not sites:
        raise HostError("apt knows no mirror", where="apt-get indextargets", fix="Run `apt-get update`.")
    return sites


def written(path: Path, sources: Mapping[str, Path]) -> str:
    """Write the archive; the sha256 of the tar inside."""
    with path.open("wb") as raw, zstandard.ZstdCompressor(level=6).stream_writer(raw) as packed:
        hashed = _Hashed(cast(IO[bytes], packed))
        with tarfile.open(fileobj=cast(IO[bytes], hashed), mode="w|", format=tarfile.GNU_FORMAT) as tar:
            for part in PARTS:
                for member, data in _members(part, sources[part.sha256]):
                    tar.addfile(member, data)
    return hashed.digest.hexdigest()


def _members(part: Part, source: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """The files and links of a part under their new names, in the order of the source."""
    prefix = part.inner.split("/") if part.inner else []
    with tarfile.open(source) as tar:
        for member in tar:
            words = member.name.removeprefix("./").split("/")[1:]
            inside = "/".join(words[len(prefix) :])
            if words[: len(prefix)] != prefix or not inside or not (member.isfile() or member.issym()):
                continue
            if any(inside.startswith(f"{folder}/") for folder in part.without):
                continue
            info = tarfile.TarInfo("/".join(filter(None, (_TOP, part.into, inside))))
            info.mtime, info.type, info.linkname, info.size = _EPOCH, member.type, member.linkname, member.size
            info.mode = 0o755 if member.mode & 0o100 else 0o644
            yield info, tar.extractfile(member) if member.isfile() else None


def _package(part: Part, urls: Mapping[str, list[str]]) -> LockedPackage:
    if part.is_sdist:
        name, version = part.source.split("==")
        return LockedPackage(name=name, version=version, index="pypi", artifacts=(part.artifact,))
    artifact = replace(part.artifact, url=urls[part.sha256][-1])
    name, _, version = artifact.filename.partition(".orig.")[0].partition("_")
    return LockedPackage(name=name, version=version, index="url", artifacts=(artifact,))


class _Hashed:
    """What `tarfile` writes to: passes on, and hashes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.stream.write(data)


def main() -> int:
    """`FOLDER`; prints the recipe's path."""
    parser = argparse.ArgumentParser(description="Put PyTorch's source and a recipe for it into a folder.")
    parser.add_argument("folder", type=Path)
    try:
        print(make(parser.parse_args().folder))
    except ComposerError as fault:
        print(fault, file=sys.stderr)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

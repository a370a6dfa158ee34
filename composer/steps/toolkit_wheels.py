"""A CUDA toolkit put together from locked wheels, as a folder in the store.

The wheels of CUDA 13 hold a compiler that works where it is unpacked, but for what a linker looks for: `lib64`, names
of libraries without a version, and a libcuda to link with where there is no driver. There is no such set for CUDA 12:
its wheels have neither nvcc nor cicc.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import msgspec

from composer._fs import host_errors, write_atomic
from composer._proc import clean_environ, run
from composer.errors import BuildError, CollisionError, FetchError, HostError, LockError
from composer.events import Event, Listener
from composer.formats.nvcc import HostLimits, driver_functions
from composer.formats.wheel import read_wheel, verified_stream
from composer.model.lock import Artifact, Lock, lock_name, render_lock
from composer.model.target import Target
from composer.model.toolchain import PinnedToolchain
from composer.steps.artifact import artifact_path
from composer.steps.fetch import Fetched, FetchEvent, fetch
from composer.steps.host_compiler import HostCompiler
from composer.steps.load import data_root
from composer.steps.locks import read_lock
from composer.steps.resolve import ResolveRequest, resolve
from composer.steps.survey import mapped_wheel
from composer.steps.toolkit import Toolkit, read_toolkit
from composer.store import Store, key_of

_VERSION = 1
_LOCK_VERSION = 1
_KIND = "toolchain"
# Any will do: none of the wheels is for one Python.
_PYTHON = "3.12"
_STUB_LIBRARY = 34  # CUDA_ERROR_STUB_LIBRARY, with which NVIDIA's own stub answers
_TIMEOUT = 120.0


class _Contents(msgspec.Struct, frozen=True, kw_only=True):
    """What a finished toolkit holds: bytes by path, links by their target. It is written last."""

    files: Mapping[str, int]
    links: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelToolkit:
    """A toolkit made of `lock`'s distributions; compiler_only: of those alone that compile and link.

    spec: what recipes/toolchains/toolchains.toml says of it.
    """

    name: str
    spec: PinnedToolchain
    lock: Lock
    compiler_only: bool

    @property
    def packages(self) -> tuple[str, ...]:
        """Names of its distributions, sorted."""
        wanted = set(self.spec.compiler) if self.compiler_only else {one.name for one in self.lock.packages}
        return tuple(sorted(wanted))

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """Its wheels."""
        names = set(self.packages)
        return tuple(artifact for one in self.lock.packages if one.name in names for artifact in one.artifacts)

    @property
    def key(self) -> str:
        """Its key in the store: the digests of all wheels, and the version of what is done to them."""
        return key_of(_KIND, _VERSION, artifacts=sorted(one.sha256 for one in self.artifacts), root=self.spec.root)

    @property
    def version(self) -> str:
        """Of its compiler, `13.0.88`."""
        return self.lock.pins["nvidia-cuda-nvcc"]

    def folder(self, store: Store) -> Path:
        """Where it is in the store, made or not."""
        return store.path(_KIND, self.key, "")

    def root(self, store: Store) -> Path:
        """Its CUDA_HOME, made or not."""
        return self.folder(store) / self.spec.root

    def is_made(self, store: Store) -> bool:
        """Whether it is in the store, whole: every file is there and has its size."""
        contents, folder = store.load(_KIND, self.key, _Contents), self.folder(store)
        return contents is not None and contents == _contents(folder)

    def missing(self, store: Store) -> tuple[Artifact, ...]:
        """The wheels that the store lacks."""
        return tuple(one for one in self.artifacts if not artifact_path(store.root, one).is_file())


# --- locks -----------------------------------------------------------------------------------------------------------


def lock_path(name: str, machine: str) -> Path:
    """Where the committed lock of a toolchain is; PEP 751 allows no dot within the name."""
    return data_root() / "recipes" / "toolchains" / f"pylock.{name.replace('.', '-')}-{machine}.toml"


def renew_toolchain_lock(name: str, spec: PinnedToolchain, machine: str) -> tuple[Lock, Path]:
    """Resolve a toolchain's wheels again and write their lock. Raises what `resolve` raises."""
    path = lock_path(name, machine)
    lock = resolve(ResolveRequest(
        name=lock_name(path.name), recipe=_lock_digest(spec, machine),
        python=_PYTHON, machine=machine, roots=spec.requires, constraints=spec.constraints,
        platforms=Target(sms=(90,), isa="", cuda=spec.cuda, python=_PYTHON, machine=machine).platforms,
    ))  # fmt: skip
    write_atomic(path, render_lock(lock).encode())
    return lock, path


def toolchain_lock(name: str, spec: PinnedToolchain, machine: str) -> Lock | None:
    """The committed lock, None where a toolchain has none for this machine; LockError when it is stale."""
    path = lock_path(name, machine)
    if not path.is_file():
        return None
    lock = read_lock(path)
    unknown = sorted({*spec.compiler, "nvidia-cuda-nvcc"} - lock.pins.keys())
    if lock.recipe != _lock_digest(spec, machine) or unknown:
        raise LockError("does not fit toolchains.toml any more", where=path.name,
                        why=f"it lacks {', '.join(unknown)}" if unknown else None,
                        fix=f"Run `compose toolchain lock {name}` where an index can be reached.")  # fmt: skip
    return lock


def _lock_digest(spec: PinnedToolchain, machine: str) -> str:
    return key_of("toolchain-lock", _LOCK_VERSION, requires=sorted(spec.requires),
                  constraints=sorted(spec.constraints), machine=machine)  # fmt: skip


# --- making one ------------------------------------------------------------------------------------------------------


def make_toolkit(toolkit: WheelToolkit, compiler: HostCompiler, store: Store, *, offline: bool,
                 wheelhouses: Sequence[Path], listener: Listener) -> None:  # fmt: skip
    """Put the toolkit into the store if it is not there yet: fetched, unpacked and mended, whole or not at all.

    compiler: makes the libcuda to link with. A killed run keeps its downloads; two runs at once make it once. Raises
    what `fetch` raises, HostError for too little space, BuildError when it is not what toolchains.toml says it is.
    """
    if not toolkit.is_made(store):
        with store.lock(f"{_KIND}-{toolkit.key}"):
            if not toolkit.is_made(store):  # another process was faster
                _make(toolkit, compiler, store, offline=offline, wheelhouses=wheelhouses, listener=listener)


def limits_of(spec: PinnedToolchain) -> HostLimits:
    """The host compilers that it takes."""
    return HostLimits(gcc_newest=spec.gcc_newest, clang_oldest=spec.clang_oldest, clang_newest=spec.clang_newest)


def _make(toolkit: WheelToolkit, compiler: HostCompiler, store: Store, *, offline: bool,
          wheelhouses: Sequence[Path], listener: Listener) -> None:  # fmt: skip
    fetched = fetch_wheels(toolkit, store, offline=offline, wheelhouses=wheelhouses, listener=listener)
    with store.writing(_KIND, toolkit.key, "") as folder, host_errors(folder):
        folder.mkdir()
        wheels = {one.sha256: fetched.paths[one.sha256] for one in toolkit.artifacts}
        _check_space(wheels, folder)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda digest: _unpack(wheels[digest], digest, folder, listener), wheels))
        mend(folder / toolkit.spec.root, compiler)
        _check_facts(toolkit, read_toolkit(folder / toolkit.spec.root, "wheels"))
        contents = _contents(folder)
    store.save(_KIND, toolkit.key, contents)


def fetch_wheels(toolkit: WheelToolkit, store: Store, *, offline: bool, wheelhouses: Sequence[Path],
                 listener: Listener) -> Fetched:  # fmt: skip
    """All its wheels, in the store. FetchError, with nothing asked, where `offline` leaves some out of reach."""
    gone = [one for one in toolkit.missing(store) if not any((at / one.filename).is_file() for at in wheelhouses)]
    if offline and gone:
        size = sum(one.size for one in gone) / 1e6
        raise FetchError(
            f"{len(gone)} wheels are not here, and no index may be asked", where=toolkit.name,
            why=f"{size:.1f} MB: {', '.join(one.filename for one in gone)}",
            fix=f"Run `compose toolchain ensure {toolkit.name} -o WHEELHOUSE` where there is a network, and give that "
                "folder here with --wheelhouse.",
        )  # fmt: skip
    names = set(toolkit.packages)
    return fetch(
        [one for one in toolkit.lock.packages if one.name in names], into=store.root, wheelhouse=wheelhouses,
        offline=offline, progress=functools.partial(_tell, listener),
    )  # fmt: skip


def _tell(listener: Listener, event: FetchEvent) -> None:
    listener(Event(step="fetch", subject=event.filename, done=event.done, total=event.size,
                   finished=event.state in ("present", "done", "missing")))  # fmt: skip


def _check_space(wheels: Mapping[str, Path], folder: Path) -> None:
    needed = 0
    for digest, path in wheels.items():
        with mapped_wheel(path, digest) as view:
            needed += sum(member.size for member in read_wheel(view, path.name).members.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise HostError("too little space for the toolchain", where=str(folder.parent),
                        why=f"it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                        fix="Free some space, or set WHEEL_COMPOSER_STORE to another folder.")  # fmt: skip


def _unpack(wheel: Path, digest: str, folder: Path, listener: Listener) -> None:
    """Every file of a wheel, each proven against RECORD."""
    with mapped_wheel(wheel, digest) as view:
        opened = read_wheel(view, wheel.name)
        for member in opened.members.values():
            path = folder / member.path
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("xb") as out:
                    for piece in verified_stream(view, opened, member):
                        out.write(piece)
                    os.fchmod(out.fileno(), member.mode)
            except FileExistsError as fault:
                raise CollisionError("is in two wheels", where=member.path, why=wheel.name) from fault
    listener(Event(step="toolchain", subject=wheel.name, finished=True))


def mend(root: Path, compiler: HostCompiler) -> None:
    """Add what linkers look for and the wheels lack: `lib64`, libX.so for every libX.so.N, and a stub of the driver.

    The stub answers every call with CUDA_ERROR_STUB_LIBRARY; a linker needs section headers, so a compiler makes it.
    """
    library = root / "lib"
    (root / "lib64").symlink_to("lib")
    for path in sorted(library.glob("lib*.so.*")):
        plain = library / re.sub(r"\.so\.[\d.]+$", ".so", path.name)
        if not plain.exists():
            plain.symlink_to(path.name)
    header = (root / "include" / "cuda.h").read_text("utf-8", "replace")
    lines = [f"int {name}(void) {{ return {_STUB_LIBRARY}; }}\n" for name in driver_functions(header)]
    stub = library / "stubs" / "libcuda.so"
    stub.parent.mkdir()
    run(
        [compiler.cc, "-x", "c", "-shared", "-fPIC", "-O1", "-g0", "-s", "-nostdlib", "-Wl,-soname,libcuda.so.1",
         "-Wl,--build-id=none", "-o", stub, "-"],
        env=clean_environ(), stdin="".join(lines).encode(), timeout=_TIMEOUT, error=BuildError,
    )  # fmt: skip


def _check_facts(toolkit: WheelToolkit, found: Toolkit) -> None:
    spec = toolkit.spec
    said = (spec.cuda, toolkit.version, spec.sms, limits_of(spec))
    says = (found.cuda, found.version, found.sms, found.limits)
    if said != says:
        raise BuildError("the toolkit is not what toolchains.toml says", where=toolkit.name,
                         why=f"it says {says}, the file {said}", fix="Correct toolchains.toml.")  # fmt: skip


def _contents(folder: Path) -> _Contents:
    """What is there now."""
    files: dict[str, int] = {}
    links: dict[str, str] = {}
    for parent, folders, names in os.walk(folder):
        for name in [*names, *folders]:
            path = Path(parent, name)
            inner = PurePosixPath(path.relative_to(folder)).as_posix()
            if path.is_symlink():
                links[inner] = str(path.readlink())
            elif name in names:
                files[inner] = path.stat().st_size
    return _Contents(files=files, links=links)

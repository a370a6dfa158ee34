"""Build one distribution from source: locked inputs, an environment of its own, no network, and a folder that survives.

The front end is the pip that composer pins: it calls any PEP 517 backend, and checks, before anything is compiled, that
everything the backend asks for is installed. Its own isolation, which would download what nobody locked, stays off; the
environment that it builds in holds exactly the locked requirements.

    builds/KEY/       of a build that is not done: source/, env/, build/ (of scikit-build-core), home/, tmp/
    logs/             the log of every build
    objects/source/   what was built, by the key; the wheel itself is an artifact as if it had been downloaded
    objects/wheel/    the same with the wheel beside it, as a remote has it
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pip
from packaging.version import Version

from composer._fs import host_errors
from composer._proc import clean_environ, run
from composer.errors import BuildError, FetchError, RecipeError, WheelError
from composer.events import Event, Listener, silent
from composer.formats.wheel import parse_wheel_name
from composer.interpreter import Candidate
from composer.model.lock import Artifact, Lock, LockedPackage
from composer.model.recipe import Component
from composer.model.source import SITE, Build, Values, local_version
from composer.model.target import Target
from composer.proofs import _cut_network
from composer.steps import _source_worker
from composer.steps.artifact import artifact_path
from composer.steps.fetch import Fetched, fetch
from composer.steps.load import LoadedRecipe
from composer.steps.locks import LockOptions
from composer.steps.relabel import labelled, relabel_wheel
from composer.steps.source_lock import ensure_build_lock
from composer.steps.source_log import failure, followed
from composer.steps.source_machine import check_room, compilers, jobs_here, used
from composer.steps.source_tree import Patch, Source, find_patches, find_source, make_tree, top_folder
from composer.steps.toolchain import Choice, Toolchain, choose_toolchain, ensure_toolchain
from composer.store import Store, key_of

_VERSION = 1
_KIND = "source"
#: What machines share. What was built here is of another kind, as only that says how long a build takes here.
_SHARED = "wheel"
#: In the folder of a build: what it took, a line for each run. The next run waits until the last has let go of it.
_RUNNING = ".running"
_ENVIRONMENT_SECONDS = 1800.0
#: PyTorch for all GPUs takes about 90 CPU hours.
_BUILD_SECONDS = 7 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to build, for which target, with which CPython of this machine.

    flags: of the compiler, for the target's CPU.
    jobs: compilers at a time at most; None for MAX_JOBS or the machine's.
    """

    loaded: LoadedRecipe
    component: Component
    target: Target
    flags: tuple[str, ...]
    python: Candidate
    lock: LockOptions = field(default_factory=LockOptions)
    wheelhouses: Sequence[Path] = ()
    jobs: int | None = None

    @property
    def build(self) -> Build:
        """How it is built for this target. RecipeError for a component that is not."""
        if self.component.build is None:
            raise RecipeError("has no [component.build]: it is not built from source", where=self.component.name,
                              fix="Add one to the recipe.")  # fmt: skip
        return self.component.build.for_target(self.target.sms, self.target.isa)

    @property
    def version(self) -> Version:
        """The version of the wheel."""
        assert self.component.build is not None
        return local_version(self.component.version or "", self.component.build, sms=self.target.sms,
                             isa=self.target.isa)  # fmt: skip


class BuiltWheel(msgspec.Struct, frozen=True, kw_only=True):
    """What was built, and from what. key: of all inputs. seconds: of the run that ended it. inputs: as in the ledger
    inside the wheel. Over all runs: cpu_seconds; memory: bytes of the largest process; disk: bytes of the folder.
    """

    filename: str
    size: int
    sha256: str
    key: str
    seconds: float
    jobs: int
    inputs: dict[str, Any]
    cpu_seconds: float = 0.0
    memory: int = 0
    disk: int = 0

    def artifact(self) -> Artifact:
        """As a file that can be had like a downloaded one."""
        return Artifact(filename=self.filename, size=self.size, sha256=self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A wheel in the store. cached: it was there already."""

    path: Path
    wheel: BuiltWheel
    cached: bool


def build_wheel(request: Request, store: Store, listener: Listener = silent) -> Result:
    """The wheel of a component with `[component.build]`, from the store or built now.

    RecipeError for a recipe that cannot be meant or a patch that does not fit, LockError and FetchError (IntegrityError
    for other bytes) for inputs that cannot be had, HostError for a machine that cannot build it, BuildError when its
    build fails. What was done until then is kept: the next run goes on from there.
    """
    return prepare_build(request, store, listener).run()


def prepare_build(request: Request, store: Store, listener: Listener = silent) -> Job:
    """Everything decided, and nothing downloaded but what an index says of the build requirements.

    RecipeError, LockError, FetchError and HostError as of `build_wheel`.
    """
    build = request.build
    choice = _toolchain(request, build, store) if build.cuda else None
    lock = ensure_build_lock(request.loaded, request.component, build, request.target, request.lock)
    source = find_source(request.loaded, request.component, build, lock)
    return Job(request=request, build=build, lock=lock, source=source, choice=choice,
               patches=find_patches(request.loaded, build), jobs=jobs_here(build, request.jobs), store=store,
               listener=listener)  # fmt: skip


def _toolchain(request: Request, build: Build, store: Store) -> Choice:
    return choose_toolchain(request.target.cuda, request.target.sms, request.target.machine, store,
                            libraries=build.cuda_libraries)  # fmt: skip


def find_built(job: Job) -> Result | None:
    """What was built from the same inputs before, here or by who shares a remote with us, if it is still whole."""
    wheel = job.store.load(_KIND, job.key, BuiltWheel)
    path = artifact_path(job.store.root, wheel.artifact()) if wheel else None
    if wheel and path and path.is_file() and _sha256(path) == wheel.sha256:
        return Result(path=path, wheel=wheel, cached=True)
    return _taken_over(job)


def _taken_over(job: Job) -> Result | None:
    """What another machine built, if it is what would be built here: its digests say only that it arrived whole."""
    store = job.store
    wheel = store.load(_SHARED, job.key, BuiltWheel)
    if wheel is None or not (path := store.path(_SHARED, job.key, ".whl")).is_file():
        return None
    if fault := _fault(job, wheel, path):
        store.refuse(_SHARED, job.key, fault)
        return None
    own = msgspec.structs.replace(wheel, cpu_seconds=0.0, memory=0, disk=0)
    place = artifact_path(store.root, own.artifact())
    with host_errors(place), store.scratch() as scratch:
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, scratch / place.name)
        (scratch / place.name).replace(place)
    store.save(_KIND, job.key, own)
    return Result(path=place, wheel=own, cached=True)


def _fault(job: Job, wheel: BuiltWheel, path: Path) -> str | None:
    """Why a wheel is not the one that would be built here."""
    if job.key != wheel.key or job.key != key_of(_KIND, _VERSION, inputs=wheel.inputs):
        return "it was made from other inputs"
    if (fault := _other(job.request, wheel.filename)) or Path(wheel.filename).name != wheel.filename:
        return fault or f"it is called {wheel.filename!r}"
    with host_errors(path):
        size = path.stat().st_size
    same = (size, _sha256(path)) == (wheel.size, wheel.sha256)
    return None if same else "the wheel is not the one that its record is of"


def _other(request: Request, filename: str) -> str | None:
    try:
        name = parse_wheel_name(filename)
    except WheelError as fault:
        return fault.what
    same = (name.name, name.version) == (request.component.name, request.version)
    return None if same else f"it is {name.name} {name.version}"


def _sha256(path: Path) -> str:
    with host_errors(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One build with everything decided. choice: its CUDA toolchain."""

    request: Request
    build: Build
    lock: Lock
    source: Source
    choice: Choice | None
    patches: tuple[Patch, ...]
    jobs: int
    store: Store
    listener: Listener

    @property
    def subject(self) -> str:
        """For messages: name and version."""
        return f"{self.request.component.name} {self.request.component.version}"

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that the wheel depends on, and nothing else: neither the jobs nor this machine's paths."""
        target, build = self.request.target, self.build
        toolchain = {"toolchain": self.choice.candidate.identity} if self.choice else {}
        return {
            "source": self.source.identity, "subdirectory": build.subdirectory,
            "patches": {one.name: one.sha256 for one in self.patches},
            "requires": {one.filename: one.sha256 for one in self._required()},
            "environment": self._filled(build.environment), "config": self._filled(build.config),
            "version": str(self.request.version), "as-of": self._epoch, "python": self.request.python.version,
            "machine": target.machine, "tools": {"pip": pip.__version__, **compilers(self._environ()), **toolchain},
        }  # fmt: skip

    @cached_property
    def key(self) -> str:
        """The store's key of the wheel."""
        return key_of(_KIND, _VERSION, inputs=self.inputs)

    @cached_property
    def folder(self) -> Path:
        """Where it is built. With shared objects it is the same for all Pythons."""
        key = self.key
        if self.build.shared:
            inputs = {name: value for name, value in self.inputs.items() if name not in ("python", "requires")}
            key = key_of("objects", _VERSION, inputs=inputs)
        return self.store.root / "builds" / key

    @property
    def log(self) -> Path:
        """What the build said, of all runs."""
        name = f"{self.request.component.name}-{self.request.version}-{self.key[:12]}.log"
        return self.store.root / "logs" / name

    @property
    def _epoch(self) -> str:
        return str(int(self.request.loaded.recipe.as_of.timestamp()))

    def run(self) -> Result:
        """The wheel, from the store or built now. Raises as `build_wheel` does."""
        if found := find_built(self):
            return found
        check_room(self.build, self.subject, self.store.root, self.folder, self.source.size)
        fetched, toolchain = self.fetch(), self._ensured()
        with self.store.lock(f"{_KIND}-{self.folder.name}"):
            if found := find_built(self):
                return found
            return self._make(fetched, toolchain)

    def fetch(self) -> Fetched:
        """Build requirements and the source, hashed again even if they were here: they are about to be run."""
        source = self.source.package
        # The source first: where it cannot be had, gigabytes of requirements are not worth a download.
        first = self._fetched([source] if source else [])
        rest = self._fetched([one for one in self.packages() if one != source])
        return Fetched(paths={**first.paths, **rest.paths})

    def _fetched(self, packages: Sequence[LockedPackage]) -> Fetched:
        request = self.request
        return fetch(
            packages, into=self.store.root, wheelhouse=request.wheelhouses, indexes=request.loaded.recipe.indexes,
            offline=request.lock.offline, verify=True,
        )  # fmt: skip

    def _ensured(self) -> Toolchain | None:
        request = self.request
        if self.choice is None:
            return None
        return ensure_toolchain(self.choice, self.store, offline=request.lock.offline, wheelhouses=request.wheelhouses,
                                listener=self.listener)  # fmt: skip

    def packages(self) -> Iterator[LockedPackage]:
        """What has to be fetched."""
        yield from self.lock.packages
        if self.source.package and self.source.package not in self.lock.packages:
            yield self.source.package

    def _required(self) -> list[Artifact]:
        found = (one.artifacts[0] for one in self.lock.packages if one != self.source.package)
        return sorted(found, key=lambda one: one.filename)

    def _filled(self, values: Mapping[str, str], *, jobs: int = 0, folder: str = ".") -> dict[str, str]:
        """With placeholders replaced; by default as the key sees them."""
        request = self.request
        meaning = Values(flags=request.flags, sms=request.target.sms, cuda=request.target.cuda,
                         version=str(request.version), jobs=jobs, folder=folder)  # fmt: skip
        return {name: meaning.fill(text) for name, text in values.items()}

    def _environ(self, **values: Any) -> dict[str, str]:  # noqa: ANN401
        """What a child of ours inherits, the host compiler that the CUDA compiler needs, and what the recipe says."""
        host = self.choice.host_compiler.environ() if self.choice else {}
        return {**clean_environ(), **host, **self._filled(self.build.environment, **values)}

    def _make(self, fetched: Fetched, toolchain: Toolchain | None) -> Result:
        """Build, label, keep. The folder goes when the wheel is in the store, unless others go on with its objects."""
        started, folder = time.monotonic(), self.folder
        with host_errors(folder):
            for name in ("home", "tmp"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self.log.parent.mkdir(exist_ok=True)
        self._once("source", lambda path: self._unpack(fetched, path))
        self._once("env", lambda path: self._install(fetched, path), self.key)
        raw = self._compile(toolchain)
        built = self._keep(raw, time.monotonic() - started)
        if self.build.shared:
            (folder / _RUNNING).unlink(missing_ok=True)  # the next build is another record
        else:
            shutil.rmtree(folder, ignore_errors=True)
        return Result(path=artifact_path(self.store.root, built.artifact()), wheel=built, cached=False)

    def _once(self, name: str, make: Callable[[Path], None], key: str = "") -> None:
        """Make a folder of the build, unless an earlier run did so to the end, with the same key."""
        path, done = self.folder / name, self.folder / f".{name}"
        with host_errors(path):
            if path.is_dir() and done.exists() and done.read_text() == key:
                self.listener(
                    Event(step="source", subject=self.subject, note=f"goes on with the {name} of an earlier run")
                )
                return
            done.unlink(missing_ok=True)
            if path.exists():
                shutil.rmtree(path)
            make(path)
            done.write_text(key)

    def _unpack(self, fetched: Fetched, path: Path) -> None:
        package = self.source.package
        if self.source.git is not None and self.request.lock.offline:
            raise FetchError("offline, and its source is a commit of a repository", where=self.subject,
                             fix="Run it where the repository can be reached.")  # fmt: skip
        make_tree(self.source, fetched.paths[package.artifacts[0].sha256] if package else None, self.patches, path)

    def _install(self, fetched: Fetched, path: Path) -> None:
        wheels = [fetched.paths[one.sha256] for one in self._required()]
        run([self.request.python.path, "-I", "-m", "venv", "--without-pip", path], timeout=_ENVIRONMENT_SECONDS)
        if wheels:
            run([*_pip(path), "install", "--no-deps", "--no-index", "--no-compile", "--quiet", *wheels],
                env=clean_environ(PIP_CONFIG_FILE=os.devnull), timeout=_ENVIRONMENT_SECONDS)  # fmt: skip
        self._follow_python(path)
        _name_libraries(self.folder / SITE)

    def _follow_python(self, path: Path) -> None:
        """Point `site` at the new environment, and let CMake look for its Python again: objects stay as they are."""
        link = self.folder / SITE
        link.unlink(missing_ok=True)
        link.symlink_to(path / "lib" / f"python{self.request.python.minor}" / "site-packages")
        if self.build.shared:
            (self._root() / self.build.shared / "CMakeCache.txt").unlink(missing_ok=True)

    def _compile(self, toolchain: Toolchain | None) -> Path:
        """Run the backend. What it has compiled stays in the folder, whatever happens."""
        out, start = self.folder / "out", self.log.stat().st_size if self.log.is_file() else 0
        shutil.rmtree(out, ignore_errors=True)
        argv: list[str | Path] = [
            sys.executable, "-I", "-S", _source_worker.__file__, self.folder / _RUNNING,
            sys.executable, "-I", "-S", _cut_network.__file__, self.folder / ".network", self.log,
            *_pip(self.folder / "env"), "wheel", "-v", "--no-build-isolation", "--check-build-dependencies",
            "--no-deps", "--no-index", "--no-cache-dir", "--wheel-dir", out, *self._settings(), self._root(),
        ]  # fmt: skip
        try:
            with followed(self.log, self.subject, self.listener):
                run(argv, env=self._build_environ(toolchain), cwd=self.folder, timeout=_BUILD_SECONDS)
        except BuildError as fault:
            raise failure(self.log, start, self.subject, fault.what) from fault
        self._tell_network()
        return self._only(out)

    def _tell_network(self) -> None:
        """Say it if the kernel did not let the build be cut off."""
        with host_errors(self.folder):
            _, fault = msgspec.json.decode((self.folder / ".network").read_bytes().splitlines()[-1], type=list[str])
        if fault:
            self.listener(Event(step="source", subject=self.subject, note=f"the network could not be cut: {fault}"))

    def _root(self) -> Path:
        root = top_folder(self.folder / "source")
        return root / self.build.subdirectory if self.build.subdirectory else root

    def _settings(self) -> Iterator[str]:
        for key, value in self._filled(self.build.config, jobs=self.jobs, folder=str(self.folder)).items():
            yield f"--config-settings={key}={value}"

    def _build_environ(self, toolchain: Toolchain | None) -> dict[str, str]:
        folder, own = self.folder, self._environ(jobs=self.jobs, folder=str(self.folder))
        cuda = toolchain.environ() if toolchain else {}
        nvcc = [str(toolchain.nvcc.parent)] if toolchain else []
        path = os.pathsep.join([str(folder / "env" / "bin"), *nvcc, own.get("PATH", os.defpath)])
        return {
            # scikit-build-core would otherwise compile in a folder that does not outlive it.
            "SKBUILD_BUILD_DIR": str(folder / "build"), "MAX_JOBS": str(self.jobs),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(self.jobs), **self._cache(own), **cuda, **own,
            "PATH": path, "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"),
            "SOURCE_DATE_EPOCH": self._epoch, "PYTHONHASHSEED": "0", "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }  # fmt: skip

    def _cache(self, environ: Mapping[str, str]) -> dict[str, str]:
        """ccache where it is installed. Not sccache: it is asked over the network, which is cut."""
        found = shutil.which("ccache", path=environ.get("PATH"))
        launchers = [f"CMAKE_{language}_COMPILER_LAUNCHER" for language in ("C", "CXX", "CUDA")]
        folders = {"CCACHE_DIR": str(self.store.root / "ccache"), "CCACHE_BASEDIR": str(self.folder)}
        return {**dict.fromkeys(launchers, found), **folders} if found else {}

    def _only(self, out: Path) -> Path:
        """The one wheel, if it is the one that was asked for."""
        with host_errors(out):
            wheels = sorted(out.glob("*.whl"))
        if len(wheels) != 1:
            raise BuildError("the build made no single wheel", where=self.subject, fix=f"See {self.log}.")
        component = self.request.component
        name = parse_wheel_name(wheels[0].name)
        if (name.name, name.version.public) != (component.name, Version(component.version or "").public):
            raise BuildError("the build made another distribution", where=self.subject, why=wheels[0].name,
                             fix="Correct the name or the version of the component.")  # fmt: skip
        return wheels[0]

    def _keep(self, raw: Path, seconds: float) -> BuiltWheel:
        ledger = msgspec.json.format(msgspec.json.encode({"schema": 1, "key": self.key, **self.inputs}))
        with self.store.scratch() as scratch:
            wheel = scratch / labelled(raw.name, self.request.version)
            relabel_wheel(raw, wheel, self.request.version, ledger)
            with host_errors(wheel), wheel.open("rb") as stream:
                sha256, size = hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()
            built = BuiltWheel(filename=wheel.name, size=size, sha256=sha256, key=self.key, seconds=round(seconds, 1),
                               jobs=self.jobs, inputs=self.inputs, disk=used(self.folder), **self._taken())  # fmt: skip
            path = artifact_path(self.store.root, built.artifact())
            with host_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                wheel.replace(path)
        self.store.save(_KIND, self.key, built)
        with self.store.writing(_SHARED, self.key, ".whl") as shared, host_errors(shared):
            os.link(path, shared)
        self.store.save(_SHARED, self.key, built)
        return built

    def _taken(self) -> dict[str, Any]:
        """What all runs of the build took; of one that was ended only the CPU seconds are known."""
        with host_errors(self.folder):
            rows = [msgspec.json.decode(line) for line in (self.folder / _RUNNING).read_bytes().splitlines()]
        return {"cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 1),
                "memory": max(row["memory"] for row in rows)}  # fmt: skip


def _pip(environment: Path) -> list[str | Path]:
    """composer's pip, working on another environment."""
    return [sys.executable, "-I", "-m", "pip", "--python", environment / "bin" / "python"]


def _name_libraries(site: Path) -> None:
    """Give NVIDIA's libraries the names that linkers look for: its wheels hold libX.so.N alone."""
    with host_errors(site):
        for library in sorted(site.glob("nvidia/*/lib/lib*.so.*")):
            link = library.with_name(f"{library.name.partition('.so.')[0]}.so")
            if not link.exists():
                link.symlink_to(library.name)

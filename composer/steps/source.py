"""Build one distribution from source: locked inputs, an environment of its own, no network, and a folder that survives.

The front end is the pip that composer pins: it calls any PEP 517 backend, and checks, before anything is compiled, that
everything the backend asks for is installed. Its own isolation, which would download what nobody locked, stays off; the
environment that it builds in holds exactly the locked requirements.

    builds/KEY/       of a build that is not done: source/, env/, build/ (of scikit-build-core), home/, tmp/
    logs/             the log of every build
    objects/source/   what was built, by the key; the wheel itself is an artifact as if it had been downloaded
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
from composer.errors import BuildError, RecipeError
from composer.events import Event, Listener, silent
from composer.formats.wheel import parse_wheel_name
from composer.interpreter import Candidate
from composer.model.lock import Artifact, Lock, LockedPackage
from composer.model.recipe import Component
from composer.model.source import Build, Values, arch_list, local_version
from composer.model.target import Target
from composer.proofs import _cut_network
from composer.steps import _source_worker
from composer.steps.fetch import Fetched, artifact_path, fetch
from composer.steps.load import LoadedRecipe
from composer.steps.locks import LockOptions
from composer.steps.relabel import labelled, relabel_wheel
from composer.steps.source_lock import ensure_build_lock
from composer.steps.source_log import failure, followed
from composer.steps.source_machine import check_room, compilers, jobs_here
from composer.steps.source_tree import Patch, Source, find_patches, find_source, make_tree, top_folder
from composer.store import Store, key_of

_VERSION = 1
_KIND = "source"
_ENVIRONMENT_SECONDS = 1800.0
#: PyTorch for all GPUs takes about 90 CPU hours.
_BUILD_SECONDS = 7 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to build, for which target, with which CPython of this machine.

    flags: of the compiler, for the target's CPU. jobs: compilers at a time at most; None for MAX_JOBS or the machine's.
    """

    loaded: LoadedRecipe
    component: Component
    target: Target
    flags: tuple[str, ...]
    python: Candidate
    lock: LockOptions = field(default_factory=LockOptions)
    wheelhouses: Sequence[Path] = ()
    jobs: int | None = None


class BuiltWheel(msgspec.Struct, frozen=True, kw_only=True):
    """What was built, and from what. key: of all inputs. seconds: of the run that ended it. inputs: as in the ledger
    inside the wheel.
    """

    filename: str
    size: int
    sha256: str
    key: str
    seconds: float
    jobs: int
    inputs: dict[str, Any]

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
    job = _prepare(request, store, listener)
    if found := find_built(store, job.key):
        return found
    check_room(job.build, job.subject, store.root, job.folder, job.source.size)
    fetched = _fetch(job)
    with store.lock(f"{_KIND}-{job.key}"):
        if found := find_built(store, job.key):
            return found
        return job.make(fetched)


def find_built(store: Store, key: str) -> Result | None:
    """What was built with this key before, if it is still whole."""
    wheel = store.load(_KIND, key, BuiltWheel)
    path = artifact_path(store.root, wheel.artifact()) if wheel else None
    if wheel is None or path is None or not path.is_file():
        return None
    with host_errors(path), path.open("rb") as stream:
        whole = hashlib.file_digest(stream, "sha256").hexdigest() == wheel.sha256
    return Result(path=path, wheel=wheel, cached=True) if whole else None


def _prepare(request: Request, store: Store, listener: Listener) -> _Job:
    build = request.component.build
    if build is None:
        raise RecipeError("has no [component.build]: it is not built from source", where=request.component.name,
                          fix="Add one to the recipe.")  # fmt: skip
    lock = ensure_build_lock(request.loaded, request.component, build, request.target, request.lock)
    source = find_source(request.loaded, request.component, build, lock)
    return _Job(request=request, build=build, lock=lock, source=source, patches=find_patches(request.loaded, build),
                jobs=jobs_here(build, request.jobs), store=store, listener=listener)  # fmt: skip


def _fetch(job: _Job) -> Fetched:
    """Build requirements and the source, hashed again even if they were here: they are about to be run."""
    request = job.request
    return fetch(
        job.packages(), into=job.store.root, wheelhouse=request.wheelhouses, indexes=request.loaded.recipe.indexes,
        offline=request.lock.offline, verify=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One build with everything decided."""

    request: Request
    build: Build
    lock: Lock
    source: Source
    patches: tuple[Patch, ...]
    jobs: int
    store: Store
    listener: Listener

    @property
    def subject(self) -> str:
        return f"{self.request.component.name} {self.request.component.version}"

    @property
    def version(self) -> Version:
        target, version = self.request.target, self.request.component.version or ""
        return local_version(version, self.build, sm=target.sm, isa=target.isa)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Everything that the wheel depends on, and nothing else: neither the jobs nor this machine's paths."""
        target, build = self.request.target, self.build
        return {
            "source": self.source.identity, "subdirectory": build.subdirectory,
            "patches": {one.name: one.sha256 for one in self.patches},
            "requires": {one.filename: one.sha256 for one in self._required()},
            "environment": self._filled(build.environment), "config": self._filled(build.config),
            "version": str(self.version), "as-of": self._epoch, "python": self.request.python.version,
            "machine": target.machine, "tools": {"pip": pip.__version__, **compilers(self._environ(), cuda=build.cuda)},
        }  # fmt: skip

    @cached_property
    def key(self) -> str:
        return key_of(_KIND, _VERSION, inputs=self.inputs)

    @property
    def folder(self) -> Path:
        return self.store.root / "builds" / self.key

    @property
    def log(self) -> Path:
        return self.store.root / "logs" / f"{self.request.component.name}-{self.version}-{self.key[:12]}.log"

    @property
    def _epoch(self) -> str:
        return str(int(self.request.loaded.recipe.as_of.timestamp()))

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
        meaning = Values(flags=self.request.flags, arch_list=arch_list(self.request.target.sm), jobs=jobs,
                         folder=folder)  # fmt: skip
        return {name: meaning.fill(text) for name, text in values.items()}

    def _environ(self, **values: Any) -> dict[str, str]:  # noqa: ANN401
        """What a child of ours inherits, and what the recipe says."""
        return {**clean_environ(), **self._filled(self.build.environment, **values)}

    def make(self, fetched: Fetched) -> Result:
        """Build, label, keep. The folder of the build goes when its wheel is in the store."""
        started, folder = time.monotonic(), self.folder
        with host_errors(folder):
            for name in ("home", "tmp"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self.log.parent.mkdir(exist_ok=True)
        self._once("source", lambda path: self._unpack(fetched, path))
        self._once("env", lambda path: self._install(fetched, path))
        raw = self._compile()
        built = self._keep(raw, time.monotonic() - started)
        shutil.rmtree(folder, ignore_errors=True)
        return Result(path=artifact_path(self.store.root, built.artifact()), wheel=built, cached=False)

    def _once(self, name: str, make: Callable[[Path], None]) -> None:
        """Make a folder of the build, unless an earlier run did so to the end."""
        path, done = self.folder / name, self.folder / f".{name}"
        if done.exists():
            self.listener(Event(step="source", subject=self.subject, note=f"goes on with the {name} of an earlier run"))
            return
        with host_errors(path):
            if path.exists():
                shutil.rmtree(path)
            make(path)
            done.touch()

    def _unpack(self, fetched: Fetched, path: Path) -> None:
        package = self.source.package
        make_tree(self.source, fetched.paths[package.artifacts[0].sha256] if package else None, self.patches, path)

    def _install(self, fetched: Fetched, path: Path) -> None:
        wheels = [fetched.paths[one.sha256] for one in self._required()]
        run([self.request.python.path, "-I", "-m", "venv", "--without-pip", path], timeout=_ENVIRONMENT_SECONDS)
        if wheels:
            run([*_pip(path), "install", "--no-deps", "--no-index", "--no-compile", "--quiet", *wheels],
                env=clean_environ(PIP_CONFIG_FILE=os.devnull), timeout=_ENVIRONMENT_SECONDS)  # fmt: skip

    def _compile(self) -> Path:
        """Run the backend. What it has compiled stays in the folder, whatever happens."""
        out, start = self.folder / "out", self.log.stat().st_size if self.log.is_file() else 0
        shutil.rmtree(out, ignore_errors=True)
        argv: list[str | Path] = [
            sys.executable, "-I", "-S", _source_worker.__file__, self.folder / ".running",
            sys.executable, "-I", "-S", _cut_network.__file__, self.folder / ".network", self.log,
            *_pip(self.folder / "env"), "wheel", "-v", "--no-build-isolation", "--check-build-dependencies",
            "--no-deps", "--no-index", "--no-cache-dir", "--wheel-dir", out, *self._settings(), self._root(),
        ]  # fmt: skip
        try:
            with followed(self.log, self.subject, self.listener):
                run(argv, env=self._build_environ(), cwd=self.folder, timeout=_BUILD_SECONDS)
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

    def _build_environ(self) -> dict[str, str]:
        folder, own = self.folder, self._environ(jobs=self.jobs, folder=str(self.folder))
        path = os.pathsep.join([str(folder / "env" / "bin"), own.get("PATH", os.defpath)])
        return {
            # scikit-build-core would otherwise compile in a folder that does not outlive it.
            "SKBUILD_BUILD_DIR": str(folder / "build"), "MAX_JOBS": str(self.jobs),
            "CMAKE_BUILD_PARALLEL_LEVEL": str(self.jobs), **self._cache(own), **own,
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
            wheel = scratch / labelled(raw.name, self.version)
            relabel_wheel(raw, wheel, self.version, ledger)
            with host_errors(wheel), wheel.open("rb") as stream:
                sha256, size = hashlib.file_digest(stream, "sha256").hexdigest(), stream.tell()
            built = BuiltWheel(filename=wheel.name, size=size, sha256=sha256, key=self.key, seconds=round(seconds, 1),
                               jobs=self.jobs, inputs=self.inputs)  # fmt: skip
            path = artifact_path(self.store.root, built.artifact())
            with host_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                wheel.replace(path)
        self.store.save(_KIND, self.key, built)
        return built


def _pip(environment: Path) -> list[str | Path]:
    """composer's pip, working on another environment."""
    return [sys.executable, "-I", "-m", "pip", "--python", environment / "bin" / "python"]

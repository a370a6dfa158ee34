"""The bundle's own files: what makes a tree of distributions a bundle that starts, and modules compiled for it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from composer._fs import host_errors
from composer._proc import run
from composer.errors import HostError, LockError, RecipeError
from composer.launchers import ENVIRONMENT_PTH, activate_scripts, env_file, script_launcher, template
from composer.model.lock import Artifact, LockedPackage
from composer.model.profile import PROFILES_PATH, RULES_PATH, render_profiles, render_rules
from composer.model.recipe import NativeModule, Recipe, Release
from composer.steps.advise import load_profiles, load_rules
from composer.steps.artifact import artifact_path
from composer.steps.base import OwnFile
from composer.steps.fetch import Fetched
from composer.steps.native import (
    TRIPLES,
    NativeLibrary,
    build_library,
    libnuma,
    library_key,
    own_library,
    tar_member,
    unpack_zig,
)
from composer.steps.outline import Outline
from composer.steps.plan import Options
from composer.steps.resolve import fits
from composer.store import Store

_PACKAGE = Path(__file__).resolve().parents[1]
_COMPILER = "ziglang"


#: Programs of every bundle, and their modules.
_PROGRAMS = {"compose-detect": "host.detect", "compose-model": "model.cli", "compose-service": "service.cli"}
#: What it says of a host is what `compose select` refuses that host by, elsewhere.
_ANY_HOST = frozenset({"compose-detect"})
#: The modules of programs by what recipes call them.
_SERVERS = {"serve": "serve.cli", "resolve": "serve.resolve"}
#: Releases that are compiled, by the folder below composer/native that goes with them.
_RELEASES: Mapping[str, Callable[[bytes], NativeLibrary]] = {"numactl": libnuma}


_NOT_REDISTRIBUTABLE = """\
Do not pass this bundle on.

NVIDIA's libraries in it were modified (code for other GPUs was cut out), which their licences do not allow for copies
that are redistributed. It was built with --slim all --accept-license-modification. The manifest (manifest.json, here)
lists every modified file with the sha256 of NVIDIA's own.
"""


def own_files(outline: Outline, fetched: Fetched, store: Store, options: Options) -> list[OwnFile]:
    """Every file that neither a wheel nor the interpreter brings. BuildError when a module does not compile."""
    site = f"lib/python{outline.target.python}/site-packages"
    files = [
        *_programs(outline),
        *_runtime(site),
        # Not sitecustomize.py: that name is the host's or the distribution's, and Debian's CPython has one.
        OwnFile(path=f"{site}/_compose_environment.pth", data=ENVIRONMENT_PTH),
        # After _compose_fallback.pth, in the order of their names: it looks at the C++ runtime that was loaded there.
        OwnFile(path=f"{site}/_compose_floors.pth", data=b"import _compose.floors\n"),
        OwnFile(path="share/compose/target.json", data=_target(outline, options)),
    ]
    files += [OwnFile(path=path, data=data) for given in outline.inputs for path, data in given.files.items()]
    if not options.redistributable:
        files.append(OwnFile(path="share/compose/DO-NOT-REDISTRIBUTE", data=_NOT_REDISTRIBUTABLE.encode()))
    modules = [_module(module, fetched, site) for module in outline.recipe.native]
    paths = _compiled(outline, [one.library for one in modules], fetched, store)
    for one, path in zip(modules, paths, strict=True):
        with host_errors(path):
            files.append(OwnFile(path=one.path, data=path.read_bytes(), mode=0o755))
        files.extend(one.notices)
    return files


def tools_here(outline: Outline) -> list[LockedPackage]:
    """What composing takes of the lock, each with the wheel for this machine. LockError where the lock has none."""
    named = [one for one in outline.lock.packages if outline.recipe.component_of(one.name).tool]
    return [replace(one, artifacts=(_for_this_machine(one, outline),)) for one in named]


def _for_this_machine(package: LockedPackage, outline: Outline) -> Artifact:
    target = replace(outline.target, machine=platform.machine())
    for artifact in package.artifacts:
        if fits(artifact.filename, target.python, target.platforms):
            return artifact
    raise LockError(f"locked with no wheel for {target.machine}, where this bundle is composed", where=package.name,
                    fix=f"Run `{outline.loaded.lock_command} --python {target.python}`.")  # fmt: skip


def releases(recipe: Recipe) -> list[LockedPackage]:
    """The source releases of native modules, as something to fetch."""
    return [
        LockedPackage(name=one.name, version=one.version, index="url", artifacts=(release_artifact(one),))
        for one in (module.release for module in recipe.native) if one
    ]  # fmt: skip


def release_artifact(release: Release) -> Artifact:
    """The one file of a release."""
    filename = release.url.rsplit("/", 1)[-1]
    return Artifact(filename=filename, size=release.size, sha256=release.sha256, url=release.url)


def debian_mirrors(recipe: Recipe, store: Store) -> dict[str, list[str]]:
    """Further URLs, by sha256, of the releases that the store lacks: on the mirrors that apt is set up with here."""
    named = [one for one in (module.release for module in recipe.native) if one and one.debian]
    wanted = [one for one in named if not artifact_path(store.root, release_artifact(one)).is_file()]
    sites = _apt_sites() if wanted else []
    return {one.sha256: [f"{site}/{one.debian}" for site in sites] for one in wanted}


def _apt_sites() -> list[str]:
    try:
        lines = run(["apt-get", "indextargets", "--format", "$(SITE)"], timeout=20, error=HostError).decode().split()
    except HostError:
        return []
    return [site.rstrip("/") for site in dict.fromkeys(lines) if site.startswith(("http://", "https://"))]


def _target(outline: Outline, options: Options) -> bytes:
    """What programs of the bundle may need to know of its target before anything is imported.

    ptx: PTX was kept, so GPUs newer than the target are worth a try.
    """
    target = outline.target
    facts = {"name": outline.name, "sm": target.sms, "isa": target.isa, "cuda": target.cuda, "machine": target.machine,
             "ptx": options.keep_ptx}  # fmt: skip
    return msgspec.json.encode(facts)


def _programs(outline: Outline) -> Iterator[OwnFile]:
    """What an operator runs or sources, and the environment that all of it shares."""
    yield OwnFile(path="etc/env", data=env_file(outline.environment))
    for path, data in activate_scripts(outline.name, outline.target.python).items():
        yield OwnFile(path=path, data=data, mode=0o755 if path == "bin/deactivate" else 0o644)
    # It says why the bundle's Python does not start, so it cannot be a launcher of that Python.
    yield OwnFile(path="bin/compose-doctor", data=template("doctor.sh").encode(), mode=0o755)
    recipe = outline.recipe
    yield OwnFile(path=RULES_PATH, data=render_rules(load_rules()))
    yield OwnFile(path=PROFILES_PATH, data=render_profiles(load_profiles(), stack=recipe.name, version=recipe.version,
                                                           sms=outline.target.sms))  # fmt: skip
    servers = {name: _SERVERS[one] for name, one in recipe.programs.items()}
    for name, module in {**_PROGRAMS, **servers}.items():
        launcher = script_launcher(f"_compose.{module}", "main", any_host=name in _ANY_HOST)
        yield OwnFile(path=f"bin/{name}", data=launcher, mode=0o755)


def _runtime(site: str) -> Iterator[OwnFile]:
    """The package of the bundle's programs; of launch/ only what is made of its texts travels."""
    root = _PACKAGE / "runtime"
    for path in sorted(root.rglob("*.py")):
        below = path.relative_to(root)
        if below.parts[0] != "launch":
            yield OwnFile(path=f"{site}/_compose/{below}", data=path.read_bytes())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """A native module ready to be compiled, where it goes, and the licence and sources that go with it."""

    path: str
    library: NativeLibrary
    notices: Sequence[OwnFile] = ()


def _module(module: NativeModule, fetched: Fetched, site: str) -> _Module:
    source, path = _PACKAGE / "native" / module.source, module.path.format(site=site)
    if not source.is_dir() or (module.release is not None) != (module.source in _RELEASES):
        raise RecipeError(f"no such sources {module.source!r}", where="native.source")
    if module.release is None:
        return _Module(path=path, library=own_library(source))
    tarball = fetched.paths[module.release.sha256]
    with host_errors(tarball):
        data = tarball.read_bytes()
    folder, licence = f"share/licenses/{module.release.name}", module.release.licence
    notices = (OwnFile(path=f"{folder}/{licence}", data=tar_member(data, licence)),
               OwnFile(path=f"{folder}/{tarball.name}", data=data))  # fmt: skip
    return _Module(path=path, library=_RELEASES[module.source](data), notices=notices)


def _compiled(outline: Outline, libraries: Sequence[NativeLibrary], fetched: Fetched, store: Store) -> list[Path]:
    """Each library, from the store or by the locked compiler, which is unpacked once for all that are missing."""
    if not libraries:
        return []
    compiler, triple = _compiler(outline), TRIPLES[outline.target.machine]
    keys = [library_key(library, zig_version=compiler.version, triple=triple) for library in libraries]
    paths = [store.path("native", key, ".so") for key in keys]
    with store.lock("native"):
        missing = [(path, library) for path, library in zip(paths, libraries, strict=True) if not path.is_file()]
        if missing:
            with store.scratch() as work:
                zig = unpack_zig(fetched.paths[compiler.artifacts[0].sha256], work, "glibc")
                for path, library in missing:
                    build_library(library, zig=zig, triple=triple, out=path)
    return paths


def _compiler(outline: Outline) -> LockedPackage:
    for package in tools_here(outline):
        if package.name == _COMPILER:
            return package
    raise RecipeError(f"native modules need {_COMPILER!r}", where="native",
                      fix=f"Add a component {_COMPILER!r} with `tool = true`.")  # fmt: skip

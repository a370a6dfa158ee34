"""The whole job: recipe and target in, bundle out. Every step is cached, so a killed run goes on where it stopped."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

import composer
from composer._fs import host_errors
from composer.errors import HostError
from composer.events import Event, Listener
from composer.model.finding import Finding
from composer.model.layer import Layer
from composer.model.lock import LockedPackage
from composer.model.manifest import HOST, Check, Manifest, fingerprint_of
from composer.model.plan import BuiltFacts, LeftOut, PlannedLayer, Summary, WheelPlan
from composer.model.target import sm_text
from composer.model.variant import variant_properties
from composer.proofs.content import Content
from composer.steps.artifact import artifact_path
from composer.steps.base import InterpreterFacts, compiler, interpreter_layer, own_layer
from composer.steps.bundle import Bundle, open_bundle
from composer.steps.edit import Tools, write_wheel
from composer.steps.fetch import Fetched, FetchEvent, fetch
from composer.steps.imported import SKIPPED, check_packed, require_room
from composer.steps.layer import LayerWriter, find_layer, stored_layer
from composer.steps.outline import Outline
from composer.steps.own import debian_mirrors, own_files, releases, tools_here
from composer.steps.pack import Ready, is_packed, pack, read_checksum
from composer.steps.plan import (
    Options,
    Plan,
    coverage_rules,
    dlopen_rules,
    draft_wheels,
    kept_files,
    plan_wheels,
    refuse_findings,
    summary_edits,
    wheel_key,
)
from composer.steps.proofs import prove_content
from composer.steps.sourcing import build_all, facts, is_built
from composer.steps.stubs import stub_files
from composer.steps.survey import Survey, Wanted, WheelFile, read_objects, survey_wheels
from composer.store import Store, key_of

#: What the texts of a layer say, by the layer's key.
_CONTENT = "content-1"
#: Of the check that modules import.
_IMPORTS_VERSION = 1
_LOOKUPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to work, which does not change the result.

    jobs: threads. wheelhouses: folders to take wheels from first. imports: import modules of the finished bundle.
    """

    jobs: int
    imports: bool = True
    offline: bool = False
    wheelhouses: Sequence[Path] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan with everything it needs at hand.

    keys: of all layers, in the order of the bundle: the interpreter, the wheels, the largest first, so that packing can
    follow composing, and the bundle's own files. known: the layers that the store has. sizes: bytes of each wheel's
    files, by key. lasting: of those, at least so many are in the bundle: files that are neither dropped nor cut.
    programs: the module of every console script, by its path.
    """

    outline: Outline
    options: Options
    fetched: Fetched
    interpreter: InterpreterFacts
    plan: Plan
    wheels: Mapping[str, WheelPlan]
    keys: tuple[str, ...]
    known: Mapping[str, Layer | None]
    sizes: Mapping[str, int]
    lasting: Mapping[str, int]
    programs: Mapping[str, str]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A finished bundle. digest: its sha256. up_to_date: nothing had to be done. findings: of all proofs, no errors."""

    path: Path
    digest: str
    manifest: Manifest
    up_to_date: bool
    findings: tuple[Finding, ...]


def sources(outline: Outline) -> list[LockedPackage]:
    """Everything that a build reads: distributions, tools, source releases, the interpreter's archive."""
    archive = outline.interpreter.archive
    return [*outline.packages, *tools_here(outline), *releases(outline.recipe), *([archive] if archive else [])]


def build_sources(outline: Outline) -> list[LockedPackage]:
    """What the builds from source read beside that, as far as it can be fetched as a file."""
    jobs = outline.sourcing.builds.values()
    toolkits = [job.choice.candidate.wheels for job in jobs if job.choice]
    return [
        *(package for job in jobs for package in job.packages()),
        *(one for toolkit in toolkits if toolkit for one in toolkit.lock.packages if one.name in toolkit.packages),
    ]


def fetch_all(outline: Outline, store: Store, settings: Settings, listener: Listener,
              more: Sequence[LockedPackage] = ()) -> Fetched:  # fmt: skip
    """All sources, and more, in the store. What is optional may be missing."""
    return fetch_some([*sources(outline), *more], outline, store, settings, listener)


def fetch_some(packages: Sequence[LockedPackage], outline: Outline, store: Store, settings: Settings,
               listener: Listener) -> Fetched:  # fmt: skip
    """Some of the sources. Raises as `fetch`."""
    return fetch(
        packages, into=store.root, wheelhouse=settings.wheelhouses, indexes=outline.recipe.indexes,
        alternatives=debian_mirrors(outline.recipe, store), local=outline.local_files(),
        offline=settings.offline, progress=functools.partial(_tell_fetch, listener),
    )  # fmt: skip


def at_hand(outline: Outline, store: Store, settings: Settings) -> bool:
    """Whether everything that a build cannot do without is here: nothing to download, nothing to compile."""
    local = {digest: file.path for digest, file in outline.local_files().items()}
    return is_built(outline.sourcing) and all(
        any(place.is_file() for place in (artifact_path(store.root, artifact), local.get(artifact.sha256, Path()),
                                          *(folder / artifact.filename for folder in settings.wheelhouses)))
        for package in sources(outline) if not package.optional for artifact in package.artifacts
    )  # fmt: skip


def _tell_fetch(listener: Listener, event: FetchEvent) -> None:
    finished = event.state in ("present", "done", "missing")
    note = "not reachable, left out" if event.state == "missing" else ""
    listener(Event(step="fetch", subject=event.filename, done=event.done, total=event.size, finished=finished,
                   note=note))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Everything that a plan is made from, at hand. outline: without what is `missing`, which is optional, by name."""

    outline: Outline
    fetched: Fetched
    wheels: Mapping[str, WheelFile]
    missing: Mapping[str, str]


def gather(outline: Outline, store: Store, settings: Settings, listener: Listener) -> Gathered:
    """Fetch, and build what comes from source. Raises as `fetch` and `build_all`."""
    fetched = fetch_all(outline, store, settings, listener)
    missing = {one.package: one.reason for one in fetched.missing}
    outline, fetched = _with_built(outline, fetched, listener)
    outline = replace(outline, packages=tuple(one for one in outline.packages if one.name not in missing))
    wheels = {one.name: _wheel_file(fetched, one) for one in outline.packages}
    return Gathered(outline=outline, fetched=fetched, wheels=wheels, missing=missing)


def prepare(outline: Outline, store: Store, settings: Settings, options: Options, listener: Listener) -> Prepared:
    """Fetch, survey and plan. Writes to the store only; the two layers that no wheel brings are made on the way."""
    gathered = gather(outline, store, settings, listener)
    outline, fetched, wheels = gathered.outline, gathered.fetched, gathered.wheels
    interpreter = interpreter_layer(store, outline.interpreter, options)
    surveys = survey_wheels(store, wheels, outline.target.python, jobs=settings.jobs, listener=listener)
    drafts = draft_wheels(outline, surveys, options, interpreter.bytecode)
    wanted = {draft.name: wanted_objects(draft, surveys[draft.name], wheels[draft.name]) for draft in drafts}
    facts = read_objects(store, wanted, options.level, jobs=settings.jobs, listener=listener)
    ours = own_files(outline, fetched, store, options)
    ours += stub_files(outline, wheels, surveys, store)
    own_key, own = own_layer(store, ours, outline.interpreter, interpreter, options)
    sizes = {name: sum(file.member.size for file in survey.files) for name, survey in surveys.items()}
    lasting = {draft.name: _lasting(draft, surveys[draft.name]) for draft in drafts}
    plan = plan_wheels(outline, drafts, surveys, facts, [*interpreter.files, *own], options)
    keyed = {
        wheel_key(wheel): wheel for wheel in sorted(plan.wheels, key=lambda wheel: (-sizes[wheel.name], wheel.name))
    }
    left_out = tuple(
        LeftOut(name=name, version=outline.lock.pins[name], reason=f"optional, and not to be had: {first_line(why)}")
        for name, why in gathered.missing.items()
    )  # fmt: skip
    keys = (interpreter.key, *keyed, own_key)
    return Prepared(
        outline=outline, options=options, fetched=fetched, interpreter=interpreter, plan=plan, wheels=keyed,
        keys=keys,
        known=_all_known(store, keys, keyed),
        sizes={key: sizes[wheel.name] for key, wheel in keyed.items()},
        lasting={key: lasting[wheel.name] for key, wheel in keyed.items()}, left_out=(*outline.left_out, *left_out),
        programs={f"bin/{one.name}": one.module for survey in surveys.values() for one in survey.scripts},
        warnings=(*_private_warnings(options), *outline.warnings, *interpreter.warnings, *_plan_warnings(plan)),
    )  # fmt: skip


def wanted_objects(draft: WheelPlan, survey: Survey, wheel: WheelFile) -> Wanted:
    """The shared objects of a wheel that planning must read."""
    files = [file for file in kept_files(draft, survey) if file.is_elf and not file.cubin]
    slimmed = frozenset(file.path for file in files if draft.slim and draft.slim.covers(file.path))
    return Wanted(wheel=wheel, files=files, stays=draft.untouched is not None, slimmed=slimmed)


def _lasting(draft: WheelPlan, survey: Survey) -> int:
    files = (file for file in kept_files(draft, survey) if not (draft.slim and draft.slim.covers(file.path)))
    return sum(file.member.size for file in files)


def _wheel_file(fetched: Fetched, package: LockedPackage) -> WheelFile:
    (artifact,) = package.artifacts
    return WheelFile(path=fetched.paths[artifact.sha256], sha256=artifact.sha256)


def first_line(text: str) -> str:
    """The first line of an error's text."""
    return text.partition("\n")[0]


def _with_built(outline: Outline, fetched: Fetched, listener: Listener) -> tuple[Outline, Fetched]:
    """What is built from source as packages at hand, like all others."""
    built = list(build_all(outline.sourcing, listener))
    packages = sorted([*outline.packages, *(package for package, _ in built)], key=lambda one: one.name)
    paths = {**fetched.paths, **{result.wheel.sha256: result.path for _, result in built}}
    return replace(outline, packages=tuple(packages)), replace(fetched, paths=paths)


def _private_warnings(options: Options) -> list[str]:
    if options.redistributable:
        return []
    return ["the bundle must not be passed on: --slim all modifies libraries against their licences"]


def _plan_warnings(plan: Plan) -> list[str]:
    return [f"{one.subject}: {one.evidence}" for one in plan.findings if one.severity == "warning"]


def summarise(prepared: Prepared, output: Path) -> Summary:
    """The plan as a person, or a program, reads it."""
    outline = prepared.outline
    sizes = {one.name: one.artifacts[0].size or 0 for one in outline.packages}
    layers = [
        PlannedLayer(name=wheel.name, version=wheel.version, key=key, size=sizes[wheel.name],
                     cached=prepared.known[key] is not None, edits=list(summary_edits(wheel)))
        for key, wheel in prepared.wheels.items()
    ]  # fmt: skip
    return Summary(
        name=outline.name, recipe=f"{outline.recipe.name} {outline.recipe.version}", lock=outline.lock.filename,
        target=target_facts(outline), interpreter=outline.interpreter.label, torch=_torch(prepared), layers=layers,
        built=built_facts(outline), inputs=[one.facts for one in outline.inputs],
        stubs=[one.summary for one in outline.recipe.stub], not_served=outline.not_served,
        left_out=prepared.left_out, warnings=prepared.warnings,
        fingerprint=_fingerprint(prepared), output=str(output),
        up_to_date=_packed(prepared, output) is not None,
    )  # fmt: skip


def _fingerprint(prepared: Prepared) -> str:
    """The fingerprint, when every layer is at hand; empty otherwise."""
    layers = [layer for layer in prepared.known.values() if layer]
    return fingerprint_of(layers) if len(layers) == len(prepared.known) else ""


def built_facts(outline: Outline) -> list[BuiltFacts]:
    """What comes from source."""
    return [facts(job) for job in outline.sourcing.builds.values()]


def _torch(prepared: Prepared) -> str:
    """How PyTorch was had, and for which GPUs."""
    slim = any(wheel.name == "torch" and wheel.slim for wheel in prepared.wheels.values())
    gpus = f"slimmed to {sm_text(prepared.outline.target.sms)}" if slim else "all its GPU architectures"
    return f"{prepared.outline.torch}; {gpus}"


def _recipe_facts(outline: Outline) -> dict[str, str]:
    """Which recipe. Its digest covers the overlays, too."""
    recipe, overlays = outline.recipe, outline.loaded.overlays
    facts = {"name": recipe.name, "version": recipe.version, "sha256": outline.loaded.digest}
    return facts | ({"overlays": " ".join(overlays)} if overlays else {})


def target_facts(outline: Outline) -> dict[str, str]:
    """The target as plain text."""
    target = outline.target
    return {"sm": " ".join(map(str, target.sms)), "isa": target.isa, "cuda": target.cuda, "python": target.python,
            "machine": target.machine}  # fmt: skip


def build(prepared: Prepared, store: Store, settings: Settings, output: Path, listener: Listener) -> Built:
    """Make the missing layers and join all into `output` (and `output`.sha256) as they become ready."""
    _check_output(output)
    with store.lock(f"output-{prepared.outline.name}"):
        prepared = _with_what_others_made(prepared, store)
        proofs = _Proofs(prepared=prepared, store=store, settings=settings, listener=listener)
        if manifest := _packed(prepared, output):
            proofs.of_texts(manifest)
            proofs.of_imports(open_bundle(output))
            return Built(path=output, digest=read_checksum(output), manifest=manifest, up_to_date=True,
                         findings=tuple(proofs.findings))  # fmt: skip
        proofs.require_room()
        with contextlib.closing(_ready_layers(prepared, store, settings, listener)) as ready:
            digest, manifest = pack(store, ready, proofs.manifest, output, mtime=prepared.options.mtime,
                                    listener=listener, accept=proofs.of_imports)  # fmt: skip
    return Built(path=output, digest=digest, manifest=manifest, up_to_date=False, findings=tuple(proofs.findings))


def _packed(prepared: Prepared, output: Path) -> Manifest | None:
    """The manifest, when `output` is this very bundle: of the same layers, and saying the same of them."""
    fingerprint = _fingerprint(prepared)
    if not (fingerprint and is_packed(output, fingerprint)):
        return None
    layers = [layer for layer in prepared.known.values() if layer]
    packed = open_bundle(output)
    manifest = msgspec.structs.replace(_manifest(prepared, layers), warnings=packed.manifest.warnings)
    return manifest if packed.manifest_json == msgspec.json.encode(manifest) else None


def _with_what_others_made(prepared: Prepared, store: Store) -> Prepared:
    """Another run may have made this very bundle while this one waited for the lock."""
    missing = [key for key, layer in prepared.known.items() if layer is None]
    return replace(prepared, known={**prepared.known, **_all_known(store, missing, prepared.wheels)})


def known_layer(store: Store, key: str, *, told: bool) -> Layer | None:
    """A layer of the store; one of a wheel only with what its texts say, which is otherwise made again, with it."""
    layer = find_layer(store, key)
    if layer is None or not told or store.load(_CONTENT, key, Content) is not None:
        return layer
    store.forget("layer", key)
    return None


def _all_known(store: Store, keys: Sequence[str], told: Collection[str]) -> dict[str, Layer | None]:
    """What the store has of each layer. Several at a time, as a remote may be asked for them."""
    with ThreadPoolExecutor(_LOOKUPS) as pool:
        found = pool.map(lambda key: known_layer(store, key, told=key in told), keys)
        return dict(zip(keys, found, strict=True))


def _check_output(output: Path) -> None:
    """Fail before hours of work, not after."""
    with host_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir():
        raise HostError("is a folder", where=str(output), fix="Give the path of a file, or another --output folder.")


def _ready_layers(
    prepared: Prepared, store: Store, settings: Settings, listener: Listener
) -> Generator[Ready, None, None]:
    """Every layer in the bundle's order, made by worker threads where the store does not have it.

    The first fault stops the rest, and so does closing the generator.
    """
    missing = [key for key in prepared.wheels if prepared.known[key] is None]
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(settings.jobs))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        stack.callback(stop.set)
        jobs: dict[str, Future[Layer]] = {}
        if missing:
            python = stack.enter_context(compiler(store, prepared.outline.interpreter))
            plans = [prepared.wheels[key] for key in missing]
            tools = Tools(python=python, patches=read_patches(prepared.outline, plans))
            jobs = {key: pool.submit(_make, prepared, key, tools, store, stop, listener) for key in missing}
        for key in prepared.keys:
            layer = jobs[key].result() if key in jobs else prepared.known[key]
            assert layer is not None  # the two that no wheel brings are made while preparing
            yield Ready(key=key, layer=layer, fresh=key in jobs)


def read_patches(outline: Outline, plans: Sequence[WheelPlan]) -> dict[str, bytes]:
    """The patches of these plans, by name."""
    folder = outline.loaded.patches
    names = {patch.name for plan in plans for patch in plan.patches}
    with host_errors(folder):
        return {name: (folder / name).read_bytes() for name in sorted(names)}


class _StoppedError(Exception):
    """Another layer failed, or the user interrupted."""


def _make(prepared: Prepared, key: str, tools: Tools, store: Store, stop: threading.Event,
          listener: Listener) -> Layer:  # fmt: skip
    plan = prepared.wheels[key]
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        if stop.is_set():
            raise _StoppedError
        done += count
        listener(Event(step="layer", subject=plan.name, done=done, total=prepared.sizes[key]))

    layer = compose_layer(store, key, plan, prepared.fetched.paths[plan.artifact], tools, progress)
    listener(Event(step="layer", subject=plan.name, finished=True))
    return layer


def compose_layer(store: Store, key: str, plan: WheelPlan, path: Path, tools: Tools,
                  progress: Callable[[int], None]) -> Layer:  # fmt: skip
    """The layer of one wheel, which is at `path`: from the store, or made. Raises as `write_wheel`.

    key: `wheel_key` of the plan. progress: is called with bytes of files.
    """
    with store.scratch() as scratch:

        def fill(writer: LayerWriter) -> Layer:
            return write_wheel(writer, plan, path, tools, scratch, functools.partial(store.save, _CONTENT, key))

        return stored_layer(store, key, fill, level=plan.level, mtime=plan.mtime, progress=progress)


@dataclass(slots=True, kw_only=True)
class _Proofs:
    """The proofs of a bundle that follow those of its plan. Each raises VerifyError before anything is shipped.

    findings: of all that were asked.
    """

    prepared: Prepared
    store: Store
    settings: Settings
    listener: Listener
    findings: list[Finding] = field(init=False)

    def __post_init__(self) -> None:
        self.findings = [*self.prepared.plan.findings]

    def manifest(self, layers: list[Layer]) -> Manifest:
        """The manifest of a bundle whose texts hold together."""
        manifest = _manifest(self.prepared, layers)
        warnings = [f"{one.subject}: {one.evidence}" for one in self.of_texts(manifest) if one.severity == "warning"]
        return msgspec.structs.replace(manifest, warnings=(*manifest.warnings, *warnings))

    def of_texts(self, manifest: Manifest) -> tuple[Finding, ...]:
        """Requirements, imports, files, what is made on the host. The interpreter and the own files tell nothing."""
        keyed = zip(self.prepared.keys, manifest.layers, strict=True)
        contents = {layer.name: self.store.load(_CONTENT, key, Content) or Content() for key, layer in keyed}
        return self._found(prove_content(manifest, contents, programs=self.prepared.programs))

    def require_room(self) -> None:
        """Fail before hours of work, not after, where the bundle cannot be unpacked for its imports."""
        layers = [layer for layer in self.prepared.known.values() if layer]
        manifest = _manifest(self.prepared, layers)
        if self.settings.imports and self._imported(_imports_key(manifest)) is None:
            missing = sum(self.prepared.lasting[key] for key, layer in self.prepared.known.items() if layer is None)
            require_room(manifest, self.store, sum(layer.size for layer in layers) + missing)

    def of_imports(self, bundle: Bundle) -> None:
        """Every module of the recipe imports; asked once of the same content."""
        if not self.settings.imports:
            return
        manifest = bundle.manifest
        key = _imports_key(manifest)
        known = self._imported(key)
        found = self._found(known if known is not None else check_packed(
            bundle, self.store, jobs=self.settings.jobs, listener=self.listener))  # fmt: skip
        # What imports a bundle without a Python of its own is this machine's, which may change.
        lasting = manifest.interpreter != HOST and not any(one.id == SKIPPED for one in found)
        if known is None and lasting:
            self.store.save("imports", key, found)

    def _imported(self, key: str) -> tuple[Finding, ...] | None:
        return self.store.load("imports", key, tuple[Finding, ...])

    def _found(self, findings: Sequence[Finding]) -> tuple[Finding, ...]:
        refuse_findings(findings)
        self.findings.extend(findings)
        return tuple(findings)


def _imports_key(manifest: Manifest) -> str:
    checks = [msgspec.to_builtins(one) for one in manifest.checks]
    return key_of("imports", _IMPORTS_VERSION, fingerprint=manifest.fingerprint, checks=checks)


def _manifest(prepared: Prepared, layers: list[Layer]) -> Manifest:
    outline = prepared.outline
    recipe = outline.recipe
    names = {one.name for one in outline.packages}
    checks = [
        Check(module=module, needs_driver=component.needs_driver)
        for component in recipe.component if component.name in names for module in component.imports
    ]  # fmt: skip
    target, floors = outline.target, prepared.plan.floors
    # Where every object chooses its code when it runs, no CPU is asked for.
    isa = outline.targets.isa[target.isa] if "CPU" in floors else None
    return Manifest(
        name=outline.name, fingerprint=fingerprint_of(layers), composer=composer.__version__,
        recipe=_recipe_facts(outline), lock=outline.lock.recipe, target=target_facts(outline),
        properties=variant_properties(target.sms, target.cuda, isa),
        python=prepared.interpreter.version, interpreter=outline.interpreter.label, torch=_torch(prepared),
        built=built_facts(outline), slim=prepared.options.slim,
        serve=recipe.serve, as_of=recipe.as_of.strftime("%Y-%m-%dT%H:%M:%SZ"), floors=floors,
        host_libraries=prepared.plan.host_libraries, coverage=coverage_rules(outline), checks=checks,
        dlopen=dlopen_rules(outline), runtime=[row for row in recipe.runtime if row.of in names],
        inputs=[one.facts for one in outline.inputs],
        left_out=prepared.left_out, warnings=prepared.warnings, layers=layers,
    )  # fmt: skip

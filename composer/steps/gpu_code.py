"""List the GPU code in a library, a wheel, a bundle or a folder, and what a selection of targets would keep of it.

One library is in memory at a time, and only those parts of it are read that tell.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from composer.errors import ElfError
from composer.formats.cubin import Cubin
from composer.formats.fatbin import Entry
from composer.formats.gpu_code import FATBIN, GpuCode, kept_entries, read_gpu_code
from composer.model.gpu import Selection, compiles, runs, select
from composer.steps.objects import objects


class Images(msgspec.Struct, frozen=True, kw_only=True):
    """Images of one form for one architecture: how many, and their bytes as stored."""

    kind: str
    sm: int
    variant: str
    compression: str
    count: int
    size: int


class Selected(msgspec.Struct, frozen=True, kw_only=True):
    """What a selection of targets does. All sizes in bytes of images.

    without: per target, containers that hold no image for it, of those that the CUDA runtime loads from. compiled: per
    target, those from which only PTX is left, which the driver compiles when it loads them.
    """

    kept: int
    dropped: int
    without: dict[int, int]
    compiled: dict[int, int]


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU code of one object, or of all loose cubins of one folder.

    size: bytes of the file or files. containers: how many, by section. elsewhere: bytes by section, in containers that
    are never touched. doubts: why an edit would leave the file alone.
    """

    path: str
    size: int
    machine: str
    images: Sequence[Images]
    containers: dict[str, int]
    elsewhere: dict[str, int]
    pinned: int
    doubts: Sequence[str]
    selected: Selected | None


def list_gpu_code(path: Path, selection: Selection) -> Iterator[Library]:
    """Every library below `path` that holds GPU code. `selection`: what to compute `selected` for, unless it is all.

    Raises HostError for what cannot be read, WheelError and VerifyError for an unsound wheel or bundle. What is wrong
    with a library alone is among its doubts.
    """
    cubins: dict[str, list[tuple[Cubin, int]]] = {}
    for name, size, content in objects(path):
        if isinstance(content, Cubin):
            cubins.setdefault(str(PurePosixPath(name).parent), []).append((content, size))
        elif library := _library(name, size, content, selection):
            yield library
    for folder, found in sorted(cubins.items()):
        yield _cubins(folder, found, selection)


def _library(path: str, size: int, content: mmap.mmap, selection: Selection) -> Library | None:
    try:
        code = read_gpu_code(content, path)
    except ElfError as fault:
        code = GpuCode(machine="", doubts=(str(fault.what),))
    if not (code.regions or code.elsewhere or code.doubts):
        return None
    return Library(
        path=path, size=size, machine=code.machine,
        images=_images(entry for region in code.regions for one in region.containers for entry in one.entries),
        containers={region.name: len(region.containers) for region in code.regions},
        elsewhere={one.section: sum(found.end - found.start for found in one.containers) for one in code.elsewhere},
        pinned=len(code.pinned), doubts=code.doubts,
        selected=_selected(code, selection) if selection.sms and code.regions else None,
    )  # fmt: skip


def _images(entries: Iterable[Entry]) -> list[Images]:
    counts: Counter[tuple[str, int, str, str]] = Counter()
    sizes: Counter[tuple[str, int, str, str]] = Counter()
    for one in entries:
        key = (one.kind, one.sm, one.variant, one.compression)
        counts[key] += 1
        sizes[key] += one.end - one.start
    return [
        Images(kind=key[0], sm=key[1], variant=key[2], compression=key[3], count=counts[key], size=sizes[key])
        for key in sorted(counts)
    ]  # fmt: skip


def _selected(code: GpuCode, selection: Selection) -> Selected:
    indices = kept_entries(code, selection)
    sizes = [
        (entry.end - entry.start, number in indices[one.start])
        for region in code.regions for one in region.containers for number, entry in enumerate(one.entries)
    ]  # fmt: skip
    loaded = [one.entries for region in code.regions if region.name == FATBIN for one in region.containers]
    return Selected(
        kept=sum(size for size, stays in sizes if stays), dropped=sum(size for size, stays in sizes if not stays),
        without={sm: sum(not runs(one, sm) and not compiles(one, sm) for one in loaded) for sm in selection.sms},
        compiled={sm: sum(not runs(one, sm) and compiles(one, sm) for one in loaded) for sm in selection.sms},
    )  # fmt: skip


def _cubins(folder: str, found: Sequence[tuple[Cubin, int]], selection: Selection) -> Library:
    counts: Counter[tuple[int, str]] = Counter()
    sizes: Counter[tuple[int, str]] = Counter()
    for cubin, size in found:
        counts[cubin.sm, cubin.variant] += 1
        sizes[cubin.sm, cubin.variant] += size
    return Library(
        path=f"{folder}/*.cubin", size=sum(sizes.values()), machine="cuda",
        images=[
            Images(kind="elf", sm=sm, variant=variant, compression="none", count=counts[sm, variant], size=size)
            for (sm, variant), size in sorted(sizes.items())
        ],
        containers={}, elsewhere={}, pinned=0, doubts=(),
        selected=_selected_cubins(found, selection) if selection.sms else None,
    )  # fmt: skip


def _selected_cubins(found: Sequence[tuple[Cubin, int]], selection: Selection) -> Selected:
    """Of loose files each stands for itself: what runs on a target stays."""
    kept = sum(size for cubin, size in found if select([cubin], selection))
    return Selected(
        kept=kept, dropped=sum(size for _, size in found) - kept,
        without={sm: sum(not runs([cubin], sm) for cubin, _ in found) for sm in selection.sms},
        compiled=dict.fromkeys(selection.sms, 0),
    )  # fmt: skip

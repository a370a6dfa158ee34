"""What GPU code one object holds, container by container: enough to tell on which GPUs it runs, and no more.

Who points at a container, and whether it may move, does not matter here (see `gpu_code`), so only section headers and
the headers of images are read: 30 libraries with 5 GB of code take 3 seconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from composer.errors import ElfError
from composer.formats.cubin import Cubin
from composer.formats.elf import Reader
from composer.formats.fatbin import Container, find_containers, read_containers
from composer.formats.gpu_code import FATBIN, RELINKABLE
from composer.formats.references import Source
from composer.formats.sections import PROGBITS, Section, read_sections


class Image(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A kind of image: `elf`, `ptx`, `lto` or `other`, for one SM; `a` and `f` as in `fatbin.Entry`."""

    kind: str
    sm: int
    variant: str = ""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """All containers of an object that hold the same kinds of images.

    count: how many. sizes: bytes once decompressed, of all of them together, for each of `images`.
    """

    images: Sequence[Image]
    count: int
    sizes: Sequence[int]


class GpuImages(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The GPU code of one object, without what is only there to be linked again. fault: why it cannot be read."""

    shapes: Sequence[Shape] = ()
    fault: str | None = None


def read_images(buffer: Source, where: str) -> GpuImages:
    """The GPU code of an ELF object, none of it where its section headers are gone.

    Never raises: what cannot be read is the result's `fault`, which is for a proof to judge.
    """
    try:
        if Reader(buffer, where).bits != 64:
            return GpuImages()
        sections = read_sections(buffer, where).sections
        containers = [one for section in sections if _may_hold(section) for one in _in_section(buffer, section, where)]
    except ElfError as fault:
        return GpuImages(fault=fault.what)
    return GpuImages(shapes=_shapes(containers))


def cubin_images(cubin: Cubin, size: int) -> GpuImages:
    """A loose cubin as an object with one container. size: bytes of the file."""
    image = Image(kind=cubin.kind, sm=cubin.sm, variant=cubin.variant)
    return GpuImages(shapes=(Shape(images=(image,), count=1, sizes=(size,)),))


def _may_hold(section: Section) -> bool:
    """Data that is loaded. The objects of `__nv_relfatbin` are the parts of code that is in `.nv_fatbin`, linked."""
    loaded = section.kind == PROGBITS and section.allocated and not section.executable
    return loaded and section.size > 0 and section.name != RELINKABLE


def _in_section(buffer: Source, section: Section, where: str) -> Sequence[Container]:
    if section.name == FATBIN:
        try:
            return read_containers(buffer, section.offset, section.end, where)
        except ElfError:
            pass  # it holds something else, too
    return find_containers(buffer, section.offset, section.end, where)


def _shapes(containers: Iterable[Container]) -> Sequence[Shape]:
    counts: Counter[tuple[tuple[str, int, str], ...]] = Counter()
    sizes: defaultdict[tuple[tuple[str, int, str], ...], list[int]] = defaultdict(list)
    for container in containers:
        key = tuple((one.kind, one.sm, one.variant) for one in container.entries)
        counts[key] += 1
        so_far = sizes[key] or [0] * len(key)
        sizes[key] = [total + one.image for total, one in zip(so_far, container.entries, strict=True)]
    return tuple(
        Shape(images=tuple(Image(kind=kind, sm=sm, variant=variant) for kind, sm, variant in key), count=counts[key],
              sizes=tuple(sizes[key]))
        for key in sorted(counts)
    )  # fmt: skip

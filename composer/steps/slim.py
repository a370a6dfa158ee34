"""Make one shared object smaller for the target: cut what its GPU cannot run and what only debuggers read; prove it.

Last of all edits: patchelf does not know of the holes between segments that this makes.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer._fs import host_errors
from composer.errors import ElfError
from composer.formats.slim import Slimmed, slim
from composer.model.gpu import Selection
from composer.model.plan import SlimEdit
from composer.proofs.slimmed import prove_slimmed
from composer.steps.slim_check import loadable
from composer.steps.survey import mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What slimming did to an object. detail: for a person; empty when there was nothing to cut."""

    changed: bool
    detail: str


def slim_object(source: Path, into: Path, where: str, edit: SlimEdit) -> Outcome:
    """Write the smaller object to `into`; `source` stays as it is, and is the result when nothing could be cut.

    ElfError when the new object does not stand up to the proof; what it is then at `into` is worth nothing.
    """
    selection = Selection(sms=tuple(edit.sms) if edit.gpu else (), keep_ptx=edit.keep_ptx)
    with mapped(source) as before:
        try:
            done = slim(before, where, selection, debug=edit.debug)
        except ElfError as fault:  # not well-formed: what a wheel has for its tests, say
            why = f" ({fault.why})" if fault.why else ""
            return Outcome(changed=False, detail=f"left alone: {fault.what}{why}")
        if done.how == "unchanged":
            return Outcome(changed=False, detail=f"left alone: {done.why}" if done.why else "")
        # Pages of a map count as memory of this process until it gives them back; the page cache keeps them.
        before.madvise(mmap.MADV_DONTNEED)
        _write(done, into)
        before.madvise(mmap.MADV_DONTNEED)
        with mapped(into) as after:
            prove_slimmed(before, after, where, selection.sms, keep_ptx=edit.keep_ptx, debug=edit.debug)
        loadable(into)
        return Outcome(changed=True, detail=_detail(done, len(before), selection.sms))


def _write(done: Slimmed, into: Path) -> None:
    with host_errors(into), into.open("wb") as out:
        out.writelines(done.pieces())


def _detail(done: Slimmed, before: int, sms: Sequence[int]) -> str:
    """`1022.8 -> 248.6 MB; 401 of 2787 images kept for SM 90; 27.1 MB of debug symbols cut`."""
    parts = [f"{before / 1e6:.1f} -> {done.size / 1e6:.1f} MB"]
    if done.dropped.images:
        targets = ", ".join(map(str, sms))
        parts.append(f"{done.kept.images} of {done.kept.images + done.dropped.images} images kept for SM {targets}")
    if done.debug:
        parts.append(f"{done.debug / 1e6:.1f} MB of debug symbols cut")
    if done.how == "compacted":
        parts.append("zeros in their place")
    return "; ".join([*parts, *([done.why] if done.why else [])])

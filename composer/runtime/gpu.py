"""Refuse a host whose GPUs the bundle was not built for, before CUDA answers "no kernel image is available".

Its code for other GPUs was cut out, or was never there. The check runs once, when torch is first looked for: programs
that use no GPU do not pay for it.
"""

# Every start of the interpreter reads this file, so what only the check needs is imported there.
# ruff: noqa: PTH118, PTH123

import os
import sys

from . import PREFIX

_SKIP = "WHEEL_COMPOSER_GPU_CHECK"
_TARGET = os.path.join(PREFIX, "share", "compose", "target.json")


class _Gate:
    """A finder that finds nothing: it sees the first search for torch.

    It stays in sys.meta_path: the import system walks over that very list, and a finder less would hide the next one.
    """

    pending = True

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:  # noqa: ARG002
        if name == "torch" and self.pending:
            _check()
            self.pending = False


def gpus() -> list[tuple[str, int]]:
    """(name, SM) of every GPU that the driver shows; none where there is no driver, or one without these functions."""
    from .host import nvml

    try:
        with nvml.opened() as library:
            asked = [(library.text("nvmlDeviceGetName", handle) or "", library.sm(handle))
                     for _, handle, status in library.handles() if not status]  # fmt: skip
    except nvml.NvmlError:
        return []
    return [(name, sm) for name, sm in asked if sm]


def runs(sm: int, built: int, *, ptx: bool) -> bool:
    """Whether code built for one SM runs on another: of the same major and not newer, and never on or from a Jetson.

    From 9.0 on the kernels are specific to their SM (`sm_90a`). The driver compiles PTX for every later one.
    """
    if sm == built or (ptx and sm > built):
        return True
    return sm // 10 == built // 10 == 8 and sm > built and 87 not in (sm, built)


def _check() -> None:
    if os.environ.get(_SKIP) == "off" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    import json

    try:
        with open(_TARGET) as stream:
            target = json.load(stream)
    except (OSError, ValueError):
        return
    found = gpus()
    if not found or any(runs(sm, built, ptx=target["ptx"]) for _, sm in found for built in target["sm"]):
        return
    built = ", ".join(f"SM {sm}" for sm in target["sm"])
    present = ", ".join(f"{name} (SM {sm})" for name, sm in dict.fromkeys(found))
    sys.stderr.write(
        f"{target['name']}: this bundle was built for {built}; this host has {present}\n"
        f"  why: code for other GPUs was left out of it, so kernels would fail\n"
        f"  fix: use a bundle built with --sm {found[0][1]} (to try this one all the same: {_SKIP}=off)\n"
    )
    raise SystemExit(10)


if __name__ == "_compose.gpu":
    sys.meta_path.insert(0, _Gate())

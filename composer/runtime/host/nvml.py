"""Ask NVIDIA's management library (NVML, by ctypes) for the driver and its GPUs.

NVML and not CUDA: a process that has initialised CUDA cannot fork. Drivers of any age are asked: a function that one
lacks is an answer that is missing, and every buffer is larger than any version of the structure that goes into it.
Layouts: nvml.h.
"""

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_DRIVER_NOT_LOADED, _FUNCTION_NOT_FOUND = 9, 13
_BUFFER = 4096


class NvmlError(Exception):
    """There is no NVML here, or it does not start; the text says why. expected: no GPU was promised either."""

    def __init__(self, text: str, *, expected: bool) -> None:
        super().__init__(text)
        self.expected = expected


class Nvml:
    """An initialised NVML."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def status(self, name: str, *arguments: Any) -> int:  # noqa: ANN401  # what ctypes takes
        """What a function returned: 0 is success."""
        try:
            function = getattr(self._library, name)
        except AttributeError:
            return _FUNCTION_NOT_FOUND
        return int(function(*arguments))

    def error(self, status: int) -> str:
        """NVML's own words for a status."""
        try:
            function = self._library.nvmlErrorString
        except AttributeError:
            return f"NVML error {status}"
        function.restype = ctypes.c_char_p
        return (function(status) or b"").decode("utf-8", "replace") or f"NVML error {status}"

    def text(self, name: str, *handle: ctypes.c_void_p, size: int = 96) -> str | None:
        """The string that a function writes."""
        found = ctypes.create_string_buffer(_BUFFER)
        return None if self.status(name, *handle, found, size) else found.value.decode("utf-8", "replace")

    def number(self, name: str, *arguments: Any) -> int | None:  # noqa: ANN401
        """The unsigned number that a function writes."""
        found = ctypes.c_uint()
        return None if self.status(name, *arguments, ctypes.byref(found)) else found.value

    def fields(self, name: str, handle: ctypes.c_void_p, layout: str) -> tuple[Any, ...]:
        """The first members of the structure that a function writes, by `struct`'s letters; none where it fails."""
        found = ctypes.create_string_buffer(_BUFFER)
        return () if self.status(name, handle, found) else struct.unpack_from(layout, found.raw)

    def handles(self) -> Iterator[tuple[int, ctypes.c_void_p, int]]:
        """(index, handle, status) of every GPU; one that is lost, or not this user's, has another status than 0."""
        for index in range(self.number("nvmlDeviceGetCount_v2") or 0):
            handle = ctypes.c_void_p()
            yield index, handle, self.status("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))

    def sm(self, handle: ctypes.c_void_p) -> int | None:
        """Ten times the compute capability."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        if self.status("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor)):
            return None
        return 10 * major.value + minor.value


@contextlib.contextmanager
def opened() -> Iterator[Nvml]:
    """NVML from its start to its end. NvmlError where it cannot start."""
    try:
        nvml = Nvml(ctypes.CDLL(_LIBRARY))
    except OSError as fault:
        raise NvmlError(str(fault), expected=True) from None
    status = nvml.status("nvmlInit_v2")
    if status:
        raise NvmlError(f"NVML does not start: {nvml.error(status)}", expected=status == _DRIVER_NOT_LOADED)
    try:
        yield nvml
    finally:
        nvml.status("nvmlShutdown")


def survey() -> dict[str, Any]:
    """`driver`, `gpus` and `notes` (what went wrong) as `detect` shows them. NvmlError without NVML."""
    with opened() as nvml:
        gpus, notes = [], []
        for index, handle, status in nvml.handles():
            if status:
                notes.append(f"GPU {index} does not answer: {nvml.error(status)}")
            else:
                gpus.append(_gpu(nvml, index, handle))
        return {"driver": _driver(nvml), "gpus": gpus, "notes": notes}


def _driver(nvml: Nvml) -> dict[str, Any] | None:
    version = nvml.text("nvmlSystemGetDriverVersion")
    # _v2 asks the libcuda that programs get, which NVIDIA's compatibility package replaces.
    cuda = nvml.number("nvmlSystemGetCudaDriverVersion_v2") or nvml.number("nvmlSystemGetCudaDriverVersion")
    return {"version": version, "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else None} if version else None


def _gpu(nvml: Nvml, index: int, handle: ctypes.c_void_p) -> dict[str, Any]:
    memory = nvml.fields("nvmlDeviceGetMemoryInfo", handle, "=QQ")
    total, free = memory or (None, None)
    return {
        "index": index,
        "uuid": nvml.text("nvmlDeviceGetUUID", handle),
        "name": nvml.text("nvmlDeviceGetName", handle),
        "sm": nvml.sm(handle),
        "memory_bytes": total,
        "free_bytes": free,
        "temperature_c": nvml.number("nvmlDeviceGetTemperature", handle, 0),
        "utilization": next(iter(nvml.fields("nvmlDeviceGetUtilizationRates", handle, "=I")), None),
        "pci": _pci(nvml, handle),
        "mig": _mig(nvml, handle),
    }


def _pci(nvml: Nvml, handle: ctypes.c_void_p) -> str | None:
    """As /sys/bus/pci names it. Its third version put a longer name behind the first version's fields."""
    found = nvml.fields("nvmlDeviceGetPciInfo_v3", handle, "=36x32s") or nvml.fields(
        "nvmlDeviceGetPciInfo_v2", handle, "=16s"
    )
    return pci_name(found[0].partition(b"\0")[0].decode("ascii", "replace")) if found else None


def pci_name(text: str) -> str | None:
    """`00000000:1B:00.0` as `0000:1b:00.0`."""
    domain, _, rest = text.strip().lower().partition(":")
    try:
        return f"{int(domain, 16):04x}:{rest}"
    except ValueError:
        return None


def _mig(nvml: Nvml, handle: ctypes.c_void_p) -> list[dict[str, Any]] | None:
    """The instances of a GPU that is divided; None for one that is whole."""
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    status = nvml.status("nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
    if status or not current.value:
        return None
    found = []
    for number in range(nvml.number("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        part = ctypes.c_void_p()
        if nvml.status("nvmlDeviceGetMigDeviceHandleByIndex", handle, number, ctypes.byref(part)):
            continue
        memory = nvml.fields("nvmlDeviceGetMemoryInfo", part, "=QQ")
        found.append({
            "uuid": nvml.text("nvmlDeviceGetUUID", part), "name": nvml.text("nvmlDeviceGetName", part),
            "memory_bytes": memory[0] if memory else None,
        })  # fmt: skip
    return found

"""Refuse a host that is older than the bundle needs, in words and before anything is imported.

Otherwise it ends in "version GLIBC_2.28 not found", "CUDA driver version is insufficient" or an illegal instruction, at
some later time. `share/compose/floors` holds the bundle's name in its first line, and then a line for each floor: name,
version and what asks for it, with tabs between. What cannot be found out about a host is not held against it.

`compose unpack` asks the same before it writes.
"""

# Every start of the interpreter runs this, so it imports what is imported anyhow, and no json.
# ruff: noqa: PTH123

import os

from . import PREFIX

_SKIP = "WHEEL_COMPOSER_HOST_CHECK"
#: Exit statuses; 10 is that of a foreign GPU.
STATUS = {"glibc": 11, "kernel": 12, "CPU": 13, "driver": 14, "libstdc++ GLIBCXX": 15, "L4T": 16}
# The first processor's features are within these bytes; the whole file of a large host takes milliseconds to make.
_CPUINFO, _CPUINFO_HEAD = "/proc/cpuinfo", 8192
_DRIVER = "/proc/driver/nvidia/version"
_MAPS = "/proc/self/maps"
#: Of Jetson Linux: `# R38 (release), REVISION: 2.0, GCID: ...`.
_L4T = "/etc/nv_tegra_release"

_FIXES = {
    "glibc": "use a host with glibc {wanted} or newer",
    "kernel": "use a host with Linux {wanted} or newer",
    "CPU": "use a bundle for an instruction set (--isa) that this CPU has",
    "driver": "install NVIDIA's driver {wanted} or newer; to use no GPU set CUDA_VISIBLE_DEVICES to nothing",
    "L4T": "use a Jetson with L4T {wanted} or newer (JetPack), or a bundle for this host's GPU",
    "libstdc++ GLIBCXX": "install a newer libstdc++, or none: the bundle has one for hosts without",
}


def parse(text: str) -> dict[str, tuple[str, str]]:
    """(version, what asks for it) by the name of the floor. ValueError for text that is something else."""
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    return {name: (version, because) for name, version, because in rows}


def unmet(floors: dict[str, tuple[str, str]], host: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """(name, what, why, fix) of every floor that a host is below. What `host` does not say is taken as met."""
    found = []
    for name, (wanted, because) in floors.items():
        has = host.get(name)
        if name not in STATUS or not has or _meets(name, wanted, has):
            continue
        if name == "driver" and "CUDA" in floors and _meets("CUDA", floors["CUDA"][0], host.get("CUDA") or "0"):
            continue
        found.append((name, f"needs {_label(name)} {wanted}; this host has {_shown(name, wanted, has)}", because,
                      _FIXES[name].format(wanted=wanted)))  # fmt: skip
    return found


def read_host(floors: dict[str, tuple[str, str]]) -> dict[str, str]:
    """What this host has of what is asked for, as far as it tells. libcuda is loaded only where the driver is old."""
    readers = {"glibc": _glibc, "kernel": _kernel, "CPU": _cpu, "driver": _driver, "libstdc++ GLIBCXX": _libstdcxx,
               "L4T": _l4t}  # fmt: skip
    host = {name: readers[name]() for name in floors if name in readers}
    if "CUDA" in floors and host.get("driver") and not _meets("driver", floors["driver"][0], host["driver"]):
        cuda = _cuda()
        # /proc shows the machine's module in a container, too, where without libcuda no GPU can be used.
        host |= {"driver": ""} if cuda is None else {"CUDA": cuda}
    return host


def _meets(name: str, wanted: str, has: str) -> bool:
    if name == "CPU":
        return not set(wanted.split()) - set(has.split())
    return _numbers(has) >= _numbers(wanted)


def _numbers(version: str) -> tuple[int, ...]:
    """`6.1.0-18-amd64` as (6, 1): zeros at the end say nothing."""
    found = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if digits:
            found.append(int(digits))
        if digits != part:
            break
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def _label(name: str) -> str:
    return {"kernel": "Linux", "CPU": "a CPU with", "driver": "NVIDIA's driver"}.get(name, name)


def _shown(name: str, wanted: str, has: str) -> str:
    return f"none with {' '.join(sorted(set(wanted.split()) - set(has.split())))}" if name == "CPU" else has


def _read(path: str, size: int) -> str:
    """The start of a file; nothing where it is not to be had. One call gives at most a page of some files of /proc."""
    found = b""
    try:
        with open(path, "rb", 0) as stream:
            while len(found) < size and (piece := stream.read(size - len(found))):
                found += piece
    except OSError:
        return ""
    return found.decode("ascii", "replace")


def _glibc() -> str:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):  # another C library
        return ""
    return version if name == "glibc" else ""


def _kernel() -> str:
    system = os.uname()
    return system.release if system.sysname == "Linux" else ""


def _cpu() -> str:
    for line in _read(_CPUINFO, _CPUINFO_HEAD).splitlines():
        name, _, features = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return features.strip()
    return ""


def _driver() -> str:
    """The kernel module's version: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Mon ...`."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return ""
    for word in _read(_DRIVER, 1024).partition("\n")[0].split():
        if "." in word and word.replace(".", "").isdigit():
            return word
    return ""


def _cuda() -> str | None:
    """The CUDA that libcuda knows: NVIDIA's compatibility package puts a newer one on an older kernel module.

    None where there is no libcuda.
    """
    import ctypes

    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    try:
        if library.cuDriverGetVersion(ctypes.byref(version)):
            return ""
    except AttributeError:
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _l4t() -> str:
    """`38.2.0`, or `none`: only hosts for GPUs that are part of a Jetson module are asked, and each has the file."""
    head, _, rest = _read(_L4T, 256).partition(" (release), REVISION: ")
    release = head.rpartition("R")[2]
    revision = rest.partition(",")[0].strip()
    return f"{release}.{revision}" if release.isdigit() else "none"


def _libstdcxx() -> str:
    """GLIBCXX of the copy in this process, if the host's: the file libstdc++.so.6.0.N defines GLIBCXX_3.4.N."""
    _, found, rest = _read(_MAPS, 1 << 20).partition("/libstdc++.so.6.0.")
    number = rest.partition("\n")[0]
    return f"3.4.{number}" if found and number.isdigit() else ""


def _check() -> None:
    if os.environ.get(_SKIP) == "off":
        return
    text = _read(f"{PREFIX}/share/compose/floors", 1 << 16)
    try:
        floors = parse(text)
    except ValueError:
        return
    found = unmet(floors, read_host(floors))
    if not found:
        return
    bundle = text.partition("\n")[0]
    lines = [f"{bundle}: this bundle {what}\n  why: {why}\n  fix: {fix}\n" for _, what, why, fix in found]
    os.write(2, f"{''.join(lines)}  (to try this host all the same: {_SKIP}=off)\n".encode())
    # While `site` runs, SystemExit is a fatal error of the interpreter with a traceback and status 1.
    os._exit(STATUS[found[0][0]])


if __name__ == "_compose.floors":
    _check()

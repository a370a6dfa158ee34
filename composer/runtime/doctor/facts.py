"""Read what the doctor judges and `detect` does not say: the bundle, the driver at work, the cache, the environment.

Nothing is written but the cache folder, which every start of the bundle makes. What cannot be read is None, or empty.
"""

# Names are joined below a folder, and nothing else: no place for pathlib.
# ruff: noqa: PTH110, PTH112, PTH116, PTH118, PTH119, PTH120, PTH123, PTH208

import fnmatch
import json
import os
import platform
import re
import resource
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .. import environment, floors
from ..host import ports
from . import driver

Facts = dict[str, Any]

#: What the launcher keeps for us of an environment that would break the interpreter; the last two it sets to `off`.
KEPT = ("PYTHONPATH", "PYTHONHOME", "WHEEL_COMPOSER_HOST_CHECK", "WHEEL_COMPOSER_GPU_CHECK")
_WAS = "_COMPOSE_WAS_"
_PORT = 30000
_STACK = re.compile(r"lib(?:c10|cublas|cudart|cudnn|cufft|cusparse|nccl|nvJitLink|nvrtc|torch)\w*\.so")
_READS_SETTINGS = re.compile(r"/(?:sglang\w*|sgl_kernel|_compose)/")
_NAME = re.compile(rb"\bSGLANG_[A-Z0-9_]+")
#: A walk that only tells how large something is ends there.
_MOST_FILES = 20_000


def read(prefix: str, manifest: Mapping[str, Any], detected: Facts, *, environ: Mapping[str, str],
         port: int | None) -> Facts:  # fmt: skip
    """`detected` and all else. environ: the caller's, with what the launcher changed put back."""
    bundle = _bundle(prefix, manifest)
    asked = environ.get("CUDA_VISIBLE_DEVICES")
    wanted = {**driver.LIBRARIES, **(manifest.get("host_libraries") or {})}
    libraries, nvidia = driver.read(wanted, by_nvml=detected["found_by"] == "nvml")
    facts = {
        **detected,
        "uid": os.getuid(),
        "environ": environ,
        "hidden": asked is not None and asked.split(",")[0].strip() in ("", "-1", "NoDevFiles"),
        "container": _in_container(environ),
        "bundle": bundle,
        "has": floors.read_host(bundle["floors"]),
        "libraries": libraries,
        "nvidia": nvidia,
        "rdma": _names("/sys/class/infiniband"),
        "iommu": bool(_names("/sys/class/iommu")) and "iommu=pt" not in _text("/proc/cmdline"),
        "numa_balancing": _text("/proc/sys/kernel/numa_balancing").strip() not in ("", "0"),
        "overcommit": _text("/proc/sys/vm/overcommit_memory").strip(),
        "hard_limits": _hard_limits(),
        "clock": _clock(manifest),
        "port": _port(port, environ),
        "shadowing": list(_shadowing(prefix, environ)),
        "prefix": _prefix(prefix),
        "cache": _cache(prefix, environ),
        "runtime": list(_runtime(prefix, manifest, environ)),
        "nvcc": _nvcc(prefix, environ),
    }
    return facts | _settings(prefix, manifest, environ)


def restored() -> dict[str, str]:
    """The environment as the caller had it; this process's own loses what the launcher did to it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(_WAS) and name not in KEPT}
    for name in KEPT:
        os.environ.pop(name, None)
        was = os.environ.pop(_WAS + name, None)
        if was is not None:
            environ[name] = was
    return environ


def _text(path: str, most: int = 1 << 16) -> str:
    try:
        with open(path, "rb") as stream:
            return stream.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _in_container(environ: Mapping[str, str]) -> bool:
    told = any(environ.get(name) for name in ("container", "KUBERNETES_SERVICE_HOST"))
    return told or os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")


# --- the bundle -------------------------------------------------------------------------------------------------------


def _bundle(prefix: str, manifest: Mapping[str, Any]) -> Facts:
    """What it was built for; of the small files that its programs read, as they are what counts when it starts."""
    try:
        target = json.loads(_text(f"{prefix}/share/compose/target.json"))
    except ValueError:
        target = {}
    try:
        needs = floors.parse(_text(f"{prefix}/share/compose/floors"))
    except ValueError:
        needs = {}
    if not needs:
        needs = {name: (one["version"], one["because"]) for name, one in (manifest.get("floors") or {}).items()}
    return {"name": target.get("name") or os.path.basename(prefix), "machine": target.get("machine"),
            "sm": target.get("sm") or [], "ptx": bool(target.get("ptx")), "isa": target.get("isa"),
            "cuda": target.get("cuda"), "floors": needs}  # fmt: skip


def _prefix(prefix: str) -> Facts:
    found = os.stat(prefix)
    inside = [prefix, *(os.path.join(prefix, name) for name in ("bin", "lib"))]
    return {"path": prefix, "owner": found.st_uid, "writable": os.access(prefix, os.W_OK),
            "noexec": _mounted_noexec(prefix),
            "open": [path for path in inside if os.path.isdir(path) and os.stat(path).st_mode & 0o002
                     and not os.stat(path).st_mode & stat.S_ISVTX]}  # fmt: skip


def _mounted_noexec(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_NOEXEC)


def _runtime(prefix: str, manifest: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[Facts]:
    """Every row of the manifest's `runtime` that is about a compiler, and what this host lacks for it."""
    target = manifest.get("target") or {}
    site = f"{prefix}/lib/python{target.get('python')}/site-packages"
    words = str(target.get("sm", "")).split()
    sms: list[int | None] = [*(int(word) for word in words if word.isdigit())] or [None]
    stack = {layer["name"] for layer in manifest.get("layers") or ()}
    for row in manifest.get("runtime") or ():
        meant = any((not row.get("sm") or sm in row["sm"]) and sm not in (row.get("sm-not") or ()) for sm in sms)
        if row["of"] in stack and meant and not _made_ahead(manifest, row.get("unless") or ()):
            needs = [name for name in row["needs"] if name != "network"]
            lacking = [name for name in needs if not _is_there(name, site, prefix, environ)]
            yield {"what": row["what"], "lacking": lacking, "asked_by": row.get("asked-by"),
                   "instead": row.get("instead")}  # fmt: skip


def _made_ahead(manifest: Mapping[str, Any], patterns: Sequence[str]) -> bool:
    """Whether the bundle holds a file that one of the globs means; `**` is any number of folders."""
    matchers = [re.compile(fnmatch.translate("*/site-packages/" + one.replace("**/", "*"))) for one in patterns]
    paths = (entry["path"] for layer in manifest["layers"] for entry in layer["entries"]) if matchers else ()
    return any(one.match(path) for path in paths for one in matchers)


def _is_there(name: str, site: str, prefix: str, environ: Mapping[str, str]) -> bool:
    return os.path.exists(os.path.join(site, name)) if "/" in name else bool(_which(name, prefix, environ))


def _which(name: str, prefix: str, environ: Mapping[str, str]) -> str | None:
    """A program as the server finds it: nvcc only in the toolkit, others in the bundle, on PATH, or there."""
    toolkit = environment.toolkit(prefix, dict(environ))
    last = f"{toolkit}/bin" if toolkit else ""
    folders = [last] if name == "nvcc" else [f"{prefix}/bin", environ.get("PATH", ""), last]
    return shutil.which(name, path=":".join(filter(None, folders)))


def _nvcc(prefix: str, environ: Mapping[str, str]) -> Facts:
    path = _which("nvcc", prefix, environ)
    if not path:
        return {"path": None, "version": None}
    try:
        told = subprocess.run([path, "--version"], capture_output=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        told = b""
    found = re.search(rb"release (\d+\.\d+)", told)
    return {"path": path, "version": found[1].decode() if found else None}


# --- the host and its settings ----------------------------------------------------------------------------------------


def _hard_limits() -> Facts:
    def hard(kind: int) -> int | None:
        limit = resource.getrlimit(kind)[1]
        return None if limit == resource.RLIM_INFINITY else limit

    return {"nofile": hard(resource.RLIMIT_NOFILE), "stack_bytes": hard(resource.RLIMIT_STACK),
            "nproc": hard(resource.RLIMIT_NPROC), "address_bytes": hard(resource.RLIMIT_AS)}  # fmt: skip


def _clock(manifest: Mapping[str, Any]) -> Facts:
    """The earliest time that it can be: that of the recipe's indexes, or of the interpreter that runs this."""
    found = [(0.0, "nothing")]
    for text, form, because in (
        (manifest.get("as_of") or "", "%Y-%m-%dT%H:%M:%SZ", "the bundle"),
        (platform.python_build()[1], "%b %d %Y %H:%M:%S", "the Python that runs this"),
    ):
        try:
            found.append((time.mktime(time.strptime(text, form)), because))
        except (ValueError, OverflowError):
            continue
    earliest, because = max(found)
    return {"now": time.time(), "earliest": earliest - 86400, "because": because}


def _port(asked: int | None, environ: Mapping[str, str]) -> Facts:
    told = environ.get("SGLANG_PORT", "")
    number = asked if asked is not None else int(told) if told.isdecimal() and 0 < int(told) < 65536 else _PORT
    owner = ports.owner(number, environ.get("SGLANG_HOST") or "0.0.0.0")  # noqa: S104  # what the server listens at
    low, high = (*_text("/proc/sys/net/ipv4/ip_local_port_range").split(), "", "")[:2]
    first = _text("/proc/sys/net/ipv4/ip_unprivileged_port_start").strip()
    return {"number": number, "asked": asked is not None, "owner": _told(owner) if owner else None,
            "unprivileged_from": int(first) if first.isdecimal() else 1024,
            "ephemeral": (int(low), int(high)) if low and high else (65536, 65536)}  # fmt: skip


def _told(owner: ports.Owner) -> str:
    pid = f"process {owner.pid}, " if owner.pid else ""
    return f"{owner.command or 'something'} ({pid}{owner.user})"


def _shadowing(prefix: str, environ: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Folders of LD_LIBRARY_PATH with libraries of the stack, outside of the bundle."""
    for folder in dict.fromkeys(filter(None, environ.get("LD_LIBRARY_PATH", "").split(":"))):
        if not os.path.realpath(folder).startswith(os.path.realpath(prefix) + "/"):
            names = [name for name in _names(folder) if _STACK.match(name)]
            if names:
                yield folder, names[:5]


def _settings(prefix: str, manifest: Mapping[str, Any], environ: Mapping[str, str]) -> Facts:
    """`unread`: the user's variables that no source of the stack names; `read_names`: those that are."""
    asked = {name for name, value in environ.items() if name.startswith("SGLANG_") and not _is_ours(value, environ)}
    if not asked:
        return {"unread": [], "read_names": []}
    entries = (entry["path"] for layer in manifest.get("layers") or () for entry in layer["entries"])
    paths = [path for path in entries if path.endswith(".py") and _READS_SETTINGS.search(path)]
    known: set[str] = set()
    for path in paths:
        known.update(name.decode() for name in _NAME.findall(_bytes(os.path.join(prefix, path))))
    return {"unread": sorted(asked - known) if known else [], "read_names": sorted(known)}


def _is_ours(value: str, environ: Mapping[str, str]) -> bool:
    """Whether the bundle's etc/env, which has prepared this process, gave `value`: a folder of the bundle's."""
    folders = filter(None, (environ.get("COMPOSE_CACHE"), environ.get("COMPOSE_PREFIX")))
    return any(f"{value}/".startswith(f"{folder}/") for folder in folders)


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError:
        return b""


# --- the cache folder -------------------------------------------------------------------------------------------------


def _cache(prefix: str, environ: Mapping[str, str]) -> Facts:
    folder = environment.cache_folder(prefix)
    facts: Facts = {
        "folder": folder,
        "root": os.path.dirname(folder),
        "asked": environ.get("WHEEL_COMPOSER_CACHE"),
        "stale": [],
        "foreign": None,
    }
    if not folder:
        return facts
    room = os.statvfs(folder)
    # File systems without a table of inodes say that there are none.
    files = room.f_favail if room.f_files else None
    return facts | {"free_bytes": room.f_bavail * room.f_frsize, "free_files": files, "noexec": _mounted_noexec(folder),
                    "filesystem": filesystem(folder, _text("/proc/self/mountinfo", 1 << 20)),
                    "foreign": _foreign(folder), "stale": list(_others(folder))}  # fmt: skip


def filesystem(path: str, mountinfo: str) -> str | None:
    """The type of the file system that holds `path`, from the text of /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    real, best, kind = os.path.realpath(path) + "/", "", None
    for line in mountinfo.splitlines():
        head, _, tail = line.partition(" - ")
        words = head.split()
        if len(words) > 4 and tail:
            # The kernel writes a space in a name as \040.
            point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), words[4]).rstrip("/") + "/"
            if real.startswith(point) and len(point) >= len(best):
                best, kind = point, tail.split()[0]
    return kind


def _foreign(folder: str) -> str | None:
    """Something in there that another user made, as root who tried the server out."""
    if os.getuid() == 0:
        return None
    places = [folder, *(os.path.join(folder, name) for name in _names(folder))]
    return next((path for path in places if os.lstat(path).st_uid != os.getuid()), None)


def _others(folder: str) -> Iterator[tuple[str, int]]:
    """Caches of other bundles beside this one, and their bytes."""
    parent, own = os.path.split(folder)
    for name in _names(parent):
        path = os.path.join(parent, name)
        if name != own and re.fullmatch(r"[0-9a-f]{16}|unknown", name) and os.path.isdir(path):
            yield name, sum(_sizes(path))


def _sizes(folder: str) -> Iterable[int]:
    count = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            count += 1
            if count > _MOST_FILES:
                return
            try:
                yield os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue

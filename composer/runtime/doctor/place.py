"""Judge where a bundle lies, where it writes, and what it would compile there. Facts in, findings out.

`facts` is what `detect` says of the host, and what `facts.read` adds to it.
"""

from collections.abc import Iterator
from typing import Any

from ..finding import Finding, error, finding, note, warning
from ..host.detect import size

Facts = dict[str, Any]

#: Kernels that a stack compiles take some hundred MiB; below the second not even one model's.
_ROOM, _LEAST_ROOM = 2 << 30, 128 << 20
_LEAST_FILES = 1000
#: Less of other bundles' is not worth a word.
_STALE = 64 << 20
_NETWORKED = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p")


def judge(facts: Facts) -> Iterator[Finding]:
    """The prefix, the cache folder, then what is compiled at first use."""
    for one in (_prefix, _cache, _stale, _compiled):
        yield from one(facts)


def _prefix(facts: Facts) -> Iterator[Finding]:
    prefix = facts["prefix"]
    if prefix["noexec"]:
        yield error(
            "prefix.noexec",
            prefix["path"],
            "mounted noexec: neither programs nor libraries load",
            "Mount it without noexec, or move the bundle.",
        )
    for path in prefix["open"]:
        yield warning("prefix.open", path, "any user may change what is run", f"chmod -R o-w {prefix['path']}")
    if prefix["owner"] not in (0, facts["uid"]):
        yield note(
            "prefix.owner",
            prefix["path"],
            f"belongs to user {prefix['owner']}, who may change it; this is user {facts['uid']}",
        )
    if not prefix["writable"]:
        yield note("prefix.read-only", prefix["path"], "cannot be written here; only adding models would")


def _cache(facts: Facts) -> Iterator[Finding]:
    cache = facts["cache"]
    if not cache["folder"]:
        yield error(
            "cache.unwritable",
            cache["asked"] or "~/.cache/compose",
            "no folder for compiled kernels can be written: neither this one nor one below TMPDIR",
            "Set WHEEL_COMPOSER_CACHE to a folder that this user may write.",
        )
        return
    if cache["foreign"]:
        fix = f"chown -R {facts['uid']} {cache['folder']} (as root), or set WHEEL_COMPOSER_CACHE."
        yield error("cache.foreign", cache["foreign"], f"belongs to another user, not to {facts['uid']}", fix)
    yield from _room(cache)
    yield from _file_system(cache)


def _room(cache: dict[str, Any]) -> Iterator[Finding]:
    free, files = cache["free_bytes"], cache["free_files"]
    fix = "Free some space, or set WHEEL_COMPOSER_CACHE to a folder elsewhere."
    if free < _ROOM:
        severity = "error" if free < _LEAST_ROOM else "warning"
        yield finding(severity, "cache.room", cache["folder"], f"{size(free)} are free for compiled kernels", fix)
    if files is not None and files < _LEAST_FILES:
        yield error("cache.inodes", cache["folder"], f"{files} more files can be made there", fix)


def _file_system(cache: dict[str, Any]) -> Iterator[Finding]:
    fix = "Set WHEEL_COMPOSER_CACHE to a folder of this host's own, on a file system that is not noexec."
    if cache["noexec"]:
        yield warning("cache.noexec", cache["folder"], "mounted noexec: what is compiled there cannot be loaded", fix)
    if cache["filesystem"] in _NETWORKED:
        evidence = f"lies on {cache['filesystem']}: slow starts, and locks that several hosts share"
        yield warning("cache.network", cache["folder"], evidence, fix)


def _stale(facts: Facts) -> Iterator[Finding]:
    stale = sorted(facts["cache"]["stale"], key=lambda one: -one[1])
    total = sum(count for _, count in stale)
    if total < _STALE:
        return
    yield note(
        "cache.stale",
        facts["cache"]["root"],
        f"{size(total)} of {len(stale)} other bundles' kernels; the most, {size(stale[0][1])}, in {stale[0][0]}",
        "Delete the folders of bundles that are gone.",
    )


def _compiled(facts: Facts) -> Iterator[Finding]:
    """What would be made at first use and cannot be: the build has seen to it that plain serving goes on without."""
    for row in facts["runtime"]:
        if not row["lacking"]:
            continue
        kept = f"only for {row['asked_by']}" if row["asked_by"] else f"{row['instead'] or 'nothing'} serves without"
        severity = "note" if row["asked_by"] or row["instead"] else "warning"
        yield finding(
            severity,
            "jit.absent",
            row["what"],
            f"made at first use with {', '.join(row['lacking'])}, which this host does not have; {kept}",
            f"Install {' and '.join(row['lacking'])}, if you want it.",
        )
    nvcc, cuda = facts["nvcc"], facts["bundle"]["cuda"]
    if nvcc["version"] and cuda and nvcc["version"].split(".")[0] != cuda.split(".")[0]:
        yield warning(
            "jit.cuda",
            nvcc["path"],
            f"compiles for CUDA {nvcc['version']}, the bundle is of {cuda}: what it compiles cannot be loaded",
            f"Set CUDA_HOME to a toolkit of CUDA {cuda}, or to nothing to compile nothing.",
        )

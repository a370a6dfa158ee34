"""Judge a host and its settings for a bundle. Facts in, findings out: nothing here reads anything.

`facts` is what `detect` says of the host, and what `facts.read` adds to it.
"""

import difflib
import ipaddress
import re
import time
from collections.abc import Iterator
from typing import Any

from .. import floors
from ..finding import Finding, error, finding, note, warning
from ..host.detect import size
from ..serve import options

Facts = dict[str, Any]

_FLOOR_IDS = {"libstdc++ GLIBCXX": "libstdcxx"}
#: What SGLang raises its soft limit to when it starts, if the hard one allows it (srt/utils/common.py, set_ulimit).
_FILES = 65535
_STACK = 8 << 20
_PROCESSES = 4096
_LOCKED = 64 << 20
#: NCCL and Python's multiprocessing share memory there; containers have 64 MB unless told otherwise.
_SHM = "/dev/shm"  # noqa: S108
_SHARED, _SHARED_FREE = 1 << 30, 64 << 20
_MEMORY = 4 << 30
#: What `requests` asks for the proxy of an http: URL, in its order.
_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
#: What Kubernetes sets for a Service that is called sglang or sgl-...; nobody means it as a setting.
_SERVICE_LINK = re.compile(r"SGLANG\w*_(?:SERVICE_(?:HOST|PORT\w*)|PORT_\d+_(?:TCP|UDP)\w*)|SGLANG\w*_PORT")
_YEAR = 365.25 * 86400
#: Certificates of public hubs are younger than that, so a clock that is this far ahead takes them for expired.
_MOST_YEARS = 15
#: Values of NVIDIA_VISIBLE_DEVICES with which NVIDIA's container toolkit gives no GPU.
_HIDES_ALL = ("", "void", "none")


def judge(facts: Facts) -> Iterator[Finding]:
    """Everything but GPUs and the bundle's own files."""
    for one in (_machine, _floors, _cpu, _limits, _shared_memory, _memory, _tuning, _clock, _port, _environment,
                _python_environment, _proxy, _variables, _unread):  # fmt: skip
        yield from one(facts)


def _machine(facts: Facts) -> Iterator[Finding]:
    wanted = facts["bundle"]["machine"]
    if wanted and wanted != facts["machine"]:
        yield error(
            "host.machine",
            facts["machine"],
            f"the bundle holds code for {wanted}",
            f"Use a bundle for {facts['machine']}.",
        )
    if facts["glibc"] is None:
        yield error(
            "host.libc",
            "C library",
            "this host's C library is not glibc",
            "Use a host, or a container image, with glibc.",
        )


def _floors(facts: Facts) -> Iterator[Finding]:
    for name, what, because, fix in floors.unmet(facts["bundle"]["floors"], facts["has"]):
        yield error(
            f"floors.{_FLOOR_IDS.get(name, name.lower())}", because, f"the bundle {what}", f"{fix[0].upper()}{fix[1:]}."
        )


def _cpu(facts: Facts) -> Iterator[Finding]:
    """Libraries that choose their code when they run need less than the target says; the floor says what all need."""
    isa, runs = facts["bundle"]["isa"], facts["cpu"]["isa"]
    if isa and runs and isa not in runs and "CPU" not in facts["bundle"]["floors"]:
        yield note(
            "host.isa",
            facts["cpu"]["model"] or "CPU",
            f"the bundle's target is {isa}, this CPU runs {', '.join(runs)}: slower code will be chosen",
        )


def _limits(facts: Facts) -> Iterator[Finding]:
    hard = facts["hard_limits"]
    if hard["nofile"] is not None and hard["nofile"] < _FILES:
        yield warning(
            "limits.nofile",
            "open files (RLIMIT_NOFILE)",
            f"at most {hard['nofile']} are allowed; SGLang raises its limit to {_FILES} and cannot",
            "LimitNOFILE=65536 in the unit, ulimits of the container, or limits.conf(5).",
        )
    if hard["stack_bytes"] is not None and hard["stack_bytes"] < _STACK:
        yield warning(
            "limits.stack",
            "stack (RLIMIT_STACK)",
            f"at most {size(hard['stack_bytes'])}",
            "LimitSTACK=64M in the unit, ulimits of the container, or limits.conf(5).",
        )
    if hard["nproc"] is not None and hard["nproc"] < _PROCESSES and facts["uid"] != 0:
        yield warning(
            "limits.nproc",
            "processes and threads (RLIMIT_NPROC)",
            f"at most {hard['nproc']} for this user; a server has a thread or more for each core and GPU",
            "LimitNPROC=infinity in the unit, ulimits of the container, or limits.conf(5).",
        )
    if hard["address_bytes"] is not None:
        yield warning(
            "limits.as",
            "address space (RLIMIT_AS)",
            f"at most {size(hard['address_bytes'])}; CUDA reserves more than GPUs and host have, and uses little",
            "ulimit -v unlimited; in a batch system, ask for memory without a limit of virtual memory.",
        )
    yield from _locked(facts)


def _locked(facts: Facts) -> Iterator[Finding]:
    locked = facts["limits"]["memlock_bytes"]
    if locked is not None and locked < _LOCKED:
        severity = "warning" if facts["rdma"] else "note"
        why = "RDMA, which this host has, locks its buffers" if facts["rdma"] else "only RDMA locks more"
        yield finding(
            severity,
            "limits.memlock",
            "locked memory (RLIMIT_MEMLOCK)",
            f"at most {size(locked)}; {why}",
            "LimitMEMLOCK=infinity in the unit, ulimits of the container, or limits.conf(5).",
        )


def _shared_memory(facts: Facts) -> Iterator[Finding]:
    shm = facts["shm"]
    if shm is None:
        yield error(
            "shm.absent",
            _SHM,
            "not there; processes of the server share memory through it",
            "mount -t tmpfs -o size=8g tmpfs /dev/shm (as root).",
        )
        return
    several = len(facts["visible"]) > 1
    if shm["size_bytes"] < _SHARED:
        yield finding(
            "error" if several else "warning",
            "shm.size",
            _SHM,
            f"{size(shm['size_bytes'])} in all; "
            + ("NCCL shares buffers between GPUs there" if several else "enough for one GPU, not for more"),
            "--shm-size 8g or --ipc host (Docker), an emptyDir of medium Memory (Kubernetes), or "
            "mount -o remount,size=8g /dev/shm (as root).",
        )
    elif shm["free_bytes"] < _SHARED_FREE:
        yield warning(
            "shm.full",
            _SHM,
            f"{size(shm['free_bytes'])} of {size(shm['size_bytes'])} are free",
            "Delete what ended processes have left there: nccl-*, torch_*, psm_*.",
        )


def _memory(facts: Facts) -> Iterator[Finding]:
    free = facts["memory"]["available_bytes"]
    if free is not None and free < _MEMORY:
        yield warning(
            "host.memory",
            "memory",
            f"{size(free)} are available; PyTorch and SGLang take 4 GiB before a model is loaded",
            "End other programs, or use a larger host.",
        )


def _tuning(facts: Facts) -> Iterator[Finding]:
    if facts["overcommit"] == "2":
        yield warning(
            "host.overcommit",
            "vm.overcommit_memory",
            "2: memory that is reserved counts as used, and CUDA reserves much more than it uses",
            "sysctl vm.overcommit_memory=0 (as root).",
        )
    if facts["hugepages"]["transparent"] == "never":
        yield note(
            "host.hugepages",
            "transparent huge pages",
            "never: copies to the GPU take more time",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root).",
        )
    if (facts["numa_nodes"] or 1) > 1 and facts["numa_balancing"]:
        yield note(
            "host.numa-balancing",
            "kernel.numa_balancing",
            f"pages are moved between {facts['numa_nodes']} nodes as programs run, which stalls them",
            "sysctl kernel.numa_balancing=0 (as root), and --numa-node to bind the server.",
        )


def _clock(facts: Facts) -> Iterator[Finding]:
    clock = facts["clock"]
    fix = "Set the clock, and keep it: timedatectl set-ntp true, or chrony."
    now = time.strftime("%Y-%m-%d", time.gmtime(clock["now"]))
    if clock["now"] < clock["earliest"]:
        yield error(
            "clock.behind", now, f"{clock['because']} is younger; TLS takes certificates for not yet valid", fix
        )
    elif clock["now"] > clock["earliest"] + _MOST_YEARS * _YEAR:
        yield error(
            "clock.ahead",
            now,
            f"{clock['because']} is {_MOST_YEARS} years older; TLS takes certificates for expired",
            fix,
        )


def _port(facts: Facts) -> Iterator[Finding]:
    port = facts["port"]
    number = port["number"]
    if port["owner"]:
        yield finding(
            "error" if port["asked"] else "warning",
            "port.busy",
            f"port {number}",
            f"{port['owner']} listens there",
            "Stop it, or serve on another: SGLANG_PORT or --port.",
        )
    if number < port["unprivileged_from"] and facts["uid"] != 0:
        yield error(
            "port.privileged",
            f"port {number}",
            f"user {facts['uid']} may not listen below {port['unprivileged_from']}",
            "Serve on a higher one: SGLANG_PORT or --port.",
        )
    low, high = port["ephemeral"]
    if low <= number <= high:
        yield note(
            "port.ephemeral",
            f"port {number}",
            f"the kernel hands out {low} to {high} to outgoing connections, so it may be taken when the server starts",
            f"sysctl net.ipv4.ip_local_reserved_ports={number} (as root), or another port.",
        )


def _environment(facts: Facts) -> Iterator[Finding]:
    environ = facts["environ"]
    for folder, names in facts["shadowing"]:
        yield warning(
            "env.library-path",
            "LD_LIBRARY_PATH",
            f"{folder} holds other copies of what the bundle has: {', '.join(names)}",
            "Unset it, or leave that folder out.",
        )
    if environ.get("LD_PRELOAD"):
        yield warning(
            "env.preload",
            "LD_PRELOAD",
            f"{environ['LD_PRELOAD']} is loaded into every process",
            "Unset it, unless it is meant.",
        )
    if environ.get("NVIDIA_VISIBLE_DEVICES") in _HIDES_ALL and facts["container"]:
        yield warning(
            "env.nvidia-visible-devices",
            "NVIDIA_VISIBLE_DEVICES",
            f"is {environ['NVIDIA_VISIBLE_DEVICES']!r}: the container is given no GPU",
            "Start it with NVIDIA_VISIBLE_DEVICES=all.",
        )
    for name in ("WHEEL_COMPOSER_HOST_CHECK", "WHEEL_COMPOSER_GPU_CHECK"):
        if environ.get(name) == "off":
            yield warning("env.check-off", name, "the bundle starts on hosts that cannot run it", f"Unset {name}.")


def _python_environment(facts: Facts) -> Iterator[Finding]:
    environ = facts["environ"]
    if environ.get("PYTHONHOME"):
        yield warning(
            "env.pythonhome",
            "PYTHONHOME",
            f"{environ['PYTHONHOME']}: bin/python3 does not start with it; other programs of bin/ unset it",
            "Unset PYTHONHOME.",
        )
    if environ.get("PYTHONPATH"):
        yield note("env.pythonpath", "PYTHONPATH", f"{environ['PYTHONPATH']} is left out by the bundle's programs")


def _proxy(facts: Facts) -> Iterator[Finding]:
    """SGLang greets itself when it starts, through the proxy if there is one, and ends if it gets no answer."""
    environ = facts["environ"]
    proxy = next((name for name in _PROXIES if environ.get(name)), None)
    host = environ.get("SGLANG_HOST") or "0.0.0.0"  # noqa: S104  # what bin/sglang-serve listens at
    direct = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if proxy and not any(_is_meant(host, one.strip()) for one in direct.split(",")):
        yield warning(
            "env.proxy",
            proxy,
            f"the server greets itself at {host} when it starts, by way of {environ[proxy]}, and ends if that fails",
            f"Add {host} to no_proxy.",
        )


def _is_meant(host: str, entry: str) -> bool:
    """Whether an entry of no_proxy is about a host, as `requests` reads it."""
    if entry in ("*", host):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry)
    except ValueError:
        return bool(entry) and host.endswith(entry)


def _variables(facts: Facts) -> Iterator[Finding]:
    """What bin/sglang-serve would object to."""
    yield from options.from_variables(facts["environ"])[1]


def _unread(facts: Facts) -> Iterator[Finding]:
    known = facts["read_names"]
    for name in sorted(one for one in facts["unread"] if not _SERVICE_LINK.fullmatch(one)):
        similar = difflib.get_close_matches(name, known, 1, 0.85)
        yield warning(
            "env.unread",
            name,
            "nothing in the bundle reads it",
            f"Did you mean {similar[0]}?" if similar else "Unset it: this release has no such setting.",
        )

"""Prove that the modules of a tree can be imported: by its own interpreter, without a network, without a GPU.

A library that needs the NVIDIA driver cannot even be loaded where there is none. A stub takes its place, in which every
function answers CUDA_ERROR_NO_DEVICE; with it all of torch, sgl_kernel and the SGLang server can be imported.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from composer._fs import host_errors
from composer._proc import run
from composer.errors import ElfError, HostError, VerifyError
from composer.formats.elf import is_elf, read_elf
from composer.formats.stublib import Machine, render_stub
from composer.formats.symbols import undefined_symbols
from composer.model.finding import Finding
from composer.model.manifest import Check
from composer.proofs import _cut_network, _import_worker

DRIVER: Final = "libcuda.so.1"
#: CUDA_ERROR_NO_DEVICE of the driver API; also cudaErrorNoDevice of the runtime API.
_NO_DEVICE: Final = 100
_MACHINES: Final[Mapping[str, Machine]] = {"x86_64": "x86_64", "aarch64": "aarch64"}
# What the CUDA runtime, Triton and cuda-bindings ask dlsym for, so that no symbol table mentions it.
_LOOKED_UP: Final = frozenset(
    {
        "cuCtxGetCurrent", "cuCtxGetDevice", "cuCtxSetCurrent", "cuDeviceGet", "cuDeviceGetAttribute",
        "cuDeviceGetCount", "cuDeviceGetName", "cuDeviceGetUuid", "cuDevicePrimaryCtxGetState",
        "cuDevicePrimaryCtxRetain", "cuDriverGetVersion", "cuGetErrorName", "cuGetErrorString", "cuGetExportTable",
        "cuGetProcAddress", "cuGetProcAddress_v2", "cuInit", "cuModuleGetLoadingMode",
    }
)  # fmt: skip
# cudaMalloc, cublasCreate and cuFileOpen belong to other libraries, whose own definitions a stub must not precede.
_DRIVER_FUNCTION: Final = re.compile(r"cu(?!File)[A-Z]\w*\Z", re.ASCII)

# What a traceback says, and what to do about it; the first that matches.
_REMEDIES: Final = (
    (re.compile(r"(libcuda\.so\.1): cannot open shared object file"), "Say in the recipe that it needs the driver."),
    (
        re.compile(r"(\S+\.so[.\w]*): cannot open shared object file"),
        "Add {} to the bundle, or an RPATH to its folder.",
    ),
    (re.compile(r"No module named '([^']+)'"), "Add the distribution that has {}, or keep what was pruned of it."),
    (
        re.compile(r"(Network is unreachable|name resolution|Name or service not known|Connection refused)"),
        "Patch it: a module must not use the network when it is imported.",
    ),
)
# faulthandler's stacks begin with the innermost frame; the thread at fault is `Current`, after a time-out the last one.
_STACK: Final = re.compile(r"^(Current thread|Thread)[^\n]*:\n(  File [^\n]+)", re.MULTILINE)
_LATE: Final = re.compile(r"^Timeout \(", re.MULTILINE)
_EVIDENCE_LINES, _EVIDENCE_LENGTH = 3, 600
_MOST_PROGRAM: Final = 120
#: Programs that make code, by the last part of their paths; what else a module runs is only mentioned.
_COMPILER: Final = re.compile(
    r"(?:.*[-/])?(?:cc|c\+\+|gcc|g\+\+|clang|clang\+\+|nvcc|ptxas|ninja|cmake|make|ld|hipcc)(?:-[\d.]+)?\Z"
)
_START_SECONDS: Final = 30.0


def driver_functions(symbols: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """The functions that a stub of the driver must define, sorted.

    They are the driver's own among `symbols`, the undefined symbols of each object that needs libcuda.so.1, and those
    that are looked up by name at run time.
    """
    wanted = {name for names in symbols for name in names if _DRIVER_FUNCTION.match(name)}
    return tuple(sorted(wanted | _LOOKED_UP))


def check_imports(
    prefix: Path, checks: Sequence[Check], *, host: Path | None = None, timeout: float = 300.0, jobs: int = 1,
    moved: bool = False, stop: threading.Event | None = None,
) -> tuple[Finding, ...]:  # fmt: skip
    """Import each module with `prefix`/bin/python3; one error for each that fails, in the order of `checks`.

    Modules that need the driver are imported, in order, by one process, the others by another (`jobs` says whether at
    the same time), because each would load torch again. A module that ends its process (a crash, an exit, more than
    `timeout` seconds) is named, and the next process goes on after it. The environment is empty but for a temporary
    home, the prefix's own bin on PATH (no compiler of this machine is) and the stub on LD_LIBRARY_PATH. Where the
    kernel refuses to cut the network, a note says so. What a module tries to run, or to reach, is found even if it gets
    over the failure. host: the CPython that a bundle without its own is to use. Raises HostError when the temporary
    folder cannot be written.

    moved: import all again after the tree was renamed, for this time, to a name with a space; its owner alone may ask
    for that. stop: another thread sets it to end all processes; what is found then is worth nothing.
    """
    prefix = prefix.absolute()
    order = {check.module: place for place, check in enumerate(checks)}
    with _scratch() as scratch:
        stub = _write_stub(prefix, scratch) if any(check.needs_driver for check in checks) else None
        world = _World(checks=checks, host=host, timeout=timeout, jobs=jobs, stub=stub, stop=stop or threading.Event())
        found = world.imports(prefix, scratch / "here")
        if moved and checks:
            with _elsewhere(prefix) as place:
                again = world.imports(place, scratch / "moved")
            known = {one.subject for one in found if one.severity == "error"}
            found += [_when_moved(one) for one in again if one.severity == "error" and one.subject not in known]
    return tuple(sorted(found, key=lambda finding: order.get(finding.subject, -1)))


@contextlib.contextmanager
def _elsewhere(prefix: Path) -> Iterator[Path]:
    """The tree under another name beside its own, to which it returns."""
    with host_errors(prefix):
        place = Path(tempfile.mkdtemp(prefix=f"{prefix.name} moved ", dir=prefix.parent))
        try:
            prefix.rename(place)
        except OSError:
            place.rmdir()
            raise
    try:
        yield place
    finally:
        with host_errors(prefix):
            place.rename(prefix)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with host_errors(Path(tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(prefix="compose-imports-", ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def _write_stub(prefix: Path, scratch: Path) -> Path:
    """A folder with a libcuda.so.1 that has what this tree asks of it."""
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        where = platform.machine()
        raise HostError("no stub of the driver for this machine", where=where, fix="Verify on x86_64 or aarch64.")
    folder = scratch / "stub"
    stub = render_stub(DRIVER, driver_functions(_driver_symbols(prefix)), _NO_DEVICE, machine)
    with host_errors(folder):
        folder.mkdir()
        (folder / DRIVER).write_bytes(stub)
    return folder


def _driver_symbols(prefix: Path) -> Iterator[frozenset[str]]:
    for folder, _, names in os.walk(prefix):
        for path in (Path(folder, name) for name in names if ".so" in name):
            if path.is_file() and not path.is_symlink():
                yield _symbols_if_driver(path)


def _symbols_if_driver(path: Path) -> frozenset[str]:
    """The undefined symbols of an object that needs the driver. Other proofs judge damaged ones."""
    with host_errors(path), path.open("rb") as handle:
        if not is_elf(handle.read(4)):
            return frozenset()
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view, contextlib.suppress(ElfError):
            if DRIVER in read_elf(view, str(path)).needed:
                return undefined_symbols(view, str(path))
    return frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    """What is the same wherever the tree is. stub: the folder of the stub, if one is needed."""

    checks: Sequence[Check]
    host: Path | None
    timeout: float
    jobs: int
    stub: Path | None
    stop: threading.Event

    def imports(self, prefix: Path, home: Path) -> list[Finding]:
        """Import all; nothing is said twice."""
        with host_errors(home):
            home.mkdir()
        groups = [[one.module for one in self.checks if one.needs_driver is driver] for driver in (False, True)]
        children = [
            _Child(
                prefix=prefix,
                home=home / name,
                timeout=self.timeout,
                libraries=libraries,
                host=self.host,
                stop=self.stop,
            )
            for name, libraries in (("bare", None), ("driver", self.stub))
        ]
        with ThreadPoolExecutor(max(1, self.jobs)) as pool:
            try:
                answers = pool.map(_import_all, children, groups)
                return list(dict.fromkeys(finding for answer in answers for finding in answer))
            except BaseException:
                # The pool waits for its threads, which wait for their processes.
                self.stop.set()
                raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Child:
    """How one group's processes are started. libraries: the stub's folder, if any; host: as in `check_imports`."""

    prefix: Path
    home: Path
    timeout: float
    libraries: Path | None
    host: Path | None
    stop: threading.Event

    def environ(self) -> dict[str, str]:
        home = str(self.home)
        environ = {
            "HOME": home, "TMPDIR": home, "WHEEL_COMPOSER_CACHE": home, "PATH": str(self.prefix / "bin"),
            "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "WHEEL_COMPOSER_GPU_CHECK": "off",
            "CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": "",
        }  # fmt: skip
        environ |= {"LD_LIBRARY_PATH": str(self.libraries)} if self.libraries else {}
        return environ | ({"WHEEL_COMPOSER_PYTHON": str(self.host), "PYTHONSAFEPATH": "1"} if self.host else {})

    def start(self, modules: Sequence[str]) -> _Outcome:
        """Run one process to its end, whatever that is."""
        report, log = self.home / "report", self.home / "log"
        with host_errors(self.home):
            self.home.mkdir(exist_ok=True)
            report.write_bytes(b"")
            log.write_bytes(b"")
        ending = ""
        # With -I, a host's CPython that was moved after it was built would not start; the environment is ours anyway.
        alone = "-s" if self.host else "-I"
        argv: list[str | Path] = [
            sys.executable, "-I", "-S", _cut_network.__file__, report, log,
            self.prefix / "bin" / "python3", alone, "-B", "-X", "faulthandler", _import_worker.__file__, report,
        ]  # fmt: skip
        request = msgspec.json.encode([self.timeout, modules])
        # The worker keeps the time of each module; this is the time after which not even that works.
        most = self.timeout * len(modules) + _START_SECONDS
        try:
            run(argv, env=self.environ(), stdin=request, timeout=most, cwd=self.home, error=VerifyError, stop=self.stop)
        except VerifyError as fault:
            ending = fault.what
        with host_errors(self.home):
            text = log.read_text(encoding="utf-8", errors="replace")
            return _Outcome(report=_lines(report.read_bytes()), log=text, ending=ending)


def _import_all(child: _Child, modules: Sequence[str]) -> list[Finding]:
    found: list[Finding] = []
    while modules and not child.stop.is_set():
        outcome = child.start(modules)
        found += outcome.findings()
        if not outcome.begun:
            break
        modules = modules[len(outcome.begun) :]
    return found


def _lines(report: bytes) -> list[list[str]]:
    """The report's lines but for one that was being written when the process ended."""
    whole = report[: report.rfind(b"\n") + 1]
    return [msgspec.json.decode(line, type=list[str]) for line in whole.splitlines()]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What one process left behind. ending: how it ended, if not well."""

    report: list[list[str]]
    log: str
    ending: str

    @property
    def begun(self) -> list[str]:
        return [module for event, module, *_ in self.report if event == "begin"]

    def findings(self) -> Iterator[Finding]:
        ended: set[str] = set()
        for event, subject, *rest in self.report:
            if event == "network" and subject:
                yield _network_open(subject)
            elif event == "end":
                ended.add(subject)
                if rest[0]:
                    yield _not_imported(subject, rest[0])
            elif event == "program":
                yield _runs(subject, rest[0])
            elif event == "reach":
                yield _reaches(subject, rest[0])
        if not self.begun:
            yield _no_interpreter(f"{self.ending} | {_tail(self.log)}")
        elif self.ending or self.begun[-1] not in ended:
            yield _died(self.begun[-1], self.ending or "exit status 0", self.log)


def _network_open(reason: str) -> Finding:
    return Finding(
        id="import.network", severity="note", subject="bin/python3",
        evidence=f"the network was not cut ({reason}); proxies that refuse connections were set instead",
        fix="Allow network namespaces to this user, or verify on a machine without a network.",
    )  # fmt: skip


def _no_interpreter(evidence: str) -> Finding:
    return Finding(
        id="import.interpreter", severity="error", subject="bin/python3", evidence=evidence,
        fix="Verify on a machine of the bundle's platform, with at least its glibc.",
    )  # fmt: skip


def _runs(module: str, program: str) -> Finding:
    evidence = f"runs {program[:_MOST_PROGRAM]!r} when it is imported"
    if not _COMPILER.match(program.partition(" ")[0]):
        return Finding(id="import.program", severity="note", subject=module, evidence=evidence)
    return Finding(
        id="import.compiles", severity="warning", subject=module, evidence=evidence,
        fix="Add what it compiles to the bundle, made ahead, or patch it.",
    )  # fmt: skip


def _reaches(module: str, host: str) -> Finding:
    return Finding(
        id="import.reaches", severity="warning", subject=module, evidence=f"tries to reach {host} when it is imported",
        fix="Patch it: a module must not use the network when it is imported.",
    )  # fmt: skip


def _when_moved(finding: Finding) -> Finding:
    return replace(
        finding, id="import.moved", evidence=f"imported where it was, and not after a move: {finding.evidence}",
        fix="Find the absolute path that it holds.",
    )  # fmt: skip


def _not_imported(module: str, traceback: str) -> Finding:
    evidence = _tail(traceback)
    fix = f"Run bin/python3 -c 'import {module}' to see all of it."
    for pattern, remedy in _REMEDIES:
        cause = pattern.search(traceback)
        if cause:
            evidence = evidence if cause[0] in evidence else f"{cause[0]} | {evidence}"
            fix = remedy.format(cause[1])
            break
    return Finding(id="import", severity="error", subject=module, evidence=evidence, fix=fix)


def _died(module: str, ending: str, log: str) -> Finding:
    stacks = _STACK.findall(log)
    frame = next((place for thread, place in stacks if thread.startswith("Current")), stacks[-1][1] if stacks else "")
    if _LATE.search(log):
        ending = "not imported in time"
    return Finding(
        id="import", severity="error", subject=module, evidence=f"{ending} | {frame.strip() or _tail(log)}",
        fix=f"Run bin/python3 -X faulthandler -c 'import {module}' to see all of it.",
    )  # fmt: skip


def _tail(text: str) -> str:
    """The last lines as one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_EVIDENCE_LINES:])[-_EVIDENCE_LENGTH:]

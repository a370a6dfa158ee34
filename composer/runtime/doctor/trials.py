"""Try the bundle out, each trial in a child process: host libraries, imports, kernels on its GPUs."""

# Names are joined below a folder, and nothing else: no place for pathlib.
# ruff: noqa: PTH118, PTH123

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..finding import Finding, error, note, warning
from .importing import PROXY

_IMPORT_SECONDS = 180
#: Loading torch from a cold disk, and kernels; then a little for each GPU.
_TEST_SECONDS, _GPU_SECONDS = 120, 20
_REFUSING = "http://{}:{}".format(*PROXY)
_COMPILER = re.compile(
    r"(?:.*/)?(?:nvcc|ptxas|ninja|cmake|make|(?:[\w.-]*-)?(?:cc|gcc|g\+\+|c\+\+|clang(?:\+\+)?)(?:-\d+)?)\Z"
)
_EVIDENCE_LINES, _EVIDENCE_LENGTH = 3, 300
_OUT_OF_MEMORY = re.compile(r"out of memory|CUDA_ERROR_OUT_OF_MEMORY", re.IGNORECASE)
_NO_IMAGE = re.compile(r"no kernel image|cudaErrorNoKernelImageForDevice")


def judge_libraries(libraries: Sequence[Mapping[str, Any]], *, rdma: Sequence[str], driver: bool,
                    ptx: bool) -> Iterator[Finding]:  # fmt: skip
    """What the bundle takes from its host and what became of loading it.

    rdma: the host's adapters; driver: whether the driver works, as otherwise its libraries' fault has been told.
    """
    for one in libraries:
        if not one["error"] and one["tried"]:
            continue
        evidence = one["error"] or "loading it ends the process"
        if one["kind"] == "plugin":
            if rdma:
                yield warning("library.plugin", one["name"], f"{evidence}; NCCL uses TCP instead of {', '.join(rdma)}",
                              "Install rdma-core (libibverbs).")  # fmt: skip
        elif driver and one["name"] != "libcuda.so.1" and (ptx or "ptxjit" not in one["name"]):
            yield warning("library.driver", one["name"], evidence, "Install all libraries of the driver.")


def imports(prefix: str, checks: Sequence[Mapping[str, Any]], environ: Mapping[str, str], *, driver: bool,
            jobs: int) -> list[Finding]:  # fmt: skip
    """Import every module of the manifest's `checks`, each in a process of its own and without a network."""
    alone = {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
    alone |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), _REFUSING)
    alone |= {"WHEEL_COMPOSER_GPU_CHECK": "off", "WHEEL_COMPOSER_HOST_CHECK": "off", "PYTHONNOUSERSITE": "1"}
    skipped = [str(one["module"]) for one in checks if one.get("needs_driver") and not driver]
    modules = [str(one["module"]) for one in checks if str(one["module"]) not in skipped]
    with ThreadPoolExecutor(jobs) as pool:
        found = [fault for faults in pool.map(lambda name: _import(prefix, name, alone), modules) for fault in faults]
    if skipped:
        found.append(note("import.skipped", ", ".join(skipped), "needs the NVIDIA driver, which does not work here"))
    return found


def _import(prefix: str, module: str, environ: Mapping[str, str]) -> list[Finding]:
    rows, ending = _child(prefix, ["-m", "_compose.doctor.importing", module], environ, _IMPORT_SECONDS)
    found = [_beside(module, *row) for row in rows if row[0] != "end"]
    fix = f"Run bin/python3 -X faulthandler -c 'import {module}' to see all of it."
    ended = next((row for row in rows if row[0] == "end"), None)
    if ended is None:
        found.append(error("import", module, ending, fix))
    elif ended[1]:
        found.append(error("import", module, _tail(ended[1]), fix))
    return list({(one["id"], one["evidence"]): one for one in found}.values())


def _beside(module: str, event: str, what: str) -> Finding:
    if event == "reach":
        return warning("import.reaches", module, f"tries to reach {what} when it is imported",
                       "Serve with the network cut, or tell the bundle's maker.")  # fmt: skip
    evidence = f"runs {what[:120]!r} when it is imported"
    if _COMPILER.match(what.partition(" ")[0]):
        return warning("import.compiles", module, evidence, "Tell the bundle's maker: it could be made ahead.")
    return note("import.program", module, evidence)


def self_test(prefix: str, gpus: int, environ: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[Finding]]:
    """(what each check of `self_test` said, findings). gpus: how many are expected."""
    quiet = {**environ, "WHEEL_COMPOSER_GPU_CHECK": "off", "WHEEL_COMPOSER_HOST_CHECK": "off"}
    limit = _TEST_SECONDS + _GPU_SECONDS * gpus
    rows, ending = _child(prefix, ["-m", "_compose.doctor.self_test"], quiet, limit)
    begun = [row[1] for row in rows if row[0] == "begin"]
    done = [row[1] for row in rows if row[0] == "end"]
    found = [_failed(one) for one in done if one["ok"] is False]
    found += [note(f"self-test.{one['check']}", one["where"], one["reason"]) for one in done if one["ok"] is None]
    if not rows or rows[-1][0] != "done":
        last = begun[-1] if len(begun) > len(done) else {"check": "start", "where": "bin/python3"}
        found.append(error(f"self-test.{last['check']}", last["where"], f"the check ended its process: {ending}",
                           "Look for `NVRM` in dmesg, and run compose-doctor without --gpu."))  # fmt: skip
    return done, found


def _failed(one: Mapping[str, Any]) -> Finding:
    fix = "Run compose-doctor --deep: a damaged file is likelier than a damaged GPU. Then look for `NVRM` in dmesg."
    if _OUT_OF_MEMORY.search(one["error"]):
        fix = "End what uses the GPU's memory (nvidia-smi), or choose another with CUDA_VISIBLE_DEVICES."
    elif _NO_IMAGE.search(one["error"]):
        fix = "Use a bundle that was built for this GPU (--sm)."
    return error(f"self-test.{one['check']}", one["where"], one["error"], fix)


def _child(prefix: str, words: Sequence[str], environ: Mapping[str, str], limit: float) -> tuple[list[list[Any]], str]:
    """The rows that a module of ours, run by the bundle's Python, wrote to its report; and how it ended, if badly."""
    try:
        with tempfile.TemporaryDirectory(prefix="compose-doctor-", ignore_cleanup_errors=True) as folder:
            report, log = os.path.join(folder, "report"), os.path.join(folder, "log")
            with open(report, "wb"), open(log, "wb") as output:
                argv = [os.path.join(prefix, "bin/python3"), "-s", "-B", *words, report]
                clean = {name: value for name, value in environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
                ending = _run(argv, {**clean, "PYTHONSAFEPATH": "1"}, folder, output.fileno(), limit)
            with open(report, "rb") as lines, open(log, errors="replace") as text:
                return _rows(lines.read()), " | ".join(filter(None, (ending, _tail(text.read()))))
    except OSError as fault:
        return [], f"cannot be tried: {fault}"


def _run(argv: Sequence[str], environ: Mapping[str, str], folder: str, output: int, limit: float) -> str:
    """Run to the end, or to that of `limit` seconds; no descendant is left. How it ended, if badly."""
    process = subprocess.Popen(argv, env=environ, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                               start_new_session=True)  # fmt: skip
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"not done within {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else ""


def _rows(report: bytes) -> list[list[Any]]:
    """The report's lines but for one that was being written when the process ended."""
    whole = report[: report.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def _tail(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_EVIDENCE_LINES:])[-_EVIDENCE_LENGTH:]

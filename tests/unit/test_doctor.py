"""The doctor: every finding from facts, facts from real libraries and files, and its launcher in real prefixes."""

from __future__ import annotations

import compileall
import copy
import hashlib
import json
import os
import py_compile
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from composer.formats.seekable import Frame
from composer.launchers import ENVIRONMENT_PTH, env_file
from composer.model.layer import Entry, Layer, Part
from composer.model.manifest import Floor, Manifest, fingerprint_of
from composer.model.runtime import RuntimeWork
from composer.proofs.floors import render_floors
from composer.runtime.doctor import cli, self_test, tree, trials
from composer.runtime.doctor import driver as doctor_driver
from composer.runtime.doctor import facts as doctor_facts
from composer.runtime.doctor.report import as_json, as_text
from composer.runtime.finding import error, note, warning
from composer.steps.verify import verify
from composer.store import Store
from tests.models import write_llama
from tests.shared_objects import library

_ROOT = Path(__file__).resolve().parents[2]
_RUNTIME = _ROOT / "composer/runtime"
_SITE = f"lib/python3.{sys.version_info[1]}/site-packages"
_GIB = 1 << 30

# --- from facts to findings -------------------------------------------------------------------------------------------

GPU = {"index": 0, "uuid": "GPU-1", "name": "NVIDIA H200", "sm": 90, "memory_bytes": 140 * _GIB,
       "free_bytes": 139 * _GIB, "temperature_c": 40, "utilization": 0, "pci": "0000:1b:00.0", "mig": None}  # fmt: skip
SECOND = {**GPU, "index": 1, "uuid": "GPU-2", "pci": "0000:1c:00.0"}
MIG = {"uuid": "MIG-1", "name": "1g.18gb", "memory_bytes": 18 * _GIB}
HEALTH = {"index": 0, "compute_mode": 0, "persistence": 1, "slowdown_c": 90, "ecc_uncorrected": 0, "throttle": 1,
          "remap_pending": False, "remap_failed": False, "processes": []}  # fmt: skip
CUDA = {"tried": True, "loaded": True, "path": "/usr/lib/libcuda.so.580.1.2", "library_version": "580.1.2", "status": 0,
        "error": None}  # fmt: skip
IBVERBS = {"name": "libibverbs.so.1", "kind": "plugin", "tried": True, "error": "no such file", "path": None}
NVML = {"name": "libnvidia-ml.so.1", "kind": "driver", "tried": True, "error": "no such file", "path": None}
PTX = {**NVML, "name": "libnvidia-ptxjitcompiler.so.1"}
WORK = {"what": "FlashInfer's kernels", "lacking": ["nvcc"], "asked_by": None, "instead": None}

#: A host on which nothing is wrong.
SOUND = {
    "machine": "x86_64", "kernel": "6.8.0", "glibc": "2.39", "libstdcxx": "3.4.33",
    "cpu": {"model": "Xeon", "cores": 64, "features": ["avx512f"], "isa": ["avx2", "avx512"]},
    "driver": {"version": "580.1.2", "cuda": "13.0"}, "gpus": [GPU], "visible": [0], "cuda_visible_devices": None,
    "found_by": "nvml", "l4t": None, "memory": {"total_bytes": 512 * _GIB, "available_bytes": 500 * _GIB},
    "shm": {"size_bytes": 256 * _GIB, "free_bytes": 256 * _GIB}, "numa_nodes": 2,
    "hugepages": {"transparent": "madvise", "free": 0},
    "limits": {"memlock_bytes": None, "stack_bytes": 8 << 20, "nofile": 1024}, "notes": [],
    "uid": 1000, "environ": {}, "hidden": False, "container": False,
    "bundle": {"name": "small-sm90", "machine": "x86_64", "sm": [90], "ptx": False, "isa": "avx512", "cuda": "12.8",
               "floors": {"glibc": ("2.28", "lib/a.so"), "driver": ("525", "lib/b.so"),
                          "libstdc++ GLIBCXX": ("3.4.22", "lib/c.so")}},
    "has": {"glibc": "2.39", "driver": "580.1.2"}, "libraries": [],
    "nvidia": {"module": "580.1.2", "cuda": CUDA, "missing_nodes": [], "denied_nodes": [], "health": [HEALTH],
               "xids": []},
    "rdma": [], "iommu": False, "numa_balancing": False, "overcommit": "0",
    "hard_limits": {"nofile": None, "stack_bytes": None, "nproc": None, "address_bytes": None},
    "clock": {"now": 1.8e9, "earliest": 1.7e9, "because": "the bundle"},
    "port": {"number": 30000, "asked": False, "owner": None, "unprivileged_from": 1024, "ephemeral": (32768, 60999)},
    "shadowing": [], "prefix": {"path": "/opt/b", "owner": 0, "writable": True, "noexec": False, "open": []},
    "cache": {"folder": "/home/u/.cache/compose/0123456789abcdef", "root": "/home/u/.cache/compose", "asked": None,
              "stale": [], "foreign": None, "free_bytes": 100 * _GIB, "free_files": 10**6, "noexec": False,
              "filesystem": "ext4"},
    "runtime": [{**WORK, "lacking": []}], "nvcc": {"path": "/usr/bin/nvcc", "version": "12.4"},
    "unread": [], "read_names": ["SGLANG_PORT"],
}  # fmt: skip

#: What is changed, and the findings that there are then.
CASES: dict[str, tuple[dict[str, object], list[str]]] = {
    "no driver": ({"nvidia.cuda.loaded": False, "nvidia.cuda.status": None, "nvidia.module": None, "gpus": []},
                  ["error driver.absent"]),
    "no libcuda": ({"nvidia.cuda.loaded": False, "nvidia.cuda.status": None}, ["error driver.libcuda"]),
    "no module": ({"nvidia.module": None, "nvidia.cuda.status": 100}, ["error driver.module"]),
    "updated driver": ({"nvidia.module": "570.9", "nvidia.cuda.status": 803}, ["error driver.mismatch"]),
    "compatibility package": ({"nvidia.module": "535.1", "nvidia.cuda.path": "/opt/cuda/compat/libcuda.so.580.1.2",
                               "nvidia.cuda.status": 804}, ["error driver.cuda"]),
    "compatibility package that works": ({"nvidia.module": "535.1"}, []),
    "no fabric manager": ({"nvidia.cuda.status": 802}, ["error driver.cuda"]),
    "crash": ({"nvidia.cuda.status": None, "nvidia.cuda.error": "exit status -11"}, ["error driver.crash"]),
    "crash while loading": ({"nvidia.cuda.status": None, "nvidia.cuda.tried": False, "nvidia.cuda.loaded": False},
                            ["error driver.crash"]),
    "no device files": ({"nvidia.missing_nodes": ["/dev/nvidia-uvm"]}, ["error driver.devices"]),
    "others' device files": ({"nvidia.denied_nodes": ["/dev/nvidia0"]}, ["error driver.permission"]),
    "hidden": ({"hidden": True, "environ": {"CUDA_VISIBLE_DEVICES": ""}, "visible": []}, ["error gpu.hidden"]),
    "none": ({"gpus": [], "visible": []}, ["error gpu.none"]),
    "lost": ({"notes": ["GPU 1 does not answer: GPU is lost"]}, ["error gpu.lost"]),
    "order": ({"notes": ["CUDA counts different GPUs by speed"]}, ["note gpu.order"]),
    "wrong SM": ({"gpus": [{**GPU, "sm": 89}]}, ["error gpu.sm"]),
    "one wrong SM": ({"gpus": [GPU, {**SECOND, "sm": 89}], "visible": [0, 1]}, ["warning gpu.sm"]),
    "wrong SM that is hidden": ({"gpus": [GPU, {**SECOND, "sm": 89}]}, []),
    "PTX for a newer SM": ({"gpus": [{**GPU, "sm": 103}], "bundle.ptx": True}, []),
    "mixed": ({"gpus": [GPU, {**SECOND, "name": "NVIDIA H100"}], "visible": [0, 1]}, ["note gpu.mixed"]),
    "unknown GPU named": ({"environ": {"CUDA_VISIBLE_DEVICES": "0,7"}}, ["warning gpu.visible"]),
    "only unknown GPUs": ({"environ": {"CUDA_VISIBLE_DEVICES": "7"}, "visible": []}, ["error gpu.visible"]),
    "memory in use": ({"gpus": [{**GPU, "free_bytes": 100 * _GIB}]}, ["warning gpu.memory"]),
    "memory in use by Jetson's system": ({"gpus": [{**GPU, "free_bytes": _GIB}], "l4t": "36.4"}, []),
    "hot": ({"gpus": [{**GPU, "temperature_c": 88}]}, ["warning gpu.hot"]),
    "throttled": ({"nvidia.health": [{**HEALTH, "throttle": 0x40}]}, ["warning gpu.hot"]),
    "power brake": ({"nvidia.health": [{**HEALTH, "throttle": 0x80}]}, ["warning gpu.power"]),
    "exclusive": ({"nvidia.health": [{**HEALTH, "compute_mode": 3}]}, ["warning gpu.compute-mode"]),
    "prohibited": ({"nvidia.health": [{**HEALTH, "compute_mode": 2}]}, ["error gpu.compute-mode"]),
    "divided": ({"gpus": [{**GPU, "mig": [MIG]}]}, ["warning gpu.mig"]),
    "divided into nothing": ({"gpus": [{**GPU, "mig": []}]}, ["error gpu.mig"]),
    "row lost": ({"nvidia.health": [{**HEALTH, "remap_failed": True}]}, ["error gpu.ecc"]),
    "row waits": ({"nvidia.health": [{**HEALTH, "remap_pending": True}]}, ["warning gpu.ecc"]),
    "memory errors": ({"nvidia.health": [{**HEALTH, "ecc_uncorrected": 2}]}, ["warning gpu.ecc"]),
    "no persistence": ({"nvidia.health": [{**HEALTH, "persistence": 0}]}, ["note gpu.persistence"]),
    "Xid": ({"nvidia.xids": [("PCI:0000:1b:00", 79, 3)]}, ["warning gpu.xid"]),
    "IOMMU": ({"iommu": True, "gpus": [GPU, SECOND], "visible": [0, 1]}, ["note gpu.iommu"]),
    "IOMMU and one GPU": ({"iommu": True}, []),
    "RDMA without library": ({"libraries": [IBVERBS], "rdma": ["mlx5_0"]}, ["warning library.plugin"]),
    "no RDMA": ({"libraries": [IBVERBS]}, []),
    "half a driver": ({"libraries": [NVML]}, ["warning library.driver"]),
    "no compiler of PTX, and no PTX": ({"libraries": [PTX]}, []),
    "no compiler of PTX": ({"libraries": [PTX], "bundle.ptx": True}, ["warning library.driver"]),
    "other machine": ({"machine": "aarch64"}, ["error host.machine"]),
    "musl": ({"glibc": None}, ["error host.libc"]),
    "old glibc": ({"has.glibc": "2.27"}, ["error floors.glibc"]),
    "old driver": ({"has.driver": "470.1"}, ["error floors.driver"]),
    "old C++ runtime": ({"has.libstdc++ GLIBCXX": "3.4.19"}, ["error floors.libstdcxx"]),
    "old CPU": ({"bundle.floors": {"CPU": ("avx512f", "torch")}, "has": {"CPU": "avx2"}}, ["error floors.cpu"]),
    "old kernel": ({"bundle.floors": {"kernel": ("4.18", "bin/python3")}, "has": {"kernel": "3.10.0"}},
                   ["error floors.kernel"]),
    "plain CPU": ({"cpu.isa": ["avx2"]}, ["note host.isa"]),
    "files": ({"hard_limits.nofile": 4096}, ["warning limits.nofile"]),
    "stack": ({"hard_limits.stack_bytes": 1 << 20}, ["warning limits.stack"]),
    "processes": ({"hard_limits.nproc": 1024}, ["warning limits.nproc"]),
    "processes of root": ({"hard_limits.nproc": 1024, "uid": 0}, []),
    "address space": ({"hard_limits.address_bytes": 64 * _GIB}, ["warning limits.as"]),
    "no overcommit": ({"overcommit": "2"}, ["warning host.overcommit"]),
    "locked memory": ({"limits.memlock_bytes": 65536}, ["note limits.memlock"]),
    "locked memory with RDMA": ({"limits.memlock_bytes": 65536, "rdma": ["mlx5_0"]}, ["warning limits.memlock"]),
    "no /dev/shm": ({"shm": None}, ["error shm.absent"]),
    "64 MB for one GPU": ({"shm.size_bytes": 64 << 20, "shm.free_bytes": 64 << 20}, ["warning shm.size"]),
    "64 MB for two": ({"shm.size_bytes": 64 << 20, "gpus": [GPU, SECOND], "visible": [0, 1]}, ["error shm.size"]),
    "full /dev/shm": ({"shm.free_bytes": 1 << 20}, ["warning shm.full"]),
    "little memory": ({"memory.available_bytes": _GIB}, ["warning host.memory"]),
    "no huge pages": ({"hugepages.transparent": "never"}, ["note host.hugepages"]),
    "NUMA balancing": ({"numa_balancing": True}, ["note host.numa-balancing"]),
    "NUMA balancing of one node": ({"numa_balancing": True, "numa_nodes": 1}, []),
    "clock behind": ({"clock.now": 0.0}, ["error clock.behind"]),
    "clock ahead": ({"clock.now": 4e9}, ["error clock.ahead"]),
    "busy port": ({"port.owner": "nc (process 7, root)"}, ["warning port.busy"]),
    "busy port that was asked for": ({"port.owner": "nc", "port.asked": True}, ["error port.busy"]),
    "low port": ({"port.number": 80}, ["error port.privileged"]),
    "low port of root": ({"port.number": 80, "uid": 0}, []),
    "port of the kernel": ({"port.number": 40000}, ["note port.ephemeral"]),
    "other libraries": ({"shadowing": [("/usr/local/cuda/lib64", ["libcudart.so.12"])]}, ["warning env.library-path"]),
    "preload": ({"environ": {"LD_PRELOAD": "/x.so"}}, ["warning env.preload"]),
    "Python's home": ({"environ": {"PYTHONHOME": "/x"}}, ["warning env.pythonhome"]),
    "Python's path": ({"environ": {"PYTHONPATH": "/x"}}, ["note env.pythonpath"]),
    "container without GPUs": ({"environ": {"NVIDIA_VISIBLE_DEVICES": "void"}, "container": True},
                               ["warning env.nvidia-visible-devices"]),
    "no check": ({"environ": {"WHEEL_COMPOSER_GPU_CHECK": "off"}}, ["warning env.check-off"]),
    "proxy": ({"environ": {"http_proxy": "http://p:1", "no_proxy": "localhost,127.0.0.1"}}, ["warning env.proxy"]),
    "proxy for all": ({"environ": {"ALL_PROXY": "http://p:1"}}, ["warning env.proxy"]),
    "proxy for others": ({"environ": {"http_proxy": "http://p:1", "NO_PROXY": "127.0.0.1, 0.0.0.0"}}, []),
    "proxy for other networks": ({"environ": {"http_proxy": "http://p:1", "SGLANG_HOST": "10.1.2.3",
                                              "no_proxy": "10.0.0.0/8"}}, []),
    "proxy for other domains": ({"environ": {"http_proxy": "http://p:1", "SGLANG_HOST": "a.lan",
                                             "no_proxy": ".lan"}}, []),
    "service link": ({"environ": {"SGLANG_PORT": "tcp://10.0.0.1:30000"}, "unread": ["SGLANG_SERVICE_HOST",
                      "SGLANG_PORT_30000_TCP_ADDR", "SGLANG_SERVICE_PORT"]}, ["warning serve.service-link"]),
    "no number": ({"environ": {"SGLANG_TP_SIZE": "two"}}, ["error serve.variable"]),
    "unread": ({"unread": ["SGLANG_PROT"]}, ["warning env.unread"]),
    "noexec": ({"prefix.noexec": True}, ["error prefix.noexec"]),
    "open to all": ({"prefix.open": ["/opt/b/bin"]}, ["warning prefix.open"]),
    "other owner": ({"prefix.owner": 1001}, ["note prefix.owner"]),
    "read-only": ({"prefix.writable": False}, ["note prefix.read-only"]),
    "no cache": ({"cache": {"folder": "", "root": "", "asked": None, "stale": [], "foreign": None}},
                 ["error cache.unwritable"]),
    "root's cache": ({"cache.foreign": "/home/u/.cache/compose/0/triton"}, ["error cache.foreign"]),
    "little room": ({"cache.free_bytes": _GIB}, ["warning cache.room"]),
    "no room": ({"cache.free_bytes": 1 << 20}, ["error cache.room"]),
    "no inodes": ({"cache.free_files": 3}, ["error cache.inodes"]),
    "no inodes known": ({"cache.free_files": None}, []),
    "noexec cache": ({"cache.noexec": True}, ["warning cache.noexec"]),
    "NFS": ({"cache.filesystem": "nfs4"}, ["warning cache.network"]),
    "old caches": ({"cache.stale": [("a" * 16, _GIB), ("b" * 16, 5)]}, ["note cache.stale"]),
    "old caches of nothing": ({"cache.stale": [("a" * 16, 5)]}, []),
    "no compiler": ({"runtime": [{**WORK, "asked_by": "diffusion models"}]}, ["note jit.absent"]),
    "no compiler, and a way without": ({"runtime": [{**WORK, "instead": "--attention-backend triton"}]},
                                       ["note jit.absent"]),
    "no compiler, and no way without": ({"runtime": [WORK]}, ["warning jit.absent"]),
    "other CUDA": ({"nvcc.version": "13.0"}, ["warning jit.cuda"]),
}  # fmt: skip


def changed(facts: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    facts = copy.deepcopy(facts)
    for name, value in changes.items():
        place = facts
        *outer, last = name.split(".") if not name.startswith("has.") else ("has", name[4:])
        for one in outer:
            place = place[one]
        place[last] = value
    return facts


def test_nothing_is_found_on_a_sound_host():
    assert list(cli.judge(SOUND)) == []


@pytest.mark.parametrize("name", CASES)
def test_one_fault_gives_one_finding(name):
    changes, wanted = CASES[name]
    found = list(cli.judge(changed(SOUND, changes)))
    assert [f"{one['severity']} {one['id']}" for one in found] == wanted
    assert all("\n" not in one["evidence"] for one in found)
    assert all(one["fix"] for one in found if one["severity"] != "note" and not one["id"].startswith("serve."))


def test_every_finding_has_a_case_and_is_documented():
    """By the sources: a finding that nobody tests, or that a reader cannot look up, is none."""
    sources = "".join(path.read_text() for path in sorted((_RUNTIME / "doctor").glob("*.py")))
    written = set(re.findall(r'(?:error|warning|note)\(\s*"([a-z-]+\.[a-z-]+)"', sources))
    written |= set(re.findall(r'finding\(\s*[^()]*?"([a-z-]+\.[a-z-]+)",', sources))
    cases = {one.split()[1] for _, wanted in CASES.values() for one in wanted if " serve." not in one}
    elsewhere = {one for one in written if one.startswith(("import.", "files.", "self-test.", "python."))}
    assert len(written) > 60
    assert written - cases - elsewhere == set()
    page = (_ROOT / "docs/reference/doctor.md").read_text()
    assert {one for one in written | cases if f"`{one}`" not in page} == set()


def test_texts_say_what_a_reader_needs():
    def text(**changes: object) -> str:
        return json.dumps(
            list(cli.judge(changed(SOUND, {name.replace("__", "."): value for name, value in changes.items()})))
        )

    assert "nvidia-fabricmanager" in text(nvidia__cuda={**CUDA, "status": 802})
    assert "CUresult 4711" in text(nvidia__cuda={**CUDA, "status": 4711})
    assert "--sm 89" in text(gpus=[{**GPU, "sm": 89}])
    assert "CUDA_VISIBLE_DEVICES=0." in text(gpus=[GPU, {**SECOND, "sm": 89}], visible=[0, 1])
    assert "python (process 42)" in text(
        gpus=[{**GPU, "free_bytes": 0}], nvidia__health=[{**HEALTH, "processes": [(42, "python")]}]
    )
    assert "SGLANG_PORT?" in text(unread=["SGLANG_PROT"])
    assert "container toolkit" in text(gpus=[], container=True)
    assert "GPU access blocked" in text(gpus=[], notes=["GPU access blocked by the operating system"])
    assert "MIG-1" in text(gpus=[{**GPU, "mig": [MIG]}])


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_worst_comes_first_and_the_many_are_counted():
    missing = [error("missing", f"f{n}", "gone", "Again.") for n in range(9)]
    found = [note("a.b", "s", "e"), *missing,
             warning("port.busy", "p", "two\nlines\udcff")]  # fmt: skip
    lines = as_text("title", found, ["files", "port", "gpu"]).splitlines()
    assert lines[:3] == ["title", "error: missing: f0: gone", "  fix: Again."]
    assert lines[11:] == [
        "error: missing: and 4 more (--json lists all)", "warning: port.busy: p: two lines\\udcff", "note: a.b: s: e",
        "ok: gpu", "not ready: 9 errors, 1 warning, 1 note",
    ]  # fmt: skip
    report = json.loads(as_json("title", found, ["files"], prefix="/p"))
    assert [one["severity"] for one in report["findings"]] == ["error"] * 9 + ["warning", "note"]


# --- what is read -----------------------------------------------------------------------------------------------------


def driver(folder: Path, init: str) -> dict[str, object]:
    """The facts of a libcuda that was made for the test, in a child whose loader finds it."""
    source = f"int cuInit(unsigned f) {{ {init} }} int cuDriverGetVersion(int *v) {{ *v = 12080; return 0; }}"
    source += "int cuDeviceGetCount(int *n) { *n = 1; return 0; }"
    library(folder / "libcuda.so.570.1.2", source)
    (folder / "libcuda.so.1").symlink_to("libcuda.so.570.1.2")
    code = (
        "import json; from composer.runtime.doctor import driver as d;"
        "rows, facts = d.read({'libcuda.so.1': 'driver', 'libabsent.so.9': 'plugin'}, by_nvml=False);"
        "print(json.dumps([rows, facts['cuda']]))"
    )
    environ = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(_ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=True, timeout=60)
    rows, cuda = json.loads(done.stdout)
    assert [row["name"] for row in rows] == ["libcuda.so.1", "libabsent.so.9"]
    if cuda["status"] is not None:
        assert "libabsent" in rows[1]["error"]
    return cuda


def test_a_driver_that_works(tmp_path):
    cuda = driver(tmp_path, "return 0;")
    assert (cuda["loaded"], cuda["status"], cuda["library_version"]) == (True, 0, "570.1.2")


def test_a_driver_that_does_not_start(tmp_path):
    assert driver(tmp_path, "return 803;")["status"] == 803


def test_a_driver_that_ends_the_process(tmp_path):
    cuda = driver(tmp_path, "*(volatile int *)0 = 1; return 0;")
    assert (cuda["loaded"], cuda["status"], cuda["error"]) == (True, None, "exit status -11")


def test_no_driver_here_or_one_that_answers():
    _, facts = doctor_driver.read(doctor_driver.LIBRARIES, by_nvml=False)
    assert facts["cuda"]["tried"]
    assert facts["cuda"]["loaded"] == (facts["cuda"]["error"] is None)


def test_xids_are_counted_by_gpu():
    log = (
        "6,1,2,-;NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off\n4,2,3,-;x\nNVRM: Xid (PCI:0000:1b:00): 79, pid=1\n"
    )
    assert doctor_driver.xids(log + "NVRM: Xid (PCI:0000:3c:00): 31, pid=7") == [
        ("PCI:0000:1b:00", 79, 2), ("PCI:0000:3c:00", 31, 1),
    ]  # fmt: skip


def test_the_file_system_of_a_folder(tmp_path):
    place = tmp_path / "a b"
    place.mkdir()
    escaped = str(place).replace(" ", "\\040")
    info = f"1 0 0:1 / / rw - ext4 /dev/vda rw\n2 1 0:2 / {escaped} rw,noexec shared:1 - nfs4 server:/x rw\n"
    assert doctor_facts.filesystem(str(place / "deep"), info) == "nfs4"
    assert doctor_facts.filesystem(str(tmp_path), info) == "ext4"
    assert doctor_facts.filesystem(str(tmp_path), "nonsense") is None


# --- prefixes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefix:
    """A small bundle that runs: an interpreter in the way of a virtual environment, the package, and a manifest."""

    path: Path

    def write(self, name: str, text: str = "", mode: int = 0o644) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def seal(self) -> Manifest:
        """Write the manifest of what is there."""
        own = {"share/compose/manifest.json", "share/compose/fingerprint", "share/compose/floors"}
        names = sorted(
            str(one.relative_to(self.path)) for one in self.path.rglob("*") if one.is_symlink() or one.is_file()
        )
        entries = [self._entry(name) for name in names if name not in own]
        layer = Layer(name="small", version="1", entries=entries,
                      parts=[Part(digest="0" * 64, frames=[Frame(compressed=1, size=1)])])  # fmt: skip
        floors = {"glibc": Floor(version="2.17", because="lib/a.so")}
        target = {"sm": "90", "isa": "avx2", "cuda": "12.8", "python": f"3.{sys.version_info[1]}", "machine": "x86_64"}
        manifest = Manifest(
            name="small-sm90", fingerprint=fingerprint_of([layer]), composer="0", lock="", target=target,
            recipe={"name": "small", "version": "1"}, python="3", interpreter="x", torch="", serve=None, floors=floors,
            checks=(), left_out=(), warnings=(), layers=[layer],
        )  # fmt: skip
        self.write("share/compose/manifest.json", msgspec.json.encode(manifest).decode())
        self.write("share/compose/fingerprint", manifest.fingerprint)
        self.write("share/compose/floors", render_floors(manifest.name, floors).decode())
        return manifest

    def _entry(self, name: str) -> Entry:
        path = self.path / name
        if path.is_symlink():
            return Entry(path=name, mode=0o777, target=str(path.readlink()))
        data = path.read_bytes()
        return Entry(
            path=name, mode=path.stat().st_mode & 0o777, size=len(data), sha256=hashlib.sha256(data).hexdigest()
        )

    def found(self, *, deep: bool = False) -> list[tuple[str, str]]:
        manifest, faults = tree.read_manifest(str(self.path))
        faults += tree.check(str(self.path), manifest, deep=deep, jobs=2) if manifest else []
        return [(one["id"], one["subject"]) for one in faults]

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.path.parent), **environ}
        return subprocess.run([self.path / "bin/compose-doctor", *words], env=environ, capture_output=True, text=True,
                              check=False, timeout=120)  # fmt: skip

    def report(self, *words: str, **environ: str) -> tuple[int, dict[str, dict[str, str]], dict[str, object]]:
        """(exit status, findings by id, the whole report)."""
        done = self.run("--json", *words, **environ)
        assert "Traceback" not in done.stderr, done.stderr
        report = json.loads(done.stdout)
        return done.returncode, {one["id"]: one for one in report["findings"]}, report


@pytest.fixture
def small(tmp_path: Path) -> Prefix:
    """A tree to compare with its manifest; nothing in it runs."""
    prefix = Prefix(tmp_path / "tree")
    prefix.write("bin/run", "#!/bin/sh\n", 0o755)
    prefix.write(f"{_SITE}/a.py", "a = 1\n")
    prefix.write("lib/b.txt", "b")
    (prefix.path / "lib/c").symlink_to("b.txt")
    prefix.seal()
    return prefix


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as bundles have it: with bytecode that is not compared with the sources."""
    folder = tmp_path_factory.mktemp("compiled") / "_compose"
    shutil.copytree(_RUNTIME, folder, ignore=shutil.ignore_patterns("__pycache__", "launch"))
    compileall.compile_dir(folder, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    return folder


@pytest.fixture
def bundle(tmp_path: Path, compiled: Path) -> Prefix:
    """What bin/compose-doctor needs, in a folder whose name wants quoting."""
    prefix = Prefix(tmp_path / "pre fix' ü")
    base = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    prefix.write("pyvenv.cfg", f"home = {base.parent}\n")
    (prefix.path / "bin").mkdir()
    (prefix.path / "bin/python3").symlink_to(base)
    shutil.copytree(compiled, prefix.path / _SITE / "_compose")
    prefix.write("bin/compose-doctor", (_RUNTIME / "launch/doctor.sh").read_text(), 0o755)
    prefix.write("share/compose/target.json", json.dumps({
        "name": "small-sm90", "sm": [90], "isa": "avx2", "cuda": "12.8", "machine": os.uname().machine, "ptx": False,
    }))  # fmt: skip
    prefix.seal()
    return prefix


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_tree_that_is_as_listed(small):
    small.write("share/models/hub/model.bin")
    assert small.found(deep=True) == []


def hurt(small: Prefix) -> None:
    """One fault of each kind that needs no reading."""
    (small.path / f"{_SITE}/a.py").unlink()
    small.write("lib/b.txt", "longer")
    small.write("lib/new.txt")
    (small.path / "lib/c").unlink()
    (small.path / "lib/c").symlink_to("/etc/passwd")
    small.write("share/compose/floors", "other\n")


HURT = [("missing", f"{_SITE}/a.py"), ("extra", "lib/new.txt"), ("content", "lib/b.txt"), ("content", "lib/c"),
        ("content", "share/compose/floors")]  # fmt: skip


def test_faults_of_files(small):
    hurt(small)
    assert small.found() == HURT


def test_compose_verify_finds_the_same(small, tmp_path):
    hurt(small)
    _, found = verify(small.path, Store(tmp_path / "store"), imports=False, jobs=1, listener=lambda event: None)
    named = {(one.id, one.subject) for one in found if one.id in ("content", "missing", "extra", "manifest")}
    assert named == set(HURT)


def test_only_reading_finds_a_changed_byte(small):
    small.write("lib/b.txt", "c")
    assert small.found() == []
    assert small.found(deep=True) == [("content", "lib/b.txt")]


@pytest.mark.parametrize(("text", "deep"), [("A=2\n", True), ("A=1\nB=2\n", False)])
def test_an_edited_environment_is_no_error(bundle, text, deep):
    before = bundle.report()[0]
    bundle.write("etc/env", "A=1\n")
    bundle.seal()
    bundle.write("etc/env", text)
    status, found, _ = bundle.report(*["--deep"] * deep)
    assert (status, found["content"]["severity"], found["content"]["subject"]) == (before, "warning", "etc/env")
    assert "edited" in found["content"]["fix"]
    (bundle.path / "etc/env").unlink()
    assert bundle.report()[1]["missing"]["severity"] == "error"


def test_a_program_that_may_not_be_run(small):
    (small.path / "bin/run").chmod(0o644)
    assert small.found() == [("files.mode", "bin/run")]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"layers": 3}', '{"layers": [{"name": "a", "parts": [], "entries": [7]}]}', "[" * 100_000]
)
def test_a_damaged_manifest_is_a_finding(small, text):
    small.write("share/compose/manifest.json", text)
    assert small.found() == [("manifest", "share/compose/manifest.json")]


def test_a_manifest_of_other_layers_is_a_finding(small):
    path = small.path / "share/compose/manifest.json"
    path.write_text(path.read_text().replace("0" * 64, "1" * 64))
    assert small.found() == [("manifest", "share/compose/manifest.json")]


# --- the launcher and the program -------------------------------------------------------------------------------------


def test_a_report_of_this_host(bundle):
    status, found, report = bundle.report()
    wrong = [one for one in found.values() if one["severity"] == "error"]
    assert status == (1 if wrong else 0)
    assert {one["id"].partition(".")[0] for one in wrong} <= {"driver", "gpu", "host", "floors", "shm"}, wrong
    assert not any(name.startswith("doctor.") for name in found), found
    assert report["bundle"] == "small-sm90"
    assert report["prefix"] == str(bundle.path)
    assert {"python", "manifest", "files", "port", "cache"} <= set(report["checked"])


def test_the_text_tells_each_finding_once(bundle):
    bundle.write("lib/new.txt")
    done = bundle.run(SGLANG_PORT="70000")
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"small-sm90 in {bundle.path}"
    assert lines.count("error: extra: lib/new.txt: in the tree, not listed in the manifest") == 1
    assert lines[-1].startswith("not ready: ")


@pytest.mark.parametrize("words", [["--port", "0"], ["--dep"]])
def test_a_command_line_that_cannot_be_meant(bundle, words):
    done = bundle.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "compose-doctor: error:" in done.stderr


def test_a_hostile_environment_is_told_and_not_used(bundle, tmp_path):
    Prefix(tmp_path).write("evil/argparse.py", "raise SystemExit('evil')")
    _, found, _ = bundle.report(
        PYTHONPATH=str(tmp_path / "evil"), PYTHONHOME="/nowhere", WHEEL_COMPOSER_HOST_CHECK="off"
    )
    assert {"env.pythonpath", "env.pythonhome", "env.check-off"} <= found.keys()
    assert "WHEEL_COMPOSER_GPU_CHECK" not in json.dumps(found)


def test_a_setting_that_nothing_reads(bundle):
    bundle.write(f"{_SITE}/sglang/srt/environ.py", "LOG = 'SGLANG_LOG_LEVEL'\n")
    bundle.seal()
    _, found, _ = bundle.report(SGLANG_LOG_LEVLE="x", SGLANG_LOG_LEVEL="y")
    assert found["env.unread"]["subject"] == "SGLANG_LOG_LEVLE"
    assert found["env.unread"]["fix"] == "Did you mean SGLANG_LOG_LEVEL?"


def test_settings_of_the_bundle_are_not_the_user_s(bundle):
    bundle.write("etc/env", env_file({}).decode())
    bundle.write(f"{_SITE}/_compose_environment.pth", ENVIRONMENT_PTH.decode())
    bundle.write(f"{_SITE}/sglang/srt/environ.py", "LOG = 'SGLANG_LOG_LEVEL'\n")
    bundle.seal()
    cache = f"{bundle.path.parent}/.cache/compose"
    _, _, report = bundle.report(SGLANG_CACHE_DIRECTORY=cache)
    assert [one["subject"] for one in report["findings"] if one["id"] == "env.unread"] == ["SGLANG_CACHE_DIRECTORY"]


def test_the_nvcc_that_the_bundle_uses(bundle, tmp_path):
    """That of CUDA_HOME, even where that is none; else the bundle's own, else that of PATH."""

    def judged(**environ: str) -> str | None:
        _, found, _ = bundle.report(PATH=f"{tmp_path}/path/bin:{os.environ['PATH']}", **environ)
        if "jit.cuda" not in found:
            return None
        assert "CUDA_HOME" in found["jit.cuda"]["fix"]
        return found["jit.cuda"]["subject"]

    for place in (tmp_path / "path", tmp_path / "named", bundle.path / "jit"):
        Prefix(place).write("bin/nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n", 0o755)
    assert judged(CUDA_HOME=f"{tmp_path}/named") == f"{tmp_path}/named/bin/nvcc"
    assert judged(CUDA_HOME="") is None
    assert judged() == f"{bundle.path}/jit/bin/nvcc"
    (bundle.path / "jit/bin/nvcc").unlink()
    assert judged() == f"{tmp_path}/path/bin/nvcc"


def test_a_busy_port_and_its_owner(bundle):
    with socket.create_server(("127.0.0.1", 0)) as server:
        status, found, _ = bundle.report("--port", str(server.getsockname()[1]))
    assert status == 1
    assert f"process {os.getpid()}" in found["port.busy"]["evidence"]


def test_libraries_that_hide_the_bundle_s(bundle, tmp_path):
    Prefix(tmp_path).write("cuda/libcudart.so.12")
    _, found, _ = bundle.report(LD_LIBRARY_PATH=f"{tmp_path}/cuda:{bundle.path}/lib:/nowhere")
    assert "libcudart.so.12" in found["env.library-path"]["evidence"]
    assert str(tmp_path / "cuda") in found["env.library-path"]["evidence"]


def test_a_cache_that_cannot_be_made(bundle):
    _, found, _ = bundle.report(WHEEL_COMPOSER_CACHE="/proc/nowhere")
    assert found["cache.unwritable"]["subject"] == "/proc/nowhere"


def test_an_incomplete_model(bundle, tmp_path):
    status, found, _ = bundle.report("--model", str(tmp_path / "absent"))
    assert status == 1
    assert found["model.folder"]["severity"] == "error"
    assert "there is no such folder" in found["model.folder"]["evidence"]
    (tmp_path / "empty").mkdir()
    _, found, report = bundle.report(SGLANG_MODEL=str(tmp_path / "empty"))
    assert [one["subject"] for name, one in found.items() if name.startswith("model.")] == [str(tmp_path / "empty")]
    assert "holds no model" in found["model.config"]["evidence"]
    folder = write_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "torchao"}}))
    bundle.write(f"{_SITE}/sglang/srt/layers/quantization/__init__.py", "QUANTIZATION_METHODS = {'fp8': 1}\n")
    _, found, _ = bundle.report("--model", str(folder))
    assert [one for one in found if one.startswith("model.")] == ["model.quantization"]
    assert "quantised by torchao" in found["model.quantization"]["evidence"]
    _, found, report = bundle.report(SGLANG_MODEL="org/name")
    assert "model" not in report["checked"]


#: An NVML, by the prototypes of nvml.h: one GPU in a bad state, with a program on it.
_NVML = """
typedef unsigned int u; typedef unsigned long long ull;
typedef struct { u pid; ull used; u gpu, compute; } process;
typedef struct { ull total, free, used; } memory;
static int text(char *to, const char *from) { while ((*to++ = *from++)); return 0; }
int nvmlInit_v2(void) { return 0; } int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *to, u n) { return text(to, "580.1.2"); }
int nvmlDeviceGetCount_v2(u *n) { *n = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(u i, void **d) { *d = &nvmlShutdown; return 0; }
int nvmlDeviceGetName(void *d, char *to, u n) { return text(to, "Stub"); }
int nvmlDeviceGetUUID(void *d, char *to, u n) { return text(to, "GPU-5"); }
int nvmlDeviceGetCudaComputeCapability(void *d, int *a, int *b) { *a = 8; *b = 9; return 0; }
int nvmlDeviceGetMemoryInfo(void *d, memory *m) { m->total = 24ull << 30; m->free = 9ull << 30; return 0; }
int nvmlDeviceGetTemperature(void *d, int kind, u *to) { *to = 61; return 0; }
int nvmlDeviceGetTemperatureThreshold(void *d, int kind, u *to) { *to = kind == 1 ? 63 : 99; return 0; }
int nvmlDeviceGetComputeMode(void *d, int *to) { *to = 2; return 0; }
int nvmlDeviceGetPersistenceMode(void *d, int *to) { *to = 0; return 0; }
int nvmlDeviceGetTotalEccErrors(void *d, int kind, int which, ull *to) { *to = kind && !which ? 7 : 0; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *d, ull *to) { *to = 0x80; return 0; }
int nvmlDeviceGetRemappedRows(void *d, u *a, u *b, u *pending, u *failed) { *pending = *failed = 0; return 0; }
int nvmlDeviceGetComputeRunningProcesses_v3(void *d, u *n, process *to) {
    *n = 2; to[0].pid = 4294967295u; to[1].pid = 1; return 0; }
"""


def test_a_host_with_a_gpu_in_a_bad_state(bundle, tmp_path):
    library(tmp_path / "libnvidia-ml.so.1", _NVML, "-Wno-incompatible-pointer-types")
    library(tmp_path / "libcuda.so.1", "int cuInit(unsigned f) { return 0; }"
            "int cuDriverGetVersion(int *v) { return 0; } int cuDeviceGetCount(int *n) { return 0; }")  # fmt: skip
    _, found, _ = bundle.report(LD_LIBRARY_PATH=str(tmp_path))
    assert {f"{one['severity']} {name}" for name, one in found.items() if name.startswith(("gpu.", "driver."))} >= {
        "error gpu.sm", "warning gpu.memory", "warning gpu.hot", "warning gpu.power", "error gpu.compute-mode",
        "warning gpu.ecc",
    }  # fmt: skip
    assert "is SM 89; the bundle holds code for SM 90" in found["gpu.sm"]["evidence"]
    init = Path("/proc/1/comm").read_text().strip()
    users = f"of another namespace (process 4294967295), {init} (process 1)"
    assert found["gpu.memory"]["evidence"] == f"15.0 GiB of 24.0 GiB are in use by {users}"
    assert found["gpu.hot"]["evidence"] == "61 degrees Celsius; it slows down at 63"
    assert found["gpu.ecc"]["evidence"].startswith("7 memory errors")


# --- where the bundle's Python does not start ------------------------------------------------------------------------


def without_python(folder: Path) -> dict[str, str]:
    """A PATH with what sh needs, and no Python."""
    folder.mkdir()
    for name in ("sh", "sed", "tr", "tail", "uname", "getconf", "realpath", "readlink"):
        (folder / name).symlink_to(shutil.which(name))
    return {"PATH": str(folder)}


STARTS = {
    "absent": (None, "it is not there"),
    "not to be run": ("x", "may not be run"),
    "old glibc": (
        '#!/bin/sh\necho "python3: libc.so.6: version \\`GLIBC_2.99\' not found" >&2; exit 1',
        "this host has glibc",
    ),
    "another loader": ("#!/nowhere/ld.so\n", "lacks the loader"),
    "old CPU": ("#!/bin/sh\nkill -ILL $$", "SIGILL"),
    "damaged": ("#!/bin/sh\nkill -SEGV $$", "signal 11"),
    "no codecs": ("#!/bin/sh\necho 'Fatal Python error: no \"codecs\" \\ here'; exit 1", 'no "codecs" \\ here'),
    "silent": ("#!/bin/sh\nexit 7", "status 7"),
    "a host's that is not there": (
        (_RUNTIME / "launch/host_python.sh").read_text().replace("@MINOR@", "3.99"),
        "no Python of its own",
    ),
}


@pytest.mark.parametrize("name", STARTS)
def test_no_start_is_a_finding_even_without_another_python(bundle, tmp_path, name):
    text, words = STARTS[name]
    python = bundle.path / "bin/python3"
    python.unlink()
    if text is not None:
        bundle.write("bin/python3", text, 0o644 if text == "x" else 0o755)
    if text == "x" and os.getuid() == 0 and os.access(python, os.X_OK):
        pytest.skip("this user may run everything")
    path = without_python(tmp_path / "few")
    status, found, report = bundle.report(**path)
    assert (status, list(found)) == (1, ["python.start"])
    assert words in found["python.start"]["evidence"]
    assert found["python.start"]["fix"]
    assert report["bundle"] == "small-sm90"
    done = bundle.run(**path)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"error: python.start: bin/python3: {found['python.start']['evidence']}" in done.stdout.splitlines()


def test_a_bundle_without_its_name_is_named_after_its_folder(bundle, tmp_path):
    (bundle.path / "bin/python3").unlink()
    (bundle.path / "share/compose/floors").unlink()
    _, found, report = bundle.report(**without_python(tmp_path / "few"))
    assert (list(found), report["bundle"]) == (["python.start"], bundle.path.name)


def test_another_machine_s_bundle_is_not_even_started(bundle, tmp_path):
    target = json.loads((bundle.path / "share/compose/target.json").read_text())
    bundle.write("share/compose/target.json", json.dumps({**target, "machine": "riscv64"}))
    bundle.write("bin/python3.x", f"#!/bin/sh\ntouch {tmp_path}/started", 0o755)
    (bundle.path / "bin/python3").unlink()
    (bundle.path / "bin/python3").symlink_to("python3.x")
    _, found, _ = bundle.report(**without_python(tmp_path / "few"))
    assert found["python.start"]["evidence"] == f"it is for riscv64, and this host is {os.uname().machine}"
    assert not (tmp_path / "started").exists()


def test_another_python_looks_for_the_rest(bundle, tmp_path):
    (bundle.path / "bin/python3").unlink()
    few = without_python(tmp_path / "few")
    base = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    Prefix(tmp_path / "few").write("python3", "#!/bin/sh\nexit 1\n", 0o755)
    (tmp_path / "few" / "python3.11").symlink_to(base)
    before = set(bundle.path.rglob("*"))
    status, found, report = bundle.report("--imports", "--gpu", **few)
    assert status == 1
    assert {"python.start", "missing", "import.skipped", "self-test.skipped"} <= found.keys()
    assert found["missing"]["subject"] == "bin/python3"
    assert "files" in report["checked"]
    assert set(bundle.path.rglob("*")) == before


# --- trials -----------------------------------------------------------------------------------------------------------


def imported(bundle: Prefix, **sources: str) -> dict[str, dict[str, str]]:
    """Findings by module, and a space, and id."""
    for name, text in sources.items():
        bundle.write(f"{_SITE}/{name}.py", text)
    checks = [{"module": name, "needs_driver": name == "driven"} for name in sources]
    environ = {"PATH": os.environ["PATH"], "HOME": str(bundle.path.parent)}
    found = trials.imports(str(bundle.path), checks, environ, driver=False, jobs=2)
    return {f"{one['subject']} {one['id']}": one for one in found}


def test_imports(bundle):
    started = time.monotonic()
    found = imported(
        bundle,
        fine="print('noise')",
        absent="import nothing_of_that_name",
        crash="import os; os.abort()",
        leaves="raise SystemExit(0)",
        online="import socket\ntry: socket.create_connection(('192.0.2.1', 80))\nexcept OSError: pass",
        asks="import urllib.request as r\ntry: r.urlopen('http://huggingface.co/x')\nexcept OSError: pass",
        compiles="import subprocess\ntry: subprocess.run(['/nowhere/x86_64-linux-gnu-g++-12'])\nexcept OSError: pass",
        driven="raise AssertionError",
    )
    assert set(found) == {
        "absent import", "crash import", "leaves import", "online import.reaches", "asks import.reaches",
        "compiles import.compiles", "driven import.skipped",
    }  # fmt: skip
    assert "nothing_of_that_name" in found["absent import"]["evidence"]
    assert "SIGABRT" in found["crash import"]["evidence"]
    assert "another machine by HTTP" in found["asks import.reaches"]["evidence"]
    assert "192.0.2.1" in found["online import.reaches"]["evidence"]
    assert time.monotonic() - started < 15


_TORCH = """\
class cuda:
    init = staticmethod(lambda: None)
    device_count = staticmethod(lambda: 2)
    get_device_name = staticmethod(lambda index: "NVIDIA H200")
    synchronize = staticmethod(lambda: None)
    class device:
        def __init__(self, index): pass
        def __enter__(self): pass
        def __exit__(self, *fault): pass
manual_seed = lambda seed: None
class backends:
    class cuda:
        class matmul: pass
def randn(*shape):
    %s
"""


def try_torch(bundle: Prefix, body: str) -> tuple[list[dict[str, object]], list[tuple[str, str]], str]:
    """(what the checks said, (id, subject) of findings, their texts) with a torch whose first tensor does `body`."""
    bundle.write(f"{_SITE}/torch.py", _TORCH % body)
    environ = {"PATH": os.environ["PATH"], "HOME": str(bundle.path.parent)}
    done, found = trials.self_test(str(bundle.path), 2, environ)
    return done, [(one["id"], one["subject"]) for one in found], json.dumps(found)


def test_a_check_that_ends_its_process_is_named(bundle):
    done, found, text = try_torch(bundle, "import os; os.abort()")
    assert [one["check"] for one in done] == ["torch"]
    assert found == [("self-test.matmul", "GPU 0 (NVIDIA H200)")]
    assert "SIGABRT" in text


def test_a_check_that_hangs_is_ended(bundle, monkeypatch):
    monkeypatch.setattr(trials, "_TEST_SECONDS", 1)
    monkeypatch.setattr(trials, "_GPU_SECONDS", 0)
    _, found, text = try_torch(bundle, "import time; time.sleep(60)")
    assert found == [("self-test.matmul", "GPU 0 (NVIDIA H200)")]
    assert "not done within 1 s" in text


def test_a_fault_of_cuda_ends_the_test(bundle):
    done, found, text = try_torch(bundle, "raise RuntimeError('CUDA error: no kernel image is available')")
    assert [(one["check"], one["ok"]) for one in done] == [("torch", True), ("matmul", False)]
    assert found == [("self-test.matmul", "GPU 0 (NVIDIA H200)")]
    assert "built for this GPU" in text


def test_other_faults_leave_the_other_checks_alone(bundle):
    done, found, text = try_torch(bundle, "raise RuntimeError('CUDA out of memory')")
    checks = [("matmul", False), ("rmsnorm", None), ("attention", False), ("triton", None)]
    assert [(one["check"], one["ok"]) for one in done] == [("torch", True), *checks, *checks, ("nccl", False)]
    assert ("self-test.rmsnorm", "GPU 1 (NVIDIA H200)") in found
    assert "nvidia-smi" in text
    assert "sgl_kernel is not in this bundle" in text


def test_no_torch_is_a_finding(bundle):
    environ = {"PATH": os.environ["PATH"], "HOME": str(bundle.path.parent)}
    done, found = trials.self_test(str(bundle.path), 0, environ)
    assert [one["ok"] for one in done] == [False]
    assert [one["id"] for one in found] == ["self-test.torch"]


def test_results_are_compared():
    class Tensor:
        """What `_close` asks of a tensor."""

        def __init__(self, values: Iterable[float], shape: tuple[int, ...] = (2,)) -> None:
            self.values, self.shape = list(values), shape

        def double(self) -> Tensor:
            return self

        cpu = double

        def __sub__(self, other: Tensor) -> Tensor:
            return Tensor(a - b for a, b in zip(self.values, other.values, strict=True))

        def abs(self) -> Tensor:
            return Tensor(map(abs, self.values))

        def max(self) -> Tensor:
            largest = max(self.values, key=lambda one: (one != one, one))
            return Tensor([largest])

        def __truediv__(self, other: Tensor) -> Tensor:
            return Tensor([self.values[0] / other.values[0]])

        def item(self) -> float:
            return self.values[0]

    self_test._close(Tensor([1, 2.01]), Tensor([1, 2]), "bfloat16")
    for wrong in (Tensor([1, 2.1]), Tensor([1, float("nan")]), Tensor([1, 2], shape=(1, 2))):
        with pytest.raises(ArithmeticError):
            self_test._close(wrong, Tensor([1, 2]), "bfloat16")


def test_runtime_rows_are_read_as_the_build_writes_them(tmp_path: Path) -> None:
    """The manifest spells the fields of a recipe's tables with hyphens."""
    rows = [
        RuntimeWork(what=name, of="stack", reason="x", needs=("no-such-compiler",), **more)
        for name, more in {"asked": {"asked_by": "one model"}, "not here": {"sm_not": (90,)}, "plain": {}}.items()
    ]  # fmt: skip
    runtime = json.loads(msgspec.json.encode(rows))

    def found(sm: str) -> dict[str, str | None]:
        manifest = {"target": {"sm": sm, "python": "3.12"}, "layers": [{"name": "stack"}], "runtime": runtime}
        return {row["what"]: row["asked_by"] for row in doctor_facts._runtime(str(tmp_path), manifest, {"PATH": ""})}

    assert found("90") == {"asked": "one model", "plain": None}
    assert found("80 90") == {"asked": "one model", "not here": None, "plain": None}

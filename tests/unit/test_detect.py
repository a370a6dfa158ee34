"""What a host is: real libraries and programs in the place of NVIDIA's, and folders as other systems have them."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import archspec.cpu
import pytest

from composer.host.detect import survey
from composer.runtime.host import detect, devices
from composer.steps.load import load_targets
from tests.shared_objects import library

_PACKAGE = Path(__file__).resolve().parents[2] / "composer/runtime"
_NVML = """
typedef struct { const char *name; const char *uuid; int sm; unsigned long long memory; int mig; } gpu;
static gpu gpus[] = { @GPUS@ { 0 } };
static gpu parts[] = { { "NVIDIA H100 MIG 1g.10gb", "MIG-aaaa", 90, 10, 0 }, { 0 } };
static int copy(char *to, const char *from, unsigned size) {
    for (unsigned i = 0; i < size; i++) if (!(to[i] = from[i])) return 0;
    return 7;
}
int nvmlInit_v2(void) { return @INIT@; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int status) { return status == 18 ? "Driver/library version mismatch" : "GPU is lost"; }
int nvmlDeviceGetCount_v2(unsigned *count) { for (*count = 0; gpus[*count].name; ++*count); return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, gpu **found) { *found = &gpus[i]; return gpus[i].sm == 1 ? 15 : 0; }
int nvmlDeviceGetName(gpu *one, char *name, unsigned size) { return copy(name, one->name, size); }
int nvmlDeviceGetUUID(gpu *one, char *uuid, unsigned size) { return copy(uuid, one->uuid, size); }
"""
_NEW = """
int nvmlSystemGetDriverVersion(char *version, unsigned size) { return copy(version, "580.159.04", size); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetCudaComputeCapability(gpu *one, int *major, int *minor) {
    *major = one->sm / 10, *minor = one->sm % 10;
    return 0;
}
int nvmlDeviceGetMemoryInfo(gpu *one, unsigned long long *found) {
    if (!one->memory) return 3;
    found[0] = one->memory << 30, found[1] = found[0] - (1 << 30), found[2] = 1 << 30;
    return 0;
}
int nvmlDeviceGetTemperature(gpu *one, int sensor, unsigned *found) { *found = 41; return sensor; }
int nvmlDeviceGetUtilizationRates(gpu *one, unsigned *found) { found[0] = 7, found[1] = 99; return 0; }
int nvmlDeviceGetPciInfo_v3(gpu *one, char *found) {
    for (int i = 0; i < 2000; i++) found[i] = 'x';  /* a later version may be larger than the 68 bytes of this one */
    return copy(found + 36, "00000000:1B:00.0", 32);
}
int nvmlDeviceGetMigMode(gpu *one, unsigned *current, unsigned *pending) {
    *current = one->mig, *pending = 0;
    return one->mig < 0 ? 3 : 0;
}
int nvmlDeviceGetMaxMigDeviceCount(gpu *one, unsigned *count) { *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(gpu *one, unsigned i, gpu **found) { *found = parts; return i ? 6 : 0; }
"""
_OLD = """
int nvmlSystemGetDriverVersion(char *version, unsigned size) { return copy(version, "384.81", size); }
int nvmlDeviceGetPciInfo_v2(gpu *one, char *found) { return copy(found, "0000:3F:00.0", 16); }
"""


@dataclass(frozen=True)
class Gpu:
    name: str
    sm: int
    uuid: str = "GPU-1111"
    memory: int = 80
    mig: int = -1

    def __str__(self) -> str:
        return f'{{ "{self.name}", "{self.uuid}", {self.sm}, {self.memory}, {self.mig} }},'


_H100 = Gpu("NVIDIA H100 80GB HBM3", 90)
_T4 = Gpu("Tesla T4", 75, uuid="GPU-2222", memory=15)


@dataclass(frozen=True)
class Machine:
    """A bundle's package, and folders for the driver's library and its programs."""

    folder: Path

    def nvml(self, gpus: Sequence[Gpu], functions: str = _NEW, init: int = 0) -> None:
        source = _NVML.replace("@GPUS@", "".join(map(str, gpus))).replace("@INIT@", str(init))
        library(self.folder / "driver/libnvidia-ml.so.1", source + functions, "-Wno-unused-result")

    def smi(self, script: str) -> None:
        """An nvidia-smi, and an NVML that cannot be loaded."""
        path = self.folder / "bin/nvidia-smi"
        for folder in (path.parent, self.folder / "driver"):
            folder.mkdir()
        (self.folder / "driver/libnvidia-ml.so.1").write_text("no library")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Start the bundle's program, isolated from this environment's site-packages."""
        start = f"import sys; sys.path.insert(0, {str(self.folder / 'site')!r})\n"
        start += "from _compose.host.detect import main\nsys.exit(main())"
        driver, path = str(self.folder / "driver"), str(self.folder / "bin")
        environ = {"LD_LIBRARY_PATH": driver, "PATH": path, "LC_ALL": "C.UTF-8", **environ}
        return subprocess.run([sys.executable, "-I", "-S", "-c", start, *words], env=environ, capture_output=True,
                              text=True, check=False, timeout=60)  # fmt: skip

    def detect(self, **environ: str) -> dict[str, Any]:
        done = self.run("--json", **environ)
        assert (done.returncode, done.stderr) == (0, "")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    shutil.copytree(_PACKAGE, tmp_path / "site/_compose")
    return Machine(tmp_path)


def tree(folder: Path, files: Mapping[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


# --- NVML -------------------------------------------------------------------------------------------------------------


def test_all_that_nvml_says(machine: Machine) -> None:
    machine.nvml([_H100])
    found = machine.detect()
    assert (found["driver"], found["found_by"]) == ({"version": "580.159.04", "cuda": "13.0"}, "nvml")
    assert found["gpus"] == [
        {"index": 0, "uuid": "GPU-1111", "name": "NVIDIA H100 80GB HBM3", "sm": 90, "memory_bytes": 80 << 30,
         "free_bytes": 79 << 30, "temperature_c": 41, "utilization": 7, "pci": "0000:1b:00.0", "mig": None},
    ]  # fmt: skip
    assert (found["visible"], found["notes"]) == ([0], [])


def test_an_old_driver_lacks_functions(machine: Machine) -> None:
    machine.nvml([_T4], _OLD)
    found = machine.detect()
    assert found["driver"] == {"version": "384.81", "cuda": None}
    assert found["gpus"][0] | {"memory_bytes": 0, "free_bytes": 0} == {
        "index": 0, "uuid": "GPU-2222", "name": "Tesla T4", "sm": None, "memory_bytes": 0, "free_bytes": 0,
        "temperature_c": None, "utilization": None, "pci": "0000:3f:00.0", "mig": None,
    }  # fmt: skip


def test_a_gpu_that_is_lost(machine: Machine) -> None:
    machine.nvml([_H100, Gpu("lost", 1), _T4])
    found = machine.detect()
    assert [one["index"] for one in found["gpus"]] == [0, 2]
    assert found["notes"] == ["GPU 1 does not answer: GPU is lost"]


def test_a_divided_gpu(machine: Machine) -> None:
    machine.nvml([Gpu("NVIDIA H100", 90, mig=1), Gpu("NVIDIA H100", 90, uuid="GPU-2222", mig=0)])
    parts = [{"uuid": "MIG-aaaa", "name": "NVIDIA H100 MIG 1g.10gb", "memory_bytes": 10 << 30}]
    assert [one["mig"] for one in machine.detect()["gpus"]] == [parts, None]
    assert machine.detect(CUDA_VISIBLE_DEVICES="MIG-aaaa")["visible"] == [0]


def test_a_gpu_that_shares_the_hosts_memory(machine: Machine) -> None:
    machine.nvml([Gpu("NVIDIA GB10", 121, memory=0)])
    found = machine.detect()
    assert found["gpus"][0]["memory_bytes"] == found["memory"]["total_bytes"] > 0


@pytest.mark.parametrize(("status", "notes"), [(9, []), (18, ["NVML does not start: Driver/library version mismatch"])])
def test_nvml_that_does_not_start(machine: Machine, status: int, notes: list[str]) -> None:
    """A library without a driver, as containers have it, is not worth a word."""
    machine.nvml([_H100], init=status)
    found = machine.detect()
    assert (found["found_by"] in (None, "proc"), found["notes"]) == (True, notes)


# --- nvidia-smi -------------------------------------------------------------------------------------------------------

_SMI = """
query=index,uuid,name,memory.total,memory.free,temperature.gpu,utilization.gpu,pci.bus_id,driver_version@
case "$1" in --query-gpu=$query) ;;
*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;; esac
"""


def test_nvidia_smi_where_nvml_is_not_found(machine: Machine) -> None:
    machine.smi(
        _SMI.replace("@", ",compute_cap")
        + """
echo '0, GPU-1, NVIDIA H200, 143771, 143167, 27, 0, 00000000:0A:00.0, 570.86.15, 9.0'
echo '1, [N/A], NVIDIA GB10, [N/A], [N/A], [Not Supported], [N/A], 0000000F:01:00.0, 570.86.15, 12.1'"""
    )
    found = machine.detect()
    assert (found["found_by"], found["driver"]) == ("nvidia-smi", {"version": "570.86.15", "cuda": None})
    assert found["gpus"] == [
        {"index": 0, "uuid": "GPU-1", "name": "NVIDIA H200", "sm": 90, "memory_bytes": 143771 << 20,
         "free_bytes": 143167 << 20, "temperature_c": 27, "utilization": 0, "pci": "0000:0a:00.0", "mig": None},
        {"index": 1, "uuid": None, "name": "NVIDIA GB10", "sm": 121, "memory_bytes": None, "free_bytes": None,
         "temperature_c": None, "utilization": None, "pci": "000f:01:00.0", "mig": None},
    ]  # fmt: skip


def test_an_old_nvidia_smi(machine: Machine) -> None:
    row = "0, GPU-1, Tesla T4, 15109, 15000, 30, 0, 00000000:0A:00.0, 450.80.02"
    machine.smi(_SMI.replace("@", "") + f"echo '{row}'")
    assert [(one["name"], one["sm"]) for one in machine.detect()["gpus"]] == [("Tesla T4", None)]


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
         "nvidia-smi: NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."),
        ("exit 6", "nvidia-smi: exit status 6"),
        ("kill -9 $$", "nvidia-smi: exit status -9"),
    ],
)  # fmt: skip
def test_an_nvidia_smi_that_fails(machine: Machine, script: str, note: str) -> None:
    machine.smi(script)
    found = machine.detect()
    assert found["found_by"] != "nvidia-smi"
    assert note in found["notes"]


@pytest.mark.parametrize("script", ["true", "echo 'No devices were found'", "printf '\\377\\000,,'"])
def test_an_nvidia_smi_that_says_nothing(machine: Machine, script: str) -> None:
    machine.smi(script)
    assert machine.detect()["found_by"] in (None, "proc")


# --- files ------------------------------------------------------------------------------------------------------------

_ORIN = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64\n",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "proc/meminfo": "MemTotal:       64349276 kB\nMemAvailable:   60000000 kB\nHugePages_Free:       3\n",
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd atomics asimdhp asimddp\nCPU implementer\t: 0x41\n"
                    "CPU part\t: 0xd42\n\nprocessor\t: 1\nFeatures\t: fp\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/devices/system/node/node0/x": "", "sys/devices/system/node/possible": "0\n",
}  # fmt: skip


def test_a_jetson_without_nvml(tmp_path: Path) -> None:
    found = detect.detect(tree(tmp_path, _ORIN))
    gpu = found["gpus"][0]
    assert (gpu["name"], gpu["sm"], gpu["memory_bytes"]) == ("NVIDIA Tegra234", 87, 64349276 << 10)
    assert (found["l4t"], found["found_by"], found["driver"]) == ("36.4.0", "device-tree", None)
    assert found["cpu"]["model"] == "Arm Cortex-A78AE"
    assert found["hugepages"] == {"transparent": "madvise", "free": 3}
    assert (found["numa_nodes"], found["shm"]) == (1, None)
    assert detect.runnable("aarch64", found["cpu"]["features"]) == ["armv8_2"]


def test_the_kernel_module_alone(tmp_path: Path) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x)  Thu Jan 1\n"
    one = "Model: \t\t NVIDIA H100 PCIe\nIRQ:   \t\t 120\nGPU UUID: \t GPU-3333\nBus Location: \t 0000:b1:00.0\n"
    root = tree(tmp_path, {"proc/driver/nvidia/version": version,
                           "proc/driver/nvidia/gpus/0000:b1:00.0/information": one})  # fmt: skip
    found = detect.detect(root)
    assert found["driver"] == {"version": "570.86.15", "cuda": None}
    assert [(one["name"], one["uuid"], one["pci"], one["sm"]) for one in found["gpus"]] == [
        ("NVIDIA H100 PCIe", "GPU-3333", "0000:b1:00.0", None)
    ]


def test_nothing_to_be_found(tmp_path: Path) -> None:
    found = detect.detect(str(tmp_path))
    assert (found["driver"], found["gpus"], found["found_by"], found["notes"]) == (None, [], None, [])
    assert found["cpu"] | {"cores": 0} == {"model": None, "cores": 0, "features": [], "isa": []}
    assert found["memory"] == {"total_bytes": None, "available_bytes": None}
    assert [line for line in detect.lines(found) if "None" in line.replace("Linux None", "")] == []


def test_files_of_noise(tmp_path: Path) -> None:
    noise = bytes(range(256)).decode("latin-1") * 400
    found = detect.detect(tree(tmp_path, dict.fromkeys(_ORIN, noise) | {"proc/driver/nvidia/version": noise}))
    assert (found["driver"], found["gpus"], found["l4t"]) == (None, [], None)


# --- what CUDA sees ---------------------------------------------------------------------------------------------------

_SEEN = [{"index": 0, "uuid": "GPU-aaa1"}, {"index": 1, "uuid": "GPU-aab2"}, {"index": 3, "uuid": "GPU-ccc3",
          "mig": [{"uuid": "MIG-ddd4"}, {"uuid": "MIG-ddd5"}]}]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "seen"),
    [
        (None, [0, 1, 3]), ("", []), ("-1", []), ("NoDevFiles", []), ("0", [0]), ("1,0", [1, 0]), (" 1 , 2 ", [1, 3]),
        ("0,-1,1", [0]), ("0,7,1", [0]), ("0,0", []), ("GPU-aab", [1]), ("GPU-AAA1,GPU-ccc", [0, 3]), ("GPU-zz", []),
        ("MIG-ddd4", [3]), ("MIG-ddd4,MIG-ddd5", [3]), ("MIG-GPU-aab2/1/0", [1]), ("aab2", []), ("0,GPU-aaa1", []),
    ],
)  # fmt: skip
def test_cuda_visible_devices(asked: str | None, seen: list[int]) -> None:
    assert devices.visible(_SEEN, asked) == seen


def test_numbers_of_different_gpus_are_doubtful(machine: Machine) -> None:
    machine.nvml([_T4, _H100])
    assert "CUDA_DEVICE_ORDER" in machine.detect(CUDA_VISIBLE_DEVICES="0")["notes"][0]
    assert machine.detect(CUDA_VISIBLE_DEVICES="0", CUDA_DEVICE_ORDER="PCI_BUS_ID")["notes"] == []
    assert machine.detect(CUDA_VISIBLE_DEVICES="GPU-2222")["visible"] == [0]


# --- CPU --------------------------------------------------------------------------------------------------------------


def test_the_table_of_instruction_sets_is_that_of_targets() -> None:
    known = {(one.machine, name): set(one.features) for name, one in load_targets().isa.items()}
    ours = {(machine, name): set(needs) for machine, table in detect.ISA.items() for name, needs in table.items()}
    assert ours == known


@pytest.mark.parametrize(
    ("cpu", "last"),
    [
        ("sandybridge", "avx"), ("haswell", "x86-64-v3"), ("x86_64_v3", "x86-64-v3"), ("zen3", "x86-64-v3"),
        ("skylake_avx512", "x86-64-v4"), ("x86_64_v4", "x86-64-v4"), ("cascadelake", "avx512vnni"),
        ("sapphirerapids", "avx512bf16"), ("zen4", "avx512bf16"), ("neoverse_n1", "armv8_2"), ("neoverse_v2", "armv9"),
    ],
)  # fmt: skip
def test_archspec_agrees(cpu: str, last: str) -> None:
    """The richest set that a CPU runs, and all poorer ones, by the features that archspec knows of it."""
    known = archspec.cpu.TARGETS[cpu]
    machine = str(known.family)
    found = detect.runnable(machine, known.features)
    order = list(detect.ISA[machine])
    assert found == order[: order.index(last) + 1]


def test_archspec_agrees_on_this_host() -> None:
    """It may name a lesser CPU than this one, where a virtual machine hides features, but never a richer one."""
    known = archspec.cpu.host()
    found = survey()["cpu"]
    assert found["microarchitecture"] == known.name
    assert set(detect.runnable(os.uname().machine, known.features)) <= set(found["isa"])


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_this_host_by_other_means(machine: Machine) -> None:
    found = machine.detect()
    glibc = subprocess.run(["getconf", "GNU_LIBC_VERSION"], capture_output=True, text=True, check=True).stdout.split()
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shm = shutil.disk_usage("/dev/shm")
    assert found["glibc"] == glibc[1]
    assert found["kernel"] == os.uname().release
    assert found["limits"]["memlock_bytes"] == (None if memlock == resource.RLIM_INFINITY else memlock)
    assert found["shm"]["size_bytes"] == shm.total
    assert found["cpu"]["cores"] == len(os.sched_getaffinity(0))


def test_unlimited_is_null(machine: Machine) -> None:
    start = (f"import sys, json, resource; sys.path.insert(0, {str(machine.folder / 'site')!r})\n"
             "resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
             "from _compose.host.detect import detect; print(detect()['limits']['stack_bytes'])")  # fmt: skip
    limit = ["sh", "-c", 'ulimit -s unlimited 2>/dev/null; exec "$@"', "sh"]
    done = subprocess.run([*limit, sys.executable, "-I", "-S", "-c", start], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_for_a_person(machine: Machine) -> None:
    machine.nvml([_H100, Gpu("NVIDIA A100", 80, uuid="GPU-3", mig=1)])
    done = machine.run(CUDA_VISIBLE_DEVICES="0", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    lines = done.stdout.splitlines()
    assert lines[0] == "GPU 0         NVIDIA H100 80GB HBM3, SM 90, 80.0 GiB, 79.0 GiB free, 41 °C, 7 % busy"
    assert lines[1].endswith("1 MIG instances, hidden by CUDA_VISIBLE_DEVICES")
    assert lines[2] == "driver        580.159.04, CUDA 13.0"
    assert (done.returncode, done.stderr) == (0, "")


def test_wrong_arguments(machine: Machine) -> None:
    done = machine.run("--yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unrecognized arguments: --yaml" in done.stderr

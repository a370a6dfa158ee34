"""The check of a host's age in real interpreters, and what it reads of a host."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from composer.runtime import floors
from tests.shared_objects import library

_SOURCE = Path(__file__).resolve().parents[2] / "composer/runtime/floors.py"
_MODULE = "Kernel Module  535.216.03  Tue Oct 22 00:00:00 UTC 2024"


@dataclass(frozen=True)
class Bundle:
    """A prefix with the check in its site-packages, and the start of an interpreter that reads its .pth file."""

    prefix: Path

    @property
    def check(self) -> Path:
        return self.prefix / "lib/python3.X/site-packages/_compose/floors.py"

    def floors(self, *rows: str) -> None:
        path = self.prefix / "share/compose/floors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["small-sm90", *rows, ""]))

    def driver(self, version: str, cuda: int | None = None) -> None:
        """A kernel module, and where `cuda` is given a libcuda that knows it."""
        proc = self.prefix / "version"
        proc.write_text(f"NVRM version: NVIDIA UNIX x86_64 {version}\nGCC version:  gcc version 12.2.0\n")
        self.check.write_text(self.check.read_text().replace("/proc/driver/nvidia/version", str(proc)))
        if cuda is not None:
            asked = f'int cuDriverGetVersion(int *found) {{ puts("asked"); *found = {cuda}; return 0; }}'
            source = f"int puts(const char *); {asked}"
            library(self.prefix / "driver/libcuda.so.1", source, "-Wno-unused-result")

    def run(self, **environ: str) -> subprocess.CompletedProcess[str]:
        """`site` reads a .pth file of ours, so that what happens to a refusal there is seen."""
        folder = self.check.parents[1]
        (folder / "_compose_floors.pth").write_text("import _compose.floors\n")
        start = (
            f"import sys, site; sys.path.insert(0, {str(folder)!r}); site.addsitedir({str(folder)!r}); print('runs')"
        )
        environ = {"LD_LIBRARY_PATH": str(self.prefix / "driver"), "PATH": "/usr/bin:/bin", **environ}
        return subprocess.run([sys.executable, "-I", "-S", "-c", start], env=environ, capture_output=True, text=True,
                              check=False, timeout=60)  # fmt: skip

    def passes(self, **environ: str) -> str:
        done = self.run(**environ)
        assert (done.returncode, done.stderr) == (0, "")
        assert "runs" in done.stdout.splitlines()
        return done.stdout

    def is_refused(self, status: int, *words: str, **environ: str) -> None:
        done = self.run(**environ)
        assert (done.returncode, done.stdout.replace("asked\n", "")) == (status, ""), done.stderr
        assert "Traceback" not in done.stderr
        assert [word for word in words if word not in done.stderr] == [], done.stderr


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    made = Bundle(tmp_path / "pre fix")
    shutil.copytree(_SOURCE.parent, made.check.parent)
    return made


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "glibc\t99.1\tlib/a.so": (11, "needs glibc 99.1; this host has 2.", "why: lib/a.so", "glibc 99.1 or newer"),
    "kernel\t99.0\tbin/python": (12, "needs Linux 99.0; this host has", "why: bin/python", "Linux 99.0 or newer"),
    "CPU\tsse2 flies\ttorch": (13, "needs a CPU with sse2 flies; this host has none with flies", "why: torch", "--isa"),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="sse2 is a feature of x86-64")
@pytest.mark.parametrize("row", REFUSED)
def test_an_older_host_is_refused_with_a_status_of_its_own(bundle: Bundle, row: str) -> None:
    bundle.floors("libstdc++ CXXABI\t9.9\tno reader", row)
    status, *words = REFUSED[row]
    bundle.is_refused(status, "small-sm90: this bundle", *words, "WHEEL_COMPOSER_HOST_CHECK=off")


def test_everything_is_said_at_once(bundle: Bundle) -> None:
    bundle.floors("glibc\t99\ta", "kernel\t99\tb")
    bundle.is_refused(11, "needs glibc 99", "needs Linux 99")


@pytest.mark.parametrize(
    ("release", "has"),
    [(None, "none"), ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n", "36.4.3")],
)
def test_a_host_that_is_no_jetson_of_that_release(bundle: Bundle, release: str | None, has: str) -> None:
    file = bundle.prefix / "release"
    bundle.check.write_text(bundle.check.read_text().replace("/etc/nv_tegra_release", str(file)))
    if release:
        file.write_text(release)
    bundle.floors("L4T\t38\tthe recipe: JetPack 7")
    bundle.is_refused(16, f"needs L4T 38; this host has {has}", "why: the recipe: JetPack 7", "a Jetson with L4T 38")
    file.write_text("# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64\n")
    bundle.passes()


def test_an_old_driver(bundle: Bundle) -> None:
    bundle.floors("driver\t580\tlib/libcudart.so.13", "CUDA\t13.0\tlib/libcudart.so.13")
    bundle.driver(_MODULE, cuda=12020)
    bundle.is_refused(14, "needs NVIDIA's driver 580; this host has 535.216.03", "why: lib/libcudart.so.13",
                      "set CUDA_VISIBLE_DEVICES to nothing")  # fmt: skip


def test_a_container_without_gpus_on_a_host_with_an_old_driver(bundle: Bundle) -> None:
    """It sees the host's /proc/driver, and no libcuda."""
    bundle.floors("driver\t580\ta", "CUDA\t13.0\ta")
    bundle.driver(_MODULE)
    bundle.passes()


# --- what passes ------------------------------------------------------------------------------------------------------


def test_the_compatibility_package_makes_an_old_driver_do(bundle: Bundle) -> None:
    bundle.floors("driver\t580\ta", "CUDA\t13.0\ta")
    bundle.driver(_MODULE, cuda=13000)
    assert "asked" in bundle.passes()


def test_a_new_driver_is_not_asked_further(bundle: Bundle) -> None:
    """Loading libcuda takes longer than the rest of an interpreter's start."""
    bundle.floors("driver\t525\ta", "CUDA\t12.0\ta")
    bundle.driver(_MODULE, cuda=1000)
    assert "asked" not in bundle.passes()


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_who_uses_no_gpu_needs_no_driver(bundle: Bundle, value: str) -> None:
    bundle.floors("driver\t580\ta")
    bundle.driver(_MODULE)
    bundle.passes(CUDA_VISIBLE_DEVICES=value)
    bundle.is_refused(14, CUDA_VISIBLE_DEVICES="0")


def test_no_driver(bundle: Bundle) -> None:
    bundle.floors("driver\t9999\ta", "CUDA\t99.0\ta")
    bundle.check.write_text(bundle.check.read_text().replace("/proc/driver", "/proc/none"))
    bundle.passes()


def test_a_host_that_is_new_enough(bundle: Bundle) -> None:
    bundle.floors("glibc\t2.2.5\ta", "kernel\t2.6.32\ta", "CPU\t\ta", "libstdc++ GLIBCXX\t99.9\tnone is loaded")
    bundle.passes()


def test_the_override(bundle: Bundle) -> None:
    bundle.floors("glibc\t99\ta")
    bundle.passes(WHEEL_COMPOSER_HOST_CHECK="off")
    bundle.is_refused(11, WHEEL_COMPOSER_HOST_CHECK="on")


@pytest.mark.parametrize("rows", [["glibc 99"], ["glibc\t99"], ["a\tb\tc\td"], [""]])
def test_a_damaged_list_is_none(bundle: Bundle, rows: list[str]) -> None:
    bundle.floors(*rows)
    bundle.passes()


def test_no_list_no_check(bundle: Bundle) -> None:
    bundle.passes()


def test_it_imports_nothing(bundle: Bundle) -> None:
    bundle.floors("glibc\t2.2.5\ta", "kernel\t2.6.32\ta", "CPU\t\ta", "driver\t1\ta")
    code = f"import os, sys; sys.path.insert(0, {str(bundle.check.parents[1])!r}); old = set(sys.modules)\n"
    code += "import _compose.floors; print(sorted(set(sys.modules) - old))"
    out = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "['_compose', '_compose.floors']\n"


def test_it_is_inert_elsewhere() -> None:
    """Composer imports it, too, on hosts that no bundle would run on."""
    assert floors.__name__ == "composer.runtime.floors"


# --- what is read of a host, and how it is compared -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted", "has", "met"),
    [
        ("glibc", "2.28", "2.28", True), ("glibc", "2.28", "2.4", False), ("glibc", "2.4", "2.28", True),
        ("kernel", "3.2.0", "3.2", True), ("kernel", "3.2.0", "6.1.0-18-amd64", True),
        ("kernel", "6.2", "6.1-x", False),
        ("kernel", "5.15.1", "5.15.0-91-generic", False), ("driver", "570", "570.86.10", True),
        ("driver", "570", "565.57.01", False), ("CPU", "avx2 fma", "fma sse2 avx2", True),
        ("CPU", "avx", "avx2", False),
        ("libstdc++ GLIBCXX", "3.4.22", "3.4.9", False), ("glibc", "2.28", "", True),
        ("L4T", "38", "38.2.0", True), ("L4T", "38", "36.4.0", False), ("L4T", "36.4", "36.4.0", True),
        ("L4T", "36.4", "36.3.0", False), ("L4T", "36", "none", False), ("L4T", "36", "", True),
    ],
)  # fmt: skip
def test_comparison(name: str, wanted: str, has: str, met: bool) -> None:
    assert [row[0] for row in floors.unmet({name: (wanted, "x")}, {name: has})] == ([] if met else [name])


def test_this_host() -> None:
    """Against what the same facts are called elsewhere."""
    host = floors.read_host(dict.fromkeys(floors.STATUS, ("0", "x")))
    assert host["glibc"] == platform.libc_ver()[1]
    assert host["kernel"] == platform.release()
    assert set(host["CPU"].split()) >= ({"fpu", "sse2"} if platform.machine() == "x86_64" else {"fp"})
    assert host["libstdc++ GLIBCXX"] == "" or host["libstdc++ GLIBCXX"].startswith("3.4.")
    assert host["driver"] == "" or Path("/proc/driver/nvidia/version").exists()


def test_the_hosts_cxx_runtime() -> None:
    """By the file that is mapped: the floor's family is in its name."""
    found = subprocess.run(["gcc", "-print-file-name=libstdc++.so.6"], capture_output=True, text=True, check=True)
    real = os.path.realpath(found.stdout.strip())
    code = f"import ctypes, sys; sys.path.insert(0, {str(_SOURCE.parents[2])!r}); ctypes.CDLL({real!r})\n"
    code += "from composer.runtime import floors; print(floors.read_host({'libstdc++ GLIBCXX': ('0', 'x')}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == f"{{'libstdc++ GLIBCXX': '3.4.{real.rpartition('.6.0.')[2]}'}}\n"


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.216.03  Tue Oct 22 UTC 2024", "535.216.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (build@x)", "580.159.04"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  570.86.10  Release Build", "570.86.10"),
        ("nothing", ""),
    ],
)  # fmt: skip
def test_the_drivers_version(line: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text(f"{line}\nGCC version:  12.2.0\n")
    monkeypatch.setattr(floors, "_DRIVER", str(tmp_path / "version"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert floors.read_host({"driver": ("0", "x")})["driver"] == version


def test_features_of_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd atomics sve2\n")
    monkeypatch.setattr(floors, "_CPUINFO", str(tmp_path / "cpuinfo"))
    assert floors.read_host({"CPU": ("", "x")}) == {"CPU": "fp asimd atomics sve2"}

"""Finding toolkits and host compilers, and choosing between them, on trees made of small real scripts."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

from composer.errors import BuildError, HostError, RecipeError
from composer.formats.nvcc import HostLimits
from composer.steps.host_compiler import find_host_compiler
from composer.steps.toolchain import (
    Choice,
    candidates,
    choose_toolchain,
    ensure_toolchain,
    find_candidate,
    load_toolchains,
)
from composer.steps.toolkit import Toolkit, Unusable, installed_toolkits
from composer.steps.toolkit_wheels import toolchain_lock
from composer.store import Store
from tests.toolkits import write_compiler, write_script, write_toolkit

LIMITS = HostLimits(gcc_newest=13, clang_oldest=3, clang_newest=17)
MACHINE = platform.machine()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """An empty machine."""
    return tmp_path / "machine"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with a shell's tools and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "printf"):
        (folder / name).symlink_to(shutil.which(name) or "")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# Toolkits


def test_nothing_is_installed(base, path):
    assert installed_toolkits({"PATH": str(path)}, base) == []


def test_the_usual_places_the_newest_first(base, path):
    local = base / "usr/local"
    write_toolkit(local / "cuda-12.4", "12.4.131", (50, 90), gcc=13, libraries=False)
    write_toolkit(local / "cuda-12.10", "12.10.1", include="targets/x86_64-linux/include")
    (local / "cuda").symlink_to("cuda-12.4")
    write_toolkit(base / "opt/cuda", "11.8.89", (61, 90))
    found = installed_toolkits({"PATH": str(path)}, base)
    assert [(one.cuda, one.root) for one in found] == [
        ("12.10", local / "cuda-12.10"), ("12.4", local / "cuda-12.4"), ("11.8", base / "opt/cuda"),
    ]  # fmt: skip
    assert found[1] == Toolkit(
        root=local / "cuda-12.4", nvcc=local / "cuda-12.4/bin/nvcc", cuda="12.4", version="12.4.131", sms=(50, 90),
        limits=HostLimits(gcc_newest=13, clang_oldest=3, clang_newest=18), libraries=False, origin="installed",
    )  # fmt: skip


def test_what_is_named_comes_first_and_counts_once(base, path):
    write_toolkit(base / "usr/local/cuda-13.0", "13.0.88")
    old = write_toolkit(base / "usr/local/cuda-12.4", "12.4.131")
    found = installed_toolkits({"PATH": str(path), "CUDA_HOME": str(old), "CUDA_PATH": str(old)}, base)
    assert [(one.cuda, one.origin) for one in found] == [("12.4", "CUDA_HOME"), ("13.0", "installed")]


def test_debian_has_no_folder_of_its_own(base, path):
    write_toolkit(base / "usr", "12.4.131", (50, 90))
    assert installed_toolkits({"PATH": str(path)}, base) == []
    write_script(base / "usr/lib/nvidia-cuda-toolkit/bin/nvcc", "#!/bin/sh\n")
    [found] = installed_toolkits({"PATH": str(path)}, base)
    assert (found.root, found.nvcc, found.cuda) == (base / "usr", base / "usr/bin/nvcc", "12.4")
    assert "Debian" in found.origin


def test_nvcc_in_path_is_followed_but_not_a_wrapper(base, path, tmp_path):
    elsewhere = write_toolkit(tmp_path / "elsewhere", "12.8.93")
    write_script(path / "nvcc", f'#!/bin/sh\nexec {elsewhere}/bin/nvcc "$@"\n')
    assert installed_toolkits({"PATH": str(path)}, base) == []
    (path / "nvcc").unlink()
    (path / "nvcc").symlink_to(elsewhere / "bin/nvcc")
    [found] = installed_toolkits({"PATH": str(path)}, base)
    assert (found.root, found.origin) == (elsewhere, "PATH")


def test_a_broken_toolkit_is_told_and_does_not_hide_others(base, path):
    local = base / "usr/local"
    write_toolkit(local / "cuda-12.8", "12.8.93")
    write_script(local / "cuda-12.6/bin/nvcc", "#!/bin/sh\nexit 1\n")
    write_toolkit(local / "cuda-12.5")
    write_script(local / "cuda-12.5/bin/nvcc", "#!/bin/sh\necho 'Segmentation fault' >&2; kill -SEGV $$\n")
    found = installed_toolkits({"PATH": str(path), "CUDA_HOME": str(base)}, base)
    named = {one.root.name: one.reason for one in found if isinstance(one, Unusable)}
    assert "no bin/nvcc" in named["machine"]
    assert "host_config.h" in named["cuda-12.6"]
    assert "SIGSEGV" in named["cuda-12.5"]
    assert [one.cuda for one in found if isinstance(one, Toolkit)] == ["12.8"]


# Host compilers


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"g++": 12}, "g++"),
        ({"g++": 14, "g++-13": 13, "g++-11": 11}, "g++-13"),
        ({"g++": 14, "g++-14": 14, "g++-11": 11}, "g++-11"),
        ({"g++": 12, "g++-13": 13}, "g++"),
    ],
)
def test_the_first_gcc_that_nvcc_takes(path, there, chosen):
    for name, major in there.items():
        write_compiler(path, name, gcc=major)
    found = find_host_compiler(LIMITS, {"PATH": str(path)})
    assert (found.cxx, found.cc) == (path / chosen, path / chosen.replace("g++", "gcc"))
    assert (found.family, found.version) == ("gcc", f"{there[chosen]}.2.0")


def test_clang_where_no_gcc_fits(path):
    write_compiler(path, "g++", gcc=15)
    write_compiler(path, "clang++", clang=19)
    write_compiler(path, "clang++-17", clang=17)
    found = find_host_compiler(LIMITS, {"PATH": str(path)})
    assert (found.cxx.name, found.cc.name, found.family) == ("clang++-17", "clang-17", "clang")


def test_no_compiler_says_which_to_install(path):
    with pytest.raises(HostError) as caught:
        find_host_compiler(LIMITS, {"PATH": str(path)})
    assert "neither g++ nor clang++ is there" in str(caught.value)
    assert "g++ up to 13, clang++ 3 to 17" in str(caught.value.fix)
    write_compiler(path, "g++", gcc=15)
    with pytest.raises(HostError, match=r"is gcc 15\.2\.0"):
        find_host_compiler(LIMITS, {"PATH": str(path)})


@pytest.mark.parametrize(
    ("environ", "chosen"),
    [
        ({"CXX": "g++-11"}, "g++-11"),
        ({"CXX": "ccache g++-11 -fPIC"}, "g++-11"),
        ({"CC": "gcc-11"}, "g++-11"),
        ({"CC": "clang-16"}, "clang++-16"),
        ({"CUDAHOSTCXX": "g++-12", "CXX": "g++-11", "CC": "gcc-11"}, "g++-12"),
        ({"CXX": ""}, "g++"),
    ],
)
def test_a_named_compiler_is_taken(path, environ, chosen):
    for name, major in (("g++", 13), ("g++-12", 12), ("g++-11", 11)):
        write_compiler(path, name, gcc=major)
    write_compiler(path, "clang++-16", clang=16)
    assert find_host_compiler(LIMITS, {"PATH": str(path), **environ}).cxx == path / chosen


def test_a_named_compiler_by_its_path(path, tmp_path):
    named = write_compiler(tmp_path / "other", "g++-12", gcc=12)
    found = find_host_compiler(LIMITS, {"PATH": str(path), "CC": str(named.with_name("gcc-12"))})
    assert (found.cxx, found.cc) == (named, named.with_name("gcc-12"))


def test_a_named_compiler_is_not_replaced(path):
    write_compiler(path, "g++")
    write_compiler(path, "g++-16", gcc=16)
    with pytest.raises(HostError, match="does not take") as caught:
        find_host_compiler(LIMITS, {"PATH": str(path), "CXX": "g++-16"})
    assert caught.value.where == "CXX=g++-16"
    with pytest.raises(HostError, match="no such compiler"):
        find_host_compiler(LIMITS, {"PATH": str(path), "CUDAHOSTCXX": "icpc"})


# The choice


def choose(
    store: Store, base: Path, path: Path, cuda: str, *sms: int, libraries: bool = True, **environ: str
) -> Choice:
    here = {"PATH": str(path), **environ}
    return choose_toolchain(cuda, sms, MACHINE, store, libraries=libraries, environ=here, base=base)


@pytest.fixture
def gxx(path: Path) -> Path:
    return write_compiler(path, "g++", gcc=12)


@pytest.mark.usefixtures("gxx")
def test_pinned_wheels_before_what_is_installed_but_after_what_is_named(store, base, path):
    installed = write_toolkit(base / "usr/local/cuda-13.0", "13.0.99", (90,))
    assert choose(store, base, path, "13.0", 90).candidate.name == "cuda13.0"
    assert choose(store, base, path, "13.0", 90, libraries=False).candidate.name == "cuda13.0-compiler"
    named = choose(store, base, path, "13.0", 90, CUDA_HOME=str(installed))
    assert (named.candidate.name, named.candidate.root) == ("installed13.0", installed)
    # It does not emit this one, so being named does not help it.
    assert choose(store, base, path, "13.0", 100, CUDA_HOME=str(installed)).candidate.name == "cuda13.0"
    assert not list(store.artifacts.iterdir())


@pytest.mark.usefixtures("gxx")
def test_the_same_release_else_the_newest_older_one(store, base, path):
    for version in ("12.4.131", "12.6.77", "12.9.86", "11.8.89"):
        write_toolkit(base / f"usr/local/cuda-{version}", version, (80, 90))
    assert choose(store, base, path, "12.8", 90).candidate.cuda == "12.6"
    assert choose(store, base, path, "12.4", 90).candidate.cuda == "12.4"
    assert choose(store, base, path, "12.9", 90, 80).candidate.cuda == "12.9"


@pytest.mark.usefixtures("gxx")
def test_libraries_are_asked_for(store, base, path):
    write_toolkit(base / "usr/local/cuda-12.8", "12.8.93", libraries=False)
    write_toolkit(base / "usr/local/cuda-12.4", "12.4.131")
    assert choose(store, base, path, "12.8", 90).candidate.cuda == "12.4"
    assert choose(store, base, path, "12.8", 90, libraries=False).candidate.cuda == "12.8"


@pytest.mark.parametrize(("cuda", "sm", "why"), [("12.8", 103, "12.9 or newer"), ("13.0", 61, "8.0 to 12.9")])
def test_an_architecture_that_a_release_cannot_emit(store, base, path, cuda, sm, why):
    """No matter what is installed."""
    with pytest.raises(RecipeError, match=f"no code for sm_{sm}") as caught:
        choose(store, base, path, cuda, sm, 90)
    assert why in str(caught.value)


@pytest.mark.usefixtures("gxx")
def test_nothing_fits_and_each_says_why(store, base, path):
    write_toolkit(base / "usr/local/cuda-12.4", "12.4.131", (50, 90))
    write_toolkit(base / "usr/local/cuda-12.6", "12.6.77", (90, 120), libraries=False)
    write_toolkit(base / "usr/local/cuda-12.7")
    write_script(base / "usr/local/cuda-12.7/bin/nvcc", "#!/bin/sh\nexit 1\n")
    with pytest.raises(HostError, match=r"no toolchain for CUDA 12\.8 and sm_120") as caught:
        choose(store, base, path, "12.8", 120)
    text = str(caught.value)
    assert "CUDA 12.4 without sm_120: only 50, 90" in text
    assert "none of NVIDIA's libraries" in text
    assert "cuda13.0 (wheels): it is CUDA 13.0" in text
    assert "cuda-12.7 (installed): exit status 1" in text
    assert "cuda-toolkit-12-8" in text
    assert "lack nvcc and cicc" in text


@pytest.mark.usefixtures("gxx")
def test_a_cuda_home_that_is_none(store, base, path):
    with pytest.raises(RecipeError, match="names no CUDA toolkit") as caught:
        choose(store, base, path, "13.0", 90, CUDA_HOME=str(base / "gone"))
    assert caught.value.where == f"CUDA_HOME={base / 'gone'}"


def test_a_compiler_that_does_not_fit_is_told_before_any_download(store, base, path):
    write_compiler(path, "g++", gcc=16)
    with pytest.raises(HostError, match="no host compiler that nvcc takes"):
        choose(store, base, path, "13.0", 90)
    assert not list(store.artifacts.iterdir())


def test_another_machine(store):
    other = {"x86_64": "aarch64"}.get(MACHINE, "x86_64")
    with pytest.raises(HostError, match=f"for {other} are not compiled on"):
        choose_toolchain("13.0", [90], other, store)


# Names


@pytest.mark.usefixtures("gxx")
def test_names_are_unique_and_paths_are_names_too(store, base, path):
    named = write_toolkit(base / "mine", "12.8.93")
    other = write_toolkit(base / "usr/local/cuda-12.8", "12.8.61")
    environ = {"PATH": str(path), "CUDA_HOME": str(named)}
    known, _ = candidates(store, MACHINE, environ, base)
    assert [one.name for one in known[-2:]] == ["installed12.8", str(other)]
    for name, root in (("installed12.8", named), (str(named), named), (str(other), other)):
        assert find_candidate(name, store, environ=environ, base=base).root == root


def test_an_unknown_name_says_what_to_install(store, base, path):
    with pytest.raises(HostError) as caught:
        find_candidate("cuda12.8", store, environ={"PATH": str(path)}, base=base)
    assert "cuda-toolkit-12-8" in str(caught.value)
    assert "Known: cuda13.0, cuda13.0-compiler." in str(caught.value)
    with pytest.raises(HostError) as caught:
        find_candidate("; rm -rf /", store, environ={"PATH": str(path)}, base=base)
    assert caught.value.fix == "Known: cuda13.0, cuda13.0-compiler."


# What does not compile


@pytest.mark.usefixtures("gxx")
def test_a_toolkit_that_does_not_compile_is_not_proven(store, base, path):
    write_toolkit(base / "usr/local/cuda-12.8", "12.8.93")
    choice = choose(store, base, path, "12.8", 90)
    for _ in range(2):
        with pytest.raises(BuildError, match="exit status 3") as caught:
            ensure_toolchain(choice, store)
        assert "no compiler in here" in str(caught.value)


@pytest.mark.usefixtures("gxx")
def test_a_compiler_that_makes_something_else_is_caught(store, base, path):
    root = write_toolkit(base / "usr/local/cuda-12.8", "12.8.93")
    library = shutil.which("true")
    script = (root / "bin/nvcc").read_text()
    copy = f'*) while [ "$1" != -o ]; do shift; done; cp {library} "$2" ;;\nesac\n'
    write_script(root / "bin/nvcc", script[: script.index("*) echo")] + copy)
    with pytest.raises(BuildError, match="other code") as caught:
        ensure_toolchain(choose(store, base, path, "12.8", 90), store)
    assert caught.value.why == "asked for sm_90a, got none"


# The shipped data


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_shipped_locks_fit_the_shipped_data(machine):
    known = load_toolchains()
    for name, spec in known.toolchain.items():
        lock = toolchain_lock(name, spec, machine)
        assert lock is not None
        assert set(spec.compiler) <= lock.pins.keys()
        wheels = [artifact.filename for package in lock.packages for artifact in package.artifacts]
        assert all(machine in one or one.endswith("-none-any.whl") for one in wheels)
        assert all(package.index == "pypi" for package in lock.packages)
        assert all(known.sm[str(sm)].has(spec.cuda) for sm in spec.sms)
        assert not any(span.has(spec.cuda) for sm, span in known.sm.items() if int(sm) not in spec.sms)

"""`--torch`: built from source, taken as a wheel, given as a file, or whatever this machine allows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import File, Index
from tests.sources import BACKEND, FILES, NAME, RECIPE, sdist, write_recipe
from tests.stack import TARGET, Stack
from tests.wheels import build_wheel, wheel_filename

pytestmark = pytest.mark.skipif(shutil.which("ninja") is None, reason="the small source is built by ninja")


def as_torch(text: str) -> str:
    """The small distribution of tests/sources.py under PyTorch's name."""
    return text.replace("small_ext", "torch").replace(NAME, "torch").replace("SMALL_EXT", "TORCH")


@pytest.fixture
def index() -> Iterator[Index]:
    with Index() as server:
        server.add("torch", File(filename="torch-1.0.tar.gz", data=sdist(FILES, "torch-1.0/")))
        wheel = build_wheel("torch", "1.0", {"torch.txt": b"prebuilt"})
        server.add("torch", File(filename=wheel_filename("torch", "1.0", "py3-none-any"), data=wheel))
        backend = build_wheel("tiny-build", "1.0", {"tiny_build.py": as_torch(BACKEND).encode()})
        server.add("tiny-build", File(filename="tiny_build-1.0-py3-none-any.whl", data=backend))
        yield server


@pytest.fixture
def small(index: Index, tmp_path: Path) -> Stack:
    stack = write_recipe(tmp_path, index.url)
    assert NAME in RECIPE
    stack.recipe.write_text(as_torch(stack.recipe.read_text()))
    stack.edit("sdist = true", 'sdist = true\nwhen = "auto"')
    return stack


def torch_of(stack: Stack, *more: str) -> str:
    """What the last line of a build says, and the manifest, too."""
    done = stack.build(*more).ok()
    shown = json.loads(stack.compose("inspect", str(stack.bundle), "--json").ok().out)["torch"]
    assert done.out.splitlines()[-1] == shown
    return str(shown)


def test_the_ways_to_have_it(small: Stack) -> None:
    assert torch_of(small) == (
        "PyTorch 1.0: prebuilt wheel (not built from source: no record says how long it takes), "
        "ISA by run-time dispatch; all its GPU architectures"
    )
    assert torch_of(small, "--torch", "source").startswith("PyTorch 1.0+avx512: built from source for SM 90 and avx512")
    built = small.digest()
    assert torch_of(small, "--torch-budget", "0").startswith("PyTorch 1.0+avx512: built from source")
    assert small.digest() == built
    assert torch_of(small, "--torch", "wheel").startswith("PyTorch 1.0: prebuilt wheel, ISA by run-time dispatch")


def test_a_build_that_failed_is_not_one_that_was_built(small: Stack, index: Index) -> None:
    broken = {**FILES, "src/b_second.c": "int second(void) { return gone(); }\nint x = gone;\n"}
    index.projects["torch"][0] = File(filename="torch-1.0.tar.gz", data=sdist(broken, "torch-1.0/"))
    small.build("--torch", "source").refused(5, "the build failed")
    assert "prebuilt wheel" in torch_of(small, "--torch-budget", "0")


@pytest.mark.parametrize("command", [("plan",), ("build", "--dry-run")])
def test_a_plan_takes_jobs_as_its_build_does(small: Stack, command: tuple[str, ...]) -> None:
    """--jobs wins over MAX_JOBS, which is not looked at then."""
    words = small.words(*command[1:], "--torch", "source", command=command[0])
    environ = {**small.environ, "MAX_JOBS": "many"}
    small.run(words, env=environ).refused(10, "MAX_JOBS: 'many' is not a number of jobs")
    assert "built from source" in small.run([*words, "-j", "1"], env=environ).ok().out


def test_switches_that_contradict_each_other(small: Stack) -> None:
    small.build("--torch", "wheel", "--no-binary", "torch").refused(2, "contradict each other")
    small.build("--torch", "t-1-py3-none-any.whl", "--no-binary", "torch").refused(2, "contradict each other")


def test_the_cpu_that_a_wheel_was_built_for_is_a_floor_whoever_built_it(small: Stack, tmp_path: Path) -> None:
    def floor(*more: str) -> str:
        small.build(*more).ok()
        floors = json.loads(small.compose("inspect", str(small.bundle), "--json").ok().out)["floors"]
        return str(floors.get("CPU", {}).get("version"))

    small.compose("wheel", "torch", "--recipe", str(small.recipe), *TARGET, "-o", str(tmp_path / "w")).ok()
    (wheel,) = (tmp_path / "w").iterdir()
    assert "avx512f" in floor("--torch", str(wheel))
    assert floor("--torch", "source") == floor("--torch", str(wheel))
    assert floor("--torch", "wheel") == "None"


def test_a_record_and_a_budget(small: Stack, index: Index) -> None:
    small.build("--torch", "source").ok()
    newer = {**FILES, "src/b_second.c": "int second(void) { return 2; }\n"}
    index.projects["torch"][0] = File(filename="torch-1.0.tar.gz", data=sdist(newer, "torch-1.0/"))
    next(small.home.glob("pylock.small-build-torch-*")).unlink()
    assert "is more than the budget" in torch_of(small, "--torch-budget", "0")
    assert "built from source" in torch_of(small, "--torch-budget", "10m")


def test_a_wheel_that_was_built_elsewhere(small: Stack, tmp_path: Path) -> None:
    wheel = tmp_path / "wheels/torch-1.0+avx512-py3-none-linux_x86_64.whl"
    small.compose("wheel", "torch", "--recipe", str(small.recipe), *TARGET, "-o", str(wheel.parent)).ok()
    small.compose("lock", str(small.recipe)).ok()
    other = small.fresh(tmp_path / "other")
    said = torch_of(other, "--torch", str(wheel), "--offline")
    assert said.startswith("PyTorch 1.0+avx512: from the wheel that was given")
    other.build("--torch", str(tmp_path / "absent.whl")).refused(2, "no such file", "absent.whl")


@pytest.mark.parametrize(
    ("filename", "why"),
    [
        ("torch-1.1+avx512-py3-none-linux_x86_64.whl", "it is version 1.1, and the stack is locked with 1.0"),
        ("other-1.0-py3-none-any.whl", "it is a wheel of other"),
        ("torch-1.0-cp38-cp38-linux_x86_64.whl", "it is not for CPython"),
        ("torch-1.0-py3-none-linux_aarch64.whl", "it is not for CPython"),
        ("torch-1.0+sm80.avx512-py3-none-linux_x86_64.whl", "it was built for sm80.avx512"),
        ("torch.whl", "not the file name of a wheel"),
    ],
)
def test_a_wheel_that_cannot_be_it(small: Stack, tmp_path: Path, filename: str, why: str) -> None:
    small.compose("lock", str(small.recipe)).ok()
    path = tmp_path / filename
    path.write_bytes(b"")
    small.build("--torch", str(path), "--offline").refused(2, "cannot be PyTorch in this bundle", why)

"""`compose wheel`: a real C source, a real ninja, a real pip, and everything that goes wrong on the way."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from composer.errors import FetchError
from composer.formats.wheel import read_wheel, verified_stream
from composer.steps.source_tree import checkout
from tests.integration.test_faults import small_disk
from tests.servers import File, Index
from tests.sources import BACKEND, FILES, NAME, PATCH, SECOND, offer, sdist, write_recipe
from tests.stack import TARGET, Done, Stack
from tests.wheels import build_wheel

pytestmark = pytest.mark.skipif(shutil.which("ninja") is None, reason="the small source is built by ninja")


@pytest.fixture
def index() -> Iterator[Index]:
    with Index() as server:
        offer(server)
        yield server


@pytest.fixture
def small(index: Index, tmp_path: Path) -> Stack:
    return write_recipe(tmp_path, index.url)


def words(small: Stack, *more: str) -> list[str]:
    return ["wheel", NAME, "--recipe", str(small.recipe), *TARGET, *more]


def built(small: Stack, *more: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(small.compose(*words(small, "--json", *more)).ok().out)
    return found


def refused(small: Stack, code: int, *told: str) -> Done:
    done = small.compose(*words(small)).refused(code, *told)
    assert not list((small.store / "objects").rglob("*.json"))
    return done


def compiled(small: Stack) -> list[str]:
    """The files that were compiled, in order."""
    trace = small.home / "trace"
    return trace.read_text().split() if trace.is_file() else []


def answer(wheel: Path, folder: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("small_ext.so", folder)
    found: int = ctypes.CDLL(str(folder / "small_ext.so")).answer()
    return found


def change(index: Index, files: Mapping[str, str]) -> None:
    index.projects[NAME] = [File(filename="small_ext-1.0.tar.gz", data=sdist({**FILES, **files}))]


# --- what is made -----------------------------------------------------------------------------------------------------


def test_a_wheel_for_the_target_with_a_record_that_is_right(small: Stack, tmp_path: Path) -> None:
    facts = built(small, "-o", str(small.output))
    wheel = small.output / "small_ext-1.0+avx512-py3-none-linux_x86_64.whl"
    assert facts["path"] == str(wheel)
    found = read_wheel(wheel.read_bytes(), wheel.name)
    for member in found.members.values():
        if not member.path.endswith("/RECORD"):
            b"".join(verified_stream(wheel.read_bytes(), found, member))
    with zipfile.ZipFile(wheel) as archive:
        ledger = json.loads(archive.read("small_ext-1.0+avx512.dist-info/compose-source.json"))
        assert b"Version: 1.0+avx512" in archive.read("small_ext-1.0+avx512.dist-info/METADATA")
    assert ledger["key"] == facts["key"]
    assert "-mavx512f" in ledger["environment"]["CFLAGS"]
    assert list(ledger["requires"]) == ["tiny_build-1.0-py3-none-any.whl"]
    assert not list((small.store / "builds").iterdir())


def test_the_flags_reach_the_compiler(small: Stack) -> None:
    path = Path(str(built(small)["path"]))
    assert b"\x00" in path.read_bytes()
    library = small.home / "small_ext.so"
    with zipfile.ZipFile(path) as archive:
        library.write_bytes(archive.read("small_ext.so"))
    shown = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "$0x200" in shown  # 512: __AVX512F__ was defined


def test_the_same_inputs_are_not_built_again(small: Stack, index: Index) -> None:
    first = built(small)
    index.down = True
    again = built(small, "--offline")
    assert again == {**first, "cached": True}
    assert compiled(small) == ["src/a_first.c", "src/b_second.c"]


def test_another_instruction_set_is_another_wheel_and_another_gpu_is_not(small: Stack) -> None:
    first = built(small)
    other = built(small, "--isa", "avx2")
    assert other["key"] != first["key"]
    assert str(other["filename"]).startswith("small_ext-1.0+avx2-")
    assert built(small, "--sm", "100")["key"] == first["key"]


def test_a_damaged_wheel_in_the_store_is_built_again(small: Stack) -> None:
    first = built(small)
    path = Path(str(first["path"]))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    again = built(small)
    assert (again["cached"], again["sha256"]) == (False, first["sha256"])


def test_progress_is_told_and_the_log_kept(small: Stack) -> None:
    done = small.compose(*words(small)).ok()
    assert "building from source" in done.err
    (log,) = (small.store / "logs").iterdir()
    assert "[3/3]" in log.read_text()


def test_a_dry_run_tells_the_inputs_and_compiles_nothing(small: Stack) -> None:
    told = json.loads(small.compose(*words(small, "--dry-run")).ok().out)
    assert "-mavx512f" in told["environment"]["CFLAGS"]
    assert (told["version"], told["built"], compiled(small)) == ("1.0+avx512", None, [])
    assert built(small)["key"] == told["key"]


def test_requirements_that_the_build_does_without(small: Stack, index: Index) -> None:
    backend = build_wheel("tiny-build", "1.0", {"tiny_build.py": BACKEND.encode()}, requires=["absent-everywhere>=1"])
    index.projects["tiny-build"] = [File(filename="tiny_build-1.0-py3-none-any.whl", data=backend)]
    refused(small, 3, "absent-everywhere")
    small.edit("#more", 'unneeded = ["absent-everywhere"]')
    assert list(built(small)["inputs"]["requires"]) == ["tiny_build-1.0-py3-none-any.whl"]  # type: ignore[index]


def test_requirements_for_a_newer_glibc_are_asked_for(small: Stack, index: Index) -> None:
    tag = f"py3-none-manylinux_2_34_{os.uname().machine}"
    backend = build_wheel("tiny-build", "1.0", {"tiny_build.py": BACKEND.encode()}, tag=tag)
    index.projects["tiny-build"] = [File(filename=f"tiny_build-1.0-{tag}.whl", data=backend)]
    refused(small, 3, "tiny-build")
    small.edit("#more", "glibc = 34")
    assert list(built(small)["inputs"]["requires"]) == [f"tiny_build-1.0-{tag}.whl"]  # type: ignore[index]


def test_a_build_without_requirements_can_be_repeated(small: Stack, index: Index) -> None:
    own = '[build-system]\nrequires = []\nbuild-backend = "tiny_build"\nbackend-path = ["."]\n'
    for name, text in {**FILES, "pyproject.toml": own, "tiny_build.py": BACKEND}.items():
        path = small.home / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    small.edit("sdist = true", 'path = "here"')
    small.edit('requires = ["tiny-build==1.0"]', "requires = []")
    first = built(small)
    assert built(small, "--locked") == {**first, "cached": True}


def test_a_build_has_no_network(small: Stack, index: Index) -> None:
    address = index.root.removeprefix("http://")
    small.edit("#environment", f'SMALL_EXT_PROBE = "{address}"')
    built(small)


def test_a_bundle_takes_it_as_a_local_wheel(small: Stack) -> None:
    facts = built(small, "-o", str(small.output))
    head, _, _ = small.recipe.read_text().partition("[component.build]")
    source = f'path = "out/{facts["filename"]}"\nsha256 = "{facts["sha256"]}"\n'
    stack, _, component = head.rpartition("[[component]]")
    labelled = component.replace('"1.0"', '"1.0+avx512"')
    small.recipe.write_text(f"{stack}[[component]]{labelled}{source}")
    small.build().ok()
    listed = subprocess.run(["tar", "--zstd", "-tf", small.bundle], capture_output=True, text=True, check=True).stdout
    assert "site-packages/small_ext-1.0+avx512.dist-info/compose-source.json" in listed


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_patch_is_applied(small: Stack, tmp_path: Path) -> None:
    patch = small.home / "patches/small-ext/second.patch"
    patch.parent.mkdir(parents=True)
    patch.write_text(PATCH)
    small.edit("#more", 'patches = ["small-ext/second.patch"]')
    small.edit('CFLAGS = "{isa.flags}"', 'CFLAGS = "-O2"')
    facts = built(small)
    assert "1.0+source" in str(facts["filename"])
    assert answer(Path(str(facts["path"])), tmp_path) == 2


def test_a_patch_that_does_not_fit_exactly(small: Stack, index: Index) -> None:
    patch = small.home / "patches/small-ext/second.patch"
    patch.parent.mkdir(parents=True)
    patch.write_text(PATCH)
    small.edit("#more", 'patches = ["small-ext/second.patch"]')
    change(index, {"src/b_second.c": "\n" + SECOND})
    refused(small, 2, "small-ext/second.patch", "b_second.c", "does not fit")
    assert not compiled(small)


def test_a_missing_patch(small: Stack) -> None:
    small.edit("#more", 'patches = ["small-ext/absent.patch"]')
    refused(small, 2, "no such patch", "absent.patch")


def test_another_sdist_under_the_locked_name(small: Stack, index: Index) -> None:
    built(small)
    shutil.rmtree(small.store)
    change(index, {"src/b_second.c": "int second(void) { return 3; }\n"})
    refused(small, 4, "small_ext-1.0.tar.gz", "expected sha256")
    assert len(compiled(small)) == 2


def test_a_local_folder(small: Stack) -> None:
    for name, text in FILES.items():
        path = small.home / "here" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    small.edit("sdist = true", 'path = "here"')
    first = built(small)
    (small.home / "here/src/b_second.c").write_text(SECOND.replace("1", "7"))
    assert built(small)["key"] != first["key"]


def test_a_backend_of_the_source_itself_needs_no_requirement(small: Stack, index: Index) -> None:
    own = '[build-system]\nrequires = []\nbuild-backend = "tiny_build"\nbackend-path = ["."]\n'
    change(index, {"pyproject.toml": own, "tiny_build.py": BACKEND})
    small.edit('requires = ["tiny-build==1.0"]', "requires = []")
    facts = built(small)
    assert facts["inputs"]["requires"] == {}  # type: ignore[index]


def test_a_local_archive_with_another_digest(small: Stack) -> None:
    (small.home / "s.tar.gz").write_bytes(sdist(FILES))
    small.edit("sdist = true", f'path = "s.tar.gz"\nsha256 = "{"0" * 64}"')
    refused(small, 4, "not the one with this sha256", "build.path")


def test_a_commit_with_its_submodules(tmp_path: Path) -> None:
    def git(folder: Path, *more: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
        return subprocess.run(["git", *who, *more], cwd=folder, check=True, capture_output=True, text=True).stdout

    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder in (inner, outer):
        folder.mkdir()
        git(folder, "init", "-q")
        (folder / "file").write_text(folder.name)
        git(folder, "add", "file")
        git(folder, "commit", "-qm", "one")
    git(outer, "submodule", "--quiet", "add", inner.as_uri(), "below")
    git(outer, "commit", "-qm", "two")
    commit = git(outer, "rev-parse", "HEAD").strip()
    checkout(outer.as_uri(), commit, tmp_path / "tree", protocols="file")
    assert (tmp_path / "tree/below/file").read_text() == "inner"
    with pytest.raises(FetchError):
        checkout(outer.as_uri(), "0" * 40, tmp_path / "none", protocols="file")
    with pytest.raises(FetchError, match="exit status"):
        checkout(outer.as_uri(), commit, tmp_path / "refused")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def wait_for(condition: object, seconds: float = 40.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running_below(folder: Path) -> list[str]:
    """Command lines of processes that name a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            found.append(line)
    return found


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_goes_on(small: Stack, how: signal.Signals) -> None:
    gate = small.home / "gate"
    gate.touch()
    process = small.start([*small.words(output=False, command="wheel"), NAME])
    wait_for(lambda: compiled(small) == ["src/a_first.c"])
    wait_for(lambda: any("sleep" in line or "while test" in line for line in running_below(gate)))
    process.send_signal(how)
    process.communicate(timeout=30)
    wait_for(lambda: not running_below(small.store) and not running_below(gate), 10)
    gate.unlink()
    done = small.compose(*words(small)).ok()
    assert "goes on with the source of an earlier run" in done.err
    assert compiled(small) == ["src/a_first.c", "src/b_second.c"]


def test_two_at_once_build_it_once(small: Stack) -> None:
    built_one = [small.start([*small.words(output=False, command="wheel"), NAME]) for _ in range(2)]
    outputs = [small.end(process).ok().out for process in built_one]
    assert sum("built before" in text for text in outputs) == 1
    assert compiled(small) == ["src/a_first.c", "src/b_second.c"]


def test_a_build_requirement_that_the_recipe_forgot(small: Stack, index: Index) -> None:
    change(index, {"pyproject.toml": FILES["pyproject.toml"].replace('["tiny-build"]', '["tiny-build", "forgotten"]')})
    refused(small, 5, "build requirements are not complete", "forgotten", "build.requires")
    assert not compiled(small)


def test_a_build_requirement_that_no_index_has(small: Stack) -> None:
    small.edit('"tiny-build==1.0"', '"tiny-build==1.0", "absent-tool==3"')
    refused(small, 3, "absent-tool")


def test_a_compiler_error_is_shown_and_the_log_kept(small: Stack, index: Index) -> None:
    change(index, {"src/b_second.c": "int second(void) { return wrong; }\n"})
    done = refused(small, 5, "the build failed", "wrong", "logs/small-ext-1.0+avx512-")
    (log,) = (small.store / "logs").iterdir()
    assert "wrong" in log.read_text()
    assert str(log) in done.err
    assert list((small.store / "builds").iterdir())


def test_another_distribution_than_was_asked_for(small: Stack) -> None:
    small.edit('name = "small-ext"\nversion = "1.0"', 'name = "small-ext"\nversion = "1.0.1"')
    small.edit("sdist = true", 'path = "s.tar.gz"')
    (small.home / "s.tar.gz").write_bytes(sdist(FILES))
    refused(small, 5, "another distribution", "small_ext-1.0-")


@pytest.mark.parametrize(("key", "told"), [("disk", "too little disk"), ("memory", "too little memory")])
def test_a_machine_that_is_too_small_is_told_before_anything_is_fetched(
    small: Stack, index: Index, key: str, told: str
) -> None:
    small.edit("#more", f"{key} = 1_000_000_000_000_000")
    refused(small, 10, told, "1000000.0")
    assert not index.gets("/files/small_ext-1.0.tar.gz")


def test_a_full_disk_in_the_middle(small: Stack, index: Index) -> None:
    change(index, {"src/b_second.c": "char big[24 << 20] = {1}; int second(void) { return big[0]; }\n"})
    with small_disk(small.store, 16) as grow:
        small.compose(*words(small)).refused(10, "No space left", "Free some space")
        grow(200)
        small.compose(*words(small)).ok()
    assert compiled(small).count("src/a_first.c") == 1


def test_a_component_without_a_source(small: Stack) -> None:
    small.compose("wheel", "nothing", "--recipe", str(small.recipe), *TARGET).refused(2, "no component 'nothing'")


def test_a_changed_build_is_not_made_from_its_old_lock(small: Stack) -> None:
    built(small)
    small.edit('requires = ["tiny-build==1.0"]', 'requires = ["tiny-build>=1.0"]')
    small.compose(*words(small, "--locked")).refused(3, "does not fit the recipe any more", "build-small-ext")

"""What goes wrong around a build: a clear error, nothing half-written, and the next run goes on from there."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import First, forget
from tests.servers import File, Index, drips, sends
from tests.stack import COMPOSE, EXTENSION, NAME, UNRESOLVED, Stack, project, serve, shared_object, wheels
from tests.wheels import Entry, build_wheel, record_entry, record_rows, wheel_entries, wheel_filename, write_zip

ROOT = os.geteuid() == 0
APP = "app-1.0-py3-none-any.whl"
HOOK = "hook-1.0-py3-none-any.whl"


@pytest.fixture
def index() -> Iterator[Index]:
    """An index of this test's own, with the wheels of the small stack."""
    with Index() as server:
        serve(server, wheels())
        yield server


def unlocked(stack: Stack, index: Index) -> Stack:
    """The stack on another index, and without its lock."""
    stack.lock.unlink()
    return stack.fresh(stack.store.parent, home=stack.home, index_url=index.url)


def on(stack: Stack, index: Index) -> Stack:
    """The stack and its lock on another index."""
    return stack.fresh(stack.store.parent, home=stack.home, index_url=index.url)


def swap(index: Index, filename: str, data: bytes) -> None:
    """Serve another wheel under a name, as if it had always been there."""
    index.projects[project(filename)] = [File(filename=filename, data=data)]


def without_artifacts(stack: Stack) -> None:
    shutil.rmtree(stack.store / "artifacts")


def nothing_left(stack: Stack) -> None:
    assert stack.leftovers() == []
    assert not stack.bundle.exists()


def goes_on(stack: Stack, first: First) -> None:
    """The next run finishes, and makes what the quiet one made."""
    stack.build().ok()
    assert stack.digest() == first.digest
    assert stack.leftovers() == []


# --- the request ------------------------------------------------------------------------------------------------------

REQUESTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sm 61": (("--sm", "61", "--isa", "avx512"), ("cannot serve SM 61", "sm75 and above", "80, 86, 89, 90")),
    "sm 75": (("--sm", "75", "--isa", "avx512"), ("cannot serve SM 75", "neither sm_75 code nor PTX")),
    "sm 7": (("--sm", "7", "--isa", "avx512"), ("7",)),
    "sm abc": (("--sm", "abc", "--isa", "avx512"), ("abc",)),
    "isa": (("--sm", "90", "--isa", "avx511"), ("avx511", "avx512")),
    "python": (("--sm", "90", "--isa", "avx512", "--python", "3.10"), ("3.10",)),
    "recipe": (("--sm", "90", "--isa", "avx512", "--recipe", "sglagn"), ("sglagn", "Did you mean 'sglang'?")),
    "no target": ((), ("--sm",)),
    "jobs": (("--sm", "90", "--isa", "avx512", "-j0"), ("0",)),
    "both": (("--sm", "90", "--isa", "avx512", "--locked", "--frozen"), ("contradict",)),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_the_shipped_recipe_cannot_serve_is_said_at_once(name: str, fresh: Stack) -> None:
    words, told = REQUESTS[name]
    fresh.compose("build", "-o", str(fresh.output), *words).refused(2, *told)
    assert not fresh.output.exists()


def test_a_recipe_that_cannot_be_meant_names_the_key(fresh: Stack) -> None:
    fresh.edit("as-of", "as-off")
    fresh.build().refused(2, "as-off", "as-of")


def test_a_changed_recipe_is_not_built_from_its_old_lock(stack: Stack) -> None:
    stack.edit("2026-03-10T00:00:00Z", "2026-03-11T00:00:00Z")
    stack.build("--locked").refused(3, stack.lock.name, "the recipe changed", "compose lock")
    nothing_left(stack)
    stack.build("--frozen").ok()


def test_no_lock_and_no_index_is_a_lock_error(stack: Stack) -> None:
    stack.lock.unlink()
    stack.build("--offline").refused(3, "there is no lock")


def test_a_damaged_lock_is_named(stack: Stack) -> None:
    stack.lock.write_text(stack.lock.read_text()[:200])
    stack.build().refused(3, stack.lock.name)


# --- the index --------------------------------------------------------------------------------------------------------


def test_a_wheel_that_the_index_lacks_for_the_target(warm: Stack, index: Index) -> None:
    data = build_wheel("native-ext", "1.0", {"native_ext/__init__.py": b""}, tag="py3-none-manylinux_2_17_aarch64")
    index.projects["native-ext"] = [
        File(filename=wheel_filename("native-ext", "1.0", "py3-none-manylinux_2_17_aarch64"), data=data)
    ]
    stack = unlocked(warm, index)
    stack.build().refused(3, "native-ext")
    nothing_left(stack)
    assert not stack.lock.exists()


def test_other_bytes_than_the_locked_ones_are_never_used(warm: Stack, index: Index, first: First) -> None:
    without_artifacts(warm)
    stack = on(warm, index)
    index.faults[APP] = sends(wheels()[APP][:-1] + b"\1")
    stack.build().refused(4, APP, "sha256")
    nothing_left(stack)
    assert list((stack.store / "artifacts").rglob(APP)) == []
    index.faults.clear()
    goes_on(stack, first)


def test_an_index_that_is_down(warm: Stack, index: Index, first: First) -> None:
    without_artifacts(warm)
    stack = on(warm, index)
    index.down = True
    stack.build().refused(4, "503")
    nothing_left(stack)
    index.down = False
    goes_on(stack, first)


def test_an_index_that_nobody_listens_at(warm: Stack) -> None:
    without_artifacts(warm)
    stack = warm.fresh(warm.store.parent, home=warm.home, index_url="http://127.0.0.1:9/simple/")
    stack.build().refused(4, "127.0.0.1", "--offline")
    stack.lock.unlink()
    stack.build().refused(4, "127.0.0.1")
    nothing_left(stack)


def test_offline_with_nothing_at_hand(warm: Stack) -> None:
    without_artifacts(warm)
    warm.build("--offline").refused(4, APP, "compose fetch -o WHEELHOUSE")
    nothing_left(warm)


# --- wheels that must not be composed ---------------------------------------------------------------------------------


def put(stack: Stack, index: Index, filename: str, data: bytes) -> Stack:
    swap(index, filename, data)
    return unlocked(stack, index)


def test_two_owners_of_one_path(warm: Stack, index: Index) -> None:
    data = build_wheel("hook", "1.0", {"hook.py": b"", "app/core.py": b"mine\n"})
    stack = put(warm, index, HOOK, data)
    stack.build().refused(8, "app/core.py", "hook", "Prune it")
    nothing_left(stack)


def test_a_wheel_that_writes_outside(warm: Stack, index: Index, tmp_path: Path) -> None:
    data = build_wheel("hook", "1.0", {"hook.py": b""}, extra=[Entry(name="../../../../escaped.py", data=b"x")])
    stack = put(warm, index, HOOK, data)
    stack.build().refused(6, HOOK, "escaped.py")
    nothing_left(stack)
    assert list(tmp_path.rglob("escaped*")) == []


def test_a_wheel_with_a_link(warm: Stack, index: Index) -> None:
    link = Entry(name="passwd", data=b"/etc/passwd", mode=0o120777)
    stack = put(warm, index, HOOK, build_wheel("hook", "1.0", {"hook.py": b""}, extra=[link]))
    stack.build().refused(6, HOOK, "passwd")


def test_content_that_is_not_what_record_says(warm: Stack, index: Index) -> None:
    entries = wheel_entries("hook", "1.0", {"hook.py": b"loaded = True\n"})
    record = "hook-1.0.dist-info/RECORD"
    rows = record_rows([replace(entries[0], data=b"something else"), *entries[1:]], record)
    rows[0] = (rows[0][0], rows[0][1], str(len(entries[0].data)))
    stack = put(warm, index, HOOK, write_zip([*entries, record_entry(record, rows)]))
    stack.build().refused(6, HOOK, "RECORD")
    nothing_left(stack)


def test_a_pth_file_that_the_recipe_does_not_allow(warm: Stack, index: Index) -> None:
    data = build_wheel("hook", "1.0", {"hook.py": b"", "hook.pth": b"import os; os.system('true')\n"})
    stack = put(warm, index, HOOK, data)
    stack.build().refused(2, "hook.pth", "does not allow", "sha256")
    nothing_left(stack)


def test_a_library_that_nothing_provides_is_found_while_planning(warm: Stack, index: Index) -> None:
    (name,) = (one for one in wheels() if one.startswith("native_ext"))
    orphan = shared_object(UNRESOLVED, "libext.so", "libnowhere.so")
    files = {"native_ext/__init__.py": b"", "native_ext/libext.so": orphan}
    stack = put(warm, index, name, build_wheel("native-ext", "1.0", files, tag="py3-none-manylinux_2_17_x86_64"))
    done = stack.build().refused(9, "libnowhere.so", "native_ext/libext.so")
    assert "composing" not in done.err
    nothing_left(stack)


def test_a_patch_that_does_not_fit(warm: Stack, index: Index) -> None:
    data = build_wheel("app", "1.0", {"app/__init__.py": b"", "app/core.py": b"x = 1\n", "app/tests/a.py": b""})
    stack = put(warm, index, APP, data)
    stack.build().refused(2, "core.py")
    nothing_left(stack)


def test_a_prune_rule_that_matches_nothing(warm: Stack) -> None:
    warm.edit("app/tests/**", "app/test/**")
    warm.build().refused(2, "app/test/**", "matches no file")
    nothing_left(warm)


# --- the store --------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def become_a_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_bytes(b"other bytes")
    path.unlink()
    path.symlink_to(target)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (cut, flip, become_a_link, become_a_folder, Path.unlink)


def compressed(stack: Stack, kind: str) -> Path:
    """The bytes of the one blob, of the interpreter's layer, or of the largest other layer."""
    paths = list((stack.store / "objects" / kind.removeprefix("interpreter ")).rglob("*.zst"))
    return sorted(paths, key=lambda path: path.stat().st_size)[-2 if kind == "layer" else -1]


@pytest.mark.parametrize(
    ("kind", "damage"), [*itertools.product(("layer", "blob"), DAMAGES), ("interpreter layer", flip)]
)
def test_damaged_bytes_of_the_store_are_never_used(
    kind: str, damage: Callable[[Path], Any], stack: Stack, first: First
) -> None:
    damage(compressed(stack, kind))
    done = stack.build()
    if done.code:
        done.refused(4, "damaged", "run the same command again")
        nothing_left(stack)
    goes_on(stack, first)


@pytest.mark.parametrize(
    ("kind", "damage"), [*itertools.product(("blob", "survey", "objects"), (cut, Path.unlink)), ("layer", cut)]
)
def test_damaged_descriptions_in_the_store_are_made_again(
    kind: str, damage: Callable[[Path], Any], stack: Stack, first: First
) -> None:
    for path in list((stack.store / "objects" / kind).rglob("*.json")):
        damage(path)
    goes_on(stack, first)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_damaged_downloads_are_fetched_again(damage: Callable[[Path], Any], warm: Stack, first: First) -> None:
    for path in [path for path in (warm.store / "artifacts").rglob("*.whl") if path.is_file()]:
        damage(path)
    goes_on(warm, first)


def test_a_flipped_download_is_never_composed(warm: Stack, first: First) -> None:
    (path,) = (warm.store / "artifacts").rglob("core_lib-*.whl")
    flip(path)
    warm.build().refused(4, "damaged", str(path), "run the same command again")
    nothing_left(warm)
    goes_on(warm, first)


# --- disk and permissions ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system of `size` MiB at a folder; calling what this gives makes it larger."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("only root with the right to mount can make a small disk")
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,size={more}m", folder], check=True) and None
    finally:
        subprocess.run(["umount", folder], check=True)


def test_the_output_disk_is_full(stack: Stack, first: First) -> None:
    with small_disk(stack.output, 8) as grow:
        stack.build().refused(10, "No space left", str(stack.output), "Free some space")
        nothing_left(stack)
        grow(128)
        goes_on(stack, first)


@pytest.mark.parametrize("size", [4, 24])
def test_the_disk_of_the_store_is_full(fresh: Stack, first: First, size: int) -> None:
    """4 MiB: while fetching; 24: while the interpreter is relocated."""
    with small_disk(fresh.store, size) as grow:
        fresh.build().refused(10, "No space left", "Free some space")
        nothing_left(fresh)
        grow(256)
        goes_on(fresh, first)


@pytest.mark.parametrize("limit", [1 << 20, 20 << 20])
def test_files_may_not_grow(warm: Stack, first: First, limit: int) -> None:
    without_artifacts(warm)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    warm.build(preexec_fn=limited).refused(10, "File too large")
    nothing_left(warm)
    goes_on(warm, first)


def as_a_plain_user() -> list[str]:
    """Words that take root's right to write anywhere from a command."""
    rights = "-dac_override,-dac_read_search,-fowner"
    return ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if ROOT else []


@pytest.mark.parametrize("which", ["output", "store"])
def test_a_folder_that_may_not_be_written(which: str, warm: Stack, first: First) -> None:
    stack = warm
    folder = {"output": stack.output, "store": stack.store}[which]
    folder.mkdir(exist_ok=True)
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        stack.run([*as_a_plain_user(), *stack.words()]).refused(10, "Permission denied", str(folder))
    finally:
        for path in folders:
            path.chmod(0o755)
    nothing_left(stack)
    goes_on(stack, first)


def test_a_read_only_disk(stack: Stack, first: First) -> None:
    with small_disk(stack.output, 64):
        subprocess.run(["mount", "-o", "remount,ro", stack.output], check=True)
        stack.build().refused(10, "Read-only file system", str(stack.output))
        subprocess.run(["mount", "-o", "remount,rw", stack.output], check=True)
        goes_on(stack, first)


def test_a_file_where_the_output_folder_must_be(stack: Stack) -> None:
    stack.output.write_text("mine")
    stack.build().refused(10, str(stack.output))
    assert stack.output.read_text() == "mine"


def test_a_folder_where_the_bundle_must_be(stack: Stack) -> None:
    stack.bundle.mkdir(parents=True)
    stack.build().refused(10, "is a folder", NAME)


def test_a_store_that_is_a_file(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    broken = stack.fresh(tmp_path, home=stack.home, store=file)
    broken.build().refused(10, str(file))


# --- two at once, and interruptions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["store and output", "store"])
def test_builds_at_once_make_the_same_bundle(shared: str, warm: Stack, first: First, tmp_path: Path) -> None:
    others = [warm] * 3 if shared == "store and output" else [
        warm, *(warm.fresh(tmp_path / str(n), home=warm.home, store=warm.store) for n in range(2))
    ]  # fmt: skip
    processes = [one.start(one.words()) for one in others]
    for one, process in zip(others, processes, strict=True):
        one.end(process).ok()
        assert one.digest() == first.digest
    # Only now: whoever ends first may find what the next one still holds open.
    assert [one.leftovers() for one in others] == [[]] * 3


def test_builds_at_once_from_nothing(fresh: Stack, first: First) -> None:
    processes = [fresh.start(fresh.words()) for _ in range(2)]
    for process in processes:
        fresh.end(process).ok()
    assert fresh.digest() == first.digest
    assert fresh.leftovers() == []


def kill_after(stack: Stack, seconds: float) -> None:
    process = stack.start(stack.words())
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.communicate()


def whole_or_absent(stack: Stack, first: First) -> None:
    """The bundle appears whole; its checksum file follows."""
    assert not stack.bundle.exists() or stack.bundle.stat().st_size == first.stack.bundle.stat().st_size


def test_a_cold_build_that_is_killed_again_and_again_goes_on(fresh: Stack, first: First) -> None:
    rng = random.Random(2)
    for _ in range(5):
        kill_after(fresh, rng.uniform(0.3, 2.0))
        whole_or_absent(fresh, first)
    goes_on(fresh, first)


def test_a_build_that_is_killed_while_it_composes_goes_on(warm: Stack, first: First) -> None:
    rng = random.Random(3)
    for _ in range(5):
        kill_after(warm, rng.uniform(0.3, 1.2))
        whole_or_absent(warm, first)
        forget(warm)
        warm.bundle.unlink(missing_ok=True)
    goes_on(warm, first)


def while_packing(stack: Stack, act: Callable[[subprocess.Popen[str]], None]) -> subprocess.Popen[str]:
    """Start a build and act when it has begun to write its output."""
    process = stack.start(stack.words())
    deadline = time.monotonic() + 60
    while process.poll() is None and not any(path.stat().st_size for path in stack.output.glob(".*.tmp")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    act(process)
    return process


def test_a_build_that_is_killed_while_it_writes_leaves_nothing_for_good(warm: Stack, first: First) -> None:
    while_packing(warm, lambda process: process.kill()).communicate()
    assert not warm.bundle.exists()
    goes_on(warm, first)


SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.mark.parametrize(("sent", "code", "word"), SIGNALS)
def test_an_interrupted_build_cleans_up(sent: signal.Signals, code: int, word: str, warm: Stack, first: First) -> None:
    process = while_packing(warm, lambda process: process.send_signal(sent))
    warm.end(process).refused(code, word, "goes on from here")
    nothing_left(warm)
    goes_on(warm, first)


@pytest.mark.parametrize(("sent", "code", "word"), SIGNALS)
def test_an_interrupted_download_ends_soon(
    sent: signal.Signals, code: int, word: str, warm: Stack, index: Index, first: First
) -> None:
    without_artifacts(warm)
    stack = on(warm, index)
    index.faults[APP] = drips(0.05)
    process = stack.start(stack.words())
    while not index.gets(f"/files/{APP}"):
        time.sleep(0.01)
    time.sleep(0.3)
    begun = time.monotonic()
    process.send_signal(sent)
    done = stack.end(process, begun).refused(code, word)
    assert done.seconds < 5
    nothing_left(stack)
    index.faults.clear()
    goes_on(stack, first)


@pytest.mark.parametrize("moment", [0.2, 0.5, 1.2, 3.0])
@pytest.mark.parametrize(("sent", "code", "word"), SIGNALS)
def test_an_interruption_at_any_time_is_said_in_one_line(
    moment: float, sent: signal.Signals, code: int, word: str, fresh: Stack, first: First
) -> None:
    process = fresh.start(fresh.words())
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.send_signal(sent)
    done = fresh.end(process)
    # Before our handler stands, the interpreter's own answer counts.
    assert done.code in (code, -sent, 0), done
    assert fresh.leftovers() == []


# --- nobody listens ---------------------------------------------------------------------------------------------------


def test_a_closed_pipe_ends_without_a_word(stack: Stack) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = stack.run(stack.words("--dry-run"), stdout=write)
    finally:
        os.close(write)
    assert done.code == 1
    assert "Broken" not in done.err


@pytest.mark.parametrize("command", [["--version"], ["build", "--help"]])
def test_a_closed_pipe_of_help(command: list[str], stack: Stack) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = stack.run([*COMPOSE, *command], stdout=write)
    finally:
        os.close(write)
    assert "Exception ignored" not in done.err


def test_no_standard_output_at_all(stack: Stack, first: First) -> None:
    done = stack.run(["sh", "-c", 'exec "$@" >&-', "sh", *stack.words()])
    assert done.code == 0, done.err
    assert stack.digest() == first.digest


def test_a_full_standard_output(stack: Stack) -> None:
    with Path("/dev/full").open("w") as full:
        done = stack.run(stack.words("--dry-run"), stdout=full)
    assert done.code == 10, done.err
    assert "No space left" in done.err


def test_the_extension_of_the_small_stack_does_need_its_neighbour() -> None:
    """Otherwise the tests of RPATH would prove nothing."""
    assert b"libcore.so" in shared_object(EXTENSION, "libext.so", "libcore.so")

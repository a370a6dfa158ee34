"""A matrix of the small real stack on this machine: shared steps once, resumed, and what fails kept apart."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.integration.conftest import First
from tests.stack import COMPOSE, NAME, Done, Stack


def words(stack: Stack, *more: str, sm: str = "90,100") -> list[str]:
    """The command line of a matrix. It imports nothing, nor makes unzstd, unless told, as builds in these tests."""
    quick = [f"--no-{name}" for name in ("imports", "unzstd") if f"--{name}" not in more]
    named = ["--sm", sm] if sm else []
    return [*COMPOSE, "matrix", "--recipe", str(stack.recipe), *named, "--isa", "avx512", "--json",
            "-o", str(stack.output), *quick, *more]  # fmt: skip


def read(done: Done) -> tuple[list[dict], dict]:
    """The changes and the report."""
    lines = [json.loads(line) for line in done.out.splitlines()]
    return [line["change"] for line in lines[:-1]], lines[-1]["report"]


def performed(changes: list[dict], kind: str = "done") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for change in changes:
        if change["kind"] == kind:
            found.setdefault(change["step"], []).append(change["subject"])
    return found


def layers(stack: Stack) -> set[Path]:
    return set((stack.store / "objects/layer").rglob("*.zst"))


def test_targets_share_their_layers_and_are_what_a_build_makes(warm: Stack, first: First) -> None:
    changes, report = read(warm.run(words(warm, "--imports")).ok())
    assert warm.digest() == first.digest
    done = performed(changes)
    assert sorted(done["layer"]) == ["app", "core-lib", "hook", "native-ext"]
    assert len(done["plan"]) == len(done["pack"]) == 2
    assert sorted(done["survey"]) == sorted(done["layer"])
    assert sorted(done["objects"]) == ["core-lib", "native-ext"]
    sm90, sm100 = report["targets"]
    assert [(one["steps"], one["shared"]) for one in (sm90["columns"]["layers"], sm100["columns"]["layers"])] == [
        (4, 0), (0, 4),
    ]  # fmt: skip
    assert (sm90["fate"], sm100["fate"]) == ("built", "built")
    # That the modules of the first import is known from the build that it is compared with.
    assert sm100["columns"]["imports"]["seconds"] > 0
    # But for the bundle's own files, which name it, the second is the first.
    assert report["bundles"] - report["stored"] > 0.98 * sm90["bytes"]
    assert Path(sm100["path"]).stat().st_size == sm100["bytes"]

    changes, report = read(warm.run(words(warm, "--imports")).ok())
    assert [one["fate"] for one in report["targets"]] == ["up to date", "up to date"]
    assert set(performed(changes)) == {"plan", "pack"}
    assert warm.leftovers() == [one.name for one in warm.output.iterdir() if "sm100" in one.name]


def test_gpus_and_variants_and_a_remote_that_a_second_machine_takes_from(
    warm: Stack, first: First, tmp_path: Path
) -> None:
    second = warm.fresh(tmp_path / "second")
    shutil.copytree(warm.store, second.store)
    more = ("--gpu", "H100", "--variant", NAME.replace("sm90", "sm100"), "--remote", f"file://{tmp_path}/shared")
    changes, report = read(warm.run(words(warm, *more, sm="")).ok())
    assert [one["name"] for one in report["targets"]] == [NAME, NAME.replace("sm90", "sm100")]
    assert sorted(performed(changes)["layer"]) == ["app", "core-lib", "hook", "native-ext"]
    assert (report["remote"]["fetched"], report["remote"]["warnings"]) == (0, [])
    assert report["remote"]["stored"] >= 4
    changes, report = read(second.run(words(second, *more, sm="")).ok())
    assert "layer" not in performed(changes)
    assert [one["columns"]["layers"]["known"] for one in report["targets"]] == [4, 0]
    assert report["remote"]["fetched"] >= 4
    assert second.digest() == warm.digest() == first.digest


def test_what_fails_before_another_target_asks_for_it_fails_that_one_too(warm: Stack) -> None:
    """Both need a file that cannot be had; with one core the first is told so before the second is planned."""
    (wheel,) = (warm.store / "artifacts").rglob("hook-1.0-*.whl")
    shutil.rmtree(wheel.parent)
    line = words(warm, "--frozen", "--offline", "--keep-going", "-j", "1")
    done = warm.run(line).refused(4, "2 of 2 targets failed", wheel.name)
    _, report = read(done)
    assert [(one["fate"], one["exit_code"]) for one in report["targets"]] == [("failed", 4)] * 2
    assert report["targets"][0]["reason"] == report["targets"][1]["reason"]


def test_what_is_refused_is_told_and_is_no_failure(stack: Stack) -> None:
    line = words(stack, sm="90,103,75")
    line.remove("--json")
    done = stack.run(line).ok()
    for text in (done.out, done.err):
        assert "small sm103 avx512: CUDA 12.8 emits no code for SM 103; small 1.0 is not offered for SM 103" in text
        assert "small sm75 avx512: small 1.0 is not offered for SM 75" in text
    assert "pack small sm90 avx512: " in done.err
    assert "1 built, 2 refused in " in done.out
    assert "layers: " in done.out


def test_a_matrix_of_refused_targets_is_an_error(stack: Stack) -> None:
    stack.run(words(stack, sm="103,75")).refused(2, "SM 103", "SM 75")


@pytest.mark.parametrize("keep_going", [True, False])
def test_a_target_that_fails_ends_alone_if_told_so(warm: Stack, keep_going: bool) -> None:
    bad = warm.home / "bad.toml"
    text = warm.recipe.read_text().replace('name = "small"', 'name = "bad"')
    bad.write_text(text.replace('paths = ["app/tests/**"]', 'paths = ["app/nothing/**"]'))
    shutil.copy(warm.lock, warm.home / warm.lock.name.replace("small", "bad"))
    more = ["--frozen", "-j", "1", *(["--keep-going"] if keep_going else [])]
    # The one that fails comes first.
    line = words(warm, *more, sm="90")
    line[line.index("--recipe") : line.index("--recipe") + 2] = ["--recipe", str(bad), "--recipe", str(warm.recipe)]
    done = warm.run(line).refused(2, "1 of 2 targets failed", "app/nothing/**")
    _, report = read(done)
    assert [one["fate"] for one in report["targets"]] == ["failed", "built" if keep_going else "given up"]
    assert warm.bundle.exists() == keep_going


def test_a_killed_matrix_goes_on_where_it_was(warm: Stack, first: First) -> None:
    process = warm.start(words(warm))
    assert process.stdout
    for line in process.stdout:
        change = json.loads(line)["change"]
        if (change["kind"], change["step"]) == ("done", "layer"):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    made = layers(warm)
    assert made
    before = {path: path.stat().st_mtime_ns for path in made}
    read(warm.run(words(warm)).ok())
    assert warm.digest() == first.digest
    assert {path: path.stat().st_mtime_ns for path in made} == before


def test_an_interrupted_matrix_ends_its_processes(warm: Stack) -> None:
    process = warm.start(words(warm), start_new_session=True)
    assert process.stdout
    for line in process.stdout:
        if json.loads(line)["change"]["kind"] == "started":
            break
    os.killpg(process.pid, signal.SIGINT)
    done = warm.end(process)
    assert (done.code, "interrupted" in done.err) == (130, True)
    deadline = time.monotonic() + 10
    while left := [name for name in Path("/proc").glob("[0-9]*/stat") if _session(name) == process.pid]:
        assert time.monotonic() < deadline, [name.with_name("cmdline").read_text() for name in left]
        time.sleep(0.05)
    assert warm.leftovers() == []


def _session(path: Path) -> int:
    try:
        return int(path.read_text().rpartition(")")[2].split()[3])
    except OSError:
        return 0


def test_two_at_once_make_every_layer_once(warm: Stack, first: First, tmp_path: Path) -> None:
    both = [warm, warm.fresh(tmp_path / "other", store=warm.store)]
    before = layers(warm)
    runs = [one.start(words(one, sm="90")) for one in both]
    for one, run in zip(both, runs, strict=True):
        read(one.end(run).ok())
        assert one.digest() == first.digest
    assert len(layers(warm) - before) == 4
    assert warm.leftovers() == []

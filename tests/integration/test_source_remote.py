"""Wheels built from source that machines share: built once, taken whole or not at all, and never for something else."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from composer.interpreter import choose_python
from composer.model.target import Target
from composer.remote import open_remote
from composer.steps.budget import records_here
from composer.steps.load import load_recipe, load_targets
from composer.steps.locks import LockOptions
from composer.steps.source import Job, Request, find_built, prepare_build
from composer.store import Store
from tests.integration.test_source import built, compiled, words
from tests.remotes import Relay, s3_server
from tests.servers import File, Index
from tests.sources import NAME, offer, write_recipe
from tests.stack import COMPOSE, PTH, PYTHON, Stack
from tests.wheels import build_wheel, wheel_filename

pytestmark = pytest.mark.skipif(shutil.which("ninja") is None, reason="the small source is built by ninja")
SOURCES = ["src/a_first.c", "src/b_second.c"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A machine that built the wheel and put it into `shared` beside its store. Tests do not change it."""
    with Index() as index:
        offer(index)
        for name, files in ((NAME, {"small_ext.txt": b"prebuilt"}), ("hook", {"hook.py": PTH})):
            wheel = build_wheel(name, "1.0", files, tag="py3-none-any")
            index.add(name, File(filename=wheel_filename(name, "1.0", "py3-none-any"), data=wheel))
        stack = write_recipe(tmp_path_factory.mktemp("first"), index.url)
        built(stack, "--remote", (stack.home / "shared").as_uri())
        assert compiled(stack) == SOURCES
        yield stack


@pytest.fixture
def remote(first: Stack, tmp_path: Path) -> Path:
    """A copy of what it put there."""
    return Path(shutil.copytree(first.home / "shared", tmp_path / "shared"))


@pytest.fixture
def other(first: Stack, tmp_path: Path) -> Stack:
    """A machine with the same recipe and a store of its own; what it compiles is counted with the first one's."""
    return first.fresh(tmp_path)


def job(stack: Stack, store: Store) -> Job:
    """What `compose wheel` decides, before anything is built."""
    loaded = load_recipe(str(stack.recipe))
    target = Target(sms=(90,), isa="avx512", cuda=loaded.recipe.cuda, python=PYTHON)
    request = Request(loaded=loaded, component=loaded.recipe.component_of(NAME), target=target,
                      flags=load_targets().isa["avx512"].flags, python=choose_python((PYTHON,)),
                      lock=LockOptions(mode="frozen", offline=True))  # fmt: skip
    return prepare_build(request, store)


def record(remote: Path) -> Path:
    (found,) = (remote / "objects/wheel").rglob("*.json")
    return found


def content(remote: Path, suffix: str) -> Path:
    """The file of the only wheel there that ends so: the wheel, or what is said of it."""
    files = {one["suffix"]: one["sha256"] for one in json.loads(record(remote).read_text())["files"]}
    return remote / "content" / files[suffix][:2] / files[suffix]


def put(remote: Path, suffix: str, data: bytes) -> None:
    """Let the remote have something else in its place, with a digest that is right."""
    said, sha256 = json.loads(record(remote).read_text()), hashlib.sha256(data).hexdigest()
    (row,) = (one for one in said["files"] if one["suffix"] == suffix)
    row |= {"size": len(data), "sha256": sha256}
    path = remote / "content" / sha256[:2] / sha256
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    record(remote).write_text(json.dumps(said))


def test_what_one_machine_built_another_takes(first: Stack, other: Stack, remote: Path) -> None:
    before = compiled(first)
    taken = built(other, "--remote", remote.as_uri(), "--frozen", "--offline")
    known = built(first)
    assert (taken["cached"], taken["sha256"], taken["inputs"]) == (True, known["sha256"], known["inputs"])
    assert str(taken["path"]).startswith(str(other.store))
    assert Path(str(taken["path"])).read_bytes() == Path(str(known["path"])).read_bytes()
    assert compiled(first) == before
    # What was built elsewhere says nothing of this machine's time, and is here now without the remote.
    assert records_here(Store(first.store)) != ()
    assert records_here(Store(other.store)) == ()
    assert built(other)["cached"] is True


def test_a_bundle_of_it_compiles_nothing(first: Stack, other: Stack, remote: Path) -> None:
    before = compiled(first)
    done = other.build("--remote", remote.as_uri()).ok()
    assert "source:   small-ext 1.0+avx512 from sha256:" in done.out
    assert compiled(first) == before


LIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "of other inputs": lambda said: {**said, "inputs": {**said["inputs"], "version": "9"}},
    "of another key": lambda said: {**said, "key": "0" * 64},
    "another distribution": lambda said: {**said, "filename": "other-1.0-py3-none-any.whl"},
    "another version": lambda said: {**said, "filename": "small_ext-2.0-py3-none-any.whl"},
    "a path": lambda said: {**said, "filename": f"../{said['filename']}"},
    "no wheel": lambda said: {**said, "filename": "../../evil.sh"},
    "other bytes": lambda said: {**said, "sha256": "0" * 64},
    "another size": lambda said: {**said, "size": said["size"] + 1},
}


@pytest.mark.parametrize("name", LIES)
def test_a_remote_that_says_something_else_is_told_and_not_believed(
    first: Stack, remote: Path, tmp_path: Path, name: str
) -> None:
    put(remote, ".json", json.dumps(LIES[name](json.loads(content(remote, ".json").read_bytes()))).encode())
    store = Store(tmp_path / "store", open_remote(remote.as_uri()))
    wanted = job(first, store)
    assert find_built(wanted) is None
    assert find_built(wanted) is None
    (warning,) = store.finish().warnings
    assert "is not used (" in warning
    assert not list((tmp_path / "store/artifacts").rglob("*.whl"))
    assert not list(tmp_path.rglob("evil.sh*"))


def test_what_is_built_in_its_place_takes_it(first: Stack, other: Stack, remote: Path, tmp_path: Path) -> None:
    put(remote, ".whl", b"no wheel at all")
    done = other.compose(*words(other, "--remote", remote.as_uri())).ok()
    assert "the wheel is not the one that its record is of" in done.err
    assert ", built in " in done.out
    assert find_built(job(first, Store(tmp_path / "third", open_remote(remote.as_uri()))))


def test_machines_that_build_the_same_at_once(first: Stack, tmp_path: Path) -> None:
    """Each has a store of its own; none waits for the other, and what both put there is sound."""
    url, both = (tmp_path / "empty").as_uri(), [first.fresh(tmp_path / name) for name in ("one", "two")]
    runs = [stack.start([*COMPOSE, *words(stack, "--json", "--remote", url)]) for stack in both]
    keys = {json.loads(stack.end(run).ok().out)["key"] for stack, run in zip(both, runs, strict=True)}
    assert len(keys) == 1
    assert "1 object, all sound" in first.compose("remote", "check", url).ok().out
    assert find_built(job(first, Store(tmp_path / "three", open_remote(url))))


def test_a_remote_in_s3_and_a_line_that_breaks_in_the_middle(
    first: Stack, remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path) as port, Relay(upstream=port) as relay:
        line = http.client.HTTPConnection("127.0.0.1", port)
        line.request("PUT", "/builds")
        assert line.getresponse().status == 200
        line.close()
        named = {"ENDPOINT_URL": f"http://127.0.0.1:{relay.port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b",
                 "DEFAULT_REGION": "us-east-1"}  # fmt: skip
        for name, value in named.items():
            monkeypatch.setenv(f"AWS_{name}", value)

        def machine(name: str, **how: Any) -> Store:
            return Store(tmp_path / name, open_remote("s3://builds/wheels", **how))

        filled = machine("filled")
        shutil.copytree(first.store / "objects/wheel", filled.root / "objects/wheel")
        assert filled.share() == 1
        assert filled.finish().stored == 1
        wheel = content(remote, ".whl").name
        relay.rule = lambda method, path: ("cut", 100) if method == "GET" and wheel in path else None
        cut = machine("cut", patience=1.5)
        assert find_built(job(first, cut)) is None
        assert len(cut.finish().warnings) == 1
        assert not list(cut.root.rglob("*.whl"))
        relay.rule = lambda _method, _path: None
        taken = find_built(job(first, machine("whole")))
        assert taken
        assert taken.path.read_bytes() == content(remote, ".whl").read_bytes()
        # Another CPU is another wheel, which nobody has.
        wanted = job(first, machine("whole"))
        for_avx2 = replace(wanted, request=replace(wanted.request, target=replace(wanted.request.target, isa="avx2"),
                                                   flags=("-mavx2",)))  # fmt: skip
        assert find_built(for_avx2) is None

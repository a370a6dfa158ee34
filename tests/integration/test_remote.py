"""A remote in S3: the second machine composes nothing; a line that fails, hangs, forbids or ends costs time only."""

from __future__ import annotations

import http.client
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from composer.cli.remote import remote
from composer.errors import FetchError
from composer.events import silent
from composer.remote import open_remote
from composer.steps.build import Built, Settings, build, prepare
from composer.steps.locks import LockOptions
from composer.steps.outline import Request, outline
from composer.steps.plan import Options
from composer.store import Store
from tests.integration.conftest import First
from tests.remotes import Relay, s3_server
from tests.stack import Stack

KEY = "ab" + "0" * 62
DATA = bytes(range(256)) * 400
BUCKET = "builds"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with a bucket; its port."""
    with s3_server(tmp_path_factory.mktemp("moto")) as port:
        line = http.client.HTTPConnection("127.0.0.1", port)
        line.request("PUT", f"/{BUCKET}")
        assert line.getresponse().status == 200
        line.close()
        yield port


@pytest.fixture
def relay(s3: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """The way to the server, as every machine of a test is told it."""
    with Relay(upstream=s3) as relay:
        named = {"ENDPOINT_URL": f"http://127.0.0.1:{relay.port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b",
                 "DEFAULT_REGION": "us-east-1"}  # fmt: skip
        for name, value in named.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield relay


class Farm:
    """Machines with a store each and one remote."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix

    def machine(self, name: str, **how: Any) -> Store:
        return Store(self.folder / name, open_remote(f"s3://{BUCKET}/{self.prefix}", **how))


@pytest.fixture
def farm(relay: Relay, tmp_path: Path) -> Farm:
    return Farm(tmp_path, tmp_path.name)


def _fill(store: Store, data: bytes = DATA) -> None:
    with store.writing("layer", KEY, ".zst") as path:
        path.write_bytes(data)
    store.save("layer", KEY, ["a value"])


def _is_here(store: Store) -> bool:
    return store.load("layer", KEY, list[str]) == ["a value"] and store.path("layer", KEY, ".zst").read_bytes() == DATA


def _compose(stack: Stack, store: Store) -> Built:
    asked = Request(recipe=str(stack.recipe), sm="90", isa="avx512", lock=LockOptions(mode="frozen"))
    settings = Settings(jobs=2, imports=False)
    prepared = prepare(outline(asked, store), store, settings, Options(), silent)
    return build(prepared, store, settings, stack.bundle, silent)


def test_a_bundle_that_one_machine_composed_another_only_joins(
    farm: Farm, first: First, warm: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in warm.environ.items():
        if name.startswith("PIP_"):
            monkeypatch.setenv(name, value)
    # The first machine has the interpreter and what was downloaded, and no layer of a wheel.
    shutil.rmtree(warm.store / "objects/content-1")
    shutil.copytree(warm.store, farm.folder / "one")
    one = farm.machine("one")
    assert _compose(warm, one).digest == first.digest
    sent = one.finish()
    assert sent.warnings == ()
    wheels = [layer for layer in _compose(warm, one).manifest.layers if layer.artifact]
    assert sent.stored >= 3 * len(wheels)
    # The second one has that, too; nothing there can compress a wheel's files any more.
    shutil.copytree(warm.store, farm.folder / "two")
    two = farm.machine("two")
    warm.bundle.unlink()
    monkeypatch.setattr("composer.steps.layer.compressor", None)
    monkeypatch.setattr("composer.steps.build.write_wheel", None)
    assert _compose(warm, two).digest == first.digest
    got = two.finish()
    assert (got.stored, got.warnings) == (0, ())
    assert got.fetched == sent.stored


def test_the_command_line(warm: Stack, first: First, tmp_path: Path) -> None:
    """One build fills an empty remote, another takes from it, and both say so."""
    second, remote = warm.fresh(tmp_path / "second"), ("--remote", f"file://{tmp_path}/shared")
    shutil.copytree(warm.store, second.store)
    assert "stored (" in warm.build(*remote).ok().out
    assert "fetched (" in second.build(*remote).ok().out
    assert second.digest() == warm.digest() == first.digest


def test_a_large_object_goes_in_pieces(farm: Farm, relay: Relay) -> None:
    one, data = farm.machine("one"), bytes(40 << 20)
    _fill(one, data)
    assert one.finish().stored == 1
    two = farm.machine("two")
    assert two.path("layer", KEY, ".zst").read_bytes() == data
    pieces = [seen.got for seen in relay.seen if seen.method == "GET" and "/content/" in seen.path]
    assert sorted(pieces)[-3:] == [8 << 20, 16 << 20, 16 << 20]


@pytest.mark.parametrize("action", [503, 404, 403, "drop", ("cut", 100)], ids=str)
def test_a_line_that_fails_while_reading_is_a_miss(farm: Farm, relay: Relay, action: Any) -> None:
    one = farm.machine("one")
    _fill(one)
    one.finish()
    for part in ("/objects/", "/content/"):
        relay.rule = lambda method, path, part=part: action if method == "GET" and part in path else None
        two = farm.machine(f"two{part.strip('/')}", patience=1.5)
        begun = time.monotonic()
        assert two.load("layer", KEY, list[str]) is None
        assert time.monotonic() - begun < 5
        assert not [path for name in ("objects", "tmp") for path in (two.root / name).rglob("*") if path.is_file()]
        assert len(two.finish().warnings) == (0 if (action, part) == (404, "/objects/") else 1)
    relay.rule = lambda _method, _path: None
    assert _is_here(farm.machine("three"))


def test_a_remote_that_hangs_is_left(farm: Farm, relay: Relay) -> None:
    relay.rule = lambda _method, _path: "hang"
    store = farm.machine("one", patience=0.5)
    begun = time.monotonic()
    assert store.load("layer", KEY, list[str]) is None
    _fill(store)
    assert _is_here(store)
    told = store.finish().warnings
    assert time.monotonic() - begun < 5
    assert [warning.split(": ", 1)[1] for warning in told] == [
        "reading failed: not tried again (no answer in time)", "writing failed: not tried again (no answer in time)",
    ]  # fmt: skip


def test_a_remote_that_may_only_be_read_is_read(farm: Farm, relay: Relay) -> None:
    one = farm.machine("one")
    _fill(one)
    one.finish()
    relay.rule = lambda method, _path: 403 if method in ("PUT", "POST") else None
    two = farm.machine("two")
    assert _is_here(two)
    for number in range(5):
        two.save("survey", f"{number:064x}", ["a"])
    told = two.finish()
    assert told.stored == 0
    assert any("writing failed: not tried again" in warning for warning in told.warnings)
    assert len(told.warnings) <= 2
    assert len([seen for seen in relay.seen if seen.status == 403]) <= 4


def test_an_upload_that_ends_halfway_leaves_no_object(farm: Farm, relay: Relay) -> None:
    relay.rule = lambda method, path: "drop" if method == "PUT" and "/objects/" in path else None
    one = farm.machine("one", patience=1.5)
    _fill(one)
    assert "writing failed" in one.finish().warnings[0]
    assert farm.machine("two").load("layer", KEY, list[str]) is None
    relay.rule = lambda _method, _path: None
    again = farm.machine("one")
    _fill(again)
    assert again.finish().stored == 1
    assert _is_here(farm.machine("three"))


def test_a_remote_that_is_gone(farm: Farm, relay: Relay) -> None:
    store = farm.machine("one", patience=1.5)
    relay.server.shutdown()
    relay.server.server_close()
    begun = time.monotonic()
    for number in range(50):
        assert store.load("survey", f"{number:064x}", list[str]) is None
        store.save("survey", f"{number:064x}", ["a"])
    told = store.finish()
    assert 1 <= len(told.warnings) <= 5
    assert time.monotonic() - begun < 8


def test_a_store_is_uploaded_and_checked_by_command(farm: Farm, relay: Relay, tmp_path: Path) -> None:
    _fill(Store(tmp_path / "filled"))
    Store(tmp_path / "filled").save("interpreter", KEY, ["of this machine"])
    url, env = f"s3://{BUCKET}/{farm.prefix}", {"WHEEL_COMPOSER_STORE": str(tmp_path / "filled")}
    runner = CliRunner()
    for words in ("remote: 1 object stored", "0 objects were missing"):
        done = runner.invoke(remote, ["fill", url], env=env)
        assert done.exit_code == 0, done.output
        assert words in done.output
    done = runner.invoke(remote, ["check", url], env={**env, "WHEEL_COMPOSER_REMOTE": url})
    assert "1 object, all sound" in done.output
    key = tmp_path / "key"
    key.write_text("0123456789abcdef")
    done = runner.invoke(remote, ["check", url, "--remote-key", str(key)], env=env)
    assert isinstance(done.exception, FetchError)
    relay.rule = lambda method, _path: 403 if method == "PUT" else None
    _fill(Store(tmp_path / "other"), b"other")
    Store(tmp_path / "other").save("survey", KEY, [])
    done = runner.invoke(remote, ["fill", url], env={"WHEEL_COMPOSER_STORE": str(tmp_path / "other")})
    assert isinstance(done.exception, FetchError)
    assert "1 object could not be uploaded" in str(done.exception)

"""Bundles in a real registry: only what differs is sent, what comes back is the same file, and faults leave nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from composer.cli.push import pull as pull_command
from composer.cli.push import push as push_command
from composer.errors import ComposerError, FetchError, HostError, IntegrityError, RecipeError, VerifyError
from composer.events import silent
from composer.host.index import Index, parse_index, read_bundle
from composer.host.remote import find_bundles
from composer.model.manifest import Manifest
from composer.steps.bundle import open_bundle
from composer.steps.layer import BLOB
from composer.steps.oci import CONFIG_TYPE, Descriptor, Pushed, published, pull, push
from composer.steps.registry import MANIFEST_TYPE, Limits, Reference, Registry, parse_reference
from composer.store import Store
from tests.bundles import Files, make_bundle
from tests.integration.conftest import First
from tests.remotes import Relay, TokenServer, registry
from tests.stack import REPOSITORY

#: `htpasswd -nbB -C 4 user secret`
_LOGIN = "user:$2b$04$y67oLtcgTJUUev2KUDoz3.9pVuKyDTU7scqk3oZhxlACPrk1Qq9lO\n"
_QUICK = Limits(attempts=3, backoff=0.05, connect=5.0, stall=5.0)
_CHILD = """
import sys
from pathlib import Path
from composer.events import silent
from composer.steps.oci import push
from composer.store import Store
push(Path(sys.argv[1]), sys.argv[2], Store(Path(sys.argv[3])), index_of=lambda _: "", jobs=2, listener=silent)
"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two bundles that share most layers."""

    sm90: Path
    sm100: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Small ones, with a layer of several parts."""
    folder = tmp_path_factory.mktemp("small")
    noise = random.Random(1).randbytes
    large = noise(1000) * (BLOB // 1000 + 1)
    layers: dict[str, Files] = {
        "base": {"bin/run": b"#!/bin/sh\n", "lib/base.bin": noise(3 << 20)},
        "large": {"lib/before": b"before", "lib/large.bin": large, "lib/link": "large.bin"},
        "app": {"app/data": noise(500_000)},
    }
    sm90, sm100 = folder / "b-sm90.tar.zst", folder / "b-sm100.tar.zst"
    make_bundle(sm90, layers, store=folder / "store")
    make_bundle(sm100, {**layers, "app": {"app/data": noise(500_000)}}, store=folder / "store")
    return Pair(sm90=sm90, sm100=sm100)


@pytest.fixture(scope="module")
def stacks(first: First, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    stack = first.stack.fresh(tmp_path_factory.mktemp("stacks"))
    shutil.copytree(first.stack.store, stack.store)
    stack.run(["100" if word == "90" else word for word in stack.words()]).ok()
    (sm100,) = stack.output.glob("*.tar.zst")
    return Pair(sm90=first.stack.bundle, sm100=sm100)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """The way to a registry of one's own."""
    with registry(tmp_path) as port, Relay(upstream=port) as relay:
        yield relay


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _push(bundle: Path, address: str, store: Store, **how: Any) -> Pushed:
    usual: dict[str, Any] = {"index_of": lambda _: "", "jobs": 2, "listener": silent, "limits": _QUICK}
    return push(bundle, address, store, **{**usual, **how})


def _at(relay: Relay, name: str = "team/small", tag: str = "") -> str:
    return f"oci://127.0.0.1:{relay.port}/{name}{tag}"


def _sizes(bundle: Path) -> dict[str, int]:
    return {layer.digest: layer.compressed for layer in _manifest(bundle).layers}


def _manifest(bundle: Path) -> Manifest:
    return open_bundle(bundle).manifest


def _sent(relay: Relay) -> int:
    """Bytes of blobs that the registry took."""
    return sum(one.sent for one in relay.uploads() if one.method == "PUT" and "/blobs/" in one.path)


def _rest(bundle: Path) -> int:
    """Bytes after the last layer."""
    return bundle.stat().st_size - sum(_sizes(bundle).values())


def test_the_second_bundle_sends_only_the_layers_that_differ(relay: Relay, stacks: Pair, store: Store) -> None:
    before = _push(stacks.sm90, _at(relay), store)
    assert sum(before.uploaded) == _sent(relay)
    assert sorted(before.uploaded)[-3:] == sorted(_sizes(stacks.sm90).values())[-3:]
    assert (before.present, before.mounted) == ((), ())
    relay.seen.clear()
    after = _push(stacks.sm100, _at(relay), store)
    known = _sizes(stacks.sm90)
    shared = [size for digest, size in _sizes(stacks.sm100).items() if digest in known]
    other = [size for digest, size in _sizes(stacks.sm100).items() if digest not in known]
    assert shared
    assert sorted(after.present) == sorted(shared)
    assert sorted(after.uploaded)[:-1] != []
    config = _sent(relay) - sum(other) - _rest(stacks.sm100)
    assert 0 < config < 4096
    assert sum(after.uploaded) == _sent(relay) < sum(shared) / 10
    relay.seen.clear()
    again = _push(stacks.sm100, _at(relay), store)
    assert (again.uploaded, again.digest, _sent(relay)) == ((), after.digest, 0)


def test_what_is_pulled_is_the_file_that_was_pushed(relay: Relay, pair: Pair, store: Store, tmp_path: Path) -> None:
    pushed = _push(pair.sm90, _at(relay), store)
    assert pushed.reference.tag == _manifest(pair.sm90).name
    out = tmp_path / "out"
    for address in (str(pushed.reference), f"{_at(relay)}@{pushed.digest}"):
        pulled = pull(address, out, listener=silent, limits=_QUICK)
        assert pulled.path == out / pair.sm90.name
        assert pulled.path.read_bytes() == pair.sm90.read_bytes()
    assert not pulled.fresh
    subprocess.run(["sha256sum", "-c", f"{pair.sm90.name}.sha256"], cwd=out, check=True, capture_output=True)
    assert sorted(path.name for path in out.iterdir()) == [pair.sm90.name, f"{pair.sm90.name}.sha256"]
    pulled.path.write_bytes(b"something else")
    assert pull(str(pushed.reference), out, listener=silent).fresh
    assert pulled.path.read_bytes() == pair.sm90.read_bytes()


def test_the_image_is_one_for_every_other_tool(relay: Relay, pair: Pair, store: Store, tmp_path: Path) -> None:
    """Each blob is an archive that zstd and tar read by itself, with the diff_id that the config says."""
    reference = _push(pair.sm90, _at(relay), store).reference
    assert reference.tag
    one = Registry(reference)
    image = json.loads(one.manifest(reference.tag))
    blobs = [_blob(one, row) for row in (image["config"], *image["layers"])]
    config = json.loads(blobs[0])
    assert (config["architecture"], config["os"]) == ("amd64", "linux")
    assert {row["mediaType"] for row in image["layers"]} == {"application/vnd.oci.image.layer.v1.tar+zstd"}
    tree = tmp_path / "tree"
    tree.mkdir()
    for blob, diff_id in zip(blobs[1:], config["rootfs"]["diff_ids"], strict=True):
        plain = subprocess.run(["zstd", "-dc"], input=blob, capture_output=True, check=True).stdout
        assert f"sha256:{hashlib.sha256(plain).hexdigest()}" == diff_id
        subprocess.run(["tar", "-xf", "-", "-C", tree], input=plain, check=True)
    assert b"".join(blobs[1:]) == pair.sm90.read_bytes()
    listed = {entry.path for layer in _manifest(pair.sm90).layers for entry in layer.entries}
    assert listed <= {path.relative_to(tree).as_posix() for path in tree.rglob("*")}


def _image(reference: Reference) -> dict[str, Any]:
    assert reference.tag
    return json.loads(Registry(reference).manifest(reference.tag))


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Bundles of more layers than an image may have, between them two large ones, one of which differs."""
    folder = tmp_path_factory.mktemp("crowd")
    noise = random.Random(2).randbytes
    layers: dict[str, Files] = {f"d{number:03}": {f"lib/{number}": noise(1000 + number)} for number in range(150)}
    large = {"d050": {"lib/50": noise(400_000)}, "d100": {"lib/100": noise(500_000)}}
    sm90, sm100 = folder / "c-sm90.tar.zst", folder / "c-sm100.tar.zst"
    make_bundle(sm90, {**layers, **large}, store=folder / "store")
    make_bundle(sm100, {**layers, **large, "d100": {"lib/100": noise(450_000)}}, store=folder / "store")
    return Pair(sm90=sm90, sm100=sm100)


def test_a_bundle_of_many_layers_is_an_image_that_runtimes_take(
    relay: Relay, crowd: Pair, store: Store, tmp_path: Path
) -> None:
    pushed = _push(crowd.sm90, _at(relay), store)
    image = _image(pushed.reference)
    rows = image["layers"]
    assert len(rows) == 125
    # The large ones are by themselves, and no blob holds much more than the others.
    sizes = {row["annotations"]["org.opencontainers.image.title"][4:]: row["size"] for row in rows}
    sizes.pop("manifest.tar.zst")
    assert sorted(sizes.values())[-2:] == [sizes["d050.tar.zst"], sizes["d100.tar.zst"]]
    assert sorted(sizes.values())[-3] < 5000
    config = json.loads(_blob(Registry(pushed.reference), image["config"]))
    assert len(config["rootfs"]["diff_ids"]) == len(config["history"]) == 125
    tree = tmp_path / "tree"
    tree.mkdir()
    for row, diff_id in zip(rows, config["rootfs"]["diff_ids"], strict=True):
        blob = _blob(Registry(pushed.reference), row)
        plain = subprocess.run(["zstd", "-dc"], input=blob, capture_output=True, check=True).stdout
        assert f"sha256:{hashlib.sha256(plain).hexdigest()}" == diff_id
        subprocess.run(["tar", "-xf", "-", "-C", tree], input=plain, check=True)
    assert len(list((tree / "lib").iterdir())) == 150
    pulled = pull(str(pushed.reference), tmp_path / "out", listener=silent, limits=_QUICK)
    assert pulled.path.read_bytes() == crowd.sm90.read_bytes()


def test_of_many_layers_still_only_those_that_differ_are_sent(relay: Relay, crowd: Pair, store: Store) -> None:
    _push(crowd.sm90, _at(relay), store)
    after = _push(crowd.sm100, _at(relay), store)
    # The large layer, the manifest and the config.
    assert len(after.uploaded) == 3
    assert max(after.uploaded) in _sizes(crowd.sm100).values()
    assert _push(crowd.sm100, _at(relay), store).digest == after.digest


def _blob(one: Registry, row: dict[str, Any]) -> bytes:
    data = bytearray(row["size"])

    def write(offset: int, piece: bytes) -> None:
        data[offset : offset + len(piece)] = piece

    one.download(Descriptor(media_type=row["mediaType"], digest=row["digest"], size=row["size"]), write)
    return bytes(data)


def test_another_repository_takes_blobs_without_their_bytes(relay: Relay, pair: Pair, store: Store) -> None:
    first = _push(pair.sm90, _at(relay), store)
    relay.seen.clear()
    second = _push(pair.sm90, _at(relay, "other/place", ":v1"), store)
    assert (second.uploaded, _sent(relay)) == ((), 0)
    assert sum(second.mounted) == sum(first.uploaded)
    assert second.digest == first.digest


def test_a_killed_push_goes_on_where_it_was(relay: Relay, pair: Pair, store: Store, tmp_path: Path) -> None:
    """The largest blob hangs; the others arrive; then the process is killed."""
    largest = max(_sizes(pair.sm90).values())
    hanging = _digest_of(pair.sm90, largest)
    relay.rule = lambda method, path: "hang" if method == "PUT" and hanging in path else None
    tag = _at(relay, tag=":v1")
    words = [sys.executable, "-c", _CHILD, str(pair.sm90), tag, str(store.root)]
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        expected = len(_sizes(pair.sm90)) + 1
        for _ in range(300):
            done = {one.path for one in relay.uploads() if one.method == "PUT"}
            if len(done) >= expected or child.poll() is not None:
                break
            time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, child.stdout.read() if child.stdout else ""
    with pytest.raises(FetchError, match="not in the registry"):
        pull(tag, tmp_path / "out", listener=silent, limits=_QUICK)
    assert not (tmp_path / "out").exists()
    relay.rule = lambda _method, _path: None
    relay.released.set()
    relay.seen.clear()
    assert _push(pair.sm90, tag, store).uploaded == (largest,)
    assert _sent(relay) == largest


def _digest_of(bundle: Path, size: int) -> str:
    described = open_bundle(bundle)
    (index,) = [number for number, layer in enumerate(described.manifest.layers) if layer.compressed == size]
    start = described.offsets[index]
    return hashlib.sha256(bundle.read_bytes()[start : start + size]).hexdigest()


def _times(count: int, action: Any, method: str, part: str = "") -> Callable[[str, str], Any]:
    """A rule for the first `count` requests of a kind."""
    left = [count]

    def rule(found: str, path: str) -> Any:
        if found == method and part in path and left[0]:
            left[0] -= 1
            return action
        return None

    return rule


@pytest.mark.parametrize("action", [503, 500, 429, "drop"])
def test_a_fault_that_passes_is_survived_by_a_push(relay: Relay, pair: Pair, store: Store, action: Any) -> None:
    for method in ("PUT", "POST", "HEAD"):
        relay.rule = _times(2, action, method)
        _push(pair.sm90, _at(relay, f"a/{method.lower()}"), Store(store.root / method))


def test_a_registry_that_stays_broken_is_an_error_and_no_image(relay: Relay, pair: Pair, store: Store) -> None:
    relay.rule = lambda method, path: 507 if method == "PUT" and "/blobs/" in path else None
    with pytest.raises(FetchError, match="does not do its part") as caught:
        _push(pair.sm90, _at(relay), store)
    assert "507" in str(caught.value)
    assert published(_at(relay), limits=_QUICK) == []


@pytest.mark.parametrize("most", [0, 1000, 100_000])
def test_a_transfer_that_is_cut_goes_on(relay: Relay, pair: Pair, store: Store, tmp_path: Path, most: int) -> None:
    address = str(_push(pair.sm90, _at(relay), store).reference)
    relay.seen.clear()
    relay.rule = _times(3, ("cut", most), "GET", "/blobs/")
    pulled = pull(address, tmp_path / "out", listener=silent, limits=_QUICK)
    assert pulled.path.read_bytes() == pair.sm90.read_bytes()
    statuses = [one.status for one in relay.seen if "/blobs/" in one.path]
    assert (206 in statuses) == (most > 0)


def test_bytes_that_are_others_are_never_a_bundle(relay: Relay, pair: Pair, store: Store, tmp_path: Path) -> None:
    pushed = _push(pair.sm90, _at(relay), store)
    out = tmp_path / "out"
    largest = _digest_of(pair.sm90, max(_sizes(pair.sm90).values()))
    (path,) = (tmp_path / "registry").rglob(f"{largest}/data")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="other bytes than its digest"):
        pull(str(pushed.reference), out, listener=silent, limits=_QUICK)
    path.write_bytes(data + b"more")
    with pytest.raises(IntegrityError):
        pull(str(pushed.reference), out, listener=silent, limits=_QUICK)
    path.write_bytes(data[:1000])
    with pytest.raises(ComposerError):
        pull(str(pushed.reference), out, listener=silent, limits=_QUICK)
    assert list(out.iterdir()) == []
    (manifest,) = (tmp_path / "registry").rglob(f"{pushed.digest.removeprefix('sha256:')}/data")
    manifest.write_bytes(manifest.read_bytes().replace(b'"schemaVersion"', b'"schemaversion"'))
    with pytest.raises(ComposerError):
        pull(f"{_at(relay)}@{pushed.digest}", out, listener=silent, limits=_QUICK)


def test_a_damaged_bundle_is_not_pushed(relay: Relay, pair: Pair, store: Store, tmp_path: Path) -> None:
    copy = tmp_path / pair.sm90.name
    data = bytearray(pair.sm90.read_bytes())
    for offset in (1000, len(data) - 600):
        damaged = bytearray(data)
        damaged[offset] ^= 1
        copy.write_bytes(damaged)
        with pytest.raises(VerifyError):
            _push(copy, _at(relay), store)
    assert relay.seen == []


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Relay]:
    """A registry that asks for a login."""
    (tmp_path / "htpasswd").write_text(_LOGIN)
    auth = f"auth: {{htpasswd: {{realm: tests, path: {tmp_path / 'htpasswd'}}}}}"
    with registry(tmp_path, auth) as port, Relay(upstream=port) as relay:
        yield relay


def _log_in(folder: Path, relay: Relay, monkeypatch: pytest.MonkeyPatch, login: str) -> None:
    folder.mkdir(exist_ok=True)
    auths = {f"127.0.0.1:{relay.port}": {"auth": base64.b64encode(login.encode()).decode()}}
    (folder / "config.json").write_text(json.dumps({"auths": auths}))
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))


def test_the_login_is_dockers(locked: Relay, pair: Pair, store: Store, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FetchError, match="does not allow") as caught:
        _push(pair.sm90, _at(locked), store)
    assert f"docker login 127.0.0.1:{locked.port}" in str(caught.value)
    _log_in(tmp_path / "wrong", locked, monkeypatch, "user:wrong")
    with pytest.raises(FetchError, match="does not allow"):
        _push(pair.sm90, _at(locked), store)
    _log_in(tmp_path / "right", locked, monkeypatch, "user:secret")
    pushed = _push(pair.sm90, _at(locked), store)
    # No body was sent to be refused.
    assert [one for one in locked.seen if one.sent and one.status == 401] == []
    monkeypatch.delenv("DOCKER_CONFIG")
    shutil.copytree(tmp_path / "right", tmp_path / ".docker")
    pulled = pull(str(pushed.reference), tmp_path / "out", listener=silent)
    assert pulled.path.read_bytes() == pair.sm90.read_bytes()
    (tmp_path / ".docker/config.json").write_text("{")
    with pytest.raises(FetchError, match="login cannot be had"):
        pull(str(pushed.reference), tmp_path / "out", listener=silent)


def test_tokens_are_for_what_is_done(pair: Pair, store: Store, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    with (
        TokenServer(folder=tmp_path) as tokens,
        registry(tmp_path, tokens.config) as port,
        Relay(upstream=port) as relay,
    ):
        _log_in(tmp_path / "wrong", relay, monkeypatch, "user:wrong")
        with pytest.raises(FetchError, match="does not allow"):
            _push(pair.sm90, _at(relay), store)
        _log_in(tmp_path / "right", relay, monkeypatch, "user:secret")
        pushed = _push(pair.sm90, _at(relay), store)
        assert any("team/small" in scope and "push" in scope for scope in tokens.scopes)
        mounted = _push(pair.sm90, _at(relay, "other/place"), store)
        assert mounted.uploaded == ()
        pulled = pull(str(pushed.reference), tmp_path / "out", listener=silent, limits=_QUICK)
        assert pulled.path.read_bytes() == pair.sm90.read_bytes()
        assert len(published(_at(relay), limits=_QUICK)) == 0


def test_select_reads_what_is_published(relay: Relay, stacks: Pair, store: Store) -> None:
    runner, env = CliRunner(), {"WHEEL_COMPOSER_STORE": str(store.root)}
    for bundle in (stacks.sm90, stacks.sm100):
        done = runner.invoke(push_command, [str(bundle), _at(relay)], env=env)
        assert done.exit_code == 0, done.output
        assert f"{_at(relay)}:{_manifest(bundle).name}@sha256:" in done.output
    found = published(_at(relay))
    bundles = [parse_index(one.index.encode(), one.reference).bundles for one in found]
    assert [one.target.sm for (one,) in bundles] == ["100", "90"]
    assert [one.sha256 for (one,) in bundles] == [_sha256(stacks.sm100), _sha256(stacks.sm90)]
    (only,) = published(f"{_at(relay)}:{_manifest(stacks.sm90).name}")
    assert only == found[1]
    assert [one for one in relay.seen if one.method == "GET" and "/blobs/sha" in one.path] == []
    assert published(_at(relay, "no/such")) == []
    with pytest.raises(RecipeError, match="which bundle") as caught:
        pull(_at(relay), Path("unused"), listener=silent)
    assert _manifest(stacks.sm100).name in str(caught.value)


def test_select_chooses_in_a_registry(relay: Relay, stacks: Pair, store: Store) -> None:
    index = msgspec.json.encode(Index(schema=1, bundles=(read_bundle(stacks.sm90),))).decode()
    pushed = _push(stacks.sm90, _at(relay), store, index_of=lambda _: index)
    _push(stacks.sm100, _at(relay), store, index_of=lambda _: "not an index")
    offer = find_bundles(_at(relay))
    assert [offer.location(one) for one in offer.bundles] == [str(pushed.reference)]
    assert [one.file for one in offer.damaged] == [f"{_at(relay)}:{_manifest(stacks.sm100).name}"]


def test_the_command_pulls(relay: Relay, pair: Pair, store: Store, tmp_path: Path) -> None:
    address = str(_push(pair.sm90, _at(relay), store).reference)
    for words in ("", " (was here already)"):
        done = CliRunner().invoke(pull_command, [address, "-o", str(tmp_path / "out")])
        assert done.exit_code == 0, done.output
        assert f"{tmp_path / 'out' / pair.sm90.name}{words}\n  sha256 {_sha256(pair.sm90)}" in done.output


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_NOT_BUNDLES: dict[str, dict[str, str]] = {
    "nothing said": {},
    "a path": {"org.opencontainers.image.title": "../x.tar.zst", "wheel-composer.sha256": "0" * 64},
    "a hidden file": {"org.opencontainers.image.title": ".x.tar.zst", "wheel-composer.sha256": "0" * 64},
    "no digest": {"org.opencontainers.image.title": "x.tar.zst", "wheel-composer.sha256": "0"},
    "other bytes": {"org.opencontainers.image.title": "x.tar.zst", "wheel-composer.sha256": "0" * 64},
}


@pytest.mark.parametrize("name", _NOT_BUNDLES)
def test_an_image_that_is_no_bundle_leaves_nothing(relay: Relay, tmp_path: Path, name: str) -> None:
    one = Registry(parse_reference(_at(relay, tag=":v1")))
    blob = Descriptor(media_type=CONFIG_TYPE, digest=f"sha256:{hashlib.sha256(b'{}').hexdigest()}", size=2)
    one.upload(blob, b"{}")  # type: ignore[arg-type]
    image = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": _row(blob), "layers": [_row(blob)],
             "annotations": _NOT_BUNDLES[name]}  # fmt: skip
    one.put_manifest("v1", json.dumps(image).encode())
    with pytest.raises((VerifyError, IntegrityError)):
        pull(_at(relay, tag=":v1"), tmp_path / "out", listener=silent)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "x.tar.zst").exists()
    assert published(_at(relay)) == []


def _row(blob: Descriptor) -> dict[str, Any]:
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}


@pytest.mark.parametrize(
    "address",
    ["", "registry/x:1", "oci://x", "oci://x/", "oci://x/A", "oci://x/a:", "oci://x/a@sha256:12", "oci://x/../a",
     "oci://x/a:t?x=1", "oci://u:p@x/a", "oci://x//a", "oci://x/a:t/b", "https://x/a"],
)  # fmt: skip
def test_an_address_that_cannot_be_meant(address: str) -> None:
    with pytest.raises(RecipeError):
        parse_reference(address)


def test_a_digest_is_no_name_for_a_push(pair: Pair, store: Store) -> None:
    with pytest.raises(RecipeError):
        _push(pair.sm90, f"oci://localhost:1/a@sha256:{'0' * 64}", store)


@pytest.mark.parametrize(
    ("address", "local"),
    [("oci://localhost:5000/a", True), ("oci://127.0.0.1/a", True), ("oci://[::1]:5000/a", True),
     ("oci://127.0.0.1.example.com/a", False), ("oci://localhost.example.com/a", False), ("oci://10.0.0.1/a", False)],
)  # fmt: skip
def test_only_this_machine_is_asked_without_encryption(address: str, local: bool) -> None:
    assert parse_reference(address).is_local is local


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="does not do its part"):
        pull("oci://127.0.0.1:1/a:v1", tmp_path, listener=silent, limits=_QUICK)


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "oras.auth", None)
    with pytest.raises(HostError) as caught:
        pull("oci://127.0.0.1:1/a:v1", tmp_path, listener=silent)
    assert "wheel-composer[oci]" in str(caught.value)

"""A remote store: what is there comes here whole and checked, or not at all; its faults cost time only."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from composer.errors import ComposerError, HostError, IntegrityError, RecipeError
from composer.events import Event
from composer.remote import SHARED, Record, StoredFile, open_remote
from composer.steps import build
from composer.store import Store

KEY = "ab" + "0" * 62
OTHER = "cd" + "1" * 62
DATA = bytes(range(256)) * 40
VALUE = {"size": 10240, "name": "ü"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "shared folder"


@pytest.fixture
def machine(tmp_path: Path, place: Path) -> Callable[..., Store]:
    """A store with the remote behind it; each is another machine."""

    def make(name: str, **how: Any) -> Store:
        return Store(tmp_path / name, open_remote(f"file://{place}", **how))

    return make


def _fill(store: Store, key: str = KEY, data: bytes = DATA, value: object = VALUE) -> None:
    with store.writing("layer", key, ".zst") as path:
        path.write_bytes(data)
    store.save("layer", key, value)


def _record(place: Path, key: str = KEY) -> Path:
    return place / f"objects/layer/{key[:2]}/{key}.json"


def _content(place: Path, data: bytes) -> Path:
    digest = hashlib.sha256(data).hexdigest()
    return place / f"content/{digest[:2]}/{digest}"


def _is_here(store: Store) -> bool:
    return store.load("layer", KEY, dict) == VALUE and store.path("layer", KEY, ".zst").read_bytes() == DATA


def _left(store: Store) -> list[Path]:
    return [path for name in ("objects", "tmp") for path in (store.root / name).rglob("*") if path.is_file()]


def test_what_one_machine_made_another_has(machine: Callable[..., Store], place: Path) -> None:
    first = machine("first")
    _fill(first)
    first.save("survey", KEY, ["a"])
    sent = first.finish()
    assert (sent.stored, sent.fetched, sent.warnings) == (2, 0, ())
    assert sent.stored_bytes == sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    second = machine("second")
    assert _is_here(second)
    assert second.load("survey", KEY, list[str]) == ["a"]
    got = second.finish()
    assert (got.fetched, got.stored, got.warnings) == (2, 0, ())
    assert got.fetched_bytes == len(DATA) + len(msgspec.json.encode(VALUE)) + len(b'["a"]')
    assert list(place.rglob("*.part")) == []


def test_bytes_are_asked_for_as_well_as_values(machine: Callable[..., Store]) -> None:
    first = machine("first")
    _fill(first)
    first.finish()
    assert machine("second").path("layer", KEY, ".zst").read_bytes() == DATA


def test_a_store_without_a_remote_asks_nobody(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    _fill(store)
    assert store.load("layer", OTHER, dict) is None
    assert store.finish().stored == 0


def test_what_was_not_there_may_be_there_later(machine: Callable[..., Store]) -> None:
    store = machine("store")
    assert store.load("layer", KEY, dict) is None
    first = machine("first")
    _fill(first)
    first.finish()
    assert _is_here(store)
    assert store.finish().warnings == ()
    assert store.finish().fetched == 0


def test_processes_without_options_are_told_by_their_environment(
    machine: Callable[..., Store], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machine("first")
    _fill(first)
    first.finish()
    assert Store.here(tmp_path / "alone").load("layer", KEY, dict) is None
    monkeypatch.setenv("WHEEL_COMPOSER_REMOTE", f"file://{place}")
    one, two = Store.here(tmp_path / "one"), Store.here(tmp_path / "two")
    assert _is_here(one)
    assert one.remote is two.remote
    key = tmp_path / "key"
    key.write_text("0123456789abcdef")
    monkeypatch.setenv("WHEEL_COMPOSER_REMOTE_KEY", str(key))
    assert Store.here(tmp_path / "three").load("layer", KEY, dict) is None


def test_what_was_given_up_is_tried_in_the_next_run(machine: Callable[..., Store], place: Path) -> None:
    place.mkdir()
    (place / "content").write_text("a file, no folder")
    store = machine("store")
    for _ in range(2):
        _fill(store)
        _fill(store, key=OTHER)
        assert "not tried again" in store.finish().warnings[-1]
    (place / "content").unlink()
    _fill(store)
    assert store.finish().stored == 1


@pytest.mark.parametrize("kind", ["interpreter", "imports", "toolchain-proof", "source"])
def test_what_is_of_one_machine_or_a_proof_stays_there(machine: Callable[..., Store], place: Path, kind: str) -> None:
    first = machine("first")
    first.save(kind, KEY, ["a"])
    assert first.finish().stored == 0
    record = Record(
        kind=kind, key=KEY, files=(StoredFile(suffix=".json", size=2, sha256=hashlib.sha256(b"[]").hexdigest()),)
    )
    path = place / f"objects/{kind}/ab/{KEY}.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(msgspec.json.encode(record))
    _content(place, b"[]").parent.mkdir(parents=True)
    _content(place, b"[]").write_bytes(b"[]")
    assert machine("second").load(kind, KEY, list[str]) is None


def test_what_steps_keep_is_shared() -> None:
    assert build._CONTENT in SHARED


def _edited(**changes: object) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        path = _record(place)
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def _resized(change: int) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        record = json.loads(_record(place).read_text())
        record["files"][0]["size"] += change
        _record(place).write_text(json.dumps(record))

    return damage


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the bytes": lambda place: _flip(_content(place, DATA)),
    "a bit of the value": lambda place: _flip(_content(place, msgspec.json.encode(VALUE))),
    "bytes cut off": lambda place: os.truncate(_content(place, DATA), 100),
    "no bytes at all": lambda place: _content(place, DATA).unlink(),
    "an empty record": lambda place: os.truncate(_record(place), 0),
    "half a record": lambda place: os.truncate(_record(place), 60),
    "a record that is no text": lambda place: _record(place).write_bytes(b"\xff\xfe"),
    "a record as deep as the sea": lambda place: _record(place).write_bytes(b"[" * 4096),
    "a huge record": lambda place: _record(place).write_bytes(b" " * 10_000 + _record(place).read_bytes()),
    "of another key": _edited(key=OTHER),
    "of another kind": _edited(kind="blob"),
    "of another schema": _edited(schema=2),
    "without files": _edited(files=[]),
    "with a path for a digest": _edited(files=[{"suffix": ".zst", "size": 1, "sha256": "../../secret"}]),
    "with more": _edited(more=1),
    "too short": _resized(-1),
    "too long": _resized(+1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_and_never_used(machine: Callable[..., Store], place: Path, name: str) -> None:
    first = machine("first")
    _fill(first)
    first.finish()
    DAMAGES[name](place)
    notes: list[Event] = []
    second = machine("second", listener=notes.append)
    assert second.load("layer", KEY, dict) is None
    assert _left(second) == []
    (warning,) = second.finish().warnings
    assert "damaged there and not used" in warning
    assert [one.note for one in notes if one.note] == [warning.split(": ", 1)[1]]
    # Made here, it takes the damaged one's place.
    _fill(second)
    assert second.finish().stored == 1
    assert _is_here(machine("third"))


def test_a_damaged_value_here_is_fetched_and_damaged_bytes_are_made_again(machine: Callable[..., Store]) -> None:
    first = machine("first")
    _fill(first)
    first.finish()
    second = machine("second")
    assert _is_here(second)
    second.path("layer", KEY, ".json").write_text("{")
    assert second.load("layer", KEY, dict) == VALUE
    second.path("layer", KEY, ".zst").unlink()
    assert not second.path("layer", KEY, ".zst").exists()


def test_what_is_forgotten_is_not_fetched_again(machine: Callable[..., Store]) -> None:
    first = machine("first")
    _fill(first)
    first.finish()
    second = machine("second")
    assert _is_here(second)
    second.forget("layer", KEY)
    assert second.load("layer", KEY, dict) is None
    _fill(second)
    assert _is_here(second)


@pytest.mark.parametrize("key", ["../../../etc/x", "", "a/b", "a\0", "A", "a.b"])
def test_a_value_of_somebody_else_leads_nowhere(tmp_path: Path, key: str) -> None:
    store = Store(tmp_path / "store")
    for call in (lambda: store.path("blob", key, ".zst"), lambda: store.load("blob", key, dict),
                 lambda: store.path(key, KEY, ".zst")):  # fmt: skip
        with pytest.raises(IntegrityError):
            call()


def test_signed_records_are_those_of_who_has_the_key(
    machine: Callable[..., Store], tmp_path: Path, place: Path
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.write_text("0123456789abcdef0123456789abcdef\n")
    theirs.write_text("fedcba9876543210fedcba9876543210\n")
    first = machine("first", key=ours)
    _fill(first)
    first.finish()
    assert _is_here(machine("second", key=ours))
    assert _is_here(machine("third"))
    for name, how in {"fourth": {"key": theirs}}.items():
        store = machine(name, **how)
        assert store.load("layer", KEY, dict) is None
        assert "not signed with our key" in store.finish().warnings[0]
    # Who may only write to the remote can lie to those without a key, and to nobody else.
    lie = b'{"a": "lie"}'
    _content(place, lie).parent.mkdir(exist_ok=True)
    _content(place, lie).write_bytes(lie)
    record = json.loads(_record(place).read_text())
    record["files"][1] |= {"size": len(lie), "sha256": hashlib.sha256(lie).hexdigest()}
    _record(place).write_text(json.dumps(record))
    assert machine("fifth").load("layer", KEY, dict) == {"a": "lie"}
    assert machine("sixth", key=ours).load("layer", KEY, dict) is None
    # Nor is a signed record one of another object.
    _record(place, OTHER).parent.mkdir()
    _fill(first)
    first.finish()
    _record(place, OTHER).write_bytes(_record(place).read_bytes())
    assert machine("seventh", key=ours).load("layer", OTHER, dict) is None


def test_a_remote_that_cannot_be_written_is_given_up(machine: Callable[..., Store], place: Path) -> None:
    place.mkdir()
    (place / "content").write_text("a file, no folder")
    store = machine("store")
    for number in range(20):
        _fill(store, key=f"{number:064x}")
    sent = store.finish()
    assert sent.stored == 0
    assert 1 <= len(sent.warnings) <= 3
    assert "not tried again" in sent.warnings[-1]
    assert store.load("layer", f"{3:064x}", dict) == VALUE


def test_silence_costs_its_time_once(machine: Callable[..., Store], place: Path) -> None:
    for key in (KEY, OTHER):
        _record(place, key).parent.mkdir(parents=True)
        os.mkfifo(_record(place, key))
    store = machine("store", patience=0.3)
    begun = time.monotonic()
    assert store.load("layer", KEY, dict) is None
    assert store.load("layer", OTHER, dict) is None
    assert time.monotonic() - begun < 2
    (warning,) = store.finish().warnings
    assert "no answer in time" in warning


def test_machines_that_make_the_same_at_once_disturb_nobody(machine: Callable[..., Store]) -> None:
    stores = [machine(f"machine {number}") for number in range(4)]
    readers = [machine(f"reader {number}") for number in range(12)]
    threads = [threading.Thread(target=lambda store=store: (_fill(store), store.finish())) for store in stores]
    for thread in threads:
        thread.start()
    seen = [reader.load("layer", KEY, dict) for reader in readers]
    for thread in threads:
        thread.join()
    assert all(value in (None, VALUE) for value in seen)
    assert [store.finish().warnings for store in (*stores, *readers)] == [()] * 16
    assert _is_here(machine("last"))


def test_equal_bytes_go_over_the_line_once(machine: Callable[..., Store]) -> None:
    first = machine("first")
    _fill(first)
    _fill(first, key=OTHER)
    first.finish()
    second = machine("second")
    _fill(second)
    assert second.finish().stored_bytes < len(DATA)


def test_a_fault_of_this_machine_is_an_error(machine: Callable[..., Store]) -> None:
    first = machine("first")
    _fill(first)
    first.finish()
    second = machine("second")
    (second.root / "objects/layer").write_text("")
    with pytest.raises(HostError):
        second.load("layer", KEY, dict)


def test_everything_there_is_listed(machine: Callable[..., Store], place: Path) -> None:
    first = machine("first")
    _fill(first)
    _fill(first, key=OTHER)
    first.finish()
    (place / "objects/layer/odd").write_text("")
    (place / "objects/readme.json").write_text("")
    assert first.remote
    assert list(first.remote.keys()) == [("layer", KEY), ("layer", OTHER)]


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("/srv/shared", RecipeError, "file:///srv/shared"),
        ("nonsense://somewhere", RecipeError, "nonsense"),
        ("gs://bucket/prefix", HostError, "wheel-composer[remote]"),
    ],
)
def test_a_url_that_cannot_be_meant(url: str, error: type[ComposerError], words: str) -> None:
    with pytest.raises(error) as caught:
        open_remote(url)
    assert words in str(caught.value)


def test_a_key_that_is_none(tmp_path: Path, place: Path) -> None:
    with pytest.raises(HostError):
        open_remote(f"file://{place}", key=tmp_path / "nowhere")
    (tmp_path / "short").write_text("secret")
    with pytest.raises(HostError, match="too short"):
        open_remote(f"file://{place}", key=tmp_path / "short")


def test_no_secret_is_told() -> None:
    remote = open_remote("s3://user:secret@bucket/prefix")
    assert remote.where == "s3://bucket/prefix"


def test_without_the_extra_the_error_names_it(place: Path) -> None:
    program = f"""
import sys
sys.modules["fsspec"] = None
from composer.errors import HostError
from composer.remote import open_remote
try:
    open_remote("file://{place}")
except HostError as fault:
    print(fault)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'wheel-composer[remote]'" in done.stdout


def test_a_store_needs_no_extra() -> None:
    program = "import sys, composer.store; sys.exit('fsspec' in sys.modules or 'requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

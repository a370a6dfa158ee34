"""The store: objects are whole or absent, scratch outlives nobody, and a torn object is a miss."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composer.errors import HostError
from composer.formats.seekable import Frame
from composer.store import Store, default_root, key_of

KEY = "ab" + "0" * 62
_CHILD = """
import sys
from pathlib import Path
from composer.store import Store

store = Store(Path(sys.argv[1]))
with store.lock("one"), store.scratch() as folder, store.writing("layer", "ab" + "0" * 62, ".zst") as half:
    (folder / "big").write_bytes(b"x" * 1000)
    half.write_bytes(b"half")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def busy(store: Store) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of making an object, with the lock `one`."""
    words = [sys.executable, "-c", _CHILD, str(store.root)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _scratch(store: Store) -> list[Path]:
    return sorted((store.root / "tmp").iterdir())


def test_scratch_is_swept_when_its_owner_was_killed_and_not_before(store: Store, busy: subprocess.Popen[str]) -> None:
    assert busy.stdout
    folder = Path(busy.stdout.readline().strip())
    assert (folder / "big").stat().st_size == 1000
    before = _scratch(store)
    assert len(before) == 2
    Store(store.root)
    assert _scratch(store) == before
    busy.send_signal(signal.SIGKILL)
    assert busy.wait() == -signal.SIGKILL
    assert _scratch(store) == before
    Store(store.root)
    assert _scratch(store) == []
    assert not store.path("layer", KEY, ".zst").exists()


def test_a_lock_is_free_once_its_owner_was_killed(store: Store, busy: subprocess.Popen[str]) -> None:
    assert busy.stdout
    busy.stdout.readline()
    taken = threading.Event()

    def take() -> None:
        with store.lock("one"):
            taken.set()

    waiting = threading.Thread(target=take, daemon=True)
    waiting.start()
    assert not taken.wait(0.2)
    busy.kill()
    assert taken.wait(10)
    waiting.join(10)


def test_locks_of_other_names_do_not_wait(store: Store) -> None:
    with store.lock("one"), store.lock("two"):
        pass


def test_a_lock_excludes_threads(store: Store) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(3):
            with store.lock("one"):
                inside += 1
                most = max(most, inside)
                threading.Event().wait(0.002)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (inside, most) == (0, 1)


def test_a_sweep_follows_no_link_and_leaves_what_is_no_folder(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (store.root / "tmp/link").symlink_to(outside)
    (store.root / "tmp/file").write_text("")
    (store.root / "tmp/old").mkdir()
    Store(store.root)
    assert (outside / "kept").read_text() == "kept"
    assert not (store.root / "tmp/old").exists()


def test_scratch_goes_whatever_happens(store: Store) -> None:
    def fill_and_raise(error: type[BaseException]) -> None:
        with store.scratch() as folder:
            (folder / "a").mkdir()
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            fill_and_raise(error)
    assert _scratch(store) == []


def test_scratch_frees_its_handle(store: Store) -> None:
    before = _open_files()
    for _ in range(5):
        with store.scratch():
            pass
        Store(store.root)
    assert _open_files() == before


def test_a_value_comes_back(store: Store) -> None:
    assert store.load("plan", KEY, list[Frame]) is None
    store.save("plan", KEY, [Frame(1, 2)])
    assert store.load("plan", KEY, list[Frame]) == [Frame(1, 2)]
    store.save("plan", KEY, [Frame(3, 4)])
    assert Store(store.root).load("plan", KEY, list[Frame]) == [Frame(3, 4)]
    assert store.load("layer", KEY, list[Frame]) is None


def test_every_torn_value_is_a_miss(store: Store) -> None:
    store.save("plan", KEY, {"name": "ü", "sizes": [1, 2.5, None]})
    path = store.path("plan", KEY, ".json")
    data = path.read_bytes()
    for end in range(len(data)):
        path.write_bytes(data[:end])
        assert store.load("plan", KEY, dict[str, Any]) is None
        path.write_bytes(data[:end] + bytes(len(data) - end))
        assert store.load("plan", KEY, dict[str, Any]) is None
    path.write_bytes(data)
    assert store.load("plan", KEY, dict[str, Any]) == {"name": "ü", "sizes": [1, 2.5, None]}


@pytest.mark.parametrize("data", [b"5", b'{"a": 1}', b'["\xff\xfe"]', b"[" * 100_000, b"\xef\xbb\xbf[]x", b"[1] [2]"])
@pytest.mark.parametrize("kind", [list[str], list[Any]])
def test_a_value_of_another_kind_is_a_miss(store: Store, data: bytes, kind: Any) -> None:
    path = store.path("plan", KEY, ".json")
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert store.load("plan", KEY, kind) is None


def test_an_object_that_is_a_folder_or_a_dead_link_is_a_miss(store: Store) -> None:
    path = store.path("plan", KEY, ".json")
    path.mkdir(parents=True)
    assert store.load("plan", KEY, list[str]) is None
    path.rmdir()
    path.symlink_to("nowhere")
    assert store.load("plan", KEY, list[str]) is None
    store.save("plan", KEY, ["a"])
    assert store.load("plan", KEY, list[str]) == ["a"]
    assert not path.is_symlink()


def _write_and_fail(store: Store) -> None:
    with contextlib.suppress(RuntimeError), store.writing("layer", KEY, ".zst") as half:
        half.write_bytes(b"other")
        raise RuntimeError


def test_what_is_being_written_is_not_seen(store: Store) -> None:
    final = store.path("layer", KEY, ".zst")
    with store.writing("layer", KEY, ".zst") as half:
        half.write_bytes(b"half")
        assert not final.exists()
    assert final.read_bytes() == b"half"
    _write_and_fail(store)
    assert final.read_bytes() == b"half"
    assert _scratch(store) == []


def test_writing_nothing_is_an_error(store: Store) -> None:
    with pytest.raises(HostError), store.writing("layer", KEY, ".zst"):
        pass


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError) as caught:
        Store(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_root_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHEEL_COMPOSER_STORE", "~/here")
    assert default_root() == tmp_path / "here"
    monkeypatch.delenv("WHEEL_COMPOSER_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_root() == tmp_path / "cache" / "wheel-composer"


def test_a_key_is_of_everything_and_of_no_order() -> None:
    key = key_of("layer", 1, a={"x": 1, "y": [2]}, b="c")
    assert key == key_of("layer", 1, b="c", a={"y": [2], "x": 1})
    others = {
        key_of("layer", 2, a={"x": 1, "y": [2]}, b="c"), key_of("plan", 1, a={"x": 1, "y": [2]}, b="c"),
        key_of("layer", 1, a={"x": 1, "y": [3]}, b="c"), key_of("layer", 1, a={"x": 1, "y": [2]}, c="c"), key,
    }  # fmt: skip
    assert len(others) == 5

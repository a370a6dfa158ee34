"""Fetching from real servers that misbehave (test matrix N), with pip's own session."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from composer.errors import FetchError, HostError, IntegrityError
from composer.model.lock import Artifact, LockedPackage
from composer.steps import download as download_step
from composer.steps.artifact import artifact_path
from composer.steps.download import Limits
from composer.steps.fetch import FetchEvent, export_wheelhouse, fetch
from composer.steps.load import LocalFile
from tests import servers
from tests.servers import File, Index

QUICK = Limits(attempts=3, backoff=0.01, connect=2, stall=0.4, grace=20)
NAME = "alpha-1.0-py3-none-any.whl"
DATA = random.Random(7).randbytes(200_000)


@pytest.fixture(autouse=True)
def _only_our_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("PIP_") or name.lower().endswith(("_proxy", "_ca_bundle")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with Index() as server:
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        server.add("alpha", File(filename=NAME, data=DATA))
        yield server


def artifact(data: bytes = DATA, filename: str = NAME, url: str | None = None) -> Artifact:
    return Artifact(filename=filename, size=len(data), sha256=hashlib.sha256(data).hexdigest(), url=url)


def package(*artifacts: Artifact, name: str = "alpha", index: str = "pypi", optional: bool = False) -> LockedPackage:
    return LockedPackage(name=name, version="1.0", index=index, artifacts=artifacts, optional=optional)


ALPHA = package(artifact())


def fetch_alpha(store: Path, locked: LockedPackage = ALPHA, **options: object) -> bytes:
    options.setdefault("limits", QUICK)
    fetched = fetch([locked], into=store, **options)
    assert fetched.missing == ()
    return fetched.paths[locked.artifacts[0].sha256].read_bytes()


def leftovers(store: Path) -> list[str]:
    """Everything in the store that is not a lock."""
    return sorted(path.name for path in store.rglob("*") if path.is_file() and path.name != ".lock")


@pytest.mark.parametrize("html", [False, True])
def test_downloads_once_then_trusts_the_size(index: Index, tmp_path: Path, html: bool) -> None:
    index.html = html
    assert fetch_alpha(tmp_path) == DATA
    assert fetch_alpha(tmp_path) == DATA
    assert len(index.gets(f"/files/{NAME}")) == 1
    path = artifact_path(tmp_path, ALPHA.artifacts[0])
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert leftovers(tmp_path) == [NAME]


def test_tells_what_happens(index: Index, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 << 20)
    index.add("big", File(filename="big-1.0-py3-none-any.whl", data=data))
    locked = package(artifact(data, "big-1.0-py3-none-any.whl"), name="big")
    events: list[FetchEvent] = []
    fetch([locked], into=tmp_path, progress=events.append)
    fetch([locked], into=tmp_path, progress=events.append)
    assert [event.state for event in events][-2:] == ["done", "present"]
    growing = [event.done for event in events if event.state == "bytes"]
    assert growing == sorted(growing)
    assert len(growing) >= 2
    assert {event.size for event in events} == {len(data)}


# --- N01: partial bodies ---------------------------------------------------------------------------------------------


def test_n01_resumes_after_every_tenth(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.stops_every(len(DATA) // 10)
    assert fetch_alpha(tmp_path) == DATA
    starts = [headers.get("range") for headers in index.gets(f"/files/{NAME}")]
    assert starts[:3] == [None, "bytes=20000-", "bytes=40000-"]


@pytest.mark.parametrize("honest", [True, False])
@pytest.mark.parametrize("shift", [1, 4096])
def test_n01_survives_a_wrong_offset(index: Index, tmp_path: Path, honest: bool, shift: int) -> None:
    index.faults[NAME] = servers.resumes_wrongly(shift, honest=honest)
    assert fetch_alpha(tmp_path) == DATA


def test_n01_survives_an_ignored_range(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.ignores_range
    assert fetch_alpha(tmp_path) == DATA


def test_n01_continues_what_an_earlier_run_left(index: Index, tmp_path: Path) -> None:
    part = artifact_path(tmp_path, ALPHA.artifacts[0]).with_suffix(".whl.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA[:150_000])
    assert fetch_alpha(tmp_path) == DATA
    assert [headers.get("range") for headers in index.gets(f"/files/{NAME}")] == ["bytes=150000-"]


@pytest.mark.parametrize("left", [DATA, b"\0" * 1000, b"\0" * len(DATA), DATA + b"more"])
def test_n01_whatever_a_killed_run_left_is_no_trap(index: Index, tmp_path: Path, left: bytes) -> None:
    part = artifact_path(tmp_path, ALPHA.artifacts[0]).with_suffix(".whl.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert fetch_alpha(tmp_path) == DATA
    assert leftovers(tmp_path) == [NAME]


def test_n01_gives_up_without_progress_and_keeps_the_part(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.breaks_down
    with pytest.raises(FetchError, match="gave up after 3 attempts"):
        fetch_alpha(tmp_path)
    index.faults.clear()
    assert leftovers(tmp_path) == [f"{NAME}.part"]
    assert fetch_alpha(tmp_path) == DATA


# --- N02, N03, N15: other bytes --------------------------------------------------------------------------------------


def test_n02_other_bytes_of_the_same_length(index: Index, tmp_path: Path) -> None:
    other = bytes(len(DATA))
    index.faults[NAME] = servers.sends(other)
    with pytest.raises(IntegrityError) as caught:
        fetch_alpha(tmp_path)
    text = str(caught.value)
    assert NAME in text
    assert hashlib.sha256(DATA).hexdigest() in text
    assert hashlib.sha256(other).hexdigest() in text
    assert leftovers(tmp_path) == []
    assert len(index.gets(f"/files/{NAME}")) == 1


def test_n03_never_reads_past_the_locked_size(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    append = download_step._Part.append

    def watched(self: download_step._Part, chunk: bytes) -> None:
        nonlocal most
        append(self, chunk)
        most = max(most, self.length)

    monkeypatch.setattr(download_step._Part, "append", watched)
    index.faults[NAME] = servers.endless
    with pytest.raises(IntegrityError, match="more than 200000 bytes"):
        fetch_alpha(tmp_path)
    assert most == len(DATA) + 1
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("length", [len(DATA) - 1, len(DATA) + 1])
def test_n03_another_length_is_seen_before_the_body(index: Index, tmp_path: Path, length: int) -> None:
    index.faults[NAME] = servers.sends(bytes(length))
    with pytest.raises(IntegrityError, match="not the locked size"):
        fetch_alpha(tmp_path)


def test_n15_lock_edited_by_one_digit(index: Index, tmp_path: Path) -> None:
    digest = artifact().sha256
    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    locked = package(Artifact(filename=NAME, size=len(DATA), sha256=wrong))
    with pytest.raises(IntegrityError, match="other bytes under this name"):
        fetch_alpha(tmp_path, locked)
    index.projects["alpha"][0].hashes = {}
    with pytest.raises(IntegrityError, match="not the locked bytes"):
        fetch_alpha(tmp_path, locked)


# --- N04: slow -------------------------------------------------------------------------------------------------------


def test_n04_a_drip_ends_at_the_overall_limit(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.drips(0.02)
    started = time.monotonic()
    with pytest.raises(FetchError, match="too slow"):
        fetch_alpha(tmp_path, limits=Limits(stall=5, grace=0.5, slowest=1e9))
    assert time.monotonic() - started < 3
    assert leftovers(tmp_path) == [f"{NAME}.part"]


def test_n04_silence_ends_at_the_stall_limit(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.stalls(20)
    started = time.monotonic()
    assert fetch_alpha(tmp_path, limits=Limits(attempts=2, backoff=0.01, stall=0.1)) == DATA
    assert time.monotonic() - started < 5


# --- N05 to N09: what servers answer ---------------------------------------------------------------------------------


@pytest.fixture
def tls(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    pem = servers.make_certificate(tmp_path_factory.mktemp("tls"))
    monkeypatch.setenv("PIP_CERT", str(pem))
    with Index(tls=pem) as server:
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        server.add("alpha", File(filename=NAME, data=DATA))
        yield server


def test_n05_https_works_with_the_configured_certificate(tls: Index, tmp_path: Path) -> None:
    assert fetch_alpha(tmp_path) == DATA


def test_n05_no_redirect_leaves_https(tls: Index, tmp_path: Path) -> None:
    with Index() as plain:
        plain.add("alpha", File(filename=NAME, data=DATA))
        tls.faults[NAME] = servers.redirects(plain.file_url(NAME))
        with pytest.raises(FetchError, match="redirects away from https"):
            fetch_alpha(tmp_path)
        assert plain.requests == []


def test_n05_redirect_to_another_https_place(tls: Index, tmp_path: Path) -> None:
    tls.add("cdn", File(filename="blob", data=DATA))
    tls.faults[NAME] = servers.redirects(tls.file_url("blob"))
    assert fetch_alpha(tmp_path) == DATA


def test_n05_redirect_loop(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.redirects(f"/files/{NAME}")
    with pytest.raises(FetchError, match="redirects"):
        fetch_alpha(tmp_path)


def test_n05_redirect_to_a_local_file(index: Index, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(DATA)
    index.faults[NAME] = servers.redirects(f"file://{tmp_path}/secret")
    with pytest.raises(FetchError):
        fetch_alpha(tmp_path / "store")


def test_n06_content_disposition_names_nothing(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.with_headers(Content_Disposition='attachment; filename="../../x"')
    assert fetch_alpha(tmp_path / "store") == DATA
    assert leftovers(tmp_path) == [NAME]


def test_n07_identity_is_asked_for(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.gzipped
    assert fetch_alpha(tmp_path) == DATA


def test_n07_a_needless_encoding_header_changes_nothing(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.with_headers(Content_Encoding="gzip")
    assert fetch_alpha(tmp_path) == DATA


@pytest.mark.parametrize("statuses", [(500,), (503, 502), (429, 500)])
def test_n08_passing_failures_are_retried(index: Index, tmp_path: Path, statuses: tuple[int, ...]) -> None:
    index.faults[NAME] = servers.answers(*statuses)
    assert fetch_alpha(tmp_path) == DATA
    assert len(index.gets(f"/files/{NAME}")) == len(statuses) + 1


def test_n08_retry_after_is_honoured(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.answers(429, Retry_After="1")
    started = time.monotonic()
    assert fetch_alpha(tmp_path) == DATA
    assert time.monotonic() - started >= 1


def test_n08_lasting_failures_are_not(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.answers(*[503] * 50)
    with pytest.raises(FetchError, match=r"gave up after 3 attempts[\s\S]*503"):
        fetch_alpha(tmp_path)


@pytest.mark.parametrize(("status", "word"), [(404, "not there"), (403, "forbidden"), (401, "login")])
def test_n09_final_answers_are_clear(index: Index, tmp_path: Path, status: int, word: str) -> None:
    index.faults[NAME] = servers.answers(*[status] * 9)
    with pytest.raises(FetchError, match=word) as caught:
        fetch_alpha(tmp_path)
    assert index.file_url(NAME) in str(caught.value)
    assert caught.value.fix is not None
    assert len(index.gets(f"/files/{NAME}")) == 1


def test_n09_unknown_to_the_index(index: Index, tmp_path: Path) -> None:
    index.projects.clear()
    with pytest.raises(FetchError, match="index 'pypi' does not have it"):
        fetch_alpha(tmp_path)


# --- N10, N13, N14: which index --------------------------------------------------------------------------------------


def test_n10_only_the_pinned_index_is_asked(index: Index, tmp_path: Path) -> None:
    with Index() as other:
        other.add("alpha", File(filename=NAME, data=DATA))
        assert fetch_alpha(tmp_path / "a", package(artifact(), index="other"), indexes={"other": other.url}) == DATA
        assert index.requests == []
        other.requests.clear()
        other.projects.clear()
        with pytest.raises(FetchError, match="index 'other' does not have it"):
            fetch_alpha(tmp_path / "b", package(artifact(), index="other"), indexes={"other": other.url})
        assert index.requests == []
        assert fetch_alpha(tmp_path / "c", indexes={"other": other.url}) == DATA
        assert other.gets("/simple/alpha/") == other.gets("/simple/alpha/")[:1]


def test_n10_an_index_without_a_url(index: Index, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no index 'nowhere'"):
        fetch_alpha(tmp_path, package(artifact(), index="nowhere"))


def test_n13_a_stale_proxy_is_named(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match="proxy"):
        fetch_alpha(tmp_path)


def test_n14_offline_asks_nobody(index: Index, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no index may be asked"):
        fetch_alpha(tmp_path / "store", offline=True)
    wheelhouse = tmp_path / "wheelhouse"
    wheelhouse.mkdir()
    (wheelhouse / NAME).write_bytes(DATA)
    assert fetch_alpha(tmp_path / "store", offline=True, wheelhouse=[tmp_path / "empty", wheelhouse]) == DATA
    assert index.requests == []


OWN = package(artifact(), index="file")


@pytest.fixture
def own(tmp_path: Path) -> dict[str, LocalFile]:
    """The artifact as a local file of a recipe."""
    path = tmp_path / "wheels" / NAME
    path.parent.mkdir()
    path.write_bytes(DATA)
    return {OWN.artifacts[0].sha256: LocalFile(path=path, key="small.toml: component[3].path (alpha)")}


def test_a_local_file_is_copied_and_then_not_needed(own: dict[str, LocalFile], tmp_path: Path) -> None:
    assert fetch_alpha(tmp_path / "store", OWN, local=own, offline=True) == DATA
    (file,) = own.values()
    file.path.unlink()
    assert fetch_alpha(tmp_path / "store", OWN, local=own) == DATA
    assert leftovers(tmp_path / "store") == [NAME]


@pytest.mark.parametrize("data", [None, b"", DATA[:-1] + b"x", DATA + b"x"])
@pytest.mark.parametrize("stored", [False, True])
def test_a_local_file_that_is_missing_or_another_one(
    own: dict[str, LocalFile], tmp_path: Path, stored: bool, data: bytes | None
) -> None:
    (file,) = own.values()
    if stored:
        fetch_alpha(tmp_path / "store", OWN, local=own)
    if data is None:
        file.path.unlink()
    else:
        file.path.write_bytes(data)
    if data is None and stored:
        assert fetch_alpha(tmp_path / "store", OWN, local=own) == DATA
        return
    with pytest.raises(FetchError) as caught:
        fetch_alpha(tmp_path / "store", OWN, local=own)
    assert isinstance(caught.value, IntegrityError) == (data is not None)
    assert caught.value.where == file.key
    assert str(file.path) in str(caught.value)
    assert leftovers(tmp_path / "store") == [NAME] * stored


def test_a_local_file_that_was_only_touched_is_still_the_one(own: dict[str, LocalFile], tmp_path: Path) -> None:
    fetch_alpha(tmp_path / "store", OWN, local=own)
    (file,) = own.values()
    file.path.write_bytes(DATA)
    assert fetch_alpha(tmp_path / "store", OWN, local=own) == DATA


def test_a_wheelhouse_stands_in_for_a_local_file(own: dict[str, LocalFile], tmp_path: Path) -> None:
    (file,) = own.values()
    house = file.path.parent.rename(tmp_path / "house")
    assert fetch_alpha(tmp_path / "store", OWN, local=own, wheelhouse=[house], offline=True) == DATA


def test_a_local_file_that_no_recipe_names(index: Index, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="the recipe names none") as caught:
        fetch_alpha(tmp_path / "store", OWN)
    assert caught.value.where == NAME
    assert index.requests == []


def test_an_optional_local_file_may_be_missing(own: dict[str, LocalFile], tmp_path: Path) -> None:
    (file,) = own.values()
    file.path.unlink()
    fetched = fetch([package(artifact(), index="file", optional=True)], into=tmp_path / "store", local=own)
    (missing,) = fetched.missing
    assert str(file.path) in missing.reason


def test_n14_an_index_that_is_down_is_one_fault(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    locked = [package(artifact(DATA[:n], f"p{n}-1.0-py3-none-any.whl"), name=f"p{n}") for n in range(1, 9)]
    with pytest.raises(FetchError, match="index 'pypi'") as caught:
        fetch(locked, into=tmp_path, limits=QUICK, jobs=1)
    assert "faults" not in str(caught.value)
    assert "--offline --wheelhouse" in str(caught.value)


def test_find_links_and_file_indexes_are_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / NAME).write_bytes(DATA)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert fetch_alpha(tmp_path / "store") == DATA
    (links / NAME).write_bytes(DATA[:-1] + b"!")
    with pytest.raises(IntegrityError, match="not the locked bytes"):
        fetch_alpha(tmp_path / "other")


def test_a_good_copy_elsewhere_makes_up_for_a_bad_one(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / NAME).write_bytes(bytes(len(DATA)))
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    assert fetch_alpha(tmp_path / "store") == DATA


# --- URL sources and optional packages -------------------------------------------------------------------------------


def test_a_url_source_needs_no_index(index: Index, tmp_path: Path) -> None:
    locked = package(artifact(url=index.file_url(NAME)), index="url")
    assert fetch_alpha(tmp_path, locked) == DATA
    assert [path for _, path, _ in index.requests] == [f"/files/{NAME}"]


def test_an_optional_package_may_be_missing(index: Index, tmp_path: Path) -> None:
    gone = artifact(b"x", "gone-1.0-py3-none-any.whl", url=index.file_url("gone-1.0-py3-none-any.whl"))
    locked = [ALPHA, package(gone, name="gone", index="url", optional=True)]
    fetched = fetch(locked, into=tmp_path, limits=QUICK)
    assert set(fetched.paths) == {ALPHA.artifacts[0].sha256}
    assert [(item.package, "404" in item.reason) for item in fetched.missing] == [("gone", True)]


def test_an_optional_package_with_other_bytes_is_an_error(index: Index, tmp_path: Path) -> None:
    locked = package(artifact(b"x" * len(DATA), url=index.file_url(NAME)), index="url", optional=True)
    with pytest.raises(IntegrityError):
        fetch([locked], into=tmp_path, limits=QUICK)


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "symlink", "folder", "absent"])
def test_a_damaged_artifact_is_fetched_again(index: Index, tmp_path: Path, damage: str) -> None:
    fetch_alpha(tmp_path)
    path = artifact_path(tmp_path, ALPHA.artifacts[0])
    path.unlink()
    if damage == "truncated":
        path.write_bytes(DATA[:-1])
    elif damage == "symlink":
        (tmp_path / "elsewhere").write_bytes(DATA)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        (path / "inside").mkdir(parents=True)
    assert fetch_alpha(tmp_path) == DATA
    assert stat.S_ISREG(path.lstat().st_mode)


def test_verify_finds_a_flipped_bit(index: Index, tmp_path: Path) -> None:
    fetch_alpha(tmp_path)
    path = artifact_path(tmp_path, ALPHA.artifacts[0])
    path.chmod(0o644)
    path.write_bytes(bytes([DATA[0] ^ 1]) + DATA[1:])
    assert fetch_alpha(tmp_path) != DATA
    assert fetch_alpha(tmp_path, verify=True) == DATA


def test_a_wrong_file_in_the_wheelhouse_is_named(index: Index, tmp_path: Path) -> None:
    wheelhouse = tmp_path / "wheelhouse"
    wheelhouse.mkdir()
    (wheelhouse / NAME).write_bytes(DATA[:-1] + b"?")
    with pytest.raises(IntegrityError, match="wheelhouse"):
        fetch_alpha(tmp_path / "store", wheelhouse=[wheelhouse])
    assert leftovers(tmp_path / "store") == []


def test_an_unwritable_store(index: Index, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(HostError):
        fetch_alpha(tmp_path / "store")


def test_export_makes_a_flat_folder(index: Index, tmp_path: Path) -> None:
    fetched = fetch([ALPHA], into=tmp_path / "store", limits=QUICK)
    for _ in range(2):
        exported = export_wheelhouse(ALPHA.artifacts, fetched, tmp_path / "out")
        assert exported == (tmp_path / "out" / NAME,)
    assert exported[0].samefile(fetched.paths[ALPHA.artifacts[0].sha256])
    (tmp_path / "out" / NAME).unlink()
    (tmp_path / "out" / NAME).write_bytes(b"old")
    export_wheelhouse(ALPHA.artifacts, fetched, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]
    assert exported[0].read_bytes() == DATA


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_export_to_another_file_system(index: Index, tmp_path: Path) -> None:
    fetched = fetch([ALPHA], into=tmp_path, limits=QUICK)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (exported,) = export_wheelhouse(ALPHA.artifacts, fetched, Path(folder))
        assert exported.read_bytes() == DATA


def test_all_faults_come_together(index: Index, tmp_path: Path) -> None:
    for name in ("beta", "gamma"):
        index.add(name, File(filename=f"{name}-1.0-py3-none-any.whl", data=DATA))
        index.faults[f"{name}-1.0-py3-none-any.whl"] = servers.sends(bytes(len(DATA)))
    locked = [package(artifact(filename=f"{name}-1.0-py3-none-any.whl"), name=name) for name in ("beta", "gamma")]
    with pytest.raises(IntegrityError, match=r"2 faults[\s\S]*beta[\s\S]*gamma"):
        fetch(locked, into=tmp_path, limits=QUICK, jobs=1)


# --- several at once, and ^C -----------------------------------------------------------------------------------------


def _fetch_in_child(store: Path, done: object) -> None:
    done.put(fetch_alpha(store) == DATA)


def test_two_processes_download_once(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.stops_every(50_000)
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    children = [context.Process(target=_fetch_in_child, args=(tmp_path, done)) for _ in range(3)]
    for child in children:
        child.start()
    assert [done.get(timeout=20) for _ in children] == [True] * 3
    for child in children:
        child.join()
    starts = [headers.get("range", "bytes=0-") for headers in index.gets(f"/files/{NAME}")]
    assert len(starts) == len(set(starts)) == 4
    assert leftovers(tmp_path) == [NAME]


def test_interruption_keeps_the_part(index: Index, tmp_path: Path) -> None:
    index.faults[NAME] = servers.stalls(30)
    timer = threading.Timer(0.7, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch_alpha(tmp_path, limits=Limits(stall=25))
    assert time.monotonic() - started < 5
    part = artifact_path(tmp_path, ALPHA.artifacts[0]).with_suffix(".whl.part")
    assert part.read_bytes() == DATA[: len(DATA) // 2]
    index.faults.clear()
    assert fetch_alpha(tmp_path) == DATA
    assert index.gets(f"/files/{NAME}")[-1]["range"] == f"bytes={len(DATA) // 2}-"

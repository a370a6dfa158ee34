"""Resolution by the real pip against real indexes, for a target that is not this machine."""

from __future__ import annotations

import datetime as dt
import hashlib
import io
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from composer import _pip
from composer.errors import FetchError, HostError, IntegrityError, LockError, RecipeError
from composer.model.lock import AppliedOverride, ExcludedRequirement, Lock, parse_lock, render_lock
from composer.steps import resolve as resolve_step
from composer.steps.fetch import export_wheelhouse, fetch
from composer.steps.load import LocalFile
from composer.steps.resolve import (
    Exclude,
    LocalSource,
    Override,
    ResolveRequest,
    UrlSource,
    marker_environment,
    resolve,
)
from tests import servers
from tests.servers import File, Index
from tests.wheels import build_wheel, wheel_filename

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "linux_x86_64")
MARCH = dt.datetime(2026, 3, 10, tzinfo=dt.UTC)


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
        yield server


def put(
    index: Index,
    name: str,
    version: str,
    requires: Sequence[str] = (),
    *,
    tag: str = "py3-none-any",
    sidecar: bool = True,
    uploaded: str | None = "2026-01-01T00:00:00Z",
    **facts: object,
) -> File:
    data = build_wheel(name, version, {f"{name}.py": b"x = 1\n"}, requires=requires, tag=tag)
    return index.add(
        name,
        File(
            filename=wheel_filename(name, version, tag), data=data, uploaded=uploaded,
            metadata=metadata_of(data) if sidecar else None, **facts,
        ),
    )  # fmt: skip


def metadata_of(wheel: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))


def lock_of(*roots: str, **more: object) -> Lock:
    more = {"python": "3.12", "platforms": PLATFORMS, **more}
    lock = resolve(ResolveRequest(name="small", recipe="a" * 64, roots=roots, **more))
    assert parse_lock(render_lock(lock), "lock").pins == lock.pins
    return lock


def filenames(lock: Lock) -> set[str]:
    return {artifact.filename for package in lock.packages for artifact in package.artifacts}


# --- for the target --------------------------------------------------------------------------------------------------


def test_markers_are_those_of_the_target(index: Index) -> None:
    wanted = {
        "yes-python": "python_version == '3.13'",
        "yes-full": "python_full_version >= '3.13.0'",
        "yes-machine": "platform_machine == 'aarch64'",
        "yes-system": "sys_platform == 'linux' and platform_python_implementation == 'CPython'",
        "no-python": "python_version < '3.13'",
        "no-machine": "platform_machine == 'x86_64'",
        "no-system": "sys_platform == 'win32' or os_name == 'nt'",
    }
    put(index, "alpha", "1.0", [f"{name}; {marker}" for name, marker in wanted.items()])
    for name in wanted:
        put(index, name, "1.0")
    lock = lock_of("alpha", python="3.13", machine="aarch64", platforms=("manylinux_2_28_aarch64",))
    assert set(lock.pins) == {"alpha", *(name for name in wanted if name.startswith("yes"))}


@pytest.mark.parametrize(
    ("python", "platforms", "expected"),
    [
        ("3.12", PLATFORMS, "cp312-cp312-manylinux_2_28_x86_64"),
        ("3.13", PLATFORMS, "cp313-cp313-manylinux_2_28_x86_64"),
        ("3.12", PLATFORMS[1:], "cp38-abi3-manylinux_2_17_x86_64"),
        ("3.14", PLATFORMS[2:], "py3-none-any"),
    ],
)
def test_tags_are_those_of_the_target(index: Index, python: str, platforms: tuple[str, ...], expected: str) -> None:
    for tag in ("cp312-cp312-manylinux_2_28_x86_64", "cp313-cp313-manylinux_2_28_x86_64", "py3-none-any"):
        put(index, "alpha", "1.0", tag=tag)
    put(index, "alpha", "1.0", tag="cp38-abi3-manylinux_2_17_x86_64")
    put(index, "alpha", "1.0", tag="cp312-cp312-win_amd64")
    lock = lock_of("alpha", python=python, platforms=platforms)
    assert filenames(lock) == {f"alpha-1.0-{expected}.whl"}


def test_requires_python_is_that_of_the_target(index: Index) -> None:
    put(index, "alpha", "1.0", requires_python=">=3.9")
    put(index, "alpha", "2.0", requires_python=">=3.13")
    assert lock_of("alpha", python="3.12").pins == {"alpha": "1.0"}
    assert lock_of("alpha", python="3.13").pins == {"alpha": "2.0"}


def test_marker_environment_has_every_variable() -> None:
    from packaging.markers import default_environment

    assert set(marker_environment("3.12", "x86_64")) == set(default_environment())
    assert marker_environment("3.12.4", "x86_64")["python_full_version"] == "3.12.4"


def test_the_pip_configuration_of_an_installation_changes_nothing(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(index, "alpha", "1.0", ["beta"])
    put(index, "beta", "1.0")
    put(index, "beta", "2.0b1")
    config = tmp_path / "pip.conf"
    config.write_text("[install]\nno-deps = true\nrequire-hashes = true\nno-binary = :all:\npre = true\nuser = true\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    assert lock_of("alpha").pins == {"alpha": "1.0", "beta": "1.0"}


# --- what is asked of the index --------------------------------------------------------------------------------------


def test_no_wheel_is_downloaded_where_metadata_files_are(index: Index) -> None:
    put(index, "alpha", "1.0", ["beta[extra]>=1"])
    put(index, "beta", "1.5")
    lock = lock_of("alpha")
    assert lock.pins == {"alpha": "1.0", "beta": "1.5"}
    assert not [path for method, path, _ in index.requests if path.endswith(".whl")]
    alpha = lock.packages[0].artifacts[0]
    data = index.projects["alpha"][0].data
    assert (alpha.size, alpha.sha256, alpha.url) == (len(data), hashlib.sha256(data).hexdigest(), None)


def test_only_ranges_are_read_where_they_are_not(index: Index) -> None:
    index.html = True
    put(index, "alpha", "1.0", ["beta"], sidecar=False)
    file = put(index, "beta", "1.0", sidecar=False)
    lock = lock_of("alpha", as_of=MARCH)
    assert lock.packages[1].artifacts[0].size == len(file.data)
    gets = [headers for method, path, headers in index.requests if method == "GET" and path.endswith(".whl")]
    assert gets
    assert all("range" in headers for headers in gets)


def test_a_digest_weaker_than_sha256_is_not_taken(index: Index) -> None:
    index.html = True
    file = put(index, "alpha", "1.0")
    file.hashes = {"md5": hashlib.md5(file.data, usedforsecurity=False).hexdigest()}
    assert lock_of("alpha").packages[0].artifacts[0].sha256 == hashlib.sha256(file.data).hexdigest()


def test_sdists_are_not_taken(index: Index) -> None:
    put(index, "alpha", "1.0")
    index.add("alpha", File(filename="alpha-2.0.tar.gz", data=b"not even an archive"))
    assert lock_of("alpha").pins == {"alpha": "1.0"}


# --- as of -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("html", [False, True])
def test_nothing_uploaded_later_is_seen(index: Index, html: bool) -> None:
    index.html = html
    put(index, "alpha", "1.0", uploaded="2026-03-09T23:59:59.999999Z")
    put(index, "alpha", "2.0", uploaded="2026-03-10T00:00:00Z")
    assert lock_of("alpha", as_of=MARCH).pins == {"alpha": "1.0"}
    assert lock_of("alpha").pins == {"alpha": "2.0"}


def test_a_time_without_a_zone_is_utc(index: Index) -> None:
    put(index, "alpha", "1.0", uploaded="2026-03-09T23:59:59")
    put(index, "alpha", "2.0", uploaded="2026-03-10T00:00:00")
    assert lock_of("alpha", as_of=MARCH).pins == {"alpha": "1.0"}


def test_n17_cooldown(index: Index) -> None:
    put(index, "alpha", "1.0", uploaded="2026-03-01T00:00:00Z")
    put(index, "alpha", "2.0", uploaded="2026-03-08T00:00:00Z")
    lock = lock_of("alpha", cooldown=7, now=MARCH)
    assert lock.pins == {"alpha": "1.0"}
    assert lock.as_of == dt.datetime(2026, 3, 3, tzinfo=dt.UTC)
    assert lock_of("alpha", cooldown=1, now=MARCH).pins == {"alpha": "2.0"}
    early = dt.datetime(2026, 3, 2, tzinfo=dt.UTC)
    assert lock_of("alpha", cooldown=1, now=MARCH, as_of=early).as_of == early


def test_without_upload_times_a_date_needs_a_pin(index: Index) -> None:
    put(index, "alpha", "1.0", uploaded=None)
    put(index, "alpha", "2.0", uploaded=None)
    with pytest.raises(LockError, match="no upload times for alpha") as caught:
        lock_of("alpha", as_of=MARCH)
    assert "constraints" in str(caught.value)
    assert lock_of("alpha", as_of=MARCH, constraints=("alpha==1.0",)).pins == {"alpha": "1.0"}
    assert lock_of("alpha==1.0", as_of=MARCH).pins == {"alpha": "1.0"}


def test_undated_local_files_do_not_pass_a_date(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(index, "alpha", "1.0")
    (tmp_path / wheel_filename("alpha", "9.0")).write_bytes(build_wheel("alpha", "9.0", {}))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert lock_of("alpha", as_of=MARCH).pins == {"alpha": "1.0"}
    lock = lock_of("alpha")
    assert lock.pins == {"alpha": "9.0"}
    assert lock.packages[0].artifacts[0].sha256 == hashlib.sha256(next(tmp_path.iterdir()).read_bytes()).hexdigest()


# --- overrides and excludes ------------------------------------------------------------------------------------------


def test_an_override_replaces_every_requirement(index: Index) -> None:
    put(index, "alpha", "1.0", ["gamma==1.0", "beta"])
    put(index, "beta", "1.0", ["gamma<2; sys_platform == 'linux'"])
    for version in ("1.0", "2.0", "3.0"):
        put(index, "gamma", version)
    lock = lock_of("alpha", "gamma==2.0", overrides=(Override(requirement="Gamma==2.0", reason="faster"),))
    assert lock.pins == {"alpha": "1.0", "beta": "1.0", "gamma": "2.0"}
    (row,) = lock.overridden
    assert (row.requirement, row.reason) == ("Gamma==2.0", "faster")
    assert [text.split(":")[0] for text in row.replaced] == ["alpha==1.0", "beta==1.0"]


def test_an_override_of_one_distribution_leaves_the_others(index: Index) -> None:
    put(index, "alpha", "1.0", ["gamma<2", "beta"])
    put(index, "beta", "1.0", ["gamma==2.0"])
    for version in ("1.0", "2.0", "3.0"):
        put(index, "gamma", version)
    with pytest.raises(LockError):
        lock_of("alpha")
    lock = lock_of("alpha", overrides=(Override(requirement="gamma<3", reason="wrong bound", of="alpha"),))
    assert lock.pins["gamma"] == "2.0"
    assert lock.overridden == (
        AppliedOverride(requirement="gamma<3", reason="wrong bound", replaced=("alpha==1.0: gamma<2",)),
    )


def test_an_override_nobody_needs_is_not_listed(index: Index) -> None:
    put(index, "alpha", "1.0", ["beta==1.0"])
    put(index, "beta", "1.0")
    assert lock_of("alpha", overrides=(Override(requirement="beta==1.0", reason="same"),)).overridden == ()


def test_an_exclude_drops_the_requirement_and_what_it_brings(index: Index) -> None:
    put(index, "alpha", "1.0", ["beta", "gamma", "delta; extra == 'more'"])
    put(index, "beta", "1.0", ["gamma>=1"])
    put(index, "gamma", "1.0", ["epsilon"])
    lock = lock_of(
        "alpha",
        excludes=(Exclude(name="Gamma", reason="not imported"), Exclude(name="delta", reason="an extra's")),
    )
    assert lock.pins == {"alpha": "1.0", "beta": "1.0"}
    assert lock.excluded == (
        ExcludedRequirement(name="gamma", reason="not imported", required_by=("alpha==1.0", "beta==1.0")),
        ExcludedRequirement(name="delta", reason="an extra's"),
    )
    assert not index.gets("/simple/gamma/")


def test_an_exclude_of_one_distribution_leaves_the_others(index: Index) -> None:
    put(index, "alpha", "1.0", ["beta", "gamma>=2"])
    put(index, "beta", "1.0", ["gamma>=1"])
    put(index, "gamma", "1.0")
    lock = lock_of("alpha", excludes=(Exclude(name="gamma", reason="wrong", of="alpha"),))
    assert lock.pins == {"alpha": "1.0", "beta": "1.0", "gamma": "1.0"}


# --- indexes ---------------------------------------------------------------------------------------------------------


def test_n10_a_pinned_name_comes_from_its_index_only(index: Index) -> None:
    with Index() as other:
        put(index, "alpha", "1.0", ["beta"])
        put(other, "beta", "1.0", ["gamma"])
        put(index, "beta", "99.0")
        put(index, "gamma", "1.0")
        put(other, "gamma", "99.0")
        lock = lock_of("alpha", pins={"Beta": "other"}, indexes={"other": other.url})
        assert lock.pins == {"alpha": "1.0", "beta": "1.0", "gamma": "1.0"}
        assert {package.name: package.index for package in lock.packages} == {
            "alpha": "pypi", "beta": "other", "gamma": "pypi",
        }  # fmt: skip
        assert {path for _, path, _ in index.requests if "beta" in path} == set()
        assert {path for _, path, _ in other.requests if "gamma" in path} == set()
        other.projects.clear()
        with pytest.raises(LockError, match="beta"):
            lock_of("alpha", pins={"beta": "other"}, indexes={"other": other.url})


@pytest.mark.parametrize("how", ["down", "refused", "not an index"])
def test_an_index_that_fails_is_not_skipped(index: Index, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    put(index, "alpha", "1.0")
    with Index(down=how == "down") as extra:
        url = {"refused": "http://127.0.0.1:9/simple", "not an index": extra.root + "/files"}.get(how, extra.url)
        if how == "not an index":
            monkeypatch.setattr(
                servers.Request, "_file", lambda self, _: self.send(200, b"hello", Content_Type="text/css")
            )
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", url)
        with pytest.raises(FetchError) as caught:
            lock_of("alpha")
    assert "127.0.0.1" in str(caught.value)


def test_a_malformed_page(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    put(index, "alpha", "1.0")
    monkeypatch.setattr(servers, "_json", lambda *_: {"files": [3]})
    with pytest.raises(FetchError, match="malformed"):
        lock_of("alpha")


def test_a_url_source_takes_part_in_the_resolution(index: Index) -> None:
    file = put(index, "hidden", "2.0", ["gamma"], sidecar=False)
    put(index, "alpha", "1.0", ["hidden>=1"])
    put(index, "gamma", "1.0")
    url = index.file_url(file.filename)
    source = UrlSource(name="hidden", version="2.0", url=url, sha256=hashlib.sha256(file.data).hexdigest())
    lock = lock_of("alpha", url_sources=(source,), as_of=MARCH)
    assert lock.pins == {"alpha": "1.0", "gamma": "1.0", "hidden": "2.0"}
    hidden = lock.packages[-1] if lock.packages[-1].name == "hidden" else lock.packages[1]
    assert (hidden.name, hidden.index, hidden.artifacts[0].url) == ("hidden", "url", url)
    assert hidden.artifacts[0].size == len(file.data)
    assert not index.gets("/simple/hidden/")


def test_an_optional_url_source_is_locked_unseen(index: Index) -> None:
    put(index, "alpha", "1.0")
    url = "https://unreachable.invalid/beta-1.0%2Bcu128-py3-none-any.whl"
    source = UrlSource(name="beta", version="1.0+cu128", url=url, sha256="b" * 64, size=5, optional=True)
    beta = lock_of("alpha", url_sources=(source,)).packages[-1]
    assert (beta.optional, beta.artifacts[0].filename) == (True, "beta-1.0+cu128-py3-none-any.whl")
    unsized = UrlSource(name="beta", version="1.0+cu128", url=url, sha256="b" * 64, optional=True)
    assert lock_of("alpha", url_sources=(unsized,)).packages[-1].artifacts[0].size == 0


def local(folder: Path, version: str = "2.0", requires: Sequence[str] = (), **change: object) -> LocalSource:
    path = folder / "wheels #1" / wheel_filename("hidden", version, "py3-none-any")
    path.parent.mkdir()
    path.write_bytes(build_wheel("hidden", version, {"hidden.py": b""}, requires=requires))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    file = LocalFile(path=path, key="small.toml: component[1].path (hidden)")
    facts = {"name": "hidden", "version": version, "file": file, "sha256": sha256, **change}
    return LocalSource(**facts)


def test_a_local_file_takes_part_in_the_resolution(index: Index, tmp_path: Path) -> None:
    source = local(tmp_path, requires=["gamma"], optional=True)
    put(index, "hidden", "3.0")
    put(index, "alpha", "1.0", ["hidden>=1"])
    put(index, "gamma", "1.0")
    lock = lock_of("alpha", "hidden==2.0", files=(source,), as_of=MARCH)
    assert lock.pins == {"alpha": "1.0", "gamma": "1.0", "hidden": "2.0"}
    (hidden,) = (one for one in lock.packages if one.name == "hidden")
    (artifact,) = hidden.artifacts
    assert (hidden.index, hidden.optional, artifact.url, artifact.sha256) == ("file", True, None, source.sha256)
    assert (artifact.filename, artifact.size) == (source.file.path.name, source.file.path.stat().st_size)
    assert str(tmp_path) not in render_lock(lock)


def test_a_local_file_that_is_missing_or_another_one_is_not_locked(index: Index, tmp_path: Path) -> None:
    source = local(tmp_path)
    source.file.path.write_bytes(b"changed")
    with pytest.raises(IntegrityError) as caught:
        lock_of("hidden==2.0", files=(source,))
    assert caught.value.where == source.file.key
    assert str(source.file.path) in str(caught.value)
    source.file.path.unlink()
    with pytest.raises(FetchError) as missing:
        lock_of("hidden==2.0", files=(source,))
    assert missing.value.where == source.file.key
    assert f"{source.file.path}: No such file" in str(missing.value)
    assert index.requests == []


# --- upgrades --------------------------------------------------------------------------------------------------------


def test_upgrade_moves_only_what_is_named(index: Index) -> None:
    for name in ("alpha", "beta", "gamma"):
        put(index, name, "1.0", ["beta", "gamma"] if name == "alpha" else ())
    first = lock_of("alpha")
    for name in ("alpha", "beta", "gamma"):
        put(index, name, "2.0", ["beta", "gamma"] if name == "alpha" else ())
    assert lock_of("alpha", previous=first).pins == first.pins
    assert lock_of("alpha", previous=first, upgrade=("Beta",)).pins == {**first.pins, "beta": "2.0"}
    assert set(lock_of("alpha").pins.values()) == {"2.0"}
    assert lock_of("alpha==2.0", previous=first).pins == {"alpha": "2.0", "beta": "1.0", "gamma": "1.0"}


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_conflict_is_explained(index: Index) -> None:
    put(index, "alpha", "1.0", ["gamma==1.0"])
    put(index, "beta", "1.0", ["gamma==2.0"])
    put(index, "gamma", "1.0")
    put(index, "gamma", "2.0")
    with pytest.raises(LockError) as caught:
        lock_of("alpha", "beta")
    assert "alpha 1.0 depends on gamma==1.0" in str(caught.value)
    assert "beta 1.0 depends on gamma==2.0" in str(caught.value)


@pytest.mark.parametrize("root", ["alpha==9.0", "nothing"])
def test_what_no_index_has_is_named(index: Index, root: str) -> None:
    put(index, "alpha", "1.0")
    with pytest.raises(LockError, match=root):
        lock_of(root)


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"roots": ("alpha; rm",)}, "roots"),
        ({"roots": ("--index-url=http://x",)}, "roots"),
        ({"roots": ("alpha @ https://example.org/a.whl",)}, "roots"),
        ({"constraints": ("../x",)}, "constraints"),
        ({"overrides": (Override(requirement="=1", reason=""),)}, "overrides"),
        ({"excludes": (Exclude(name="Alpha", reason=""),)}, "alpha"),
        ({"pins": {"alpha": "other"}}, "alpha"),
        ({"as_of": dt.datetime(2026, 3, 10)}, "as-of"),
    ],
)
def test_input_that_cannot_be_meant(more: dict[str, object], where: str) -> None:
    request = {"roots": ("alpha",), "python": "3.12", "platforms": PLATFORMS, **more}
    with pytest.raises(RecipeError) as caught:
        resolve(ResolveRequest(name="small", recipe="a" * 64, **request))
    assert str(caught.value).startswith(where)


def test_another_pip_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _pip.check_interfaces()
    monkeypatch.setattr(_pip._Distribution, "iter_dependencies", lambda self: ())
    with pytest.raises(_pip.PipFault, match=r"pip 26\.3") as caught:
        _pip.check_interfaces()
    assert "Distribution.iter_dependencies(self, extras)" in caught.value.why
    assert isinstance(resolve_step._translate({"what": "pip", "why": "", "kind": "pip"}), HostError)


# --- and pip reads the lock ------------------------------------------------------------------------------------------


def test_pip_installs_from_the_lock_alone(index: Index, tmp_path: Path) -> None:
    put(index, "alpha", "1.0", ["beta"])
    put(index, "beta", "1.0")
    python = ".".join(platform.python_version_tuple()[:2])
    lock = lock_of("alpha", python=python, machine=platform.machine())
    fetched = fetch(lock.packages, into=tmp_path / "store")
    artifacts = [artifact for package in lock.packages for artifact in package.artifacts]
    export_wheelhouse(artifacts, fetched, tmp_path / "wheelhouse")
    (tmp_path / lock.filename).write_text(render_lock(lock))
    index.down = True
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--target", tmp_path / "out",
         "-r", tmp_path / lock.filename],
        check=True,
    )  # fmt: skip
    assert (tmp_path / "out" / "alpha.py").exists()
    assert (tmp_path / "out" / "beta.py").exists()

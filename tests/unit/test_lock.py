"""The lock as text: what is written is PEP 751, reads back equal, and nothing else is accepted."""

from __future__ import annotations

import dataclasses
import datetime as dt
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.pylock import Pylock, is_valid_pylock_path

from composer.errors import LockError
from composer.model.lock import (
    AppliedOverride,
    Artifact,
    ExcludedRequirement,
    Lock,
    LockedPackage,
    parse_lock,
    render_lock,
)

LOCK = Lock(
    name="small",
    recipe="a" * 64,
    python="3.12",
    machine="x86_64",
    platforms=tuple(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)),
    as_of=dt.datetime(2026, 3, 11, tzinfo=dt.UTC),
    packages=(
        LockedPackage(
            name="alpha", version="1.0", index="pypi", requires_python=">=3.10",
            artifacts=(Artifact(filename="alpha-1.0-py3-none-any.whl", size=12, sha256="b" * 64),),
        ),
        LockedPackage(
            name="alpha-own", version="1.0", index="file", optional=True,
            artifacts=(Artifact(filename="alpha_own-1.0-py3-none-any.whl", size=7, sha256="d" * 64),),
        ),
        LockedPackage(
            name="beta-kit", version="2.0+cu128", index="url", optional=True,
            artifacts=(
                Artifact(
                    filename="beta_kit-2.0+cu128-py3-none-any.whl", size=34, sha256="c" * 64,
                    url="https://example.org/beta_kit-2.0%2Bcu128-py3-none-any.whl",
                ),
            ),
        ),
    ),
    excluded=(ExcludedRequirement(name="gamma", reason='not "used"', required_by=("alpha==1.0",)),),
    overridden=(AppliedOverride(requirement="beta-kit==2.0", reason="newer", replaced=("alpha==1.0: beta-kit==1",)),),
)  # fmt: skip
TEXT = render_lock(LOCK)


def test_reads_back_equal() -> None:
    assert parse_lock(TEXT, "lock") == LOCK


def test_is_pep_751() -> None:
    pylock = Pylock.from_dict(tomllib.loads(TEXT))
    pylock.validate()
    assert [package.name for package in pylock.packages] == ["alpha", "alpha-own", "beta-kit"]
    wheel = pylock.packages[0].wheels[0]
    assert (wheel.path, wheel.url, wheel.size) == ("wheelhouse/alpha-1.0-py3-none-any.whl", None, 12)
    assert LOCK.filename == "pylock.small.toml"
    assert is_valid_pylock_path(Path(LOCK.filename))


def test_names_no_host_but_that_of_a_url_source() -> None:
    assert TEXT.count("://") == 1


def test_order_of_the_values_does_not_show() -> None:
    turned = dataclasses.replace(LOCK, packages=LOCK.packages[::-1])
    assert render_lock(turned) == TEXT


def test_lines_can_be_read() -> None:
    assert all(len(line) < 250 for line in TEXT.splitlines())
    assert 'required-by = ["alpha==1.0"]' in TEXT.splitlines()


def test_pins() -> None:
    assert LOCK.pins == {"alpha": "1.0", "alpha-own": "1.0", "beta-kit": "2.0+cu128"}


def test_absent_parts_stay_absent() -> None:
    bare = dataclasses.replace(LOCK, as_of=None, excluded=(), overridden=())
    assert parse_lock(render_lock(bare), "lock") == bare
    assert "as-of" not in render_lock(bare)


@given(st.text(), st.text())
def test_any_reason_survives(reason: str, replaced: str) -> None:
    lock = dataclasses.replace(
        LOCK,
        excluded=(ExcludedRequirement(name="x", reason=reason),),
        overridden=(AppliedOverride(requirement="y", reason=reason, replaced=(replaced,) * 3),),
    )
    try:
        text = render_lock(lock)
        text.encode()
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    assert parse_lock(text, "lock") == lock


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lock-version", "lock version", "not TOML"),
        ("size = 12", "size = " + "9" * 5_000, "not TOML"),
        ('{ index = "url",', '{ index = "file",', "if and only if"),
        ('lock-version = "1.0"', 'lock-version = "2.0"', "not supported"),
        ('lock-version = "1.0"\n', "", "missing required value"),
        ("schema = 1", "schema = 2", "schema 2"),
        ("schema = 1", "schema = '1'", "expected `int`"),
        ("schema = 1", "schema = 1\ncolour = 3", "colour"),
        ("[tool.wheel-composer]", "[tool.other]", "missing required field"),
        ('recipe = "a', 'recipe = "z', "recipe is not a SHA-256"),
        ("as-of = 2026-03-11T00:00:00Z", "as-of = 2026-03-11T00:00:00", "no time zone"),
        ('{ index = "pypi" }', '{ index = "pypi", colour = 3 }', "colour"),
        ('{ index = "pypi" }', "{}", "index"),
        ('{ index = "pypi" }', '{ index = "https://host/" }', "not a name"),
        ('{ index = "pypi" }', '{ index = "url" }', "if and only if"),
        ('{ index = "url",', '{ index = "pypi",', "if and only if"),
        ('name = "alpha"', 'name = "beta-kit"', "not consistent"),
        ('name = "alpha"', 'name = "Alpha"', "not normalized"),
        ('version = "1.0"\nrequires', "requires", "has no version"),
        ("size = 12,", "", "has no size"),
        ("size = 12", "size = 0", "has no size"),
        ("size = 12", "size = -1", "has no size"),
        ('sha256 = "b', 'md5 = "b', "sha256"),
        ('sha256 = "b', 'sha256 = "B', "sha256"),
        ('sha256 = "bb', 'sha256 = "b', "sha256"),
        ('sha256 = "bb', 'md5 = "x", sha256 = "bb', "one hash"),
        ("wheelhouse/alpha", "../alpha", "path is not"),
        ("wheelhouse/alpha", "/etc/alpha", "path is not"),
        ("wheelhouse/alpha", "wheelhouse/x/alpha", "path is not"),
        ("wheelhouse/alpha", "wheelhouse/../alpha", "path is not"),
        ("https://example.org", "ftp://example.org", "http"),
        ("https://example.org", "https://me:pw@example.org", "credentials"),
        ("https://example.org", "https://[", "http"),
        ("wheels = [\n    { path", 'vcs = { type = "git", url = "x", commit-id = "y" }\nx = [\n    { path', "wheels"),
    ],
)
def test_refuses(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(LockError) as caught:
        parse_lock(TEXT.replace(old, new, 1), "pylock.small.toml")
    assert message in str(caught.value)
    assert "pylock.small.toml" in str(caught.value)


def test_refuses_a_distribution_twice() -> None:
    twice = dataclasses.replace(LOCK, packages=(*LOCK.packages, LOCK.packages[0]))
    with pytest.raises(LockError, match="alpha is locked twice"):
        parse_lock(render_lock(twice), "lock")


def test_lists_all_faults_of_the_packages() -> None:
    with pytest.raises(LockError) as caught:
        parse_lock(TEXT.replace("size = 12", "size = 0").replace("size = 34", "size = 0"), "lock")
    assert "2 faults" in str(caught.value)
    assert "alpha" in str(caught.value)
    assert "beta_kit" in str(caught.value)


def test_refuses_a_lock_of_another_tool() -> None:
    with pytest.raises(LockError, match="not a lock that compose wrote"):
        parse_lock('lock-version = "1.0"\ncreated-by = "pip"\npackages = []\n', "lock")


def test_nesting_is_bounded() -> None:
    with pytest.raises(LockError):
        parse_lock("x = " + "[" * 10_000 + "]" * 10_000, "lock")

"""Globs of recipes: each wildcard crosses what it says and no more, and no pattern is an accident."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import RecipeError
from composer.model.globs import compile_glob, matches


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("a/b.py", ["a/b.py"], ["a/b.pyc", "xa/b.py", "a/bxpy", "A/b.py"]),
        ("*.py", ["a.py", ".py", "a b\n.py"], ["a/b.py", "a.pyc"]),
        ("a?c", ["abc", "a.c"], ["a/c", "ac", "abbc"]),
        ("a/**", ["a/b", "a/b/c", "a/"], ["a", "b/a/c", "ab/c"]),
        ("**/x.so", ["x.so", "a/x.so", "a/b/x.so"], ["a/yx.so", "x.so/a"]),
        ("a/**/x", ["a/x", "a/b/x", "a/b/c/x"], ["ax", "a/bx", "b/a/x"]),
        ("a**z", ["az", "a/b/z", "abz"], ["a/b", "baz"]),
        ("a**/z", ["a/z", "ab/z", "a/b/z"], ["az", "a/bz"]),
        ("**a*b", ["a/ab", "aab", "a/b/ab"], ["a/b", "ab/c"]),
        ("*a*b**c*d", ["xabcd", "aab/bcbd", "ab/c/cd"], ["x/abcd", "abcd/d"]),
        ("**/a*/b*/c", ["a/b/c", "x/ab/a/bb/c"], ["a/x/b/c"]),
        ("[abc]x", ["ax", "cx"], ["dx", "x", "[abc]x"]),
        ("[!a]", ["b", "^"], ["a", "/", ""]),
        ("[.-0]", [".", "0"], ["/", "1"]),
        ("[^a]", ["^", "a"], ["b"]),
        ("[a&&b]", ["a", "&", "b"], ["c"]),
        ("[\\]", ["\\"], ["", "]"]),
        ("[[a]", ["[", "a"], ["b"]),
        ("[a", ["[a"], ["a"]),
        ("[]", ["[]"], [""]),
        ("a+(b)|c$", ["a+(b)|c$"], ["aab", "c", "ab"]),
        ("", [""], ["a"]),
    ],
)
def test_matches(pattern: str, inside: list[str], outside: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [path for path in inside if not matches(path, pattern)] == []
        assert [path for path in outside if matches(path, pattern)] == []


def test_a_turned_range_is_no_glob() -> None:
    with pytest.raises(RecipeError, match=re.escape("'x/[z-a]' is not a glob")):
        compile_glob("x/[z-a]")


@pytest.mark.parametrize("pattern", ["*a" * 30 + "b", "**a" * 30 + "b", "**/a*" * 30 + "b", "*a**a?" * 20 + "b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    started = time.monotonic()
    assert not matches("a" * 1000, pattern)
    assert not matches("a/" * 500, pattern)
    assert time.monotonic() - started < 1


def _reference(path: str, tokens: tuple[str, ...]) -> bool:
    """The meaning of wildcards, tried out one by one."""
    if not tokens:
        return path == ""
    token, *others = tokens
    if token in ("**/", "**", "*"):
        ends = [end for end in range(len(path) + 1) if token != "*" or "/" not in path[:end]]
        ends = [end for end in ends if token != "**/" or end == 0 or path[end - 1] == "/"]
        return any(_reference(path[end:], tuple(others)) for end in ends)
    fits = path[:1] == token or (token == "?" and path[:1] not in ("", "/"))
    return fits and _reference(path[1:], tuple(others))


@given(pattern=st.text(st.sampled_from("ab/*?"), max_size=8), path=st.text(st.sampled_from("ab/"), max_size=8))
def test_wildcards_mean_what_trying_everything_finds(pattern: str, path: str) -> None:
    tokens = tuple(re.findall(r"(?:^|(?<=/))\*\*/|\*\*|.", pattern))
    assert matches(path, pattern) == _reference(path, tokens)


_PATHS = st.text(st.sampled_from("ab/.*?[]!-\\^n\n"), max_size=12)


@given(path=_PATHS)
def test_a_path_matches_itself_when_it_has_no_wildcard(path: str) -> None:
    plain = re.sub(r"[*?\[]", "x", path)
    assert matches(plain, plain)
    assert not matches(f"{plain}x", plain)


@given(pattern=_PATHS, path=_PATHS)
def test_no_pattern_leaks_another_error(pattern: str, path: str) -> None:
    try:
        matched = matches(path, pattern)
    except RecipeError:
        return
    if "**" not in pattern and matched:
        assert path.count("/") == pattern.count("/") or "[" in pattern

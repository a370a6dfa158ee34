"""Globs of recipes: each wildcard crosses what it says and no more, and no pattern is an accident."""

from __future__ import annotations

import re
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

"""Exact application of unified diffs: what GNU patch does where nothing is to be guessed, and refusal elsewhere."""

from __future__ import annotations

import difflib
import random
import re
import subprocess
from pathlib import Path

import pytest

from composer.errors import RecipeError
from composer.formats.patch import apply_patch, parse_patch

PATCHES = Path(__file__).parents[2] / "patches"
TEXT = b"one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\n"


def diff(old: bytes, new: bytes, path: str = "pkg/mod.py", context: int = 3) -> bytes:
    sides = [side.decode("latin-1").splitlines(keepends=True) for side in (old, new)]
    lines = difflib.unified_diff(*sides, f"a/{path}", f"b/{path}", n=context)
    whole = [line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines]
    return "".join(whole).encode("latin-1")


def apply(patch: bytes, content: bytes = TEXT, path: str = "pkg/mod.py") -> bytes:
    result = apply_patch(patch, {path: content}.__getitem__)
    assert list(result) == [path]
    return result[path]


@pytest.mark.parametrize(
    "new",
    [
        TEXT.replace(b"two\n", b"2\n"),
        TEXT.replace(b"one\n", b""),
        b"zero\n" + TEXT,
        TEXT + b"ten\n",
        TEXT.replace(b"nine\n", b"nine"),
        TEXT.replace(b"two\n", b"").replace(b"eight\n", b"8\n8\n"),
        b"",
        TEXT.replace(b"five\n", b"five\r\n"),
        TEXT.replace(b"five\n", b"a\x0bb\x0cc\n"),
    ],
)
@pytest.mark.parametrize("context", [0, 1, 3])
def test_makes_the_new_file(new: bytes, context: int) -> None:
    old, changed = TEXT.decode("latin-1").split("\n"), new.decode("latin-1").split("\n")
    patch = _diff_lf(old, changed, context)
    assert apply(patch) == new


def _diff_lf(old: list[str], new: list[str], context: int) -> bytes:
    """Like diff -u, with lines that end in LF alone."""
    sides = [[line + "\n" for line in side[:-1]] + ([side[-1]] if side[-1] else []) for side in (old, new)]
    lines = difflib.unified_diff(*sides, "a/pkg/mod.py", "b/pkg/mod.py", n=context)
    whole = [line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines]
    return "".join(whole).encode("latin-1")


def test_agrees_with_diff_and_patch_on_random_edits(tmp_path: Path) -> None:
    random.seed(7)
    for _ in range(12):
        old = [f"{random.randrange(6)}\n".encode() for _ in range(40)]
        new = [line for line in old if random.random() > 0.1]
        new.insert(random.randrange(len(new)), b"inserted\n")
        (tmp_path / "old").write_bytes(b"".join(old))
        (tmp_path / "new").write_bytes(b"".join(new))
        labels = ["--label", "a/pkg/mod.py", "--label", "b/pkg/mod.py"]
        done = subprocess.run(["diff", "-u", *labels, "old", "new"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 1
        assert apply(done.stdout, b"".join(old)) == b"".join(new)


def test_dep3_header_and_git_lines_are_read_past() -> None:
    body = diff(TEXT, TEXT.replace(b"two", b"2"))
    git = b"diff --git a/pkg/mod.py b/pkg/mod.py\nindex 0123456..89abcde 100644\n"
    header = b"Description: x\nOrigin: vendor\nForwarded: no\nWhy: y\n---\n"
    assert apply(header + git + body) == TEXT.replace(b"two", b"2")


def test_several_files_in_one_patch() -> None:
    patch = diff(TEXT, TEXT + b"x\n", "a.py") + diff(TEXT, b"y\n" + TEXT, "b/c.py")
    result = apply_patch(patch, lambda path: TEXT)
    assert result == {"a.py": TEXT + b"x\n", "b/c.py": b"y\n" + TEXT}


GOOD = diff(TEXT, TEXT.replace(b"five", b"5"))


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (b"", "not a unified diff"),
        (b"2c\nzwei\n.\nw\n", "not a unified diff"),
        (GOOD.replace(b"pkg/mod.py", b"../mod.py"), "relative path"),
        (GOOD.replace(b"pkg/mod.py", b"/etc/passwd"), "relative path"),
        (GOOD.replace(b"pkg/mod.py", b"pkg/../../x"), "relative path"),
        (GOOD.replace(b"pkg/mod.py", b"pkg\\mod.py"), "relative path"),
        (GOOD.replace(b"a/pkg/mod.py", b'"a/pkg/mod.py"'), "relative path"),
        (GOOD.replace(b"b/pkg/mod.py", b"b/pkg/other.py"), "renames a file"),
        (GOOD.replace(b"a/pkg/mod.py", b"/dev/null"), "creates or deletes"),
        (GOOD.replace(b"b/pkg/mod.py", b"/dev/null"), "creates or deletes"),
        (b"diff --git a/x b/x\n" + GOOD, "another file"),
        (b"diff --git a/pkg/mod.py b/pkg/mod.py\nold mode 100644\nnew mode 100755\n" + GOOD, "more than a change"),
        (b"rename from x\nrename to y\n" + GOOD, "more than a change"),
        (b"GIT binary patch\nliteral 3\n" + GOOD, "more than a change"),
        (GOOD + b"Binary files a/x and b/x differ\n", "more than a change"),
        (b"*** a/pkg/mod.py\n--- b/pkg/mod.py\n", "more than a change"),
        (GOOD + b"rubbish\n", "neither a hunk"),
        (GOOD + GOOD, "twice"),
        (GOOD.replace(b"@@ -2,7 +2,7 @@", b"@@ -2,8 +2,7 @@"), "ends before"),
        (GOOD.replace(b"@@ -2,7 +2,7 @@", b"@@ -2,7 +2,9 @@"), "ends before"),
        (GOOD.replace(b"@@ -2,7 +2,7 @@", b"@@ -2,3 +2,5 @@"), "more lines than"),
        (GOOD.replace(b"@@ -2,7 +2,7 @@", b"@@ -2,7 +3,7 @@"), "do not add up"),
        (GOOD.replace(b"@@ -2,7 +2,7 @@", b"@@ two @@"), "malformed"),
        (GOOD.replace(b"@@ -2,7 +2,7 @@\n", b""), "without a hunk"),
        (b"--- a/pkg/mod.py\n+++ b/pkg/mod.py\n@@ -1 +1 @@\n one\n", "changes nothing"),
    ],
)
def test_malformed_or_asking_too_much(patch: bytes, says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        apply(patch)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"new\n" + TEXT, "line 2 is b'one"),  # an offset of one
        (TEXT.replace(b"three", b"3"), "line 3 is b'3"),  # fuzz in the context
        (TEXT.replace(b"five", b"5"), "there already"),
        (TEXT.replace(b"\n", b"\r\n"), "line 2 is"),
        (TEXT[:20], "is b'"),
        (b"", "the end of the file"),
    ],
)
def test_fits_exactly_or_not_at_all(content: bytes, says: str) -> None:
    with pytest.raises(RecipeError, match="does not fit") as caught:
        apply(GOOD, content)
    assert says in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match="no such file"):
        apply_patch(GOOD, {}.__getitem__)


def test_hunks_out_of_order() -> None:
    two = diff(TEXT, TEXT.replace(b"one", b"1").replace(b"nine", b"9"), context=0)
    header, first, second = re.split(rb"(?=@@ )", two)
    with pytest.raises(RecipeError, match="do not add up"):
        parse_patch(header + second + first)


@pytest.mark.parametrize("path", sorted(PATCHES.rglob("*.patch")), ids=lambda path: path.name)
def test_shipped_patches_are_well_formed(path: Path) -> None:
    text = path.read_bytes()
    assert parse_patch(text)
    header = text.split(b"\n---\n")[0]
    for field in (b"Description: ", b"Origin: ", b"Forwarded: ", b"Why: "):
        assert re.search(rb"^" + field + rb"\S", header, re.MULTILINE), field

"""What an error says, how several are told at once, and the exit codes that scripts rely on."""

from __future__ import annotations

import pytest

from composer import errors
from composer.errors import ComposerError, FetchError, IntegrityError, LockError, RecipeError

EXIT_CODES = {
    "RecipeError": 2, "LockError": 3, "FetchError": 4, "IntegrityError": 4, "BuildError": 5, "WheelError": 6,
    "ElfError": 7, "CollisionError": 8, "VerifyError": 9, "HostError": 10,
}  # fmt: skip


def _classes() -> dict[str, type[ComposerError]]:
    found = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, ComposerError)}


def test_exit_codes_are_those_documented() -> None:
    classes = _classes()
    assert classes.pop("ComposerError").exit_code == 1
    assert {name: value.exit_code for name, value in classes.items()} == EXIT_CODES
    for name, code in EXIT_CODES.items():
        assert any(name in line and str(code) in line.split() for line in str(errors.__doc__).splitlines()), name


def test_only_a_subclass_shares_an_exit_code() -> None:
    families = [value for value in _classes().values() if value is not IntegrityError]
    assert len({family.exit_code for family in families}) == len(families)
    assert issubclass(IntegrityError, FetchError)


def test_says_where_why_and_what_to_do() -> None:
    error = RecipeError("is odd", where="r.toml: name", why="it is 3", fix="Make it even.", reference="PEP 0")
    assert str(error) == "r.toml: name: is odd\n  why: it is 3\n  fix: Make it even.\n  see: PEP 0"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RecipeError("is odd"), "is odd"),
        (RecipeError("is odd", where="x"), "x: is odd"),
        (RecipeError("is odd", fix="Stop."), "is odd\n  fix: Stop."),
        (RecipeError("is odd", where="", why=""), "is odd"),
    ],
)
def test_leaves_out_what_is_unknown(error: ComposerError, text: str) -> None:
    assert str(error) == text


def test_collects_nothing_one_and_many() -> None:
    RecipeError.collect([])
    first, second = LockError("one", where="a"), LockError("two", fix="Mend it.")
    with pytest.raises(LockError) as single:
        RecipeError.collect([first])
    assert single.value is first
    with pytest.raises(RecipeError) as many:
        RecipeError.collect([first, second])
    assert many.value.what == "2 faults"
    assert "- a: one" in str(many.value)
    assert "- two\n  fix: Mend it." in str(many.value)

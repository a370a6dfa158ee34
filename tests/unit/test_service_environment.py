"""Settings files: read as systemd reads them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.runtime.service.environment_file import parse, render, update
from composer.runtime.service.spec import ServiceError

#: systemd's own reader of such files. It also expands $, which EnvironmentFile= does not.
SYSTEMD = Path("/usr/lib/systemd/user-environment-generators/30-systemd-environment-d-generator")
LINES = r"""
# a comment
; another
PLAIN=word
SPACES =  two  words  @
JSON={"max_new_tokens": 512, "stop": ["'"]}
QUOTED="{\"a\": \"b \\ c\"}" @
SINGLE='all "of" it \ \n'
JOINED='a'"b"c
LATE=a'b c'd
ESCAPED=a\ b\"c
LONG=one \
  two
HASH=a#b ;c
UNICODE="é ü 漢"
PERCENT=100%h
""".replace("@", "\t")


@pytest.mark.skipif(not SYSTEMD.exists(), reason="needs systemd")
def test_every_way_to_write_a_value_is_read_as_systemd_does(tmp_path):
    folder = tmp_path / "environment.d"
    folder.mkdir()
    (folder / "a.conf").write_text(LINES)
    env = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([SYSTEMD], env=env, capture_output=True, text=True, check=True)
    ours = parse(LINES, "x")
    lines = [line for line in done.stdout.splitlines() if line.partition("=")[0] in ours]
    # The generator writes its result for a shell.
    shell = "".join(f"{line}\nprintf '%s\\0' \"${line.partition('=')[0]}\"\n" for line in lines)
    values = subprocess.run(["sh", "-c", shell], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert dict(zip((line.partition("=")[0] for line in lines), values, strict=True)) == ours
    assert len(ours) == 12


@given(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True), st.text().filter(str.isprintable)))
def test_what_is_written_is_read_again(variables):
    assert parse(render(variables), "x") == variables


@pytest.mark.parametrize(
    ("text", "line"),
    [("A=1\nexport B=2\n", 2), ("A B=1", 1), ("\n\n=1", 3), ("1A=2", 1), ('A="open\n', 1), ("A='open", 1), ("word", 1)],
)
def test_a_line_that_systemd_would_skip_is_a_fault(text, line):
    with pytest.raises(ServiceError, match=f"x: line {line} "):
        parse(text, "x")


@pytest.mark.parametrize("pair", [{"A": "a\nb"}, {"A": "\0"}, {"A B": "c"}, {"": "c"}, {"1A": "c"}])
def test_what_no_line_can_hold_is_not_written(pair):
    with pytest.raises(ServiceError, match="cannot be a line of a settings file"):
        render(pair)


def test_updating_keeps_comments_order_and_what_is_not_named():
    text = "# mine\nA=1\n\nB=2 # not a comment\nA=3"
    assert update(text, {"A": "9", "Z": "$x"}, "x") == '# mine\nA="9"\n\nB=2 # not a comment\nZ="\\$x"\n'
    assert update(text, {}, "x").rstrip("\n") == text


@given(
    st.lists(st.sampled_from(["# c", "", "A=1", "B='x\ny'", "C=a\\\nb", 'D="q"']), max_size=6),
    st.text("ABZ", max_size=1),
)
def test_updating_changes_no_other_variable(lines, name):
    text = "\n".join(lines)
    variables = {name: "new"} if name else {}
    assert parse(update(text, variables, "x"), "x") == {**parse(text, "x"), **variables}


def test_a_value_holds_what_a_shell_would_run(tmp_path):
    target = tmp_path / "ran"
    assert parse(f"A=$(touch {target})`touch {target}`\n", "x") == {"A": f"$(touch {target})`touch {target}`"}
    assert not target.exists()
    assert re.search(r"\\\$\(touch\)", render({"A": "$(touch)"}))
    assert os.linesep not in render({"A": "x"}).rstrip("\n")

"""The table of a matrix: what counts for which target, and what the report makes of it."""

from __future__ import annotations

import pytest

from composer.cli.matrix import _cell
from composer.steps.matrix_report import Board, Cell, Row


def board(rows=2):
    return Board([Row(name=f"target {number}", recipe="small", sms=(90,), isa="avx2") for number in range(rows)])


def step(board, key, kind, *owners, **state):
    for owner in owners:
        record = board.claim(owner, key, kind, key)
    for name, value in {"state": "done", **state}.items():
        setattr(record, name, value)


def test_what_targets_share_counts_for_the_first_of_them_whoever_asked_first():
    made = board()
    step(made, "a", "layer", 1, 0, seconds=5.0, size=100)
    step(made, "b", "layer", 1, seconds=1.0, size=10)
    assert made.cell(0, "layers") == Cell(total=1, done=1, seconds=5.0, size=100)
    assert made.cell(1, "layers") == Cell(total=2, done=2, shared=1, seconds=1.0, size=10)


def test_surveys_and_reading_objects_are_one_column():
    made = board()
    step(made, "a", "survey", 0, seconds=1.0)
    step(made, "b", "objects", 0, state="running", begun=7.0)
    assert made.cell(0, "survey") == Cell(total=2, done=1, running=1, seconds=1.0, begun=7.0)


def test_a_proof_by_imports_is_no_part_of_packing():
    made = board()
    step(made, "a", "pack", 0, seconds=10.0, size=99)
    made.rows[0].proving = 4.0
    assert made.cell(0, "pack").seconds == 6.0
    assert made.cell(0, "imports") == Cell(total=1, done=1, seconds=4.0)
    assert made.cell(1, "imports") == Cell()


def test_building_from_source_is_a_column_only_where_it_happens():
    made = board()
    assert "source" not in made.used()
    step(made, "a", "source", 0)
    assert made.used().index("source") == 1


def test_the_report_compares_with_the_first_built_target_and_counts_shared_bytes_once():
    made = board(3)
    for number, (key, seconds) in enumerate([("a", 100.0), ("b", 40.0), ("c", 10.0)]):
        step(made, key, "plan", number, seconds=seconds, cpu=seconds / 2, memory=number)
    made.rows[0].fate = "failed"
    made.rows[1].fate, made.rows[1].parts = "built", {"x": 1000, "y": 1}
    made.rows[2].fate, made.rows[2].parts = "up to date", {"x": 1000, "z": 2}
    report = made.report(60.0)
    assert [one.relative for one in report.targets] == [None, 1.0, 0.25]
    assert (report.bundles, report.stored) == (2003, 1003)
    assert (report.seconds, report.work, report.cpu) == (60.0, 150.0, 75.0)
    assert report.memory == {"plan": 2}


def test_figures_part_what_was_made_shared_and_known():
    made = board()
    step(made, "a", "layer", 0, 1, seconds=2.0, size=5)
    step(made, "b", "layer", 1, state="known", size=7)
    step(made, "c", "layer", 1, seconds=3.0, size=9)
    figures = made.report(1.0).targets[1].columns["layers"]
    assert (figures.steps, figures.shared, figures.known, figures.seconds, figures.bytes) == (1, 1, 1, 3.0, 16)


@pytest.mark.parametrize(("cell", "text"), [
    (Cell(), ""),
    (Cell(total=3, done=3, shared=3), "shared"),
    (Cell(total=3, done=3, shared=1, known=2), "known"),
    (Cell(total=3, done=1, broken=2), "1/3 failed"),
    (Cell(total=1, done=1, seconds=2.4, size=1_500_000), "2 s 1.5 MB"),
    (Cell(total=9, done=4, running=1, seconds=5.0, begun=90.0), "4/9 15 s"),
])  # fmt: skip
def test_a_cell_says_how_far_it_is(cell, text):
    assert _cell(cell, 100.0) == text

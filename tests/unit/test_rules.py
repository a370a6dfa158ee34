"""The rule language: every shipped rule by its own two examples, and every fault of a rule by its path."""

from __future__ import annotations

import itertools

import pytest

from composer.errors import RecipeError
from composer.model.rule import OPERATORS, Tables, parse_rules, parse_tables
from composer.proofs.rules import Context, evaluate, judge
from composer.steps.advise import load_rules

BOOK = load_rules()
TABLES = parse_tables({"schema": 1, "tables": {"t": {"12.8": ["90"]}}}, "tables.toml")
RULE = {
    "id": "one", "severity": "error", "when": [["host.sm", ">=", 100]], "must": [["host.driver", ">=", "570"]],
    "message": "m", "fix": "f", "source": ["s"], "verified": "v", "bad": {}, "ok": {},
}  # fmt: skip


def rule(**changes):
    return {"launch.toml": {"schema": 1, "phase": "launch", "rule": [RULE | changes]}}


def verdict(must, values, *, when=("argv", "exists"), unknown=()):
    book = parse_rules(rule(when=[list(when)], must=[must]), TABLES)
    context = Context(values={"argv": ["x"]} | values, unknown=frozenset(unknown))
    return evaluate(book.rules[0], context, TABLES).verdict


def test_all_96_rules_are_here():
    assert len(BOOK.rules) == len({one.id for one in BOOK.rules}) == 96
    assert {one.phase for one in BOOK.rules} == {"build", "compose", "select", "install", "host", "launch", "k8s"}


@pytest.mark.parametrize("one", BOOK.rules, ids=lambda one: one.id)
def test_a_rules_examples(one):
    bad = evaluate(one, Context(values=one.bad), BOOK.tables)
    assert (bad.verdict, bad.applies) == ("violated", True)
    assert bad.evidence
    assert evaluate(one, Context(values=one.ok), BOOK.tables).verdict == "ok"


@pytest.mark.parametrize("one", [one for one in BOOK.rules if "unknown" not in one.id], ids=lambda one: one.id)
def test_without_what_it_turns_on_no_rule_is_violated(one):
    """Facts that are not there are never held against anyone, and never called ok where the rule applies."""
    needed = [field for field in one.fields if field.partition(".")[0] in ("host", "topo", "stack", "target")]
    for field in needed:
        found = evaluate(one, Context(values={k: v for k, v in one.bad.items() if k != field}), BOOK.tables)
        assert found.verdict in ("unknown", "violated")
        assert found.verdict == "unknown" or any(field not in text for text in found.evidence)


def test_operators_are_all_used_or_tested():
    used = {one.operator for r in BOOK.rules for one in (*r.when, *r.must)}
    assert used <= set(OPERATORS)
    assert len(OPERATORS) == 27


@pytest.mark.parametrize(("must", "values", "expected"), [
    (["host.driver", ">=", "570"], {"host.driver": "570.86.10"}, "ok"),
    (["host.driver", ">=", "570"], {"host.driver": "1000.1"}, "ok"),
    (["host.driver", ">=", "570.0"], {"host.driver": "570"}, "ok"),
    (["host.driver", ">=", "570"], {"host.driver": "none"}, "unknown"),
    (["target.cuda", "<", "12.10"], {"target.cuda": "12.9"}, "ok"),
    (["flags.--x", "<=", 0.93], {"flags.--x": "0.95"}, "violated"),
    (["flags.--x", "<=", 0.93], {}, "violated"),
    (["flags.--x", "<=", 0.93], {"flags.--x": "lots"}, "unknown"),
    (["flags.--x", "==", True], {"flags.--x": "1"}, "violated"),
    (["flags.--x", "==", 1], {"flags.--x": True}, "violated"),
    (["flags.--x", "==", 4], {"flags.--x": "4"}, "ok"),
    (["flags.--x", "!=", "a"], {}, "ok"),
    (["flags.--x", "not_in", ["a"]], {}, "ok"),
    (["flags.--x", "in", ["a"]], {}, "violated"),
    (["flags.--x", "absent"], {"flags.--x": None}, "ok"),
    (["host.x", "absent"], {}, "unknown"),
    (["host.x", "absent"], {"host.x": None}, "ok"),
    (["host.x", "exists"], {"host.x": 0}, "ok"),
    (["host.sm", "exists"], {}, "unknown"),
    (["env.A", "!=field", "flags.--port"], {"env.A": "1"}, "ok"),
    (["env.A", "!=field", "flags.--port"], {"env.A": "1", "flags.--port": 1}, "violated"),
    (["env.A", "==field", "host.x"], {"env.A": "1"}, "unknown"),
    (["env.A", "contains", "b"], {"env.A": "abc"}, "ok"),
    (["host.x", "contains", "b"], {"host.x": ["abc"]}, "violated"),
    (["host.x", "contains", "b"], {"host.x": 3}, "violated"),
    (["build.j", "<=expr", "host.ram_gb/8"], {"build.j": 8, "host.ram_gb": 64}, "ok"),
    (["build.j", "<=expr", "host.ram_gb/8"], {"build.j": 9, "host.ram_gb": 64}, "violated"),
    (["build.j", "<=expr", "host.ram_gb/8"], {"build.j": 9}, "unknown"),
    (["build.j", "<=expr", "host.ram_gb/8"], {"build.j": 9, "host.ram_gb": "much"}, "unknown"),
    (["target.arch", "in_table", "t.target.cuda"], {"target.arch": 90, "target.cuda": "12.8"}, "ok"),
    (["target.arch", "in_table", "t.target.cuda"], {"target.arch": "90", "target.cuda": "11.8"}, "unknown"),
    (["topo.links_max", "level_le", "env.L"], {"topo.links_max": "PHB", "env.L": "4"}, "ok"),
    (["topo.links_max", "level_le", "env.L"], {"topo.links_max": "SYS", "env.L": "3"}, "violated"),
    (["topo.links_max", "level_le", "env.L"], {"topo.links_max": "PHB", "env.L": "9"}, "ok"),
    (["topo.links_max", "level_le", "env.L"], {"topo.links_max": "PHB", "env.L": "far"}, "unknown"),
    (["host.l4t", "same_l4t_line", "target.l4t"], {"host.l4t": "39.0", "target.l4t": "38.2"}, "ok"),
    (["host.l4t", "same_l4t_line", "target.l4t"], {"host.l4t": "35.4.1", "target.l4t": "36.2"}, "violated"),
    (["host.l4t", "same_l4t_line", "target.l4t"], {"host.l4t": "x", "target.l4t": "36.2"}, "unknown"),
    (["target.sm", "same_major_le", "host.sm"], {"target.sm": 120, "host.sm": 121}, "ok"),
    (["target.sm", "same_major_le", "host.sm"], {"target.sm": 89, "host.sm": 86}, "violated"),
    (["target.cuda", "major", 12], {"target.cuda": "cuda"}, "unknown"),
    (["stack.m", "len==", 1], {"stack.m": "12"}, "violated"),
    (["stack.m", "==", [12]], {"stack.m": [12]}, "ok"),
    (["stack.m", "subset_of", "host.f"], {"stack.m": ["a"], "host.f": "a"}, "unknown"),
    (["flags.--tp", "power_of_two"], {"flags.--tp": "8"}, "ok"),
    (["flags.--tp", "power_of_two"], {"flags.--tp": 0}, "violated"),
    (["flags.--tp", "power_of_two"], {"flags.--tp": "many"}, "unknown"),
    (["flags.--a", "==plus1", "flags.--b"], {"flags.--a": "4", "flags.--b": 3}, "ok"),
    (["flags.--a", "==plus1", "flags.--b"], {"flags.--a": "4", "flags.--b": "x"}, "unknown"),
    (["build.x", "is_int"], {"build.x": True}, "violated"),
])  # fmt: skip
def test_an_operator(must, values, expected):
    assert verdict(must, values) == expected


def test_a_rule_that_does_not_apply_is_ok_whatever_else_is_unknown():
    files = rule(when=[["host.sm", "==", 90], ["host.x", "==", 1]])
    one = parse_rules(files, TABLES).rules[0]
    found = evaluate(one, Context(values={"host.sm": 80}), TABLES)
    assert (found.verdict, found.applies) == ("ok", False)
    found = evaluate(one, Context(values={"host.sm": 90, "host.driver": "600"}), TABLES)
    assert (found.verdict, found.applies, found.missing) == ("unknown", None, ("host.x",))


def test_flags_are_unknown_where_nothing_is_launched():
    must = ["flags.--x", "absent"]
    assert verdict(must, {}) == "ok"
    assert verdict(must, {}, unknown={"flags"}) == "unknown"


def test_only_the_phases_that_are_asked_for():
    assert {one.rule.phase for one in judge(BOOK, Context(values={}), phases=["host"])} == {"host"}
    assert len(judge(BOOK, Context(values={}))) == 96


def test_nothing_known_makes_nothing_violated():
    everything = frozenset(("flags", "env", "build", "k8s", "model", "argv"))
    verdicts = {one.verdict for one in judge(BOOK, Context(values={}, unknown=everything))}
    assert verdicts == {"unknown"}


@pytest.mark.parametrize(("changes", "where", "what"), [
    ({"when": [["hots.sm", "==", 1]]}, "rule[0] (one).when[0]", "did you mean host."),
    ({"when": [["sm", "==", 1]]}, "rule[0] (one).when[0]", "unknown field"),
    ({"when": [["host", "==", 1]]}, "rule[0] (one).when[0]", "names no field"),
    ({"must": [["host.sm", "=<", 1]]}, "rule[0] (one).must[0]", "unknown operator '=<'"),
    ({"must": [["host.sm", "<", "soon"]]}, "rule[0] (one).must[0]", "neither a number nor a version"),
    ({"must": [["host.sm", "<", True]]}, "rule[0] (one).must[0]", "neither a number nor a version"),
    ({"must": [["host.sm", "in", 90]]}, "rule[0] (one).must[0]", "no list"),
    ({"must": [["host.sm", "in", []]]}, "rule[0] (one).must[0]", "no list"),
    ({"must": [["host.sm", "exists", 1]]}, "rule[0] (one).must[0]", "takes no value"),
    ({"must": [["host.sm", "=="]]}, "rule[0] (one).must[0]", "takes a value"),
    ({"must": [["host.sm"]]}, "rule[0] (one).must[0]", "a condition is"),
    ({"must": [["host.sm", "==", {"a": 1}]]}, "rule[0] (one).must[0]", "neither a scalar nor"),
    ({"must": [["host.sm", "==field", "hist.sm"]]}, "rule[0] (one).must[0]", "did you mean host."),
    ({"must": [["host.sm", "<=expr", "host.ram"]]}, "rule[0] (one).must[0]", "FIELD/NUMBER"),
    ({"must": [["host.sm", "<=expr", "host.ram/0"]]}, "rule[0] (one).must[0]", "FIELD/NUMBER"),
    ({"must": [["host.sm", "<=expr", "__import__('os')/1"]]}, "rule[0] (one).must[0]", "unknown field"),
    ({"must": [["host.sm", "in_table", "t"]]}, "rule[0] (one).must[0]", "TABLE.FIELD"),
    ({"must": [["host.sm", "in_table", "u.host.x"]]}, "rule[0] (one).must[0]", "no table 'u'"),
    ({"must": [["host.sm", "len==", -1]]}, "rule[0] (one).must[0]", "no whole number"),
    ({"must": [["host.sm", "contains", 5]]}, "rule[0] (one).must[0]", "no text"),
    ({"must": []}, "rule[0] (one).must", "no condition"),
    ({"fix": " "}, "rule[0] (one).fix", "is empty"),
    ({"id": "One!"}, "rule[0] (One!).id", "is no id"),
    ({"bad": {"hots.sm": 1}}, "rule[0] (one).bad.hots.sm", "did you mean host."),
    ({"ok": {"host.sm": {"x": 1}}}, "rule[0] (one).ok.host.sm", "neither a scalar"),
    ({"severity": "fatal"}, "rule[0].severity", "invalid enum value"),
    ({"fixx": "f"}, "launch.toml", "unknown key 'rule[0].fixx'"),
])  # fmt: skip
def test_a_fault_names_the_rule_and_the_field(changes, where, what):
    with pytest.raises(RecipeError) as caught:
        parse_rules(rule(**changes), TABLES)
    assert where in str(caught.value)
    assert what in str(caught.value)


def test_faults_are_raised_together_and_ids_are_unique():
    first, second = RULE | {"when": [["hots.sm", "exists"]]}, RULE | {"fix": ""}
    with pytest.raises(RecipeError) as caught:
        parse_rules({"a.toml": {"schema": 2, "phase": "host", "rule": [first, second]}}, Tables(schema=1))
    text = str(caught.value)
    assert "4 faults" in text
    assert all(part in text for part in ("schema 2", "hots", "is empty", "this id is taken"))


def test_evidence_says_what_is_there():
    one = next(one for one in BOOK.rules if one.id == "sglang-port-collision")
    found = evaluate(one, Context(values=one.bad), BOOK.tables)
    assert found.evidence == (
        "env.SGLANG_PORT is 30000, flags.--port is 30000; wanted: env.SGLANG_PORT != flags.--port",
    )


def test_no_two_rules_say_the_same():
    for left, right in itertools.combinations(BOOK.rules, 2):
        assert (left.when, left.must) != (right.when, right.must), (left.id, right.id)

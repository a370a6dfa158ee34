"""Requirements of a stack: which count, which are met, and what a recipe decided against."""

from __future__ import annotations

import pytest

from composer.errors import WheelError
from composer.model.layer import RequiresChange
from composer.proofs.ledger import Declared, check_ledger, check_requirements, ledger, left_out, read_declared

ENVIRONMENT = {
    "implementation_name": "cpython", "implementation_version": "3.12.1", "os_name": "posix",
    "platform_machine": "x86_64", "platform_python_implementation": "CPython", "platform_release": "",
    "platform_system": "Linux", "platform_version": "", "python_full_version": "3.12.1", "python_version": "3.12",
    "sys_platform": "linux",
}  # fmt: skip


def one(name, version="1.0", *requires):
    return Declared(path=f"{name}.dist-info/METADATA", name=name, version=version, requires=requires)


def unmet(*stack):
    return [(finding.subject, finding.evidence) for finding in check_requirements(stack, ENVIRONMENT)]


def rows(stack, **changes):
    made = {
        name: [RequiresChange(was=was, now=now, reason="because") for was, now in listed]
        for name, listed in changes.items()
    }
    return ledger(stack, made, ENVIRONMENT)


def test_the_facts_of_one_metadata():
    text = b"Metadata-Version: 2.1\nName: My.App\nVersion: 1.0\nRequires-Dist: A_b >=1 ; extra == 'x'\n\nBody\n"
    found = read_declared("p/METADATA", text)
    assert (found.path, found.name, found.version) == ("p/METADATA", "my-app", "1.0")
    assert found.requires == ('A_b>=1; extra == "x"',)
    with pytest.raises(WheelError):
        read_declared("p/METADATA", b"Name: app\n")


@pytest.mark.parametrize(
    "requires",
    [
        "other", "Other_", "other==1.0", "other>=0.9,<2", "other~=1.0", "absent; python_version<'3.12'",
        "absent; sys_platform=='win32'", "absent; extra=='x'", "other @ https://example.org/o.whl",
    ],
)  # fmt: skip
def test_requirements_that_are_met_or_do_not_count(requires):
    assert unmet(one("app", "1.0", requires.replace("Other_", "oTHER")), one("other")) == []


@pytest.mark.parametrize(
    ("requires", "has"),
    [
        ("other==2.0", "the bundle has 1.0"), ("absent>=1", "the bundle does not have it"),
        ("absent; python_version>='3.12'", "the bundle does not have it"), ("other<1", "the bundle has 1.0"),
    ],
)  # fmt: skip
def test_requirements_that_are_not(requires, has):
    assert unmet(one("app", "1.0", requires), one("other")) == [
        ("app.dist-info/METADATA", f"app 1.0 requires {requires}; {has}")
    ]


def test_a_pre_release_that_is_there_counts():
    assert unmet(one("app", "1.0", "other>=0.9"), one("other", "1.0rc1")) == []


def test_a_line_that_is_there_twice_is_named_once():
    assert len(unmet(one("app", "1.0", "absent", "absent"))) == 1


def test_extras_that_somebody_asks_for():
    server = one(
        "server", "1.0", "loop; extra=='fast'", "server[deep]; extra=='fast'", "well; extra=='Deep'", "x; extra=='y'"
    )
    assert unmet(one("app", "1.0", "server"), server) == []
    assert [evidence for _, evidence in unmet(one("app", "1.0", "server[Fast]"), server)] == [
        "server 1.0 requires loop; extra=='fast'; the bundle does not have it",
        "server 1.0 requires well; extra=='Deep'; the bundle does not have it",
    ]
    assert unmet(one("app", "1.0", "server[fast]; extra=='never'"), server) == []


def test_the_ledger_of_a_stack():
    stack = [one("app", "1.0", "kernels==2.1"), one("kernels", "2.1"), one("tools", "3.0")]
    found = rows(
        stack, app=[("Kernels==2.0", "kernels==2.1"), ("scipy", None), ("tools>=2", None), ("docs; extra == 'd'", None)]
    )
    assert [(row.name, row.kind, row.extras, row.applies, row.version, row.met) for row in found] == [
        ("docs", "dropped", ("d",), False, None, False),
        ("kernels", "overridden", (), True, "2.1", False),
        ("scipy", "dropped", (), True, None, False),
        ("tools", "dropped", (), True, "3.0", True),
    ]
    notes = check_ledger(found, {"app": "app.dist-info/METADATA"})
    assert [(note.id, note.severity, note.subject, note.evidence) for note in notes] == [
        ("ledger.violated", "note", "app.dist-info/METADATA", "app requires Kernels==2.0; the bundle has 2.1: because"),
        ("ledger.dropped", "note", "app.dist-info/METADATA", "app requires scipy; left out: because"),
    ]
    assert left_out(found) == {"docs": "because", "scipy": "because"}


def test_what_counts_only_for_an_extra_counts_when_it_is_asked_for():
    changes = [("loop>=1; extra == 'fast' and python_version > '3'", None)]
    stack = [one("app", "1.0", "server[fast]"), one("server")]
    (row,) = rows(stack, server=changes)
    assert (row.applies, row.extras) == (True, ("fast",))
    assert check_ledger([row], {})[0].evidence == "server requires loop>=1; left out: because"
    (row,) = rows([one("app", "1.0", "server"), one("server")], server=changes)
    assert not row.applies
    (row,) = rows([one("app"), one("server")], app=[("server[fast]", None)], server=[])
    assert row.met


def test_an_extra_that_only_a_dropped_line_asked_for():
    stack = [one("app"), one("server")]
    found = rows(stack, app=[("server[fast]", "server")], server=[("loop; 'fast' == extra", None)])
    assert [(row.name, row.kind, row.applies, row.extras) for row in found] == [
        ("server", "relaxed", True, ()), ("loop", "dropped", True, ("fast",)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("was", "now", "kind"),
    [
        ("a>=1,<2", "a>=1", "relaxed"), ("a==1", "a", "relaxed"), ("a==1", "a==2", "overridden"),
        ("a", "a>=1", "overridden"), ("a", "b", "overridden"), ("a[x]", "a", "relaxed"), ("a", "a[x]", "overridden"),
        ("a", "a @ https://example.org/a.whl", "overridden"), ("a", None, "dropped"), ("A_b<2", "a-b", "relaxed"),
    ],
)  # fmt: skip
def test_kinds_of_changes(was, now, kind):
    (row,) = rows([one("app")], app=[(was, now)])
    assert row.kind == kind

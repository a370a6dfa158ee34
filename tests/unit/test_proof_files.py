"""Files of a bundle that exist only as values: whose they are, their modes, links, hooks and rows of RECORD."""

from __future__ import annotations

import hashlib

import pytest

from composer.formats.loader import Tree
from composer.formats.record import RecordRow, render_record
from composer.model.layer import Entry
from composer.proofs.files import (
    Owned,
    check_collisions,
    check_entries,
    check_record,
    check_start,
    owned,
    read_recorded,
)

SITE = "lib/python3.12/site-packages/"
SHA, OTHER = hashlib.sha256(b"x").hexdigest(), hashlib.sha256(b"y").hexdigest()


def short(found):
    return [(one.id, one.severity, one.subject, one.evidence) for one in found]


# --- collisions -------------------------------------------------------------------------------------------------------


def test_distributions_that_get_along():
    shared = {"n/__init__.py": SHA, "n/__pycache__/__init__.cpython-312.pyc": OTHER}
    parts = [Owned(name=name, files={f"{name}/x.py": SHA, **shared}) for name in ("a", "b")]
    assert check_collisions(parts) == ()


@pytest.mark.parametrize(
    ("path", "first", "second"),
    [
        ("build_backend.py", SHA, SHA), ("n/__init__.py", SHA, OTHER), ("n/__init__.py", None, None),
        ("n/l.so", None, SHA), ("n/__pycache__/__init__.cpython-312.pyc", SHA, OTHER), ("n/__init__.pyi", SHA, SHA),
    ],
)  # fmt: skip
def test_a_file_of_two_distributions(path, first, second):
    found = check_collisions([Owned(name="a", files={path: first}), Owned(name="b", files={path: second})])
    assert short(found) == [("files.collision", "error", path, "owned by both a and b")]


def test_a_file_where_another_has_a_folder():
    found = check_collisions([Owned(name="a", files={"n": SHA}), Owned(name="b", files={"n/x/y.py": SHA})])
    assert short(found) == [("files.collision", "error", "n", "a file of a, and a folder")]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("n/Data.txt", "n/data.txt"), ("caf\u00e9.py", "cafe\u0301.py"), ("STRASSE.py", "stra\u00dfe.py"),
        ("\u212b", "\u00e5"),
    ],
)  # fmt: skip
def test_names_that_some_file_systems_take_for_one(first, second):
    (finding,) = check_collisions([Owned(name="a", files={first: SHA}), Owned(name="b", files={second: SHA})])
    assert (finding.id, finding.severity, finding.subject) == ("files.look-alike", "warning", max(first, second))
    assert finding.evidence.isascii()


def test_names_that_all_file_systems_tell_apart():
    assert check_collisions([Owned(name="a", files={"n/a.py": SHA, "n/\u00e4.py": SHA, "N/b.py": SHA})]) == ()


def test_the_files_of_a_layer():
    part = owned("a", [Entry(path="x", sha256=SHA), Entry(path="l", target="x")])
    assert part == Owned(name="a", files={"x": SHA, "l": None})


# --- modes and links --------------------------------------------------------------------------------------------------


def entries(*made):
    links = {one.path: one.target for one in made if one.target is not None}
    tree = Tree(objects={}, symlinks=links, files={one.path for one in made} - links.keys())
    return short(check_entries(made, tree))


@pytest.mark.parametrize("mode", [0o644, 0o755, 0o444, 0o664, 0o1755])
def test_modes_that_are_sound(mode):
    assert entries(Entry(path="a", mode=mode)) == []


@pytest.mark.parametrize(
    ("mode", "evidence"),
    [
        (0o646, "mode 0646: anyone may change it"), (0o4755, "mode 4755: runs with the rights of its owner or group"),
        (0o2755, "mode 2755: runs with the rights of its owner or group"), (0o777, "mode 0777: anyone may change it"),
    ],
)  # fmt: skip
def test_modes_that_give_too_much(mode, evidence):
    assert entries(Entry(path="a", mode=mode)) == [("files.mode", "error", "a", evidence)]


@pytest.mark.parametrize(
    ("path", "target"), [("l", "a/f"), ("a/l", "f"), ("a/l", "../a/./f"), ("l", "a"), ("b/c/l", "../../a/f")]
)
def test_links_that_stay(path, target):
    assert entries(Entry(path="a/f"), Entry(path=path, target=target, mode=0o777)) == []


@pytest.mark.parametrize(
    ("path", "target", "why"),
    [
        ("l", "/etc/passwd", "an absolute path"), ("a/l", "../../x", "outside the bundle"),
        ("l", "..", "outside the bundle"), ("l", "gone", "not in the bundle"),
        ("l", "l", "not in the bundle"), ("a/l", "f/x", "not in the bundle"),
    ],
)  # fmt: skip
def test_links_that_do_not(path, target, why):
    ((name, severity, subject, evidence),) = entries(Entry(path="a/f"), Entry(path=path, target=target))
    assert (name, severity, subject) == ("files.link", "error", path)
    assert f"leads to {target!r}, which is {why}" in evidence


def test_a_link_that_leaves_by_way_of_another():
    found = entries(Entry(path="a/f"), Entry(path="b/up", target="../a"), Entry(path="l", target="b/up/../../f"))
    assert [(one[0], one[2]) for one in found] == [("files.link", "l")]


# --- what runs at every start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [b"", b"# import x\n", b"folder\n\n../site-packages/x\n", b"importlib_x\n", b" import x\n"]
)
def test_pth_files_that_run_nothing(text):
    assert check_start({f"{SITE}a.pth": text}, ()) == ()


@pytest.mark.parametrize(
    "text", [b"import hook\n", b"x\nimport\thook", b"\xef\xbb\xbfimport hook", b"import hook # \xff\n"]
)
def test_pth_files_that_run_something(text):
    (finding,) = check_start({f"{SITE}a.pth": text}, {f"{SITE}b.pth"})
    assert (finding.id, finding.severity, finding.subject) == ("files.at-start", "error", f"{SITE}a.pth")
    assert "hook" in finding.evidence
    assert check_start({f"{SITE}a.pth": text}, {f"{SITE}a.pth"}) == ()


@pytest.mark.parametrize("folder", ["/opt/x", "../../../../x"])
def test_pth_files_that_lead_out(folder):
    (finding,) = check_start({f"{SITE}a.pth": folder.encode()}, {f"{SITE}a.pth"})
    assert (finding.id, finding.severity) == ("files.pth-folder", "error")
    assert repr(folder) in finding.evidence


def test_modules_that_python_imports_by_their_names():
    paths = [f"{SITE}sitecustomize.py", f"{SITE}usercustomize.abi3.so", f"{SITE}a/sitecustomize.py", f"{SITE}site.py"]
    found = check_start({}, {f"{SITE}usercustomize.abi3.so"}, paths)
    assert [(one.id, one.subject) for one in found] == [("files.at-start", f"{SITE}sitecustomize.py")]


# --- RECORD -----------------------------------------------------------------------------------------------------------

RECORD = f"{SITE}app-1.0.dist-info/RECORD"
FILES = (Entry(path=f"{SITE}app.py", size=1, sha256=SHA, original=OTHER), Entry(path="bin/app", size=1, sha256=SHA))


def record(**changes):
    """Findings when rows (by the last part of their paths) are changed, and no more is."""
    row = RecordRow(sha256=bytes.fromhex(SHA), size=1)
    rows = {"app.py": row, "../../../bin/app": row, "app-1.0.dist-info/RECORD": RecordRow()}
    rows |= {name.replace("_", "."): value for name, value in changes.items()}
    data = render_record({name: value for name, value in rows.items() if value is not None})
    made = (*FILES, Entry(path=RECORD, size=9), Entry(path=f"{SITE}link", target="app.py"))
    return short(check_record(read_recorded(RECORD, data), made))


def test_a_record_of_what_is_there():
    assert record() == []


@pytest.mark.parametrize(
    ("changes", "evidence"),
    [
        ({"app_py": None}, f"{SITE}app.py is not in it"),
        ({"more_py": RecordRow(sha256=bytes.fromhex(SHA), size=1)}, f"{SITE}more.py is not in the bundle"),
        (
            {"app_py": RecordRow(sha256=bytes.fromhex(OTHER), size=1)},
            f"the digest of {SITE}app.py is upstream's, but the file was edited",
        ),
        ({"app_py": RecordRow(sha256=b"z" * 32, size=1)}, f"the digest of {SITE}app.py is not the file's"),
        ({"app_py": RecordRow(sha256=bytes.fromhex(SHA), size=2)}, f"{SITE}app.py has 1 bytes, not 2"),
        ({"app_py": RecordRow(sha256=bytes.fromhex(SHA))}, f"{SITE}app.py has no digest or no size in it"),
        ({"app_py": RecordRow()}, f"{SITE}app.py has no digest or no size in it"),
    ],
)  # fmt: skip
def test_a_record_of_something_else(changes, evidence):
    assert record(**changes) == [("files.record", "error", RECORD, evidence)]


def test_a_damaged_record():
    (finding,) = check_record(read_recorded(RECORD, b"a,b\n"), FILES)
    assert finding.evidence.startswith("cannot be read: a row has 2 columns")


def test_many_faults_are_counted():
    made = [Entry(path=f"{SITE}m{number}.py", size=1, sha256=SHA) for number in range(9)]
    found = check_record(read_recorded(RECORD, b""), made)
    assert len(found) == 6
    assert found[-1].evidence == "and 4 more of the kind"

"""Modules of a tree that exists only as paths and sources: what is there, what is reached, what is missing."""

from __future__ import annotations

import sys

import pytest

from composer.formats.python_imports import source_imports
from composer.formats.python_tree import python_tree, standard_library
from composer.proofs.modules import Left, check_losses, check_modules, check_programs, distribution_of

SITE = "lib/python3.12/site-packages/"
STDLIB = ("lib/python3.12/os.py", "lib/python3.12/json/__init__.py", "lib/python3.12/json/decoder.py",
          "lib/python3.12/lib-dynload/_ssl.cpython-312-x86_64-linux-gnu.so")  # fmt: skip
NOTHING = Left(dropped={}, pruned={})


def tree(*paths, pth=None, stdlib=STDLIB):
    return python_tree([*stdlib, *(SITE + path for path in paths)], "3.12", "x86_64", pth)


def check(sources, *roots, left=NOTHING, pth=None, more=(), stdlib=STDLIB):
    files = {SITE + path: text.encode() for path, text in sources.items()}
    modules = tree(*sources, *more, pth=pth, stdlib=stdlib)
    scans = {path: source_imports(text) for path, text in files.items() if path.endswith(".py")}
    return check_modules(modules, scans.get, roots or ("app",), left)


def evidences(found):
    return [(one.id, one.severity, one.subject.removeprefix(SITE), one.evidence) for one in found]


# --- what is there ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("a.py", "a"), ("a/__init__.py", "a"), ("a/b.py", "a.b"), ("a/b.abi3.so", "a.b"), ("a.so", "a"),
        ("a/b.cpython-312-x86_64-linux-gnu.so", "a.b"), ("a.pyc", "a"), ("a/b/c.py", "a.b"), ("a/b/c.py", "a"),
    ],
)  # fmt: skip
def test_files_that_are_modules(path, module):
    assert tree(path).has(module)


@pytest.mark.parametrize(
    "path",
    [
        "b.cpython-310-x86_64-linux-gnu.so", "b.cpython-312-aarch64-linux-gnu.so", "__pycache__/b.cpython-312.pyc",
        "b.txt", "b", "b-1.py", "b-1.0.dist-info/METADATA", "x.y/b.py",
    ],
)  # fmt: skip
def test_files_that_are_not(path):
    assert not tree(path).has("b")


def test_the_standard_library_of_the_tree():
    modules = tree()
    assert all(
        modules.has(name) for name in ("os", "json", "json.decoder", "sys", "math", "_ssl", "_thread", "__main__")
    )
    assert not any(modules.has(name) for name in ("asyncio", "tkinter", "msvcrt", "no_such_module"))


def test_the_standard_library_of_a_host():
    modules = tree(stdlib=())
    assert all(modules.has(name) for name in ("os", "asyncio", "json.decoder", "sys"))
    assert not any(modules.has(name) for name in ("winreg", "distutils"))


@pytest.mark.parametrize(
    ("python", "cgi", "imp"), [("3.11", True, True), ("3.12", True, False), ("3.13", False, False)]
)
def test_the_standard_library_by_version(python, cgi, imp):
    names = standard_library(python)
    assert ("cgi" in names, "imp" in names, "os" in names) == (cgi, imp, True)


def test_this_interpreters_own_names_are_known():
    own = "{}.{}".format(*sys.version_info)
    assert sys.stdlib_module_names - standard_library(own) == {"msvcrt", "nt", "winreg", "winsound"}


def test_folders_of_pth_files():
    pth = {f"{SITE}x.pth": b"# comment\nvendored/packages\n/abs\n../../../out\nimport x\n"}
    assert tree("vendored/packages/a.py", pth=pth).has("a")
    assert not tree("vendored/packages/a.py").has("a")


# --- what is missing --------------------------------------------------------------------------------------------------


def test_a_stack_that_is_whole():
    sources = {
        "app/__init__.py": "import os, json.decoder, sys\nfrom . import core\nfrom .core import x as y\nimport ext.sub",
        "app/core.py": "from app import __version__\nfrom ..app import core\nimport space.part\nfrom native import f",
        "ext/__init__.py": "", "ext/sub.py": "import ext",
        "space/part.py": "import _ssl", "native.abi3.so": "",
    }  # fmt: skip
    assert check(sources) == ()


def test_the_chain_to_a_missing_module():
    sources = {"app/__init__.py": "from .core import x", "app/core.py": "\nimport lost.deep"}
    assert evidences(check(sources)) == [
        (
            "imports.missing",
            "error",
            "app/core.py",
            "lost is not in the bundle: app > app.core > lost (line 2 of app.core)",
        )
    ]


def test_what_was_dropped_is_named_with_its_reason():
    left = Left(dropped={"pillow": "no pictures", "scipy": "unused"}, pruned={})
    (finding,) = check({"app.py": "from PIL import Image"}, left=left)
    assert finding.evidence.endswith("; pillow was left out: no pictures")
    assert finding.fix == "Keep pillow, or patch the import."


def test_one_finding_for_each_missing_module():
    found = check({"app.py": "import lost, gone\nimport other", "other.py": "import lost.part"})
    assert [one.evidence.split()[0] for one in found] == ["lost", "gone"]


def test_what_is_not_reached_is_no_error():
    assert check({"app.py": "", "other.py": "import lost"}) == ()
    assert len(check({"app.py": "", "other.py": "import lost"}, "app", "other")) == 1


def test_what_the_recipe_names_and_is_not_there():
    assert evidences(check({"app.py": ""}, "app", "lost.part")) == [
        ("imports.missing", "error", "lost", "lost is not in the bundle: lost, which the recipe names")
    ]


def test_a_submodule_that_was_pruned():
    left = Left(dropped={}, pruned={"app/tests/**": "its own tests"})
    sources = {"app/__init__.py": "import app.tests.data, app.made_at_run_time", "app/core.py": ""}
    (finding,) = check(sources, left=left)
    assert finding.evidence.startswith("app.tests is not in the bundle: app > app.tests (line 1 of app)")
    assert finding.evidence.endswith("; pruned by app/tests/**: its own tests")


def test_a_module_of_an_extension_is_its_own_business():
    assert check({"app/__init__.py": "import app.native.sub", "app/native.abi3.so": ""}) == ()


def test_a_package_that_looks_inside_itself():
    sources = {"app/__init__.py": "import sys\nsys.path.append('x')\nimport vendored", "app/_vendor/vendored.py": ""}
    assert check(sources) == ()
    assert len(check({**sources, "app/__init__.py": "import vendored"})) == 1
    assert len(check({**sources, "app/__init__.py": "import sys\nsys.path.append('x')\nimport other"})) == 1


def test_a_namespace_package_inside_has_no_file_of_its_own():
    sources = {"app/__init__.py": "import sys\nsys.path.append('x')\nimport jar", "app/_vendor/jar/text.py": ""}
    assert check(sources) == ()
    assert len(check({**sources, "app/__init__.py": "import sys\nsys.path.append('x')\nimport ja"})) == 1


def test_distutils_is_made_by_setuptools_hook():
    assert len(check({"app.py": "import distutils"})) == 1
    assert check({"app.py": "import distutils", "_distutils_hack/__init__.py": ""}) == ()


def test_a_module_that_the_standard_library_of_the_tree_lacks():
    (finding,) = check({"app.py": "import asyncio"})
    assert finding.evidence == "asyncio is not in the bundle: app > asyncio (line 1 of app)"
    assert check({"app.py": "import asyncio"}, stdlib=()) == ()


@pytest.mark.parametrize(
    ("module", "name"),
    [("yaml", "pyyaml"), ("google.protobuf.x", "protobuf"), ("google.cloud", "google"), ("hf_transfer", "hf-transfer")],
)
def test_distributions_of_modules(module, name):
    assert distribution_of(module) == name


def test_what_leaving_out_costs():
    left = Left(dropped={"scipy": "unused", "pillow": "no pictures"}, pruned={})
    sources = {f"app/m{number}.py": "import scipy.sparse" for number in range(6)} | {
        "app/guarded.py": "if x:\n import PIL"
    }
    scans = {SITE + path: source_imports(text.encode()) for path, text in sources.items()}
    (note,) = check_losses(tree(*sources), scans, left)
    assert (note.id, note.severity, note.subject) == ("imports.lost", "note", f"{SITE}app/m0.py")
    assert note.evidence == (
        "app/m0.py, app/m1.py, app/m2.py, app/m3.py and 2 more cannot be imported without scipy, left out: unused"
    )


# --- programs ---------------------------------------------------------------------------------------------------------


def test_programs_that_can_only_end_in_an_error():
    good = "import json, app.inner\ntry:\n    import rich\nexcept ImportError: 0\n"
    sources = {"app/__init__.py": "", "app/good.py": good,
               "app/inner.py": "", "app/bad.py": "import app.table\n", "app/table.py": "import tabulate\n"}  # fmt: skip
    files = {SITE + path: text.encode() for path, text in sources.items()}
    scans = {path: source_imports(text) for path, text in files.items()}
    programs = {"bin/c-good": "app.good", "bin/b-bad": "app.bad", "bin/a-gone": "tools.main", "bin/d-lost": "app.lost"}
    left = Left(dropped={"tabulate": "tables only"}, pruned={})
    found = check_programs(tree(*sources), scans.get, programs, left)
    assert [(one.id, one.severity, one.subject, one.evidence) for one in found] == [
        ("imports.program", "warning", "bin/a-gone", "ends in an error: tools is not in the bundle: tools"),
        ("imports.program", "warning", "bin/b-bad", "ends in an error: tabulate is not in the bundle: "
         "app.bad > app.table > tabulate; tabulate was left out: tables only"),
        ("imports.program", "warning", "bin/d-lost", "ends in an error: app.lost is not in the bundle: app.lost"),
    ]  # fmt: skip

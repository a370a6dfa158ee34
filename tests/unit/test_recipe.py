"""Recipes as untrusted data: every value that cannot be meant is refused with its place, and loading runs nothing."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer.errors import ComposerError, RecipeError
from composer.model.recipe import Recipe, parse_recipe
from composer.model.target import Target
from composer.steps.load import data_root, load_recipe, load_targets

HEAD = """\
schema = 1
name = "small"
version = "1.0"
summary = "A test"
cuda = "12.8"
pythons = ["3.12", "3.11"]
as-of = 2026-03-11T00:00:00Z
sm = [80, 90]
"""
BODY = """
[indexes]
extra = "https://example.org/simple"
[environment]
SMALL_MODE = "1"
[[refuse]]
sm = [61]
reason = "too old"
[[requires]]
name = "gamma"
to = "gamma>=2"
reason = "newer"
[[untouched]]
names = ["nvidia-*"]
unless = ["nvidia-free"]
reason = "its licence"
[[component]]
name = "alpha"
version = "1.0"
imports = ["alpha", "alpha.sub_module"]
patches = ["alpha/0001-fix.patch"]
prune = [{ paths = ["alpha/**/*.cu"], reason = "sources", sm-not = [80], machines = ["x86_64"] }]
links = [{ path = "alpha/x.so", to = "alpha/x.so.1", reason = "a copy", sm = [90] }]
rpath = [{ files = ["alpha/*.so"], folders = ["alpha/lib"], reason = "dlopen" }]
[[component]]
name = "beta"
version = "2.0"
url = "https://example.org/beta-2.0-py3-none-any.whl"
sha256 = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
sm = [90]
reason = "only there"
[component.slim]
files = ["beta/lib/*.so", "beta/**/*.cubin"]
licence = "MIT"
text = "licenses/LICENSE"
sha256 = "dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd"
[[component]]
name = "delta"
tool = true
[[interpreter]]
python = "3.12"
machine = "x86_64"
url = "https://example.org/python.tar.gz"
sha256 = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
[[native]]
source = "numactl"
path = "{site}/libnuma.so.1"
reason = "needed"
[native.release]
name = "numactl"
version = "2"
url = "https://example.org/numactl.tar.gz"
sha256 = "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"
size = 5
licence = "COPYING"
debian = "pool/main/n/numactl.tar.gz"
"""
DATA = tomllib.loads(HEAD + BODY)
RECIPE = parse_recipe(DATA, "small.toml")
TARGET = Target(sms=(90,), isa="avx512", cuda="12.8", python="3.12")


def changed(path: str, value: object) -> dict[str, Any]:
    """The sample with one value replaced; the path is written like `component.0.name`."""
    data: Any = copy.deepcopy(DATA)
    *parents, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    inner = data
    for word in parents:
        inner = inner[word]
    inner[last] = value
    return data  # type: ignore[no-any-return]


def refusal(path: str, value: object) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(changed(path, value), "small.toml")
    return caught.value


def dotted(path: str) -> str:
    return "".join(f"[{word}]" if word.isdigit() else f".{word}" for word in path.split("."))[1:]


# --- what a good recipe means ----------------------------------------------------------------------------------------


def test_reads_every_key() -> None:
    alpha, beta, _ = RECIPE.component
    assert (RECIPE.name, RECIPE.pythons, RECIPE.machines) == ("small", ("3.12", "3.11"), ("x86_64",))
    assert (alpha.index, alpha.optional, alpha.needs_driver) == ("pypi", False, False)
    assert [alpha.prune[0].applies(sm) for sm in (80, 90)] == [False, True]
    assert [alpha.links[0].applies(sm) for sm in (80, 90)] == [False, True]
    assert beta.sm == (90,)
    assert [RECIPE.on(machine).component[0].prune for machine in ("x86_64", "aarch64")] == [alpha.prune, ()]
    assert RECIPE.component_of("alpha") is alpha
    assert alpha.slim is None
    assert beta.slim is not None
    assert (beta.slim.gpu, beta.slim.keep_ptx, beta.slim.debug) == (True, False, True)
    assert RECIPE.component_of("unheard-of").patches == ()
    assert RECIPE.bundle_name(TARGET) == "small-python312-cuda12_8-sm90-avx512"
    assert RECIPE.bundle_name(replace(TARGET, sms=(90, 80))) == "small-python312-cuda12_8-sm80_90-avx512"


def test_what_is_composed_and_what_is_no_longer_required() -> None:
    names = ("alpha", "beta", "delta", "other")
    found = {name: [RECIPE.composed(name, sms) for sms in ([80], [90], [80, 90])] for name in names}
    assert found == {"alpha": [True] * 3, "beta": [False, True, True], "delta": [False] * 3, "other": [True] * 3}
    assert [(edit.name, edit.to, edit.reason) for edit in RECIPE.requires_edits([80])] == [
        ("gamma", "gamma>=2", "newer"), ("beta", None, "only there"),
    ]  # fmt: skip
    assert [edit.name for edit in RECIPE.requires_edits([90])] == ["gamma"]
    assert [edit.name for edit in RECIPE.requires_edits([80, 90])] == ["gamma"]  # one needs it: nobody's is dropped


def test_what_may_not_be_modified() -> None:
    assert RECIPE.untouched_reason("nvidia-cublas-cu12") == "its licence"
    assert RECIPE.untouched_reason("nvidia-free") is None
    assert RECIPE.untouched_reason("alpha") is None


@pytest.mark.parametrize(
    ("change", "where", "word"),
    [
        ({"sms": (61,)}, "--sm", "too old"), ({"sms": (120,)}, "--sm", "80, 90"),
        ({"sms": (61, 90)}, "--sm", "cannot serve SM 61"), ({"sms": (80, 120)}, "--sm", "not offered for SM 120"),
        ({"python": "3.13"}, "--python", "3.12, 3.11"), ({"machine": "aarch64"}, "--isa", "x86_64"),
    ],
)  # fmt: skip
def test_a_target_that_is_not_served(change: dict[str, Any], where: str, word: str) -> None:
    RECIPE.check_target(TARGET)
    fields = {"sms": (90,), "isa": "avx512", "cuda": "12.8", "python": "3.12", **change}
    with pytest.raises(RecipeError) as caught:
        RECIPE.check_target(Target(**fields))
    assert caught.value.where == where
    assert word in str(caught.value)


# --- keys and types (R04, R05, R12) ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("verison", "version"), ("components", "component"), ("as_of", "as-of"), ("component.1.sha265", "sha256"),
        ("component.0.prune.0.path", "paths"), ("component.0.needs_driver", "needs-driver"),
        ("native.0.release.licens", "licence"), ("requires.0.resaon", "reason"), ("refuse.0.sms", "sm"),
        ("component.1.slim.file", "files"), ("component.1.slim.keep_ptx", "keep-ptx"),
        ("component.1.slim.license", "licence"), ("component.1.slims", "slim"),
    ],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(path: str, near: str) -> None:
    error = refusal(path, "x")
    assert error.what == f"unknown key {dotted(path)!r}"
    assert error.fix == f"Did you mean {near!r}?"


def test_all_unknown_keys_are_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(changed("component.0.zzzzzz", 1) | {"\x1b[31m": 1}, "small.toml")
    text = str(caught.value)
    assert "2 faults" in text
    assert "'component[0].zzzzzz'" in text
    assert "Known keys here: as-of, component" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", 5), ("sm", "90"), ("sm.0", "90"), ("sm.0", 9.5), ("sm.0", True), ("pythons", "3.12"),
        ("pythons.1", 3.11),
        ("as-of", "yesterday"), ("as-of", 5), ("include", 5), ("include", {"x": 5}), ("component", "x"),
        ("component", {"name": "x"}), ("component.0", "x"), ("component.0.name", ["x"]),
        ("component.1.size", float("nan")),
        ("component.0.prune", {"paths": []}), ("component.0.prune.0.paths", "x"), ("component.0.prune.0.sm-not", 80),
        ("component.2.tool", "yes"), ("component.1.slim", "all"), ("component.1.slim", []),
        ("component.1.slim.files", "x"), ("component.1.slim.gpu", 1), ("component.1.slim.sha256", 5),
        ("native.0.release", []), ("native.0.release.size", "5"), ("environment", []),
        ("environment.SMALL_MODE", 1), ("indexes.extra", ["x"]), ("requires.0.to", False), ("constraints", {}),
    ],
)  # fmt: skip
def test_a_wrong_type_names_its_place(path: str, value: object) -> None:
    error = refusal(path, value)
    assert error.what.startswith(("expected", "invalid"))
    # The key of a free table is not told.
    place = dotted(path).replace(".SMALL_MODE", "[...]").replace(".extra", "[...]")
    assert error.where == f"small.toml: {place}"


@pytest.mark.parametrize("path", ["name", "sm", "component", "component.0.name", "refuse.0.reason", "native.0.path",
                                  "component.1.slim.files", "component.1.slim.licence", "component.1.slim.text",
                                  "component.1.slim.sha256"])  # fmt: skip
def test_a_missing_key_is_named(path: str) -> None:
    data: Any = copy.deepcopy(DATA)
    *parents, last = path.split(".")
    inner = data
    for word in parents:
        inner = inner[int(word) if word.isdigit() else word]
    del inner[last]
    with pytest.raises(RecipeError, match=f"missing required field `{last}`"):
        parse_recipe(data, "small.toml")


@pytest.mark.parametrize("value", [0, 2, "1", True, None, [1]])
def test_another_schema(value: object) -> None:
    assert str(refusal("schema", value).where) == "small.toml: schema"


# --- values (R01, R02, R03, R06, R07, R08, R11, R12, R13) -------------------------------------------------------------

_SHELL = ["; rm -rf /", "$(id)", "`id`", "a\nb", "-rf", "--config=x", "a b", "", "\0", "\x1b[31m", "../x", "/x"]
_NOT_HTTPS = [
    "http://example.org/x", "file:///etc/passwd", "ftp://example.org/x", "git+https://example.org/x", "//example.org/x",
    "https://user:word@example.org/x", "https://example.org/$(id)", "https://example.org/`id`", "-https://example.org",
    "https://example.org/a b", "https://example.org/a\nb", "https://example.org/;x", "https://", "", "HTTPS:x",
]  # fmt: skip
_NO_PATH = ["..", "../x", "a/../x", "a/..", "/etc/passwd", "-x", "--output=x", "", "a\\b", "a\nb", "a\0b", "a\x1bb"]
_NO_SHA256 = ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", "md5:" + "a" * 60]
_NO_VARIABLE = [
    "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "HOME",
    "BASH_ENV", "IFS", "A B", "A=B", "1A", "", "$(id)", "A\n", "A;B",
]  # fmt: skip

FAULTS: list[tuple[str, list[str]]] = [
    ("name", _SHELL),
    ("version", _SHELL),
    ("cuda", [*_SHELL, "12", "12.8.1", "12_8"]),
    ("pythons.0", [*_SHELL, "3", "3.9", "3.12.1", "2.7", "3.12\n"]),
    ("component.0.name", [*_SHELL, "Alpha", "al_pha", "alpha\n", "nvidia.x"]),
    ("component.0.version", [*_SHELL[:6], *_SHELL[7:], ">=1", "main", "1.0\n", " 1.0", "v1.0 ; x"]),
    ("component.0.index", ["other", "https://example.org/simple", "-x"]),
    ("component.1.url", _NOT_HTTPS),
    ("component.1.sha256", _NO_SHA256),
    ("component.1.slim.sha256", _NO_SHA256),
    ("component.1.slim.files", [*_NO_PATH, "a/[z-a]"]),
    ("component.1.slim.text", _NO_PATH),
    ("component.1.slim.licence", ["", " ", "MIT\n", "\x1b[31m"]),
    ("component.0.patches.0", _NO_PATH),
    ("component.0.prune.0.paths", [*_NO_PATH, "a/[z-a]"]),
    ("component.0.prune.0.machines", ["arm64", ""]),
    ("component.0.links.0.path", _NO_PATH),
    ("component.0.links.0.to", _NO_PATH),
    ("component.0.rpath.0.files", [*_NO_PATH, "[9-0]"]),
    ("component.0.rpath.0.folders", _NO_PATH),
    ("component.0.imports.0", [*_SHELL, "os; import x", "a-b", ".a", "a..b", "1a"]),
    ("interpreter.0.url", _NOT_HTTPS),
    ("interpreter.0.sha256", _NO_SHA256),
    ("native.0.path", [*_NO_PATH, "{other}/x", "{0}", "{site.x}/y", "{site", "{site}/../x"]),
    ("native.0.source", _NO_PATH),
    ("native.0.release.url", _NOT_HTTPS),
    ("native.0.release.sha256", _NO_SHA256),
    ("native.0.release.name", _NO_PATH),
    ("native.0.release.licence", _NO_PATH),
    ("native.0.release.debian", _NO_PATH),
    ("indexes.extra", _NOT_HTTPS),
    ("requires.0.name", ["Gamma", "-r x", "", "ga_mma"]),
    ("requires.0.to", ["-r /etc/passwd", "--index-url=x", "$(id)", "gamma @ x y", "", "other>=2", "gamma>>2"]),
]


@pytest.mark.parametrize(("path", "value"), [(path, value) for path, values in FAULTS for value in values])
def test_a_value_that_cannot_be_meant(path: str, value: str) -> None:
    error = refusal(path, [value] if path.endswith(("paths", "files", "folders", "machines")) else value)
    faults = str(error)
    assert f"small.toml: {dotted(path)}" in faults
    assert "\x1b" not in faults
    assert "\0" not in faults


@pytest.mark.parametrize("name", _NO_VARIABLE)
def test_a_variable_that_a_bundle_may_not_set(name: str) -> None:
    assert "environment" in str(refusal("environment", {name: "x"}))


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("component.1.name", "alpha", "component[1].name"),
        ("component", [], "component"),
        ("requires.0.of", "Al_pha", "requires[0].of"),
        ("component.1.path", "beta-2.0-py3-none-any.whl", "component[1].path"),
        ("component.1.index", "extra", "component[1].index"),
        ("component.0.size", 5, "component[0].size"),
        ("component.1.size", 0, "component[1].size"),
        ("indexes.file", "https://example.org/simple", "indexes.file"),
        ("component.1.version", None, "component[1].version"),
        ("component.1.sha256", None, "component[1].sha256"),
        ("component.0.sha256", "a" * 64, "component[0].sha256"),
        ("component.1.reason", None, "component[1].reason"),
        ("component.0.untouched", "its licence", "component[0].untouched"),
        ("component.1.slim.files", [], "component[1].slim.files"),
        ("component.1.untouched", "its licence", "component[1].slim"),
        ("untouched.0.names", ["bet*"], "component[1].slim"),
        ("refuse.0.sm", [90, 61], "refuse[0].sm"),
        ("sm", [90, 90], "sm"),
        ("sm", [], "sm"),
        ("pythons", [], "pythons"),
        ("machines", ["x86_64", "x86_64"], "machines"),
    ],
)
def test_a_contradiction(path: str, value: object, place: str) -> None:
    assert str(refusal(path, value).where) == f"small.toml: {place}"


WHEEL = {"name": "zeta", "version": "1.0", "path": "wheels/zeta-1.0-py3-none-any.whl", "sha256": "a" * 64}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"sha256": None}, "sha256"),
        ({"sha256": "A" * 64}, "sha256"),
        ({"version": None}, "version"),
        ({"index": "extra"}, "index"),
        ({"url": "https://example.org/zeta-1.0-py3-none-any.whl"}, "path"),
        ({"version": "1.1"}, "path"),
        *(({"path": path}, "path") for path in (
            "", "wheels", "wheels/", "zeta-1.0.tar.gz", "eta-1.0-py3-none-any.whl", "zeta-1.0-py3-none-any.whl\n",
            "a\\zeta-1.0-py3-none-any.whl", "-x/zeta-1.0-py3-none-any.whl", "\x1b/zeta-1.0-py3-none-any.whl",
        )),
    ],
)  # fmt: skip
def test_a_local_file_that_cannot_be_meant(change: dict[str, str | None], key: str) -> None:
    component = {name: value for name, value in (WHEEL | change).items() if value is not None}
    assert f"small.toml: component[3].{key}" in str(refusal("component", [*DATA["component"], component]).where)


@pytest.mark.parametrize("path", [WHEEL["path"], "../zeta-1.0-py3-none-any.whl", "/a b/ü/zeta-1.0-1-py3-none-any.whl"])
def test_a_local_file(path: str) -> None:
    recipe = parse_recipe(changed("component", [*DATA["component"], WHEEL | {"path": path}]), "small.toml")
    assert recipe.component[-1].path == path


def test_a_date_without_a_time_zone() -> None:
    assert str(refusal("as-of", DATA["as-of"].replace(tzinfo=None)).where) == "small.toml: as-of"


def test_all_contradictions_are_told_at_once() -> None:
    data = changed("name", "$(id)")
    data["component"][0]["version"] = "main"
    data["sm"] = []
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "small.toml")
    assert all(f"small.toml: {place}" in str(caught.value) for place in ("name", "component[0].version", "sm"))


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.times(), st.datetimes()
)
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
)
_KEYS = [field.encode_name for field in msgspec.structs.fields(Recipe)]


@given(key=st.sampled_from(_KEYS), value=_TREES)
def test_no_value_leaks_another_error(key: str, value: object) -> None:
    with contextlib.suppress(RecipeError):
        assert parse_recipe(changed(key, value), "small.toml").schema == 1


@given(
    path=st.sampled_from([path for path, _ in FAULTS if not path.endswith(("paths", "files", "folders", "machines"))]),
    value=st.text(max_size=30),
)
def test_no_text_brings_in_a_control_character(path: str, value: str) -> None:
    try:
        parse_recipe(changed(path, value), "small.toml")
    except RecipeError:
        return
    assert value.isprintable()
    assert not value.startswith("-")


# --- files (R09, R10, R14) -------------------------------------------------------------------------------------------


def loaded(folder: Path, text: str | bytes, **included: str | bytes) -> Recipe:
    for name, content in {"small": text, **included}.items():
        (folder / f"{name}.toml").write_bytes(content.encode() if isinstance(content, str) else content)
    return load_recipe(str(folder / "small.toml")).recipe


def test_a_file_with_included_components(tmp_path: Path) -> None:
    more = '[[component]]\nname = "epsilon"\n'
    recipe = loaded(tmp_path, 'include = ["more.toml"]\n' + HEAD + BODY, more=more)
    assert [one.name for one in recipe.component] == ["alpha", "beta", "delta", "epsilon"]
    before = load_recipe(str(tmp_path / "small.toml"))
    assert before.lock_path("3.12", "x86_64") == tmp_path / "pylock.small-py312-x86_64.toml"
    assert before.patches == data_root() / "patches"
    (tmp_path / "patches").mkdir()
    (tmp_path / "more.toml").write_text(more + "# a remark\n")
    after = load_recipe(str(tmp_path / "small.toml"))
    assert (after.patches, after.recipe) == (tmp_path / "patches", before.recipe)
    assert after.digest != before.digest


def test_local_files_lie_relative_to_the_file_that_names_them(tmp_path: Path) -> None:
    def component(name: str, path: str, digit: str) -> str:
        return f'[[component]]\nname = "{name}"\nversion = "1.0"\npath = "{path}"\nsha256 = "{digit * 64}"\n'

    (tmp_path / "parts").mkdir()
    more = component("eta", "wheels/eta-1.0-py3-none-any.whl", "b")
    more += component("theta", "../theta-1.0-py3-none-any.whl", "c")
    more += component("iota", "/srv/iota-1.0-py3-none-any.whl", "d")
    own = component("zeta", "wheels/zeta-1.0-py3-none-any.whl", "a")
    loaded(tmp_path, 'include = ["parts/more.toml"]\n' + HEAD + BODY + own, **{"parts/more": more})
    files = load_recipe(str(tmp_path / "small.toml")).local_files()
    assert {digest[0]: (Path(os.path.normpath(one.path)), one.key) for digest, one in files.items()} == {
        "a": (tmp_path / "wheels/zeta-1.0-py3-none-any.whl", "small.toml: component[3].path (zeta)"),
        "b": (tmp_path / "parts/wheels/eta-1.0-py3-none-any.whl", "small.toml: component[4].path (eta)"),
        "c": (tmp_path / "theta-1.0-py3-none-any.whl", "small.toml: component[5].path (theta)"),
        "d": (Path("/srv/iota-1.0-py3-none-any.whl"), "small.toml: component[6].path (iota)"),
    }


@pytest.mark.parametrize(
    "name", ["../x.toml", "/etc/hostname", "a/../../x.toml", "..", "a\\u0000b", "a\\nb", "missing.toml", ".", ""]
)
def test_an_include_that_leaves_the_folder_or_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.toml").write_text("")
    (tmp_path / "r").mkdir()
    with pytest.raises(RecipeError) as caught:
        loaded(tmp_path / "r", f'include = ["{name}"]\n' + HEAD + BODY)
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize(
    ("include", "more", "word"),
    [
        ("5", "", "expected `array`"),
        ('"more.toml"', "", "expected `array`"),
        ("[5]", "", "5 is not a file"),
        ('["more.toml"]', 'name = "other"', "'name' is not allowed"),
        ('["more.toml"]', "component = 5", "'component' is not allowed"),
        ('["more.toml"]', "[environment]\nA = '1'", "'environment' is not allowed"),
        ('["more.toml"]', 'include = ["more.toml"]', "'include' is not allowed"),
        ('["small.toml"]', "", "'include' is not allowed"),
        ('["more.toml"]', '[[component]]\nname = "alpha"', "listed twice"),
        ('["more.toml"]', "[[component]]\nnome = 1", "Did you mean 'name'"),
    ],
)
def test_what_an_included_file_may_not_hold(tmp_path: Path, include: str, more: str, word: str) -> None:
    with pytest.raises(RecipeError, match=word):
        loaded(tmp_path, f"include = {include}\n" + HEAD + BODY, more=more)


def test_a_list_that_is_none_beside_an_included_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected `array`"):
        loaded(tmp_path, 'include = ["more.toml"]\ncomponent = 5\n' + HEAD, more='[[component]]\nname = "alpha"')


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"name = ", "not TOML"), (b"a = 1\na = 2", "not TOML"), (b"\xef\xbb\xbf" + HEAD.encode(), "not TOML"),
        (b'name = "\xff"', "not UTF-8"), (HEAD.encode("utf-16"), "not UTF-8"), (b"a\0 = 1", "not TOML"),
        (b"a = " + b"[" * 10_000 + b"]" * 10_000, "not TOML"),
        (b"a = " + b"{b=" * 10_000 + b"1" + b"}" * 10_000, "not TOML"),
        (b"[" + b"a." * 10_000 + b"a]", "schema None"), (b"size = " + b"9" * 5_000, "not TOML"), (b"", "schema None"),
        (HEAD.encode() + b"a" + b".a" * 3_000 + b" = 1", "unknown key 'a'"), (b'a = "\\ud800"', "not TOML"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe(tmp_path: Path, text: bytes, word: str) -> None:
    with pytest.raises(RecipeError, match=word) as caught:
        loaded(tmp_path, text)
    assert "small.toml" in str(caught.value)


def test_a_file_of_100_mb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_bytes(b"")
    os.truncate(path, 100 << 20)
    with pytest.raises(RecipeError, match="larger than 1048576 bytes"):
        load_recipe(str(path))
    path.write_text(HEAD + BODY + "#" * ((1 << 20) - len(HEAD + BODY)))
    assert load_recipe(str(path)).recipe == RECIPE


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("slang")
    assert caught.value.fix == "Did you mean 'sglang'?"
    with pytest.raises(RecipeError) as caught:
        load_recipe("zzz")
    assert caught.value.fix is not None
    assert caught.value.fix.startswith("Known: sglang, ")


@pytest.mark.parametrize("name", ["", "targets.tom", "../recipes/x", "a\0b", "/nonexistent/x.toml", "-x", "."])
def test_a_name_that_is_no_recipe(name: str) -> None:
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(name)


def test_the_lock_and_the_vocabulary_are_no_recipes() -> None:
    for name in ("targets", "pylock.sglang-py312-x86_64"):
        with pytest.raises(RecipeError, match="schema"):
            load_recipe(name)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ComposerError, match="no recipe"):
        load_recipe(str(tmp_path / "folder.toml"))


_AUDITED = """
import subprocess, sys
from pathlib import Path
from composer.steps import load
from composer.model.target import Target

seen = []
WATCHED = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.", "socket.", "import",
           "ctypes.", "os.mkdir", "os.remove", "os.rename", "os.chmod", "os.link", "os.symlink", "urllib.", "code.")

def watch(event, arguments):
    if event.startswith(WATCHED) or (event == "open" and set(str(arguments[1])) & set("wax+")):
        seen.append(event)

sys.addaudithook(watch)
for name in sys.argv[1:]:
    loaded = load.load_recipe(name)
    recipe = loaded.recipe
    targets = load.load_targets()
    recipe.check_target(Target(sms=recipe.sm[:1], isa="avx2", cuda=recipe.cuda, python=recipe.pythons[0]))
    recipe.requires_edits(recipe.sm)
    loaded.lock_path(recipe.pythons[0], "x86_64")
print(sorted(set(seen)))
subprocess.run(["true"])
import socket
socket.socket().close()
print("subprocess.Popen" in seen, "socket.__new__" in seen, "import" in seen)
"""


def test_loading_starts_no_process_opens_no_socket_imports_and_writes_nothing(tmp_path: Path) -> None:
    loaded(tmp_path, 'include = ["more.toml"]\n' + HEAD + BODY, more='[[component]]\nname = "epsilon"\n')
    # What an import of the recipe's own folder, or a build script in it, would leave behind.
    for name in ("small.py", "conftest.py", "sitecustomize.py", "setup.py"):
        (tmp_path / name).write_text("raise SystemExit('ran')")
    words = [sys.executable, "-c", _AUDITED, "sglang", str(tmp_path / "small.toml")]
    done = subprocess.run(words, cwd=data_root(), capture_output=True, text=True, check=False)
    assert done.stderr == ""
    # The second line shows that the hook sees what it watches.
    assert done.stdout == "[]\nTrue True True\n"
    assert not list(tmp_path.glob("__pycache__"))


def test_the_shipped_recipe_holds_together() -> None:
    shipped = load_recipe("sglang")
    recipe, targets = shipped.recipe, load_targets()
    assert {str(sm) for sm in recipe.sm} <= targets.sm.keys()
    assert all((shipped.patches / name).is_file() for one in recipe.component for name in one.patches)
    assert all(shipped.lock_path(python, "x86_64").is_file() for python in recipe.pythons)

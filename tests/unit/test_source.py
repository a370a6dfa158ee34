"""Source builds as data: what a recipe may say, how many jobs, which version, and what changes a key."""

from __future__ import annotations

import io
import lzma
import tarfile
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from packaging.version import Version

from composer.errors import BuildError, HostError, IntegrityError, LockError, RecipeError
from composer.formats.wheel import read_wheel
from composer.interpreter import Candidate
from composer.interpreter.archive import unpack
from composer.model.lock import Artifact, Lock, LockedPackage, parse_lock, render_lock
from composer.model.recipe import parse_recipe
from composer.model.source import Build, Values, Variant, Without, jobs_for, local_version
from composer.model.target import Target
from composer.steps import source as step
from composer.steps.load import LoadedRecipe
from composer.steps.relabel import labelled, relabel_wheel
from composer.steps.source import Job, Request
from composer.steps.source_log import failure, progress_note
from composer.steps.source_machine import check_room, jobs_here, memory_here
from composer.steps.source_tree import Patch, Source
from composer.store import Store
from tests.recipes import head
from tests.wheels import build_wheel

HEAD = (
    head(sm=(90, 100))
    + """\
[[component]]
name = "some-ext"
"""
)
GOOD = 'version = "1.0"\n[component.build]\nrequires = ["tool==1"]\n'
SHA = "a" * 64


def build(**more: Any) -> Build:
    return Build(**{"requires": ("tool==1",), "sdist": True, **more})


def refused(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(tomllib.loads(HEAD + text), "r.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "component[0].build: needs one source"),
        ('sdist = true\nurl = "https://example.org/x.tar.gz"', "component[0].build: needs one source"),
        ('url = "https://example.org/x.tar.gz"', "component[0].build.sha256: must be the 64 hex digits"),
        (f'url = "http://example.org/x"\nsha256 = "{SHA}"', "component[0].build.url: "),
        (f'url = "https://u:p@example.org/x"\nsha256 = "{SHA}"', "component[0].build.url: "),
        (
            f'url = "https://example.org/x"\nreleases = {{ "1.0" = "{SHA}" }}',
            "component[0].build.releases: is meant for",
        ),
        (
            f'url = "https://example.org/{{release}}"\nreleases = {{ "2.0" = "{SHA}" }}',
            "component[0].build.releases: does not hold 1.0; it has 2.0",
        ),
        (
            'url = "https://example.org/{release}"\nreleases = { "1.0" = "x" }',
            "component[0].build.releases.1.0: must be",
        ),
        (f'sdist = true\nsha256 = "{SHA}"', "component[0].build.sha256: is only meant beside"),
        ("sdist = true\nsize = 1", "component[0].build.size: "),
        ('git = "https://example.org/x.git"', "component[0].build.commit: and git are only meant together"),
        ('git = "https://example.org/x.git"\ncommit = "v1.0"', "component[0].build.commit: 'v1.0' is not 40"),
        (f'git = "ssh://example.org/x.git"\ncommit = "{"a" * 40}"', "component[0].build.git: "),
        ('path = "-x"', "component[0].build.path: "),
        ('sdist = true\nsubdirectory = "../x"', "component[0].build.subdirectory: "),
        ('sdist = true\npatches = ["/etc/x"]', "component[0].build.patches[0]: "),
        ('sdist = true\nprebuilt = false\nwhen = "asked"', "component[0].build.when: must be 'always' or 'auto'"),
        (
            'sdist = true\n[[component.build.without]]\nnames = ["A_b"]\nreason = "r"',
            "component[0].build.without: 'A_b'",
        ),
        (
            'sdist = true\n[[component.build.variant]]\nreason = "r"\nenvironment = { LD_PRELOAD = "x" }',
            "component[0].build.variant[0].environment.LD_PRELOAD: is not",
        ),
        ("sdist = true\ndisk = -1", "component[0].build.disk: "),
        ('sdist = true\nconfig = { "a b" = "1" }', "component[0].build.config.a b: "),
        ('sdist = true\nconfig = { a = "{isa}" }', "component[0].build.config.a: {isa} is not a placeholder"),
        ('sdist = true\nenvironment = { CFLAGS = "{isa.flags" }', "component[0].build.environment.CFLAGS: has a brace"),
        ('sdist = true\nenvironment = { CFLAGS = "-O2\\nX" }', "component[0].build.environment.CFLAGS: must be one"),
        ("sdist = true\nenviroment = {}", "unknown key 'component[0].build.enviroment'"),
    ],
)
def test_a_build_that_cannot_be_meant_is_named_by_its_key(text: str, place: str) -> None:
    assert place in refused(GOOD + text)


def test_the_archive_of_a_version_is_chosen_by_it() -> None:
    one = build(sdist=False, url="https://example.org/v{release}.tar.gz", releases={"1.0": SHA, "2.0": "b" * 64})
    assert one.release("2.0") == ("https://example.org/v2.0.tar.gz", "b" * 64)


def test_a_requirement_that_is_none_and_one_that_is_a_url() -> None:
    told = refused(GOOD.replace('"tool==1"', '"==", "tool @ https://example.org/t.whl"') + "sdist = true")
    assert "component[0].build.requires[0]" in told
    assert "component[0].build.requires[1]" in told


def test_a_source_needs_a_version() -> None:
    assert "component[0].build: needs the component's version" in refused(
        GOOD.replace('version = "1.0"', "") + "sdist = true"
    )


@pytest.mark.parametrize(
    "name",
    ["LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "PYTHONSTARTUP", "HOME", "BASH_ENV", "IFS", "TMPDIR",
     "GCC_EXEC_PREFIX", "PIP_INDEX_URL", "http_proxy", "CMAKE_INSTALL_PREFIX", "CMAKE_CXX_COMPILER_LAUNCHER", "cflags",
     "CFLAGS ", "OTHER_EXT_X", "SOURCE_DATE_EPOCH", "CUDA_HOME", "CUDACXX", "CUDAHOSTCXX", ""],
)  # fmt: skip
def test_variables_that_could_change_what_runs_are_refused(name: str) -> None:
    told = refused(GOOD + f'sdist = true\nenvironment = {{ "{name}" = "x" }}')
    assert f"component[0].build.environment.{name}: is not a variable" in told


@pytest.mark.parametrize(
    "name",
    ["CFLAGS", "CXXFLAGS", "LDFLAGS", "USE_CUDNN", "BUILD_TEST", "CMAKE_ARGS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS",
     "PYTORCH_BUILD_VERSION", "_GLIBCXX_USE_CXX11_ABI", "SOME_EXT_FAST", "SKBUILD_CMAKE_ARGS", "NVCC_PREPEND_FLAGS"],
)  # fmt: skip
def test_what_build_systems_are_told_is_allowed(name: str) -> None:
    text = GOOD + f'sdist = true\nenvironment = {{ "{name}" = "{{sm.arch_list}} {{isa.flags}} {{jobs}}" }}'
    (component,) = parse_recipe(tomllib.loads(HEAD + text), "r.toml").component
    assert component.build is not None
    assert component.build.uses("sm")


# --- jobs, versions, placeholders -------------------------------------------------------------------------------------

GB = 10**9


@pytest.mark.parametrize(
    ("cuda", "cores", "memory", "wanted", "jobs"),
    [(False, 8, GB, None, 8), (True, 8, 33 * GB, None, 4), (True, 8, GB, None, 1), (True, 2, 900 * GB, None, 2),
     (True, 8, 900 * GB, 3, 3), (False, 8, GB, 99, 8), (False, 8, GB, 1, 1)],
)  # fmt: skip
def test_jobs(cuda: bool, cores: int, memory: int, wanted: int | None, jobs: int) -> None:
    assert jobs_for(build(cuda=cuda), cores=cores, memory=memory, wanted=wanted) == jobs


def test_max_jobs_is_honoured_and_must_be_a_number() -> None:
    assert jobs_here(build(), None, {"MAX_JOBS": "1"}) == 1
    for text in ("0", "many", "-1"):
        with pytest.raises(HostError, match="MAX_JOBS"):
            jobs_here(build(), None, {"MAX_JOBS": text})


ISA = {"CFLAGS": "{isa.flags}"}
SM = {"TORCH_CUDA_ARCH_LIST": "{sm.arch_list}"}


@pytest.mark.parametrize(
    ("version", "environment", "isa", "expected"),
    [("0.1.27", ISA, "avx512", "0.1.27+avx512"), ("2.9.1", {**ISA, **SM}, "avx512", "2.9.1+sm90.avx512"),
     ("2.9.1+cu128", SM, "avx512", "2.9.1+cu128.sm90"), ("1.0", {}, "avx512", "1.0+source"),
     ("1.0", ISA, "x86-64-v3", "1.0+x86.64.v3"), ("1.0+avx2", ISA, "avx2", "1.0+avx2"),
     ("1.0", {"MAX_JOBS": "{jobs}"}, "avx2", "1.0+source")],
)  # fmt: skip
def test_the_version_says_what_the_wheel_is_for(
    version: str, environment: dict[str, str], isa: str, expected: str
) -> None:
    assert str(local_version(version, build(environment=environment), sms=(90,), isa=isa)) == expected


def test_the_version_of_a_wheel_for_several_gpus() -> None:
    several = build(environment={**ISA, **SM}, all=(80, 90))
    assert str(local_version("2.9.1", several, sms=(90, 80), isa="avx2")) == "2.9.1+all.avx2"
    assert str(local_version("2.9.1", several, sms=(80, 100), isa="avx2")) == "2.9.1+sm80.sm100.avx2"


def test_placeholders_are_filled() -> None:
    values = Values(flags=("-ma", "-mb"), sms=(80, 120), cuda="12.8", version="1.0+avx2", jobs=3, folder="/f")
    assert values.fill("{isa.flags}|{sm.arch_list}|-j{jobs}|{folder}") == "-ma -mb|8.0;12.0|-j3|/f"
    assert values.fill("{sm.specific}|{sm.nvcc}|{cuda}|{version}|{site}") == "8.0;12.0a|80;120a|12.8|1.0+avx2|/f/site"


VARIANTS = (
    Variant(reason="r", sm=(61,), environment={"USE_CUDNN": "0"}, without=(Without(names=("cudnn",), reason="r"),)),
    Variant(reason="r", isa=("avx",), environment={"USE_FBGEMM": "0", "BLAS": "Eigen"}),
)


@pytest.mark.parametrize(
    ("sms", "isa", "changed", "without"),
    [((90,), "avx2", {}, []), ((61,), "avx2", {"USE_CUDNN": "0"}, ["cudnn"]), ((61, 90), "avx2", {}, []),
     ((90,), "avx", {"USE_FBGEMM": "0", "BLAS": "Eigen"}, []),
     ((61,), "avx", {"USE_CUDNN": "0", "USE_FBGEMM": "0", "BLAS": "Eigen"}, ["cudnn"])],
)  # fmt: skip
def test_variants_hold_for_their_targets_only(
    sms: tuple[int, ...], isa: str, changed: dict[str, str], without: list[str]
) -> None:
    plain = {"USE_CUDNN": "1", "BLAS": "MKL"}
    one = build(environment=plain, variant=VARIANTS).for_target(sms, isa)
    assert one.environment == {**plain, **changed}
    assert [name for rule in one.without for name in rule.names] == without


def test_what_differs_by_variant_is_part_of_the_version() -> None:
    assert str(local_version("1.0", build(variant=VARIANTS), sms=(90,), isa="avx")) == "1.0+sm90.avx"


# --- the key ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> Job:
    recipe = parse_recipe(tomllib.loads(HEAD + GOOD + 'sdist = true\nenvironment = { CFLAGS = "{isa.flags}" }'), "r")
    loaded = LoadedRecipe(recipe=recipe, path=tmp_path / "r.toml", patches=tmp_path, digest="")
    component = recipe.component[0]
    assert component.build is not None
    request = Request(
        loaded=loaded, component=component, target=Target(sms=(90,), isa="avx2", cuda="12.8", python="3.12"),
        flags=("-mavx2",),
        python=Candidate(minor="3.12", version="3.12.1", path=Path("/p"), origin="PATH", glibc_floor="2.17"),
    )  # fmt: skip
    tool = LockedPackage(name="tool", version="1", index="pypi", artifacts=(artifact("tool-1-py3-none-any.whl", "b"),))
    lock = Lock(name="n", recipe=SHA, python="3.12", machine="x86_64", platforms=(), packages=(tool,))
    return Job(request=request, build=component.build, lock=lock, source=Source(identity="sha256:x"), patches=(),
               choice=None, jobs=1, store=Store(tmp_path / "store"), listener=lambda _: None)  # fmt: skip


def artifact(filename: str, digit: str) -> Artifact:
    return Artifact(filename=filename, size=1, sha256=digit * 64)


def with_build(job: Job, **more: Any) -> Job:
    return replace(job, build=msgspec.structs.replace(job.build, **more))


def with_request(job: Job, **more: Any) -> Job:
    return replace(job, request=replace(job.request, **more))


def with_tool(job: Job) -> Job:
    other = replace(job.lock.packages[0], artifacts=(artifact("tool-1-py3-none-any.whl", "c"),))
    return replace(job, lock=replace(job.lock, packages=(other,)))


CHANGES: dict[str, Callable[[Job], Job]] = {
    "source": lambda job: replace(job, source=Source(identity="sha256:y")),
    "patch": lambda job: replace(job, patches=(Patch(name="p", data=b"x"),)),
    "flags": lambda job: with_request(job, flags=("-mavx512f",)),
    "python": lambda job: with_request(job, python=replace(job.request.python, version="3.12.2")),
    "variable": lambda job: with_build(job, environment={"CFLAGS": "-O3"}),
    "setting": lambda job: with_build(job, config={"a": "b"}),
    "subdirectory": lambda job: with_build(job, subdirectory="x"),
    "tool": with_tool,
    "compiler": lambda job: with_build(job, environment={**job.build.environment, "CC": "ld"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_input_changes_the_key(what: str, job: Job) -> None:
    assert CHANGES[what](job).key != job.key


def test_what_does_not_change_the_wheel_does_not_change_the_key(job: Job) -> None:
    other = Target(sms=(100,), isa="avx2", cuda="12.8", python="3.12")
    assert replace(job, jobs=7).key == with_build(job, disk=9, memory=9).key == job.key
    assert with_request(job, target=other).key == job.key
    assert with_build(job, environment={"CFLAGS": "{jobs} {folder}"}).key == with_build(
        replace(job, jobs=9, store=Store(job.store.root / "other")), environment={"CFLAGS": "{jobs} {folder}"}
    ).key  # fmt: skip


def test_a_component_without_a_build_is_refused(job: Job) -> None:
    component = msgspec.structs.replace(job.request.component, build=None)
    with pytest.raises(RecipeError, match=r"some-ext: has no \[component.build\]"):
        step.build_wheel(replace(job.request, component=component), job.store)


def test_nothing_of_the_caller_reaches_a_build(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "CXXFLAGS", "PYTHONPATH", "PIP_INDEX_URL", "CMAKE_PREFIX_PATH", "SECRET"):
        monkeypatch.setenv(name, "callers")
    environ = replace(job, jobs=3)._build_environ(None)
    assert "callers" not in environ.values()
    assert (environ["CFLAGS"], environ["MAX_JOBS"]) == ("-mavx2", "3")
    assert environ["PATH"].startswith(str(job.folder / "env/bin"))
    assert {environ[name] for name in ("HOME", "TMPDIR")} == {str(job.folder / name) for name in ("home", "tmp")}


def test_ccache_is_used_when_it_is_installed(job: Job, tmp_path: Path) -> None:
    assert job._cache({"PATH": str(tmp_path)}) == {}
    program = tmp_path / "ccache"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    found = job._cache({"PATH": str(tmp_path)})
    assert found["CMAKE_CXX_COMPILER_LAUNCHER"] == str(program)
    assert Path(found["CCACHE_DIR"]).is_relative_to(job.store.root)


# --- the lock, archives, wheels, logs ---------------------------------------------------------------------------------


def test_only_the_lock_of_a_build_may_hold_an_sdist(job: Job) -> None:
    package = LockedPackage(name="s", version="1", index="pypi", artifacts=(artifact("s-1.tar.gz", "d"),))
    lock = replace(job.lock, packages=(*job.lock.packages, package), platforms=("linux_x86_64",))
    text = render_lock(lock)
    assert set(parse_lock(text, "l", sdists=True).packages) == set(lock.packages)
    with pytest.raises(LockError, match="something other than wheels"):
        parse_lock(text, "l")


def test_xz_archives_and_their_bounds(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name in ("a/x", "a/y"):
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    path = tmp_path / "s.tar.xz"
    path.write_bytes(lzma.compress(raw.getvalue()))
    unpack(path, tmp_path / "out")
    assert (tmp_path / "out/a/y").read_bytes() == b"abc"
    for number, bounds in enumerate(({"members": 1}, {"size": 5})):
        with pytest.raises(IntegrityError, match="is refused"):
            unpack(path, tmp_path / f"more{number}", **bounds)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(IntegrityError, match="damaged archive"):
        unpack(path, tmp_path / "cut")


def test_a_relabelled_wheel_keeps_its_files(tmp_path: Path) -> None:
    raw = tmp_path / "pkg-1.0-py3-none-any.whl"
    raw.write_bytes(
        build_wheel("pkg", "1.0", {"pkg/__init__.py": b"x = 1\n", "pkg-1.0.data/scripts/run": b"#!python\n"})
    )
    version = Version("1.0+avx2")
    target = tmp_path / labelled(raw.name, version)
    relabel_wheel(raw, target, version, b"{}")
    wheel = read_wheel(target.read_bytes(), target.name)
    assert wheel.dist_info == "pkg-1.0+avx2.dist-info"
    assert {"pkg/__init__.py", "pkg-1.0+avx2.data/scripts/run", "pkg-1.0+avx2.dist-info/compose-source.json"} <= set(
        wheel.members
    )
    again = tmp_path / "again.whl"
    relabel_wheel(raw, again, version, b"{}")
    assert again.read_bytes() == target.read_bytes()


@pytest.mark.parametrize(
    ("text", "kind", "told"),
    [
        ("a\nx.c:1: error: bad\n" + "noise\n" * 40, BuildError, "x.c:1: error: bad"),
        ("c++: fatal error: Killed signal terminated program cc1plus\n", BuildError, "MAX_JOBS"),
        ("write failed: No space left on device\n", HostError, "Free some space"),
        ("ERROR: Some build dependencies for file:///x are missing: 'foo', 'bar'.\n", BuildError, "'foo', 'bar'"),
        ("", BuildError, "exit status 1"),
    ],
)
def test_what_a_failed_build_says(tmp_path: Path, text: str, kind: type[Exception], told: str) -> None:
    log = tmp_path / "log"
    log.write_text("an error of an earlier run: error: old\n" + text)
    start = len("an error of an earlier run: error: old\n")
    fault = failure(log, start, "x 1", "exit status 1")
    assert isinstance(fault, kind)
    assert told in str(fault)
    assert "old" not in str(fault)


def test_progress_counts_only_what_this_run_did() -> None:
    assert progress_note(50, 100, 10.0, 10) == "[50/100] after 10 s, about 50 s left"


def test_room_is_checked(tmp_path: Path) -> None:
    check_room(build(), "x", tmp_path, tmp_path / "none", 1)
    with pytest.raises(HostError, match="2 faults"):
        check_room(build(disk=10**18, memory=memory_here() + 1), "x", tmp_path, tmp_path / "none", 1)

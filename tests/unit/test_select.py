"""The bundle that fits a host: real bundle files, real hosts' descriptions, a real server."""

from __future__ import annotations

import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from composer.cli.detect import detect
from composer.cli.select import select
from composer.errors import ComposerError, FetchError, HostError, RecipeError, VerifyError
from composer.host.detect import Host, parse_host
from composer.host.index import parse_index, read_bundle, write_index
from composer.host.override import Stated, overridden
from composer.host.remote import find_bundles
from composer.model.manifest import Floor, Manifest
from composer.steps.load import load_targets
from composer.steps.pack import pack
from composer.store import Store

_AVX512 = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl")
_DRIVER = {"driver": ("570", "libcudart.so.12"), "CUDA": ("12.8", "libcudart.so.12")}


def gpu(index: int, name: str, sm: int | None, **facts: Any) -> dict[str, Any]:
    return {"index": index, "name": name, "sm": sm, "uuid": f"GPU-{index}{index}", "memory_bytes": 80 << 30, **facts}


_H100, _A100, _A10 = gpu(0, "NVIDIA H100", 90), gpu(0, "NVIDIA A100", 80), gpu(0, "NVIDIA A10", 86)


def described(*gpus: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """A host as `compose-detect --json` describes it."""
    return {
        "schema": 1, "machine": "x86_64", "kernel": "6.1.0-18-amd64", "glibc": "2.36", "libstdcxx": "3.4.30",
        "cpu": {"model": "a CPU", "features": list(_AVX512), "isa": ["avx", "avx2", "avx512"], "cores": 8},
        "driver": {"version": "570.86.15", "cuda": "12.8"}, "gpus": list(gpus),
        "visible": [one["index"] for one in gpus], "l4t": None, "notes": [], **facts,
    }  # fmt: skip


def bundle(folder: Path, name: str, *, sm: str = "90", isa: str = "avx512", cuda: str = "12.8", version: str = "0.5.9",
           recipe: str = "sglang", machine: str = "x86_64",
           floors: Mapping[str, tuple[str, str]] = _DRIVER, padding: int = 0) -> Path:  # fmt: skip
    """A bundle without layers. sm: as in its floor, `90+PTX`, `80 90`, or nothing where it has no GPU code."""
    wanted = {**floors, **({"SM": (sm, "sgl_kernel.so")} if sm else {})}
    manifest = Manifest(
        name=name, fingerprint="0" * 64, composer="1", recipe={"name": recipe, "version": version, "sha256": "0" * 64},
        lock="pylock.toml", python="3.12.1", interpreter="host", torch="none", serve=None, checks=(), left_out=(),
        target={"sm": sm.replace("+PTX", "") or "90", "isa": isa, "cuda": cuda, "python": "3.12", "machine": machine},
        floors={key: Floor(version=one, because=why) for key, (one, why) in wanted.items()},
        warnings=[bytes((number * 7919 % 251 + 1) % 94 + 33 for number in range(padding)).decode()], layers=(),
    )  # fmt: skip
    path = folder / f"{name}.tar.zst"
    pack(Store(folder / "store"), [], lambda _: manifest, path, mtime=0, listener=lambda _: None,
         accept=lambda _: None)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one bundle, for tests that change nothing in it."""
    folder = tmp_path_factory.mktemp("one")
    bundle(folder, "a", floors={**_DRIVER, "glibc": ("2.28", "a.so")})
    return folder


def choose(place: Path | str, host: Mapping[str, Any] | None, *words: str, **environ: str) -> Result:
    asked = ["--host", "-"] if host is not None else []
    clean = dict.fromkeys(_VARIABLES)
    return CliRunner().invoke(select, [str(place), *asked, *words], input=json.dumps(host), env={**clean, **environ})


def chosen(place: Path | str, host: Mapping[str, Any], *words: str, **environ: str) -> dict[str, Any]:
    done = choose(place, host, "--json", *words, **environ)
    assert isinstance(done.exception, HostError | None), done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["selected"] is None) == (done.exception is not None)
    return found


def best(place: Path, host: Mapping[str, Any], *words: str, **environ: str) -> str:
    found = chosen(place, host, *words, **environ)["selected"]
    name: str = found["name"]
    return name


def refusals(place: Path, host: Mapping[str, Any], *words: str, **environ: str) -> list[str]:
    refused = chosen(place, host, *words, **environ)["refused"]
    return [reason["what"] for one in refused for reason in one["reasons"]]


_CUDA, _SM, _GLIBC = "CONDA_OVERRIDE_CUDA", "CONDA_OVERRIDE_CUDA_ARCH", "CONDA_OVERRIDE_GLIBC"
_NV_CUDA, _NV_SM = "NV_VARIANT_PROVIDER_FORCE_CUDA_DRIVER_VERSION", "NV_VARIANT_PROVIDER_FORCE_SM_ARCH"
_VARIABLES = (_CUDA, _SM, _GLIBC, _NV_CUDA, _NV_SM)


# --- rank -------------------------------------------------------------------------------------------------------------


def test_native_before_compatible(tmp_path: Path) -> None:
    bundle(tmp_path, "a80", sm="80", version="9.9")
    bundle(tmp_path, "b86", sm="86")
    found = chosen(tmp_path, described(_A10))
    assert (found["selected"]["name"], [one["name"] for one in found["others"]]) == ("b86", ["a80"])
    assert (found["selected"]["native"], found["others"][0]["native"]) == (True, False)
    assert best(tmp_path, described(_A100)) == "a80"


def test_the_richest_instruction_set_that_the_cpu_runs(tmp_path: Path) -> None:
    for isa in ("avx", "avx2", "avx512", "avx512bf16"):
        bundle(tmp_path, f"for-{isa}", isa=isa)
    found = chosen(tmp_path, described(_H100))
    # Without a floor for the CPU, code for more is chosen at run time: it works, but nothing is gained.
    assert found["selected"]["name"] == "for-avx512"
    assert [one["name"] for one in found["others"]] == ["for-avx2", "for-avx", "for-avx512bf16"]


def test_then_version_then_cuda_then_size(tmp_path: Path) -> None:
    bundle(tmp_path, "a", version="0.5.9", cuda="12.9")
    bundle(tmp_path, "b", version="0.5.10", cuda="12.6", padding=5000)
    bundle(tmp_path, "c", version="0.5.10", cuda="12.6")
    bundle(tmp_path, "d", version="0.5.10", cuda="12.8", padding=5000)
    bundle(tmp_path, "e", version="not a version", cuda="12.9")
    found = chosen(tmp_path, described(_H100))
    assert [one["name"] for one in (found["selected"], *found["others"])] == ["d", "c", "b", "a", "e"]


def test_a_bundle_for_several_fits_each_of_them_and_comes_after_the_smaller_one_for_that(tmp_path: Path) -> None:
    bundle(tmp_path, "several", sm="80 90", padding=5000)
    for device in (_A100, _H100):
        found = chosen(tmp_path, described(device))["selected"]
        assert (found["name"], found["native"]) == ("several", True)
    assert chosen(tmp_path, described(_A10))["selected"]["native"] is False  # by what it has for SM 80
    assert "SM 80, 90: native on 1 GPU" in choose(tmp_path, described(_H100)).stdout
    (refused,) = refusals(tmp_path, described(gpu(0, "NVIDIA B200", 100)))
    assert refused == "holds GPU code for SM 80, SM 90; this host has NVIDIA B200 (SM 100)"
    bundle(tmp_path, "exact", sm="90")
    found = chosen(tmp_path, described(_H100))
    assert (found["selected"]["name"], [one["name"] for one in found["others"]]) == ("exact", ["several"])
    assert best(tmp_path, described(_A100)) == "several"
    assert best(tmp_path, described(_A100, _H100)) == "several"  # the other one would leave out a GPU


def test_ptx_runs_on_what_came_later(tmp_path: Path) -> None:
    bundle(tmp_path, "a80", sm="80+PTX")
    assert best(tmp_path, described(_H100)) == "a80"
    bundle(tmp_path, "b90")
    assert best(tmp_path, described(_H100)) == "b90"


def test_a_bundle_without_gpu_code_comes_last(tmp_path: Path) -> None:
    bundle(tmp_path, "cpu", sm="", version="9.9")
    assert best(tmp_path, described()) == "cpu"
    bundle(tmp_path, "gpu")
    assert best(tmp_path, described(_H100)) == "gpu"


def test_versions_of_different_recipes_do_not_compare(tmp_path: Path) -> None:
    bundle(tmp_path, "a")
    bundle(tmp_path, "b", recipe="vllm", version="0.19")
    fault = choose(tmp_path, described(_H100)).exception
    assert isinstance(fault, RecipeError)
    assert (fault.why, fault.fix) == ("sglang, vllm", "Choose one: --recipe sglang.")
    assert best(tmp_path, described(_H100), "--recipe", "vllm") == "b"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_every_reason_at_once(tmp_path: Path) -> None:
    floors = {"glibc": ("2.38", "a.so"), "kernel": ("6.2", "b"), "CPU": ("avx512_bf16 avx512f", "torch"),
              "libstdc++ GLIBCXX": ("3.4.32", "c.so"), "driver": ("580", "d.so"), "CUDA": ("13.0", "d.so")}  # fmt: skip
    bundle(tmp_path, "new", floors=floors)
    assert refusals(tmp_path, described(_A100)) == [
        "needs glibc 2.38; this host has 2.36",
        "needs Linux 6.2; this host has 6.1.0-18-amd64",
        "needs a CPU with avx512_bf16 avx512f; this host has none with avx512_bf16",
        "needs libstdc++ GLIBCXX 3.4.32; this host has 3.4.30",
        "needs NVIDIA's driver 580; this host has 570.86.15",
        "holds GPU code for SM 90; this host has NVIDIA A100 (SM 80)",
    ]


def test_a_newer_cuda_by_nvidias_compatibility_package(tmp_path: Path) -> None:
    bundle(tmp_path, "a")
    old = {"version": "535.183.06", "cuda": "12.2"}
    assert refusals(tmp_path, described(_H100, driver=old)) == ["needs NVIDIA's driver 570; this host has 535.183.06"]
    assert best(tmp_path, described(_H100, driver={**old, "cuda": "12.8"})) == "a"


def test_what_is_not_known_is_not_held_against_a_host(tmp_path: Path) -> None:
    bundle(tmp_path, "a", floors={"glibc": ("9.9", "a.so"), "kernel": ("99", "b"), **_DRIVER})
    assert best(tmp_path, described(_H100, glibc=None, kernel=None, driver=None)) == "a"


def test_another_machine(tmp_path: Path) -> None:
    bundle(tmp_path, "a", machine="aarch64", floors={"glibc": ("9.9", "a.so")})
    assert refusals(tmp_path, described(_H100)) == ["is for aarch64; this host is x86_64"]


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (described(), "none was found"),
        (described(_H100, visible=[]), "CUDA_VISIBLE_DEVICES hides all 1 of this host"),
        (described(gpu(0, "x", None)), "the SM of this host's is not known"),
        (described(gpu(0, "NVIDIA Orin", 87)), "this host has NVIDIA Orin (SM 87)"),
    ],
)  # fmt: skip
def test_gpus_that_will_not_do(tmp_path: Path, host: dict[str, Any], words: str) -> None:
    bundle(tmp_path, "a", sm="86")
    assert [words in one for one in refusals(tmp_path, host)] == [True]


def test_in_words(tmp_path: Path) -> None:
    bundle(tmp_path, "fits")
    bundle(tmp_path, "not", sm="100")
    (tmp_path / "no-bundle.tar.zst").write_bytes(b"hello")
    done = choose(tmp_path, described(_H100))
    assert done.exception is None
    assert done.stdout.splitlines() == [
        f"selected: {tmp_path}/fits.tar.zst",
        "  sglang 0.5.9, CUDA 12.8, SM 90: native on 1 GPU, ISA avx512, 0.0 MB",
        f"  sha256 {(tmp_path / 'fits.tar.zst.sha256').read_text()[:64]}",
        "refused: not",
        "  holds GPU code for SM 100; this host has NVIDIA H100 (SM 90)",
        "    fix: use one built with --sm 90",
        "refused: 'no-bundle.tar.zst'",
        "  " + done.stdout.splitlines()[-1].strip(),
    ]


def test_none_fits(tmp_path: Path) -> None:
    bundle(tmp_path, "a")
    done = choose(tmp_path, described(_A100), "--path")
    assert isinstance(done.exception, HostError)
    assert (done.stdout, done.exception.what) == ("", "none of 1 bundle fits this host")
    assert "holds GPU code for SM 90" in done.stderr


def test_only_the_path(tmp_path: Path) -> None:
    path = bundle(tmp_path, "a")
    assert choose(tmp_path, described(_H100), "--path").stdout == f"{path}\n"
    assert choose(path, described(_H100), "--path").stdout == f"{path}\n"


# --- different GPUs ---------------------------------------------------------------------------------------------------

_MIXED = described(gpu(0, "NVIDIA A10", 86), gpu(1, "NVIDIA A100", 80), gpu(2, "Tesla T4", 75))


def test_who_runs_on_more_of_them_wins(tmp_path: Path) -> None:
    bundle(tmp_path, "a80", sm="80")
    bundle(tmp_path, "b86", sm="86", version="9.9")
    found = chosen(tmp_path, _MIXED)["selected"]
    assert (found["name"], found["visible_devices"]) == ("a80", "CUDA_VISIBLE_DEVICES=GPU-00,GPU-11")
    assert [one["name"] for one in found["left_out"]] == ["Tesla T4"]


def test_the_gpus_that_are_left_out_are_named(tmp_path: Path) -> None:
    bundle(tmp_path, "a", sm="80")
    lines = choose(tmp_path, _MIXED).stdout.splitlines()
    assert "  leaves out GPU 2: Tesla T4 (SM 75), for which it has no code" in lines
    assert "  so run it with CUDA_VISIBLE_DEVICES=GPU-00,GPU-11" in lines


def test_hidden_gpus_do_not_count(tmp_path: Path) -> None:
    bundle(tmp_path, "a80", sm="80")
    found = chosen(tmp_path, {**_MIXED, "visible": [1]})["selected"]
    assert (found["visible_devices"], found["left_out"]) == (None, [])


def test_fewer_but_larger(tmp_path: Path) -> None:
    bundle(tmp_path, "a75", sm="75", version="9.9")
    bundle(tmp_path, "b90", sm="90")
    small = [gpu(index, "Tesla T4", 75, memory_bytes=15 << 30) for index in range(4)]
    assert best(tmp_path, described(*small, gpu(4, "NVIDIA H100", 90))) == "b90"
    assert best(tmp_path, described(*small)) == "a75"


def test_all_before_the_larger_and_more_where_sizes_are_not_known(tmp_path: Path) -> None:
    bundle(tmp_path, "a80", sm="80")
    bundle(tmp_path, "b86", sm="86", version="9.9")
    assert best(tmp_path, _BARE, "--sm", "86,80") == "a80"
    assert best(tmp_path, _BARE, "--gpu", "T4", "--gpu", "A10", "--gpu", "A100") == "a80"
    bundle(tmp_path, "c75", sm="75", version="9.9")
    assert best(tmp_path, _BARE, "--gpu", "T4", "--gpu", "T4", "--gpu", "A10") == "c75"


# --- what is stated ---------------------------------------------------------------------------------------------------

_BARE = described(driver=None)


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (["--sm", "90"], {}), (["--sm", "9.0,80"], {}), (["--gpu", "NVIDIA H100 80GB HBM3"], {}),
        ([], {_SM: "9.0"}), ([], {_SM: "9.0=0"}), ([], {_NV_SM: "9.0"}), ([], {_NV_SM: "9.0", _SM: "8.0"}),
        (["--sm", "90"], {_NV_SM: "8.0", _SM: ""}), ([], {_NV_SM: "", _SM: "9.0"}),
        ([], {_SM: "9.0", _CUDA: "12.8"}), ([], {_SM: "9.0", _CUDA: "13.0"}), ([], {_SM: "9.0", _NV_CUDA: "12.8"}),
        ([], {_SM: "9.0", _NV_CUDA: "12.8", _CUDA: "11.8"}), (["--sm", "90"], {_GLIBC: "2.28"}),
    ],
)  # fmt: skip
def test_stated_facts_make_it_fit(one: Path, words: list[str], environ: dict[str, str]) -> None:
    assert refusals(one, _BARE)
    assert best(one, _BARE, *words, **environ) == "a"


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({_SM: "8.0"}, "this host has a GPU (SM 80)"), ({_SM: ""}, "none was found"), ({_CUDA: ""}, "none was found"),
        ({_CUDA: "12.6"}, "needs NVIDIA's driver 570; this host has 560"),
        ({_CUDA: "12.7"}, "needs NVIDIA's driver 570; this host has 560"),
        ({_CUDA: "12"}, "needs NVIDIA's driver 570; this host has 525"),
        ({_NV_CUDA: "11.8", _CUDA: "12.8"}, "needs NVIDIA's driver 570; this host has 450"),
        ({_GLIBC: "2.17"}, "needs glibc 2.28; this host has 2.17"),
    ],
)  # fmt: skip
def test_stated_facts_make_it_unfit(one: Path, environ: dict[str, str], reason: str) -> None:
    assert best(one, described(_H100)) == "a"
    found = refusals(one, described(_H100), **environ)
    assert [reason in one for one in found] == [True], found


@pytest.mark.parametrize(
    ("words", "environ", "where"),
    [
        ([], {_CUDA: "twelve"}, _CUDA), ([], {_NV_CUDA: "12.8; rm"}, _NV_CUDA), ([], {_SM: "90"}, _SM),
        ([], {_SM: "9.0a"}, _SM), ([], {_NV_SM: "9"}, _NV_SM), ([], {_NV_SM: "9.0=0"}, _NV_SM),
        ([], {_GLIBC: ""}, _GLIBC), (["--sm", "all"], {}, "--sm"), (["--sm", ""], {}, "--sm"),
        (["--sm", "91"], {}, "--sm"), (["--isa", "avx1024"], {}, "--isa"), (["--gpu", "H1000"], {}, "--gpu"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(one: Path, words: list[str], environ: dict[str, str], where: str) -> None:
    fault = choose(one, described(_H100), *words, **environ).exception
    assert isinstance(fault, RecipeError)
    assert fault.where == where


def test_all_that_cannot_be_meant_at_once(one: Path) -> None:
    fault = choose(one, described(_H100), "--isa", "avx1024", **{_CUDA: "x", _GLIBC: "y", _NV_SM: "z"}).exception
    assert [one in str(fault) for one in ("--isa", _CUDA, _GLIBC, _NV_SM)] == [True] * 4


def test_stated_facts_are_shown_as_such(tmp_path: Path) -> None:
    bundle(tmp_path, "a")
    done = choose(tmp_path, _BARE, "--isa", "avx2", **{_NV_SM: "9.0", _CUDA: "12.8"})
    assert done.stdout.splitlines()[:3] == [
        "taken as stated: CUDA 12.8 (CONDA_OVERRIDE_CUDA)",
        "taken as stated: SM 90 (NV_VARIANT_PROVIDER_FORCE_SM_ARCH)",
        "taken as stated: ISA avx2 (command line)",
    ]
    assert "ISA avx512 (which this CPU lacks; code is chosen at run time)" in done.stdout


@pytest.mark.parametrize(
    ("stated", "fits"),
    [("avx512", ["avx", "avx2", "x86-64-v3", "avx512", "x86-64-v4"]), ("avx2", ["avx", "avx2", "x86-64-v3"]),
     ("x86-64-v3", ["avx", "avx2", "x86-64-v3"]), ("avx", ["avx"]), ("armv9", ["armv8_2", "armv9"])],
)  # fmt: skip
def test_a_stated_cpu_runs_what_is_poorer(stated: str, fits: list[str]) -> None:
    targets = load_targets()
    host, _ = overridden(parse_host(described(_H100), "a test"), Stated(isa=stated), {}, targets)
    assert list(host.cpu.isa) == fits
    assert host.machine == targets.isa[stated].machine


# --- hosts ------------------------------------------------------------------------------------------------------------


def test_what_compose_detect_prints_is_what_select_reads(tmp_path: Path) -> None:
    bundle(tmp_path, "a")
    code = "import sys; from composer.runtime.host.detect import main; sys.exit(main(['--json']))"
    here = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    there = json.loads(CliRunner().invoke(detect, ["--json"]).stdout)
    assert here["cpu"].items() <= there["cpu"].items()
    found = chosen(tmp_path, here, "--sm", "90")
    assert found["host"]["kernel"] == there["kernel"]
    assert found["host"] == chosen(tmp_path, there, "--sm", "90")["host"]


def test_this_host(tmp_path: Path) -> None:
    bundle(tmp_path, "a", floors={})
    assert choose(tmp_path, None, "--sm", "90", "--path").stdout.endswith("a.tar.zst\n")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2}, {"schema": "1"}, {"gpus": None}, {"gpus": [{"index": -1, "sm": 90}]}, {"visible": ["0"]},
        {"machine": "x86_64\x1b[2J"}, {"driver": {"version": 570, "cuda": None}}, {"cpu": {"features": "avx"}},
        {"gpus": [gpu(0, "x" * 300, 90)]}, {"gpus": [gpu(0, "GPU", 90, uuid="$(reboot)")]},
        {"gpus": [gpu(0, "GPU", 90, uuid="a\nb")]}, {"glibc": ["2.36"]},
    ],
)  # fmt: skip
def test_a_description_that_is_none(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="a host"):
        parse_host(json.dumps({**described(_H100), **change}).encode(), "detect.json")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b"null", b" " * ((1 << 20) + 1)])
def test_a_file_that_is_no_description(data: bytes) -> None:
    with pytest.raises(RecipeError):
        parse_host(data, "detect.json")


def test_numbers_as_hosts_have_them() -> None:
    host: Host = parse_host(described(gpu(0, "NVIDIA H200", 90, memory_bytes=150754820096)), "a test")
    assert [one.kind for one in host.visible_gpus] == ["NVIDIA H200 (SM 90)"]


# --- places -----------------------------------------------------------------------------------------------------------


def test_an_index_says_what_the_folder_says(tmp_path: Path) -> None:
    bundle(tmp_path, "a80", sm="80")
    bundle(tmp_path, "b90")
    done = CliRunner().invoke(select, ["--write-index", str(tmp_path)])
    assert (done.exception, done.stdout) == (None, f"{tmp_path}/index.json: 2 bundles\n")
    first = (tmp_path / "index.json").read_bytes()
    by_index = chosen(tmp_path / "index.json", described(_H100))
    assert by_index == chosen(tmp_path, described(_H100)) == chosen(f"file://{tmp_path}", described(_H100))
    write_index(tmp_path)
    assert (tmp_path / "index.json").read_bytes() == first


def test_a_bundle_without_a_checksum_file_is_hashed(tmp_path: Path) -> None:
    path = bundle(tmp_path, "a")
    side = path.with_name("a.tar.zst.sha256")
    known = side.read_text()[:64]
    side.unlink()
    assert read_bundle(path).sha256 is None
    assert [one.sha256 for one in write_index(tmp_path)[1].bundles] == [known]


def test_no_index_of_damaged_bundles(tmp_path: Path) -> None:
    bundle(tmp_path, "a")
    (tmp_path / "b.tar.zst").write_bytes((tmp_path / "a.tar.zst").read_bytes()[:-10])
    with pytest.raises(VerifyError, match=r"b\.tar\.zst"):
        write_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


class _Site(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        moved = {"/moved/index.json": "/index.json", "/loop/index.json": "/loop/index.json"}
        if self.path not in moved:
            super().do_GET()
            return
        self.send_response(302)
        self.send_header("Location", moved[self.path])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Site, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_an_index_on_a_server(tmp_path: Path, site: str) -> None:
    bundle(tmp_path, "a b")
    write_index(tmp_path)
    for place in (f"http://{site}/", f"http://{site}/index.json?token=x", f"http://u:secret@{site}/moved/"):
        offer = find_bundles(place)
        assert [offer.location(one) for one in offer.bundles] == [f"http://{site}/a%20b.tar.zst"]


@pytest.mark.parametrize(
    ("place", "kind", "what"),
    [
        ("http://u:secret@{site}/none.json", FetchError, "the server answers 404"),
        ("http://{site}/loop/", FetchError, "more than 5 redirects"),
        ("http://{site}/a.tar.zst.sha256", VerifyError, "not an index"),
        ("oci://127.0.0.1:1/sglang:0.5.9", FetchError, "the registry does not do its part"),
        ("s3://bucket/index.json", RecipeError, "not a place of bundles"),
    ],
)
def test_places_without_an_index(tmp_path: Path, site: str, place: str, kind: type[ComposerError], what: str) -> None:
    bundle(tmp_path, "a")
    with pytest.raises(kind, match=what) as found:
        find_bundles(place.format(site=site))
    assert "secret" not in str(found.value)


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(FetchError) as found:
        find_bundles("http://127.0.0.1:9/")
    assert found.value.where == "http://127.0.0.1:9/index.json"


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    fault = choose(tmp_path, described(_H100)).exception
    assert isinstance(fault, HostError)
    assert fault.what == "no bundles here"
    assert isinstance(choose(tmp_path / "none", described(_H100)).exception, HostError)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file", "../a.tar.zst"), ("file", "/etc/a.tar.zst"), ("file", "https://evil.example/a.tar.zst"),
        ("file", "a//b.tar.zst"), ("file", "a\\b.tar.zst"), ("file", "a.tar.gz"), ("file", "a\x1b.tar.zst"),
        ("sha256", "0" * 63), ("sha256", "Z" * 64), ("size", -1), ("size", "1"), ("size", 1e300), ("name", "a\nb"),
        ("floors", {"glibc": "2.28"}), ("target", {"sm": "90"}), ("surprise", 1), ("version", None),
    ],
)  # fmt: skip
def test_an_index_that_is_none(one: Path, key: str, value: object) -> None:
    data = json.loads(write_index(one)[0].read_bytes())
    parse_index(json.dumps(data).encode(), "index.json")
    data["bundles"][0][key] = value
    with pytest.raises(VerifyError):
        parse_index(json.dumps(data).encode(), "index.json")


@pytest.mark.parametrize("data", [b"", b"{}", b'{"schema": 2, "bundles": []}', b"\xff", b"[" * 100_000])
def test_a_file_that_is_no_index(data: bytes) -> None:
    with pytest.raises(VerifyError):
        parse_index(data, "index.json")


# --- Jetson -----------------------------------------------------------------------------------------------------------


def jetson(release: str | None) -> dict[str, Any]:
    cpu = {"model": "Arm", "features": ["asimdhp", "asimddp", "atomics", "sve2", "bf16", "i8mm"],
           "isa": ["armv8_2", "armv9"]}  # fmt: skip
    return described(gpu(0, "NVIDIA Thor", 110), machine="aarch64", cpu=cpu, l4t=release)


@pytest.fixture(scope="module")
def thor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thor")
    bundle(folder, "a", sm="110", isa="armv9", machine="aarch64", floors={"L4T": ("38", "the recipe: JetPack 7")})
    return folder


@pytest.mark.parametrize(("release", "why"), [("36.4.3", "this host has 36.4.3"), (None, "this host has none")])
def test_a_jetson_below_the_bundles_release(thor: Path, release: str | None, why: str) -> None:
    done = choose(thor, jetson(release))
    assert done.exit_code != 0
    assert f"needs L4T 38; {why}" in done.output + str(done.exception)


def test_a_jetson_of_the_bundles_release_and_one_that_is_only_stated(thor: Path) -> None:
    assert choose(thor, jetson("38.2.0")).exit_code == 0
    # What is said of a host by its SM alone says nothing of its L4T.
    assert choose(thor, described(), "--sm", "110", "--isa", "armv9").exit_code == 0

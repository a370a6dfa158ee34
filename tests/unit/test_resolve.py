"""Where a model is found, what is said of it, and the file that remembers it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from composer.runtime.model.place import Place
from composer.runtime.serve import env_file
from composer.runtime.serve.report import MODEL, USAGE, Refusal
from composer.runtime.serve.resolve import Resolved, recalled, record, resolve, told
from tests.models import COMMIT, NEW_CLASS, model, snapshot

_RUNTIME = Path(__file__).resolve().parents[2] / "composer/runtime"
_NAME = "microsoft/Phi-4-mini-instruct-FP8-TORCHAO"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A bundle and a cache folder, both empty, and a home without a Hugging Face cache."""
    (tmp_path / "bundle").mkdir()
    (tmp_path / "cache").mkdir()
    return Place(prefix=tmp_path / "bundle", cache=tmp_path / "cache", environ={"HOME": str(tmp_path / "home")})


def with_environ(place: Place, **environ: str) -> Place:
    return Place(prefix=place.prefix, cache=place.cache, environ={**place.environ, **environ})


def refusal(asked: str, place: Place, **options: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        resolve(asked, place, **options)
    return caught.value


# --- the order of the reference ---------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "my model")
    expected = Resolved(asked=str(folder), source="folder", folder=str(folder), path=str(folder))
    assert resolve(str(folder), place) == expected
    assert told(expected) == f"[model] Using local model directory: {folder}\n"
    monkeypatch.chdir(tmp_path)
    assert resolve("my model", place) == expected  # whatever folder the server is started from


def test_a_folder_comes_before_the_bundle(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot(place.bundled, "org/name")
    folder = model(tmp_path / "work/org/name")
    monkeypatch.chdir(tmp_path / "work")
    assert resolve("org/name", place).path == str(folder)


def test_the_bundle_comes_before_the_cache(place: Place, tmp_path: Path) -> None:
    snapshot(tmp_path / "hub", _NAME)
    found = resolve(_NAME, with_environ(place, HF_HUB_CACHE=str(tmp_path / "hub")))
    assert found.source == "cache"
    folder = snapshot(place.bundled, _NAME)
    found = resolve(_NAME, with_environ(place, HF_HUB_CACHE=str(tmp_path / "hub")))
    assert (found.source, found.path, found.asked) == ("bundle", str(folder), _NAME)
    assert told(found) == f"[model] Bundled: {_NAME} -> {folder}\n"


def test_what_is_nowhere_is_downloaded(place: Place) -> None:
    found = resolve(_NAME, place)
    assert (found.source, found.path, found.findings) == ("hub", _NAME, ())
    assert told(found) == f"[model] No bundled model found for {_NAME}; SGLang will download at runtime\n"


def test_a_name_without_an_organisation_is_passed_on(place: Place) -> None:
    found = resolve("gpt2", place)
    assert (found.source, found.path) == ("name", "gpt2")
    assert told(found) == "[model] SGLANG_MODEL=gpt2 (not an HF ID, not a local dir — passing through)\n"
    folder = snapshot(place.bundled, "gpt2")
    assert resolve("gpt2", place).path == str(folder)


def test_an_address_and_a_file_are_passed_on(place: Place, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve("s3://bucket/model", place).path == "s3://bucket/model"
    found = resolve(str(tmp_path / "model.gguf"), place)
    assert (found.source, found.path) == ("file", str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("main", "chosen"),
    [
        ("b" * 40, "b" * 40),
        (f"{'b' * 40}\n", "b" * 40),
        (None, "a" * 40),
        ("c" * 40, "a" * 40),
        ("../../elsewhere", "a" * 40),
    ],
)
def test_the_bundles_snapshot(place: Place, main: str | None, chosen: str) -> None:
    """That of refs/main, or the first, as in the reference; never a folder outside."""
    snapshot(place.bundled, _NAME, revision="b" * 40, main=main)
    snapshot(place.bundled, _NAME, revision="a" * 40, main=main)
    model(place.bundled / "elsewhere")
    assert Path(resolve(_NAME, place).path).name == chosen


def test_a_snapshot_without_config_is_none(place: Place) -> None:
    folder = snapshot(place.bundled, _NAME)
    (folder / "config.json").unlink()
    found = resolve(_NAME, place)
    assert found.source == "hub"
    assert [(one["severity"], one["subject"]) for one in found.findings] == [("warning", str(folder))]


# --- more than the reference ------------------------------------------------------------------------------------------


def test_a_folder_without_config_is_refused_and_no_repository(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = refusal("org/name", place)
    assert (found.status, found.findings[0]["id"]) == (MODEL, "model.config")


def test_the_folder_above_a_snapshot_is_a_usual_mistake(place: Place) -> None:
    folder = snapshot(place.bundled, "org/name")
    assert str(folder) in refusal(str(folder.parents[1]), place).findings[0]["fix"]


@pytest.mark.parametrize("asked", ["/no/such", "./no", "../no", "~/no", "a/b/c", "org/name/"])
def test_a_folder_that_is_not_there_is_no_repository(place: Place, asked: str) -> None:
    assert refusal(asked, place).status == MODEL


@pytest.mark.parametrize(
    "asked", ["a/$(touch pwned)", "a b", "a/b;c", "org/a--b", "org/..", "-x", "org/a..b", "a" * 97]
)
def test_what_cannot_be_a_name(place: Place, asked: str) -> None:
    found = refusal(asked, place)
    assert (found.status, found.findings[0]["id"]) == (USAGE, "model.name")


@pytest.mark.parametrize(
    "asked", ["meta-llama/Llama-3.1-8B-Instruct", "a/b", "nvidia/Qwen3.5_x", "01-ai/Yi-6B", "a" * 96]
)
def test_names(place: Place, asked: str) -> None:
    assert resolve(asked, place).path == asked


@pytest.mark.parametrize("source", ["folder", "bundle"])
def test_a_model_that_is_not_whole_is_refused(place: Place, tmp_path: Path, source: str) -> None:
    folder = snapshot(place.bundled, "org/name")
    (folder / "model.safetensors").write_bytes(b"\1")
    asked = "org/name" if source == "bundle" else str(folder)
    found = refusal(asked, place)
    assert found.status == MODEL
    assert found.findings[0]["subject"] == str(folder / "model.safetensors")
    assert resolve(asked, with_environ(place, WHEEL_COMPOSER_MODEL_CHECK="off")).source == source
    assert resolve(asked, place, flags=["--load-format dummy"]).source == source


def write_methods(place: Place) -> None:
    """The table of quantisations in the bundle's SGLang, written in each way that one release or another has."""
    source = place.prefix / "lib/python3.12/site-packages/sglang/srt/layers/quantization/__init__.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "import torch\n"
        "BASE_QUANTIZATION_METHODS: Dict[str, Type] = {'fp8': Fp8Config, 'awq': AWQConfig}\n"
        "if is_cuda():\n    BASE_QUANTIZATION_METHODS.update({'mxfp4': Mxfp4Config})\n"
        "BASE_QUANTIZATION_METHODS['quark'] = QuarkConfig\n"
        "QUANTIZATION_METHODS = {**BASE_QUANTIZATION_METHODS}\nOTHERS = {'torchao': 1}\n"
    )


def quantise(folder: Path, key: str = "quantization_config", **config: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: config}))


@pytest.mark.parametrize("source", ["folder", "bundle", "cache"])
def test_a_quantisation_that_the_bundles_sglang_does_not_know(place: Place, tmp_path: Path, source: str) -> None:
    """Of a cached copy, too: a download would not change it."""
    write_methods(place)
    place = with_environ(place, HF_HUB_CACHE=str(tmp_path / "hub"))
    folder = snapshot(tmp_path / "hub" if source == "cache" else place.bundled, "org/name")
    asked = str(folder) if source == "folder" else "org/name"
    for method in ("FP8", "awq", "mxfp4", "quark"):
        quantise(folder, quant_method=method)
        assert resolve(asked, place).source == source
    quantise(folder, quant_method="torchao", quant_type="float8")
    found = refusal(asked, place)
    assert (found.status, found.findings[0]["id"]) == (MODEL, "model.quantization")
    assert "quantised by torchao" in found.findings[0]["evidence"]
    assert "awq, fp8, mxfp4, quark. WHEEL_COMPOSER_MODEL_CHECK=off" in str(found.findings[0]["fix"])
    assert resolve(asked, with_environ(place, WHEEL_COMPOSER_MODEL_CHECK="off")).source == source
    assert resolve(asked, place, flags=["--quantization"]).source == source


def test_a_quantisation_of_compressed_tensors(place: Place) -> None:
    write_methods(place)
    folder = snapshot(place.bundled, "org/name")
    quantise(folder, "compression_config", quant_method="compressed-tensors")
    assert refusal("org/name", place).findings[0]["id"] == "model.quantization"


def test_of_the_default_model_only_the_name_tells_its_quantisation(place: Place) -> None:
    assert resolve(_NAME, place).findings == ()  # the table of this bundle cannot be read
    write_methods(place)
    assert [(one["id"], one["severity"]) for one in resolve(_NAME, place).findings] == [
        ("model.quantization", "warning")
    ]
    assert resolve("org/name", place).findings == ()


def test_a_file_is_served_if_it_is_gguf(place: Place, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    found = refusal(str(folder / "config.json"), place)
    assert (found.status, found.findings[0]["id"]) == (MODEL, "model.file")
    assert found.findings[0]["fix"] == f"Name the folder: {folder}."
    (tmp_path / "one.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert resolve(str(tmp_path / "one.gguf"), place).source == "file"


def test_flags_that_do_without_a_tokenizer(place: Place, tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert refusal(str(folder), place).findings[0]["id"] == "model.tokenizer"
    for flag in ("--tokenizer-path", "--skip-tokenizer-init"):
        assert resolve(str(folder), place, flags=[flag]).findings == ()


def test_a_cache_that_is_not_whole_is_completed_by_a_download(place: Place, tmp_path: Path) -> None:
    place = with_environ(place, HF_HOME=str(tmp_path / "hf"))
    folder = snapshot(tmp_path / "hf/hub", _NAME)
    assert resolve(_NAME, place).path == str(folder)
    (folder / "model.safetensors").unlink()
    found = resolve(_NAME, place)
    assert (found.source, [one["severity"] for one in found.findings]) == ("hub", ["note"])
    found_ = refusal(_NAME, with_environ(place, HF_HUB_OFFLINE="1"))
    assert [one["id"] for one in found_.findings] == ["model.absent", "model.weights"]


@pytest.mark.parametrize(
    ("variable", "hub"),
    [("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_where_the_cache_is(place: Place, tmp_path: Path, variable: str, hub: str) -> None:
    folder = snapshot(tmp_path / "there" / hub, "org/name")
    found = resolve("org/name", with_environ(place, **{variable: str(tmp_path / "there")}))
    assert (found.source, found.path) == ("cache", str(folder))


def test_the_cache_of_the_home_folder(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    snapshot(tmp_path / ".cache/huggingface/hub", "org/name")
    assert resolve("org/name", with_environ(place)).source == "cache"


def test_who_says_online_is_not_given_the_cache(place: Place, tmp_path: Path) -> None:
    place = with_environ(place, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0")
    snapshot(tmp_path, "org/name")
    assert resolve("org/name", place).source == "hub"


def test_the_cache_has_no_first_snapshot(place: Place, tmp_path: Path) -> None:
    """Without refs/main huggingface_hub would not find it either."""
    snapshot(tmp_path, "org/name", main=None)
    assert resolve("org/name", with_environ(place, HF_HUB_CACHE=str(tmp_path))).source == "hub"


def test_only_the_revision_that_is_asked_for_will_do(place: Place) -> None:
    folder = snapshot(place.bundled, "org/name")
    (folder.parents[1] / "refs/v2").write_text(COMMIT)
    assert resolve("org/name", place, revision="v2").source == "bundle"
    assert resolve("org/name", place, revision=COMMIT).source == "bundle"
    assert resolve("org/name", place, revision="v3").source == "hub"


# --- the tokenizer's class --------------------------------------------------------------------------------------------


def shim(place: Place, folder: Path) -> Path:
    return Path(resolve(str(folder), place).path)


def test_the_tokenizers_class_is_mended_in_a_folder_of_links(place: Place) -> None:
    folder = snapshot(place.bundled, "org/name", tokenizer_class=NEW_CLASS)
    (folder / ".hidden").write_text("")
    (folder / "original").mkdir()
    found = resolve("org/name", place)
    made = Path(found.path)
    assert place.cache
    assert made.parent == place.cache / "sglang-compat"
    links = {path.name: str(path.readlink()) for path in made.iterdir() if path.is_symlink()}
    assert links == {
        name: str(folder / name) for name in ("config.json", "model.safetensors", "tokenizer.json", "original")
    }
    text = (made / "tokenizer_config.json").read_text()
    assert text == (folder / "tokenizer_config.json").read_text().replace(NEW_CLASS, "PreTrainedTokenizerFast")
    assert json.loads(text)["x"] == "é"
    assert told(found).startswith("  tokenizer compat: TokenizersBackend -> PreTrainedTokenizerFast (shadow)\n")
    assert resolve("org/name", place) == found


@pytest.mark.parametrize(("version", "mended"), [("4.57.1", True), ("5.2.0", False), ("x", True)])
def test_transformers_5_needs_no_mending(place: Place, version: str, mended: bool) -> None:
    (place.prefix / f"lib/python3.12/site-packages/transformers-{version}.dist-info").mkdir(parents=True)
    folder = snapshot(place.bundled, "org/name", tokenizer_class=NEW_CLASS)
    assert (resolve("org/name", place).path != str(folder)) == mended


def test_two_copies_of_one_hash_have_two_folders(place: Place, tmp_path: Path) -> None:
    """In the reference the second closure is given the links of the first, which may be gone."""
    first = snapshot(tmp_path / "one", "org/name", tokenizer_class=NEW_CLASS)
    second = snapshot(tmp_path / "two", "org/name", tokenizer_class=NEW_CLASS)
    made = [shim(place, first), shim(place, second)]
    shutil.rmtree(tmp_path / "one")
    assert len(set(made)) == 2
    assert (made[1] / "config.json").is_file()


def test_a_damaged_folder_of_links_is_made_again(place: Place, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", tokenizer_class=NEW_CLASS)
    made = shim(place, folder)
    (made / "config.json").unlink()
    (made / "config.json").symlink_to("/nowhere")
    (made / "tokenizer_config.json").write_text("{}")
    assert shim(place, folder) == made
    assert (made / "config.json").is_file()
    assert "PreTrainedTokenizerFast" in (made / "tokenizer_config.json").read_text()


def test_a_changed_model_has_another_folder(place: Place, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", tokenizer_class=NEW_CLASS)
    before = shim(place, folder)
    (folder / "chat_template.jinja").write_text("")
    after = shim(place, folder)
    assert (after / "chat_template.jinja").is_file()
    assert before != after


def test_a_folder_of_links_needs_a_cache(place: Place, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", tokenizer_class=NEW_CLASS)
    assert refusal(str(folder), Place(prefix=place.prefix, cache=None, environ={})).status == 1
    (tmp_path / "file").write_text("")
    assert refusal(str(folder), Place(prefix=place.prefix, cache=tmp_path / "file", environ={})).status == 1


# --- the file ---------------------------------------------------------------------------------------------------------


def written(asked: str, place: Place) -> Path:
    return record(resolve(asked, place), place)


def test_a_file_for_each_model(place: Place) -> None:
    snapshot(place.bundled, "org/name")
    paths = [written(asked, place) for asked in ("org/name", "org/other", "org-other/x", "org/other-x")]
    assert len(set(paths)) == 4
    assert place.cache
    assert paths[0].parent == place.cache / "models"
    assert paths[0].name.startswith("sglang-model.org-name.")
    assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_shell_reads_the_file_and_runs_nothing(place: Place, tmp_path: Path, shell: str) -> None:
    """In the reference a model named `$(...)` runs when the file is read."""
    folder = model(tmp_path / 'it\'s $(touch pwned) `touch pwned` "x" \\ é')
    path = written(str(folder), place)
    done = subprocess.run([shell, "-c", '. "$0"; printf %s "$SGLANG_MODEL"; env', path], cwd=tmp_path, env={},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.startswith(f"{folder}")
    assert "SGLANG_MODEL_FOLDER" not in done.stdout
    assert not (tmp_path / "pwned").exists()
    found, findings = recalled(str(folder), place)
    assert findings == []
    assert found
    assert found.path == str(folder)


def test_what_the_file_exports(place: Place) -> None:
    folder = snapshot(place.bundled, "org/name")
    lines = written("org/name", place).read_text().splitlines()
    assert lines[:4] == ["# generated by sglang-resolve-model", f"export SGLANG_MODEL={folder}",
                         "export SGLANG_BUNDLED_FROM=org/name", "export HF_HUB_OFFLINE=1"]  # fmt: skip
    assert not any(line.startswith("export") for line in lines[4:])
    assert "HF_HUB_OFFLINE" not in written("org/absent", place).read_text()


def test_a_file_is_believed_while_it_holds(place: Place) -> None:
    folder = snapshot(place.bundled, "org/name")
    written("org/name", place)
    found, findings = recalled("org/name", place)
    assert (found, findings) == (resolve("org/name", place), [])
    folder.rename(folder.with_name("f" * 40))
    assert recalled("org/name", place) == (None, [])


def test_a_model_that_was_changed_since_is_judged_anew(place: Place, tmp_path: Path) -> None:
    folder = model(tmp_path / "mine")
    written(str(folder), place)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert recalled(str(folder), place) == (None, [])
    assert recalled(str(folder), place, ["--load-format dummy"])[0]
    with pytest.raises(Refusal):
        resolve(str(folder), place)


def test_a_moved_bundle_does_not_believe_its_old_files(place: Place, tmp_path: Path) -> None:
    snapshot(place.bundled, "org/name")
    written("org/name", place)
    shutil.copytree(place.prefix, tmp_path / "new")
    moved = Place(prefix=tmp_path / "new", cache=place.cache, environ=place.environ)
    assert recalled("org/name", moved) == (None, [])


def test_a_model_that_was_absent_is_looked_for_again(place: Place) -> None:
    written("org/name", place)
    assert recalled("org/name", place) == (None, [])


def test_a_file_about_another_model_is_not_used(place: Place, tmp_path: Path) -> None:
    """In the reference it wins over SGLANG_MODEL."""
    snapshot(place.bundled, "org/old")
    place = with_environ(place, SGLANG_MODEL_ENV_FILE=str(tmp_path / "own.env"))
    assert written("org/old", place) == tmp_path / "own.env"
    found, findings = recalled("org/new", place)
    assert found is None
    assert "'org/old'" in findings[0]["evidence"]
    assert recalled("org/old", place)[0]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('# generated\nexport SGLANG_MODEL="a \\"b\\" $(x)"\n', {"SGLANG_MODEL": 'a "b" $(x)'}),
        ("SGLANG_MODEL=a\n\nHF_HUB_OFFLINE=1", {"SGLANG_MODEL": "a", "HF_HUB_OFFLINE": "1"}),
        ("export SGLANG_MODEL='$HOME'\n", {"SGLANG_MODEL": "$HOME"}), ("SGLANG_MODEL=\n", {"SGLANG_MODEL": ""}),
    ],
)  # fmt: skip
def test_lines(tmp_path: Path, text: str, values: dict[str, str]) -> None:
    path = tmp_path / "x.env"
    path.write_text(text)
    assert env_file.read(path) == (values, [])


@pytest.mark.parametrize("text", ["touch pwned", "A=b c", "A='b", "export A", "x; A=b", "a=b", "\udcff"])
def test_lines_that_we_do_not_write(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.env"
    path.write_text(text, errors="surrogateescape")
    values, findings = env_file.read(path)
    assert (values, len(findings)) == ({}, 1)


def test_a_file_that_others_could_have_written(tmp_path: Path) -> None:
    path = tmp_path / "x.env"
    path.write_text("SGLANG_MODEL=a")
    path.chmod(0o646)
    assert "another user" in env_file.read(path)[1][0]["evidence"]
    assert "cannot be read" in env_file.read(tmp_path)[1][0]["evidence"]
    assert env_file.read(tmp_path / "absent") == ({}, [])
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in env_file.read(tmp_path / "pipe")[1][0]["evidence"]


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(place: Place) -> Path:
    """The site-packages of a bundle that holds the program."""
    site = place.prefix / "lib/python3.12/site-packages"
    site.mkdir(parents=True)
    (site / "_compose").symlink_to(_RUNTIME)
    return site


def start(site: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    code = f"import sys; sys.path.insert(0, {str(site)!r})\nfrom _compose.serve.resolve import main\nsys.exit(main())"
    root = site.parents[3]
    environ = {"PATH": "/usr/bin", "HOME": str(root / "home"), "WHEEL_COMPOSER_CACHE": str(root / "cache"), **environ}
    return subprocess.Popen([sys.executable, "-IS", "-c", code, *arguments], env=environ, cwd=root, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(site: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    process = start(site, *arguments, **environ)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_the_program_and_its_default_model(installed: Path, place: Place) -> None:
    folder = snapshot(place.bundled, _NAME)
    done = run(installed, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["source"], report["model"]) == (0, "bundle", str(folder))
    assert done.stderr == f"[model] Bundled: {_NAME} -> {folder}\n[model] Env file: {report['env_file']}\n"
    assert Path(report["env_file"]).is_relative_to(place.cache or "")
    done = run(installed)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("environ", "status", "words"),
    [
        ({"SGLANG_MODEL": "a/$(touch pwned)"}, 2, "cannot be the name of a repository"),
        ({"SGLANG_MODEL": "--help"}, 2, "looks like a flag"),
        ({"SGLANG_MODEL": "/no/such/model"}, 6, "there is no such folder"),
        ({"SGLANG_MODEL": "a/b", "WHEEL_COMPOSER_CACHE": "/proc/1"}, 1, "there is none that can be written to"),
        ({"SGLANG_MODEL": "a/b", "SGLANG_MODEL_ENV_FILE": "/proc/1/x.env"}, 1, "cannot be written"),
    ],
)
def test_the_programs_statuses(installed: Path, place: Place, environ: dict[str, str], status: int, words: str) -> None:
    done = run(installed, "--json", **environ)
    assert (done.returncode, json.loads(done.stdout)["status"]) == (status, status)
    assert done.stderr.startswith("ERROR: ")
    assert words in done.stderr
    assert not (place.prefix.parent / "pwned").exists()


def test_an_option_that_there_is_not(installed: Path) -> None:
    assert run(installed, "--model", "x").returncode == 2
    assert run(installed, "--help").returncode == 0


def test_several_at_once(installed: Path, place: Place) -> None:
    """All make the same folder of links and write the same file."""
    snapshot(place.bundled, "org/name", tokenizer_class=NEW_CLASS)
    running = [start(installed, SGLANG_MODEL="org/name") for _ in range(4)]
    errors = {process.communicate(timeout=60)[1] for process in running}
    assert {process.returncode for process in running} == {0}
    assert len(errors) == 1
    assert place.cache
    left = [path.name for path in place.cache.rglob("*") if path.name.startswith(".new.")]
    assert left == []


def test_a_record_of_another_revision_is_not_believed(place: Place) -> None:
    snapshot(place.bundled, "org/name", revision="b" * 40, main="b" * 40)
    record(resolve("org/name", place), place)
    assert recalled("org/name", place)[0]
    snapshot(place.bundled, "org/name", revision="c" * 40, main="c" * 40)
    assert recalled("org/name", place) == (None, [])


def test_a_record_of_the_cache_is_not_believed_when_the_hub_is_to_be_asked(place: Place, tmp_path: Path) -> None:
    snapshot(tmp_path, "org/name")
    cached = with_environ(place, HF_HUB_CACHE=str(tmp_path))
    record(resolve("org/name", cached), cached)
    assert recalled("org/name", cached)[0]
    assert recalled("org/name", with_environ(place, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="0"))[0] is None
    assert recalled("org/name", with_environ(place, HF_HUB_CACHE=str(tmp_path / "other")))[0] is None

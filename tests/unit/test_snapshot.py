"""A model's folder is whole, or it is said what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest

from composer.runtime.model.safetensors import tensor_names
from composer.runtime.model.snapshot import faults
from tests.models import cached, raw_safetensors, safetensors, shapes, write_llama

FIRST = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model")


def found(folder: Path, *, deep: bool = False) -> list[tuple[str, str, str]]:
    return [(one["id"], one["severity"], one["subject"]) for one in faults(str(folder), deep=deep)]


def only(folder: Path, *, deep: bool = False) -> dict[str, str]:
    (one,) = faults(str(folder), deep=deep)
    assert set(one) == {"id", "severity", "subject", "evidence", "fix"}
    return one


def sums(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "".join(f"{hashlib.sha256(one.read_bytes()).hexdigest()}  {one.relative_to(folder)}\n" for one in files)


@pytest.mark.parametrize("deep", [False, True])
def test_whole(model: Path, deep: bool) -> None:
    assert found(model, deep=deep) == []
    (model / "SHA256SUMS").write_text(sums(model))
    assert found(model, deep=deep) == []


def test_no_folder(tmp_path: Path) -> None:
    assert found(tmp_path / "absent") == [("model.folder", "error", str(tmp_path / "absent"))]


def test_a_folder_without_a_model_is_one_fault(tmp_path: Path) -> None:
    assert found(tmp_path) == [("model.config", "error", ".")]
    (tmp_path / "README.md").write_text("about models")
    assert "holds no model" in only(tmp_path)["evidence"]
    (tmp_path / "tokenizer.json").write_text("{}")  # a part of one: what else it lacks
    assert [one[0] for one in found(tmp_path)] == ["model.config", "model.weights"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", "[" * 100_000], ids=["empty", "list", "cut", "names nothing", "deep"]
)
def test_config(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert found(model) == [("model.config", "error", "config.json")]


def test_shards(model: Path) -> None:
    data = (model / FIRST).read_bytes()
    (model / FIRST).write_bytes(data[:-1])
    assert "cut short" in only(model)["evidence"]
    (model / FIRST).write_bytes(data + b"\0")
    assert "too long" in only(model)["evidence"]
    (model / FIRST).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "cut short or no safetensors file" in only(model)["evidence"]
    (model / FIRST).unlink()
    assert found(model) == [("model.shard", "error", FIRST)]


def test_an_index_that_names_unknown_tensors_and_files(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"] |= {"model.more": FIRST, "model.other": "../outside.safetensors"}
    (model / INDEX).write_text(json.dumps(index))
    assert [(one["id"], one["subject"]) for one in faults(str(model), deep=False)] == [
        ("model.shard", "../outside.safetensors"), ("model.index", FIRST),
    ]  # fmt: skip
    (model / INDEX).write_text('{"weight_map": {"model.more": 3}}')
    assert found(model) == [("model.index", "error", INDEX)]


def test_a_tensor_that_the_index_does_not_name_is_a_warning(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (model / INDEX).write_text(json.dumps(index))
    (one,) = faults(str(model), deep=False)
    assert one["severity"] == "warning"
    assert "lm_head.weight" in one["evidence"]


def test_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version":')
    assert found(model) == [("model.tokenizer", "error", "tokenizer.json")]
    (model / "tokenizer.json").unlink()
    assert "--tokenizer-path" in only(model)["fix"]
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    assert found(model) == []


def test_pickles(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    weights = model / "pytorch_model.bin"
    weights.write_bytes(content.getvalue())
    assert found(model) == []
    weights.write_bytes(content.getvalue()[:-30])
    assert "without its end" in only(model)["evidence"]
    weights.write_bytes(b"")
    assert only(model)["evidence"] == "is empty"


def test_digests(model: Path) -> None:
    (model / "SHA256SUMS").write_text(sums(model))
    (model / "extra.py").write_text("import os")
    assert found(model, deep=True) == [("model.file", "warning", "extra.py")]
    (model / "extra.py").unlink()
    data = bytearray((model / FIRST).read_bytes())
    data[-1] ^= 1
    (model / FIRST).write_bytes(data)
    assert found(model) == []
    assert found(model, deep=True) == [("model.digest", "error", FIRST)]
    (model / "SHA256SUMS").write_text("nonsense\n")
    assert found(model, deep=True) == [("model.digest", "error", "SHA256SUMS")]


def test_a_cache_vouches_for_its_blobs(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    assert found(snapshot, deep=True) == []
    for name in (FIRST, "tokenizer_config.json"):
        blob = (snapshot / name).resolve()
        data = bytearray(blob.read_bytes())
        data[-2] ^= 1
        blob.write_bytes(data)
    assert ("model.digest", "error", FIRST) in found(snapshot, deep=True)
    assert ("model.digest", "error", "tokenizer_config.json") in found(snapshot, deep=True)


def test_a_download_that_was_broken_off(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    (snapshot / FIRST).resolve().unlink()
    one = faults(str(snapshot), deep=True)[0]
    assert (one["id"], one["subject"]) == ("model.file", FIRST)
    assert "blobs" in one["evidence"]


def test_what_downloads_leave_in_a_folder_is_not_the_models(model: Path) -> None:
    (model / "SHA256SUMS").write_text(sums(model))
    (model / ".cache/huggingface").mkdir(parents=True)
    (model / ".cache/huggingface/tokenizer.json.metadata").write_text("")
    assert found(model, deep=True) == []
    shutil.rmtree(model / ".cache")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "evidence"),
    [
        ({"a": {**GOOD, "data_offsets": [0, 4]}}, "not \\[2\\] of F32"),
        ({"a": {**GOOD, "data_offsets": [4, 12]}}, "a gap or an overlap"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, "a gap or an overlap"),
        ({"a": GOOD, "b": {**GOOD, "data_offsets": [0, 8]}}, "a gap or an overlap"),
        ({"a": {**GOOD, "data_offsets": [8, 0]}}, "impossible numbers"),
        ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "impossible numbers"),
        ({"a": {**GOOD, "shape": [True, 2]}}, "impossible numbers"),
        ({"a": {**GOOD, "shape": None}}, "is not described"),
        ({"a": {"dtype": "F32"}}, "is not described"),
        ({"a": 3}, "is not described"),
        ({"a": {**GOOD, "data_offsets": [0, 8, 8]}}, "is not described"),
    ],
)
def test_headers(tmp_path: Path, header: dict[str, object], evidence: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_safetensors(json.dumps(header).encode(), bytes(12)))
    with pytest.raises(ValueError, match=evidence):
        tensor_names(path)


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff", b'{"a": 1, "a": 1}', b"[" * 100_000])
def test_damaged_headers(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_safetensors(header, b""))
    with pytest.raises(ValueError, match="its header is"):
        tensor_names(path)


def test_every_dtype_and_padding(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors(shapes()))
    assert tensor_names(path) == set(shapes())
    header = {"half": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]},
              "none": {"dtype": "F32", "shape": [0], "data_offsets": [3, 3]},
              "new": {"dtype": "F2_E1M0", "shape": [8], "data_offsets": [3, 5]}}  # fmt: skip
    path.write_bytes(raw_safetensors(json.dumps(header).encode() + b"   ", bytes(5)))
    assert tensor_names(path) == {"half", "none", "new"}


def test_the_index_of_a_format_that_was_not_downloaded(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert faults(str(folder), deep=False) == []
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert {one["id"] for one in faults(str(folder), deep=False)} == {"model.shard"}

"""A tiny Llama with random weights, written by hand: no torch, no tokenizer library, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "tiny/llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_HIDDEN, _LAYERS, _VOCABULARY, _INNER = 16, 2, 64, 32

Shapes = Mapping[str, Sequence[int]]


def shapes() -> dict[str, list[int]]:
    """The tensors of a Llama of this size."""
    square, up, down = [_HIDDEN, _HIDDEN], [_INNER, _HIDDEN], [_HIDDEN, _INNER]
    found = {"model.embed_tokens.weight": [_VOCABULARY, _HIDDEN], "model.norm.weight": [_HIDDEN],
             "lm_head.weight": [_VOCABULARY, _HIDDEN]}  # fmt: skip
    for index in range(_LAYERS):
        layer = f"model.layers.{index}"
        found |= {f"{layer}.self_attn.{name}_proj.weight": square for name in "qkvo"}
        found |= {f"{layer}.mlp.{name}_proj.weight": down if name == "down" else up for name in ("gate", "up", "down")}
        found |= {f"{layer}.{name}.weight": [_HIDDEN] for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def safetensors(tensors: Shapes, *, header: Mapping[str, Any] | None = None, cut: int = 0) -> bytes:
    """A file with random F32 tensors. header: entries that replace or join the right ones; cut: bytes off its end."""
    randomness = random.Random(0)
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, shape in tensors.items():
        count = 1
        for side in shape:
            count *= side
        begin = len(content)
        content += struct.pack(f"<{count}f", *(randomness.gauss(0, 0.02) for _ in range(count)))
        described[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, len(content)]}
    return raw_safetensors(json.dumps({**described, **(header or {})}).encode(), content)[: -cut or None]


def raw_safetensors(header: bytes, content: bytes) -> bytes:
    """A file with any header."""
    return struct.pack("<Q", len(header)) + header + content


def write_llama(folder: Path, *, shards: int = 2) -> Path:
    """A whole model in a new folder."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _HIDDEN,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": _INNER, "vocab_size": _VOCABULARY,
        "torch_dtype": "float32", "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    vocabulary = {chr(32 + index): index for index in range(_VOCABULARY)}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary,
                                                                  "unk_token": " "}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    places = {tensor: names[index % shards] for index, tensor in enumerate(shapes())}
    for name in names:
        (folder / name).write_bytes(safetensors({one: shape for one, shape in shapes().items() if places[one] == name}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def cached(hub: Path, name: str = NAME, commit: str = COMMIT) -> Path:
    """The same model as huggingface_hub leaves it: links to blobs that are named by digests; returns its snapshot."""
    repository = hub / f"models--{name.replace('/', '--')}"
    plain = write_llama(hub / "plain")
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    for path in plain.iterdir():
        data = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest()
        digest = hashlib.sha256(data).hexdigest() if path.suffix == ".safetensors" else git
        path.rename(repository / "blobs" / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    plain.rmdir()
    return snapshot


#: The tokenizer class of transformers 5, which older ones do not know.
NEW_CLASS = "TokenizersBackend"
_USUAL_CLASS = "PreTrainedTokenizerFast"


def model(folder: Path, *, tokenizer_class: str = _USUAL_CLASS) -> Path:
    """A whole model of one file of weights in a new folder; its tokenizer's settings are not all ASCII."""
    write_llama(folder, shards=1)
    next(folder.glob("*.safetensors")).rename(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    settings = json.dumps({"tokenizer_class": tokenizer_class, "x": "é"}, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(settings)
    return folder


def snapshot(hub: Path, name: str, *, revision: str = COMMIT, main: str | None = COMMIT,
             tokenizer_class: str = _USUAL_CLASS) -> Path:  # fmt: skip
    """A model in the layout of a hub's cache, of plain files. main: the revision that refs/main names; None: no ref."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    if main is not None:
        (repository / "refs/main").write_text(main)
    return model(repository / "snapshots" / revision, tokenizer_class=tokenizer_class)

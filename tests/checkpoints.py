"""Checkpoints for tests: tiny random GPT-2s as Hugging Face folders, and safetensors files byte by byte."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from pyengine.architectures import gpt2
from pyengine.checkpoint import Checkpoint, TensorInfo, bind
from pyengine.plan import MatrixSpec, VectorSpec

CONFIG: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 2,
    "n_positions": 64,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

TEXT = "Once upon a time there was a little engine that thought it could. It said: I think I can, I think I can!"


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: `header` as JSON unless it is bytes; `length` in place of its true length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def save(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """Write name → (safetensors dtype, array) to a safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    path.write_bytes(safetensors(header, b"".join(array.tobytes() for _, array in tensors.values())))


def stored(values: NDArray[np.float32], dtype: str) -> tuple[str, NDArray[Any]]:
    """float32 values as a checkpoint stores them: (safetensors dtype, array); bfloat16 as uint16, rounded to even."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return "BF16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return {"float32": "F32", "float16": "F16"}[dtype], values.astype(dtype)


def write_checkpoint(
    folder: Path,
    config_overrides: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    shards: int = 1,
    prefix: str = "",
    seed: int = 0,
) -> Path:
    """Write a random GPT-2 with this config into `folder`, and a tokenizer if its 257 tokens or more fit vocab_size.

    `dtype` is float32, float16 or bfloat16; `prefix` stands before every tensor's name but lm_head's. Returns `folder`.
    """
    config = CONFIG | dict(config_overrides or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    plan = gpt2.plan(config)
    tensors = {}
    specs: list[MatrixSpec | VectorSpec] = [*plan.matrices.values(), *plan.vectors.values()]
    for spec in specs:
        values = rng.standard_normal(spec.shape, np.float32) * np.float32(0.2)
        if spec.tensor.endswith("weight") and len(spec.shape) == 1:
            values += 1  # a gain
        name = spec.tensor if spec.tensor == "lm_head.weight" else prefix + spec.tensor
        tensors[name] = stored(values, dtype)
    if shards == 1:
        save(folder / "model.safetensors", tensors)
    else:
        weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(weight_map.values()):
            save(folder / shard, {name: tensors[name] for name in tensors if weight_map[name] == shard})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config["vocab_size"] >= 257:
        (folder / "tokenizer.json").write_text(train_tokenizer(min(config["vocab_size"], 300)))
    return folder


@functools.cache
def train_tokenizer(vocab_size: int) -> str:
    """The tokenizer.json of a byte-level BPE with <|endoftext|> as token 0 and at most `vocab_size` tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return str(tokenizer.to_str())


def bound(folder: Path) -> dict[str, TensorInfo]:
    """What a GPT-2's plan finds in the folder: weight → tensor."""
    with Checkpoint.open(folder) as checkpoint:
        return bind(checkpoint, gpt2.plan(checkpoint.config), gpt2.PREFIXES, gpt2.IGNORED)


def values(checkpoint: Checkpoint, name: str) -> np.ndarray[Any, Any]:
    """A float32 tensor, read in one piece."""
    tensor = checkpoint.tensors[name]
    out = np.empty(tensor.nbytes, np.uint8)
    checkpoint.read_into(name, out)
    return out.view(np.float32).reshape(tensor.shape)


def rewrite(folder: Path, change: Any) -> None:
    """Apply `change` to the dict name → (dtype, array) of a checkpoint's only file."""
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: ("F32", values(checkpoint, name)) for name in checkpoint.tensors}
    change(tensors)
    save(folder / "model.safetensors", tensors)

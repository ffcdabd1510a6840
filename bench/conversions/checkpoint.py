"""A checkpoint's content for the engines whose files we write ourselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import random_checkpoint
from bench.engines import Floats
from pyengine.architectures import architecture_of
from pyengine.checkpoint import Checkpoint, bind
from pyengine.plan import Plan
from pyengine.weights import TensorReader


def tensors(folder: Path) -> Iterator[tuple[str, Floats]]:
    """(name, float32 values) of each weight of the plan, under its bare Hugging Face name; matrices as [out, in]."""
    with Checkpoint.open(folder) as checkpoint:
        architecture = architecture_of(checkpoint.config)
        plan: Plan = architecture.plan(checkpoint.config)
        found = bind(checkpoint, plan, architecture.PREFIXES, architecture.IGNORED)
        reader = TensorReader(checkpoint, found, plan)
        for name, vector in plan.vectors.items():
            yield vector.tensor, reader.vector(name)
        for name, spec in plan.matrices.items():
            values = np.concatenate([rows.copy() for _, rows in reader.rows(name)])  # the reader uses its buffer again
            yield spec.tensor, np.ascontiguousarray(values.T) if spec.layout == "in_out" else values


def vocabulary(folder: Path, vocab_size: int) -> tuple[list[str], list[str]]:
    """The tokens by their ids and the merges ("a b"), of the checkpoint's tokenizer or of one made up for it."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.exists() else random_checkpoint.tokenizer(vocab_size).to_str()
    content = json.loads(text)
    ids = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    names = {i: token for token, i in ids.items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return [names.get(i, f"<unused {i}>") for i in range(vocab_size)], merges

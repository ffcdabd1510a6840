"""What int8 costs in quality, on the bundled model and real prose: as it is, and with outliers that break int8."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import save
from numpy.typing import NDArray

import pyengine
from pyengine.checkpoint import Checkpoint
from pyengine.equalize import Scales
from pyengine.model import find
from pyengine.weights import as_stored, to_float32

N_WINDOW = 8
WINDOW = 512  # tokens
FACTOR = np.float32(32)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass
class Quality:
    """int8 against float32."""

    perplexity_ratio: float
    divergence: float  # mean Kullback-Leibler divergence of the next token's distribution, nats
    same_top: float  # share of positions at which the most probable token is the same


@pytest.fixture(scope="module")
def windows(shared: Path) -> list[list[int]]:
    """Token ids from eight places spread over the text."""
    text = (shared / "data" / "prose.txt").read_text(encoding="utf-8")
    tokenizer = pyengine.load("demo").tokenizer
    assert tokenizer is not None
    starts = range(0, len(text), len(text) // N_WINDOW)[:N_WINDOW]
    return [tokenizer.encode(text[start : start + 8 * WINDOW])[:WINDOW] for start in starts]


@pytest.fixture(scope="module")
def expected(windows: list[list[int]]) -> list[Doubles]:
    """What float32 says: log-probabilities, [WINDOW, vocab_size] for each window."""
    model = pyengine.load("demo", dtype="float32")
    return [log_softmax(model.logits(window)) for window in windows]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with channels of its norms and values 32 times as large and what they meet a 32nd.

    The factor is a power of 2: the function is the same.
    """
    folder = tmp_path_factory.mktemp("outliers")
    with Checkpoint.open(find("demo")) as checkpoint:
        tensors = {name.removeprefix("transformer."): read(checkpoint, name) for name in checkpoint.tensors}
        n_layer, d_model = checkpoint.config["n_layer"], checkpoint.config["n_embd"]
    rng = np.random.default_rng(1)
    for layer in (f"h.{i}." for i in range(n_layer)):
        for norm, reader in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            channels = rng.choice(d_model, 6, replace=False)
            for part in ("weight", "bias"):
                tensors[f"{layer}{norm}.{part}"][channels] *= FACTOR
            tensors[f"{layer}{reader}.weight"][channels] /= FACTOR
        channels = rng.choice(d_model, 4, replace=False)
        tensors[f"{layer}attn.c_attn.weight"][:, 2 * d_model + channels] *= FACTOR
        tensors[f"{layer}attn.c_attn.bias"][2 * d_model + channels] *= FACTOR
        tensors[f"{layer}attn.c_proj.weight"][channels] /= FACTOR
    save(folder / "model.safetensors", {name: ("F32", array) for name, array in tensors.items()})
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(find("demo") / name, folder / name)
    return folder


def read(checkpoint: Checkpoint, name: str) -> Floats:
    """A tensor of any dtype in float32."""
    tensor = checkpoint.tensors[name]
    raw = np.empty(tensor.nbytes, np.uint8)
    checkpoint.read_into(name, raw)
    return to_float32(as_stored(raw, tensor.dtype)).reshape(tensor.shape)


def log_softmax(logits: Floats) -> Doubles:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def quality(model: pyengine.Model, windows: list[list[int]], expected: list[Doubles]) -> Quality:
    surprise, divergence, same = [], [], []
    for window, reference in zip(windows, expected, strict=True):
        got = log_softmax(model.logits(window))
        at = np.arange(len(window) - 1), window[1:]
        surprise.append(reference[at] - got[at])
        divergence.append((np.exp(reference) * (reference - got)).sum(axis=1))
        same.append(reference.argmax(axis=1) == got.argmax(axis=1))
    means: list[Any] = [np.concatenate(parts).mean() for parts in (surprise, divergence, same)]
    return Quality(float(np.exp(means[0])), float(means[1]), float(means[2]))


def test_bundled_model(windows: list[list[int]], expected: list[Doubles]) -> None:
    got = quality(pyengine.load("demo", dtype="int8"), windows, expected)
    assert got.perplexity_ratio <= 1.003
    assert 0 < got.divergence <= 0.0025
    assert got.same_top >= 0.955


def test_outliers(outliers: Path, windows: list[list[int]], expected: list[Doubles]) -> None:
    got = quality(pyengine.load(outliers, dtype="int8"), windows, expected)
    assert got.perplexity_ratio <= 1.005
    assert 0 < got.divergence <= 0.004


def test_outliers_leave_float32_as_it_is(outliers: Path, windows: list[list[int]]) -> None:
    before = pyengine.load("demo", dtype="float32").logits(windows[0])
    after = pyengine.load(outliers, dtype="float32").logits(windows[0])
    assert np.abs(after - before).max() <= 1e-4


def test_control_without_equalisation(
    outliers: Path, windows: list[list[int]], expected: list[Doubles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outliers do break int8: it is the equalising that holds the gate."""
    monkeypatch.setattr("pyengine.weights.equalize", lambda plan, vectors, columns: Scales())
    got = quality(pyengine.load(outliers, dtype="int8"), windows, expected)
    assert got.perplexity_ratio > 1.005
    assert got.divergence > 0.004

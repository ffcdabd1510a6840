"""What dtypes and KV dtypes cost in quality, on the bundled model and real prose: as it is, and with outliers."""

from __future__ import annotations

import math
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
from pyengine.equalize import ROOTS, Scales, _scale
from pyengine.loading import find
from pyengine.weights import as_stored, to_float32

N_WINDOW = 8
WINDOW = 512  # tokens
FACTOR = np.float32(32)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass
class Quality:
    """Against float32."""

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
    model = pyengine.load("demo", dtype="float32", kv_dtype="float32")
    return [log_softmax(model.logits(window)) for window in windows]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with channels of its norms and values 32 times as large and what they meet a 32nd.

    The factor is a power of 2: the function is the same.
    """
    folder = tmp_path_factory.mktemp("outliers")
    tensors = demo_tensors()
    n_layer, d_model = 6, len(tensors["ln_f.weight"])
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
    write_demo(folder, tensors)
    return folder


def demo_tensors() -> dict[str, Floats]:
    """The bundled model's tensors in float32."""
    with Checkpoint.open(find("demo")) as checkpoint:
        return {name.removeprefix("transformer."): read(checkpoint, name) for name in checkpoint.tensors}


def write_demo(folder: Path, tensors: dict[str, Floats]) -> None:
    """A checkpoint as the bundled one, with these tensors."""
    save(folder / "model.safetensors", {name: ("F32", array) for name, array in tensors.items()})
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(find("demo") / name, folder / name)


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


def test_bfloat16(windows: list[list[int]], expected: list[Doubles]) -> None:
    got = quality(pyengine.load("demo", dtype="bfloat16"), windows, expected)
    assert abs(got.perplexity_ratio - 1) <= 0.001
    assert 0 < got.divergence <= 0.0002
    assert got.same_top >= 0.985


def q4_0(w: Floats) -> Floats:
    """Weights [n_out, n_in] through ggml's Q4_0, 4.5 bits as int4: 32 values share a scale in float16."""
    groups = w.reshape(-1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    scale = (largest / -8).astype(np.float16).astype(np.float32)
    codes = np.clip(np.floor(groups / np.where(scale == 0, 1, scale) + 8.5), 0, 15) - 8
    return (scale * codes).reshape(w.shape)


def test_int4_is_better_than_q4_0(tmp_path: Path, windows: list[list[int]], expected: list[Doubles]) -> None:
    """At equal bits, though int4 has activations in int8 besides, and Q4_0 is given float32 everywhere else."""
    tensors = demo_tensors()
    for name, w in tensors.items():
        if w.ndim == 2 and name.startswith("h."):
            tensors[name] = np.ascontiguousarray(q4_0(np.ascontiguousarray(w.T)).T)
    write_demo(tmp_path, tensors)
    theirs = quality(pyengine.load(tmp_path, dtype="float32"), windows, expected)
    ours = quality(pyengine.load("demo", dtype="int4"), windows, expected)
    assert ours.perplexity_ratio < theirs.perplexity_ratio
    assert ours.divergence < 0.85 * theirs.divergence
    assert ours.perplexity_ratio <= 1.045
    assert 0.002 < ours.divergence <= 0.04
    assert ours.same_top >= 0.85


def test_outliers(outliers: Path, windows: list[list[int]], expected: list[Doubles]) -> None:
    got = quality(pyengine.load(outliers, dtype="int8"), windows, expected)
    assert got.perplexity_ratio <= 1.005
    assert 0 < got.divergence <= 0.004
    assert quality(pyengine.load(outliers, dtype="int4"), windows, expected).divergence <= 0.045


def test_kv_dtypes(windows: list[list[int]], expected: list[Doubles]) -> None:
    got = quality(pyengine.load("demo", dtype="float32", kv_dtype="bfloat16"), windows, expected)
    assert abs(got.perplexity_ratio - 1) <= 0.0003
    assert 0 < got.divergence <= 0.000025
    assert got.same_top >= 0.995
    got = quality(pyengine.load("demo", dtype="float32", kv_dtype="int8"), windows, expected)
    assert abs(got.perplexity_ratio - 1) <= 0.0003
    assert 0 < got.divergence <= 0.00015
    assert got.same_top >= 0.99


def test_control_of_kv_dtypes(outliers: Path, windows: list[list[int]], expected: list[Doubles]) -> None:
    """Values with a few large channels take int8, which has one scale for all, out of its gate; not bfloat16."""
    got = quality(pyengine.load(outliers, dtype="float32", kv_dtype="int8"), windows, expected)
    assert got.divergence > 0.00015
    got = quality(pyengine.load(outliers, dtype="float32", kv_dtype="bfloat16"), windows, expected)
    assert 0 < got.divergence <= 0.000025


def test_outliers_leave_float32_as_it_is(outliers: Path, windows: list[list[int]]) -> None:
    before = pyengine.load("demo", dtype="float32").logits(windows[0])
    after = pyengine.load(outliers, dtype="float32").logits(windows[0])
    assert np.abs(after - before).max() <= 1e-4


def test_control_without_equalisation(
    outliers: Path, windows: list[list[int]], expected: list[Doubles], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outliers do break int8: it is the equalising that holds the gate."""
    monkeypatch.setattr("pyengine.loading.equalize", lambda plan, vectors, measure, dtype: Scales())
    got = quality(pyengine.load(outliers, dtype="int8"), windows, expected)
    assert got.perplexity_ratio > 1.005
    assert got.divergence > 0.004


@pytest.mark.parametrize("dtype", list(ROOTS))
def test_scales_are_the_same_on_every_processor(dtype: str) -> None:
    """Correctly rounded roots: the square root of a double, rounded to float32, is that of the float32."""
    rng = np.random.default_rng(0)
    channels, weights = (np.exp(rng.normal(0, 5, 5000)).astype(np.float32) for _ in range(2))
    channels[:4], weights[3:7] = (0, np.inf, np.nan, 0), 0
    with np.errstate(divide="ignore", invalid="ignore"):
        got = _scale(channels, weights, ROOTS[dtype])
    for channel, weight, scale in zip(channels, weights, got, strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            root = channel / weight
        expected = np.float32(1)
        if np.isfinite(root) and root > 0:
            for n in range(1, 6):
                root = np.float32(math.sqrt(root))
                expected = expected * root if 2**n in ROOTS[dtype] else expected
        assert scale.tobytes() == np.float32(expected).tobytes()
    power = sum(1 / n for n in ROOTS[dtype])
    np.testing.assert_allclose(got[7:], (channels[7:] / weights[7:]).astype(np.float64) ** power, rtol=1e-6)

"""Against transformers in float64: logits, greedy continuations and beam searches of its own making; and the float64
reference executor on configurations that those files don't have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from checkpoints import bound, values, write_checkpoint

import pyengine
from pyengine.checkpoint import Checkpoint

CASES = ["gpt2-tiny", "gpt2-erf", "gpt2-untied", "gpt2-wide-head"]


@pytest.mark.parametrize("case", CASES)
def test_golden_logits(shared: Path, case: str) -> None:
    golden = np.load(shared / "data" / "golden" / case / "golden.npz")
    model = pyengine.load(shared / "data" / "golden" / case, dtype="float32")
    for ids, expected in zip(golden["ids"], golden["logits"], strict=True):
        error = np.abs(model.logits(ids.tolist()) - expected).max()
        assert error <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_golden_greedy(shared: Path, case: str) -> None:
    golden = np.load(shared / "data" / "golden" / case / "golden.npz")
    model = pyengine.load(shared / "data" / "golden" / case, dtype="float32")
    completion = model.generate(golden["prompt"][0].tolist(), max_new_tokens=24, temperature=0, ignore_eos=True)
    assert completion.token_ids == golden["greedy"][0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_golden_beams(shared: Path, case: str) -> None:
    folder = shared / "data" / "golden" / case
    prompt = np.load(folder / "golden.npz")["prompt"][0].tolist()
    model = pyengine.load(folder, dtype="float32")
    for search in json.loads((folder / "beams.json").read_text()):
        n = search["args"].get("num_return_sequences", 1)
        found: Any = model.generate(prompt, max_new_tokens=16, **search["args"])
        completions = found if n > 1 else [found]
        assert [c.token_ids for c in completions] == search["sequences"]
        np.testing.assert_allclose([c.score for c in completions], search["scores"], atol=1e-4)


GROUPS = json.loads((Path(__file__).parent / "golden" / "beam_groups.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_golden_beam_groups(shared: Path, case: str) -> None:
    folder = shared / "data" / "golden" / case
    prompt = np.load(folder / "golden.npz")["prompt"][0].tolist()
    model = pyengine.load(folder, dtype="float32")
    searches = [search for search in GROUPS if search["checkpoint"] == case]
    assert len(searches) == 9
    for search in searches:
        stop_ids = search["stop_token_ids"]
        completions: Any = model.generate(
            prompt, max_new_tokens=16, ignore_eos=True, stop_token_ids=stop_ids, **search["arguments"]
        )
        found = [c.token_ids for c in completions]
        for token_ids in found:  # that version puts the first of the stop tokens in the place of each
            token_ids[-1] = stop_ids[0] if token_ids[-1] in stop_ids else token_ids[-1]
        assert found == search["sequences"]
        np.testing.assert_allclose([c.score for c in completions], search["scores"], rtol=2e-6)


CONFIGS: list[dict[str, Any]] = [
    *({"activation_function": name} for name in ("gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu")),
    *({"activation_function": name} for name in ("relu", "silu", "swish", "tanh")),
    {"n_inner": 100},
    {"layer_norm_epsilon": 0.1},
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"tie_word_embeddings": False},
    {"n_embd": 60, "n_head": 3},
    {"n_embd": 12, "n_head": 12, "n_layer": 1},
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(f"{k}={v}" for k, v in config.items()))
def test_against_the_reference_executor(tmp_path: Path, config: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, config)
    model = pyengine.load(tmp_path, dtype="float32")
    ids = np.random.default_rng(1).integers(0, model.plan.vocab_size, 64)
    expected = reference.run(model.plan, reference_weights(tmp_path, model), ids)[model.plan.logits]
    assert np.abs(model.logits(ids.tolist()) - expected).max() <= 1e-5 * np.abs(expected).max()


def reference_weights(folder: Path, model: pyengine.Model) -> dict[str, Any]:
    """The checkpoint's weights under the plan's names, in float64, matrices as [n_out, n_in]."""
    with Checkpoint.open(folder) as checkpoint:
        weights = {name: values(checkpoint, tensor.name).astype(np.float64) for name, tensor in bound(folder).items()}
    for name, spec in model.plan.matrices.items():
        if spec.layout == "in_out":
            weights[name] = weights[name].T
    return weights

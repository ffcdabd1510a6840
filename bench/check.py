"""Do the engines compute the same? Asked of every variant before it is timed, against our float32.

Two questions. The logits at every position of a text, where the engine shows them. And its own greedy continuations,
alone and as a batch, which go through the code that is timed: our float32 reads them, and at each token `regret` is how
far the token's logit lies below the best one, as a share of what a token drawn at random would lose. 0 is our own
choice, 1 is chance: random weights make flat distributions, on which a token that differs says little and a divergence
in nats stays small even from nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEXT_TOKENS = 100
PROMPT_TOKENS = 24
NEW_TOKENS = 16
BATCH = 8

EXACT = 1e-3  # most that a float32 logit may differ by, as a share of the largest

# Bounds of (relative error of the logits, mean regret). With random weights, formats of 8 bits give at most 0.04 and
# 0.001, of 4 bits 0.29 and 0.06. Mistakes go beyond, even without a rounding: positions off by one give 0.48 and 0.07,
# a layer with the weights of its neighbour 0.55 and 0.09, a matrix that isn't transposed 0.38 and 0.04. What 4 bits
# could hide shows in the float32 of the same engine, which comes out of the same conversion.
BOUNDS = {"float32": (EXACT, EXACT), "bfloat16": (0.05, 0.005), "int8": (0.1, 0.01), "int4": (0.4, 0.1)}

Logits = NDArray[np.float32]


def prompts(vocab_size: int, max_seq_len: int) -> tuple[list[int], list[list[int]]]:
    """A text whose logits are compared, and prompts that are continued."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, vocab_size - 1, min(TEXT_TOKENS, max_seq_len)).tolist()
    return text, rng.integers(0, vocab_size - 1, (BATCH, PROMPT_TOKENS)).tolist()


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Logits → log-probabilities, by row."""
    shifted = logits - logits.max(-1, keepdims=True).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def difference(logits: Logits, expected: Logits) -> dict[str, float]:
    """How far logits are from those that are expected, both [n, vocab_size].

    relative: the root of the summed squares of the difference over that of the expected, both less their mean by row,
    since the same number added to all logits of a row changes nothing.
    """
    if logits.shape != expected.shape:
        raise ValueError(f"logits: expected {expected.shape}, got {logits.shape}")
    centred = expected - expected.mean(-1, keepdims=True)
    error = logits - logits.mean(-1, keepdims=True) - centred
    p, q = log_softmax(expected), log_softmax(logits)
    return {
        "max": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "relative": float(np.linalg.norm(error) / np.linalg.norm(centred)),
        "divergence": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "same_top": float((logits.argmax(-1) == expected.argmax(-1)).mean()),
    }


def regret(logits: Logits, tokens: list[int]) -> float:
    """What choosing these tokens loses, mean over the last len(tokens) + 1 rows but one; see the module."""
    rows = logits[-len(tokens) - 1 : -1]  # the row before a token is the one that it was chosen by
    best = rows.max(-1)
    lost = best - rows[np.arange(len(tokens)), tokens]
    return float((lost / (best - rows.mean(-1))).mean())


def verdict(width: str, found: Mapping[str, Any]) -> str | None:
    """What is wrong with a variant; None: nothing. `found` has "logits" (of `difference`, or None) and "regret"."""
    most_error, most_regret = BOUNDS[width]
    logits = found["logits"]
    if logits is not None:
        name = "max" if width == "float32" else "relative"
        if not logits[name] <= most_error:  # not, so that NaN fails
            return f"logits differ from our float32: {name} {logits[name]:.3g}, allowed are {most_error:g}"
    if not found["regret"] <= most_regret:
        return f"its tokens aren't those of our float32: regret {found['regret']:.3g}, allowed are {most_regret:g}"
    return None

"""The reference executor: runs a plan in float64 with numpy alone, as plainly as it can be written.

The oracle of every kernel and of every new architecture. One sequence, all positions at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pyengine.plan import Attend, Embed, Linear, Norm, PickRows, Plan

Array = NDArray[np.float64]


def layer_norm(x: Array, gain: Array, bias: Array, eps: float) -> Array:  # [n, d] → [n, d]
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * gain + bias


def softmax(x: Array) -> Array:  # [..., n] → [..., n]
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


erfc = np.vectorize(math.erfc, otypes=[np.float64])


ACTIVATIONS = {
    None: lambda x: x,
    # 0.5 x (1 + tanh u) is x sigmoid(2 u), which doesn't cancel where tanh is near -1.
    "gelu_tanh": lambda x: x * sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),
    "gelu_erf": lambda x: 0.5 * x * erfc(-x / np.sqrt(2)),
    "gelu_sigmoid": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "tanh": np.tanh,
}


def attention(qkv: Array, n_head: int, n_kv_head: int, head_dim: int, scale: float) -> Array:
    n = len(qkv)
    q, k, v = np.split(qkv, [n_head * head_dim, (n_head + n_kv_head) * head_dim], axis=1)
    q = q.reshape(n, n_head, head_dim)
    k = np.repeat(k.reshape(n, n_kv_head, head_dim), n_head // n_kv_head, axis=1)  # [n, n_head, head_dim]
    v = np.repeat(v.reshape(n, n_kv_head, head_dim), n_head // n_kv_head, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) * scale  # [n_head, n, n]
    scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
    return np.einsum("hij,jhd->ihd", softmax(scores), v).reshape(n, -1)


def as_stored(x: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """Keys or values [..., head_dim] as a KV page gives them back: rounded to what it stores, to the bit."""
    if dtype == "bfloat16":
        bits = x.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
        return np.where(np.isnan(x), x, np.where(np.abs(x) < 2.0**-50, np.float32(0), rounded))
    if dtype == "int8":
        scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), np.float32(1e-30))
        return np.rint(x * (np.float32(1) / scale)) * scale
    return x


def run(plan: Plan, weights: Mapping[str, Array], token_ids: NDArray[np.integer]) -> dict[str, Array]:
    """Every buffer as it is at the end; the logits are those of all positions. weights: the plan's names, matrices
    [n_out, n_in].
    """
    b: dict[str, Array] = {}
    for op in plan.ops:
        match op:
            case Embed():
                b[op.out] = weights[op.token_table][token_ids] + weights[op.position_table][: len(token_ids)]
            case Norm():
                b[op.out] = layer_norm(b[op.src], weights[op.gain], weights[op.bias], op.eps)
            case Linear():
                y = b[op.src] @ weights[op.weight].T + (weights[op.bias] if op.bias else 0)
                b[op.out] = ACTIVATIONS[op.activation](y) + (b[op.residual] if op.residual else 0)
            case Attend():
                b[op.out] = attention(b[op.src], op.n_head, op.n_kv_head, op.head_dim, op.scale)
            case PickRows():
                b[op.out] = b[op.src]
    return b

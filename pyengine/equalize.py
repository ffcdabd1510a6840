"""Equalising a plan's weights before they become int8: exact in real arithmetic, and no data is needed.

Where a channel runs from a norm into matrix products, dividing the norm's gain and bias by s and multiplying the
products' column by s changes nothing; likewise between the values of attention and the output projection. With s =
(range of the channel / largest weight that it meets) ^ power, channels and weights both get ranges that int8 resolves
(Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction"; the power is that of
SmoothQuant, Xiao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .plan import Attend, Linear, Norm, Op, PickRows, Plan

Floats = npt.NDArray[np.float32]

# A normalised channel stays within this many standard deviations for nearly all tokens.
DEVIATIONS = np.float32(3)

# The power, as the roots that it is the product of: 1/2, and 11/32. 4-bit weights have less room for a channel's range,
# so less of it goes to them. Measured on the bundled model: KL divergence 0.033 at 0.35 and 0.036 at 0.5; with outliers
# 0.038 and 0.043 (at 0.25: 0.032 and 0.050).
ROOTS = {"int8": (2,), "int4": (4, 16, 32)}


@dataclass
class Scales:
    """What matrices are multiplied with when they are packed: per input [n_in] and per output [n_out]."""

    ins: dict[str, Floats] = field(default_factory=dict)
    outs: dict[str, Floats] = field(default_factory=dict)


class Measure(Protocol):
    """What is asked of matrices, by their names; all at once, as each time all of them are read."""

    def largest_by_input(self, names: Iterable[str]) -> dict[str, Floats]:
        """The size of the largest weight that each input channel meets: [n_in]."""

    def output_norms(self, ins: Mapping[str, Floats | None]) -> dict[str, Floats]:
        """The norm of each output's weights, where inputs are multiplied with a scale: [n_out]."""


@np.errstate(divide="ignore", invalid="ignore", over="ignore")  # weights that aren't finite are refused when packed
def equalize(plan: Plan, vectors: dict[str, Floats], measure: Measure, dtype: str) -> Scales:
    """The scales of every matrix of a model in `dtype`; changes the norms' gains and biases, and the biases of values,
    in `vectors` to match. None for a dtype that needs none.
    """
    scales = Scales()
    if dtype not in ROOTS:
        return scales
    roots = ROOTS[dtype]
    met: dict[int, list[str]] = {}  # operation → the matrices that its output meets
    for i, op in enumerate(plan.ops):
        weights = [linear.weight for linear in readers(plan, i)] if isinstance(op, Norm | Attend) else []
        if weights and not any(weight in others for others in met.values() for weight in weights):
            met[i] = weights
    by_matrix = measure.largest_by_input([weight for weights in met.values() for weight in weights])
    largest: dict[int, Floats] = {i: np.max([by_matrix[weight] for weight in met[i]], axis=0) for i in met}
    for i, weights in met.items():
        op = plan.ops[i]
        if isinstance(op, Norm):
            s = _scale(DEVIATIONS * np.abs(vectors[op.gain]) + np.abs(vectors[op.bias]), largest[i], roots)
            vectors[op.gain], vectors[op.bias] = vectors[op.gain] / s, vectors[op.bias] / s
            scales.ins |= dict.fromkeys(weights, s)
    makers = {i: qkv for i in met if isinstance(qkv := plan.ops[i - 1], Linear) and isinstance(plan.ops[i], Attend)}
    # A value's standard deviation, if the inputs of its product had equal ones: the norm of its row of weights.
    spreads = measure.output_norms({qkv.weight: scales.ins.get(qkv.weight) for qkv in makers.values()})
    for i, qkv in makers.items():
        s = _equalize_values(plan.ops[i], qkv, largest[i], spreads[qkv.weight], vectors, scales, roots)
        scales.ins |= dict.fromkeys(met[i], s)
    return scales


def readers(plan: Plan, i: int) -> list[Linear]:
    """The matrix products that read the output of operation i, or what was picked of it; none if anything else reads it
    too.
    """
    found: list[Linear] = []
    for j, op in enumerate(plan.ops[i + 1 :], i + 1):
        if isinstance(op, PickRows) and op.src == plan.ops[i].out:
            picked = readers(plan, j)
            return found + picked if picked else []  # a plan reads the source of `PickRows` no more
        if getattr(op, "src", None) == plan.ops[i].out or getattr(op, "residual", None) == plan.ops[i].out:
            if not isinstance(op, Linear) or op.residual == plan.ops[i].out:
                return []
            found.append(op)
        if op.out == plan.ops[i].out:
            break
    return found


def _equalize_values(
    attend: Op,
    qkv: Linear,
    largest: Floats,
    spread: Floats,
    vectors: dict[str, Floats],
    scales: Scales,
    roots: tuple[int, ...],
) -> Floats:
    """The scale of attention's output [n_head head_dim]; the product that makes the values is divided by it."""
    assert isinstance(attend, Attend) and qkv.out == attend.src
    n_value = attend.n_kv_head * attend.head_dim
    bias = None if qkv.bias is None else vectors[qkv.bias]
    value_range = DEVIATIONS * spread[-n_value:] + (np.float32(0) if bias is None else np.abs(bias[-n_value:]))
    # Heads that share a kv head share its channels: the weights that a channel meets are those of all of them.
    by_group = largest.reshape(attend.n_kv_head, -1, attend.head_dim).max(axis=1)
    s = _scale(value_range, by_group.reshape(-1), roots)
    outs = np.ones(spread.size, np.float32)
    outs[-n_value:] = 1 / s
    scales.outs[qkv.weight] = outs
    if bias is not None and qkv.bias is not None:
        vectors[qkv.bias] = bias * outs
    heads = s.reshape(attend.n_kv_head, 1, attend.head_dim)
    group = attend.n_head // attend.n_kv_head
    by_head: Floats = np.broadcast_to(heads, (attend.n_kv_head, group, attend.head_dim)).reshape(-1).copy()
    return by_head


def _scale(channel_range: Floats, weight_range: Floats, roots: tuple[int, ...]) -> Floats:
    """(range of the channel / of its weights) ^ power; 1 where that says nothing, as one of them is 0 or not finite.

    By square roots alone, which all processors round alike: numpy's power differs with their vector instructions.
    """
    ratio = channel_range / weight_range
    root: Floats = np.where(np.isfinite(ratio) & (ratio > 0), ratio, np.float32(1))
    scale = np.ones_like(root)
    for n in range(1, max(roots).bit_length()):
        root = np.sqrt(root)
        if 2**n in roots:
            scale *= root
    return scale

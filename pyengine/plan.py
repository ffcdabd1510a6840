"""The plan: a model as a flat list of operations over named activation buffers.

An architecture file (pyengine/architectures/) turns a checkpoint's config into a `Plan`. Whoever runs, costs or
watches a model reads the plan; nobody else knows what a GPT-2 is. Operations name their buffers and their weights;
what a weight looks like in the checkpoint stands in its `MatrixSpec` or `VectorSpec`. A plan never says what dtype a
weight is kept in: that is decided where weights are packed.

Every buffer holds one row for each row of a step, or for each that was picked: [n_rows, width].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Activation = Literal["gelu_tanh", "gelu_erf", "gelu_sigmoid", "relu", "silu", "tanh"]


@dataclass(frozen=True)
class MatrixSpec:
    """A weight of `Linear`, or a table of `Embed`: y[n_out] = W x[n_in]; a table has a row for each of its n_out
    ids.
    """

    tensor: str  # name in the checkpoint
    n_out: int
    n_in: int
    layout: Literal["out_in", "in_out"]  # the checkpoint's axis order; "in_out" is the transposed one of GPT-2's Conv1D

    @property
    def shape(self) -> tuple[int, int]:
        """The tensor's shape in the checkpoint."""
        return (self.n_out, self.n_in) if self.layout == "out_in" else (self.n_in, self.n_out)


@dataclass(frozen=True)
class VectorSpec:
    """A bias, a gain, or a table of position embeddings: kept in float32 as it is."""

    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Embed:
    """out = token_table[token_id] + position_table[position]."""

    out: str
    token_table: str  # a MatrixSpec's name
    position_table: str  # a VectorSpec's name, [max_seq_len, width]


@dataclass(frozen=True)
class Norm:
    """out = (src - mean) / sqrt(variance + eps) * gain + bias (LayerNorm, Ba et al. 2016)."""

    src: str
    out: str
    gain: str
    bias: str
    eps: float


@dataclass(frozen=True)
class Linear:
    """out = activation(src W^T + bias) + residual; `residual` may be the buffer `out` itself."""

    src: str
    out: str
    weight: str
    bias: str | None = None
    activation: Activation | None = None
    residual: str | None = None


@dataclass(frozen=True)
class Attend:
    """Scaled causal self-attention over the sequence's cached keys and values (Vaswani et al. 2017).

    `src` holds q, k and v side by side: [n_rows, (n_head + 2 n_kv_head) head_dim]. Its k and v are appended to layer
    `layer` of the KV cache; then out = softmax(scale q K^T) V for each head, over the positions up to the row's own.
    """

    src: str
    out: str
    layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    scale: float


@dataclass(frozen=True)
class PickRows:
    """out = the rows of src whose logits are wanted; what follows runs on these alone, and reads src no more."""

    src: str
    out: str


Op = Embed | Norm | Linear | Attend | PickRows


@dataclass(frozen=True)
class Plan:
    """A model: its operations in order, its buffers (name → width) and its weights (name → spec)."""

    model_type: str
    ops: tuple[Op, ...]
    buffers: dict[str, int]
    matrices: dict[str, MatrixSpec]
    vectors: dict[str, VectorSpec]
    logits: str  # the buffer that holds the logits at the end
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_model: int
    vocab_size: int
    max_seq_len: int

    def linears(self) -> Iterator[Linear]:
        """The plan's matrix products, in order."""
        return (op for op in self.ops if isinstance(op, Linear))

"""GPT-2 (Radford et al. 2019), as `transformers` lays it out: config.json → plan, tensor names → plan weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import MAX_LAYER, Config, refuse
from ..plan import Activation, Attend, Embed, Linear, MatrixSpec, Norm, Op, PickRows, Plan, VectorSpec

# Names that other tools save a checkpoint under, besides the bare ones.
PREFIXES = ("transformer.",)

# Buffers of old checkpoints that hold the causal mask: implied by the architecture.
IGNORED = r"h\.\d+\.attn\.(bias|masked_bias)"

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu_erf",
    "quick_gelu": "gelu_sigmoid",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def plan(config: Mapping[str, Any]) -> Plan:
    """The plan of a GPT-2 with this config.json; raises `CheckpointError` naming the key that can't be honoured."""
    read = Config(config)
    d_model = read.size("n_embd", 768)
    n_head = read.size("n_head", 12)
    n_layer = read.size("n_layer", 12, MAX_LAYER)
    d_ff = read.size("n_inner", 4 * d_model)
    vocab_size = read.size("vocab_size", 50257)
    max_seq_len = read.size("n_positions", 1024)
    eps = read.positive("layer_norm_epsilon", 1e-5)
    activation = read.choice("activation_function", "gelu_new", ACTIVATIONS)
    scaled = read.flag("scale_attn_weights", True)
    scaled_by_layer = read.flag("scale_attn_by_inverse_layer_idx", False)
    tied = read.flag("tie_word_embeddings", True)
    if read.flag("add_cross_attention", False):
        raise refuse("add_cross_attention", "false: pyengine runs decoders alone", True)
    if d_model % n_head:
        raise refuse("n_embd", f"a multiple of n_head ({n_head})", d_model)
    head_dim = d_model // n_head

    matrices = {"token_embedding": MatrixSpec("wte.weight", vocab_size, d_model, "out_in")}
    vectors = {"position_embedding": VectorSpec("wpe.weight", (max_seq_len, d_model))}
    ops: list[Op] = [Embed("x", "token_embedding", "position_embedding")]

    def norm(src: str, out: str, tensor: str) -> None:
        for part in ("weight", "bias"):
            vectors[f"{tensor}.{part}"] = VectorSpec(f"{tensor}.{part}", (d_model,))
        ops.append(Norm(src, out, f"{tensor}.weight", f"{tensor}.bias", eps))

    def linear(src: str, out: str, tensor: str, n_out: int, n_in: int, **epilogue: Any) -> None:
        matrices[f"{tensor}.weight"] = MatrixSpec(f"{tensor}.weight", n_out, n_in, "in_out")
        vectors[f"{tensor}.bias"] = VectorSpec(f"{tensor}.bias", (n_out,))
        ops.append(Linear(src, out, f"{tensor}.weight", f"{tensor}.bias", **epilogue))

    x, attended = "x", "attended"
    for i in range(n_layer):
        scale = (1.0 / math.sqrt(head_dim) if scaled else 1.0) / (i + 1 if scaled_by_layer else 1)
        norm(x, "normed", f"h.{i}.ln_1")  # [n_rows, d_model]
        linear("normed", "qkv", f"h.{i}.attn.c_attn", 3 * d_model, d_model)  # [n_rows, 3 d_model]
        ops.append(Attend("qkv", attended, i, n_head, n_head, head_dim, scale))  # [n_rows, d_model]
        if i == n_layer - 1:  # no row needs more of another one
            ops += [PickRows(x, "picked"), PickRows(attended, "picked_attended")]  # [n_logits, d_model]
            x, attended = "picked", "picked_attended"
        linear(attended, x, f"h.{i}.attn.c_proj", d_model, d_model, residual=x)
        norm(x, "normed", f"h.{i}.ln_2")
        linear("normed", "hidden", f"h.{i}.mlp.c_fc", d_ff, d_model, activation=activation)  # [n_rows, d_ff]
        linear("hidden", x, f"h.{i}.mlp.c_proj", d_model, d_ff, residual=x)

    lm_head = "token_embedding"
    if not tied:
        lm_head = "lm_head"
        matrices[lm_head] = MatrixSpec("lm_head.weight", vocab_size, d_model, "out_in")
    norm(x, "final", "ln_f")
    ops.append(Linear("final", "logits", lm_head))  # [n_logits, vocab_size]

    width = {"x": d_model, "normed": d_model, "qkv": 3 * d_model, "attended": d_model, "hidden": d_ff}
    return Plan(
        model_type="gpt2",
        ops=tuple(ops),
        buffers=width | {"picked": d_model, "picked_attended": d_model, "final": d_model, "logits": vocab_size},
        matrices=matrices,
        vectors=vectors,
        logits="logits",
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=head_dim,
        d_model=d_model,
        vocab_size=vocab_size,
        max_seq_len=max_seq_len,
    )

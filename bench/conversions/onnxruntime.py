"""The ONNX graph of a GPT-2, of the fused operators that ONNX Runtime's own optimiser makes of one; int8 is its dynamic
quantisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from bench.conversions.checkpoint import tensors
from bench.engines import NotAvailable
from bench.engines.onnxruntime import MODEL
from pyengine import loading
from pyengine.plan import Plan

MICROSOFT = "com.microsoft"  # the domain of operators that are ONNX Runtime's own


def write_onnx(checkpoint: Path, folder: Path) -> None:
    """The checkpoint as an ONNX graph in float32, its weights in a file beside it."""
    plan = loading.plan_of(checkpoint)
    if "lm_head" in plan.matrices or any(getattr(op, "activation", None) not in (None, "gelu_tanh") for op in plan.ops):
        raise NotAvailable("the graph is written for tied embeddings and the tanh form of GELU")
    weights = dict(tensors(checkpoint))
    for spec in plan.matrices.values():
        if spec.layout == "in_out":
            weights[spec.tensor] = np.ascontiguousarray(weights[spec.tensor].T)
    weights["lm_head.weight"] = np.ascontiguousarray(weights["wte.weight"].T)  # [d_model, vocab_size]
    initial = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    past = [2, "n_prompt", plan.n_head, "n_past", plan.head_dim]
    inputs = [("tokens", ["n_prompt", "n"]), ("positions", [1, "n"]), ("wanted", ["n_wanted"])]
    graph = helper.make_graph(
        nodes(plan),
        plan.model_type,
        [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, shape in inputs]
        + [helper.make_tensor_value_info(f"past{i}", TensorProto.FLOAT, past) for i in range(plan.n_layer)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n_prompt", "n_wanted", plan.vocab_size])]
        + [helper.make_tensor_value_info(f"present{i}", TensorProto.FLOAT, None) for i in range(plan.n_layer)],
        initial,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    folder.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets), folder / MODEL, save_as_external_data=True)


def nodes(plan: Plan) -> list[onnx.NodeProto]:
    """GPT-2's operators, in order."""
    made: list[onnx.NodeProto] = []
    eps = next(op.eps for op in plan.ops if hasattr(op, "eps"))

    def add(kind: str, inputs: Sequence[str], *outputs: str, **attributes: object) -> str:
        outputs = outputs or (f"v{len(made)}",)
        made.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def norm(x: str, name: str) -> str:
        return add("LayerNormalization", [x, f"{name}.weight", f"{name}.bias"], epsilon=eps)

    def linear(x: str, name: str) -> str:
        return add("Add", [add("MatMul", [x, f"{name}.weight"]), f"{name}.bias"])

    x = add("Add", [add("Gather", ["wte.weight", "tokens"]), add("Gather", ["wpe.weight", "positions"])])
    for i in range(plan.n_layer):
        qkv = [f"h.{i}.attn.c_attn.weight", f"h.{i}.attn.c_attn.bias"]
        attended = add(
            "Attention",
            [norm(x, f"h.{i}.ln_1"), *qkv, "", f"past{i}"],
            *(f"attended{i}", f"present{i}"),
            domain=MICROSOFT,
            num_heads=plan.n_head,
            unidirectional=1,
        )
        x = add("Add", [x, linear(attended, f"h.{i}.attn.c_proj")])
        hidden = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = add("Add", [x, linear(add("FastGelu", [hidden], domain=MICROSOFT), f"h.{i}.mlp.c_proj")])
    picked = add("Gather", [x, "wanted"], axis=1)
    add("MatMul", [norm(picked, "ln_f"), "lm_head.weight"], "logits")
    return made


def quantise(exact: Path, folder: Path) -> None:
    """The products in int8, by channel; activations are quantised as they come."""
    folder.mkdir(parents=True)
    quantize_dynamic(
        exact / MODEL,
        folder / MODEL,
        op_types_to_quantize=["MatMul", "Attention"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"DefaultTensorType": TensorProto.FLOAT},  # what shape inference can't see behind Attention
    )

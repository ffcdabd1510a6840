"""ONNX Runtime. The graph is written here, of the fused operators that its own optimiser makes of a GPT-2; int8 is its
dynamic quantisation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from bench.checkpoint import once, tensors
from bench.engines import Base, Floats, NotAvailable, Prompts, Run
from pyengine import loading
from pyengine.plan import Plan

MICROSOFT = "com.microsoft"  # the domain of operators that are ONNX Runtime's own
MODEL = "model.onnx"


class Engine(Base):
    """A session of ONNX Runtime; keys and values go out of a step and into the next one without a copy."""

    packages = ("onnxruntime", "onnx")

    @staticmethod
    def convert(checkpoint: Path, work: Path, variant: str) -> Path:
        exact = once(work / "float32", partial(write_onnx, checkpoint))
        return exact if variant == "float32" else once(work / variant, partial(quantise, exact))

    def __init__(self, files: Path, variant: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(files / MODEL, options, ["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        # [2, n_prompt, n_head, length, head_dim] for each layer
        self.pasts = {past.name: past.shape for past in self.session.get_inputs() if past.name.startswith("past")}

    def step(self, tokens: Floats, start: int, wanted: Sequence[int], pasts: list) -> tuple[Floats, list]:
        """Runs tokens [n_prompt, n] at positions from `start` on; the logits at the wanted ones, and the new pasts."""
        n = tokens.shape[1]
        values = {
            "tokens": np.ascontiguousarray(tokens, np.int64),
            "positions": np.arange(start, start + n, dtype=np.int64)[None],
            "wanted": np.array(wanted, np.int64),
        }
        feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
        feeds |= dict(zip(self.pasts, pasts, strict=True))
        logits, *presents = self.session.run_with_ort_values(self.outputs, feeds)
        return logits.numpy(), presents

    def empty(self, n_prompt: int) -> list:
        """Pasts without a position."""
        shapes = [(2, n_prompt, shape[2], 0, shape[4]) for shape in self.pasts.values()]
        return [onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for shape in shapes]

    def generate(self, prompts: Prompts, n_new: int) -> Run:
        new, seconds = [], []
        tokens, start, pasts = np.array(prompts), 0, self.empty(len(prompts))
        begun = time.perf_counter()
        for _ in range(n_new):
            logits, pasts = self.step(tokens, start, [tokens.shape[1] - 1], pasts)
            start += tokens.shape[1]
            tokens = logits[:, -1].argmax(-1)[:, None]  # [n_prompt, 1]
            new.append(tokens)
            seconds.append(time.perf_counter() - begun)
        return Run(np.concatenate(new, 1).tolist(), seconds)

    def logits(self, token_ids: Sequence[int]) -> Floats:
        return self.step(np.array([token_ids]), 0, range(len(token_ids)), self.empty(1))[0][0]


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

"""ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from bench.conversions import once
from bench.engines import Base, Floats, Prompts, Run

MODEL = "model.onnx"


class Engine(Base):
    """A session of ONNX Runtime; keys and values go out of a step and into the next one without a copy."""

    packages = ("onnxruntime", "onnx")

    @staticmethod
    def convert(checkpoint: Path, work: Path, variant: str) -> Path:
        from bench.conversions.onnxruntime import quantise, write_onnx

        exact = once(work / "float32", partial(write_onnx, checkpoint))
        return exact if variant == "float32" else once(work / variant, partial(quantise, exact), exact)

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

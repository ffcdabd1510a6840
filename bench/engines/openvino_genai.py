"""OpenVINO GenAI: its continuous batching pipeline, on models that optimum-intel exports."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from bench.conversions import once
from bench.engines import Base, Floats, Prompts, Run

FORMATS = {"float32": "fp32", "int8": "int8", "int4": "int4"}  # what the exporter calls them


class Engine(Base):
    """A pipeline of OpenVINO GenAI."""

    packages = ("openvino-genai", "openvino", "optimum-intel", "nncf")
    settings = (
        "float32: INFERENCE_PRECISION_HINT and KV_CACHE_PRECISION f32, since it computes in bfloat16 otherwise where "
        "the CPU can; no prefix cache; max_num_batched_tokens 8192"
    )

    @staticmethod
    def convert(checkpoint: Path, work: Path, variant: str) -> Path:
        return once(work / variant, partial(write_model, checkpoint, variant))

    def __init__(self, files: Path, variant: str, threads: int) -> None:
        self.files = files
        self.properties = {"INFERENCE_NUM_THREADS": threads}
        if variant == "float32":
            self.properties |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 8192  # all prompts of a batch in one step
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(files, scheduler, "CPU", self.properties)
        self.n_request = 0

    def generate(self, prompts: Prompts, n_new: int) -> Run:
        config = openvino_genai.GenerationConfig(max_new_tokens=n_new, do_sample=False, ignore_eos=True)
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        seconds: list[float] = []
        start = time.perf_counter()
        handles = [self.pipeline.add_request(self.n_request + i, x, config) for i, x in enumerate(inputs)]
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for new, handle in zip(tokens, handles, strict=True):
                if handle.can_read():
                    new.extend(handle.read()[0].generated_ids)
            now = time.perf_counter() - start
            seconds.extend([now] * (min(map(len, tokens)) - len(seconds)))
        self.n_request += len(prompts)
        return Run(tokens, seconds)

    def logits(self, token_ids: Sequence[int]) -> Floats:
        # The pipeline keeps them to itself: the same files, run by the runtime below it.
        n = len(token_ids)
        model = openvino.Core().compile_model(self.files / "openvino_model.xml", "CPU", self.properties)
        values = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, n), np.int64),
            "position_ids": np.arange(n, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request = model.create_infer_request()
        inputs = {port.get_any_name(): values[port.get_any_name()] for port in model.inputs}
        return np.array(request.infer(inputs)["logits"][0])


def write_model(checkpoint: Path, variant: str, path: Path) -> None:
    """The checkpoint as OpenVINO's files, by the exporter's command line."""
    command = [
        Path(sys.executable).with_name("optimum-cli"),
        *("export", "openvino", "--task", "text-generation-with-past"),
        *("--model", checkpoint, "--weight-format", FORMATS[variant], path),
    ]
    subprocess.run([str(word) for word in command], check=True)

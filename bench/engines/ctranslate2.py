"""CTranslate2, with its own converter of transformers' models."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import ctranslate2
import numpy as np

from bench.conversions import once
from bench.engines import Base, Floats, Prompts, Run


class Engine(Base):
    """A generator of CTranslate2."""

    packages = ("ctranslate2",)

    @staticmethod
    def convert(checkpoint: Path, work: Path, variant: str) -> Path:
        return once(work / variant, partial(write_model, checkpoint, variant))

    def __init__(self, files: Path, variant: str, threads: int) -> None:
        self.generator = ctranslate2.Generator(
            str(files), compute_type=variant, inter_threads=1, intra_threads=threads
        )
        self.tokens = json.loads((files / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(self, prompts: Prompts, n_new: int) -> Run:
        texts = [[self.tokens[i] for i in prompt] for prompt in prompts]
        seconds = [0.0] * n_new

        def arrived(result: ctranslate2.GenerationStepResult) -> bool:
            seconds[result.step] = time.perf_counter() - start  # the last prompt's call of this step stays
            return False

        start = time.perf_counter()
        results = self.generator.generate_batch(
            texts,
            min_length=n_new,
            max_length=n_new,
            include_prompt_in_result=False,
            callback=arrived,
        )
        return Run([result.sequences_ids[0] for result in results], seconds)

    def logits(self, token_ids: Sequence[int]) -> Floats:
        return np.array(self.generator.forward_batch([list(token_ids)]))[0]


def write_model(checkpoint: Path, variant: str, path: Path) -> None:
    """The checkpoint as a model of CTranslate2."""
    converter = ctranslate2.converters.TransformersConverter(str(checkpoint))
    converter.convert(str(path), quantization=None if variant == "float32" else variant)

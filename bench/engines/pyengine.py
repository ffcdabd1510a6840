"""pyengine: this project, by what its own scheduler calls: `Executor.step`, and `Executor.decode` for as many steps."""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.engines import Base, Floats, NotAvailable, Prompts, Run
from pyengine import load
from pyengine.errors import ArgumentError
from pyengine.executor import Rows
from pyengine.kv import Sequence
from pyengine.sampling import Draw
from pyengine.scheduler import AHEAD_SECONDS, AHEAD_STEPS

GREEDY = Draw(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, sample_index=0, position=0, stop_ids=frozenset())


class Engine(Base):
    """A model of pyengine."""

    packages = ("pyengine", "numpy")
    settings = "no prefix cache; -kv-int8: keys and values in int8, else in bfloat16, or float32 with float32"

    def __init__(self, files: Path, variant: str, threads: int) -> None:
        dtype, _, kv_dtype = variant.partition("-kv-")
        try:
            # Without the prefix cache KV pages are used again from prompt to prompt, as the other engines do.
            model = load(files, dtype, threads, kv_dtype=kv_dtype or None, prefix_cache=False)
        except ArgumentError as error:
            raise NotAvailable(str(error)) from error
        self.executor, self.works = model.executor, model.runner.scheduler.works

    def generate(self, prompts: Prompts, n_new: int) -> Run:
        sequences = [self.executor.new_sequence() for _ in prompts]
        start = time.perf_counter()
        logits = self._prefill(sequences, [np.array(prompt, np.int32) for prompt in prompts])
        tokens = [[best] for best in logits.argmax(1).tolist()]
        seconds = [time.perf_counter() - start]
        while len(seconds) < n_new:
            rows = [Rows(s, np.array(t[-1:], np.int32)) for s, t in zip(sequences, tokens, strict=True)]
            n = min(n_new - len(seconds), AHEAD_STEPS)
            for step in self.executor.decode(rows, [GREEDY] * len(rows), n, AHEAD_SECONDS, self.works, bool):
                for new, drawn in zip(tokens, step, strict=True):
                    new.append(drawn.token_id)
                seconds.append(time.perf_counter() - start)
        for sequence in sequences:
            sequence.close()
        return Run(tokens, seconds)

    def _prefill(self, sequences: list[Sequence], prompts: list[NDArray[np.int32]]) -> Floats:
        """The logits after each prompt; as many prompts go into a step, whole or in part, as it takes rows."""
        most = self.executor.max_rows
        whole: list[Floats] = []
        step: list[Rows] = []
        room = most
        for sequence, prompt in zip(sequences, prompts, strict=True):
            for first in range(0, len(prompt), most):
                part = prompt[first : first + most]
                if len(part) > room:
                    whole.append(self.executor.step(step))
                    step, room = [], most
                step.append(Rows(sequence, part, int(first + most >= len(prompt))))
                room -= len(part)
        whole.append(self.executor.step(step))
        return np.concatenate(whole)

    def logits(self, token_ids: SequenceOf[int]) -> Floats:
        sequence = self.executor.new_sequence()
        logits = self.executor.step([Rows(sequence, np.array(token_ids, np.int32), len(token_ids))])
        sequence.close()
        return logits

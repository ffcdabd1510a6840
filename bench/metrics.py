"""What is measured, and the roofline that a figure stands beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.engines import Run
from pyengine.cost import cost
from pyengine.plan import Plan


@dataclass(frozen=True)
class Metric:
    """A greedy run of so many prompts and new tokens, and what is read off it."""

    title: str
    n_prompt: int  # prompts, which run as one batch
    prompt_tokens: int
    new_tokens: int  # after the first one, which the prompt's own logits give; none: the prompt is what is timed

    @property
    def positions(self) -> int:
        """Positions of a sequence whose keys and values must fit; the last token is never an input."""
        return self.prompt_tokens + self.new_tokens

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random prompts, the same for all engines, others for each seed. The last token may end texts: left out."""
        rng = np.random.default_rng([seed, self.n_prompt, self.prompt_tokens])
        return rng.integers(0, vocab_size - 1, (self.n_prompt, self.prompt_tokens)).tolist()

    def rate(self, run: Run) -> float:
        """Tokens a second: of the prompts until the first new token is known, or of the new ones after it."""
        if not self.new_tokens:
            return self.n_prompt * self.prompt_tokens / run.seconds[0]
        return self.n_prompt * self.new_tokens / (run.seconds[-1] - run.seconds[0])


METRICS = {
    "prefill_512": Metric("prefill, 512 tokens", 1, 512, 0),
    "prefill_4096": Metric("prefill, 4,096 tokens", 1, 4096, 0),
    "decode": Metric("decode, context < 128", 1, 16, 96),
    "decode_900": Metric("decode, context 900", 1, 900, 32),
    "decode_8": Metric("decode, 8 sequences", 8, 32, 64),
    "decode_32": Metric("decode, 32 sequences", 32, 32, 64),
}

# What a fresh process shows: seconds and bytes, of which less is better.
FIRST = Metric("first token", 1, 16, 0)
USE = Metric("use", 1, 512, 16)  # what it does before its memory is read, as far as the context goes
PROCESS_METRICS = {
    "load": "load to the first token, imports done",
    "load_with_import": "load to the first token, imports included",
    "memory": "peak memory",
}

TITLES = {name: metric.title for name, metric in METRICS.items()} | PROCESS_METRICS


def short(metric: Metric, max_seq_len: int) -> Metric:
    """The metric with a prompt that fits into the context."""
    fitting = min(metric.prompt_tokens, max_seq_len - metric.new_tokens)
    return Metric(metric.title, metric.n_prompt, fitting, metric.new_tokens)


def roofline(plan: Plan, width: str, metric: Metric, limits: Mapping[str, Any]) -> float | None:
    """The tokens a second that the limits allow to weights of this width; None where a limit wasn't measured.

    Counted are the weights, read once a step, and the products with them, those that all tokens need alone in a prompt,
    as in `pyengine bench`; neither keys and values nor anything else.
    """
    exact = cost(plan, "float32", "float32")
    peak = limits.get("peak_" + {"int4": "int8"}.get(width, width))
    bandwidth = limits["bandwidth"]
    if peak is None:
        return None
    if not metric.new_tokens:
        return float(peak) / exact.block_flops
    flops = metric.n_prompt * (exact.block_flops + exact.picked_flops)
    return metric.n_prompt / max(decode_bytes(plan, width) / bandwidth, flops / peak)


def decode_bytes(plan: Plan, width: str) -> float:
    """Bytes of weights that a step reads, as our packed form has them."""
    return cost(plan, width, "float32").decode_bytes

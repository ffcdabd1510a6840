"""What is measured. Workers import it, so it imports nothing of pyengine, which would not count as our imports then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.engines import Run


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
    "from_checkpoint": "from the checkpoint to the first token, its conversion included",
    "memory": "peak memory",
}

TITLES = {name: metric.title for name, metric in METRICS.items()} | PROCESS_METRICS


def short(metric: Metric, max_seq_len: int) -> Metric:
    """The metric with a prompt that fits into the context."""
    fitting = min(metric.prompt_tokens, max_seq_len - metric.new_tokens)
    return Metric(metric.title, metric.n_prompt, fitting, metric.new_tokens)

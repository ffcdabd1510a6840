"""PyTorch, with transformers' GPT-2 and the cache that its own generate() takes by default."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, GPT2LMHeadModel

from bench.engines import Base, Floats, Prompts, Run


class Engine(Base):
    """A model of transformers, not compiled, run step by step."""

    packages = ("torch", "transformers")
    settings = "eager, default attention (sdpa), DynamicCache"

    def __init__(self, files: Path, variant: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = GPT2LMHeadModel.from_pretrained(files, dtype=getattr(torch, variant)).eval()

    @torch.inference_mode()
    def generate(self, prompts: Prompts, n_new: int) -> Run:
        new, seconds = [], []
        start = time.perf_counter()
        tokens, cache = torch.tensor(prompts), DynamicCache(config=self.model.config)
        for _ in range(n_new):
            output = self.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = output.logits[:, -1:].argmax(-1)  # [n_prompt, 1]
            new.append(tokens)
            seconds.append(time.perf_counter() - start)
        return Run(torch.cat(new, 1).tolist(), seconds)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Floats:
        return self.model(torch.tensor([token_ids])).logits[0].float().numpy()

"""Writes beam_sampling.json: beam sampling of transformers on FakeExecutor's table, with pyengine's draws.

transformers 5.24, with torch, does everything but the draw: torch.multinomial is replaced by the race that pyengine
draws by, written here in numpy. So filters, scores, what is kept and what ends are its own.

    python tests/golden/beam_sampling.py 24 > tests/golden/beam_sampling.json
"""

from __future__ import annotations

import json
import math
import random
import sys
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

VOCAB = 16
TABLE = torch.tensor(2.0 * np.random.default_rng(7).standard_normal((VOCAB + 1, VOCAB, VOCAB)), dtype=torch.float32)
WORD = 2**32 - 1


def uniform(seed: int, sample_index: int, position: int) -> float:
    """pyengine's: Philox4x32-10."""
    words, keys = [position & WORD, position >> 32, sample_index, 0], [seed & WORD, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [(b >> 32) ^ words[1] ^ keys[0], b & WORD, (a >> 32) ^ words[3] ^ keys[1], a & WORD]
        keys = [(keys[0] + 0x9E3779B9) & WORD, (keys[1] + 0xBB67AE85) & WORD]
    return (((words[1] << 32) | words[0]) >> 11) * 2.0**-53


class Draws:
    """Stands in for torch.multinomial, for the search with `seed`."""

    def __init__(self, seed: int, num_beams: int) -> None:
        self.seed, self.num_beams, self.step = seed, num_beams, 0

    def __call__(self, probs: torch.Tensor, num_samples: int) -> torch.Tensor:
        arrivals = []
        for row, rates in enumerate(probs.double().numpy().reshape(self.num_beams, -1).copy()):
            time, first = 0.0, 2 * num_samples * self.step
            for i in range(num_samples):
                if rates.sum() == 0:
                    break
                which, when = (uniform(self.seed, row, first + 2 * i + j) for j in (0, 1))
                token_id = int(np.searchsorted(np.cumsum(rates), which * rates.sum(), side="right"))
                time -= math.log1p(-when) / rates.sum()
                arrivals.append((time, row * len(rates) + token_id))
                rates[token_id] = 0.0
        self.step += 1
        arrivals.sort()
        indices = [index for _, index in arrivals[:num_samples]]
        # Fewer than it asks for: fill up with what is impossible, as torch does.
        unlikely = (i for i in np.argsort(probs[0].numpy(), kind="stable").tolist() if i not in indices)
        return torch.tensor([indices + [next(unlikely) for _ in range(num_samples - len(indices))]])


class Table(GPT2LMHeadModel):
    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithCrossAttentions:
        before = torch.cat([torch.full_like(input_ids[:, :1], VOCAB), input_ids[:, :-1]], 1)
        return CausalLMOutputWithCrossAttentions(logits=TABLE[before, input_ids])


def configuration(rng: random.Random) -> tuple[list[int], list[int], dict[str, Any]]:
    """A prompt, the tokens that end a text, and arguments."""
    num_beams = rng.choice([2, 3, 4])
    stop_ids = sorted(rng.sample(range(VOCAB), rng.choice([0, 1, 1, 2])))
    arguments: dict[str, Any] = {
        "num_beams": num_beams,
        "num_return_sequences": rng.randint(1, num_beams),
        "early_stopping": rng.choice([True, False, "never"]),
        "length_penalty": rng.choice([0.0, 0.6, 1.0, 2.0]),
        "max_new_tokens": rng.choice([2, 4, 9, 9]),
    }
    for name, values in {
        "temperature": [0.5, 1.7, 3.0],
        "top_k": [1, 4, 9],
        "top_p": [0.3, 0.8, 0.95],
        "min_p": [0.05, 0.3],
        "repetition_penalty": [0.8, 1.2],
    }.items():
        if rng.random() < 0.4:
            arguments[name] = rng.choice(values)
    return [rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))], stop_ids, arguments


def main(n: int, seed: int) -> list[dict[str, Any]]:
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = Table(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)).eval()
    model.generation_config.eos_token_id = None
    rng = random.Random(seed)
    cases = []
    for i in range(n):
        prompt, stop_ids, arguments = configuration(rng)
        torch.multinomial = Draws(i, arguments["num_beams"])
        ids = torch.tensor([prompt])
        unset = {"top_k": 0, "eos_token_id": stop_ids or None, "use_cache": False, "do_sample": True}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_scores=True,
            **unset | arguments,
        )
        sequences = []
        for row in out.sequences[:, len(prompt) :].tolist():
            end = next((j + 1 for j, token_id in enumerate(row) if token_id in stop_ids), len(row))
            sequences.append(row[:end])
        arguments = {"seed": i} | arguments
        results = {"sequences": sequences, "scores": out.sequences_scores.tolist()}
        cases.append({"prompt": prompt, "stop_token_ids": stop_ids, "arguments": arguments} | results)
    return cases


if __name__ == "__main__":
    found = main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print("[", ",\n".join(json.dumps(case) for case in found), "]", sep="\n")

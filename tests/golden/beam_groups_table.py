"""Writes beam_groups_table.json: diverse beam searches of transformers 4.49, with torch, on FakeExecutor's table.

Of 400 random configurations it keeps those that tell its rules from others that come near (what a group that has ended
counts as, what ends a group, what the length ends), and a dozen more.

    python tests/golden/beam_groups_table.py > tests/golden/beam_groups_table.json
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

VOCAB = 16
TABLE = torch.tensor(2.0 * np.random.default_rng(7).standard_normal((VOCAB + 1, VOCAB, VOCAB)), dtype=torch.float32)
KEPT = [*range(12), 32, 65, 125, 142, 168, 224, 291, 310, 372]


class Table(GPT2LMHeadModel):
    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutputWithCrossAttentions:
        before = torch.cat([torch.full_like(input_ids[:, :1], VOCAB), input_ids[:, :-1]], 1)
        return CausalLMOutputWithCrossAttentions(logits=TABLE[before, input_ids])


def configuration(rng: random.Random) -> tuple[list[int], list[int], dict[str, Any]]:
    """A prompt, the tokens that end a text, and arguments."""
    n_group, size, n_stop = rng.choice([2, 2, 3, 4]), rng.choice([1, 2, 2, 3]), rng.choice([0, 1, 1, 2])
    stop_ids = sorted(rng.sample(range(VOCAB), n_stop))
    prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))]
    arguments = {
        "num_beams": n_group * size,
        "num_beam_groups": n_group,
        "diversity_penalty": rng.choice([0.1, 0.5, 1.0, 3.0]),
        "num_return_sequences": rng.randint(1, n_group * size),
        "early_stopping": rng.choice([True, False, "never"]),
        "length_penalty": rng.choice([-1.0, 0.0, 0.6, 1.0, 2.0]),
        "max_new_tokens": rng.choice([1, 2, 4, 9, 9, 9]),
    }
    if rng.random() < 0.4:
        arguments["repetition_penalty"] = rng.choice([0.8, 1.2, 1.4])
    return prompt, stop_ids, arguments


def main() -> list[dict[str, Any]]:
    sizes = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = Table(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)).eval()
    model.generation_config.eos_token_id = None
    rng = random.Random(1)
    cases = []
    for prompt, stop_ids, arguments in [configuration(rng) for _ in range(400)]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=stop_ids or None,
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
            **arguments,
        )
        sequences = []
        for row in out.sequences[:, len(prompt) :].tolist():
            end = next((i + 1 for i, token_id in enumerate(row) if token_id in stop_ids), len(row))
            sequences.append(row[:end])
        results = {"sequences": sequences, "scores": out.sequences_scores.tolist()}
        cases.append({"prompt": prompt, "stop_token_ids": stop_ids, "arguments": arguments} | results)
    return cases


if __name__ == "__main__":
    found = main()
    print("[", ",\n".join(json.dumps(found[i]) for i in KEPT), "]", sep="\n")

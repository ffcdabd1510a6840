"""Writes beam_groups.json: diverse beam searches of transformers on the golden checkpoints, in float64.

transformers 4.49, with torch, is the last oracle: version 5 has no beam groups. It replaces the token that ends a text
by the first of eos_token_id.

    python tests/golden/beam_groups.py ../shared/data/golden > tests/golden/beam_groups.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2LMHeadModel

# How many tokens end a text, and the arguments.
SETTINGS: list[tuple[int, dict[str, Any]]] = [
    (0, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 4}),
    (0, {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0, "num_return_sequences": 6}),
    (0, {"num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 2.0, "num_return_sequences": 4}),
    (1, {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.3, "num_return_sequences": 3}),
    (
        1,
        {
            "num_beams": 6,
            "num_beam_groups": 2,
            "diversity_penalty": 0.7,
            "num_return_sequences": 6,
            "early_stopping": True,
        },
    ),
    (
        1,
        {
            "num_beams": 6,
            "num_beam_groups": 3,
            "diversity_penalty": 0.2,
            "num_return_sequences": 4,
            "early_stopping": "never",
            "length_penalty": 2.0,
        },
    ),
    (
        1,
        {
            "num_beams": 8,
            "num_beam_groups": 4,
            "diversity_penalty": 1.5,
            "num_return_sequences": 8,
            "length_penalty": 0.0,
            "repetition_penalty": 1.3,
        },
    ),
    (
        2,
        {
            "num_beams": 6,
            "num_beam_groups": 2,
            "diversity_penalty": 0.4,
            "num_return_sequences": 5,
            "early_stopping": "never",
            "length_penalty": -1.0,
            "repetition_penalty": 1.2,
        },
    ),
    (
        2,
        {
            "num_beams": 4,
            "num_beam_groups": 2,
            "diversity_penalty": 5.0,
            "num_return_sequences": 4,
            "early_stopping": True,
            "length_penalty": 0.6,
        },
    ),
]


def narrow(module: Any, args: Any, output: Any) -> Any:
    """Logits as float32: group beam search makes them that anyway, but can't list scores of float64."""
    output.logits = output.logits.float()
    return output


def search(model: Any, prompt: torch.Tensor, eos: list[int], arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The sequences, without prompt and padding, and their scores."""
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        eos_token_id=eos or None,
        max_new_tokens=16,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **arguments,
    )
    sequences = []
    for row in found.sequences[:, prompt.shape[1] :].tolist():
        end = next((i + 1 for i, token_id in enumerate(row) if token_id in eos), len(row))
        sequences.append(row[:end])
    return sequences, found.sequences_scores.tolist()


def main(folder: Path) -> list[dict[str, Any]]:
    cases = []
    for name in ("gpt2-tiny", "gpt2-untied", "gpt2-wide-head", "gpt2-erf"):
        prompt = torch.tensor(np.load(folder / name / "golden.npz")["prompt"][:1])
        model = GPT2LMHeadModel.from_pretrained(folder / name, torch_dtype=torch.float64)
        model.generation_config.eos_token_id = None
        model.register_forward_hook(narrow)
        for n_eos, arguments in SETTINGS:
            # Tokens that do come up end a text, so that some groups end before others.
            free, _ = search(model, prompt, [], arguments)
            counts = np.bincount([token_id for row in free for token_id in row[2:]])
            eos = sorted(np.argsort(-counts, kind="stable")[1 : 1 + n_eos].tolist())
            sequences, scores = search(model, prompt, eos, arguments)
            cases.append(
                {
                    "checkpoint": name,
                    "stop_token_ids": eos,
                    "arguments": arguments,
                    "sequences": sequences,
                    "scores": scores,
                }
            )
    return cases


if __name__ == "__main__":
    lines = [json.dumps(case) for case in main(Path(sys.argv[1]))]
    print("[", ",\n".join(lines), "]", sep="\n")

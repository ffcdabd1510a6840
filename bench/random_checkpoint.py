"""Writes a GPT-2 checkpoint with random weights, in the shape of a real one: for timing, since speed doesn't ask what
the weights are. A tokenizer of the vocabulary's size lies beside them, since other engines don't load without one.

    python -m bench.random_checkpoint 124m /tmp/gpt2-124m
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from pyengine.architectures import gpt2
from pyengine.plan import MatrixSpec, VectorSpec

SHAPES = {
    "tiny": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},  # for what isn't about speed
    "124m": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "124m-4096": {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 4096},  # for long prompts
    "355m": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "774m": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}

END = "<|endoftext|>"
TOKENIZER_CONFIG = {"tokenizer_class": "GPT2TokenizerFast", "bos_token": END, "eos_token": END, "unk_token": END}


def tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE without a text behind it: the bytes, as many pairs of bytes as fit, the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(itertools.product(alphabet, repeat=2), vocab_size - len(alphabet) - 1))
    tokens = [*alphabet, *(a + b for a, b in merges)]
    bpe = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([END])
    return bpe


def write(folder: Path, shape: str, seed: int = 0) -> None:
    """Writes config.json, a tokenizer, and model.safetensors in float32; values are drawn as GPT-2 is initialised."""
    config = {"model_type": "gpt2", "n_positions": 1024, "vocab_size": 50257, **SHAPES[shape]}
    config |= {"architectures": ["GPT2LMHeadModel"], "bos_token_id": 50256, "eos_token_id": 50256}
    plan = gpt2.plan(config)
    specs: list[MatrixSpec | VectorSpec] = [*plan.matrices.values(), *plan.vectors.values()]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + 4 * int(np.prod(spec.shape))
        header[spec.tensor] = {"dtype": "F32", "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer(50257).to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            values = rng.standard_normal(spec.shape, np.float32) * np.float32(0.02)
            is_gain = len(spec.shape) == 1 and spec.tensor.endswith("weight")
            file.write((values + 1 if is_gain else values).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.shape)


if __name__ == "__main__":
    main()

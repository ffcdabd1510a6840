"""Writes a GPT-2 checkpoint with random weights, in the shape of a real one: for timing, since speed doesn't ask what
the weights are.

    python -m bench.random_checkpoint 124m /tmp/gpt2-124m
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from pyengine.architectures import gpt2
from pyengine.plan import MatrixSpec, VectorSpec

SHAPES = {
    "124m": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "355m": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "774m": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
}


def write(folder: Path, shape: str, seed: int = 0) -> None:
    """Writes config.json and model.safetensors in float32; values are drawn as GPT-2 is initialised."""
    config = {"model_type": "gpt2", "n_positions": 1024, "vocab_size": 50257, **SHAPES[shape]}
    plan = gpt2.plan(config)
    specs: list[MatrixSpec | VectorSpec] = [*plan.matrices.values(), *plan.vectors.values()]
    header: dict[str, object] = {}
    end = 0
    for spec in specs:
        start, end = end, end + 4 * int(np.prod(spec.shape))
        header[spec.tensor] = {"dtype": "F32", "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
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

"""What it takes to restore a saved state, beside running its tokens again: interleaved, in one process.

    python -m bench.random_checkpoint 124m /tmp/gpt2-124m
    python -m bench.states /tmp/gpt2-124m [--dtype int8] [--positions 1000] [--rounds 7]

Restoring is measured into pages that were used before, as those of a process that has run for a while, and into new
memory, whose first touch costs time of its own. What is restored is compared to the bit with what was computed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pyengine import Model, State, load

from .arrivals import prompt, spread


def seconds_of(make: Callable[[], State], expected: State) -> tuple[float, State]:
    """The time until a state has its logits, which are checked."""
    start = time.perf_counter()
    state = make()
    logits = state.logits
    seconds = time.perf_counter() - start
    assert logits.tobytes() == expected.logits.tobytes() and state.token_ids == expected.token_ids
    return seconds, state


def main() -> None:
    """Prints the medians, and the ratios of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    model: Model = load(arguments.model, dtype=arguments.dtype, prefix_cache=False)
    token_ids = prompt(model, np.random.default_rng(0), arguments.positions)
    saved = model.state(token_ids)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        saved.save(path)
        print(f"{arguments.positions} positions, {path.stat().st_size / 1e6:.0f} MB")
        rounds, kept = [], []
        for i in range(arguments.rounds + 1):
            computed, one = seconds_of(lambda: model.state(token_ids), saved)
            one.close()
            used, one = seconds_of(lambda: model.restore(path), saved)  # in the pages of the one before
            new, other = seconds_of(lambda: model.restore(path), saved)  # while these are taken
            one.close()
            kept.append(other)  # so that the next new pages are new
            if i:  # the first is for warming up
                rounds.append((computed, used, new))
    names = "running the tokens", "restoring, used pages", "restoring, new pages"
    for name, values in zip(names, zip(*rounds, strict=True), strict=True):
        shares = spread([one / computed for one, (computed, _, _) in zip(values, rounds, strict=True)], ".3f")
        print(f"{name:<24}{spread([one * 1e3 for one in values], '.1f')} ms, x {shares}")


if __name__ == "__main__":
    main()

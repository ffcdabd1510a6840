"""What guessing ahead brings and costs: the same texts with and without, interleaved, alone on the machine.

    python -m bench.speculation MODEL PROSE [--dtype int8] [--assistant MODEL] [--tokens 128] [--rounds 5]

PROSE is a text file, from which prompts are cut. Prints, for each kind of text, the time of decoding with guesses over
that without (median of the pairs, and the quartiles), the tokens of a step, and how many guesses were right.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import pyengine

CODE = """
def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("expected a size")
    return width * height

def volume(width, height, depth):
    if width < 0 or height < 0 or depth < 0:
        raise ValueError("expected a size")
    return width * height * depth

def edge(width, height):
    if width < 0"""


def kinds(prose: str) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Kind of text → prompts and how to go on."""
    excerpts = [prose[i : i + 1200] for i in range(1000, 61000, 10000)]
    return {
        "prose, temperature 0.8": (excerpts, {"temperature": 0.8}),
        "prose, temperature 1": (excerpts, {"temperature": 1.0}),
        "prose, greedy": (excerpts, {"temperature": 0}),
        "code, temperature 0.3": ([CODE] * 3, {"temperature": 0.3}),
        "code, greedy": ([CODE], {"temperature": 0}),
        "a text twice, greedy": ([f"{s[:600]}\n\n{s[:600]}\n\n{s[:80]}" for s in excerpts[:3]], {"temperature": 0}),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prose")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--assistant")
    parser.add_argument("--assistant-dtype", default="int8")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default="")
    arguments = parser.parse_args()
    model = pyengine.load(arguments.model, dtype=arguments.dtype)
    how: dict[str, Any] = {"prompt_lookup_num_tokens": 10}
    if arguments.assistant:
        # Without a prefix cache each text is new to it, also in later rounds.
        assistant = pyengine.load(arguments.assistant, dtype=arguments.assistant_dtype, prefix_cache=False)
        how = {"assistant_model": assistant}
    for kind, (prompts, params) in kinds(Path(arguments.prose).read_text()).items():
        if not kind.startswith(arguments.kinds):
            continue
        ratios, n_token, n_step, n_right, n_guess = [], 0, 0, 0, 0
        for i in range(arguments.rounds):
            for seed, prompt in enumerate(prompts):
                seconds = []
                for with_it in (False, True) if (i + seed) % 2 else (True, False):
                    extra = how if with_it else {}
                    completion = model.generate(
                        prompt, **params, **extra, seed=seed, max_new_tokens=arguments.tokens, ignore_eos=True
                    )
                    usage = completion.usage
                    seconds.append((with_it, usage.decode_seconds))
                    if with_it:
                        n_token += usage.completion_tokens - 1
                        n_step += usage.completion_tokens - 1 - usage.accepted_tokens
                        n_right += usage.accepted_tokens
                        n_guess += usage.proposed_tokens
                ratios.append(dict(seconds)[True] / dict(seconds)[False])
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(
            f"{kind:<26} time x {middle:.3f} ({low:.3f}-{high:.3f}), {n_token / n_step:.2f} tokens a step, "
            f"{n_right} of {n_guess} guesses right, {len(ratios)} pairs",
            flush=True,
        )


if __name__ == "__main__":
    main()

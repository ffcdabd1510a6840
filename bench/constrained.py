"""What a constraint costs beside a decode step: the mask, what is done with it, and the token that is accepted.

    python -m bench.random_checkpoint 124m /tmp/gpt2-124m
    cp GPT2/tokenizer.json /tmp/gpt2-124m    # the tokenizer of a real GPT-2
    python -m bench.constrained /tmp/gpt2-124m

Each constraint is followed by a text that was written by hand, which is near to what a model says, and by texts that
random logits choose. Every text that ends is checked to match before it counts.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.params import SamplingParams
from pyengine.sampling import Adjustments

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 40},
                "postcode": {"type": "string", "pattern": "^[A-Z]{1,2}[0-9]{1,2} [0-9][A-Z]{2}$"},
                "country": {"enum": ["France", "Germany", "India", "Japan", "United Kingdom"]},
            },
            "required": ["street", "postcode", "country"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "address"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "date": {"type": "string", "format": "date"},
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 8,
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"},
                    "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
                    "price": {"type": "number", "minimum": 0},
                    "tags": {"type": "array", "maxItems": 4, "items": {"type": "string", "maxLength": 20}},
                    "gift": {"type": ["boolean", "null"]},
                },
                "required": ["sku", "quantity", "price"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["id", "date", "items"],
    "additionalProperties": False,
}
ANY = {"type": "object"}
ARITHMETIC = """
start: sum
sum: product (("+" | "-") product)*
product: atom (("*" | "/") atom)*
atom: NUMBER | "(" sum ")"
NUMBER: /(0|[1-9][0-9]{0,3})(\\.[0-9]{1,2})?/
"""
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])T[0-2][0-9]:[0-5][0-9]"
SENTENCES = r"([A-Z][a-z]+( [a-z]+){2,12}[.!?] ){1,4}"
PERSON_TEXT = (
    '{"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "address": {"street": "12 St James\'s Square", '
    '"postcode": "SW1 4JH", "country": "United Kingdom"}}'
)
ORDER_TEXT = (
    '{"id": "5f0c9a7e-3b1d-4c55-9d0e-0a1b2c3d4e5f", "date": "2026-01-31", "items": [{"sku": "ABC-1234", "quantity": 2, '
    '"price": 19.95, "tags": ["red", "large size"], "gift": true}, {"sku": "XYZ-0001", "quantity": 12, "price": 0.5}]}'
)
CASES: list[tuple[str, dict[str, Any], Callable[[str], Any], str]] = [
    ("schema: a person with an address", {"json_schema": PERSON}, json.loads, PERSON_TEXT),
    ("schema: an order with items", {"json_schema": ORDER}, json.loads, ORDER_TEXT),
    ("schema: any object", {"json_schema": ANY}, json.loads, PERSON_TEXT),
    ("regex: a date and a time", {"regex": DATE}, re.compile(DATE).fullmatch, "2026-01-31T12:34"),
    (
        "regex: sentences",
        {"regex": SENTENCES},
        re.compile(SENTENCES).fullmatch,
        "The old man went down to the harbour again. Nobody saw him for a week! ",
    ),
    (
        "grammar: arithmetic",
        {"grammar": ARITHMETIC},
        lambda text: compile(text, "text", "eval"),
        "(12+3.5)*4-(7/(2+1))*100.25",
    ),
]


def follow(
    model: pyengine.Model, arguments: dict[str, Any], token_ids: list[int] | None, n_max: int, seed: int
) -> tuple[list[int], list[float]]:
    """The tokens of a text, those given or drawn by random logits, and the seconds that each took."""
    params = SamplingParams(**arguments)
    adjustments = Adjustments(params, np.empty(0, np.int32), model._constraint(params))
    vocab_size = model.plan.vocab_size
    work, rng = Workspace(vocab_size), np.random.default_rng(seed)
    chosen: list[int] = []
    seconds = []
    while len(chosen) < n_max and not adjustments.complete:
        logits = rng.standard_normal(vocab_size, np.float32)
        if token_ids is not None and len(chosen) == len(token_ids):
            break
        start = time.perf_counter()
        row = adjustments.apply(work, logits)
        middle = time.perf_counter()
        token_id = work.argmax(row) if token_ids is None else token_ids[len(chosen)]
        assert row[token_id] > -np.inf, f"{model.tokenizer.decode([token_id])!r} is not allowed"  # type: ignore[union-attr]
        chosen.append(token_id)
        if token_id in model.eos_token_ids:
            break
        resumed = time.perf_counter()
        adjustments.append(token_id)
        seconds.append(time.perf_counter() - resumed + middle - start)
    return chosen, seconds


def main() -> None:
    """Prints a line for each constraint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder with a tokenizer")
    parser.add_argument("--texts", type=int, default=20, help="random texts of each constraint")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = pyengine.load(arguments.model, threads=arguments.threads)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    start = time.perf_counter()
    model._vocabulary  # noqa: B018
    print(f"vocabulary of {model.plan.vocab_size:,} tokens: {time.perf_counter() - start:.2f} s")
    steps = []
    for seed in range(5):
        usage = model.generate("The", max_new_tokens=100, ignore_eos=True, seed=seed).usage
        steps.append(usage.decode_seconds / (usage.completion_tokens - 1))
    step = statistics.median(steps)
    low, high = min(steps) * 1e3, max(steps) * 1e3
    print(f"decode step, {model.dtype}, context of 100: {step * 1e3:.2f} ms ({low:.2f}-{high:.2f})")
    print(f"{'':<50}{'compile':>9}{'tokens':>8}{'mean':>7}{'median':>8}{'p95':>7}{'max':>8} µs, mean of a step")
    for name, constraint, check, written in CASES:
        params = SamplingParams(**constraint)
        start = time.perf_counter()
        model._constraint(params)
        compiled = time.perf_counter() - start
        runs: list[tuple[str, list[float]]] = []
        token_ids, seconds = follow(model, constraint, tokenizer.encode(written), 1000, 0)
        assert check(tokenizer.decode(token_ids)) is not None
        runs.append(("written", seconds))
        drawn: list[float] = []
        for seed in range(arguments.texts):
            token_ids, seconds = follow(model, constraint, None, 100, seed)
            if len(token_ids) < 100:
                assert check(tokenizer.decode(token_ids, skip_special_tokens=True)) is not None
            drawn += seconds
        runs.append(("random", drawn))
        for how, seconds in runs:
            us = np.array(seconds) * 1e6
            print(
                f"{name + ', ' + how:<50}{compiled * 1e6:>9,.0f}{len(us):>8,}{us.mean():>7.0f}{np.median(us):>8.0f}"
                f"{np.percentile(us, 95):>7.0f}{us.max():>8.0f}    {us.mean() / step / 1e6:.1%}"
            )


if __name__ == "__main__":
    main()

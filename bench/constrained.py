"""What a constraint costs beside a decode step: masks, drawing again, and the tokens that are accepted.

    python -m bench.random_checkpoint 124m /tmp/gpt2-124m
    cp GPT2/tokenizer.json /tmp/gpt2-124m    # the tokenizer of a real GPT-2
    python -m bench.constrained /tmp/gpt2-124m

Each is measured on texts that follow the constraint of themselves, as those of a model that knows what is asked of it
(written by hand, their tokens far above all others), and on texts of random logits, where few of the tokens that are
drawn are allowed, but within free words. Alone, for 32 texts in one step and for a search of 4 beams; the same without
the constraint is subtracted, and what is left compared with the step. Every text that ends is checked to match.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.beam import Beam, BeamSearch, Candidates
from pyengine.constraints import Constraint
from pyengine.generation import Job
from pyengine.params import SamplingParams
from pyengine.sampling import Sampler, draw_ahead

BATCH = 32
BEAMS = 4
LONGEST = 100  # tokens of a text

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
WORDS = r"[A-Za-z ,.']{20,200}"
PERSON_TEXT = (
    '{"name": "Ada Lovelace", "age": 36, "email": "ada@example.org", "address": {"street": "12 St James\'s Square", '
    '"postcode": "SW1 4JH", "country": "United Kingdom"}}'
)
ORDER_TEXT = (
    '{"id": "5f0c9a7e-3b1d-4c55-9d0e-0a1b2c3d4e5f", "date": "2026-01-31", "items": [{"sku": "ABC-1234", "quantity": 2, '
    '"price": 19.95, "tags": ["red", "large size"], "gift": true}, {"sku": "XYZ-0001", "quantity": 12, "price": 0.5}]}'
)
Case = tuple[str, dict[str, Any], Callable[[str], Any], str]  # name, arguments, what checks a text, a text
CASES: list[Case] = [
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
        "regex: some words",
        {"regex": WORDS},
        re.compile(WORDS).fullmatch,
        "Apples, pears and one dozen of the best eggs.",
    ),
    (
        "grammar: arithmetic",
        {"grammar": ARITHMETIC},
        lambda text: compile(text, "text", "eval"),
        "(12+3.5)*4-(7/(2+1))*100.25",
    ),
]


@dataclass
class Bench:
    """Samplers as the scheduler has them, without an engine."""

    model: pyengine.Model
    arguments: dict[str, Any]  # of sampling
    constraint: Constraint | None
    check: Callable[[str], Any]
    written: list[int] | None  # the tokens of each text; None: they are drawn
    works: list[Workspace]
    seeds: Any = field(default_factory=itertools.count)

    def sampler(self) -> Sampler:
        params = SamplingParams(**self.arguments, seed=next(self.seeds))
        return Sampler(params, self.works[0], np.empty(0, np.int32), constraint=self.constraint)

    def step(self, samplers: list[Sampler], rng: np.random.Generator) -> float:
        """The seconds of a step of all samplers; those whose text is over begin another."""
        logits = rng.standard_normal((len(samplers), self.model.plan.vocab_size), np.float32)
        if self.written:
            for sampler, row in zip(samplers, logits, strict=True):
                row[self.written[len(sampler.adjustments.generated)]] = 40.0
        start = time.perf_counter()
        draw_ahead(self.works, [(sampler, row[None]) for sampler, row in zip(samplers, logits, strict=True)])
        for sampler, row in zip(samplers, logits, strict=True):
            sampler.sample(row)
        seconds = time.perf_counter() - start
        for i, sampler in enumerate(samplers):
            if self.is_over(sampler):
                samplers[i] = self.sampler()
        return seconds

    def is_over(self, sampler: Sampler) -> bool:
        token_ids = sampler.adjustments.generated.tolist()
        ended = self.constraint and (sampler.adjustments.complete or token_ids[-1] in self.model.eos_token_ids)
        if ended:
            check_text(self.model, self.check, token_ids)
        return bool(ended) or len(token_ids) == (len(self.written) if self.written else LONGEST)


@dataclass
class BeamBench:
    """A search as its task has it, without an engine."""

    model: pyengine.Model
    constraint: Constraint | None
    check: Callable[[str], Any]
    follows: bool
    works: list[Workspace]

    def __post_init__(self) -> None:
        params = SamplingParams(num_beams=BEAMS, max_new_tokens=LONGEST)
        job = Job(np.zeros(1, np.int32), params, params.stop_ids(self.model.eos_token_ids), None, self.constraint)
        self.search, self.candidates = BeamSearch(job, LONGEST), Candidates(job, self.works)

    def step(self, rng: np.random.Generator) -> float:
        """The seconds of a step; a search that is over begins again."""
        beams = self.search.beams
        logits = rng.standard_normal((len(beams), self.model.plan.vocab_size), np.float32)
        for beam, row in zip(beams, logits, strict=True):
            if self.follows:
                row[self.likely(beam, row)] = 40.0
        start = time.perf_counter()
        goes_on = self.search.advance(partial(self.candidates.of, logits))
        seconds = time.perf_counter() - start
        if goes_on is None:
            for beam in self.search.finished:
                token_ids = [token.token_id for token in beam.tokens]
                if self.constraint and (beam.adjustments.complete or token_ids[-1] in self.model.eos_token_ids):
                    check_text(self.model, self.check, token_ids)
            self.__post_init__()
        return seconds

    def likely(self, beam: Beam, row: NDArray[np.float32]) -> int:
        """A token that may come."""
        constraint = beam.adjustments.constraint
        return int((constraint.fork().mask(self.works[0], row) if constraint else row).argmax())


def check_text(model: pyengine.Model, check: Callable[[str], Any], token_ids: list[int]) -> None:
    assert model.tokenizer is not None
    assert check(model.tokenizer.decode(token_ids, skip_special_tokens=True)) is not None


def beam_cost(model: pyengine.Model, case: Case, follows: bool, n_step: int) -> float:
    """The seconds that a constraint adds to a step of a beam search, as `cost` has them."""
    _, value, check, _ = case
    works = [Workspace(model.plan.vocab_size) for _ in range(model.executor.threads)]
    constraint = model._constraint(SamplingParams(**value))
    benches = [BeamBench(model, one, check, follows, works) for one in (constraint, None)]
    rng = np.random.default_rng(0)
    with_it, without = np.mean([[bench.step(rng) for bench in benches] for _ in range(n_step)], axis=0)
    return float(with_it - without)


def cost(
    model: pyengine.Model, case: Case, arguments: dict[str, Any], follows: bool, n_text: int, n_step: int
) -> float:
    """The seconds that a constraint adds to a step of so many texts: the difference of means, taken in turns."""
    _, value, check, text = case
    assert model.tokenizer is not None
    written = model.tokenizer.encode(text) if follows else None
    works = [Workspace(model.plan.vocab_size) for _ in range(model.executor.threads)]
    constraint = model._constraint(SamplingParams(**value))
    seconds = []
    benches = [Bench(model, arguments, one, check, written, works) for one in (constraint, None)]
    samplers = [[bench.sampler() for _ in range(n_text)] for bench in benches]
    rng = np.random.default_rng(0)
    for _ in range(n_step):
        seconds.append([bench.step(its, rng) for bench, its in zip(benches, samplers, strict=True)])
    with_it, without = np.mean(seconds, axis=0)
    return float(with_it - without)


def decode_step(model: pyengine.Model, n_text: int, num_beams: int = 1) -> float:
    """The median seconds of a step that decodes so many texts with a context of about 100, without constraints."""
    steps = []
    for _ in range(5):
        found = model.generate(["The"] * n_text, max_new_tokens=100, ignore_eos=True, num_beams=num_beams)
        steps.append(max(one.usage.decode_seconds for one in found) / 99)
    return statistics.median(steps)


def main() -> None:
    """Prints a line for each constraint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder with a tokenizer")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = pyengine.load(arguments.model, threads=arguments.threads)
    start = time.perf_counter()
    model._vocabulary  # noqa: B018
    print(f"vocabulary of {model.plan.vocab_size:,} tokens: {time.perf_counter() - start:.2f} s")
    steps = {n: decode_step(model, n) for n in (1, BATCH)}
    beams = decode_step(model, 1, BEAMS)
    print(
        f"decode step, {model.dtype}: 1 text {steps[1] * 1e3:.2f} ms, {BATCH} texts {steps[BATCH] * 1e3:.2f} ms, "
        f"{BEAMS} beams {beams * 1e3:.2f} ms"
    )
    columns = list(itertools.product(steps, ("follows", "random"), ({}, {"top_p": 0.9})))
    names = [f"{n} {how}{' top_p' if filters else ''}" for n, how, filters in columns]
    names += [f"{BEAMS} beams {how}" for how in ("follows", "random")]
    print(f"{'added to a step by':<34}" + "".join(f"{name:>18}" for name in names))
    for case in CASES:
        added = [(cost(model, case, f, how == "follows", n, 600 // n + 60), steps[n]) for n, how, f in columns]
        added += [(beam_cost(model, case, how == "follows", 200), beams) for how in ("follows", "random")]
        columns_of = "".join(f"{one * 1e6:>8,.0f} µs {one / step:>6.1%}" for one, step in added)
        print(f"{case[0]:<34}{columns_of}", flush=True)


if __name__ == "__main__":
    main()

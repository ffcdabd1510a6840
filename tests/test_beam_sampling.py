"""Beam sampling: against a float64 reference that takes the same uniforms, transformers, and the exact distribution."""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, complete
from numpy.typing import NDArray

import pyengine
from pyengine._native.drawing import uniform
from pyengine._native.sampling import Workspace
from pyengine.beam import Beam, Candidates, Group
from pyengine.completion import Completion
from pyengine.generation import Job
from pyengine.params import SamplingParams
from pyengine.sampling import TokenLogprob

Floats = NDArray[np.float64]


def job(prompt_ids: list[int], stop_ids: Any = (), **arguments: Any) -> Job:
    params = SamplingParams(**{"max_new_tokens": 7, "num_beams": 3, "do_sample": True} | arguments)
    return Job(np.array(prompt_ids, np.int32), params, frozenset(stop_ids))


def search(executor: Any, prompt_ids: list[int], stop_ids: Any = (), **arguments: Any) -> list[Completion]:
    return complete(executor, [job(prompt_ids, stop_ids, **arguments)])[0]


def filtered(scores: Floats, params: SamplingParams, n_least: int) -> Floats:
    """A row of scores with -inf for what the filters drop, each by a full sort."""
    order = np.argsort(-scores, kind="stable")
    if params.top_k:
        scores = np.where(scores < scores[order[: max(params.top_k, n_least)]][-1], -np.inf, scores)
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    n_kept = max(1 + int(np.searchsorted(np.cumsum(probs[order]), params.top_p)), n_least) if params.top_p < 1 else None
    kept = np.zeros(len(scores), bool)
    kept[order[:n_kept]] = True
    likely = probs >= params.min_p * probs.max()
    likely[order[:n_least]] = True
    return np.where(kept & likely, scores, -np.inf)


def race(rates: Floats, uniforms: list[float]) -> list[tuple[float, int]]:
    """(time, index) of arrivals, by sequential inversion over what is left."""
    rates, time, found = rates.copy(), 0.0, []
    for which, when in zip(uniforms[::2], uniforms[1::2], strict=True):
        if rates.sum() == 0:
            break
        index = int(np.searchsorted(np.cumsum(rates), which * rates.sum(), side="right"))
        time -= math.log1p(-when) / rates.sum()
        found.append((time, index))
        rates[index] = 0.0
    return found


def reference(executor: FakeExecutor, asked: Job) -> list[tuple[list[int], float]]:
    """The search in float64, from its definition: the whole row of scores, one beam after the other."""
    params, prompt = asked.params, asked.prompt_ids.tolist()
    n_least = max(2, 1 + len(asked.stop_ids))
    n_candidates, size = n_least * params.num_beams, params.num_beams
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float]] = []
    for step in range(params.max_new_tokens):
        drawn = []
        for i, (tokens, score) in enumerate(beams):
            logits = executor.from_table(prompt + tokens)[-1].astype(np.float32).astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum())
            seen = list({*prompt, *tokens})
            logprobs[seen] *= params.repetition_penalty
            scores = filtered(logprobs / params.temperature, params, n_least) + score
            uniforms = [uniform(params.seed or 0, i, 2 * n_candidates * step + j) for j in range(2 * n_candidates)]
            drawn += [(time, scores[k], tokens, k) for time, k in race(np.exp(scores), uniforms)]
        chosen = sorted(drawn, key=lambda one: one[0])[:n_candidates]
        chosen.sort(key=lambda one: -one[1])
        length = (step + 1) ** params.length_penalty
        last = step + 1 == params.max_new_tokens
        beams = []
        for rank, (_, score, tokens, k) in enumerate(chosen):
            if k not in asked.stop_ids and not last:
                beams.append(([*tokens, k], score))
            elif rank < size:
                finished.append(([*tokens, k], score / length))
        beams = beams[:size]
        finished = sorted(finished, key=lambda one: -one[1])[:size]
        if not beams or (len(finished) == size and beams[0][1] / length <= finished[-1][1]):
            break
    return finished[: params.num_return_sequences]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.6, "num_beams": 5, "num_return_sequences": 5},
        {"temperature": 2.5, "top_k": 6},
        {"top_k": 1, "num_beams": 2},
        {"top_p": 0.7, "length_penalty": 0.0},
        {"top_p": 0.05, "num_beams": 4, "num_return_sequences": 2},
        {"min_p": 0.2, "temperature": 1.5},
        {"min_p": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.4},
    ],
)
@pytest.mark.parametrize("stop_ids", [[], [3], [2, 9, 11, 17]])
def test_equals_the_reference(seed: int, arguments: dict[str, Any], stop_ids: list[int]) -> None:
    executor = FakeExecutor(40, max_rows=8)
    asked = job([4, 11], stop_ids, seed=seed, **arguments)
    found = search(executor, [4, 11], stop_ids, seed=seed, **arguments)
    expected = reference(executor, asked)
    assert [one.token_ids for one in found] == [tokens for tokens, _ in expected]
    assert [one.score for one in found] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-5)


SCORES = [-1.0, -1.6, -0.4]
LOGITS = np.array([[0.5, -1.0, 0.0, 1.0], [1.5, 0.0, -0.5, -2.0], [0.2, 0.1, -np.inf, 0.4]], np.float32)


def rates_of(scores: list[float], temperature: float) -> Floats:
    logprobs = LOGITS - np.log(np.exp(LOGITS).sum(axis=1, keepdims=True))
    rates: Floats = np.exp(np.array(scores)[:, None] + logprobs / temperature)
    return rates.ravel()


def probability_of_sets(rates: Floats, n: int) -> dict[frozenset[int], float]:
    """Drawing n without replacement: the exact probability of each set, summed over the orders it can come in."""
    found: Counter[frozenset[int]] = Counter()
    for order in itertools.permutations(np.flatnonzero(rates).tolist(), n):
        left, probability = rates.sum(), 1.0
        for index in order:
            probability *= rates[index] / left
            left -= rates[index]
        found[frozenset(order)] += probability
    return found


def deviations(counts: Counter[frozenset[int]], expected: dict[frozenset[int], float]) -> float:
    """How far chi-square is from its mean, in standard deviations (Wilson & Hilferty 1931); rare sets are one class."""
    n = sum(counts.values())
    rare = [one for one, probability in expected.items() if n * probability < 10]
    classes = [[one] for one in expected if one not in rare] + ([rare] if rare else [])
    assert counts.keys() <= expected.keys()
    observed = np.array([sum(counts[one] for one in ones) for ones in classes])
    means = n * np.array([sum(expected[one] for one in ones) for ones in classes])
    freedom = len(classes) - 1
    chi_square = ((observed - means) ** 2 / means).sum()
    return float(((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_candidates_follow_the_exact_distribution(temperature: float) -> None:
    """6 of 3 beams' 11 possible continuations, for 20,000 seeds."""
    token = TokenLogprob(0, 0.0)
    counts: Counter[frozenset[int]] = Counter()
    work = Workspace(4)
    for seed in range(20_000):
        asked = job([1], num_beams=3, temperature=temperature, seed=seed)
        group = Group(asked, 9)
        adjustments = group.beams[0].adjustments
        group.beams = [Beam(score, adjustments, (token,)) for score in SCORES]
        drawn = list(Candidates(asked, [work]).of(LOGITS, group, array("i")))
        counts[frozenset(4 * one.parent + one.chosen.token_id for one in drawn)] += 1
        scores = [one.score for one in drawn]
        assert len(drawn) == 6 and scores == sorted(scores, reverse=True)
    assert abs(deviations(counts, probability_of_sets(rates_of(SCORES, temperature), 6))) < 4
    # The controls: another temperature, and beams whose scores aren't told apart.
    assert deviations(counts, probability_of_sets(rates_of(SCORES, temperature * 1.1), 6)) > 4
    assert deviations(counts, probability_of_sets(rates_of([-1.0] * 3, temperature), 6)) > 4


def test_the_seed_decides_whatever_else_runs() -> None:
    executor = FakeExecutor(40)
    alone = [search(executor, [4, 11], seed=seed, temperature=3.0)[0].token_ids for seed in range(20)]
    assert alone == [search(executor, [4, 11], seed=seed, temperature=3.0)[0].token_ids for seed in range(20)]
    assert len({tuple(token_ids) for token_ids in alone}) > 10
    fresh = [search(executor, [4, 11], temperature=3.0)[0].token_ids for _ in range(5)]
    assert any(token_ids != fresh[0] for token_ids in fresh)


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    model = pyengine.load("demo", dtype="float32")
    arguments: dict[str, Any] = {"num_beams": 3, "do_sample": True, "seed": 5, "max_new_tokens": 8, "top_p": 0.9}
    prompts = ["It was a dark", "One", "The sea"]
    batch = model.generate(prompts, **arguments)
    assert [one.text for one in batch] == [model.generate(prompt, **arguments).text for prompt in prompts]


def test_fewer_continuations_than_beams_are_no_error() -> None:
    executor = FakeExecutor(20)
    executor.table[:, :, 2:] = -np.inf  # two tokens are possible, so two beams after one step
    found = search(executor, [1], num_beams=4, num_return_sequences=4, max_new_tokens=3, seed=0)
    assert len(found) == 4 and {token_id for one in found for token_id in one.token_ids} == {0, 1}


FROZEN = json.loads((Path(__file__).parent / "golden" / "beam_sampling.json").read_text())


@pytest.mark.parametrize("case", FROZEN, ids=lambda case: str(case["arguments"]))
def test_results_of_transformers_with_the_same_draws(case: dict[str, Any]) -> None:
    found = search(FakeExecutor(16), case["prompt"], case["stop_token_ids"], **case["arguments"])
    assert [one.token_ids for one in found] == case["sequences"]
    assert [one.score for one in found] == pytest.approx(case["scores"], rel=1e-5, abs=1e-5)

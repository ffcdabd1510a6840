"""How many guesses are worth it; prompt lookup."""

from __future__ import annotations

import itertools
from array import array
from typing import Any

import numpy as np
import pytest
from guesses import ARGUMENTS, essence, ids

import pyengine
from pyengine.speculation import PromptLookup, shared, worth


def test_worth_is_the_best_number_of_guesses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        p, cost, n = rng.random(), 0.3 * rng.random(), int(rng.integers(1, 12))
        gain = [1.05, *(sum(p**i for i in range(k + 1)) / (1 + k * cost) for k in range(1, n + 1))]
        assert worth([p], 0, cost, n) == (int(np.argmax(gain)), pytest.approx(max(gain)))
    assert worth([0.0, 1.0, 0.5], 1, 0.0, 5) == (5, 1 + 1 + 1 / 2 + 1 / 4 + 1 / 8 + 1 / 16)
    assert worth([0.0, 1.0, 0.0], 1, 0.0, 5) == (1, 2)


def test_worth_of_a_guess_beside_other_texts() -> None:
    """Guess while that brings more tokens of all texts for the time: n rows cost 1 + (n - 1) row_cost."""
    for n_row, row_cost, p in itertools.product((1, 2, 5, 11), (0.02, 0.1, 0.3), (0.3, 0.6, 0.9, 0.99)):
        pace = n_row / (1 + (n_row - 1) * row_cost)
        with_one = (n_row + p) / (1 + n_row * row_cost)
        if not 1 < with_one / pace < 1.06:  # the margin is taken of one text
            assert bool(worth([p], 0, shared(row_cost, row_cost, n_row), 1)[0]) == (with_one > pace) or n_row > 1
        if with_one < pace:
            assert worth([p], 0, shared(row_cost, row_cost, n_row), 8)[0] == 0


def looked_up(prompt: list[int], generated: list[int], n: int = 5, cost: float = 0.0) -> list[int]:
    return PromptLookup(ids(*prompt), 100, cost).propose(array("i", generated), n)


def test_prompt_lookup_follows_the_last_occurrence() -> None:
    assert looked_up([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2], [3]) == [4, 5, 6, 7, 8]
    assert looked_up([1, 2, 3, 4, 9, 1, 2, 3, 7, 8, 0, 1, 2], [3]) == [7, 8, 0, 1, 2]
    assert looked_up([5, 2, 3, 4, 9, 1, 2, 3, 7, 8, 0, 5, 2], [3]) == [4, 9, 1, 2, 3]  # three are better than two
    assert looked_up([1, 2, 3, 4, 5], [6, 7]) == []
    assert looked_up([7], [7]) == looked_up([1], [2]) == looked_up([1, 2], [3]) == []
    assert looked_up([1, 2, 3, 1, 2], [3], 7) == [1, 2, 3, 1, 2, 3, 1]  # goes round
    assert looked_up([7, 7, 7], [7], 3) == [7, 7, 7]
    big = 2**31 - 1
    assert looked_up([big, big - 1, big - 2, 5, big, big - 1], [big - 2], 2) == [5, big]


def test_prompt_lookup_learns_from_what_it_did_not_propose() -> None:
    rng = np.random.default_rng(0)
    lookup = PromptLookup(ids(0), 10, 0.1)
    generated = array("i")
    n_proposed = 0
    for _ in range(2000):  # pairs recur, and mean nothing
        n_proposed += len(lookup.propose(generated, 10))
        generated.append(int(rng.integers(0, 12)))
    assert n_proposed < 150  # by chance, and before it knows
    for i in range(100):
        generated.append(i % 20)
        lookup.propose(generated, 10)
    assert len(lookup.propose(generated, 10)) == 10
    assert len(lookup.propose(generated, 3)) == 3
    generated.append(999)
    assert lookup.propose(generated, 10) == []


def test_prompt_lookup_is_the_same_however_it_is_told() -> None:
    rng = np.random.default_rng(1)
    text = np.repeat(rng.integers(0, 6, (60, 1)), 4, 1).ravel() % rng.integers(2, 6, 240)
    one, other = (PromptLookup(text[:50].astype(np.int32), 8, 0.02) for _ in range(2))
    for n in range(51, 240, 7):
        for i in range(n - 6, n + 1):
            step_by_step = one.propose(array("i", text[50:i].tolist()), 8)
        assert other.propose(array("i", text[50:n].tolist()), 8) == step_by_step


REPETITIVE = [ord(c) for c in "for i in range(10): print(i); "] * 4


@pytest.mark.parametrize("arguments", ARGUMENTS[:5], ids=str)
def test_prompt_lookup_changes_no_bit(target: pyengine.Model, arguments: dict[str, Any]) -> None:
    prompt = REPETITIVE[:100]
    arguments = {"max_new_tokens": 90, "ignore_eos": True} | arguments
    plain, guessed = (target.generate(prompt, **arguments, prompt_lookup_num_tokens=n) for n in (None, 10))
    for a, b in zip(*(one if isinstance(one, list) else [one] for one in (plain, guessed)), strict=True):
        assert essence(a) == essence(b)
        assert a.usage.proposed_tokens == 0
    assert target.stats.kv_pages_used == 0
    pieces = list(target.stream(prompt, **(arguments | {"num_return_sequences": 1}), prompt_lookup_num_tokens=10))
    assert [piece.token_id for piece in pieces] == (plain[0] if isinstance(plain, list) else plain).token_ids


def test_prompt_lookup_pays_where_the_text_repeats_itself(target: pyengine.Model) -> None:
    biased = {"logit_bias": {token_id: 1e6 for token_id in (5,)}, "temperature": 0, "max_new_tokens": 60}
    before = target.stats.steps
    completion = target.generate([1, 2, 3], **biased, prompt_lookup_num_tokens=10)
    assert completion.token_ids == [5] * 60
    assert completion.usage.accepted_tokens > 40
    assert target.stats.steps - before == 60 - completion.usage.accepted_tokens

"""Scoring and logits of a text, in windows and chunks, on an executor without a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, drive

from pyengine.errors import ArgumentError
from pyengine.scoring import Logits, Score, Scoring


def score(executor: Any, token_ids: list[int], stride: int | None = None) -> Score:
    task = Scoring(executor, token_ids, stride)
    drive(executor, [task], step_tokens=executor.max_rows)
    return task.score()


def logits(executor: Any, token_ids: list[int]) -> Any:
    task = Logits(executor, token_ids)
    drive(executor, [task])
    return task.logits


def positional(token_ids: list[int]) -> Any:
    """Logits that depend on the token and on how many stand before it in the window."""
    n = len(token_ids)
    return np.sin(np.outer(1.0 + np.arange(n) + 3.0 * np.array(token_ids), np.arange(1, 51)))


def expected_logprobs(token_ids: list[int], size: int, stride: int) -> list[float]:
    """Each token in the first window that reaches it, window by window, in float64."""
    found: dict[int, float] = {}
    for start in range(0, len(token_ids), stride):
        rows = positional(token_ids[start : start + size])
        for i, row in enumerate(rows[: len(token_ids) - 1 - start]):
            found.setdefault(start + i + 1, row[token_ids[start + i + 1]] - math.log(np.exp(row).sum()))
    return [found[i] for i in range(1, len(token_ids))]


@pytest.mark.parametrize("max_rows", [16, 512])
@pytest.mark.parametrize("n", [2, 3, 64, 65, 199, 200, 201, 202, 300, 301, 1000])
@pytest.mark.parametrize("stride", [None, 1, 77, 100, 200])
def test_score(max_rows: int, n: int, stride: int | None) -> None:
    if stride == 1 and n > 300:
        n = 260
    executor: Any = FakeExecutor(max_seq_len=200, max_rows=max_rows, logits_of=positional)
    token_ids = np.random.default_rng(n).integers(0, 50, n).tolist()
    got = score(executor, token_ids, stride)
    expected = expected_logprobs(token_ids, 200, stride or 100)
    np.testing.assert_allclose(got.logprobs, expected, rtol=0, atol=2e-6)
    assert got.logprobs.dtype == np.float64 and got.token_ids == token_ids
    assert got.total == pytest.approx(sum(expected), abs=1e-3)
    assert got.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-5)
    assert executor.n_open == 0


def test_score_holds_one_chunk_of_logits() -> None:
    largest = 0
    executor: Any = FakeExecutor(max_seq_len=1000, max_rows=512)
    step = executor.step

    def watched(rows: Any) -> Any:
        nonlocal largest
        largest = max(largest, sum(r.n_logits for r in rows))
        return step(rows)

    executor.step = watched
    score(executor, [1, 2] * 700)
    assert largest == 64
    assert max(max(step) for step in executor.steps) > 64  # what is context only runs in larger chunks


def test_score_of_a_single_token_and_of_bad_input() -> None:
    executor: Any = FakeExecutor()
    single = score(executor, [3])
    assert len(single.logprobs) == 0 and single.total == 0 and math.isnan(single.perplexity)
    assert executor.steps == []
    for call, message in (
        (lambda: score(executor, []), "token_ids: expected at least 1"),
        (lambda: score(executor, [1, 50]), "token_ids: expected token ids from 0 to 49, got 50 at position 1"),
        (lambda: score(executor, [1, 2], stride=0), "stride: expected 1 to 64 .*, got 0"),
        (lambda: score(executor, [1, 2], stride=65), "stride: expected 1 to 64 .*, got 65"),
        (lambda: logits(executor, []), "token_ids: expected 1 to 64"),
        (lambda: logits(executor, [1] * 65), "token_ids: expected 1 to 64 .*, got 65"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()


@pytest.mark.parametrize("max_rows", [7, 512])
def test_logits_of_every_position(max_rows: int) -> None:
    executor: Any = FakeExecutor(max_seq_len=200, max_rows=max_rows, logits_of=positional)
    token_ids = [i % 50 for i in range(150)]
    got = logits(executor, token_ids)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_array_equal(got, positional(token_ids).astype(np.float32))
    assert executor.n_open == 0


@pytest.mark.parametrize("call", [score, logits])
def test_scoring_closes_its_sequence_on_errors(call: Any) -> None:
    executor: Any = FakeExecutor(max_rows=16)
    executor.fail_at = 1
    with pytest.raises(KeyboardInterrupt):
        call(executor, [1] * 50)
    assert executor.n_open == 0

"""Beam search against transformers: frozen results, the golden checkpoints, and what must hold for any search."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, LetterTokenizer, complete, saying

import pyengine
from pyengine.completion import Completion
from pyengine.errors import ArgumentError, NonFiniteError
from pyengine.generation import Generation, Job
from pyengine.params import SamplingParams

# transformers 5.23, `generate` on a model whose logits are FakeExecutor's table: prompt, eos_token_id, arguments;
# sequences and sequences_scores.
FROZEN: list[tuple[list[int], list[int], dict[str, Any], list[list[int]], list[float]]] = [
    (
        [4, 11],
        [2, 9],
        {"num_beams": 4, "num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": True, "max_new_tokens": 9},
        [[15, 7, 1, 9]],
        [-0.83283],
    ),
    (
        [6, 15],
        [10, 12],
        {
            "num_beams": 4,
            "num_return_sequences": 2,
            "length_penalty": 0.0,
            "early_stopping": "never",
            "max_new_tokens": 1,
        },
        [[0], [6]],
        [-1.57894, -1.81972],
    ),
    (
        [0, 2, 5, 1],
        [],
        {
            "num_beams": 3,
            "num_return_sequences": 2,
            "length_penalty": 1.0,
            "early_stopping": "never",
            "max_new_tokens": 9,
        },
        [[0, 11, 0, 5, 13, 0, 10, 2, 5], [0, 0, 7, 15, 8, 2, 11, 7, 2]],
        [-0.78796, -0.86167],
    ),
    (
        [13, 12, 14, 4],
        [],
        {"num_beams": 3, "num_return_sequences": 1, "length_penalty": 0.0, "early_stopping": True, "max_new_tokens": 1},
        [[10]],
        [-0.81643],
    ),
    (
        [13, 9, 13],
        [8, 11],
        {
            "num_beams": 4,
            "num_return_sequences": 4,
            "length_penalty": 2.0,
            "early_stopping": False,
            "max_new_tokens": 4,
            "repetition_penalty": 1.4,
        },
        [[7, 5, 6, 6], [5, 6, 6, 11], [7, 5, 0, 12], [7, 5, 0, 4]],
        [-0.23531, -0.25216, -0.25252, -0.27671],
    ),
    (
        [8],
        [10],
        {
            "num_beams": 4,
            "num_return_sequences": 1,
            "length_penalty": 0.0,
            "early_stopping": "never",
            "max_new_tokens": 9,
        },
        [[1, 13, 14, 10]],
        [-3.55356],
    ),
    (
        [9, 3, 2],
        [2, 5],
        {
            "num_beams": 3,
            "num_return_sequences": 1,
            "length_penalty": 1.0,
            "early_stopping": False,
            "max_new_tokens": 1,
        },
        [[15]],
        [-0.83588],
    ),
    (
        [13, 13, 3],
        [],
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True, "max_new_tokens": 9},
        [[11, 12, 15, 0, 0, 7, 15, 8, 2], [11, 12, 15, 0, 0, 7, 6, 2, 3]],
        [-0.08876, -0.09272],
    ),
    (
        [7, 1, 9],
        [],
        {
            "num_beams": 2,
            "num_return_sequences": 1,
            "length_penalty": 2.0,
            "early_stopping": "never",
            "max_new_tokens": 1,
        },
        [[10]],
        [-1.31489],
    ),
    (
        [12, 12],
        [3, 9],
        {
            "num_beams": 3,
            "num_return_sequences": 3,
            "length_penalty": 0.6,
            "early_stopping": True,
            "max_new_tokens": 9,
            "repetition_penalty": 1.4,
        },
        [[6, 1, 4, 9], [6, 1, 9], [6, 8, 12, 3]],
        [-1.77174, -1.85853, -2.14366],
    ),
    (
        [8, 15, 0],
        [],
        {"num_beams": 4, "num_return_sequences": 1, "length_penalty": 0.6, "early_stopping": True, "max_new_tokens": 9},
        [[0, 7, 15, 8, 2, 11, 11, 5, 0]],
        [-1.76544],
    ),
    (
        [9, 10, 5, 11],
        [11],
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.6, "early_stopping": True, "max_new_tokens": 1},
        [[0], [12]],
        [-0.57292, -1.17609],
    ),
    (
        [4],
        [8],
        {
            "num_beams": 3,
            "num_return_sequences": 1,
            "length_penalty": 0.6,
            "early_stopping": False,
            "max_new_tokens": 9,
        },
        [[7, 9, 5, 8]],
        [-1.24642],
    ),
    (
        [3, 3, 10, 10],
        [14],
        {
            "num_beams": 4,
            "num_return_sequences": 2,
            "length_penalty": -1.0,
            "early_stopping": True,
            "max_new_tokens": 9,
        },
        [[8, 7, 9, 5, 8, 11, 14], [8, 7, 9, 5, 3, 2, 15, 6, 5]],
        [-39.91496, -49.9493],
    ),
    # early_stopping=False ends these sooner, with another result.
    (
        [13, 15],
        [2, 4],
        {
            "num_beams": 2,
            "num_return_sequences": 1,
            "length_penalty": 1.0,
            "early_stopping": "never",
            "max_new_tokens": 9,
        },
        [[1, 15, 7, 1, 9, 10, 14, 6, 2]],
        [-1.05969],
    ),
    (
        [13],
        [5],
        {
            "num_beams": 2,
            "num_return_sequences": 2,
            "length_penalty": 1.0,
            "early_stopping": "never",
            "max_new_tokens": 9,
        },
        [[11, 0, 5], [11, 15, 7, 1, 9, 10, 14, 6, 2]],
        [-0.86957, -0.91555],
    ),
    (
        [2, 0, 10],
        [3, 13],
        {
            "num_beams": 3,
            "num_return_sequences": 3,
            "length_penalty": 1.0,
            "early_stopping": "never",
            "max_new_tokens": 9,
        },
        [[2, 5, 3], [2, 5, 9, 2, 5, 3], [2, 5, 1, 0, 0, 7, 6, 2, 3]],
        [-0.75193, -0.8468, -0.97528],
    ),
]


GROUPS = json.loads((Path(__file__).parent / "golden" / "beam_groups_table.json").read_text())


def search(executor: Any, prompt_ids: list[int], stop_ids: Any = (), **arguments: Any) -> list[Completion]:
    """Beam search that leaves nothing open."""
    params = SamplingParams(**{"max_new_tokens": 6, "num_beams": 3} | arguments)
    return complete(executor, [Job(np.array(prompt_ids, np.int32), params, frozenset(stop_ids))])[0]


@pytest.mark.parametrize("max_rows", [4, 512])
@pytest.mark.parametrize(("prompt_ids", "stop_ids", "arguments", "sequences", "scores"), FROZEN)
def test_results_of_transformers(
    max_rows: int, prompt_ids: Any, stop_ids: Any, arguments: Any, sequences: Any, scores: Any
) -> None:
    found = search(FakeExecutor(16, max_rows=max_rows), prompt_ids, stop_ids, **arguments)
    assert [one.token_ids for one in found] == sequences
    assert [one.score for one in found] == pytest.approx(scores, abs=1e-4)
    assert [one.finish_reason for one in found] == ["stop" if ids[-1] in stop_ids else "length" for ids in sequences]


@pytest.mark.parametrize("case", GROUPS, ids=lambda case: str(case["arguments"]))
def test_groups_give_the_results_of_transformers(case: dict[str, Any]) -> None:
    stop_ids = case["stop_token_ids"]
    found = search(FakeExecutor(16), case["prompt"], stop_ids, **case["arguments"])
    sequences = [one.token_ids for one in found]
    for token_ids in sequences:  # that version puts the first of the stop tokens in the place of each
        token_ids[-1] = stop_ids[0] if token_ids[-1] in stop_ids else token_ids[-1]
    assert sequences == case["sequences"]
    assert [one.score for one in found] == pytest.approx(case["scores"], rel=1e-5, abs=1e-5)


def test_groups_differ_by_the_penalty() -> None:
    arguments: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 3}
    groups: dict[str, Any] = {"num_beam_groups": 4, "diversity_penalty": 1000.0}
    found = search(FakeExecutor(), [1, 2], **arguments, **groups)
    for step in range(3):
        assert len({one.token_ids[step] for one in found}) == 4
    first = search(FakeExecutor(), [1, 2], num_beams=1, do_sample=False, max_new_tokens=3)
    assert found[0].token_ids == first[0].token_ids  # the first group knows of no other


def test_a_group_that_has_ended_runs_no_further() -> None:
    executor = FakeExecutor()
    executor.table[:, :, 7], executor.table[:, :, 8] = 10.0, 9.0  # what the first and the second group begin with
    executor.table[:, 7, 5] = 20.0
    groups: dict[str, Any] = {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 5.0}
    found = search(executor, [1], [5], **groups, early_stopping=True, num_return_sequences=2, max_new_tokens=4)
    assert executor.steps == [[1], [1, 1], [1], [1]]
    assert sorted(one.token_ids[:2] for one in found) == [[7, 5], [8, 8]]


@pytest.mark.parametrize("name", ["gpt2-tiny", "gpt2-untied", "gpt2-wide-head", "gpt2-erf"])
def test_golden_checkpoints(shared: Path, name: str) -> None:
    folder = shared / "data" / "golden" / name
    prompt_ids = np.load(folder / "golden.npz")["prompt"][0].tolist()
    model = pyengine.load(folder, dtype="float32")
    for case in json.loads((folder / "beams.json").read_text()):
        found = model.generate(prompt_ids, max_new_tokens=16, **case["args"])
        found = found if isinstance(found, list) else [found]
        assert [one.token_ids for one in found] == case["sequences"]
        assert [one.score for one in found] == pytest.approx(case["scores"], abs=1e-4)


def log_probability(executor: FakeExecutor, prompt_ids: list[int], token_ids: list[int]) -> list[float]:
    rows = executor.from_table(prompt_ids + token_ids)[len(prompt_ids) - 1 : -1]
    rows = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return [float(row[i]) for row, i in zip(rows, token_ids, strict=True)]


def test_beams_enough_for_every_text_find_the_best() -> None:
    executor = FakeExecutor(60, max_rows=64)
    executor.table[:, :, 4:] = -np.inf  # four tokens are possible: 16 texts of two tokens go on
    found = search(executor, [1, 2], num_beams=16, num_return_sequences=16, max_new_tokens=3, length_penalty=0.0)
    texts = [list(text) for text in itertools.product(range(4), repeat=3)]
    best = sorted(texts, key=lambda text: -sum(log_probability(executor, [1, 2], text)))
    assert [one.token_ids for one in found] == best[:16]


def test_logprobs_and_scores_are_of_the_text() -> None:
    executor = FakeExecutor()
    for one in search(executor, [4, 5], num_return_sequences=3, length_penalty=2.0, logprobs=2):
        expected = log_probability(executor, [4, 5], one.token_ids)
        assert [token.logprob for token in one.logprobs] == pytest.approx(expected, abs=1e-5)
        assert one.score == pytest.approx(sum(expected) / 6**2, abs=1e-5)
        for token, so_far in zip(one.logprobs, itertools.accumulate([[i] for i in one.token_ids]), strict=True):
            assert token.top[0][0] == executor.from_table([4, 5, *so_far[:-1]])[-1].argmax()
            assert len(token.top) == 2
        assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (2, 6)


def test_all_beams_run_in_one_step_on_forks() -> None:
    executor = FakeExecutor(max_rows=8)
    search(executor, list(range(20)), num_beams=4, max_new_tokens=5)
    assert executor.steps == [[8], [8], [4], [1] * 4, [1] * 4, [1] * 4, [1] * 4]
    assert executor.n_fork >= 3


def test_the_context_ends_the_search() -> None:
    executor = FakeExecutor(max_seq_len=20)
    [one] = search(executor, list(range(18)), max_new_tokens=100)
    assert (len(one.token_ids), one.finish_reason) == (3, "length")


def test_text_leaves_out_the_stop_token() -> None:
    params = SamplingParams(num_beams=2, max_new_tokens=10)
    executor: Any = saying("größe\x04")
    [[one]] = complete(executor, [Job(np.array([1], np.int32), params, frozenset([4]), LetterTokenizer())])
    assert (one.text, one.token_ids[-1], one.finish_reason) == ("größe", 4, "stop")


def test_a_banned_token_is_in_no_beam() -> None:
    plain = search(FakeExecutor(), [1], num_return_sequences=3)
    banned = plain[0].token_ids[0]
    found = search(FakeExecutor(), [1], num_return_sequences=3, logit_bias={banned: -math.inf})
    assert all(banned not in one.token_ids for one in found)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NonFiniteError("bad")])
@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_sequences_are_closed_whatever_step_raises(error: BaseException, fail_at: int) -> None:
    executor: Any = FakeExecutor()
    executor.fail_at, executor.error = fail_at, error
    with pytest.raises(type(error)):
        search(executor, list(range(20)))
    assert executor.n_open == 0


def test_logits_that_cannot_be_used_are_refused() -> None:
    executor: Any = FakeExecutor()
    executor.table[:, :, 7] = np.nan
    with pytest.raises(NonFiniteError, match="token id 7"):
        search(executor, [1])
    assert executor.n_open == 0


def test_arguments_are_checked_before_anything_runs() -> None:
    executor: Any = FakeExecutor(50, max_rows=16)
    with pytest.raises(ArgumentError, match=r"num_beams: expected at most 16 .*, got 17"):
        search(executor, [1], num_beams=17)
    with pytest.raises(ArgumentError, match=r"num_beams: expected at most 12 .*, got 13"):
        search(executor, [1], [1, 2, 3], num_beams=13)
    with pytest.raises(ArgumentError, match="prompt: expected 1 to 64 tokens"):
        search(executor, [])
    with pytest.raises(ArgumentError, match="num_beams: expected 1"):
        Generation(executor, Job(np.array([1], np.int32), SamplingParams(num_beams=2)))
    assert executor.steps == []
    assert executor.steps == []

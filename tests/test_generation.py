"""The generation loop, stop strings and scoring, on an executor without a model."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, LetterTokenizer, complete, drive, saying

from pyengine.completion import Completion, Piece, StopMatcher
from pyengine.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from pyengine.generation import Generation, Job, check_token_ids
from pyengine.params import SamplingParams
from pyengine.scheduler import Scheduler

START = np.array([65], np.int32)


def prompt(*token_ids: int) -> Any:
    return np.array(token_ids, np.int32)


def job(token_ids: Any, stop_ids: frozenset[int] = frozenset(), **arguments: Any) -> Job:
    return Job(token_ids, SamplingParams(**{"max_new_tokens": 10} | arguments), stop_ids)


def say(text: str | bytes, stop_ids: frozenset[int] = frozenset(), **arguments: Any) -> Completion:
    """The completion of a model that says `text` and then zeros; checks that the streamed pieces are the same text."""
    params = SamplingParams(**{"temperature": 0, "max_new_tokens": 40} | arguments)
    executor: Any = saying(text)
    pieces: list[Piece] = []
    task = Generation(executor, Job(START, params, stop_ids, LetterTokenizer()))
    task.on_piece = pieces.append
    drive(executor, [task])
    [completion] = task.completions()
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [completion.finish_reason]
    assert [piece.token_id for piece in pieces] == completion.token_ids
    assert executor.n_open == 0
    return completion


def greedy(executor: FakeExecutor, token_ids: list[int], n: int) -> list[int]:
    """One token after the other, without batches, chunks or pages."""
    token_ids = list(token_ids)
    for _ in range(n):
        token_ids.append(int(np.argmax(executor.from_table(token_ids)[-1])))
    return token_ids[-n:]


PROMPTS = [[3], list(range(1, 40)), [7, 7, 7], [49, 0], list(range(20)), [11] * 16, [5, 6], [1], [2], [4]]


@pytest.mark.parametrize(("max_rows", "max_batch"), [(1, 1), (3, 2), (16, 4), (16, 32), (512, 32)])
def test_a_batch_equals_one_by_one(max_rows: int, max_batch: int) -> None:
    executor: Any = FakeExecutor(max_rows=max_rows)
    results = complete(executor, [job(prompt(*ids), temperature=0) for ids in PROMPTS], max_batch)
    assert [[one.token_ids for one in many] for many in results] == [[greedy(executor, ids, 10)] for ids in PROMPTS]
    assert executor.n_open == 0
    assert max(len(step) for step in executor.steps) <= max_batch


@pytest.mark.parametrize("arguments", [{}, {"top_k": 5}, {"top_p": 0.9, "repetition_penalty": 1.3}, {"min_p": 0.1}])
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(arguments: dict[str, Any]) -> None:
    jobs = [
        job(prompt(*ids), seed=i, num_return_sequences=1 + i % 3, **arguments) for i, ids in enumerate(PROMPTS)
    ]

    def texts(max_rows: int, max_batch: int, chosen: list[Job]) -> list[list[list[int]]]:
        results = complete(FakeExecutor(max_rows=max_rows), chosen, max_batch)  # type: ignore[arg-type]
        return [[one.token_ids for one in many] for many in results]

    alone = [texts(16, 32, [one])[0] for one in jobs]
    assert texts(16, 32, jobs) == texts(5, 3, jobs) == texts(512, 1, jobs) == alone
    assert len({tuple(ids) for many in alone for ids in many}) == sum(1 + i % 3 for i in range(len(PROMPTS)))


def test_samples_of_a_prompt_run_it_once() -> None:
    executor: Any = FakeExecutor(max_rows=16)
    [results] = complete(executor, [job(prompt(*range(40)), num_return_sequences=4, seed=1, max_new_tokens=3)])
    assert executor.steps == [[16], [16], [8], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert executor.n_fork == 3 and executor.n_open == 0
    assert len({tuple(one.token_ids) for one in results}) > 1
    single = complete(executor, [job(prompt(*range(40)), seed=1, max_new_tokens=3)])[0][0]
    assert results[0].token_ids == single.token_ids


def test_more_samples_than_max_batch_run_without_others() -> None:
    executor: Any = FakeExecutor(max_rows=3)
    jobs = [job(prompt(1)), job(prompt(2), num_return_sequences=5, max_new_tokens=3), job(prompt(3))]
    results = complete(executor, jobs, max_batch=2)
    assert [len(many) for many in results] == [1, 5, 1]
    assert [len(one.token_ids) for one in results[1]] == [3] * 5
    assert executor.n_open == 0


def test_stop_token() -> None:
    completion = say("abc\x04def", stop_ids=frozenset([4]))
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("abc", list(b"abc\x04"), "stop")
    assert say("abc\x04def", stop_ids=frozenset([4]), max_new_tokens=4).finish_reason == "stop"


def test_length() -> None:
    completion = say("abcdef", max_new_tokens=3)
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("abc", list(b"abc"), "length")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (1, 3)
    assert completion.usage.time_to_first_token >= completion.usage.prefill_seconds > 0
    assert completion.usage.decode_seconds > 0
    assert [one.token_id for one in completion.logprobs] == list(b"abc")


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", "STOP", "one "),
        ("one STOP two", ["two", "one STOP"], ""),
        ("one STO two STOP", "STOP", "one STO two "),
        ("SSTOP", "STOP", "S"),
        ("ababac", "abac", "ab"),
        ("aaab", "aab", "a"),
        ("x\n\ny", ["\n\n", "\n"], "x"),
        ("xyz", ["yz", "xyz!", "z"], "x"),
        ("größe", "ß", "grö"),
        ("a🦙b", "🦙", "a"),
    ],
)
def test_stop_strings(text: str, stop: Any, expected: str) -> None:
    completion = say(text, stop=stop)
    assert (completion.text, completion.finish_reason) == (expected, "stop")
    assert bytes(completion.token_ids).decode().startswith(expected)


def test_text_held_back_for_a_stop_string_comes_in_the_end() -> None:
    assert say("abcSTO", stop="STOP", max_new_tokens=6).text == "abcSTO"
    assert say("abcSTO\x04", stop_ids=frozenset([4]), stop="STOP").text == "abcSTO"
    assert say("STOP", stop="STOP", max_new_tokens=4).finish_reason == "stop"


def test_half_a_character_at_the_end() -> None:
    assert say("aß".encode()[:2], max_new_tokens=2).text == "a\ufffd"
    assert say("aß".encode()[:2] + b"\x04", stop_ids=frozenset([4])).text == "a\ufffd"


def test_stop_matcher_equals_a_search_in_the_whole_text() -> None:
    rng = np.random.default_rng(0)
    for _ in range(3000):
        text = "".join(rng.choice(list("ab"), rng.integers(1, 12)))
        stops = tuple("".join(rng.choice(list("ab"), rng.integers(1, 5))) for _ in range(rng.integers(1, 4)))
        cuts = sorted(rng.integers(0, len(text) + 1, 3))
        matcher = StopMatcher(stops)
        got = "".join(matcher.push(text[a:b]) for a, b in itertools.pairwise([0, *cuts, len(text)]))
        assert matcher.stopped == any(stop in text for stop in stops)
        # Which of two overlapping strings comes first can depend on where the pieces end: the one that ends first wins.
        assert text.startswith(got + matcher.held)
        if matcher.stopped:
            assert any(text.startswith(stop, len(got)) for stop in stops) and not any(stop in got for stop in stops)
        else:
            assert got + matcher.flush() == text


def test_the_context_ends_the_text() -> None:
    executor: Any = FakeExecutor(max_seq_len=20)
    for n, expected in ((20, 1), (19, 2), (1, 20)):
        [[completion]] = complete(executor, [job(prompt(*range(n)), temperature=0, max_new_tokens=100)])
        assert (len(completion.token_ids), completion.finish_reason) == (expected, "length")
    assert executor.n_open == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NonFiniteError("bad"), MemoryError()])
@pytest.mark.parametrize("fail_at", [0, 1, 4, 6])
def test_sequences_are_closed_whatever_step_raises(error: BaseException, fail_at: int) -> None:
    executor: Any = FakeExecutor()
    executor.fail_at, executor.error = fail_at, error
    jobs = [job(prompt(*ids), num_return_sequences=3) for ids in PROMPTS]
    with pytest.raises(type(error)):
        complete(executor, jobs, max_batch=8)
    assert executor.n_open == 0


def test_what_goes_wrong_with_one_ends_that_one() -> None:
    executor: Any = FakeExecutor()
    executor.table[:, 5] = np.nan
    tasks = [Generation(executor, job(prompt(i), temperature=0, num_return_sequences=2)) for i in (3, 5)]
    with pytest.raises(NonFiniteError, match="50 of 50"):
        drive(executor, tasks)
    assert tasks[0].error is None and tasks[0].completions()[1].token_ids == greedy(executor, [3], 10)
    assert executor.n_open == 0


def test_requests_are_checked_before_anything_runs() -> None:
    executor: Any = FakeExecutor(max_seq_len=20)
    for bad, message in (
        (job(prompt()), r"prompt: expected 1 to 20 tokens .*, got 0"),
        (job(prompt(*range(21))), r"prompt: expected 1 to 20 tokens .*, got 21"),
        (job(prompt(3, 50)), r"prompt: expected token ids from 0 to 49, got 50 at position 1"),
        (job(prompt(-1)), r"prompt: expected token ids from 0 to 49, got -1 at position 0"),
        (job(prompt(1), logit_bias={50: 1.0}), "logit_bias: expected token ids below 50"),
        (job(prompt(1), stop="x"), "stop: expected no strings without a tokenizer"),
        (job(prompt(1), num_beams=2), "num_beams: expected 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Generation(executor, bad)
    for name in ("max_batch", "step_tokens"):
        for value in (0, 17):
            with pytest.raises(ArgumentError, match=f"{name}: expected 1 to 16, got {value}"):
                Scheduler(executor, **({"max_batch": 4, "step_tokens": 4} | {name: value}))
    assert executor.steps == [] and executor.n_open == 0


def test_token_ids_are_checked() -> None:
    assert check_token_ids("x", [1, 2], 3).dtype == np.int32
    assert check_token_ids("x", np.array([1, 2], np.uint8), 3).tolist() == [1, 2]
    assert check_token_ids("x", [], 3).tolist() == []
    for bad in ([1.0], ["a"], 1, [[1]], [[1], [1, 2]], None, "12", [True]):
        with pytest.raises(ArgumentTypeError, match=r"^x: expected a list of token ids"):
            check_token_ids("x", bad, 3)
    for bad in ([0, 3], [-1], [2**40], [2**70]):
        with pytest.raises(ArgumentError, match=r"^x: expected token ids from 0 to 2"):
            check_token_ids("x", bad, 3)

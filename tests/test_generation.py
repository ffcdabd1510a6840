"""The generation loop, stop strings and scoring, on an executor without a model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, LetterTokenizer, saying

from pyengine.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from pyengine.generation import Completion, Request, StopMatcher, check_token_ids, complete, logits, run, score
from pyengine.sampling import SamplingParams

START = np.array([65], np.int32)


def prompt(*token_ids: int) -> Any:
    return np.array(token_ids, np.int32)


def request(token_ids: Any, stop_ids: frozenset[int] = frozenset(), **arguments: Any) -> Request:
    return Request(token_ids, SamplingParams(**{"max_new_tokens": 10} | arguments), stop_ids)


def say(text: str | bytes, stop_ids: frozenset[int] = frozenset(), **arguments: Any) -> Completion:
    """The completion of a model that says `text` and then zeros; checks that the streamed pieces are the same text."""
    params = SamplingParams(**{"temperature": 0, "max_new_tokens": 40} | arguments)
    executor = saying(text)
    requests = [Request(START, params, stop_ids, LetterTokenizer())]
    pieces = [piece for _, piece in run(executor, requests)]  # type: ignore[arg-type]
    [[completion]] = complete(saying(text), requests)  # type: ignore[arg-type]
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
    results = complete(executor, [request(prompt(*ids), temperature=0) for ids in PROMPTS], max_batch)
    assert [[one.token_ids for one in many] for many in results] == [[greedy(executor, ids, 10)] for ids in PROMPTS]
    assert executor.n_open == 0
    assert max(len(step) for step in executor.steps) <= max_batch


@pytest.mark.parametrize("arguments", [{}, {"top_k": 5}, {"top_p": 0.9, "repetition_penalty": 1.3}, {"min_p": 0.1}])
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(arguments: dict[str, Any]) -> None:
    requests = [
        request(prompt(*ids), seed=i, num_return_sequences=1 + i % 3, **arguments) for i, ids in enumerate(PROMPTS)
    ]

    def texts(max_rows: int, max_batch: int, chosen: list[Request]) -> list[list[list[int]]]:
        results = complete(FakeExecutor(max_rows=max_rows), chosen, max_batch)  # type: ignore[arg-type]
        return [[one.token_ids for one in many] for many in results]

    alone = [texts(16, 32, [one])[0] for one in requests]
    assert texts(16, 32, requests) == texts(5, 3, requests) == texts(512, 1, requests) == alone
    assert len({tuple(ids) for many in alone for ids in many}) == sum(1 + i % 3 for i in range(len(PROMPTS)))


def test_samples_of_a_prompt_run_it_once() -> None:
    executor: Any = FakeExecutor(max_rows=16)
    [results] = complete(executor, [request(prompt(*range(40)), num_return_sequences=4, seed=1, max_new_tokens=3)])
    assert executor.steps == [[16], [16], [8], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert executor.n_fork == 3 and executor.n_open == 0
    assert len({tuple(one.token_ids) for one in results}) > 1
    single = complete(executor, [request(prompt(*range(40)), seed=1, max_new_tokens=3)])[0][0]
    assert results[0].token_ids == single.token_ids


def test_decoding_goes_before_prompts_and_prompts_in_order() -> None:
    executor: Any = FakeExecutor(max_rows=8)
    requests = [request(prompt(*range(n)), temperature=0, max_new_tokens=4) for n in (2, 10, 9)]
    complete(executor, requests)
    # The first prompt and a piece of the second; then the first one's token, and prompts as far as there is room.
    assert executor.steps[:4] == [[2, 6], [1, 4, 3], [1, 1, 6], [1, 1, 1]]


def test_a_finished_request_makes_room_for_the_next() -> None:
    executor: Any = FakeExecutor()
    requests = [request(prompt(i), temperature=0, max_new_tokens=n) for i, n in enumerate([1, 4, 1, 1])]
    order = [(sample.index, piece.finish_reason) for sample, piece in run(executor, requests, max_batch=2)]
    assert [index for index, reason in order if reason] == [0, 2, 3, 1]
    assert [len(step) for step in executor.steps] == [2, 2, 2, 1]


def test_more_samples_than_max_batch_run_without_others() -> None:
    executor: Any = FakeExecutor(max_rows=3)
    requests = [request(prompt(1)), request(prompt(2), num_return_sequences=5, max_new_tokens=3), request(prompt(3))]
    results = complete(executor, requests, max_batch=2)
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
        [[completion]] = complete(executor, [request(prompt(*range(n)), temperature=0, max_new_tokens=100)])
        assert (len(completion.token_ids), completion.finish_reason) == (expected, "length")
    assert executor.n_open == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NonFiniteError("bad"), MemoryError()])
@pytest.mark.parametrize("fail_at", [0, 1, 4, 6])
def test_sequences_are_closed_whatever_step_raises(error: BaseException, fail_at: int) -> None:
    executor: Any = FakeExecutor()
    executor.fail_at, executor.error = fail_at, error
    requests = [request(prompt(*ids), num_return_sequences=3) for ids in PROMPTS]
    with pytest.raises(type(error)):
        complete(executor, requests, max_batch=8)
    assert executor.n_open == 0
    assert len(executor.steps) == fail_at


def test_sequences_are_closed_when_sampling_fails_or_nobody_reads_on() -> None:
    executor: Any = FakeExecutor()
    stream = run(executor, [request(prompt(1, 2), num_return_sequences=4), request(prompt(3))])
    next(stream)
    assert executor.n_open == 5
    stream.close()  # type: ignore[attr-defined]
    assert executor.n_open == 0
    executor.table[:, 5] = np.nan
    with pytest.raises(NonFiniteError, match="50 of 50"):
        complete(executor, [request(prompt(5), num_return_sequences=2), request(prompt(3))])
    assert executor.n_open == 0


def test_two_streams_can_take_turns() -> None:
    executor: Any = FakeExecutor()
    requests = [[request(prompt(i), temperature=0, num_return_sequences=2)] for i in (1, 2)]
    streams = [run(executor, one) for one in requests]
    pairs = list(zip(*streams, strict=True))
    for i in (0, 1):
        tokens = [pair[i][1].token_id for pair in pairs]
        assert tokens[::2] == tokens[1::2] == greedy(executor, [i + 1], 10)


def test_requests_are_checked_before_anything_runs() -> None:
    executor: Any = FakeExecutor(max_seq_len=20)
    for bad, message in (
        (request(prompt()), r"prompt: expected 1 to 20 tokens .*, got 0"),
        (request(prompt(*range(21))), r"prompt: expected 1 to 20 tokens .*, got 21"),
        (request(prompt(3, 50)), r"prompt: expected token ids from 0 to 49, got 50 at position 1"),
        (request(prompt(-1)), r"prompt: expected token ids from 0 to 49, got -1 at position 0"),
        (request(prompt(1), logit_bias={50: 1.0}), "logit_bias: expected token ids below 50"),
        (request(prompt(1), stop="x"), "stop: expected no strings without a tokenizer"),
        (request(prompt(1), num_beams=2), "num_beams: expected 1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            run(executor, [request(prompt(1)), bad])
    with pytest.raises(ArgumentError, match="max_batch: expected at least 1, got 0"):
        run(executor, [], max_batch=0)
    assert executor.steps == [] and executor.n_open == 0


def test_no_requests() -> None:
    assert complete(FakeExecutor(), []) == []  # type: ignore[arg-type]


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

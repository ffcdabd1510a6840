"""logits_processor: what such a function is given, where it stands in the order, and what it may get wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, complete

from pyengine._native.sampling import Workspace
from pyengine.errors import ArgumentError, ArgumentTypeError
from pyengine.generation import Job
from pyengine.params import SamplingParams
from pyengine.sampling import NONE, Sampler

PROMPT = np.array([3, 1, 4], np.int32)
ROW = np.random.default_rng(0).standard_normal(50).astype(np.float32)


def sampler(**arguments: Any) -> Sampler:
    return Sampler(SamplingParams(**arguments), Workspace(50), PROMPT)


def only(token_id: int) -> Any:
    """A processor that leaves one token, changing the row in place."""

    def processor(token_ids: Any, logits: Any) -> Any:
        logits[np.arange(len(logits)) != token_id] = -np.inf
        return logits

    return processor


def test_it_is_given_the_tokens_so_far_and_the_penalised_logits() -> None:
    seen = []

    def look(token_ids: Any, logits: Any) -> Any:
        seen.append((token_ids.copy(), logits.copy()))
        return logits

    one = sampler(temperature=0, logit_bias={7: 2.0}, repetition_penalty=2.0, logits_processor=look)
    first = one.sample(ROW).token_id
    one.sample(ROW)
    work, bias = Workspace(50), (np.array([7], np.int32), np.array([2.0], np.float32))
    for (token_ids, logits), generated in zip(seen, ([], [first]), strict=True):
        assert (token_ids.dtype, token_ids.tolist()) == (np.int32, [*PROMPT, *generated])
        ids = np.array(generated, np.int32)
        np.testing.assert_array_equal(logits, work.adjust(ROW, 0.0, NONE, 0.0, PROMPT, ids, 2.0, 0.0, 0.0, *bias))
    assert not np.array_equal(seen[0][1], seen[1][1])


def test_processors_run_in_order_and_before_the_filters() -> None:
    calls = []

    def ban_the_best(token_ids: Any, logits: Any) -> Any:
        calls.append("ban")
        logits[logits.argmax()] = -np.inf
        return logits

    def copied(token_ids: Any, logits: Any) -> Any:
        calls.append("copy")
        return logits[::-1][::-1].copy()

    order = np.argsort(-ROW)
    one = sampler(temperature=1.0, top_k=1, logits_processor=[ban_the_best, copied, ban_the_best], seed=0)
    assert one.sample(ROW).token_id == order[2]
    assert calls == ["ban", "copy", "ban"]
    assert sampler(top_k=1).sample(ROW).token_id == order[0]


def test_the_models_logits_and_logprobs_stay_as_they_are() -> None:
    row = ROW.copy()
    chosen = sampler(logits_processor=only(9), logprobs=2, seed=0).sample(row)
    plain = sampler(logit_bias={9: 1e30}, logprobs=2, seed=0).sample(row)
    np.testing.assert_array_equal(row, ROW)
    assert (chosen.token_id, chosen.logprob, chosen.top) == (9, plain.logprob, plain.top)
    assert chosen.logprob < -1


def test_what_it_returns_is_not_changed() -> None:
    kept = np.where(np.arange(50) == 6, 0, -np.inf).astype(np.float32)
    one = sampler(temperature=0, logits_processor=lambda token_ids, logits: kept)
    assert [one.sample(ROW).token_id for _ in range(3)] == [6, 6, 6]
    reversed_row = ROW[::-1]  # with a negative stride
    assert sampler(temperature=0, logits_processor=lambda i, x: reversed_row).sample(ROW).token_id == 49 - ROW.argmax()


@pytest.mark.parametrize(
    ("returned", "error", "got"),
    [
        (None, ArgumentTypeError, "got None"),
        ([0.0] * 50, ArgumentTypeError, r"got \[0.0"),
        (np.zeros(50), ArgumentTypeError, "got float64"),
        (np.zeros(49, np.float32), ArgumentError, r"got \[49\]"),
        (np.zeros((1, 50), np.float32), ArgumentError, r"got \[1, 50\]"),
    ],
)
def test_what_it_may_not_return(returned: Any, error: Any, got: str) -> None:
    def wrong(token_ids: Any, logits: Any) -> Any:
        return returned

    with pytest.raises(error, match=rf"^logits_processor: expected float32 \[50\] from .*wrong.*, {got}"):
        sampler(logits_processor=wrong).sample(ROW)


@pytest.mark.parametrize("wrong", [3, "f", [only(1), None], {only(1)}])
def test_what_is_no_function_is_refused(wrong: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^logits_processor: expected a function or a list of functions, got "):
        SamplingParams(logits_processor=wrong)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_its_own_exception_arrives_as_it_is(num_beams: int) -> None:
    error = ZeroDivisionError("mine")

    def fail(token_ids: Any, logits: Any) -> Any:
        if len(token_ids) == 5:
            raise error
        return logits

    executor: Any = FakeExecutor()
    request = Job(PROMPT, SamplingParams(logits_processor=fail, num_beams=num_beams))
    with pytest.raises(ZeroDivisionError) as caught:
        complete(executor, [request])
    assert caught.value is error
    assert executor.n_open == 0


def test_each_sample_has_its_own_tokens() -> None:
    seen = set()

    def look(token_ids: Any, logits: Any) -> Any:
        seen.add(tuple(token_ids.tolist()))
        return logits

    params = SamplingParams(logits_processor=look, num_return_sequences=3, max_new_tokens=6, seed=0)
    executor: Any = FakeExecutor()
    [texts] = complete(executor, [Job(PROMPT, params)])
    assert len({tuple(one.token_ids) for one in texts}) == 3
    assert seen == {(*PROMPT.tolist(), *one.token_ids[:n]) for one in texts for n in range(6)}


def test_a_batch_equals_one_by_one() -> None:
    def lean(token_ids: Any, logits: Any) -> Any:
        logits += np.sin(np.arange(len(logits), dtype=np.float32) * token_ids.sum())
        return logits

    jobs = [
        Job(np.arange(1, n, dtype=np.int32), SamplingParams(logits_processor=lean, seed=n, max_new_tokens=9))
        for n in range(2, 9)
    ]
    fake: Any = FakeExecutor
    alone = [complete(fake(), [one])[0][0].token_ids for one in jobs]
    assert [one.token_ids for [one] in complete(fake(max_rows=5), jobs, 3)] == alone


def test_beams_give_it_log_probabilities() -> None:
    sums = []

    def look(token_ids: Any, logits: Any) -> Any:
        sums.append(float(np.log(np.exp(logits.astype(np.float64)).sum())))
        return only(token_ids[-1] + 1)(token_ids, logits)

    executor: Any = FakeExecutor()
    params = SamplingParams(logits_processor=look, num_beams=3, max_new_tokens=4, length_penalty=0.0)
    [one] = complete(executor, [Job(PROMPT, params)])[0]
    assert one.token_ids == [5, 6, 7, 8]
    assert sums == pytest.approx([0.0] * len(sums), abs=1e-5)
    assert one.score == pytest.approx(sum(token.logprob for token in one.logprobs), abs=1e-4)
    assert math.isfinite(one.score)

"""Steps that the engine decodes by itself: the same bits as one by one, and when it stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.errors import StepStopped
from pyengine.executor import Executor, Rows
from pyengine.generation import Generation, Job
from pyengine.kv import PAGE, Sequence
from pyengine.params import SamplingParams
from pyengine.sampling import Draw, Drawn, Sampler
from pyengine.scheduler import AHEAD_SECONDS, AHEAD_STEPS, WATCHED_SECONDS, Scheduler

VOCAB = 97
PROMPTS = [[3, 4, 5], [7] * (PAGE - 3), [1], list(range(90))]
PARAMS: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_k": 7, "temperature": 1.5}, {"top_p": 0.8, "min_p": 0.01}]


@pytest.fixture(scope="module", params=["float32", "int8"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pyengine.Model:
    config = {"vocab_size": VOCAB, "n_positions": 3 * PAGE, "n_layer": 2}
    folder = write_checkpoint(tmp_path_factory.mktemp("decode"), config)
    return pyengine.load(folder, dtype=request.param, threads=2)


class Texts:
    """Four prompts that have run but for their last token, and how their next tokens are drawn."""

    def __init__(self, executor: Executor, stop_ids: frozenset[int] = frozenset()) -> None:
        self.executor = executor
        self.works = [Workspace(VOCAB) for _ in range(executor.threads)]
        self.sequences = [executor.new_sequence() for _ in PROMPTS]
        for sequence, ids in zip(self.sequences, PROMPTS, strict=True):
            if ids[:-1]:
                executor.step([Rows(sequence, np.array(ids[:-1], np.int32), 0)])
        self.samplers = [
            Sampler(SamplingParams(seed=i, **params), self.works[0], np.array(ids, np.int32), i)
            for i, (ids, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
        ]
        self.draws = [draw for sampler in self.samplers if (draw := sampler.plain(stop_ids))]

    def rows(self) -> list[Rows]:
        return [Rows(s, np.array(ids[-1:], np.int32)) for s, ids in zip(self.sequences, PROMPTS, strict=True)]

    def decode(
        self, n: int, seconds: float = 60.0, urgent: Callable[[], bool] = lambda: False
    ) -> list[list[Drawn]]:
        return list(self.executor.decode(self.rows(), self.draws, n, seconds, self.works, urgent))

    def one_by_one(self, n: int) -> list[list[tuple[int, float]]]:
        rows, found = self.rows(), []
        for _ in range(n):
            logits = self.executor.step(rows)
            chosen = [sampler.sample(row) for sampler, row in zip(self.samplers, logits, strict=True)]
            found.append([(one.token_id, one.logprob) for one in chosen])
            rows = [Rows(r.sequence, np.array([one.token_id], np.int32)) for r, one in zip(rows, chosen, strict=True)]
        return found

    def stored(self) -> list[list[int]]:
        return [list(sequence.token_ids) for sequence in self.sequences]


def test_as_one_by_one(model: pyengine.Model) -> None:
    """Tokens, log-probabilities to the last bit, and what the sequences hold then: across the end of a page."""
    ours, theirs = Texts(model.executor), Texts(model.executor)
    got = [[(one.token_id, one.logprob) for one in step] for step in ours.decode(20)]
    assert got == theirs.one_by_one(20)
    assert ours.stored() == theirs.stored() and len(ours.stored()[0]) == 22
    last = np.array([5], np.int32)
    logits = [model.executor.step([Rows(s, last) for s in one.sequences]).tobytes() for one in (ours, theirs)]
    assert logits[0] == logits[1]
    other = Texts(model.executor)
    other.draws[1] = other.draws[1]._replace(position=1)  # the control: a number of another place
    assert [[(one.token_id, one.logprob) for one in step] for step in other.decode(20)] != got


def test_it_ends_after_a_stop_id(model: pyengine.Model) -> None:
    steps = Texts(model.executor).decode(20)
    stop = steps[6][3].token_id
    first = next(i for i, step in enumerate(steps) if any(one.token_id == stop for one in step))
    got = Texts(model.executor, frozenset([stop])).decode(20)
    assert got == steps[: first + 1]


def test_it_ends_for_others(model: pyengine.Model) -> None:
    answers = iter([False, False, True])
    assert len(Texts(model.executor).decode(20, urgent=lambda: next(answers))) == 3
    assert len(Texts(model.executor).decode(20, seconds=0.0)) == 1
    start = time.perf_counter()
    n = len(Texts(model.executor).decode(60, seconds=1e-4))
    assert 1 <= n <= 60 and time.perf_counter() - start < 10


def test_stopped(model: pyengine.Model) -> None:
    """Before the first step is done nothing has happened; after it, what is done counts."""
    texts = Texts(model.executor)
    before = texts.stored()
    model.executor.stop()
    with pytest.raises(StepStopped):
        texts.decode(5)
    assert texts.stored() == before
    expected = Texts(model.executor).decode(5)
    calls: list[None] = []

    def urgent() -> bool:
        calls.append(None)
        if len(calls) == 2:
            model.executor.stop()
        return False

    assert texts.decode(5, urgent=urgent) == expected[:2]
    assert [len(s) for s in texts.stored()] == [len(s) + 2 for s in before]


def test_only_what_is_taken_counts(model: pyengine.Model) -> None:
    texts = Texts(model.executor)
    before = texts.stored()
    steps = model.executor.decode(texts.rows(), texts.draws, 8, 60.0, texts.works, lambda: False)
    next(steps)
    del steps
    assert [len(s) for s in texts.stored()] == [len(s) + 1 for s in before]


def test_bad_arguments(model: pyengine.Model) -> None:
    texts = Texts(model.executor)
    rows = texts.rows()

    def decode(rows: list[Rows], draws: list[Draw], n: int, works: list[Workspace]) -> None:
        list(model.executor.decode(rows, draws, n, 1.0, works, lambda: False))

    for message, arguments in (
        ("a row and a draw for each part", (rows, texts.draws[1:], 1, texts.works)),
        ("at least a step", (rows, texts.draws, 0, texts.works)),
        ("at least a step", ([], [], 1, texts.works)),
        ("expected one for each of 2 threads, got 1", (rows, texts.draws, 1, texts.works[1:])),
        ("expected them for 97 logits, got 98", (rows, texts.draws, 1, [Workspace(VOCAB + 1)] * 2)),
        ("positions, but the context has 192", (rows[:1], texts.draws[:1], 3 * PAGE, texts.works)),
    ):
        with pytest.raises(pyengine.ArgumentError, match=message):
            decode(*arguments)


def steps_of(model: pyengine.Model, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> list[int]:
    """How many tokens each call of `decode` gives to a text of 21."""
    sizes: list[int] = []
    decode = Executor.decode

    def counted(*args: Any) -> Any:
        steps = list(decode(*args[:4], 60.0, *args[5:]))
        sizes.append(len(steps))
        return iter(steps)

    monkeypatch.setattr(Executor, "decode", counted)
    params = SamplingParams(**{"max_new_tokens": 21, "seed": 1} | arguments)
    scheduler = Scheduler(model.executor)
    scheduler.add(Generation(model.executor, Job(np.array([1, 2], np.int32), params)))
    while scheduler.busy:
        scheduler.step()
    return sizes


def test_who_is_decoded_so(model: pyengine.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token comes of the prompt; the rest in portions, unless more than logits counts."""
    assert steps_of(model, monkeypatch) == [AHEAD_STEPS, AHEAD_STEPS, 20 - 2 * AHEAD_STEPS]
    assert steps_of(model, monkeypatch, num_return_sequences=3) == [AHEAD_STEPS, AHEAD_STEPS, 20 - 2 * AHEAD_STEPS]
    for more in ({"repetition_penalty": 1.2}, {"logit_bias": {1: 0.5}}, {"logprobs": 2}):
        assert steps_of(model, monkeypatch, **more) == []


def test_without_pages_it_makes_one_step(model: pyengine.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = Sequence.reserve

    def scarce(self: Sequence, n: int, within: bool = False) -> None:
        if n > 1 and within:
            raise pyengine.OutOfMemoryError("no pages")
        reserve(self, n, within)

    expected = model.generate([1, 2], max_new_tokens=21, seed=1, ignore_eos=True).token_ids
    monkeypatch.setattr(Sequence, "reserve", scarce)
    got = model.generate([1, 2], max_new_tokens=21, seed=1, ignore_eos=True).token_ids
    assert got == expected


def test_pieces_are_those_of_single_steps(model: pyengine.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = list(model.stream([1, 2], max_new_tokens=21, seed=1, ignore_eos=True))
    monkeypatch.setattr("pyengine.scheduler.AHEAD_STEPS", 1)
    assert list(model.stream([1, 2], max_new_tokens=21, seed=1, ignore_eos=True)) == pieces


def test_smaller_portions_while_somebody_watches(model: pyengine.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []
    decode = Executor.decode

    def noted(*args: Any) -> Any:
        seconds.append(args[4])
        return decode(*args)

    monkeypatch.setattr(Executor, "decode", noted)
    scheduler = Scheduler(model.executor)
    for n, watched in ((20, True), (99, False)):
        task = Generation(model.executor, Job(np.array([1], np.int32), SamplingParams(max_new_tokens=n)))
        task.watched = partial(bool, watched)
        scheduler.add(task)
    while scheduler.busy:
        scheduler.step()
    assert set(seconds[:3]) == {WATCHED_SECONDS} and seconds[-1] == AHEAD_SECONDS


def test_who_iterates_watches(model: pyengine.Model) -> None:
    request = model.submit([1, 2], max_new_tokens=8, ignore_eos=True)
    assert not request.watched()
    pieces = iter(request)
    next(pieces)
    assert request.watched()
    assert len(list(pieces)) == 7
    assert not request.watched()

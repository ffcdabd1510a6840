"""Speculation: the same tokens, to the last bit of their log-probabilities, whatever is guessed; when it guesses."""

from __future__ import annotations

import itertools
import json
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from fake_executor import FakeExecutor, FakeSequence, LetterTokenizer, drive, saying

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.completion import Completion, Piece
from pyengine.errors import ArgumentError, ArgumentTypeError
from pyengine.executor import Executor, Rows
from pyengine.generation import Generation, Job
from pyengine.kv import PAGE, Sequence
from pyengine.params import SamplingParams
from pyengine.prefix import digests
from pyengine.sampling import Sampler
from pyengine.scheduler import DRAFT_ROWS, Scheduler
from pyengine.speculation import DraftModel, PromptLookup, Proposer, Speculation, shared, worth

CONTEXT = 3 * PAGE + 8


class Scripted(Proposer):
    """Guesses the text that is known to come, each token of it rightly with probability `right`."""

    def __init__(self, expected: list[int], right: float, rng: np.random.Generator) -> None:
        self.expected, self.right, self.rng = expected, right, rng
        self.told: list[tuple[int, int]] = []

    def propose(self, generated: array[int], n: int, n_row: int = 1) -> list[int]:
        assert n > 0 and generated.tolist() == self.expected[: len(generated)]
        n = int(self.rng.integers(1, n + 1)) if self.right < 1 else n
        coming = [*self.expected[len(generated) :], *[0] * n][:n]
        return [token_id if self.rng.random() < self.right else token_id ^ 1 for token_id in coming]

    def observe(self, n_proposed: int, n_accepted: int) -> None:
        self.told.append((n_proposed, n_accepted))

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Script(Speculation):
    """Speculation that knows what comes: `texts`, by sample."""

    num_tokens: int = 8
    row_cost: float = 0.0
    texts: list[list[int]] = field(default_factory=list)
    right: float = 0.5
    seed: int = 0

    def proposer(self, prompt_ids: Any, sampler: Sampler) -> Proposer:
        rng = np.random.default_rng([self.seed, len(prompt_ids), sampler.sample_index])
        return Scripted(self.texts[sampler.sample_index], self.right, rng)


def ids(*token_ids: int) -> Any:
    return np.array(token_ids, np.int32)


def run(
    executor: Any, jobs: list[Job], max_batch: int | None = None, step_tokens: int | None = None
) -> tuple[list[list[Completion]], list[list[Piece]]]:
    """The completions of jobs that run as one batch, and the pieces that were streamed of each."""
    tasks = [Generation(executor, job) for job in jobs]
    pieces: list[list[Piece]] = [[] for _ in tasks]
    for task, into in zip(tasks, pieces, strict=True):
        task.on_piece = into.append
    drive(executor, tasks, max_batch, step_tokens)
    return [task.completions() for task in tasks], pieces


def essence(completion: Completion) -> Any:
    """All that has to be the same."""
    return completion.text, completion.token_ids, completion.finish_reason, completion.logprobs


def guessing(job: Job, completions: list[Completion], right: float) -> Job:
    """The job, with guesses of what came of it."""
    script = Script(texts=[one.token_ids for one in completions], right=right)
    return replace(job, speculation=script)


def check_same(new: Callable[[], Any], jobs: list[Job], max_batch: int | None = None) -> None:
    """Runs jobs without guesses and with: right, wrong and mixed ones, alone and as a batch."""
    plain, plain_pieces = run(new(), jobs, max_batch)
    n_plain = sum(len(one.token_ids) for many in plain for one in many)
    for right in (1.0, 0.8, 0.3, 0.0):
        executor = new()
        guessed, pieces = run(executor, [guessing(*one, right) for one in zip(jobs, plain, strict=True)], max_batch)
        assert [list(map(essence, many)) for many in guessed] == [list(map(essence, many)) for many in plain]
        assert pieces == plain_pieces
        usage = [one.usage for many in guessed for one in many]
        n_proposed, n_accepted = (sum(getattr(u, f"{k}_tokens") for u in usage) for k in ("proposed", "accepted"))
        assert n_accepted <= n_proposed and (right > 0 or n_accepted == 0)
        assert n_plain < 20 or (n_proposed > n_plain / 4 and n_accepted > n_plain * right / 8 - 1)
        assert open_sequences(executor) == 0


def open_sequences(executor: Any) -> int:
    return executor.n_open if isinstance(executor, FakeExecutor) else executor.pool.n_used


PROMPTS = [[3], list(range(1, 40)), [7, 7, 7], [49, 0], list(range(20))]
ARGUMENTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 3},
    {"seed": 3, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.1},
    {"seed": 4, "top_k": 5, "logprobs": 3, "logit_bias": {4: 2.0}},
    {"seed": 5, "num_return_sequences": 3},
    {"seed": 6, "max_new_tokens": 1000},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("together", [False, True])
def test_same_text_on_the_fake_executor(arguments: dict[str, Any], together: bool) -> None:
    jobs = [Job(ids(*one), SamplingParams(**{"max_new_tokens": 25} | arguments), frozenset([9])) for one in PROMPTS]
    for part in [jobs[:3]] if together else [[job] for job in jobs]:
        check_same(FakeExecutor, part)


def test_control(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong guess that stays in the sequence is seen: what comes after it is another text."""
    settle = FakeSequence.settle
    monkeypatch.setattr(FakeSequence, "settle", lambda self, n: settle(self, min(n + 1, self.length)))
    job = Job(ids(3), SamplingParams(seed=1, max_new_tokens=20))
    [plain], _ = run(FakeExecutor(), [job])
    with pytest.raises(AssertionError):
        run(FakeExecutor(), [guessing(job, plain, 0.5)])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("one STOP two STOP three", {"stop": "STOP"}),
        ("one STOP two STOP three", {"stop": ["two", "e ST"]}),
        ("abcdefghij\x04klmnop", {}),
        ("größe a🦙b größe", {"max_new_tokens": 9}),
        ("größe a🦙b größe", {"stop": "🦙"}),
        ("abcSTO", {"stop": "STOP", "max_new_tokens": 6}),
    ],
)
def test_what_ends_a_text_cuts_guesses(text: str, arguments: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 0, "max_new_tokens": 40} | arguments)
    check_same(lambda: saying(text), [Job(ids(65), params, frozenset([4]), LetterTokenizer())])


def test_right_guesses_save_steps_and_end_where_the_text_does() -> None:
    for n_prompt, n_new, n_context in ((5, 21, 64), (5, 100, 64), (63, 9, 64), (64, 9, 64), (5, 10, 14), (5, 2, 64)):
        job = Job(ids(*range(n_prompt % 50), *[1] * (n_prompt - n_prompt % 50)), SamplingParams(max_new_tokens=n_new))
        job = Job(job.prompt_ids, SamplingParams(max_new_tokens=n_new, temperature=0))
        [plain], _ = run(FakeExecutor(max_seq_len=n_context, max_rows=64), [job])
        executor = FakeExecutor(max_seq_len=n_context, max_rows=64)
        [guessed], _ = run(executor, [guessing(job, plain, 1.0)])
        assert essence(guessed[0]) == essence(plain[0])
        n = len(plain[0].token_ids)
        assert n == min(n_new, n_context - n_prompt + 1)
        assert len(executor.steps) == 1 + -(-(n - 1) // DRAFT_ROWS)
        usage = guessed[0].usage
        assert usage.proposed_tokens == usage.accepted_tokens == n - len(executor.steps)  # none beyond the end


def test_guesses_take_what_others_leave() -> None:
    """Rows for sequences and prompts first; with a dozen of them nothing is guessed."""
    params = SamplingParams(temperature=0, max_new_tokens=12)
    jobs = [Job(ids(i), params) for i in range(5)]
    plain, _ = run(FakeExecutor(), jobs)
    for n, most in ((5, DRAFT_ROWS), (3, 4), (4, 4)):
        executor = FakeExecutor()
        part = [guessing(*one, 1.0) for one in zip(jobs[:n], plain, strict=False)]
        guessed, _ = run(executor, part, step_tokens=None if most == DRAFT_ROWS else most)
        assert [many[0].token_ids for many in guessed] == [many[0].token_ids for many in plain[:n]]
        assert max(map(sum, executor.steps)) == most and all(len(step) <= n for step in executor.steps)
    many = [Job(ids(i), params) for i in range(DRAFT_ROWS)]
    plain, _ = run(FakeExecutor(), many)
    executor = FakeExecutor()
    guessed, _ = run(executor, [guessing(*one, 1.0) for one in zip(many, plain, strict=True)])
    assert all(one.usage.proposed_tokens == 0 for [one] in guessed)
    # A long prompt comes in: while it runs, in pieces of the whole budget, nothing is guessed.
    executor = FakeExecutor(max_seq_len=100)
    long = Job(ids(*[1] * 90), SamplingParams(temperature=0, max_new_tokens=1))
    run(executor, [guessing(jobs[0], plain[0], 1.0), long])
    assert executor.steps[0][0] == 1 and all(sum(step) == 16 for step in executor.steps[:6])
    assert all(step[0] == 1 for step in executor.steps[:6])


def test_a_proposer_that_fails_ends_its_text_alone() -> None:
    class Failing(Script):
        def proposer(self, prompt_ids: Any, sampler: Sampler) -> Proposer:
            return Scripted([-1], 1.0, np.random.default_rng(0))  # which is not how the text begins

    executor: Any = FakeExecutor()
    params = SamplingParams(temperature=0, max_new_tokens=5)
    jobs = [Job(ids(1), params, speculation=Failing()), Job(ids(2), params)]
    tasks = [Generation(executor, job) for job in jobs]
    with pytest.raises(AssertionError):
        drive(executor, tasks)
    assert tasks[1].error is None and len(tasks[1].completions()[0].token_ids) == 5
    assert executor.n_open == 0


# With the real executor.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"n_embd": 48, "n_head": 3, "n_layer": 2, "n_positions": CONTEXT, "vocab_size": 300}
    return write_checkpoint(tmp_path_factory.mktemp("target"), config)


@pytest.fixture(params=["float32", "int8"])
def model(request: pytest.FixtureRequest, folder: Path) -> pyengine.Model:
    return pyengine.load(folder, dtype=request.param, threads=2)


def prompts(n: int) -> list[Any]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 300, length).astype(np.int32) for length in (1, 60, 130, 7, 64)[:n]]


@pytest.mark.parametrize("arguments", ARGUMENTS[:5], ids=str)
def test_same_bits_with_a_model(model: pyengine.Model, arguments: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_new_tokens": 60} | arguments)
    jobs = [Job(prompt, params, frozenset([9]), model.tokenizer) for prompt in prompts(5)]

    def new() -> Executor:
        return model.executor

    check_same(new, jobs[:3])
    check_same(new, jobs[4:])


def held_by_cache(executor: Executor) -> set[bytes]:
    assert executor.pool.cache
    return set(executor.pool.cache.pages)


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets all full pages into the cache at once, guesses or not."""
    extend = Sequence.extend
    monkeypatch.setattr(Sequence, "extend", lambda self, token_ids, n_draft=0: extend(self, token_ids))


@pytest.mark.parametrize("spoiled", [False, True])
def test_the_prefix_cache_never_has_guesses(
    model: pyengine.Model, folder: Path, monkeypatch: pytest.MonkeyPatch, spoiled: bool
) -> None:
    executor = model.executor
    if spoiled:
        spoil(monkeypatch)
    job = Job(prompts(2)[1], SamplingParams(seed=2, max_new_tokens=1000))  # to the end of the context
    [plain], _ = run(executor, [job])
    text = np.concatenate([job.prompt_ids, ids(*plain[0].token_ids)])
    expected = set(digests(text[:CONTEXT], PAGE))
    assert len(expected) == 3 and held_by_cache(executor) == expected
    clean = True
    for seed in range(20 if spoiled else 4):
        executor.pool.cache.clear()  # type: ignore[union-attr]
        script = Script(texts=[plain[0].token_ids], right=0.85, seed=seed)
        [guessed], _ = run(executor, [Job(job.prompt_ids, job.params, speculation=script)])
        assert guessed[0].token_ids == plain[0].token_ids
        assert 0 < guessed[0].usage.accepted_tokens < guessed[0].usage.proposed_tokens
        clean = clean and held_by_cache(executor) == expected
        # Whoever starts the same gets these pages, and from them the bits of a model that never guessed.
        fresh = pyengine.load(folder, dtype=model.dtype, threads=1, prefix_cache=False)  # type: ignore[arg-type]
        sequence, other = executor.new_sequence(), fresh.executor.new_sequence()
        n = sequence.reuse(text[:CONTEXT])
        assert n == 3 * PAGE
        logits = executor.step([Rows(sequence, text[n:CONTEXT], CONTEXT - n)])
        assert logits.tobytes() == fresh.executor.step([Rows(other, text[:CONTEXT], CONTEXT - n)]).tobytes()
        sequence.close()
    assert clean != spoiled
    assert executor.pool.n_used == 0


def test_guesses_never_make_others_pause(folder: Path) -> None:
    """In a pool that is just large enough guesses take no page beyond it, and none is refused to others."""
    model = pyengine.load(folder, dtype="float32", threads=1)
    layout, n_pages = model.executor.pool.layout, 4
    jobs = [Job(ids(*[i] * 55), SamplingParams(temperature=0, max_new_tokens=2 * PAGE - 55 + 1)) for i in (1, 2)]
    plain, _ = run(model.executor, jobs)
    tight = pyengine.load(folder, dtype="float32", threads=1, kv_memory=n_pages * layout.page_nbytes)
    scheduler = Scheduler(tight.executor)
    tasks = [Generation(tight.executor, guessing(*one, 1.0)) for one in zip(jobs, plain, strict=True)]
    for task in tasks:
        scheduler.add(task)
    while scheduler.busy:
        scheduler.step()
        assert tight.executor.pool.n_used <= n_pages
    assert [essence(task.completions()[0]) for task in tasks] == [essence(one) for [one] in plain]
    assert scheduler.n_paused == 0 and tight.executor.pool.n_used == 0
    # With a page less the younger one has to wait, as without guesses; the older one goes on guessing.
    tight.executor.pool.capacity = n_pages - 1
    tight.executor.pool.cache.clear()  # type: ignore[union-attr]
    tasks = [Generation(tight.executor, guessing(*one, 1.0)) for one in zip(jobs, plain, strict=True)]
    for task in tasks:
        scheduler.add(task)
    while scheduler.busy:
        scheduler.step()
        assert tight.executor.pool.n_used <= n_pages - 1
    assert [essence(task.completions()[0]) for task in tasks] == [essence(one) for [one] in plain]
    assert scheduler.n_paused <= 1 and tight.executor.pool.n_used == 0


# When and what is guessed.


def test_worth_is_the_best_number_of_guesses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        p, cost, n = rng.random(), 0.3 * rng.random(), int(rng.integers(1, 12))
        gain = [1.05, *(sum(p**i for i in range(k + 1)) / (1 + k * cost) for k in range(1, n + 1))]
        assert worth([p], 0, cost, n) == int(np.argmax(gain))
    assert worth([0.0, 1.0, 0.5], 1, 0.0, 5) == 5
    assert worth([0.0, 1.0, 0.0], 1, 0.0, 5) == 1


def test_worth_of_a_guess_beside_other_texts() -> None:
    """Guess while that brings more tokens of all texts for the time: n rows cost 1 + (n - 1) row_cost."""
    for n_row, row_cost, p in itertools.product((1, 2, 5, 11), (0.02, 0.1, 0.3), (0.3, 0.6, 0.9, 0.99)):
        pace = n_row / (1 + (n_row - 1) * row_cost)
        with_one = (n_row + p) / (1 + n_row * row_cost)
        if not 1 < with_one / pace < 1.06:  # the margin is taken of one text
            assert bool(worth([p], 0, shared(row_cost, row_cost, n_row), 1)) == (with_one > pace) or n_row > 1
        if with_one < pace:
            assert worth([p], 0, shared(row_cost, row_cost, n_row), 8) == 0


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
def test_prompt_lookup_changes_no_bit(model: pyengine.Model, arguments: dict[str, Any]) -> None:
    prompt = REPETITIVE[:100]
    arguments = {"max_new_tokens": 90, "ignore_eos": True} | arguments
    plain, guessed = (model.generate(prompt, **arguments, prompt_lookup_num_tokens=n) for n in (None, 10))
    for a, b in zip(*(one if isinstance(one, list) else [one] for one in (plain, guessed)), strict=True):
        assert essence(a) == essence(b)
        assert a.usage.proposed_tokens == 0
    assert model.stats.kv_pages_used == 0
    pieces = list(model.stream(prompt, **(arguments | {"num_return_sequences": 1}), prompt_lookup_num_tokens=10))
    assert [piece.token_id for piece in pieces] == (plain[0] if isinstance(plain, list) else plain).token_ids


def test_prompt_lookup_pays_where_the_text_repeats_itself(model: pyengine.Model) -> None:
    biased = {"logit_bias": {token_id: 1e6 for token_id in (5,)}, "temperature": 0, "max_new_tokens": 60}
    before = model.stats.steps
    completion = model.generate([1, 2, 3], **biased, prompt_lookup_num_tokens=10)
    assert completion.token_ids == [5] * 60
    assert completion.usage.accepted_tokens > 40
    assert model.stats.steps - before == 60 - completion.usage.accepted_tokens


# A draft model.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"n_embd": 16, "n_head": 1, "n_layer": 1, "n_positions": 150, "vocab_size": 300}
    return write_checkpoint(tmp_path_factory.mktemp("draft"), config, seed=3)


def make_cheap(model: pyengine.Model) -> None:
    """Makes believe that its guesses cost nothing: a twin's would never pay."""
    model.__dict__["cost"] = replace(model.cost, step_seconds=0.0)


@pytest.mark.parametrize("arguments", ARGUMENTS[:5], ids=str)
@pytest.mark.parametrize("twin", [True, False])
def test_a_draft_model_changes_no_bit(
    model: pyengine.Model, folder: Path, small: Path, arguments: dict[str, Any], twin: bool
) -> None:
    assistant = pyengine.load(folder if twin else small, dtype=model.dtype, threads=1)  # type: ignore[arg-type]
    make_cheap(assistant)
    arguments = {"max_new_tokens": 50, "ignore_eos": True} | arguments
    for prompt in prompts(3):
        plain, guessed = (model.generate(prompt.tolist(), **arguments, assistant_model=a) for a in (None, assistant))
        for a, b in zip(*(one if isinstance(one, list) else [one] for one in (plain, guessed)), strict=True):
            assert essence(a) == essence(b)
            if twin:
                assert b.usage.accepted_tokens == b.usage.proposed_tokens > 25
    together = [prompt.tolist() for prompt in prompts(5)]
    if "num_return_sequences" not in arguments:
        plain, guessed = (model.generate(together, **arguments, assistant_model=a) for a in (None, assistant))
        assert list(map(essence, plain)) == list(map(essence, guessed))
    assert model.stats.kv_pages_used == assistant.stats.kv_pages_used == 0


def test_a_draft_model_pauses_longer_and_longer(folder: Path, small: Path) -> None:
    other = pyengine.load(small, dtype="float32", threads=1).executor
    sampler = Sampler(SamplingParams(temperature=0), Workspace(300), ids(1))
    draft = DraftModel(Speculation(8, 0.1, other, 0.1), other, ids(1), sampler)
    generated = array("i", [1])
    at = []
    while len(generated) < 140:
        guesses = draft.propose(generated, 8)
        assert draft.propose(generated, 8) in (guesses, [])
        if guesses:
            at.append(len(generated))
            draft.observe(len(guesses), 0)
        generated.append(299 if not guesses else (guesses[0] + 1) % 300)
    gaps = np.diff(at)
    assert gaps.tolist() == sorted(gaps) and gaps[-1] >= 32 and len(at) < 40
    draft.close()
    assert other.pool.n_used == 0


def test_a_draft_model_without_room_guesses_nothing(model: pyengine.Model, folder: Path) -> None:
    n_proposed = []
    plain = model.generate([1, 2, 3], seed=1, max_new_tokens=120, ignore_eos=True)
    for capacity in (1, 2):
        assistant = pyengine.load(folder, dtype="float32", threads=1)
        assistant.executor.pool.capacity = capacity
        make_cheap(assistant)
        guessed = model.generate([1, 2, 3], seed=1, max_new_tokens=120, ignore_eos=True, assistant_model=assistant)
        assert essence(plain) == essence(guessed)
        n_proposed.append(guessed.usage.proposed_tokens)
        assert assistant.executor.pool.n_used == 0 and assistant.executor.pool.n_made <= capacity
    assert 30 < n_proposed[0] < n_proposed[1]


def test_the_prefix_cache_of_a_draft_model_has_no_guesses(model: pyengine.Model, small: Path) -> None:
    assistant = pyengine.load(small, dtype="float32", threads=1)
    make_cheap(assistant)
    [prompt] = prompts(1)
    arguments: dict[str, Any] = {"temperature": 0.3, "seed": 1, "max_new_tokens": 140, "ignore_eos": True}
    completion = model.generate(prompt.tolist(), **arguments, assistant_model=assistant)
    text = np.concatenate([prompt, ids(*completion.token_ids)])
    assert completion.usage.accepted_tokens < completion.usage.proposed_tokens
    assert held_by_cache(assistant.executor) <= set(digests(text, PAGE))


def test_forks_while_a_draft_model_runs(folder: Path, small: Path) -> None:
    """A fork waits for the step of the one model, which takes pages of the other."""
    assistant = pyengine.load(small, dtype="float32", threads=1)  # the older one, whose locks a fork takes first
    model = pyengine.load(folder, dtype="float32", threads=1)
    make_cheap(assistant)
    requests = [model.submit([i], assistant, seed=i, max_new_tokens=140, ignore_eos=True) for i in range(1, 9)]
    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    for i, request in enumerate(requests, 1):
        assert request.result().token_ids == model.generate([i], seed=i, max_new_tokens=140, ignore_eos=True).token_ids


# What can't be asked for.


def test_arguments(model: pyengine.Model, folder: Path, small: Path, tmp_path: Path) -> None:
    for value, message in ((0, "expected 1 to"), (1.5, "expected an integer, got 1.5"), (True, "expected an integer")):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"prompt_lookup_num_tokens: {message}"):
            SamplingParams(prompt_lookup_num_tokens=value)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens: expected None or unset with num_beams=2"):
        model.generate([1], num_beams=2, prompt_lookup_num_tokens=4)
    assistant = pyengine.load(small, threads=1)
    for name, value in (("num_beams", 2), ("prompt_lookup_num_tokens", 3)):
        with pytest.raises(ArgumentError, match=f"assistant_model: expected none with {name}={value}"):
            model.generate([1], assistant_model=assistant, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"assistant_model: expected a pyengine.Model, got 'demo'"):
        model.submit([1], assistant_model="demo")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="assistant_model: expected another model"):
        model.stream([1], assistant_model=model)
    with pytest.raises(ArgumentError, match=r"assistant_model: expected a vocabulary of 300 tokens .*, got 4096"):
        model.generate([1], assistant_model=pyengine.load("demo", threads=1))
    other = write_checkpoint(tmp_path / "other", {"vocab_size": 300})
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArgumentError, match="assistant_model: expected the same vocabulary"):
        model.generate([1], assistant_model=pyengine.load(other, threads=1))

"""Guesses are verified: the same tokens, to the last bit of their log-probabilities, whatever is guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, FakeSequence, LetterTokenizer, drive, saying
from guesses import (
    ARGUMENTS,
    CONTEXT,
    PROMPTS,
    Script,
    Scripted,
    check_same,
    essence,
    guessing,
    held_by_cache,
    ids,
    prompts,
    run,
)

import pyengine
from pyengine.executor import Executor, Rows
from pyengine.generation import Generation, Job
from pyengine.kv import PAGE, Sequence
from pyengine.params import SamplingParams
from pyengine.prefix import digests
from pyengine.sampling import Sampler
from pyengine.scheduler import DRAFT_ROWS, Scheduler
from pyengine.speculation import Proposer


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


@pytest.mark.parametrize("arguments", ARGUMENTS[:5], ids=str)
def test_same_bits_with_a_model(target: pyengine.Model, arguments: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_new_tokens": 60} | arguments)
    jobs = [Job(prompt, params, frozenset([9]), target.tokenizer) for prompt in prompts(5)]

    def new() -> Executor:
        return target.executor

    check_same(new, jobs[:3])
    check_same(new, jobs[4:])


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets all full pages into the cache at once, guesses or not."""
    extend = Sequence.extend
    monkeypatch.setattr(Sequence, "extend", lambda self, token_ids, n_draft=0: extend(self, token_ids))


@pytest.mark.parametrize("spoiled", [False, True])
def test_the_prefix_cache_never_has_guesses(
    target: pyengine.Model, target_folder: Path, monkeypatch: pytest.MonkeyPatch, spoiled: bool
) -> None:
    executor = target.executor
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
        # Whoever starts the same gets these pages, and from them the bits of a target that never guessed.
        fresh = pyengine.load(target_folder, dtype=target.dtype, threads=1, prefix_cache=False)  # type: ignore[arg-type]
        sequence, other = executor.new_sequence(), fresh.executor.new_sequence()
        n = sequence.reuse(text[:CONTEXT])
        assert n == 3 * PAGE
        logits = executor.step([Rows(sequence, text[n:CONTEXT], CONTEXT - n)])
        assert logits.tobytes() == fresh.executor.step([Rows(other, text[:CONTEXT], CONTEXT - n)]).tobytes()
        sequence.close()
    assert clean != spoiled
    assert executor.pool.n_used == 0


def test_guesses_never_make_others_pause(target_folder: Path) -> None:
    """In a pool that is just large enough guesses take no page beyond it, and none is refused to others."""
    model = pyengine.load(target_folder, dtype="float32", threads=1)
    layout, n_pages = model.executor.pool.layout, 4
    jobs = [Job(ids(*[i] * 55), SamplingParams(temperature=0, max_new_tokens=2 * PAGE - 55 + 1)) for i in (1, 2)]
    plain, _ = run(model.executor, jobs)
    tight = pyengine.load(target_folder, dtype="float32", threads=1, kv_memory=n_pages * layout.page_nbytes)
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

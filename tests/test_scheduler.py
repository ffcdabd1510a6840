"""The scheduler: whose turn it is, who pauses; and the same bits for every request whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from fake_executor import FakeExecutor, drive

import pyengine
from pyengine import kv
from pyengine.beam import BeamGeneration
from pyengine.errors import ArgumentError, OutOfMemoryError
from pyengine.executor import Executor, Rows
from pyengine.generation import Generation, Job
from pyengine.kv import PAGE, KVPool, Sequence
from pyengine.params import SamplingParams
from pyengine.saved import load_state, save_state
from pyengine.scheduler import Scheduler, shares, stats
from pyengine.scoring import Logits, Scoring
from pyengine.speculation import Speculation
from pyengine.task import Task

N_SCHEDULE = 2500
CONTEXT = 3 * PAGE + 20
VOCAB = 97


def prompt(*token_ids: int) -> Any:
    return np.array(token_ids, np.int32)


def generation(executor: Any, token_ids: Any, **arguments: Any) -> Generation:
    params = SamplingParams(**{"temperature": 0, "max_new_tokens": 4} | arguments)
    return Generation(executor, Job(prompt(*token_ids), params))


def test_decoding_goes_before_prompts_and_prompts_in_order() -> None:
    executor: Any = FakeExecutor(max_rows=8)
    drive(executor, [generation(executor, range(n)) for n in (2, 10, 9)])
    # The first prompt and a piece of the second; then the first one's token, and prompts as far as there is room.
    assert executor.steps[:4] == [[2, 6], [1, 4, 3], [1, 1, 6], [1, 1, 1]]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    executor: Any = FakeExecutor(max_rows=16)
    drive(executor, [generation(executor, range(40)), generation(executor, [1, 2, 3])])
    assert executor.steps[:4] == [[13, 3], [1, 15], [1, 12], [1, 1]]


def test_prompts_in_pieces_keep_the_pace_of_others() -> None:
    executor: Any = FakeExecutor(max_rows=16)
    drive(executor, [generation(executor, [1]), generation(executor, range(40))], step_tokens=8)
    assert executor.steps[:4] == [[1, 15], [1, 7], [1, 7], [1, 7]]


def test_a_finished_request_makes_room_for_the_next() -> None:
    executor: Any = FakeExecutor()
    ended: list[int] = []
    tasks = [generation(executor, [i], max_new_tokens=n) for i, n in enumerate([1, 4, 1, 1])]
    for i, task in enumerate(tasks):
        task.on_end = lambda i=i: ended.append(i)  # type: ignore[misc]
    drive(executor, tasks, max_batch=2)
    assert ended == [0, 2, 3, 1]
    assert [len(step) for step in executor.steps] == [2, 2, 2, 1]


def test_shares() -> None:
    executor: Any = FakeExecutor()

    def granted(n: int, *lengths: int) -> list[int]:
        tasks = [generation(executor, [1] * length) for length in lengths]
        got = {id(task): share for task, share in shares(tasks, n)}
        return [got.get(id(task), 0) for task in tasks]

    assert granted(16, 40) == [16]
    assert granted(16, 5, 40) == [5, 11]
    assert granted(16, 40, 8, 1) == [8, 8, 0]
    assert granted(16, 40, 9, 1) == [15, 0, 1]
    assert granted(4, 40, 40, 40) == [4, 0, 0]
    assert granted(16, *[3] * 6) == [3, 3, 3, 3, 3, 1]


def test_cancelling_a_task_wherever_it_is() -> None:
    executor: Any = FakeExecutor()
    scheduler = Scheduler(executor, max_batch=2, step_tokens=16)
    tasks = [generation(executor, [i], max_new_tokens=30) for i in range(4)]
    for task in tasks:
        scheduler.add(task)
    scheduler.step()
    for task in (tasks[0], tasks[3], tasks[3]):
        scheduler.cancel(task)
    scheduler.step()
    assert (scheduler.live, list(scheduler.waiting)) == ([tasks[1], tasks[2]], [])
    assert [task.ended for task in tasks] == [True, False, False, True]
    scheduler.close()
    assert executor.n_open == 0 and not scheduler.busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": CONTEXT, "vocab_size": VOCAB}
    return write_checkpoint(tmp_path_factory.mktemp("scheduler"), config)


@pytest.fixture(scope="module", params=["float32", "int8"])
def executor(request: pytest.FixtureRequest, folder: Path) -> Executor:
    return pyengine.load(folder, dtype=request.param, threads=1).executor


def new_pool(executor: Executor, pages: int, prefix_cache: bool) -> KVPool:
    """Gives the executor an empty pool of another size."""
    executor.pool = KVPool(executor.plan, executor.pool.dtype, pages, prefix_cache)
    return executor.pool


class Wish:
    """A request that can be made again and again: what it is, and what it gives alone.

    Some go on from a state that was saved to a file in `folder`.
    """

    def __init__(self, executor: Executor, seed: int, folder: Path) -> None:
        rng = np.random.default_rng(seed)
        common = np.random.default_rng(seed % 3).integers(0, VOCAB, 2 * PAGE + 5).astype(np.int32)
        n_common, n_own = int(rng.choice([0, PAGE, PAGE + 7, 2 * PAGE])), int(rng.choice([1, 3, 20, 50]))
        self.token_ids = np.concatenate([common[:n_common], rng.integers(0, VOCAB, n_own).astype(np.int32)])
        self.kind = str(rng.choice(["sample", "sample", "samples", "beams", "score", "logits"]))
        params = SamplingParams(
            max_new_tokens=int(rng.choice([1, 5, 12, 70])),
            temperature=float(rng.choice([0.0, 1.0])) if self.kind == "sample" else 1.0,
            repetition_penalty=float(rng.choice([1.0, 1.2])),
            seed=None if self.kind == "beams" else seed,
            num_beams=3 if self.kind == "beams" else 1,
            num_beam_groups=3 if self.kind == "beams" and seed % 2 else 1,
            diversity_penalty=0.5 if self.kind == "beams" and seed % 2 else 0.0,
            num_return_sequences=3 if self.kind in ("samples", "beams") else 1,
        )
        self.job = Job(self.token_ids, params, frozenset([5]))
        self.guessing = Speculation(6, 0.0) if self.kind.startswith("sample") and seed % 3 == 0 else None
        new_pool(executor, 1000, prefix_cache=False)
        self.alone = self.result(executor, self.run_alone(executor))
        self.file = folder / f"{seed}.safetensors" if self.kind == "sample" and seed % 3 == 1 else None
        if self.file and len(self.token_ids) > 1:
            sequence = executor.new_sequence()
            logits = executor.step([Rows(sequence, self.token_ids[:-1])])[0]
            save_state(self.file, executor, "any", sequence, logits, None)

    def restored(self, executor: Executor) -> Sequence | None:
        """What was saved, if there is room for it."""
        try:
            return load_state(self.file, executor, "any")[0] if self.file and self.file.exists() else None
        except OutOfMemoryError:
            return None

    def task(self, executor: Executor) -> Task:
        if self.kind == "score":
            return Scoring(executor, self.token_ids)
        if self.kind == "logits":
            return Logits(executor, self.token_ids)
        if self.kind == "beams":
            return BeamGeneration(executor, self.job)
        guessing = self.guessing if executor.pool.cache else None  # not alone
        sequence = self.restored(executor) if executor.pool.cache else None
        return Generation(executor, replace(self.job, speculation=guessing), sequence=sequence)

    def run_alone(self, executor: Executor) -> Task:
        task = self.task(executor)
        drive(executor, [task])
        return task

    @staticmethod
    def result(executor: Executor, task: Task) -> bytes:
        """All that came out of it, to the last bit."""
        if isinstance(task, Logits):
            return task.logits.tobytes()
        if isinstance(task, Scoring):
            return task.logprobs.tobytes()
        assert isinstance(task, Generation | BeamGeneration)
        parts = []
        for completion in task.completions():
            parts.append(np.array(completion.token_ids, np.int32).tobytes())
            parts.append(np.array([token.logprob for token in completion.logprobs]).tobytes())
        return b"|".join(parts)


@pytest.fixture(scope="module")
def wishes(executor: Executor, tmp_path_factory: pytest.TempPathFactory) -> list[Wish]:
    folder = tmp_path_factory.mktemp("states")
    return [Wish(executor, seed, folder) for seed in range(60)]


def schedule(executor: Executor, wishes: list[Wish], rng: np.random.Generator) -> tuple[list[str], int]:
    """Requests that arrive and are cancelled at random, in a pool that may be too small for all of them at once.

    Returns what differed from the same request alone, and how often one paused.
    """
    pool = new_pool(executor, int(rng.choice([9, 9, 10, 14, 1000])), prefix_cache=bool(rng.random() < 0.7))
    scheduler = Scheduler(executor, int(rng.choice([1, 4, 16, 64])), int(rng.choice([1, 16, 100, 512])))
    chosen = [wishes[i] for i in rng.integers(0, len(wishes), int(rng.integers(2, 14)))]
    tasks = [wish.task(executor) for wish in chosen]
    arriving = list(zip(chosen, tasks, strict=True))
    cancelled: set[int] = set()
    while arriving or scheduler.busy:
        while arriving and (not scheduler.busy or rng.random() < 0.3):
            _, task = arriving.pop(0)
            scheduler.check(task)
            scheduler.add(task)
        if rng.random() < 0.01:
            victim = tasks[int(rng.integers(len(tasks)))]
            if not victim.ended and victim in [*scheduler.live, *scheduler.waiting]:
                cancelled.add(id(victim))
                scheduler.cancel(victim)
        scheduler.step()
    differ = [
        wish.kind
        for wish, task in zip(chosen, tasks, strict=True)
        if id(task) not in cancelled and (task.error or wish.result(executor, task) != wish.alone)
    ]
    assert pool.n_used == 0
    if pool.cache:
        pool.cache.clear()
    assert pool.n_made == len(pool.free)
    return differ, scheduler.n_paused


def test_the_same_bits_in_thousands_of_schedules(executor: Executor, wishes: list[Wish]) -> None:
    """Alone; among others that join and leave; with and without the prefix cache; paused and computed again; from a
    state that was saved; with guesses.
    """
    rng = np.random.default_rng(7)
    n_paused = n_reused = 0
    for number in range(N_SCHEDULE // 2):
        differ, paused = schedule(executor, wishes, rng)
        assert differ == [], f"schedule {number}"
        n_paused += paused
        n_reused += executor.pool.cache.counters.reused_tokens if executor.pool.cache else 0
    assert n_paused > 100 and n_reused > 10_000  # they did pause, and the cache was of use


def test_the_comparison_can_fail(executor: Executor, wishes: list[Wish], monkeypatch: pytest.MonkeyPatch) -> None:
    """With keys that say nothing of the tokens, the prefix cache gives one request the pages of another."""

    def keys(token_ids: Any, page: int, before: bytes = b"") -> Iterator[bytes]:
        for _ in range(len(token_ids) // page):
            before += b"x"
            yield before

    monkeypatch.setattr(kv, "digests", keys)
    rng = np.random.default_rng(7)
    assert any(schedule(executor, wishes, rng)[0] for _ in range(20))


def test_a_request_that_could_never_fit_is_refused_with_the_numbers(folder: Path) -> None:
    page = pyengine.load(folder, threads=1).stats.kv_page_bytes
    model = pyengine.load(folder, threads=1, kv_memory=2 * page)
    with pytest.raises(ArgumentError, match=r"kv_memory: expected room for 4 pages of 64 positions.*, got room for 2"):
        model.generate([1] * 150, max_new_tokens=50)
    assert len(model.generate([1] * 100, max_new_tokens=28, ignore_eos=True).token_ids) == 28
    with pytest.raises(ArgumentError, match=rf"kv_memory: expected at least {page:,} bytes \(64 positions\), got 10"):
        pyengine.load(folder, threads=1, kv_memory=10)
    with pytest.raises(pyengine.ArgumentTypeError, match="kv_memory: expected a number of bytes, got '1G'"):
        pyengine.load(folder, threads=1, kv_memory="1G")  # type: ignore[arg-type]


def test_the_prefix_cache_is_used_and_bounded(folder: Path) -> None:
    page = pyengine.load(folder, threads=1).stats.kv_page_bytes
    model = pyengine.load(folder, threads=1, kv_memory=6 * page)
    ids = [i % VOCAB for i in range(2 * PAGE + 9)]
    first = model.logits(ids)
    assert model.stats.kv_pages_cached == 2
    assert model.generate(ids, max_new_tokens=1, temperature=0).token_ids == [int(first[-1].argmax())]
    assert (model.stats.prompt_tokens, model.stats.reused_tokens) == (len(ids), 2 * PAGE)
    model.generate(ids[: 2 * PAGE], max_new_tokens=1)  # the last token has to run: only the first page is of use
    assert model.stats.reused_tokens == 3 * PAGE
    for i in range(10):
        model.generate([i, *ids], max_new_tokens=1)
    assert model.stats.kv_pages_cached <= 6 and model.stats.evicted_pages >= 14
    assert model.stats.kv_pages_used == 0
    assert pyengine.load(folder, threads=1, prefix_cache=False).stats.reused_tokens == 0


def test_stats_of_what_runs() -> None:
    executor: Any = FakeExecutor()
    executor.pool = KVPool(_plan(), "float32", 40)
    scheduler = Scheduler(executor, 2, 8)
    for i in range(3):
        scheduler.add(generation(executor, [i]))
    scheduler.step()
    now = stats(scheduler)
    assert (now.running, now.waiting, now.steps, now.kv_pages) == (2, 1, 1, 40)
    scheduler.close()


def _plan() -> Any:
    from checkpoints import CONFIG

    from pyengine.architectures import gpt2

    return gpt2.plan(CONFIG)

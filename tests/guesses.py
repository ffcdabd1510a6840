"""Guesses for tests: of texts that are known to come, rightly and wrongly; and whether anything changes by them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fake_executor import FakeExecutor, drive

from pyengine.completion import Completion, Piece
from pyengine.executor import Executor
from pyengine.generation import Generation, Job
from pyengine.kv import PAGE
from pyengine.sampling import Sampler
from pyengine.speculation import Proposer, Speculation

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


def prompts(n: int) -> list[Any]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 300, length).astype(np.int32) for length in (1, 60, 130, 7, 64)[:n]]


def held_by_cache(executor: Executor) -> set[bytes]:
    assert executor.pool.cache
    return set(executor.pool.cache.pages)

"""An executor without a model: logits from a table of random numbers for the last two tokens; and what drives it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from pyengine._native.drawing import uniform
from pyengine._native.logprobs import unusable
from pyengine._native.rows import draw_rows
from pyengine.beam import BeamGeneration
from pyengine.completion import Completion
from pyengine.executor import Rows
from pyengine.generation import Generation, Job
from pyengine.kv import UNLIMITED
from pyengine.sampling import Draw, Drawn
from pyengine.scheduler import Scheduler
from pyengine.task import Task


class FakePool:
    """Has room for everything."""

    capacity = n_available = UNLIMITED


class FakeSequence:
    """Keeps its tokens; the executor counts those that have any."""

    def __init__(self, executor: FakeExecutor, token_ids: SequenceOf[int] = ()) -> None:
        self.executor = executor
        self.token_ids = list(token_ids)
        executor.sequences.append(self)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def reserve(self, n: int, within: bool) -> None:
        pass

    def settle(self, n: int) -> None:
        assert n <= self.length
        del self.token_ids[n:]

    def reuse(self, token_ids: Any) -> int:
        assert not self.token_ids
        return 0

    def fork(self) -> FakeSequence:
        self.executor.n_fork += 1
        return FakeSequence(self.executor, self.token_ids)

    def close(self) -> None:
        self.token_ids.clear()


class FakeExecutor:
    """`logits_of` maps a token list to float [n, vocab_size], a row for each token; by default from the table."""

    def __init__(
        self,
        vocab_size: int = 50,
        max_seq_len: int = 64,
        max_rows: int = 16,
        logits_of: Callable[[list[int]], Any] | None = None,
    ) -> None:
        self.vocab_size, self.max_seq_len, self.max_rows = vocab_size, max_seq_len, max_rows
        self.table = 2.0 * np.random.default_rng(7).standard_normal((vocab_size + 1, vocab_size, vocab_size))
        self.logits_of = logits_of or self.from_table
        self.sequences: list[FakeSequence] = []
        self.n_fork = 0
        self.steps: list[list[int]] = []  # rows of each sequence in each step
        self.fail_at: int | None = None  # the step that raises `error`
        self.error: BaseException = KeyboardInterrupt()
        self.pool = FakePool()
        self.threads = 2

    def from_table(self, token_ids: list[int]) -> Any:
        return self.table[[self.vocab_size, *token_ids[:-1]], token_ids]

    @property
    def n_open(self) -> int:
        """Sequences that hold something."""
        return sum(sequence.length > 0 for sequence in self.sequences)

    def new_sequence(self) -> FakeSequence:
        return FakeSequence(self)

    def step(self, rows: SequenceOf[Rows]) -> Any:
        if self.fail_at == len(self.steps):
            raise self.error
        self.steps.append([len(r.token_ids) for r in rows])
        assert 1 <= sum(self.steps[-1]) <= self.max_rows
        assert len({id(r.sequence) for r in rows}) == len(rows)
        found = []
        for r in rows:
            sequence: Any = r.sequence
            assert r.token_ids.dtype == np.int32
            sequence.token_ids += r.token_ids.tolist()
            assert sequence.length <= self.max_seq_len
            found += list(self.logits_of(sequence.token_ids)[sequence.length - r.n_logits :])
        padded = np.empty((len(found), self.vocab_size + 3), np.float32)  # as the engine's: rows lie further apart
        padded[:, : self.vocab_size] = np.array(found).reshape(-1, self.vocab_size)
        return padded[:, : self.vocab_size]


    def decode(
        self, rows: SequenceOf[Rows], draws: SequenceOf[Draw], n: int, seconds: float, works: Any, urgent: Any
    ) -> Any:
        token_ids = [r.token_ids for r in rows]
        for i in range(n):
            logits = self.step([Rows(r.sequence, ids) for r, ids in zip(rows, token_ids, strict=True)])
            wishes: list[Any] = [(*d[:4], (uniform(d.seed, d.sample_index, d.position + i),)) for d in draws]
            found, totals, _ = draw_rows(works, list(logits), wishes)
            drawn = [
                Drawn(token_id, float(row[token_id]) - total, unusable(row) if token_id < 0 else None)
                for [token_id], row, total in zip(found, logits, totals, strict=True)
            ]
            yield drawn
            if urgent() or any(one.error or one.token_id in d.stop_ids for one, d in zip(drawn, draws, strict=True)):
                return
            token_ids = [np.array(one, np.int32) for one in found]


class LetterTokenizer:
    """Token ids are UTF-8 bytes, so that a character can span tokens."""

    def stream(self) -> LetterStream:
        return LetterStream()


class LetterStream:
    def __init__(self) -> None:
        self.bytes = b""

    def push(self, token_id: int) -> str:
        self.bytes += bytes([token_id])
        try:
            text = self.bytes.decode()
        except UnicodeDecodeError:
            return ""
        self.bytes = b""
        return text

    def flush(self) -> str:
        text, self.bytes = self.bytes.decode(errors="replace"), b""
        return text


def saying(text: str | bytes) -> FakeExecutor:
    """An executor that, token by token, says the bytes of `text` after a prompt of one token."""
    data = text.encode() if isinstance(text, str) else text

    def logits_of(token_ids: list[int]) -> Any:
        logits = np.zeros((len(token_ids), 256))
        for i in range(len(token_ids)):
            logits[i, data[i] if i < len(data) else 0] = 100.0
        return logits

    return FakeExecutor(256, 1000, logits_of=logits_of)


def drive(executor: Any, tasks: SequenceOf[Task], max_batch: int | None = None, step_tokens: int | None = None) -> None:
    """Runs tasks to their end; raises what one of them ended with."""
    scheduler = Scheduler(executor, min(max_batch or 32, executor.max_rows), step_tokens or executor.max_rows)
    try:
        for task in tasks:
            scheduler.check(task)
            scheduler.add(task)
        while scheduler.busy:
            scheduler.step()
    finally:
        scheduler.close()
    for task in tasks:
        if task.error:
            raise task.error


def complete(executor: Any, jobs: SequenceOf[Job], max_batch: int | None = None) -> list[list[Completion]]:
    """The completions of jobs that run as one batch; nothing stays open."""
    tasks = [(BeamGeneration if job.params.num_beams > 1 else Generation)(executor, job) for job in jobs]
    try:
        drive(executor, tasks, max_batch)
    finally:
        assert executor.n_open == 0
    return [task.completions() for task in tasks]

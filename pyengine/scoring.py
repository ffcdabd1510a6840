"""Scoring: the log-probability of a text, and the logits of every position."""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ._native.logprobs import token_logprobs
from .errors import ArgumentError, ArgumentTypeError
from .executor import Executor, Rows
from .generation import Ids, check_token_ids
from .kv import PAGE
from .task import Floats, Task

MOST_LOGITS = 64  # rows of logits that are wanted of one step


@dataclass(frozen=True)
class Score:
    """How probable a text is: the log-probability of each token given those before it. The first has none before it."""

    token_ids: list[int]  # n
    logprobs: NDArray[np.float64]  # [n - 1], of token_ids[1:]

    @property
    def total(self) -> float:
        """The log-probability of the text given its first token."""
        return float(self.logprobs.sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; NaN for a single token."""
        return math.exp(-self.logprobs.mean()) if len(self.logprobs) else math.nan


class Reading(Task):
    """A text that is read in one sequence; what its positions' logits are for is told by `take`.

    Logits are wanted from position `skip` on, a few dozen rows at a time.
    """

    def __init__(self, executor: Executor, token_ids: Ids, skip: int = 0) -> None:
        super().__init__()
        self.executor = executor
        self.token_ids = token_ids
        self.skip = skip
        self.sequence = executor.new_sequence()

    def start(self) -> None:
        pass

    @property
    def n_pending(self) -> int:
        return len(self.token_ids) - self.sequence.length

    @property
    def decoding(self) -> bool:
        return False

    @property
    def n_page_most(self) -> int:
        return -(-len(self.token_ids) // PAGE)

    def plan(self, n: int) -> list[Rows]:
        first = self.sequence.length
        n = min(n, self.skip - first) if first < self.skip else min(n, MOST_LOGITS)
        chunk = self.token_ids[first : first + n]
        return [Rows(self.sequence, chunk, 0 if first < self.skip else len(chunk))]

    def advance(self, rows: list[Rows], logits: Floats) -> None:
        if len(logits):
            self.take(self.sequence.length - len(logits), logits)

    def take(self, first: int, logits: Floats) -> None:
        """The logits of positions from `first` on, float32 [n, vocab_size]."""
        raise NotImplementedError

    @property
    def finished(self) -> bool:
        return self.n_pending == 0

    def pause(self) -> None:
        self.sequence.close()


class Logits(Reading):
    """The logits of every position, float32 [n, vocab_size], for at most max_seq_len tokens."""

    def __init__(self, executor: Executor, token_ids: SequenceOf[int] | Ids) -> None:
        ids = check_token_ids("token_ids", token_ids, executor.vocab_size)
        if not 1 <= len(ids) <= executor.max_seq_len:
            raise ArgumentError(f"token_ids: expected 1 to {executor.max_seq_len} tokens (the context), got {len(ids)}")
        super().__init__(executor, ids)
        self.logits = np.empty((len(ids), executor.vocab_size), np.float32)

    def take(self, first: int, logits: Floats) -> None:
        self.logits[first : first + len(logits)] = logits


class Scoring(Reading):
    """The log-probability of each token given those before it, never holding more than a few dozen rows of logits.

    A text longer than the context is read in windows of max_seq_len tokens, which start `stride` apart (default: half
    of max_seq_len). A token is scored in the first window that reaches it: with max_seq_len - stride tokens before it,
    or all that there are. A smaller stride gives a lower perplexity and takes longer.
    """

    def __init__(self, executor: Executor, token_ids: SequenceOf[int] | Ids, stride: int | None = None) -> None:
        ids = check_token_ids("token_ids", token_ids, executor.vocab_size)
        size = executor.max_seq_len
        stride = max(size // 2, 1) if stride is None else stride
        if isinstance(stride, bool) or not isinstance(stride, int):
            raise ArgumentTypeError(f"stride: expected an integer, got {stride!r}")
        if not 1 <= stride <= size:
            raise ArgumentError(f"stride: expected 1 to {size} (the context), got {stride}")
        if len(ids) == 0:
            raise ArgumentError("token_ids: expected at least 1, got none")
        self.text = ids
        self.stride = stride
        self.window = 0  # where the window starts that is read
        self.logprobs = np.empty(len(ids) - 1)
        self.n_scored = 0
        # The logits of position i are about token i + 1: the last token doesn't run.
        super().__init__(executor, ids[: min(size, len(ids) - 1)])

    def take(self, first: int, logits: Floats) -> None:
        n = len(logits)
        targets = self.text[self.window + first + 1 : self.window + first + 1 + n]
        self.logprobs[self.n_scored : self.n_scored + n] = token_logprobs(logits, targets)
        self.n_scored += n
        if super().finished and not self.finished:
            self.window += self.stride
            self.token_ids = self.text[self.window : min(self.window + self.executor.max_seq_len, len(self.logprobs))]
            self.skip = self.n_scored - self.window
            self.sequence.close()

    @property
    def finished(self) -> bool:
        return self.n_scored == len(self.logprobs)

    def pause(self) -> None:
        self.skip = self.n_scored - self.window  # what was scored needn't be again
        super().pause()

    def score(self) -> Score:
        """What was found."""
        return Score(self.text.tolist(), self.logprobs)

"""Generation: the loop that advances many requests as one batch; and scoring. It is all bookkeeping over `step`."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ._native.sampling import Workspace, token_logprobs
from .constraints import Constraint
from .errors import ArgumentError, ArgumentTypeError
from .executor import Executor, Rows
from .kv import Sequence
from .sampling import Sampler, SamplingParams, TokenLogprob

FinishReason = Literal["stop", "length"]

SCORE_ROWS = 64  # rows of logits that `score` and `logits` ask for in one step


class Detokenizer(Protocol):
    """Decodes one text token by token: what `Tokenizer.stream` returns."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class Detokenizes(Protocol):
    """What generation needs of a tokenizer."""

    def stream(self) -> Detokenizer: ...


@dataclass(frozen=True)
class Request:
    """A prompt and what to do with it."""

    prompt_ids: NDArray[np.int32]  # [n], n > 0
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()  # token ids that end the text: `SamplingParams.stop_ids`
    tokenizer: Detokenizes | None = None  # without one there is no text
    constraint: Constraint | None = None  # what the text must match, before its first token

    def check(self, executor: Executor) -> None:
        """Raises `ArgumentError` for what this executor can't do."""
        n = len(self.prompt_ids)
        if not 1 <= n <= executor.max_seq_len:
            raise ArgumentError(f"prompt: expected 1 to {executor.max_seq_len} tokens (the context), got {n}")
        check_token_ids("prompt", self.prompt_ids, executor.vocab_size)
        self.params.check_vocab(executor.vocab_size)
        if self.params.stop_strings and self.tokenizer is None:
            raise ArgumentError(f"stop: expected no strings without a tokenizer, got {self.params.stop!r}")

    def sampler(self, work: Workspace, sample_index: int = 0) -> Sampler:
        """What chooses the tokens of one of its samples."""
        return Sampler(self.params, work, self.prompt_ids, sample_index, self.constraint)


@dataclass(frozen=True)
class Piece:
    """What one step adds to a text: a token, and the text that is certain now (it may be empty).

    Text is held back while it could be half a character or the beginning of a stop string. The last piece has the
    `finish_reason`.
    """

    text: str
    token_id: int
    logprob: float
    top_logprobs: list[tuple[int, float]]  # (token_id, logprob), the most probable first
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Usage:
    """What a completion took. Seconds are of wall time, and shared with what else ran in the batch."""

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float  # seconds since the call, waiting for a place in the batch included
    prefill_seconds: float  # from the first chunk of the prompt to the first token
    decode_seconds: float  # from the first token to the last


@dataclass(frozen=True)
class Completion:
    """A generated text.

    A stop token is the last of `token_ids` but not in `text`; a stop string is not in `text` either, its tokens are in
    `token_ids`. `finish_reason` is "stop" for both, and where a constraint lets nothing follow; "length" where
    max_new_tokens or the context ended it.
    """

    text: str  # "" without a tokenizer
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob]  # one for each token
    usage: Usage
    score: float | None = None  # of a beam search: log-probability / length ** length_penalty


class StopMatcher:
    """Cuts a text, which comes in pieces, before the first of the stop strings."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.held = ""  # could be the beginning of a stop string
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain now; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self.held + text
        ends = [end for end in map(text.find, self.stops) if end >= 0]
        if ends:
            self.held, self.stopped = "", True
            return text[: min(ends)]
        n_held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """The text that was held back, as there is no more to come."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Sample:
    """One text on its way: its sequence, the tokens still to run, what makes tokens of logits and text of tokens."""

    def __init__(self, request: Request, index: int, sequence: Sequence, sampler: Sampler, called: float) -> None:
        self.request = request
        self.index = index  # of the request
        self.sequence = sequence
        self.sampler = sampler
        self.called = called  # a perf_counter, as the next three
        self.started = self.first_token = self.last_token = time.perf_counter()
        self.pending = request.prompt_ids  # token ids whose keys and values aren't stored yet
        self.detokenizer = request.tokenizer.stream() if request.tokenizer else None
        self.matcher = StopMatcher(request.params.stop_strings)
        self.pieces: list[Piece] = []

    def forks(self) -> Iterator[Sample]:
        """The other samples of its prompt, once that has run."""
        for i in range(1, self.request.params.num_return_sequences):
            sampler = self.request.sampler(self.sampler.work, i)
            fork = Sample(self.request, self.index, self.sequence.fork(), sampler, self.called)
            fork.started = self.started
            yield fork

    @property
    def finished(self) -> bool:
        """Whether it has its last token."""
        return bool(self.pieces) and self.pieces[-1].finish_reason is not None

    def rows(self, n: int) -> Rows:
        """The next n of the pending tokens; logits are wanted once they are the last."""
        return Rows(self.sequence, self.pending[:n], int(n == len(self.pending)))

    def advance(self, logits: NDArray[np.float32], max_seq_len: int) -> Piece:
        """Chooses the next token, given float32 [vocab_size]."""
        chosen = self.sampler.sample(logits)
        self.pending = np.array([chosen.token_id], np.int32)
        text = ""
        reason: FinishReason | None = None
        if chosen.token_id in self.request.stop_ids:
            reason = "stop"
        elif self.detokenizer:
            text = self.matcher.push(self.detokenizer.push(chosen.token_id))
        if self.sampler.adjustments.complete:
            reason = "stop"
        # A token that is the last needs no place in the context: it never runs.
        if len(self.pieces) + 1 == self.request.params.max_new_tokens or self.sequence.length == max_seq_len:
            reason = reason or "length"
        if reason and self.detokenizer:
            text += self.matcher.push(self.detokenizer.flush()) + self.matcher.flush()
        if self.matcher.stopped:
            reason = "stop"
        self.last_token = time.perf_counter()
        if not self.pieces:
            self.first_token = self.last_token
        piece = Piece(text, chosen.token_id, chosen.logprob, chosen.top, reason)
        self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """The finished text."""
        reason = self.pieces[-1].finish_reason
        assert reason is not None
        return Completion(
            text="".join(piece.text for piece in self.pieces),
            token_ids=[piece.token_id for piece in self.pieces],
            finish_reason=reason,
            logprobs=[TokenLogprob(piece.token_id, piece.logprob, piece.top_logprobs) for piece in self.pieces],
            usage=Usage(
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=len(self.pieces),
                time_to_first_token=self.first_token - self.called,
                prefill_seconds=self.first_token - self.started,
                decode_seconds=self.last_token - self.first_token,
            ),
        )


class Batch:
    """The samples that run together, and the requests that wait for a place among them."""

    def __init__(self, executor: Executor, requests: SequenceOf[Request], max_batch: int) -> None:
        self.executor = executor
        self.max_batch = max_batch
        self.called = time.perf_counter()
        self.work = Workspace(executor.vocab_size)
        self.waiting = deque(enumerate(requests))
        self.live: list[Sample] = []

    def admit(self) -> None:
        """Gives requests a place in the order they came; one with more samples than max_batch runs without others."""
        while self.waiting:
            n_live = sum(1 if sample.pieces else sample.request.params.num_return_sequences for sample in self.live)
            index, request = self.waiting[0]
            if n_live and n_live + request.params.num_return_sequences > self.max_batch:
                return
            self.waiting.popleft()
            sampler = request.sampler(self.work)
            self.live.append(Sample(request, index, self.executor.new_sequence(), sampler, self.called))

    def step(self) -> list[tuple[Sample, Piece]]:
        """Advances by one step: a row for each sample that decodes, then chunks of prompts as far as there is room."""
        n_left = self.executor.max_rows
        rows = []
        running = []
        for sample in sorted(self.live, key=lambda sample: not sample.pieces):
            n = min(len(sample.pending), n_left)
            if n:
                rows.append(sample.rows(n))
                running.append(sample)
                n_left -= n
        # Valid until the next step, which the caller could do: so all of it is used before anything is yielded.
        logits = iter(self.executor.step(rows))
        pieces = []
        for sample, chunk in zip(running, rows, strict=True):
            sample.pending = sample.pending[len(chunk.token_ids) :]
            if chunk.n_logits:
                row = next(logits)
                samples = [sample]
                if not sample.pieces:
                    for fork in sample.forks():
                        self.live.append(fork)
                        samples.append(fork)
                pieces += [(one, one.advance(row, self.executor.max_seq_len)) for one in samples]
        for sample in [sample for sample in self.live if sample.finished]:
            self.live.remove(sample)
            sample.sequence.close()
        return pieces

    def run(self) -> Iterator[tuple[Sample, Piece]]:
        """Steps until all requests are finished; gives back the memory of all sequences, whatever ends it."""
        try:
            while self.waiting or self.live:
                self.admit()
                yield from self.step()
        finally:
            for sample in self.live:
                sample.sequence.close()


def run(executor: Executor, requests: SequenceOf[Request], max_batch: int = 32) -> Iterator[tuple[Sample, Piece]]:
    """Generates for all requests as one batch of at most `max_batch` samples at a time; yields every token as it comes.

    What a request gives doesn't depend on the others. Raises `ArgumentError` at the call; and while it runs
    `NonFiniteError` for logits that can't be sampled from, or what `Executor.step` raises.
    """
    if max_batch < 1:
        raise ArgumentError(f"max_batch: expected at least 1, got {max_batch}")
    for request in requests:
        request.check(executor)
        if request.params.num_beams > 1:
            raise ArgumentError(f"num_beams: expected 1 for sampling, got {request.params.num_beams}")
    return Batch(executor, requests, max_batch).run()


def check_token_ids(name: str, token_ids: object, vocab_size: int) -> NDArray[np.int32]:
    """`token_ids` as int32 [n]; raises an error naming the argument for what isn't from 0 to vocab_size - 1."""
    array = np.array(token_ids, object)  # as they came: numpy would make integers of a bool among them
    if array.ndim != 1:
        raise ArgumentTypeError(f"{name}: expected a list of token ids, got {type(token_ids).__name__}")
    for i, token_id in enumerate(array):
        if isinstance(token_id, bool) or not isinstance(token_id, Integral):
            raise ArgumentTypeError(f"{name}: expected a list of token ids, got {token_id!r} at position {i}")
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if len(bad):
        raise ArgumentError(
            f"{name}: expected token ids from 0 to {vocab_size - 1}, got {array[bad[0]]} at position {bad[0]}"
        )
    return array.astype(np.int32)


def complete(executor: Executor, requests: SequenceOf[Request], max_batch: int = 32) -> list[list[Completion]]:
    """`run` to the end: for each request its num_return_sequences completions."""
    completions: list[list[Completion]] = [[] for _ in requests]
    finished: list[Sample] = [sample for sample, piece in run(executor, requests, max_batch) if piece.finish_reason]
    for sample in sorted(finished, key=lambda sample: sample.sampler.sample_index):
        completions[sample.index].append(sample.completion())
    return completions


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


def score(executor: Executor, token_ids: SequenceOf[int], stride: int | None = None) -> Score:
    """The log-probability of each token given those before it, never holding more than a few dozen rows of logits.

    A text longer than the context is read in windows of max_seq_len tokens, which start `stride` apart (default: half
    of max_seq_len). A token is scored in the first window that reaches it: with max_seq_len - stride tokens before it,
    or all that there are. A smaller stride gives a lower perplexity and takes longer.
    """
    ids = check_token_ids("token_ids", token_ids, executor.vocab_size)
    size = executor.max_seq_len
    stride = max(size // 2, 1) if stride is None else stride
    if isinstance(stride, bool) or not isinstance(stride, int):
        raise ArgumentTypeError(f"stride: expected an integer, got {stride!r}")
    if not 1 <= stride <= size:
        raise ArgumentError(f"stride: expected 1 to {size} (the context), got {stride}")
    if len(ids) == 0:
        raise ArgumentError("token_ids: expected at least 1, got none")
    logprobs = np.empty(len(ids) - 1)
    n_scored = 0
    for start in range(0, len(ids), stride):
        if n_scored == len(logprobs):
            break
        window = ids[start : min(start + size, len(logprobs))]  # the logits of position i are about token i + 1
        for first, logits in _chunks(executor, window, n_scored - start):
            n = len(logits)
            targets = ids[start + first + 1 : start + first + 1 + n]
            logprobs[n_scored : n_scored + n] = token_logprobs(logits, targets)
            n_scored += n
    return Score(ids.tolist(), logprobs)


def logits(executor: Executor, token_ids: SequenceOf[int]) -> NDArray[np.float32]:
    """The logits of every position, float32 [n, vocab_size], for at most max_seq_len tokens."""
    ids = check_token_ids("token_ids", token_ids, executor.vocab_size)
    if not 1 <= len(ids) <= executor.max_seq_len:
        raise ArgumentError(f"token_ids: expected 1 to {executor.max_seq_len} tokens (the context), got {len(ids)}")
    out = np.empty((len(ids), executor.vocab_size), np.float32)
    for first, rows in _chunks(executor, ids, 0):
        out[first : first + len(rows)] = rows
    return out


def _chunks(executor: Executor, token_ids: NDArray[np.int32], skip: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Runs a text; yields (first position, logits from there) chunk by chunk, but for the first `skip` positions."""
    sequence = executor.new_sequence()
    try:
        while (first := sequence.length) < len(token_ids):
            n = min(executor.max_rows, skip - first) if first < skip else min(executor.max_rows, SCORE_ROWS)
            chunk = token_ids[first : first + n]
            rows = executor.step([Rows(sequence, chunk, 0 if first < skip else len(chunk))])
            if first >= skip:
                yield first, rows
    finally:
        sequence.close()

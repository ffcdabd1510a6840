"""Generation: texts on their way. A `Generation` is a prompt and its samples, one task of the scheduler."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ._native.sampling import Workspace
from .completion import Completion, FinishReason, Piece, StopMatcher, Usage
from .constraints import Constraint
from .errors import ArgumentError, ArgumentTypeError, OutOfMemoryError
from .executor import Executor, Rows
from .kv import PAGE, NoPages, Sequence
from .params import SamplingParams
from .sampling import Draw, Drawn, Sampler, TokenLogprob
from .speculation import Speculation
from .task import Floats, Task
from .window import Window

Ids = NDArray[np.int32]


class Detokenizer(Protocol):
    """Decodes one text token by token: what `Tokenizer.stream` returns."""

    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


class Detokenizes(Protocol):
    """What generation needs of a tokenizer."""

    def stream(self) -> Detokenizer: ...


@dataclass(frozen=True)
class Job:
    """A prompt and what to do with it."""

    prompt_ids: Ids  # [n], n > 0
    params: SamplingParams
    stop_ids: frozenset[int] = frozenset()  # token ids that end the text: `SamplingParams.stop_ids`
    tokenizer: Detokenizes | None = None  # without one there is no text
    constraint: Constraint | None = None  # what the text must match, before its first token
    speculation: Speculation | None = None  # without one nothing is guessed ahead
    window: Window | None = None  # what the model sees of a text that has no end

    def check(self, executor: Executor) -> None:
        """Raises `ArgumentError` for what this executor can't do."""
        n = len(self.prompt_ids)
        if not 1 <= n <= executor.max_seq_len:
            raise ArgumentError(f"prompt: expected 1 to {executor.max_seq_len} tokens (the context), got {n}")
        check_token_ids("prompt", self.prompt_ids, executor.vocab_size)
        self.params.check_vocab(executor.vocab_size)
        if self.params.stop_strings and self.tokenizer is None:
            raise ArgumentError(f"stop: expected no strings without a tokenizer, got {self.params.stop!r}")
        if self.window and self.params.num_beams > 1:
            raise ArgumentError(f"num_beams: expected 1 with a window, got {self.params.num_beams}")

    def sampler(self, work: Workspace, sample_index: int = 0) -> Sampler:
        """What chooses the tokens of one of its samples."""
        return Sampler(self.params, work, self.prompt_ids, sample_index, self.constraint)

    def n_most(self, executor: Executor) -> int:
        """Positions that the model sees at once."""
        return self.window.size if self.window else executor.max_seq_len

    def n_position(self, executor: Executor) -> int:
        """Positions that one text can come to have: the last token never runs."""
        return min(len(self.prompt_ids) + self.params.max_new_tokens - 1, self.n_most(executor))

    def n_page_most(self, executor: Executor, n_text: int) -> int:
        """Pages that so many texts can come to hold; they share those that the prompt fills."""
        shared = len(self.prompt_ids) // PAGE
        return shared + n_text * (-(-self.n_position(executor) // PAGE) - shared)


class Sample:
    """One text on its way: its sequence, the tokens still to run, what makes tokens of logits and text of tokens."""

    def __init__(self, job: Job, n_most: int, sequence: Sequence, sampler: Sampler, called: float) -> None:
        self.job = job
        self.n_most = n_most  # positions that its sequence has place for
        self.sequence = sequence
        self.sampler = sampler
        self.called = called  # a perf_counter, as the next three
        self.started = self.first_token = self.last_token = time.perf_counter()
        self.pending = job.prompt_ids  # token ids whose keys and values aren't stored yet
        self.detokenizer = job.tokenizer.stream() if job.tokenizer else None
        self.matcher = StopMatcher(job.params.stop_strings)
        self.pieces: list[Piece] = []
        self.proposer = job.speculation.proposer(job.prompt_ids, sampler) if job.speculation else None
        self.n_proposed = self.n_accepted = 0

    def fork(self, index: int) -> Sample:
        """Another sample of the prompt, once that has run."""
        sampler = self.job.sampler(self.sampler.work, index)
        fork = Sample(self.job, self.n_most, self.sequence.fork(), sampler, self.called)
        fork.started = self.started
        return fork

    @property
    def finished(self) -> bool:
        """Whether it has its last token."""
        return bool(self.pieces) and self.pieces[-1].finish_reason is not None

    @property
    def guesses(self) -> bool:
        """Whether it may have something to guess."""
        return self.proposer is not None and len(self.pieces) >= self.proposer.awake_at

    def rows(self, n: int) -> Rows:
        """The next n of the pending tokens; logits are wanted once they are the last."""
        return Rows(self.sequence, self.pending[:n], int(n >= len(self.pending)))

    def restart(self) -> None:
        """Goes on from what its sequence has, or else the prefix cache, of its tokens; all others are pending."""
        token_ids = np.concatenate([self.job.prompt_ids, np.array(self.sampler.adjustments.generated, np.int32)])
        if self.job.window:
            token_ids = self.job.window.seen(token_ids)
        self.pending = token_ids[self.sequence.length or self.sequence.reuse(token_ids) :]

    def draw(self) -> tuple[int, Draw | None]:
        """How many steps may be made without it, and how its tokens are drawn; None if it is needed at each."""
        draw = None if self.matcher.stops else self.sampler.plain(self.job.stop_ids)
        n = min(self.job.params.max_new_tokens - len(self.pieces), self.n_most - self.sequence.length)
        if self.proposer:  # what comes will be looked at again when it wakes
            n = min(n, max(self.proposer.awake_at - len(self.pieces), 1))
        return n, draw

    def draft(self, rows: Rows, n: int, n_row: int) -> int:
        """Adds at most n guesses to its row, if there are pages for them; how many."""
        generated = self.sampler.adjustments.generated
        guesses = self.proposer.propose(generated, n, n_row) if self.proposer and self.guesses and n > 0 else []
        if not guesses:
            return 0
        try:
            self.sequence.reserve(1 + len(guesses), within=True)
        except (NoPages, OutOfMemoryError):
            return 0
        rows.token_ids = np.concatenate([rows.token_ids, np.array(guesses, np.int32)])
        rows.n_draft = len(guesses)
        rows.n_logits += len(guesses)
        return len(guesses)

    def verify(self, ran: Rows, logits: Floats, on_piece: Callable[[Piece], None] | None) -> None:
        """Chooses tokens, given float32 [1 + n_draft, vocab_size]: a next one as long as the last was guessed.

        `on_piece` is told of each.
        """
        certain = self.sequence.length - ran.n_draft
        for n_accepted, row in enumerate(logits):
            full = certain + n_accepted == self.n_most
            piece = self.advance(self.sampler.sample(row), full, on_piece)
            if piece.finish_reason or n_accepted == ran.n_draft or piece.token_id != ran.token_ids[1 + n_accepted]:
                break
        self.sampler.drawn.clear()  # for what was guessed wrongly
        if self.proposer and ran.n_draft:
            self.sequence.settle(certain + n_accepted)
            self.proposer.observe(ran.n_draft, n_accepted)
            self.n_proposed += ran.n_draft
            self.n_accepted += n_accepted
        self.go_on(piece, full)

    def accept(self, drawn: Drawn, on_piece: Callable[[Piece], None] | None) -> None:
        """Takes a token that the engine has drawn; `on_piece` is told of it."""
        full = self.sequence.length == self.n_most
        self.go_on(self.advance(self.sampler.accept(drawn), full, on_piece), full)

    def go_on(self, last: Piece, full: bool) -> None:
        """After its last piece: gives its pages back if that was the end, or lets a full window move on."""
        if last.finish_reason:
            self.close()
        elif full:
            self.sequence.close()
            self.restart()

    def close(self) -> None:
        """Gives all pages back; what was in them is to run again, should it go on."""
        self.sequence.close()
        if self.proposer:
            self.proposer.close()

    def advance(self, chosen: TokenLogprob, full: bool, on_piece: Callable[[Piece], None] | None) -> Piece:
        """Adds a token, and tells `on_piece` of it; `full`: its sequence has no place for it."""
        self.pending = np.array([chosen.token_id], np.int32)
        text = ""
        reason: FinishReason | None = None
        if chosen.token_id in self.job.stop_ids:
            reason = "stop"
        elif self.detokenizer:
            text = self.matcher.push(self.detokenizer.push(chosen.token_id))
        if self.sampler.adjustments.complete:
            reason = "stop"
        # A token that is the last needs no place in the context: it never runs.
        if len(self.pieces) + 1 == self.job.params.max_new_tokens or (full and not self.job.window):
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
        if on_piece:
            on_piece(piece)
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
                prompt_tokens=len(self.job.prompt_ids),
                completion_tokens=len(self.pieces),
                time_to_first_token=self.first_token - self.called,
                prefill_seconds=self.first_token - self.started,
                decode_seconds=self.last_token - self.first_token,
                proposed_tokens=self.n_proposed,
                accepted_tokens=self.n_accepted,
            ),
        )


class Generation(Task):
    """A prompt and its num_return_sequences samples, which share the pages of the prompt.

    `works` are scratch memory for the thread that steps. `sequence` has run the beginning of the prompt already, not
    all of it; it is the task's from then on.
    """

    def __init__(
        self, executor: Executor, job: Job, works: list[Workspace] | None = None, sequence: Sequence | None = None
    ) -> None:
        job.check(executor)
        if job.params.num_beams > 1:
            raise ArgumentError(f"num_beams: expected 1 for sampling, got {job.params.num_beams}")
        super().__init__(job.params.num_return_sequences)
        self.n_position = job.n_position(executor)
        self.executor = executor
        self.job = job
        sampler = job.sampler(works[0] if works else Workspace(executor.vocab_size))
        self.samples = [Sample(job, job.n_most(executor), sequence or executor.new_sequence(), sampler, self.called)]
        self.unfinished = self.samples[:]

    def start(self) -> None:
        for sample in self.unfinished:
            sample.restart()
        if not self.samples[0].pieces:
            self.samples[0].started = time.perf_counter()

    @property
    def n_pending(self) -> int:
        return sum([len(sample.pending) for sample in self.unfinished])

    @property
    def decoding(self) -> bool:
        return bool(self.samples[0].pieces) and self.n_pending == len(self.unfinished)

    @property
    def n_page_most(self) -> int:
        return self.job.n_page_most(self.executor, self.n_place)

    def plan(self, n: int) -> list[Rows]:
        planned = []
        for sample in self.unfinished:
            if n:
                planned.append(sample.rows(n))
                n -= len(planned[-1].token_ids)
        return planned

    def draws(self) -> tuple[int, list[Draw]]:
        found = [sample.draw() for sample in self.unfinished]
        draws = [draw for _, draw in found if draw is not None]
        return (min([n for n, _ in found]), draws) if len(draws) == len(found) else (0, [])

    @property
    def drafts(self) -> bool:
        return self.job.speculation is not None and any(sample.guesses for sample in self.unfinished)

    def draft(self, rows: list[Rows], n: int, n_row: int) -> int:
        n_left = n
        for sample, row in zip(self.unfinished, rows, strict=True):
            n_useful = self.n_position - sample.sequence.length - 1
            n_left -= sample.draft(row, n_useful if n_useful < n_left else n_left, n_row)
        return n - n_left

    def samplers(self, rows: list[Rows], logits: Floats) -> Iterator[tuple[Sampler, Floats]]:
        first = 0
        for sample, ran in zip(self.unfinished, rows, strict=False):
            if ran.n_logits:
                yield sample.sampler, logits[first : first + ran.n_logits]
            first += ran.n_logits

    def advance(self, rows: list[Rows], logits: Floats) -> None:
        first = 0
        for sample, ran in zip(self.unfinished, rows, strict=False):
            if not ran.n_logits:
                sample.pending = sample.pending[len(ran.token_ids) :]
                continue
            if not sample.pieces:
                self.samples += [sample.fork(i) for i in range(1, self.n_place)]
            for one in [sample] if sample.pieces else self.samples:
                on_piece = self.on_piece if one is self.samples[0] else None
                one.verify(ran, logits[first : first + ran.n_logits], on_piece)
            first += ran.n_logits
        self.unfinished = [sample for sample in self.samples if not sample.finished]

    def accept(self, drawn: list[Drawn]) -> None:
        for sample, one in zip(self.unfinished, drawn, strict=True):
            sample.accept(one, self.on_piece if sample is self.samples[0] else None)
        self.unfinished = [sample for sample in self.samples if not sample.finished]

    @property
    def finished(self) -> bool:
        return not self.unfinished

    def pause(self) -> None:
        for sample in self.samples:
            sample.close()

    def completions(self) -> list[Completion]:
        """The finished texts."""
        return [sample.completion() for sample in self.samples]


def check_token_ids(name: str, token_ids: object, vocab_size: int) -> Ids:
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

"""Beam search (Lowerre 1976), by the rules of transformers: what is kept, what counts as finished, when it ends.

The beams are forks of one sequence: they share the pages of what they have in common, and take each other's place by
fork and close alone. All beams run in one step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ._native.sampling import Workspace
from .errors import ArgumentError
from .executor import Executor, Rows
from .generation import Completion, FinishReason, Request, Usage
from .kv import Sequence
from .sampling import Adjustments, TokenLogprob, token_logprob


@dataclass(frozen=True)
class Beam:
    """A text that the search follows, or could: its tokens and the sum of their log-probabilities."""

    score: float
    adjustments: Adjustments
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A beam, continued by one token."""

    score: float
    parent: int  # index of the beam
    chosen: TokenLogprob


class BeamSearch:
    """The bookkeeping of one search, free of logits and sequences: candidates in, the beams to go on with out.

    `n_max` is the most tokens of a text.
    """

    def __init__(self, request: Request, n_max: int) -> None:
        self.params = request.params
        self.stop_ids = request.stop_ids
        self.n_max = n_max
        self.beams = [Beam(0.0, Adjustments(self.params, request.prompt_ids, request.constraint))]
        self.finished: list[Beam] = []  # the best num_beams, the best first; score is divided by the length penalty

    @property
    def n_candidates(self) -> int:
        """Continuations to look at in a step: enough that num_beams of them go on, however many end."""
        return max(2, 1 + len(self.stop_ids)) * self.params.num_beams

    def advance(self, candidates: list[Candidate]) -> list[int] | None:
        """Takes the n_candidates best, in order. Returns the new beams' parents, or None at the end of the search."""
        num_beams = self.params.num_beams
        n_tokens = len(self.beams[0].tokens) + 1
        going_on: list[tuple[int, Beam]] = []
        for rank, candidate in enumerate(candidates):
            parent = self.beams[candidate.parent]
            adjustments = parent.adjustments.fork()
            adjustments.append(candidate.chosen.token_id)
            beam = Beam(candidate.score, adjustments, (*parent.tokens, candidate.chosen))
            ends = candidate.chosen.token_id in self.stop_ids or adjustments.complete
            if n_tokens < self.n_max and not ends:
                going_on.append((candidate.parent, beam))
            elif rank < num_beams:  # what ends further down is no result: it would have been no beam
                self.finished.append(replace(beam, score=self._penalised(beam.score, n_tokens)))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:num_beams]
        going_on = going_on[:num_beams]
        if not going_on or self._settled(going_on[0][1].score, n_tokens):
            return None
        self.beams = [beam for _, beam in going_on]
        return [parent for parent, _ in going_on]

    def _settled(self, best: float, n_tokens: int) -> bool:
        """Whether the finished texts are the result: no beam can replace one; `best` is the beams' best score."""
        if len(self.finished) < self.params.num_beams:
            return False
        if self.params.early_stopping is True:
            return True
        # An estimate: with a positive penalty a longer text could score better. "never" allows for that.
        hopeful = self.params.early_stopping == "never" and self.params.length_penalty > 0
        return self._penalised(best, self.n_max if hopeful else n_tokens) <= self.finished[-1].score

    def _penalised(self, score: float, n_tokens: int) -> float:
        return score / math.pow(n_tokens, self.params.length_penalty)


def beam_search(executor: Executor, request: Request) -> list[Completion]:
    """The num_return_sequences best texts that a search with num_beams beams finds, the best first, with their scores.

    What ends a text: `request.stop_ids`, a constraint that lets nothing follow, max_new_tokens or the end of the
    context. There are fewer texts where the constraint allows fewer. Raises `ArgumentError`, `NonFiniteError` for
    logits that can't be used, or what `Executor.step` raises.

    >>> beam_search(executor, Request(prompt_ids, SamplingParams(num_beams=4)))[0].score
    """
    called = time.perf_counter()
    request.check(executor)
    params, n_prompt = request.params, len(request.prompt_ids)
    search = BeamSearch(request, min(params.max_new_tokens, executor.max_seq_len - n_prompt + 1))
    if search.n_candidates > executor.vocab_size or params.num_beams > executor.max_rows:
        most = min(executor.vocab_size * params.num_beams // search.n_candidates, executor.max_rows)
        raise ArgumentError(f"num_beams: expected at most {most} for this model, got {params.num_beams}")
    work = Workspace(executor.vocab_size)
    sequences = [executor.new_sequence()]
    try:
        logits = prefill(executor, sequences[0], request.prompt_ids)
        first_token = time.perf_counter()
        parents = search.advance(_candidates(search, work, logits))
        while parents is not None:
            reorder(sequences, parents)
            last = [np.array([beam.tokens[-1].token_id], np.int32) for beam in search.beams]
            logits = executor.step([Rows(sequence, ids) for sequence, ids in zip(sequences, last, strict=True)])
            parents = search.advance(_candidates(search, work, logits))
    finally:
        for sequence in sequences:
            sequence.close()
    seconds = (first_token - called, first_token - called, time.perf_counter() - first_token)
    return [
        _completion(request, beam, Usage(n_prompt, len(beam.tokens), *seconds))
        for beam in search.finished[: params.num_return_sequences]
    ]


def prefill(executor: Executor, sequence: Sequence, token_ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Runs a prompt in chunks; returns the logits of its last token, float32 [1, vocab_size]."""
    for start in range(0, len(token_ids), executor.max_rows):
        chunk = token_ids[start : start + executor.max_rows]
        logits = executor.step([Rows(sequence, chunk, int(start + len(chunk) == len(token_ids)))])
    return logits


def reorder(sequences: list[Sequence], parents: list[int]) -> None:
    """Puts forks of sequences[parents[i]] in each place i; a sequence goes on itself in one of its places."""
    old = sequences[:]
    unused = set(range(len(old)))
    new = []
    for parent in parents:
        if parent in unused:
            unused.remove(parent)
            new.append(old[parent])
        else:
            sequences.append(old[parent].fork())  # in the list at once, so that it is closed whatever happens
            new.append(sequences[-1])
    sequences[:] = new
    for parent in unused:
        old[parent].close()


def _candidates(search: BeamSearch, work: Workspace, logits: NDArray[np.float32]) -> list[Candidate]:
    """The best continuations of the beams, the best first, given their logits, [n_beams, vocab_size]."""
    totals = [work.logsumexp(row) for row in logits]
    found: list[tuple[float, int, int]] = []  # score, parent, token_id
    for parent, (beam, row, total) in enumerate(zip(search.beams, logits, totals, strict=True)):
        # As in transformers the adjustments work on log-probabilities here, not on logits.
        adjusted = beam.adjustments.apply(work, row, total)
        shift = total if adjusted is row else 0.0
        token_ids, values = work.top(adjusted, search.n_candidates)
        found += [(beam.score + float(v) - shift, parent, int(i)) for i, v in zip(token_ids, values, strict=True)]
    found.sort(key=lambda one: -one[0])
    n_top = search.params.logprobs
    return [
        Candidate(score, parent, token_logprob(work, logits[parent], totals[parent], token_id, n_top))
        for score, parent, token_id in found[: search.n_candidates]
    ]


def _completion(request: Request, beam: Beam, usage: Usage) -> Completion:
    token_ids = [token.token_id for token in beam.tokens]
    stopped = token_ids[-1] in request.stop_ids
    reason: FinishReason = "stop" if stopped or beam.adjustments.complete else "length"
    text = ""
    if request.tokenizer:
        stream = request.tokenizer.stream()
        text = "".join([stream.push(token_id) for token_id in token_ids[: len(token_ids) - stopped]]) + stream.flush()
    return Completion(text, token_ids, reason, list(beam.tokens), usage, beam.score)

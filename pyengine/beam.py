"""Beam search (Lowerre 1976), by the rules of transformers: what is kept, what counts as finished, when it ends.

The beams are forks of one sequence: they share the pages of what they have in common, and take each other's place by
fork and close alone. All beams run in one step.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from ._native.sampling import Workspace
from .completion import Completion, Usage
from .errors import ArgumentError
from .executor import Executor, Rows
from .generation import Job
from .kv import PAGE, Sequence
from .sampling import Penalties, TokenLogprob, token_logprob
from .scheduler import Floats, Task


@dataclass(frozen=True)
class Beam:
    """A text that the search follows, or could: its tokens and the sum of their log-probabilities."""

    score: float
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

    def __init__(self, job: Job, n_max: int) -> None:
        self.params = job.params
        self.stop_ids = job.stop_ids
        self.n_max = n_max
        self.beams = [Beam(0.0)]
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
            beam = Beam(candidate.score, (*self.beams[candidate.parent].tokens, candidate.chosen))
            if n_tokens < self.n_max and candidate.chosen.token_id not in self.stop_ids:
                going_on.append((candidate.parent, beam))
            elif rank < num_beams:  # what ends further down is no result: it would have been no beam
                self.finished.append(Beam(self._penalised(beam.score, n_tokens), beam.tokens))
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


class BeamGeneration(Task):
    """A prompt and the search for its num_return_sequences best texts, the best first, with their scores.

    What ends a text: `job.stop_ids`, max_new_tokens or the end of the context. All beams are in one step. `sequence` is
    as in `Generation`.
    """

    def __init__(
        self, executor: Executor, job: Job, work: Workspace | None = None, sequence: Sequence | None = None
    ) -> None:
        job.check(executor)
        params, n_prompt = job.params, len(job.prompt_ids)
        super().__init__(params.num_beams)
        self.executor = executor
        self.job = job
        self.work = work or Workspace(executor.vocab_size)
        self.search = BeamSearch(job, min(params.max_new_tokens, executor.max_seq_len - n_prompt + 1))
        if self.search.n_candidates > executor.vocab_size or params.num_beams > executor.max_rows:
            most = min(executor.vocab_size * params.num_beams // self.search.n_candidates, executor.max_rows)
            raise ArgumentError(f"num_beams: expected at most {most} for this model, got {params.num_beams}")
        self.penalties = Penalties(params, job.prompt_ids)
        self.sequences = [sequence or executor.new_sequence()]
        self.pending = [job.prompt_ids]  # of each beam, the tokens whose keys and values aren't stored yet
        self.logits: dict[int, Floats] = {}  # of the beams that have run their last token
        self.searching = True
        self.started = self.last_token = self.called
        self.first_token = 0.0

    def start(self) -> None:
        for i, (beam, sequence) in enumerate(zip(self.search.beams, self.sequences, strict=True)):
            generated = np.array([token.token_id for token in beam.tokens], np.int32)
            token_ids = np.concatenate([self.job.prompt_ids, generated])
            self.pending[i] = token_ids[sequence.length or sequence.reuse(token_ids) :]
        if not self.search.beams[0].tokens:
            self.started = time.perf_counter()

    @property
    def n_pending(self) -> int:
        return sum(len(token_ids) for token_ids in self.pending)

    @property
    def decoding(self) -> bool:
        return bool(self.search.beams[0].tokens) and all(len(token_ids) == 1 for token_ids in self.pending)

    @property
    def n_page_most(self) -> int:
        shared = len(self.job.prompt_ids) // PAGE
        return shared + self.n_place * (-(-self.job.n_position(self.executor) // PAGE) - shared)

    def plan(self, n: int) -> list[Rows]:
        planned = []
        for sequence, token_ids in zip(self.sequences, self.pending, strict=True):
            part = token_ids[:n]
            if len(part):
                planned.append(Rows(sequence, part, int(len(part) == len(token_ids))))
                n -= len(part)
        return planned

    def advance(self, rows: list[Rows], logits: Floats) -> None:
        index = {id(sequence): i for i, sequence in enumerate(self.sequences)}
        first = 0
        for ran in rows:
            i = index[id(ran.sequence)]
            self.pending[i] = self.pending[i][len(ran.token_ids) :]
            if ran.n_logits:
                self.logits[i] = logits[first]
                first += 1
        if self.n_pending:
            return
        in_order = [self.logits[i] for i in range(len(self.sequences))]
        self.logits.clear()
        parents = self.search.advance(_candidates(self.search, self.work, self.penalties, in_order))
        self.last_token = time.perf_counter()
        self.first_token = self.first_token or self.last_token
        if parents is None:
            self.searching = False
            return
        reorder(self.sequences, parents)
        self.pending = [np.array([beam.tokens[-1].token_id], np.int32) for beam in self.search.beams]

    @property
    def finished(self) -> bool:
        return not self.searching

    def pause(self) -> None:
        self.logits.clear()
        for sequence in self.sequences:
            sequence.close()

    def completions(self) -> list[Completion]:
        """The best texts, the best first."""
        seconds = (
            self.first_token - self.called,
            self.first_token - self.started,
            self.last_token - self.first_token,
        )
        n_prompt = len(self.job.prompt_ids)
        return [
            _completion(self.job, beam, Usage(n_prompt, len(beam.tokens), *seconds))
            for beam in self.search.finished[: self.job.params.num_return_sequences]
        ]


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


def _candidates(
    search: BeamSearch, work: Workspace, penalties: Penalties, logits: SequenceOf[Floats]
) -> list[Candidate]:
    """The best continuations of the beams, the best first, given the logits of each, float32 [vocab_size]."""
    totals = [work.logsumexp(row) for row in logits]
    found: list[tuple[float, int, int]] = []  # score, parent, token_id
    for parent, (beam, row, total) in enumerate(zip(search.beams, logits, totals, strict=True)):
        # As in transformers the penalties work on log-probabilities here, not on logits.
        generated = array("i", [token.token_id for token in beam.tokens])
        adjusted = penalties.apply(work, row, generated, total)
        shift = total if adjusted is row else 0.0
        token_ids, values = work.top(adjusted, search.n_candidates)
        found += [(beam.score + float(v) - shift, parent, int(i)) for i, v in zip(token_ids, values, strict=True)]
    found.sort(key=lambda one: -one[0])
    n_top = search.params.logprobs
    return [
        Candidate(score, parent, token_logprob(work, logits[parent], totals[parent], token_id, n_top))
        for score, parent, token_id in found[: search.n_candidates]
    ]


def _completion(job: Job, beam: Beam, usage: Usage) -> Completion:
    token_ids = [token.token_id for token in beam.tokens]
    stopped = token_ids[-1] in job.stop_ids
    text = ""
    if job.tokenizer:
        stream = job.tokenizer.stream()
        text = "".join([stream.push(token_id) for token_id in token_ids[: len(token_ids) - stopped]]) + stream.flush()
    return Completion(text, token_ids, "stop" if stopped else "length", list(beam.tokens), usage, beam.score)

"""Beam search (Lowerre 1976), by the rules of transformers: what is kept, what counts as finished, when it ends.

Diverse groups of beams (Vijayakumar et al. 2016) and beam sampling are the same search with other candidates.

The beams are forks of one sequence: they share the pages of what they have in common, and take each other's place by
fork and close alone. All beams run in one step.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ._native.drawing import uniform
from ._native.rows import top_rows
from ._native.sampling import Workspace
from .completion import Completion, FinishReason, Usage
from .errors import ArgumentError
from .executor import Executor, Rows
from .generation import Job
from .kv import Sequence
from .sampling import Adjustments, TokenLogprob, token_logprob
from .task import Floats, Task

REFUSED = 2  # tokens, after which a constraint's mask is made: it costs as much as a few questions

UNKNOWN = -1  # a token that a constraint has yet to be asked for

Continuation = tuple[float, float, int, int]  # of a beam: its rank (the least first), score, parent and token id
Top = tuple[NDArray[np.int32], Floats]  # token ids and logits, the largest first


@dataclass(frozen=True)
class Beam:
    """A text that the search follows, or could: its tokens and its score."""

    score: float  # the sum of the log-probabilities; of a finished text, divided by the length penalty
    adjustments: Adjustments  # of its next logits
    tokens: tuple[TokenLogprob, ...] = ()
    parent: int = 0  # the row of the beam that it continues


@dataclass(frozen=True)
class Candidate:
    """A beam, continued by one token."""

    score: float
    parent: int  # index of the beam in its group
    chosen: TokenLogprob


class Group:
    """Beams that compete with each other, and the texts that they finished. `n_max` is the most tokens of a text."""

    def __init__(self, job: Job, n_max: int) -> None:
        self.params = job.params
        self.stop_ids = job.stop_ids
        self.n_max = n_max
        self.size = self.params.num_beams // self.params.num_beam_groups
        self.beams = [Beam(0.0, Adjustments(self.params, job.prompt_ids, job.constraint))]
        self.first_row = 0  # of the logits of its beams
        self.finished: list[Beam] = []  # the best `size`, the best first
        self.ended = False

    @property
    def n_candidates(self) -> int:
        """Continuations to look at in a step: enough that `size` of them go on, however many end."""
        return max(2, 1 + len(self.stop_ids)) * self.size

    def advance(self, candidates: Iterable[Candidate]) -> None:
        """Takes as many of the n_candidates best, in order, as it needs to know what goes on and what is a result."""
        n_tokens = len(self.beams[0].tokens) + 1
        best = -math.inf
        going_on: list[Beam] = []
        for rank, candidate in enumerate(itertools.islice(candidates, self.n_candidates)):
            best = max(best, candidate.score)
            parent = self.beams[candidate.parent]
            adjustments = parent.adjustments.fork()
            adjustments.append(candidate.chosen.token_id)
            tokens = (*parent.tokens, candidate.chosen)
            beam = Beam(candidate.score, adjustments, tokens, self.first_row + candidate.parent)
            if candidate.chosen.token_id not in self.stop_ids and not adjustments.complete:
                going_on.append(beam)
            elif rank < self.size:  # what ends further down is no result: it would have been no beam
                self._finish([beam])
            if len(going_on) == self.size:
                break  # what is left neither goes on nor is a result
        self.beams = going_on
        # With groups the rules are those of transformers 4, the last that has them: what ends counts among the best
        # that could come, and early_stopping leaves no room for texts that the length ends. Version 5 differs in both.
        grouped = self.params.num_beam_groups > 1
        if not grouped:
            best = self.beams[0].score if self.beams else -math.inf
        self.ended = not self.beams or self._settled(best, n_tokens)
        if n_tokens == self.n_max and not (grouped and self.ended):
            self._finish(self.beams)
        self.ended = self.ended or n_tokens == self.n_max

    def _finish(self, beams: list[Beam]) -> None:
        done = [replace(beam, score=self._penalised(beam.score, len(beam.tokens))) for beam in beams]
        self.finished = sorted(self.finished + done, key=lambda beam: -beam.score)[: self.size]

    def _settled(self, best: float, n_tokens: int) -> bool:
        """Whether the finished texts are the result: no beam can replace one; `best` is the best score of a step."""
        if len(self.finished) < self.size:
            return False
        if self.params.early_stopping is True:
            return True
        # An estimate: with a positive penalty a longer text could score better. "never" allows for that.
        hopeful = self.params.early_stopping == "never" and self.params.length_penalty > 0
        return self._penalised(best, self.n_max if hopeful else n_tokens) <= self.finished[-1].score

    def _penalised(self, score: float, n_tokens: int) -> float:
        return score / math.pow(n_tokens, self.params.length_penalty)


class BeamSearch:
    """The bookkeeping of one search, free of logits and sequences: candidates in, the beams to go on with out.

    Plain search is one group. The beams of all groups that go on are rows of one step.
    """

    def __init__(self, job: Job, n_max: int) -> None:
        n_group = job.params.num_beam_groups
        self.groups = [Group(job, n_max) for _ in range(n_group)]
        # transformers pads the beams of a group that has ended, with this token unless a checkpoint has one for that.
        self.padding = min(job.stop_ids, default=0)

    @property
    def n_candidates(self) -> int:
        """Continuations of a group to look at in a step."""
        return self.groups[0].n_candidates

    @property
    def beams(self) -> list[Beam]:
        """What goes on, in the order of the rows."""
        return [beam for group in self.groups if not group.ended for beam in group.beams]

    @property
    def finished(self) -> list[Beam]:
        """The texts that are done, the best first."""
        return sorted((beam for group in self.groups for beam in group.finished), key=lambda beam: -beam.score)

    def advance(self, candidates_of: Callable[[Group, array[int]], Iterable[Candidate]]) -> list[int] | None:
        """One step: asks for each group's candidates, given the tokens that the beams of the groups before it took.

        Returns the new beams' parents, or None at the end of the search.
        """
        taken = array("i")
        for group in self.groups:
            if group.ended:
                taken.extend([self.padding] * group.size)
            else:
                group.advance(candidates_of(group, taken))
                taken.extend(beam.tokens[-1].token_id for beam in group.beams)
        n_row = 0
        for group in self.groups:
            group.first_row = n_row
            n_row += 0 if group.ended else len(group.beams)
        return [beam.parent for beam in self.beams] or None


class BeamGeneration(Task):
    """A prompt and the search for its num_return_sequences best texts, the best first, with their scores.

    What ends a text: `job.stop_ids`, a constraint that lets nothing follow, max_new_tokens or the end of the context.
    There are fewer texts where the constraint allows fewer. All beams are in one step. `sequence` is
    as in `Generation`.
    """

    def __init__(
        self, executor: Executor, job: Job, works: list[Workspace] | None = None, sequence: Sequence | None = None
    ) -> None:
        job.check(executor)
        params, n_prompt = job.params, len(job.prompt_ids)
        super().__init__(params.num_beams)
        self.executor = executor
        self.job = job
        self.search = BeamSearch(job, min(params.max_new_tokens, executor.max_seq_len - n_prompt + 1))
        if self.search.n_candidates > executor.vocab_size or params.num_beams > executor.max_rows:
            most = min(executor.vocab_size * params.num_beams // self.search.n_candidates, executor.max_rows)
            raise ArgumentError(f"num_beams: expected at most {most} for this model, got {params.num_beams}")
        self.candidates = Candidates(job, works or [Workspace(executor.vocab_size)])
        self.sequences = [sequence or executor.new_sequence()]
        self.pending = [job.prompt_ids]  # of each beam, the tokens whose keys and values aren't stored yet
        self.logits: dict[int, Floats] = {}  # of the beams that have run their last token
        self.searching = True
        self.started = self.last_token = self.called
        self.first_token = 0.0

    def start(self) -> None:
        # At first all groups begin with one row, the prompt's.
        for i, (sequence, beam) in enumerate(zip(self.sequences, self.search.beams, strict=False)):
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
        return self.job.n_page_most(self.executor, self.n_place)

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
        parents = self.search.advance(partial(self.candidates.of, in_order))
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


class Candidates:
    """What makes candidates of logits: the best continuations of a group's beams, or a draw of them."""

    def __init__(self, job: Job, works: list[Workspace]) -> None:
        self.params = job.params
        self.works = works
        self.work = works[0]
        self.seed = job.params.choose_seed()
        self.n_least = max(2, 1 + len(job.stop_ids))  # tokens that the filters leave, so that one can go on

    def of(self, logits: SequenceOf[Floats], group: Group, taken: array[int]) -> Iterator[Candidate]:
        """The candidates of a group, the best first, given the logits of each row, float32 [vocab_size].

        They are looked for as they are asked for.
        """
        rows = list(logits[group.first_row : group.first_row + len(group.beams)])
        tops, totals = self._tops(rows, group, taken)
        found: list[Iterable[Continuation]] = []
        for parent, (beam, row, total) in enumerate(zip(group.beams, rows, totals, strict=True)):
            if self.params.samples:
                found.append(self._draw(row, total, beam, parent, taken, group.n_candidates))
            else:
                found.append(self._best(row, total, beam, parent, taken, group.n_candidates, tops[parent]))
        best: Iterable[Continuation] = heapq.merge(*found, key=lambda one: one[0])
        if self.params.samples:  # the first that arrive, by their scores
            best = sorted(itertools.islice(best, group.n_candidates), key=lambda one: -one[1])
        n_top = self.params.logprobs
        for _, score, parent, token_id in best:
            if token_id != UNKNOWN:
                chosen = token_logprob(self.work, rows[parent], totals[parent], token_id, n_top)
                yield Candidate(score, parent, chosen)

    def _tops(
        self, rows: list[Floats], group: Group, taken: array[int]
    ) -> tuple[SequenceOf[Top | None], list[float]]:
        """The largest logits of each row, where they are those that are looked for, and all logsumexps."""
        if self.params.samples or taken or group.beams[0].adjustments.any:
            return [None] * len(rows), [self.work.logsumexp(row) for row in rows]
        tops, totals = top_rows(self.works, rows, group.n_candidates)
        if np.isnan(totals).any():
            self.work.logsumexp(rows[int(np.isnan(totals).argmax())])  # raises what is wrong with it
        return tops, totals.tolist()

    def _best(
        self, row: Floats, total: float, beam: Beam, parent: int, taken: array[int], n: int, top: Top | None
    ) -> Iterator[Continuation]:
        """The n best continuations of a beam, the best first; `top` are the n largest logits if nothing adjusts them.

        A constraint is asked as late as can be. Of each token comes first what its score would be, without the token:
        only if all that is better has been taken, the constraint is asked for it. When it has refused some, a mask is
        made in its place, and when none is left of those that would be the best without the constraint.
        """
        constraint, n_found, n_refused = beam.adjustments.constraint, 0, 0
        adjusted, shift = self._adjusted(row, total, beam, taken)
        token_ids, values = top or self.work.top(adjusted, n)
        for token_id, value in zip(token_ids.tolist(), values.tolist(), strict=True):
            score = beam.score + (value - shift)
            if constraint:
                yield -score, score, parent, UNKNOWN
                if n_refused == REFUSED:
                    break
                if not constraint.allows(token_id):
                    n_refused += 1
                    continue
            n_found += 1
            yield -score, score, parent, token_id
        if not (constraint and n_refused):
            return
        adjusted, shift = self._adjusted(row, total, beam, taken)  # again: others came between
        token_ids, values = self.work.top(adjusted, n, constraint.masking())
        for token_id, value in zip(token_ids[n_found:].tolist(), values[n_found:].tolist(), strict=True):
            score = beam.score + (value - shift)
            yield -score, score, parent, token_id

    def _draw(
        self, row: Floats, total: float, beam: Beam, parent: int, taken: array[int], n: int
    ) -> list[Continuation]:
        """The first n continuations of a beam that arrive in a race at rates of exp(score): see `Workspace.race`."""
        params, constraint = self.params, beam.adjustments.constraint
        logits, shift = self._adjusted(row, total, beam, taken)
        if constraint:
            logits = constraint.mask(self.work, logits)
        first = 2 * n * len(beam.tokens)
        uniforms = np.array([uniform(self.seed, parent, first + i) for i in range(2 * n)])
        filters = (params.temperature, params.top_k, params.top_p, params.min_p, self.n_least)
        token_ids, log_times = self.work.race(logits, *filters, uniforms)
        scale = min(1 / params.temperature, 1e30)  # as the race's
        scores = beam.score + (logits[token_ids].astype(np.float64) - shift) * scale
        ranks = log_times + (shift * scale - beam.score)
        return list(zip(ranks.tolist(), scores.tolist(), itertools.repeat(parent), token_ids.tolist()))

    def _adjusted(self, row: Floats, total: float, beam: Beam, taken: array[int]) -> tuple[Floats, float]:
        """A row's logits adjusted, valid until the next call, and what to subtract for log-probabilities.

        As in transformers the adjustments work on log-probabilities here, not on logits.
        """
        adjusted = beam.adjustments.apply(self.work, row, total, taken)
        return adjusted, total if adjusted is row else 0.0


def _completion(job: Job, beam: Beam, usage: Usage) -> Completion:
    token_ids = [token.token_id for token in beam.tokens]
    stopped = token_ids[-1] in job.stop_ids
    reason: FinishReason = "stop" if stopped or beam.adjustments.complete else "length"
    text = ""
    if job.tokenizer:
        stream = job.tokenizer.stream()
        text = "".join([stream.push(token_id) for token_id in token_ids[: len(token_ids) - stopped]]) + stream.flush()
    return Completion(text, token_ids, reason, list(beam.tokens), usage, beam.score)

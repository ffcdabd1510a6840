"""From a row of logits to the next token."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._native.drawing import uniform
from ._native.logprobs import unusable
from ._native.rows import draw_rows
from ._native.sampling import Workspace
from .constraints import Constraint
from .errors import ArgumentError, ArgumentTypeError, Error, NonFiniteError
from .params import LogitsProcessor, SamplingParams

NONE = array("i")  # no token ids

Wish = tuple[float, int, float, float, tuple[float, ...]]  # what `draw_rows` is asked for a row
LARGEST: Wish = (0.0, 0, 1.0, 0.0, (0.0,))
ATTEMPTS = 3  # tokens drawn before a constraint's mask is made: together they cost little more than one


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the most probable tokens in its place.

    Of the model's own distribution: log softmax of the logits before penalties, bias and temperature.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)  # (token_id, logprob), the most probable first


class Draw(NamedTuple):
    """How the next tokens of a text are drawn where nothing counts but their logits: what `Executor.decode` is told."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sample_index: int
    position: int  # of the next token in the text
    stop_ids: frozenset[int]  # that end it


class Drawn(NamedTuple):
    """What came of a draw."""

    token_id: int
    logprob: float
    error: Error | None  # why there is no token


class Adjustments:
    """What one text makes of its logits, and the state that this depends on: its tokens, and how far its constraint is.

    `constraint` is that of the text's beginning, and stays as it is.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: NDArray[np.int32], constraint: Constraint | None = None
    ) -> None:
        bias = params.logit_bias or {}
        self.prompt_ids = prompt_ids
        self.generated = array("i")
        self.factors = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self.bias_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        self.diversity_penalty = params.diversity_penalty
        self.processors = params.processors
        self.constraint = constraint and constraint.fork()
        self.penalised = self.factors != (1, 0, 0) or len(bias) > 0
        self.any = self.penalised or bool(self.processors)  # whether `apply` may change a row

    def apply(
        self, work: Workspace, logits: NDArray[np.float32], shift: float = 0.0, taken: array[int] = NONE
    ) -> NDArray[np.float32]:
        """logits - shift, adjusted by all but the constraint: float32 [vocab_size], valid until the next call; just
        `logits` without any.

        `taken` are the tokens that other groups of beams chose.
        """
        if not (self.any or taken):
            return logits
        if self.penalised or taken or self.processors or shift:
            logits = work.adjust(
                logits,
                shift,
                taken,
                self.diversity_penalty,
                self.prompt_ids,
                self.generated,
                *self.factors,
                self.bias_ids,
                self.bias,
            )
        if self.processors:
            token_ids = np.concatenate([self.prompt_ids, np.array(self.generated, np.int32)])
            for processor in self.processors:
                logits = _processed(processor, token_ids, logits)
        return logits

    def append(self, token_id: int) -> None:
        """The text goes on by this token."""
        self.generated.append(token_id)
        if self.constraint:
            self.constraint.accept(token_id)

    def fork(self) -> Adjustments:
        """Those of another text with the same beginning."""
        fork = object.__new__(Adjustments)
        vars(fork).update(vars(self))  # `copy.copy` takes three times as long
        fork.generated = self.generated[:]
        fork.constraint = self.constraint and self.constraint.fork()
        return fork

    @property
    def complete(self) -> bool:
        """Whether nothing may follow, by the constraint."""
        return self.constraint is not None and self.constraint.complete


class Sampler:
    """Chooses the tokens of one sample, one after the other.

    `work` is scratch memory that the samplers of one thread share; `sample_index` tells the samples of a prompt apart.
    """

    def __init__(
        self,
        params: SamplingParams,
        work: Workspace,
        prompt_ids: NDArray[np.int32],
        sample_index: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.work = work
        self.adjustments = Adjustments(params, prompt_ids, constraint)
        self.sample_index = sample_index
        self.drawn: list[Found] = []  # what `draw_ahead` has found for the next tokens
        self.seed = params.choose_seed()
        self.filters = (params.temperature, params.top_k, params.top_p, params.min_p) if params.samples else None

    def sample(self, logits: NDArray[np.float32]) -> TokenLogprob:
        """The next token, given the model's logits, float32 [vocab_size]; `NonFiniteError` if they can't be used."""
        total = self.work.logsumexp(logits) if self.adjustments.any else None
        found = self.drawn.pop(0) if self.drawn else self._draw(logits, self.adjustments)
        if found.error:
            raise found.error
        self.adjustments.append(found.token_id)
        total = found.total if total is None else total
        return token_logprob(self.work, logits, total, found.token_id, self.params.logprobs)

    def accept(self, drawn: Drawn) -> TokenLogprob:
        """Takes the next token, which was drawn as `plain` says."""
        if drawn.error:
            raise drawn.error
        self.adjustments.append(drawn.token_id)
        return TokenLogprob(drawn.token_id, drawn.logprob)

    def choose(self, logits: NDArray[np.float32], guesses: array[int]) -> int:
        """The token that would come if `guesses` came before it; nothing is kept of it."""
        adjustments = self.adjustments.fork()
        for token_id in guesses:
            adjustments.append(token_id)
        found = self._draw(logits, adjustments)
        if found.error:
            raise found.error
        return found.token_id

    def plain(self, stop_ids: frozenset[int]) -> Draw | None:
        """How its next tokens are drawn, if nothing counts but their logits, and nobody asks for those."""
        adjustments = self.adjustments
        if adjustments.any or adjustments.constraint or self.params.logprobs:
            return None
        return Draw(
            *(self.filters or LARGEST[:4]), self.seed, self.sample_index, len(adjustments.generated), stop_ids
        )

    def _draw(self, logits: NDArray[np.float32], adjustments: Adjustments) -> Found:
        adjusted = adjustments.apply(self.work, logits)
        (found,) = draw([self.work], [Row(self, adjusted, len(adjustments.generated), adjustments.constraint)])
        return found

    def wish(self, position: int, attempts: range) -> Wish:
        """What `draw_rows` is asked for at a position of the text."""
        if self.filters is None:
            return LARGEST
        return *self.filters, tuple([uniform(self.seed, self.sample_index, position, attempt) for attempt in attempts])


class Row(NamedTuple):
    """What a token is drawn from."""

    sampler: Sampler
    logits: NDArray[np.float32]  # adjusted, [vocab_size]
    position: int  # of the token in the text
    constraint: Constraint | None


class Found(NamedTuple):
    """What was found for a row."""

    token_id: int
    total: float  # the logits' logsumexp
    error: Error | None = None  # why there is no token


def draw(works: list[Workspace], rows: list[Row]) -> list[Found]:
    """A token for each row, on a thread for each of `works`.

    Under a constraint tokens are drawn as if there were none, and the first comes that is allowed; where all of a few
    are refused, another is drawn from those that are allowed, by a mask. So a constraint changes nothing where a text
    matches anyway, and seldom needs a mask of many tokens. It is what drawing from the allowed ones at once would be:
    each draw, if it is accepted, is distributed as they are, and so is the last.

    Filters come before the constraint. Where it allows nothing of what they leave, they come after it.
    """
    wishes = [row.sampler.wish(row.position, range(ATTEMPTS if row.constraint else 1)) for row in rows]
    token_ids, totals, cuts = draw_rows(works, [row.logits for row in rows], wishes)
    found: list[Found] = []
    refused: list[int] = []
    masks: list[tuple[NDArray[np.uint32], NDArray[np.int32], float]] = []
    for i, (row, its, total) in enumerate(zip(rows, token_ids, totals, strict=True)):
        constraint = row.constraint
        error: Error | None = None
        token_id = its[0] if constraint is None else _first_allowed(constraint, its)
        if math.isnan(total):
            error = unusable(row.logits)
        elif constraint and token_id < 0:
            try:
                masks.append((*constraint.masking(), cuts[i]))
                refused.append(i)
            except ArgumentError as its_error:
                error = its_error
        found.append(Found(token_id, total, error))
    if refused:
        for i, again in zip(refused, _draw_masked(works, [rows[i] for i in refused], masks), strict=True):
            found[i] = Found(again.token_id, found[i].total, again.error)
    return found


def _first_allowed(constraint: Constraint, token_ids: list[int]) -> int:
    """-1 for none."""
    for i, token_id in enumerate(token_ids):
        if token_id >= 0 and token_id not in token_ids[:i] and constraint.allows(token_id):
            return token_id
    return -1


def _draw_masked(
    works: list[Workspace], rows: list[Row], masks: list[tuple[NDArray[np.uint32], NDArray[np.int32], float]]
) -> list[Found]:
    wishes = [row.sampler.wish(row.position, range(ATTEMPTS, ATTEMPTS + 1)) for row in rows]
    token_ids, _, _ = draw_rows(works, [row.logits for row in rows], wishes, masks)
    found = [Found(token_id, math.nan) for [token_id] in token_ids]
    for i, row in enumerate(rows):
        if found[i].token_id < 0 and row.constraint:
            name = row.constraint.name
            error = f"{name}: expected one of its tokens to be left by logit_bias and logits_processor, got none"
            found[i] = Found(-1, math.nan, NonFiniteError(error))
    return found


def draw_ahead(works: list[Workspace], asked: list[tuple[Sampler, NDArray[np.float32]]]) -> None:
    """Draws for many samplers at once, given logits of the next tokens of each, [n, vocab_size]; `sample` takes them.

    Left out are those whose rows have to be adjusted first, and those of guesses under a constraint, which depend on
    each other; also a row that is left alone: `sample` is as fast.
    """
    rows: list[Row] = []
    for sampler, logits in asked:
        adjustments = sampler.adjustments
        if not (adjustments.any or (adjustments.constraint and len(logits) > 1)):
            first = len(adjustments.generated)
            rows += [Row(sampler, row, first + i, adjustments.constraint) for i, row in enumerate(logits)]
    if len(rows) > 1:
        for row, found in zip(rows, draw(works, rows), strict=True):
            row.sampler.drawn.append(found)


def token_logprob(
    work: Workspace, logits: NDArray[np.float32], total: float, token_id: int, n_top: int
) -> TokenLogprob:
    """The log-probability of a token and of the `n_top` most probable ones; `total` is the logits' logsumexp."""
    top: list[tuple[int, float]] = []
    if n_top:
        top = [(int(i), float(value) - total) for i, value in zip(*work.top(logits, n_top), strict=True)]
    return TokenLogprob(token_id, float(logits[token_id]) - total, top)


def _processed(
    processor: LogitsProcessor, token_ids: NDArray[np.int32], logits: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What a processor makes of the logits, checked."""
    shape = logits.shape
    result = processor(token_ids, logits)
    expected = f"logits_processor: expected float32 {list(shape)} from {processor!r}"
    if not isinstance(result, np.ndarray):
        raise ArgumentTypeError(f"{expected}, got {result!r}")
    if result.dtype != np.float32:
        raise ArgumentTypeError(f"{expected}, got {result.dtype}")
    if result.shape != shape:
        raise ArgumentError(f"{expected}, got {list(result.shape)}")
    return np.ascontiguousarray(result)

"""From a row of logits to the next token."""

from __future__ import annotations

import copy
from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ._native.drawing import uniform
from ._native.sampling import Workspace, draw_rows
from .constraints import Constraint
from .errors import ArgumentError, ArgumentTypeError
from .params import LogitsProcessor, SamplingParams

NONE = array("i")  # no token ids


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the most probable tokens in its place.

    Of the model's own distribution: log softmax of the logits before penalties, bias and temperature.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)  # (token_id, logprob), the most probable first


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
        self.any = self.penalised or bool(self.processors) or constraint is not None  # whether a row may be changed

    def apply(
        self, work: Workspace, logits: NDArray[np.float32], shift: float = 0.0, taken: array[int] = NONE
    ) -> NDArray[np.float32]:
        """logits - shift, adjusted: float32 [vocab_size], valid until the next call; just `logits` without any.

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
        return self.constraint.mask(work, logits) if self.constraint else logits

    def append(self, token_id: int) -> None:
        """The text goes on by this token."""
        self.generated.append(token_id)
        if self.constraint:
            self.constraint.accept(token_id)

    def fork(self) -> Adjustments:
        """Those of another text with the same beginning."""
        fork = copy.copy(self)
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
        self.drawn: list[tuple[int, float]] = []  # token ids that `draw_ahead` has found, -1 for none, and logsumexps
        self.seed = params.choose_seed()

    def sample(self, logits: NDArray[np.float32]) -> TokenLogprob:
        """The next token, given the model's logits, float32 [vocab_size]; `NonFiniteError` if they can't be used."""
        token_id, total = self.drawn.pop(0) if self.drawn else (-1, 0.0)
        if token_id < 0:
            total = self.work.logsumexp(logits)
            token_id = self.choose(logits)
        self.adjustments.append(token_id)
        return token_logprob(self.work, logits, total, token_id, self.params.logprobs)

    def choose(self, logits: NDArray[np.float32], guesses: array[int] = NONE) -> int:
        """The token that would come if `guesses` came before it; nothing is kept of it."""
        params, work, adjustments = self.params, self.work, self.adjustments
        if guesses:
            adjustments = adjustments.fork()
            for token_id in guesses:
                adjustments.append(token_id)
        adjusted = adjustments.apply(work, logits)
        if not params.samples:
            return work.argmax(adjusted)
        number = self.number(len(adjustments.generated))
        return work.draw(adjusted, params.temperature, params.top_k, params.top_p, params.min_p, number)

    def number(self, position: int) -> float:
        """The random number in [0, 1) of a position of the text."""
        return uniform(self.seed, self.sample_index, position)


def draw_ahead(works: list[Workspace], asked: list[tuple[Sampler, NDArray[np.float32]]]) -> None:
    """Draws for many samplers at once, on a thread for each of `works`; `Sampler.sample` takes what it finds.

    A sampler has logits for its next tokens, float32 [n, vocab_size]. Those that adjust their rows are left out, since
    that has to come first, and in order.
    """
    logits: list[NDArray[np.float32]] = []
    wishes: list[tuple[float, float, float, float, float]] = []
    plain = [(sampler, rows) for sampler, rows in asked if not sampler.adjustments.any]
    for sampler, rows in plain:
        params, position = sampler.params, len(sampler.adjustments.generated)
        filters = (params.temperature if params.samples else 0.0, params.top_k, params.top_p, params.min_p)
        for i, row in enumerate(rows):
            logits.append(row)
            wishes.append((*filters, sampler.number(position + i) if params.samples else 0.0))
    if len(logits) < 2:
        return
    token_ids, totals = draw_rows(works, logits, np.array(wishes))
    drawn = zip(token_ids.tolist(), totals.tolist(), strict=True)
    for sampler, rows in plain:
        sampler.drawn = [next(drawn) for _ in rows]


def token_logprob(
    work: Workspace, logits: NDArray[np.float32], total: float, token_id: int, n_top: int
) -> TokenLogprob:
    """The log-probability of a token and of the `n_top` most probable ones; `total` is the logits' logsumexp."""
    token_ids, values = work.top(logits, n_top) if n_top else ((), ())
    top = [(int(i), float(value) - total) for i, value in zip(token_ids, values, strict=True)]
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

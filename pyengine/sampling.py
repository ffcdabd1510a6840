"""From a row of logits to the next token: what can be asked for, and the sampler that does it."""

from __future__ import annotations

import math
import operator
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ._native.sampling import Workspace, uniform
from .errors import ArgumentError, ArgumentTypeError

MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to generate. Names, defaults and the order of operations are those of transformers.

    A logit goes through repetition_penalty (for tokens of the prompt and generated ones), presence_penalty and
    frequency_penalty (generated ones; as OpenAI defines them), logit_bias, temperature, top_k, top_p, min_p; then one
    token is drawn. temperature=0 takes the largest logit instead, the lowest id of those that tie. num_beams > 1
    searches for the most probable text and draws nothing.

    The draw depends on the seed, on which of num_return_sequences it is for, and on how many tokens that one has: so
    the same seed gives the same text, alone or in a batch. Without a seed each sample takes a fresh one.

    Raises `ArgumentError` or `ArgumentTypeError` naming the argument, what is expected and what came.

    >>> SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None  # token id → added to its logit; -inf bans it
    stop: str | Sequence[str] | None = None  # the text ends before the first of these strings
    stop_token_ids: Sequence[int] | None = None  # besides the model's end of text
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0  # beams: score = log-probability / length ** length_penalty
    early_stopping: bool | Literal["never"] = False  # beams: as in transformers
    num_return_sequences: int = 1
    logprobs: int = 0  # alternatives listed with each token's log-probability
    ignore_eos: bool = False  # generate past the model's end of text

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1, MAX_INT)
        _number("temperature", self.temperature, "at least 0", lambda value: value >= 0)
        _integer("top_k", self.top_k, 0, MAX_INT)
        _number("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        _number("min_p", self.min_p, "at least 0 and below 1", lambda value: 0 <= value < 1)
        _number("repetition_penalty", self.repetition_penalty, "above 0", lambda value: value > 0)
        _number("presence_penalty", self.presence_penalty, "a finite number", lambda value: True)
        _number("frequency_penalty", self.frequency_penalty, "a finite number", lambda value: True)
        _check_bias(self.logit_bias)
        _check_stop(self.stop)
        for token_id in _sequence("stop_token_ids", self.stop_token_ids, "a list of token ids"):
            _integer("stop_token_ids", token_id, 0, MAX_INT)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        _integer("num_beams", self.num_beams, 1, MAX_INT)
        _number("length_penalty", self.length_penalty, "-10 to 10", lambda value: abs(value) <= 10)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ArgumentError(f"early_stopping: expected True, False or 'never', got {self.early_stopping!r}")
        _integer("num_return_sequences", self.num_return_sequences, 1, MAX_INT)
        _integer("logprobs", self.logprobs, 0, MAX_INT)
        if not isinstance(self.ignore_eos, bool):
            raise ArgumentTypeError(f"ignore_eos: expected True or False, got {self.ignore_eos!r}")
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        if self.temperature not in (0, 1):
            raise _with_beams("temperature", "0 or unset", self.temperature, self.num_beams)
        for name, unset in (("top_k", 0), ("top_p", 1), ("min_p", 0), ("seed", None)):
            if getattr(self, name) != unset:
                raise _with_beams(name, f"{unset!r} or unset", getattr(self, name), self.num_beams)
        if self.stop_strings:
            raise _with_beams("stop", "no strings (stop_token_ids can be used)", self.stop, self.num_beams)
        if self.num_return_sequences > self.num_beams:
            raise _with_beams(
                "num_return_sequences", f"at most {self.num_beams}", self.num_return_sequences, self.num_beams
            )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def stop_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The token ids that end a text, given the model's own."""
        return frozenset(self.stop_token_ids or ()) | frozenset(() if self.ignore_eos else eos_token_ids)

    def check_stream(self) -> None:
        """Raises `ArgumentError` for what can't be streamed: several texts, and those that may change to the end."""
        for name in ("num_beams", "num_return_sequences"):
            if getattr(self, name) != 1:
                raise ArgumentError(f"{name}: expected 1 for a stream, got {getattr(self, name)}")

    def check_vocab(self, vocab_size: int) -> None:
        """Raises `ArgumentError` for an argument that a model of this vocabulary can't honour."""
        for name, token_ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in token_ids or ():
                if token_id >= vocab_size:
                    raise ArgumentError(f"{name}: expected token ids below {vocab_size} (vocab_size), got {token_id}")
        if self.logprobs > vocab_size:
            raise ArgumentError(f"logprobs: expected at most {vocab_size} (vocab_size), got {self.logprobs}")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the most probable tokens in its place.

    Of the model's own distribution: log softmax of the logits before penalties, bias and temperature.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)  # (token_id, logprob), the most probable first


class Penalties:
    """The adjustments that depend on the tokens so far, and the bias."""

    def __init__(self, params: SamplingParams, prompt_ids: NDArray[np.int32]) -> None:
        bias = params.logit_bias or {}
        self.prompt_ids = prompt_ids
        self.factors = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self.bias_ids = np.fromiter(bias.keys(), np.int32, len(bias))
        self.bias = np.fromiter(bias.values(), np.float32, len(bias))
        self.any = self.factors != (1, 0, 0) or len(bias) > 0

    def apply(
        self, work: Workspace, logits: NDArray[np.float32], generated: array[int], shift: float = 0.0
    ) -> NDArray[np.float32]:
        """logits - shift, adjusted: float32 [vocab_size], valid until the next call; just `logits` without any."""
        if not self.any:
            return logits
        return work.adjust(logits, shift, self.prompt_ids, generated, *self.factors, self.bias_ids, self.bias)


class Sampler:
    """Chooses the tokens of one sample, one after the other.

    `work` is scratch memory that the samplers of one thread share; `sample_index` tells the samples of a prompt apart.
    """

    def __init__(
        self, params: SamplingParams, work: Workspace, prompt_ids: NDArray[np.int32], sample_index: int = 0
    ) -> None:
        self.params = params
        self.work = work
        self.penalties = Penalties(params, prompt_ids)
        self.sample_index = sample_index
        self.seed = int.from_bytes(os.urandom(8), "little") if params.seed is None else operator.index(params.seed)
        self.generated = array("i")

    def sample(self, logits: NDArray[np.float32]) -> TokenLogprob:
        """The next token, given the model's logits, float32 [vocab_size]; `NonFiniteError` if they can't be used."""
        params, work = self.params, self.work
        total = work.logsumexp(logits)
        adjusted = self.penalties.apply(work, logits, self.generated)
        if params.temperature == 0:
            token_id = work.argmax(adjusted)
        else:
            number = uniform(self.seed, self.sample_index, len(self.generated))
            token_id = work.draw(adjusted, params.temperature, params.top_k, params.top_p, params.min_p, number)
        self.generated.append(token_id)
        return token_logprob(work, logits, total, token_id, params.logprobs)


def token_logprob(
    work: Workspace, logits: NDArray[np.float32], total: float, token_id: int, n_top: int
) -> TokenLogprob:
    """The log-probability of a token and of the `n_top` most probable ones; `total` is the logits' logsumexp."""
    token_ids, values = work.top(logits, n_top) if n_top else ((), ())
    top = [(int(i), float(value) - total) for i, value in zip(token_ids, values, strict=True)]
    return TokenLogprob(token_id, float(logits[token_id]) - total, top)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool | np.bool_) or not isinstance(value, Integral):
        raise ArgumentTypeError(f"{name}: expected an integer, got {value!r}")
    if not low <= int(value) <= high:
        raise ArgumentError(f"{name}: expected {low} to {high}, got {value}")


def _number(name: str, value: object, expected: str, accepts: Any) -> None:
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value) or not accepts(value):
        raise ArgumentError(f"{name}: expected {expected}, got {value}")


def _sequence(name: str, value: object, expected: str) -> Sequence[object]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ArgumentTypeError(f"{name}: expected {expected}, got {value!r}")
    return value


def _check_bias(bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise ArgumentTypeError(f"logit_bias: expected a dict of token id to number, got {bias!r}")
    for token_id, value in bias.items():
        _integer("logit_bias", token_id, 0, MAX_INT)
        if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
            raise ArgumentTypeError(f"logit_bias[{token_id}]: expected a number, got {value!r}")
        if not (abs(float(value)) <= 1e30 or float(value) == -math.inf):
            raise ArgumentError(f"logit_bias[{token_id}]: expected -1e30 to 1e30 or -inf, got {value}")


def _check_stop(stop: object) -> None:
    for text in (stop,) if isinstance(stop, str) else _sequence("stop", stop, "a string or a list of strings"):
        if not isinstance(text, str):
            raise ArgumentTypeError(f"stop: expected a string or a list of strings, got {text!r} in it")
        if not text:
            raise ArgumentError("stop: expected strings of at least one character, got ''")


def _with_beams(name: str, expected: str, got: object, num_beams: int) -> ArgumentError:
    return ArgumentError(f"{name}: expected {expected} with num_beams={num_beams}, got {got!r}")

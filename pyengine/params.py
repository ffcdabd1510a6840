"""What can be asked of a generation, checked."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, ArgumentTypeError

MAX_INT = 2**31 - 1
CONSTRAINTS = ("json_schema", "regex", "grammar")

# Token ids of the prompt and of what is generated so far, int32 [n]; logits, float32 [vocab_size] → such logits.
LogitsProcessor = Callable[[NDArray[np.int32], NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class SamplingParams:
    """How to generate. Names, defaults and the order of operations are those of transformers.

    A logit goes through repetition_penalty (for tokens of the prompt and generated ones), presence_penalty and
    frequency_penalty (generated ones; as OpenAI defines them), logit_bias, logits_processor, temperature, top_k, top_p,
    min_p; then one token is drawn. do_sample=False or temperature=0 take the largest logit instead, the lowest id of
    those that tie.

    A constraint (json_schema, regex, grammar) takes away from what top_k, top_p and min_p leave; where it allows
    nothing of that, they choose from what it allows. So it changes nothing where a text matches anyway. With beams it
    comes before them.

    num_beams > 1 searches for the most probable text (beam search, Lowerre 1976).

    num_beam_groups > 1 searches in groups of beams, one after the other: from a token's log-probability each takes
    diversity_penalty for every beam of the groups before it that chose this token in the same step (diverse beam
    search, Vijayakumar et al. 2016). As in transformers, a group that has ended counts as choosing the end of text.

    do_sample=True with num_beams > 1 draws the continuations that compete (beam sampling): without replacement, in
    proportion to exp(score). A score adds up log-probabilities after penalties, temperature and filters; the filters
    leave each beam one token more than can end a text, and at least two.

    The draw depends on the seed, on which of num_return_sequences or beams it is for, and on how many tokens that one
    has: so the same seed gives the same text, alone or in a batch. Without a seed each sample takes a fresh one.

    logits_processor is a function, or a list of them, f(token_ids, logits) -> logits: int32 [n], the prompt and what is
    generated so far; float32 [vocab_size], which it may change and return, or return another. What it is given is valid
    until it returns. With beams these are log-probabilities, as in transformers. What it raises ends the generation.

    json_schema, regex or grammar (Lark, as llguidance takes it) is what the text must match, from its first character
    to its last; at most one of them. A token that can't lead to a match isn't drawn, nor the end of the text before it
    matches; once nothing more may follow it ends, with finish_reason "stop". max_new_tokens, the context and stop
    strings may end it before. JSON has no blanks but one after a comma or a colon, unless the schema's "x-guidance"
    allows others.

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
    do_sample: bool | None = None  # None: draw with one beam, search without drawing with more
    num_beam_groups: int = 1  # a divisor of num_beams
    diversity_penalty: float = 0.0  # above 0 with groups
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    prompt_lookup_num_tokens: int | None = None  # most tokens that are guessed ahead from the text itself; None: none

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1, MAX_INT)
        if self.do_sample is not None and not isinstance(self.do_sample, bool):
            raise ArgumentTypeError(f"do_sample: expected True, False or None, got {self.do_sample!r}")
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
        if self.do_sample and self.temperature == 0:
            raise ArgumentError("temperature: expected above 0 with do_sample=True, got 0")
        self._check_groups()
        if not callable(self.logits_processor):
            expected = "a function or a list of functions"
            for processor in _sequence("logits_processor", self.logits_processor, expected):
                if not callable(processor):
                    raise ArgumentTypeError(f"logits_processor: expected {expected}, got {processor!r} in it")
        self._check_constraint()
        if self.prompt_lookup_num_tokens is not None:
            _integer("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, 1, MAX_INT)
        if self.num_beams > 1:
            self._check_beams()

    def _check_groups(self) -> None:
        n = self.num_beam_groups
        _integer("num_beam_groups", n, 1, MAX_INT)
        _number("diversity_penalty", self.diversity_penalty, "at least 0", lambda value: value >= 0)
        if self.num_beams % n:
            raise ArgumentError(f"num_beam_groups: expected a divisor of num_beams={self.num_beams}, got {n}")
        if (n > 1) != (self.diversity_penalty > 0):
            expected = "above 0" if n > 1 else "0 or unset"
            raise ArgumentError(
                f"diversity_penalty: expected {expected} with num_beam_groups={n}, got {self.diversity_penalty}"
            )
        if n > 1 and self.do_sample:
            raise ArgumentError(f"do_sample: expected False or unset with num_beam_groups={n}, got True")

    def _check_beams(self) -> None:
        if not self.samples and self.temperature not in (0, 1):
            raise _with_beams("temperature", "0, unset or do_sample=True", self.temperature, self.num_beams)
        for name, unset in (("top_k", 0), ("top_p", 1), ("min_p", 0), ("seed", None)):
            if not self.samples and getattr(self, name) != unset:
                expected = f"{unset!r}, unset or do_sample=True"
                raise _with_beams(name, expected, getattr(self, name), self.num_beams)
        if self.prompt_lookup_num_tokens is not None:
            raise _with_beams(
                "prompt_lookup_num_tokens", "None or unset", self.prompt_lookup_num_tokens, self.num_beams
            )
        if self.stop_strings:
            raise _with_beams("stop", "no strings (stop_token_ids can be used)", self.stop, self.num_beams)
        if self.num_return_sequences > self.num_beams:
            raise _with_beams(
                "num_return_sequences", f"at most {self.num_beams}", self.num_return_sequences, self.num_beams
            )

    def _check_constraint(self) -> None:
        for name in CONSTRAINTS:
            value = getattr(self, name)
            if not isinstance(value, str | None) and (name != "json_schema" or not isinstance(value, dict)):
                expected = "a dict or a str" if name == "json_schema" else "a str"
                raise ArgumentTypeError(f"{name}: expected {expected}, got {value!r}")
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ArgumentError(f"{given[1]}: expected none beside {given[0]}, got {getattr(self, given[1])!r}")

    @property
    def constraint(self) -> tuple[str, Any] | None:
        """The name and the value of json_schema, regex or grammar, whichever is given."""
        return next(((name, getattr(self, name)) for name in CONSTRAINTS if getattr(self, name) is not None), None)

    @property
    def processors(self) -> tuple[LogitsProcessor, ...]:
        """`logits_processor` as a tuple."""
        if self.logits_processor is None:
            return ()
        return (self.logits_processor,) if callable(self.logits_processor) else tuple(self.logits_processor)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return (self.num_beams == 1 and self.temperature > 0) if self.do_sample is None else self.do_sample

    def choose_seed(self) -> int:
        """The seed, or a fresh one."""
        return int.from_bytes(os.urandom(8), "little") if self.seed is None else operator.index(self.seed)

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

"""What a generation gives: pieces while it runs, a completion at its end; and where a text stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .sampling import TokenLogprob

FinishReason = Literal["stop", "length"]


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
    proposed_tokens: int = 0  # that were guessed ahead and run with what was certain (speculation)
    accepted_tokens: int = 0  # of these, how many the text went on with


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
        if not self.stops:
            return text
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

"""What a scheduler runs: a text on its way, a beam search, a text that is scored. Here, what it asks of them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from .completion import Piece
from .executor import Rows
from .sampling import Draw, Drawn, Sampler

Floats = NDArray[np.float32]


class Task(ABC):
    """What takes part in steps. Only the thread that steps calls its methods; `cancelled` may be set by any."""

    keeps = False  # whether its pages are its user's: neither pausing nor ending it gives them back

    def __init__(self, n_place: int = 1) -> None:
        self.n_place = n_place  # sequences that it has at most, places in the batch
        self.called = time.perf_counter()
        self.cancelled = False
        self.ended = False
        self.error: BaseException | None = None  # why it could not finish
        self.on_piece: Callable[[Piece], None] | None = None  # is told each token of its first text
        self.watched: Callable[[], bool] = bool  # whether somebody waits for each token
        self.on_end: Callable[[], None] | None = None

    @abstractmethod
    def start(self) -> None:
        """Opens its sequences, with what the prefix cache has of them: at first, and after `pause`."""

    @property
    @abstractmethod
    def n_pending(self) -> int:
        """Tokens that wait to be run, of all its sequences."""

    @property
    @abstractmethod
    def decoding(self) -> bool:
        """Whether each sequence waits for one token: then all of these are in the next step."""

    @property
    @abstractmethod
    def n_page_most(self) -> int:
        """Pages that it can have come to hold at its end."""

    @abstractmethod
    def plan(self, n: int) -> list[Rows]:
        """Its rows of the next step, at most n tokens, at least one."""

    def samplers(self, rows: list[Rows], logits: Floats) -> Iterable[tuple[Sampler, Floats]]:
        """Who will draw from which of the logits in `advance`, as far as that is known."""
        return ()

    @abstractmethod
    def advance(self, rows: list[Rows], logits: Floats) -> None:
        """Takes the logits that its rows wanted, float32 [sum of n_logits, vocab_size]."""

    def draws(self) -> tuple[int, list[Draw]]:
        """Where it decodes: how many steps can be made without it, and how each row's next tokens are drawn.

        (0, []) if more than their logits counts for that.
        """
        return 0, []

    def accept(self, drawn: list[Drawn]) -> None:
        """Takes the tokens that were drawn so, one for each of its rows."""
        raise NotImplementedError

    @property
    def drafts(self) -> bool:
        """Whether it may guess what comes next."""
        return False

    def draft(self, rows: list[Rows], n: int, n_row: int) -> int:
        """Adds to the rows that it planned, a row for each sequence, at most n tokens that it guesses; how many.

        n_row is how many rows the step has without any guesses.
        """
        return 0

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether it has all that it was for."""

    @abstractmethod
    def pause(self) -> None:
        """Gives all pages back; what was in them is pending again."""

    def end(self, error: BaseException | None = None) -> None:
        """Gives all pages back for good, and tells whoever waits for it; `error` is why it could not finish."""
        self.error = error
        self.pause()
        self.ended = True
        on_end, self.on_end = self.on_end, None
        if on_end:
            on_end()

"""The KV cache: a pool of pages of 64 positions, and sequences that share them.

A sequence is a list of pages and a length. A fork shares the pages of its origin; whoever writes into a page that
others share (which can only be the last, partly filled one) gets a copy of it first.
"""

from __future__ import annotations

import numpy as np

from ._native.memory import Block
from ._native.pages import KVLayout
from .errors import ArgumentError
from .plan import Plan

PAGE = KVLayout.page_positions


class KVPool:
    """The pages of one model. A page's memory is kept for the next one when nobody refers to the page any more."""

    def __init__(self, plan: Plan, dtype: str) -> None:
        self.dtype = dtype  # what keys and values are stored in: float32, bfloat16 or int8
        self.layout = KVLayout(plan.n_layer, plan.n_kv_head, plan.head_dim, dtype)
        self.max_pages = -(-plan.max_seq_len // PAGE)
        self.free: list[Block] = []
        self.n_made = 0

    @property
    def n_used(self) -> int:
        """How many pages sequences hold."""
        return self.n_made - len(self.free)

    def take(self) -> Page:
        """A page that nobody else holds, unfilled."""
        if not self.free:
            self.free.append(Block(self.layout.page_nbytes, "KV page"))
            self.n_made += 1
        return Page(self.free)


class Page:
    """Keys and values of up to 64 positions, in all layers.

    Its memory goes back by itself, so nothing is lost when Ctrl-C comes between two lines. n_holder is then too large
    at worst, which costs a copy.
    """

    __slots__ = ("free", "memory", "n_holder")

    def __init__(self, free: list[Block]) -> None:
        self.free = free
        self.n_holder = 1  # sequences that have it; one that writes must be the only one
        self.memory = free.pop()

    def __del__(self) -> None:
        self.free.append(self.memory)


class Sequence:
    """The keys and values of one sequence of tokens: the state of the transformer seen as a recurrent network."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.length = 0  # positions whose keys and values are stored
        self.pages: list[Page] = []
        self.table = np.zeros(pool.max_pages, np.uintp)  # the pages' addresses, for the native executor

    def reserve(self, n: int) -> None:
        """Makes the next n positions writable."""
        if self.length % PAGE and self.pages[self.length // PAGE].n_holder > 1:
            self._replace(self.length // PAGE)
        while len(self.pages) * PAGE < self.length + n:
            self._append(self.pool.take())

    def _append(self, page: Page) -> None:
        self.table[len(self.pages)] = page.memory.address
        self.pages.append(page)

    def _replace(self, index: int) -> None:
        """Puts a copy in the place of a page that others hold too."""
        old, page = self.pages[index], self.pool.take()
        self.pool.layout.copy(old.memory, page.memory, self.length % PAGE)
        self.table[index] = page.memory.address
        self.pages[index] = page
        old.n_holder -= 1

    def fork(self) -> Sequence:
        """A second sequence that starts as this one is; pages are shared until one of them writes."""
        other = Sequence(self.pool)
        other.length = self.length
        for page in self.pages[: -(-self.length // PAGE)]:
            page.n_holder += 1
            other._append(page)
        return other

    def truncate(self, n: int) -> None:
        """Forgets all but the first n positions."""
        if not 0 <= n <= self.length:
            raise ArgumentError(f"n: expected 0..{self.length} positions, got {n}")
        self.length = n
        while len(self.pages) * PAGE >= n + PAGE:
            self.pages.pop().n_holder -= 1

    def close(self) -> None:
        """Gives all pages back; the sequence is empty then."""
        self.truncate(0)

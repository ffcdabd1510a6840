"""The KV cache: a pool of pages of 64 positions, and sequences that share them.

A sequence is a list of pages and a length. A fork shares the pages of its origin; whoever writes into a page that
others share (which can only be the last, partly filled one) gets a copy of it first.
"""

from __future__ import annotations

import numpy as np

from ._native.attention import KVLayout
from ._native.memory import Block
from .errors import ArgumentError
from .plan import Plan

PAGE = KVLayout.page_positions


class KVPool:
    """The pages of one model. A page is taken when a sequence grows into it, and kept for the next when it is given
    back.
    """

    def __init__(self, plan: Plan) -> None:
        self.layout = KVLayout(plan.n_layer, plan.n_kv_head, plan.head_dim)
        self.max_pages = -(-plan.max_seq_len // PAGE)
        self.free: list[Block] = []
        self.n_used = 0  # pages that sequences hold

    def take(self) -> Page:
        """A page that nobody else holds, unfilled."""
        memory = self.free.pop() if self.free else Block(self.layout.page_nbytes, "KV page")
        self.n_used += 1
        return Page(memory)

    def release(self, page: Page) -> None:
        """One holder less; the last one gives the memory back."""
        page.n_holder -= 1
        if page.n_holder == 0:
            self.free.append(page.memory)
            self.n_used -= 1


class Page:
    """Keys and values of up to 64 positions, in all layers."""

    __slots__ = ("memory", "n_holder")

    def __init__(self, memory: Block) -> None:
        self.memory = memory
        self.n_holder = 1


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
        page = self.pool.take()
        self.pool.layout.copy(self.pages[index].memory, page.memory, self.length % PAGE)
        self.pool.release(self.pages[index])
        self.pages[index] = page
        self.table[index] = page.memory.address

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
            self.pool.release(self.pages.pop())

    def close(self) -> None:
        """Gives all pages back; the sequence is empty then."""
        self.truncate(0)

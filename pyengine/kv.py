"""The KV cache: a pool of pages of 64 positions, and sequences that share them.

A sequence is a list of pages, the tokens whose keys and values they hold, and a length. A fork shares the pages of its
origin; the prefix cache shares full ones with whoever starts with the same tokens. Whoever writes into a page that
others have too gets a copy of it first.
"""

from __future__ import annotations

import threading
from array import array
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ._native.memory import Block
from ._native.pages import KVLayout
from .errors import ArgumentError, OutOfMemoryError
from .plan import Plan
from .prefix import PrefixCache, digests

PAGE = KVLayout.page_positions
UNLIMITED = 1 << 62


class NoPages(Exception):
    """All pages that the pool may have are held by sequences."""


class KVPool:
    """The pages of one model. A page's memory is kept for the next one when nobody refers to the page any more.

    `capacity` is how many pages requests and the prefix cache may take, all together. `lock` is held by whoever changes
    who holds which page; never while the engine computes.
    """

    def __init__(self, plan: Plan, dtype: str, capacity: int = UNLIMITED, prefix_cache: bool = True) -> None:
        self.dtype = dtype  # what keys and values are stored in: float32, bfloat16 or int8
        self.layout = KVLayout(plan.n_layer, plan.n_kv_head, plan.head_dim, dtype)
        self.max_pages = -(-plan.max_seq_len // PAGE)
        self.capacity = capacity
        self.cache = PrefixCache() if prefix_cache else None
        self.lock = threading.RLock()
        self.free: list[Block] = []
        self.n_made = 0
        self.n_used = 0  # pages that sequences hold

    @property
    def n_cached(self) -> int:
        """Pages that the prefix cache alone keeps."""
        return self.n_made - len(self.free) - self.n_used

    @property
    def n_available(self) -> int:
        """Pages that sequences can still take: the unused ones, and those that the prefix cache would give up."""
        return self.capacity - self.n_used

    def take(self, within: bool) -> Page:
        """An unfilled page that the caller alone holds; raises `NoPages` if it is to be `within` the capacity."""
        while not self.free and self.n_made >= self.capacity and self.cache and self.cache.evict():
            pass
        if not self.free:
            if within and self.n_made >= self.capacity:
                raise NoPages
            self.free.append(Block(self.layout.page_nbytes, "KV page"))
            self.n_made += 1
        page = Page(self.free)
        self.hold(page)
        return page

    def hold(self, page: Page) -> None:
        """Counts one more sequence that has the page."""
        self.n_used += page.n_holder == 0
        page.n_holder += 1

    def release(self, page: Page) -> None:
        """Counts one sequence less."""
        page.n_holder -= 1
        self.n_used -= page.n_holder == 0


def no_room(pool: KVPool, n_page: int) -> OutOfMemoryError:
    """The error where pages that states hold leave too little room; the caller raises it."""
    return OutOfMemoryError(
        f"kv_memory: expected room for {n_page} more pages of {PAGE} positions, got {max(pool.n_available, 0)} of "
        f"{pool.capacity}: states and what runs hold the others"
    )


class Page:
    """Keys and values of up to 64 positions, in all layers. Its memory goes back by itself."""

    __slots__ = ("digest", "free", "memory", "n_holder")

    def __init__(self, free: list[Block]) -> None:
        self.free = free
        self.n_holder = 0  # sequences that have it; one that writes must be the only one, and it not in the cache
        self.digest: bytes | None = None  # its key in the prefix cache, if it is there
        self.memory = free.pop()

    def __del__(self) -> None:
        self.free.append(self.memory)


class Sequence:
    """The keys and values of one sequence of tokens: the state of the transformer seen as a recurrent network."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.token_ids = array("i")  # what its positions hold
        self.pages: list[Page] = []
        self.digests: list[bytes] = []  # keys of its full pages
        self.publishes = True  # whether its full pages go to the prefix cache: not on top of what a file says
        self.table = np.zeros(pool.max_pages, np.uintp)  # the pages' addresses, for the native executor

    @property
    def length(self) -> int:
        """Positions whose keys and values are stored."""
        return len(self.token_ids)

    def reserve(self, n: int, within: bool = False) -> None:
        """Makes the next n positions writable; `within` the pool's capacity, or `NoPages` is raised."""
        with self.pool.lock:
            last, filled = divmod(len(self.token_ids), PAGE)
            if filled and (self.pages[last].n_holder > 1 or self.pages[last].digest):
                self._replace(last, within)
            while len(self.pages) * PAGE < last * PAGE + filled + n:
                self._append(self.pool.take(within))

    def extend(self, token_ids: NDArray[np.int32], n_draft: int = 0) -> None:
        """Counts the tokens whose keys and values have been stored; full pages go to the prefix cache.

        The last `n_draft` of all its tokens are guesses, whose pages the cache must not have before `settle`.
        """
        with self.pool.lock:
            self.token_ids.frombytes(token_ids.tobytes())
            self._publish(self.length - n_draft)

    def settle(self, n: int) -> None:
        """Ends guessing: the first n positions are certain, and all others are forgotten."""
        with self.pool.lock:
            self.truncate(n)
            self._publish(n)

    def _publish(self, n: int) -> None:
        """Lets the prefix cache have the full pages of the first n positions."""
        first = len(self.digests)
        if self.pool.cache is None or not self.publishes or first >= n // PAGE:
            return
        fresh = np.array(self.token_ids[first * PAGE : n], np.int32)
        for index, key in enumerate(digests(fresh, PAGE, self.digests[-1] if first else b""), first):
            self.digests.append(key)
            self._share(index, cast("Page", self.pool.cache.put(key, self.pages[index])))

    def reuse(self, token_ids: NDArray[np.int32]) -> int:
        """Takes the pages that the prefix cache has of the beginning of `token_ids`, never of all of them.

        The sequence must be empty; returns how many positions it has then.
        """
        with self.pool.lock:
            if self.pool.cache is None:
                return 0
            keys = list(digests(token_ids[: len(token_ids) - 1], PAGE))
            for page in self.pool.cache.find(keys):
                self.pool.hold(cast("Page", page))
                self._append(cast("Page", page))
            n = len(self.pages)
            self.digests = keys[:n]
            self.token_ids.frombytes(token_ids[: n * PAGE].tobytes())
            self.pool.cache.counters.prompt_tokens += len(token_ids)
            self.pool.cache.counters.reused_tokens += n * PAGE
            return n * PAGE

    def _append(self, page: Page) -> None:
        self.table[len(self.pages)] = page.memory.address
        self.pages.append(page)

    def _put(self, index: int, page: Page) -> None:
        """Puts a page that is held already in the place of another one."""
        old = self.pages[index]
        self.table[index] = page.memory.address
        self.pages[index] = page
        self.pool.release(old)

    def _share(self, index: int, page: Page) -> None:
        """Goes on with another page of the same content."""
        if page is not self.pages[index]:
            self.pool.hold(page)
            self._put(index, page)

    def _replace(self, index: int, within: bool) -> None:
        """Puts a copy in the place of a page that others have too."""
        page = self.pool.take(within)
        self.pool.layout.copy(self.pages[index].memory, page.memory, self.length % PAGE)
        self._put(index, page)

    def fork(self) -> Sequence:
        """A second sequence that starts as this one is; pages are shared until one of them writes."""
        with self.pool.lock:
            other = Sequence(self.pool)
            other.token_ids = self.token_ids[:]
            other.digests = self.digests[:]
            other.publishes = self.publishes
            for page in self.pages[: -(-self.length // PAGE)]:
                self.pool.hold(page)
                other._append(page)
            return other

    def truncate(self, n: int) -> None:
        """Forgets all but the first n positions."""
        if not 0 <= n <= self.length:
            raise ArgumentError(f"n: expected 0..{self.length} positions, got {n}")
        with self.pool.lock:
            del self.token_ids[n:]
            del self.digests[n // PAGE :]
            while len(self.pages) * PAGE >= n + PAGE:
                self.pool.release(self.pages.pop())

    def close(self) -> None:
        """Gives all pages back; the sequence is empty then."""
        self.truncate(0)

    __del__ = close

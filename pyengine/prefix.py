"""The prefix cache: full KV pages by the tokens that they and all pages before them hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 16


class Cached(Protocol):
    """What the cache keeps: a page, of which it asks who else holds it."""

    n_holder: int  # sequences that have it
    digest: bytes | None  # its key while it is in the cache


@dataclass
class PrefixCounters:
    """What the cache did since the model was loaded."""

    prompt_tokens: int = 0  # of the prompts that were looked up
    reused_tokens: int = 0  # of these, how many didn't have to run
    evicted_pages: int = 0


def digests(token_ids: NDArray[np.int32], page: int, before: bytes = b"") -> Iterator[bytes]:
    """The key of each full page of `page` tokens: a hash of its tokens and of the key of the page before it."""
    for start in range(0, len(token_ids) - page + 1, page):
        before = blake2b(before + token_ids[start : start + page].tobytes(), digest_size=DIGEST_BYTES).digest()
        yield before


class PrefixCache:
    """Full pages, the least recently used first.

    A page is used with all pages before it, and these count as used after it. So the end of a prefix always goes
    before its beginning, without which it could not be found. Not locked: the pool does that.
    """

    def __init__(self) -> None:
        self.pages: OrderedDict[bytes, Cached] = OrderedDict()
        self.counters = PrefixCounters()

    def find(self, keys: list[bytes]) -> list[Cached]:
        """The pages of the longest beginning of `keys` that is here."""
        found = []
        for key in keys:
            page = self.pages.get(key)
            if page is None:
                break
            found.append(page)
        for key in reversed(keys[: len(found)]):
            self.pages.move_to_end(key)
        return found

    def put(self, key: bytes, page: Cached) -> Cached:
        """Keeps a page; returns the one with this content that was here before, if there is one."""
        kept = self.pages.setdefault(key, page)
        if kept is page:
            page.digest = key
        return kept

    def evict(self) -> bool:
        """Forgets the least recently used page that no sequence holds; False if there is none."""
        for key, page in self.pages.items():
            if page.n_holder == 0:
                del self.pages[key]
                page.digest = None
                self.counters.evicted_pages += 1
                return True
        return False

    def clear(self) -> None:
        """Forgets all pages; those that sequences hold stay theirs."""
        for page in self.pages.values():
            page.digest = None
        self.pages.clear()

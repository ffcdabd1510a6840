"""How much memory the KV pool may take."""

from __future__ import annotations

import os
from numbers import Integral

from .cgroup import memory_left
from .errors import ArgumentError, ArgumentTypeError
from .kv import PAGE

SHARE = 0.5  # of the memory that is left once the weights are there


def choose_pages(kv_memory: int | None, page_nbytes: int, max_pages: int, max_batch: int) -> int:
    """How many pages the pool may have: as many as `kv_memory` bytes hold, or by default as max_batch sequences of the
    whole context need, but at most half of the memory that is left. One sequence of the whole context fits in any
    case.

    Raises ArgumentError for less than a page.
    """
    if kv_memory is None:
        left = available_memory()
        most = max_batch * max_pages
        return most if left is None else max(min(most, int(SHARE * left) // page_nbytes), max_pages)
    if isinstance(kv_memory, bool) or not isinstance(kv_memory, Integral):
        raise ArgumentTypeError(f"kv_memory: expected a number of bytes, got {kv_memory!r}")
    if kv_memory < page_nbytes:
        raise ArgumentError(f"kv_memory: expected at least {page_nbytes:,} bytes ({PAGE} positions), got {kv_memory:,}")
    return int(kv_memory) // page_nbytes


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping, its cgroup's limit included; None: nobody tells."""
    found = [memory_left(), _system()]
    known = [value for value in found if value is not None]
    return max(int(min(known)), 0) if known else None


def _system() -> float | None:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) / 2
    except (AttributeError, OSError, ValueError):
        return None

"""How many threads a model runs on, and why: the least of the CPUs that this process may use and the quota of its
cgroup.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Integral

from ._native.parallel import MOST_THREADS, usable_cpus
from .cgroup import cpu_quota
from .errors import ArgumentError, ArgumentTypeError

VARIABLE = "PYENGINE_NUM_THREADS"


@dataclass(frozen=True)
class Threads:
    """A number of threads and the reason for it."""

    count: int
    reason: str


def choose_threads(requested: int | None = None) -> Threads:
    """The number of threads: what was requested, else PYENGINE_NUM_THREADS, else what the CPUs and the cgroup allow.

    Raises ArgumentError for a number outside 1..1024.
    """
    if requested is not None:
        return Threads(_checked("threads", requested), "as requested")
    if os.environ.get(VARIABLE):
        try:
            return Threads(_checked(VARIABLE, int(os.environ[VARIABLE])), f"set by {VARIABLE}")
        except ValueError:
            raise ArgumentError(f"{VARIABLE}: expected 1..{MOST_THREADS}, got {os.environ[VARIABLE]!r}") from None
    cpus = usable_cpus()
    quota = cpu_quota()
    if quota is not None and quota < cpus:
        count = min(max(1, math.floor(quota)), MOST_THREADS)
        return Threads(count, f"the cgroup's CPU quota of {quota:g}, of {cpus} CPUs")
    return Threads(min(cpus, MOST_THREADS), f"{cpus} CPUs that this process may run on")


def _checked(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentTypeError(f"{name}: expected an integer, got {value!r}")
    count = int(value)
    if not 1 <= count <= MOST_THREADS:
        raise ArgumentError(f"{name}: expected 1..{MOST_THREADS}, got {count}")
    return count

"""How many threads a model runs on, and why: the least of the CPUs that this process may use and the quota of its
cgroup.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from ._native.parallel import MOST_THREADS
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
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
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


def cgroup_quota(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that this process may use, the least of its cgroup and all above it (v2 and v1); None: no
    limit.
    """
    quotas = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, _, rest = line.partition(":")  # hierarchy:controllers:path
        controllers, colon, path = rest.partition(":")
        if not colon:
            continue
        if controllers == "":
            quotas += _walk(root, path, _v2)
        elif "cpu" in controllers.split(","):
            quotas += _walk(root / "cpu", path, _v1)
    return min(quotas, default=None)


def _walk(root: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    folder = root / path.strip("/")
    found = []
    while True:
        try:
            quota = read(folder)
        except (OSError, ValueError, ZeroDivisionError):
            quota = None  # no such file at this level, or none that can be understood: no limit there
        if quota is not None:
            found.append(quota)
        if folder == root or root not in folder.parents:
            return found
        folder = folder.parent


def _v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())

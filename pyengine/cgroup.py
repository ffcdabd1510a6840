"""What the cgroups of this process allow it (Linux; versions 1 and 2): CPU time, memory, and memory nodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
STATUS = Path("/proc/self/status")

Reader = Callable[[Path], float | None]


def cpu_quota(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs' worth of time that this process may use; None: no limit."""
    return _least(root, membership, "cpu", _cpu_v2, _cpu_v1)


def memory_left(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Bytes that this process can still take; None: no limit."""
    return _least(root, membership, "memory", _memory_v2, _memory_v1)


def memory_nodes(status: Path = STATUS) -> int:
    """How many memory nodes this process may use; 1 where nobody tells."""
    try:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        ranges = [[int(n) for n in part.split("-")] for part in fields["Mems_allowed_list"].split(",")]
        return sum(part[-1] - part[0] + 1 for part in ranges)
    except (OSError, KeyError, ValueError):
        return 1


def _least(root: Path, membership: Path, controller: str, read_v2: Reader, read_v1: Reader) -> float | None:
    """The least of what the cgroup of this process and all above it allow."""
    found: list[float] = []
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
            found += _walk(root, path, read_v2)
        elif controller in controllers.split(","):
            found += _walk(root / controller, path, read_v1)
    return min(found, default=None)


def _walk(root: Path, path: str, read: Reader) -> list[float]:
    folder = root / path.strip("/")
    found = []
    while True:
        try:
            value = read(folder)
        except (OSError, ValueError, ZeroDivisionError):
            value = None  # no such file at this level, or none that can be understood: no limit there
        if value is not None:
            found.append(value)
        if folder == root or root not in folder.parents:
            return found
        folder = folder.parent


def _cpu_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _cpu_v1(folder: Path) -> float | None:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())


def _memory_v2(folder: Path) -> float | None:
    limit = (folder / "memory.max").read_text().strip()
    return None if limit == "max" else int(limit) - _used(folder, "memory.current")


def _memory_v1(folder: Path) -> float | None:
    return int((folder / "memory.limit_in_bytes").read_text()) - _used(folder, "memory.usage_in_bytes")


def _used(folder: Path, name: str) -> int:
    """Bytes that can't be had: the file cache that is not in use goes when memory is short."""
    lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    stat = {key: int(value) for key, value in lines}
    return int((folder / name).read_text()) - stat.get("total_inactive_file", stat.get("inactive_file", 0))

"""How many threads: asked for, by the environment, by the CPUs that may be used, by the quota of the cgroup."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pyengine import threads
from pyengine._native import parallel
from pyengine._native.parallel import taken
from pyengine.cgroup import cpu_quota, memory_nodes
from pyengine.errors import ArgumentError, ArgumentTypeError
from pyengine.threads import MOST_THREADS, VARIABLE, choose_threads


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight CPUs, no quota, nothing in the environment."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 8)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_is_asked_for_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "5")
    assert choose_threads(3).count == 3
    assert choose_threads(np.int64(3)).count == 3  # type: ignore[arg-type]
    assert choose_threads(MOST_THREADS).count == MOST_THREADS


def test_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "5")
    assert choose_threads().count == 5
    assert VARIABLE in choose_threads().reason
    monkeypatch.setenv(VARIABLE, "")
    assert choose_threads().count == 8


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "two", "1025", "99999999999999999999", " "])
def test_rubbish_in_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ArgumentError, match=f"{VARIABLE}: expected 1..1024, got '{value}'"):
        choose_threads()


@pytest.mark.parametrize("value", [0, -1, 1025, 10**30])
def test_bad_number(value: int) -> None:
    with pytest.raises(ArgumentError, match=f"threads: expected 1..1024, got {value}"):
        choose_threads(value)


@pytest.mark.parametrize("value", [True, "2", 2.0, [2]])
def test_no_number(value: object) -> None:
    with pytest.raises(ArgumentTypeError, match="threads: expected an integer, got "):
        choose_threads(value)  # type: ignore[arg-type]


def test_then_the_cpus_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_threads().count == 8
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    assert choose_threads().count == 2
    assert "2 CPUs" in choose_threads().reason
    monkeypatch.setattr(threads, "usable_cpus", lambda: 5000)
    assert choose_threads().count == MOST_THREADS


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="nobody tells which CPUs it may use")
@pytest.mark.parametrize("bind", ["false", "true"])
def test_cpus_are_those_of_the_process(bind: str) -> None:
    """Also where OpenMP binds threads to CPUs, the one that asks to a single one."""
    count = "from pyengine._native.parallel import usable_cpus; print(usable_cpus())"
    env = os.environ | {"OMP_PROC_BIND": bind}
    done = subprocess.run([sys.executable, "-P", "-c", count], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(os.sched_getaffinity(0))


def started(n_threads: int) -> int:
    """How many threads a region of a fresh thread starts."""
    tasks = Path("/proc/self/task")
    counts = []

    def run() -> None:
        before = set(tasks.iterdir())
        assert np.array_equal(taken(n_threads, 3, 8, 0), np.ones((3, 8)))
        counts.append(len(set(tasks.iterdir()) - before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return counts[0]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="nobody tells which threads there are")
def test_no_more_threads_than_cpus_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(4) == 3
    monkeypatch.setattr(parallel, "usable_cpus", lambda: 2)
    assert started(4) == 1
    monkeypatch.setattr(parallel, "usable_cpus", lambda: 1)
    assert started(4) == 0


@pytest.mark.parametrize(("quota", "count"), [(2.9, 2), (1.0, 1), (0.5, 1), (8.0, 8), (20.0, 8), (None, 8)])
def test_the_quota_is_rounded_down(monkeypatch: pytest.MonkeyPatch, quota: float | None, count: int) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    chosen = choose_threads()
    assert chosen.count == count
    assert ("quota" in chosen.reason) == (quota is not None and quota < 8)


V2 = "0::/user.slice/app\n"
V1 = "12:cpuset:/\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n"

CGROUPS: dict[str, tuple[str, dict[str, str], float | None]] = {
    "v2": (V2, {"user.slice/app/cpu.max": "150000 100000\n"}, 1.5),
    "v2 without a limit": (V2, {"user.slice/app/cpu.max": "max 100000\n", "cpu.max": "max 100000\n"}, None),
    "v2, the least of all levels": (
        V2,
        {"user.slice/app/cpu.max": "800000 100000\n", "user.slice/cpu.max": "250000 100000\n", "cpu.max": "max 100000"},
        2.5,
    ),
    "v2 in a container, whose own cgroup is the root": (V2, {"cpu.max": "300000 100000\n"}, 3.0),
    "v2 outside of the namespace": ("0::/../../other\n", {"cpu.max": "400000 100000\n"}, 4.0),
    "v2 without the controller": (V2, {}, None),
    "v2 that isn't understood": (V2, {"user.slice/app/cpu.max": "much\n", "cpu.max": "200000 100000\n"}, 2.0),
    "v1": (V1, {"cpu/docker/abc/cpu.cfs_quota_us": "350000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, 3.5),
    "v1 without a limit": (
        V1,
        {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "v1 in a container": (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    "v1, another controller's": (
        "3:cpuset:/a\n",
        {"cpu/a/cpu.cfs_quota_us": "1\n", "cpu/a/cpu.cfs_period_us": "1\n"},
        None,
    ),
    "v1 with a period of nothing": (V1, {"cpu/cpu.cfs_quota_us": "5\n", "cpu/cpu.cfs_period_us": "0\n"}, None),
    "both": (
        V1 + V2,
        {
            "cpu/docker/abc/cpu.cfs_quota_us": "600000",
            "cpu/docker/abc/cpu.cfs_period_us": "100000",
            "user.slice/cpu.max": "700000 100000",
        },
        6.0,
    ),
    "a name with colons": ("0::/a:b:c\n", {"a:b:c/cpu.max": "100000 100000"}, 1.0),
    "nothing": ("", {}, None),
    "a line that isn't understood": ("rubbish\n" + V2, {"cpu.max": "100000 100000"}, 1.0),
}


@pytest.mark.parametrize(("membership", "files", "expected"), CGROUPS.values(), ids=CGROUPS)
def test_cgroup(tmp_path: Path, membership: str, files: dict[str, str], expected: float | None) -> None:
    write(tmp_path / "membership", membership)
    root = tmp_path / "root"
    root.mkdir()
    for name, text in files.items():
        write(root / name, text)
    assert cpu_quota(root, tmp_path / "membership") == expected


def test_no_cgroups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path, tmp_path / "membership") is None


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("Name:\tx\nMems_allowed:\t0001\nMems_allowed_list:\t0\n", 1),
        ("Mems_allowed_list:\t0-3\n", 4),
        ("Mems_allowed_list:\t0,2-3,8\n", 4),
        ("Mems_allowed_list:\t\n", 1),
        ("Name:\tx\n", 1),
        ("rubbish\n", 1),
    ],
)
def test_memory_nodes(tmp_path: Path, status: str, expected: int) -> None:
    (tmp_path / "status").write_text(status)
    assert memory_nodes(tmp_path / "status") == expected
    assert memory_nodes(tmp_path / "none") == 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("n_unit", [1, 2, 3, 5, 16, 97, 1000])
def test_every_unit_is_done_once(n: int, n_unit: int) -> None:
    """Whoever comes when: no unit is left out or done twice, and no phase waits for threads that are late."""
    for n_late in {0, 1, n // 2, n - 1}:
        if n_late < n:
            assert (taken(n, 20, n_unit, n_late) == 1).all()

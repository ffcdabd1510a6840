"""Native memory: in the hands of the garbage collector, and on which memory node weights lie."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pyengine._native.matmul import DTYPES, PackedMatrix
from pyengine._native.memory import Arena
from pyengine._native.packing import Loader
from pyengine.cgroup import memory_nodes

CYCLE = """
import gc
from pyengine._native.memory import Arena, Block

for arena in [Arena(), Arena(2), None] * 50:
    block = Block(64, "test", arena)
    cycle = [block]  # younger than the block: the collector clears what the block refers to before it frees it
    cycle.append(cycle)
    del block, cycle
    gc.collect()
"""


def test_a_block_in_a_cycle() -> None:
    """A part of an arena isn't freed by itself, also where the collector has taken its arena from it."""
    done = subprocess.run([sys.executable, "-P", "-c", CYCLE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are in memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("threads", "nodes"), [(1, 1), (2, 1), (3, 2), (64, 2)])
@pytest.mark.parametrize("n_out", [70, 4500])  # few units for many threads
def test_all_of_a_matrix_is_touched(dtype: str, threads: int, nodes: int, n_out: int) -> None:
    """By some thread: each touches its own share, and together they are everything; and nothing else is."""
    arena = Arena(nodes)
    matrix = PackedMatrix(n_out, 900, dtype, arena)
    after = PackedMatrix(n_out, 2000, dtype, arena)  # behind the first one in memory
    forget(after.parts[0])
    before = in_memory(after.parts[0])
    assert not before[1:-1].any()
    Loader(threads).touch([matrix])
    for part in matrix.parts:
        assert in_memory(part).all()
    if nodes > 1:  # else they share a huge page
        assert np.array_equal(in_memory(after.parts[0])[1:], before[1:])  # an allocator may have written to its start


def in_memory(part: object) -> np.ndarray:
    """Whether each page that starts in a buffer is in memory."""
    data = np.frombuffer(part, np.uint8)  # type: ignore[call-overload]
    first, n_page = pages(data)
    found = np.empty(n_page, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(n_page * PAGE), ctypes.c_void_p(found.ctypes.data)) == 0
    return found & 1 == 1


def forget(part: object) -> None:
    """Takes the whole pages of a buffer from memory, where the allocator gave what somebody had before."""
    first, n_page = pages(np.frombuffer(part, np.uint8))  # type: ignore[call-overload]
    libc = ctypes.CDLL(None, use_errno=True)
    dont_need = 4
    assert libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t((n_page - 1) * PAGE), dont_need) == 0


PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def pages(data: np.ndarray) -> tuple[int, int]:
    """Where the first page that starts in an array starts, and how many such pages there are."""
    first = -(-data.ctypes.data // PAGE) * PAGE
    return first, -(-(data.ctypes.data + data.nbytes - first) // PAGE)


# Prints the memory node of each page of a matrix that was touched by threads on the first CPU of two nodes.
NODES = """
import ctypes, json, sys
import numpy as np
from pyengine._native.matmul import PackedMatrix
from pyengine._native.memory import Arena
from pyengine._native.packing import Loader
sys.path.insert(0, sys.argv[1])
from test_memory import PAGE, pages

matrix = PackedMatrix(8192, 1024, sys.argv[3], Arena(2))
Loader(2).touch([matrix])
first, n_page = pages(np.frombuffer(matrix.parts[0], np.uint8))
addresses = first + PAGE * np.arange(n_page)
nodes = np.empty(n_page, np.int32)
MOVE_PAGES = {"x86_64": 279, "aarch64": 239}[sys.argv[2]]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(MOVE_PAGES, 0, ctypes.c_ulong(n_page), ctypes.c_void_p(addresses.ctypes.data), None,
                    ctypes.c_void_p(nodes.ctypes.data), 0) == 0
print(json.dumps(nodes.tolist()))
"""


@pytest.mark.skipif(memory_nodes() < 2, reason="needs a machine with two memory nodes")
@pytest.mark.parametrize("dtype", ["float32", "int4"])  # in huge pages, and in small ones
def test_weights_lie_near_the_threads_that_read_them(dtype: str) -> None:
    """Where OpenMP's threads stay where they are, one on each node: each reads a half of the matrix in decoding."""
    nodes = [int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*")]
    cpus = {node: Path(f"/sys/devices/system/node/node{node}/cpulist").read_text().split(",")[0] for node in nodes}
    first, second = sorted(node for node, text in cpus.items() if text.strip())[:2]
    places = ",".join("{" + cpus[node].split("-")[0].strip() + "}" for node in (first, second))
    command = [sys.executable, "-P", "-c", NODES, str(Path(__file__).parent), os.uname().machine, dtype]
    env = os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": places}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    half = len(found) // 2  # the page in the middle is of either
    assert set(found[: half - 1]) == {first}
    assert set(found[half + 1 :]) == {second}

"""Native memory, in the hands of the garbage collector."""

from __future__ import annotations

import subprocess
import sys

CYCLE = """
import gc
from pyengine._native.memory import Arena, Block

for arena in [Arena(), None] * 50:
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

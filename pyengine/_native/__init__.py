"""The native modules: loops over threads, panels, rows and heads. They import nothing of pyengine but its errors."""

import os

# At the end of a parallel region libgomp's threads wait for each other, and for milliseconds they spin. A thread that
# another process keeps off its core then holds up all: on a busy machine a step takes ten times as long. Here no thread
# waits for one that has no work (team.h), so libgomp may sleep after some microseconds. It reads this when it is
# loaded.
_SPIN = "GOMP_SPINCOUNT"
if _SPIN not in os.environ and "OMP_WAIT_POLICY" not in os.environ:
    os.environ[_SPIN] = "2000"
    try:
        from . import parallel as parallel
    finally:
        del os.environ[_SPIN]

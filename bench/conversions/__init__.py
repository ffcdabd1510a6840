"""What engines load that don't read a checkpoint as it is: made once, and how long that took.

An engine's module here is imported by its `convert` alone: what a conversion needs, pyengine's reader of checkpoints
among it, would count as the engine's own imports elsewhere.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path


def once(path: Path, make: Callable[[Path], None], source: Path | None = None) -> Path:
    """Makes a file or a folder unless it is there; what breaks off half-way doesn't count as there.

    Beside it stands how long that took, with what its `source` took, if it is made from one.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name("unfinished-" + path.name)
        shutil.rmtree(unfinished, ignore_errors=True)
        start = time.perf_counter()
        make(unfinished)
        seconds = time.perf_counter() - start
        before = 0.0 if source is None else seconds_of(source)
        if before is not None:
            _told(path).write_text(str(before + seconds))
        os.replace(unfinished, path)
    return path


def seconds_of(path: Path) -> float | None:
    """How long it took to make what `once` returned; None where nobody wrote it down."""
    return float(_told(path).read_text()) if _told(path).exists() else None


def _told(path: Path) -> Path:
    return path.with_name(path.name + ".seconds")

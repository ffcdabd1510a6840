"""A process with one engine in one variant, told by JSON lines on its standard input what to do: one line an answer.

    python -m bench.worker llama_cpp Q8_0

`compare` starts it. Every variant has a process of its own, so that no engine's threads or memory meet another's. The
first line comes unasked, once the engine is imported.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bench import check
from bench.conversions import seconds_of
from bench.engines import Base, NotAvailable, engine_class
from bench.metrics import Metric

Answer = dict[str, Any]


class Worker:
    """What the lines call: a method's name stands in "do", its arguments in the other keys."""

    def __init__(self, engine: type[Base], variant: str) -> None:
        self.engine = engine
        self.variant = variant

    def convert(self, checkpoint: str, work: str) -> Answer:
        """Makes the files that the engine loads, once; seconds that it took then, null where nobody knows."""
        files = self.engine.convert(Path(checkpoint), Path(work), self.variant)
        return {"files": str(files), "seconds": 0.0 if files == Path(checkpoint) else seconds_of(files)}

    def load(self, files: str, threads: int) -> Answer:
        """Loads; seconds until it is done."""
        start = time.perf_counter()
        self.model = self.engine(Path(files), self.variant, threads)
        return {"seconds": time.perf_counter() - start}

    def run(self, metric: Answer, vocab_size: int, seed: int) -> Answer:
        """A timed run of a metric on random prompts."""
        what = Metric(**metric)
        run = self.model.generate(what.prompts(vocab_size, seed), what.new_tokens + 1)
        return {"rate": what.rate(run), "seconds": run.seconds}

    def greedy(self, prompts: list[list[int]], n_new: int) -> Answer:
        """What the engine continues prompts with."""
        return {"tokens": self.model.generate(prompts, n_new).tokens}

    def save_logits(self, text: list[int], path: str) -> Answer:
        """Writes the logits at all positions of a text to a file: they are long for a line of JSON."""
        np.save(path, self.model.logits(text))
        return {}

    def compare_logits(self, text: list[int], path: str) -> Answer:
        """How far the logits are from those that another worker wrote; null where the engine doesn't show them."""
        logits = self.model.logits(text)
        return {"logits": None if logits is None else check.difference(logits, np.load(path))}

    def judge(self, prompts: list[list[int]], tokens: list[list[int]]) -> Answer:
        """What this model thinks of another's continuations: the mean regret."""
        pairs = zip(prompts, tokens, strict=True)
        regrets = [check.regret(self.model.logits(prompt + new), new) for prompt, new in pairs]
        return {"regret": float(np.mean(regrets))}

    def limits(self, threads: int, megabytes: int) -> Answer:
        """What the machine can do now, by our own kernels."""
        from pyengine._native import limits, simd

        bandwidth = {n: limits.read_bandwidth(n, megabytes << 20) for n in range(1, threads + 1)}
        found: Answer = {"bandwidth_by_threads": bandwidth, "bandwidth": bandwidth[threads], "simd": simd.active()}
        for name in ("peak_float32", "peak_bfloat16", "peak_int8"):
            if hasattr(limits, name):
                found[name] = getattr(limits, name)(threads)
        return found

    def memory(self) -> Answer:
        """The most memory that the process has had so far, files that it has mapped included."""
        return {"bytes": peak_memory()}


def version(package: str) -> str:
    """A distribution's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # ours, built in place and not installed
        return str(getattr(sys.modules.get(package), "__version__", "unknown"))


def peak_memory() -> int:
    """VmHWM, else what getrusage calls the largest resident set: elsewhere than on Linux."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10


def answer(call: Callable[[], Answer]) -> Answer:
    """A call's answer, or why there is none."""
    try:
        return call()
    except NotAvailable as error:
        return {"skipped": str(error)}
    except Exception as error:  # an engine may raise anything; the comparison goes on without it
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def serve(name: str, variant: str, replies: TextIO) -> None:
    """Imports the engine, then answers line by line until there are no more."""
    start = time.perf_counter()
    worker: Worker | None = None

    def begin() -> Answer:
        nonlocal worker
        engine = engine_class(name)
        worker = Worker(engine, variant)
        versions = {package: version(package) for package in engine.packages}
        seconds = time.perf_counter() - start
        return {"import_seconds": seconds, "bytes": peak_memory(), "versions": versions, "settings": engine.settings}

    print(json.dumps(answer(begin)), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        method = getattr(worker, request.pop("do"))
        print(json.dumps(answer(lambda: method(**request))), file=replies, flush=True)  # noqa: B023


def die_with_parent() -> None:
    """Has the system kill this process when the one that started it ends, however that ends: stopped, it would stay."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    # What libraries print goes to standard error, even from C, and doesn't garble the answers.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        serve(sys.argv[1], sys.argv[2], out)

"""Thousands of requests of all kinds, most of which don't come to their end as they should, on a tiny model: cancelled,
dropped, waited for too short a time, refused, with callbacks that raise. At the end no request runs and no page is
used, and memory has not grown since the first half.

    python -m bench.soak [--requests 24000] [--seed 0]

Memory that grows is a leak, or what malloc keeps; so its growth is told in bytes a request, and only what no heap needs
counts as a failure. The heap reaches its size within some 10,000 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.random_checkpoint import write
from pyengine import ArgumentError, Model, load

Requests = list[Any]
KV_MEMORY = 230_000  # bytes, 14 pages: so that requests pause for each other
MOST_GROWTH = 200  # bytes a request


def rss() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Soak:
    """What to do with a model, at random."""

    model: Model
    rng: random.Random

    def params(self) -> dict[str, Any]:
        """Samples, beams, stops: what a request may ask for."""
        kind = self.rng.choice(
            [
                {"temperature": 0},
                {"top_p": 0.9, "seed": 1},
                {"num_return_sequences": 3},
                {"num_beams": 3},
                {"stop_token_ids": [3, 4], "repetition_penalty": 1.2},
                {"logprobs": 3},
            ]
        )
        return {"max_new_tokens": self.rng.randint(1, 40)} | kind

    def prompt(self) -> list[int]:
        """Some begin the same, for the prefix cache."""
        n = self.rng.randint(1, 200)
        return [7] * n if self.rng.random() < 0.3 else [self.rng.randrange(300) for _ in range(n)]

    def submit(self) -> Any:
        return self.model.submit(self.prompt(), **self.params())

    def waited_for(self) -> Requests:
        return [self.submit()]

    def cancelled(self) -> Requests:
        request = self.submit()
        if self.rng.random() < 0.5:
            time.sleep(self.rng.uniform(0, 0.003))
        request.cancel()
        return [request]

    def too_late(self) -> Requests:
        request = self.submit()
        try:
            request.result(timeout=self.rng.uniform(0, 0.002))
        except TooLate:
            request.cancel()
        return [request]

    def raising(self) -> Requests:
        def callback(_: Any) -> None:
            raise RuntimeError("of a callback")

        request = self.submit()
        request.add_done_callback(callback)
        return [request]

    def dropped(self) -> Requests:
        stream = self.model.stream(self.prompt(), max_new_tokens=self.rng.randint(1, 60))
        for _ in range(self.rng.randint(0, 5)):
            next(stream, None)
        return []

    def batch(self) -> Requests:
        self.model.generate([self.prompt() for _ in range(4)], **self.params())
        return []

    def scored(self) -> Requests:
        self.model.score([1, *self.prompt()])
        return []

    def refused(self) -> Requests:
        bad: list[dict[str, Any]] = [{"temperature": -1}, {"stop_token_ids": [10**6]}, {"stop": ""}]
        with contextlib.suppress(ArgumentError):
            self.model.submit(self.prompt(), **({"max_new_tokens": 2} | self.rng.choice(bad)))
        return []

    def awaited(self) -> Requests:
        async def leave() -> None:
            async for _ in self.model.astream(self.prompt(), max_new_tokens=30):
                if self.rng.random() < 0.3:
                    break

        asyncio.run(leave())
        return []

    def run(self, n: int) -> None:
        """n requests, some dozens at one time."""
        kinds: list[Callable[[], Requests]] = [self.waited_for, self.cancelled, self.too_late, self.raising]
        kinds += [self.dropped, self.batch, self.scored, self.refused, self.awaited, self.cancelled]
        running: Requests = []
        for _ in range(n):
            running += self.rng.choice(kinds)()
            while len(running) > 50:
                with contextlib.suppress(CancelledError):
                    running.pop(self.rng.randrange(len(running))).result(timeout=60)
        for request in running:
            with contextlib.suppress(CancelledError):
                request.result(timeout=60)


def at_rest(model: Model, seconds: float = 30.0) -> bool:
    """Whether nothing runs and no page is used, soon: what was dropped ends with the next step."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        now = model.stats
        if now.running == now.waiting == now.kv_pages_used == 0:
            return True
        time.sleep(0.01)
    return False


def soak(n: int, seed: int) -> tuple[Model, float]:
    """The model after n requests, and by how many bytes a request of the second half memory has grown."""
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)  # tells of each callback that raises
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), "tiny")
        model = load(folder, threads=2, max_batch=8, kv_memory=KV_MEMORY)
    work = Soak(model, random.Random(seed))
    work.run(n // 2)
    gc.collect()
    before = rss()
    work.run(n - n // 2)
    gc.collect()
    return model, (rss() - before) / (n - n // 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    model, growth = soak(arguments.requests, arguments.seed)
    rested = at_rest(model)
    print(f"{arguments.requests:,} requests in {time.perf_counter() - start:.0f} s; {model.stats}")
    print(f"memory: {rss() / 1e6:.1f} MB, {growth:+.0f} bytes a request in the second half")
    sys.exit(not rested or growth > MOST_GROWTH)


if __name__ == "__main__":
    main()

"""The scheduler while requests come and go: throughput, the wait for a first token, what it leaves other threads, and
what a step costs beside the engine.

    python -m bench.arrivals FOLDER [--dtype int8] [--rounds 3] [PART ...]

throughput  32 requests of mixed lengths (prompts of 16 to 160 tokens, 24 to 96 new ones), greedy: all at once, against
            the same ones that arrive one by one, at random times of the first fourth or half of what all at once took.
            Tokens generated, by the time from the first request to the last one's end; there is no time without a
            request in it. So the wait for the last arrival and the smaller batch until then count against arrivals.
first-token a prompt of 20 tokens is submitted while 16 sequences decode and a prompt of 900 is in its second step.
            Steps that end until its first token is there, the one that runs when it comes included.
ticks       the longest that a thread, which wakes every 10 ms, waits while a prompt of 1,000 tokens runs; and the same
            while nothing runs.
overhead    the time from one decode step to the next, in `submit`ted requests and in a bare loop of `Executor.step` and
            an argmax, for 8 and 32 sequences; interleaved, compared within each round, the median of its steps.
batch       a batch job of 128 requests of 32 tokens and 64 new ones, as `pyengine batch` runs it, against the bare loop
            with the same prompts, 32 at a time. Generated tokens by the whole time, prompts and JSON included.
profile     where the time between steps goes: cProfile in the engine's thread, for 32 sequences.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np

from pyengine import Model, load
from pyengine.batch import Job
from pyengine.batch import run as run_batch
from pyengine.executor import Rows

Request = tuple[list[int], dict[str, Any]]
SAMPLED = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
GREEDY = {"temperature": 0.0}


def spread(values: list[float], form: str = ".2f") -> str:
    """The median, the least and the most."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


@contextmanager
def recorded(model: Model) -> Iterator[list[tuple[float, float, int]]]:
    """(start, end, tokens) of each step that the model runs."""
    steps: list[tuple[float, float, int]] = []
    step, decode = model.executor.step, model.executor.decode

    def timed(rows: Any) -> Any:
        start = time.perf_counter()
        logits = step(rows)
        steps.append((start, time.perf_counter(), sum(len(one.token_ids) for one in rows)))
        return logits

    def timed_ahead(rows: Any, *arguments: Any) -> Iterator[Any]:
        start = time.perf_counter()
        several = decode(rows, *arguments)
        first = next(several)  # by then all are computed
        end, n = time.perf_counter(), 0
        for drawn in chain([first], several):
            yield drawn
            n += 1
        for i in range(n):  # as if each had taken the same time
            steps.append((start + (end - start) * i / n, start + (end - start) * (i + 1) / n, len(rows)))

    model.executor.step = timed  # type: ignore[method-assign]
    model.executor.decode = timed_ahead  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        model.executor.step, model.executor.decode = step, decode  # type: ignore[method-assign]


def prompt(model: Model, rng: np.random.Generator, n: int) -> list[int]:
    """Random token ids."""
    return rng.integers(0, model.plan.vocab_size - 1, n).tolist()


def run(model: Model, requests: list[Request], times: list[float]) -> float:
    """Tokens a second of requests that are submitted at these times, from the first to the last one's end."""
    start = time.perf_counter()
    running = []
    for (token_ids, params), at in zip(requests, times, strict=True):
        time.sleep(max(start + at - time.perf_counter(), 0))
        running.append(model.submit(token_ids, ignore_eos=True, **params))
    n_token = sum(request.result().usage.completion_tokens for request in running)
    return n_token / (time.perf_counter() - start)


def throughput(model: Model, rounds: int) -> None:
    """Arrivals against a static batch."""
    shares = {"a fourth": 0.25, "half": 0.5}
    rates: dict[str, list[float]] = {name: [] for name in ("at once", *shares)}
    for i in range(rounds + 1):
        rng = np.random.default_rng(i)
        lengths = zip(rng.integers(16, 161, 32).tolist(), rng.integers(24, 97, 32).tolist(), strict=True)
        requests = [(prompt(model, rng, n), {"max_new_tokens": new} | GREEDY) for n, new in lengths]
        n_token = sum(params["max_new_tokens"] for _, params in requests)
        static = run(model, requests, [0.0] * 32)
        found = {"at once": static}
        for name, share in shares.items():
            times = np.sort(rng.uniform(0, share * n_token / static, 32))
            found[name] = run(model, requests, (times - times[0]).tolist())
        if i:  # the first round is a warm-up
            for name, rate in found.items():
                rates[name].append(rate)
    print(f"32 mixed requests at once      {spread(rates['at once'], ',.0f')} tokens/s")
    for name in shares:
        ratios = [rate / static for rate, static in zip(rates[name], rates["at once"], strict=True)]
        print(f"arriving in {name:<8} of that  {spread(rates[name], ',.0f')} tokens/s, x {spread(ratios)}")


def first_token(model: Model, rounds: int) -> None:
    """A short prompt behind a long one."""
    waits, n_steps, paces = [], [], []
    for i in range(4 * rounds):
        rng = np.random.default_rng(i)
        with recorded(model) as steps:
            params = {"max_new_tokens": 400, "ignore_eos": True} | GREEDY
            decoding = [model.submit(prompt(model, rng, 20), **params) for _ in range(16)]
            for request in decoding:
                next(iter(request))
            long = model.submit(prompt(model, rng, 900), max_new_tokens=1, **GREEDY)
            n_seen = len(steps)
            while sum(n > 16 for _, _, n in steps[n_seen:]) < 2:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))  # or else it would always come between two steps
            called = time.perf_counter()
            usage = model.submit(prompt(model, rng, 20), max_new_tokens=1, **GREEDY).result().usage
            assert not long.done()
            for request in [*decoding, long]:
                request.cancel()
                request.join()
        came = called + usage.time_to_first_token
        ends = [(start, end) for start, end, _ in steps if called < end <= came]
        waits.append(1e3 * usage.time_to_first_token)
        n_steps.append(float(len(ends)))
        paces.append(1e3 * statistics.median(end - start for start, end in ends))
    print(f"first token of 20 behind 900   {spread(waits, '.1f')} ms, {spread(n_steps, '.0f')} steps ended meanwhile")
    print(f"  a step of these              {spread(paces, '.1f')} ms")


def ticks(model: Model, rounds: int) -> None:
    """What a Python thread gets while a prompt runs."""
    n = min(1000, model.plan.max_seq_len)

    def longest(work: Any) -> float:
        gaps, going = [], True

        def tick() -> None:
            last = time.perf_counter()
            while going:
                time.sleep(0.01)
                now = time.perf_counter()
                gaps.append(1e3 * (now - last))
                last = now

        thread = threading.Thread(target=tick)
        thread.start()
        work()
        going = False
        thread.join()
        return max(gaps)

    busy, idle = [], []
    for i in range(4 * rounds):
        token_ids = prompt(model, np.random.default_rng(i), n)
        busy.append(longest(lambda token_ids=token_ids: model.generate(token_ids, max_new_tokens=1, **GREEDY)))
        idle.append(longest(lambda: time.sleep(0.2)))
    print(f"longest gap between ticks      {spread(busy, '.1f')} ms while a prompt of {n} runs")
    print(f"  with nothing to do           {spread(idle, '.1f')} ms")


def bare(model: Model, prompts: list[list[int]], n_new: int) -> list[float]:
    """Seconds from one decode step to the next, in a loop of `Executor.step` and an argmax."""
    executor = model.executor
    sequences = [executor.new_sequence() for _ in prompts]
    best = []
    at_once = executor.max_rows // len(prompts[0])
    for first in range(0, len(prompts), at_once):
        some = zip(sequences[first : first + at_once], prompts[first : first + at_once], strict=True)
        best += executor.step([Rows(s, np.array(one, np.int32)) for s, one in some]).argmax(1).tolist()
    times = []
    for _ in range(n_new):
        times.append(time.perf_counter())
        rows = [Rows(s, np.array([token_id], np.int32)) for s, token_id in zip(sequences, best, strict=True)]
        best = executor.step(rows).argmax(1).tolist()
    for sequence in sequences:
        sequence.close()
    return np.diff(times).tolist()


def submitted(model: Model, prompts: list[list[int]], n_new: int, params: dict[str, Any]) -> tuple[list[float], ...]:
    """Seconds from one decode step of all sequences to the next, and those inside of the executor."""
    with recorded(model) as steps:
        requests = [model.submit(one, max_new_tokens=n_new, ignore_eos=True, **params) for one in prompts]
        for request in requests:
            request.result()
    whole = [(start, end) for start, end, n in steps if n == len(prompts)]
    whole = whole[len(whole) // 4 :]  # by then all decode: a prompt can have as many tokens
    starts = [start for start, _ in whole]
    return np.diff(starts).tolist(), [end - start for start, end in whole]


def overhead(model: Model, rounds: int) -> None:
    """Requests against a bare loop."""
    for n in (8, 32):
        loops: list[float] = []
        found: dict[str, list[tuple[float, float]]] = {"greedy": [], "top_p": []}  # (a step, between steps) a round
        for i in range(rounds + 1):
            rng = np.random.default_rng(i)
            prompts = [prompt(model, rng, 32) for _ in range(n)]
            n_new = 64 if i else 8
            loops.append(1e3 * statistics.fmean(bare(model, prompts, n_new)))
            for name, params in (("greedy", GREEDY), ("top_p", SAMPLED)):
                periods, inside = submitted(model, prompts, n_new + n // 4, params)
                between = statistics.fmean(periods) - statistics.fmean(inside)
                found[name].append((1e3 * statistics.fmean(periods), 1e3 * between))
        del loops[0]  # the first round is a warm-up
        print(f"{n:>2} sequences, bare loop        {spread(loops)} ms a step")
        for name, rows in found.items():
            ratios = [loop / period for loop, (period, _) in zip(loops, rows[1:], strict=True)]
            between = [one for _, one in rows[1:]]
            print(f"  requests, {name:<18} x {spread(ratios, '.3f')} of its speed; {spread(between)} ms between steps")


def batch(model: Model, rounds: int) -> None:
    """A batch job against a bare loop."""
    jobs, loops = [], []
    for i in range(rounds + 1):
        rng = np.random.default_rng(i)
        prompts = [prompt(model, rng, 32) for _ in range(128)]
        start = time.perf_counter()
        for first in range(0, 128, 32):
            bare(model, prompts[first : first + 32], 63)
        middle = time.perf_counter()
        job = Job(model, {"max_new_tokens": 64, "ignore_eos": True}, temperature=0.0)
        results = list(run_batch(job, [json.dumps({"prompt": one}).encode() for one in prompts]))
        end = time.perf_counter()
        assert sum(result.n_token for result in results) == 128 * 64
        if i:
            loops.append(128 * 64 / (middle - start))
            jobs.append(128 * 64 / (end - middle))
    ratios = [job / loop for job, loop in zip(jobs, loops, strict=True)]
    print(f"batch job of 128               {spread(jobs, ',.0f')} tokens/s, x {spread(ratios)} of the bare loop's")
    print(f"  bare loop, 4 times 32        {spread(loops, ',.0f')} tokens/s")


def profile(model: Model, rounds: int) -> None:
    """Where the time goes, in the engine's own thread."""
    rng = np.random.default_rng(0)
    for name, params in (("greedy", GREEDY), ("top_p", SAMPLED)):
        profiler = cProfile.Profile()
        model.runner._inbox.put(lambda scheduler, profiler=profiler: profiler.enable())
        prompts = [prompt(model, rng, 32) for _ in range(32)]
        periods, _ = submitted(model, prompts, 80, params)
        model.runner._inbox.put(lambda scheduler, profiler=profiler: profiler.disable())
        model.generate([1], max_new_tokens=1)
        print(f"{name}: {len(periods)} steps of 32 sequences and their prompts, under the profiler")
        pstats.Stats(profiler).sort_stats("tottime").print_stats(14)


PARTS = {
    "throughput": throughput,
    "first-token": first_token,
    "ticks": ticks,
    "overhead": overhead,
    "batch": batch,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a checkpoint, as of bench.random_checkpoint")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default all but profile")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_intermixed_args()
    # Without the prefix cache: each way of running the same prompts does all the work.
    model = load(arguments.folder, dtype=arguments.dtype, threads=arguments.threads, prefix_cache=False)
    print(f"{model!r}, {model.executor.threads} threads, {model.executor.simd}")
    for part in arguments.parts or [name for name in PARTS if name != "profile"]:
        PARTS[part](model, arguments.rounds)


if __name__ == "__main__":
    main()

"""Prefill and decode of a loaded model, timed beside the limits that the machine shows in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np

from ._native import limits
from .cost import CACHE_BYTES
from .errors import ArgumentError
from .executor import Rows
from .model import Model

UNCACHED_BYTES = 256 << 20  # so many come from memory, whatever the caches hold


def run(model: Model, prompt_tokens: int, new_tokens: int, rounds: int) -> Iterator[str]:
    """Lines of a report. Random prompts; the first round is a warm-up; median, and least to most, of the others."""
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("rounds", rounds)):
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
    executor, cost = model.executor, model.cost
    prompt_tokens = min(prompt_tokens, executor.max_seq_len)
    new_tokens = min(new_tokens, executor.max_seq_len - 1)
    yield (
        f"{model.plan.model_type}, {cost.n_parameter:,} parameters, {model.dtype}, KV {model.kv_dtype}, "
        f"{executor.threads} threads, {executor.simd}"
    )
    multiplied = "int8" if model.dtype == "int4" else model.dtype
    peak_of = {"float32": limits.peak_float32, "bfloat16": limits.peak_bfloat16, "int8": limits.peak_int8}[multiplied]
    # Weights that caches may keep from step to step stand beside reading as much from there.
    n_read = int(cost.decode_bytes) if cost.decode_bytes <= CACHE_BYTES else UNCACHED_BYTES
    unit = "GOPS" if multiplied == "int8" else "GFLOPS"
    bandwidths, peaks, prefills, decodes = [], [], [], []
    for i in range(rounds + 1):
        bandwidth = limits.read_bandwidth(executor.threads, n_read)
        peak = peak_of(executor.threads)
        rng = np.random.default_rng(i)
        prefill = _prefill(model, rng.integers(0, executor.vocab_size, prompt_tokens).astype(np.int32))
        decode = _decode(model, int(rng.integers(0, executor.vocab_size)), new_tokens)
        if i:
            bandwidths.append(bandwidth)
            peaks.append(peak)
            prefills.append(prefill)
            decodes.append(decode)
    bandwidth, peak = statistics.median(bandwidths), statistics.median(peaks)
    yield f"limits: {bandwidth / 1e9:.1f} GB/s read ({n_read / 1e6:,.0f} MB), {peak / 1e9:,.0f} {unit} {multiplied}"
    # Shares are made within rounds: a machine that others use changes its speed from one to the next.
    share = statistics.median(cost.block_flops * prompt_tokens / s / p for s, p in zip(prefills, peaks, strict=True))
    what = f"{share:.0%} of the peak, in products that all tokens need"
    yield f"prefill {prompt_tokens:>5} tokens  {_rates(prefills, prompt_tokens)}  {what}"
    share = statistics.median(cost.decode_bytes / s / b for s, b in zip(decodes, bandwidths, strict=True))
    read = cost.decode_bytes / statistics.median(decodes)
    what = f"{read / 1e9:.1f} GB/s of weights, {share:.0%} of the read bandwidth"
    yield f"decode  {new_tokens:>5} tokens  {_rates(decodes, 1)}  {what}"


def _prefill(model: Model, token_ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> float:
    """Seconds until the logits of the last token are there.

    The pages are used again by the next prompt, as those of a process that has run for a while: memory that is touched
    for the first time is the system's time, which differs by ten from machine to machine.
    """
    sequence = model.executor.new_sequence()
    sequence.publishes = False
    start = time.perf_counter()
    for first in range(0, len(token_ids), model.executor.max_rows):
        model.executor.step([Rows(sequence, token_ids[first : first + model.executor.max_rows])])
    seconds = time.perf_counter() - start
    sequence.close()
    return seconds


def _decode(model: Model, token_id: int, new_tokens: int) -> float:
    """Seconds for a token of a generated text, after the first."""
    done = model.generate([token_id], max_new_tokens=new_tokens + 1, temperature=0, ignore_eos=True)
    return float(done.usage.decode_seconds / (done.usage.completion_tokens - 1))


def _rates(seconds: list[float], n: int) -> str:
    rates = sorted(n / s for s in seconds)
    return f"{statistics.median(rates):>9,.1f} tokens/s ({rates[0]:,.1f} to {rates[-1]:,.1f})"

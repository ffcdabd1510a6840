"""Prefill and decode of a loaded model, timed beside the limits that the machine shows in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np

from ._native import limits
from .errors import ArgumentError
from .executor import Rows
from .model import Model


def run(model: Model, prompt_tokens: int, new_tokens: int, rounds: int) -> Iterator[str]:
    """Lines of a report. Random tokens; the first round is a warm-up; median, and least to most, of the others."""
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
    bandwidth = limits.read_bandwidth(executor.threads)
    multiplied = "int8" if model.dtype == "int4" else model.dtype
    peaks = {"float32": limits.peak_float32, "bfloat16": limits.peak_bfloat16, "int8": limits.peak_int8}
    peak = peaks[multiplied](executor.threads)
    unit = "GOPS" if multiplied == "int8" else "GFLOPS"
    yield f"limits: {bandwidth / 1e9:.1f} GB/s read, {peak / 1e9:,.0f} {unit} {multiplied}"
    prefills, decodes = [], []
    for i in range(rounds + 1):
        rng = np.random.default_rng(i)
        prefill = _prefill(model, rng.integers(0, executor.vocab_size, prompt_tokens).astype(np.int32))
        decode = _decode(model, rng.integers(0, executor.vocab_size, new_tokens).astype(np.int32))
        if i:
            prefills.append(prefill)
            decodes.append(decode)
    flops = cost.block_flops * prompt_tokens / statistics.median(prefills)
    read = cost.decode_bytes / statistics.median(decodes)
    share = f"{flops / peak:.0%} of the peak, in products of the blocks"
    yield f"prefill {prompt_tokens:>5} tokens  {_rates(prefills, prompt_tokens)}  {share}"
    cached = " (the weights fit in the caches)" if read > 1.2 * bandwidth else ""
    share = f"{read / 1e9:.1f} GB/s of weights, {read / bandwidth:.0%} of the read bandwidth{cached}"
    yield f"decode  {new_tokens:>5} tokens  {_rates(decodes, 1)}  {share}"


def _prefill(model: Model, token_ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> float:
    """Seconds until the logits of the last token are there."""
    sequence = model.executor.new_sequence()
    start = time.perf_counter()
    for first in range(0, len(token_ids), model.executor.max_rows):
        model.executor.step([Rows(sequence, token_ids[first : first + model.executor.max_rows])])
    seconds = time.perf_counter() - start
    sequence.close()
    return seconds


def _decode(model: Model, token_ids: np.ndarray[tuple[int], np.dtype[np.int32]]) -> float:
    """Seconds for a token, the median."""
    sequence = model.executor.new_sequence()
    seconds = []
    for i in range(len(token_ids)):
        start = time.perf_counter()
        model.executor.step([Rows(sequence, token_ids[i : i + 1])])
        seconds.append(time.perf_counter() - start)
    sequence.close()
    return statistics.median(seconds)


def _rates(seconds: list[float], n: int) -> str:
    rates = sorted(n / s for s in seconds)
    return f"{statistics.median(rates):>9,.1f} tokens/s ({rates[0]:,.1f} to {rates[-1]:,.1f})"

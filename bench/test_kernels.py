"""Kernels on the shapes of GPT-2 124M, by SIMD level and number of threads: pytest bench --benchmark-only.

Each result is checked before it is timed. `extra_info` has the rate and its share of the limit that was measured in the
same run: GFLOPS (GOPS for int8) count a multiplication and an addition as two; GB/s count the bytes of the packed
weight.
"""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pyengine._native import limits, simd
from pyengine._native.attention import attention
from pyengine._native.matmul import PackedMatrix, matmul
from pyengine._native.packing import Loader, StoredMatrix

SHAPES = [(512, 2304, 768), (512, 768, 3072), (32, 3072, 768), (1, 3072, 768), (1, 50257, 768)]  # rows, n_out, n_in


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("level", [level for level in simd.levels() if level != "portable"])
def test_matmul(
    benchmark: BenchmarkFixture, level: str, shape: tuple[int, int, int], dtype: str, threads: int
) -> None:
    n_row, n_out, n_in = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n_row, n_in), np.float32)
    w = rng.standard_normal((n_out, n_in), np.float32)
    packed = PackedMatrix(n_out, n_in, dtype)
    stored = StoredMatrix(w.view(np.uint8).reshape(-1), 0, "F32", "out_in", n_out, n_in)
    Loader(threads).pack([(stored, packed, None, None)])
    before = simd.use(level)
    try:
        exact = x[:4] @ w.T
        assert np.abs(matmul(x[:4], packed, threads) - exact).max() < 0.02 * np.abs(exact).max()
        benchmark(matmul, x, packed, threads)
        peak = (limits.peak_int8 if dtype == "int8" else limits.peak_float32)(threads)
        bandwidth = limits.read_bandwidth(threads)
    finally:
        simd.use(before)
    if benchmark.stats:
        seconds = benchmark.stats["median"]
        rate = 2 * n_row * n_out * n_in / seconds
        read = packed.nbytes / seconds
        benchmark.extra_info.update(
            {"Gops": rate / 1e9, "of peak": rate / peak, "GB/s": read / 1e9, "of bandwidth": read / bandwidth}
        )


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_row", [512, 1024])
def test_attention(benchmark: BenchmarkFixture, n_row: int, threads: int) -> None:
    qkv = np.random.default_rng(0).standard_normal((n_row, 3 * 768), np.float32)
    benchmark(attention, qkv, 12, 12, 64, 0.125, threads)

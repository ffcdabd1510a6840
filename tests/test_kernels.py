"""Every kernel of every SIMD level that this machine has, by name, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from pyengine._native import simd
from pyengine._native.activation import activate, exp
from pyengine._native.attention import attention
from pyengine._native.matmul import PackedMatrix, matmul, quantize
from pyengine._native.norm import layer_norm, softmax
from pyengine._native.packing import Loader, StoredMatrix
from pyengine._native.pages import KV_DTYPES

SIZES = [*range(1, 131), 191, 192, 193, 255, 256, 257, 383, 384, 385, 511, 512, 513, 767, 768, 769]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 24, 25, 47, 48, 49, 50, 96, 97, 130, 200]


@pytest.fixture(params=simd.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each SIMD level in turn, and the proof that it is the one that runs."""
    before = simd.use(request.param)
    assert simd.active() == request.param
    yield request.param
    simd.use(before)


def pack(w: NDArray[np.float32], dtype: str) -> PackedMatrix:
    packed = PackedMatrix(*w.shape, dtype)
    stored = StoredMatrix(w.view(np.uint8).reshape(-1), 0, "F32", "out_in", *w.shape)
    assert Loader().pack([(stored, packed, None, None)]) == -1
    return packed


def ulp(got: NDArray[np.float32], exact: NDArray[np.float64], scale: NDArray[np.float64] | None = None) -> float:
    """The largest error in units of the last place of `scale`, by default of the exact value."""
    spacing = np.spacing(np.abs(exact if scale is None else scale).astype(np.float32)).astype(np.float64)
    return float((np.abs(got.astype(np.float64) - exact) / spacing).max())


def matmul_bound(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float64]:
    """2 sqrt(K) eps sum |x w|: what rounding after each of K terms amounts to, with room for bad luck."""
    k = x.shape[1]
    return 2 * max(k, 4) ** 0.5 * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64)) + 1e-40


@pytest.mark.parametrize("n_row", ROWS)
def test_matmul_float32_rows(level: str, n_row: int) -> None:
    rng = np.random.default_rng(n_row)
    for n_out, n_in in ((1, 1), (16, 7), (33, 64), (130, 100), (200, 33)):
        x = rng.standard_normal((n_row, n_in)).astype(np.float32)
        w = rng.standard_normal((n_out, n_in)).astype(np.float32)
        error = np.abs(matmul(x, pack(w, "float32"), 2) - x.astype(np.float64) @ w.T.astype(np.float64))
        assert (error <= matmul_bound(x, w)).all()


@pytest.mark.parametrize("n", SIZES)
def test_matmul_float32_sizes(level: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for n_out, n_in in ((n, 20), (20, n)):
        x = rng.standard_cauchy((3, n_in)).astype(np.float32)
        w = rng.standard_normal((n_out, n_in)).astype(np.float32)
        error = np.abs(matmul(x, pack(w, "float32")) - x.astype(np.float64) @ w.T.astype(np.float64))
        assert (error <= matmul_bound(x, w)).all()


@pytest.mark.parametrize("n", SIZES)
def test_matmul_int8_is_exact(level: str, n: int) -> None:
    """With scales of 1 the product is the integer one, to the bit: no saturation anywhere."""
    rng = np.random.default_rng(n)
    for n_row, n_out, n_in in ((1, n, 20), (5, 20, n), (13, 17, n)):
        w = rng.choice([-127, -126, 0, 1, 126, 127], (n_out, n_in)).astype(np.float32)
        w[:, rng.integers(n_in)] = 127  # so that a column's scale is 1
        x = rng.choice([0, 1, 128, 254, 255], (n_row, n_in)).astype(np.float32)
        for start in range(0, n_in, 128):  # so that a group's scale is 1 and its zero point 0
            width = min(128, n_in - start)
            x[:, start] = 255
            if width > 1:
                x[:, start + 1] = 0
        exact = x.astype(np.int64) @ w.T.astype(np.int64)
        if n_in % 128 == 1:  # a group of one value has a scale of its own
            np.testing.assert_allclose(matmul(x, pack(w, "int8")), exact, rtol=1e-5, atol=1)
        else:
            assert np.array_equal(matmul(x, pack(w, "int8")), exact.astype(np.float32))


def check_int8(n_row: int, n_out: int, n_in: int) -> None:
    """Quantised activations times quantised weights, summed in float64, is what comes out."""
    rng = np.random.default_rng(n_row)
    x = (rng.standard_normal((n_row, n_in)) + rng.standard_normal((n_row, 1))).astype(np.float32)
    w = rng.standard_normal((n_out, n_in)).astype(np.float32)
    packed = pack(w, "int8")
    weights = np.stack([packed.row(i) for i in range(n_out)]).astype(np.float64)
    q, scale, offset = quantize(x)
    group = np.arange(n_in) // 128
    values = scale[:, group].astype(np.float64) * (q.astype(np.int64) + offset[:, group])
    bound = 2.0**-22 * (np.abs(values) @ np.abs(weights).T)
    assert (np.abs(matmul(x, packed, 2) - values @ weights.T) <= bound).all()
    assert (np.abs(values - x) <= scale[:, group] * 0.75).all()
    assert (np.abs(weights - w) <= np.abs(w).max(1, keepdims=True) / 127 * 0.501).all()


@pytest.mark.parametrize("n_row", ROWS)
def test_matmul_int8_is_what_its_integers_say(level: str, n_row: int) -> None:
    for n_out, n_in in ((16, 7), (40, 300), (130, 128), (65, 257)):
        check_int8(n_row, n_out, n_in)


@pytest.mark.parametrize(("n_row", "n_out", "n_in"), [(50, 130, 4000), (24, 230, 4097), (7, 200, 1300)])
def test_matmul_int8_in_parts(level: str, n_row: int, n_out: int, n_in: int) -> None:
    """More weights than are done at a time, or so long rows that it isn't by rows."""
    check_int8(n_row, n_out, n_in)


@pytest.mark.parametrize("n_row", ROWS)
def test_matmul_bfloat16_is_what_its_values_say(level: str, n_row: int) -> None:
    """Rounded activations times rounded weights, summed in float64, is what comes out."""
    rng = np.random.default_rng(n_row)
    for n_out, n_in in ((1, 1), (16, 7), (40, 300), (130, 128), (65, 257)):
        x = (rng.standard_cauchy((n_row, n_in)) * 2.0 ** rng.integers(-60, 20, (n_row, n_in))).astype(np.float32)
        w = rng.standard_normal((n_out, n_in)).astype(np.float32)
        packed = pack(w, "bfloat16")
        weights = np.stack([packed.row(i) for i in range(n_out)])
        assert np.array_equal(weights, reference.as_stored(w, "bfloat16"))
        values = reference.as_stored(x, "bfloat16")
        exact = values.astype(np.float64) @ weights.T.astype(np.float64)
        assert (np.abs(matmul(x, packed, 2) - exact) <= matmul_bound(values, weights)).all()


def test_bfloat16_rounding(level: str) -> None:
    """Products with 1 show the rounded values themselves: ties, subnormals, the largest; what isn't finite shows."""
    bits = np.concatenate([np.arange(0, 2**32, 65521, np.uint32), np.arange(0x3F800000, 0x3F840000, 0x2000, np.uint32)])
    x = bits.view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) < 3.38e38)]
    one = pack(np.eye(16, 1, dtype=np.float32), "bfloat16")
    assert np.array_equal(matmul(x.reshape(-1, 1), one)[:, 0], reference.as_stored(x, "bfloat16"))
    for special in (np.nan, np.inf, -np.inf):
        assert not np.isfinite(matmul(np.array([[special]], np.float32), one)[0, 0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("n_out", [64, 240, 256, 600, 1029])
def test_few_rows_are_rows_of_many(level: str, dtype: str, n_out: int) -> None:
    """A tile of few rows takes panels that lie apart, of many rows panels side by side: to the bit the same."""
    rng = np.random.default_rng(n_out)
    x = rng.standard_normal((50, 300)).astype(np.float32)
    packed = pack(rng.standard_normal((n_out, 300)).astype(np.float32), dtype)
    many = matmul(x, packed)
    for n_row in range(1, 9):
        for threads in (1, 3):
            assert matmul(x[:n_row], packed, threads).tobytes() == many[:n_row].tobytes()


@pytest.mark.parametrize("n", SIZES)
def test_matmul_narrow_sizes(level: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for n_out, n_in in ((n, 20), (20, n)):
        x = rng.standard_normal((3, n_in)).astype(np.float32)
        w = rng.standard_normal((n_out, n_in)).astype(np.float32)
        packed = pack(w, "bfloat16")
        x_kept, w_kept = (reference.as_stored(array, "bfloat16").astype(np.float64) for array in (x, w))
        error = np.abs(matmul(x, packed) - x_kept @ w_kept.T)
        assert (error <= matmul_bound(x, w)).all()
        check_int4(x, w)


@pytest.mark.parametrize("n_row", ROWS)
def test_matmul_int4_rows(level: str, n_row: int) -> None:
    rng = np.random.default_rng(n_row)
    for n_out, n_in in ((16, 7), (40, 300), (130, 128), (65, 257)):
        x = rng.standard_normal((n_row, n_in)) + 5 * rng.standard_normal((n_row, 1))
        check_int4(x.astype(np.float32), rng.standard_normal((n_out, n_in)).astype(np.float32))


LONG = [(24, 50, 6144), (25, 40, 6130), (24, 20, 6145), (29, 40, 3072), (26, 70, 3080)]


@pytest.mark.parametrize(("n_row", "n_out", "n_in"), LONG)
def test_matmul_int4_of_long_rows(level: str, n_row: int, n_out: int, n_in: int) -> None:
    """As long as can be unpacked for many rows, and longer."""
    rng = np.random.default_rng(n_in)
    x = rng.standard_normal((n_row, n_in)) + 5 * rng.standard_normal((n_row, 1))
    check_int4(x.astype(np.float32), rng.standard_normal((n_out, n_in)).astype(np.float32))


@pytest.mark.parametrize("n_row", [1, 2, 3, 4, 5, 9, 24])
def test_matmul_int4_does_not_saturate(level: str, n_row: int) -> None:
    """Activations of 255 times the codebook's largest value, which is what equal weights get."""
    x = np.full((n_row, 256), 255, np.float32)
    x[:, ::128] = 0
    check_int4(x, np.repeat(np.float32([-1, 1, 3]), 16)[:, None] * np.ones((1, 256), np.float32))


def check_int4(x: NDArray[np.float32], w: NDArray[np.float32]) -> None:
    """Quantised activations times quantised weights, summed in float64, is what comes out."""
    packed = pack(w, "int4")
    weights = np.stack([packed.row(i) for i in range(len(w))]).astype(np.float64)
    q, scale, offset = quantize(x)
    group = np.arange(x.shape[1]) // 128
    values = scale[:, group].astype(np.float64) * (q.astype(np.int64) + offset[:, group])
    # The zero point is taken off at the end of a group: what is rounded on the way is as large as q.
    size = scale[:, group] * (q.astype(np.float64) + np.abs(offset[:, group]))
    assert (np.abs(matmul(x, packed, 2) - values @ weights.T) <= 2.0**-21 * (size @ np.abs(weights).T)).all()


def test_int4_weights(level: str) -> None:
    """Each group of 32 is a scale in bfloat16 times entries of the codebook, near the best scale there is."""
    rng = np.random.default_rng(1)
    w = np.concatenate([rng.standard_normal((40, 96)), rng.standard_t(5, (40, 96))]).astype(np.float32)
    w[3] = 0
    w[5, :32], w[5, 7] = 0, -3e-3
    packed = pack(w, "int4")
    got = np.stack([packed.row(i) for i in range(len(w))]).reshape(-1, 32)
    groups = w.reshape(-1, 32)
    entries = np.array([-64, -50, -39, -31, -23, -17, -11, -5, 0, 5, 11, 17, 24, 31, 41, 53], np.float32)
    assert np.array_equal(packed.row(3), np.zeros(96)) and packed.row(5)[7] == pytest.approx(-3e-3, rel=2e-3)
    errors, least = [], []
    for values, kept in zip(groups, got, strict=True):
        size = float(np.abs(values).max()) or 1.0
        best = np.inf
        for scale in np.outer([-1, 1], size / np.linspace(45, 81, 100)).ravel():
            nearest = entries[np.abs(values[:, None] / scale - entries).argmin(1)] * scale
            best = min(best, float(((values - nearest) ** 2).sum()))
        errors.append(float(((values - kept) ** 2).sum()))
        least.append(best)
    assert all(error <= 1.6 * best + 1e-9 for error, best in zip(errors, least, strict=True))
    assert sum(errors) <= 1.03 * sum(least)


def test_quantize_extremes(level: str) -> None:
    x = np.zeros((7, 128), np.float32)
    x[1] = 5.0  # constant
    x[2] = 1e6 + np.arange(128)  # a small range far from zero
    x[3, 0] = -1e30
    x[4] = 1e-40
    x[5, 3] = np.nan
    x[6, 4] = np.inf
    q, scale, offset = quantize(x)
    values = scale.astype(np.float64) * (q.astype(np.int64) + offset)
    assert np.array_equal(values[0], x[0])
    np.testing.assert_allclose(values[1], x[1], rtol=1e-6)
    np.testing.assert_allclose(values[2], x[2], rtol=2e-5)
    np.testing.assert_allclose(values[3], x[3], rtol=1e-2)
    np.testing.assert_allclose(values[4], x[4], atol=1e-29)
    assert np.isnan(scale[5:]).all()


@pytest.mark.parametrize("n", SIZES)
def test_layer_norm(level: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for offset in (0.0, 3.0, -1000.0):
        x = (rng.standard_normal((4, n)) + offset).astype(np.float32)
        gain, bias = rng.standard_normal((2, n)).astype(np.float32)
        exact = reference.layer_norm(x.astype(np.float64), gain.astype(np.float64), bias.astype(np.float64), 1e-5)
        row_scale = np.abs(exact).max(1, keepdims=True) + np.abs(bias).max()
        assert ulp(layer_norm(x, gain, bias, 1e-5), exact, row_scale) <= 4


@pytest.mark.parametrize("n", SIZES)
def test_softmax(level: str, n: int) -> None:
    x = (np.random.default_rng(n).standard_normal((4, n)) * 8).astype(np.float32)
    exact = reference.softmax(x.astype(np.float64))
    assert ulp(softmax(x), exact, exact.max(1, keepdims=True)) <= 4


@pytest.mark.parametrize("kind", ["gelu_tanh", "gelu_erf", "gelu_sigmoid", "relu", "silu", "tanh"])
def test_activations(level: str, kind: str) -> None:
    """At most 2 ULP, 4 in the far tail where the result is below 1e-30; every size as one value after the other."""
    tail = {"gelu_tanh": -10.0, "gelu_erf": -14.0, "gelu_sigmoid": -61.0, "silu": -103.0}.get(kind, -20.0)
    small = np.geomspace(1e-30, 10, 2001)
    x = np.concatenate([np.linspace(-4, 12, 40001), np.linspace(tail, -4, 20001), small, -small]).astype(np.float32)
    exact = reference.ACTIVATIONS[kind](x.astype(np.float64))
    got = activate(kind, x)
    far = np.abs(exact) < 1e-30
    assert ulp(got[~far], exact[~far]) <= 2
    assert ulp(got[far], exact[far]) <= 4
    for n in range(1, 131):
        assert np.array_equal(activate(kind, x[7000 : 7000 + n]), got[7000 : 7000 + n])
    special = activate(kind, np.array([np.inf, -np.inf, np.nan, 0, 3e38, -3e38], np.float32))
    bounded = kind == "tanh"
    assert special[0] == (1 if bounded else np.inf) and special[1] == (-1 if bounded else 0)
    assert np.isnan(special[2]) and special[3] == 0
    assert special[4] == (1 if bounded else np.float32(3e38)) and special[5] == (-1 if bounded else 0)


def test_coarse_gelu(level: str) -> None:
    """Where its result becomes bfloat16 or int8: at most 2^-12 of it off, or 2^-45."""
    small = np.geomspace(1e-30, 10, 2001)
    x = np.concatenate([np.linspace(-12, 12, 60001), small, -small]).astype(np.float32)
    exact = reference.ACTIVATIONS["gelu_tanh"](x.astype(np.float64))
    got = activate("gelu_tanh", x, narrow=True)
    assert not np.array_equal(got, activate("gelu_tanh", x))
    assert (np.abs(got - exact) <= np.maximum(2**-12 * np.abs(exact), 2**-45)).all()
    special = activate("gelu_tanh", np.array([np.inf, -np.inf, np.nan, 0, 3e38, -3e38], np.float32), narrow=True)
    assert special[0] == np.inf and np.isnan(special[2]) and special[3] == 0 and special[4] == np.float32(3e38)
    assert (np.abs(special[[1, 5]]) <= 2**-45).all()
    for kind in ("gelu_erf", "silu", "relu"):
        assert np.array_equal(activate(kind, x, narrow=True), activate(kind, x))


def test_exp(level: str) -> None:
    """At most 2 ULP from the smallest subnormal result to the largest finite one; every size."""
    x = np.concatenate([np.linspace(-103.9, 88.7, 60001), np.linspace(-1, 1, 20001)]).astype(np.float32)
    assert ulp(exp(x), np.exp(x.astype(np.float64))) <= 2
    for n in range(1, 131):
        assert np.array_equal(exp(x[:n]), exp(x)[:n])
    special = exp(np.array([0, -np.inf, np.inf, np.nan, 89, -104.5], np.float32))
    assert special[0] == 1 and special[1] == 0 and special[2] == np.inf and np.isnan(special[3])
    assert special[4] == np.inf and special[5] == 0


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 63, 64, 65, 66, 100, 127, 128, 129, 200])
def test_attention(level: str, n: int) -> None:
    rng = np.random.default_rng(n)
    for n_head, n_kv_head, head_dim in ((2, 2, 16), (4, 2, 20), (3, 1, 64), (2, 1, 17)):
        qkv = rng.standard_normal((n, (n_head + 2 * n_kv_head) * head_dim)).astype(np.float32) * 2
        exact = reference.attention(qkv.astype(np.float64), n_head, n_kv_head, head_dim, head_dim**-0.5)
        np.testing.assert_allclose(attention(qkv, n_head, n_kv_head, head_dim, head_dim**-0.5, 2), exact, atol=2e-5)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("n", [1, 17, 64, 65, 150])
def test_attention_of_a_kv_dtype(level: str, n: int, kv_dtype: str) -> None:
    """To the bit the same for rounded keys and values (in int8 that of float32), and as exact as their rounding."""
    rng = np.random.default_rng(n)
    for n_head, n_kv_head, head_dim in ((2, 2, 16), (4, 2, 20), (3, 1, 64), (2, 1, 17)):
        q = rng.standard_normal((n, n_head, head_dim)).astype(np.float32)
        kv = rng.standard_normal((n, 2 * n_kv_head, head_dim)).astype(np.float32) * 2
        stored = reference.as_stored(kv, kv_dtype)
        scale = head_dim**-0.5
        arguments = n_head, n_kv_head, head_dim, scale
        qkv, rounded = (np.concatenate([q, x], axis=1).reshape(n, -1) for x in (kv, stored))
        got = attention(qkv, *arguments, 2, kv_dtype)
        same = "bfloat16" if kv_dtype == "bfloat16" else "float32"
        assert got.tobytes() == attention(rounded, *arguments, 2, same).tobytes()

        # Half a step: bfloat16 has 8 bits of precision.
        largest = np.abs(kv).max(-1, keepdims=True)
        unit = {"float32": 0 * kv, "bfloat16": np.abs(kv) * 2.0**-8, "int8": largest / 127 * 0.501 + 0 * kv}[kv_dtype]
        assert (np.abs(stored - kv) <= unit).all()
        k_unit, v_unit = np.repeat(np.split(unit, 2, axis=1), n_head // n_kv_head, axis=2)
        # Scores move by at most s, so weights by a factor of at most exp(2 s); bfloat16 rounds queries and weights too.
        s = scale * np.einsum("ihd,jhd->hij", np.abs(q), k_unit).max((1, 2))[:, None]
        rounding = 2.0**-8 if kv_dtype == "bfloat16" else 0.0
        keys = np.repeat(np.abs(stored[:, :n_kv_head]), n_head // n_kv_head, axis=1)
        s = s + rounding * scale * np.einsum("ihd,jhd->hij", np.abs(q), keys).max((1, 2))[:, None]
        bound = (np.expm1(2 * s) + rounding) * np.abs(kv).max() + v_unit.max((0, 2))[:, None] + 2e-5  # [n_head, 1]
        error = np.abs(got - reference.attention(qkv.astype(np.float64), *arguments)).reshape(n, n_head, head_dim)
        assert (error <= bound).all()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_what_a_page_gives_back(level: str, kv_dtype: str) -> None:
    """A query that sees one key gives that key's value: of every head, one vector of numbers."""
    d = 20
    patterns = np.arange(1 << 16, dtype=np.uint32) << 16  # all of bfloat16; then what is rounded to it
    halfway = np.concatenate([patterns | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    rng = np.random.default_rng(0)
    finite = halfway[np.isfinite(halfway)]
    x = np.concatenate([finite[: len(finite) // d * d], rng.standard_normal(100 * d).astype(np.float32)]).reshape(-1, d)
    x[1] = 0
    x[2] = 1e-38
    x[3, 5:] = 3e38
    for bad in (np.inf, -np.inf, np.nan):
        x = np.concatenate([x, x[-1:]])
        x[-1, 7] = bad
    x = np.concatenate([x, x[-1:]])
    x[-1, 7] = np.array([0x7F800001], np.uint32).view(np.float32)[0]  # NaN in its lower half alone
    n = len(x)
    qkv = np.concatenate([np.zeros((2, n, d), np.float32), x[None]]).reshape(1, -1)
    got = attention(qkv, n, n, d, 1.0, 1, kv_dtype).reshape(n, d)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = reference.as_stored(x, kv_dtype)
    if kv_dtype == "int8":
        expected[-4:] = np.nan  # the scale says that something was not finite
    assert np.array_equal(got, expected, equal_nan=True)


def test_same_bits_across_levels() -> None:
    """All levels with FMA give the same bits; the portable one doesn't, so the comparison can fail."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((19, 300)).astype(np.float32) * 3
    w = rng.standard_normal((200, 300)).astype(np.float32)
    qkv = rng.standard_normal((150, 3 * 96)).astype(np.float32)
    got = {}
    for name in simd.levels():
        before = simd.use(name)
        results = [
            matmul(x, pack(w, "float32")),
            matmul(x, pack(w, "bfloat16")),
            matmul(x, pack(w, "int8")),
            matmul(x, pack(w, "int4")),
            layer_norm(x, w[0], w[1], 1e-5),
            softmax(x),
        ]
        results += [activate(kind, x.reshape(-1)) for kind in ("gelu_tanh", "gelu_erf", "gelu_sigmoid", "silu", "tanh")]
        results.append(activate("gelu_tanh", x.reshape(-1), narrow=True))
        results += [attention(qkv, 3, 3, 32, 0.2, 1, kv_dtype) for kv_dtype in ("float32", "bfloat16", "int8")]
        got[name] = [r.tobytes() for r in results]
        simd.use(before)
    portable = got.pop("portable")
    for name, result in got.items():
        assert result == next(iter(got.values())), name
    if got:
        assert portable != next(iter(got.values()))

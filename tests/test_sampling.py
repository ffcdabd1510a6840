"""What sampling does to a row of logits: the native operations against plain numpy, and the draw's distribution."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyengine._native import simd
from pyengine._native.drawing import philox4x32, uniform
from pyengine._native.logprobs import token_logprobs
from pyengine._native.rows import draw_rows, top_rows
from pyengine._native.sampling import Workspace
from pyengine.errors import ArgumentError, NonFiniteError
from pyengine.params import SamplingParams
from pyengine.sampling import Sampler

NONE = np.empty(0, np.int32)
SIZES = [1, 2, 3, 31, 63, 64, 65, 97, 129, 511, 513, 2049, 5000]
FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.0, 700, 1.0, 0.0),
    (1.0, 0, 0.95, 0.0),
    (1.3, 0, 0.47, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.8, 40, 0.9, 0.05),
    (1e-3, 3, 0.9, 0.0),
    (50.0, 0, 0.3, 0.2),
]
FMA_LEVELS = [level for level in simd.levels() if level != "portable"]


def draw(
    work: Workspace,
    row: NDArray[np.float32],
    number: float,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    [[token_id]], _, _ = draw_rows([work], [row], [(temperature, top_k, top_p, min_p, (number,))])
    return token_id


def rows(vocab_size: int) -> dict[str, NDArray[np.float32]]:
    """Rows that a filter could trip over."""
    rng = np.random.default_rng(vocab_size)
    normal = rng.standard_normal(vocab_size)
    banned = normal.copy()
    banned[rng.random(vocab_size) < 0.5] = -np.inf
    banned[0] = 0.0
    peaked = normal.copy()
    peaked[-1] = 40.0
    return {
        name: row.astype(np.float32)
        for name, row in {
            "normal": normal,
            "ties": np.round(normal * 2) / 2,
            "constant": np.full(vocab_size, -3.5),
            "flat": normal * 1e-3,
            "wide": normal * 100,
            "shifted": normal * 3 - 1000,
            "peaked": peaked,
            "peak over a plain": np.where(np.arange(vocab_size) == vocab_size // 2, 8.0, normal * 1e-4),
            "banned": banned,
            "far apart": np.where(rng.random(vocab_size) < 0.5, normal, -1e30 * np.abs(normal) - 1),
            "subnormal": normal * 1e-40,
        }.items()
    }


def expected_probabilities(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """The filters as they are defined, in float64 with a full sort."""
    x = logits.astype(np.float64)
    if 0 < top_k < len(x):
        x[x < np.sort(x)[-top_k]] = -np.inf
    probs = np.exp((x - x.max()) / temperature)
    probs /= probs.sum()
    order = np.argsort(-x, kind="stable")
    cumulative = np.cumsum(probs[order])
    # float32 weights can't tell these apart: such a case shows nothing.
    if top_p < 1 and np.abs(cumulative - top_p).min() < 1e-6:
        pytest.skip("the mass of the first tokens is all but top_p")
    last = order[np.searchsorted(cumulative, top_p)] if top_p < 1 else order[-1]
    kept = (x >= x[last]) & (probs >= min_p * probs.max())
    probs = np.where(kept, probs, 0.0)
    return probs / probs.sum()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter: Any, key: Any, words: Any) -> None:
    assert philox4x32(counter, key) == words


def test_uniform_is_a_function_of_each_of_its_arguments() -> None:
    seen = {uniform(seed, sample, n) for seed in (0, 1, 2**63) for sample in range(5) for n in (0, 1, 2**33)}
    assert len(seen) == 45
    assert all(0 <= number < 1 for number in seen)
    assert uniform(7, 1, 2) == uniform(7, 1, 2)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("kind", rows(1))
def test_top_equals_a_full_sort(vocab_size: int, kind: str) -> None:
    row, work = rows(vocab_size)[kind], Workspace(vocab_size)
    order = np.lexsort((np.arange(vocab_size), -row))
    order = order[row[order] > -np.inf]
    for k in (0, 1, 2, 7, 50, 600, vocab_size, vocab_size + 1):
        token_ids, values = work.top(row, k)
        np.testing.assert_array_equal(token_ids, order[:k])
        np.testing.assert_array_equal(values, row[order[:k]])


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("kind", rows(1))
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
def test_filters_equal_their_definition(
    vocab_size: int, kind: str, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = rows(vocab_size)[kind]
    expected = expected_probabilities(row, temperature, top_k, top_p, min_p)
    got = Workspace(vocab_size).probabilities(row, temperature, top_k, top_p, min_p)
    visible = expected > 1e-30  # float32 weights end at 1e-38
    np.testing.assert_array_equal(got[visible] > 0, True)
    np.testing.assert_array_equal(got[expected == 0], 0)
    np.testing.assert_allclose(got[visible], expected[visible], rtol=2e-5)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("kind", rows(1))
@pytest.mark.parametrize("n_least", [2, 3, 70])
def test_filters_leave_the_n_least_largest(vocab_size: int, kind: str, n_least: int) -> None:
    row, work = rows(vocab_size)[kind], Workspace(vocab_size)
    everything = work.probabilities(row, 1.0, 0, 1.0, 0.0)
    least = np.sort(row)[max(vocab_size - n_least, 0)]
    for top_k, top_p, min_p in ((1, 1.0, 0.0), (0, 1e-9, 0.0), (0, 1.0, 0.9999), (1, 1e-9, 0.9999), (100, 0.5, 0.2)):
        kept = work.probabilities(row, 1.0, top_k, top_p, min_p) > 0
        expected = (kept | (row >= least)) & (everything > 0)
        got = work.probabilities(row, 1.0, top_k, top_p, min_p, n_least) > 0
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("kind", rows(1))
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.6, 9)])
def test_a_race_equals_inversion_over_what_is_left(vocab_size: int, kind: str, temperature: float, top_k: int) -> None:
    row, work = rows(vocab_size)[kind], Workspace(vocab_size)
    uniforms = np.array([uniform(11, 0, i) for i in range(40)])
    rates, time = work.probabilities(row, temperature, top_k, 1.0, 0.0), 0.0
    top = float(row.max())
    rates *= np.exp((row - top) / temperature).sum(where=rates > 0, dtype=np.float64)  # 1 for the largest
    token_ids, log_times = work.race(row, temperature, top_k, 1.0, 0.0, 1, uniforms)
    assert len(token_ids) == min(20, np.count_nonzero(rates))
    for i, (token_id, log_time) in enumerate(zip(token_ids, log_times, strict=True)):
        cumulative = np.cumsum(rates)
        bounds = cumulative[[token_id - 1, token_id]] if token_id else (0.0, cumulative[0])
        assert bounds[0] * (1 - 1e-6) <= uniforms[2 * i] * cumulative[-1] <= bounds[1] * (1 + 1e-6)
        time -= math.log1p(-uniforms[2 * i + 1]) / cumulative[-1]
        assert log_time == pytest.approx(math.log(time) - top / temperature, rel=1e-6, abs=1e-4)
        rates[token_id] = 0.0
    assert len(set(token_ids.tolist())) == len(token_ids)


def test_a_race_of_nobody() -> None:
    token_ids, log_times = Workspace(9).race(np.zeros(9, np.float32), 1.0, 0, 1.0, 0.0, 1, np.empty(0))
    assert len(token_ids) == len(log_times) == 0


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("kind", rows(1))
@pytest.mark.parametrize("top_p", [1 - 1e-6, 1 - 1e-12, 1 - 2**-53])
def test_top_p_next_to_1_drops_no_more_than_the_rest(vocab_size: int, kind: str, top_p: float) -> None:
    row, work = rows(vocab_size)[kind], Workspace(vocab_size)
    everything, got = work.probabilities(row, 1.0, 0, 1.0, 0.0), work.probabilities(row, 1.0, 0, top_p, 0.0)
    assert everything[got == 0].sum() <= (1 - top_p) + 1e-12
    assert row[got > 0].min() > row[(got == 0) & (everything > 0)].max(initial=-np.inf)


@pytest.mark.parametrize("top_k", [0, 3])
def test_tiny_and_huge_temperatures(top_k: int) -> None:
    row, work = np.array([1, 3, 2, -np.inf, 3], np.float32), Workspace(5)
    np.testing.assert_allclose(work.probabilities(row, 1e-300, top_k, 1.0, 0.0), [0, 0.5, 0, 0, 0.5])
    hot = work.probabilities(row, 1e300, top_k, 1.0, 0.0)
    np.testing.assert_allclose(hot, [0, 1 / 3, 1 / 3, 0, 1 / 3] if top_k else [0.25, 0.25, 0.25, 0, 0.25])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (1.5, 20, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (0.9, 30, 0.9, 0.02)],
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    n = 200_000
    row, work = rows(600)["normal"], Workspace(600)
    probs = work.probabilities(row, temperature, top_k, top_p, min_p)
    numbers = [uniform(3, 0, i) for i in range(n)]
    drawn = [draw(work, row, number, temperature, top_k, top_p, min_p) for number in numbers]
    counts = np.bincount(drawn, minlength=600)
    kept = probs > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts[kept] - n * probs[kept]) ** 2 / (n * probs[kept])).sum()
    freedom = kept.sum() - 1
    # Wilson & Hilferty 1931: the cube root is close to normal, where chi-square itself is skewed.
    deviations = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(deviations) < 4
    np.testing.assert_array_equal(drawn, np.searchsorted(np.cumsum(probs), numbers, side="right"))


def test_draw_inverts_the_cumulative_distribution() -> None:
    row, work = rows(5000)["normal"], Workspace(5000)
    cumulative = np.cumsum(work.probabilities(row, 1.0, 0, 1.0, 0.0))
    for number in [0.0, 0.1, 0.25, 0.5, 0.999, 1 - 2**-53]:
        token_id = draw(work, row, number)
        assert abs(token_id - np.searchsorted(cumulative, number, side="right")) <= (number > 0.9999)


def test_draw_never_gives_a_token_of_probability_zero() -> None:
    row = np.full(1200, -np.inf, np.float32)
    row[700] = 0.0
    work = Workspace(1200)
    assert {draw(work, row, number) for number in (0.0, 0.5, 1 - 2**-53)} == {700}


def bits_of(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """A mask of these tokens, of which none ends a text."""
    n_word = len(allowed) // 32 + 1
    return np.packbits(np.resize(np.append(allowed, [False] * 64), 32 * n_word), bitorder="little").view(np.uint32)


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.9])
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), [(0.0, 0, 1.0, 0.0), *FILTERS])
def test_a_mask_takes_from_what_the_filters_leave(
    vocab_size: int, share: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Few tokens and many go ways of their own: both draw what the other rows have where the rest is -inf."""
    rng, works = np.random.default_rng(vocab_size), [Workspace(vocab_size)]
    ends, numbers = np.empty(0, np.int32), (0.0, 0.3, 0.6, 1 - 2**-53)
    for row in rows(vocab_size).values():
        allowed = rng.random(vocab_size) < share
        masked = np.where(allowed, row, np.float32(-np.inf))
        wish = (temperature, top_k, top_p, min_p, numbers)
        _, _, [cut] = draw_rows(works, [row], [wish])
        [got], [total], _ = draw_rows(works, [row], [wish], [(bits_of(allowed), ends, cut)])
        assert math.isnan(total)
        if np.isneginf(masked).all():
            assert got == [-1] * 4
            continue
        for k in (1, 3, vocab_size):
            expected, found = works[0].top(masked, k), works[0].top(row, k, (bits_of(allowed), ends))
            np.testing.assert_array_equal(found, expected)
        if temperature == 0.0:
            assert got == [masked.argmax()] * 4
            continue
        left = np.where(row >= cut, masked, np.float32(-np.inf))
        filters = (top_k, top_p, min_p)
        if np.isneginf(left).all():
            left = masked
        elif cut > -np.inf:
            filters = (0, 1.0, 0.0)
        probs = works[0].probabilities(left, temperature, *filters)
        up_to = np.cumsum(probs)
        below = np.append(0.0, up_to)[:-1]
        for number, token_id in zip(numbers, got, strict=True):
            assert probs[token_id] > 0
            assert below[token_id] - 1e-5 <= number <= up_to[token_id] + 1e-5


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), FILTERS)
def test_the_cut_is_the_lowest_logit_that_the_filters_leave(
    vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    work = Workspace(vocab_size)
    for row in rows(vocab_size).values():
        _, _, [cut] = draw_rows([work], [row], [(temperature, top_k, top_p, min_p, (0.5, 0.5))])
        left = work.probabilities(row, temperature, top_k, top_p, min_p) > 0
        visible = row > row.max() - 80 * temperature  # weights end at e^-87
        np.testing.assert_array_equal((row >= cut)[visible], left[visible])


def test_rows_on_several_threads_are_what_they_are_alone() -> None:
    works = [Workspace(513) for _ in range(3)]
    logits = [row for row in rows(513).values() for _ in range(5)]
    logits.insert(7, np.full(513, np.nan, np.float32))
    wishes = [(0.9, 0, 0.95, 0.0, (uniform(0, 0, i),)) for i in range(len(logits))]
    token_ids, totals, _ = draw_rows(works, logits, wishes)
    tops, same = top_rows(works, logits, 9)
    np.testing.assert_array_equal(same, totals)
    assert math.isnan(totals[7]) and token_ids[7] == [-1] and len(tops[7][0]) == 0
    for i, (row, wish) in enumerate(zip(logits, wishes, strict=True)):
        if i != 7:
            assert token_ids[i] == draw_rows(works[:1], [row], [wish])[0][0]
            assert totals[i] == works[0].logsumexp(row)
            np.testing.assert_array_equal(tops[i], works[0].top(row, 9))


@pytest.mark.parametrize("vocab_size", SIZES)
def test_logsumexp_and_token_logprobs(vocab_size: int) -> None:
    for name, row in rows(vocab_size).items():
        exact = row.astype(np.float64)
        exact = exact.max() + np.log(np.exp(exact - exact.max()).sum())
        assert Workspace(vocab_size).logsumexp(row) == pytest.approx(exact, rel=1e-6, abs=1e-6), name
        token_id = int(row.argmax())
        padded = np.zeros((2, vocab_size + 5), np.float32)
        padded[:, :vocab_size] = row
        got = token_logprobs(padded[:, :vocab_size], np.array([token_id] * 2, np.int32))
        np.testing.assert_allclose(got, row[token_id] - exact, rtol=1e-6, atol=1e-6)


def test_argmax_takes_the_lowest_id_of_those_that_tie() -> None:
    row = np.zeros(1000, np.float32)
    row[[300, 700, 999]] = 2.0
    assert draw(Workspace(1000), row, 0.0, temperature=0.0) == 300


def test_penalties_follow_their_formulas() -> None:
    row = np.array([2.0, -2.0, 1.0, 0.5, -1.0, 3.0, 4.0], np.float32)
    prompt, generated = np.array([0, 1, 1], np.int32), array("i", [2, 4, 2, 1])
    bias_ids, bias = np.array([6, 5], np.int32), np.array([-np.inf, 0.25], np.float32)
    work = Workspace(7)
    for _ in range(2):  # nothing stays behind
        got = work.adjust(row, 0.0, NONE, 0.0, prompt, generated, 2.0, 0.5, 0.125, bias_ids, bias)
        once, twice = 0.5 + 0.125, 0.5 + 0.25
        expected = [1.0, -4.0 - once, 0.5 - twice, 0.5, -2.0 - once, 3.25, -np.inf]
        np.testing.assert_array_equal(got, np.array(expected, np.float32))
    got = work.adjust(row, 1.5, NONE, 0.0, NONE, NONE, 1.0, 0.0, 0.0, NONE, bias[:0])
    np.testing.assert_array_equal(got, row - 1.5)


def test_what_other_groups_took_is_penalised_before_anything_else() -> None:
    row, taken = np.array([2.0, -2.0, 1.0], np.float32), array("i", [2, 0, 2])
    got = Workspace(3).adjust(row, 0.5, taken, 0.25, np.array([2], np.int32), NONE, 2.0, 0.0, 0.0, NONE, row[:0])
    np.testing.assert_array_equal(got, [1.25, -2.5, 0.0])
    got = Workspace(3).adjust(row, 0.0, taken, 1.0, np.array([2], np.int32), NONE, 2.0, 0.0, 0.0, NONE, row[:0])
    np.testing.assert_array_equal(got, [1.0, -2.0, -2.0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 100])
def test_logits_that_cannot_be_used_are_refused(value: float, vocab_size: int) -> None:
    work = Workspace(vocab_size)
    for i in range(vocab_size):
        row = np.zeros(vocab_size, np.float32)
        row[i] = value
        for call in (
            lambda row=row: work.logsumexp(row),
            lambda row=row: work.top(row, 2),
            lambda row=row: Sampler(SamplingParams(temperature=0), work, NONE).sample(row),
            lambda row=row: Sampler(SamplingParams(seed=0, top_p=0.9), work, NONE).sample(row),
            lambda row=row: work.race(row, 1.0, 2, 0.9, 0.1, 1, np.array([0.5, 0.5])),
            lambda row=row: token_logprobs(row[None], np.zeros(1, np.int32)),
        ):
            with pytest.raises(NonFiniteError, match=f"1 of {vocab_size} NaN or \\+inf, the first at token id {i} "):
                call()


def test_a_row_without_any_possible_token_is_refused() -> None:
    row = np.full(9, -np.inf, np.float32)
    with pytest.raises(NonFiniteError, match="every one is -inf"):
        Sampler(SamplingParams(seed=0), Workspace(9), NONE).sample(row)


def test_sizes_and_ids_are_checked() -> None:
    work, row = Workspace(9), np.zeros(9, np.float32)
    with pytest.raises(ArgumentError, match="expected 9"):
        draw(work, np.zeros(8, np.float32), 0.5)
    for bad in (-1, 9):
        ids = np.array([0, bad], np.int32)
        with pytest.raises(ArgumentError, match=rf"token_ids\[1\]: expected 0 to 8, got {bad}"):
            work.adjust(row, 0.0, NONE, 0.0, ids, NONE, 2.0, 0.0, 0.0, NONE, row[:0])
        with pytest.raises(ArgumentError, match="expected 0 to 8"):
            token_logprobs(np.zeros((2, 9), np.float32), ids)


@pytest.mark.skipif(len(FMA_LEVELS) < 2, reason="needs two SIMD levels with FMA")
def test_all_simd_levels_give_the_same_bits() -> None:
    row, work = rows(5000)["normal"], Workspace(5000)
    results = []
    before = simd.active()
    try:
        for level in FMA_LEVELS:
            simd.use(level)
            probs = work.probabilities(row, 0.9, 0, 0.95, 0.001)
            draws = [draw(work, row, uniform(1, 0, i), 0.9, 0, 0.95, 0.001) for i in range(100)]
            raced = [one.tobytes() for one in work.race(row, 0.9, 0, 0.95, 0.001, 3, np.linspace(0, 0.99, 30))]
            results.append((simd.active(), work.logsumexp(row), probs.tobytes(), draws, raced))
    finally:
        simd.use(before)
    assert [result[0] for result in results] == FMA_LEVELS
    assert all(result[1:] == results[0][1:] for result in results)

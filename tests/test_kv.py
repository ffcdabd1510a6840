"""KV pages: forks share them, writers copy them, all come back; against sequences that are plain lists of tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from checkpoints import CONFIG, write_checkpoint
from numpy.typing import NDArray

import pyengine
from pyengine._native.pages import KV_DTYPES
from pyengine.architectures import gpt2
from pyengine.errors import ArgumentError
from pyengine.executor import Executor, Rows
from pyengine.kv import PAGE, KVPool, Sequence

CONTEXT = 3 * PAGE + 10
VOCAB = 50


@pytest.fixture
def pool() -> KVPool:
    return KVPool(gpt2.plan(CONFIG | {"n_positions": CONTEXT}), "float32", prefix_cache=False)


def grow(sequence: Sequence, n: int) -> None:
    """What a step does."""
    sequence.reserve(n)
    sequence.extend(np.arange(n, dtype=np.int32))


def test_pages_are_taken_as_it_grows_and_used_again(pool: KVPool) -> None:
    sequence = Sequence(pool)
    for length, n_page in ((1, 1), (PAGE, 1), (PAGE + 1, 2), (2 * PAGE, 2), (CONTEXT, 4)):
        grow(sequence, length - sequence.length)
        assert (len(sequence.pages), pool.n_used) == (n_page, n_page)
        assert sequence.table[:n_page].tolist() == [page.memory.address for page in sequence.pages]
    addresses = set(sequence.table.tolist())
    sequence.close()
    assert (sequence.length, pool.n_used, len(pool.free)) == (0, 0, 4)
    other = Sequence(pool)
    grow(other, CONTEXT)
    assert set(other.table.tolist()) == addresses
    assert pool.free == []


def test_fork_shares_until_one_writes(pool: KVPool) -> None:
    sequence = Sequence(pool)
    grow(sequence, PAGE + 5)
    fork = sequence.fork()
    assert fork.pages == sequence.pages
    assert fork.table.tolist() == sequence.table.tolist()
    assert pool.n_used == 2
    grow(fork, 1)  # copies the page that is partly filled, the other stays shared
    assert fork.pages[0] is sequence.pages[0]
    assert fork.pages[1] is not sequence.pages[1]
    assert pool.n_used == 3
    grow(sequence, 1)  # holds its page alone by now
    assert pool.n_used == 3
    sequence.close()
    assert pool.n_used == 2
    fork.close()
    assert pool.n_used == 0


def test_fork_at_a_page_boundary_copies_nothing(pool: KVPool) -> None:
    sequence = Sequence(pool)
    grow(sequence, PAGE)
    fork = sequence.fork()
    grow(fork, 1)
    grow(sequence, 1)
    assert fork.pages[0] is sequence.pages[0]
    assert pool.n_used == 3


def test_fork_of_a_fork_after_its_origin_is_gone(pool: KVPool) -> None:
    sequence = Sequence(pool)
    grow(sequence, 10)
    forks = [sequence.fork(), sequence.fork()]
    forks.append(forks[0].fork())
    sequence.close()
    forks[0].close()
    assert pool.n_used == 1
    assert forks[1].pages[0].n_holder == 2
    for fork in forks:
        fork.close()
    assert pool.n_used == 0


def test_truncate(pool: KVPool) -> None:
    sequence = Sequence(pool)
    grow(sequence, 3 * PAGE)
    fork = sequence.fork()
    for length, n_page in ((3 * PAGE - 1, 3), (2 * PAGE + 1, 3), (2 * PAGE, 2), (1, 1), (0, 0)):
        sequence.truncate(length)
        assert (sequence.length, len(sequence.pages)) == (length, n_page)
    assert pool.n_used == 3  # the fork's
    fork.truncate(PAGE + 1)
    grow(fork, 1)
    assert pool.n_used == 2


@pytest.mark.parametrize("n", [-1, 6])
def test_truncate_to_what_it_never_was(pool: KVPool, n: int) -> None:
    sequence = Sequence(pool)
    grow(sequence, 5)
    with pytest.raises(ArgumentError, match=rf"n: expected 0\.\.5 positions, got {n}"):
        sequence.truncate(n)
    assert sequence.length == 5


@pytest.fixture(scope="module", params=KV_DTYPES)
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Executor:
    config = {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": CONTEXT, "vocab_size": VOCAB}
    folder = write_checkpoint(tmp_path_factory.mktemp("kv"), config)
    return pyengine.load(folder, dtype="float32", threads=1, kv_dtype=request.param).executor


def append(executor: Executor, sequence: Sequence, tokens: list[int]) -> bytes:
    return executor.step([Rows(sequence, np.array(tokens, np.int32), len(tokens))]).tobytes()


def test_logits_are_the_callers_own(executor: Executor) -> None:
    """The memory of logits is used again, but not as long as anybody has them, or a row of them."""
    sequence = executor.new_sequence()

    def step() -> NDArray[np.float32]:
        return executor.step([Rows(sequence, np.array([5], np.int32), 1)])

    first, row = step(), step()[0]
    before = first.tobytes(), row.tobytes()
    for _ in range(5):
        step()
    assert (first.tobytes(), row.tobytes()) == before
    del first, row
    assert len({step().ctypes.data for _ in range(20)}) <= 2


@pytest.mark.parametrize("seed", range(12))
def test_random_schedule(executor: Executor, seed: int) -> None:
    """After any forks, appends, truncations and closings a sequence goes on as one that had its tokens to itself."""
    rng = np.random.default_rng(seed)
    live: list[tuple[Sequence, list[int]]] = [(executor.new_sequence(), [])]
    for _ in range(60):
        i = int(rng.integers(len(live)))
        sequence, tokens = live[i]
        what = rng.choice(["append", "append", "fork", "truncate", "close"])
        if what == "append" and len(tokens) < CONTEXT:
            n = min(int(rng.choice([1, 1, 5, PAGE - 1, PAGE, 2 * PAGE])), CONTEXT - len(tokens))
            new = rng.integers(VOCAB, size=n).tolist()
            append(executor, sequence, new)
            tokens += new
        elif what == "fork":
            live.append((sequence.fork(), tokens.copy()))
        elif what == "truncate":
            n = int(rng.integers(len(tokens) + 1))
            sequence.truncate(n)
            del tokens[n:]
        elif what == "close" and len(live) > 1:
            live.pop(i)[0].close()
        check_pages(executor, live)
    for sequence, tokens in live:
        sequence.truncate(min(len(tokens), CONTEXT - 1))
        fresh = executor.new_sequence()
        everything = append(executor, fresh, [*tokens[: CONTEXT - 1], 7])
        assert append(executor, sequence, [7]) == everything[-4 * VOCAB :]
        fresh.close()
        sequence.close()
    assert executor.pool.n_used == 0


def check_pages(executor: Executor, live: list[tuple[Sequence, list[int]]]) -> None:
    """Lengths, and who holds which pages."""
    holders = Counter(page for sequence, _ in live for page in sequence.pages)
    assert executor.pool.n_used == len(holders)
    assert all(page.n_holder == n for page, n in holders.items())
    held = {page.memory.address for page in holders}
    assert len(held) == len(holders)
    assert held.isdisjoint(memory.address for memory in executor.pool.free)
    for sequence, tokens in live:
        assert sequence.length == len(tokens)
        assert len(sequence.pages) == -(-len(tokens) // PAGE)


def test_a_step_that_is_refused_changes_no_sequence(executor: Executor) -> None:
    sequence, other = executor.new_sequence(), executor.new_sequence()
    append(executor, sequence, [1, 2, 3])
    expected = append(executor, other, [1, 2, 3, 4])[-4 * VOCAB :]
    bad = [
        [Rows(sequence, np.array([1, VOCAB], np.int32))],
        [Rows(sequence, np.array([-1], np.int32))],
        [Rows(sequence, np.zeros(CONTEXT - 2, np.int32))],
        [Rows(sequence, np.zeros(1, np.int32)), Rows(other, np.array([VOCAB], np.int32))],
    ]
    for rows in bad:
        with pytest.raises(ArgumentError):
            executor.step(rows)
        assert (sequence.length, other.length) == (3, 4)
    assert append(executor, sequence, [4]) == expected
    sequence.close()
    other.close()
    assert executor.pool.n_used == 0

"""The same-bits promise: a token's logits depend on the weights and the tokens before it, to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint
from numpy.typing import NDArray

import pyengine
from pyengine._native import simd
from pyengine._native.matmul import DTYPES
from pyengine.executor import Executor, Rows

LENGTHS = (150, 1, 64, 65, 17, 128, 3, 127, 90)
Ids = NDArray[np.int32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that are no multiple of anything: a head of 20, more columns than a unit of work, two groups of int8
    values.
    """
    folder = tmp_path_factory.mktemp("bits")
    config = {"n_embd": 180, "n_head": 9, "n_layer": 3, "n_positions": 200, "n_inner": 300, "vocab_size": 777}
    write_checkpoint(folder, config)
    return folder


@pytest.fixture(params=[*DTYPES, "float32, KV int8", "int8, KV float32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(folder: Path, dtype: str, threads: int) -> pyengine.Model:
    weights, _, kv = dtype.partition(", KV ")
    return pyengine.load(folder, dtype=weights, threads=threads, kv_dtype=kv or None)  # type: ignore[arg-type]


def executor_of(folder: Path, dtype: str, threads: int) -> Executor:
    return load(folder, dtype, threads).executor


def prompts() -> list[Ids]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 777, n).astype(np.int32) for n in LENGTHS]


def alone(executor: Executor, token_ids: Ids, chunk: int) -> bytes:
    """The logits of every position of one sequence, run in chunks."""
    sequence = executor.new_sequence()
    parts = [token_ids[i : i + chunk] for i in range(0, len(token_ids), chunk)]
    got = b"".join(executor.step([Rows(sequence, part, len(part))]).tobytes() for part in parts)
    sequence.close()
    return got


def test_rows_whose_logits_are_wanted(folder: Path, dtype: str) -> None:
    """What follows the last attention runs on these alone, in other places and other numbers."""
    executor, token_ids = executor_of(folder, dtype, 2), prompts()[0]
    every = np.frombuffer(alone(executor, token_ids, len(token_ids)), np.float32).reshape(len(token_ids), -1)
    two = [executor.new_sequence(), executor.new_sequence()]
    got = executor.step([Rows(two[0], token_ids[:77], 1), Rows(two[1], token_ids[:40], 3)])
    assert got.tobytes() == every[[76, 37, 38, 39]].tobytes()
    assert got.tobytes() != every[[75, 37, 38, 39]].tobytes()
    assert len(executor.step([Rows(two[0], token_ids[77:90], 0), Rows(two[1], token_ids[40:41], 0)])) == 0
    got = executor.step([Rows(two[0], token_ids[90:], 2), Rows(two[1], token_ids[41:42], 1)])
    assert got.tobytes() == every[[148, 149, 41]].tobytes()


def test_threads(folder: Path, dtype: str) -> None:
    expected = alone(executor_of(folder, dtype, 1), prompts()[0], 512)
    for threads in (2, 3, 4):
        executor = executor_of(folder, dtype, threads)
        assert all(alone(executor, prompts()[0], 512) == expected for _ in range(5))


def test_chunks(folder: Path, dtype: str) -> None:
    executor = executor_of(folder, dtype, 2)
    expected = alone(executor, prompts()[0], 512)
    for chunk in (1, 7, 64):
        assert alone(executor, prompts()[0], chunk) == expected


def test_batch_of_mixed_lengths(folder: Path, dtype: str) -> None:
    """Nine sequences in one step, then each decodes a token beside the others: as each of them alone."""
    executor = executor_of(folder, dtype, 2)
    executor.max_rows = 1000
    sequences = [executor.new_sequence() for _ in LENGTHS]
    logits = executor.step(
        [Rows(s, p[:-1], len(p) - 1) for s, p in zip(sequences, prompts(), strict=True) if len(p) > 1]
    ).copy()
    decoded = executor.step([Rows(s, p[-1:]) for s, p in zip(sequences, prompts(), strict=True)]).copy()
    first = 0
    for prompt, last in zip(prompts(), decoded, strict=True):
        expected = alone(executor, prompt, 512)
        assert logits[first : first + len(prompt) - 1].tobytes() + last.tobytes() == expected
        first += len(prompt) - 1


def test_forks_and_undo(folder: Path, dtype: str) -> None:
    """A fork that goes its own way, and a sequence that was cut back, are as if they had been alone."""
    executor = executor_of(folder, dtype, 2)
    prompt = prompts()[0]
    sequence = executor.new_sequence()
    executor.step([Rows(sequence, prompt[:100], 0)])
    fork = sequence.fork()
    other = (prompt[100:140] + 1) % 777
    ours, theirs = np.split(executor.step([Rows(sequence, prompt[100:], 50), Rows(fork, other, 40)]).copy(), [50])
    assert ours.tobytes() == alone(executor, prompt, 512)[-ours.nbytes :]
    assert theirs.tobytes() == alone(executor, np.concatenate([prompt[:100], other]), 512)[-theirs.nbytes :]
    fork.truncate(70)
    again = executor.step([Rows(fork, prompt[70:], 80)])
    assert again.tobytes() == alone(executor, prompt, 512)[-again.nbytes :]
    sequence.close()
    fork.close()
    assert executor.pool.n_used == 0


def test_levels(folder: Path, dtype: str) -> None:
    """All SIMD levels with FMA; the portable one is close and, as a rule, not equal, so that this can fail. At each,
    one row at a time gives what many give.
    """
    got = {}
    for level in simd.levels():
        before = simd.use(level)
        got[level] = alone(executor_of(folder, dtype, 2), prompts()[0], 512)
        assert got[level].startswith(alone(executor_of(folder, dtype, 1), prompts()[0][:20], 1))
        simd.use(before)
    portable = got.pop("portable")
    assert len(set(got.values())) <= 1
    for other in got.values():
        a, b = np.frombuffer(portable, np.float32), np.frombuffer(other, np.float32)
        assert portable != other or dtype == "bfloat16"  # exact products; rounding hides the rest
        if dtype == "float32":
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_control(folder: Path, dtype: str) -> None:
    """One token more before it changes a token's logits: the comparisons above compare something."""
    executor = executor_of(folder, dtype, 2)
    prompt = prompts()[0]
    changed = prompt.copy()
    changed[0] = (changed[0] + 1) % 777
    row = 777 * 4
    assert alone(executor, prompt, 512)[-row:] != alone(executor, changed, 512)[-row:]


def test_generation_alone_and_in_a_batch(folder: Path, dtype: str) -> None:
    model = load(folder, dtype, 2)
    together = model.generate([p.tolist() for p in prompts()], max_new_tokens=20, seed=7, ignore_eos=True)
    for prompt, completion in zip(prompts(), together, strict=True):
        one = model.generate(prompt.tolist(), max_new_tokens=20, seed=7, ignore_eos=True)
        assert one.token_ids == completion.token_ids
        assert [t.logprob for t in one.logprobs] == [t.logprob for t in completion.logprobs]

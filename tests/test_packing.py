"""The loader: matrices in every layout and dtype, read in pieces from a file or from memory, packed and measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pyengine import CheckpointFileError
from pyengine._native import simd
from pyengine._native.matmul import PackedMatrix
from pyengine._native.packing import Loader, StoredMatrix

SHAPES = [(1, 1), (16, 16), (33, 40), (100, 17), (64, 129)]


@pytest.fixture(params=simd.levels(), autouse=True)
def level(request: pytest.FixtureRequest) -> object:
    before = simd.use(request.param)
    yield request.param
    simd.use(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("n_out", "n_in"), SHAPES)
def test_pieces(n_out: int, n_in: int, dtype: str, layout: str, threads: int, tmp_path: Path) -> None:
    w, ins, outs, data = matrix(n_out, n_in, dtype, layout)
    path = tmp_path / "data"
    path.write_bytes(b"before" + data)
    loader = Loader(threads, 1000)
    with path.open("rb") as file:
        for source, offset in ((file.fileno(), 6), (np.frombuffer(data, np.uint8), 0)):
            tensor = StoredMatrix(source, offset, dtype, layout, n_out, n_in)
            plain, scaled = PackedMatrix(n_out, n_in, "float32"), PackedMatrix(n_out, n_in, "float32")
            assert loader.pack([(tensor, plain, None, None), (tensor, scaled, ins, outs)]) == -1
            expected = w * ins * outs[:, None] * (1 / ins)  # a row has in_scale undone
            for n in range(n_out):
                assert np.array_equal(plain.row(n), w[n])
                assert np.array_equal(scaled.row(n), expected[n])
            assert np.array_equal(loader.largest_by_input([tensor, tensor])[1], np.abs(w).max(axis=0))
            norms = loader.output_norms([(tensor, ins), (tensor, None)])
            np.testing.assert_allclose(norms[0], np.linalg.norm(w * ins, axis=1), rtol=1e-5)
            np.testing.assert_allclose(norms[1], np.linalg.norm(w, axis=1), rtol=1e-5)


def matrix(
    n_out: int, n_in: int, dtype: str, layout: str
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], bytes]:
    """A weight [n_out, n_in] that `dtype` holds exactly, scales of its inputs and outputs, and how it is stored."""
    rng = np.random.default_rng(n_out)
    w = rng.integers(-100, 100, (n_out, n_in)).astype(np.float32) / 64
    ins, outs = (rng.uniform(0.5, 2, n).astype(np.float32) for n in (n_in, n_out))
    lies = np.ascontiguousarray(w if layout == "out_in" else w.T)
    data = {
        "F32": lies.tobytes(),
        "F16": lies.astype(np.float16).tobytes(),
        "BF16": (lies.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
    }
    return w, ins, outs, data[dtype]


def test_a_file_that_ends_before(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(bytes(4 * 32 * 32 - 1))
    with path.open("rb") as file:
        tensor = StoredMatrix(file.fileno(), 0, "F32", "out_in", 32, 32, "here: tensor 'w'")
        for use in (
            lambda: Loader(2).pack([(tensor, PackedMatrix(32, 32, "int8"), None, None)]),
            lambda: Loader(2).largest_by_input([tensor]),
            lambda: Loader(2, 64).output_norms([(tensor, None)]),
        ):
            with pytest.raises(CheckpointFileError, match=r"here: tensor 'w'.* truncated"):
                use()


def test_which_one_is_not_finite() -> None:
    w = np.ones((20, 20), np.float32)
    bad = w.copy()
    bad[19, 3] = np.nan
    tensors = [StoredMatrix(x.view(np.uint8).reshape(-1), 0, "F32", "out_in", 20, 20) for x in (w, bad, w)]
    jobs = [(tensor, PackedMatrix(20, 20, "int8"), None, None) for tensor in tensors]
    assert Loader(2).pack(jobs) == 1
    assert Loader(2).pack(jobs[:1]) == Loader(2).pack([]) == -1

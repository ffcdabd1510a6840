"""From a checkpoint's tensors to packed weights: read piece by piece, packed by all threads, one copy at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ._native.matmul import PackedMatrix
from ._native.memory import Arena
from .checkpoint import Checkpoint, TensorInfo
from .cost import matrix_dtypes
from .equalize import POWER, Scales, equalize
from .errors import CheckpointError
from .plan import Plan

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Stored = npt.NDArray[np.float32 | np.float16 | np.uint16]
Progress = Callable[[int, int], None]

SLAB_BYTES = 8 << 20


class TensorReader:
    """Reads a plan's weights from a checkpoint into one buffer that is used again and again."""

    def __init__(self, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], plan: Plan) -> None:
        self.checkpoint = checkpoint
        self.tensors = tensors
        self.plan = plan
        self.buffer = np.empty(0, np.uint8)

    def _read(self, name: str, start: int, nbytes: int) -> Bytes:
        if self.buffer.size < nbytes:
            self.buffer = np.empty(0, np.uint8)  # gives the old one back first
            self.buffer = np.empty(nbytes, np.uint8)
        self.checkpoint.read_into(self.tensors[name].name, self.buffer[:nbytes], start)
        return self.buffer[:nbytes]

    def vector(self, name: str) -> Floats:
        """A vector in float32; raises CheckpointError where a value is NaN or infinite."""
        tensor = self.tensors[name]
        values = to_float32(as_stored(self._read(name, 0, tensor.nbytes), tensor.dtype)).reshape(tensor.shape).copy()
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            index = tuple(int(i) for i in np.unravel_index(int(bad[0]), values.shape))
            raise CheckpointError(
                f"{tensor.path}: {tensor.name}{list(index)}: expected a finite number, got {values[index]}"
            )
        return values

    def slabs(self, name: str) -> Iterator[tuple[int, Bytes]]:
        """(first output column, bytes) of a matrix: whole rows of an "out_in" tensor in slabs, an "in_out" one in one
        piece.
        """
        tensor, spec = self.tensors[name], self.plan.matrices[name]
        if spec.layout == "in_out":
            yield 0, self._read(name, 0, tensor.nbytes)
            return
        row = tensor.nbytes // spec.n_out
        step = max(SLAB_BYTES // row // 16 * 16, 16)
        for first in range(0, spec.n_out, step):
            yield first, self._read(name, first * row, min(step, spec.n_out - first) * row)

    def columns(self, name: str) -> Iterator[tuple[int, Floats]]:
        """The same as (first output column, float32 [n columns, n_in]), a few columns at a time in either layout."""
        tensor, spec = self.tensors[name], self.plan.matrices[name]
        step = max(SLAB_BYTES // (4 * spec.n_in), 1)
        for first, raw in self.slabs(name):
            stored = as_stored(raw, tensor.dtype)
            stored = stored.reshape(spec.shape).T if spec.layout == "in_out" else stored.reshape(-1, spec.n_in)
            for start in range(0, len(stored), step):
                yield first + start, to_float32(stored[start : start + step])


def as_stored(raw: Bytes, dtype: str) -> Stored:
    """A tensor's bytes as its values; bfloat16, which numpy doesn't know, as uint16."""
    return raw.view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype])


def to_float32(stored: Stored) -> Floats:
    """Stored values as float32, which float16 and bfloat16 turn into without loss."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def load_weights(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    plan: Plan,
    dtype: str,
    threads: int,
    progress: Progress | None = None,
) -> tuple[dict[str, PackedMatrix], dict[str, Floats]]:
    """The plan's matrices packed as `dtype` (see cost.matrix_dtypes), and its vectors in float32.

    `tensors` maps the plan's names to tensors. `progress` is called with the bytes that were packed so far, and all.
    Raises CheckpointError where a value is NaN or infinite.
    """
    reader = TensorReader(checkpoint, tensors, plan)
    vectors = {name: reader.vector(name) for name in plan.vectors}
    scales = equalize(plan, vectors, reader.columns, dtype) if dtype in POWER else Scales()
    dtypes = matrix_dtypes(plan, dtype)
    total = sum(tensors[name].nbytes for name in plan.matrices)
    done = 0
    matrices = {}
    arena = Arena()
    for name, spec in plan.matrices.items():
        matrix = matrices[name] = PackedMatrix(spec.n_out, spec.n_in, dtypes[name], arena)
        for first, raw in reader.slabs(name):
            bad = matrix.pack(
                raw, tensors[name].dtype, spec.layout, first, scales.ins.get(name), scales.outs.get(name), threads
            )
            if bad >= 0:
                raise not_finite(reader, name)
            done += raw.size
            if progress:
                progress(done, total)
    return matrices, vectors


def not_finite(reader: TensorReader, name: str) -> CheckpointError:
    """The error that names the first NaN or infinity of a matrix."""
    tensor, spec = reader.tensors[name], reader.plan.matrices[name]
    for first, values in reader.columns(name):
        bad = np.argwhere(~np.isfinite(values))
        if bad.size:
            n, k = int(bad[0, 0]), int(bad[0, 1])
            index = [first + n, k] if spec.layout == "out_in" else [k, first + n]
            return CheckpointError(f"{tensor.path}: {tensor.name}{index}: expected a finite number, got {values[n, k]}")
    return CheckpointError(f"{tensor.path}: {tensor.name}: expected finite numbers")

"""From a checkpoint's tensors to packed weights: read piece by piece, packed by all threads, one copy at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ._native.matmul import PackedMatrix
from ._native.memory import Arena
from ._native.packing import Loader, StoredMatrix
from .cgroup import memory_nodes
from .checkpoint import Checkpoint, TensorInfo
from .cost import matrix_dtypes
from .equalize import Scales
from .errors import CheckpointError
from .plan import Plan

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Stored = npt.NDArray[np.float32 | np.float16 | np.uint16]
Progress = Callable[[int, int], None]

SLAB_BYTES = 1 << 20  # what a thread reads at once, and has in its core's cache then
BATCH_BYTES = 512 << 20


class TensorReader:
    """Reads a plan's weights from a checkpoint into buffers that are used again and again."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], plan: Plan, threads: int = 1
    ) -> None:
        self.checkpoint = checkpoint
        self.tensors = tensors
        self.plan = plan
        self.loader = Loader(threads, SLAB_BYTES)
        self.buffer = np.empty(0, np.uint8)

    def stored(self, name: str) -> StoredMatrix:
        """A matrix, for `loader`."""
        tensor, spec = self.tensors[name], self.plan.matrices[name]
        file = self.checkpoint.fileno(tensor)
        return StoredMatrix(file, tensor.offset, tensor.dtype, spec.layout, spec.n_out, spec.n_in, tensor)

    def largest_by_input(self, names: Iterable[str]) -> dict[str, Floats]:
        """See `equalize.Measure`."""
        names = list(names)
        return dict(zip(names, self.loader.largest_by_input([self.stored(name) for name in names]), strict=True))

    def output_norms(self, ins: Mapping[str, Floats | None]) -> dict[str, Floats]:
        """See `equalize.Measure`."""
        return dict(zip(ins, self.loader.output_norms([(self.stored(name), ins[name]) for name in ins]), strict=True))

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

    def vectors(self) -> dict[str, Floats]:
        """All vectors of the plan."""
        return {name: self.vector(name) for name in self.plan.vectors}

    def rows(self, name: str) -> Iterator[tuple[int, Floats]]:
        """(index of the first, float32 [n, width]) of some rows of a matrix at a time, as they lie in the file."""
        tensor = self.tensors[name]
        row = tensor.nbytes // tensor.shape[0]
        step = max(SLAB_BYTES // row, 1)
        for first in range(0, tensor.shape[0], step):
            raw = self._read(name, first * row, min(step, tensor.shape[0] - first) * row)
            yield first, to_float32(as_stored(raw, tensor.dtype)).reshape(-1, tensor.shape[1])


def as_stored(raw: Bytes, dtype: str) -> Stored:
    """A tensor's bytes as its values; bfloat16, which numpy doesn't know, as uint16."""
    return raw.view({"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[dtype])


def to_float32(stored: Stored) -> Floats:
    """Stored values as float32, which float16 and bfloat16 turn into without loss."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def load_matrices(
    reader: TensorReader, scales: Scales, dtype: str, progress: Progress | None = None
) -> dict[str, PackedMatrix]:
    """The plan's matrices packed as `dtype` (see cost.matrix_dtypes).

    `progress` is called with the bytes that were packed so far, and all. Raises CheckpointError where a value is NaN or
    infinite.
    """
    plan, tensors = reader.plan, reader.tensors
    dtypes = matrix_dtypes(plan, dtype)
    nodes = memory_nodes()
    arena = Arena(nodes)
    matrices = {
        name: PackedMatrix(spec.n_out, spec.n_in, dtypes[name], arena) for name, spec in plan.matrices.items()
    }
    total = sum(tensors[name].nbytes for name in matrices)
    done = 0
    for names in _batches(tensors, matrices):
        jobs = [(reader.stored(name), matrices[name], scales.ins.get(name), scales.outs.get(name)) for name in names]
        if nodes > 1:
            reader.loader.touch([matrices[name] for name in names])
        bad = reader.loader.pack(jobs)
        if bad >= 0:
            raise not_finite(reader, names[bad])
        done += sum(tensors[name].nbytes for name in names)
        if progress:
            progress(done, total)
    return matrices


def _batches(tensors: Mapping[str, TensorInfo], names: Iterable[str]) -> Iterator[list[str]]:
    """The matrices in parts, after each of which progress is told of and Ctrl-C is heard."""
    batch: list[str] = []
    for name in names:
        batch.append(name)
        if sum(tensors[name].nbytes for name in batch) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def not_finite(reader: TensorReader, name: str) -> CheckpointError:
    """The error that names the first NaN or infinity of a matrix."""
    tensor = reader.tensors[name]
    for first, values in reader.rows(name):
        bad = np.argwhere(~np.isfinite(values))
        if bad.size:
            i, j = bad[0].tolist()
            index = [first + i, j]
            return CheckpointError(f"{tensor.path}: {tensor.name}{index}: expected a finite number, got {values[i, j]}")
    return CheckpointError(f"{tensor.path}: {tensor.name}: expected finite numbers")

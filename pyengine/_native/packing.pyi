from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .matmul import PackedMatrix

Scale = NDArray[np.float32] | None

class StoredMatrix:
    n_out: int
    n_in: int
    def __init__(
        self,
        source: int | NDArray[np.uint8],
        offset: int,
        dtype: str,
        layout: str,
        n_out: int,
        n_in: int,
        what: object = "tensor",
    ) -> None: ...

class Loader:
    def __init__(self, threads: int = 1, piece_bytes: int = 1 << 20) -> None: ...
    def touch(self, matrices: Sequence[PackedMatrix]) -> None: ...
    def pack(self, jobs: Sequence[tuple[StoredMatrix, PackedMatrix, Scale, Scale]]) -> int: ...
    def largest_by_input(self, tensors: Sequence[StoredMatrix]) -> list[NDArray[np.float32]]: ...
    def output_norms(self, jobs: Sequence[tuple[StoredMatrix, Scale]]) -> list[NDArray[np.float32]]: ...

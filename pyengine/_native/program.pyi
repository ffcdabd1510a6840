from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .matmul import PackedMatrix
from .pages import KVLayout

Floats = NDArray[np.float32]

class Program:
    def __init__(self, widths: Sequence[int], layout: KVLayout, n_threads: int) -> None: ...
    def add_embed(self, out: int, table: PackedMatrix, positions: Floats) -> None: ...
    def add_norm(self, src: int, out: int, gain: Floats, bias: Floats, eps: float) -> None: ...
    def add_linear(
        self,
        src: int,
        out: int,
        weight: PackedMatrix,
        bias: Floats | None = None,
        activation: str | None = None,
        residual: int = -1,
    ) -> None: ...
    def add_attend(self, src: int, out: int, layer: int, n_head: int, scale: float) -> None: ...
    def add_pick_rows(self, src: int, out: int) -> None: ...

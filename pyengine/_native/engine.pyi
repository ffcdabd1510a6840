from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .program import Program
from .sampling import Workspace

Floats = NDArray[np.float32]
Part = tuple[NDArray[np.int32], NDArray[np.uintp], int, int]  # token_ids, pages, position, n_logits

# temperature, top_k, top_p, min_p, seed, sample_index, position, stop_ids
Draw = tuple[float, int, float, float, int, int, int, frozenset[int]]

class Engine:
    def __init__(self, program: Program) -> None: ...
    def step(self, parts: list[Part]) -> Floats: ...
    def decode(
        self,
        parts: list[Part],
        draws: Sequence[Draw],
        n_step: int,
        seconds: float,
        works: list[Workspace],
        urgent: Callable[[], bool],
    ) -> tuple[list[list[tuple[int, float]]], Floats]: ...
    def stop(self) -> None: ...

import numpy as np
from numpy.typing import NDArray

from .sampling import Floats, Ids, Workspace

Wish = tuple[float, int, float, float, tuple[float, ...]]  # temperature, top_k, top_p, min_p, numbers in [0, 1)

def draw_rows(
    works: list[Workspace],
    logits: list[Floats],
    asked: list[Wish],
    masks: list[tuple[NDArray[np.uint32], Ids, float]] | None = None,
) -> tuple[list[list[int]], list[float], list[float]]: ...
def top_rows(
    works: list[Workspace], logits: list[Floats], k: int
) -> tuple[list[tuple[Ids, Floats]], NDArray[np.float64]]: ...

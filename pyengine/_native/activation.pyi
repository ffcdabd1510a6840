import numpy as np
from numpy.typing import NDArray

ACTIVATIONS: dict[str | None, int]

def exp(x: NDArray[np.float32]) -> NDArray[np.float32]: ...
def activate(
    kind: str | None, x: NDArray[np.float32], threads: int = 1, narrow: bool = False
) -> NDArray[np.float32]: ...

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

def layer_norm(x: Floats, gain: Floats, bias: Floats, eps: float, threads: int = 1) -> Floats: ...
def softmax(x: Floats, threads: int = 1) -> Floats: ...

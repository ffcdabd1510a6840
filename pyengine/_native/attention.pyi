import numpy as np
from numpy.typing import NDArray

def attention(
    qkv: NDArray[np.float32],
    n_head: int,
    n_kv_head: int,
    head_dim: int,
    scale: float,
    threads: int = 1,
    kv_dtype: str = "float32",
) -> NDArray[np.float32]: ...

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from .memory import Block

KV_DTYPES: tuple[str, ...]

class KVLayout:
    page_positions: ClassVar[int]
    def __init__(self, n_layer: int, n_kv_head: int, head_dim: int, dtype: str) -> None: ...
    @property
    def page_nbytes(self) -> int: ...
    def copy(self, src: Block, dst: Block, n: int) -> None: ...

def attention(
    qkv: NDArray[np.float32],
    n_head: int,
    n_kv_head: int,
    head_dim: int,
    scale: float,
    threads: int = 1,
    kv_dtype: str = "float32",
) -> NDArray[np.float32]: ...

from typing import ClassVar

from .memory import Block

KV_DTYPES: tuple[str, ...]

class KVLayout:
    page_positions: ClassVar[int]
    def __init__(self, n_layer: int, n_kv_head: int, head_dim: int, dtype: str) -> None: ...
    @property
    def page_nbytes(self) -> int: ...
    def copy(self, src: Block, dst: Block, n: int) -> None: ...

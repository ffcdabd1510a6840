import numpy as np
from numpy.typing import NDArray

from .memory import Arena, Block

DTYPES: tuple[str, ...]

class PackedMatrix:
    dtype: str
    n_out: int
    n_in: int
    def __init__(self, n_out: int, n_in: int, dtype: str, arena: Arena | None = None) -> None: ...
    @property
    def n_panel(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def parts(self) -> list[Block | NDArray[np.uint8]]: ...
    def pack(
        self,
        src: NDArray[np.uint8],
        tensor_dtype: str,
        layout: str,
        first: int = 0,
        in_scale: NDArray[np.float32] | None = None,
        out_scale: NDArray[np.float32] | None = None,
        threads: int = 1,
    ) -> int: ...
    def row(self, n: int) -> NDArray[np.float32]: ...

def matmul(x: NDArray[np.float32], weight: PackedMatrix, threads: int = 1) -> NDArray[np.float32]: ...
def quantize(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int32]]: ...

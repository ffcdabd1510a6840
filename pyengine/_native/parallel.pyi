import numpy as np
from numpy.typing import NDArray

MOST_THREADS: int

def usable_cpus() -> int: ...
def taken(threads: int, n_phase: int, n_unit: int, n_late: int) -> NDArray[np.int64]: ...

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NonFiniteError

def token_logprobs(logits: NDArray[np.float32], token_ids: NDArray[np.int32]) -> NDArray[np.float64]: ...
def unusable(logits: Any) -> NonFiniteError: ...

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]
Masking = tuple[NDArray[np.uint32], Ids]  # bits and end_ids of `Workspace.mask`

class Workspace:
    vocab_size: int
    def __init__(self, vocab_size: int) -> None: ...
    def logsumexp(self, logits: Floats) -> float: ...
    def top(self, logits: Floats, k: int, masking: Masking | None = None) -> tuple[Ids, Floats]: ...
    def adjust(
        self,
        logits: Floats,
        shift: float,
        taken_ids: Any,  # a buffer of int32, as generated_ids
        diversity_penalty: float,
        prompt_ids: Ids,
        generated_ids: Any,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        bias_ids: Ids,
        bias: Floats,
    ) -> Floats: ...
    def mask(self, logits: Floats, bits: NDArray[np.uint32], end_ids: Ids) -> Floats: ...
    def probabilities(
        self, logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float, n_least: int = 1
    ) -> NDArray[np.float64]: ...
    def race(
        self,
        logits: Floats,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        n_least: int,
        uniforms: NDArray[np.float64],
    ) -> tuple[Ids, NDArray[np.float64]]: ...

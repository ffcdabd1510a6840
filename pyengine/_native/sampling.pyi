from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]

def uniform(seed: int, sample_index: int, position: int) -> float: ...
def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]: ...
def token_logprobs(logits: Floats, token_ids: Ids) -> NDArray[np.float64]: ...

class Workspace:
    vocab_size: int
    def __init__(self, vocab_size: int) -> None: ...
    def logsumexp(self, logits: Floats) -> float: ...
    def argmax(self, logits: Floats) -> int: ...
    def top(self, logits: Floats, k: int) -> tuple[Ids, Floats]: ...
    def adjust(
        self,
        logits: Floats,
        shift: float,
        prompt_ids: Ids,
        generated_ids: Any,  # a buffer of int32
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        bias_ids: Ids,
        bias: Floats,
    ) -> Floats: ...
    def mask(self, logits: Floats, bits: NDArray[np.uint32], end_ids: Ids) -> Floats: ...
    def probabilities(
        self, logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> NDArray[np.float64]: ...
    def draw(
        self, logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float
    ) -> int: ...

"""What a model sees of a text that has no end: its first tokens and its last ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Window:
    """At most `size` tokens, of which the first `sinks` always stay.

    When a token comes that has no place, the sinks and the last half of the others are kept, and run again from
    position 0 on. What is seen depends on the tokens alone, not on the pieces that they come in.
    """

    size: int
    sinks: int  # less than size

    def seen(self, token_ids: Ids) -> Ids:
        """What is seen of a text after its last token, given all of it, or what was seen before and what came then."""
        kept = self.sinks + (self.size - self.sinks) // 2  # tokens, where the window was full
        if len(token_ids) <= self.size:
            return token_ids
        n_more = len(token_ids) - self.size  # tokens since it was full for the first time
        n_since = (n_more - 1) % (self.size - kept) + 1  # and since it was for the last time
        first = len(token_ids) - n_since - (kept - self.sinks)
        return np.concatenate([token_ids[: self.sinks], token_ids[first:]])

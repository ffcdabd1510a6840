"""Finds the 16 values of a 4-bit weight (PE_Q4_CODEBOOK in csrc/kernels.h): python -m bench.codebook

Lloyd's algorithm (1982) on made-up weights in groups of 32, half of them normal, half with the longer tails of
Student's t (8 degrees of freedom): values go to their nearest entry, at the scale that is best for their group; entries
move to where the squared error is least; the entry next to 0 is held there, since a padded weight must be nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GROUP = 32
LARGEST = 64
Doubles = NDArray[np.float64]
Codes = NDArray[np.int64]


def nearest(values: Doubles, codebook: Doubles) -> Codes:
    """The index of the entry nearest to each value."""
    return np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)


def best_scale(groups: Doubles, entries: Doubles) -> Doubles:
    """The scale of each group at which `entries` are nearest to it: [n, 1]."""
    scale: Doubles = (groups * entries).sum(axis=1) / (entries**2).sum(axis=1)
    return scale[:, None]


def assign(groups: Doubles, codebook: Doubles) -> tuple[Codes, Doubles]:
    """Codes [n, 32] and scales [n, 1]: of several begun at either end of the codebook, the best."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    codes, scales = np.zeros(groups.shape, np.int64), np.ones((len(groups), 1))
    least = np.full(len(groups), np.inf)
    for end in (codebook[0], codebook[-1]):
        for start in (0.95, 1.05):
            scale = largest / end * start
            for _ in range(2):
                scale = best_scale(groups, codebook[nearest(groups / scale, codebook)])
            code = nearest(groups / scale, codebook)
            error = ((groups - scale * codebook[code]) ** 2).sum(axis=1)
            better = error < least
            codes[better], scales[better], least[better] = code[better], scale[better], error[better]
    return codes, scales


def find(n_group: int = 20_000, rounds: int = 40, seed: int = 0) -> list[int]:
    """The codebook, its largest entry 64 in size: what vpmaddubsw multiplies exactly."""
    rng = np.random.default_rng(seed)
    groups = np.concatenate([rng.standard_normal((n_group, GROUP)), rng.standard_t(8, (n_group, GROUP))])
    groups /= np.sqrt((groups**2).mean(axis=1, keepdims=True))
    codebook = np.linspace(-LARGEST, LARGEST, 17)[:16]
    for _ in range(rounds):
        codes, scales = assign(groups, codebook)
        weight = np.broadcast_to(scales**2, groups.shape).ravel()
        above = np.bincount(codes.ravel(), (groups * scales).ravel(), 16)
        codebook = np.sort(above / np.maximum(np.bincount(codes.ravel(), weight, 16), 1e-9))
        codebook[np.abs(codebook).argmin()] = 0
        codebook *= LARGEST / np.abs(codebook).max()
    if codebook[-1] > LARGEST - 0.01:  # a scale may be negative: which side has more entries is a matter of taste
        codebook = -codebook[::-1]
    return [round(entry) for entry in codebook]


if __name__ == "__main__":
    print(find())

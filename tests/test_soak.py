"""A short version of `make soak`: whatever happens to requests, nothing is left of them."""

from __future__ import annotations

import pytest

soak = pytest.importorskip("bench.soak", reason="needs the checkout")


def test_nothing_is_left() -> None:
    model, _ = soak.soak(n=300, seed=0)
    assert soak.at_rest(model)
    stats = model.stats
    assert (stats.running, stats.waiting, stats.kv_pages_used) == (0, 0, 0)
    assert stats.kv_pages_cached <= stats.kv_pages
    model.close()

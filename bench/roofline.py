"""The tokens a second that the machine's limits allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.metrics import Metric
from pyengine.cost import cost
from pyengine.plan import Plan


def roofline(plan: Plan, width: str, metric: Metric, limits: Mapping[str, Any]) -> float | None:
    """The tokens a second that the limits allow to weights of this width; None where a limit wasn't measured.

    Counted are the weights, read once a step, and the products with them, those that all tokens need alone in a prompt,
    as in `pyengine bench`; neither keys and values nor anything else.
    """
    exact = cost(plan, "float32", "float32")
    peak = limits.get("peak_" + {"int4": "int8"}.get(width, width))
    bandwidth = limits["bandwidth"]
    if peak is None:
        return None
    if not metric.new_tokens:
        return float(peak) / exact.block_flops
    flops = metric.n_prompt * (exact.block_flops + exact.picked_flops)
    return metric.n_prompt / max(decode_bytes(plan, width) / bandwidth, flops / peak)


def decode_bytes(plan: Plan, width: str) -> float:
    """Bytes of weights that a step reads, as our packed form has them."""
    return cost(plan, width, "float32").decode_bytes

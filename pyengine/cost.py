"""What a plan costs, read off it: memory, and the operations and bytes of a token. Nothing is loaded for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ._native import simd
from .plan import Attend, Embed, Linear, MatrixSpec, PickRows, Plan

# PE_GROUP, PE_Q4_GROUP and PE_LANES of csrc/kernels.h
GROUP = 128  # values of an int8 or int4 weight's column that share a sum
Q4_GROUP = 32  # values of an int4 weight's column that share a scale
LANES = 16
# Rough speeds of two cores, by which `step_seconds` and `row_seconds` are weighed against each other. Those of products
# of a few rows, in operations a second, by the SIMD level; NEON and portable C are taken for the last.
OPERATIONS = {
    "avx512": {"float32": 0.5e12, "bfloat16": 1.0e12, "int8": 1.6e12, "int4": 1.2e12},
    "avx2_vnni": {"float32": 0.15e12, "bfloat16": 0.1e12, "int8": 0.5e12, "int4": 0.4e12},
    "": {"float32": 0.15e12, "bfloat16": 0.1e12, "int8": 0.17e12, "int4": 0.2e12},
}
MEMORY_SPEED = 40e9  # bytes read in a second
CACHE_SPEED = 80e9  # from caches, which a model of CACHE_BYTES fits into
CACHE_BYTES = 32e6
OVERHEAD = 50e-6  # seconds of a step, whatever the model
VISIT_SECONDS = 40e-6  # of these, what steps don't take that the engine makes by itself
ROW_OVERHEAD = 4e-6  # of a row
KV_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of a number of a key or a value


@dataclass(frozen=True)
class Cost:
    """A plan with its weights in one dtype, and its keys and values in one."""

    n_parameter: int
    weight_bytes: int  # packed weights, and vectors
    kv_bytes_per_token: int  # keys and values of one position
    decode_bytes: int  # weights that every SIMD level reads for a token, the head included
    block_flops: int  # of the matrix products for a token; multiplication and addition count each
    picked_flops: int  # of those that follow `PickRows`: for a token whose logits are wanted, besides
    attention_flops_per_position: int  # for a token, times the positions that it looks at
    step_seconds: float  # of a step of one row, about: to weigh things up
    cold_seconds: float  # of such a step where another model's weights have taken the caches meanwhile
    row_seconds: float  # of each further row, while they are few


def default_kv_dtype(dtype: str) -> Literal["float32", "bfloat16"]:
    """What a model of `dtype` keeps keys and values in: what loses nothing measurable beside the weights."""
    return "float32" if dtype == "float32" else "bfloat16"


def matrix_dtypes(plan: Plan, dtype: str) -> dict[str, str]:
    """What each matrix is kept as in a model of `dtype`: in int4 the head and the tables of tokens stay int8."""
    by_token = {op.token_table for op in plan.ops if isinstance(op, Embed)}
    by_token |= {op.weight for op in plan.linears() if op.out == plan.logits}
    return {name: "int8" if dtype == "int4" and name in by_token else dtype for name in plan.matrices}


def matrix_bytes(spec: MatrixSpec, dtype: str) -> int:
    """The memory of a packed matrix."""
    columns = _whole(spec.n_out, LANES)
    match dtype:
        case "float32":
            return 4 * columns * spec.n_in
        case "bfloat16":
            return 2 * columns * _whole(spec.n_in, 2)
        case "int8":
            return columns * (_whole(spec.n_in, 4) + 2 * _whole(spec.n_in, GROUP) // GROUP + 4)
        case _:
            n_in = _whole(spec.n_in, Q4_GROUP)
            return columns * (n_in // 2 + 2 * n_in // Q4_GROUP) + weight_sum_bytes(spec)


def weight_sum_bytes(spec: MatrixSpec) -> int:
    """The part of a packed int4 matrix that only levels read whose products wait for instructions, not for memory."""
    return _whole(spec.n_out, LANES) * 4 * _whole(spec.n_in, GROUP) // GROUP


def kv_bytes(op: Attend, dtype: str) -> int:
    """The memory of one position's keys and values; bfloat16 keeps keys in pairs, int8 has a float32 scale for each."""
    scales = 8 if dtype == "int8" else 0
    key_width = _whole(op.head_dim, 2) if dtype == "bfloat16" else op.head_dim
    return op.n_kv_head * (KV_BYTES[dtype] * (key_width + _whole(op.head_dim, LANES)) + scales)


def cost(plan: Plan, dtype: str, kv_dtype: str, level: str | None = None) -> Cost:
    """The cost of a plan whose matrices are kept as `dtype` (see matrix_dtypes), keys and values as `kv_dtype`.

    Its seconds are of a SIMD level, by default the one in use.
    """
    dtypes = matrix_dtypes(plan, dtype)
    memory = {name: matrix_bytes(spec, dtypes[name]) for name, spec in plan.matrices.items()}
    size = {name: spec.n_out * spec.n_in for name, spec in plan.matrices.items()}
    vectors = sum(math.prod(spec.shape) for spec in plan.vectors.values())
    read = {op.weight for op in plan.linears()}
    only_looked_up = {op.token_table for op in plan.ops if isinstance(op, Embed)} - read
    first_picked = next((i for i, op in enumerate(plan.ops) if isinstance(op, PickRows)), len(plan.ops))
    picked = sum(2 * size[op.weight] for op in plan.ops[first_picked:] if isinstance(op, Linear))
    flops = sum(2 * size[op.weight] for op in plan.linears())
    attend = [op for op in plan.ops if isinstance(op, Attend)]
    decode_bytes = sum(n for name, n in memory.items() if name not in only_looked_up)
    decode_bytes -= sum(weight_sum_bytes(spec) for name, spec in plan.matrices.items() if dtypes[name] == "int4")
    speeds = next(its for name, its in OPERATIONS.items() if (level or simd.active()).startswith(name))
    row_seconds = ROW_OVERHEAD + flops / speeds[dtype]
    in_caches = decode_bytes <= CACHE_BYTES
    return Cost(
        n_parameter=sum(size.values()) + vectors,
        weight_bytes=sum(memory.values()) + 4 * vectors,
        kv_bytes_per_token=sum(kv_bytes(op, kv_dtype) for op in attend),
        decode_bytes=decode_bytes,
        block_flops=flops - picked,
        picked_flops=picked,
        attention_flops_per_position=sum(4 * op.n_head * op.head_dim for op in attend),
        step_seconds=OVERHEAD + decode_bytes / (CACHE_SPEED if in_caches else MEMORY_SPEED) + row_seconds,
        cold_seconds=OVERHEAD + decode_bytes / MEMORY_SPEED + row_seconds,
        row_seconds=row_seconds,
    )


def _whole(n: int, size: int) -> int:
    """n rounded up to a multiple of size."""
    return -(-n // size) * size

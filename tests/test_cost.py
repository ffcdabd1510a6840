"""The cost of a plan against what is allocated for it, and the bundled model's known size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG, bound, write_checkpoint

from pyengine._native import simd
from pyengine._native.matmul import DTYPES, PackedMatrix
from pyengine._native.pages import KV_DTYPES, KVLayout
from pyengine.architectures import gpt2
from pyengine.checkpoint import Checkpoint
from pyengine.cost import Cost, cost, matrix_bytes
from pyengine.equalize import equalize
from pyengine.loading import plan_of
from pyengine.plan import MatrixSpec
from pyengine.weights import TensorReader, load_matrices

SIZES = [(1, 1), (15, 3), (16, 4), (17, 5), (33, 127), (48, 128), (50, 129), (31, 255), (257, 256), (7, 1000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_out", "n_in"), SIZES)
def test_matrix(n_out: int, n_in: int, dtype: str) -> None:
    assert matrix_bytes(MatrixSpec("w", n_out, n_in, "out_in"), dtype) == PackedMatrix(n_out, n_in, dtype).nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}, {"n_embd": 60, "n_head": 3, "n_inner": 77}])
def test_weights(tmp_path: Path, config: dict[str, Any], dtype: str) -> None:
    write_checkpoint(tmp_path, config)
    plan = plan_of(tmp_path)
    with Checkpoint.open(tmp_path) as checkpoint:
        reader = TensorReader(checkpoint, bound(tmp_path), plan)
        vectors = reader.vectors()
        matrices = load_matrices(reader, equalize(plan, vectors, reader, dtype), dtype)
        stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    expected = cost(plan, dtype, "float32")
    packed = {name: matrix.nbytes for name, matrix in matrices.items()}
    assert expected.weight_bytes == sum(packed.values()) + sum(vector.nbytes for vector in vectors.values())
    assert expected.n_parameter == stored / 4  # float32
    looked_up = packed["token_embedding"] if "lm_head" in packed else 0
    unread = 0  # by levels that wait for memory: a float32 for 128 weights
    if dtype == "int4":
        blocks = [spec for name, spec in plan.matrices.items() if name.startswith("h.")]
        unread = sum(4 * -(-spec.n_in // 128) * -(-spec.n_out // 16) * 16 for spec in blocks)
    assert expected.decode_bytes == sum(packed.values()) - looked_up - unread


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize(("n_embd", "n_head"), [(32, 2), (60, 3), (48, 1), (34, 2)])
def test_kv_cache(n_embd: int, n_head: int, dtype: str) -> None:
    plan = gpt2.plan(CONFIG | {"n_embd": n_embd, "n_head": n_head})
    layout = KVLayout(plan.n_layer, plan.n_kv_head, plan.head_dim, dtype)
    assert cost(plan, "int8", dtype).kv_bytes_per_token * KVLayout.page_positions == layout.page_nbytes


def test_bundled_model() -> None:
    plan = plan_of("demo")
    got = cost(plan, "float32", "float32")
    assert got.n_parameter == 5_918_720
    assert got.weight_bytes == 4 * 5_918_720  # all of its sizes are multiples of 16
    n_block = 6 * (256 * 768 + 256 * 256 + 2 * 256 * 1024)
    picked = 256 * 256 + 2 * 256 * 1024  # of the last block, behind its attention
    assert got.block_flops == 2 * (n_block - picked)
    assert got.picked_flops == 2 * (picked + 4096 * 256)
    assert got.decode_bytes == 4 * (n_block + 4096 * 256)
    assert got.attention_flops_per_position == 6 * 4 * 256  # a multiplication and an addition for each of q k and w v
    assert got.kv_bytes_per_token == 6 * 2 * 256 * 4
    assert cost(plan, "int8", "float32").weight_bytes < 0.3 * got.weight_bytes


def test_what_a_row_adds_to_a_step() -> None:
    """What speculation goes by: a row costs much less than a step where weights come from memory, less so in caches."""
    config = CONFIG | {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}

    def both(level: str) -> tuple[Cost, dict[str, Cost]]:
        large = {dtype: cost(gpt2.plan(config), dtype, "bfloat16", level) for dtype in DTYPES}
        return cost(plan_of("demo"), "int8", "bfloat16", level), large

    demo, large = both("avx512_vnni")
    shares = {dtype: one.row_seconds / one.step_seconds for dtype, one in large.items()}
    assert all(0.02 < share < 0.12 for share in shares.values())
    assert 0.06 < demo.row_seconds / demo.step_seconds < 0.15
    assert demo.cold_seconds > 1.3 * demo.step_seconds  # it comes from caches, unless another model has taken them
    assert all(one.cold_seconds == one.step_seconds for one in large.values())
    assert large["int4"].step_seconds < large["int8"].step_seconds < 0.3 * large["float32"].step_seconds
    demo, large = both("avx2")  # where products of int8 and int4 take instructions rather than bytes
    shares = {dtype: one.row_seconds / one.step_seconds for dtype, one in large.items()}
    assert 0.05 < shares["float32"] < 0.2 < shares["bfloat16"] < shares["int8"] < shares["int4"] < 0.5
    assert 0.3 < demo.row_seconds / demo.step_seconds < 0.5


def test_costs_are_of_the_level_in_use() -> None:
    plan = plan_of("demo")
    assert cost(plan, "int8", "bfloat16") == cost(plan, "int8", "bfloat16", simd.active())
    assert all(cost(plan, "int8", "bfloat16", level).row_seconds > 0 for level in simd.levels())

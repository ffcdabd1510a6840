"""The executor: a plan and its packed weights, run by the native engine, one `step` at a time.

`step` is the one entry. It takes rows; a row is (token id, sequence, position). A prompt is many rows of one
sequence, decoding is one row of each sequence, a batch, a chunk of a prompt and the beams of a beam search are rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ._native import simd
from ._native.engine import Engine
from ._native.logprobs import unusable
from ._native.matmul import PackedMatrix
from ._native.memory import checksum
from ._native.program import Program
from ._native.sampling import Workspace
from .errors import ArgumentError
from .kv import UNLIMITED, KVPool, Sequence
from .plan import Attend, Embed, Linear, Norm, PickRows, Plan
from .sampling import Draw, Drawn

if TYPE_CHECKING:  # of the stub
    from ._native.engine import Part

Floats = npt.NDArray[np.float32]


@dataclass
class Rows:
    """Tokens that continue a sequence in one step, and for how many of the last of them logits are wanted."""

    sequence: Sequence
    token_ids: npt.NDArray[np.int32]  # [n]
    n_logits: int = 1
    n_draft: int = 0  # of the last tokens of the sequence then, how many are guesses: see `Sequence.settle`


class Executor:
    """Runs a plan. Steps of several threads wait for each other."""

    max_rows = 512  # most rows of one step: a chunk of a prompt, which bounds the memory of activations

    def __init__(
        self,
        plan: Plan,
        matrices: Mapping[str, PackedMatrix],
        vectors: Mapping[str, Floats],
        kv_dtype: str,
        threads: int,
        kv_pages: int = UNLIMITED,
        prefix_cache: bool = True,
    ) -> None:
        self.plan = plan
        self.threads = threads
        self.simd = simd.active()
        self.max_seq_len = plan.max_seq_len
        self.vocab_size = plan.vocab_size
        self.pool = KVPool(plan, kv_dtype, kv_pages, prefix_cache)
        self._matrices, self._vectors = matrices, vectors
        self._lock = threading.Lock()
        self._engine = native(plan, matrices, vectors, self.pool, threads)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that change with the plan or any weight, as packed: whose keys and values a file has."""
        digest = blake2b(repr(self.plan).encode(), digest_size=16)
        for name, matrix in sorted(self._matrices.items()):
            digest.update(f"{name} {matrix.dtype}".encode())
            for part in matrix.parts:
                digest.update(checksum(part))
        for name, vector in sorted(self._vectors.items()):
            digest.update(name.encode())
            digest.update(checksum(vector.reshape(-1).view(np.uint8)))
        return digest.hexdigest()

    def new_sequence(self) -> Sequence:
        """An empty sequence."""
        return Sequence(self.pool)

    def step(self, rows: SequenceOf[Rows]) -> Floats:
        """Appends the rows' tokens to their sequences; returns the logits that are wanted, in order.

        The logits are float32 [sum of n_logits, vocab_size], the caller's own. A sequence may occur once.
        KV pages that aren't reserved are taken, beyond the pool's capacity if need be.
        Raises ArgumentError for token ids out of range, too many rows or a full context, StepStopped after `stop`, and
        lets KeyboardInterrupt through; then no sequence has changed.
        """
        parts = self._parts(rows, 0)
        with self._lock:
            for r in rows:
                r.sequence.reserve(len(r.token_ids))
            logits = self._engine.step(parts)
            for r in rows:
                r.sequence.extend(r.token_ids, r.n_draft)
            return logits

    def decode(
        self,
        rows: SequenceOf[Rows],
        draws: SequenceOf[Draw],
        n: int,
        seconds: float,
        works: list[Workspace],
        urgent: Callable[[], bool],
    ) -> Iterator[list[Drawn]]:
        """At most n steps of a row of each sequence, each of which draws the rows of the next; gives them one by one.

        Of each step, for each row, the token that comes next; by then the sequences have the rows' tokens, and they
        lose nothing if no more steps are taken. All are computed before the first is given: fewer than n where a text
        ends, where they would take longer than so many seconds, or as soon as `urgent()`. Raises what `step` raises.
        """
        parts = self._parts(rows, n - 1)
        with self._lock:
            for r in rows:
                r.sequence.reserve(n)
            found, logits = self._engine.decode(parts, draws, n, seconds, works, urgent)
        token_ids = [r.token_ids for r in rows]
        for step in found:
            for r, ran in zip(rows, token_ids, strict=True):
                r.sequence.extend(ran)
            # Unusable logits are the last step's.
            yield [
                Drawn(token_id, logprob, None if token_id >= 0 else unusable(row))
                for (token_id, logprob), row in zip(step, logits, strict=True)
            ]
            token_ids = [np.array([token_id], np.int32) for token_id, _ in step]

    def _parts(self, rows: SequenceOf[Rows], n_more: int) -> list[Part]:
        """What the engine is told of the rows; checks that each sequence has place for them and n_more."""
        n_row = 0
        parts: list[Part] = []
        for r in rows:
            position, n = r.sequence.length, len(r.token_ids)
            n_position = position + n + n_more
            if n_position > self.max_seq_len:
                raise ArgumentError(f"token_ids: {n_position} positions, but the context has {self.max_seq_len}")
            parts.append((r.token_ids, r.sequence.table, position, r.n_logits))
            n_row += n
        if n_row > self.max_rows:
            raise ArgumentError(f"rows: expected at most {self.max_rows} in one step, got {n_row}")
        return parts

    def stop(self) -> None:
        """Ends the step that another thread runs, or else the next one, within an operation of it."""
        self._engine.stop()


def native(
    plan: Plan, matrices: Mapping[str, PackedMatrix], vectors: Mapping[str, Floats], pool: KVPool, threads: int
) -> Engine:
    """The native engine of a plan, which it is told operation by operation."""
    index = {name: i for i, name in enumerate(plan.buffers)}
    program = Program(list(plan.buffers.values()), pool.layout, threads)
    for op in plan.ops:
        match op:
            case Embed():
                program.add_embed(index[op.out], matrices[op.token_table], vectors[op.position_table])
            case Norm():
                program.add_norm(index[op.src], index[op.out], vectors[op.gain], vectors[op.bias], op.eps)
            case Linear():
                bias = None if op.bias is None else vectors[op.bias]
                residual = -1 if op.residual is None else index[op.residual]
                program.add_linear(index[op.src], index[op.out], matrices[op.weight], bias, op.activation, residual)
            case Attend():
                program.add_attend(index[op.src], index[op.out], op.layer, op.n_head, op.scale)
            case PickRows():
                program.add_pick_rows(index[op.src], index[op.out])
    return Engine(program)

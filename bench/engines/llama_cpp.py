"""llama.cpp, through the C functions that llama-cpp-python binds."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from bench.conversions import once
from bench.engines import Base, Floats, Prompts, Run

Rows = NDArray[np.int64]

CELLS = 256  # a context is a multiple of so many positions


class Engine(Base):
    """A model of llama.cpp, and a context for each size of a run."""

    packages = ("llama-cpp-python", "gguf")

    @staticmethod
    def convert(checkpoint: Path, work: Path, variant: str) -> Path:
        from bench.conversions.llama_cpp import quantise, write_gguf

        exact = once(work / "F32.gguf", partial(write_gguf, checkpoint))
        return exact if variant == "F32" else once(work / f"{variant}.gguf", partial(quantise, exact, variant), exact)

    def __init__(self, files: Path, variant: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(files).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{files}: llama.cpp can't load it; what it printed tells why")
        self.max_seq_len = llama_cpp.llama_model_n_ctx_train(self.model)
        self.threads = threads
        self.contexts: dict[tuple[int, int], Context] = {}
        self.context(1, self.max_seq_len)

    def context(self, n_seq: int, length: int) -> Context:
        """An empty context for so many sequences of that length; a single sequence gets the model's whole context."""
        length = max(length, self.max_seq_len) if n_seq == 1 else length
        size = n_seq, -(-length // CELLS) * CELLS
        if size not in self.contexts:
            self.contexts[size] = Context(self.model, *size, self.threads)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.contexts[size].pointer), True)
        return self.contexts[size]

    def generate(self, prompts: Prompts, n_new: int) -> Run:
        n_seq, length = np.shape(prompts)
        context = self.context(n_seq, length + n_new)
        sequences = np.arange(n_seq)
        tokens = np.empty((n_seq, n_new), np.int32)
        seconds = []
        start = time.perf_counter()
        last = np.arange(length) == length - 1
        ids = np.repeat(sequences, length)
        logits = context.decode(np.ravel(prompts), np.tile(np.arange(length), n_seq), ids, np.tile(last, n_seq))
        for i in range(n_new):
            if i:
                logits = context.decode(tokens[:, i - 1], length + i - 1, sequences, True)
            tokens[:, i] = logits.argmax(1)
            seconds.append(time.perf_counter() - start)
        return Run(tokens.tolist(), seconds)

    def logits(self, token_ids: Sequence[int]) -> Floats:
        n = len(token_ids)
        return self.context(1, n).decode(np.array(token_ids), np.arange(n), 0, True).copy()


class Context:
    """A context of llama.cpp, and its rows in numpy arrays that a llama_batch points to."""

    def __init__(self, model: llama_cpp.llama_model_p, n_seq: int, length: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = n_seq
        params.n_ctx = params.n_batch = n_row = n_seq * length
        params.n_threads = params.n_threads_batch = threads
        self.pointer = llama_cpp.llama_init_from_model(model, params)
        if not self.pointer:
            raise MemoryError(f"llama.cpp can't make a context of {n_seq} times {length} positions")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.tokens, self.positions, self.sequences = (np.zeros(n_row, np.int32) for _ in range(3))
        self.wanted = np.zeros(n_row, np.int8)
        # Each row is of one sequence: a list of one, which lies in the array of all.
        self.counts = np.ones(n_row, np.int32)
        self.lists = (self.sequences.ctypes.data + 4 * np.arange(n_row)).astype(np.uintp)
        self.batch = llama_cpp.llama_batch()
        arrays = {"token": self.tokens, "pos": self.positions, "n_seq_id": self.counts}
        for name, array in (arrays | {"seq_id": self.lists, "logits": self.wanted}).items():
            kind = dict(llama_cpp.llama_batch._fields_)[name]
            setattr(self.batch, name, ctypes.cast(array.ctypes.data, kind))

    def decode(self, tokens: Rows, positions: Rows | int, sequences: Rows | int, wanted: Rows | bool) -> Floats:
        """Runs rows of (token, position, sequence); the logits of those that are wanted, a view."""
        n = self.batch.n_tokens = len(tokens)
        self.tokens[:n], self.positions[:n] = tokens, positions
        self.sequences[:n], self.wanted[:n] = sequences, wanted
        code = llama_cpp.llama_decode(self.pointer, self.batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code} for {n} rows")
        logits = llama_cpp.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(logits, (int(self.wanted[:n].sum()), self.vocab_size))

"""llama.cpp, through the C functions that llama-cpp-python binds; its GGUF files are written here and quantised by
llama.cpp itself.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

from bench.checkpoint import once, tensors, vocabulary
from bench.engines import Base, Floats, Prompts, Run
from pyengine import loading

Rows = NDArray[np.int64]

FILE_TYPES = {
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
CELLS = 256  # a context is a multiple of so many positions


class Engine(Base):
    """A model of llama.cpp, and a context for each size of a run."""

    packages = ("llama-cpp-python", "gguf")

    @staticmethod
    def convert(checkpoint: Path, work: Path, variant: str) -> Path:
        exact = once(work / "F32.gguf", partial(write_gguf, checkpoint))
        return exact if variant == "F32" else once(work / f"{variant}.gguf", partial(quantise, exact, variant))

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


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint as a GGUF file in float32."""
    plan = loading.plan_of(checkpoint)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(plan.max_seq_len)
    writer.add_embedding_length(plan.d_model)
    writer.add_feed_forward_length(plan.buffers["hidden"])
    writer.add_block_count(plan.n_layer)
    writer.add_head_count(plan.n_head)
    writer.add_layer_norm_eps(next(op.eps for op in plan.ops if hasattr(op, "eps")))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens, merges = vocabulary(checkpoint, plan.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, plan.n_layer)
    for name, values in tensors(checkpoint):
        prefix = "" if name.startswith("lm_head") else "transformer."
        writer.add_tensor(names.get_name(prefix + name, (".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantise(exact: Path, variant: str, path: Path) -> None:
    """A GGUF file of another type, by llama.cpp."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[variant]
    code = llama_cpp.llama_model_quantize(str(exact).encode(), str(path).encode(), params)
    if code:
        raise RuntimeError(f"{variant}: llama_model_quantize returned {code}")

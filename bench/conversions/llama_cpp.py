"""GGUF files of a GPT-2, in float32; llama.cpp itself quantises them."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp

from bench.conversions.checkpoint import tensors, vocabulary
from pyengine import loading

FILE_TYPES = {
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


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

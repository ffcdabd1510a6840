"""Loading: from a folder, "demo" or a model id of the hub to a Model."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ._native.matmul import DTYPES
from ._native.pages import KV_DTYPES, KVLayout
from .architectures import architecture_of
from .checkpoint import Checkpoint, bind, read_json
from .cost import default_kv_dtype
from .equalize import equalize
from .errors import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointFileError
from .executor import Executor
from .kv import PAGE
from .memory import choose_pages
from .model import Model
from .plan import Plan
from .scheduler import Scheduler
from .threads import choose_threads
from .tokenizer import Tokenizer
from .weights import TensorReader, load_matrices

Dtype = Literal["float32", "bfloat16", "int8", "int4"]
KVDtype = Literal["float32", "bfloat16", "int8"]

# What a checkpoint's folder may hold that is read; nothing else is downloaded.
FILES = ["*.json", "*.safetensors", "merges.txt"]


def load(
    model: str | PathLike[str] = "demo",
    dtype: Dtype = "int8",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    kv_dtype: KVDtype | None = None,
    max_batch: int = 32,
    step_tokens: int = 128,
    kv_memory: int | None = None,
    prefix_cache: bool = True,
) -> Model:
    """Loads a model from a Hugging Face checkpoint, as it is: a folder, "demo" (the bundled one), or a model id of
    the hub.

    dtype is what the matrices are kept and multiplied in: "float32"; "bfloat16" (half the memory; weights and
    activations rounded to 8 bits of precision; fast where the CPU multiplies it, as `pyengine info` tells); "int8"
    (weights and activations; a fourth of the memory, several times as fast, a perplexity about 0.2 % higher); or
    "int4" (weights of 4.75 bits, the embedding and the head in int8; activations in int8). threads is the number of
    threads, by default that of the CPUs that this process may use, or the value of PYENGINE_NUM_THREADS. progress is
    called now and then with the bytes of weights that are packed, and of all.
    kv_dtype is what the cache keeps keys and values in: "float32" (the default for a float32 model), "bfloat16" (half
    the memory, and attention's products in bfloat16; the default for all others), or "int8" (little more than a fourth
    of the memory, a scale for each position and head; attention computes in float32).

    All that is asked of a model at one time runs as one batch. max_batch is how many sequences run at once.
    step_tokens is how many tokens a step takes while a text is being generated: long prompts are cut into pieces by
    it, so that other texts keep their pace; more is faster for prompts. kv_memory is the most memory, in bytes, that
    keys and values of requests and of the prefix cache take: by default that of max_batch sequences of the whole
    context, but at most half of what is left. prefix_cache keeps the keys and values of what has run, as far as there
    is room, so that a prompt that starts the same doesn't run again.

    A model id, such as "openai-community/gpt2", needs the extra `hub` and is downloaded by huggingface_hub into its
    cache. Raises CheckpointError and CheckpointFileError for what is wrong with the checkpoint, ArgumentError for the
    arguments, OutOfMemoryError where there is too little memory; all are pyengine.Error.

    >>> model = pyengine.load("demo")
    >>> model.generate("Once upon a time", max_new_tokens=8, temperature=0).text
    """
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if kv_dtype is None:
        kv_dtype = default_kv_dtype(dtype)
    if kv_dtype not in KV_DTYPES:
        raise ArgumentError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    n_threads = choose_threads(threads).count
    folder = find(model)
    with Checkpoint.open(folder) as checkpoint, ThreadPoolExecutor(1) as beside:
        architecture = architecture_of(checkpoint.config)
        plan: Plan = architecture.plan(checkpoint.config)
        tensors = bind(checkpoint, plan, architecture.PREFIXES, architecture.IGNORED)
        eos_token_ids = _eos_token_ids(folder, checkpoint.config, plan.vocab_size)
        weights = TensorReader(checkpoint, tensors, plan, n_threads)
        vectors = weights.vectors()
        scales = equalize(plan, vectors, weights, dtype)
        # The tokenizer holds the GIL while it is made, some 0.1 s. Packing takes as long and doesn't need it.
        tokenizer = beside.submit(Tokenizer.from_folder, folder, plan.vocab_size)
        matrices = load_matrices(weights, scales, dtype, progress)
    page_nbytes = KVLayout(plan.n_layer, plan.n_kv_head, plan.head_dim, kv_dtype).page_nbytes
    pages = choose_pages(kv_memory, page_nbytes, -(-plan.max_seq_len // PAGE), max_batch)
    executor = Executor(plan, matrices, vectors, kv_dtype, n_threads, pages, prefix_cache)
    scheduler = Scheduler(executor, max_batch, step_tokens)
    return Model(checkpoint.config, dtype, scheduler, tokenizer.result(), eos_token_ids)


def plan_of(model: str | PathLike[str]) -> Plan:
    """The plan of a checkpoint, from its config.json alone."""
    config = read_json(find(model), "config.json")
    plan: Plan = architecture_of(config).plan(config)
    return plan


def find(model: str | PathLike[str]) -> Path:
    """The folder of a model: the one of that path, the bundled one, or a snapshot of the hub."""
    if not isinstance(model, str | PathLike):
        raise ArgumentTypeError(f"model: expected a folder or a model id, got {model!r}")
    if model == "demo":
        return Path(__file__).parent / "demo"
    path = Path(model)
    name = str(model)
    is_id = (
        isinstance(model, str) and name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name
    )
    if os.path.exists(path) or not is_id:
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise CheckpointFileError(
            f"{name}: expected a folder, 'demo', or a model id; there is no such folder, and for model ids "
            "huggingface_hub must be installed: pip install pyengine[hub]"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointFileError(
            f"{name}: expected a folder, 'demo', or a model id; there is no such folder, and the hub says: {error}"
        ) from error


def _eos_token_ids(folder: Path, config: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json, else of config.json."""
    values = config.get("eos_token_id")
    source = "config.json"
    if (folder / "generation_config.json").exists():
        generation_config = read_json(folder, "generation_config.json")
        if generation_config.get("eos_token_id") is not None:
            values, source = generation_config["eos_token_id"], "generation_config.json"
    token_ids = values if isinstance(values, list) else [] if values is None else [values]
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise CheckpointError(f"{folder / source}: eos_token_id: expected token ids, got {values!r}")
    # A config may keep the id of a larger vocabulary: a token that can't occur ends nothing.
    return tuple(token_id for token_id in token_ids if 0 <= token_id < vocab_size)

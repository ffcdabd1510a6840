"""A loaded model: text or token ids in, text, logits or scores out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from importlib import resources
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from ._native.matmul import DTYPES
from ._native.pages import KV_DTYPES, KVLayout
from ._native.sampling import Workspace
from .architectures import architecture_of
from .beam import BeamGeneration
from .checkpoint import Checkpoint, bind, read_json
from .completion import Completion, Piece
from .cost import Cost, cost, default_kv_dtype
from .errors import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointFileError
from .executor import Executor
from .generation import Generation, Ids, Job, check_token_ids
from .kv import PAGE, Sequence
from .memory import choose_pages
from .plan import Plan
from .runner import Request, Runner, Stream, wait_all
from .sampling import SamplingParams
from .scheduler import Scheduler, Stats, stats
from .scoring import Logits, Score, Scoring
from .state import State, window_of
from .threads import choose_threads
from .tokenizer import Tokenizer
from .weights import load_weights
from .window import Window

Prompt = str | SequenceOf[int]
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
    "int4" (weights of 4.5 bits, the embedding and the head in int8; activations in int8). threads is the number of
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
    with Checkpoint.open(folder) as checkpoint:
        architecture = architecture_of(checkpoint.config)
        plan: Plan = architecture.plan(checkpoint.config)
        tensors = bind(checkpoint, plan, architecture.PREFIXES, architecture.IGNORED)
        eos_token_ids = _eos_token_ids(folder, checkpoint.config, plan.vocab_size)
        tokenizer = Tokenizer.from_folder(folder, plan.vocab_size)
        matrices, vectors = load_weights(checkpoint, tensors, plan, dtype, n_threads, progress)
    page_nbytes = KVLayout(plan.n_layer, plan.n_kv_head, plan.head_dim, kv_dtype).page_nbytes
    pages = choose_pages(kv_memory, page_nbytes, -(-plan.max_seq_len // PAGE), max_batch)
    executor = Executor(plan, matrices, vectors, kv_dtype, n_threads, pages, prefix_cache)
    scheduler = Scheduler(executor, max_batch, step_tokens)
    return Model(checkpoint.config, dtype, scheduler, tokenizer, eos_token_ids)


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
        return Path(str(resources.files("pyengine") / "demo"))
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


class Model:
    """A model in memory. Made by `load`. Any thread may call it at any time: what runs at one time runs as one batch.

    config is the checkpoint's config.json; tokenizer has encode(text) -> list[int] and decode(token_ids) -> str, or is
    None where the checkpoint has none (token ids can be used then).
    """

    def __init__(
        self,
        config: dict[str, Any],
        dtype: str,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.executor = scheduler.executor
        self.kv_dtype = self.executor.pool.dtype
        self.plan = self.executor.plan
        self.runner = Runner(scheduler)
        self._work = Workspace(self.plan.vocab_size)  # for the thread that steps

    def __repr__(self) -> str:
        return f"<pyengine.Model {self.plan.model_type}, {self.cost.n_parameter:,} parameters, {self.dtype}>"

    @property
    def cost(self) -> Cost:
        """Memory, and the operations and bytes of a token."""
        return cost(self.plan, self.dtype, self.kv_dtype)

    def generate(
        self,
        prompt: Prompt | SequenceOf[Prompt],
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        stop: str | SequenceOf[str] | None = None,
        stop_token_ids: SequenceOf[int] | None = None,
        seed: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
        num_return_sequences: int = 1,
        logprobs: int = 0,
        ignore_eos: bool = False,
    ) -> Any:
        """Continues a prompt: a str, a list of token ids, or a list of either, which runs as one batch.

        Returns a `Completion`; a list of them for a list of prompts; and for num_return_sequences > 1 a list of that
        many in the place of each. What the arguments mean stands in `SamplingParams`; a text ends at the model's
        end-of-text token, at a stop string or stop token, after max_new_tokens, or when the context is full. The same
        seed gives the same text, alone or in a batch. Raises ArgumentError naming the argument, and NonFiniteError
        where the logits can't be used.

        >>> model.generate("It was a dark", max_new_tokens=20, temperature=0.8, seed=1).text
        >>> [c.text for c in model.generate(["One", "Two"], num_beams=4)]
        """
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            stop=stop,
            stop_token_ids=stop_token_ids,
            seed=seed,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )
        prompts = self._prompts(prompt)
        if prompts is None:
            return self._submit(self._task(cast("Prompt", prompt), params)).wait()
        with self._all(prompts, params) as requests:
            return wait_all(requests)

    def submit(self, prompt: Prompt, **params: Any) -> Request[Any]:
        """Begins to continue one prompt, and returns at once; takes the arguments of `generate`.

        The request is a future: `result()` is what `generate` returns; iterating gives the pieces that `stream` yields.
        It joins what runs already. Raises ArgumentError for a request that could never run, as for want of kv_memory.

        >>> requests = [model.submit(prompt, seed=1) for prompt in prompts]
        >>> texts = [request.result().text for request in requests]
        """
        return self._submit(self._task(prompt, SamplingParams(**params)))

    async def agenerate(self, prompt: Prompt | SequenceOf[Prompt], **params: Any) -> Any:
        """`generate` for an event loop, which goes on meanwhile; cancelling the task cancels the request.

        >>> completion = await model.agenerate("Once upon a time")
        """
        prompts = self._prompts(prompt)
        sampling = SamplingParams(**params)
        if prompts is None:
            return await asyncio.wrap_future(self._submit(self._task(cast("Prompt", prompt), sampling)))
        with self._all(prompts, sampling) as requests:
            return await asyncio.gather(*map(asyncio.wrap_future, requests))

    async def astream(self, prompt: Prompt, **params: Any) -> AsyncIterator[Piece]:
        """`stream` for an event loop; leaving the loop cancels the request.

        >>> async for piece in model.astream("Once upon a time"):
        ...     print(piece.text, end="", flush=True)
        """
        request = self._stream(prompt, params)
        try:
            async for piece in request:
                yield piece
        finally:
            request.cancel()

    def stream(self, prompt: Prompt, **params: Any) -> Stream:
        """Continues one prompt and yields each token as it comes; takes the arguments of `generate`, but for beams
        and samples. Closing or dropping the iterator ends the generation.

        A piece has text (which may be empty: no half character is ever shown), token_id, logprob, top_logprobs, and
        finish_reason in the last one.

        >>> for piece in model.stream("Once upon a time", seed=1):
        ...     print(piece.text, end="", flush=True)
        """
        return Stream(self._stream(prompt, params))

    def score(self, text: Prompt, stride: int | None = None) -> Score:
        """How probable a text is: the log-probability of each token given those before it, and the perplexity.

        text is a str or a list of token ids, of any length: one longer than the context is read in windows that start
        `stride` tokens apart, by default half the context.

        >>> model.score("It was a dark and stormy night").perplexity
        """
        scoring = Scoring(self.executor, self.token_ids(text, "text"), stride)
        return self.runner.submit(scoring, scoring.score).wait()

    def logits(self, text: Prompt) -> NDArray[np.float32]:
        """The logits of the next token at every position of a text: float32 [n, vocab_size]."""
        reading = Logits(self.executor, self.token_ids(text, "text"))
        return self.runner.submit(reading, lambda: reading.logits).wait()

    def state(self, prompt: Prompt | None = None, window: int | None = None, sinks: int = 4) -> State:
        """A state that has seen `prompt`, to be appended to, forked, cut back, continued and saved; without one it is
        empty.

        Without `window` it ends with the context. With it there is no end: the model sees at most `window` tokens at a
        time, in constant memory. When it is full, the first `sinks` tokens and the last half of the others are kept and
        run again as a text of their own, so each token runs about twice. That is sound for every position encoding,
        learned ones as GPT-2's too, since no key or value moves to another position: the logits are to the bit those of
        `logits` for the tokens that are kept. Moving them instead, as StreamingLLM does, takes relative positions; that
        the first tokens must stay, since models rest much attention on them, is from there (Xiao et al. 2023, Efficient
        Streaming Language Models with Attention Sinks). What it costs in quality: the model sees the sinks and the last
        tokens, between half of the window and all of it, nothing in between, and so a text that jumps after the sinks.

        >>> state = model.state("It was a dark")
        >>> state.append(" and stormy night").logits.argmax()
        >>> endless = model.state("Once upon a time", window=256)
        """
        state = State(self, window=window_of(window, sinks, self.plan.max_seq_len))
        if prompt is not None:
            state.append(self.token_ids(prompt).tolist())
        return state

    def restore(self, path: str | PathLike[str]) -> State:
        """The state that `State.save` wrote to a file, with the same bits; nothing of it runs again.

        Raises CheckpointFileError for a file that is missing or can't be read; CheckpointError for one that is damaged
        or no saved state, or is of another model, dtype or kv_dtype; OutOfMemoryError where the KV pool has no room.

        >>> model.state("Once upon a time").save("once.safetensors")
        >>> model.restore("once.safetensors").generate(seed=1).text
        """
        return State.load(self, path)

    @property
    def stats(self) -> Stats:
        """What runs, and how the pool of KV pages is used, at this moment."""
        return stats(self.runner.scheduler)

    def close(self) -> None:
        """Cancels all requests and ends the thread that runs them; the model can't be used any more."""
        self.runner.close()

    def token_ids(self, text: Prompt, name: str = "prompt") -> NDArray[np.int32]:
        """The token ids of a text or a list of them, checked: int32 [n], n > 0. `name` is the argument that errors
        name.
        """
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ArgumentError(f"{name}: expected token ids, got text: the checkpoint has no tokenizer")
            ids = check_token_ids(name, self.tokenizer.encode(text), self.plan.vocab_size)
        else:
            ids = check_token_ids(name, text, self.plan.vocab_size)
        if len(ids) == 0:
            raise ArgumentError(f"{name}: expected at least one token, got an empty one")
        return ids

    @staticmethod
    def _prompts(prompt: object) -> SequenceOf[Prompt] | None:
        """The prompts, if it is a list of them and not one."""
        try:
            one = isinstance(prompt, str) or len(prompt) == 0 or isinstance(prompt[0], Integral)  # type: ignore[arg-type, index]
        except (TypeError, LookupError):
            expected = "a str, a list of token ids, or a list of either"
            raise ArgumentTypeError(f"prompt: expected {expected}, got {type(prompt).__name__}") from None
        return None if one else cast("SequenceOf[Prompt]", prompt)

    def _stream(self, prompt: Prompt, params: Mapping[str, Any]) -> Request[Any]:
        sampling = SamplingParams(**params)
        sampling.check_stream()
        return self._submit(self._task(prompt, sampling))

    @contextmanager
    def _all(self, prompts: SequenceOf[Prompt], params: SamplingParams) -> Iterator[list[Request[Any]]]:
        """The requests of a list, none of which outlives the block: if one fails, the others are cancelled."""
        tasks = [self._task(one, params, f"prompt[{i}]") for i, one in enumerate(prompts)]
        requests: list[Request[Any]] = []
        try:
            requests += map(self._submit, tasks)
            yield requests
        finally:
            for request in requests:
                request.cancel()

    def _task(self, prompt: Prompt, params: SamplingParams, name: str = "prompt") -> Generation | BeamGeneration:
        return self._task_from(None, self.token_ids(prompt, name), params)

    def _task_from(
        self, sequence: Sequence | None, prompt_ids: Ids, params: SamplingParams, window: Window | None = None
    ) -> Generation | BeamGeneration:
        job = Job(prompt_ids, params, params.stop_ids(self.eos_token_ids), self.tokenizer, window)
        return (BeamGeneration if params.num_beams > 1 else Generation)(self.executor, job, self._work, sequence)

    def submit_from(
        self, sequence: Sequence, prompt_ids: Ids, params: SamplingParams, window: Window | None
    ) -> Request[Any]:
        """Continues a prompt of which `sequence` has run a beginning, not all; it is the request's from then on."""
        return self._submit(self._task_from(sequence, prompt_ids, params, window))

    def _submit(self, task: Generation | BeamGeneration) -> Request[Any]:
        def result() -> Completion | list[Completion]:
            completions = task.completions()
            return completions if len(completions) > 1 else completions[0]

        return self.runner.submit(task, result)

"""A loaded model: text or token ids in, text, logits or scores out."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from functools import cached_property, partial
from numbers import Integral
from os import PathLike
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from .beam import BeamGeneration
from .completion import Completion, Piece
from .constraints import Constraint, Vocabulary
from .cost import VISIT_SECONDS, Cost, cost
from .errors import ArgumentError, ArgumentTypeError
from .generation import Generation, Ids, Job, check_token_ids
from .kv import Sequence
from .params import LogitsProcessor, SamplingParams
from .runner import Request, Runner, Stream, wait_all
from .scheduler import Scheduler, Stats, stats
from .scoring import Logits, Score, Scoring
from .speculation import Experience, Speculation
from .state import State, window_of
from .tokenizer import Tokenizer
from .window import Window

Prompt = str | SequenceOf[int]

ASSISTANT_TOKENS = 8  # most that an assistant guesses at a time


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
        # Those that were checked, and what is known of them, by temperature
        self._assistants: weakref.WeakKeyDictionary[Model, dict[float, Experience]] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<pyengine.Model {self.plan.model_type}, {self.cost.n_parameter:,} parameters, {self.dtype}>"

    @cached_property
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
        do_sample: bool | None = None,
        num_beam_groups: int = 1,
        diversity_penalty: float = 0.0,
        logits_processor: LogitsProcessor | SequenceOf[LogitsProcessor] | None = None,
        json_schema: dict[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        prompt_lookup_num_tokens: int | None = None,
        assistant_model: Model | None = None,
    ) -> Any:
        """Continues a prompt: a str, a list of token ids, or a list of either, which runs as one batch.

        Returns a `Completion`; a list of them for a list of prompts; and for num_return_sequences > 1 a list of that
        many in the place of each. What the arguments mean stands in `SamplingParams`; a text ends at the model's
        end-of-text token, at a stop string or stop token, after max_new_tokens, or when the context is full; one that
        must match json_schema, regex or grammar (they need the extra `constrained`) also when nothing more may follow.
        The same seed gives the same text, alone or in a batch. Raises ArgumentError naming the argument, and
        NonFiniteError where the logits can't be used.

        prompt_lookup_num_tokens and assistant_model guess up to so many tokens ahead, which one step then runs: from
        what the text has said before, or by a smaller model of the same vocabulary. The tokens stay the same to the
        last bit of their log-probabilities; they come sooner where guesses are right, and where they aren't none are
        made. `Completion.usage` counts them.

        >>> model.generate("It was a dark", max_new_tokens=20, temperature=0.8, seed=1).text
        >>> [c.text for c in model.generate(["One", "Two"], num_beams=4)]
        >>> model.generate("The year was", regex=r" 1[0-9]{3}").text
        >>> model.generate("One", num_beams=6, num_beam_groups=3, diversity_penalty=1.0, num_return_sequences=3)
        """
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
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
            num_beam_groups=num_beam_groups,
            diversity_penalty=diversity_penalty,
            logits_processor=logits_processor,
            json_schema=json_schema,
            regex=regex,
            grammar=grammar,
            num_return_sequences=num_return_sequences,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
            prompt_lookup_num_tokens=prompt_lookup_num_tokens,
        )
        prompts = self._prompts(prompt)
        if prompts is None:
            return self._submit_one(cast("Prompt", prompt), params, assistant_model).wait()
        with self._all(prompts, params, assistant_model) as requests:
            return wait_all(requests)

    def submit(self, prompt: Prompt, assistant_model: Model | None = None, **params: Any) -> Request[Any]:
        """Begins to continue one prompt, and returns at once; takes the arguments of `generate`.

        The request is a future: `result()` is what `generate` returns; iterating gives the pieces that `stream` yields.
        It joins what runs already. Raises ArgumentError for a request that could never run, as for want of kv_memory.

        >>> requests = [model.submit(prompt, seed=1) for prompt in prompts]
        >>> texts = [request.result().text for request in requests]
        """
        return self._submit_one(prompt, SamplingParams(**params), assistant_model)

    async def agenerate(
        self, prompt: Prompt | SequenceOf[Prompt], assistant_model: Model | None = None, **params: Any
    ) -> Any:
        """`generate` for an event loop, which goes on meanwhile; cancelling the task cancels the request.

        >>> completion = await model.agenerate("Once upon a time")
        """
        import asyncio  # slow to import, and there already where an event loop runs

        prompts = self._prompts(prompt)
        sampling = SamplingParams(**params)
        if prompts is None:
            return await asyncio.wrap_future(self._submit_one(cast("Prompt", prompt), sampling, assistant_model))
        with self._all(prompts, sampling, assistant_model) as requests:
            return await asyncio.gather(*map(asyncio.wrap_future, requests))

    async def astream(
        self, prompt: Prompt, assistant_model: Model | None = None, **params: Any
    ) -> AsyncIterator[Piece]:
        """`stream` for an event loop; leaving the loop cancels the request.

        >>> async for piece in model.astream("Once upon a time"):
        ...     print(piece.text, end="", flush=True)
        """
        request = self._stream(prompt, params, assistant_model)
        try:
            async for piece in request:
                yield piece
        finally:
            request.cancel()

    def stream(self, prompt: Prompt, assistant_model: Model | None = None, **params: Any) -> Stream:
        """Continues one prompt and yields each token as it comes; takes the arguments of `generate`, but for beams
        and samples. Closing or dropping the iterator ends the generation.

        A piece has text (which may be empty: no half character is ever shown), token_id, logprob, top_logprobs, and
        finish_reason in the last one.

        >>> for piece in model.stream("Once upon a time", seed=1):
        ...     print(piece.text, end="", flush=True)
        """
        return Stream(self._stream(prompt, params, assistant_model))

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

    def _stream(
        self, prompt: Prompt, params: Mapping[str, Any], assistant_model: Model | None = None
    ) -> Request[Any]:
        sampling = SamplingParams(**params)
        sampling.check_stream()
        return self._submit_one(prompt, sampling, assistant_model)

    @contextmanager
    def _all(
        self, prompts: SequenceOf[Prompt], params: SamplingParams, assistant_model: Model | None
    ) -> Iterator[list[Request[Any]]]:
        """The requests of a list, none of which outlives the block: if one fails, the others are cancelled."""
        how = self._constraint(params), self._speculation(params, assistant_model)
        tasks = [self._task(one, params, *how, f"prompt[{i}]") for i, one in enumerate(prompts)]
        requests: list[Request[Any]] = []
        try:
            requests += map(self._submit, tasks)
            yield requests
        finally:
            for request in requests:
                request.cancel()

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """What constraints walk; made when first used."""
        assert self.tokenizer is not None
        encode = partial(self.tokenizer.encode, allow_special=False)
        return Vocabulary(self.tokenizer.vocabulary(), self.tokenizer.special_ids, encode)

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        if params.constraint is None:
            return None
        name, value = params.constraint
        if self.tokenizer is None:
            raise ArgumentError(f"{name}: expected none, got {value!r}: the checkpoint has no tokenizer")
        params.check_vocab(self.plan.vocab_size)
        return self._vocabulary.compile(name, value, params.stop_ids(self.eos_token_ids))

    def _speculation(self, params: SamplingParams, assistant: Model | None) -> Speculation | None:
        """How the text of a request is guessed ahead."""
        num_tokens, step = params.prompt_lookup_num_tokens, self.cost.step_seconds
        row_cost = self.cost.row_seconds / step
        if assistant is None:
            return None if num_tokens is None else Speculation(num_tokens, row_cost, VISIT_SECONDS / step)
        if not isinstance(assistant, Model):
            raise ArgumentTypeError(f"assistant_model: expected a pyengine.Model, got {assistant!r}")
        for name, unset in (("num_beams", 1), ("prompt_lookup_num_tokens", None)):
            if getattr(params, name) != unset:
                raise ArgumentError(f"assistant_model: expected none with {name}={getattr(params, name)}")
        if assistant not in self._assistants:
            self._check_assistant(assistant)
            self._assistants[assistant] = {}
        temperature = round(params.temperature, 1) if params.samples else 0.0
        return Speculation(
            ASSISTANT_TOKENS,
            row_cost,
            assistant=assistant.executor,
            assistant_cost=assistant.cost.cold_seconds / step,
            assistant_row_cost=assistant.cost.row_seconds / step,
            experience=self._assistants[assistant].setdefault(temperature, Experience()),
        )

    def _check_assistant(self, assistant: Model) -> None:
        """Raises `ArgumentError` for a model whose tokens are others."""
        if assistant is self:
            raise ArgumentError("assistant_model: expected another model than the one that it guesses for")
        ours, theirs = self.plan.vocab_size, assistant.plan.vocab_size
        if ours != theirs:
            raise ArgumentError(f"assistant_model: expected a vocabulary of {ours} tokens (vocab_size), got {theirs}")
        if self.tokenizer and assistant.tokenizer and self.tokenizer.vocabulary() != assistant.tokenizer.vocabulary():
            raise ArgumentError("assistant_model: expected the same vocabulary, got a tokenizer with other tokens")

    def _task(
        self,
        prompt: Prompt,
        params: SamplingParams,
        constraint: Constraint | None,
        speculation: Speculation | None,
        name: str = "prompt",
    ) -> Generation | BeamGeneration:
        prompt_ids = self.token_ids(prompt, name)
        return self._task_from(None, prompt_ids, params, constraint, speculation, None)

    def _task_from(
        self,
        sequence: Sequence | None,
        prompt_ids: Ids,
        params: SamplingParams,
        constraint: Constraint | None,
        speculation: Speculation | None,
        window: Window | None,
    ) -> Generation | BeamGeneration:
        stop_ids = params.stop_ids(self.eos_token_ids)
        job = Job(prompt_ids, params, stop_ids, self.tokenizer, constraint, speculation, window)
        works = self.runner.scheduler.works
        return (BeamGeneration if params.num_beams > 1 else Generation)(self.executor, job, works, sequence)

    def submit_from(
        self, sequence: Sequence, prompt_ids: Ids, params: SamplingParams, window: Window | None
    ) -> Request[Any]:
        """Continues a prompt of which `sequence` has run a beginning, not all; it is the request's from then on."""
        how = self._constraint(params), self._speculation(params, None)
        return self._submit(self._task_from(sequence, prompt_ids, params, *how, window))

    def _submit_one(self, prompt: Prompt, params: SamplingParams, assistant_model: Model | None) -> Request[Any]:
        return self._submit(
            self._task(prompt, params, self._constraint(params), self._speculation(params, assistant_model))
        )

    def _submit(self, task: Generation | BeamGeneration) -> Request[Any]:
        def result() -> Completion | list[Completion]:
            completions = task.completions()
            return completions if len(completions) > 1 else completions[0]

        return self.runner.submit(task, result)

"""States: the transformer seen as a recurrent network, (state, token) → (state, logits).

A state is a sequence that its user holds, and the logits after its last token. All that computes is a task of the
scheduler, so states and requests run as one batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from numbers import Integral
from os import PathLike
from typing import Any, Protocol

import numpy as np

from .errors import ArgumentError, ArgumentTypeError
from .executor import Executor, Rows
from .generation import Ids
from .kv import PAGE, Sequence
from .params import SamplingParams
from .runner import Request, Runner, Stream
from .saved import load_state, save_state
from .task import Floats, Task
from .window import Window


class Append(Task):
    """Tokens that a sequence goes on with, and the logits after the last of them.

    The sequence is its user's: its pages are not taken away from it. When the task fails or is cancelled, the sequence
    is as it was before.
    """

    keeps = True

    def __init__(self, sequence: Sequence, token_ids: Ids) -> None:
        super().__init__()
        self.sequence = sequence
        self.token_ids = token_ids
        self.n_before = sequence.length
        self.logits: Floats | None = None  # [vocab_size]

    def start(self) -> None:
        if self.sequence.length == 0:
            self.sequence.reuse(self.token_ids)

    @property
    def n_done(self) -> int:
        """Tokens that have run."""
        return self.sequence.length - self.n_before

    @property
    def n_pending(self) -> int:
        return len(self.token_ids) - self.n_done

    @property
    def decoding(self) -> bool:
        return self.n_pending == 1

    @property
    def n_page_most(self) -> int:
        return -(-(self.n_before + len(self.token_ids)) // PAGE)

    def plan(self, n: int) -> list[Rows]:
        chunk = self.token_ids[self.n_done :][:n]
        return [Rows(self.sequence, chunk, int(len(chunk) == self.n_pending))]

    def advance(self, rows: list[Rows], logits: Floats) -> None:
        if len(logits):
            self.logits = logits[0].copy()
            self.logits.flags.writeable = False

    @property
    def finished(self) -> bool:
        return self.logits is not None

    def pause(self) -> None:
        """Its pages would come back to nobody: it goes on where it was."""

    def end(self, error: BaseException | None = None) -> None:
        if not self.finished:
            self.sequence.truncate(self.n_before)
        super().end(error)


class Host(Protocol):
    """What a state needs of its model."""

    dtype: str
    executor: Executor
    runner: Runner

    def token_ids(self, text: str | SequenceOf[int], name: str) -> Ids: ...
    def submit_from(
        self, sequence: Sequence, prompt_ids: Ids, params: SamplingParams, window: Window | None
    ) -> Request[Any]: ...


class State:
    """What a model knows after some tokens. Made by `Model.state`, `Model.restore` and `fork`.

    It holds KV pages until it is closed or dropped, or its `with` block ends. A model's states may be used by any
    threads, one state by one thread at a time.

    >>> state = model.state("Once upon a time")
    >>> state.append(", in a land").generate(seed=1).text
    """

    def __init__(self, model: Host, sequence: Sequence | None = None, window: Window | None = None) -> None:
        self.window = window
        self._model = model
        self._sequence = sequence or model.executor.new_sequence()
        self._logits: Floats | None = None  # after the last token; None: to be computed when they are asked for
        self._closed = False

    def __repr__(self) -> str:
        return f"<pyengine.State {'closed' if self._closed else f'of {len(self)} tokens'}>"

    def __len__(self) -> int:
        """How many tokens the model sees: all, or with a window those in it."""
        return self._sequence.length

    @property
    def token_ids(self) -> list[int]:
        """The tokens that the model sees."""
        return self._sequence.token_ids.tolist()

    @property
    def logits(self) -> Floats:
        """The logits of the next token: float32 [vocab_size], read-only. After `truncate` the last token runs again."""
        self._check(1)
        if self._logits is None:
            sequence = self._sequence.fork()
            sequence.truncate(len(self) - 1)
            self._run(sequence, self._ids()[-1:])
        assert self._logits is not None
        return self._logits

    def append(self, tokens: str | SequenceOf[int]) -> State:
        """Goes on with a text or a list of token ids, of at least one token; returns the state itself.

        A text is encoded by itself: its tokens can differ from those of the whole text in one piece. If this fails or
        is interrupted, the state is as it was before. Raises ArgumentError where the context has no place for them
        (a window always has), and OutOfMemoryError where the KV pool has none: `kv_memory` of `load` is what states
        and requests may hold together.
        """
        self._check(0)
        new = self._model.token_ids(tokens, "tokens")
        n, most = len(self) + len(new), self._model.executor.max_seq_len
        sequence = self._sequence
        if self.window and n > self.window.size:
            sequence = self._model.executor.new_sequence()
            new = self.window.seen(np.concatenate([self._ids(), new]))
        elif n > most:
            raise ArgumentError(
                f"tokens: expected at most {most - len(self)} more (the context has {most}), got {len(new)}; "
                "a state with a window has no end"
            )
        self._run(sequence, new)
        return self

    def _run(self, sequence: Sequence, token_ids: Ids) -> None:
        """Appends tokens to the state's own sequence, or to one that then takes its place."""
        task = Append(sequence, token_ids)
        n_before = sequence.length
        try:
            logits = self._model.runner.submit(task, lambda: task.logits).wait()
        except BaseException:
            sequence.truncate(n_before if sequence is self._sequence else 0)
            raise
        if sequence is not self._sequence:
            self._sequence.close()
            self._sequence = sequence
        self._logits = logits

    def fork(self) -> State:
        """Another state with the same tokens. They share KV pages; who goes on copies the last, unless it is full."""
        self._check(0)
        other = State(self._model, self._sequence.fork(), self.window)
        other._logits = self._logits
        return other

    def truncate(self, n: int) -> None:
        """Forgets all but the first n tokens, as if the others had never come; what has left a window stays away."""
        self._check(0)
        if isinstance(n, bool) or not isinstance(n, Integral):
            raise ArgumentTypeError(f"n: expected an integer, got {n!r}")
        if n != len(self):
            self._sequence.truncate(int(n))
            self._logits = None

    def generate(self, **params: Any) -> Any:
        """Continues the text without changing the state; takes the arguments of `Model.generate`, and returns the same.

        The same seed gives what `Model.generate` gives for the state's tokens. With a window the text goes on past the
        context, in a window of its own.

        >>> [state.generate(seed=seed, max_new_tokens=20).text for seed in range(3)]
        """
        return self.submit(**params).wait()

    def stream(self, **params: Any) -> Stream:
        """`generate`, token by token, as `Model.stream` does."""
        sampling = SamplingParams(**params)
        sampling.check_stream()
        return Stream(self._submit(sampling))

    def submit(self, **params: Any) -> Request[Any]:
        """`generate` as a request, which doesn't wait, as `Model.submit` gives; the state may go on meanwhile."""
        return self._submit(SamplingParams(**params))

    def _submit(self, params: SamplingParams) -> Request[Any]:
        self._check(1)
        sequence = self._sequence.fork()
        try:
            sequence.truncate(len(self) - 1)  # the last token runs again, for its logits
            return self._model.submit_from(sequence, self._ids(), params, self.window)
        except BaseException:
            sequence.close()
            raise

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the state to a safetensors file, from which `Model.restore` of the same model makes it again.

        The file is written beside the path and then renamed: it is there as a whole or not at all. It has the tokens,
        and all keys and values. Raises CheckpointFileError where it can't be written.
        """
        logits = self.logits
        save_state(path, self._model.executor, self._model.dtype, self._sequence, logits, self.window)

    @classmethod
    def load(cls, model: Host, path: str | PathLike[str]) -> State:
        """What `Model.restore` does."""
        sequence, logits, window = load_state(path, model.executor, model.dtype)
        state = cls(model, sequence, window)
        logits.flags.writeable = False
        state._logits = logits
        return state

    def close(self) -> None:
        """Gives the KV pages back; the state can't be used any more."""
        self._closed = True
        self._logits = None
        self._sequence.close()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _ids(self) -> Ids:
        return np.array(self._sequence.token_ids, np.int32)

    def _check(self, n: int) -> None:
        if self._closed:
            raise ArgumentError("state: expected an open one, got one that is closed")
        if len(self) < n:
            raise ArgumentError("state: expected one of at least one token, got an empty one")


def window_of(window: int | None, sinks: int, max_seq_len: int) -> Window | None:
    """The window that these arguments ask for, if any; raises an error naming the one that can't be honoured."""
    if window is None:
        return None
    for name, value, least, most in (("window", window, 1, max_seq_len), ("sinks", sinks, 0, window)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ArgumentTypeError(f"{name}: expected an integer, got {value!r}")
        if not least <= value < most + (name == "window"):
            raise ArgumentError(f"{name}: expected {least} to {most - (name == 'sinks')}, got {value}")
    return Window(int(window), int(sinks))

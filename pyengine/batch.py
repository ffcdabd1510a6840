"""Batch jobs: a file of requests in, a file of results out, line for line. Nothing is printed here: cli does that.

Each line of the input is a JSON object: `prompt`, arguments of `generate`, and an `id` if it likes. Its result is the
same line of the output, whatever it is. A result begins with a digest of the request and of all that it depends on, by
which a job that is started again knows how far it was, and that the file is its own.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from io import FileIO
from itertools import chain
from queue import SimpleQueue
from typing import Any

from .completion import Completion
from .errors import ArgumentError, Error
from .model import Model
from .params import SamplingParams
from .runner import Request

WINDOW = 8  # times max_batch: lines that are on their way from the input to the output
PARAMS = {field.name for field in fields(SamplingParams)}


@dataclass(frozen=True)
class Result:
    """A line of the output."""

    line: bytes  # JSON in UTF-8, with its newline
    failed: bool
    n_token: int  # generated


class Job:
    """What all lines have in common: the model, and the arguments of `generate` that a line needn't repeat.

    `temperature` is for lines that have none and search with no beams. With `seed`, a line that has none gets one of
    its own, made of it and of the line's number. Results have token ids if `token_ids`, or if there is no tokenizer.

    Raises `ArgumentError` and `ArgumentTypeError` for defaults that can't be honoured.
    """

    def __init__(
        self,
        model: Model,
        defaults: Mapping[str, Any] | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
        token_ids: bool = False,
    ) -> None:
        SamplingParams(**(defaults or {}))
        SamplingParams(temperature=temperature, seed=seed)
        self.model = model
        self.defaults = dict(defaults or {})
        self.seed = seed
        self.temperature = temperature
        self.token_ids = token_ids or model.tokenizer is None
        of_model = [model.config, model.kv_dtype, model.executor.fingerprint]
        common = [self.defaults, seed, temperature, self.token_ids, *of_model]
        self._common = json.dumps(common, sort_keys=True, default=repr).encode()

    def digest(self, line: bytes) -> str:
        """16 hexadecimal digits, of the line and of all else that its result depends on."""
        return hashlib.blake2b(self._common + b"\n" + line.rstrip(b"\r\n"), digest_size=8).hexdigest()

    def head(self, line: bytes) -> bytes:
        """What the result of a line begins with."""
        return b'{"request": "%s"' % self.digest(line).encode()

    def seed_of(self, number: int) -> int | None:
        """The seed of a line that has none."""
        if self.seed is None:
            return None
        return int.from_bytes(hashlib.blake2b(b"%d:%d" % (self.seed, number), digest_size=8).digest(), "little")

    def submit(self, number: int, line: bytes) -> Entry:
        """Begins with a line, the first of which is number 1."""
        entry = Entry(number, {"request": self.digest(line)})
        try:
            keys = parse(line.rstrip(b"\r\n"))
            if "id" in keys:
                entry.head["id"] = _id(keys.pop("id"))
            prompt, params = request_of(keys)
            params = self.defaults | params
            if params.get("num_beams", 1) == 1:
                params = {"temperature": self.temperature, "seed": self.seed_of(number)} | params
            entry.logprobs = bool(params.get("logprobs"))
            entry.request = self.model.submit(prompt, **params)
        except Exception as error:
            entry.error = error
        return entry

    def result(self, entry: Entry) -> Result:
        """The line of a request that has ended."""
        completions: list[Completion] = []
        error = entry.error
        if entry.request is not None:
            try:
                found = entry.request.result()
                completions = found if isinstance(found, list) else [found]
            except Exception as raised:
                error = raised
        if error is not None:
            what = str(error) if isinstance(error, Error) else f"{type(error).__name__}: {error}"
            body: dict[str, Any] = {"error": f"line {entry.number}: {' '.join(what.split())}"}
        else:
            texts = [self._text(completion, entry.logprobs) for completion in completions]
            body = texts[0] if len(texts) == 1 else {"completions": texts}
        n_token = sum(completion.usage.completion_tokens for completion in completions)
        return Result(encode(entry.head | body), error is not None, n_token)

    def _text(self, completion: Completion, logprobs: bool) -> dict[str, Any]:
        text: dict[str, Any] = {"text": completion.text}
        if self.token_ids:
            text["token_ids"] = completion.token_ids
        if completion.score is not None:
            text["score"] = completion.score
        if logprobs:
            text["logprobs"] = [asdict(one) for one in completion.logprobs]
        usage = completion.usage  # without its seconds: a job gives the same bytes each time
        text["finish_reason"] = completion.finish_reason
        text["usage"] = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
        return text


@dataclass
class Entry:
    """A line on its way."""

    number: int
    head: dict[str, Any]  # keys that its result begins with
    request: Request[Any] | None = None
    error: Exception | None = None
    logprobs: bool = False


def run(job: Job, lines: Iterable[bytes], n_done: int = 0) -> Generator[Result, None, None]:
    """The results of all lines, in their order, each as soon as it and those before it are there.

    `lines` are those after the first `n_done`; they are read by a thread, as there is room in the window. When the
    iterator is closed, what still runs is cancelled.
    """
    window = WINDOW * job.model.runner.scheduler.max_batch
    room = threading.Semaphore(window)
    events: SimpleQueue[bytes | Entry | Exception | None] = SimpleQueue()
    stopping = False

    def read() -> None:
        try:
            for line in lines:
                room.acquire()
                if stopping:
                    return
                events.put(line)
            events.put(None)
        except OSError as error:
            events.put(ArgumentError(f"input: expected to read it, got: {error.strerror}"))
        except Exception as error:
            events.put(error)

    running: dict[int, Entry] = {}
    ready: dict[int, Result] = {}
    n_read, at_end = n_done, False
    threading.Thread(target=read, name="pyengine batch input", daemon=True).start()
    try:
        while not at_end or n_done < n_read:
            match events.get():
                case bytes(line):
                    n_read += 1
                    entry = job.submit(n_read, line)
                    if entry.request is None:
                        ready[n_read] = job.result(entry)
                    else:
                        running[n_read] = entry
                        entry.request.add_done_callback(partial(_put, events, entry))
                case Entry() as entry:
                    del running[entry.number]
                    ready[entry.number] = job.result(entry)
                case None:
                    at_end = True
                case Exception() as error:
                    raise error
            while n_done + 1 in ready:
                n_done += 1
                yield ready.pop(n_done)
                room.release()
    finally:
        stopping = True
        room.release()
        requests = [entry.request for entry in running.values() if entry.request is not None]
        for request in requests:
            request.cancel()
        for request in requests:
            request.join()


def _put(events: SimpleQueue[Any], entry: Entry, request: Request[Any]) -> None:
    events.put(entry)


@dataclass(frozen=True)
class Done:
    """How far a job was when it ended."""

    n_line: int
    n_failed: int  # of these
    rest: Iterator[bytes]  # the lines of the input that come next


def resume(job: Job, lines: Iterator[bytes], out: FileIO) -> Done:
    """Finds how far the output is, and puts the file at its end. A last line that isn't whole is cut off.

    Raises `ArgumentError`, and changes nothing, for a file that is no output of this job.
    """
    n = n_failed = end = 0
    out.seek(0)
    with open(out.fileno(), "rb", closefd=False) as written:
        for result in written:
            line = next(lines, None)
            if line is None:
                raise ArgumentError(f"{out.name}: expected {n} lines at most, as many as the input has, got more")
            head = job.head(line)
            if result[: len(head)] != head[: len(result)]:
                raise _not_ours(out, n + 1)
            if not result.endswith(b"\n"):
                lines = chain([line], lines)
                break
            try:
                n_failed += "error" in json.loads(result)
            except ValueError:
                raise _not_ours(out, n + 1) from None
            n += 1
            end += len(result)
    out.seek(end)
    out.truncate()
    return Done(n, n_failed, lines)


def _not_ours(out: FileIO, number: int) -> ArgumentError:
    return ArgumentError(
        f"{out.name}: expected results of this job, with the same input, options and model, "
        f"got something else in line {number}"
    )


def append(out: FileIO, line: bytes) -> None:
    """Writes a line at the end of an unbuffered file, or nothing of it."""
    end = out.tell() if out.seekable() else 0
    try:
        while line:
            line = line[out.write(line) :]
    except BaseException:
        with suppress(OSError):
            out.truncate(end)
        raise


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object of a line of the input; `ArgumentError` for anything else."""
    try:
        keys = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except ArgumentError:
        raise
    except UnicodeDecodeError as error:
        raise ArgumentError(f"expected UTF-8, got byte {line[error.start]:#04x} at {error.start}") from None
    except RecursionError:
        raise ArgumentError("expected a JSON object, got one that is nested too deeply") from None
    except json.JSONDecodeError as error:
        got = f"{error.msg} at character {error.pos}" if line.strip() else "an empty line"
        raise ArgumentError(f"expected a JSON object, got: {got}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ArgumentError(f"expected a JSON object, got: {error}") from None
    if not isinstance(keys, dict):
        raise ArgumentError(f"expected a JSON object, got {type(keys).__name__}")
    return keys


def request_of(keys: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The prompt and the arguments of `generate` that a line asks for, of whatever type they are."""
    for name in keys:
        if name not in PARAMS and name != "prompt":
            raise ArgumentError(f"{name!r}: expected 'id', 'prompt' or an argument of generate")
    prompt = keys.get("prompt")
    if not isinstance(prompt, str | list):
        got = type(prompt).__name__ if "prompt" in keys else "none"
        raise ArgumentError(f"prompt: expected a string or a list of token ids, got {got}")
    params = {name: value for name, value in keys.items() if name != "prompt"}
    bias = params.get("logit_bias")
    if isinstance(bias, dict):  # the keys of JSON are strings
        params["logit_bias"] = {_token_id(name): value for name, value in bias.items()}
    return prompt, params


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ArgumentError(f"{twice!r}: expected once in an object, got it again")
    return found


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 20):
        raise ArgumentError(f"logit_bias: expected token ids, got {name!r}")
    return int(name)


def _id(value: object) -> str | int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ArgumentError(f"id: expected a string or an integer, got {value!r}")
    return value


def encode(keys: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    try:
        return json.dumps(keys, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a character, which JSON can express and UTF-8 can't
        return json.dumps(keys).encode() + b"\n"

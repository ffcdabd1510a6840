"""Batch jobs: what becomes of each line, the order, the window, and what is left when a job is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint
from command import COMMAND, environment, run, the_line

import pyengine
from pyengine import batch
from pyengine.batch import WINDOW, Job

SMALL = ("--threads", "2", "--max-new-tokens", "6", "--seed", "5")


@pytest.fixture(scope="module")
def model() -> pyengine.Model:
    return pyengine.load("demo", threads=2, max_batch=4)


def lines(*requests: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def results(data: str | bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def all_of(job: Job, data: bytes) -> list[dict[str, Any]]:
    return [json.loads(result.line) for result in batch.run(job, data.splitlines(keepends=True))]


def test_results_are_those_of_generate(model: pyengine.Model) -> None:
    requests: list[dict[str, Any]] = [
        {"id": "a", "prompt": "Once upon a time", "max_new_tokens": 9, "seed": 1},
        {"id": 7, "prompt": [1, 2, 3], "temperature": 0},
        {"prompt": "The sea", "num_beams": 3, "num_return_sequences": 2},
        {"prompt": "One", "seed": 2, "logit_bias": {"11": -100}, "logprobs": 2, "num_return_sequences": 2},
        {"prompt": "One", "seed": 2, "stop": ["e"], "top_p": 0.5},
    ]
    job = Job(model, {"max_new_tokens": 5}, temperature=0.8, token_ids=True)
    for request, result in zip(requests, all_of(job, lines(*requests)), strict=True):
        assert result.get("id") == request.pop("id", None)
        if request.get("num_beams", 1) == 1:
            request = {"temperature": 0.8} | request
        if "logit_bias" in request:
            request["logit_bias"] = {11: -100}
        expected = model.generate(**({"max_new_tokens": 5} | request))
        texts = result.get("completions", [result])
        for text, completion in zip(texts, expected if isinstance(expected, list) else [expected], strict=True):
            assert (text["text"], text["token_ids"]) == (completion.text, completion.token_ids)
            assert text["finish_reason"] == completion.finish_reason
            assert text["usage"] == {
                "prompt_tokens": completion.usage.prompt_tokens,
                "completion_tokens": len(completion.token_ids),
            }
            assert text.get("score") == completion.score
            if "logprobs" in request:
                assert text["logprobs"][0]["logprob"] == completion.logprobs[0].logprob
                assert text["logprobs"][0]["top"][1] == list(completion.logprobs[0].top[1])
            else:
                assert "logprobs" not in text


BAD = {
    "not JSON": (b"nonsense", "expected a JSON object, got: Expecting value at character 0"),
    "cut off": (b'{"prompt": "a', "expected a JSON object, got: Unterminated string starting at at character 11"),
    "empty": (b"", "expected a JSON object, got: an empty line"),
    "blank": (b"  \r", "expected a JSON object, got: an empty line"),
    "list": (b'["a"]', "expected a JSON object, got list"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, "expected a JSON object, got one that is nested too deeply"),
    "digits": (b'{"prompt": [' + b"1" * 5000 + b"]}", "expected a JSON object, got: Exceeds the limit"),
    "UTF-8": (b'{"prompt": "caf\xe9"}', "expected UTF-8, got byte 0xe9 at 15"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "expected UTF-8, got byte 0xff at 0"),
    "unknown": (b'{"prompt": "a", "max_tokens": 3}', "'max_tokens': expected 'id', 'prompt' or an argument of"),
    "twice": (b'{"prompt": "a", "prompt": "b"}', "'prompt': expected once in an object, got it again"),
    "no prompt": (b'{"id": 1}', "prompt: expected a string or a list of token ids, got none"),
    "null prompt": (b'{"prompt": null}', "prompt: expected a string or a list of token ids, got NoneType"),
    "number": (b'{"prompt": 7}', "prompt: expected a string or a list of token ids, got int"),
    "empty prompt": (b'{"prompt": ""}', "prompt: expected at least one token, got an empty one"),
    "two prompts": (b'{"prompt": ["a", "b"]}', "prompt: expected a list of token ids, got 'a' at position 0"),
    "surrogate": (b'{"prompt": "\\ud800"}', "text: expected Unicode text, got the lone surrogate"),
    "long": (b'{"prompt": [' + b"1, " * 600 + b"1]}", "prompt: expected 1 to 512 tokens (the context), got 601"),
    "token id": (b'{"prompt": [1e99]}', "prompt: expected a list of token ids, got 1e+99 at position 0"),
    "id": (b'{"id": [1], "prompt": "a"}', "id: expected a string or an integer, got [1]"),
    "type": (b'{"prompt": "a", "temperature": "hot"}', "temperature: expected a number, got 'hot'"),
    "value": (b'{"prompt": "a", "top_p": NaN}', "top_p: expected above 0 and at most 1, got nan"),
    "bias": (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias: expected token ids, got 'x'"),
    "beams": (b'{"prompt": "a", "num_beams": 2, "seed": 1}', "seed: expected None, unset or do_sample=True with"),
}


def test_bad_lines_are_named_and_the_job_goes_on(model: pyengine.Model) -> None:
    good = b'{"prompt": "a", "max_new_tokens": 1}'
    found = all_of(Job(model), b"\n".join(line for line, _ in BAD.values()) + b"\n" + good)
    assert len(found) == len(BAD) + 1
    for number, (result, (_, message)) in enumerate(zip(found[:-1], BAD.values(), strict=True), 1):
        assert result["error"].startswith(f"line {number}: {message}")
    assert "text" in found[-1]
    assert model.stats.kv_pages_used == 0


def test_an_id_is_kept_with_an_error(model: pyengine.Model) -> None:
    (result,) = all_of(Job(model), b'{"id": "x\\ud800", "prompt": "a", "colour": 1}\n')
    assert result["id"] == "x\ud800"
    assert "'colour'" in result["error"]


def test_bad_defaults(model: pyengine.Model) -> None:
    with pytest.raises(pyengine.ArgumentError, match="top_k"):
        Job(model, {"top_k": -1})
    with pytest.raises(pyengine.ArgumentError, match="seed"):
        Job(model, seed=-1)


def test_a_window_of_lines_is_read(model: pyengine.Model) -> None:
    """However long the first text takes, and however many lines there are."""
    n_read = 0

    def source() -> Iterator[bytes]:
        nonlocal n_read
        for i in range(10_000):
            n_read += 1
            yield lines({"id": i, "prompt": "a", "max_new_tokens": 400 if i == 0 else 1, "ignore_eos": True})

    window = WINDOW * 4
    job = batch.run(Job(model), source())
    for i in range(100):
        assert json.loads(next(job).line)["id"] == i
        assert n_read <= i + window + 1  # one waits in the reader's hand
    job.close()
    assert model.stats.running == model.stats.waiting == model.stats.kv_pages_used == 0


def test_what_is_there_is_given_while_the_input_waits(model: pyengine.Model) -> None:
    """A program that writes a line, and the next one when it has the result."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as source, os.fdopen(write, "wb", 0) as sink:
        job = batch.run(Job(model, {"max_new_tokens": 2}), source)
        for i in range(3):
            sink.write(lines({"id": i, "prompt": "a"}))
            assert json.loads(next(job).line)["id"] == i
        sink.close()
        assert next(job, None) is None


def test_errors_of_the_input_come_out(model: pyengine.Model) -> None:
    def source() -> Iterator[bytes]:
        yield lines({"prompt": "a", "max_new_tokens": 1})
        raise OSError(5, "Input/output error")

    with pytest.raises(pyengine.ArgumentError, match="input: expected to read it, got: Input/output error"):
        list(batch.run(Job(model), source()))
    assert model.stats.kv_pages_used == 0


def test_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    class Full:
        """Takes a part of a line, and no more."""

        def __init__(self) -> None:
            self.data, self.room = b"", 25

        def seekable(self) -> bool:
            return True

        def tell(self) -> int:
            return len(self.data)

        def truncate(self, n: int) -> None:
            self.data = self.data[:n]

        def write(self, data: bytes) -> int:
            n = min(self.room, len(data), 7)
            if not n:
                raise OSError(28, "No space left on device")
            self.data += data[:n]
            self.room -= n
            return n

    out: Any = Full()
    batch.append(out, b"0123456789\n")
    batch.append(out, b"abcdefghi\n")
    with pytest.raises(OSError, match="No space left"):
        batch.append(out, b"0123456789\n")
    assert out.data == b"0123456789\nabcdefghi\n"


# The command.


def test_batch_from_file_to_file(tmp_path: Path, model: pyengine.Model) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(lines({"id": "a", "prompt": "One"}, {"prompt": "Two", "temperature": 0}))
    assert run("batch", str(source), str(out), *SMALL) == (0, "", "")
    first, second = results(out.read_bytes())
    assert list(first) == ["request", "id", "text", "finish_reason", "usage"]
    assert second["text"] == model.generate("Two", temperature=0, max_new_tokens=6).text
    code, text, err = run("batch", "-", "-", *SMALL, "--token-ids", stdin=source.read_bytes() + b"oops")
    assert (code, err) == (1, "pyengine: 1 of 3 lines have errors\n")
    assert results(text)[0]["text"] == first["text"]
    assert len(results(text)[0]["token_ids"]) == 6
    assert "error" in results(text)[2]
    assert run("batch", str(source), str(tmp_path / "none"), stdin=b"")[0] == 0
    source.write_bytes(b"")
    assert run("batch", str(source), str(tmp_path / "empty")) == (0, "", "")
    assert (tmp_path / "empty").read_bytes() == b""


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = [{"prompt": "One"}, {"prompt": "Two"}, {"prompt": "Three"}]
    source.write_bytes(lines(*requests))
    assert run("batch", str(source), str(out), *SMALL)[0] == 0
    whole = out.read_bytes()

    def refused(*options: str) -> str:
        before = out.read_bytes()
        code, text, err = run("batch", str(source), str(out), *SMALL, *options)
        assert (code, text) == (1, "")
        assert out.read_bytes() == before
        return the_line(err).removeprefix(f"{out}: ")

    other = "expected results of this job, with the same input, options and model, got something else in line "
    assert refused("--temperature", "0.5") == other + "1"
    assert refused("--dtype", "float32") == other + "1"
    source.write_bytes(lines(requests[0], requests[2], requests[1]))
    assert refused() == other + "2"
    source.write_bytes(lines(*requests[:2]))
    assert refused() == "expected 2 lines at most, as many as the input has, got more"
    source.write_bytes(lines(*requests))
    for text in (b"notes without an end of line", whole[:40] + b"\n", b"\n", whole + b"x"):
        out.write_bytes(text)
        refused()
    assert run("batch", str(source), str(out), *SMALL, "--restart") == (0, "", "")
    assert out.read_bytes() == whole
    # An input that has grown is the same job.
    source.write_bytes(lines(*requests, {"prompt": "Four", "temperature": -1}))
    for _ in range(2):
        code, _, err = run("batch", str(source), str(out), *SMALL)
        assert (code, err) == (1, "pyengine: 1 of 4 lines have errors\n")
        assert out.read_bytes().startswith(whole)


def test_the_digest_knows_the_weights(tmp_path: Path) -> None:
    """Of two models with one config each has its own; one that is loaded again has the same."""
    folders = [write_checkpoint(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    digests = [Job(pyengine.load(folder, threads=1)).digest(b"{}") for folder in folders]
    assert digests[0] == digests[1] != digests[2]


def test_refused_files(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines({"prompt": "One"}))
    for arguments, message in {
        (str(tmp_path / "none"), "-"): f"{tmp_path / 'none'}: expected a readable file, got: ",
        (str(source), str(tmp_path)): f"{tmp_path}: expected a writable file, got: ",
        (str(source), str(source)): f"{source}: expected another file than the input, got the same",
        (str(source), "-", "--top-p", "2"): "top_p: expected above 0 and at most 1, got 2.0",
        (str(source), "-", "--max-batch", "0"): "max_batch: expected 1 to ",
    }.items():
        code, text, err = run("batch", *arguments)
        assert (code, text) == (1, "")
        assert the_line(err).startswith(message)
    assert source.read_bytes() == lines({"prompt": "One"})


def mixed(n: int) -> bytes:
    """Requests of mixed lengths, some of which fail."""
    rng = random.Random(0)
    requests: list[dict[str, Any]] = []
    for i in range(n):
        request = {"id": i, "prompt": "word " * rng.randint(1, 30), "max_new_tokens": rng.choice([1, 20, 40, 150])}
        request |= rng.choice([{}, {}, {"num_beams": 2}, {"seed": 3}, {"num_return_sequences": 2}, {"top_p": -1}])
        requests.append(request)
    return lines(*requests)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_killed_at_any_time(tmp_path: Path) -> None:
    """Again and again, by SIGKILL and Ctrl-C: then the file is that of a job that nobody disturbed, byte by byte."""
    source, whole, out = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(mixed(400))
    options = ("--threads", "2", "--seed", "11", "--max-batch", "8", "--ignore-eos")
    assert run("batch", str(source), str(whole), *options)[0] == 1
    rng = random.Random(time.time_ns())
    n_killed = n_torn = 0
    while n_killed < 6:
        number = signal.SIGINT if n_killed % 3 == 2 else signal.SIGKILL
        before = out.stat().st_size if out.exists() else 0
        command = [*COMMAND, "batch", str(source), str(out), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment({})) as process:
            while process.poll() is None and (not out.exists() or out.stat().st_size == before):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(number)
            code = ended(process)
        if code == 1:  # it was at its end already
            break
        assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
        n_killed += 1
        data = out.read_bytes()
        assert whole.read_bytes().startswith(data)
        if number == signal.SIGINT:
            assert data[-1:] in (b"", b"\n")  # whole lines; none, if the first was the one that a kill had torn
        elif rng.random() < 0.7:  # what a kill in the middle of a write leaves
            out.write_bytes(data[: len(data) - rng.randint(0, 60)])
            n_torn += 1
    assert n_killed >= 4
    code, _, err = run("batch", str(source), str(out), *options)
    assert (code, out.read_bytes()) == (1, whole.read_bytes())
    n_error = sum("error" in result for result in results(out.read_bytes()))
    assert err == f"pyengine: {n_error} of 400 lines have errors\n"


def ended(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; one that hangs is killed, so that the test can end."""
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_while_the_input_waits() -> None:
    command = [*COMMAND, "batch", "-", "-", *SMALL]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment({}), **pipes) as process:  # type: ignore[call-overload]
        process.stdin.write(lines({"prompt": "One"}))
        process.stdin.flush()
        assert "text" in json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert ended(process) == 130
        assert process.stderr.read().strip() == b""
        assert process.stdout.read() == b""


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    source = tmp_path / "in.jsonl"
    source.write_bytes(mixed(60))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # one without a size shows no bar
    command = [*COMMAND, "batch", str(source), "-", "--ignore-eos"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment({})) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait(30) == 1
    os.close(ours)
    assert b"/60 [" in seen and b" tokens/s" in seen

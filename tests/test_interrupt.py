"""Ctrl-C, in the middle of a step and between steps: KeyboardInterrupt comes out, soon; the model goes on as before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from types import FrameType

import numpy as np
import pytest
from checkpoints import write_checkpoint

import pyengine
from pyengine._native import simd
from pyengine.executor import Rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signal to a single process")

SOON = 10.0  # seconds: far more than it takes, far less than what is interrupted would take
PROMPT = [1] * 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Little to load, much to compute: 200 narrow layers and a long context."""
    config = {"n_embd": 64, "n_layer": 200, "n_positions": 2048}
    return write_checkpoint(tmp_path_factory.mktemp("deep"), config)


@pytest.fixture(scope="module", params=["float32", "int8"])
def model(request: pytest.FixtureRequest, folder: Path) -> pyengine.Model:
    return pyengine.load(folder, dtype=request.param, threads=2)


@pytest.fixture
def one_step(model: pyengine.Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The whole prompt is one step, on the slowest level there is, which takes it half a minute."""
    monkeypatch.setattr(model.executor, "max_rows", len(PROMPT))
    before = simd.use("portable")
    yield
    simd.use(before)


def interrupt(call: Callable[[], object], after: float = 0.2) -> None:
    """Calls, and presses Ctrl-C `after` seconds later; fails unless the call itself ends by it, and soon."""
    timer = Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    returned = False
    start = time.monotonic()
    timer.start()
    try:
        call()
        returned = True
        time.sleep(after + 1)  # takes the signal, so that it hits nothing else
    except KeyboardInterrupt:
        pass
    finally:
        timer.join()
    assert not returned, "the call was over before Ctrl-C, or swallowed it"
    assert time.monotonic() - start < SOON


def test_in_the_middle_of_a_step(model: pyengine.Model, one_step: None) -> None:
    before = model.generate([5, 6, 7], max_new_tokens=3, seed=1, ignore_eos=True)
    interrupt(lambda: model.generate(PROMPT, max_new_tokens=1))
    assert model.executor.pool.n_used == 0
    assert model.generate([5, 6, 7], max_new_tokens=3, seed=1, ignore_eos=True).token_ids == before.token_ids


def test_a_step_can_be_done_again(model: pyengine.Model, one_step: None) -> None:
    """The sequence is as it was: the same step on it gives what it gives on one that nothing happened to."""
    executor = model.executor
    start, rest = np.array([1, 2, 3], np.int32), np.array(PROMPT[3:], np.int32)
    sequence = executor.new_sequence()
    executor.step([Rows(sequence, start)])
    interrupt(lambda: executor.step([Rows(sequence, rest)]))
    assert sequence.length == len(start)
    again = executor.step([Rows(sequence, rest[:5], 5)]).copy()
    sequence.close()
    other = executor.new_sequence()
    executor.step([Rows(other, start)])
    assert executor.step([Rows(other, rest[:5], 5)]).tobytes() == again.tobytes()
    other.close()
    assert executor.pool.n_used == 0


CALLS: dict[str, Callable[[pyengine.Model], object]] = {
    "decode": lambda model: model.generate([5, 6], max_new_tokens=2000, ignore_eos=True),
    "stream": lambda model: list(model.stream([5, 6], max_new_tokens=2000, ignore_eos=True)),
    "batch": lambda model: model.generate([[5, 6], [7], PROMPT[:99]], max_new_tokens=1900, ignore_eos=True),
    "beams": lambda model: model.generate([5, 6], max_new_tokens=2000, num_beams=3, ignore_eos=True),
    "score": lambda model: [model.score(PROMPT) for _ in range(20)],
    "logits": lambda model: [model.logits(PROMPT) for _ in range(20)],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_between_steps(model: pyengine.Model, call: Callable[[pyengine.Model], object]) -> None:
    before = model.generate([5, 6, 7], max_new_tokens=20, seed=1, ignore_eos=True)
    interrupt(lambda: call(model))
    assert model.executor.pool.n_used == 0
    assert model.generate([5, 6, 7], max_new_tokens=20, seed=1, ignore_eos=True).token_ids == before.token_ids


def test_a_handler_that_returns_disturbs_nothing(folder: Path) -> None:
    model = pyengine.load(folder, dtype="int8", threads=2)
    expected = model.logits(PROMPT[:512])
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        got = model.logits(PROMPT[:512])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
    assert got.tobytes() == expected.tobytes()


def test_command_line(folder: Path) -> None:
    """Exit code 130 and no traceback; what was generated so far has been written."""
    command = [sys.executable, "-m", "pyengine", "generate", "I think", "--model", str(folder), "--ignore-eos"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "2000", "--temperature", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(8).startswith(b"I think")  # and a first piece of the text
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read().decode()
        assert process.wait(SOON) == 130
    assert errors.strip() == ""

"""Requests from threads, event loops and forked processes; what is dropped or cancelled; how a process ends."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, TimeoutError, as_completed, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

import pyengine
from pyengine.runner import Inbox

SOON = 20.0  # seconds: far more than it takes
LONG: dict[str, Any] = {"max_new_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pyengine.Model:
    """A long context, so that a request can take long."""
    folder = write_checkpoint(tmp_path_factory.mktemp("runner"), {"n_positions": 2048})
    return pyengine.load(folder, threads=1)


@pytest.fixture(autouse=True)
def nothing_is_left(model: pyengine.Model) -> Any:
    yield
    until(lambda: model.stats.running + model.stats.waiting + model.stats.kv_pages_used == 0)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline, "it doesn't come to pass"
        gc.collect()
        time.sleep(0.001)


def test_a_request_is_a_future(model: pyengine.Model) -> None:
    expected = model.generate([1, 2], seed=1, max_new_tokens=9)
    request = model.submit([1, 2], seed=1, max_new_tokens=9)
    assert request.result(SOON).token_ids == expected.token_ids
    assert request.done() and not request.cancelled() and request.exception() is None
    assert [piece.token_id for piece in request] == expected.token_ids
    assert [piece.token_id for piece in request] == expected.token_ids  # from the first one each time
    assert not request.cancel() and request.result() is request.result()
    requests = [model.submit([i], seed=i, max_new_tokens=5) for i in range(40)]
    assert {id(one) for one in as_completed(requests, SOON)} == {id(one) for one in requests}
    assert wait(requests, SOON).not_done == set()
    for i, one in enumerate(requests):
        assert one.result().token_ids == model.generate([i], seed=i, max_new_tokens=5).token_ids


def test_samples_and_beams(model: pyengine.Model) -> None:
    for arguments in ({"num_return_sequences": 3, "seed": 1}, {"num_beams": 3, "num_return_sequences": 2}):
        arguments = arguments | {"max_new_tokens": 6}
        expected = [one.token_ids for one in model.generate([7, 8], **arguments)]  # type: ignore[arg-type]
        assert [one.token_ids for one in model.submit([7, 8], **arguments).result(SOON)] == expected


def test_cancelling(model: pyengine.Model) -> None:
    running = model.submit([1], **LONG)
    waiting = [model.submit([2], **LONG) for _ in range(40)]
    next(iter(running))
    with pytest.raises(TimeoutError):
        running.result(0.001)
    for request in [*waiting, running]:
        assert request.cancel()
    for request in [running, *waiting]:
        with pytest.raises(CancelledError):
            request.result(SOON)
        assert request.cancelled() and request.done() and request.cancel()
    with pytest.raises(CancelledError):
        list(running)
    assert len(running.pieces) >= 1


def test_errors_come_at_the_call_or_with_the_result(model: pyengine.Model) -> None:
    with pytest.raises(pyengine.ArgumentError, match="prompt: expected token ids from 0 to 299, got 300"):
        model.submit([300])
    with pytest.raises(TypeError, match="max_tokens"):
        model.submit([1], max_tokens=3)
    bad = model.submit([1], logit_bias={i: -np.inf for i in range(300)})
    with pytest.raises(pyengine.NonFiniteError):
        bad.result(SOON)
    with pytest.raises(pyengine.NonFiniteError):
        list(bad)
    with pytest.raises(pyengine.ArgumentError, match=r"prompt\[1\]: expected token ids from 0 to 299"):
        model.generate([[1], [300]])


def test_a_list_fails_as_a_whole(model: pyengine.Model) -> None:
    with pytest.raises(pyengine.NonFiniteError):
        model.generate([[1], [2]], logit_bias={i: -np.inf for i in range(300)}, **LONG)
    assert model.stats.kv_pages_used == 0


def test_callbacks_that_raise_disturb_nobody(model: pyengine.Model, caplog: pytest.LogCaptureFixture) -> None:
    request = model.submit([1], max_new_tokens=3)
    request.add_done_callback(lambda _: 1 / 0)
    others = [model.submit([i], max_new_tokens=3) for i in range(5)]
    assert all(len(one.result(SOON).token_ids) <= 3 for one in others)
    until(request.done)


def test_waiting_in_a_callback_is_refused(model: pyengine.Model) -> None:
    """It would wait for the thread that it runs in; submitting is no problem there."""
    got: list[Any] = []

    def callback(_: object) -> None:
        got.append(model.submit([2], max_new_tokens=3))
        for call in (lambda: model.generate([1]), lambda: list(model.stream([1])), lambda: model.score([1, 2])):
            try:
                call()
            except pyengine.ArgumentError as error:
                got.append(str(error))

    model.submit([1], max_new_tokens=3).add_done_callback(callback)
    until(lambda: len(got) == 4)
    assert len(got[0].result(SOON).token_ids) <= 3
    assert all("expected to be waited for outside of callbacks" in text for text in got[1:])


def test_many_threads(model: pyengine.Model) -> None:
    """What each gets is what it gets alone: texts, scores and logits at once."""
    calls: list[Callable[[], Any]] = [
        *(lambda i=i: model.generate([i, 3], seed=i, max_new_tokens=20).token_ids for i in range(8)),
        lambda: [piece.token_id for piece in model.stream([9], seed=4, max_new_tokens=20)],
        lambda: model.score(list(range(200))).logprobs.tobytes(),
        lambda: model.logits(list(range(150))).tobytes(),
        lambda: [one.token_ids for one in model.generate([[4], [5]], num_beams=2, max_new_tokens=9)],
    ]
    alone = [call() for call in calls]
    got: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda i=i, call=call: got.setdefault(i, [call(), call(), call()]))
        for i, call in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert [got.get(i) for i in range(len(calls))] == [[one] * 3 for one in alone]


def test_event_loop(model: pyengine.Model) -> None:
    expected = model.generate([1, 2], seed=3, max_new_tokens=12)

    async def main() -> None:
        async def stream() -> list[int]:
            return [piece.token_id async for piece in model.astream([1, 2], seed=3, max_new_tokens=12)]

        one, many, streamed = await asyncio.gather(
            model.agenerate([1, 2], seed=3, max_new_tokens=12),
            model.agenerate([[1, 2], [1, 2]], seed=3, max_new_tokens=12),
            stream(),
        )
        assert [one.token_ids, streamed, *(each.token_ids for each in many)] == [expected.token_ids] * 4
        with pytest.raises(pyengine.ArgumentError, match="num_beams: expected 1 for a stream, got 2"):
            await anext(model.astream([1], num_beams=2))
        task = asyncio.create_task(model.agenerate([1], **LONG))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async for _ in model.astream([1], **LONG):
            break
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(model.agenerate([[1], [2]], **LONG), 0.01)

    asyncio.run(main())


def test_the_loop_goes_on_while_a_request_runs(model: pyengine.Model) -> None:
    async def main() -> int:
        task = asyncio.create_task(model.agenerate([1], max_new_tokens=500, ignore_eos=True))
        n = 0
        while not task.done():
            await asyncio.sleep(0)
            n += 1
        return n

    assert asyncio.run(main()) > 10


def test_a_model_that_nobody_uses_goes_with_its_thread(tmp_path: Path) -> None:
    model = pyengine.load(write_checkpoint(tmp_path), threads=1)
    request = model.submit([1], max_new_tokens=5)
    thread, gone = model.runner._thread, weakref.ref(model.runner.scheduler.executor)
    assert thread is not None and thread.is_alive()
    del model
    assert len(request.result(SOON).token_ids) <= 5  # a request keeps what it needs
    until(lambda: gone() is None and not thread.is_alive())


def test_closing_a_model(tmp_path: Path) -> None:
    model = pyengine.load(write_checkpoint(tmp_path), threads=1)
    request = model.submit([1], max_new_tokens=60, ignore_eos=True)
    model.close()
    assert request.done()
    assert model.stats.kv_pages_used == 0
    model.close()


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_in_the_middle_of_everything(model: pyengine.Model) -> None:
    """The parent's requests go on; the child has none of them, and computes for itself."""
    expected = model.generate([5], seed=1, max_new_tokens=9).token_ids
    busy = [model.submit([i], max_new_tokens=1500, ignore_eos=True, seed=i) for i in range(4)]
    next(iter(busy[0]))
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        receiver, sender = context.Pipe(duplex=False)

        def work(sender: Any = sender) -> None:
            before = model.stats
            sender.send((before.running, before.kv_pages_used, model.generate([5], seed=1, max_new_tokens=9).token_ids))

        child = context.Process(target=work)
        child.start()
        try:
            assert receiver.poll(60), "the forked process hangs"
            assert receiver.recv() == (0, 0, expected)
        finally:
            child.kill()
            child.join()
    assert [len(one.result(60).token_ids) for one in busy] == [1500] * 4


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "raise ValueError('on purpose')"])
def test_the_process_ends_while_requests_run(ending: str) -> None:
    code = f"""
import sys, pyengine
model = pyengine.load("demo")
requests = [model.submit("Once", max_new_tokens=500, ignore_eos=True) for _ in range(20)]
stream = model.stream("Once", max_new_tokens=500, ignore_eos=True)
next(stream)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == {"pass": 0, "sys.exit(3)": 3}.get(ending, 1)
    assert done.stderr.strip().splitlines()[-1:] == (["ValueError: on purpose"] if "raise" in ending else [])


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a callback of the collector
def test_ctrl_c_while_the_thread_is_told_something() -> None:
    """Wherever it comes, the thread hears what is said afterwards."""
    inbox = Inbox()

    def listen() -> None:
        while inbox.wait():
            for _ in inbox.take():
                pass

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for i in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + i * 1e-6)
                for _ in range(20_000):  # not forever: Python forgets an interrupt that comes in a finaliser
                    inbox.put(lambda scheduler: None)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
    finally:
        signal.signal(signal.SIGALRM, before)
    inbox.close()
    thread.join(SOON)
    assert not thread.is_alive()

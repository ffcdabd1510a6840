"""A process forked from one that has computed: the same text, and no hang."""

from __future__ import annotations

import multiprocessing
import os
import sys

import pytest

import pyengine


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of fork in a process with threads
def test_forked_process_generates() -> None:
    model = pyengine.load("demo", threads=2)

    def text(seed: int) -> str:
        completion = model.generate("One day", max_new_tokens=10, seed=seed)
        return str(completion.text)

    expected = [text(seed) for seed in range(3)]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send([text(seed) for seed in range(3)]))
    child.start()
    try:
        assert receiver.poll(60), "the forked process hangs"
        assert receiver.recv() == expected
    finally:
        child.kill()
        child.join()
    assert text(0) == expected[0]

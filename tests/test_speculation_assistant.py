"""Another model guesses: the same bits, when it guesses, and what can't be asked of it."""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from guesses import ARGUMENTS, essence, held_by_cache, ids, prompts

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.errors import ArgumentError, ArgumentTypeError
from pyengine.kv import PAGE
from pyengine.params import SamplingParams
from pyengine.prefix import digests
from pyengine.sampling import Sampler
from pyengine.speculation import DraftModel, Speculation


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"n_embd": 16, "n_head": 1, "n_layer": 1, "n_positions": 150, "vocab_size": 300}
    return write_checkpoint(tmp_path_factory.mktemp("draft"), config, seed=3)


def make_cheap(model: pyengine.Model) -> None:
    """Makes believe that its guesses cost nothing: a twin's would never pay."""
    model.__dict__["cost"] = replace(model.cost, step_seconds=0.0)


@pytest.mark.parametrize("arguments", ARGUMENTS[:5], ids=str)
@pytest.mark.parametrize("twin", [True, False])
def test_a_draft_model_changes_no_bit(
    target: pyengine.Model, target_folder: Path, small: Path, arguments: dict[str, Any], twin: bool
) -> None:
    assistant = pyengine.load(target_folder if twin else small, dtype=target.dtype, threads=1)  # type: ignore[arg-type]
    make_cheap(assistant)
    arguments = {"max_new_tokens": 50, "ignore_eos": True} | arguments
    for prompt in prompts(3):
        plain, guessed = (target.generate(prompt.tolist(), **arguments, assistant_model=a) for a in (None, assistant))
        for a, b in zip(*(one if isinstance(one, list) else [one] for one in (plain, guessed)), strict=True):
            assert essence(a) == essence(b)
            if twin:
                assert b.usage.accepted_tokens == b.usage.proposed_tokens > 25
    together = [prompt.tolist() for prompt in prompts(5)]
    if "num_return_sequences" not in arguments:
        plain, guessed = (target.generate(together, **arguments, assistant_model=a) for a in (None, assistant))
        assert list(map(essence, plain)) == list(map(essence, guessed))
    assert target.stats.kv_pages_used == assistant.stats.kv_pages_used == 0


def test_a_draft_model_pauses_longer_and_longer(target_folder: Path, small: Path) -> None:
    other = pyengine.load(small, dtype="float32", threads=1).executor
    sampler = Sampler(SamplingParams(temperature=0), Workspace(300), ids(1))
    draft = DraftModel(Speculation(8, 0.1, other, 0.1), other, ids(1), sampler)
    generated = array("i", [1])
    at = []
    while len(generated) < 140:
        guesses = draft.propose(generated, 8)
        assert draft.propose(generated, 8) in (guesses, [])
        if guesses:
            at.append(len(generated))
            draft.observe(len(guesses), 0)
        generated.append(299 if not guesses else (guesses[0] + 1) % 300)
    gaps = np.diff(at)
    assert gaps.tolist() == sorted(gaps) and gaps[-1] >= 32 and len(at) < 40
    draft.close()
    assert other.pool.n_used == 0


def test_a_draft_model_without_room_guesses_nothing(target: pyengine.Model, target_folder: Path) -> None:
    n_proposed = []
    plain = target.generate([1, 2, 3], seed=1, max_new_tokens=120, ignore_eos=True)
    for capacity in (1, 2):
        assistant = pyengine.load(target_folder, dtype="float32", threads=1)
        assistant.executor.pool.capacity = capacity
        make_cheap(assistant)
        guessed = target.generate([1, 2, 3], seed=1, max_new_tokens=120, ignore_eos=True, assistant_model=assistant)
        assert essence(plain) == essence(guessed)
        n_proposed.append(guessed.usage.proposed_tokens)
        assert assistant.executor.pool.n_used == 0 and assistant.executor.pool.n_made <= capacity
    assert 30 < n_proposed[0] < n_proposed[1]


def test_the_prefix_cache_of_a_draft_model_has_no_guesses(target: pyengine.Model, small: Path) -> None:
    assistant = pyengine.load(small, dtype="float32", threads=1)
    make_cheap(assistant)
    [prompt] = prompts(1)
    arguments: dict[str, Any] = {"temperature": 0.3, "seed": 1, "max_new_tokens": 140, "ignore_eos": True}
    completion = target.generate(prompt.tolist(), **arguments, assistant_model=assistant)
    text = np.concatenate([prompt, ids(*completion.token_ids)])
    assert completion.usage.accepted_tokens < completion.usage.proposed_tokens
    assert held_by_cache(assistant.executor) <= set(digests(text, PAGE))


def test_forks_while_a_draft_model_runs(target_folder: Path, small: Path) -> None:
    """A fork waits for the step of the one model, which takes pages of the other."""
    assistant = pyengine.load(small, dtype="float32", threads=1)  # the older one, whose locks a fork takes first
    model = pyengine.load(target_folder, dtype="float32", threads=1)
    make_cheap(assistant)
    requests = [model.submit([i], assistant, seed=i, max_new_tokens=140, ignore_eos=True) for i in range(1, 9)]
    for _ in range(30):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    for i, request in enumerate(requests, 1):
        assert request.result().token_ids == model.generate([i], seed=i, max_new_tokens=140, ignore_eos=True).token_ids


def test_arguments(target: pyengine.Model, target_folder: Path, small: Path, tmp_path: Path) -> None:
    for value, message in ((0, "expected 1 to"), (1.5, "expected an integer, got 1.5"), (True, "expected an integer")):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=f"prompt_lookup_num_tokens: {message}"):
            SamplingParams(prompt_lookup_num_tokens=value)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="prompt_lookup_num_tokens: expected None or unset with num_beams=2"):
        target.generate([1], num_beams=2, prompt_lookup_num_tokens=4)
    assistant = pyengine.load(small, threads=1)
    for name, value in (("num_beams", 2), ("prompt_lookup_num_tokens", 3)):
        with pytest.raises(ArgumentError, match=f"assistant_model: expected none with {name}={value}"):
            target.generate([1], assistant_model=assistant, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match=r"assistant_model: expected a pyengine.Model, got 'demo'"):
        target.submit([1], assistant_model="demo")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="assistant_model: expected another model"):
        target.stream([1], assistant_model=target)
    with pytest.raises(ArgumentError, match=r"assistant_model: expected a vocabulary of 300 tokens .*, got 4096"):
        target.generate([1], assistant_model=pyengine.load("demo", threads=1))
    other = write_checkpoint(tmp_path / "other", {"vocab_size": 300})
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ArgumentError, match="assistant_model: expected the same vocabulary"):
        target.generate([1], assistant_model=pyengine.load(other, threads=1))

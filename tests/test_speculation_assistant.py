"""Another model guesses: the same bits, when it guesses, and what can't be asked of it."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint
from fake_executor import FakeExecutor
from guesses import ARGUMENTS, essence, held_by_cache, ids, prompts

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.errors import ArgumentError, ArgumentTypeError
from pyengine.kv import PAGE
from pyengine.params import SamplingParams
from pyengine.prefix import digests
from pyengine.sampling import Sampler
from pyengine.speculation import Experience, Speculation


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"n_embd": 16, "n_head": 1, "n_layer": 1, "n_positions": 150, "vocab_size": 300}
    return write_checkpoint(tmp_path_factory.mktemp("draft"), config, seed=3)


def make_cheap(model: pyengine.Model) -> None:
    """Makes believe that its guesses cost nothing: a twin's would never pay."""
    model.__dict__["cost"] = replace(model.cost, cold_seconds=0.0, row_seconds=0.0)


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


class Texts:
    """Texts that an assistant guesses for, which is a fake executor; who drives it says which guesses are right."""

    def __init__(self, **costs: float) -> None:
        self.executor: Any = FakeExecutor(max_seq_len=2000, max_rows=512)
        costs = {"row_cost": 0.05, "assistant_cost": 0.3, "assistant_row_cost": 0.03} | costs
        self.how = Speculation(8, assistant=self.executor, **costs)  # type: ignore[arg-type]
        self.n_token = self.n_guess = self.n_right = 0

    @property
    def lost(self) -> float:
        """Steps of one row that guessing has cost beyond what it saved."""
        rows = [n for [n] in self.executor.steps]
        reading = sum(self.how.assistant_cost + (n - 1) * self.how.assistant_row_cost for n in rows)
        return reading + self.n_guess * self.how.row_cost - self.n_right

    def run(self, n_prompt: int, n_new: int, right: Callable[[], bool]) -> list[int]:
        """One text to its end; how much of it there was whenever the assistant guessed."""
        prompt = ids(*np.arange(n_prompt) % 50)
        sampler = Sampler(SamplingParams(temperature=0, max_new_tokens=n_new), Workspace(50), prompt)
        draft = self.how.proposer(prompt, sampler)
        generated = array("i", [0])
        at = []
        while len(generated) < n_new:
            n = min(8, n_new - len(generated) - 1)
            guesses = draft.propose(generated, n) if n and len(generated) >= draft.awake_at else []
            n_right = next((i for i in range(len(guesses)) if not right()), len(guesses))
            if guesses:
                at.append(len(generated))
                draft.observe(len(guesses), n_right)
            generated.extend(guesses[:n_right])
            generated.append(7 if n_right == len(guesses) else (guesses[n_right] + 1) % 50)
            self.n_guess += len(guesses)
            self.n_right += n_right
        draft.close()
        self.n_token += n_new
        return at


def never() -> bool:
    return False


def always() -> bool:
    return True


@pytest.mark.parametrize("how_often", [0.0, 0.3, 0.5])
@pytest.mark.parametrize(("n_prompt", "n_new"), [(1, 10), (3, 20), (40, 100), (300, 128), (600, 400)])
def test_an_assistant_that_does_not_help_takes_a_fixed_share(n_prompt: int, n_new: int, how_often: float) -> None:
    rng = np.random.default_rng(1)
    texts = Texts()
    reading = texts.how.assistant_row_cost * n_prompt
    for _ in range(24000 // n_new):
        texts.run(n_prompt, n_new, lambda: rng.random() < how_often)
        assert texts.lost < Experience.SHARE * texts.n_token + Experience.CREDIT[0] + reading + 2
    assert texts.n_guess > 10  # it isn't given up


def test_an_assistant_that_helps_does_so_from_the_first_token() -> None:
    texts = Texts()
    assert texts.run(300, 128, always)[0] <= 3  # having read in steps of 128
    assert texts.n_right > 90 and texts.lost < -30
    assert len(texts.run(300, 128, always)) < 18  # the second text begins with what the first one has learnt
    # After so many good ones that begin, one that isn't costs no more than its reading and a few guesses.
    before = texts.lost
    assert len(texts.run(300, 128, never)) < 12
    assert texts.lost - before < 0.03 * 300 + 12


def test_what_was_gained_is_not_spent_without_end() -> None:
    texts = Texts()
    for _ in range(20):
        texts.run(300, 128, always)
    before, n_before = texts.lost, texts.n_token
    for _ in range(100):
        texts.run(300, 128, never)
    assert texts.lost - before < Experience.SHARE * (texts.n_token - n_before) + Experience.CREDIT[1] + 0.03 * 300 + 2
    n_right = texts.n_right
    for _ in range(20):
        texts.run(300, 128, always)
    assert texts.n_right - n_right > 1000  # it comes back


def test_an_assistant_reads_nothing_where_it_could_not_pay() -> None:
    for n_prompt, n_new, costs in (
        (40, 1000, {"assistant_cost": 0.8}),  # even if four of five are right
        (600, 50, {}),  # the text's rest is too short for its beginning
    ):
        texts = Texts(**costs)
        assert texts.run(n_prompt, n_new, always) == texts.executor.steps == []


def test_a_draft_model_pauses_longer_and_longer() -> None:
    texts = Texts(assistant_row_cost=0.0)
    gaps = np.diff(texts.run(3, 400, never))
    assert gaps.tolist() == sorted(gaps.tolist()) and [n for n in gaps if n > 16] == [32, 64, 128]


def test_experience_is_of_an_assistant_and_a_temperature(target: pyengine.Model, small: Path) -> None:
    assistants = [pyengine.load(small, dtype="float32", threads=1) for _ in range(2)]

    def experience(assistant: pyengine.Model, **params: Any) -> Experience:
        speculation = target._speculation(SamplingParams(**params), assistant)
        assert speculation
        return speculation.experience

    greedy = experience(assistants[0], temperature=0)
    assert greedy is experience(assistants[0], do_sample=False, temperature=0.7)
    warm = experience(assistants[0], temperature=0.7)
    assert warm is experience(assistants[0], temperature=0.72, top_p=0.9)
    assert len({id(one) for one in (greedy, warm, experience(assistants[1], temperature=0.7))}) == 3


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

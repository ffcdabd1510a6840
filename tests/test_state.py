"""States: appended in any pieces, forked, cut back, saved and restored, they are to the bit what their tokens are."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

import pyengine
from pyengine import ArgumentError, ArgumentTypeError, OutOfMemoryError, State
from pyengine._native.pages import KV_DTYPES
from pyengine.kv import PAGE
from pyengine.state import Append
from pyengine.window import Window

CONTEXT = 3 * PAGE + 10
VOCAB = 300


def load(folder: Path, **arguments: Any) -> pyengine.Model:
    return pyengine.load(folder, **({"dtype": "float32", "threads": 2} | arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd head_dim: keys in bfloat16 pages have a row of padding."""
    config = {"n_embd": 39, "n_head": 3, "n_layer": 2, "n_positions": CONTEXT, "vocab_size": VOCAB}
    return write_checkpoint(tmp_path_factory.mktemp("state"), config)


@pytest.fixture(scope="module", params=KV_DTYPES)
def model(request: pytest.FixtureRequest, folder: Path) -> pyengine.Model:
    return load(folder, dtype="int8", kv_dtype=request.param)


@pytest.fixture
def simple(folder: Path) -> pyengine.Model:
    return load(folder)


def draw(rng: np.random.Generator, n: int) -> list[int]:
    return [int(i) for i in rng.integers(VOCAB, size=n)]


def bits(model: pyengine.Model, token_ids: list[int]) -> bytes:
    """The logits after a text, of one that runs by itself."""
    return bytes(model.logits(token_ids)[-1].tobytes())


def test_any_pieces(model: pyengine.Model) -> None:
    token_ids = draw(np.random.default_rng(1), CONTEXT)
    expected = model.logits(token_ids)
    for chunk in (1, 7, PAGE, 100, CONTEXT):
        with model.state() as state:
            for i in range(0, CONTEXT, chunk):
                assert state.append(token_ids[i : i + chunk]) is state
                assert state.logits.tobytes() == expected[len(state) - 1].tobytes()
            assert state.token_ids == token_ids
    assert model.stats.kv_pages_used == 0
    assert expected[-1].tobytes() != expected[-2].tobytes()  # so that this can fail


@pytest.mark.parametrize("seed", range(4))
def test_random_schedule(model: pyengine.Model, tmp_path: Path, seed: int) -> None:
    """After any appends, forks, cuts, savings and closings, beside requests that run."""
    rng = np.random.default_rng(seed)
    live: list[tuple[State, list[int]]] = [(model.state([5]), [5])]
    requests = []
    for step in range(60):
        i = int(rng.integers(len(live)))
        state, tokens = live[i]
        match rng.choice(["append", "append", "fork", "truncate", "save", "generate", "close"]):
            case "append" if len(tokens) < CONTEXT:
                new = draw(rng, min(int(rng.choice([1, 1, 5, PAGE, 2 * PAGE])), CONTEXT - len(tokens)))
                state.append(new)
                tokens += new
            case "fork":
                live.append((state.fork(), tokens.copy()))
            case "truncate":
                n = int(rng.integers(1, len(tokens) + 1))
                state.truncate(n)
                del tokens[n:]
            case "save":
                state.save(tmp_path / "state")
                live.append((model.restore(tmp_path / "state"), tokens.copy()))
            case "generate":
                requests.append(state.submit(max_new_tokens=9, seed=step, ignore_eos=True))
                requests.append(model.submit(tokens, max_new_tokens=9, seed=step, ignore_eos=True))
            case "close" if len(live) > 1:
                live.pop(i)[0].close()
        assert [len(state) for state, _ in live] == [len(tokens) for _, tokens in live]
    for ours, expected in zip(requests[::2], requests[1::2], strict=True):
        assert ours.result().token_ids == expected.result().token_ids
        assert ours.result().logprobs == expected.result().logprobs
    for state, tokens in live:
        assert state.token_ids == tokens
        assert state.logits.tobytes() == bits(model, tokens)
        state.close()
    assert model.stats.kv_pages_used == 0


@pytest.mark.parametrize("n", [1, 2, PAGE, PAGE + 1, CONTEXT])
def test_generate_equals_the_models_and_leaves_the_state(model: pyengine.Model, n: int) -> None:
    token_ids = draw(np.random.default_rng(n), n)
    state = model.state(token_ids)
    cases: list[dict[str, Any]] = [
        {"seed": 1},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"seed": 2, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ]
    for case in cases:
        arguments = {"max_new_tokens": 70, "ignore_eos": True} | case
        ours, expected = state.generate(**arguments), model.generate(token_ids, **arguments)
        for one, other in zip(*([x] if not isinstance(x, list) else x for x in (ours, expected)), strict=True):
            assert (one.text, one.token_ids, one.logprobs) == (other.text, other.token_ids, other.logprobs)
    pieces = list(state.stream(max_new_tokens=5, seed=1))
    assert [p.token_id for p in pieces] == model.generate(token_ids, max_new_tokens=5, seed=1).token_ids
    assert state.token_ids == token_ids
    assert state.logits.tobytes() == bits(model, token_ids)
    state.close()
    assert model.stats.kv_pages_used == 0


def test_text(simple: pyengine.Model) -> None:
    assert simple.tokenizer
    state = simple.state("Once upon")
    assert state.append(" a time").token_ids == simple.tokenizer.encode("Once upon") + simple.tokenizer.encode(
        " a time"
    )
    assert state.logits.dtype == np.float32 and state.logits.shape == (VOCAB,)
    assert not state.logits.flags.writeable
    assert repr(state) == f"<pyengine.State of {len(state)} tokens>"


def test_the_prefix_cache_serves_states_and_is_fed_by_them(simple: pyengine.Model) -> None:
    token_ids = draw(np.random.default_rng(1), 3 * PAGE)
    state = simple.state(token_ids)
    again = simple.state(token_ids)
    assert simple.stats.reused_tokens == 2 * PAGE  # never all: the last token's logits are wanted
    assert simple.stats.kv_pages_used == 3
    assert again.logits.tobytes() == state.logits.tobytes()
    again.truncate(PAGE + 3)
    again.append(token_ids[PAGE + 3 : PAGE + 5])  # writes into a copy of a page that is in the cache
    assert again.logits.tobytes() == bits(simple, token_ids[: PAGE + 5])
    assert state.append([1]).logits.tobytes() == bits(simple, [*token_ids, 1])


def test_pages_come_back(simple: pyengine.Model) -> None:
    states = [simple.state(draw(np.random.default_rng(i), 80)) for i in range(3)]
    assert simple.stats.kv_pages_used == 6
    fork = states[0].fork()
    assert simple.stats.kv_pages_used == 6
    fork.append([1])
    assert simple.stats.kv_pages_used == 7
    fork.close()
    fork.close()
    with states.pop():
        pass
    assert simple.stats.kv_pages_used == 4
    states.clear()
    gc.collect()
    assert simple.stats.kv_pages_used == 0


def test_what_a_state_is_not(simple: pyengine.Model) -> None:
    state = simple.state()
    assert (len(state), state.token_ids) == (0, [])
    for use in (lambda: state.logits, state.generate, lambda: state.save("x"), state.submit, state.stream):
        with pytest.raises(ArgumentError, match="state: expected one of at least one token, got an empty one"):
            use()
    for tokens in ("", []):
        with pytest.raises(ArgumentError, match="tokens: expected at least one token"):
            state.append(tokens)
    with pytest.raises(ArgumentError, match="tokens: expected token ids from 0 to 299, got 300 at position 1"):
        state.append([1, 300])
    with pytest.raises(ArgumentError, match="prompt: expected token ids"):
        simple.state([300])
    state.append([1, 2, 3])
    for n in (-1, 4):
        with pytest.raises(ArgumentError, match=rf"n: expected 0\.\.3 positions, got {n}"):
            state.truncate(n)
    for n in (True, 1.0, "1"):
        with pytest.raises(ArgumentTypeError, match="n: expected an integer"):
            state.truncate(n)  # type: ignore[arg-type]
    with pytest.raises(
        ArgumentError, match=f"tokens: expected at most {CONTEXT - 3} more .*{CONTEXT}.*, got {CONTEXT}"
    ):
        state.append([1] * CONTEXT)
    with pytest.raises(ArgumentError, match="num_beams: expected 1 for a stream"):
        state.stream(num_beams=2)
    with pytest.raises(TypeError):
        state.generate(max_tokens=3)
    with pytest.raises(ArgumentError, match="top_p"):
        state.generate(top_p=2.0)
    assert state.token_ids == [1, 2, 3]
    assert state.logits.tobytes() == bits(simple, [1, 2, 3])
    state.truncate(0)
    assert state.append([4]).logits.tobytes() == bits(simple, [4])
    state.close()
    for use in (lambda: state.logits, lambda: state.append([1]), state.fork, state.generate, lambda: state.truncate(0)):
        with pytest.raises(ArgumentError, match="state: expected an open one, got one that is closed"):
            use()
    assert simple.stats.kv_pages_used == 0


# --- what goes wrong on the way --------------------------------------------------------------------------------------


def test_an_append_that_fails_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its first step or in a later one, and where `logits` runs the last token again."""
    simple = load(folder, prefix_cache=False)
    token_ids = draw(np.random.default_rng(1), CONTEXT)
    state, empty = simple.state(token_ids[:70]), simple.state()
    simple.executor.max_rows = 60
    step, n_left = simple.executor.step, 0

    def failing(rows: Any) -> Any:
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise RuntimeError("broken")
        return step(rows)

    with monkeypatch.context() as patch:
        patch.setattr(simple.executor, "step", failing)
        for some, tokens in ((state, token_ids[70:]), (empty, token_ids)):
            before = some.token_ids
            for n in range(3):
                n_left = n
                with pytest.raises(RuntimeError, match="broken"):
                    some.append(tokens)
                assert some.token_ids == before
        state.truncate(65)
        with pytest.raises(RuntimeError, match="broken"):
            _ = state.logits
    assert (len(state), len(empty), simple.executor.pool.n_used) == (65, 0, 2)
    assert state.logits.tobytes() == bits(simple, token_ids[:65])
    assert state.append(token_ids[65:]).logits.tobytes() == bits(simple, token_ids)
    assert empty.append(token_ids).logits.tobytes() == bits(simple, token_ids)


@pytest.mark.parametrize("window", [None, 100])
def test_an_interrupted_append_changes_nothing(
    simple: pyengine.Model, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Even where the interrupt comes when all has run."""
    state = simple.state(list(range(80)), window=window)
    with monkeypatch.context() as patch:
        result = pyengine.Request.result

        def interrupted(self: Any, timeout: float | None = None) -> Any:
            result(self, timeout)
            raise KeyboardInterrupt

        patch.setattr(pyengine.Request, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            state.append([7] * 50)
    assert state.token_ids == list(range(80))
    assert simple.executor.pool.n_used == 2
    assert state.append([3]).logits.tobytes() == bits(simple, [*range(80), 3])


def small(folder: Path, n_page: int, **arguments: Any) -> pyengine.Model:
    model = load(folder, prefix_cache=False, **arguments)
    model.executor.pool.capacity = n_page
    return model


def test_states_never_take_more_than_kv_memory(folder: Path) -> None:
    model = small(folder, 6)
    states = [model.state([1] * 130), model.state([2] * 100)]
    with pytest.raises(OutOfMemoryError, match=r"kv_memory: expected room for 1 more .*, got 0 of 6: states"):
        states[0].append([3] * 64)
        states[1].append([4] * 64)
    assert [len(state) for state in states] == [194, 100]
    assert model.stats.kv_pages_used == 6
    # A request still runs, since its pages come back.
    assert len(model.generate([1] * 100, max_new_tokens=30, ignore_eos=True).token_ids) == 30
    assert len(states[1].generate(max_new_tokens=70, ignore_eos=True).token_ids) == 70
    states[0].close()
    assert states[1].append([4] * 64).logits.tobytes() == bits(model, [2] * 100 + [4] * 64)
    with pytest.raises(ArgumentError, match="kv_memory: expected room for 4 pages"):
        small(folder, 3).state([1] * 200)


def test_appends_wait_for_requests_and_keep_what_they_have(folder: Path) -> None:
    """Many threads on a pool that is too small for all at once: requests pause, states don't lose a page."""
    model = small(folder, 12, max_batch=8)
    rng = np.random.default_rng(0)
    texts = [draw(rng, 150) for _ in range(3)]
    requests = [model.submit(draw(rng, 90), max_new_tokens=100, seed=i, ignore_eos=True) for i in range(6)]
    found: dict[int, bytes] = {}

    def build(i: int) -> None:
        with model.state() as state:
            for j in range(0, 150, 10):
                state.append(texts[i][j : j + 10])
            found[i] = state.logits.tobytes()

    threads = [threading.Thread(target=build, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(len(request.result(60).token_ids) == 100 for request in requests)
    assert model.stats.paused > 0
    assert model.stats.kv_pages_used == 0
    assert found == {i: bits(model, text) for i, text in enumerate(texts)}


def test_pausing_a_task_that_keeps_takes_nothing(simple: pyengine.Model) -> None:
    sequence = simple.executor.new_sequence()
    task = Append(sequence, np.arange(10, dtype=np.int32))
    simple.executor.step(task.plan(6))
    task.pause()
    task.start()
    assert (task.n_pending, sequence.length, task.finished) == (4, 6, False)
    task.end()
    assert sequence.length == 0
    sequence.close()


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "sinks"), [(1, 0), (2, 0), (2, 1), (7, 0), (8, 3), (9, 3), (20, 4), (20, 19), (100, 4)]
)
def test_a_window_depends_on_the_tokens_alone(size: int, sinks: int) -> None:
    """Against one token at a time, by the rule as it is said."""
    window, rng = Window(size, sinks), np.random.default_rng(0)
    text = np.arange(5 * size + 7, dtype=np.int32)
    seen: list[int] = []
    by_token = []
    for token in text.tolist():
        if len(seen) == size:
            others = seen[sinks:]
            seen = seen[:sinks] + others[len(others) - len(others) // 2 :]
        seen.append(token)
        by_token.append(seen.copy())
        assert window.seen(text[: token + 1]).tolist() == seen
    for _ in range(20):
        start, now = 0, text[:0]
        while start < len(text):
            end = start + int(rng.integers(1, 2 * size + 2))
            now = window.seen(np.concatenate([now, text[start:end]]))
            start = end
            assert now.tolist() == by_token[min(end, len(text)) - 1]


@pytest.mark.parametrize("seed", range(3))
def test_a_window_sees_the_text_that_it_keeps(model: pyengine.Model, tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    window, text = Window(100, 4), draw(rng, 1000)
    state = model.state(window=100)
    most, n_rolled = 0, 0
    while text:
        n = int(rng.choice([1, 1, 3, 40, 230]))
        before = state.token_ids
        state.append(text[:n])
        expected = window.seen(np.array(before + text[:n], np.int32)).tolist()
        n_rolled += len(expected) < len(before) + len(text[:n])
        del text[:n]
        assert state.token_ids == expected
        assert state.logits.tobytes() == bits(model, expected)
        most = max(most, model.stats.kv_pages_used)
        if rng.random() < 0.2:
            state.save(tmp_path / "state")
            state.close()
            state = model.restore(tmp_path / "state")
    assert n_rolled > 3
    assert most <= 2
    assert state.window == window
    state.close()
    assert model.stats.kv_pages_used == 0


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0}, {"seed": 3, "top_p": 0.9}, {"seed": 4, "num_return_sequences": 3}]
)
def test_a_window_generates_without_end(model: pyengine.Model, arguments: dict[str, Any]) -> None:
    """Past the context; as a state to which each token is appended, and as the model's while nothing is left out."""
    prompt = draw(np.random.default_rng(5), 70)
    state = model.state(prompt, window=100)
    arguments = {"max_new_tokens": 2 * CONTEXT, "ignore_eos": True, "logprobs": 2} | arguments
    found = state.generate(**arguments)
    short = model.generate(prompt, **(arguments | {"max_new_tokens": 30}))
    for completion, one in zip(*([x] if not isinstance(x, list) else x for x in (found, short)), strict=True):
        assert completion.token_ids[:30] == one.token_ids
        assert (len(completion.token_ids), completion.finish_reason) == (2 * CONTEXT, "length")
        follow = state.fork()
        for token in completion.logprobs:
            logits = follow.logits.astype(np.float64)
            total = np.log(np.exp(logits - logits.max()).sum()) + logits.max()
            assert token.logprob == pytest.approx(logits[token.token_id] - total, abs=1e-4)
            follow.append([token.token_id])
        follow.close()
    assert state.token_ids == prompt
    state.close()
    assert model.stats.kv_pages_used == 0


def test_a_window_that_pauses_goes_on_with_the_same_text(folder: Path) -> None:
    arguments = {"max_new_tokens": 300, "ignore_eos": True}
    roomy, tight = load(folder), small(folder, 12, max_batch=8)
    expected = [roomy.state([i] * 50, window=150).generate(seed=i, **arguments).token_ids for i in range(6)]
    states = [tight.state([i] * 50, window=150) for i in range(6)]
    requests = [state.submit(seed=i, **arguments) for i, state in enumerate(states)]
    assert [request.result(60).token_ids for request in requests] == expected
    assert tight.stats.paused > 0


def test_windows_that_cannot_be(simple: pyengine.Model) -> None:
    for window, sinks, message in [
        (0, 0, f"window: expected 1 to {CONTEXT}, got 0"),
        (CONTEXT + 1, 4, f"window: expected 1 to {CONTEXT}, got {CONTEXT + 1}"),
        (20, 20, "sinks: expected 0 to 19, got 20"),
        (20, -1, "sinks: expected 0 to 19, got -1"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            simple.state("a", window=window, sinks=sinks)
    for window, sinks in [(True, 4), (20.0, 4), ("20", 4), (20, 4.0)]:  # type: ignore[assignment]
        with pytest.raises(ArgumentTypeError, match=r"(window|sinks): expected an integer"):
            simple.state("a", window=window, sinks=sinks)
    with pytest.raises(ArgumentError, match="num_beams: expected 1 with a window, got 2"):
        simple.state("a", window=20).generate(num_beams=2)
    assert simple.stats.kv_pages_used == 0

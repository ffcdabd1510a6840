"""The Python API end to end, on tiny random checkpoints and on the bundled model."""

from __future__ import annotations

import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from checkpoints import rewrite, save, write_checkpoint
from test_golden import reference_weights

import pyengine
from pyengine.checkpoint import Checkpoint

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def demo() -> pyengine.Model:
    return pyengine.load("demo", threads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder: Path) -> pyengine.Model:
    return pyengine.load(folder, dtype="float32", threads=1)


def nothing_in_use(model: pyengine.Model) -> bool:
    """Whether all pages come back, soon: who was dropped is noticed between two steps."""
    gc.collect()
    deadline = time.monotonic() + 10
    while model.executor.pool.n_used and time.monotonic() < deadline:
        time.sleep(0.001)
    return model.executor.pool.n_used == 0


@pytest.fixture(autouse=True)
def everything_is_given_back(request: pytest.FixtureRequest) -> Any:
    """No test leaves KV pages in use."""
    yield
    gc.collect()
    for name in {"demo", "tiny"} & set(request.fixturenames):
        assert nothing_in_use(request.getfixturevalue(name))


def test_prompt_as_text_and_as_token_ids(demo: pyengine.Model) -> None:
    assert demo.tokenizer is not None
    ids = demo.tokenizer.encode(PROMPT)
    expected = demo.generate(PROMPT, max_new_tokens=16, temperature=0)
    assert expected.text == demo.tokenizer.decode(expected.token_ids)
    assert len(expected.token_ids) == len(expected.logprobs) == expected.usage.completion_tokens == 16
    assert expected.usage.prompt_tokens == len(ids)
    assert expected.finish_reason == "length"
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)):
        assert demo.generate(prompt, max_new_tokens=16, temperature=0).token_ids == expected.token_ids


def test_list_of_prompts(demo: pyengine.Model) -> None:
    prompts: list[Any] = [PROMPT, [5, 6, 7], "London", np.array([9, 10])]
    together = demo.generate(prompts, max_new_tokens=12, seed=4)
    assert [c.token_ids for c in together] == [demo.generate(p, max_new_tokens=12, seed=4).token_ids for p in prompts]
    assert [c.text for c in demo.generate([PROMPT], max_new_tokens=12, seed=4)] == [together[0].text]


def test_samples(demo: pyengine.Model) -> None:
    samples = demo.generate(PROMPT, max_new_tokens=12, seed=4, num_return_sequences=3)
    assert samples[0].token_ids == demo.generate(PROMPT, max_new_tokens=12, seed=4).token_ids
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    both = demo.generate([PROMPT, "London"], max_new_tokens=12, seed=4, num_return_sequences=3)
    assert [len(found) for found in both] == [3, 3]
    assert [c.token_ids for c in both[0]] == [c.token_ids for c in samples]


def test_beams(demo: pyengine.Model) -> None:
    found = demo.generate(PROMPT, max_new_tokens=10, num_beams=4, num_return_sequences=3)
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
    assert found[0].score == pytest.approx(sum(t.logprob for t in found[0].logprobs) / 10)
    assert demo.generate([PROMPT, "London"], max_new_tokens=10, num_beams=4)[0].token_ids == found[0].token_ids


def test_seeds(demo: pyengine.Model) -> None:
    texts = [demo.generate(PROMPT, max_new_tokens=12, seed=seed).token_ids for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    unseeded = [demo.generate(PROMPT, max_new_tokens=12).token_ids for _ in range(3)]
    assert unseeded[0] != unseeded[1] or unseeded[1] != unseeded[2]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 3}, {"temperature": 0, "stop": [" sure", "zebra"]}])
def test_stream_is_generate_in_pieces(demo: pyengine.Model, params: dict[str, Any]) -> None:
    expected = demo.generate(PROMPT, max_new_tokens=30, logprobs=2, **params)
    pieces = list(demo.stream(PROMPT, max_new_tokens=30, logprobs=2, **params))
    assert "".join(piece.text for piece in pieces) == expected.text
    assert [piece.token_id for piece in pieces] == expected.token_ids
    assert [piece.logprob for piece in pieces] == [token.logprob for token in expected.logprobs]
    assert [piece.top_logprobs for piece in pieces] == [token.top for token in expected.logprobs]
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [expected.finish_reason]


def test_stop_strings(demo: pyengine.Model) -> None:
    text = demo.generate(PROMPT, max_new_tokens=30, temperature=0).text
    stop = text[12:18]
    stopped = demo.generate(PROMPT, max_new_tokens=30, temperature=0, stop=stop)
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(stop)]


@pytest.mark.parametrize(("n_prompt", "n_expected"), [(64, 1), (60, 5), (1, 64)])
def test_full_context(tiny: pyengine.Model, n_prompt: int, n_expected: int) -> None:
    for params in ({"temperature": 0}, {"num_beams": 2}, {"seed": 1}):
        completion = tiny.generate([7] * n_prompt, max_new_tokens=1000, ignore_eos=True, **params)
        assert (len(completion.token_ids), completion.finish_reason) == (n_expected, "length")


def eos_of(folder: Path, config: Any, generation_config: Any) -> tuple[int, ...]:
    values = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config}
    (folder / "config.json").write_text(json.dumps(values))
    if generation_config is not ...:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_config}))
    return pyengine.load(folder, threads=1).eos_token_ids


@pytest.mark.parametrize(
    ("config", "generation_config", "expected"),
    [
        (5, ..., (5,)),
        ([5, 6], ..., (5, 6)),
        (None, ..., ()),
        (5, 7, (7,)),
        (5, [7, 8], (7, 8)),
        (5, None, (5,)),
        (50256, ..., ()),  # of the vocabulary that this one was cut from
        (5, [299, 300], (299,)),
    ],
)
def test_eos_token_ids(tmp_path: Path, config: Any, generation_config: Any, expected: tuple[int, ...]) -> None:
    assert eos_of(write_checkpoint(tmp_path), config, generation_config) == expected


@pytest.mark.parametrize("bad", ["5", True, 5.0, [5, "6"], {"a": 1}])
def test_bad_eos_token_ids(tmp_path: Path, bad: Any) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(pyengine.CheckpointError, match=r"config\.json: eos_token_id: expected token ids, got "):
        eos_of(tmp_path, bad, ...)
    with pytest.raises(
        pyengine.CheckpointError, match=r"generation_config\.json: eos_token_id: expected token ids, got"
    ):
        eos_of(tmp_path, 5, bad)


def test_eos_ends_a_text(folder: Path, tmp_path: Path) -> None:
    free = pyengine.load(folder, dtype="float32", threads=1).generate(
        PROMPT, max_new_tokens=20, seed=2, ignore_eos=True
    )
    end = next(token for i, token in enumerate(free.token_ids) if i >= 5 and token not in free.token_ids[:i])
    n = free.token_ids.index(end) + 1
    model = pyengine.load(write_checkpoint(tmp_path, {"eos_token_id": end}), dtype="float32", threads=1)
    for stopped in (
        model.generate(PROMPT, max_new_tokens=20, seed=2),
        model.generate(PROMPT, max_new_tokens=20, seed=2, ignore_eos=True, stop_token_ids=[end]),
    ):
        assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:n], "stop")
        assert model.tokenizer is not None
        assert stopped.text == model.tokenizer.decode(free.token_ids[: n - 1])
    assert model.generate(PROMPT, max_new_tokens=20, seed=2, ignore_eos=True).token_ids == free.token_ids


def test_logits_and_score_in_float64(tiny: pyengine.Model, folder: Path) -> None:
    """One window of text: all tokens have all those before them."""
    ids = np.random.default_rng(0).integers(0, 300, 64)
    expected = reference.run(tiny.plan, reference_weights(folder, tiny), ids)[tiny.plan.logits]
    logits = tiny.logits(ids.tolist())
    assert (logits.dtype, logits.shape) == (np.float32, (64, 300))
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    logprobs = (expected - np.logaddexp.reduce(expected, axis=1, keepdims=True))[np.arange(63), ids[1:]]
    score = tiny.score(ids.tolist())
    assert score.token_ids == ids.tolist()
    np.testing.assert_allclose(score.logprobs, logprobs, atol=1e-4)
    assert score.total == pytest.approx(logprobs.sum(), abs=1e-3)
    assert score.perplexity == pytest.approx(np.exp(-logprobs.mean()), rel=1e-5)


def test_score_of_a_text_longer_than_the_context(tiny: pyengine.Model, folder: Path) -> None:
    ids = np.random.default_rng(1).integers(0, 300, 150)
    weights = reference_weights(folder, tiny)
    for stride, starts in ((None, (0, 32, 64, 96)), (64, (0, 64, 128)), (50, (0, 50, 100))):
        expected: list[float] = []
        for start in starts:
            window = ids[start : start + 64]
            logits = reference.run(tiny.plan, weights, window)[tiny.plan.logits]
            logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            first = len(expected) - start  # position of the first whose next token has no score yet
            targets = ids[start + 1 : start + 65]
            expected += [logprobs[i, targets[i]] for i in range(first, len(targets))]
        np.testing.assert_allclose(tiny.score(ids.tolist(), stride).logprobs, expected, atol=1e-4)


def test_score_of_text(demo: pyengine.Model) -> None:
    assert demo.tokenizer is not None
    score = demo.score("It was a dark and stormy night")
    assert score.token_ids == demo.tokenizer.encode("It was a dark and stormy night")
    assert score.perplexity < demo.score("Night stormy was a it dark and").perplexity
    assert np.isnan(demo.score([5]).perplexity)


def test_a_completion_scores_what_it_says(demo: pyengine.Model) -> None:
    assert demo.tokenizer is not None
    ids = demo.tokenizer.encode(PROMPT)
    completion = demo.generate(ids, max_new_tokens=20, seed=5)
    score = demo.score(ids + completion.token_ids)
    assert score.logprobs[len(ids) - 1 :].tolist() == pytest.approx([t.logprob for t in completion.logprobs], abs=1e-6)


def test_without_a_tokenizer(tmp_path: Path, tiny: pyengine.Model) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    model = pyengine.load(tmp_path, dtype="float32", threads=1)
    assert model.tokenizer is None
    expected = tiny.generate([1, 2], max_new_tokens=5, temperature=0)
    completion = model.generate([1, 2], max_new_tokens=5, temperature=0)
    assert (completion.text, completion.token_ids) == ("", expected.token_ids)
    assert [piece.text for piece in model.stream([1, 2], max_new_tokens=5, ignore_eos=True)] == [""] * 5
    assert model.generate([1, 2], max_new_tokens=5, num_beams=2).text == ""
    for call in (model.generate, model.stream, model.score, model.logits):
        with pytest.raises(
            pyengine.ArgumentError, match="expected token ids, got text: the checkpoint has no tokenizer"
        ):
            call(PROMPT)
    with pytest.raises(pyengine.ArgumentError, match="stop: expected no strings without a tokenizer"):
        model.generate([1, 2], stop="a")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kept", ["float32", "int8"])
def test_half_precision_is_the_float32_that_it_stands_for(tmp_path: Path, dtype: str, kept: Any) -> None:
    half, full = write_checkpoint(tmp_path / "half", dtype=dtype), tmp_path / "full"
    ids = list(range(60))
    write_checkpoint(full)
    as_float32(half, full)
    got = pyengine.load(half, dtype=kept, threads=1).logits(ids)
    assert got.tobytes() == pyengine.load(full, dtype=kept, threads=1).logits(ids).tobytes()


def as_float32(half: Path, full: Path) -> None:
    """Writes the values of one checkpoint's file into another's, in float32."""
    tensors = {}
    with Checkpoint.open(half) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            raw = np.empty(tensor.nbytes, np.uint8)
            checkpoint.read_into(name, raw)
            if tensor.dtype == "F16":
                values = raw.view(np.float16).astype(np.float32)
            else:  # bfloat16: the upper half of a float32
                values = np.stack([np.zeros(raw.size // 2, np.uint16), raw.view(np.uint16)], axis=1).view(np.float32)
            tensors[name] = ("F32", values.reshape(tensor.shape))
    save(full / "model.safetensors", tensors)


@pytest.mark.parametrize("how", [{"shards": 3}, {"prefix": "transformer."}, {"shards": 2, "prefix": "transformer."}])
def test_other_ways_to_store_it(tmp_path: Path, tiny: pyengine.Model, how: dict[str, Any]) -> None:
    model = pyengine.load(str(write_checkpoint(tmp_path, **how)), dtype="float32", threads=2)
    assert model.logits([1, 2, 3]).tobytes() == tiny.logits([1, 2, 3]).tobytes()


def test_threads_at_once(demo: pyengine.Model) -> None:
    """Calls of several Python threads on one model give what they give alone."""
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPT, "seed": 1},
        {"prompt": ["London", [5, 6, 7]], "seed": 2},
        {"prompt": "It was", "num_beams": 3},
        {"prompt": "The old man", "temperature": 0, "num_return_sequences": 2},
        {"prompt": list(range(300)), "seed": 3},
    ]

    def tokens(call: dict[str, Any]) -> list[list[int]]:
        found: Any = demo.generate(max_new_tokens=40, ignore_eos=True, **call)
        return [c.token_ids for c in (found if isinstance(found, list) else [found])]

    alone = [tokens(call) for call in calls]
    scored = demo.score(PROMPT * 30).logprobs
    got: dict[int, Any] = {}
    workers = [threading.Thread(target=lambda i=i: got.update({i: tokens(calls[i])})) for i in range(len(calls))]
    workers.append(threading.Thread(target=lambda: got.update({99: demo.score(PROMPT * 30).logprobs})))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [got.get(i) for i in range(len(calls))] == alone
    assert got[99].tolist() == scored.tolist()


def test_abandoned_streams_give_their_pages_back(demo: pyengine.Model) -> None:
    never_read = demo.stream(PROMPT, max_new_tokens=500, ignore_eos=True)
    streams = [demo.stream(PROMPT, seed=i, max_new_tokens=500, ignore_eos=True) for i in range(3)]
    texts = ["".join(next(stream).text for _ in range(5)) for stream in streams]  # side by side
    assert texts == ["".join(piece.text for piece in demo.stream(PROMPT, seed=i, max_new_tokens=5)) for i in range(3)]
    del streams, never_read
    assert nothing_in_use(demo)


def test_a_consumer_that_raises_gives_them_back_too(demo: pyengine.Model) -> None:
    with pytest.raises(ZeroDivisionError):
        for piece in demo.stream(PROMPT):
            piece.token_id / 0
    assert nothing_in_use(demo)


def test_nonfinite_logits(tmp_path: Path) -> None:
    """Finite weights whose products overflow: an error, not a text of token 0; and nothing stays in use."""

    def enlarge(tensors: dict[str, tuple[str, np.ndarray[Any, Any]]]) -> None:
        tensors["ln_f.weight"] = ("F32", np.full(32, 3e38, np.float32))

    rewrite(write_checkpoint(tmp_path), enlarge)
    model = pyengine.load(tmp_path, dtype="float32", threads=1)
    for call in (
        lambda: model.generate([1, 2], max_new_tokens=3),
        lambda: model.generate([1, 2], max_new_tokens=3, temperature=0),
        lambda: model.generate([1, 2], max_new_tokens=3, num_beams=2),
        lambda: list(model.stream([1, 2])),
        lambda: model.score([1, 2, 3]),
    ):
        with pytest.raises(pyengine.NonFiniteError):
            call()
        assert model.executor.pool.n_used == 0


def test_progress(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    pyengine.load(folder, threads=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == {total for _, total in seen}.pop()


def test_what_a_model_says_of_itself(demo: pyengine.Model) -> None:
    assert repr(demo) == "<pyengine.Model gpt2, 5,918,720 parameters, int8>"
    assert demo.config["n_layer"] == 6
    assert demo.cost.n_parameter == 5_918_720


def test_every_public_name_is_there() -> None:
    assert set(pyengine.__all__) <= set(dir(pyengine))
    assert all(getattr(pyengine, name) is not None for name in pyengine.__all__)
    with pytest.raises(AttributeError, match="module 'pyengine' has no attribute 'laod'"):
        pyengine.laod  # noqa: B018

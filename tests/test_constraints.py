"""Constraints: every text that ends matches, whatever the logits; alone, in a batch, among samples and in beams."""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Callable
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from constrained import CASES, END, NUMBERS, SCHEMAS, N, ascii_vocabulary
from fake_executor import FakeExecutor, LetterTokenizer, complete, drive

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.beam import Beam, Candidates, Group
from pyengine.completion import Completion
from pyengine.constraints import Constraint, Vocabulary
from pyengine.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from pyengine.generation import Generation, Job
from pyengine.params import SamplingParams
from pyengine.sampling import Sampler

PROMPT = np.array([65], np.int32)


def check_of(name: str, value: Any) -> Callable[[str], bool]:
    """What tells whether a text matches, by another implementation than that which makes it."""
    if name == "regex":
        return lambda text: re.fullmatch(value, text) is not None
    if name == "grammar":
        return lambda text: re.fullmatch(r"[1-9][0-9]{0,2}(\+[1-9][0-9]{0,2}){1,3}", text) is not None
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is what tells whether a text matches a schema")
    formats = jsonschema.FormatChecker()
    # A grammar of dates doesn't know leap years: the 29th of February is one in all.
    formats.checks("date", ValueError)(lambda text: date.fromisoformat(f"2000{text[4:]}") is not None)
    validator = jsonschema.Draft202012Validator(value, format_checker=formats)

    def check(text: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(text)))
        except json.JSONDecodeError:
            return False

    return check


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return ascii_vocabulary()


@pytest.fixture(scope="module")
def demo() -> pyengine.Model:
    pytest.importorskip("llguidance", reason="constraints need llguidance: the extra `constrained`")
    return pyengine.load("demo", threads=2)


@pytest.fixture(scope="module")
def executor() -> Any:
    return FakeExecutor(N, max_seq_len=400)


def job(vocabulary: Vocabulary, name: str, value: Any, stop_ids: Any = (END,), **arguments: Any) -> Job:
    params = SamplingParams(**{"max_new_tokens": 300, name: value} | arguments)
    constraint = vocabulary.compile(name, value, stop_ids)
    return Job(PROMPT, params, frozenset(stop_ids), LetterTokenizer(), constraint)


def free(one: Job) -> Job:
    """The same without its constraint."""
    return Job(one.prompt_ids, one.params, one.stop_ids, one.tokenizer)


def saying(text: str) -> Any:
    """Logits for a text, whatever came before, far above all others; then for its last character."""

    def logits_of(token_ids: list[int]) -> Any:
        logits = np.zeros((len(token_ids), N))
        for i in range(len(token_ids)):
            logits[i, ord(text[min(i, len(text) - 1)])] = 100.0
        return logits

    return FakeExecutor(N, 1000, logits_of=logits_of)


def only_text(found: list[list[Completion]]) -> Completion:
    [[one]] = found
    return one


@pytest.mark.parametrize(("name", "value"), [*CASES, pytest.param("json_schema", NUMBERS, id="numbers")])
def test_every_text_that_ends_matches(vocabulary: Vocabulary, executor: Any, name: str, value: Any) -> None:
    check = check_of(name, value)
    jobs = [
        job(vocabulary, name, value, seed=seed, temperature=temperature)
        for seed in range(30)
        for temperature in (0.5, 1.0, 3.0)
    ]
    texts = [one for [one] in complete(executor, jobs)]
    assert sum(one.finish_reason == "stop" for one in texts) >= 0.8 * len(texts)
    for one in texts:
        assert check(one.text) == (one.finish_reason == "stop"), one.text
    assert len({one.text for one in texts}) >= 4
    # The control: the same logits and seeds without the constraint.
    assert not any(check(one.text) for [one] in complete(executor, [free(one) for one in jobs[:10]]))
    assert executor.n_open == 0


@pytest.mark.parametrize(("name", "value"), CASES)
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.8}, {"temperature": 0}])
def test_the_same_text_alone_in_a_batch_and_among_samples(
    vocabulary: Vocabulary, executor: Any, name: str, value: Any, filters: dict[str, Any]
) -> None:
    one = job(vocabulary, name, value, seed=3, num_return_sequences=3, **filters)
    others = [job(vocabulary, "regex", r"[a-z]{5,30}", seed=seed) for seed in range(3)]
    [alone] = complete(executor, [one])
    batch = complete(executor, [others[0], one, free(one), *others[1:]], max_batch=4)[1]
    assert [text.token_ids for text in batch] == [text.token_ids for text in alone]
    single = complete(executor, [job(vocabulary, name, value, seed=3, **filters)])[0][0]
    assert single.token_ids == alone[0].token_ids


@pytest.mark.parametrize(("name", "value"), CASES)
def test_beams_find_texts_that_match(vocabulary: Vocabulary, executor: Any, name: str, value: Any) -> None:
    check = check_of(name, value)
    one = job(vocabulary, name, value, num_beams=4, num_return_sequences=4)
    found = complete(executor, [one])[0]
    assert any(text.finish_reason == "stop" for text in found)
    assert all(check(text.text) or text.finish_reason == "length" for text in found)
    scores = [text.score for text in found]
    assert scores == sorted(scores, key=lambda score: -(score or 0))
    assert not any(check(text.text) for text in complete(executor, [free(one)])[0])
    assert executor.n_open == 0


def test_beams_find_the_best_text_of_all(vocabulary: Vocabulary, executor: Any) -> None:
    """A few texts: each one's log-probability is the sum of its tokens', and the search finds them all, in order."""
    one = job(vocabulary, "regex", "[abc][xy]", stop_ids=(), num_beams=6, num_return_sequences=6, length_penalty=0.0)
    found = complete(executor, [one])[0]
    expected = {}
    for text in [a + b for a in "abc" for b in "xy"]:
        rows = executor.from_table([int(PROMPT[0]), *text.encode()])
        rows = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        expected[text] = sum(float(row[token]) for row, token in zip(rows, text.encode(), strict=False))
    assert [text.text for text in found] == sorted(expected, key=lambda text: -expected[text])
    assert [text.score for text in found] == pytest.approx([expected[text.text] for text in found], abs=1e-4)
    assert {text.finish_reason for text in found} == {"stop"}
    few = job(vocabulary, "regex", "a|b", num_beams=4, num_return_sequences=4)
    assert {text.text for text in complete(executor, [few])[0]} == {"a", "b"}


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_beams_ask_late_and_get_what_masks_give_at_once(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    """The first candidates of three beams are those of masked rows, in order, and a beam far behind isn't asked."""
    asked = []
    for name in ("allows", "bits"):
        ask = getattr(Constraint, name)
        monkeypatch.setattr(Constraint, name, lambda its, *rest, ask=ask: asked.append(its) or ask(its, *rest))
    rng, work = np.random.default_rng(0), Workspace(N)
    one = job(vocabulary, "regex", "[a-f]{1,3}[x-z ]+", num_beams=3)
    for _ in range(50):
        logits = spread * rng.standard_normal((3, N)).astype(np.float32)
        group = Group(one, 9)
        beams = [Beam(score, group.beams[0].adjustments.fork()) for score in (-1.0, -2.0, -1e6)]
        for beam, text in zip(beams, ("a", "bc", "abc"), strict=True):
            for character in text[: int(rng.integers(len(text) + 1))]:
                beam.adjustments.append(ord(character))
        group.beams = beams
        expected: list[tuple[float, int, int]] = []
        for parent, (beam, row) in enumerate(zip(beams, logits, strict=True)):
            constraint = beam.adjustments.constraint
            assert constraint is not None
            allowed = np.flatnonzero(constraint.mask(work, row) > -np.inf)
            scores = beam.score + (row[allowed].astype(np.float64) - work.logsumexp(row))
            expected += zip(scores.tolist(), [parent] * len(allowed), allowed.tolist(), strict=True)
        n_allowed = len([parent for _, parent, _ in expected if parent < 2])
        asked.clear()
        found = list(islice(Candidates(one, [work]).of(logits, group, array("i")), min(6, n_allowed)))
        expected = sorted(expected, reverse=True)[: len(found)]
        assert [(one.score, one.parent, one.chosen.token_id) for one in found] == expected
        assert asked and beams[2].adjustments.constraint not in asked


def test_the_end_of_text_waits_for_the_constraint(vocabulary: Vocabulary) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 10}
    text = only_text(complete(saying("\0"), [job(vocabulary, "regex", "ab?", **greedy)]))
    assert (text.text, text.token_ids, text.finish_reason) == ("a", [ord("a"), END], "stop")
    text = only_text(complete(saying("\0"), [job(vocabulary, "regex", "abc", **greedy)]))
    assert (text.text, text.token_ids, text.finish_reason) == ("abc", [*b"abc"], "stop")  # complete: it isn't asked for
    # Without a token that ends it the text goes on as long as it may.
    text = only_text(complete(saying("\0"), [job(vocabulary, "regex", "ab{0,3}", stop_ids=(), **greedy)]))
    assert (text.text, text.finish_reason) == ("abbb", "stop")
    text = only_text(complete(saying("\0"), [job(vocabulary, "regex", "ab*", stop_ids=(), **greedy)]))
    assert (text.text, text.finish_reason) == ("abbbbbbbbb", "length")
    # A stop token that is a character too stands for the end alone.
    text = only_text(complete(saying("b"), [job(vocabulary, "regex", "a{2}b?", stop_ids=[ord("b")], **greedy)]))
    assert (text.text, text.token_ids) == ("aa", [*b"aab"])


def test_length_and_stop_strings_end_it_before(vocabulary: Vocabulary) -> None:
    one = job(vocabulary, "regex", "(abc){5}", temperature=0, max_new_tokens=4)
    assert only_text(complete(saying("a"), [one])).finish_reason == "length"
    one = job(vocabulary, "regex", "(abc){5}", temperature=0, stop="ca")
    assert only_text(complete(saying("a"), [one])).text == "ab"
    one = job(vocabulary, "regex", "abc", temperature=0, max_new_tokens=3)
    assert only_text(complete(saying("a"), [one])).finish_reason == "stop"


def test_the_constraint_comes_after_penalties_bias_and_processors(vocabulary: Vocabulary) -> None:
    def insist(token_ids: Any, logits: Any) -> Any:
        logits[ord("z")] = 1000.0
        return logits

    arguments: dict[str, Any] = {"logit_bias": {ord("q"): 500.0}, "presence_penalty": 1.0, "seed": 0}
    one = job(vocabulary, "regex", "[a-c]{9}", logits_processor=insist, **arguments)
    assert set(only_text(complete(saying("x"), [one])).text) <= set("abc")
    one = job(vocabulary, "regex", "[a-z]{9}", logits_processor=insist, **arguments)
    assert only_text(complete(saying("x"), [one])).text == "zzzzzzzzz"
    banned = job(vocabulary, "regex", "a", logit_bias={ord("a"): -math.inf})
    with pytest.raises(NonFiniteError, match=r"^regex: expected one of its tokens to be left by logit_bias and"):
        complete(saying("x"), [banned])


def test_logprobs_are_of_the_models_own_distribution(vocabulary: Vocabulary) -> None:
    text = only_text(complete(saying("x"), [job(vocabulary, "regex", "abc", temperature=0, logprobs=1)]))
    assert [token.token_id for token in text.logprobs] == [*b"abc"]
    assert all(token.logprob == pytest.approx(-100.0, abs=1e-3) for token in text.logprobs)
    assert all(token.top[0][0] == ord("x") for token in text.logprobs)


def test_drawing_again_is_drawing_from_what_is_allowed(vocabulary: Vocabulary) -> None:
    """Frequencies of 20,000 draws against softmax over the allowed tokens: within 4.5 standard deviations each."""
    logits = np.random.default_rng(0).normal(0, 1.5, N).astype(np.float32)
    ids = np.frombuffer(b"abcdefgh", np.uint8)
    work, n = Workspace(N), 20_000
    constraint = vocabulary.compile("regex", "[a-h]{2}", [END])
    counts = np.zeros(N)
    for seed in range(n):
        params = SamplingParams(seed=seed, temperature=1.3)
        counts[Sampler(params, work, PROMPT, constraint=constraint).sample(logits).token_id] += 1
    weights = np.exp(logits[ids].astype(np.float64) / 1.3)
    assert 0.02 < weights.sum() / np.exp(logits / 1.3).sum() < 0.3  # most are drawn again
    expected = weights / weights.sum()
    assert counts[ids].sum() == n
    assert (abs(counts[ids] - n * expected) < 4.5 * np.sqrt(n * expected * (1 - expected))).all()


@pytest.mark.parametrize("filters", [{}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1}, {"temperature": 0}])
def test_a_constraint_that_allows_everything(vocabulary: Vocabulary, executor: Any, filters: Any) -> None:
    arguments = {"max_new_tokens": 25, "seed": 4, "logit_bias": {END: -math.inf}, **filters}
    one = job(vocabulary, "regex", r"(.|\n)*", stop_ids=(), **arguments)
    [[with_it], [without]] = complete(executor, [one, free(one)])
    assert with_it.token_ids == without.token_ids


def test_a_constraint_that_the_text_meets_anyway(vocabulary: Vocabulary, executor: Any) -> None:
    """Without filters it changes nothing."""
    [[text]] = complete(executor, [free(job(vocabulary, "regex", "x", stop_ids=(), max_new_tokens=9, seed=4))])
    regex = re.escape(text.text) + "|[a-z]{30}"
    one = job(vocabulary, "regex", regex, stop_ids=(), max_new_tokens=9, seed=4)
    assert only_text(complete(executor, [one])).token_ids == text.token_ids


@pytest.mark.parametrize("arguments", [{"json_schema": [1]}, {"regex": b"a"}, {"grammar": 3}, {"regex": {}}])
def test_arguments_of_a_wrong_type(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^{next(iter(arguments))}: expected a "):
        SamplingParams(**arguments)


def test_one_constraint_at_most() -> None:
    with pytest.raises(ArgumentError, match=r"^regex: expected none beside json_schema, got 'a'"):
        SamplingParams(json_schema={}, regex="a")


def test_one_that_gets_stuck_ends_its_own_text_alone() -> None:
    pytest.importorskip("llguidance", reason="constraints need llguidance: the extra `constrained`")
    tokens = [b"" if chr(i) in "xy" else bytes([i]) for i in range(N)]
    vocabulary = Vocabulary(tokens, [END], lambda text: [ord(c) for c in text if c not in "xy"])
    executor = saying("aab")
    for filters in ({}, {"top_p": 0.9}, {"temperature": 0}):
        jobs = [job(vocabulary, "regex", regex, seed=0, **filters) for regex in ("a[xy]|cc", "[ab]{3}", "a{4}", "cb?")]
        jobs.append(job(vocabulary, "regex", "[cd]", logit_bias={99: -math.inf, 100: -math.inf}, seed=0, **filters))
        tasks = [Generation(executor, one) for one in jobs]
        with pytest.raises(ArgumentError, match=r"^regex: expected one that the tokens of the model can match"):
            drive(executor, tasks)
        errors = [type(task.error) for task in tasks]
        assert errors == [ArgumentError, type(None), type(None), type(None), NonFiniteError]
        assert [task.completions()[0].text for task in tasks[1:3]] == ["aab", "aaaa"]
        assert tasks[3].completions()[0].token_ids == complete(executor, [jobs[3]])[0][0].token_ids
        assert executor.n_open == 0


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_bundled_model(demo: pyengine.Model, name: str) -> None:
    schema = SCHEMAS[name]
    check = check_of("json_schema", schema)
    arguments: dict[str, Any] = {"json_schema": schema, "max_new_tokens": 150}
    texts = demo.generate(
        ["Once", "The answer is", [5, 6]], num_return_sequences=4, temperature=2.0, seed=1, **arguments
    )
    flat = [one for many in texts for one in many]
    assert sum(one.finish_reason == "stop" for one in flat) >= 10
    assert all(check(one.text) == (one.finish_reason == "stop") for one in flat)
    alone = demo.generate("The answer is", temperature=2.0, seed=1, **arguments | {"json_schema": json.dumps(schema)})
    assert alone.token_ids == texts[1][0].token_ids
    pieces = list(demo.stream("The answer is", temperature=2.0, seed=1, **arguments))
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == (alone.text, alone.finish_reason)
    beams = demo.generate("The answer is", num_beams=3, num_return_sequences=3, **arguments)
    assert all(check(one.text) == (one.finish_reason == "stop") for one in beams)
    assert not check(demo.generate("The answer is", max_new_tokens=150, seed=1).text)
    assert demo.executor.pool.n_used == 0


def test_the_example_of_the_readme(demo: pyengine.Model, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    [code] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "json_schema" in block]
    exec(code, {})
    person, year, number, prose = capsys.readouterr().out.splitlines()
    assert set(json.loads(person)) == {"name", "age"}
    assert re.fullmatch(r" 1[0-9]{3}", year)
    assert re.fullmatch(r" [1-9][0-9]?(\+[1-9][0-9]?)*", number)
    assert "," not in prose

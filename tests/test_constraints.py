"""Constraints: every text that ends matches, whatever the logits; alone, in a batch, among samples and in beams."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_executor import FakeExecutor, LetterTokenizer, complete, drive

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.completion import Completion
from pyengine.constraints import Constraint, Vocabulary
from pyengine.errors import ArgumentError, ArgumentTypeError, NonFiniteError
from pyengine.generation import Generation, Job
from pyengine.params import SamplingParams
from pyengine.sampling import Sampler
from pyengine.scheduler import Scheduler

N = 128  # tokens are ASCII characters
END = 0
PROMPT = np.array([65], np.int32)

SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "home": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo"]},
                    "since": {"type": "integer", "minimum": 1900, "maximum": 2100},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "age", "home"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "minItems": 1,
        "maxItems": 4,
        "items": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 5}, {"const": {"x": [1, None]}}]},
    },
    "formats": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}},
        "required": ["day", "id"],
        "additionalProperties": False,
    },
}
NUMBERS = {"type": "array", "maxItems": 3, "items": {"type": "number", "minimum": -5, "exclusiveMaximum": 1e3}}
REGEXES = {
    "year": r"(19|20)[0-9]{2}",
    "choice": r"yes|no|maybe|none of these",
    "word": r"[a-z]{2,9}(-[a-z]{2,9})?",
    "open": r"a+b*",
}
GRAMMARS = {
    "sum": 'start: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/',
}
CASES = [
    *(pytest.param("json_schema", schema, id=name) for name, schema in SCHEMAS.items()),
    *(pytest.param("regex", regex, id=name) for name, regex in REGEXES.items()),
    *(pytest.param("grammar", grammar, id=name) for name, grammar in GRAMMARS.items()),
]


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
    pytest.importorskip("llguidance", reason="constraints need llguidance: the extra `constrained`")
    return Vocabulary([bytes([i]) for i in range(N)], special_ids=[END], encode=lambda text: list(text.encode()))


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


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 63, 64, 100, 5000])
def test_mask_is_its_definition(vocab_size: int) -> None:
    rng, work = np.random.default_rng(vocab_size), Workspace(vocab_size)
    row = rng.standard_normal(vocab_size).astype(np.float32)
    n_word = vocab_size // 32 + 1
    end_ids = np.array([0, vocab_size - 1], np.int32)
    for words in (
        np.zeros(n_word, np.uint32),
        np.full(n_word, 2**32 - 1, np.uint32),
        rng.integers(0, 2**32, n_word, np.uint32),
        np.where(rng.random(n_word) < 0.5, 0, 2**32 - 1).astype(np.uint32),
    ):
        bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
        allowed = bits[:vocab_size].copy()
        np.testing.assert_array_equal(work.mask(row, words, end_ids[:0]), np.where(allowed, row, -np.inf))
        allowed[end_ids] = bits[vocab_size]
        np.testing.assert_array_equal(work.mask(row, words, end_ids), np.where(allowed, row, -np.inf))
    with pytest.raises(ArgumentError, match=f"bits: expected {n_word} words, got {n_word + 1}"):
        work.mask(row, np.zeros(n_word + 1, np.uint32), end_ids)
    with pytest.raises(ArgumentError, match="expected 0 to"):
        work.mask(row, words, np.array([vocab_size], np.int32))


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


def random_texts(vocabulary: Vocabulary, name: str, value: Any) -> Iterator[tuple[Constraint, Any, list[int]]]:
    """A constraint on its way through a few texts that it allows: before each token, its mask, the tokens so far."""
    rng, work = np.random.default_rng(1), Workspace(vocabulary.vocab_size)
    row = np.zeros(vocabulary.vocab_size, np.float32)
    text: list[int]
    for _ in range(5):
        constraint, text = vocabulary.compile(name, value, [END]).fork(), []
        while not constraint.complete and END not in text and len(text) < 40:
            mask = np.isfinite(constraint.mask(work, row))
            yield constraint, mask, text
            text.append(int(rng.choice(np.flatnonzero(mask))))
            constraint.accept(text[-1])


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_token_is_allowed_where_the_mask_has_it(vocabulary: Vocabulary, name: str, value: Any) -> None:
    for constraint, mask, _ in random_texts(vocabulary, name, value):
        assert [constraint.allows(token_id) for token_id in range(N)] == mask.tolist()


@pytest.mark.parametrize(("name", "value"), [*CASES, ("regex", "([A-Z]?[a-z]{1,12}[ ,.]){2,}")])
def test_kinds_of_tokens_change_no_mask(demo: pyengine.Model, name: str, value: Any) -> None:
    """What is decided for words as a whole is what a walk over all tokens says."""
    assert demo.tokenizer is not None
    walking = Vocabulary(demo.tokenizer.vocabulary(), demo.tokenizer.special_ids, demo.tokenizer.encode)
    walking._trie = walking._trie.with_slices([])
    work, row = Workspace(walking.vocab_size), np.zeros(walking.vocab_size, np.float32)
    for _, mask, text in random_texts(demo._vocabulary, name, value):
        other = walking.compile(name, value, [END]).fork()
        for token_id in text:
            other.accept(token_id)
        assert np.array_equal(np.isfinite(other.mask(work, row)), mask)


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


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_fork_stays_where_it_was(vocabulary: Vocabulary, name: str, value: Any) -> None:
    """It allows what its origin did then, however far that went."""
    work, row = Workspace(N), np.zeros(N, np.float32)
    forks = [(constraint.fork(), mask) for constraint, mask, _ in random_texts(vocabulary, name, value)]
    for fork, mask in forks:
        assert np.array_equal(np.isfinite(fork.mask(work, row)), mask)


def test_forks_go_their_own_way(vocabulary: Vocabulary) -> None:
    constraint = vocabulary.compile("regex", "ab|cd", []).fork()
    forks = [constraint.fork(), constraint.fork()]
    for fork, text in zip(forks, (b"ab", b"cd"), strict=True):
        assert fork.allows(text[0])
        fork.accept(text[0])
        assert [fork.allows(i) for i in b"abcd"] == [i == text[1] for i in b"abcd"]
    assert [constraint.allows(i) for i in b"abcd"] == [True, False, True, False]


REFUSED = [
    ("regex", "(", "regex: expected one that can be used, got: .*unclosed group"),
    ("regex", "(?=a)b", "regex: .*look-around"),
    ("regex", "\ud800", "regex: .*surrogate"),
    ("grammar", "start: a\na: a", "grammar: expected one that the tokens of the model can match"),
    ("json_schema", {"$ref": "#"}, "json_schema: expected one that the tokens of the model can match"),
    ("json_schema", {"const": "\ud800"}, "json_schema: expected one that can be used, got: .*hex escape"),
    ("json_schema", {"x-guidance": {"bogus": 1}}, "json_schema: .*bogus"),
    ("regex", "", "regex: expected one that allows a text of at least one token, got ''"),
    ("grammar", "start: nowhere", 'grammar: .*unknown name: "nowhere"'),
    ("grammar", "begin: /a/", "grammar: .*start"),
    ("json_schema", "{", "json_schema: expected JSON, got an error in it"),
    ("json_schema", {"type": "integer", "minimum": math.nan}, "json_schema: expected JSON, got an error in it"),
    ("json_schema", '{"a":' * 100_000, "json_schema: "),
    ("json_schema", '{"allOf":[' * 500 + "{}" + "]}" * 500, "json_schema: "),
    ("json_schema", {"type": "sometimes"}, "json_schema: .*Invalid type: sometimes"),
    ("json_schema", {"type": "array", "uniqueItems": True}, "json_schema: .*uniqueItems"),
    ("json_schema", {"if": {"type": "string"}, "then": {"maxLength": 3}}, 'json_schema: .*"if", "then"'),
    ("json_schema", {"type": "string", "format": "planet"}, "json_schema: .*Unknown format: planet"),
    ("json_schema", {"type": "string", "pattern": "(?!a)b"}, "json_schema: .*look-around"),
    ("json_schema", {"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "json_schema: .*oneOf"),
    ("json_schema", {"$ref": "http://127.0.0.1/schema"}, "json_schema: "),
    ("json_schema", {"type": "integer", "minimum": 5, "maximum": 4}, "json_schema: .*Unsatisfiable"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(
    vocabulary: Vocabulary, name: str, value: Any, message: str
) -> None:
    with pytest.raises(ArgumentError, match=f"(?s)^{message}"):
        vocabulary.compile(name, value, [END])


@pytest.mark.parametrize("value", ["[]", "3", {"a": {1, 2}}, {1: object()}])
def test_what_is_no_schema(vocabulary: Vocabulary, value: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^json_schema: expected"):
        vocabulary.compile("json_schema", value, [END])


@pytest.mark.parametrize("arguments", [{"json_schema": [1]}, {"regex": b"a"}, {"grammar": 3}, {"regex": {}}])
def test_arguments_of_a_wrong_type(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentTypeError, match=f"^{next(iter(arguments))}: expected a "):
        SamplingParams(**arguments)


def test_one_constraint_at_most() -> None:
    with pytest.raises(ArgumentError, match=r"^regex: expected none beside json_schema, got 'a'"):
        SamplingParams(json_schema={}, regex="a")


def test_a_vocabulary_that_cannot_spell_it() -> None:
    pytest.importorskip("llguidance", reason="constraints need llguidance: the extra `constrained`")
    few = Vocabulary([b"a", b"b", b"c"], [], lambda text: [ord(c) - 97 for c in text if c in "abc"])
    work, row = Workspace(3), np.zeros(3, np.float32)
    constraint: Constraint = few.compile("regex", "a[xy]|cc", []).fork()
    assert np.isfinite(constraint.mask(work, row)).tolist() == [True, False, True]
    constraint.accept(0)
    with pytest.raises(ArgumentError, match=r"^regex: expected one that the tokens of the model can match"):
        constraint.mask(work, row)
    with pytest.raises(ArgumentError, match=r"^regex: "):
        few.compile("regex", "[xy]a", [])
    with pytest.raises(ArgumentError, match=r"^regex: token 1 may not come here"):
        few.compile("regex", "ac", []).fork().accept(1)


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


def test_a_tokenizer_that_changes_the_text() -> None:
    """Where nothing but one text may follow its own spelling is asked for; not if that is of another text."""
    pytest.importorskip("llguidance", reason="constraints need llguidance: the extra `constrained`")
    tokens = [b"a", b"b", b"ab", b" ab"]
    work, row = Workspace(4), np.zeros(4, np.float32)
    for spelling in ([0, 1, 2], [3, 2], [0, 0], []):
        vocabulary = Vocabulary(tokens, [], lambda text, spelling=spelling: spelling)  # type: ignore[misc]
        constraint = vocabulary.compile("regex", "abab", []).fork()
        chosen = []
        while not constraint.complete:
            chosen.append(int(np.flatnonzero(np.isfinite(constraint.mask(work, row)))[-1]))
            constraint.accept(chosen[-1])
        assert b"".join(tokens[i] for i in chosen) == b"abab"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    model = pyengine.load("demo", threads=1)
    with pytest.raises(ArgumentError, match=r"llguidance isn't installed: pip install pyengine\[constrained\]"):
        model.generate("Once", regex="a")
    assert model.generate("Once", max_new_tokens=3, seed=0).token_ids


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


def test_characters_of_several_tokens(demo: pyengine.Model) -> None:
    for seed in range(5):
        text = demo.generate("Once", regex="[äöü🦙]{3} ", seed=seed, temperature=2.0).text
        assert re.fullmatch("[äöü🦙]{3} ", text)


def test_the_vocabulary_is_made_once(demo: pyengine.Model) -> None:
    assert demo._vocabulary is demo._vocabulary
    assert demo.tokenizer is not None
    tokens = demo.tokenizer.vocabulary()
    ids = demo.tokenizer.encode("It was a dark and stormy night 🦙")
    assert len(tokens) == demo.plan.vocab_size
    assert b"".join(tokens[i] for i in ids).decode() == demo.tokenizer.decode(ids)


def test_a_model_without_a_tokenizer(demo: pyengine.Model) -> None:
    model = pyengine.Model(demo.config, demo.dtype, Scheduler(demo.executor), None, demo.eos_token_ids)
    with pytest.raises(ArgumentError, match=r"^regex: expected none, got 'a': the checkpoint has no tokenizer"):
        model.generate([1], regex="a")
    with pytest.raises(ArgumentError, match=r"^stop_token_ids: expected token ids below 4096 .*, got 5000"):
        demo.generate([1], regex="a", stop_token_ids=[5000])

"""Vocabularies and masks: which tokens may come next, what forks know of each other, and what can't be spelled."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from constrained import CASES, END, N, ascii_vocabulary

import pyengine
from pyengine._native.sampling import Workspace
from pyengine.constraints import Constraint, Vocabulary
from pyengine.errors import ArgumentError, ArgumentTypeError
from pyengine.scheduler import Scheduler


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return ascii_vocabulary()


@pytest.fixture(scope="module")
def demo() -> pyengine.Model:
    pytest.importorskip("llguidance", reason="constraints need llguidance: the extra `constrained`")
    return pyengine.load("demo", threads=2)


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

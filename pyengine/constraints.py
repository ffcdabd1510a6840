"""Texts that must match a JSON schema, a regular expression or a grammar: which tokens may come next.

The parsing is that of llguidance, the extra `constrained`; no other module knows it. It walks the tokenizer's tokens as
a trie of bytes and gives a mask: a bit for each token. What ends a text is ours: the tokens that do so are allowed
where the text matches as it is, and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._native.sampling import Workspace
from .errors import ArgumentError, ArgumentTypeError

Masking = tuple[NDArray[np.uint32], NDArray[np.int32]]  # bits and end_ids, as `Workspace.mask` takes them

# No blanks but one after a comma or a colon: a model could go on with blanks for ever. "x-guidance" in a schema sets
# others.
JSON_DEFAULTS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}

# Kinds of tokens that are allowed or not as a whole, where a part of a constraint says so: then none of them is walked.
# The library's own are of what stands in JSON strings, up to 10 and 30 characters; these are the words among them. One
# kind has to contain another or have nothing in common with it: where some of a kind match, the others are walked.
SHORT_WORDS = [" ?[A-Za-z]{1,9}", "[a-z]{1,9}", " [a-z]{1,9}", "[A-Z][a-z]{0,8}", " [A-Z][a-z]{0,8}"]
LONG_WORDS = [" [A-Za-z]{10,20}", "[A-Za-z]{11,20}", " [a-z]{10,20}", "[a-z]{11,20}"]


class Vocabulary:
    """A tokenizer's tokens, as constraints walk them. Made once for a model: it takes a third of a second.

    `tokens` are the bytes of each, [vocab_size], none for an id without a text; `special_ids` are those that no text is
    made of; `encode` gives the token ids of a text. Raises `ArgumentError` where llguidance isn't installed.

    >>> vocabulary = Vocabulary([b"a", b"b", b"ab"], special_ids=[], encode=tokenizer.encode)
    >>> vocabulary.compile("regex", "(ab)+", end_ids=[]).fork()
    """

    def __init__(self, tokens: list[bytes], special_ids: Iterable[int], encode: Callable[[str], list[int]]) -> None:
        try:
            import llguidance
        except ImportError:
            raise ArgumentError(
                "json_schema, regex, grammar: expected none of them, since llguidance isn't installed: "
                "pip install pyengine[constrained]"
            ) from None
        library: Any = llguidance
        self._matcher = library.LLMatcher
        slices = library.LLTokenizer.general_slices() + SHORT_WORDS + LONG_WORDS
        self._trie = library.LLTokenizer(_Tokens(tokens, special_ids, encode), slices=slices)
        self.vocab_size = len(tokens)

    def compile(self, name: str, value: Any, end_ids: Iterable[int]) -> Constraint:
        """The constraint `name` ("json_schema", "regex" or "grammar") before the first token of a text.

        `value` is a dict or a str for a schema, else a str; `end_ids` are the tokens that end a text. Raises
        `ArgumentError` or `ArgumentTypeError` naming the argument, with what the library has against it.
        """
        if name == "json_schema":
            value = _schema_text(value)
        try:
            if name == "json_schema":
                grammar = self._matcher.grammar_from_json_schema(value, defaults=JSON_DEFAULTS)
            elif name == "regex":
                grammar = self._matcher.grammar_from_regex(value)
            else:
                grammar = self._matcher.grammar_from_lark(value)
            matcher = self._matcher(self._trie, grammar, log_level=0)
        except ValueError as error:  # of a lone surrogate, for one
            raise ArgumentError(f"{name}: expected one that can be used, got: {error}") from None
        if matcher.is_error():
            raise ArgumentError(f"{name}: expected one that can be used, got: {_reason(matcher)}")
        constraint = Constraint(name, matcher, frozenset(end_ids))
        if not constraint.fork().allows_any(self.vocab_size):
            raise ArgumentError(f"{name}: expected one that allows a text of at least one token, got {value!r}")
        return constraint


class Constraint:
    """A text on its way through a constraint: what may come next, and whether anything may. Made by `Vocabulary`."""

    def __init__(self, name: str, matcher: Any, ends: frozenset[int]) -> None:
        self.name = name
        self._matcher = matcher
        self._ends = ends
        self.end_ids = np.array(sorted(ends), np.int32)

    def fork(self) -> Constraint:
        """Another text with the same beginning; takes two microseconds."""
        fork = object.__new__(Constraint)
        vars(fork).update(vars(self), _matcher=self._matcher.deep_copy())
        return fork

    def mask(self, work: Workspace, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """`logits`, with -inf for tokens that may not come next: float32 [vocab_size], valid until the next call."""
        return work.mask(logits, *self.masking())

    def masking(self) -> Masking:
        """What `mask` goes by: `bits` now, and the tokens that end a text."""
        return self.bits(), self.end_ids

    def bits(self) -> NDArray[np.uint32]:
        """A bit for each token, and one more, whether the text may end here: uint32 [vocab_size // 32 + 1]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise ArgumentError(
                f"{self.name}: expected one that the tokens of the model can match, got: {_reason(self._matcher)}"
            )
        return bits

    def allows(self, token_id: int) -> bool:
        """Whether this token may come next: what `mask` says, for a part of its time."""
        allowed: bool
        if token_id in self._ends:
            allowed = self._matcher.is_accepting()
        else:
            allowed = self._matcher.validate_tokens([token_id]) == 1
        return allowed

    def accept(self, token_id: int) -> None:
        """Goes on by a token that is allowed."""
        if token_id not in self._ends and not self._matcher.consume_token(token_id):
            raise ArgumentError(f"{self.name}: token {token_id} may not come here: {_reason(self._matcher)}")

    @property
    def complete(self) -> bool:
        """Whether the text is over: it matches, and nothing may follow."""
        stopped: bool = self._matcher.is_stopped()
        return stopped

    def allows_any(self, vocab_size: int) -> bool:
        """Whether any token may come next, but for those that end the text."""
        bits = np.unpackbits(self.bits().view(np.uint8), bitorder="little", count=vocab_size)
        bits[self.end_ids] = 0
        return bool(bits.any())


class _Tokens:
    """What llguidance asks of a tokenizer. The token that ends a text is one beyond the model's."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_ids: Iterable[int], encode: Callable[[str], list[int]]) -> None:
        self.tokens = [*tokens, b""]
        self.special_token_ids = list(special_ids)
        self.eos_token_id = len(tokens)
        self._encode = encode
        self._spelled = lru_cache(maxsize=4096)(self._spell)  # the same few texts are certain again and again

    def __call__(self, text: str) -> list[int]:
        """The tokens that a certain text is made of."""
        return self._spelled(text)

    def _spell(self, text: str) -> list[int]:
        """The tokens that are asked for where the text is certain: the tokenizer's, or the longest that there are where
        it would change the text, by a normalizer or a blank before it.
        """
        token_ids, data = self._encode(text), text.encode()
        if b"".join(self.tokens[i] for i in token_ids) == data:
            return token_ids
        token_ids, longest = [], max(map(len, self._ids), default=0)
        while data:
            n = next((n for n in range(min(len(data), longest), 0, -1) if data[:n] in self._ids), len(data))
            token_ids += [self._ids[data[:n]]] if data[:n] in self._ids else []  # nothing else if it can't be spelled
            data = data[n:]
        return token_ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {token: i for i, token in enumerate(self.tokens) if token and i not in special}


def _schema_text(schema: object) -> str:
    """A schema as JSON."""
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"json_schema: expected JSON, got an error in it: {error}") from None
    except TypeError as error:
        raise ArgumentTypeError(f"json_schema: expected what JSON can hold, got: {error}") from None
    if not isinstance(schema, dict):
        raise ArgumentTypeError(f"json_schema: expected a dict, or a str of a JSON object, got {schema!r}")
    return text


def _reason(matcher: Any) -> str:
    """The library's message, without the state of its parser."""
    message: str = matcher.get_error()
    return message.split("<state>")[0].strip()

"""Text ↔ token ids: the byte-level BPE of GPT-2 (Radford et al. 2019), encoded by the tokenizers library.

A token of a byte-level BPE is a string of bytes. Encoding is the library's. Decoding is its rule written out: the
tokens' bytes in a row, read as UTF-8, with U+FFFD for what isn't. So a text can be decoded token by token, in constant
time for each, and comes out the same.
"""

from __future__ import annotations

import codecs
import operator
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from .checkpoint import read_file, read_json, show
from .errors import ArgumentError, ArgumentTypeError, CheckpointError

MAX_FILE = 100_000_000  # bytes of a tokenizer file

# Normalizers without a pattern of their own: a regular expression from a file could take exponential time.
NORMALIZERS = (normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD)

# How byte-level BPE writes a byte as a character: as itself if Latin-1 prints it, else shifted past U+0100, in order.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_SHIFTED = [byte for byte in range(0x100) if byte not in _PRINTED]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + i): byte for i, byte in enumerate(_SHIFTED)}


class Tokenizer:
    """A checkpoint's tokenizer.

    >>> tokenizer = Tokenizer.from_folder("gpt2", vocab_size=50257)
    >>> tokenizer.encode("Hello world")
    [15496, 995]
    >>> tokenizer.decode([15496, 995])
    'Hello world'
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        self._backend = backend
        self._lock = threading.Lock()  # the library keeps what to do with special tokens as a state
        self.special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = vocab_size  # the model's: ids that it has beyond the tokenizer's stand for no text
        self._spelled: dict[int, bytes] = {}  # what tokens stand for that have come up

    @classmethod
    def from_folder(cls, folder: str | Path, vocab_size: int) -> Tokenizer | None:
        """The tokenizer in tokenizer.json, else in vocab.json and merges.txt; None if the folder has none of them.

        `vocab_size` is the model's: a tokenizer with ids beyond it is refused. Raises `CheckpointError` or
        `CheckpointFileError` naming the file.
        """
        folder = Path(folder)
        if os.path.lexists(folder / "tokenizer.json"):
            source = "tokenizer.json"
            backend = _read_tokenizer(folder)
        elif os.path.lexists(folder / "vocab.json") or os.path.lexists(folder / "merges.txt"):
            source = "vocab.json"
            backend = _read_vocab_and_merges(folder)
        else:
            return None
        _check_vocab(backend, vocab_size, folder / source)
        if os.path.lexists(folder / "tokenizer_config.json"):
            add = read_json(folder, "tokenizer_config.json").get("add_prefix_space")
            if add is not None and not isinstance(add, bool):
                raise CheckpointError(
                    f"{folder / 'tokenizer_config.json'}: add_prefix_space: expected true or false, got {show(add)}"
                )
            if add is not None:
                backend.pre_tokenizer.add_prefix_space = add
        return cls(backend, vocab_size)

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """The token ids of `text`; none are added before or after.

        A special token spelled out in the text, such as <|endoftext|>, becomes its id, as in transformers. With
        allow_special=False it is text like any other: right for text that isn't trusted. Raises `ArgumentTypeError` for
        what isn't a str and `ArgumentError` for a lone surrogate, which has no UTF-8.
        """
        if not isinstance(text, str):
            raise ArgumentTypeError(f"text: expected a str, got {show(text)}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"text: expected Unicode text, got the lone surrogate {text[error.start]!r} at {error.start}"
            ) from None
        with self._lock:
            self._backend.encode_special_tokens = not allow_special
            return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `token_ids`, with U+FFFD in place of bytes that aren't UTF-8.

        Raises `ArgumentTypeError` for an id that isn't an integer and `ArgumentError` for one outside the vocabulary.
        """
        try:
            ids = iter(token_ids)
        except TypeError:
            raise ArgumentTypeError(f"token_ids: expected integers, got {show(token_ids)}") from None
        return b"".join(self._bytes(token_id, skip_special_tokens) for token_id in ids).decode("utf-8", "replace")

    def stream(self, skip_special_tokens: bool = False) -> TokenStream:
        """A new `TokenStream`, which decodes one token at a time."""
        return TokenStream(self, skip_special_tokens)

    def vocabulary(self) -> list[bytes]:
        """The bytes of every token, [vocab_size]; none for an id that only the model has."""
        return [self._bytes(token_id, skip_special_tokens=False) for token_id in range(self.vocab_size)]

    def _bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """The bytes that a token stands for; none for an id that only the model has."""
        try:
            index = operator.index(token_id)
        except TypeError:
            raise ArgumentTypeError(f"token id: expected an integer, got {show(token_id)}") from None
        if isinstance(token_id, bool):
            raise ArgumentTypeError(f"token id: expected an integer, got {token_id}")
        if not 0 <= index < self.vocab_size:
            raise ArgumentError(f"token id: expected 0 to {self.vocab_size - 1}, got {show(index)}")
        if skip_special_tokens and index in self.special_ids:
            return b""
        if index not in self._spelled:
            self._spelled[index] = _spelling(self._backend.id_to_token(index))
        return self._spelled[index]


def _spelling(token: str | None) -> bytes:
    """The bytes of a token as the vocabulary writes it."""
    if token is None:
        return b""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:  # an added token, spelled as it is
        return token.encode("utf-8")


class TokenStream:
    """Decodes token by token: the pieces in a row are what `Tokenizer.decode` makes of all the ids.

    Bytes that may be the start of a character wait for the rest, so a piece may be empty; `flush` gives what is left.

    >>> stream = tokenizer.stream()
    >>> [stream.push(token_id) for token_id in tokenizer.encode("½ 🦙")] + [stream.flush()]
    ['½', ' ', '', '🦙', '']
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # keeps three bytes at most

    def push(self, token_id: int) -> str:
        """The text that is certain now; raises as `Tokenizer.decode`."""
        return self._decoder.decode(self._tokenizer._bytes(token_id, self._skip_special_tokens))

    def flush(self) -> str:
        """The text of the bytes that still wait, as there is no more to come; the stream can be used anew."""
        return self._decoder.decode(b"", final=True)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what the tokenizers library raises into a `CheckpointError` that names the file."""
    try:
        yield
    except BaseException as error:
        # The library raises plain Exceptions; for a panic a BaseException whose class can't be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path}: expected a tokenizer, got an error in it: {error}") from error


def _read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    data = read_file(folder, "tokenizer.json", MAX_FILE)
    with _refusing(path):
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    backend.no_truncation()
    backend.no_padding()
    for part, value, known in (
        ("model", backend.model, (models.BPE,)),
        ("normalizer", backend.normalizer, (type(None), *NORMALIZERS)),
        ("pre_tokenizer", backend.pre_tokenizer, (pre_tokenizers.ByteLevel,)),
        ("decoder", backend.decoder, (decoders.ByteLevel,)),
    ):
        if not isinstance(value, known):
            expected, got = " or ".join(kind.__name__ for kind in known), type(value).__name__
            raise CheckpointError(f"{path}: {part}: expected {expected}, got {got}".replace("NoneType", "null"))
    if backend.model.dropout:
        raise CheckpointError(f"{path}: model.dropout: expected none, got {backend.model.dropout}")
    return backend


def _read_vocab_and_merges(folder: Path) -> tokenizers.Tokenizer:
    vocab = read_json(folder, "vocab.json", MAX_FILE)
    path = folder / "merges.txt"
    data = read_file(folder, "merges.txt", MAX_FILE)
    with _refusing(path):
        lines = data.decode("utf-8").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        pair = line.rstrip("\r").split(" ")
        if line.startswith("#version") or pair == [""]:
            continue
        if len(pair) != 2:
            raise CheckpointError(f"{path}: line {number}: expected two tokens, got {show(line)}")
        merges.append((pair[0], pair[1]))
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise CheckpointError(f"{folder / 'vocab.json'}: {show(token)}: expected a token id, got {show(token_id)}")
    with _refusing(path):
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if "<|endoftext|>" in vocab:
        backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _check_vocab(backend: tokenizers.Tokenizer, vocab_size: int, path: Path) -> None:
    # As many ids as tokens: no two share one, and none is beyond. A dictionary of all takes half as long again.
    if list(map(backend.id_to_token, range(vocab_size))).count(None) == vocab_size - backend.get_vocab_size():
        return
    vocab = backend.get_vocab()
    token_of = {token_id: token for token, token_id in vocab.items()}
    if len(token_of) < len(vocab):
        token, token_id = next((token, i) for token, i in vocab.items() if token_of[i] != token)
        raise CheckpointError(
            f"{path}: token id {token_id}: expected one token, got {show(token)} and {show(token_of[token_id])}"
        )
    highest = max(token_of, default=-1)
    if highest >= vocab_size:
        raise CheckpointError(
            f"{path}: {show(token_of[highest])}: expected a token id below the model's vocab_size, {vocab_size}, "
            f"got {highest}"
        )

"""Text ↔ token ids against the reference vectors, against the tokenizers library, and with everything that is wrong."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from checkpoints import TEXT, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointFileError
from pyengine.tokenizer import Tokenizer

VOCAB_SIZE = 300  # of the model; train_tokenizer fills it but for the ids that added tokens take
LAYOUTS = ("tokenizer.json", "vocab.json + merges.txt")


def write_layout(folder: Path, layout: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """Write the small trained tokenizer, after `change`, into `folder` in one of the layouts."""
    parsed = json.loads(train_tokenizer(290))
    change(parsed)
    if layout == "tokenizer.json":
        (folder / "tokenizer.json").write_text(json.dumps(parsed))
    else:
        (folder / "vocab.json").write_text(json.dumps(parsed["model"]["vocab"]))
        merges = [" ".join(pair) for pair in parsed["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


def load(folder: Path, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder, vocab_size)
    assert tokenizer is not None
    return tokenizer


def streamed(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool = False) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens)
    return [*(stream.push(token_id) for token_id in token_ids), stream.flush()]


@pytest.fixture(scope="module", params=LAYOUTS)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write_layout(tmp_path_factory.mktemp("small"), request.param))


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """A tokenizer with added tokens of all kinds, and the library's own for comparison."""
    library = tokenizers.Tokenizer.from_str(train_tokenizer(290))
    library.add_special_tokens(["<|é|>", "<|日|>"])
    library.add_tokens(["é", "日本", "a b", "Ġ", " "])
    folder = tmp_path_factory.mktemp("added")
    library.save(str(folder / "tokenizer.json"))
    return load(folder), library


# --- the reference vectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpt2_vectors(layout: str, shared: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if name in layout:
            shutil.copy(shared / "data/gpt2-tokenizer" / name, tmp_path)
    tokenizer = load(tmp_path, 50257)
    vectors = shared / "data/tokenizer-vectors/ggml-vocab-gpt-2.gguf"
    texts = vectors.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = vectors.with_suffix(".gguf.out").read_text().split("\n")
    expected = [[int(token_id) for token_id in line.split()] for line in lines[: len(texts)]]
    assert len(texts) == 47
    for text, token_ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text) == token_ids, text
        assert tokenizer.decode(token_ids) == text
        assert "".join(streamed(tokenizer, token_ids)) == text


# --- encode ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(small: Tokenizer, text: str) -> None:
    for allow_special in (True, False):
        token_ids = small.encode(text, allow_special)
        assert small.decode(token_ids) == text
        assert all(0 <= token_id < VOCAB_SIZE for token_id in token_ids)


def test_nothing_is_added_and_merges_are_used(small: Tokenizer) -> None:
    assert small.encode("") == []
    assert len(small.encode(TEXT)) < 0.8 * len(TEXT)
    assert small.encode("e") == [small.encode("ex")[0]]


def test_special_tokens_in_text_become_ids_unless_forbidden(small: Tokenizer) -> None:
    text = "a<|endoftext|>b"
    token_ids = small.encode(text)
    assert token_ids[1] == 0
    assert len(token_ids) == 3
    plain = small.encode(text, allow_special=False)
    assert 0 not in plain
    assert small.decode(plain) == text
    assert small.encode(text) == token_ids  # the choice isn't remembered


@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_prefix_space_is_honoured(layout: str, tmp_path: Path) -> None:
    write_layout(tmp_path, layout)
    without, with_space = load(tmp_path).encode("the"), load(tmp_path).encode(" the")
    assert without != with_space
    for value, expected in ((True, with_space), (False, without), (None, without)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": value}))
        assert load(tmp_path).encode("the") == expected
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": "yes"}')
    with pytest.raises(CheckpointError, match=r"config\.json: add_prefix_space: expected true or false, got 'yes'"):
        load(tmp_path)


def test_add_prefix_space_of_tokenizer_json_stands_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    write_layout(tmp_path, "tokenizer.json", lambda parsed: parsed["pre_tokenizer"].update(add_prefix_space=True))
    assert load(tmp_path).decode(load(tmp_path).encode("the")) == " the"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": False, "model_max_length": 10**30}))
    assert load(tmp_path).decode(load(tmp_path).encode("the")) == "the"


def test_a_template_of_special_tokens_is_not_filled_in(tmp_path: Path) -> None:
    special = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    write_layout(tmp_path, "tokenizer.json", lambda parsed: parsed.update(post_processor={
        "type": "TemplateProcessing", "single": [special, sequence], "pair": [sequence, sequence],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }))  # fmt: skip
    assert 0 not in load(tmp_path).encode(TEXT)


def test_truncation_and_padding_are_for_training(tmp_path: Path) -> None:
    write_layout(tmp_path, "tokenizer.json", lambda parsed: parsed.update(
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    ))  # fmt: skip
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("text", [None, 3, b"text", ["text"], 1.5])
def test_text_of_a_wrong_type_is_refused(small: Tokenizer, text: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="text: expected a str, got"):
        small.encode(text)


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "\ud83e\udd99"])
def test_a_lone_surrogate_is_refused(small: Tokenizer, text: str) -> None:
    with pytest.raises(ArgumentError, match=r"text: expected Unicode text, got the lone surrogate '\\ud"):
        small.encode(text)


@pytest.mark.parametrize("text", ["^" * 10**6, "A" * 10**6, " " * 10**6, "\0" * 10**5, "a " * 10**5])
def test_long_runs_encode(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


# --- decode and stream -----------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(token_ids=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=40), skip=st.booleans())
def test_a_stream_says_what_decode_says_and_what_the_library_says(
    added: tuple[Tokenizer, tokenizers.Tokenizer], token_ids: list[int], skip: bool
) -> None:
    tokenizer, library = added
    text = tokenizer.decode(token_ids, skip)
    assert text == library.decode(token_ids, skip_special_tokens=skip)
    assert "".join(streamed(tokenizer, token_ids, skip)) == text


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_stream_as_they_decode(small: Tokenizer, seed: int) -> None:
    """Tokens of single bytes, most of them beyond ASCII: broken and whole characters of all lengths occur."""
    byte_ids = list(range(1, 257))
    draw = random.Random(seed)
    bytes_of = {token_id: small._bytes(token_id, False) for token_id in byte_ids}
    assert sorted(bytes_of.values()) == [bytes([byte]) for byte in range(256)]
    high = [token_id for token_id in byte_ids if bytes_of[token_id] >= b"\x80"]
    for _ in range(2000):
        token_ids = draw.choices(high if draw.random() < 0.7 else byte_ids, k=draw.randint(0, 12))
        expected = b"".join(bytes_of[token_id] for token_id in token_ids).decode("utf-8", "replace")
        assert small.decode(token_ids) == expected
        assert "".join(streamed(small, token_ids)) == expected


def test_no_piece_has_half_a_character(small: Tokenizer) -> None:
    id_of = {small._bytes(token_id, False): token_id for token_id in range(1, 257)}
    for char in "é½日🦙\u07ff\u0800\uffff\U00010000\U0010ffff":
        token_ids = [id_of[bytes([byte])] for byte in char.encode()]
        assert streamed(small, token_ids) == [""] * (len(token_ids) - 1) + [char, ""]
        assert streamed(small, token_ids[:-1]) == [""] * (len(token_ids) - 1) + ["\ufffd"]


def test_a_stream_waits_for_at_most_three_bytes_and_starts_anew_after_flush(small: Tokenizer) -> None:
    stream = small.stream()
    token_ids = small.encode("🦙") * 1000
    for token_id in token_ids[:-1]:
        stream.push(token_id)
        waiting, _ = stream._decoder.getstate()
        assert len(waiting) <= 3
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert "".join(stream.push(token_id) for token_id in small.encode("½")) == "½"


def test_special_tokens_are_skipped_on_request_and_part_characters(small: Tokenizer) -> None:
    llama = small.encode("🦙")
    token_ids = [0, *llama[:2], 0, *llama[2:], 0]
    assert small.decode(token_ids, skip_special_tokens=True) == "🦙"
    assert "".join(streamed(small, token_ids, skip_special_tokens=True)) == "🦙"
    assert small.decode(token_ids) == "<|endoftext|>\ufffd<|endoftext|>\ufffd\ufffd<|endoftext|>"
    assert "".join(streamed(small, token_ids)) == small.decode(token_ids)


def test_ids_that_only_the_model_has_stand_for_no_text(small: Tokenizer) -> None:
    assert small.vocab_size == VOCAB_SIZE
    token_ids = small.encode("🦙")
    assert small.decode([token_ids[0], VOCAB_SIZE - 1, *token_ids[1:]]) == "🦙"


def test_ids_may_come_from_numpy_or_a_generator(small: Tokenizer) -> None:
    token_ids = small.encode(TEXT)
    assert small.decode(np.array(token_ids)) == TEXT
    assert small.decode(token_id for token_id in token_ids) == TEXT


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**32, 2**64, -(2**70), np.int64(VOCAB_SIZE)])
def test_an_id_outside_the_vocabulary_is_refused(small: Tokenizer, token_id: int) -> None:
    calls: list[Callable[[], str]] = [lambda: small.decode([1, token_id]), lambda: small.stream().push(token_id)]
    for call in calls:
        with pytest.raises(ArgumentError, match=f"token id: expected 0 to {VOCAB_SIZE - 1}, got {int(token_id)}"):
            call()


@pytest.mark.parametrize("token_id", [None, 1.0, "1", True, np.float32(1), [1]])
def test_an_id_that_is_no_integer_is_refused(small: Tokenizer, token_id: Any) -> None:
    calls: list[Callable[[], str]] = [lambda: small.decode([1, token_id]), lambda: small.stream().push(token_id)]
    for call in calls:
        with pytest.raises(ArgumentTypeError, match="token id: expected an integer, got"):
            call()


@pytest.mark.parametrize("token_ids", [None, 3])
def test_ids_that_are_no_list_are_refused(small: Tokenizer, token_ids: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=f"token_ids: expected integers, got {token_ids}"):
        small.decode(token_ids)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert Tokenizer.from_folder(tmp_path, VOCAB_SIZE) is None
    assert Tokenizer.from_folder(str(tmp_path), VOCAB_SIZE) is None


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    write_layout(tmp_path, LAYOUTS[0])
    (tmp_path / "vocab.json").write_text("broken")
    assert load(tmp_path).encode("<|endoftext|>") == [0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tokenizer_bigger_than_the_model_is_refused(layout: str, tmp_path: Path) -> None:
    write_layout(tmp_path, layout)
    assert load(tmp_path, 290).vocab_size == 290
    name = layout.split()[0]
    with pytest.raises(CheckpointError, match=rf"{name}: .*below the model's vocab_size, 289, got 289"):
        load(tmp_path, 289)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_id_of_two_tokens_is_refused(layout: str, tmp_path: Path) -> None:
    write_layout(tmp_path, layout, lambda parsed: parsed["model"]["vocab"].update(zzzz=7))
    with pytest.raises(CheckpointError, match=r"token id 7: expected one token, got ('zzzz' and|.* and 'zzzz')"):
        load(tmp_path)


def model(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda parsed: parsed["model"].update(changes)


# fmt: off
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no model": (lambda parsed: parsed.pop("model"), "Model missing"),
    "no vocab": (lambda parsed: parsed["model"].pop("vocab"), "Missing vocab"),
    "unknown model": (model(type="WAT"), "expected a tokenizer"),
    "another model": (lambda parsed: parsed.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
                      "model: expected BPE, got WordLevel"),
    "merge of unknown tokens": (model(merges=[["qqq", "zzz"]]), "qqq"),
    "merge into an unknown token": (model(merges=[["q", "q"]]), "qq"),
    "merge of one token": (model(merges=["abc"]), "expected a tokenizer"),
    "negative id": (lambda parsed: parsed["model"]["vocab"].update(a=-1), "-1"),
    "id over 2^32": (lambda parsed: parsed["model"]["vocab"].update(a=2**32), "4294967296"),
    "dropout": (model(dropout=0.5), "model.dropout: expected none, got 0.5"),
    "word prefix that panics": (model(continuing_subword_prefix="x" * 50), "expected a tokenizer"),
    "a regular expression": (
        lambda parsed: parsed.update(pre_tokenizer={
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
        "pre_tokenizer: expected ByteLevel, got Split"),
    "a regular expression in the normalizer": (
        lambda parsed: parsed.update(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}),
        "normalizer: expected null or NFC or NFD or NFKC or NFKD, got Replace"),
    "no pre_tokenizer": (lambda parsed: parsed.update(pre_tokenizer=None),
                         "pre_tokenizer: expected ByteLevel, got null"),
    "no decoder": (lambda parsed: parsed.update(decoder=None), "decoder: expected ByteLevel, got null"),
    "another decoder": (lambda parsed: parsed.update(decoder={"type": "Fuse"}),
                        "decoder: expected ByteLevel, got Fuse"),
}
# fmt: on


@pytest.mark.parametrize("case", BROKEN)
def test_a_tokenizer_json_that_cannot_be_honoured_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, part = BROKEN[case]
    write_layout(tmp_path, "tokenizer.json", change)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert part in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"{", b"\xff", b"[" * 100_000, b"null", b"\x80\x04."])
def test_a_broken_tokenizer_json_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer, got an error"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "part"),
    [
        ("vocab.json", b"[]", "expected a JSON object"),
        ("vocab.json", b'{"a": 0, "a": 1}', "duplicate key 'a'"),
        ("vocab.json", b'{"a": true}', "'a': expected a token id, got True"),
        ("vocab.json", b'{"a": 1.0}', "'a': expected a token id, got 1.0"),
        ("vocab.json", b'{"a": -1}', "'a': expected a token id, got -1"),
        ("vocab.json", b'{"a": 4294967296}', "'a': expected a token id, got 4294967296"),
        ("merges.txt", b"a b c", "line 1: expected two tokens, got 'a b c'"),
        ("merges.txt", b"#version: 0.2\nt h\nabc\n", "line 3: expected two tokens, got 'abc'"),
        ("merges.txt", b"qqq zzz", "qqq"),
        ("merges.txt", b"\xff", "utf-8"),
    ],
)
def test_a_broken_vocab_or_merges_is_refused_by_name(name: str, data: bytes, part: str, tmp_path: Path) -> None:
    write_layout(tmp_path, LAYOUTS[1])
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert part in str(caught.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_vocab_without_merges_or_merges_without_vocab_is_refused(name: str, tmp_path: Path) -> None:
    write_layout(tmp_path, LAYOUTS[1])
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointFileError, match=name):
        load(tmp_path)


def test_merges_with_windows_line_ends_load(tmp_path: Path) -> None:
    write_layout(tmp_path, LAYOUTS[1])
    expected = load(tmp_path).encode(TEXT)
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert load(tmp_path).encode(TEXT) == expected


def test_both_layouts_agree(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, layout in zip((one, other), LAYOUTS, strict=True):
        folder.mkdir()
        write_layout(folder, layout)
    assert load(one).encode(TEXT + "<|endoftext|>\n½ 🦙") == load(other).encode(TEXT + "<|endoftext|>\n½ 🦙")

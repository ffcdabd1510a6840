"""Bad input: an error of the right type that names the thing, what was expected, what came; nothing stays in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import rewrite, stored, write_checkpoint
from numpy.typing import NDArray

import pyengine
from pyengine import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointFileError

Tensors = dict[str, tuple[str, NDArray[Any]]]
BUILT_IN = {
    ArgumentError: ValueError,
    ArgumentTypeError: TypeError,
    CheckpointError: ValueError,
    CheckpointFileError: OSError,
}


def refuses(error: type[Exception], parts: tuple[str, ...], call: Callable[[], object]) -> None:
    """The call raises `error`, which is a pyengine.Error and the built-in that fits; its message has all the parts."""
    with pytest.raises(error) as caught, warnings.catch_warnings(action="error"):
        call()
    assert isinstance(caught.value, pyengine.Error)
    assert isinstance(caught.value, BUILT_IN[error])
    for part in parts:
        assert part in str(caught.value)


# What is wrong with a folder, and what the message says.


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return change


def tensors(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


C_ATTN = "h.1.attn.c_attn.weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], type[Exception], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointFileError, ("{folder}/config.json",)),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        CheckpointFileError,
        ("{folder}: expected model.safetensors or model.safetensors.index.json, got neither",),
    ),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        CheckpointError,
        ("{folder}/config.json: expected a JSON object, got ",),
    ),
    "model_type": (config(model_type="gpt9"), CheckpointError, ("model_type: expected one of gpt2, got 'gpt9'",)),
    "no model_type": (config(model_type=None), CheckpointError, ("model_type: expected one of gpt2, got None",)),
    "n_head": (config(n_head=5), CheckpointError, ("n_embd: expected a multiple of n_head (5), got 32",)),
    "n_layer": (config(n_layer=10**9), CheckpointError, ("n_layer: expected an integer from 1 to ", "got 1000000000")),
    "vocab_size": (config(vocab_size=0), CheckpointError, ("vocab_size: expected an integer from 1 to ", "got 0")),
    "activation": (
        config(activation_function="gelu_newer"),
        CheckpointError,
        ("activation_function: expected one of gelu, ", "got 'gelu_newer'"),
    ),
    "epsilon": (
        config(layer_norm_epsilon=-1),
        CheckpointError,
        ("layer_norm_epsilon: expected a number above 0, got -1",),
    ),
    "flag": (
        config(tie_word_embeddings="no"),
        CheckpointError,
        ("tie_word_embeddings: expected true or false, got 'no'",),
    ),
    "quantised": (config(quantization_config={"bits": 4}), CheckpointError, ("quantization_config: expected none",)),
    "missing tensor": (
        tensors(lambda t: t.pop("h.0.ln_1.bias")),
        CheckpointError,
        ("{folder}: missing 1 tensor: 'h.0.ln_1.bias'",),
    ),
    "extra tensor": (
        tensors(lambda t: t.update({"h.0.adapter": t["h.0.ln_1.bias"]})),
        CheckpointError,
        ("{folder}: expected a gpt2 alone, got also 1 tensor: 'h.0.adapter'",),
    ),
    "misshapen tensor": (
        tensors(lambda t: t.update({C_ATTN: ("F32", np.ascontiguousarray(t[C_ATTN][1].T))})),
        CheckpointError,
        (f"tensor '{C_ATTN}': shape: expected [32, 96], got [96, 32]",),
    ),
    "wrong dtype": (
        tensors(lambda t: t.update({C_ATTN: ("I32", t[C_ATTN][1].astype(np.int32))})),
        CheckpointError,
        (f"tensor '{C_ATTN}': dtype: expected one of F32, F16, BF16, got I32",),
    ),
    "truncated file": (truncated, CheckpointError, ("{folder}/model.safetensors: expected ", "the file is truncated")),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("[]"),
        CheckpointError,
        ("{folder}/tokenizer.json: expected a tokenizer",),
    ),
}


@pytest.mark.parametrize(("change", "error", "parts"), FOLDERS.values(), ids=FOLDERS)
def test_folder(
    tmp_path: Path, change: Callable[[Path], object], error: type[Exception], parts: tuple[str, ...]
) -> None:
    write_checkpoint(tmp_path)
    pyengine.load(tmp_path, threads=1)
    change(tmp_path)
    refuses(error, tuple(part.replace("{folder}", str(tmp_path)) for part in parts), lambda: pyengine.load(tmp_path))


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def untied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder whose weights are stored in that dtype."""
    folder = tmp_path_factory.mktemp("untied")
    write_checkpoint(folder, {"tie_word_embeddings": False}, dtype=request.param)
    return folder, request.param


NOT_FINITE = [
    ("wte.weight", (0, 0)),  # "out_in"
    ("wte.weight", (299, 31)),
    ("lm_head.weight", (17, 3)),
    (C_ATTN, (0, 0)),  # "in_out"
    (C_ATTN, (31, 95)),
    ("h.0.attn.c_proj.weight", (4, 9)),
    ("h.1.mlp.c_fc.weight", (30, 64)),
    ("h.0.mlp.c_proj.weight", (127, 0)),
    ("wpe.weight", (63, 31)),
    ("h.1.ln_2.weight", (31,)),
    ("h.0.attn.c_attn.bias", (70,)),
    ("ln_f.bias", (0,)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "index"), NOT_FINITE)
def test_not_finite(
    untied: tuple[Path, str],
    tmp_path: Path,
    name: str,
    index: tuple[int, ...],
    value: float,
    dtype: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyengine.weights.SLAB_BYTES", 1000)  # a few rows: the bad one is in another slab
    folder, stored_dtype = untied
    spoil(folder, tmp_path, name, index, stored(np.array([value], np.float32), stored_dtype)[1])
    parts = (f"{tmp_path}/model.safetensors: {name}{list(index)}: expected a finite number, got {value}",)
    refuses(CheckpointError, parts, lambda: pyengine.load(tmp_path, dtype=dtype, threads=2))


def spoil(source: Path, folder: Path, name: str, index: tuple[int, ...], value: NDArray[Any]) -> None:
    """Copies a checkpoint with one element of one tensor replaced, as stored."""
    data = bytearray((source / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    start = 8 + length + entry["data_offsets"][0] + int(np.ravel_multi_index(index, entry["shape"])) * value.nbytes
    data[start : start + value.nbytes] = value.tobytes()
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())


# What is wrong with an argument.

LOAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"dtype": "int3"}, ArgumentError, "dtype: expected one of float32, bfloat16, int8, int4, got 'int3'"),
    "no dtype": ({"dtype": None}, ArgumentError, "dtype: expected one of float32, bfloat16, int8, int4, got None"),
    "kv_dtype": (
        {"model": "/no/such/folder", "kv_dtype": "int4"},
        ArgumentError,
        "kv_dtype: expected one of float32, bfloat16, int8, got 'int4'",
    ),
    "threads 0": ({"threads": 0}, ArgumentError, "threads: expected 1..1024, got 0"),
    "threads -1": ({"threads": -1}, ArgumentError, "threads: expected 1..1024, got -1"),
    "threads True": ({"threads": True}, ArgumentTypeError, "threads: expected an integer, got True"),
    "threads str": ({"threads": "2"}, ArgumentTypeError, "threads: expected an integer, got '2'"),
    "model": ({"model": 3}, ArgumentTypeError, "model: expected a folder or a model id, got 3"),
    "folder": ({"model": "/no/such/folder"}, CheckpointFileError, "/no/such/folder: expected a checkpoint's folder"),
    "file": ({"model": __file__}, CheckpointFileError, f"{__file__}: expected a checkpoint's folder, got a file"),
    "long name": ({"model": "x" * 5000}, CheckpointFileError, "xxx: expected a folder, 'demo', or a model id"),
    "NUL": ({"model": "a\0b"}, CheckpointFileError, "expected a folder, 'demo', or a model id"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), LOAD.values(), ids=LOAD)
def test_load(arguments: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses(error, (message,), lambda: pyengine.load(**arguments))


def test_model_id_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if not installed
    parts = ("openai-community/gpt2: expected a folder, 'demo', or a model id", "pip install pyengine[hub]")
    refuses(CheckpointFileError, parts, lambda: pyengine.load("openai-community/gpt2"))


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("lots", "0", "1.5", "1025"):
        monkeypatch.setenv("PYENGINE_NUM_THREADS", value)
        message = f"PYENGINE_NUM_THREADS: expected 1..1024, got '{value}'"
        refuses(ArgumentError, (message,), lambda: pyengine.load("demo"))


def test_unknown_simd_level() -> None:
    """In a process of its own: the level is chosen once."""
    code = "import pyengine\ntry: pyengine.load('demo')\nexcept pyengine.ArgumentError as error: print(error)"
    environment = os.environ | {"PYENGINE_ISA": "sse9", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "expected one of " in done.stdout
    assert "portable" in done.stdout
    assert done.stdout.endswith("got 'sse9'\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pyengine.Model:
    return pyengine.load(write_checkpoint(tmp_path_factory.mktemp("tiny")), threads=1)


IDS = "expected a list of token ids, got"
PROMPTS: dict[str, tuple[Any, type[Exception], str]] = {
    "empty text": ("", ArgumentError, "prompt: expected at least one token, got"),
    "no tokens": ([], ArgumentError, "prompt: expected at least one token, got"),
    "one of no tokens": ([[1], []], ArgumentError, "prompt[1]: expected at least one token, got"),
    "too large": ([1, 300], ArgumentError, "prompt: expected token ids from 0 to 299, got 300 at position 1"),
    "far too large": ([2**70], ArgumentError, f"prompt: expected token ids from 0 to 299, got {2**70} at position 0"),
    "negative": ([-1], ArgumentError, "prompt: expected token ids from 0 to 299, got -1 at position 0"),
    "too long": ([1] * 65, ArgumentError, "prompt: expected 1 to 64 tokens (the context), got 65"),
    "too long a text": ("word " * 300, ArgumentError, "prompt: expected 1 to 64 tokens (the context), got "),
    "None": (None, ArgumentTypeError, "prompt: expected a str, a list of token ids, or a list of either, got NoneType"),
    "number": (3.5, ArgumentTypeError, "prompt: expected a str, a list of token ids, or a list of either, got float"),
    "iterator": (iter([1]), ArgumentTypeError, "prompt: expected a str, a list of token ids, or a list of either"),
    "set": ({1, 2}, ArgumentTypeError, "prompt: expected a str, a list of token ids, or a list of either, got set"),
    "dict": ({"a": 1}, ArgumentTypeError, "prompt: expected a str, a list of token ids, or a list of either, got dict"),
    "bytes": (b"abc", ArgumentTypeError, f"prompt: {IDS} bytes"),
    "list of floats": ([1.5], ArgumentTypeError, f"prompt[0]: {IDS} float"),
    "list of None": ([None], ArgumentTypeError, f"prompt[0]: {IDS} NoneType"),
    "list of bools": ([True], ArgumentTypeError, f"prompt: {IDS} True at position 0"),
    "list of lists of str": ([["a"]], ArgumentTypeError, f"prompt[0]: {IDS} 'a' at position 0"),
    "ids and a str": ([1, "a"], ArgumentTypeError, f"prompt: {IDS} 'a' at position 1"),
    "a str and ids": (["a", 1], ArgumentTypeError, f"prompt[1]: {IDS} int"),
    "array of floats": (np.array([1.0]), ArgumentTypeError, f"prompt[0]: {IDS} float64"),
    "lone surrogate": ("a\ud800", ArgumentError, "text: expected Unicode text, got the lone surrogate '\\ud800' at 1"),
}


@pytest.mark.parametrize(("prompt", "error", "message"), PROMPTS.values(), ids=PROMPTS)
def test_prompt(model: pyengine.Model, prompt: Any, error: type[Exception], message: str) -> None:
    refuses(error, (message,), lambda: model.generate(prompt, max_new_tokens=2))
    refuses(error, (message,), lambda: model.generate(prompt, max_new_tokens=2, num_beams=2))
    assert model.executor.pool.n_used == 0


@pytest.mark.parametrize("prompt", ["", [], None, 3.5, [1.5], [["a"]], ["a"], [1, "a"], [300], [-1], [True], b"abc"])
def test_prompt_of_what_takes_one(model: pyengine.Model, prompt: Any) -> None:
    for call, name in ((model.stream, "prompt"), (model.score, "text"), (model.logits, "text")):
        with pytest.raises(pyengine.Error, match=f"^{name}: expected ") as caught:
            call(prompt)
        assert isinstance(caught.value, ValueError | TypeError)


def test_too_long_for_logits(model: pyengine.Model) -> None:
    refuses(ArgumentError, ("expected 1 to 64 tokens (the context), got 65",), lambda: model.logits([1] * 65))


PARAMS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "temperature -0.1": ({"temperature": -0.1}, ArgumentError, "temperature: expected at least 0, got -0.1"),
    "temperature nan": ({"temperature": np.nan}, ArgumentError, "temperature: expected at least 0, got nan"),
    "temperature str": ({"temperature": "1"}, ArgumentTypeError, "temperature: expected a number, got '1'"),
    "top_p 0": ({"top_p": 0}, ArgumentError, "top_p: expected above 0 and at most 1, got 0"),
    "top_p 1.5": ({"top_p": 1.5}, ArgumentError, "top_p: expected above 0 and at most 1, got 1.5"),
    "top_p nan": ({"top_p": np.nan}, ArgumentError, "top_p: expected above 0 and at most 1, got nan"),
    "top_k": ({"top_k": -1}, ArgumentError, "top_k: expected 0 to "),
    "max_new_tokens": ({"max_new_tokens": 0}, ArgumentError, "max_new_tokens: expected 1 to "),
    "seed": ({"seed": -1}, ArgumentError, "seed: expected 0 to "),
    "logit_bias": ({"logit_bias": {300: 1.0}}, ArgumentError, "logit_bias: expected token ids below 300"),
    "stop_token_ids": ({"stop_token_ids": [300]}, ArgumentError, "stop_token_ids: expected token ids below 300"),
    "stop": ({"stop": 5}, ArgumentTypeError, "stop: expected a string or a list of strings, got 5"),
    "logprobs": ({"logprobs": 301}, ArgumentError, "logprobs: expected at most 300 (vocab_size), got 301"),
    "ignore_eos": ({"ignore_eos": 1}, ArgumentTypeError, "ignore_eos: expected True or False, got 1"),
}
BEAMS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "temperature": (
        {"temperature": 0.5},
        ArgumentError,
        "temperature: expected 0, unset or do_sample=True with num_beams=2, got 0.5",
    ),
    "top_k": ({"top_k": 5}, ArgumentError, "top_k: expected 0, unset or do_sample=True with num_beams=2, got 5"),
    "top_p": ({"top_p": 0.5}, ArgumentError, "top_p: expected 1, unset or do_sample=True with num_beams=2, got 0.5"),
    "seed": ({"seed": 5}, ArgumentError, "seed: expected None, unset or do_sample=True with num_beams=2, got 5"),
    "stop": ({"stop": "a"}, ArgumentError, "stop: expected no strings"),
    "samples": (
        {"num_return_sequences": 3},
        ArgumentError,
        "num_return_sequences: expected at most 2 with num_beams=2",
    ),
}


@pytest.mark.parametrize(("params", "error", "message"), PARAMS.values(), ids=PARAMS)
def test_params(model: pyengine.Model, params: dict[str, Any], error: type[Exception], message: str) -> None:
    refuses(error, (message,), lambda: model.generate("a", **params))
    refuses(error, (message,), lambda: model.stream("a", **params))


@pytest.mark.parametrize(("params", "error", "message"), BEAMS.values(), ids=BEAMS)
def test_beams_with_sampling(
    model: pyengine.Model, params: dict[str, Any], error: type[Exception], message: str
) -> None:
    refuses(error, (message,), lambda: model.generate("a", num_beams=2, **params))


def test_more_beams_than_the_model_has_tokens(model: pyengine.Model) -> None:
    refuses(ArgumentError, ("num_beams: expected at most 150", "got 200"), lambda: model.generate("a", num_beams=200))
    assert model.executor.pool.n_used == 0


def test_stream_of_many(model: pyengine.Model) -> None:
    for name in ("num_beams", "num_return_sequences"):
        message = f"{name}: expected 1 for a stream, got 2"
        refuses(ArgumentError, (message,), lambda name=name: model.stream("a", **{name: 2}))


@pytest.mark.parametrize("stride", [0, -1, 65])
def test_stride(model: pyengine.Model, stride: int) -> None:
    message = f"stride: expected 1 to 64 (the context), got {stride}"
    refuses(ArgumentError, (message,), lambda: model.score([1, 2, 3], stride))

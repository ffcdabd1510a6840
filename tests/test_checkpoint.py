"""Opening checkpoints: what is accepted, and that everything else is refused by name."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import CONFIG, safetensors, save, values, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from pyengine import checkpoint as module
from pyengine.checkpoint import Checkpoint, TensorInfo
from pyengine.errors import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointFileError

FOUR = b"\1\2\3\4"


def entry(begin: Any = 0, end: Any = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def open_weights(folder: Path, data: bytes) -> dict[str, TensorInfo]:
    """What Checkpoint.open finds in a folder with this model.safetensors."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(data)
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.tensors


# --- hostile headers: (file, parts of the message) -------------------------------------------------------------------

# fmt: off
HOSTILE: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["header length", "got a file of 0"]),
    "seven bytes": (b"\2\0\0\0\0\0\0", ["header length", "got a file of 7"]),
    "length alone": (safetensors(b"", length=2), ["header length", "got 2"]),
    "length 0": (safetensors(b"{}", length=0), ["header length", "got 0"]),
    "length 1": (safetensors(b"{}", length=1), ["header length", "got 1"]),
    "length past the file": (safetensors(b"{}", length=3), ["header length", "expected 2 to 2", "got 3"]),
    "length over 100 MB": (safetensors(b"{}", length=100_000_001), ["header length", "got 100000001"]),
    "length 2^63": (safetensors(b"{}", length=2**63), ["header length", f"got {2**63}"]),
    "length 2^64 - 1": (safetensors(b"{}", length=2**64 - 1), ["header length", f"got {2**64 - 1}"]),
    "length cuts the header": (safetensors({"a": entry()}, FOUR, length=10), ["header", "JSON"]),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), ["header", "utf-8"]),
    "UTF-16": (safetensors("{}".encode("utf-16")), ["header", "utf-8"]),
    "byte order mark": (safetensors(b"\xef\xbb\xbf{}"), ["header", "JSON"]),
    "not JSON": (safetensors(b"{]"), ["header", "JSON"]),
    "two objects": (safetensors(b"{}{}"), ["header", "Extra data"]),
    "padded with zeros": (safetensors(b"{}\0\0"), ["header", "Extra data"]),
    "an array": (safetensors(b"[1]"), ["header", "JSON object", "got [1]"]),
    "a number": (safetensors(b"17"), ["header", "JSON object", "got 17"]),
    "null": (safetensors(b"null"), ["header", "JSON object", "got None"]),
    "pickle": (b"\x80\x04\x95" + bytes(64), ["header length", "got"]),
    "duplicate tensor": (
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],'
                    b'"data_offsets":[0,4]}}', FOUR),
        ["header", "duplicate key 'a'"],
    ),
    "duplicate shape": (
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', FOUR),
        ["header", "duplicate key 'shape'"],
    ),
    "duplicate by escape": (safetensors(b'{"a":1,"\\u0061":1}'), ["header", "duplicate key 'a'"]),
    "NaN": (safetensors(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR), ["header", "'NaN'"]),
    "-Infinity": (safetensors(b'{"a":-Infinity}'), ["header", "'-Infinity'"]),
    "infinite by overflow": (safetensors(b'{"a":1e999}'), ["header", "'1e999'"]),
    "an integer of 10^5 digits": (safetensors(b'{"a":' + b"9" * 100_000 + b"}"), ["header", "100000 digits"]),
    "100,000 arrays deep": (safetensors(b"[" * 100_000), ["header", "nested too deep"]),
    "100,000 objects deep": (safetensors(b'{"a":' * 100_000), ["header", "nested too deep"]),
    "metadata is a string": (safetensors({"__metadata__": "pt"}), ["__metadata__", "got 'pt'"]),
    "metadata holds a number": (safetensors({"__metadata__": {"a": 1}}), ["__metadata__", "'a': 1"]),
    "tensor is an array": (safetensors({"a": [0, 4]}, FOUR), ["tensor 'a'", "got [0, 4]"]),
    "tensor is null": (safetensors({"a": None}), ["tensor 'a'", "got None"]),
    "no dtype": (safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR), ["tensor 'a'", "dtype"]),
    "no shape": (safetensors({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR), ["tensor 'a'", "shape"]),
    "no offsets": (safetensors({"a": {"dtype": "F32", "shape": [1]}}, FOUR), ["tensor 'a'", "data_offsets"]),
    "another key": (safetensors({"a": {**entry(), "device": "cpu"}}, FOUR), ["tensor 'a'", "device"]),
    "unknown dtype": (safetensors({"a": entry(dtype="F33")}, FOUR), ["tensor 'a'", "dtype", "BF16", "got 'F33'"]),
    "dtype in lower case": (safetensors({"a": entry(dtype="f32")}, FOUR), ["tensor 'a'", "dtype", "got 'f32'"]),
    "dtype is a number": (safetensors({"a": entry(dtype=32)}, FOUR), ["tensor 'a'", "dtype", "got 32"]),
    "dtype is an array": (safetensors({"a": entry(dtype=["F32"])}, FOUR), ["tensor 'a'", "dtype", "got ['F32']"]),
    "negative dimension": (safetensors({"a": entry(shape=[-1])}, FOUR), ["tensor 'a'", "shape", "got [-1]"]),
    "two negative ones": (safetensors({"a": entry(shape=[-1, -1])}, FOUR), ["tensor 'a'", "shape", "got [-1, -1]"]),
    "float dimension": (safetensors({"a": entry(shape=[1.0])}, FOUR), ["tensor 'a'", "shape", "got [1.0]"]),
    "bool dimension": (safetensors({"a": entry(shape=[True])}, FOUR), ["tensor 'a'", "shape", "got [True]"]),
    "string dimension": (safetensors({"a": entry(shape=["1"])}, FOUR), ["tensor 'a'", "shape", "got ['1']"]),
    "shape is a number": (safetensors({"a": entry(shape=1)}, FOUR), ["tensor 'a'", "shape", "got 1"]),
    "dimension of 2^64": (safetensors({"a": entry(shape=[2**64, 0])}, FOUR), ["tensor 'a'", "shape", "184467440737"]),
    "65 dimensions": (safetensors({"a": entry(shape=[1] * 65)}, FOUR), ["tensor 'a'", "at most 64"]),
    "size wraps to 0": (safetensors({"a": entry(0, 0, [2**32, 2**32])}), ["tensor 'a'", f"expected {2**66} bytes"]),
    "size wraps to 4": (safetensors({"a": entry(0, 4, [2**62 + 1])}, FOUR), ["tensor 'a'", f"expected {2**64 + 4}"]),
    "shape too big": (safetensors({"a": entry(shape=[1000, 1000])}, FOUR), ["tensor 'a'", "4000000 bytes", "got 4"]),
    "shape too small": (safetensors({"a": entry(0, 8)}, FOUR * 2), ["tensor 'a'", "expected 4 bytes", "got 8"]),
    "half a byte": (safetensors({"a": entry(0, 1, [3], "F4")}, b"\0"), ["tensor 'a'", "F4 [3]", "got 1"]),
    "end before begin": (safetensors({"a": entry(4, 0)}, FOUR), ["tensor 'a'", "data_offsets", "got -4 from [4, 0]"]),
    "negative begin": (safetensors({"a": entry(-4, 0)}, FOUR), ["tensor 'a'", "data_offsets", "got [-4, 0]"]),
    "float offset": (safetensors({"a": entry(0, 4.0)}, FOUR), ["tensor 'a'", "data_offsets", "got [0, 4.0]"]),
    "bool offset": (safetensors({"a": entry(False, 4)}, FOUR), ["tensor 'a'", "data_offsets", "got [False, 4]"]),
    "three offsets": (
        safetensors({"a": {**entry(), "data_offsets": [0, 4, 8]}}, FOUR), ["tensor 'a'", "two integers", "[0, 4, 8]"],
    ),
    "overlap": (safetensors({"a": entry(0, 8, [2]), "b": entry(4, 8)}, FOUR * 2), ["tensor 'b'", "an overlap"]),
    "same place": (safetensors({"a": entry(), "b": entry()}, FOUR), ["tensor 'b'", "an overlap"]),
    "empty one inside": (
        safetensors({"a": entry(0, 8, [2]), "z": entry(4, 4, [0])}, FOUR * 2), ["tensor 'z'", "an overlap"],
    ),
    "hole at the start": (safetensors({"a": entry(4, 8)}, FOUR * 2), ["tensor 'a'", "a hole"]),
    "hole between": (safetensors({"a": entry(), "b": entry(8, 12)}, FOUR * 3), ["tensor 'b'", "a hole"]),
    "tail": (safetensors({"a": entry()}, FOUR + b"x"), ["a tail", "got"]),
    "tail without tensors": (safetensors({}, b"x"), ["a tail", "expected 10 bytes, got 11"]),
    "one byte missing": (safetensors({"a": entry()}, FOUR[:3]), ["truncated"]),
    "no data at all": (safetensors({"a": entry()}), ["truncated"]),
    "data far past the end": (safetensors({"a": entry(0, 2**40, [2**38])}, FOUR), ["truncated"]),
}
# fmt: on


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_by_name(case: str, tmp_path: Path) -> None:
    data, parts = HOSTILE[case]
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path, data)
    message = str(caught.value)
    for part in (str(tmp_path / "model.safetensors"), "expected", *parts):
        assert part in message
    assert len(message) < 1000


def test_a_header_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    length = module.MAX_JSON + 1
    with pytest.raises(CheckpointError, match=f"header length: expected 2 to {module.MAX_JSON} bytes, got {length}"):
        open_weights(tmp_path, safetensors(b"{}" + b" " * (length - 2)))


ACCEPTED: dict[str, tuple[bytes, dict[str, tuple[str, tuple[int, ...], int]]]] = {
    "nothing": (safetensors({}), {}),
    "spaces around": (safetensors(b"  {}    "), {}),
    "no dimensions": (safetensors({"a": entry(shape=[])}, FOUR), {"a": ("F32", (), 4)}),
    "an empty tensor": (safetensors({"a": entry(0, 0, [3, 0])}), {"a": ("F32", (3, 0), 0)}),
    "empty ones at both ends": (
        safetensors({"a": entry(), "y": entry(0, 0, [0]), "z": entry(4, 4, [0])}, FOUR),
        {"a": ("F32", (1,), 4), "y": ("F32", (0,), 0), "z": ("F32", (0,), 0)},
    ),
    "in any order": (
        safetensors({"b": entry(4, 8), "a": entry()}, FOUR * 2),
        {"a": ("F32", (1,), 4), "b": ("F32", (1,), 4)},
    ),
    "sub-byte dtype": (safetensors({"a": entry(0, 3, [4], "F6_E2M3")}, b"abc"), {"a": ("F6_E2M3", (4,), 3)}),
    "a name beyond ASCII": (safetensors({"ключ": entry()}, FOUR), {"ключ": ("F32", (1,), 4)}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_odd_but_valid_headers_are_accepted(case: str, tmp_path: Path) -> None:
    data, expected = ACCEPTED[case]
    tensors = open_weights(tmp_path, data)
    assert {name: (tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in tensors.items()} == expected


def test_truncation_is_noticed_at_every_byte(tmp_path: Path) -> None:
    data = safetensors({"a": entry(0, 8, [2]), "b": entry(8, 12)}, FOUR * 3)
    assert open_weights(tmp_path, data).keys() == {"a", "b"}
    for size in range(len(data)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_weights(tmp_path, data[:size])


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_header_is_read_as_the_reference_reads_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    good = safetensors({"a": entry(0, 8, [2, 1]), "b": entry(8, 10, [1], "F16")}, FOUR * 2 + b"\0\0")
    file = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(file) - 1))
        end = at + data.draw(st.integers(0, 2))
        file[at:end] = data.draw(st.sampled_from([b"", b"0", b"1", b"-", b",", b"a", b"\xff"]))
    try:
        ours = open_weights(folder, bytes(file))
    except CheckpointError:
        return
    with safe_open(folder / "model.safetensors", "numpy") as reference:  # raises where we are too lenient
        assert {name: list(tensor.shape) for name, tensor in ours.items()} == {
            name: reference.get_slice(name).get_shape() for name in list(reference.keys())
        }


def test_the_reference_refuses_what_we_refuse_but_for_the_listed(tmp_path: Path) -> None:
    stricter = {"duplicate tensor", "another key", "65 dimensions"}
    for case, (data, _) in HOSTILE.items():
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        try:
            with safe_open(path, "numpy"):
                accepted = True
        except SafetensorError:
            accepted = False
        assert accepted == (case in stricter), case


# --- config.json and the folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"", ["JSON"]),
        (b"[]", ["JSON object", "got []"]),
        (b'"gpt2"', ["JSON object", "got 'gpt2'"]),
        (b'{"n_embd": 8,}', ["JSON", "line 1"]),
        (b'{"n_embd": 8, "n_embd": 16}', ["duplicate key 'n_embd'"]),
        (b'{"a": {"b": 1, "b": 1}}', ["duplicate key 'b'"]),
        (b'{"layer_norm_epsilon": NaN}', ["'NaN'"]),
        (b'{"layer_norm_epsilon": Infinity}', ["'Infinity'"]),
        (b'{"layer_norm_epsilon": 1e400}', ["'1e400'"]),
        (b'{"n_embd": ' + b"1" * 101 + b"}", ["101 digits"]),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, ["nested too deep"]),
        (b'{"a": "\xe9"}', ["utf-8"]),
        (b'{"a": "' + b"x" * module.MAX_JSON + b'"}', [f"at most {module.MAX_JSON} bytes"]),
        (b'{"quantization_config": {}}', ["quantization_config", "got {}"]),
        (b'{"quantization_config": {"quant_method": "gptq"}}', ["quantization_config", "gptq"]),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(text: bytes, parts: list[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    for part in (str(tmp_path / "config.json"), "expected", *parts):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_config_may_hold_long_integers_and_a_null_quantization(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model_max_length": 10**30, "quantization_config": None})
    with Checkpoint.open(str(tmp_path)) as checkpoint:
        assert checkpoint.folder == tmp_path
        assert checkpoint.config == {**CONFIG, "model_max_length": 10**30, "quantization_config": None}


def test_a_folder_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, part in {"nowhere": "nothing there", "file": "a file", "empty": "config.json", "\0": "nothing"}.items():
        with pytest.raises(CheckpointFileError) as caught:
            Checkpoint.open(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert part in str(caught.value)
    with pytest.raises(ArgumentTypeError, match="folder: expected a str or a Path, got 3"):
        Checkpoint.open(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointFileError, match=r"expected model.safetensors or .*, got neither"):
        Checkpoint.open(tmp_path)
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointFileError, match=rf"expected model.safetensors or .*, got {name}.* safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_not_a_regular_file_is_refused(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        path = tmp_path / name
        path.unlink()
        make(path)
        with pytest.raises(CheckpointFileError, match=name):
            Checkpoint.open(tmp_path)
        if path.is_dir():
            path.rmdir()
            path.touch()


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["preadv", "seek"])
def read_with(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of reading, the second for systems without preadv."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv")
    return str(request.param)


def test_any_range_of_a_tensor_is_read_from_any_thread(read_with: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = {f"t{i}": rng.standard_normal((50 + i, 33), np.float32) for i in range(4)}
    save(tmp_path / "model.safetensors", {name: ("F32", array) for name, array in arrays.items()})
    (tmp_path / "config.json").write_text("{}")
    wrong: list[str] = []

    def read(seed: int, checkpoint: Checkpoint) -> None:
        draw = random.Random(seed)
        for _ in range(200):
            name = draw.choice(sorted(arrays))
            data = arrays[name].tobytes()
            start = draw.randint(0, len(data))
            out = np.empty(draw.randint(0, len(data) - start), np.uint8)
            checkpoint.read_into(name, out, start)
            if out.tobytes() != data[start : start + out.size]:
                wrong.append(name)

    with Checkpoint.open(tmp_path) as checkpoint:
        threads = [threading.Thread(target=read, args=(seed, checkpoint)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, array in arrays.items():
            np.testing.assert_array_equal(values(checkpoint, name), array)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs os.preadv")
def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.arange(1000, dtype=np.float32)
    save(tmp_path / "model.safetensors", {"a": ("F32", data)})
    (tmp_path / "config.json").write_text("{}")
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
    with Checkpoint.open(tmp_path) as checkpoint:
        np.testing.assert_array_equal(values(checkpoint, "a"), data)


def test_a_file_truncated_after_opening_is_an_error(read_with: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"a": ("F32", np.zeros(10, np.float32)), "b": ("F32", np.zeros(10, np.float32))})
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        os.truncate(path, path.stat().st_size - 30)
        values(checkpoint, "a")
        with pytest.raises(CheckpointFileError, match=rf"{path}: tensor 'b': expected 40 bytes .* got 10: .*truncated"):
            values(checkpoint, "b")


def test_a_file_replaced_after_opening_is_read_as_it_was(read_with: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, {"a": ("F32", np.arange(10, dtype=np.float32))})
    (tmp_path / "config.json").write_text("{}")
    with Checkpoint.open(tmp_path) as checkpoint:
        path.unlink()
        path.write_bytes(b"something else")
        np.testing.assert_array_equal(values(checkpoint, "a"), np.arange(10))


def test_wrong_reads_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", {"a": ("F32", np.zeros(10, np.float32))})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    frozen = np.empty(4, np.uint8)
    frozen.flags.writeable = False
    wrong: list[Any] = [np.empty(4, np.float32), np.empty((2, 2), np.uint8), np.empty(8, np.uint8)[::2], frozen]
    for out in wrong:
        with pytest.raises(ArgumentError, match="out: expected writable, contiguous uint8"):
            checkpoint.read_into("a", out)
    for size, start in [(41, 0), (40, 1), (1, 40), (1, -1), (0, 41)]:
        with pytest.raises(ArgumentError, match=f"start: expected {size} bytes within the 40 of 'a', .* {start}$"):
            checkpoint.read_into("a", np.empty(size, np.uint8), start)
    with pytest.raises(ArgumentError, match=r"name: expected a tensor of .*, got 'b'"):
        checkpoint.read_into("b", np.empty(1, np.uint8))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointFileError, match=r"tensor 'a'.*closed"):
        checkpoint.read_into("a", np.empty(4, np.uint8))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_files_are_closed_with_the_checkpoint_and_after_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=3)

    def open_files() -> int:
        paths = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sum(path.startswith(str(folder)) for path in paths)

    with Checkpoint.open(folder):
        assert open_files() == 3
    assert open_files() == 0
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert open_files() == 0
    assert "model-00003" in str(caught.value)

"""Saved states: the same bits again, files that the format's own library reads, and hostile ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import safetensors, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import pyengine
from pyengine import CheckpointError, CheckpointFileError, OutOfMemoryError
from pyengine._native import simd
from pyengine._native.matmul import DTYPES
from pyengine._native.memory import Block, checksum
from pyengine._native.pages import KV_DTYPES, KVLayout
from pyengine.kv import PAGE

CONFIG = {"n_embd": 39, "n_head": 3, "n_layer": 2, "n_positions": 3 * PAGE + 10, "vocab_size": 300}
TOKENS = [int(i) for i in np.random.default_rng(0).integers(300, size=PAGE + 21)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("saved"), CONFIG)


@pytest.fixture(scope="module", params=KV_DTYPES)
def model(request: pytest.FixtureRequest, folder: Path) -> pyengine.Model:
    return pyengine.load(folder, dtype="int8", threads=2, kv_dtype=request.param)


@pytest.fixture(scope="module")
def simple(folder: Path) -> pyengine.Model:
    return pyengine.load(folder, dtype="int8", threads=1)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


# --- what is written and read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 10])
def test_restored_is_as_saved(model: pyengine.Model, tmp_path: Path, n: int) -> None:
    token_ids = (TOKENS * 3)[:n]
    state = model.state(token_ids)
    state.save(tmp_path / "a")
    with model.restore(str(tmp_path / "a")) as restored:
        assert restored.token_ids == token_ids
        assert restored.logits.tobytes() == state.logits.tobytes()
        assert not restored.logits.flags.writeable
        restored.save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        text = restored.generate(max_new_tokens=20, seed=1, ignore_eos=True).token_ids
        assert text == state.generate(max_new_tokens=20, seed=1, ignore_eos=True).token_ids
        if n < CONFIG["n_positions"]:
            assert restored.append([7]).logits.tobytes() == model.logits([*token_ids, 7])[-1].tobytes()
        restored.truncate(n)
        assert restored.logits.tobytes() == state.logits.tobytes()
    state.close()
    assert model.stats.kv_pages_used == 0


def test_the_file_is_what_safetensors_reads(model: pyengine.Model, tmp_path: Path) -> None:
    state = model.state(TOKENS, window=150, sinks=3)
    state.save(tmp_path / "state")
    layout = model.executor.pool.layout
    with safe_open(tmp_path / "state", "numpy") as file:
        assert sorted(file.keys()) == ["kv", "logits", "token_ids"]
        assert file.get_tensor("token_ids").tolist() == TOKENS
        assert file.get_tensor("logits").tobytes() == state.logits.tobytes()
        kv = file.get_tensor("kv")
        pages = state._sequence.pages
        assert kv[: layout.page_nbytes].tobytes() == bytes(memoryview(pages[0].memory))
        assert kv[layout.page_nbytes :].tobytes() == layout.part_of(pages[1].memory, 21)
        assert kv.nbytes == layout.page_nbytes * (PAGE + 32) // PAGE
        metadata = file.metadata()
    checksum_, model_hash = metadata.pop("checksum"), metadata.pop("model")
    assert len(checksum_) == len(model_hash) == 32
    assert metadata == {
        "format": "pyengine-state",
        "version": "1",
        "model_type": "gpt2",
        "dtype": "int8",
        "kv_dtype": model.kv_dtype,
        "n_positions": str(len(TOKENS)),
        "window": "150",
        "sinks": "3",
    }
    assert model.restore(tmp_path / "state").window == state.window


def test_the_same_state_gives_the_same_bytes_whatever_its_history(model: pyengine.Model, tmp_path: Path) -> None:
    """Its pages have held other tokens, and hold such still, after the last position."""
    model.state(TOKENS).save(tmp_path / "a")
    state = model.state([299 - i for i in TOKENS])
    for n in (0, 5, 30, 60, PAGE + 3):
        state.truncate(min(n, len(state)))
        state.append(TOKENS[len(state) : PAGE + 10] if n else TOKENS[:40])
        state.truncate(n + 3 if n else 5)
        common = sum(1 for _ in zip(state.token_ids, TOKENS, strict=False))
        assert state.token_ids == TOKENS[:common]
    state.append([*TOKENS[len(state) :], 1, 2, 3])
    state.truncate(len(TOKENS))
    state.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    model.state([*TOKENS[:-1], TOKENS[-1] ^ 1]).save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("level", simd.levels())
def test_any_level_and_threads_go_on_with_it(folder: Path, tmp_path: Path, simple: pyengine.Model, level: str) -> None:
    """The portable level goes on with a state too; what it computes is close."""
    simple.state(TOKENS).save(tmp_path / "state")
    before = simd.use(level)
    try:
        other = pyengine.load(folder, dtype="int8", threads=3, prefix_cache=False, max_batch=2)
        logits = other.restore(tmp_path / "state").append([1]).logits
    finally:
        simd.use(before)
    expected = simple.logits([*TOKENS, 1])[-1]
    assert logits.tobytes() == expected.tobytes() or level == "portable"
    np.testing.assert_allclose(logits, expected, atol=1e-2 * float(np.abs(expected).max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_is_of_the_model_alone(folder: Path, tmp_path: Path, dtype: Any) -> None:
    found = {pyengine.load(folder, dtype=dtype, threads=n).executor.fingerprint for n in (1, 2, 3)}
    assert len(found) == 1
    for i, change in enumerate([{"layer_norm_epsilon": 1e-4}, {"n_positions": 100}, {"activation_function": "relu"}]):
        write_checkpoint(tmp_path / str(i), CONFIG | change)
    write_checkpoint(tmp_path / "seed", CONFIG, seed=1)
    found |= {pyengine.load(path, dtype=dtype, threads=1).executor.fingerprint for path in tmp_path.iterdir()}
    assert len(found) == 5


def test_restored_pages_never_get_to_others(folder: Path, tmp_path: Path) -> None:
    """A forged file with a right checksum: it gives wrong logits to its own state, and to nobody else."""
    model = pyengine.load(folder, dtype="int8", threads=1)
    honest = pyengine.load(folder, dtype="int8", threads=1, prefix_cache=False)
    text = (TOKENS * 3)[: 2 * PAGE]
    state = honest.state(text)
    for page in state._sequence.pages:
        view = np.frombuffer(page.memory, np.uint8)
        view[:] = np.random.default_rng(0).integers(60, size=len(view))  # small numbers, whatever their dtype
    state.save(tmp_path / "forged")
    forged = model.restore(tmp_path / "forged")
    forged.append([1] * (PAGE - 10))
    fork = forged.fork()
    fork.append([2] * 10)
    fork.generate(max_new_tokens=5, seed=1)
    assert fork.logits.tobytes() != honest.logits([*text, *[1] * (PAGE - 10), *[2] * 10])[-1].tobytes()
    assert model.stats.kv_pages_cached == 0 and not model.executor.pool.cache.pages  # type: ignore[union-attr]
    for prompt in (text, [*text, *[1] * (PAGE - 10), *[2] * 10]):
        assert model.state(prompt).logits.tobytes() == honest.logits(prompt)[-1].tobytes()


# --- what can't be honoured ------------------------------------------------------------------------------------------


def test_another_model_is_refused_by_name(folder: Path, tmp_path: Path, simple: pyengine.Model) -> None:
    path = tmp_path / "state"
    simple.state(TOKENS).save(path)
    write_checkpoint(tmp_path / "weights", CONFIG, seed=1)
    write_checkpoint(tmp_path / "wide", CONFIG | {"n_embd": 42})
    write_checkpoint(tmp_path / "eps", CONFIG | {"layer_norm_epsilon": 1e-3})
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "weights", {"dtype": "int8"}, "model: expected '[0-9a-f]{32}', got '[0-9a-f]{32}'.*very model"),
        (tmp_path / "wide", {"dtype": "int8"}, "model: expected"),
        (tmp_path / "eps", {"dtype": "int8"}, "model: expected"),
        (folder, {"dtype": "int4"}, "dtype: expected 'int4', got 'int8'"),
        (folder, {"dtype": "float32"}, "dtype: expected 'float32', got 'int8'"),
        (folder, {"dtype": "int8", "kv_dtype": "float32"}, "kv_dtype: expected 'float32', got 'bfloat16'"),
    ]
    for other, arguments, message in cases:
        model = pyengine.load(other, threads=1, **arguments)
        with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
            model.restore(path)
        assert model.stats.kv_pages_used == 0 and model.executor.pool.n_made == 0


def test_what_is_no_file_is_refused(simple: pyengine.Model, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, got in {"nowhere": "nothing there", "": "something else", "fifo": "something else", "\0": ""}.items():
        with pytest.raises(CheckpointFileError, match=f"expected a saved state's file, got.*{got}"):
            simple.restore(tmp_path / name)
    with pytest.raises(CheckpointFileError):
        simple.restore("/dev/zero")
    for path in (3, None, b"x"):
        with pytest.raises(TypeError, match="path: expected a str or a Path"):
            simple.restore(path)  # type: ignore[arg-type]
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="got a file of 0"):
        simple.restore(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="format: expected 'pyengine-state', got 'pt': not a saved state"):
        simple.restore(Path(__file__).parents[1] / "pyengine" / "demo" / "model.safetensors")


def test_where_no_file_can_be_written(simple: pyengine.Model, tmp_path: Path) -> None:
    state = simple.state(TOKENS)
    for path in (tmp_path, tmp_path / "nowhere" / "x", tmp_path / ("x" * 300), tmp_path / "\0", Path(".")):
        with pytest.raises(CheckpointFileError, match="expected a file that can be written"):
            state.save(path)
    with pytest.raises(TypeError, match="path: expected a str or a Path"):
        state.save(3)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_the_old_file(
    simple: pyengine.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    simple.state([1]).save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(CheckpointFileError, match=f"{path}: .*No space left"):
                simple.state(TOKENS).save(path)
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == before
    simple.state(TOKENS).save(path)
    assert simple.restore(path).token_ids == TOKENS
    assert list(tmp_path.iterdir()) == [path]


def test_no_room(folder: Path, tmp_path: Path, simple: pyengine.Model) -> None:
    simple.state(TOKENS).save(tmp_path / "state")
    model = pyengine.load(folder, dtype="int8", threads=1)
    model.executor.pool.capacity = 3
    state = model.restore(tmp_path / "state")
    with pytest.raises(OutOfMemoryError, match=r"kv_memory: expected room for 2 more pages .*, got 1 of 3"):
        model.restore(tmp_path / "state")
    assert model.stats.kv_pages_used == 2
    state.close()
    model.generate([1] * PAGE + [2] * PAGE, max_new_tokens=1)  # the prefix cache gives its pages up
    assert model.stats.kv_pages_cached == 2
    assert [len(model.restore(tmp_path / "state")) for _ in range(3)] == [len(TOKENS)] * 3


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no metadata": (lambda h: h.pop("__metadata__"), "format: expected 'pyengine-state', got None"),
    "a later version": (lambda h: h["__metadata__"].update(version="2"), "version: expected '1', got '2'"),
    "no model": (lambda h: h["__metadata__"].pop("model"), "model: expected .*, got None"),
    "no checksum": (lambda h: h["__metadata__"].pop("checksum"), "checksum: expected .*, got None"),
    "no length": (lambda h: h["__metadata__"].pop("n_positions"), "n_positions: expected an integer from 1 to 202"),
    "no position": (lambda h: h["__metadata__"].update(n_positions="0"), "n_positions: expected .*, got '0'"),
    "too many": (lambda h: h["__metadata__"].update(n_positions="203"), "n_positions: expected .*, got '203'"),
    "a long number": (lambda h: h["__metadata__"].update(n_positions="9" * 9999), "n_positions: expected .*, got '999"),
    "other digits": (lambda h: h["__metadata__"].update(n_positions="٨٥"), "n_positions: expected"),
    "another length": (lambda h: h["__metadata__"].update(n_positions="84"), r"token_ids.*expected I32 \[84\], got"),
    "a small window": (lambda h: h["__metadata__"].update(window="84"), "window: expected an integer from 85 to 202"),
    "no sinks": (lambda h: h["__metadata__"].update(window="100"), "sinks: expected an integer from 0 to 99, got None"),
    "a window": (lambda h: h["__metadata__"].update(window="100", sinks="4"), "checksum: expected .* damaged"),
    "one more word": (lambda h: h["__metadata__"].update(more="x"), "checksum: expected .* damaged"),
    "a tensor's name": (lambda h: h.update(kw=h.pop("kv")), "expected the tensors token_ids, logits, kv, got .*'kw'"),
    "a dtype": (lambda h: h["token_ids"].update(dtype="U32"), r"token_ids.*expected I32 \[85\], got U32 \[85\]"),
    "a shape": (lambda h: h["logits"].update(shape=[1, 300]), r"logits.*expected F32 \[300\], got F32 \[1, 300\]"),
    "kv": (lambda h: h["kv"].update(dtype="I8"), "kv.*expected U8 "),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_cannot_be_honoured_is_refused_by_name(simple: pyengine.Model, tmp_path: Path, case: str) -> None:
    path = tmp_path / "state"
    simple.state(TOKENS).save(path)
    change, message = HOSTILE[case]
    header, data = split(path.read_bytes())
    change(header)
    path.write_bytes(safetensors(header, data))
    used = simple.stats.kv_pages_used
    with pytest.raises(CheckpointError, match=message) as caught:
        simple.restore(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 600
    assert simple.stats.kv_pages_used == used


def test_token_ids_out_of_range(simple: pyengine.Model, tmp_path: Path) -> None:
    path = tmp_path / "state"
    for bad in (300, -1, 2**31 - 1, -(2**31)):
        state = simple.state(TOKENS)
        state._sequence.token_ids[7] = bad
        state.save(path)
        with pytest.raises(CheckpointError, match=rf"token_ids\[7\]: expected token ids from 0 to 299, got {bad}"):
            simple.restore(path)


@pytest.fixture(scope="module")
def saved(simple: pyengine.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("mutated") / "state"
    simple.state(TOKENS[:20], window=100).save(path)
    return path, path.read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_refused_or_mean_the_same(
    simple: pyengine.Model, saved: tuple[Path, bytes], data: st.DataObject
) -> None:
    """Whatever is flipped, cut, put in or left out, in the header or in what it describes."""
    path, good = saved
    file = bytearray(good)
    length = 8 + int.from_bytes(good[:8], "little")
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(file) - 1))
        file = file[:at]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.one_of(st.integers(0, min(length, len(file))), st.integers(0, len(file))))
        end = at + data.draw(st.integers(0, 2))
        what = data.draw(st.sampled_from([b"", b"0", b"1", b"9", b"-", b",", b'"', b"a", b" ", b"\0", b"\xff"]))
        file[at:end] = what
    path.write_bytes(bytes(file))
    used = simple.stats.kv_pages_used
    try:
        restored = simple.restore(path)
    except CheckpointError:
        assert simple.stats.kv_pages_used == used
        return
    assert restored.token_ids == TOKENS[:20]  # where spaces of the header's end were changed, or nothing
    assert restored.logits.tobytes() == simple.logits(TOKENS[:20])[-1].tobytes()
    restored.close()


def test_every_byte_of_the_data_counts(simple: pyengine.Model, saved: tuple[Path, bytes]) -> None:
    path, good = saved
    start = 8 + int.from_bytes(good[:8], "little")
    rng = np.random.default_rng(0)
    for at in rng.integers(start, len(good), 300):
        file = bytearray(good)
        file[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(file))
        with pytest.raises(CheckpointError, match=r"checksum|token_ids"):
            simple.restore(path)
    path.write_bytes(good)
    simple.restore(path).close()


# --- the native part -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 7, 8, 63, 64, 65, 127, 128, 1000])
def test_a_checksum_changes_with_each_bit_and_the_length(n: int) -> None:
    data = np.random.default_rng(n).integers(256, size=n).astype(np.uint8)
    found = {checksum(data)}
    for i in range(n):
        for bit in range(8):
            data[i] ^= 1 << bit
            found.add(checksum(data))
            data[i] ^= 1 << bit
    for more in (b"\0", b"\0\0", b"\0" * 64):
        found.add(checksum(data.tobytes() + more))
    assert len(found) == 1 + 8 * n + 3
    assert all(len(one) == 64 for one in found)
    for pair in ((0, 64), (0, 8), (3, 67)):  # two bits of a lane, or of two, flipped
        if max(pair) < n:
            changed = data.copy()
            changed[list(pair)] ^= 0x80
            assert checksum(changed) != checksum(data)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [1, 5, 16, 20, 64])
def test_parts_of_pages(dtype: str, head_dim: int) -> None:
    """A part holds what a page has of its first positions, and nothing of the others; put back, it is the same part."""
    layout = KVLayout(2, 3, head_dim, dtype)
    rng = np.random.default_rng(0)
    page, other = Block(layout.page_nbytes), Block(layout.page_nbytes)
    a, b = np.frombuffer(page, np.uint8), np.frombuffer(other, np.uint8)
    a[:] = rng.integers(1, 256, size=len(a))
    assert bytes(layout.part_of(page, PAGE)) == a.tobytes()
    for n in range(PAGE + 1):
        part = layout.part_of(page, n)
        assert len(part) == layout.part_nbytes(n) == layout.page_nbytes // PAGE * (-(-n // 16) * 16)
        assert np.count_nonzero(np.frombuffer(part, np.uint8)) == layout.page_nbytes // PAGE * n
        b[:] = rng.integers(256, size=len(b))
        layout.put_part(part, other, n)
        assert layout.part_of(other, n) == part
        for m in range(0, n, 5):
            assert layout.part_of(other, m) == layout.part_of(page, m)
    for n in (-1, PAGE + 1):
        with pytest.raises(ValueError, match=r"n: expected 0\.\.64 positions"):
            layout.part_of(page, n)
    with pytest.raises(ValueError, match="page: expected"):
        layout.part_of(Block(layout.page_nbytes - 1), 5)
    with pytest.raises(ValueError, match="part: expected"):
        layout.put_part(bytearray(3), page, 5)

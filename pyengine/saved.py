"""Saved states: a sequence's tokens, its keys and values and its last logits, as one safetensors file.

The tensors are token_ids (I32 [n]), logits (F32 [vocab_size], after the last token) and kv (U8): the KV pages as they
are in memory, the last one cut to its positions, rounded up to 16. `__metadata__` tells whose keys and values these
are, and a checksum of everything. The same state always gives the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import blake2b
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ._native.memory import checksum
from .checkpoint import SafetensorsFile, TensorInfo, show
from .errors import ArgumentTypeError, CheckpointError, CheckpointFileError
from .executor import Executor
from .kv import PAGE, NoPages, Sequence, no_room
from .window import Window

Floats = NDArray[np.float32]
Buffer = memoryview | bytearray

FORMAT = "pyengine-state"
VERSION = "1"  # of the tensors, and of how keys and values lie in a page
ALIGNMENT = 64


def identity(executor: Executor, dtype: str) -> Iterator[tuple[str, str]]:
    """What a file must say to be this model's, one item after the other: the last one takes a while to find."""
    yield "format", FORMAT
    yield "version", VERSION
    yield "model_type", executor.plan.model_type
    yield "dtype", dtype
    yield "kv_dtype", executor.pool.dtype
    yield "model", executor.fingerprint


def save_state(
    path: str | PathLike[str],
    executor: Executor,
    dtype: str,
    sequence: Sequence,
    logits: Floats,
    window: Window | None,
) -> None:
    """Writes a file that is there as a whole or not at all: beside the path, from where it is then renamed.

    Raises CheckpointFileError where it can't be written.
    """
    n = sequence.length
    token_ids = np.array(sequence.token_ids, np.int32)
    parts = [token_ids.view(np.uint8).data, logits.view(np.uint8).data, *_kept(sequence)]
    metadata = dict(identity(executor, dtype)) | {"n_positions": str(n)}
    if window:
        metadata |= {"window": str(window.size), "sinks": str(window.sinks)}
    digest = _digest(metadata)
    for part in parts:
        digest.update(checksum(part))
    header: dict[str, object] = {"__metadata__": metadata | {"checksum": digest.hexdigest()}}
    end = 0
    for name, (tensor_dtype, shape, nbytes) in _tensors(executor, n).items():
        header[name] = {"dtype": tensor_dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    _write(_path(path), [len(text).to_bytes(8, "little"), text, *parts])


def load_state(path: str | PathLike[str], executor: Executor, dtype: str) -> tuple[Sequence, Floats, Window | None]:
    """The sequence, the logits after its last token and the window that a file has.

    Its keys and values never go to the prefix cache, since they could be anything. Raises CheckpointFileError for a
    file that can't be read, CheckpointError for one that isn't a state of this very model, or is damaged, and
    OutOfMemoryError where the KV pool has no room for it.
    """
    path = _path(path)
    with _open(path) as opened:
        file = SafetensorsFile(path, opened)
        tensors = file.read_header()
        metadata = file.metadata
        _check_identity(path, metadata, executor, dtype)
        n = _integer(path, metadata, "n_positions", 1, executor.max_seq_len)
        window = None
        if "window" in metadata:
            size = _integer(path, metadata, "window", n, executor.max_seq_len)
            window = Window(size, _integer(path, metadata, "sinks", 0, size - 1))
        _check_tensors(path, tensors, executor, n)
        digest = _digest(metadata)

        def read(name: str, out: memoryview, offset: int = 0) -> bytes:
            """Reads a piece of a tensor; returns its checksum."""
            file.read_into(out, tensors[name].offset + offset, tensors[name])
            return checksum(out)

        token_ids, logits = np.empty(n, np.int32), np.empty(executor.vocab_size, np.float32)
        digest.update(read("token_ids", token_ids.view(np.uint8).data))
        digest.update(read("logits", logits.view(np.uint8).data))
        bad = np.flatnonzero((token_ids < 0) | (token_ids >= executor.vocab_size))
        if len(bad):
            expected = f"token ids from 0 to {executor.vocab_size - 1}"
            raise CheckpointError(f"{path}: token_ids[{bad[0]}]: expected {expected}, got {token_ids[bad[0]]}")
        sequence = executor.new_sequence()
        sequence.publishes = False
        try:
            for piece in _fill(sequence, n, read, executor.threads):
                digest.update(piece)
            if digest.hexdigest() != metadata.get("checksum"):
                got = show(metadata.get("checksum"))
                raise CheckpointError(f"{path}: checksum: expected {digest.hexdigest()}, got {got}: damaged")
        except BaseException:
            sequence.close()
            raise
    sequence.extend(token_ids)
    return sequence, logits, window


def _fill(sequence: Sequence, n: int, read: Callable[[str, memoryview, int], bytes], threads: int) -> list[bytes]:
    """Takes pages for n positions and reads what is in them, on all threads: half of the time goes to new memory.

    Returns the checksums of the pages.
    """
    layout = sequence.pool.layout
    try:
        sequence.reserve(n, within=True)
    except NoPages:
        sequence.close()
        raise no_room(sequence.pool, -(-n // PAGE)) from None
    n_full, n_left = divmod(n, PAGE)
    part = bytearray(layout.part_nbytes(n_left))
    pieces = [memoryview(page.memory) for page in sequence.pages[:n_full]] + [memoryview(part)] * (n_left > 0)
    with ThreadPoolExecutor(threads) as pool:
        sums = list(pool.map(lambda i: read("kv", pieces[i], i * layout.page_nbytes), range(len(pieces))))
    if n_left:
        layout.put_part(part, sequence.pages[n_full].memory, n_left)
    return sums


def _kept(sequence: Sequence) -> Iterator[Buffer]:
    """A sequence's keys and values."""
    n_full, n_left = divmod(sequence.length, PAGE)
    for page in sequence.pages[:n_full]:
        yield memoryview(page.memory)
    if n_left:
        yield sequence.pool.layout.part_of(sequence.pages[n_full].memory, n_left)


def _tensors(executor: Executor, n: int) -> dict[str, tuple[str, list[int], int]]:
    """The tensors of a state of n positions: dtype, shape and bytes."""
    layout, vocab_size = executor.pool.layout, executor.vocab_size
    kv_nbytes = n // PAGE * layout.page_nbytes + layout.part_nbytes(n % PAGE)
    return {
        "token_ids": ("I32", [n], 4 * n),
        "logits": ("F32", [vocab_size], 4 * vocab_size),
        "kv": ("U8", [kv_nbytes], kv_nbytes),
    }


def _check_identity(path: Path, metadata: Mapping[str, str], executor: Executor, dtype: str) -> None:
    for name, expected in identity(executor, dtype):
        got = metadata.get(name)
        if got != expected:
            raise CheckpointError(
                f"{path}: {name}: expected {expected!r}, got {show(got)}: "
                + ("not a saved state" if name == "format" else "a state goes on in the very model that it is of")
            )


def _check_tensors(path: Path, tensors: Mapping[str, TensorInfo], executor: Executor, n: int) -> None:
    expected = _tensors(executor, n)
    if tensors.keys() != expected.keys():
        raise CheckpointError(f"{path}: expected the tensors {', '.join(expected)}, got {show(sorted(tensors))}")
    for name, (dtype, shape, _) in expected.items():
        tensor = tensors[name]
        if (tensor.dtype, list(tensor.shape)) != (dtype, shape):
            raise CheckpointError(f"{tensor}: expected {dtype} {shape}, got {tensor.dtype} {show(list(tensor.shape))}")


def _integer(path: Path, metadata: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = metadata.get(name)
    if text is None or not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise CheckpointError(f"{path}: {name}: expected an integer from {least} to {most}, got {show(text)}")
    return int(text)


def _digest(metadata: Mapping[str, str]) -> blake2b:
    """The hash that the checksums of all data are then put into."""
    told = sorted(item for item in metadata.items() if item[0] != "checksum")
    return blake2b(json.dumps(told).encode(), digest_size=16)


def _path(path: object) -> Path:
    if not isinstance(path, str | PathLike):
        raise ArgumentTypeError(f"path: expected a str or a Path, got {show(path)}")
    return Path(path)


def _open(path: Path) -> io.FileIO:
    try:
        if path.is_file():
            return io.FileIO(path)
        got = "something else" if path.exists() else "nothing there"
    except (OSError, ValueError) as error:
        got = str(error)
    raise CheckpointFileError(f"{path}: expected a saved state's file, got {got}")


def _write(path: Path, parts: Iterable[bytes | Buffer]) -> None:
    try:
        if path.is_dir():
            raise IsADirectoryError("a folder")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        with _removed(temporary):
            with open(temporary, "xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, ValueError) as error:  # ValueError: no name that a file can have
        raise CheckpointFileError(f"{path}: expected a file that can be written, got: {error}") from error


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    """Removes a file if something goes wrong."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise

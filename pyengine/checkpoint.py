"""Opening a Hugging Face folder: config.json and the headers of its safetensors files, checked before anything is
allocated for a weight. Weights are read later, piece by piece, into memory that the caller owns.

A safetensors file is 8 bytes of header length (little endian), the header (JSON: tensor name → dtype, shape,
data_offsets) and the data, which the tensors cover without overlap, hole or tail (huggingface.co/docs/safetensors).
The header is read here and not by the safetensors library: it keeps the offsets to itself, accepts duplicate keys, and
maps the file (a file truncated under a map kills the process; a short read is an error).
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import reprlib
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArgumentError, ArgumentTypeError, CheckpointError, CheckpointFileError
from .plan import MatrixSpec, Plan, VectorSpec

MAX_JSON = 10_000_000  # bytes of a config, an index or a header; 80,000 tensors need about as much
MAX_RANK = 64
SLAB = 1 << 20  # bytes compared at a time

DTYPES = ("F32", "F16", "BF16")  # what a weight may be stored in

# Bits per element of every dtype that a header may name.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TIED_HEAD = "lm_head.weight"

# A shard's name comes from the index: one plain path component on every system, nothing that leaves the folder.
SHARD_NAME = re.compile(r"[^/\\:\0\ud800-\udfff]+\.safetensors")

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 160
_shortened.maxlist = _shortened.maxdict = 8
show = _shortened.repr  # repr() for messages: what comes from a file may be megabytes long


def open_file(folder: Path, name: str) -> io.FileIO:
    """Open folder/name, a regular file, unbuffered.

    A link may lead to another place in the folder, or to a blob of the Hugging Face cache that the folder is part of:
    <cache>/<repo>/snapshots/<revision>/name → <repo>/blobs/…, or <cache>/blobs/…, the store that repositories share.
    Raises `CheckpointFileError` for anything else.
    """
    path = folder / name
    try:
        home = Path(os.path.realpath(folder, strict=True))
        real = Path(os.path.realpath(path, strict=True))
        roots = [home]
        if home.parent.name == "snapshots":
            repo = home.parent.parent
            roots += [repo / "blobs", repo.parent / "blobs"]
        if any(real.is_relative_to(root) for root in roots) and real.is_file():
            return io.FileIO(real)
    except OSError as error:
        raise CheckpointFileError(f"{path}: expected a readable file, got: {error}") from error
    raise CheckpointFileError(f"{path}: expected a regular file inside the checkpoint's folder, got {real}")


def read_file(folder: Path, name: str, limit: int = MAX_JSON) -> bytes:
    """The bytes of folder/name; raises as `open_file`, and `CheckpointError` for more than `limit` of them."""
    with io.BufferedReader(open_file(folder, name)) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            if size <= limit:
                return file.read(size)
        except OSError as error:
            raise CheckpointFileError(f"{folder / name}: expected a readable file, got: {error}") from error
    raise CheckpointError(f"{folder / name}: expected at most {limit} bytes, got {size}")


def read_json(folder: Path, name: str, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in folder/name; raises as `read_file` and `parse_json`."""
    return parse_json(read_file(folder, name, limit), folder / name)


def parse_json(data: bytes | bytearray, where: object) -> dict[str, Any]:
    """The JSON object in `data`, read strictly: no duplicate keys, no NaN or Infinity, no number of absurd length.

    Raises `CheckpointError` that names `where`.
    """
    try:
        value = _decoder.decode(data.decode("utf-8"))
    except RecursionError:
        raise CheckpointError(f"{where}: expected a JSON object, got one nested too deep") from None
    except ValueError as error:  # also JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{where}: expected a JSON object, got an error in it: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {show(value)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"duplicate key {show(key)}")
        values[key] = value
    return values


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{show(text)} is not a finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > 100:  # int() takes quadratic time; honest files have 1e30 written out
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_integer)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are: little endian, row-major."""

    name: str
    dtype: str  # a key of BITS
    shape: tuple[int, ...]
    path: Path
    offset: int  # bytes from the start of the file
    nbytes: int

    def __str__(self) -> str:
        return f"{self.path}: tensor {show(self.name)}"


class SafetensorsFile:
    """An open safetensors file that any thread may read from."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self.path = path
        self.file = file
        self.metadata: dict[str, str] = {}  # as `read_header` has found it
        self.lock = threading.Lock()

    def read_into(self, out: memoryview, offset: int, what: object) -> None:
        """Fill `out` from `offset` on; raises `CheckpointFileError` naming `what` if the file ends before that."""
        done = 0
        while done < len(out):
            try:
                got = self._read(out[done:], offset + done)
            except (OSError, ValueError) as error:  # ValueError: closed
                raise CheckpointFileError(f"{what}: expected a readable file, got: {error}") from error
            if not got:
                raise CheckpointFileError(
                    f"{what}: expected {len(out)} bytes at offset {offset}, got {done}: the file was truncated since"
                )
            done += got

    def _read(self, out: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.file.fileno(), [out], offset)
        with self.lock:  # Windows
            self.file.seek(offset)
            return self.file.readinto(out) or 0

    def read_header(self) -> dict[str, TensorInfo]:
        """The tensors that the header describes; raises `CheckpointError` unless they tile the data exactly."""
        size = os.fstat(self.file.fileno()).st_size
        if size < 8:
            raise CheckpointError(f"{self.path}: expected 8 bytes of header length, got a file of {size}")
        prefix = bytearray(8)
        self.read_into(memoryview(prefix), 0, f"{self.path}: header length")
        length = int.from_bytes(prefix, "little")
        limit = min(size - 8, MAX_JSON)
        if not 2 <= length <= limit:
            raise CheckpointError(f"{self.path}: header length: expected 2 to {limit} bytes, got {length}")
        text = bytearray(length)
        self.read_into(memoryview(text), 8, f"{self.path}: header")
        header = parse_json(text, f"{self.path}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self.path}: __metadata__: expected an object of strings, got {show(metadata)}")
        self.metadata = metadata

        tensors = [_tensor(self.path, name, entry, 8 + length) for name, entry in header.items()]
        end = 8 + length
        for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != end:
                fault = "an overlap" if tensor.offset < end else "a hole"
                raise CheckpointError(f"{tensor}: expected its data at offset {end}, got {tensor.offset}: {fault}")
            end += tensor.nbytes
        if end != size:
            fault = "the file is truncated" if size < end else "a tail that no tensor covers"
            raise CheckpointError(f"{self.path}: expected {end} bytes, got {size}: {fault}")
        return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor {show(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected an object of dtype, shape and data_offsets, got {show(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: dtype: expected one of {', '.join(BITS)}, got {show(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where}: shape: expected at most {MAX_RANK} integers from 0 on, got {show(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets: expected two integers from 0 on, got {show(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        expected = f"{bits // 8} bytes for {dtype} {show(shape)}"
        raise CheckpointError(f"{where}: data_offsets: expected {expected}, got {end - begin} from {offsets}")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


class Checkpoint:
    """A Hugging Face folder with its weights' files open, for reading from any thread until `close`.

    >>> with Checkpoint.open("gpt2") as checkpoint:
    ...     wte = np.empty(checkpoint.tensors["wte.weight"].nbytes, np.uint8)
    ...     checkpoint.read_into("wte.weight", wte)
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo], files: dict[Path, SafetensorsFile]
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors
        self._files = files

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and the headers of model.safetensors, or of the shards of model.safetensors.index.json.

        Raises `CheckpointFileError` for a file that is missing or can't be read, `CheckpointError` for one whose
        content can't be honoured.
        """
        if not isinstance(folder, str | Path):
            raise ArgumentTypeError(f"folder: expected a str or a Path, got {show(folder)}")
        folder = Path(folder)
        if not os.path.isdir(folder):
            got = "a file" if os.path.exists(folder) else "nothing there"
            raise CheckpointFileError(f"{folder}: expected a checkpoint's folder, got {got}")
        config = read_json(folder, CONFIG)
        quantization = config.get("quantization_config")
        if quantization is not None:
            raise CheckpointError(
                f"{folder / CONFIG}: quantization_config: expected none, got {show(quantization)}: "
                "pyengine quantises full-precision weights itself"
            )
        files: dict[Path, SafetensorsFile] = {}
        tensors: dict[str, TensorInfo] = {}
        with ExitStack() as opened:
            for name, promised in _shards(folder).items():
                path = folder / name
                files[path] = SafetensorsFile(path, opened.enter_context(open_file(folder, name)))
                held = files[path].read_header()
                if lost := promised - held.keys():
                    raise CheckpointError(f"{path}: expected what {INDEX} places here, got no {_named(sorted(lost))}")
                if twice := held.keys() & tensors.keys():
                    raise CheckpointError(f"{path}: expected each tensor once, got again {_named(sorted(twice))}")
                tensors |= held
            opened.pop_all()  # all is well: they stay open
        return cls(folder, config, tensors, files)

    def read_into(self, name: str, out: NDArray[np.uint8], start: int = 0) -> None:
        """Read out.size bytes of tensor `name`, from its byte `start` on, into `out`: uint8, [n_bytes], writable.

        Raises `ArgumentError` for a range outside the tensor, `CheckpointFileError` if the file has shrunk meanwhile.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ArgumentError(f"name: expected a tensor of {self.folder}, got {show(name)}")
        if out.dtype != np.uint8 or out.ndim != 1 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ArgumentError(f"out: expected writable, contiguous uint8 [n_bytes], got {out.dtype} {out.shape}")
        if not 0 <= start <= tensor.nbytes - out.size:
            raise ArgumentError(
                f"start: expected {out.size} bytes within the {tensor.nbytes} of {show(name)}, got a start of {start}"
            )
        self._files[tensor.path].read_into(out.data, tensor.offset + start, tensor)

    def fileno(self, tensor: TensorInfo) -> int:
        """The descriptor of the file that a tensor is in, for native code to read from."""
        return self._files[tensor.path].file.fileno()

    def close(self) -> None:
        """Close the files; what was read stays valid."""
        for file in self._files.values():
            file.file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _shards(folder: Path) -> dict[str, set[str]]:
    """The folder's weight files, each with the tensors that the index (if there is one) promises to be in it."""
    if os.path.lexists(folder / WEIGHTS):
        return {WEIGHTS: set()}
    if not os.path.lexists(folder / INDEX):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in folder.glob(pattern))
        got = f"{', '.join(pickles[:4])}: save it as safetensors, a pickle can run code" if pickles else "neither"
        raise CheckpointFileError(f"{folder}: expected {WEIGHTS} or {INDEX}, got {got}")
    where = f"{folder / INDEX}: weight_map"
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected an object of tensor → file name, got {show(weight_map)}")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise CheckpointError(f"{where}: {show(tensor)}: expected a plain *.safetensors name, got {show(name)}")
        shards.setdefault(name, set()).add(tensor)
    return shards


def bind(checkpoint: Checkpoint, plan: Plan, prefixes: tuple[str, ...], ignored: str) -> dict[str, TensorInfo]:
    """Find the tensor of every weight of the plan: its name there → `TensorInfo`, each of the right shape and dtype.

    A tensor's name may start with one of `prefixes`. Names that match the regular expression `ignored` in full (after
    the prefix) are buffers that the architecture implies. A plan with tied embeddings has no weight for lm_head.weight:
    the tensor may be there if it is a copy of the embedding. Raises `CheckpointError` naming each tensor that is
    missing, left over, misshapen or of a wrong dtype.
    """
    present: dict[str, TensorInfo] = {}
    for tensor in checkpoint.tensors.values():
        prefix = next((prefix for prefix in prefixes if tensor.name.startswith(prefix)), "")
        name = tensor.name[len(prefix) :]
        if re.fullmatch(ignored, name):
            continue
        if name in present:
            raise CheckpointError(f"{tensor}: expected one tensor of this name, got also {present[name]}")
        present[name] = tensor

    specs: dict[str, MatrixSpec | VectorSpec] = {**plan.matrices, **plan.vectors}
    expected = {spec.tensor for spec in specs.values()}
    missing = sorted(expected - present.keys())
    extra = sorted(present.keys() - expected)
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: missing {_named(missing)}{_closest(missing[0], extra)}")
    for spec in specs.values():
        tensor = present[spec.tensor]
        if tensor.shape != spec.shape:
            raise CheckpointError(f"{tensor}: shape: expected {list(spec.shape)}, got {show(list(tensor.shape))}")
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{tensor}: dtype: expected one of {', '.join(DTYPES)}, got {tensor.dtype}")
    if TIED_HEAD in extra:
        extra.remove(TIED_HEAD)
        head = present[TIED_HEAD]
        embedding = next(present[specs[op.weight].tensor] for op in plan.linears() if op.out == plan.logits)
        if not _same_bytes(checkpoint, head, embedding):
            raise CheckpointError(
                f"{head}: tie_word_embeddings is true: expected a copy of {show(embedding.name)}, got one that differs"
            )
    if extra:
        raise CheckpointError(f"{checkpoint.folder}: expected a {plan.model_type} alone, got also {_named(extra)}")
    return {weight: present[spec.tensor] for weight, spec in specs.items()}


def _same_bytes(checkpoint: Checkpoint, a: TensorInfo, b: TensorInfo) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    slabs = np.empty((2, SLAB), np.uint8)
    for start in range(0, a.nbytes, SLAB):
        slab_a, slab_b = slabs[:, : a.nbytes - start]
        checkpoint.read_into(a.name, slab_a, start)
        checkpoint.read_into(b.name, slab_b, start)
        if not np.array_equal(slab_a, slab_b):
            return False
    return True


def _named(names: list[str]) -> str:
    first = ", ".join(show(name) for name in names[:5])
    return f"{len(names)} tensor{'s' * (len(names) > 1)}: {first}{', …' if len(names) > 5 else ''}"


def _closest(name: str, candidates: Iterable[str]) -> str:
    import difflib  # not needed to load what is well

    # Comparing takes quadratic time in the length, so a bounded number of names that could be meant are looked at.
    few = list(itertools.islice((candidate for candidate in candidates if len(candidate) < 100), 1000))
    close = difflib.get_close_matches(name, few, n=1)
    return f"; the closest to {show(name)} is {show(close[0])}" if close else ""

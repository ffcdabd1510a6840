"""The engines that are compared: one module each, with a class `Engine` that derives from `Base`.

A module is imported in the worker of its variant alone, so what it needs may be missing elsewhere. A variant is an
engine in one of its own formats; its width is the format's kind, by which variants are compared.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Prompts = Sequence[Sequence[int]]
Floats = NDArray[np.float32]

WIDTHS = ("float32", "bfloat16", "int8", "int4")

# Engine → its formats → their widths. Ours comes first: the others are compared with its first of a width.
VARIANTS: dict[str, dict[str, str]] = {
    "pyengine": {
        "float32": "float32",
        "bfloat16": "bfloat16",
        "int8": "int8",
        "int8-kv-int8": "int8",
        "int4": "int4",
    },
    "llama_cpp": {"F32": "float32", "BF16": "bfloat16", "Q8_0": "int8", "Q4_0": "int4", "Q4_K_M": "int4"},
    "ctranslate2": {"float32": "float32", "int8": "int8"},
    "openvino_genai": {"float32": "float32", "int8": "int8", "int4": "int4"},
    "torch": {"float32": "float32", "bfloat16": "bfloat16"},
    "onnxruntime": {"float32": "float32", "int8": "int8"},
}


class NotAvailable(Exception):
    """What an engine can't do, with the reason: not installed, no such format, nothing to measure."""


@dataclass
class Run:
    """A greedy continuation: token ids of each prompt, and when the last prompt had its first, second, … of them."""

    tokens: list[list[int]]  # [n_prompt, n_new]
    seconds: list[float]  # [n_new], since the call


class Base(ABC):
    """An engine with a model loaded in one variant. Making one is what loading is timed by."""

    packages: ClassVar[Sequence[str]] = ()  # the distributions whose versions are told
    settings: ClassVar[str] = ""  # what differs from the engine's defaults, for the report

    @abstractmethod
    def __init__(self, files: Path, variant: str, threads: int) -> None:
        """Loads what `convert` returned."""

    @staticmethod
    def convert(checkpoint: Path, work: Path, variant: str) -> Path:
        """Makes what this variant loads, somewhere in `work`, unless it is there; returns its path.

        The default is for engines that read the checkpoint as it is.
        """
        return checkpoint

    @abstractmethod
    def generate(self, prompts: Prompts, n_new: int) -> Run:
        """The most probable tokens after prompts of one length, n_new of each, whatever they are; timed.

        Nothing may be kept from one call to the next. What depends on the sizes alone may be made before the clock
        starts.
        """

    def logits(self, token_ids: Sequence[int]) -> Floats | None:
        """The logits at every position of a text, [n, vocab_size]; None where the engine doesn't show them."""
        return None


def engine_class(name: str) -> type[Base]:
    """The class of an engine; raises NotAvailable where what it needs is not installed."""
    try:
        module = importlib.import_module(f"bench.engines.{name}")
    except ImportError as error:
        raise NotAvailable(f"not installed: {error}") from error
    engine: type[Base] = module.Engine
    return engine

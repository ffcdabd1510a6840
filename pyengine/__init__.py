"""pyengine runs transformer language models on CPUs, straight from their Hugging Face checkpoints.

>>> import pyengine
>>> model = pyengine.load("demo")
>>> model.generate("Once upon a time", max_new_tokens=16, temperature=0).text
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    CheckpointFileError,
    Error,
    NonFiniteError,
    OutOfMemoryError,
)

if TYPE_CHECKING:
    from .completion import Completion, Piece, Usage
    from .loading import load
    from .model import Model
    from .params import SamplingParams
    from .runner import Request
    from .sampling import TokenLogprob
    from .scoring import Score
    from .state import State
else:
    # Imported when first used: the engine takes a fifth of a second, and can fail, as where PYENGINE_ISA names no SIMD
    # level; the command line, which is in this package, gets the chance to say so in one line.
    _MODULES = {
        "completion": ("Completion", "Piece", "Usage"),
        "loading": ("load",),
        "model": ("Model",),
        "runner": ("Request",),
        "params": ("SamplingParams",),
        "sampling": ("TokenLogprob",),
        "scoring": ("Score",),
        "state": ("State",),
    }

    def __getattr__(name):
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CheckpointError",
    "CheckpointFileError",
    "Completion",
    "Error",
    "Model",
    "NonFiniteError",
    "OutOfMemoryError",
    "Piece",
    "Request",
    "SamplingParams",
    "Score",
    "State",
    "TokenLogprob",
    "Usage",
    "load",
]

"""pyengine runs transformer language models on CPUs, straight from their Hugging Face checkpoints.

>>> import pyengine
>>> model = pyengine.load("demo")
>>> model.generate("Once upon a time", max_new_tokens=16, temperature=0).text
"""

from .errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    CheckpointFileError,
    Error,
    NonFiniteError,
    OutOfMemoryError,
)
from .generation import Completion, Piece, Score, Usage
from .model import Model, load
from .sampling import SamplingParams, TokenLogprob

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
    "SamplingParams",
    "Score",
    "TokenLogprob",
    "Usage",
    "load",
]

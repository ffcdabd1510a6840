"""Every error that pyengine raises: each derives from `Error` and from the built-in that fits.

A message names the thing (file, tensor, key, argument), what was expected and what came.
"""


class Error(Exception):
    """Base of every error that pyengine raises on purpose."""


class ArgumentError(Error, ValueError):
    """An argument of a call has a value that can't be honoured."""


class ArgumentTypeError(Error, TypeError):
    """An argument of a call has a type that can't be honoured."""


class CheckpointError(Error, ValueError):
    """The content of a checkpoint or a saved state (a config key, a tensor, a header) can't be honoured."""


class CheckpointFileError(Error, OSError):
    """A file of a checkpoint or a saved state is missing, or can't be read or written."""


class OutOfMemoryError(Error, MemoryError):
    """There is not enough memory; the message says for what and how much."""


class NonFiniteError(Error, ArithmeticError):
    """The model produced NaN or infinite logits."""


class StepStopped(Error):
    """A step of the executor was stopped from another thread; no sequence has changed."""

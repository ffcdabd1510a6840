"""Reading config.json key by key: a value is honoured or refused by name, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import CheckpointError

T = TypeVar("T")

MAX_SIZE = 2**31 - 1
MAX_LAYER = 10_000  # a plan lists each layer; deeper than any model


def refuse(key: str, expected: str, got: object) -> CheckpointError:
    """The error for a config key whose value can't be honoured; the caller raises it."""
    return CheckpointError(f"config.json: {key}: expected {expected}, got {got!r}")


class Config:
    """A checkpoint's config.json, read one checked key at a time; a missing or null key takes the family's default."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def size(self, key: str, default: int, most: int = MAX_SIZE) -> int:
        """A positive integer, at most `most`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise refuse(key, f"an integer from 1 to {most}", value)
        return value

    def positive(self, key: str, default: float) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise refuse(key, "a number above 0", value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise refuse(key, "true or false", value)
        return value

    def choice(self, key: str, default: str, known: Mapping[str, T]) -> T:
        """One of the names in `known`; returns what it maps to."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in known:
            raise refuse(key, f"one of {', '.join(sorted(known))}", value)
        return known[value]

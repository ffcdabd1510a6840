"""What tests of constraints share: a vocabulary of characters, and constraints over it."""

from __future__ import annotations

from typing import Any

import pytest

from pyengine.constraints import Vocabulary

N = 128  # tokens are ASCII characters
END = 0

SCHEMAS: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "home": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo"]},
                    "since": {"type": "integer", "minimum": 1900, "maximum": 2100},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
        "required": ["name", "age", "home"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "minItems": 1,
        "maxItems": 4,
        "items": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 5}, {"const": {"x": [1, None]}}]},
    },
    "formats": {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"}},
        "required": ["day", "id"],
        "additionalProperties": False,
    },
}
NUMBERS = {"type": "array", "maxItems": 3, "items": {"type": "number", "minimum": -5, "exclusiveMaximum": 1e3}}
REGEXES = {
    "year": r"(19|20)[0-9]{2}",
    "choice": r"yes|no|maybe|none of these",
    "word": r"[a-z]{2,9}(-[a-z]{2,9})?",
    "open": r"a+b*",
}
GRAMMARS = {
    "sum": 'start: NUMBER ("+" NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/',
}
CASES = [
    *(pytest.param("json_schema", schema, id=name) for name, schema in SCHEMAS.items()),
    *(pytest.param("regex", regex, id=name) for name, regex in REGEXES.items()),
    *(pytest.param("grammar", grammar, id=name) for name, grammar in GRAMMARS.items()),
]


def ascii_vocabulary() -> Vocabulary:
    """A token for each character."""
    pytest.importorskip("llguidance", reason="constraints need llguidance: the extra `constrained`")
    return Vocabulary([bytes([i]) for i in range(N)], special_ids=[END], encode=lambda text: list(text.encode()))

"""One file per model family, named after the model_type of its config.json.

A family's file has: `plan(config) -> Plan`; PREFIXES, that some checkpoints put before tensor names; IGNORED, a regular
expression of tensors that hold nothing the plan needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..config import refuse


def supported() -> list[str]:
    """The model types that can be loaded."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def architecture_of(config: Mapping[str, Any]) -> ModuleType:
    """The family's module for a config.json; raises CheckpointError for a model_type that isn't supported."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in supported():
        raise refuse("model_type", f"one of {', '.join(supported())}", model_type)
    return importlib.import_module(f"{__name__}.{model_type}")

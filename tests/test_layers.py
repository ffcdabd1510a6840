"""Imports point one way: a room may enter those below it, never those above or beside it that aren't listed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyengine"

# From the bottom up; what stands on one line doesn't import each other unless ORDER_WITHIN says so.
LAYERS = [
    ["errors"],
    ["_native"],
    ["constraints", "params"],
    ["plan", "config", "sampling", "cgroup", "prefix", "window"],
    ["architectures", "completion", "cost", "checkpoint", "equalize", "kv", "threads"],
    ["tokenizer", "weights", "executor", "memory"],
    ["task"],
    ["scheduler", "speculation"],
    ["generation", "runner"],
    ["beam", "scoring", "saved"],
    ["state"],
    ["model"],
    ["loading"],
    ["benchmark", "batch", "arguments"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py" and "demo" not in p.parts)


def room(path: Path) -> str:
    """The layer's name that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The rooms of this package that a Python file imports from, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {room((base / name.replace(".", "/")).resolve()) for name in names}
    return found - {room(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_point_down(path: Path) -> None:
    for name in imports(path):
        assert LEVEL[name] < LEVEL[room(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "_native").glob("*.p[yx][xd]")), ids=lambda path: path.name)
def test_native_modules_import_errors_alone(path: Path) -> None:
    for dots in re.findall(r"^from (\.+\w*) c?import", path.read_text(), re.M):
        assert not dots.startswith("..") or dots == "..errors"


def test_architectures_know_plan_and_config_alone() -> None:
    for path in (PACKAGE / "architectures").glob("*.py"):
        assert imports(path) <= {"plan", "config"}


def test_csrc_knows_no_threads_allocation_python_or_stdio() -> None:
    allowed = {"math.h", "string.h", "stdint.h", "immintrin.h", "arm_neon.h"}
    of_cpu = {"cpuid.h", "intrin.h", "sys/auxv.h", "windows.h"}
    for path in (PACKAGE.parent / "csrc").rglob("*.[ch]"):
        for header in re.findall(r"#include <(.+)>", path.read_text()):
            assert header in allowed or (path.name == "cpu.c" and header in of_cpu), f"{path.name}: {header}"


def test_intrinsics_stay_in_isa() -> None:
    for path in (PACKAGE.parent / "csrc").glob("*.[ch]"):
        assert not re.search(r"\b_mm\d*_|\bv\w+q_[fsu]\d+\b|__m\d", path.read_text()), path.name


def test_the_check_can_fail(tmp_path: Path) -> None:
    assert imports(PACKAGE / "cli.py") > {"errors", "loading"}
    order = ("cli", "loading", "model", "generation", "scheduler", "kv", "plan", "_native")
    assert sorted(order, key=lambda name: -LEVEL[name]) == list(order)

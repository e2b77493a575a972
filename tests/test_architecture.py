"""docs/ARCHITECTURE.md names places that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
STOPS = re.findall(
    r"`((?:yan_core|pipelines|serve)/[\w/]+\.py)` `([\w.]+)`", (ROOT / "docs/ARCHITECTURE.md").read_text()
)


def names_in(file: Path) -> set[str]:
    """Functions, classes and methods of a file."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def test_every_stop_is_a_function_or_class_of_its_file():
    assert len(STOPS) > 25
    assert [f"{file}: {name}" for file, name in STOPS if name not in names_in(ROOT / file)] == []

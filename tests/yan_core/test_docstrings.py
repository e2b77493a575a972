"""What a public docstring must tell: shapes of tensors, and the errors its own body raises."""

import ast
import doctest
from collections.abc import Iterator
from pathlib import Path

import pytest

import yan_core

PACKAGE = Path(__file__).parents[2] / "yan_core"
Definition = ast.FunctionDef | ast.ClassDef


def public(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}.{child.name}")


DEFINITIONS = dict(
    pair for file in sorted(PACKAGE.glob("*.py")) for pair in public(ast.parse(file.read_text()), file.stem)
)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_public_docstring_tells_shapes_and_errors(name: str) -> None:
    node = DEFINITIONS[name]
    text = ast.get_docstring(node)
    assert text, f"{name} has no docstring"
    if isinstance(node, ast.FunctionDef):
        signature = f"{ast.unparse(node.args)} -> {ast.unparse(node.returns) if node.returns else ''}"
        assert "Tensor" not in signature or "[" in text, f"{name} gives no shape"
        raises = any(isinstance(part, ast.Raise) for part in ast.walk(node))
        assert not raises or "aises" in text, f"{name} raises something that it does not tell"


def test_the_example_of_the_package_uses_every_public_name_and_is_true() -> None:
    assert [name for name in yan_core.__all__ if f"yan_core.{name}" not in (yan_core.__doc__ or "")] == []
    found = doctest.testmod(yan_core)
    assert found.attempted >= 14 and found.failed == 0

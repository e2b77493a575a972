"""What a public docstring must tell: shapes of tensors, and the errors its own body raises."""

import ast
import doctest
import re
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


SHAPE = r"\[(?:(?:[a-z]|\.\.\.|\d+, [a-z])[^\]]*)?\]"
"""A shape; `in [0, 1]` is none."""
REFERENCE = r"[Ss]ame shape|[Ss]haped like `?\w|any shape|\ba scalar\b"
AXES = r"\w+_[A-Z]+"
"""A name that says its axes, which the legend at the top of its module names."""


def listed(text: str) -> dict[str, str]:
    """What a docstring says under Args, by argument."""
    section = re.search(r"^Args:\n((?: {4}.*(?:\n|$)|\n)+)", text, re.MULTILINE)
    found = re.findall(r"^ {4}(\w+): ((?:.*(?:\n {8}.*)*))", section[1] if section else "", re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in found}


def untold(node: ast.FunctionDef, text: str) -> list[str]:
    """Tensors among the arguments whose shape the docstring does not tell, under Args or in a summary without Args."""
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    tensors = [a.arg for a in arguments if a.annotation and re.search(r"\bTensor\b", ast.unparse(a.annotation))]
    told, summary = listed(text), " ".join(text.split())
    for of in [] if told else re.findall(r"(?:See|[Aa]rguments as) `([\w.]+)`", summary):
        for other in [other for known, other in DEFINITIONS.items() if known.endswith(f".{of}")]:
            told |= listed(ast.get_docstring(other) or "")
    wrong = []
    for name in tensors:
        here = rf"\b{name}`?,?(?: of)? {SHAPE}"
        if name == tensors[0]:
            here += rf"|(?:^|[:,;] ){SHAPE} (?:in|->) "  # "[batch] -> [batch, d_model]."
        fits = re.search(rf"{SHAPE}|{REFERENCE}", told[name]) if name in told else not told and re.search(here, summary)
        if not fits and not re.fullmatch(AXES, name):
            wrong.append(name)
    return wrong


def unheaded(node: ast.FunctionDef, text: str) -> bool:
    """Whether the body raises and the docstring has no section that says what."""
    raises = any(isinstance(part, ast.Raise) for part in ast.walk(node))
    return raises and not re.search(r"^Raises:\n {4}\w+: \S", text, re.MULTILINE)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_public_docstring_tells_shapes_and_errors(name: str) -> None:
    node = DEFINITIONS[name]
    text = ast.get_docstring(node)
    assert text, f"{name} has no docstring"
    if isinstance(node, ast.FunctionDef):
        assert untold(node, text) == [], f"{name} does not give the shapes of these"
        gives = "Tensor" in ast.unparse(node.returns) if node.returns else False
        assert not gives or re.search(rf"{SHAPE}|{REFERENCE}", text), f"{name} does not give its result's shape"
        assert not unheaded(node, text), f"{name} raises something that it does not tell"


def test_arguments_named_by_their_axes_have_a_legend() -> None:
    for file in PACKAGE.glob("*.py"):
        module = ast.parse(file.read_text())
        axes = {
            axis
            for node in ast.walk(module)
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            for a in node.args.args
            if re.fullmatch(AXES, a.arg)
            for axis in a.arg.rpartition("_")[2]
        }
        legend = ast.get_docstring(module) or ""
        assert [axis for axis in axes if not re.search(rf"\b{axis} \w", legend)] == [], file.name


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("Mix.\n\nArgs:\n    x: Points, [batch, length].\n    mask: True for real tokens, same shape.", []),
        ("Mix.\n\nArgs:\n    x: Points, [batch,\n        length].\n    mask: Shaped like x, or\n        [batch].", []),
        ("Mix x [batch, length] by its `mask`, [batch, length].", []),
        ("[batch, length] -> [batch]; mask [batch, length].", []),
        ("[batch, length] in and out; mask [batch, length].", []),
        ("Mixed: [batch, length].", ["x", "mask"]),
        ("Mix x in [0, 1] by a mask: [batch, length].", ["x", "mask"]),
        ("[batch, length] in and out.", ["mask"]),
        ("Mix.\n\nArgs:\n    x: Points in [0, 1].\n    mask: True for real tokens.", ["x", "mask"]),
        ("Mix x [batch].\n\nArgs:\n    mask: True for real tokens, [batch].", ["x"]),
        ("Mix.\n\nArgs:\n    x: Points.\n    mask: The mask.\n\nReturns:\n    [batch].", ["x", "mask"]),
    ],
)
def test_what_tells_a_shape(text: str, wrong: list[str]) -> None:
    (node,) = ast.parse("def mix(x: Tensor, mask: Tensor | None, steps: int) -> Tensor: ...").body
    assert isinstance(node, ast.FunctionDef)
    assert untold(node, text) == wrong


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("Check.\n\nRaises:\n    ValueError: If it is not so.", False),
        ("Check; raises ValueError.", True),
        ("Check.\n\nRaises:\n", True),
    ],
)
def test_what_tells_an_error(text: str, wrong: bool) -> None:
    (node,) = ast.parse("def check(x: int) -> None:\n    if x:\n        raise ValueError").body
    assert isinstance(node, ast.FunctionDef)
    assert unheaded(node, text) == wrong


def test_the_example_of_the_package_uses_every_public_name_and_is_true() -> None:
    assert [name for name in yan_core.__all__ if f"yan_core.{name}" not in (yan_core.__doc__ or "")] == []
    found = doctest.testmod(yan_core)
    assert found.attempted >= 14 and found.failed == 0

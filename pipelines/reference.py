"""`docs/CONFIG.md` from the dataclasses of `yan_core.config`: every key, its type, its default and what it does.

python -m pipelines.reference docs/CONFIG.md
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import typing
from pathlib import Path
from typing import Any

from yan_core.config import RunConfig
from yan_core.files import write_file

HEAD = """# Settings of a run

Every key of a run's YAML file, as `yan run --config FILE` reads it; on the command line with dots, such as
`--stages.flow.max_steps 500`. Made from `yan_core/config.py` by `python -m pipelines.reference docs/CONFIG.md`.
"""


def said_of_fields(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass, which Python itself forgets."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def section_of(hint: Any) -> type | None:
    """The dataclass that a key holds, alone, or by name; None: it holds values."""
    for part in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(part) and isinstance(part, type):
            return part
    return None


def default_of(field: dataclasses.Field[Any]) -> str:
    """A default as YAML has it."""
    value = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
    if dataclasses.is_dataclass(value):
        return ""
    return value if isinstance(value, str) and value else json.dumps(value)


def section(cls: type, prefix: str, text: str) -> list[str]:
    """Lines of a dataclass's own keys, then those of the sections below it."""
    hints, texts = typing.get_type_hints(cls), said_of_fields(cls)
    lines = [
        "",
        f"## {prefix.rstrip('.') or 'The run'}",
        "",
        text,
        "",
        "| key | type | default | |",
        "|---|---|---|---|",
    ]
    below: list[str] = []
    for field in dataclasses.fields(cls):
        held, key, said = section_of(hints[field.name]), prefix + field.name, texts.get(field.name, "")
        if held is not None:
            below += section(held, f"{key}.{'NAME.' * (typing.get_origin(hints[field.name]) is dict)}", said)
            continue
        cells = (f"`{key}`", f"`{field.type}`", f"`{default_of(field)}`", said)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*(lines if len(lines) > 7 else lines[:4]), *below]


def page() -> str:
    """The page, in Markdown."""
    return HEAD + "\n".join(section(RunConfig, "", " ".join((RunConfig.__doc__ or "").split()))) + "\n"


if __name__ == "__main__":
    write_file(Path(sys.argv[1]), page())

"""`docs/CONFIG.md` from the dataclasses of `yan_core.config` and the arguments of the served app: every key, its type,
its default and what it does; and `docs/API.md` from the docstrings of what `yan_core` exports.

    python -m pipelines.reference docs
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import re
import sys
import typing
from pathlib import Path
from typing import Any

import yan_core
from yan_core.config import RunConfig
from yan_core.files import write_file

API_HEAD = """# yan_core in Python

What `import yan_core` gives, made from its docstrings by `python -m pipelines.reference docs`; settings are in
[CONFIG.md](CONFIG.md). The examples are run by the tests.
"""

HEAD = """# Settings

Every key of a run's YAML file, as `yan run --config FILE` reads it; on the command line with dots, such as
`--stages.flow.max_steps 500`. Those of [the served app](#the-served-app) are at the end. Made from `yan_core/config.py`
and `serve/schemas.py` by `python -m pipelines.reference docs`.
"""

SERVING_HEAD = """
## The served app

The arguments of `serve.app:build_app`, as `args` of a Serve config and `serve run` have them. `yan serve` has options
for most, with dashes for underscores.

| argument | type | default | |
|---|---|---|---|
"""


SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
"""Bounds of an argument, by the attributes that hold them."""


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


def as_yaml(value: Any) -> str:
    """A default as YAML has it."""
    if dataclasses.is_dataclass(value):
        return ""
    return value if isinstance(value, str) and value else json.dumps(value)


def default_in(holder: Any, field: dataclasses.Field[Any]) -> Any:
    """What a field holds where nothing is set: in `holder`, which may set it otherwise than its class does."""
    if holder is not None:
        return getattr(holder, field.name)
    return field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]


def section(cls: type, prefix: str, text: str, holder: Any = None) -> list[str]:
    """Lines of a dataclass's own keys, then those of the sections below it; the defaults are those in `holder`."""
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
        value = default_in(holder, field)
        if held is not None:
            inside = value if isinstance(value, held) else None
            below += section(held, f"{key}.{'NAME.' * (typing.get_origin(hints[field.name]) is dict)}", said, inside)
            continue
        cells = (f"`{key}`", f"`{field.type}`", f"`{as_yaml(value)}`", said)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*(lines if len(lines) > 7 else lines[:4]), *below]


def serving() -> list[str]:
    """Lines of the served app's arguments."""
    app_args = importlib.import_module("serve.schemas").AppArgs  # by a string: pipelines imports nothing of serve
    texts, lines = said_of_fields(app_args), []
    for name, field in app_args.model_fields.items():
        kind = getattr(field.annotation, "__name__", "")
        bounds = [
            f" {sign} {getattr(of, key)}" for of in field.metadata for key, sign in SIGNS.items() if hasattr(of, key)
        ]
        default = "" if field.is_required() else f"`{json.dumps(field.default)}`"
        lines.append(f"| `{name}` | `{kind}`{','.join(bounds)} | {default} | {texts[name]} |")
    return lines


def page() -> str:
    """The page, in Markdown."""
    of_run = section(RunConfig, "", " ".join((RunConfig.__doc__ or "").split()))
    return HEAD + "\n".join(of_run) + "\n" + SERVING_HEAD + "\n".join(serving()) + "\n"


def described(text: str) -> list[str]:
    """A docstring as Markdown: its sections (Args, Returns, Raises, Attributes) in bold, their entries as a list."""
    lines: list[str] = []
    inside = ""
    for line in inspect.cleandoc(text).splitlines():
        heading = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
        if heading:
            inside = heading[1]
            lines += [f"**{inside}**", ""]
        elif not inside or not line.startswith("    "):
            lines.append(line)
        elif inside != "Returns" and re.match(r" {4}\S", line):
            name, _, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {rest}" if rest else f"- {name}")
        else:
            lines.append(line[4:] if inside == "Returns" else line[6:])
    return [*lines, ""]


def signature_of(name: str, what: Any) -> list[str]:
    """A call as it is written, in a block; its annotations as in the source."""
    whole = inspect.signature(what)
    taken = [value for key, value in whole.parameters.items() if key != "self"]
    parts = [
        f"{'*, ' * (value.kind is value.KEYWORD_ONLY and (not before or before.kind is not value.KEYWORD_ONLY))}{value}"
        for before, value in zip([None, *taken], taken, strict=False)
    ]
    back = "" if inspect.isclass(what) else f" -> {whole.return_annotation}"
    text = f"{name}({', '.join(parts)}){back}"
    if len(text) > 110:
        text = f"{name}(\n    " + ",\n    ".join(parts) + f",\n){back}"
    return [
        "```python",
        re.sub(r"""(: )(?:'([^']*)'|"([^"]*)")""", r"\1\2\3", text).replace(
            "*, ", "*,\n    " if "\n" in text else "*, "
        ),
        "```",
        "",
    ]


def entry(name: str, what: Any) -> list[str]:
    """A function or class, and the public methods that are its own."""
    lines = [f"## {name}", "", *signature_of(name, what), *described(what.__doc__ or "")]
    for method, value in vars(what).items() if inspect.isclass(what) else ():
        inner = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        text = inspect.getdoc(inner)
        if method.startswith("_") or not text or not (inspect.isfunction(inner) or isinstance(inner, property)):
            continue
        called = f"{name}.{method}" if inner is not value else f"{re.findall('[A-Z][a-z]+', name)[-1].lower()}.{method}"
        head = [f"`{called}`", ""] if isinstance(inner, property) else signature_of(called, getattr(what, method))
        lines += [f"### {name}.{method}", "", *head, *described(text)]
    return lines


def api_page() -> str:
    """The page of what `yan_core` exports, in Markdown."""
    text, *examples = re.split(r"\n\n(?=[^>\n])", inspect.cleandoc(yan_core.__doc__ or ""))
    lines = [text, ""]
    for example in examples:
        said, _, code = example.partition("\n\n")
        lines += [said, "", *(["```python", code, "```", ""] if code else [])]
    for name in yan_core.__all__:
        what = getattr(yan_core, name)
        if not (dataclasses.is_dataclass(what) and what.__module__ == "yan_core.config"):
            lines += entry(name, what)
    return re.sub(r"\n{3,}", "\n\n", API_HEAD + "\n" + "\n".join(lines).strip() + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python -m pipelines.reference FOLDER; writes CONFIG.md and API.md into a folder that is there")
    write_file(Path(sys.argv[1]) / "CONFIG.md", page())
    write_file(Path(sys.argv[1]) / "API.md", api_page())

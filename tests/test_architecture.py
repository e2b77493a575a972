"""What the whole tree keeps to: docs/ARCHITECTURE.md names places that exist, files are short, settings are read."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from pipelines import reference
from pipelines.results import main as write_results
from serve import schemas
from yan_core import config

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


SOURCES = [file for top in ("yan_core", "pipelines", "serve") for file in sorted((ROOT / top).rglob("*.py"))]


def test_no_file_is_too_long_to_be_read_at_once():
    lengths = {file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    most = {file: 400 if file.parts[0] == "yan_core" else 500 for file in lengths}
    most[Path("yan_core/config.py")] = 900  # every setting and every default in one place
    assert {file: lines for file, lines in lengths.items() if lines > most[file]} == {}


def test_every_setting_is_read_somewhere():
    code = {file: file.read_text(encoding="utf-8") for file in SOURCES}
    whole = "\n".join(text for file, text in code.items() if file.name != "config.py")
    read = {*re.findall(r"\.([a-z]\w*)", whole), *(f"weight_{term}" for term in re.findall(r'"loss_(\w+)"', whole))}
    settings = {
        field.name
        for module in (config, schemas)
        for cls in vars(module).values()
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module.__name__
        for field in dataclasses.fields(cls)
    } | set(schemas.AppArgs.model_fields)
    assert len(settings) > 100
    assert settings - read == set()


def test_the_page_of_settings_is_made_from_the_settings():
    page = reference.page()
    assert (ROOT / "docs/CONFIG.md").read_text(encoding="utf-8") == page  # python -m pipelines.reference docs
    assert "| `stages.flow.optim.lr` | `float` | `0.001` | " in page
    assert '| `stages.autoencoder.trains` | `tuple[Part, ...]` | `["target_encoder", "decoder"]` | ' in page  # its own
    assert re.findall(r"^\| `[^`]+` \| `.+` \| `.+` \|  \|$", page, re.MULTILINE) == []  # each says what it does


def test_the_page_of_the_package_is_made_from_its_docstrings():
    page = (ROOT / "docs/API.md").read_text(encoding="utf-8")
    assert page == reference.api_page()  # python -m pipelines.reference docs
    for said in (
        "## load\n",
        "### TextGenerator.generate\n\n```python\ngenerator.generate(\n    sources: Sequence[str],\n",
        "\n    *,\n    method: Method = 'euler',\n",
        "\nTokenizer.from_json(text: str) -> Tokenizer\n",
        "\n- `sources`: Texts as the model's task template makes them.\n",
        "\n>>> (answer,) = generator.generate([story], num_steps=3, seeds=7)\n",
    ):
        assert said in page


def test_the_results_are_those_of_the_reports(tmp_path):
    """`make docs` writes both; nobody types a figure."""
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    reports = [str(path) for path in sorted((ROOT / "docs" / "results").glob("*.json"))]
    write_results([*reports, "--page", str(tmp_path / "page.md"), "--short", str(tmp_path / "README.md")])
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs" / "RESULTS.md").read_text()
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    kept = {path.name for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert kept == {path.name for path in (tmp_path / "pictures").iterdir()} and kept
    assert kept == set(re.findall(r"\(pictures/(.+?)\)", (ROOT / "docs" / "RESULTS.md").read_text()))


def test_no_page_has_a_place_that_was_to_be_filled_in():
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        assert re.findall(r"\b[A-Z]+_HERE\b|\bTODO\b|\bTBD\b", path.read_text(encoding="utf-8")) == [], path.name

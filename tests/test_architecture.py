"""What the whole tree keeps to: docs/ARCHITECTURE.md names places that exist, files are short, settings are read."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
from pathlib import Path

import pytest

from pipelines import reference
from pipelines.results import main as write_results
from serve import schemas
from tests.settings_read import Tree
from yan_core import config
from yan_core.generator import TextGenerator

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


USED_WHOLE = {
    # `TextGenerator.generate(..., **vars(sampling))`
    "SamplingConfig": set(inspect.signature(TextGenerator.generate).parameters),
    # `weigh` in yan_core/loss.py: the weight of each term, by the term's name
    "FlowLossConfig": {
        f"weight_{node.value.removeprefix('loss_')}"
        for node in ast.walk(ast.parse((ROOT / "yan_core/loss.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and re.fullmatch(r"loss_\w+", str(node.value))
    },
}
"""Fields that no line names, since their section is handed on whole."""
SECTIONS = {
    cls.__name__: {field.name for field in dataclasses.fields(cls)}
    for cls in vars(config).values()
    if isinstance(cls, type) and dataclasses.is_dataclass(cls)
} | {"AppArgs": set(schemas.AppArgs.model_fields)}


@functools.cache
def tree() -> Tree:
    return Tree(file.read_text(encoding="utf-8") for file in SOURCES if "benchmarks" not in file.parts)


def test_every_setting_is_read_somewhere():
    assert sum(map(len, SECTIONS.values())) > 180
    unread = {
        f"{section}.{name}"
        for section, names in SECTIONS.items()
        for name in names - USED_WHOLE.get(section, set())
        if (section, name) not in tree().read
    }
    assert unread == set()


def test_no_common_name_would_pass_for_a_setting_that_is_read():
    """Other objects' attributes have these names, in hundreds of places."""
    common = {"size", "text", "path", "step", "limit", "shape", "name", "kind", "tokens", "length", "device", "rank"}
    read = {(s, n) for s, names in SECTIONS.items() for n in common - names if (s, n) in tree().read}
    assert read == set()


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("def f(config: Run): return config.part.size", {"size"}),
        ("def f(part: Part | None): return part and part.size", {"size"}),
        ("def f(run: Run): part = run.part; return part.size", {"size"}),
        ("def f(run: Run): seed, part = run.seed, run.part; return part.size", {"size"}),
        ("def f(run: Run): return [part.size for part in run.parts.values()]", {"size"}),
        ("def f(run: Run): return replace(run.part, text='').size", {"size"}),
        ("def f(run: Run, name: str): return getattr(run, name).size", {"size"}),
        ("def f(run: Run):\n  def g(): return run.part.text\n  return g", {"text"}),
        (
            "class A:\n  def __init__(self, run: Run): self.run = run\n  def f(self): return self.run.part.text",
            {"text"},
        ),
        ("class A:\n  run: Run\n  def f(self): return self.run.part.text", {"text"}),
        ("def made() -> Part: ...\ndef f(): return made().text", {"text"}),
        ("def f(): return from_dict(Part, {}).text", {"text"}),
        ("def f(part: Other): return part.size", set()),
        ("def f(part): return part.size", set()),
        ("def f(run: Run): return run.size", set()),
        ("def f(run: Run): 'Reads run.part.size.'", set()),
        ("def f(run: Run): return 'run.part.size'  # part.size", set()),
        ("def f(part: Part): part.size = 3", set()),
        ("def f(part: Part): return to_dict(part), Part(size=3)", set()),
        ("def f(part: Part):\n  def g(part: Other): return part.size\n  return g", set()),
    ],
)
def test_what_counts_as_reading_a_setting(line, fields):
    sections = """
class Other: ...
class Part:
    size: int = 1
    text: str = ""
    def __post_init__(self): assert self.size > 0 and self.text
    def _check_more(self, part: Part): assert part.size and self.text
class Run:
    seed: int = 0
    part: Part = Part()
    parts: dict[str, Part] = {}
"""
    assert {name for section, name in Tree([sections, line]).read if section == "Part"} & {"size", "text"} == fields


def literal_defaults(file: Path) -> set[str]:
    """Names of parameters and fields of a file whose default is a number or a text, not an empty one, written there."""
    pairs: list[tuple[str, ast.expr | None]] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.arguments):
            by_place = [*node.posonlyargs, *node.args]
            pairs += [(arg.arg, default) for arg, default in zip(by_place[::-1], node.defaults[::-1], strict=False)]
            pairs += [(arg.arg, default) for arg, default in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            pairs.append((node.target.id, node.value))
    values = [(name, value.value) for name, value in pairs if isinstance(value, ast.Constant) and value.value != ""]
    return {name for name, value in values if type(value) in (str, int, float)}


def test_the_defaults_of_sampling_stand_in_the_config_alone():
    names = {"num_steps", *(field.name for field in dataclasses.fields(config.SamplingConfig))}
    own = {  # a solver's neutral arguments, whatever answers are drawn by, and the frames of a picture
        Path("yan_core/solver.py"): {"method", "guidance_scale"},
        Path("pipelines/pictures.py"): {"num_steps"},
    }
    again = {file.relative_to(ROOT): names & literal_defaults(file) for file in SOURCES if file.name != "config.py"}
    assert {file: found for file, found in again.items() if found - own.get(file, set())} == {}
    assert literal_defaults(ROOT / "yan_core/config.py") >= names - {"num_steps"}  # or the test would see nothing


def test_the_defaults_of_serving_stand_in_the_arguments_of_the_app_alone():
    names = {*schemas.AppArgs.model_fields, "most", "retry_s", "timeout_s", "host", "port"}
    files = [file for file in SOURCES if file.parent.name == "serve" and file.name != "schemas.py"]
    assert {file.name: names & literal_defaults(file) for file in files if names & literal_defaults(file)} == {}


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
        "\n    *,\n    sampling: SamplingConfig = SamplingConfig(method='euler', guidance_scale=1.0, ",
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

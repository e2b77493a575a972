"""Model cards: what is known of a model and no more, as the hub reads it."""

import re
from pathlib import Path

import pytest
import yaml

import yan_core
from tests.yan_core.tiny import tiny_config
from yan_core.checkpoint import read_config, save_pretrained
from yan_core.config import BaselineConfig, TokenizerConfig
from yan_core.model import build_model
from yan_core.tasks import TASKS, Task
from yan_core.tokenization import Tokenizer


def card_of(folder: Path, task: str = "question_answering", lowercase: bool = False, **changes: int) -> str:
    tokenizer = Tokenizer.train(["Mary went to the kitchen. Where is Mary?"], TokenizerConfig(lowercase=lowercase))
    model = build_model(tiny_config(**changes), tokenizer.vocab_size, seed=0)
    save_pretrained(folder, model, tokenizer, {"task": task, "max_source_tokens": 30, "max_target_tokens": 4})
    return (folder / "README.md").read_text(encoding="utf-8")


def parts(card: str) -> tuple[dict, str]:
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_pages_own_task_is_trained_and_told_like_those_that_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "TASKS.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"```python\n(Task\(.*\))\n```", page)
    task = eval(line, {"Task": Task})
    monkeypatch.setitem(TASKS, task.name, task)
    metadata, _ = parts(card_of(tmp_path / "model", task.name))
    assert metadata["pipeline_tag"] == "translation"
    assert yan_core.load(tmp_path / "model").task.pair({"english": "the tree", "german": "der Baum"})[1] == "der Baum"


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_card_whose_example_runs(
    tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata, text = parts(card_of(tmp_path / "model", task))
    assert metadata["library_name"] == "yan" and metadata["pipeline_tag"] == TASKS[task].pipeline_tag
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code.replace("path/to/this/folder", str(tmp_path / "model")), {})
    source = "Mary went to the <mask>." if task == "infilling" else "Mary went to the kitchen. Where is Mary?"
    answer = yan_core.load(tmp_path / "model").generate([source], num_steps=3)[0].text
    assert capsys.readouterr().out == f"{answer}\n"


def test_a_folder_alone_knows_its_architecture_and_claims_no_figure(tmp_path: Path) -> None:
    metadata, text = parts(card_of(tmp_path / "model"))
    assert set(metadata) == {"library_name", "pipeline_tag", "tags"}
    assert "None were recorded with this folder." in text and "Not recorded with this folder." in text
    config = read_config(tmp_path / "model")
    (written,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert yaml.safe_load(written) == {"model": config["model"]}
    assert f"commit {config['commit']}" in text
    model = yan_core.load(tmp_path / "model").model
    assert text.startswith("# model\n") and f"A YAN of {model.num_parameters():,} parameters" in text


def test_limits_and_tags_are_those_of_the_model(tmp_path: Path) -> None:
    metadata, text = parts(card_of(tmp_path / "a", lowercase=True, num_experts=1))
    assert metadata["tags"] == ["yan", "flow-matching"] and "lower case alone" in text
    assert "It reads 30 tokens of a source, the end of a longer one, and writes at most 4." in text
    metadata, text = parts(card_of(tmp_path / "b", "classification"))
    assert metadata["tags"] == ["yan", "flow-matching", "mixture-of-experts"] and "lower case alone" not in text
    assert "the start of a longer one" in text


def test_a_baseline_says_what_it_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["Mary went"], TokenizerConfig())
    baseline = BaselineConfig(family="masked_diffusion", d_model=16, num_blocks=1, num_heads=2, max_positions=40)
    details = {"run": "its-name", "task": "last_word", "max_source_tokens": 30, "max_target_tokens": 4}
    model = build_model(baseline, tokenizer.vocab_size, seed=0)
    save_pretrained(tmp_path / "model", model, tokenizer, details)
    metadata, text = parts((tmp_path / "model" / "README.md").read_text(encoding="utf-8"))
    assert metadata["tags"] == ["yan", "baseline"]
    assert (
        text.startswith("# its-name\n\nA masked diffusion model of ") and "all words of an answer at once" not in text
    )

"""Shipped recipes on real data: every row of theirs has a source and a target, from files and from the hub."""

import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipelines.arguments import parse_config
from pipelines.encode import text_row
from pipelines.listing import locate
from pipelines.sources import fields_of, open_source, value_at
from yan_core.config import DataConfig, DatasetConfig, from_dict
from yan_core.tasks import get_task
from yan_core.tokenization import MASK

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
RECIPES = [
    path
    for path in sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))
    if "datasets:" in path.read_text() and "format: world" not in path.read_text()  # made up here
]

QUESTION = {"document": {"id": "d1", "summary": {"text": "A man left."}, "text": "The book."}}
HUB_ROWS = {
    "Muennighoff/babi": {"passage": "John left.\n", "question": "Who left?", "answer": "John", "task": 1},
    "rajpurkar/squad": {
        "context": "A man left.",
        "question": "Who left?",
        "answers": {"text": ["A man", "man"], "answer_start": [0, 2]},
    },
    "deepmind/narrativeqa": {
        **QUESTION,
        "question": {"text": "Who left?", "tokens": ["Who"]},
        "answers": [{"text": "A man", "tokens": ["A"]}, {"text": "man", "tokens": ["man"]}],
    },
    "fancyzhx/ag_news": {"text": "Stocks fell.", "label": "Business"},
    "fancyzhx/dbpedia_14": {"title": "X", "content": " X is a plant.", "label": "Plant"},
    "stanfordnlp/sst2": {"idx": 0, "sentence": "a fine film ", "label": "positive"},
    "mintujupally/ROCStories": {"text": "One two. Three four."},
    "roneneldan/TinyStories": {"text": "One two. Three four."},
}
"""A row of each data set as the hub has it, labels by name."""


def data_of(path: Path) -> DataConfig:
    return parse_config("run", ["--config", str(path), "--data.root", str(DATA)]).data


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipes_task_maps_real_validation_rows(path):
    data = data_of(path)
    dataset, task = data.datasets[data.dataset], get_task(data.task)
    file = Path(locate(data, dataset.validation))
    if not file.is_file():
        pytest.skip(f"no data at {file}")
    rows = [r for r in pq.read_table(file).to_pylist() if all(str(r[k]) == v for k, v in dataset.where.items())]
    found = [text_row(fields_of(row, dataset.columns), task) for row in rows[:200]]
    assert len(found) == 200
    assert all(row["source"].strip() and row["target"].strip() and row["target"] in row["answers"] for row in found)
    assert all(MASK in row["source"] for row in found) == (data.task == "infilling")
    assert len({row["source"] for row in found}) > 190
    if data.task == "classification":
        assert len({row["target"] for row in found}) <= 14
    if data.task == "last_word":
        assert all(re.fullmatch(r"[^\W_](.*[^\W_])?", row["target"]) for row in found)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_names_its_data_set_on_the_hub(path):
    data = data_of(path)
    own = {k for k, d in data.datasets.items() if d.format != "huggingface"}
    assert {k for k in data.datasets if k not in own} == {f"{k}_hub" for k in own}
    name = f"{data.dataset}_hub"
    hub = data.datasets[name]
    assert f"--data.dataset {name}" in path.read_text()
    row = {**HUB_ROWS[hub.path], **{column: value for column, value in hub.where.items()}}
    fields = fields_of(row, hub.columns)
    source, target = get_task(data.task).pair(fields)
    assert source and target and (not hub.document or value_at(row, hub.document))
    if hub.path in ("rajpurkar/squad", "deepmind/narrativeqa") and data.task == "question_answering":
        assert get_task(data.task).answers(fields) == ["A man", "man"]
    chosen = parse_config("run", ["--config", str(path), "--data.dataset", name])
    assert chosen.data.dataset == name and chosen.data.datasets[name] == hub


@pytest.mark.parametrize("name", ["squad", "narrativeqa"])
def test_columns_inside_others_are_read_from_a_hub_data_set(tmp_path, name):
    hub: DatasetConfig = data_of(ROOT / "pipelines" / "configs" / f"{name}.yaml").datasets[f"{name}_hub"]
    rows = pa.Table.from_pylist([HUB_ROWS[hub.path]] * 3)
    datasets.Dataset(rows).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    own = {"format": "huggingface", "path": str(tmp_path), "columns": hub.columns}
    data = from_dict(DataConfig, {"dataset": "own", "datasets": {"own": own}})
    source = open_source(data, "own", "train", 0)
    (batch,) = [batch for piece in source.pieces for batch in source.rows(piece)]
    found = [text_row(fields_of(row, source.dataset.columns), get_task(data.task)) for row in batch.rows]
    expected = {"source": "A man left. Who left?", "target": "A man", "answers": ["A man", "man"], "kind": ""}
    assert found == [expected] * 3


def test_there_is_a_recipe_for_every_data_set_of_the_paper():
    tasks = {path.stem: yaml.safe_load(path.read_text())["data"].get("task") for path in RECIPES}
    assert {"babi_qa1", "babi_qa2", "babi_qa3", "squad", "narrativeqa", "narrativeqa_infilling"} <= set(tasks)
    assert {"ag_news", "dbpedia14", "sst2", "rocstories", "rocstories_last_word", "tinystories"} <= set(tasks)
    assert set(tasks.values()) == {None, "classification", "infilling", "last_word", "continuation"}

"""The run's part of a model card: counts and figures as they were recorded, in a form the hub reads."""

import dataclasses

import pytest
import yaml
from huggingface_hub import ModelCard

from pipelines.card import evidence
from pipelines.evaluation import Quality
from tests.yan_core.tiny import tiny_config
from yan_core.card import Evidence, model_card
from yan_core.checkpoint import read_config, save_pretrained
from yan_core.config import RunConfig, TokenizerConfig, from_dict, to_dict
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

MANIFEST = {
    "rows": {"finetune": 12_345, "flow": 678, "validation": 40, "test": 0},
    "tokens": 99_001,
    "vocab_size": 321,
    "dropped": {"duplicate": 3, "short": 0},
    "bad_rows": {"train": 1, "validation": 4},
    "sources_cut": 7,
}


def quality(num_steps: int, value: float) -> Quality:
    metrics = {"exact_match": value, "exact_match_oracle_length": 0.999, "token_f1": value / 2, "perplexity": 7 * value}
    return Quality(
        num_steps=num_steps,
        nfe=2 * num_steps,
        metric="exact_match",
        value=value,
        by_kind={},
        oracle_value=0.999,
        latency_ms_batch_1=1.0,
        examples=[],
        metrics=metrics,
        intervals={name: [of - 0.01, of + 0.02] for name, of in metrics.items()},
        rows=[1.0] * 40,
    )


QUALITY = [quality(1, 0.25), quality(3, 0.75)]


def test_counts_are_those_of_the_prepared_data():
    text = evidence(RunConfig(), MANIFEST, QUALITY).data
    assert "12,345 training pairs of `world`, YAN's built-in" in text and "678 windows of up to 32 tokens" in text
    assert "Tokens prepared: 99,001; vocabulary: 321." in text
    assert "Rows left out: duplicate 3, unusable 5; sources cut to fit: 7." in text


def test_figures_are_those_of_the_evaluation_with_their_intervals():
    lines = evidence(RunConfig(), MANIFEST, QUALITY).figures.splitlines()
    assert lines[0].startswith("On 40 validation rows of `world`")
    assert lines[2:] == [
        "| steps | passes | exact match | token f1 | perplexity |",
        "|---:|---:|---:|---:|---:|",
        "| 1 | 2 | 25.0 [24.0, 27.0] | 12.5 [11.5, 14.5] | 1.8 [1.7, 1.8] |",
        "| 3 | 6 | 75.0 [74.0, 77.0] | 37.5 [36.5, 39.5] | 5.2 [5.2, 5.3] |",
    ]


def test_a_stage_that_was_left_out_saw_no_corpus_and_a_start_is_named():
    stages = {"autoencoder": {"max_steps": 0}, "flow": {"max_steps": 0}}
    config = from_dict(RunConfig, {"stages": stages, "init_from": "runs/other/model"})
    text = evidence(config, MANIFEST, QUALITY).data
    assert "Corpus" not in text and "from the model `runs/other/model`" in text


@pytest.mark.parametrize("local", [False, True])
def test_data_sets_of_the_hub_are_named_as_there(tmp_path, monkeypatch, local):
    monkeypatch.chdir(tmp_path)
    if local:
        (tmp_path / "someone" / "stories").mkdir(parents=True)
    own = {"format": "huggingface", "path": "someone/stories", "train": "train", "validation": "test"}
    config = from_dict(RunConfig, {"data": {"dataset": "own", "datasets": {"own": own}}})
    found = evidence(config, MANIFEST, QUALITY)
    assert found.metadata.get("datasets") == (None if local else ["someone/stories"])
    assert "12,345 training pairs of `own` (huggingface: `someone/stories`)" in found.data


def test_the_settings_are_the_runs_without_where_it_ran():
    config = from_dict(RunConfig, {"runs_dir": "/some/where", "tracking": {"uri": "http://user:word@host:1"}})
    settings = evidence(config, MANIFEST, QUALITY).settings
    text = yaml.safe_dump(settings)
    assert "/some/where" not in text and "user:word" not in text and "baseline" not in settings
    left_out = {"runs_dir", "log_every_s", "scaling", "tracking", "baseline"}
    assert settings == {name: value for name, value in to_dict(config).items() if name not in left_out}


def test_the_hub_reads_the_figures(tmp_path):
    tokenizer = Tokenizer.train(["Mary went"], TokenizerConfig())
    details = {"task": "question_answering", "max_source_tokens": 16, "max_target_tokens": 4}
    save_pretrained(tmp_path / "model", build_model(tiny_config(), tokenizer.vocab_size, 0), tokenizer, details)
    known = evidence(dataclasses.replace(RunConfig(), name="mine"), MANIFEST, QUALITY)
    text = model_card("mine", read_config(tmp_path / "model"), tokenizer, 5, known)
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "yan" and data.metrics[0] == "exact_match" and data.model_name == "mine"
    found = [(of.dataset_name, of.metric_type, of.metric_name, of.metric_value) for of in data.eval_results]
    assert found == [
        ("world", "exact_match", "exact_match at num_steps=1", 0.25),
        ("world", "exact_match", "exact_match at num_steps=3", 0.75),
    ]
    assert Evidence().figures not in text and Evidence().data not in text

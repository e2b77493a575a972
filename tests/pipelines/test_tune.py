"""`yan tune`: what it refuses, and a search of seconds with its trials in MLflow."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
import torch
import yaml
from ray import tune

from pipelines.arguments import UsageError
from pipelines.cli import main
from pipelines.cluster import ray_session
from pipelines.prepare import prepare
from pipelines.state import model_details
from pipelines.tracking import Tracker
from pipelines.tune import parse_search, trial, with_settings
from yan_core.checkpoint import save_pretrained
from yan_core.config import RunConfig, StageConfig, to_dict
from yan_core.model import build_model


def test_settings_are_put_where_their_keys_say():
    config = with_settings(RunConfig(), {"stages.finetune.optim.lr": 0.5, "model.dropout": 0.25})
    assert config.stages.finetune.optim.lr == 0.5 and config.model.dropout == 0.25
    assert config.stages.flow == RunConfig().stages.flow


def test_a_search_is_read():
    space = parse_search(["stages.flow.optim.lr=loguniform:1e-4,1e-2", "model.num_experts=choice:1,4"], RunConfig())
    assert set(space) == {"stages.flow.optim.lr", "model.num_experts"}
    assert space["model.num_experts"].categories == [1, 4]
    assert isinstance(space["stages.flow.optim.lr"], tune.search.sample.Float)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model.dropout", "must be KEY=KIND:VALUES"),
        ("model.dropout=gaussian:0,1", "with KIND one of uniform, loguniform"),
        ("model.dropuot=uniform:0,1", "did you mean 'model.dropout'"),
        ("data.window_tokens=randint:8,64", "only model, losses and stages can be searched"),
        ("model.dropout=uniform:0", "missing 1 required positional argument"),
    ],
)
def test_a_search_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_search([text], RunConfig())


@pytest.mark.ray
def test_trials_are_runs_below_one_run_and_the_best_is_named(tiny_config, tmp_path, capfd):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(tiny_config)))
    options = ["--search", "stages.finetune.optim.lr=choice:1e-3,1e-2", "--trials", "3", "--reports", "2"]
    assert main(["tune", "--config", str(file), *options]) == 0
    best = json.loads((Path(tiny_config.runs_dir) / "tiny" / "tune" / "best.json").read_text())
    assert f"--stages.finetune.optim.lr {best['settings']['stages.finetune.optim.lr']}" in capfd.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{Path(tiny_config.runs_dir).resolve()}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("yan").experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    trials = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(trials) == 3 and parent.info.status == "FINISHED"
    assert {r.info.status for r in trials} <= {"FINISHED", "KILLED"}
    qualities = [r.data.metrics["tune/quality"] for r in trials]
    assert best["quality"] == parent.data.metrics["tune/best_quality"] <= 1 and max(qualities) >= best["quality"]
    assert all(r.data.params["stages.finetune.optim.lr"] in ("0.001", "0.01") for r in trials)


@pytest.mark.ray
def test_a_trial_is_measured_as_the_run_would_be(tiny_config, tmp_path, monkeypatch):
    """By the averaged weights, from stage to stage too, and at the numbers of solver steps that it evaluates."""
    with ray_session(1, 1):
        prepare(tiny_config, tmp_path / "prepared")
    began: dict[str, float] = {}
    measured: list[tuple[float, int]] = []

    def weight(model) -> float:
        return model.state_dict()["decoder.ffns.0.0.weight"].mean().item()

    def train(state, batches, on_step):
        began[state.job.stage] = weight(state.model)
        left = {"autoencoder": 1.0, "flow": 2.0, "finetune": 3.0}[state.job.stage]
        state.average.weights = {name: torch.full_like(of, left) for name, of in state.average.weights.items()}
        on_step(state.settings.max_steps, {"loss": torch.tensor(0.0)})

    def answer(generator, rows, num_steps, evaluation):
        measured.append((weight(generator.model), num_steps))
        return [row["answers"][0] if num_steps == 2 else "wrong" for row in rows]

    reported: list[dict[str, float]] = []
    for name, stand_in in (
        ("train_on", train),
        ("answer_rows", answer),
        ("tune.get_context", lambda: SimpleNamespace(get_trial_id=lambda: "t")),
        ("tune.report", reported.append),
        ("Tracker.child", lambda *of: Tracker("http://127.0.0.1:9", "gone")),
    ):
        monkeypatch.setattr(f"pipelines.tune.{name}", stand_in)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = {f"stages.{stage}.optim.ema_decay": 0.9 for stage in ("autoencoder", "flow", "finetune")}
    settings["evaluation.num_steps"] = [1, 2]
    trial(settings, to_dict(tiny_config), str(tmp_path / "prepared"), 1, ("", ""))
    assert (began["flow"], began["finetune"]) == (1.0, 2.0)
    assert measured == [(3.0, 1), (3.0, 2)] and [of["quality"] for of in reported] == [0.5]


@pytest.mark.ray
def test_a_trial_begins_with_the_model_that_the_run_would(tiny_config, tmp_path, monkeypatch):
    """`init_from` is where `yan run` starts; MLflow may be away meanwhile."""
    with ray_session(1, 1):
        prepared = prepare(tiny_config, tmp_path / "prepared")
    model = build_model(tiny_config.model, prepared.tokenizer.vocab_size, seed=5)
    save_pretrained(tmp_path / "start", model, prepared.tokenizer, model_details(tiny_config))
    stages = dataclasses.replace(
        tiny_config.stages, autoencoder=StageConfig(max_steps=0), flow=StageConfig(max_steps=0)
    )
    config = dataclasses.replace(tiny_config, init_from=str(tmp_path / "start"), stages=stages)
    started: list[torch.Tensor] = []

    def look(state, *args):
        started.append(state.model.state_dict()["decoder.ffns.0.0.weight"].clone())

    monkeypatch.setattr("pipelines.tune.train_on", look)
    monkeypatch.setattr("pipelines.tune.tune.get_context", lambda: SimpleNamespace(get_trial_id=lambda: "t"))
    monkeypatch.setattr("pipelines.tune.Tracker.child", lambda *of: Tracker("http://127.0.0.1:9", "gone"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    trial({"stages.finetune.optim.lr": 1e-3}, to_dict(config), str(tmp_path / "prepared"), 1, ("", ""))
    assert torch.equal(started[0], model.state_dict()["decoder.ffns.0.0.weight"])
    told: list[str] = []

    def fail(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr("pipelines.tune.train_on", fail)
    monkeypatch.setattr("pipelines.tune.Tracker.finish", lambda self, status: told.append(status))
    with pytest.raises(RuntimeError, match="no memory"):
        trial({"stages.finetune.optim.lr": 1e-3}, to_dict(config), str(tmp_path / "prepared"), 1, ("", ""))
    assert told == ["FAILED"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    assert main(["tune", "--config", str(file), "--search", "model.dropout=choice:0,0.1"]) == 2

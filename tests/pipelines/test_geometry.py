"""`yan demo geometry`: points, distance, a training that learns, and what the command leaves behind."""

import dataclasses
import json
import math
import os

import pytest
import torch

from pipelines.cli import main
from pipelines.geometry import flows
from pipelines.geometry.flows import (
    SOLVER_STEPS,
    TRAININGS,
    Job,
    PointLoss,
    Settings,
    Trained,
    fresh_model,
    gate_at,
    generate,
    held_out,
    no_source,
    train_and_measure,
    train_flow,
)
from pipelines.geometry.points import DATA_SETS, draw_points, sliced_wasserstein
from pipelines.geometry.results import shares, with_mean
from yan_core.batching import Batch
from yan_core.config import FlowLossConfig, ModelConfig, OptimConfig, from_dict
from yan_core.loss import flow_loss
from yan_core.training import TrainingFailed

MEAN_SQUARE = {
    "ring": 2**2 + 2 * 0.1**2,
    # radius r = 0.4 + 2 s with s the square root of a uniform number: E s = 2/3, E s^2 = 1/2
    "spiral": 0.4**2 + 2 * 0.4 * 2 * 2 / 3 + 4 / 2 + 2 * 0.05**2,
    "grid": 2 * (1.2**2 * (4**2 - 1) / 12 + 0.1**2),
    "anisotropic": 1.6**2 + 0.5**2 + 0.05**2,
}
"""E |x|^2, from what the samplers say."""

TINY = Settings(
    data_sets=("ring",),
    updates=60,
    batch_size=64,
    train_points=2_000,
    held_out_points=500,
    model=ModelConfig(latent_dim=2, d_model=16, flow_blocks=1, num_heads=1, max_positions=1),
)


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_points_follow_their_seed_and_have_the_stated_spread(data_set):
    points = draw_points(data_set, 40_000, seed=3)
    assert points.shape == (40_000, 2) and points.dtype == torch.float32
    assert torch.equal(points, draw_points(data_set, 40_000, seed=3))
    assert not torch.equal(points, draw_points(data_set, 40_000, seed=4))
    assert float(points.square().sum(-1).mean()) == pytest.approx(MEAN_SQUARE[data_set], rel=0.02)
    if data_set != "spiral":  # which has no symmetry
        assert points.mean(0).abs().max() < 0.04


def test_training_and_the_two_held_out_samples_share_no_points():
    samples = [draw_points("spiral", 500, seed=0), held_out("spiral", TINY), held_out("spiral", TINY, 2)]
    assert len(torch.cat(samples).unique(dim=0)) == 1_500


def test_sliced_wasserstein_is_zero_for_the_same_points_in_any_order_and_symmetric():
    x, y = draw_points("ring", 300, seed=0), draw_points("grid", 300, seed=0)
    assert sliced_wasserstein(x, x[torch.randperm(300)]) == 0
    assert sliced_wasserstein(x, y) == pytest.approx(sliced_wasserstein(y, x)) and sliced_wasserstein(x, y) > 0.1
    with pytest.raises(ValueError, match=r"x \(300, 2\) and y \(299, 2\) must have the same shape"):
        sliced_wasserstein(x, y[1:])


@pytest.mark.parametrize("angle", [0.0, 0.3, 2.0])
def test_sliced_wasserstein_of_a_shift_is_its_length_times_the_mean_cosine(angle):
    x = draw_points("anisotropic", 500, seed=0)
    shift = 0.7 * torch.tensor([math.cos(angle), math.sin(angle)])
    assert sliced_wasserstein(x, x + shift) == pytest.approx(0.7 * 2 / math.pi, rel=1e-3)


def test_a_short_training_brings_the_points_closer_and_repeats_itself():
    job = Job("ring", "ours", 8)
    real = held_out("ring", TINY)
    before = fresh_model(TINY, 8).flow
    longer = dataclasses.replace(TINY, updates=150, optim=OptimConfig(lr=5e-3, warmup_steps=10))
    after = train_flow(job, longer)
    for num_steps in (1, 3):
        first, last = (sliced_wasserstein(generate(f, 500, num_steps, 1)[0][-1], real) for f in (before, after))
        assert last < 0.6 * first
    short = dataclasses.replace(TINY, updates=3)
    one, two = (train_flow(job, short).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_paths_run_from_noise_through_every_step_and_experts_follow_the_gate():
    flow = fresh_model(TINY, 4).flow
    path, expert = generate(flow, 4_000, 3, seed=5)
    assert path.shape == (4, 4_000, 2) and expert.shape == (4_000,)
    assert torch.equal(path[0], generate(flow, 4_000, 8, seed=5)[0][0])
    gate = gate_at(flow, path[0])
    assert torch.allclose(gate.sum(-1), torch.ones(4_000), atol=1e-5)
    drawn = torch.bincount(expert, minlength=4) / 4_000
    assert torch.allclose(drawn, gate.mean(0), atol=0.03)


def test_plain_has_one_expert_whatever_is_asked_for_and_names_count_once():
    jobs = Settings(data_sets=("grid", "grid"), experts=(2, 8)).jobs
    expected = [("ours", 2), ("ours", 8), ("paper", 2), ("paper", 8), ("plain", 1)]
    assert [(job.training, job.num_experts) for job in jobs] == expected


@pytest.mark.parametrize("training", TRAININGS)
def test_the_loss_is_the_products_with_points_for_latents_and_no_decoder(monkeypatch, training):
    config = dataclasses.replace(TINY.loss, **TRAININGS[training])
    model, points = fresh_model(TINY, 4), draw_points("grid", 50, seed=0)
    rows = torch.arange(32)[:, None] % model.vocab_size  # the decoder reads them as words, at no weight
    batch = Batch(torch.arange(32), rows, torch.zeros_like(rows, dtype=torch.bool), rows, torch.ones_like(rows) > 0)
    total, parts = PointLoss(model.flow, points, config)(batch, num_steps=3)

    monkeypatch.setattr(model, "encode_target", lambda ids, mask, draws: points[ids])
    monkeypatch.setattr(model, "encode_source", lambda ids, mask, draws: no_source(model.flow, len(ids)))
    product = flow_loss(model, batch, dataclasses.replace(config, weight_ce=0.0), num_steps=3)
    assert float(total.detach()) == pytest.approx(float(product.total.detach()), rel=1e-6)
    assert all(float(value) == pytest.approx(float(product.parts[name])) for name, value in parts.items())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--data-sets", "rign"],
            r"--data-sets: unknown name 'rign'; did you mean 'ring'? Allowed: anisotropic, grid,",
        ),
        (["--trainings", "their"], "--trainings: unknown name 'their'"),
        (["--experts", "4", "0"], "--experts must be >= 1, got 0"),
        (["--steps", "0"], "--steps must be >= 1, got 0"),
        (["--processes", "0"], "--processes must be >= 1, got 0"),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(capsys, tmp_path, options, message):
    assert main(["demo", "geometry", *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_command_leaves_figures_pictures_and_metrics_by_solver_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = tmp_path / "geometry"
    names = ["--data-sets", "ring", "grid", "--trainings", "ours", "plain", "--experts", "1", "2"]
    assert main(["demo", "geometry", *names, "--steps", "2", "--processes", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out

    results = json.loads((out / "results.json").read_text())
    found = results["sliced_wasserstein"]
    assert set(found) == set(results["floor"]) == {"ring", "grid", "mean"}
    kinds = {(training, count) for training in found["mean"] for count in found["mean"][training]}
    assert kinds == {("ours", "K1"), ("ours", "K2"), ("plain", "K1")}
    assert results["commit"] and results["config"]["updates"] == 2 and len(results["training_seconds"]) == 6
    assert from_dict(FlowLossConfig, results["config"]["loss"]) == Settings().loss
    # In another process, the same as here.
    here = train_and_measure(Job("ring", "ours", 2), Settings(updates=2)).distances
    assert found["ring"]["ours"]["K2"] == {str(n): pytest.approx(value) for n, value in here.items()}
    assert f"{here[3]:.3f}" in printed and "[ 6/6]" in printed
    pictures = {"ring.png", "grid.png", "distances.png"}
    assert {p.name for p in out.iterdir()} == pictures | {"results.json", "table.txt"}

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("yan").experiment_id])
    assert (run.info.run_name, run.info.status) == ("geometry", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "geometry/ring/ours/K2/sliced_wasserstein")
    assert {m.step: m.value for m in history} == {int(n): v for n, v in found["ring"]["ours"]["K2"].items()}
    assert "geometry/mean/plain/K1/sliced_wasserstein" in run.data.metrics
    assert {f.path for f in client.list_artifacts(run.info.run_id)} >= pictures | {"results.json"}


def test_shares_compare_most_experts_with_fewest_or_with_plain_and_means_are_over_data_sets():
    settings = Settings(data_sets=("ring", "grid"), trainings=("ours", "plain"), experts=(1, 2, 8))
    values = {("ours", 1): 0.8, ("ours", 2): 0.6, ("ours", 8): 0.2, ("plain", 1): 0.4}
    trained = []
    for job in settings.jobs:
        distance = values[job.training, job.num_experts] * (2 if job.data_set == "grid" else 1)
        trained.append(Trained(job, dict.fromkeys(SOLVER_STEPS, distance), 0.0, {}))
    distances = with_mean(reversed(trained), settings)
    assert distances[Job("mean", "ours", 2)][3] == pytest.approx(0.9)
    assert shares(distances)["mean"] == {"ours": dict.fromkeys(SOLVER_STEPS, pytest.approx(0.25))}
    assert shares(distances, of_plain=True)["grid"] == {"ours": dict.fromkeys(SOLVER_STEPS, pytest.approx(0.5))}
    assert [(job.data_set, job.num_experts) for job in distances][-4:] == [("mean", k) for k in (1, 2, 8, 1)]


def die(job, settings):
    """In the place of a training: a process that the system kills."""
    os._exit(9)


def test_a_killed_process_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(flows, "train_and_measure", die)
    with pytest.raises(TrainingFailed, match="a training process was killed from outside"):
        list(flows.train_all(Settings(data_sets=("ring",), experts=(1, 2)), processes=2))

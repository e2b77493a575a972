"""Which Ray a command uses, that of RAY_ADDRESS or a local one of its own, and what it does where nodes have GPUs."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from pipelines import train
from pipelines.cluster import ClusterError, progress_lines, ray_session
from pipelines.prepare import prepare
from pipelines.publish import measure
from yan_core.checkpoint import save_pretrained
from yan_core.model import build_model


@pytest.mark.ray
def test_another_cluster_of_the_machine_is_left_alone(monkeypatch):
    """`ray start` leaves its address in a file, and `ray.init` without an address would connect to it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="t") as folder:  # short: Ray makes socket names of it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:1")
        with ray_session(1, 1):
            assert ray.cluster_resources()["CPU"] >= 3


def test_a_ray_that_does_not_come_up_is_started_once_more(monkeypatch):
    outcomes = [Exception("timed out"), None, Exception("timed out"), Exception("traceback\ntimed out again")]

    def init(**settings):
        if error := outcomes.pop(0):
            raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with ray_session(1, 1):
        pass
    with (
        pytest.raises(ClusterError, match="Ray did not start on this machine, tried twice: timed out again"),
        ray_session(1, 1),
    ):
        pass
    assert outcomes == []


@pytest.fixture(scope="module")
def cluster_with_a_gpu() -> Iterator[None]:
    """A node that says it has a GPU, which this process has not."""
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Trainer:
    """In Ray Train's place: three workers that no node has room for, and after a while it ends."""

    scaling_config = SimpleNamespace(resources_per_worker={"CPU": 64, "GPU": 1})

    def fit(self) -> str:
        group = placement_group([{"CPU": 64.0, "GPU": 1.0}] * 3)
        ready, _ = ray.wait([group.ready()], timeout=1.5)
        remove_placement_group(group)
        return "ended" if not ready else "placed"


@pytest.mark.ray
def test_workers_that_no_node_has_room_for_are_told(cluster_with_a_gpu, monkeypatch, capfd):
    """Ray Train waits for them without end and without a word."""
    monkeypatch.setattr(train, "TELL_WAITING_S", 0.5)
    trainer: Any = Trainer()
    with progress_lines(0.1) as board:
        assert train.fit_interruptibly(trainer, board) == "ended"
    told = "waits for 3 workers of 64 CPU and 1 GPU each; the cluster has 2 of 2 CPU, 1 of 1 GPU free"
    assert told in capfd.readouterr().out
    assert train.what_is_waited_for({"CPU": 64, "GPU": 1}) == ""


@pytest.mark.ray
def test_a_model_is_measured_where_the_gpus_are(cluster_with_a_gpu, tiny_config, tmp_path, capfd):
    """As the workers train there; a head without one would measure on its processor, and call that a GPU's speed."""
    config = replace(tiny_config, evaluation=replace(tiny_config.evaluation, max_rows=8))
    prepared = prepare(config, tmp_path / "prepared")
    model = build_model(config.model, prepared.tokenizer.vocab_size, 0)
    details = {"task": config.data.task, "max_source_tokens": 96, "max_target_tokens": 14}
    save_pretrained(tmp_path / "model", model, prepared.tokenizer, details)
    here = measure(config, prepared, tmp_path / "model")
    assert "evaluate: 8 validation rows, own length\n" in capfd.readouterr().out
    on_gpus = replace(config, scaling=replace(config.scaling, use_gpu=True))
    there = measure(on_gpus, prepared, tmp_path / "model")
    assert "8 validation rows, own length, on cpu of " in capfd.readouterr().out
    assert [(q.num_steps, q.value, q.rows) for q in there] == [(q.num_steps, q.value, q.rows) for q in here]

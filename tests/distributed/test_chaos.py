"""A cluster of two nodes that loses workers, nodes and drivers while it trains: `pytest -m soak tests/distributed`."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from yan_core.config import RunConfig, from_dict, to_dict

pytestmark = [pytest.mark.soak, pytest.mark.cluster, pytest.mark.distributed, pytest.mark.timeout(3600)]

STEPS = {"autoencoder": 100, "flow": 100, "finetune": 400}
NODE = {"num_cpus": 3, "object_store_memory": 200 * 2**20}
METRIC = "{}/train/loss"


def settings(tiny_settings: dict, folder: Path, name: str, workers: int) -> RunConfig:
    values = {
        **tiny_settings,
        "name": name,
        "runs_dir": str(folder),
        "log_every_s": 0.0,
        "stages": {stage: {**tiny_settings["stages"][stage], "max_steps": n} for stage, n in STEPS.items()},
        "scaling": {"num_workers": workers, "checkpoint_every_s": 1.0, "max_failures": -1},
        "evaluation": {"num_steps": [3], "max_rows": 10},
    }
    values["data"] = {
        **values["data"],
        "datasets": {
            "small": {"format": "world", "num_train": 400, "num_validation": 40},
            "stories": {"format": "world_stories", "num_train": 200},
        },
        "corpus": "stories",
    }
    values["model"] = {**values["model"], "dropout": 0.1}
    return from_dict(RunConfig, values)


def start(config: RunConfig, address: str | None) -> tuple[subprocess.Popen, Path]:
    folder = Path(config.runs_dir)
    file, log = folder / f"{config.name}.yaml", folder / f"{config.name}.{time.monotonic_ns()}.log"
    file.write_text(yaml.safe_dump(to_dict(config)))
    # else each checkpoint waits for two seconds
    environment = {**os.environ, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    if address:
        environment["RAY_ADDRESS"] = address
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(file)]
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment), log


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("RayTrainWorker" in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def losses_of(config: RunConfig) -> dict[tuple[str, int], list[float]]:
    """Every loss that was recorded at a step, of the one run there is."""
    client = mlflow.MlflowClient(f"sqlite:///{Path(config.runs_dir).resolve()}/mlflow.db")
    experiment = client.get_experiment_by_name("yan")
    assert experiment is not None
    (run,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == config.name]
    assert run.info.status == "FINISHED"
    found: dict[tuple[str, int], list[float]] = {}
    for stage in STEPS:
        for metric in client.get_metric_history(run.info.run_id, METRIC.format(stage)):
            found.setdefault((stage, metric.step), []).append(metric.value)
    return found


def drain(address: str, node_id: str, seconds: float) -> None:
    """Announce that a node will be taken away, as a spot market does."""
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, reason = GcsClient(address=address).drain_node(
        node_id, autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot market", deadline_ms
    )
    assert accepted, reason


def test_a_checkpoint_is_saved_before_a_node_is_taken_away(tiny_settings, tmp_path):
    """The only checkpoint in a stage is the one that the announcement brings about."""
    config = settings(tiny_settings, tmp_path, "spot", 2)
    config = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, checkpoint_every_s=3600.0))
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 1})
    try:
        spot = cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        process, log = start(config, cluster.address)
        deadline = time.monotonic() + 240
        while not re.search(r"\n  finetune +[3-9]\d/", log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        drain(cluster.address, spot.node_id, seconds=8)
        time.sleep(8)
        cluster.remove_node(spot, allow_graceful=False)
        cluster.add_node(**NODE)
        assert process.wait(600) == 0, log.read_text()
    finally:
        process.kill()
        cluster.shutdown()
    said = log.read_text()
    assert "a node is about to be taken away: a checkpoint is saved" in said, said
    resumed = [int(step) for step in re.findall(r"goes on from its checkpoint at step (\d+)", said)]
    assert resumed and resumed[0] >= 30, said
    found = losses_of(config)
    assert sorted(found) == sorted((s, i) for s, n in STEPS.items() for i in range(1, n + 1))
    assert all(max(values) - min(values) < 1e-6 for values in found.values())


def test_whatever_is_killed_the_losses_are_those_of_an_undisturbed_run(tiny_settings, tmp_path):
    """Ten kills at random moments, of a worker, a node's raylet or the driver."""
    calm, wild = settings(tiny_settings, tmp_path, "calm", 2), settings(tiny_settings, tmp_path, "wild", 2)
    process, log = start(calm, None)
    assert process.wait(600) == 0, log.read_text()

    rng, kills = random.Random(0), {"worker": 0, "raylet": 0, "driver": 0}
    plan = ["worker", "raylet", "driver"] * 3 + ["worker"]
    rng.shuffle(plan)
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        other = cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        process, log = start(wild, cluster.address)
        for what in plan:
            seen = log.read_text()
            deadline = time.monotonic() + 240
            while not re.search(r"\n  \w+ +\d+/\d+ loss", log.read_text()[len(seen) :]):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            time.sleep(rng.uniform(0, 4))
            assert process.poll() is None, f"over after {kills}"
            kills[what] += 1
            if what == "worker":
                victims = workers()
                while not victims:  # between two stages, or two groups of workers
                    time.sleep(0.1)
                    victims = workers()
                rng.choice(victims).kill()
            elif what == "raylet":
                cluster.remove_node(other, allow_graceful=False)
                other = cluster.add_node(**NODE)
            else:
                process.send_signal(signal.SIGKILL)
                process.wait()
                time.sleep(3)
                process, log = start(wild, cluster.address)
        print(kills, flush=True)
        assert process.wait(600) == 0, log.read_text()
    finally:
        process.kill()
        cluster.shutdown()
    expected, found = losses_of(calm), losses_of(wild)
    assert sorted(found) == sorted(expected) == sorted((s, i) for s, n in STEPS.items() for i in range(1, n + 1))
    worst = max(abs(value - expected[key][0]) for key, values in found.items() for value in values)
    repeated = sum(len(values) > 1 for values in found.values())
    print(f"{kills}, {repeated} of {len(found)} steps done more than once, largest difference {worst:.2g}")
    assert worst < 1e-6 and repeated
    # What was done again after a kill gave the very same numbers.
    assert max(max(values) - min(values) for values in found.values()) < 1e-6


def test_workers_come_and_go_with_the_nodes(tiny_settings, tmp_path):
    """Three nodes with room for a worker each, of which one leaves and comes back; three do not divide the lanes."""
    one = settings(tiny_settings, tmp_path, "one", 1)
    steps = {"autoencoder": 10, "flow": 10, "finetune": 250}
    stages = {name: dataclasses.replace(getattr(one.stages, name), max_steps=n) for name, n in steps.items()}
    one = dataclasses.replace(one, stages=dataclasses.replace(one.stages, **stages))
    scaling = dataclasses.replace(one.scaling, num_workers=(1, 3), cpus_per_worker=2.0, resize_every_s=5.0)
    some = dataclasses.replace(one, name="some", scaling=scaling)
    process, log = start(one, None)
    assert process.wait(600) == 0, log.read_text()

    cluster = Cluster(initialize_head=True, head_node_args=NODE)  # three CPUs: one is left for reading
    try:
        other, _ = cluster.add_node(**NODE), cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        process, log = start(some, cluster.address)

        def wait_for(pattern: str, timeout_s: float = 900) -> None:
            deadline = time.monotonic() + timeout_s
            while not re.search(pattern, log.read_text()):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)

        wait_for(r"\n  finetune +[5-9]\d/")
        cluster.remove_node(other, allow_graceful=False)
        wait_for(r"goes on from its checkpoint at step \d+ on 2 workers")
        cluster.add_node(**NODE)
        wait_for(r"on 2 workers[\s\S]*goes on from its checkpoint at step \d+ on 3 workers")
        assert process.wait(900) == 0, log.read_text()
    finally:
        process.kill()
        cluster.shutdown()
    expected, found = losses_of(one), losses_of(some)
    assert sorted(found) == sorted(expected)
    worst = max(abs(value / expected[key][0] - 1) for key, values in found.items() for value in values)
    print(f"largest difference {worst:.2g}; {re.findall('goes on.*', log.read_text())}")
    assert worst < 1e-3  # another batch is another loss

"""Ray Train for real: two gloo workers, one of them killed, an interrupted driver, a step that need not be redone."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml

import yan_core
from tests.clusters.conftest import free_port
from yan_core.config import RunConfig, from_dict, to_dict
from yan_core.training import learning_rate

pytestmark = [pytest.mark.distributed, pytest.mark.ray]


def start(config, *overrides: str) -> tuple[subprocess.Popen, Path]:
    """`yan run` in a process of its own, its lines going to a file."""
    folder = Path(config.runs_dir)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    log = folder / f"log{len(list(folder.glob('log*')))}.txt"
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(file), *overrides]
    # Where the tests themselves run in a shell's background, SIGINT is ignored, and a child would inherit that.
    hears_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, preexec_fn=hears_interrupts), log


def wait_for(pattern: str, log: Path, process: subprocess.Popen, timeout_s: float = 240) -> re.Match[str]:
    """Wait until a log matches a pattern; gives its last match."""
    deadline = time.monotonic() + timeout_s
    while not (found := list(re.finditer(pattern, log.read_text()))):
        assert process.poll() is None, f"ended early:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no {pattern!r} in\n{log.read_text()}"
        time.sleep(0.1)
    return found[-1]


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Ray Train worker processes below a driver."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [p for p in below if any("RayTrainWorker" in part for part in p.cmdline())]


def mlflow_runs(config) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{Path(config.runs_dir).resolve()}/mlflow.db")
    experiment = client.get_experiment_by_name("yan")
    return client.search_runs([experiment.experiment_id])


@pytest.mark.timeout(1500)  # it trains five times; ten minutes were not enough on a machine half as fast as usual
def test_a_killed_worker_and_an_interrupted_driver_lose_nothing(tiny_config, bucket):
    """Kill -9 a worker, interrupt the driver, terminate it, run again: one MLflow run, checkpoints in a bucket."""
    every = ("--stages.finetune.max_steps", "240", "--log_every_s", "0", "--evaluation.every_steps", "120")
    every += ("--scaling.storage", f"{bucket}/checkpoints")
    every += ("--evaluation.keep", "best", "--evaluation.rows_while_training", "10")
    often = ("--scaling.checkpoint_every_s", "0.5")
    goes_on = r"finetune +goes on from its checkpoint at step (\d+)"
    process, log = start(tiny_config, *every, *often)
    wait_for(r"finetune +[5-9]\d/240", log, process)  # late enough for a first checkpoint of this stage
    os.kill(workers_of(process)[0].pid, signal.SIGKILL)
    first = int(wait_for(goes_on, log, process)[1])
    assert 0 < first < 240

    # A SIGTERM loses no step at all.
    wait_for(rf"step {first}\n(.*\n)*  finetune +\d+/240", log, process)
    process.terminate()
    assert process.wait(90) == 143
    assert "stops after a checkpoint; the same command goes on from there" in log.read_text()
    left_at = int(re.findall(r"  finetune +(\d+)/240", log.read_text())[-1])
    assert first <= left_at < 240

    # A SIGINT loses the steps since the last checkpoint: some, as none is due so soon and MLflow has them.
    process, log = start(tiny_config, *every, "--scaling.checkpoint_every_s", "600")
    while max(step for _, step in losses_of(tiny_config)) <= left_at:
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 130
    assert "the same command goes on from here" in log.read_text()
    assert f"at step {left_at}\n" in log.read_text()

    process, log = start(tiny_config, *every)
    assert process.wait(240) == 0, log.read_text()
    text = log.read_text()
    assert "prepare: done before, inputs unchanged" in text
    assert "autoencoder: done before, inputs unchanged" in text
    assert "flow: done before, inputs unchanged" in text
    second = re.search(goes_on, text)
    assert second is not None and int(second[1]) == left_at
    assert "120/240" in text
    (run,) = mlflow_runs(tiny_config)
    assert run.info.status == "FINISHED"

    # Everything promised is in the run.
    assert run.data.params["stages.finetune.max_steps"] == "240"
    assert {"finetune/train/loss", "finetune/train/loss_flow", "eval/exact_match", "eval/exact_match/where"} <= set(
        run.data.metrics
    )
    assert any(name.startswith("system/") for name in run.data.metrics)
    shares = {
        f"finetune/perf/{name}": run.data.metrics[f"finetune/perf/{name}"]
        for name in ("data_wait_share", "padding_share")
    }
    assert (
        all(0 <= share < 1 for share in shares.values())
        and 1 <= run.data.metrics["finetune/train/expert_load_max"] <= 2
    )
    assert 0 <= run.data.metrics["finetune/train/gate_entropy"] <= math.log(2) + 1e-6
    assert run.data.metrics["finetune/perf/memory_bytes"] > 2**26 and run.data.metrics["finetune/perf/tokens_per_s"] > 0
    assert {"finetune/validation/exact_match", "finetune/validation/exact_match_3_steps"} <= set(run.data.metrics)
    client = mlflow.MlflowClient(f"sqlite:///{Path(tiny_config.runs_dir).resolve()}/mlflow.db")
    measured = client.get_metric_history(run.info.run_id, "finetune/validation/exact_match")
    assert sorted({m.step for m in measured}) == [120, 240]
    pictures = {"quality_by_steps.png", "experts_by_position.png", "paths.png"}
    assert {"config.json", "examples.json", "samples.json", *pictures} <= {
        f.path for f in client.list_artifacts(run.info.run_id)
    }
    assert {"data/rows/finetune", "data/tokens", "data/bad_rows/train"} <= set(run.data.metrics)
    assert {used.dataset.name for used in run.inputs.dataset_inputs} == {"small", "stories"}
    rates = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "finetune/train/lr")}
    assert rates == {step + 1: learning_rate(step, 240, tiny_config.stages.finetune.optim) for step in range(240)}
    # Steps that were done again after a restart gave the same losses, and so did every step in between.
    losses: dict[int, list[float]] = {}
    for metric in client.get_metric_history(run.info.run_id, "finetune/train/loss"):
        losses.setdefault(metric.step, []).append(metric.value)
    again = [values for values in losses.values() if len(values) > 1]
    assert sorted(losses) == list(range(1, 241)) and again
    assert max(max(values) - min(values) for values in again) < 1e-6
    version = client.get_model_version_by_alias("yan-tiny", "champion")
    assert version.run_id == run.info.run_id

    # The registered model answers as the folder does, without a pickle in it.
    mlflow.set_tracking_uri(client.tracking_uri)
    source = ["Mary went to the kitchen. Where is Mary?"]
    loaded = mlflow.pyfunc.load_model("models:/yan-tiny@champion")
    folder = Path(tiny_config.runs_dir) / "tiny" / "model"
    assert loaded.predict(source) == [yan_core.load(folder).generate(source)[0].text]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "400 training pairs of `small`" in card and "On 20 validation rows of `small`" in card
    assert f"| 3 | 3 | {100 * run.data.metrics['eval/exact_match']:.1f} [" in card
    artifacts = Path(mlflow.artifacts.download_artifacts("models:/yan-tiny@champion"))
    assert card in [f.read_text(encoding="utf-8") for f in artifacts.rglob("README.md")]
    assert not [f for f in artifacts.rglob("*") if f.suffix in (".pkl", ".pickle", ".pt", ".bin")]

    # Run again: nothing is redone. Change one setting: only what follows from it is.
    process, log = start(tiny_config, *every)
    assert process.wait(120) == 0
    assert "evaluate, register: done before, inputs unchanged" in log.read_text()
    assert "not done yet" not in log.read_text()
    fewer = ("--scaling.num_workers", "[1,2]")  # or as many as there is room for
    process, log = start(tiny_config, *every, *fewer, "--stages.finetune.max_steps", "20")
    assert process.wait(240) == 0, log.read_text()
    assert "flow: done before, inputs unchanged" in log.read_text()
    assert "finetune: inputs changed (stages.finetune.max_steps: 240 -> 20)" in log.read_text()
    assert len(mlflow_runs(tiny_config)) == 2
    assert not list((Path(tiny_config.runs_dir) / "tiny").rglob("*.part"))
    assert json.loads((Path(tiny_config.runs_dir) / "tiny" / "run.json").read_text())["finished"] is True


def test_a_loss_that_is_not_finite_stops_the_run_with_a_message(tiny_config):
    process, log = start(
        tiny_config, "--stages.autoencoder.optim.lr", "1e30", "--stages.autoencoder.optim.warmup_steps", "0"
    )  # fmt: skip
    assert process.wait(240) == 1
    text = log.read_text()
    assert "training failed" in text and "stage autoencoder, step " in text and "gradient is not finite" in text
    assert "Traceback" not in text and text.count("workers start") == 1 and "worker 0 failed" not in text


def test_a_sharded_training_goes_on_after_a_kill_and_keeps_two_checkpoints(tiny_config):
    settings = ("--scaling.strategy", "fsdp", "--scaling.accumulation", "2", "--scaling.recompute", "true")
    settings += ("--scaling.checkpoint_every_s", "0.2", "--stages.finetune.max_steps", "30", "--log_every_s", "0")
    settings += ("--stages.autoencoder.max_steps", "3", "--stages.flow.max_steps", "3")  # it is not about them
    process, log = start(tiny_config, *settings)
    wait_for(r"finetune +(1[5-9]|2\d)/30", log, process)
    kept = [
        path
        for path in (Path(tiny_config.runs_dir) / "tiny" / "checkpoints" / "training").glob("checkpoint_*")
        if path.is_dir()  # Ray Train keeps its list of them, checkpoint_manager_snapshot.json, beside them
    ]
    assert 1 <= len(kept) <= 3  # one may be on its way out
    os.kill(workers_of(process)[0].pid, signal.SIGKILL)
    assert process.wait(300) == 0, log.read_text()
    assert re.search(r"finetune +goes on from its checkpoint at step [1-9]", log.read_text())
    (run,) = mlflow_runs(tiny_config)
    client = mlflow.MlflowClient(f"sqlite:///{Path(tiny_config.runs_dir).resolve()}/mlflow.db")
    for metric in ("loss", "grad_norm"):
        again: dict[int, list[float]] = {}
        for value in client.get_metric_history(run.info.run_id, f"finetune/train/{metric}"):
            again.setdefault(value.step, []).append(value.value)
        assert sorted(again) == list(range(1, 31))
        assert all(max(values) - min(values) <= 1e-6 * max(1, max(values)) for values in again.values())


def losses_of(config) -> dict[tuple[str, int], list[float]]:
    """Every loss that was recorded at a step, of the one run there is."""
    client = mlflow.MlflowClient(f"sqlite:///{Path(config.runs_dir).resolve()}/mlflow.db")
    (run,) = mlflow_runs(config)
    found: dict[tuple[str, int], list[float]] = {}
    for stage in ("autoencoder", "flow", "finetune"):
        for metric in client.get_metric_history(run.info.run_id, f"{stage}/train/loss"):
            found.setdefault((stage, metric.step), []).append(metric.value)
    return found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_compiled_training_has_the_losses_of_one_that_is_not(tiny_settings, tmp_path):
    found = []
    for how in ("false", "true"):
        (tmp_path / how).mkdir()
        config = from_dict(RunConfig, {**tiny_settings, "runs_dir": str(tmp_path / how)})
        settings = ("--scaling.num_workers", "1", "--log_every_s", "0", "--scaling.compile", how)
        settings += ("--stages.autoencoder.max_steps", "0", "--stages.flow.max_steps", "0")
        process, log = start(config, *settings, "--flow_loss.solver_steps", "[1]")
        assert process.wait(1800) == 0, log.read_text()
        found.append(losses_of(config))
    eager, compiled = found
    assert sorted(eager) == sorted(compiled) == [("finetune", step) for step in range(1, 13)]
    assert max(abs(compiled[key][0] / eager[key][0] - 1) for key in eager) < 1e-4


BASELINE = {"family": "ar", "d_model": 16, "num_blocks": 1, "num_heads": 1, "dropout": 0.3}


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["yan", "baseline"])
def test_one_worker_that_is_killed_twice_has_the_losses_of_one_that_is_not(tiny_settings, tmp_path, kind):
    settings = ("--scaling.num_workers", "1", "--scaling.checkpoint_every_s", "0.5", "--log_every_s", "0")
    settings += ("--stages.finetune.max_steps", "200")
    if kind == "baseline":  # transformers draws its dropout from the process's own generator
        whole = {"max_steps": 6, "batch_size": 16, "trains": ["flow"]}
        stages = {"autoencoder": {"max_steps": 0}, "flow": whole, "finetune": whole}
        evaluation = {**tiny_settings["evaluation"], "num_steps": [1]}
        tiny_settings = {**tiny_settings, "baseline": BASELINE, "stages": stages, "evaluation": evaluation}
    found = []
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
        config = from_dict(RunConfig, {**tiny_settings, "runs_dir": str(tmp_path / name)})
        process, log = start(config, *settings)
        for least in ("[5-9]", "1[0-9]") if name == "killed" else ():
            wait_for(rf"finetune +{least}\d/200", log, process, timeout_s=600)
            os.kill(workers_of(process)[0].pid, signal.SIGKILL)
        assert process.wait(600) == 0, log.read_text()
        found.append(losses_of(config))
    calm, killed = found
    assert sorted(calm) == sorted(killed)
    assert any(len(values) > 1 for values in killed.values())
    assert max(abs(value - calm[key][0]) for key, values in killed.items() for value in values) < 1e-6


@pytest.mark.soak
def test_an_mlflow_server_that_goes_away_stops_no_training(tiny_config, tmp_path):
    """It goes in the first stage; the driver is interrupted and goes on without it, and tells all when it is back."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"

    def serve() -> subprocess.Popen:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += [
            "--backend-store-uri",
            f"sqlite:///{tmp_path}/server.db",
            "--artifacts-destination",
            str(tmp_path / "a"),
        ]
        with (tmp_path / "server.log").open("a") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1):
                return server
            time.sleep(0.2)
        raise AssertionError((tmp_path / "server.log").read_text())

    settings = ("--tracking.uri", address, "--log_every_s", "0", "--scaling.checkpoint_every_s", "1")
    settings += ("--stages.finetune.max_steps", "400")
    server = serve()
    try:
        process, log = start(tiny_config, *settings)
        wait_for(r"autoencoder +\d+/", log, process)
        os.killpg(server.pid, signal.SIGKILL)
        wait_for(r"finetune +[2-9]\d/", log, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130, log.read_text()

        process, log = start(tiny_config, *settings)
        assert process.wait(600) == 1, log.read_text()
        text = log.read_text()
        assert "the run goes on, and it is told later" in text and "training: done in" in text
        assert "does not take the result" in text and "Traceback" not in text
        model = Path(tiny_config.runs_dir) / "tiny" / "model"
        assert yan_core.load(model).generate(["Mary went to the kitchen. Where is Mary?"])

        server = serve()
        process, log = start(tiny_config, *settings)
        assert process.wait(240) == 0, log.read_text()
        text = log.read_text()
        assert (
            "evaluate: done before, inputs unchanged" in text
            and "register: models:/yan-tiny@champion is version 1" in text
        )
        client = mlflow.MlflowClient(address)
        (run,) = client.search_runs([client.get_experiment_by_name("yan").experiment_id])
        assert run.info.status == "FINISHED" and "eval/exact_match" in run.data.metrics
        for stage, last in {"autoencoder": 12, "flow": 6, "finetune": 400}.items():
            steps = {m.step for m in client.get_metric_history(run.info.run_id, f"{stage}/train/loss")}
            assert steps == set(range(1, last + 1))
    finally:
        os.killpg(server.pid, signal.SIGKILL)

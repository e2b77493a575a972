"""A stage's state: what a checkpoint brings back, and what it refuses."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import torch

from pipelines.checkpoints import Checkpoints
from pipelines.order import Position, RowOrder, Shard, StageOrder
from pipelines.state import StageJob, StageState
from pipelines.train import reason_of_failures
from pipelines.worker import LoopConfig, TrainingStream, left_from, train_loop
from yan_core.checkpoint import CheckpointError
from yan_core.config import RunConfig, from_dict, to_dict
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

JOB = StageJob(stage="finetune", inputs={}, fingerprint="f", init_from="", output="", record="")


def fresh_state(config: RunConfig, seed: int, checkpoint: tuple[Path, Position] | None = None) -> StageState:
    tokenizer = Tokenizer.train(["Mary went to the kitchen."], config.tokenizer)
    order = StageOrder(RowOrder([Shard("a", 100)], seed=0), config.stages.finetune, config.data)
    model = build_model(config.model, tokenizer.vocab_size, seed)
    return StageState(config, JOB, model, tokenizer, order, checkpoint)


def update(state: StageState) -> None:
    """One optimizer step on a gradient that the weights alone decide."""
    for parameter in state.model.parameters():
        parameter.grad = parameter.detach().sin() if parameter.requires_grad else None
    state.optimizer.step()
    if state.average is not None:
        state.average.update(state.model, state.step)
    state.step += 1


@pytest.fixture(params=[0.0, 0.5], ids=["last", "averaged"])
def config(request, tiny_config) -> RunConfig:
    settings = to_dict(tiny_config)
    settings["stages"]["finetune"]["optim"]["ema_decay"] = request.param
    return from_dict(RunConfig, settings)


@pytest.fixture
def saved(config: RunConfig, tmp_path: Path) -> tuple[StageState, Path]:
    state = fresh_state(config, seed=0)
    for _ in range(3):
        update(state)
    state.snapshot()(tmp_path)
    return state, tmp_path


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(saved, config):
    state, folder = saved
    restored = fresh_state(config, 1, (folder, state.position))
    assert restored.step == 3
    for either in (state, restored):
        update(either)
    for name, value in state.result().items():
        assert torch.equal(value, restored.result()[name]), name
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, restored.model.state_dict()[name]), name


def test_a_snapshot_is_of_the_moment_it_was_taken(config, tmp_path):
    state, other = fresh_state(config, seed=0), fresh_state(config, seed=0)
    for either in (state, other):
        update(either)
    write = state.snapshot()
    update(state)
    write(tmp_path)
    restored = fresh_state(config, 1, (tmp_path, other.position))
    assert all(torch.equal(v, restored.result()[n]) for n, v in other.result().items())
    update(other)
    update(restored)
    assert all(torch.equal(v, restored.model.state_dict()[n]) for n, v in other.model.state_dict().items())


def test_the_average_lags_behind_the_weights(saved, config):
    state, _ = saved
    moved = [n for n, p in state.model.named_parameters() if p.requires_grad]
    equal = [torch.equal(state.result()[n], state.model.state_dict()[n]) for n in moved]
    assert not all(equal) if config.stages.finetune.optim.ema_decay else all(equal)


def test_a_damaged_model_is_refused_by_name(saved, config):
    state, folder = saved
    path = folder / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        fresh_state(config, 1, (folder, state.position))


def test_a_checkpoint_says_where_it_was_taken(saved, tmp_path):
    state, _ = saved
    assert (state.position.stage, state.position.fingerprint, state.position.step) == ("finetune", "f", 3)
    checkpoints = Checkpoints(str(tmp_path / "training"))
    checkpoints.write("checkpoint_0", state.position, state.snapshot())
    assert checkpoints.newest() == ("checkpoint_0", state.position)


def test_stages_that_are_done_are_left_out_after_a_restart():
    jobs = [StageJob(s, {}, s, "", "", "") for s in ("autoencoder", "flow", "finetune")]
    assert left_from(jobs, None) == (jobs, 0)
    assert left_from(jobs, Position("flow", "flow", 7)) == (jobs[1:], 7)


def test_the_reason_of_failures_a_failed_worker_is_what_was_raised_and_not_the_advice_below_it():
    advice = "To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext`."
    cause = (
        "ray::Map() (pid=1)\n  File x\nFileNotFoundError: no such file: /runs/a.parquet\n\nThe above exception ...\n"
    )
    raised = RuntimeError(f"{cause}ray.exceptions.UserCodeException: UDF failed to process a data block.\n{advice}\n")
    assert reason_of_failures({1: raised}, ValueError("other")) == "FileNotFoundError: no such file: /runs/a.parquet"
    died = RuntimeError("The worker died.\nIts node was terminated: health check failed\n")
    assert reason_of_failures({0: died}, ValueError("other")) == "Its node was terminated: health check failed"
    assert reason_of_failures({}, ValueError("other")) == "other"


def test_a_worker_with_another_copy_of_the_code_says_so_where_the_driver_looks(tmp_path, monkeypatch):
    loop = LoopConfig(
        stream=TrainingStream({}, [JOB], "nowhere", "nowhere"),
        failure=str(tmp_path / "failure.txt"),
        unsent="",
        code=("another", "yan_core of the driver"),
        board=None,
        mlflow=None,
    )
    given = pickle.loads(pickle.dumps(loop.wrapped()))  # as Ray Train hands it to each worker
    assert given == {"loop": loop}
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 3))
    train_loop(given)  # opens nothing
    said = (tmp_path / "failure.txt").read_text()
    assert said.startswith("worker 3 runs another copy of the code (")
    assert "than the driver (yan_core of the driver)" in said

"""Ray Train: one stage over N workers, from a Ray Data stream, with checkpoints that a restart goes on from."""

from __future__ import annotations

import json
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, DataConfig, FailureConfig, Result, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, get_device, prepare_model

import yan_core
from pipelines.loader import open_stage, stage_batches
from pipelines.prepare import Prepared, open_prepared
from pipelines.sources import DataError
from pipelines.tracking import Tracker
from yan_core.checkpoint import code_fingerprint, from_pretrained, save_pretrained
from yan_core.config import RunConfig, StageConfig, from_dict, to_dict
from yan_core.loss import Objective
from yan_core.model import YanModel, build_model
from yan_core.tokenization import Tokenizer
from yan_core.training import (
    TrainingFailed,
    build_optimizer,
    draw_solver_steps,
    freeze_all_but,
    learning_rate,
    set_training_mode,
    train_step,
)

STAGES = ("autoencoder", "flow", "finetune")
"""Stages in the order they build on each other."""


def model_details(config: RunConfig) -> dict[str, Any]:
    """What a saved model needs beside its weights to answer as it was trained."""
    return {
        "run": config.name,
        "task": config.data.task,
        "max_source_tokens": config.data.max_source_tokens,
        "max_target_tokens": config.data.max_target_tokens,
    }


class StageState:
    """Model, optimizer and position of a stage: what a checkpoint holds."""

    def __init__(self, config: RunConfig, stage: str, model: YanModel, tokenizer: Tokenizer) -> None:
        self.config, self.stage, self.model, self.tokenizer = config, stage, model, tokenizer
        self.settings: StageConfig = getattr(config.stages, stage)
        freeze_all_but(model, self.settings.trains)
        self.optimizer = build_optimizer(model, self.settings.optim)
        self.step = 0

    @property
    def loss_config(self) -> Any:
        """The stage's objective."""
        return self.config.autoencoder_loss if self.stage == "autoencoder" else self.config.flow_loss

    def save(self, folder: Path) -> None:
        """Write everything a restart needs."""
        save_pretrained(folder / "model", self.model, self.tokenizer, model_details(self.config))
        # Tensors and plain values only, so that it is read back with weights_only=True.
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "position.json").write_text(json.dumps({"step": self.step}), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        saved, _, _ = from_pretrained(folder / "model")
        self.model.load_state_dict(saved.state_dict())
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        self.step = json.loads((folder / "position.json").read_text(encoding="utf-8"))["step"]


class Reporter:
    """Rank 0's progress lines and metrics, one set per interval, averaged over it."""

    def __init__(self, state: StageState, board: ActorHandle | None, tracker: Tracker | None, workers: int) -> None:
        self.state, self.board, self.tracker, self.workers = state, board, tracker, workers
        self.total = state.settings.max_steps
        self.started, self.first_step = time.perf_counter(), state.step
        self._clear()

    def _clear(self) -> None:
        self.since, self.steps, self.tokens, self.wait_s = time.perf_counter(), 0, 0, 0.0
        self.sums: dict[str, torch.Tensor] = {}

    def say(self, line: str) -> None:
        """Show a line on the driver's terminal."""
        if self.board is not None:
            self.board.add.remote(f"  {self.state.stage:<11} {line}")

    def add(self, metrics: dict[str, torch.Tensor], tokens: int, wait_s: float) -> None:
        """Count one step."""
        self.steps, self.tokens, self.wait_s = self.steps + 1, self.tokens + tokens, self.wait_s + wait_s
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def due(self) -> bool:
        """Whether the interval is over."""
        return time.perf_counter() - self.since >= self.state.config.log_every_s

    def report(self, lr: float) -> dict[str, float]:
        """Show and record the interval; returns its mean metrics."""
        if self.steps == 0:
            return {}
        elapsed = time.perf_counter() - self.since
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        rate = self.workers * self.tokens / elapsed
        done, step = self.state.step - self.first_step, self.state.step
        left_s = (time.perf_counter() - self.started) / max(1, done) * (self.total - step)
        parts = " ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in means.items() if k.startswith("loss_"))
        load = f" load x{means['expert_load_max']:.2f}" if "expert_load_max" in means else ""
        self.say(
            f"{step:>5}/{self.total} loss {means['loss']:.3f} ({parts}) lr {lr:.1e} grad {means['grad_norm']:.2f} "
            f"{rate / 1000:.1f}k tok/s wait {self.wait_s / elapsed:.0%}{load} left {left_s:.0f}s"
        )
        if self.tracker is not None:
            named = {f"{self.state.stage}/train/{k}": v for k, v in means.items()}
            named |= {
                f"{self.state.stage}/train/lr": lr,
                f"{self.state.stage}/perf/tokens_per_s": rate,
                f"{self.state.stage}/perf/data_wait_share": self.wait_s / elapsed,
            }
            self.tracker.metrics(named, step)
        self._clear()
        return means


def save_checkpoint(state: StageState, metrics: dict[str, float], rank: int) -> None:
    """Report metrics and, from rank 0, a checkpoint; every worker must call it at the same step."""
    metrics = {**metrics, "step": state.step}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as scratch:
        state.save(Path(scratch))
        ray.train.report(metrics, ray.train.Checkpoint.from_directory(scratch))


def train_loop(job: dict[str, Any]) -> None:
    """What each worker runs: one stage from its start, or from the newest checkpoint, to its last step.

    Args:
        job: `config` (a RunConfig as a dictionary), `stage`, `prepared` and `init_from` (folders), `code` (hash
            of the driver's yan_core), `board` and `mlflow` (for rank 0).
    """
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if code_fingerprint() != job["code"]:
        raise TrainingFailed(
            f"worker {rank} runs another copy of yan_core ({Path(yan_core.__file__).parent}, {code_fingerprint()}) "
            f"than the driver ({job['code']}): ship one copy, by --working-dir or in the image, and do not edit it in "
            "mid-run"
        )
    config = from_dict(RunConfig, job["config"])
    stage: str = job["stage"]
    tokenizer = open_prepared(Path(job["prepared"])).tokenizer
    if job["init_from"]:
        model, _, _ = from_pretrained(job["init_from"])
    else:
        model = build_model(config.model, tokenizer.vocab_size, config.seed)
    torch.manual_seed(config.seed * 1_000_003 + rank)  # dropout alone uses the global generator
    device = get_device()
    model = model.to(device)
    state = StageState(config, stage, model, tokenizer)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state.restore(Path(folder))

    objective = Objective(model, state.loss_config)
    wrapped = prepare_model(objective, move_to_device=False) if workers > 1 else objective
    tracker = Tracker(*job["mlflow"]) if rank == 0 and job["mlflow"] else None
    reporter = Reporter(state, job["board"] if rank == 0 else None, tracker, workers)
    if checkpoint is not None:
        reporter.say(f"goes on from its checkpoint at step {state.step}")
    set_training_mode(model, state.settings.trains)
    optim, saved_at = state.settings.optim, time.perf_counter()
    shard = ray.train.get_dataset_shard("rows")
    batches = stage_batches(shard, config, stage, workers, skip_steps=state.step)
    means: dict[str, float] = {}
    lr = 0.0
    while state.step < state.settings.max_steps:
        asked = time.perf_counter()
        batch = next(batches).to(device)
        wait_s = time.perf_counter() - asked
        lr = learning_rate(state.step, state.settings.max_steps, optim)
        num_steps = draw_solver_steps(config.flow_loss.solver_steps, config.seed, state.step)
        metrics = train_step(
            wrapped, batch, state.optimizer, num_steps, lr, optim.clip_norm, bf16=device.type == "cuda"
        )
        state.step += 1
        reporter.add(metrics, batch.num_tokens, wait_s)
        if rank == 0 and reporter.due():
            means = reporter.report(lr)
        # Rank 0's clock decides for all: they must report at the same step.
        if agree(time.perf_counter() - saved_at >= config.scaling.checkpoint_every_s, device, workers):
            save_checkpoint(state, means, rank)
            saved_at = time.perf_counter()
    if rank == 0:
        means = reporter.report(lr) or means
    save_checkpoint(state, means, rank)


def agree(here: bool, device: torch.device, workers: int) -> bool:
    """Rank 0's answer, on every worker."""
    if workers == 1:
        return here
    answer = torch.tensor([here], dtype=torch.int32, device=device)
    torch.distributed.broadcast(answer, src=0)
    return bool(answer.item())


def train_stage(
    config: RunConfig,
    stage: str,
    prepared: Prepared,
    init_from: Path | None,
    output: Path,
    storage: Path,
    attempt: str,
    board: ActorHandle | None = None,
    tracker: Tracker | None = None,
) -> dict[str, Any]:
    """Train one stage and leave its model folder at `output`.

    Args:
        config: The run.
        stage: One of STAGES.
        prepared: Its data.
        init_from: Model folder of the stage before, or None for fresh weights.
        output: Where the trained model goes, when it is complete.
        storage: Folder (shared by all nodes) for checkpoints while it runs.
        attempt: Name of this training; the same name goes on from its newest checkpoint.
        board: Takes progress lines.
        tracker: MLflow run.

    Returns:
        The last metrics.

    Raises:
        DataError: If there are fewer rows than one batch.
        TrainingFailed: If it gave up after scaling.max_failures.
    """
    settings: StageConfig = getattr(config.stages, stage)
    rows = prepared.num_rows(stage)
    if rows < settings.batch_size:
        raise DataError(f"stage {stage} has {rows} rows, fewer than stages.{stage}.batch_size={settings.batch_size}")
    scaling = config.scaling
    job = {
        "config": to_dict(config),
        "stage": stage,
        "prepared": str(prepared.folder.resolve()),
        "init_from": str(init_from.resolve()) if init_from else None,
        "code": code_fingerprint(),
        "board": board,
        "mlflow": (tracker.uri, tracker.run_id) if tracker else None,
    }
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=job,
        datasets={"rows": open_stage(prepared, stage, config)},
        dataset_config=DataConfig(datasets_to_split=["rows"]),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=attempt,
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=scaling.keep_checkpoints),
            callbacks=[SayRestarts(stage, board)] if board is not None else None,
        ),
    )
    try:
        result = fit_interruptibly(trainer)
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        raise TrainingFailed(f"stage {stage} failed: {reason_of(failures, error)}") from error
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        model, tokenizer, details = from_pretrained(Path(folder) / "model")
    save_pretrained(output, model, tokenizer, details)
    return dict(result.metrics or {})


def fit_interruptibly(trainer: TorchTrainer) -> Result:
    """`trainer.fit()`, beside the main thread: there it would put a SIGINT handler of its own in place that ends the
    process without the clean-up of its callers (and with status 0).
    """
    done: Future[Result] = Future()

    def fit() -> None:
        try:
            done.set_result(trainer.fit())
        except BaseException as error:  # handed to the caller as it is
            done.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    return done.result()


def reason_of(failures: dict[int, Exception], otherwise: BaseException) -> str:
    """The first worker's own last line of a failure that Ray wrapped."""
    for error in (*failures.values(), otherwise):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines:
            return lines[-1]
    return type(otherwise).__name__


class SayRestarts(UserCallback):
    """Tells the driver's terminal that a worker failed, before the workers start again."""

    def __init__(self, stage: str, board: ActorHandle) -> None:
        self.stage, self.board = stage, board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller."""
        ranks = ", ".join(map(str, worker_exceptions))
        error = next(iter(worker_exceptions.values()))
        self.board.add.remote(f"  {self.stage:<11} worker {ranks} failed: {reason_of(worker_exceptions, error)[:300]}")

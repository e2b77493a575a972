"""Ray Train: the stages of a run over N workers, from Ray Data streams, with checkpoints that a restart goes on from.

One `TorchTrainer` for all stages: to start the workers and their stream costs half a minute on two cores.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, DataConfig, FailureConfig, Result, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, get_device, prepare_model

import yan_core
from pipelines.loader import stage_batches
from pipelines.prepare import Prepared, open_prepared
from pipelines.sources import DataError
from pipelines.stream import open_stage
from yan_core.checkpoint import CheckpointError, from_pretrained, save_pretrained
from yan_core.config import RunConfig, StageConfig, from_dict, to_dict
from yan_core.files import code_fingerprint, sha256_file, write_file
from yan_core.loss import Objective
from yan_core.model import YanModel, build_model
from yan_core.tokenization import Tokenizer
from yan_core.training import (
    NonFiniteLoss,
    TrainingFailed,
    build_optimizer,
    draw_solver_steps,
    freeze_all_but,
    learning_rate,
    set_training_mode,
    train_step,
)

if TYPE_CHECKING:
    from pipelines.tracking import Tracker

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


@dataclass(frozen=True)
class StageJob:
    """A stage to be trained.

    Attributes:
        stage: One of STAGES.
        inputs: What its result depends on, written beside it.
        fingerprint: Hash of `inputs`; a checkpoint with another one is not gone on from.
        init_from: Model folder of the stage before, or empty for fresh weights.
        output: Where the model folder goes, when it is complete.
        record: File that then gets `inputs`.
    """

    stage: str
    inputs: dict[str, Any]
    fingerprint: str
    init_from: str
    output: str
    record: str


class StageState:
    """Model, optimizer and position of a stage: what a checkpoint holds."""

    def __init__(self, config: RunConfig, job: StageJob, model: YanModel, tokenizer: Tokenizer) -> None:
        self.config, self.job, self.model, self.tokenizer = config, job, model, tokenizer
        self.settings: StageConfig = getattr(config.stages, job.stage)
        freeze_all_but(model, self.settings.trains)
        self.optimizer = build_optimizer(model, self.settings.optim)
        self.step = 0

    @property
    def loss_config(self) -> Any:
        """The stage's objective."""
        return self.config.autoencoder_loss if self.job.stage == "autoencoder" else self.config.flow_loss

    def save(self, folder: Path) -> None:
        """Write everything a restart needs."""
        save_pretrained(folder / "model", self.model, self.tokenizer, model_details(self.config))
        # Tensors and plain values only, so that it is read back with weights_only=True.
        torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        position = {
            "stage": self.job.stage,
            "fingerprint": self.job.fingerprint,
            "step": self.step,
            "optimizer_sha256": sha256_file(folder / "optimizer.pt"),
        }
        (folder / "position.json").write_text(json.dumps(position), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            CheckpointError: If a file of it is damaged.
        """
        saved, _, _ = from_pretrained(folder / "model")
        if sha256_file(folder / "optimizer.pt") != read_position(folder)["optimizer_sha256"]:
            raise CheckpointError(
                f"{folder / 'optimizer.pt'} is damaged: its SHA-256 is not the one in position.json; delete the run's "
                "folder `training`, and the stage begins anew"
            )
        self.model.load_state_dict(saved.state_dict())
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        self.step = read_position(folder)["step"]


def read_position(folder: Path) -> dict[str, Any]:
    """Where a checkpoint was taken: stage, fingerprint of its inputs, step."""
    return json.loads((folder / "position.json").read_text(encoding="utf-8"))


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

    @property
    def seconds(self) -> float:
        """Time since this stage began or went on."""
        return time.perf_counter() - self.started

    def say(self, line: str) -> None:
        """Show a line on the driver's terminal."""
        if self.board is not None:
            self.board.add.remote(f"  {self.state.job.stage:<11} {line}")

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
            named = {f"{self.state.job.stage}/train/{k}": v for k, v in means.items()}
            named |= {
                f"{self.state.job.stage}/train/lr": lr,
                f"{self.state.job.stage}/perf/tokens_per_s": rate,
                f"{self.state.job.stage}/perf/data_wait_share": self.wait_s / elapsed,
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
    """What each worker runs: the stages in order, from the start or from the newest checkpoint.

    Args:
        job: `config` (a RunConfig as a dictionary), `stages` (StageJobs), `prepared` (folder), `failure` (file that
            says why training cannot go on), `code` (hash of the driver's yan_core), `board` and `mlflow` (for rank 0).
    """
    context = ray.train.get_context()
    rank = context.get_world_rank()
    if code_fingerprint() != job["code"]:
        raise TrainingFailed(
            f"worker {rank} runs another copy of yan_core ({Path(yan_core.__file__).parent}, {code_fingerprint()}) "
            f"than the driver ({job['code']}): ship one copy, by --working-dir or in the image, and do not edit it in "
            "mid-run"
        )
    config = from_dict(RunConfig, job["config"])
    stages: list[StageJob] = job["stages"]
    tokenizer = open_prepared(Path(job["prepared"])).tokenizer
    board = job["board"] if rank == 0 else None
    tracker = None
    if rank == 0 and job["mlflow"]:
        from pipelines.tracking import Tracker  # two seconds of imports that only this worker needs

        tracker = Tracker(*job["mlflow"])

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            fingerprint = read_position(Path(folder))["fingerprint"]
        at = [i for i, stage in enumerate(stages) if stage.fingerprint == fingerprint]
        stages = stages[at[0] :] if at else stages
        checkpoint = checkpoint if at else None  # of a stage that is done, or whose inputs have changed since

    try:
        train_all(config, stages, checkpoint, tokenizer, board, tracker)
    except NonFiniteLoss as error:  # on every worker alike; to try again would end alike
        if rank == 0:
            write_file(Path(job["failure"]), str(error))


def train_all(
    config: RunConfig,
    stages: list[StageJob],
    checkpoint: ray.train.Checkpoint | None,
    tokenizer: Tokenizer,
    board: ActorHandle | None,
    tracker: Tracker | None,
) -> None:
    """Train stages in order, the first one from `checkpoint` if there is one; rank 0 leaves each one's model folder."""
    context, device = ray.train.get_context(), get_device()
    rank, workers = context.get_world_rank(), context.get_world_size()
    model: YanModel | None = None
    held = ""  # folder of the trained model in memory
    for stage in stages:
        if model is None or stage.init_from != held:
            if stage.init_from:
                model, _, _ = from_pretrained(stage.init_from)
            else:
                model = build_model(config.model, tokenizer.vocab_size, config.seed)
            model = model.to(device)
        state = StageState(config, stage, model, tokenizer)
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                state.restore(Path(folder))
            checkpoint = None
        reporter = Reporter(state, board, tracker, workers)
        if state.step:
            reporter.say(f"goes on from its checkpoint at step {state.step}")
        train_one_stage(state, reporter, rank, workers, device)
        if rank == 0:
            save_pretrained(stage.output, model, tokenizer, model_details(config))
            write_file(Path(stage.record), json.dumps(stage.inputs, indent=2))
            reporter.say(f"done in {reporter.seconds:.0f} s")
        held = stage.output


def train_one_stage(state: StageState, reporter: Reporter, rank: int, workers: int, device: torch.device) -> None:
    """Train from `state.step` to the stage's last step, with a checkpoint now and then and one at the end."""
    config, stage, settings = state.config, state.job.stage, state.settings
    torch.manual_seed(config.seed * 1_000_003 + rank)  # dropout alone uses the global generator
    objective = Objective(state.model, state.loss_config)
    wrapped = prepare_model(objective, move_to_device=False) if workers > 1 else objective
    set_training_mode(state.model, settings.trains)
    shard = ray.train.get_dataset_shard(stage)
    batches = stage_batches(shard, config, stage, workers, skip_steps=state.step)
    means: dict[str, float] = {}
    lr, saved_at = 0.0, time.perf_counter()
    while state.step < settings.max_steps:
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise TrainingFailed(f"stage {stage} ran out of rows at step {state.step}: prepare the data again")
        batch = batch.to(device)
        wait_s = time.perf_counter() - asked
        lr = learning_rate(state.step, settings.max_steps, settings.optim)
        num_steps = draw_solver_steps(config.flow_loss.solver_steps, config.seed, state.step)
        try:
            metrics = train_step(
                wrapped, batch, state.optimizer, num_steps, lr, settings.optim.clip_norm, bf16=device.type == "cuda"
            )
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"stage {stage}, step {state.step + 1}: {error}") from error
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


def train_stages(
    config: RunConfig,
    stages: list[StageJob],
    prepared: Prepared,
    storage: Path,
    board: ActorHandle | None = None,
    tracker: Tracker | None = None,
) -> None:
    """Train stages, one after the other, and leave each one's model folder at its `output`.

    Args:
        config: The run.
        stages: What to train, in order.
        prepared: The data.
        storage: Folder (shared by all nodes) for checkpoints. What an earlier call left there is gone on from.
        board: Takes progress lines.
        tracker: MLflow run.

    Raises:
        DataError: If there are fewer rows than one batch.
        TrainingFailed: If it gave up after scaling.max_failures.
    """
    for job in stages:
        rows, batch_size = prepared.num_rows(job.stage), getattr(config.stages, job.stage).batch_size
        if rows < batch_size:
            raise DataError(
                f"stage {job.stage} has {rows} rows, fewer than stages.{job.stage}.batch_size={batch_size}: "
                "add rows or lower the batch size"
            )
    scaling, failure = config.scaling, storage.resolve() / "failure.txt"
    failure.unlink(missing_ok=True)
    loop_config = {
        "failure": str(failure),
        "config": to_dict(config),
        "stages": stages,
        "prepared": str(prepared.folder.resolve()),
        "code": code_fingerprint(),
        "board": board,
        "mlflow": (tracker.uri, tracker.run_id) if tracker else None,
    }
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=loop_config,
        datasets={job.stage: open_stage(prepared, job.stage, config) for job in stages},
        dataset_config=DataConfig(datasets_to_split="all"),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="training",  # the same name goes on from its newest checkpoint
            storage_path=str(storage.resolve()),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=scaling.keep_checkpoints),
            callbacks=[SayRestarts(board)] if board is not None else None,
        ),
    )
    try:
        fit_interruptibly(trainer)
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        raise TrainingFailed(f"training failed: {reason_of(failures, error)}") from error
    if failure.is_file():
        raise TrainingFailed(f"training failed: {failure.read_text(encoding='utf-8')}")


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

    def __init__(self, board: ActorHandle) -> None:
        self.board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller."""
        ranks = ", ".join(map(str, worker_exceptions))
        error = next(iter(worker_exceptions.values()))
        self.board.add.remote(f"  training    worker {ranks} failed: {reason_of(worker_exceptions, error)[:300]}")

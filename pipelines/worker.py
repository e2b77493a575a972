"""What each worker of a training does: the stages in order, step by step, from the newest sound checkpoint on."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import ray
import ray.data
import ray.exceptions
import ray.train
import torch
from ray.actor import ActorHandle
from ray.data import ExecutionOptions
from ray.train import (
    CheckpointUploadMode,
)
from ray.train.torch import get_device, prepare_model

from pipelines.batches import ahead
from pipelines.checkpoints import Checkpoints
from pipelines.cluster import quiet_ray
from pipelines.loader import StageBatches, open_blocks
from pipelines.metrics_buffer import MetricsBuffer
from pipelines.order import Position, stage_order
from pipelines.prepare import open_prepared
from pipelines.reporter import Reporter
from pipelines.state import StageJob, StageState
from pipelines.stream import open_stream
from pipelines.validation import Validation
from yan_core.baselines import Baseline
from yan_core.batching import Batch
from yan_core.checkpoint import from_pretrained
from yan_core.config import RunConfig, from_dict
from yan_core.files import code_description, code_fingerprint, write_file
from yan_core.model import YanModel, build_model
from yan_core.parallel import num_workers
from yan_core.training import NonFiniteLoss, set_training_mode

if TYPE_CHECKING:
    from pipelines.tracking import Tracker

STREAM = "training"
"""Name of the stream of rows in Ray Train."""

NOT_FINITE = "not_finite"
"""Beside the checkpoints: the state of a training that met no finite gradient."""


@dataclass(frozen=True)
class TrainingStream:
    """The stream of rows of a group of workers, from where the newest sound checkpoint stands.

    Attributes:
        config: The run, as plain values.
        jobs: All stages that are to be trained.
        prepared: Folder of the data.
        checkpoints: Place of the checkpoints.
    """

    config: dict[str, Any]
    jobs: list[StageJob]
    prepared: str
    checkpoints: str

    def open(self, workers: int) -> ray.data.Dataset:
        """Decide what so many workers go on from, and open the rows after it."""
        found = Checkpoints(self.checkpoints).decide([job.fingerprint for job in self.jobs])
        jobs, step = left_from(self.jobs, found[1] if found else None)
        config = from_dict(RunConfig, self.config)
        return open_stream(open_prepared(Path(self.prepared)), config, [job.stage for job in jobs], step, workers)


class DealtStream(ray.train.DataConfig):
    """Opens a stream for as many workers as Ray Train has started, each time that it starts some."""

    def __init__(self, stream: TrainingStream) -> None:
        # In order, so that the same blocks come to the same workers each time.
        super().__init__(execution_options=ExecutionOptions(preserve_order=True))
        self.stream = stream

    def configure(
        self, datasets: dict[str, ray.data.Dataset], world_size: int, *_: object, **__: object
    ) -> list[dict[str, ray.data.DataIterator]]:
        """What each worker reads in place of the data set of a name, which stands in for the stream."""
        quiet_ray()
        (name,) = datasets
        stream = self.stream.open(world_size)
        stream.set_name(name)
        stream.context.execution_options = self._resolve_execution_options(name)
        return [{name: part} for part in stream.streaming_split(world_size, equal=False)]


def left_from(jobs: list[StageJob], position: Position | None) -> tuple[list[StageJob], int]:
    """The stages that are left at a position, and how many steps of the first of them are done."""
    if position is None:
        return jobs, 0
    at = [job.fingerprint for job in jobs].index(position.fingerprint)
    return jobs[at:], position.step


def save_checkpoint(
    state: StageState, checkpoints: Checkpoints, metrics: dict[str, float], rank: int, wait: bool
) -> None:
    """Report metrics and, from rank 0, a checkpoint; every worker must call it at the same step.

    Training goes on while it is written, from a copy, unless `wait` is true.
    """
    metrics = {**metrics, "step": state.step}
    position, fill = state.position, state.snapshot()
    if rank != 0:
        ray.train.report(metrics)
        return

    def write(_: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        return checkpoints.write(name, position, fill)

    ray.train.report(
        metrics,
        ray.train.Checkpoint.from_directory(tempfile.gettempdir()),  # a stand-in: `write` writes the files itself
        checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=False,
        checkpoint_upload_fn=write,
    )


def _tracker(uri: str, run_id: str) -> Tracker:
    from pipelines.tracking import Tracker  # see MetricsBuffer

    return Tracker(uri, run_id)


@dataclass(frozen=True)
class LoopConfig:
    """What each worker of a training is given.

    Attributes:
        stream: What is trained, on which rows.
        failure: File that says why training cannot go on.
        unsent: File of metrics that could not be sent.
        code: Fingerprint of the driver's yan_core, and which it is in words.
        board: Takes rank 0's progress lines.
        mlflow: Address and run of rank 0's metrics.
    """

    stream: TrainingStream
    failure: str
    unsent: str
    code: tuple[str, str]
    board: ActorHandle | None
    mlflow: tuple[str, str] | None

    def wrapped(self) -> dict[str, LoopConfig]:
        """What Ray Train, which wants a dictionary, hands to `train_loop`."""
        return {"loop": self}


def train_loop(wrapped: dict[str, LoopConfig]) -> None:
    """What each worker runs: the stages in order, from the start or from the newest sound checkpoint.

    Args:
        wrapped: From `LoopConfig.wrapped`.
    """
    loop = wrapped["loop"]
    rank = ray.train.get_context().get_world_rank()
    if not same_code(loop, rank):  # on every worker alike
        return
    board = loop.board if rank == 0 else None
    tracker = None
    if rank == 0 and loop.mlflow:
        tracker = MetricsBuffer(partial(_tracker, *loop.mlflow), Path(loop.unsent))
    try:
        train_all(loop.stream, board, tracker)
    except NonFiniteLoss as error:  # on every worker alike; to try again would end alike
        if rank == 0:
            write_file(Path(loop.failure), str(error))
    except Stopped:  # on every worker alike
        pass
    finally:
        if tracker is not None and (left := tracker.close()) and board is not None:
            board.add.remote(f"  training    MLflow does not answer: {left} values wait in {loop.unsent} until it does")


def same_code(loop: LoopConfig, rank: int) -> bool:
    """Whether every worker runs the driver's copy of the code; one that does not says so where the driver looks.

    To start the workers again would end alike, so none of them raises.
    """
    fingerprint, driver = loop.code
    other = code_fingerprint() != fingerprint
    if other:
        write_file(
            Path(loop.failure),
            f"worker {rank} runs another copy of the code ({code_description()}) than the driver ({driver}): ship one "
            "copy, by --working-dir or in the image, and do not edit it in mid-run",
        )
    if num_workers() > 1:
        others = torch.tensor(int(other), device=get_device())
        torch.distributed.all_reduce(others)
        other = bool(others.item())
    return not other


def train_all(stream: TrainingStream, board: ActorHandle | None, tracker: MetricsBuffer | None) -> None:
    """Train the stages that are left, in order; rank 0 leaves each one's model folder."""
    context, device = ray.train.get_context(), get_device()
    rank, workers = context.get_world_rank(), context.get_world_size()
    config, prepared = from_dict(RunConfig, stream.config), open_prepared(Path(stream.prepared))
    checkpoints, tokenizer = Checkpoints(stream.checkpoints), prepared.tokenizer
    batches = StageBatches(open_blocks(ray.train.get_dataset_shard(STREAM)), config, rank, workers)
    found = checkpoints.decided()  # when the stream was opened
    jobs, _ = left_from(stream.jobs, found[1] if found else None)
    model: YanModel | Baseline | None = None
    held = ""  # folder of the trained model in memory
    for job in jobs:
        if model is None or job.init_from != held:
            if job.init_from:
                model, known, _ = from_pretrained(job.init_from)
                if known.to_json() != tokenizer.to_json():
                    raise ValueError(f"init_from={job.init_from} has another tokenizer than the prepared data")
            else:
                model = build_model(config.architecture, tokenizer.vocab_size, config.seed)
            model = model.to(device)
        order = stage_order(prepared, job.stage, config)
        if found is None:
            state = StageState(config, job, model, tokenizer, order)
        else:
            with checkpoints.fetch(found[0]) as folder:
                state = StageState(config, job, model, tokenizer, order, (folder, found[1]))
            found = None
        reporter = Reporter(state, board, tracker)
        if state.step:
            elastic = config.scaling.min_workers < config.scaling.max_workers
            reporter.say(
                f"goes on from its checkpoint at step {state.step}{f' on {workers} workers' if elastic else ''}"
            )
        validation = None
        if job.stage == "finetune" and config.evaluation.every_steps:
            rows = prepared.validation(config.evaluation.rows_while_training)
            validation = Validation(state, rows, checkpoints, rank)
        train_one_stage(state, checkpoints, batches.stage(job.stage, state.step), reporter, rank, device, validation)
        best = validation.best_weights() if validation is not None else None
        weights = state.result() if best is None else best
        if rank == 0:
            state.save_model(Path(job.output), weights)
            write_file(Path(job.record), json.dumps(job.inputs, indent=2))
            reporter.say(f"done in {reporter.seconds:.0f} s")
        if config.scaling.strategy == "fsdp":  # the next stage shards a model anew, from the file
            model = None
            torch.distributed.barrier()
        else:
            model.load_state_dict(weights)
            held = job.output


class Stopped(Exception):
    """The driver was told to end: the workers have saved a checkpoint and leave."""


class Clock:
    """What is due at a step: rank 0's clock decides for all workers, since they must do it at the same step."""

    LOOK_EVERY_S = 1.0
    """Seconds between looks at whether the driver or a node is about to be taken away."""

    def __init__(self, state: StageState, reporter: Reporter) -> None:
        self.scaling, self.reporter = state.config.scaling, reporter
        self.saved_at = self.looked_at = time.perf_counter()
        self.warned = False
        self.asked: Any = None

    def due(self, device: torch.device) -> tuple[bool, bool, bool]:
        """Whether to report, whether to save a checkpoint, and whether to leave after it."""
        now = time.perf_counter()
        here = [
            self.reporter.due(),
            now - self.saved_at >= self.scaling.checkpoint_every_s,
            now - self.looked_at >= self.LOOK_EVERY_S,
            self._asked_to_stop(now),
        ]
        if num_workers() > 1:
            answer = torch.tensor(here, dtype=torch.int32, device=device)
            torch.distributed.broadcast(answer, src=0)
            here = [bool(v) for v in answer.tolist()]
        report, save, look, stop = here
        if look:
            self.looked_at = now
            save |= self._about_to_end()
        return report, save, stop

    def _asked_to_stop(self, now: float) -> bool:
        """Whether the driver has asked, as of the last look; never waits for its answer."""
        board = self.reporter.board
        if board is None:
            return False
        if self.asked is None:
            if now - self.looked_at >= self.LOOK_EVERY_S:
                self.asked = board.asked_to_stop.remote()
            return False
        if not ray.wait([self.asked], timeout=0)[0]:
            return False
        asked, self.asked = self.asked, None
        try:
            return ray.get(asked)
        except ray.exceptions.RayError:  # the board is gone, and with it the driver
            return False

    def _about_to_end(self) -> bool:
        """Whether a node that a worker runs on has just been said to be taken away; the same on every worker."""
        taken = ray.train.get_preemption_info() is not None
        new = taken and not self.warned
        if new:
            self.reporter.say("a node is about to be taken away: a checkpoint is saved")
        self.warned = taken
        return new


def train_one_stage(
    state: StageState,
    checkpoints: Checkpoints,
    batches: Iterator[Batch],
    reporter: Reporter,
    rank: int,
    device: torch.device,
    validation: Validation | None,
) -> None:
    """Train from `state.step` to the stage's last step, with a checkpoint now and then and one at the end."""
    settings, scaling = state.settings, state.config.scaling
    objective: Any = state.objective
    if scaling.compile:
        objective = torch.compile(objective, dynamic=True)
    if num_workers() > 1 and scaling.strategy == "ddp":
        objective = prepare_model(objective, move_to_device=False)
    set_training_mode(state.model, settings.trains)
    batches, clock = ahead(batches), Clock(state, reporter)
    means: dict[str, float] = {}
    lr = 0.0
    while state.step < settings.max_steps:
        asked = time.perf_counter()
        loaded = next(batches)
        wait_s = time.perf_counter() - asked
        try:
            done = state.take_step(objective, loaded.to(device), rank)
        except NonFiniteLoss as error:
            give_up(state, loaded, checkpoints, rank, error)
        lr = done.lr
        if done.metrics is None:
            reporter.skipped += 1
        else:
            reporter.add(done.metrics, loaded, done.num_steps, wait_s)
        report, save, stop = clock.due(device)
        if report:
            means = reporter.report(lr) or means
        if validation is not None and validation.due():
            validation.look(reporter)
        if (save or stop) and state.step < settings.max_steps:
            reporter.keep_unsent()
            save_checkpoint(state, checkpoints, means, rank, wait=stop)
            if stop:
                raise Stopped
            clock.saved_at = time.perf_counter()  # it may have waited until the one before was written
    means = reporter.report(lr) or means
    save_checkpoint(state, checkpoints, means, rank, wait=True)


def give_up(state: StageState, batch: Batch, checkpoints: Checkpoints, rank: int, error: NonFiniteLoss) -> NoReturn:
    """Leave model, optimizer and rank 0's batch of a step whose gradient is not finite, for a look, and stop."""
    fill = state.snapshot()

    def write(folder: Path) -> None:
        fill(folder)
        torch.save(vars(batch), folder / "batch.pt")

    if rank == 0:
        checkpoints.write(NOT_FINITE, state.position, write)
    raise NonFiniteLoss(
        f"stage {state.job.stage}, step {state.step + 1}, {state.skipped} in a row: {error} "
        f"Model, optimizer and batch are in {checkpoints.root}/{NOT_FINITE}."
    ) from error

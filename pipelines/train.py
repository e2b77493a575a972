"""Ray Train: the stages of a run over N workers, from Ray Data streams, with checkpoints that a restart goes on from.

One `TorchTrainer` for all stages: to start the workers and their stream costs half a minute on two cores.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
import ray.data
import ray.exceptions
import ray.train
from ray.actor import ActorHandle
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    ScalingConfig,
    UserCallback,
)
from ray.train.torch import TorchTrainer
from ray.util import placement_group_table

from pipelines.checkpoints import Checkpoints
from pipelines.listing import DataError, raised_in
from pipelines.metrics_buffer import UNSENT
from pipelines.prepare import Prepared
from pipelines.state import StageJob
from pipelines.worker import STREAM, DealtStream, LoopConfig, TrainingStream, train_loop
from yan_core.config import RunConfig, to_dict
from yan_core.files import code_description, code_fingerprint
from yan_core.training import (
    TrainingFailed,
)

if TYPE_CHECKING:
    from pipelines.tracking import Tracker

TRAINING = "training"
"""Name that Ray Train knows a run's training by; its checkpoints are below it."""


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
    place = f"{scaling.storage.rstrip('/')}/{config.name}" if scaling.storage else str(storage.resolve())
    checkpoints = f"{place}/{TRAINING}"
    stream = TrainingStream(to_dict(config), stages, str(prepared.folder.resolve()), checkpoints)
    loop = LoopConfig(
        stream=stream,
        failure=str(failure),
        unsent=str(storage.resolve().parent / UNSENT.format(tracker.run_id if tracker else "")),
        code=(code_fingerprint(), code_description()),
        board=board,
        mlflow=(tracker.uri, tracker.run_id) if tracker else None,
    )
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=loop.wrapped(),
        datasets={STREAM: ray.data.range(1)},  # in its place the workers get the stream
        dataset_config=DealtStream(stream),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            elastic_resize_monitor_interval_s=scaling.resize_every_s,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=TRAINING,
            storage_path=place,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=scaling.keep_checkpoints),
            callbacks=[SayRestarts(board)] if board is not None else None,
        ),
    )
    try:
        fit_interruptibly(trainer, board)
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        raise TrainingFailed(f"training failed: {reason_of_failures(failures, error)}") from error
    if failure.is_file():
        raise TrainingFailed(f"training failed: {failure.read_text(encoding='utf-8')}")
    if not all(Path(job.record).is_file() for job in stages):
        raise SystemExit(143)  # as after any SIGTERM; nothing else lets the workers leave early
    Checkpoints(checkpoints).delete()


TELL_WAITING_S = 60.0
"""How often it is told that no node has room for the workers."""


def fit_interruptibly(trainer: TorchTrainer, board: ActorHandle | None) -> Result:
    """`trainer.fit()`, beside the main thread: there it would put a SIGINT handler of its own in place that ends the
    process without the clean-up of its callers (and with status 0).

    A SIGTERM, as a spot machine or `ray job stop` sends it, has the workers save a checkpoint and leave; a second one
    ends this process at once.
    """
    done: Future[Result] = Future()
    ended_by = signal.getsignal(signal.SIGTERM)

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, ended_by)
        cast(Any, board).add.remote("  training    stops after a checkpoint; the same command goes on from there")
        cast(Any, board).ask_to_stop.remote()

    def fit() -> None:
        try:
            done.set_result(trainer.fit())
        except BaseException as error:  # handed to the caller as it is
            done.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    if board is None or threading.current_thread() is not threading.main_thread():
        return done.result()
    signal.signal(signal.SIGTERM, leave)
    try:
        while not wait([done], timeout=TELL_WAITING_S).done:
            worker = cast("Mapping[str, float]", trainer.scaling_config.resources_per_worker)
            if line := what_is_waited_for(worker):
                cast(Any, board).add.remote(f"  training    {line}")
        return done.result()
    finally:
        signal.signal(signal.SIGTERM, ended_by)


def what_is_waited_for(worker: Mapping[str, float]) -> str:
    """Workers that no node has room for, and what the nodes have; empty: there are none.

    Ray waits for them without end and without a word, since an autoscaler may bring the nodes.

    Args:
        worker: What one of them needs.
    """
    pending = [group for group in placement_group_table().values() if group["state"] == "PENDING"]
    count = sum(worker.items() <= bundle.items() for group in pending for bundle in group["bundles"].values())
    if not count:
        return ""
    free, all_of_it = ray.available_resources(), ray.cluster_resources()
    nodes = ", ".join(f"{free.get(name, 0):g} of {all_of_it.get(name, 0):g} {name}" for name in worker)
    needs = " and ".join(f"{amount:g} {name}" for name, amount in worker.items())
    return (
        f"waits for {count} workers of {needs} each; the cluster has {nodes} free. Where no autoscaler brings nodes: "
        "lower scaling.num_workers or scaling.cpus_per_worker, or set scaling.use_gpu to false"
    )


def reason_of_failures(failures: dict[int, Exception], otherwise: BaseException) -> str:
    """What the first worker raised, or its last line, of a failure that Ray wrapped and put advice below."""
    for error in (*failures.values(), otherwise):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines:
            return (raised_in(lines) or lines)[-1]
    return type(otherwise).__name__


class SayRestarts(UserCallback):
    """Tells the driver's terminal that a worker failed, before the workers start again."""

    def __init__(self, board: ActorHandle) -> None:
        self.board = board

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train's controller."""
        ranks = ", ".join(map(str, worker_exceptions))
        error = next(iter(worker_exceptions.values()))
        self.board.add.remote(
            f"  training    worker {ranks} failed: {reason_of_failures(worker_exceptions, error)[:300]}"
        )

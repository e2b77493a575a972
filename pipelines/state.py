"""What a stage of training consists of, what a checkpoint of it holds, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.order import Position, StageOrder, num_lanes
from yan_core.baselines import Baseline
from yan_core.batching import Batch
from yan_core.checkpoint import from_pretrained, save_pretrained
from yan_core.config import AutoencoderLossConfig, FlowLossConfig, RunConfig, StageConfig
from yan_core.loss import Objective
from yan_core.model import YanModel
from yan_core.sharding import full_copy, restore_optimizer, shard
from yan_core.tokenization import Tokenizer
from yan_core.training import (
    NonFiniteLoss,
    WeightAverage,
    build_optimizer,
    draw_solver_steps,
    freeze_all_but,
    learning_rate,
    train_step,
)

STAGES = ("autoencoder", "flow", "finetune")
"""Stages in the order they build on each other."""


def check_stages(config: RunConfig) -> None:
    """Look whether there is something to train, and whether workers can do it in step, before anything starts.

    Raises:
        ValueError: If there is nothing. If a worker may have fewer rows than passes: it would make fewer of them than
            others, which wait for it in each.
    """
    if not any(getattr(config.stages, stage).max_steps for stage in STAGES):
        raise ValueError("every stage has max_steps=0: nothing to train")
    for stage in STAGES:
        settings, scaling = getattr(config.stages, stage), config.scaling
        lanes = num_lanes(settings, config.data)
        uneven = [n for n in range(scaling.min_workers, scaling.max_workers + 1) if lanes % n]
        fewest = min((lanes // n * (settings.batch_size // lanes) for n in uneven), default=scaling.accumulation)
        if settings.max_steps and scaling.accumulation > fewest:
            raise ValueError(
                f"scaling.accumulation={scaling.accumulation} must be at most {fewest}, what a worker may have of "
                f"stages.{stage}.batch_size={settings.batch_size} where {uneven[-1]} share its {lanes} lanes"
            )


@dataclass(frozen=True)
class StageJob:
    """A stage to be trained.

    Attributes:
        stage: `autoencoder`, `flow` or `finetune`.
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


def model_details(config: RunConfig) -> dict[str, Any]:
    """What a saved model needs beside its weights to answer as it was trained."""
    return {
        "run": config.name,
        "task": config.data.task,
        "max_source_tokens": config.data.max_source_tokens,
        "max_target_tokens": config.data.max_target_tokens,
    }


@dataclass(frozen=True)
class StepDone:
    """A step that was taken.

    Attributes:
        metrics: See `train_step`; None: its gradient was not finite, and the weights are as they were.
        num_steps: Of the training solver.
        lr: Learning rate.
    """

    metrics: dict[str, Tensor] | None
    num_steps: int
    lr: float


class StageState:
    """Model, optimizer, averages and position of a stage: all that a checkpoint needs to hold.

    No random generator has a state to be kept: every draw is a function of seed, epoch, row and step (noise.py).
    """

    def __init__(
        self,
        config: RunConfig,
        job: StageJob,
        model: YanModel | Baseline,
        tokenizer: Tokenizer,
        order: StageOrder,
        checkpoint: tuple[Path, Position] | None = None,
    ) -> None:
        """Begin a stage, or go on with it.

        Args:
            config: The run.
            job: The stage.
            model: Whole, on its device; with scaling.strategy=fsdp it is sharded in place.
            tokenizer: Saved beside the model.
            order: The stage's batches.
            checkpoint: What an earlier `snapshot` wrote, and where it was taken.

        Raises:
            CheckpointError: If the model in the checkpoint is damaged.
        """
        self.config, self.job, self.model, self.tokenizer, self.order = config, job, model, tokenizer, order
        self.settings: StageConfig = getattr(config.stages, job.stage)
        self.step = checkpoint[1].step if checkpoint else 0
        self.skipped = 0
        """Steps in a row, up to now, whose gradient was not finite."""
        folder = checkpoint[0] if checkpoint else None
        if folder is not None:
            model.load_state_dict(from_pretrained(folder / "model")[0].state_dict())
        freeze_all_but(model, self.settings.trains)
        if isinstance(model, YanModel):
            model.recompute(config.scaling.recompute)
        self.objective = Objective(model, self.loss_config)
        """What a step computes."""
        if config.scaling.strategy == "fsdp":
            shard(self.objective)
        self.optimizer = build_optimizer(model, self.settings.optim)
        decay = self.settings.optim.ema_decay
        self.average = WeightAverage(model, decay) if decay else None
        if folder is not None:
            # Tensors and plain values only, so that nothing but those is read back.
            restore_optimizer(self.optimizer, torch.load(folder / "optimizer.pt", weights_only=True))
            if self.average is not None:
                self.average.load(from_pretrained(folder / "average")[0])

    @property
    def loss_config(self) -> AutoencoderLossConfig | FlowLossConfig:
        """The stage's objective."""
        return self.config.autoencoder_loss if self.job.stage == "autoencoder" else self.config.flow_loss

    def take_step(self, objective: Any, batch: Batch, rank: int = 0) -> StepDone:
        """One update of model and average, on a worker of Ray Train or without Ray; `step` is then one higher.

        Args:
            objective: `self.objective`, or what compiles it or wraps it for data parallelism.
            batch: Rows of this worker, on the model's device.
            rank: Which worker this is.

        Raises:
            NonFiniteLoss: After `optim.max_skipped` steps in a row without a finite gradient; `step` stays.
        """
        config, optim = self.config, self.settings.optim
        lr = learning_rate(self.step, self.settings.max_steps, optim)
        num_steps = draw_solver_steps(config.flow_loss.solver_steps, config.seed, self.step)
        counts = self.objective.counts(batch).of_all_workers()
        bf16, parts = batch.keys.device.type == "cuda", config.scaling.accumulation
        torch.manual_seed(config.seed + self.step + (rank << 32))  # GPT-2 and BART draw their dropout from there
        metrics = None
        try:
            metrics = train_step(objective, batch, self.optimizer, num_steps, lr, optim.clip_norm, bf16, counts, parts)
            self.skipped = 0
            if self.average is not None:
                self.average.update(self.model, self.step)
        except NonFiniteLoss:
            self.skipped += 1
            if self.skipped > optim.max_skipped:
                raise
        self.step += 1
        return StepDone(metrics, num_steps, lr)

    @property
    def position(self) -> Position:
        """Where this stage stands."""
        return Position(self.job.stage, self.job.fingerprint, self.step, **self.order.cursor(self.step))

    def snapshot(self) -> Callable[[Path], None]:
        """Copy what a checkpoint holds, so that training can go on; gives what writes the copy into a folder.

        With scaling.strategy=fsdp every worker must call it: the shards are put together.
        """
        weights = full_copy(self.model.state_dict())
        optimizer = full_copy(self.optimizer.state_dict())
        average = None if self.average is None else full_copy(self.average.weights)

        def write(folder: Path) -> None:
            self.save_model(folder / "model", weights)
            if average is not None:
                self.save_model(folder / "average", average)
            torch.save(optimizer, folder / "optimizer.pt")

        return write

    def result(self) -> dict[str, Tensor]:
        """The weights that the stage leaves; with scaling.strategy=fsdp every worker must call it."""
        return full_copy(self.model.state_dict() if self.average is None else self.average.weights)

    def save_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a model folder with weights as `result` gives them."""
        save_pretrained(folder, self.model, self.tokenizer, model_details(self.config), weights)

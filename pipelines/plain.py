"""A stage's training in this process, without Ray: for trials of a search, and to measure what Ray adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.batches import TrainingData, ahead
from pipelines.order import Position, stage_order
from pipelines.state import StageJob, StageState
from yan_core.baselines import Baseline
from yan_core.batching import Batch
from yan_core.config import RunConfig
from yan_core.model import YanModel
from yan_core.training import set_training_mode

OnStep = Callable[[int, dict[str, Tensor]], bool]
"""Called after each step with its number, from 1, and its metrics; False ends the training. It may put the model into
evaluation mode."""


def plain_state(
    model: YanModel | Baseline,
    config: RunConfig,
    data: TrainingData,
    stage: str,
    checkpoint: tuple[Path, Position] | None = None,
) -> StageState:
    """A stage to be trained in this process, from its first step or from a checkpoint; see `StageState`.

    With scaling.strategy=fsdp too its model is whole: there are no workers to shard it over.
    """
    whole = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, strategy="ddp"))
    job = StageJob(stage, {}, "", "", "", "")
    return StageState(whole, job, model, data.tokenizer, stage_order(data, stage, config), checkpoint)


def train_on(state: StageState, batches: Iterator[Batch], on_step: OnStep, steps: int | None = None) -> None:
    """Train a stage with the losses and updates that one worker of Ray Train has; see `StageState.take_step`.

    Args:
        state: Where it stands.
        batches: The stage's, from there on.
        on_step: See `OnStep`.
        steps: Steps of the stage after which to end; None: all.

    Raises:
        NonFiniteLoss: After `optim.max_skipped` steps in a row without a finite gradient.
    """
    settings = state.settings
    device = next(state.model.parameters()).device
    objective: Any = torch.compile(state.objective, dynamic=True) if state.config.scaling.compile else state.objective
    batches = ahead(batches)
    while state.step < (settings.max_steps if steps is None else steps):
        set_training_mode(state.model, settings.trains)
        metrics = state.take_step(objective, next(batches).to(device)).metrics
        if metrics is not None and not on_step(state.step, metrics):
            return


def train_plainly(
    model: YanModel | Baseline,
    config: RunConfig,
    data: TrainingData,
    stage: str,
    on_step: OnStep,
    steps: int | None = None,
) -> None:
    """Train a stage from its first step, with the batches that one worker of Ray Train has; see `train_on`.

    Args:
        model: Trained in place, on the device it is on.
        config: The run.
        data: The rows.
        stage: `autoencoder`, `flow` or `finetune`.
        on_step: See `OnStep`.
        steps: Most steps; None: those of the stage.
    """
    train_on(plain_state(model, config, data, stage), data.batches(config, stage), on_step, steps)


def device_of(use_gpu: bool) -> torch.device:
    """Where a training in this process runs."""
    return torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")

"""A stage's training in this process, without Ray: for trials of a search, and to measure what Ray adds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipelines.loader import StageBatches, ahead
from pipelines.prepare import Prepared
from pipelines.stream import ReadLane, StageStream, stage_order
from yan_core.baselines import Baseline
from yan_core.batching import Batch
from yan_core.config import RunConfig, StageConfig
from yan_core.loss import Objective
from yan_core.model import YanModel
from yan_core.training import (
    build_optimizer,
    draw_solver_steps,
    freeze_all_but,
    learning_rate,
    set_training_mode,
    train_step,
)


def stage_batches(config: RunConfig, prepared: Prepared, stage: str) -> Iterator[Batch]:
    """All batches of a stage, read in this process."""
    order = stage_order(prepared, stage, config)
    read = ReadLane([StageStream(stage, order, order.pools())])
    blocks = (read.read(number) for number in range(read.first[-1]))
    return StageBatches(blocks, config).stage(stage, 0)


def train_plainly(
    model: YanModel | Baseline,
    config: RunConfig,
    prepared: Prepared,
    stage: str,
    on_step: Callable[[int, dict[str, Tensor]], bool],
    steps: int | None = None,
) -> None:
    """Train a stage with the batches, losses and updates that Ray Train's workers have.

    Args:
        model: Trained in place, on the device it is on.
        config: The run.
        prepared: The data.
        stage: `autoencoder`, `flow` or `finetune`.
        on_step: Called after each step with its number, from 1, and its metrics; False ends the training. It may put
            the model into evaluation mode.
        steps: Most steps; None: those of the stage.
    """
    settings: StageConfig = getattr(config.stages, stage)
    loss = config.autoencoder_loss if stage == "autoencoder" else config.flow_loss
    device = next(model.parameters()).device
    batches = ahead(stage_batches(config, prepared, stage))
    freeze_all_but(model, settings.trains)
    objective, optimizer = Objective(model, loss), build_optimizer(model, settings.optim)
    for step in range(settings.max_steps if steps is None else steps):
        set_training_mode(model, settings.trains)
        batch = next(batches).to(device)
        lr = learning_rate(step, settings.max_steps, settings.optim)
        num_steps = draw_solver_steps(config.flow_loss.solver_steps, config.seed, step)
        bf16 = device.type == "cuda"
        metrics = train_step(objective, batch, optimizer, num_steps, lr, settings.optim.clip_norm, bf16)
        if not on_step(step + 1, metrics):
            return


def device_of(use_gpu: bool) -> torch.device:
    """Where a training in this process runs."""
    return torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")

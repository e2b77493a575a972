"""What a training computes: floating-point operations, counted by PyTorch on batches of the training itself."""

from __future__ import annotations

import itertools
from collections import Counter

from torch.utils.flop_counter import FlopCounterMode

from pipelines.batches import TrainingData
from pipelines.order import stage_order
from pipelines.state import STAGES
from yan_core.batching import Batch
from yan_core.config import RunConfig, StageConfig
from yan_core.loss import Objective
from yan_core.model import build_model
from yan_core.training import freeze_all_but, set_training_mode

ROWS = 2
"""Rows of a batch that are computed to count the operations of all of them: each row, padded alike, takes as many."""

POOLS = 8
"""Pools of batches, spread over a stage, that are read to find how large its batches are."""


def _sample(config: RunConfig, data: TrainingData, stage: str) -> list[Batch]:
    """Batches spread over a stage."""
    order, found = stage_order(data, stage, config), []
    for pool in map(order.pool, range(0, order.num_pools, -(-order.num_pools // POOLS))):
        found += itertools.islice(data.batches(config, stage, pool.first_step), len(pool.batches))
    return found


def step_flops(config: RunConfig, data: TrainingData, stage: str) -> float:
    """Mean floating-point operations of a stage's step, forward and backward.

    They are counted on a batch of about mean size, for each number of solver steps that may be drawn, as often as it
    is drawn, and taken to be in proportion to the places of a batch. PyTorch counts products of matrices, convolutions
    and attention: what is done element by element is left out, Mamba's scan among it.

    Args:
        config: The run.
        data: Its data.
        stage: A stage with max_steps > 0.
    """
    settings: StageConfig = getattr(config.stages, stage)
    loss = config.autoencoder_loss if stage == "autoencoder" else config.flow_loss
    solves = stage != "autoencoder" and config.baseline is None
    choices = Counter(config.flow_loss.solver_steps if solves else (1,))
    model = build_model(config.architecture, data.tokenizer.vocab_size, config.seed)
    freeze_all_but(model, settings.trains)
    set_training_mode(model, settings.trains)
    objective = Objective(model, loss)
    batches = _sample(config, data, stage)
    mean = sum(batch.num_tokens for batch in batches) / len(batches)
    typical = min(batches, key=lambda batch: abs(batch.num_tokens - mean))
    part = Batch(**{name: value[:ROWS] for name, value in vars(typical).items()})
    flops = 0.0
    for num_steps, times in choices.items():
        with FlopCounterMode(display=False) as counter:
            total, _ = objective(part, num_steps)
            total.backward()
        flops += counter.get_total_flops() * times / choices.total()
    return flops * mean / part.num_tokens


def training_flops(config: RunConfig, data: TrainingData) -> dict[str, float]:
    """Floating-point operations of each stage that is trained."""
    steps = {stage: getattr(config.stages, stage).max_steps for stage in STAGES}
    return {stage: n * step_flops(config, data, stage) for stage, n in steps.items() if n}

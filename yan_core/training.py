"""One optimizer step and its schedule, without Ray."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from yan_core.baselines import Baseline
from yan_core.batching import Batch
from yan_core.config import OptimConfig, Part
from yan_core.counts import Counts
from yan_core.mamba import MambaScan
from yan_core.model import YanModel
from yan_core.noise import Stream, fold, uniform
from yan_core.sharding import is_shard, shard_like


class TrainingFailed(RuntimeError):
    """A stage of training gave up; the message says why."""


class NonFiniteLoss(TrainingFailed):
    """The loss or its gradient is infinite or not a number; the weights were left as they were."""


def parts_of(model: YanModel | Baseline) -> dict[Part, list[nn.Module]]:
    """The modules that each trainable part of the model consists of; all of a baseline is its `flow`."""
    if isinstance(model, Baseline):
        return {"target_encoder": [], "decoder": [], "source_encoder": [], "flow": [model]}
    source: list[nn.Module] = [model.source_encoder] if model.source_encoder is not None else []
    flow: list[nn.Module] = [model.flow] if model.length_head is None else [model.flow, model.length_head]
    return {
        "target_encoder": [model.target_encoder],
        "decoder": [model.decoder],
        "source_encoder": source,
        "flow": flow,
    }


def freeze_all_but(model: YanModel | Baseline, trains: tuple[Part, ...]) -> None:
    """Let only the named parts of the model learn."""
    model.requires_grad_(False)
    for part in trains:
        for module in parts_of(model)[part]:
            module.requires_grad_(True)


def set_training_mode(model: YanModel | Baseline, trains: tuple[Part, ...]) -> None:
    """Dropout on in the parts that learn and off in the frozen ones, whose latents must not move."""
    model.eval()
    for part in trains:
        for module in parts_of(model)[part]:
            module.train()


def build_optimizer(model: YanModel | Baseline, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what learns; weight decay on matrices only, never on embeddings, norms, biases and Mamba's rates."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rates = {id(m.A_log) for m in model.modules() if isinstance(m, MambaScan)}
    experts = model.flow.experts if isinstance(model, YanModel) else None
    expert_biases = {id(experts.b_in_KF), id(experts.b_out_KD)} if experts is not None else set()
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in tables | rates | expert_biases
            (decayed if matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # One fused kernel instead of a dozen small operations a parameter: they were 6 % of a small model's step on a CPU.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(0.9, config.beta2), fused=True)


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    shape = 1 - progress if config.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (0.02 + 0.98 * shape)


def draw_solver_steps(choices: tuple[int, ...], seed: int, step: int) -> int:
    """Solver steps of one training step: the same on every worker."""
    key = fold(torch.tensor([seed]), step)
    return choices[int(float(uniform(key, Stream.SOLVER_STEPS, ())) * len(choices))]


class WeightAverage:
    """Exponential moving average of a model's weights.

    Source: Polyak and Juditsky 1992; the growing decay is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: YanModel | Baseline, decay: float) -> None:
        """Begin with the model's weights of now; `decay` in [0, 1)."""
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: YanModel | Baseline, step: int) -> None:
        """Move towards the model's weights, after optimizer step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = model.state_dict()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.weights[name].lerp_(now[name], 1 - decay)

    @torch.no_grad()
    def load(self, model: YanModel | Baseline) -> None:
        """Go on from averages saved earlier, given as the weights of a whole model."""
        for name, value in model.state_dict().items():
            self.weights[name].copy_(shard_like(value, self.weights[name]))


class _Loss(Protocol):
    def __call__(self, batch: Batch, num_steps: int, counts: Counts | None) -> tuple[Tensor, dict[str, Tensor]]: ...


def train_step(
    objective: _Loss,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    lr: float,
    clip_norm: float,
    bf16: bool = False,
    counts: Counts | None = None,
    parts: int = 1,
) -> dict[str, Tensor]:
    """One update, after one forward and backward pass over each part of a batch.

    Args:
        objective: Gives the total loss and its parts; an `Objective`, or one wrapped for data parallelism.
        batch: Rows of this worker, [batch, length], on the objective's device.
        optimizer: Over the parameters that learn.
        num_steps: Solver steps of this batch.
        lr: Learning rate of this step.
        clip_norm: Largest gradient norm.
        bf16: Whether to run the forward pass in bfloat16 autocast.
        counts: What the loss is divided by, from `Objective.counts`; needed where it is not what one pass holds.
        parts: Passes that the batch is cut into, which saves memory; their gradients are summed up.

    Returns:
        `loss`, its parts and `grad_norm`, detached scalars on the device.

    Raises:
        NonFiniteLoss: Before the update, if the gradient is not finite; names the parts of the loss.
    """
    device = batch.keys.device.type
    pieces = batch.split(parts) if parts > 1 else [batch]
    share = counts and counts.divided(len(pieces))
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    for i, piece in enumerate(pieces):
        last = i == len(pieces) - 1
        with nullcontext() if last or not isinstance(objective, DistributedDataParallel) else objective.no_sync():
            with torch.autocast(device, dtype=torch.bfloat16) if bf16 else nullcontext():
                loss, terms = objective(piece, num_steps, share)
            (loss / len(pieces)).backward()
        for name, value in {"loss": loss.detach(), **terms}.items():
            sums[name] = sums.get(name, 0) + value / len(pieces)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    if is_shard(grad_norm):
        grad_norm = cast(Any, grad_norm).full_tensor()
    if not bool(torch.isfinite(grad_norm)):
        shown = ", ".join(f"{k}={float(v):.4g}" for k, v in sums.items())
        raise NonFiniteLoss(
            f"the gradient is not finite ({shown}); the weights stay as they were. "
            "Lower optim.lr or optim.clip_norm, or look at the last batch."
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return {**sums, "grad_norm": grad_norm}

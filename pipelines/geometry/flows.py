"""Trainings of the product's own flow network on points: one token, two latent numbers, no source."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.geometry.points import DATA_SETS, draw_points, sliced_wasserstein
from yan_core.batching import Batch
from yan_core.config import (
    FlowLossConfig,
    ModelConfig,
    OptimConfig,
    unknown_name,
)
from yan_core.counts import Counts
from yan_core.loss import match_flow, weigh
from yan_core.model import FlowNetwork, Source, YanModel, build_model
from yan_core.moe import gate_log_probs
from yan_core.noise import Stream, fold, normal, uniform
from yan_core.solver import FrozenExpertField, evaluation_times, solve, time_grid
from yan_core.training import (
    TrainingFailed,
    build_optimizer,
    draw_solver_steps,
    freeze_all_but,
    learning_rate,
    train_step,
)

PAPER = {"likelihood": "marginal", "expert_draw": "prior", "weight_gate": 0.0}
TRAININGS: dict[str, dict[str, Any]] = {"ours": {}, "paper": PAPER, "plain": {**PAPER, "weight_end": 0.0}}
"""What each training changes in `FlowLossConfig`. `plain` is flow matching without a loss through the solver, with one
expert always: the usual single field."""

SOLVER_STEPS = (1, 2, 3, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a demo does; its defaults are those of the command."""

    data_sets: tuple[str, ...] = tuple(DATA_SETS)
    trainings: tuple[str, ...] = tuple(TRAININGS)
    experts: tuple[int, ...] = (1, 2, 4, 8)
    updates: int = 400
    seed: int = 0
    batch_size: int = 256
    train_points: int = 20_000
    held_out_points: int = 2_000
    model: ModelConfig = field(
        default_factory=lambda: ModelConfig(latent_dim=2, d_model=32, flow_blocks=1, num_heads=1, max_positions=1)
    )
    loss: FlowLossConfig = field(default_factory=lambda: FlowLossConfig(sigma=0.3))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-3, warmup_steps=50, decay="linear"))

    def __post_init__(self) -> None:
        for option, known in (("data_sets", list(DATA_SETS)), ("trainings", list(TRAININGS))):
            for name in getattr(self, option):
                if name not in known:
                    raise ValueError(unknown_name(f"--{option.replace('_', '-')}", name, known))
        for option, least in (("experts", 1), ("updates", 1), ("seed", 0)):
            value = getattr(self, option)
            for number in value if isinstance(value, tuple) else (value,):
                if number < least:
                    raise ValueError(f"--{'steps' if option == 'updates' else option} must be >= {least}, got {number}")

    @property
    def jobs(self) -> list[Job]:
        """Every training, in the order of the table."""
        return [
            Job(data_set, training, num_experts)
            for data_set in dict.fromkeys(self.data_sets)
            for training in dict.fromkeys(self.trainings)
            for num_experts in ([1] if training == "plain" else dict.fromkeys(self.experts))
        ]


@dataclass(frozen=True, order=True)
class Job:
    """One training."""

    data_set: str
    training: str
    num_experts: int


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        job: Which one.
        distances: Sliced Wasserstein distance to the held-out points by solver steps.
        seconds: Wall-clock time of training and measuring.
        weights: Of the flow network; arrays, which travel between processes by value.
    """

    job: Job
    distances: dict[int, float]
    seconds: float
    weights: dict[str, np.ndarray[Any, Any]]


def fresh_model(settings: Settings, num_experts: int) -> YanModel:
    """The product's model, of which only the flow is used."""
    return build_model(dataclasses.replace(settings.model, num_experts=num_experts), vocab_size=8, seed=settings.seed)


def no_source(flow: FlowNetwork, num: int) -> Source:
    """A source without a word, for `num` rows."""
    return flow.source(torch.zeros(num, 1, flow.config.d_model), torch.zeros(num, 1, dtype=torch.bool))


@dataclass(frozen=True)
class PointLoss:
    """`yan_core.loss.flow_loss` with a table of points [num, 2] for a target encoder, and no decoder."""

    flow: FlowNetwork
    points: Tensor
    config: FlowLossConfig

    def __call__(self, batch: Batch, num_steps: int, counts: Counts | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts; the batch's target ids [batch, 1] are rows of the table."""
        x_1 = self.points[batch.target_ids]  # [batch, 1, 2]
        x_0 = self.flow.config.init_noise * normal(batch.keys, Stream.SOURCE_NOISE, tuple(x_1.shape[1:]))
        t = uniform(batch.keys, Stream.TIME, ())
        source, mask = no_source(self.flow, len(x_1)), batch.target_mask
        weight = mask.to(x_1.dtype)
        keys, config = batch.keys, self.config
        matching = match_flow(self.flow, x_0, x_1, t, source, mask, weight, keys, config, num_steps, counts)
        output = weigh(matching.terms, config)
        return output.total, output.parts


def train_flow(job: Job, settings: Settings) -> FlowNetwork:
    """Train a flow from fresh weights; jobs of one data set see the same points, noise and times."""
    model = fresh_model(settings, job.num_experts)
    freeze_all_but(model, ("flow",))
    optimizer = build_optimizer(model, settings.optim)
    config = dataclasses.replace(settings.loss, **TRAININGS[job.training])
    points = draw_points(job.data_set, settings.train_points, seed=16 * settings.seed)
    objective = PointLoss(model.flow, points, config)
    order = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, 1)
    empty, real = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    for step in range(settings.updates):
        rows = torch.randint(len(points), shape, generator=order)
        keys = fold(torch.arange(step * len(rows), (step + 1) * len(rows)), settings.seed)
        batch = Batch(keys=keys, source_ids=rows, source_mask=empty, target_ids=rows, target_mask=real)
        num_steps = draw_solver_steps(config.solver_steps, settings.seed, step)
        lr = learning_rate(step, settings.updates, settings.optim)
        train_step(objective, batch, optimizer, num_steps, lr, settings.optim.clip_norm)
    return model.flow.eval()


@torch.no_grad()
def generate(flow: FlowNetwork, num: int, num_steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points drawn as in serving: noise, one expert a point from the gate at t = 0, Euler steps.

    Returns:
        The points after each step, noise first, [num_steps + 1, num, 2], and each one's expert, [num].
    """
    keys = fold(torch.arange(num), seed)
    times = time_grid(num_steps)
    uniforms = uniform(keys, Stream.EXPERT, (1,))
    field = FrozenExpertField(flow, no_source(flow, num), evaluation_times(times), None, uniforms=uniforms)
    passed: list[Tensor] = []

    def velocity(x: Tensor, i: int) -> Tensor:
        passed.append(x)
        return field(x, i)

    end = solve(velocity, flow.config.init_noise * normal(keys, Stream.SOURCE_NOISE, (1, 2)), times)
    assert field.expert is not None
    return torch.stack([*passed, end])[:, :, 0], field.expert[:, 0]


@torch.no_grad()
def gate_at(flow: FlowNetwork, x_0: Tensor) -> Tensor:
    """Probability of each expert at noise x_0 [num, 2]: [num, num_experts]."""
    source, start = no_source(flow, len(x_0)), flow.at(torch.zeros(len(x_0)))
    mask = torch.ones(len(x_0), 1, dtype=torch.bool)
    features = flow.trunk(x_0[:, None], start, source, mask)
    return gate_log_probs(flow.gate(features, source.mean, start.embedding), mask, 1)[:, 0].exp()


def held_out(data_set: str, settings: Settings, sample: int = 1) -> Tensor:
    """Points that no training sees, [held_out_points, 2]: sample 1, or one of samples 2 to 9 for the floor."""
    return draw_points(data_set, settings.held_out_points, seed=16 * settings.seed + sample)


def train_and_measure(job: Job, settings: Settings) -> Trained:
    """Train on one thread, then measure at every number of solver steps."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    flow, real = train_flow(job, settings), held_out(job.data_set, settings)
    ends = {n: generate(flow, len(real), n, settings.seed + 1)[0][-1] for n in SOLVER_STEPS}
    distances = {n: sliced_wasserstein(end, real) for n, end in ends.items()}
    weights = {name: value.numpy() for name, value in flow.state_dict().items()}
    return Trained(job, distances, time.perf_counter() - started, weights)


def train_all(settings: Settings, processes: int) -> Iterator[Trained]:
    """Every training, in the order they finish, spread over processes of one thread each.

    Raises:
        TrainingFailed: If one of the processes dies. Whatever ends this early, the others are stopped.
    """
    jobs = sorted(settings.jobs, key=lambda job: -job.num_experts)  # the long ones first
    if processes == 1:
        yield from (train_and_measure(job, settings) for job in jobs)
        return
    # Spawned, not forked: a forked copy of a process whose PyTorch has started threads may hang.
    pool = ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn"))
    try:
        for done in as_completed([pool.submit(train_and_measure, job, settings) for job in jobs]):
            yield done.result()
    except BrokenProcessPool as error:
        raise TrainingFailed("a training process was killed from outside; --processes 1 needs no other") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()

"""`yan demo geometry`: what experts are for, shown on points in the plane.

The product's own flow network, loss and solver on sequences of one token whose latents are two numbers and whose source
is empty: what it learns can be seen. Two trainings (the paper's and ours) with several numbers of experts, measured at
several numbers of solver steps by the sliced Wasserstein distance to points held out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.cli import UsageError
from yan_core.batching import Batch
from yan_core.config import (
    FlowLossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    to_dict,
    unknown_name,
)
from yan_core.files import code_commit, write_file
from yan_core.loss import Counts, match_flow, weigh
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

# --- points in the plane ----------------------------------------------------------------------------------------------


def ring(num: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians of standard deviation 0.1 on a circle of radius 2, [num, 2]."""
    angle = torch.randint(8, (num,), generator=generator) * (math.pi / 4)
    return 2 * _unit(angle) + 0.1 * torch.randn(num, 2, generator=generator)


def spiral(num: int, generator: torch.Generator) -> Tensor:
    """Two turns, the radius growing from 0.4 to 2.4, under noise of standard deviation 0.05, [num, 2]."""
    share = torch.rand(num, generator=generator).sqrt()  # about evenly along the line, whose turns get longer
    return (0.4 + 2 * share)[:, None] * _unit(4 * math.pi * share) + 0.05 * torch.randn(num, 2, generator=generator)


def grid(num: int, generator: torch.Generator) -> Tensor:
    """Sixteen Gaussians of standard deviation 0.1 on a square grid of spacing 1.2, [num, 2]."""
    cell = torch.randint(4, (num, 2), generator=generator)
    return 1.2 * (cell - 1.5) + 0.1 * torch.randn(num, 2, generator=generator)


def anisotropic(num: int, generator: torch.Generator) -> Tensor:
    """Six Gaussians at distance 1.6 from the middle, 0.5 long and 0.05 wide, each turned its own way, [num, 2]."""
    part = torch.randint(6, (num,), generator=generator)
    along, across = _unit(part * (math.pi / 6)), _unit(part * (math.pi / 6) + math.pi / 2)
    size = torch.randn(num, 2, generator=generator)
    return 1.6 * _unit(part * (math.pi / 3)) + 0.5 * size[:, :1] * along + 0.05 * size[:, 1:] * across


def _unit(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


DATA_SETS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "ring": ring,
    "spiral": spiral,
    "grid": grid,
    "anisotropic": anisotropic,
}
"""Sets of points by name."""


def draw_points(data_set: str, num: int, seed: int) -> Tensor:
    """Points of a data set, [num, 2]; the same for the same seed."""
    return DATA_SETS[data_set](num, torch.Generator().manual_seed(seed))


NUM_DIRECTIONS = 128


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Sliced Wasserstein-1 distance of two samples of the plane, over 128 directions spread evenly.

    Args:
        x: [num, 2].
        y: Same shape.

    Raises:
        ValueError: If the shapes differ.

    Source: Bonneel et al. 2015, Sliced and Radon Wasserstein Barycenters of Measures, sec. 2.
    """
    if x.shape != y.shape:
        raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} must have the same shape")
    directions = _unit((torch.arange(NUM_DIRECTIONS) + 0.5) * (math.pi / NUM_DIRECTIONS))
    difference = (x @ directions.T).sort(dim=0).values - (y @ directions.T).sort(dim=0).values
    return float(difference.abs().mean())


# --- training ---------------------------------------------------------------------------------------------------------

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


# --- results ----------------------------------------------------------------------------------------------------------

Distances = dict[Job, dict[int, float]]
"""Sliced Wasserstein distance by training and solver steps; the data set `mean` is the mean over all."""


def with_mean(trained: Iterable[Trained], settings: Settings) -> Distances:
    """All distances in the order of the table, with the mean over the data sets where there are several."""
    measured = {done.job: done.distances for done in trained}
    found: Distances = {job: measured[job] for job in settings.jobs}
    names = list(dict.fromkeys(settings.data_sets))
    if len(names) > 1:
        for job in settings.jobs:
            rows = [measured[dataclasses.replace(job, data_set=name)] for name in names]
            mean = {n: sum(row[n] for row in rows) / len(rows) for n in SOLVER_STEPS}
            found[dataclasses.replace(job, data_set="mean")] = mean
    return found


def floors(settings: Settings) -> dict[str, float]:
    """Mean distance of eight fresh samples of each data set to the held-out one: that of a perfect model."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(settings.data_sets):
        real = held_out(name, settings)
        fresh = [sliced_wasserstein(held_out(name, settings, sample), real) for sample in range(2, 10)]
        found[name] = sum(fresh) / len(fresh)
    return found if len(found) == 1 else {**found, "mean": sum(found.values()) / len(found)}


def table(distances: Distances, floor: dict[str, float]) -> list[str]:
    """The distances as lines of text."""
    lines = [
        f"{'data set':<12} {'training':<9} {'K':>2}  " + "".join(f"{n:>7}" for n in SOLVER_STEPS) + "  solver steps"
    ]
    last = None
    for job, row in distances.items():
        if job.data_set != last:
            lines.append(f"{job.data_set:<12} floor {floor[job.data_set]:.3f}: fresh data")
        last = job.data_set
        values = "".join(f"{row[n]:>7.3f}" for n in SOLVER_STEPS)
        lines.append(f"{job.data_set:<12} {job.training:<9} {job.num_experts:>2}  {values}")
    return lines


def shares(distances: Distances, of_plain: bool = False) -> dict[str, dict[str, dict[int, float]]]:
    """For each data set and training, the distance with most experts over the distance with fewest, by solver steps.

    Args:
        distances: From `with_mean`.
        of_plain: Compare with `plain` instead, which is the stronger single expert where steps are many.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for data_set, training in dict.fromkeys((job.data_set, job.training) for job in distances):
        counts = [job.num_experts for job in distances if (job.data_set, job.training) == (data_set, training)]
        few, many = Job(data_set, training, min(counts)), Job(data_set, training, max(counts))
        base = Job(data_set, "plain", 1) if of_plain else few
        if base in distances and few != many:
            row = {n: distances[many][n] / distances[base][n] for n in SOLVER_STEPS}
            found.setdefault(data_set, {})[training] = row
    return found


def nested(distances: Distances) -> dict[str, Any]:
    """Distances for JSON: data set, training, K<number>, solver steps."""
    found: dict[str, Any] = {}
    for job, row in distances.items():
        found.setdefault(job.data_set, {}).setdefault(job.training, {})[f"K{job.num_experts}"] = row
    return found


# --- pictures ---------------------------------------------------------------------------------------------------------

PICTURED_STEPS = (1, 3)
REACH = 3.6
"""Half the width of what is shown of the plane."""


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def picture_of_points(data_set: str, flows: dict[Job, FlowNetwork], settings: Settings) -> Any:
    """A row for each flow: its points at 1 and 3 steps against the data, its paths, its experts' regions."""
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection

    figure, axes = _figure(len(flows), 4, 2.9, 3.0)
    real = held_out(data_set, settings)
    for row, (job, flow) in zip(axes, flows.items(), strict=True):
        ten = job.num_experts <= 10
        colours = colormaps["tab10" if ten else "turbo"](np.linspace(0, 1, 10 if ten else job.num_experts))[:, :3]
        for place, num_steps in zip(row, PICTURED_STEPS, strict=False):
            ends = generate(flow, len(real), num_steps, settings.seed + 1)[0][-1]
            place.scatter(*real.T, s=3, color="0.75", linewidths=0, label="data")
            place.scatter(*ends.T, s=3, color="tab:red", linewidths=0, alpha=0.6, label="generated")
            place.set_title(f"{num_steps} step{'s' * (num_steps > 1)}: {sliced_wasserstein(ends, real):.3f}")
        row[0].set_ylabel(f"{job.training}, K = {job.num_experts}", fontsize="large")

        path, expert = generate(flow, 400, PICTURED_STEPS[-1], settings.seed + 2)
        row[2].add_collection(LineCollection(list(path.transpose(0, 1).numpy()), colors=colours[expert], lw=0.5))
        row[2].scatter(*path[-1].T, s=4, c=colours[expert], linewidths=0, zorder=2)
        row[2].set_title(f"paths, {PICTURED_STEPS[-1]} steps, by expert")

        line = torch.linspace(-REACH, REACH, 160)
        gate = gate_at(flow, torch.cartesian_prod(line, line)).unflatten(0, (160, 160)).transpose(0, 1)
        likeliest = gate.max(-1)
        # The less sure the gate, the paler: an expert that leads by a hair owns no region.
        sure = likeliest.values[..., None].sqrt().numpy()
        row[3].imshow(1 - sure * (1 - colours[likeliest.indices]), origin="lower", extent=[-REACH, REACH] * 2)
        for radius in (1, 2):
            row[3].plot(*(radius * _unit(torch.linspace(0, 2 * math.pi, 100))).T, color="black", lw=0.5)
        mean = float(gate_at(flow, path[0]).max(-1).values.mean())
        row[3].set_title(f"likeliest expert of x_0, mean p = {mean:.2f}")
        for place in row:
            place.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal", xticks=[], yticks=[])
    axes[0][0].legend(loc="upper left", fontsize="small", markerscale=3)
    figure.suptitle(
        f"{data_set}: sliced Wasserstein distance to held-out points in the titles\n"
        "right: paler where the gate is less sure; circles: 1 and 2 sigma of the noise"
    )
    return figure


def picture_of_distances(distances: Distances, floor: dict[str, float]) -> Any:
    """Distance against solver steps: a column for each data set, a row for each training with a choice of K."""
    from matplotlib.ticker import NullFormatter

    names = list(dict.fromkeys(job.data_set for job in distances))
    trainings = [t for t in dict.fromkeys(job.training for job in distances) if t != "plain"] or ["plain"]
    figure, axes = _figure(len(trainings), len(names), 2.7, 2.7)
    top, bottom = max(max(r.values()) for r in distances.values()), min(floor.values())
    for training, row in zip(trainings, axes, strict=True):
        for name, place in zip(names, row, strict=True):
            shown = {job: d for job, d in distances.items() if job.data_set == name}
            for job, by_steps in shown.items():
                if job.training == training:
                    place.plot(
                        list(by_steps), list(by_steps.values()), marker="o", ms=3, label=f"K = {job.num_experts}"
                    )
                elif job.training == "plain":
                    place.plot(list(by_steps), list(by_steps.values()), color="0.6", marker=".", ms=3, label="plain")
            place.axhline(floor[name], color="black", lw=0.8, ls="--", label="floor")
            place.set(yscale="log", ylim=(bottom * 0.8, top * 1.2), xticks=SOLVER_STEPS, title=f"{name}, {training}")
            place.yaxis.set_minor_formatter(NullFormatter())
            place.grid(alpha=0.3, which="both")
    for row in axes:
        row[0].set_ylabel("sliced Wasserstein distance")
    for place in axes[-1]:
        place.set_xlabel("solver steps")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside right upper")
    return figure


# --- the command ------------------------------------------------------------------------------------------------------


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Options of `yan demo geometry`."""
    own = Settings()
    parser = argparse.ArgumentParser(
        prog="yan demo geometry",
        description="Mixture-of-experts flow matching on points in the plane: trainings, experts and solver steps.",
    )
    for option, default, known in (("data-sets", own.data_sets, DATA_SETS), ("trainings", own.trainings, TRAININGS)):
        text = f"default: all of {', '.join(known)}"
        parser.add_argument(f"--{option}", nargs="+", metavar="NAME", default=default, help=text)
    counts = f"numbers of experts; default: {' '.join(map(str, own.experts))}"
    parser.add_argument("--experts", nargs="+", type=int, metavar="K", default=own.experts, help=counts)
    parser.add_argument("--steps", type=int, default=own.updates, help="optimizer steps of each training")
    parser.add_argument("--seed", type=int, default=own.seed, help="of weights, points and noise")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--out", default="runs/geometry", help="folder for figures and pictures")
    parser.add_argument("--tracking-uri", default="", help="MLflow store; default: as `yan run` has it")
    return parser.parse_args(list(args))


def main(args: Sequence[str]) -> int:
    """Train, measure, draw; print a table and log to one MLflow run.

    Args:
        args: See `yan demo geometry --help`.

    Raises:
        UsageError: If an option names something unknown or is out of range.
    """
    chosen = parse_options(args)
    try:
        settings = Settings(
            data_sets=tuple(chosen.data_sets),
            trainings=tuple(chosen.trainings),
            experts=tuple(chosen.experts),
            updates=chosen.steps,
            seed=chosen.seed,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if chosen.processes < 1:
        raise UsageError(f"--processes must be >= 1, got {chosen.processes}")
    run_demo(settings, Path(chosen.out), chosen.tracking_uri, chosen.processes)
    return 0


def run_demo(settings: Settings, out: Path, tracking_uri: str = "", processes: int = 1) -> dict[str, Any]:
    """Do the whole demo; returns what results.json holds."""
    from pipelines.tracking import Tracker, check_tracking

    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    config = RunConfig(
        name="geometry", runs_dir=str(out.parent), seed=settings.seed, tracking=TrackingConfig(uri=tracking_uri)
    )
    check_tracking(config)
    tracker = Tracker.start(config, None)
    try:
        tracker.tag("commit", code_commit())
        tracker.params({name: value for name, value in to_dict(settings).items() if not isinstance(value, dict)})
        results = _measure_and_draw(settings, out, tracker, processes, started)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.finish("FINISHED")
    print(f"{time.perf_counter() - started:.0f} s in all; figures and pictures: {out}  MLflow run: {tracker.run_id}")
    return results


def _measure_and_draw(settings: Settings, out: Path, tracker: Any, processes: int, started: float) -> dict[str, Any]:
    """Everything between the start of the MLflow run and its end."""
    trained: list[Trained] = []
    total = len(settings.jobs)
    print(
        f"{total} trainings of {settings.updates} steps, {processes} at a time; distance at {SOLVER_STEPS} solver steps"
    )
    for done in train_all(settings, processes):
        trained.append(done)
        job = done.job
        for num_steps, value in done.distances.items():
            tracker.metrics({_metric(job): value}, step=num_steps)
        values = "".join(f"{v:>7.3f}" for v in done.distances.values())
        name = f"{job.data_set:<12} {job.training:<6} K = {job.num_experts:<2}"
        print(f"[{len(trained):>2}/{total}] {name} {done.seconds:>4.0f} s {values}", flush=True)

    distances, floor = with_mean(trained, settings), floors(settings)
    for job, row in distances.items():
        if job.data_set == "mean":
            for num_steps, value in row.items():
                tracker.metrics({_metric(job): value}, step=num_steps)
    tracker.metrics({f"geometry/{name}/floor": value for name, value in floor.items()}, step=0)
    own, of_plain = shares(distances), shares(distances, of_plain=True)
    few, many = min(settings.experts), max(settings.experts)
    lines = [
        *table(distances, floor),
        *_share_lines(f"distance with K = {many} over the same training's with K = {few}", own),
        *_share_lines(f"distance with K = {many} over plain's: one expert, no loss through the solver", of_plain),
    ]
    print("\n".join(["", *lines, ""]), flush=True)

    results = {
        "config": to_dict(settings),
        "sliced_wasserstein": nested(distances),
        "floor": floor,
        "share_of_fewest_experts": own,
        "share_of_plain": of_plain,
        "training_seconds": {_metric(done.job).split("/", 1)[1].rsplit("/", 1)[0]: done.seconds for done in trained},
        "seconds": time.perf_counter() - started,
        "processes": processes,
        "commit": code_commit(),
    }
    write_file(out / "table.txt", "\n".join(lines) + "\n")
    write_file(out / "results.json", json.dumps(results, indent=2))
    files = [out / "table.txt", out / "results.json"]
    weights = {done.job: done.weights for done in trained}
    for data_set in dict.fromkeys(settings.data_sets):
        flows = {job: _flow_of(job, weights[job], settings) for job in _pictured(data_set, settings)}
        files.append(out / f"{data_set}.png")
        picture_of_points(data_set, flows, settings).savefig(files[-1], dpi=110)
    files.append(out / "distances.png")
    picture_of_distances(distances, floor).savefig(files[-1], dpi=110)
    for file in files:
        tracker.file(file)
    return results


def _metric(job: Job) -> str:
    return f"geometry/{job.data_set}/{job.training}/K{job.num_experts}/sliced_wasserstein"


def _share_lines(title: str, found: dict[str, dict[str, dict[int, float]]]) -> list[str]:
    rows = [(name, training, row) for name, by_training in found.items() for training, row in by_training.items()]
    lines = [
        f"{name:<12} {training:<9}     " + "".join(f"{row[n]:>7.2f}" for n in SOLVER_STEPS)
        for name, training, row in rows
    ]
    return ["", title, *lines] if rows else []


def _pictured(data_set: str, settings: Settings) -> list[Job]:
    """The first training with fewest experts, then every training with most."""
    jobs = [job for job in settings.jobs if job.data_set == data_set]
    mixed = [job for job in jobs if job.training != "plain"] or jobs
    few, many = min(job.num_experts for job in mixed), max(job.num_experts for job in mixed)
    first = next(job for job in mixed if job.num_experts == few)
    return list(dict.fromkeys([first, *(job for job in mixed if job.num_experts == many)]))


def _flow_of(job: Job, weights: dict[str, np.ndarray[Any, Any]], settings: Settings) -> FlowNetwork:
    flow = fresh_model(settings, job.num_experts).flow
    flow.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return flow.eval()

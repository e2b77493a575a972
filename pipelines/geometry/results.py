"""Distances of all trainings: table, means, shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from pipelines.geometry.flows import SOLVER_STEPS, Job, Settings, Trained, held_out
from pipelines.geometry.points import sliced_wasserstein

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

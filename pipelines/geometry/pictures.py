"""Pictures of the points, of the experts' regions and of the distances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pipelines.geometry.flows import SOLVER_STEPS, Job, Settings, gate_at, generate, held_out
from pipelines.geometry.points import on_circle, sliced_wasserstein
from pipelines.geometry.results import Distances
from yan_core.model import FlowNetwork

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
            row[3].plot(*(radius * on_circle(torch.linspace(0, 2 * math.pi, 100))).T, color="black", lw=0.5)
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

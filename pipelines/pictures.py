"""Pictures of a trained model for MLflow: which expert writes where, and how noise travels to the latents of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from yan_core.batching import pad_rows
from yan_core.checkpoint import from_pretrained
from yan_core.model import YanModel
from yan_core.moe import scope_length
from yan_core.noise import Stream, fold, normal, uniform
from yan_core.path import straight_path
from yan_core.solver import FrozenExpertField, evaluation_times, solve, time_grid
from yan_core.tasks import get_task
from yan_core.tokenization import Tokenizer


@dataclass(frozen=True)
class Journey:
    """What the sampler did with some rows.

    Attributes:
        points: x at each time of the grid, [num_steps + 1, batch, length, latent_dim].
        x_1: Latents of the right answers, [batch, length, latent_dim].
        expert: Expert of each token, [batch, length].
        real: True up to the first end-of-text token of the right answer, [batch, length].
        num_experts: How many there are.
    """

    points: Tensor
    x_1: Tensor
    expert: Tensor
    real: Tensor
    num_experts: int


@torch.no_grad()
def follow(folder: Path, rows: Sequence[dict[str, Any]], num_steps: int = 8) -> Journey:
    """Sample answers to rows and keep every point on the way.

    Args:
        folder: Model folder.
        rows: `source` and `target` texts.
        num_steps: Euler steps.

    Raises:
        ValueError: If the model is a baseline.
    """
    model, tokenizer, details = from_pretrained(folder)
    if not isinstance(model, YanModel):
        raise ValueError(f"{folder} is a baseline, which has no way from noise to text")
    length = details["max_target_tokens"]
    keep = get_task(details["task"]).keep
    sources = tokenizer.encode_batch([r["source"] for r in rows], details["max_source_tokens"], keep)
    targets = [e.ids[:length] for e in tokenizer.encode_batch([r["target"] for r in rows])]
    source = model.encode_source(*pad_rows([s.ids for s in sources], Tokenizer.pad_id))
    target, _ = pad_rows(targets, Tokenizer.eos_id, length)
    real = torch.arange(length) <= torch.tensor([[len(t)] for t in targets])
    x_1 = model.encode_target(target, torch.ones_like(real))

    keys, grid = fold(torch.arange(len(rows)), 0), time_grid(num_steps)  # as `sample` makes them of seeds
    x = model.config.init_noise * normal(keys, Stream.SOURCE_NOISE, (length, model.config.latent_width))
    scopes = -(-length // scope_length(model.config, length))
    uniforms = uniform(keys, Stream.EXPERT, (scopes,))
    field = FrozenExpertField(model.flow, source, evaluation_times(grid), None, uniforms=uniforms)
    points = [x]
    solve(field, x, grid, on_step=lambda _, reached: points.append(reached))
    assert field.expert is not None
    return Journey(torch.stack(points), x_1, field.expert, real, model.config.num_experts)


def usage_by_position(journey: Journey) -> np.ndarray:
    """Share of tokens that each expert writes at each place, [num_experts, length]."""
    chosen = torch.nn.functional.one_hot(journey.expert, journey.num_experts).float()
    return chosen.mean(0).T.numpy()


def draw_usage(journey: Journey) -> Figure:
    """Bars of `usage_by_position`, one above the other."""
    shares = usage_by_position(journey)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    bottom = np.zeros(shares.shape[1])
    for expert, share in enumerate(shares):
        axes.bar(np.arange(shares.shape[1]), share, bottom=bottom, label=f"expert {expert}")
        bottom += share
    axes.set(xlabel="token", ylabel="share of answers", title="Which expert writes where", ylim=(0, 1))
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def draw_paths(journey: Journey, most: int = 60) -> Figure:
    """Ways of some tokens from noise to where they arrive, on the two main axes of the true latents."""
    true = journey.x_1[journey.real]
    centre = true.mean(0)
    _, _, axes_of = torch.linalg.svd(true - centre, full_matrices=False)

    def flat(x: Tensor) -> np.ndarray:
        return ((x - centre) @ axes_of[:2].T).numpy()

    ways = journey.points[:, journey.real][:, :most]
    expert = journey.expert[journey.real][:most]
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.scatter(*flat(true).T, s=8, color="lightgrey", label="latents of the right answers")
    for i in range(ways.shape[1]):
        way = flat(ways[:, i])
        axes.plot(*way.T, color=f"C{int(expert[i]) % 10}", alpha=0.5, linewidth=0.8)
        axes.scatter(*way[-1], color=f"C{int(expert[i]) % 10}", s=10)
    axes.set(xlabel="first axis", ylabel="second axis", title="From noise to text (colour: expert)")
    axes.legend(fontsize="small")
    return figure


def straightness(journey: Journey) -> float:
    """Mean distance of the way's points to the straight line between its ends, over the line's length."""
    times = torch.linspace(0, 1, len(journey.points))
    start, end = journey.points[0], journey.points[-1]
    flat = [
        straight_path(start, end, t.expand(len(start))).x_t for t in times
    ]  # where the points would be on a straight way
    off = (journey.points - torch.stack(flat)).norm(dim=-1).mean(0)
    return float((off / (end - start).norm(dim=-1))[journey.real].mean())

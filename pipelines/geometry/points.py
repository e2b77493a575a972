"""Sets of points in the plane, and the distance of two samples of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def ring(num: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians of standard deviation 0.1 on a circle of radius 2, [num, 2]."""
    angle = torch.randint(8, (num,), generator=generator) * (math.pi / 4)
    return 2 * on_circle(angle) + 0.1 * torch.randn(num, 2, generator=generator)


def spiral(num: int, generator: torch.Generator) -> Tensor:
    """Two turns, the radius growing from 0.4 to 2.4, under noise of standard deviation 0.05, [num, 2]."""
    share = torch.rand(num, generator=generator).sqrt()  # about evenly along the line, whose turns get longer
    return (0.4 + 2 * share)[:, None] * on_circle(4 * math.pi * share) + 0.05 * torch.randn(num, 2, generator=generator)


def grid(num: int, generator: torch.Generator) -> Tensor:
    """Sixteen Gaussians of standard deviation 0.1 on a square grid of spacing 1.2, [num, 2]."""
    cell = torch.randint(4, (num, 2), generator=generator)
    return 1.2 * (cell - 1.5) + 0.1 * torch.randn(num, 2, generator=generator)


def anisotropic(num: int, generator: torch.Generator) -> Tensor:
    """Six Gaussians at distance 1.6 from the middle, 0.5 long and 0.05 wide, each turned its own way, [num, 2]."""
    part = torch.randint(6, (num,), generator=generator)
    along, across = on_circle(part * (math.pi / 6)), on_circle(part * (math.pi / 6) + math.pi / 2)
    size = torch.randn(num, 2, generator=generator)
    return 1.6 * on_circle(part * (math.pi / 3)) + 0.5 * size[:, :1] * along + 0.05 * size[:, 1:] * across


def on_circle(angle: Tensor) -> Tensor:
    """Points of the unit circle, [..., 2]."""
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
    directions = on_circle((torch.arange(NUM_DIRECTIONS) + 0.5) * (math.pi / NUM_DIRECTIONS))
    difference = (x @ directions.T).sort(dim=0).values - (y @ directions.T).sort(dim=0).values
    return float(difference.abs().mean())

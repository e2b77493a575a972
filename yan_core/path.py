"""The probability path from noise to data. Convention of the whole project: t = 0 is noise, t = 1 is data.

x_t = (1 - t) x_0 + t x_1 and u_t = d x_t / dt = x_1 - x_0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class PathSample:
    """A point of the path and its velocity, both [batch, length, latent_dim]."""

    x_t: Tensor
    u_t: Tensor


def straight_path(x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
    """Draw x_t on the straight path from x_0 to x_1, with its velocity u_t.

    Args:
        x_0: Source noise, [batch, length, latent_dim].
        x_1: Data latents, same shape.
        t: Times in [0, 1], [batch].

    Raises:
        ValueError: If the shapes disagree.

    Source: Lipman et al. 2023, arXiv:2210.02747, sec. 4.1 (optimal-transport path, sigma_min = 0).
    """
    if x_0.shape != x_1.shape or t.shape != x_1.shape[:1]:
        raise ValueError(f"x_0 {tuple(x_0.shape)}, x_1 {tuple(x_1.shape)} and t {tuple(t.shape)} do not fit together")
    time = t[:, None, None].to(x_1.dtype)
    return PathSample(x_t=(1 - time) * x_0 + time * x_1, u_t=x_1 - x_0)


def _rest(t: Tensor | float) -> Tensor | float:
    """1 - t, for [batch, length, latent_dim]."""
    return 1 - t[:, None, None] if isinstance(t, torch.Tensor) else 1 - t


def endpoint_of(velocity: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """Where a straight path from x_t with this velocity ends, x_t + (1 - t) velocity.

    Args:
        velocity: [batch, length, latent_dim].
        x_t: Same shape.
        t: Times, [batch] or one number.
    """
    return x_t + _rest(t) * velocity


def velocity_to(x_1: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
    """Velocity of the straight path from x_t that ends in x_1, (x_1 - x_t) / (1 - t).

    Args:
        x_1: [batch, length, latent_dim].
        x_t: Same shape.
        t: Times below 1, [batch] or one number.
    """
    return (x_1 - x_t) / _rest(t)


def _log_factor(edges: Tensor, power: float) -> Tensor:
    """Log of x**(power - 1) in each cell of a uniform grid, but for a constant: at its midpoint, or its mean if 0 is a
    pole."""
    if power < 1:
        return (edges**power).diff().log()
    return (power - 1) * (edges[:-1] + edges[1:]).log()


@lru_cache(maxsize=8)
def _beta_quantiles(alpha: float, beta: float, num_cells: int = 8192) -> tuple[Tensor, Tensor]:
    """Cumulative distribution of Beta(alpha, beta) at the edges of a uniform grid, from its density in each cell."""
    edges = torch.linspace(0, 1, num_cells + 1, dtype=torch.float64)
    log_density = _log_factor(edges, alpha) + _log_factor(edges, beta).flip(0)
    mass = (log_density - log_density.max()).exp()
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0) / mass.sum()])
    return cumulative.float(), edges.float()


def beta_times(uniforms: Tensor, alpha: float, beta: float) -> Tensor:
    """Map uniform numbers to t ~ Beta(alpha, beta) by the inverse of its distribution function.

    Args:
        uniforms: In (0, 1), any shape.
        alpha: First shape parameter, > 0.
        beta: Second shape parameter, > 0.

    Returns:
        Times in [0, 1], shaped like `uniforms`; exact for Beta(1, 1), else within one cell of 1/8192.
    """
    if alpha == beta == 1.0:
        return uniforms
    cumulative, edges = (a.to(uniforms.device) for a in _beta_quantiles(alpha, beta))
    cell = torch.searchsorted(cumulative, uniforms.contiguous(), right=True).clamp(1, len(edges) - 1)
    low, high = cumulative[cell - 1], cumulative[cell]
    share = (uniforms - low) / (high - low).clamp_min(1e-12)
    return edges[cell - 1] + share.clamp(0, 1) * (edges[cell] - edges[cell - 1])

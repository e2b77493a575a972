"""Solving the flow's ODE from noise at t = 0 to data at t = 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from yan_core.model import Source, YanModel
from yan_core.moe import draw_expert, gate_log_probs, scope_length, spread

Velocity = Callable[[Tensor, int], Tensor]
"""Velocity at a point [batch, length, d_model] and the index of its time on the grid."""


def time_grid(num_steps: int, device: torch.device | None = None) -> Tensor:
    """`num_steps` + 1 uniform times from 0 to 1. The reference's "n timesteps" are n - 1 of our steps."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    return torch.linspace(0, 1, num_steps + 1, device=device)


def euler(velocity: Velocity, x_0: Tensor, grid: Tensor) -> Tensor:
    """Solve dx/dt = velocity(x, t) by Euler's method: one evaluation a step.

    Args:
        velocity: Gives the velocity at (x, index into the grid).
        x_0: Start, [batch, length, d_model].
        grid: Increasing times, [num_steps + 1].

    Returns:
        The endpoint, shaped like x_0.
    """
    x = x_0
    for i, dt in enumerate(grid.diff().tolist()):
        x = x + dt * velocity(x, i)
    return x


class FrozenExpertField:
    """The velocity of one expert a scope, drawn from the gate at t = 0 and then kept (arXiv:2604.15009, sampling).

    The gate and the first Euler step see the same (x_0, t = 0), so one trunk pass serves both, and the number of
    function evaluations equals the number of Euler steps. Only the chosen expert's head is computed; the source's keys
    and values and the modulations of the grid's times are computed before the first step.
    """

    def __init__(self, model: YanModel, source: Source, grid: Tensor, uniforms: Tensor, mask: Tensor | None) -> None:
        """Prepare to solve.

        Args:
            model: The model.
            source: From `model.encode_source`.
            grid: Times that `velocity` will be asked at, [num_steps + 1].
            uniforms: Uniform numbers that draw the experts, one a scope, [batch, scopes].
            mask: True for real target tokens, [batch, length]; None: all are.
        """
        self.model, self.source, self.uniforms, self.mask = model, source, uniforms, mask
        batch = len(source.mean)
        self.steps = [model.flow.at(t.expand(batch)) for t in grid[:-1]]
        self.nfe = 0
        self.expert: Tensor | None = None
        """Expert of each token after the first call, int64, [batch, length]."""

    def __call__(self, x: Tensor, i: int) -> Tensor:
        """Velocity at x [batch, length, d_model] and the i-th time of the grid."""
        flow, step = self.model.flow, self.steps[i]
        features = flow.trunk(x, step, self.source, self.mask)
        self.nfe += 1
        if self.expert is None:
            batch, length = x.shape[:2]
            tokens = scope_length(self.model.config, length)
            mask = torch.ones(batch, length, dtype=torch.bool, device=x.device) if self.mask is None else self.mask
            log_probs = gate_log_probs(flow.gate(features, self.source.mean, step.embedding), mask, tokens)
            self.expert = spread(draw_expert(log_probs, self.uniforms), tokens, length)
        return flow.experts.one(features, self.expert)

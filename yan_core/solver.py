"""Solving the flow's ODE from noise at t = 0 to data at t = 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from yan_core.config import Method
from yan_core.model import FlowNetwork, Source
from yan_core.moe import draw_expert, gate_log_probs, scope_length, spread
from yan_core.path import endpoint_of

Velocity = Callable[[Tensor, int], Tensor]
"""Velocity at a point [batch, length, d_model] and the index of its time among the `evaluation_times`."""


def time_grid(num_steps: int, device: torch.device | None = None) -> Tensor:
    """`num_steps` + 1 uniform times from 0 to 1. The reference's "n timesteps" are n - 1 of our steps."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    return torch.linspace(0, 1, num_steps + 1, device=device)


def evaluation_times(grid: Tensor, method: Method = "euler") -> Tensor:
    """Times at which `solve` asks for the velocity, in order; as many as it costs function evaluations.

    Args:
        grid: Increasing times, [num_steps + 1].
        method: The solver.

    Raises:
        ValueError: If the grid does not increase or the method is unknown.
    """
    start, end = grid[:-1], grid[1:]
    if len(grid) < 2 or not bool((end > start).all()):
        raise ValueError(f"a time grid must increase, got {grid.tolist()}")
    if method == "euler":
        return start
    if method == "midpoint":
        return torch.stack([start, (start + end) / 2], dim=1).flatten()
    if method == "heun":
        return torch.stack([start, end], dim=1).flatten()
    raise ValueError(f"solver must be one of euler, midpoint, heun, got {method!r}")


def solve(velocity: Velocity, x_0: Tensor, grid: Tensor, method: Method = "euler") -> Tensor:
    """Solve dx/dt = velocity(x, t).

    Args:
        velocity: Gives the velocity at (x, index into `evaluation_times(grid, method)`).
        x_0: Start, [batch, length, d_model].
        grid: Increasing times, [num_steps + 1].
        method: `euler` (order 1), `midpoint` or `heun` (order 2).

    Returns:
        The endpoint, shaped like x_0.

    Source: Hairer, Norsett and Wanner 1993, Solving Ordinary Differential Equations I, sec. II.1.
    """
    x = x_0
    for i, dt in enumerate(grid.diff().tolist()):
        if method == "euler":
            x = x + dt * velocity(x, i)
        elif method == "midpoint":
            x = x + dt * velocity(x + dt / 2 * velocity(x, 2 * i), 2 * i + 1)
        else:
            first = velocity(x, 2 * i)
            x = x + dt / 2 * (first + velocity(x + dt * first, 2 * i + 1))
    return x


class FrozenExpertField:
    """The velocity of one expert a scope, drawn from the gate at t = 0 and then kept (arXiv:2604.15009, sampling).

    The gate and the first evaluation see the same (x_0, t = 0), so one trunk pass serves both, and the number of
    function evaluations equals the number of times asked. Only the chosen expert's head is computed; the source's keys
    and values and the modulations of all times are computed before the first step.
    """

    def __init__(
        self,
        flow: FlowNetwork,
        source: Source,
        times: Tensor,
        mask: Tensor | None,
        *,
        uniforms: Tensor | None = None,
        expert: Tensor | None = None,
        features_0: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        """Prepare to solve.

        Args:
            flow: The network.
            source: From `encode_source`.
            times: Times that will be asked at, in order, from `evaluation_times`; the first is 0.
            mask: True for real target tokens, [batch, length]; None: all are.
            uniforms: Uniform numbers that draw the experts, one a scope, [batch, scopes].
            expert: Expert of each token, [batch, length], where it is drawn already, as in training.
            features_0: Trunk features at (x_0, 0) where they are known already, as in training.
            guidance_scale: w of v_0 + w (v - v_0), v_0 being the velocity without a source; other than 1 it costs a
                second trunk pass an evaluation (Ho and Salimans 2022, arXiv:2207.12598).
        """
        self.flow, self.mask, self.uniforms, self.expert = flow, mask, uniforms, expert
        self.guidance_scale, self.features_0 = guidance_scale, features_0
        self.guided = guidance_scale != 1.0
        self.source = source.beside(source.dropped()) if self.guided else source
        self.times: list[float] = times.tolist()
        if flow.config.prediction == "endpoint" and max(self.times) >= 1:
            raise ValueError(
                "model.prediction=endpoint has no velocity at t = 1, which heun asks for: use euler or midpoint"
            )
        mean = self.source.mean
        # Filled on the device: a copy from the host could not be part of a CUDA graph.
        self.steps = [flow.at(torch.full((len(mean),), t, device=mean.device)) for t in self.times]
        self.guess: Tensor | None = None
        self.nfe = 0
        """Trunk passes so far, a row."""

    def __call__(self, x: Tensor, i: int) -> Tensor:
        """Velocity at x [batch, length, d_model] and the i-th of `times`."""
        batch, length = x.shape[:2]
        features = self.features_0 if i == 0 else None
        if features is None:
            copies = 2 if self.guided else 1
            mask = None if self.mask is None else self.mask.repeat(copies, 1)
            guess = None if self.guess is None else self.guess.repeat(copies, 1, 1)
            features = self.flow.trunk(x.repeat(copies, 1, 1), self.steps[i], self.source, mask, guess)
            self.nfe += copies
        if self.expert is None:
            assert self.uniforms is not None
            self.expert = self._draw(features[:batch], self.steps[i].embedding[:batch], self.uniforms)
        expert = torch.cat([self.expert, self.expert]) if self.guided else self.expert
        outputs = self.flow.experts.one(features, expert)
        if self.guided:
            with_source, without = outputs.chunk(2)
            outputs = without + self.guidance_scale * (with_source - without)
        velocity = self.flow.velocity(outputs, x, self.times[i])
        if self.flow.config.self_conditioning:
            self.guess = endpoint_of(velocity, x, self.times[i]).detach()
        return velocity

    def _draw(self, features: Tensor, time: Tensor, uniforms: Tensor) -> Tensor:
        """Expert of each token from the gate at t = 0, [batch, length]."""
        batch, length = features.shape[:2]
        tokens = scope_length(self.flow.config, length)
        mask = torch.ones(batch, length, dtype=torch.bool, device=features.device) if self.mask is None else self.mask
        log_probs = gate_log_probs(self.flow.gate(features, self.source.mean[:batch], time), mask, tokens)
        return spread(draw_expert(log_probs, uniforms), tokens, length)

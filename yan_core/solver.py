"""Solving the flow's ODE from noise at t = 0 to data at t = 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from yan_core.config import Method, SamplingConfig
from yan_core.model import FlowNetwork, Source
from yan_core.moe import draw_expert, gate_log_probs, scope_length, spread
from yan_core.noise import RowDraws
from yan_core.path import endpoint_of

Velocity = Callable[[Tensor, int], Tensor]
"""Velocity at a point [batch, length, latent_dim] and the index of its time among the `evaluation_times`."""


def time_grid(num_steps: int) -> list[float]:
    """`num_steps` + 1 uniform times from 0 to 1. The reference's "n timesteps" are n - 1 of our steps.

    Plain numbers, not a tensor: the host needs them to decide what to compute, and to ask a GPU for them would stop it.

    Raises:
        ValueError: If num_steps is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    return [i / num_steps for i in range(num_steps + 1)]


def evaluation_times(grid: Sequence[float], method: Method = "euler") -> list[float]:
    """Times at which `solve` asks for the velocity, in order; as many as it costs function evaluations.

    Args:
        grid: Increasing times, num_steps + 1 of them.
        method: The solver.

    Raises:
        ValueError: If the grid does not increase or the method is unknown.
    """
    steps = list(pairwise(grid))
    if not steps or any(end <= start for start, end in steps):
        raise ValueError(f"a time grid must increase, got {list(grid)}")
    if method == "euler":
        return [start for start, _ in steps]
    if method == "midpoint":
        return [t for start, end in steps for t in (start, (start + end) / 2)]
    if method == "heun":
        return [t for step in steps for t in step]
    raise ValueError(f"method must be one of euler, midpoint, heun, got {method!r}")


def trunk_passes(num_steps: int, sampling: SamplingConfig) -> int:
    """Trunk passes of an answer on the uniform grid, known before it is drawn; guidance doubles the evaluations.

    Raises:
        ValueError: If num_steps is below 1 or the method is unknown.
    """
    times = evaluation_times(time_grid(num_steps), sampling.method)
    return len(times) * (1 if sampling.guidance_scale == 1.0 else 2)


def solve(
    velocity: Velocity,
    x_0: Tensor,
    grid: Sequence[float],
    method: Method = "euler",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Solve dx/dt = velocity(x, t).

    Args:
        velocity: Gives the velocity at (x, index into `evaluation_times(grid, method)`).
        x_0: Start, [batch, length, latent_dim].
        grid: Increasing times, num_steps + 1 of them.
        method: `euler` (order 1), `midpoint` or `heun` (order 2).
        on_step: Called after each step with the number of steps done, from 1 on, and the point reached, shaped like
            x_0; what it raises ends the solving.

    Returns:
        The endpoint, shaped like x_0.

    Source: Hairer, Norsett and Wanner 1993, Solving Ordinary Differential Equations I, sec. II.1.
    """
    x = x_0
    for i, (start, end) in enumerate(pairwise(grid)):
        dt = end - start
        if method == "euler":
            x = x + dt * velocity(x, i)
        elif method == "midpoint":
            x = x + dt * velocity(x + dt / 2 * velocity(x, 2 * i), 2 * i + 1)
        else:
            first = velocity(x, 2 * i)
            x = x + dt / 2 * (first + velocity(x + dt * first, 2 * i + 1))
        if on_step is not None:
            on_step(i + 1, x)
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
        times: Sequence[float],
        mask: Tensor | None,
        *,
        uniforms: Tensor | None = None,
        expert: Tensor | None = None,
        features_0: Tensor | None = None,
        guidance_scale: float = 1.0,
        draws: RowDraws | None = None,
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
            draws: For dropout, in training; without guidance.
        """
        self.draws = draws
        self.flow, self.mask, self.uniforms, self.expert = flow, mask, uniforms, expert
        self.guidance_scale, self.features_0 = guidance_scale, features_0
        self.guided = guidance_scale != 1.0
        self.source = source.beside(source.dropped()) if self.guided else source
        self.times = list(times)
        if flow.config.prediction == "endpoint" and max(self.times) >= 1:
            raise ValueError(
                "model.prediction=endpoint has no velocity at t = 1, which heun asks for: use euler or midpoint"
            )
        # All times in one pass through the weights, a row each that holds for the whole batch. Filled on the device, as
        # a copy from the host could not be part of a CUDA graph.
        times_T = torch.cat([torch.full((1,), t, device=source.mean.device) for t in self.times])
        self.steps = flow.at(times_T).rows()
        self.guess: Tensor | None = None
        self.nfe = 0
        """Trunk passes so far, a row."""

    def __call__(self, x: Tensor, i: int) -> Tensor:
        """Velocity at x [batch, length, latent_dim] and the i-th of `times`."""
        batch = len(x)
        features = self.features_0 if i == 0 else None
        if features is None:
            features = self._trunk(x, i)
        if self.expert is None:
            assert self.uniforms is not None
            time = self.steps[i].embedding.expand(batch, -1)
            self.expert = self._draw(features[:batch], time, self.uniforms)
        expert = torch.cat([self.expert, self.expert]) if self.guided else self.expert
        outputs = self.flow.experts.one(features, expert)
        if self.guided:
            with_source, without = outputs.chunk(2)
            outputs = without + self.guidance_scale * (with_source - without)
        velocity = self.flow.velocity(outputs, x, self.times[i])
        if self.flow.config.self_conditioning:
            self.guess = endpoint_of(velocity, x, self.times[i]).detach()
        return velocity

    def _trunk(self, x: Tensor, i: int) -> Tensor:
        """Features with the source and, where guided, then those without it: [batch or 2 batch, length, d_model]."""
        mask, guess = self.mask, self.guess
        if self.guided:
            x = torch.cat([x, x])
            mask = None if mask is None else torch.cat([mask, mask])
            guess = None if guess is None else torch.cat([guess, guess])
        self.nfe += 2 if self.guided else 1
        draws = None if self.draws is None else self.draws.at(i)
        return self.flow.trunk(x, self.steps[i], self.source, mask, guess, draws)

    def _draw(self, features: Tensor, time: Tensor, uniforms: Tensor) -> Tensor:
        """Expert of each token from the gate at t = 0, [batch, length]."""
        batch, length = features.shape[:2]
        tokens = scope_length(self.flow.config, length)
        mask = torch.ones(batch, length, dtype=torch.bool, device=features.device) if self.mask is None else self.mask
        log_probs = gate_log_probs(self.flow.gate(features, self.source.mean[:batch], time), mask, tokens)
        return spread(draw_expert(log_probs, uniforms), tokens, length)

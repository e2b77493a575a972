"""Sums over the workers of a data-parallel training; without such workers, the numbers themselves.

A loss is a mean over the whole batch of a step. Each worker divides by what the whole batch holds, and not by what its
own part holds, so that the averaged gradients are those of one worker that had it all.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


def num_workers() -> int:
    """Workers that share each step's batch; 1 outside of such a training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Total(torch.autograd.Function):
    """A sum over the workers, each of which goes on to use it: so their gradients add up too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.contiguous().clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        gradient = grad_outputs[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def total(values: Tensor) -> Tensor:
    """Sum over the workers, [...] in and out, with gradient to every worker's own part."""
    return values if num_workers() == 1 else cast(Tensor, _Total.apply(values))


def even_share(counts: Tensor) -> Tensor:
    """What each worker would have of the sum, if all had the same; [...] in and out, without gradient."""
    if num_workers() == 1:
        return counts
    counts = counts.detach().clone()
    dist.all_reduce(counts)
    return counts / num_workers()


def gather(values: Tensor) -> Tensor:
    """Every worker's tensor, with gradient to one's own: [...] -> [workers, ...]."""
    if num_workers() == 1:
        return values[None]
    places = torch.zeros(num_workers(), *values.shape, dtype=values.dtype, device=values.device)
    places[dist.get_rank()] = values
    return total(places)

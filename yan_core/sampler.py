"""Noise -> solver -> decoder: token ids of a whole batch in a fixed number of trunk passes (arXiv:2604.15009)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yan_core.model import YanModel
from yan_core.moe import scope_length
from yan_core.noise import Stream, fold, normal, uniform
from yan_core.solver import FrozenExpertField, euler, time_grid


@dataclass(frozen=True)
class Sample:
    """What was drawn.

    Attributes:
        ids: Token ids, end-of-text tokens and what follows them included, [batch, length].
        expert: Expert of each token, [batch, length].
        nfe: Trunk passes a row.
    """

    ids: Tensor
    expert: Tensor
    nfe: int


@torch.no_grad()
def sample(
    model: YanModel, source_ids: Tensor, source_mask: Tensor, length: int, seeds: Tensor, num_steps: int = 3
) -> Sample:
    """Draw one target for each source.

    The noise and the expert of a row follow from its own seed alone, so a row's answer does not depend on its company.

    Args:
        model: In evaluation mode.
        source_ids: int64, [batch, source_length].
        source_mask: True for real tokens, [batch, source_length].
        length: Places to fill; the text ends at the first end-of-text token.
        seeds: int64, [batch].
        num_steps: Euler steps = trunk passes.

    Raises:
        ValueError: If length or num_steps is out of range.
    """
    if not 1 <= length <= model.config.max_positions:
        raise ValueError(f"length must be in [1, model.max_positions={model.config.max_positions}], got {length}")
    device = source_ids.device
    keys = fold(seeds.to(device), 0)
    grid = time_grid(num_steps, device)
    x_0 = model.config.init_noise * normal(keys, Stream.SOURCE_NOISE, (length, model.config.d_model))
    scopes = -(-length // scope_length(model.config, length))
    source = model.encode_source(source_ids, source_mask)
    field = FrozenExpertField(model, source, grid, uniform(keys, Stream.EXPERT, (scopes,)), mask=None)
    x_1 = euler(field, x_0.to(model.flow.positions.weight.dtype), grid)
    assert field.expert is not None
    return Sample(ids=model.decoder.argmax(x_1), expert=field.expert, nfe=field.nfe)

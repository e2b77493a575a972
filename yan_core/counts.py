"""How much each target token counts in a loss, and what a loss is divided by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from yan_core.batching import Batch
from yan_core.config import AutoencoderLossConfig, FlowLossConfig, ModelConfig
from yan_core.moe import scope_length, sum_scopes
from yan_core.parallel import even_share
from yan_core.tokenization import Tokenizer


def token_weights(ids: Tensor, mask: Tensor, fill_weight: float) -> Tensor:
    """How much each target token counts: 1 up to the first end-of-text token, `fill_weight` after it, 0 at padding.

    What is generated ends at the first end-of-text token; an answer of one word filled up to fourteen tokens would
    otherwise be a fourteenth of its own loss.

    Args:
        ids: Target ids, [batch, length].
        mask: True for real target tokens, the filling included, [batch, length].
        fill_weight: In [0, 1].

    Returns:
        float32, [batch, length].
    """
    ends = (ids == Tokenizer.eos_id).cumsum(-1)
    after = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=-1) > 0
    return mask * torch.where(after, fill_weight, 1.0)


@dataclass(frozen=True)
class Counts:
    """What the terms of a loss are divided by, scalars.

    Of one worker's rows, or its even share of what all workers have in a step (`of_all_workers`): a loss is a mean over
    the whole step, whoever has how much of it.

    Attributes:
        weight: Sum of the target tokens' weights.
        tokens: Real target tokens, the filling included.
        scopes: Scopes of an expert's draw that hold a real token.
        rows: Rows.
    """

    weight: Tensor
    tokens: Tensor
    scopes: Tensor
    rows: Tensor

    def of_all_workers(self) -> Counts:
        """This worker's even share of all workers' counts."""
        return Counts(*even_share(torch.stack([self.weight, self.tokens, self.scopes, self.rows])))

    def divided(self, parts: int) -> Counts:
        """The even share of each of some parts."""
        return Counts(*(count / parts for count in vars(self).values()))


def count(batch: Batch, config: AutoencoderLossConfig | FlowLossConfig, model: ModelConfig) -> Counts:
    """What the terms of a batch's loss are divided by.

    Args:
        batch: Rows, targets [batch, length].
        config: Of the loss; says what filling weighs.
        model: Says what a scope is.
    """
    mask = batch.target_mask
    of_flow = isinstance(config, FlowLossConfig)
    weight = token_weights(batch.target_ids, mask, config.fill_weight) if of_flow else mask
    return count_places(weight, mask, scope_length(model, mask.shape[1]))


def count_places(weight: Tensor, mask: Tensor, tokens: int) -> Counts:
    """The counts of weighed places.

    Args:
        weight: Of each target token, [batch, length].
        mask: True for real target tokens, [batch, length].
        tokens: Tokens of a scope.
    """
    scopes = (sum_scopes(mask[..., None], mask, tokens) > 0).sum()
    rows = torch.full((), float(len(mask)), device=mask.device)
    return Counts(*(c.float().clamp_min(1) for c in (weight.sum(), mask.sum(), scopes, rows)))

"""Rows of token ids -> padded tensors for each stage, corruption included.

Every random choice follows from a row's key (see noise.py), so a row is corrupted alike on any worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yan_core.config import AutoencoderLossConfig, FlowLossConfig
from yan_core.noise import Stream, uniform
from yan_core.tokenization import Tokenizer

Row = Sequence[int] | np.ndarray[Any, Any]
"""Token ids of one row."""

SOURCE_BUCKET = 16
"""Tokens of the shortest length that sources are padded to where shapes are to be few."""
PAD, EOS, MASK = Tokenizer.pad_id, Tokenizer.eos_id, Tokenizer.mask_id


def length_bucket(length: int) -> int:
    """Length that a source of so many tokens is padded to where shapes are to be few: a power of two, at least 16."""
    return max(SOURCE_BUCKET, 2 ** (max(1, length) - 1).bit_length())


@dataclass(frozen=True)
class Batch:
    """Rows of one training step.

    Attributes:
        keys: Each row's key for random draws, int64, [batch].
        source_ids: What is read, int64, [batch, source_length].
        source_mask: True for real source tokens, [batch, source_length].
        target_ids: What is to be written, end-of-text tokens included, int64, [batch, target_length].
        target_mask: True for real target tokens, [batch, target_length].
    """

    keys: Tensor
    source_ids: Tensor
    source_mask: Tensor
    target_ids: Tensor
    target_mask: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; shapes as they are."""
        return Batch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})

    def split(self, parts: int) -> list[Batch]:
        """Some batches of as many rows each, or one more; fewer where there are fewer rows."""
        rows = zip(*(value.tensor_split(min(parts, len(self.keys))) for value in vars(self).values()), strict=True)
        return [Batch(*values) for values in rows]

    @property
    def num_tokens(self) -> int:
        """Places in source and target, padding included (no synchronisation with the device)."""
        return self.source_ids.numel() + self.target_ids.numel()


def pad_rows(rows: Sequence[Row], fill: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Stack rows of different length.

    Args:
        rows: Token ids of each row.
        fill: Id that fills the rest.
        length: Length of the result; None: the longest row's, at least 1.

    Returns:
        ids, int64, and a mask that is True for the rows' own tokens, both [batch, length].
    """
    lengths = torch.tensor([len(row) for row in rows])
    length = max(1, int(lengths.max())) if length is None else length
    mask = torch.arange(length) < lengths[:, None]
    ids = torch.full((len(rows), length), fill, dtype=torch.int64)
    ids[mask] = torch.from_numpy(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]))
    return ids, mask


def infill_spans(ids: Tensor, mask: Tensor, keys: Tensor, share: float, max_span: int) -> tuple[Tensor, Tensor]:
    """Replace spans of tokens by one mask token each; every row loses at least one span.

    Args:
        ids: int64, [batch, length].
        mask: True for tokens that may be masked, which come first, [batch, length].
        keys: [batch].
        share: Expected share of masked tokens (spans that meet join, so a little less).
        max_span: Longest span; lengths are uniform in 1..max_span.

    Returns:
        The shortened rows, padded, and the mask of what is left of the tokens, both [batch, length].

    Source: arXiv:2604.15009 (text infilling as in BART, arXiv:1910.13461, with uniform span lengths).
    """
    length = ids.shape[1]
    draws = uniform(keys, Stream.CORRUPTION, (length, 2)).to(ids.device)
    counts = mask.sum(-1, keepdim=True)
    starts = draws[..., 0] < 2 * share / (1 + max_span)
    surest = (draws[:, :1, 1] * counts).long().clamp_max(length - 1)
    starts.scatter_(1, surest, starts.gather(1, surest) | ~(starts & mask).any(-1, keepdim=True))
    span = (draws[..., 1] * max_span).long().clamp_max(max_span - 1) + 1
    masked = torch.zeros_like(mask)
    for back in range(max_span):
        reached = starts & (span > back)
        masked[:, back:] |= reached[:, : length - back]
    masked &= mask
    first = masked & ~torch.cat([torch.zeros_like(masked[:, :1]), masked[:, :-1]], dim=1)
    kept = mask & (~masked | first)
    order = (~kept).to(torch.int8).argsort(dim=-1, stable=True)
    left = torch.arange(length, device=ids.device) < kept.sum(-1, keepdim=True)
    return torch.where(first, MASK, ids).gather(1, order).masked_fill(~left, PAD), left


def _longest_of_group(text_mask: Tensor, groups: int) -> Tensor:
    """Length of the longest row of each row's group, [batch, 1]."""
    lengths = text_mask.sum(-1).view(groups, -1)
    return lengths.amax(-1, keepdim=True).clamp_min(1).expand_as(lengths).reshape(-1, 1)


def autoencoder_batch(rows: Sequence[Row], keys: Tensor, config: AutoencoderLossConfig, groups: int = 1) -> Batch:
    """Stage 1: corrupted text in, clean text out, with end-of-text tokens after it.

    Each row is followed by end-of-text tokens up to a length drawn between its own and the longest row's of its group,
    so that targets of any length are met. The corrupted row keeps the target's length: infilling shortens it, and
    without the places at its end the last tokens would have none.

    Args:
        rows: Token ids of each row.
        keys: int64, [batch].
        config: How much is corrupted.
        groups: Equal parts of the rows, in order, that are looked at alone; what is in a group must not depend on how
            many workers share a batch.

    Returns:
        Source and target of the same [batch, length], length that of the longest row.
    """
    target, text_mask = pad_rows(rows, EOS)
    length = target.shape[1]
    text_lengths = text_mask.sum(-1, keepdim=True)
    fill = uniform(keys, Stream.FILL, (1,)) * (_longest_of_group(text_mask, groups) + 1 - text_lengths)
    target_mask = torch.arange(length) < (text_lengths + fill.long()).clamp_min(1)
    target = target.masked_fill(~target_mask, PAD)
    corrupted, left = infill_spans(target, text_mask, keys, config.mask_share, config.max_span)
    corrupted = corrupted.masked_fill(~left, EOS).masked_fill(~target_mask, PAD)
    clean = uniform(keys, Stream.CLEAN, (1,)) < config.clean_share
    return Batch(keys, torch.where(clean, target, corrupted), target_mask, target, target_mask)


def infilling_batch(
    rows: Sequence[Row], keys: Tensor, config: FlowLossConfig, fill: bool = True, groups: int = 1
) -> Batch:
    """Stage 2 on plain text: the source has masked spans, the target is the whole text.

    Args:
        rows: Token ids of each row.
        keys: int64, [batch].
        config: Share of masked tokens and longest span.
        fill: Whether targets are filled with end-of-text tokens up to the longest row of their group, or keep their
            own length.
        groups: Equal parts of the rows, as in `autoencoder_batch`.

    Returns:
        Source and target of the same [batch, length], length that of the longest row.
    """
    text, mask = pad_rows(rows, PAD)
    source, source_mask = infill_spans(text, mask, keys, config.corpus_mask_share, config.corpus_max_span)
    source_mask = _drop_sources(source_mask, keys, config)
    if not fill:
        return Batch(keys, source, source_mask, text, mask)
    target_mask = torch.arange(text.shape[1]) < _longest_of_group(mask, groups)
    target, _ = pad_rows(rows, EOS)
    return Batch(keys, source, source_mask, target.masked_fill(~target_mask, PAD), target_mask)


def _drop_sources(source_mask: Tensor, keys: Tensor, config: FlowLossConfig) -> Tensor:
    """The mask with some rows all False, as guidance wants; both [batch, source_length]."""
    if not config.source_drop_share:
        return source_mask
    return source_mask & (uniform(keys, Stream.SOURCE_DROP, (1,)) >= config.source_drop_share)


def task_batch(
    sources: Sequence[Row],
    targets: Sequence[Row],
    keys: Tensor,
    config: FlowLossConfig,
    target_length: int,
    fill: bool = True,
) -> Batch:
    """Stage 3: a task's pairs.

    Args:
        sources: Token ids of each source.
        targets: Token ids of each target, at most `target_length`.
        keys: int64, [batch].
        config: Shares of the source that are hidden.
        target_length: Places of a filled target.
        fill: Whether targets are filled with end-of-text tokens to `target_length`, or keep their own length (an empty
            one is a single end-of-text token).

    Returns:
        Source [batch, source_length] and target [batch, target_length], or as long as the longest target.
    """
    source, source_mask = pad_rows(sources, PAD)
    if config.source_mask_share:
        hidden = uniform(keys, Stream.SOURCE_MASK, (source.shape[1],)) < config.source_mask_share
        source = source.masked_fill(hidden & source_mask, MASK)
    source_mask = _drop_sources(source_mask, keys, config)
    target, mask = pad_rows(targets, EOS, target_length if fill else None)
    if fill:
        return Batch(keys, source, source_mask, target, torch.ones_like(mask))
    mask[:, 0] = True
    return Batch(keys, source, source_mask, target.masked_fill(~mask, PAD), mask)

"""Building blocks: attention with rotary positions and padding, feed-forward, time conditioning, short convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yan_core.config import ModelConfig
from yan_core.mamba import BidirectionalMamba
from yan_core.noise import RowDraws


@dataclass(frozen=True)
class KeyValues:
    """Projected keys and values of a sequence, both [batch, num_heads, length, head_dim], and its padding.

    `mask` is [batch, length], True where a token is real; None: all are.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def repeat(self, times: int) -> KeyValues:
        """The same rows several times over along the batch."""
        if times == 1:
            return self
        mask = None if self.mask is None else self.mask.repeat(times, 1)
        return KeyValues(self.keys.repeat(times, 1, 1, 1), self.values.repeat(times, 1, 1, 1), mask)

    def hidden(self) -> KeyValues:
        """The same shape with no real token: what attends to it gets zeros."""
        batch, _, length, _ = self.keys.shape
        return KeyValues(self.keys, self.values, torch.zeros(batch, length, dtype=torch.bool, device=self.keys.device))

    def beside(self, other: KeyValues) -> KeyValues:
        """These rows and then those of `other`, which has the same shape and a mask too."""
        assert self.mask is not None and other.mask is not None
        keys, values = torch.cat([self.keys, other.keys]), torch.cat([self.values, other.values])
        return KeyValues(keys, values, torch.cat([self.mask, other.mask]))


@lru_cache(maxsize=64)
def rotary_angles(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each [length, head_dim / 2]. Source: Su et al. 2021, arXiv:2104.09864."""
    with torch.inference_mode(False):  # cached: the first caller's mode must not bind the later ones
        frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
        return angle.cos(), angle.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of channels by their positions' angles.

    Args:
        x: [batch, num_heads, length, head_dim].
        angles: From `rotary_angles`, [length, head_dim / 2] each.

    Returns:
        Shaped like x.
    """
    cos, sin = (a.to(x.dtype) for a in angles)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attend(query: Tensor, context: KeyValues) -> Tensor:
    """Bidirectional attention in which padded keys take no part.

    A row with no real key gives zeros, where a plain softmax would give NaN.

    Args:
        query: [batch, num_heads, length, head_dim].
        context: Keys, values and their padding.

    Returns:
        [batch, num_heads, length, head_dim].
    """
    mask = context.mask
    if query.is_cuda or not torch.is_grad_enabled():
        attention_mask = None if mask is None else (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        out = F.scaled_dot_product_attention(query, context.keys, context.values, attn_mask=attention_mask)
    else:
        # On a CPU the backward pass of the fused kernel took twice as long as this (EXPERIMENTS, 2026-11-23).
        scores = query @ context.keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
        out = scores.softmax(-1) @ context.values
    return out if mask is None else out * mask.any(-1)[:, None, None, None]


class Attention(nn.Module):
    """Multi-head attention over a sequence itself, or over another one's latents."""

    def __init__(self, d_model: int, num_heads: int, rotary: bool) -> None:
        super().__init__()
        self.num_heads, self.rotary = num_heads, rotary
        self.query = nn.Linear(d_model, d_model)
        self.key_value = nn.Linear(d_model, 2 * d_model)
        self.out = nn.Linear(d_model, d_model)

    @torch.no_grad()
    def start_matching(self, gain: float) -> None:
        """Make keys equal queries, `gain` times as large: each token then attends to its like from the start."""
        self.query.weight.mul_(gain)
        self.key_value.weight[: len(self.query.weight)].copy_(self.query.weight)
        self.query.bias.zero_()
        self.key_value.bias[: len(self.query.bias)].zero_()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [batch, num_heads, length, head_dim]

    def project(self, context: Tensor, mask: Tensor | None) -> KeyValues:
        """Keys and values of `context` [batch, length, d_model], with its `mask` [batch, length], for any queries."""
        keys, values = self.key_value(context).chunk(2, dim=-1)
        return KeyValues(self._heads(keys), self._heads(values), mask)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: KeyValues | None = None) -> Tensor:
        """Attend from x to x itself, or to `context`.

        Args:
            x: [batch, length, d_model].
            mask: True for x's real tokens, [batch, length]; None: all are, or there is a context.
            context: From `project`.

        Returns:
            [batch, length, d_model].
        """
        query = self._heads(self.query(x))
        if context is None:
            context = self.project(x, mask)
            if self.rotary:
                angles = rotary_angles(x.shape[1], query.shape[-1], x.device)
                query, keys = rotate(query, angles), rotate(context.keys, angles)
                context = KeyValues(keys, context.values, mask)
        return self.out(attend(query, context).transpose(1, 2).flatten(2))


def feed_forward(d_model: int, multiple: int) -> nn.Sequential:
    """d_model -> multiple * d_model -> d_model with GELU."""
    return nn.Sequential(nn.Linear(d_model, multiple * d_model), nn.GELU(), nn.Linear(multiple * d_model, d_model))


class ShortConv(nn.Module):
    """Depthwise convolution over neighbouring tokens, added to its input; padded tokens neither give nor receive."""

    def __init__(self, d_model: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(d_model, d_model, kernel, padding=kernel // 2, groups=d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[batch, length, d_model] in and out; mask [batch, length]."""
        keep = mask[..., None].to(x.dtype)
        # As a convolution over an image one pixel wide, which a CPU trains 1.3 to 3 times as fast as a 1-d one.
        image, weight = (x * keep).transpose(1, 2)[..., None], self.conv.weight[..., None]
        padding, groups = (self.conv.kernel_size[0] // 2, 0), self.conv.groups
        out = F.conv2d(image, weight, self.conv.bias, padding=padding, groups=groups)
        return x + out[..., 0].transpose(1, 2) * keep


def token_mixer(config: ModelConfig, rotary: bool) -> nn.Module:
    """What lets a block's tokens see each other: [batch, length, d_model] and padding mask in, the former out."""
    if config.mixer == "attention":
        return Attention(config.d_model, config.num_heads, rotary)
    return BidirectionalMamba(config.d_model, config.mamba.d_state, config.mamba.conv_kernel, config.mamba.expand)


class RowDropout(nn.Module):
    """Dropout whose mask follows from the rows' keys: the same on any worker, at any padding, and when recomputed.

    Source: Srivastava et al. 2014, JMLR 15.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor, draws: RowDraws | None) -> Tensor:
        """[batch, length, d_model] in and out; nothing is dropped outside of training.

        Raises:
            ValueError: If there is something to draw and no `draws`.
        """
        if not self.training or self.share == 0:
            return x
        if draws is None:
            raise ValueError("dropout in training needs the rows' keys: give `draws`, or call eval() on the model")
        kept = draws.kept((x.shape[1], x.shape[2]), self.share)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.share))


def _place(draws: RowDraws | None, number: int) -> RowDraws | None:
    return None if draws is None else draws.at(number)


def run_block(block: nn.Module, recompute: bool, *inputs: Any) -> Tensor:
    """A block's output, [batch, length, d_model]; with `recompute` its activations are computed again when needed.

    Source: Chen et al. 2016, arXiv:1604.06174.
    """
    if recompute and torch.is_grad_enabled():
        # Dropout follows from the rows' keys, so there is no state of a generator to restore.
        return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False))
    return block(*inputs)


class EncoderBlock(nn.Module):
    """Pre-norm bidirectional block, with an optional short convolution in front."""

    def __init__(self, config: ModelConfig, conv_kernel: int, rotary: bool) -> None:
        super().__init__()
        self.conv = ShortConv(config.d_model, conv_kernel) if conv_kernel else None
        self.norm_mixer = nn.LayerNorm(config.d_model)
        self.mixer = token_mixer(config, rotary)
        self.norm_ffn = nn.LayerNorm(config.d_model)
        self.ffn = feed_forward(config.d_model, config.ffn_multiple)
        self.dropout = RowDropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, draws: RowDraws | None = None) -> Tensor:
        """[batch, length, d_model] in and out; mask [batch, length]; draws: for dropout, in training."""
        if self.conv is not None:
            x = self.conv(x, mask)
        x = x + self.dropout(self.mixer(self.norm_mixer(x), mask), _place(draws, 0))
        return x + self.dropout(self.ffn(self.norm_ffn(x)), _place(draws, 1))


def time_features(t: Tensor, d_model: int) -> Tensor:
    """Sinusoidal features of t in [0, 1]: [batch] -> [batch, d_model]. Source: Vaswani et al. 2017, sec. 3.5."""
    frequency = 10000.0 ** (-torch.arange(0, d_model, 2, device=t.device, dtype=torch.float32) / d_model)
    angle = 1000.0 * t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoidal features -> linear -> GELU (arXiv:2604.15009)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.linear = nn.Linear(d_model, d_model)

    def forward(self, t: Tensor) -> Tensor:
        """[batch] -> [batch, d_model]."""
        return F.gelu(self.linear(time_features(t, self.d_model).to(self.linear.weight.dtype)))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift normalised features by the row.

    Args:
        x: [batch, length, d_model].
        scale: What is added to 1, [batch, d_model], or [1, d_model] for all rows.
        shift: Shaped like scale.

    Returns:
        [batch, length, d_model].
    """
    return x * (1 + scale[:, None]) + shift[:, None]


class FlowBlock(nn.Module):
    """Token mixer, cross-attention to the source where asked, feed-forward; each normalised adaptively by t."""

    def __init__(self, config: ModelConfig, cross_attention: bool) -> None:
        super().__init__()
        self.num_sublayers = 3 if cross_attention else 2
        self.norm = nn.LayerNorm(config.d_model, elementwise_affine=False)
        self.modulation = nn.Linear(config.d_model, 2 * self.num_sublayers * config.d_model)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.mixer = token_mixer(config, rotary=True)
        self.cross_attention = Attention(config.d_model, config.num_heads, rotary=False) if cross_attention else None
        self.ffn = feed_forward(config.d_model, config.ffn_multiple)
        self.dropout = RowDropout(config.dropout)

    def modulations(self, time: Tensor) -> tuple[Tensor, ...]:
        """Scale and shift of each sub-layer at an embedded `time` [batch, d_model]; each [batch, d_model]."""
        return self.modulation(time).chunk(2 * self.num_sublayers, dim=-1)

    def project_source(self, latents: Tensor, mask: Tensor) -> KeyValues | None:
        """Keys and values of the source, where the block reads it.

        Args:
            latents: The source's, [batch, length, d_model].
            mask: True for real source tokens, [batch, length].
        """
        return None if self.cross_attention is None else self.cross_attention.project(latents, mask)

    def forward(
        self,
        x: Tensor,
        modulations: tuple[Tensor, ...],
        source: KeyValues | None,
        mask: Tensor | None,
        draws: RowDraws | None = None,
    ) -> Tensor:
        """Features after the block.

        Args:
            x: Features before it, [batch, length, d_model].
            modulations: From `modulations`, [batch, d_model] or [1, d_model] each.
            source: From `project_source`.
            mask: True for real target tokens, [batch, length]; None: all are.
            draws: For dropout, in training.

        Returns:
            [batch, length, d_model].
        """
        pairs = list(zip(modulations[::2], modulations[1::2], strict=True))
        x = x + self.dropout(self.mixer(modulate(self.norm(x), *pairs[0]), mask), _place(draws, 0))
        if self.cross_attention is not None:
            read = self.cross_attention(modulate(self.norm(x), *pairs[1]), context=source)
            x = x + self.dropout(read, _place(draws, 1))
        return x + self.dropout(self.ffn(modulate(self.norm(x), *pairs[-1])), _place(draws, 2))

"""Token ids -> latents, and latents -> logits: both ends of the autoencoder (arXiv:2604.15009, stage 1)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yan_core.blocks import Attention, EncoderBlock, RowDropout, feed_forward, run_block
from yan_core.config import EncoderConfig, ModelConfig
from yan_core.noise import RowDraws


class TokenEncoder(nn.Module):
    """Token ids -> one latent a token, of unit scale."""

    def __init__(self, vocab_size: int, model: ModelConfig, config: EncoderConfig, latent_dim: int = 0) -> None:
        super().__init__()
        self.recompute = False
        """Whether the blocks' activations are computed again in the backward pass."""
        self.embedding = nn.Embedding(vocab_size, model.d_model)
        nn.init.normal_(self.embedding.weight, std=config.embed_std)
        self.from_start = self._positions(model, config, "start")
        self.from_end = self._positions(model, config, "end")
        self.dropout = RowDropout(model.dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(model, config.conv_kernel, rotary="rotary" in config.positions)
            for _ in range(config.num_blocks)
        )
        if config.matching_gain:
            for block in self.blocks:
                cast(Attention, cast(EncoderBlock, block).mixer).start_matching(config.matching_gain)
        self.latent_out = nn.Linear(model.d_model, latent_dim) if latent_dim else nn.Identity()
        # Without gain or bias: latents stay at unit scale, the scale of the source noise.
        self.norm = nn.LayerNorm(latent_dim or model.d_model, elementwise_affine=False)

    @staticmethod
    def _positions(model: ModelConfig, config: EncoderConfig, kind: str) -> nn.Embedding | None:
        if kind not in config.positions:
            return None
        table = nn.Embedding(model.max_positions, model.d_model)
        nn.init.normal_(table.weight, std=config.position_std)
        return table

    def forward(self, ids: Tensor, mask: Tensor, draws: RowDraws | None = None) -> Tensor:
        """Encode token ids.

        Args:
            ids: int64, [batch, length].
            mask: True for real tokens, which come before the padding, [batch, length].
            draws: For dropout, in training.

        Returns:
            Latents, [batch, length, latent_dim or d_model]; at padded tokens they mean nothing.

        Raises:
            ValueError: If length is over model.max_positions.
        """
        limit = self.from_start or self.from_end
        if limit is not None and ids.shape[1] > limit.num_embeddings:
            raise ValueError(f"{ids.shape[1]} tokens are more than model.max_positions={limit.num_embeddings}")
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.embedding(ids)
        if self.from_start is not None:
            x = x + self.from_start(position)
        if self.from_end is not None:
            x = x + self.from_end((mask.sum(-1, keepdim=True) - 1 - position).clamp_min(0))
        x = self.dropout(x, draws)
        for i, block in enumerate(self.blocks):
            x = run_block(block, self.recompute, x, mask, None if draws is None else draws.at(i))
        return self.norm(self.latent_out(x))


def highest(logits: Tensor, width: int = 256) -> tuple[Tensor, Tensor]:
    """Highest of logits [tokens, vocab] and its index, both [tokens]; of equals the first.

    On a CPU the maximum of each `width` logits first, which is vectorised, and then the index within one of them alone:
    3 to 9 times as fast as `max`, which took 8 % of a request's time (EXPERIMENTS, 2026-11-23).
    """
    blocks = logits.shape[-1] // width
    if logits.is_cuda or blocks < 2:
        best = logits.max(-1)
        return best.values, best.indices
    whole = logits[:, : blocks * width].unflatten(-1, (blocks, width))
    top, block = whole.amax(-1).max(-1)
    inside = whole[torch.arange(len(logits), device=logits.device), block].argmax(-1)
    index = block * width + inside
    if blocks * width == logits.shape[-1]:
        return top, index
    rest = logits[:, blocks * width :].max(-1)
    later = rest.values > top
    return torch.where(later, rest.values, top), torch.where(later, rest.indices + blocks * width, index)


class TokenDecoder(nn.Module):
    """Latents -> logits over the vocabulary, each token by itself."""

    def __init__(self, vocab_size: int, model: ModelConfig) -> None:
        super().__init__()
        self.latent_in = nn.Linear(model.latent_dim, model.d_model) if model.latent_dim else nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(model.d_model) for _ in range(model.decoder_blocks))
        self.ffns = nn.ModuleList(feed_forward(model.d_model, model.ffn_multiple) for _ in range(model.decoder_blocks))
        self.head = nn.Linear(model.d_model, vocab_size)

    def hidden(self, latents: Tensor) -> Tensor:
        """Everything before the vocabulary: [..., latent_dim] -> [..., d_model]."""
        x = self.latent_in(latents)
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            x = x + ffn(norm(x))
        return x

    def forward(self, latents: Tensor) -> Tensor:
        """Logits [..., vocab] of latents [..., latent_dim]."""
        return self.head(self.hidden(latents))

    @torch.no_grad()
    def read(
        self,
        latents: Tensor,
        with_log_probs: bool = False,
        tokens_at_once: int = 1024,
        logits_at_once: int | None = None,
        never: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Most likely tokens, never holding more than `logits_at_once` logits (of one token, at least one).

        Args:
            latents: [batch, length, latent_dim].
            with_log_probs: Whether to give the tokens' log-probabilities too.
            tokens_at_once: Rows of logits at a time.
            logits_at_once: Numbers of logits at a time, the vocabulary read in blocks. None: 2**27 on a GPU, 2**22
                on a CPU, which stay in its cache.
            never: A token that is not to be read, its probability given to the others.

        Returns:
            Token ids and their log-probabilities (float32) or None, both [batch, length].
        """
        if logits_at_once is None:
            logits_at_once = 2**27 if latents.is_cuda else 2**22
        ids, log_probs = [], []
        for part in self.hidden(latents).flatten(0, -2).split(tokens_at_once):
            block = max(1, logits_at_once // len(part))
            best, found, log_total = self._read_block(part, 0, block, with_log_probs, never)
            for start in range(block, self.head.out_features, block):
                top, index, log_sum = self._read_block(part, start, block, with_log_probs, never)
                found = torch.where(top > best, index, found)  # of equals the first, as argmax has it
                best = torch.maximum(best, top)
                log_total = torch.logaddexp(log_total, log_sum)
            ids.append(found)
            log_probs.append(best.float() - log_total)
        shape = latents.shape[:-1]
        return torch.cat(ids).view(shape), torch.cat(log_probs).view(shape) if with_log_probs else None

    def _read_block(
        self, hidden: Tensor, start: int, block: int, with_log_sum: bool, never: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Highest logit among `block` tokens from `start` on, its token and the log-sum-exp where asked; [tokens]."""
        rows = slice(start, start + block)
        logits = F.linear(hidden, self.head.weight[rows], self.head.bias[rows])
        if never is not None and start <= never < start + block:
            logits[:, never - start] = -torch.inf
        top, index = highest(logits)
        log_sum = logits.float().logsumexp(-1) if with_log_sum else torch.zeros_like(top, dtype=torch.float32)
        return top, index + start, log_sum

"""Token ids -> latents, and latents -> logits: both ends of the autoencoder (arXiv:2604.15009, stage 1)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from yan_core.blocks import Attention, EncoderBlock, feed_forward
from yan_core.config import EncoderConfig, ModelConfig


class TokenEncoder(nn.Module):
    """Token ids -> one latent a token, of unit scale."""

    def __init__(self, vocab_size: int, model: ModelConfig, config: EncoderConfig, latent_dim: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, model.d_model)
        nn.init.normal_(self.embedding.weight, std=config.embed_std)
        self.from_start = self._positions(model, config, "start")
        self.from_end = self._positions(model, config, "end")
        self.dropout = nn.Dropout(model.dropout)
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

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token ids.

        Args:
            ids: int64, [batch, length].
            mask: True for real tokens, which come before the padding, [batch, length].

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
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(self.latent_out(x))


class TokenDecoder(nn.Module):
    """Latents -> logits over the vocabulary, each token by itself."""

    def __init__(self, vocab_size: int, model: ModelConfig) -> None:
        super().__init__()
        self.latent_in = nn.Linear(model.latent_dim, model.d_model) if model.latent_dim else nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(model.d_model) for _ in range(model.decoder_blocks))
        self.ffns = nn.ModuleList(feed_forward(model.d_model, model.ffn_multiple) for _ in range(model.decoder_blocks))
        self.head = nn.Linear(model.d_model, vocab_size)

    def hidden(self, latents: Tensor) -> Tensor:
        """Everything before the vocabulary: [..., latent_dim] in, [..., d_model] out."""
        x = self.latent_in(latents)
        for norm, ffn in zip(self.norms, self.ffns, strict=True):
            x = x + ffn(norm(x))
        return x

    def forward(self, latents: Tensor) -> Tensor:
        """Logits [..., vocab] of latents [..., latent_dim]."""
        return self.head(self.hidden(latents))

    @torch.no_grad()
    def read(
        self, latents: Tensor, with_log_probs: bool = False, tokens_at_once: int = 1024
    ) -> tuple[Tensor, Tensor | None]:
        """Most likely tokens, never holding more than `tokens_at_once` rows of logits.

        Args:
            latents: [batch, length, latent_dim].
            with_log_probs: Whether to give the tokens' log-probabilities too.
            tokens_at_once: Rows of logits at a time.

        Returns:
            Token ids and their log-probabilities (float32) or None, both [batch, length].
        """
        ids, log_probs = [], []
        for part in self.hidden(latents).flatten(0, -2).split(tokens_at_once):
            logits = self.head(part)
            ids.append(logits.argmax(-1))
            if with_log_probs:
                log_probs.append(logits.float().log_softmax(-1).gather(-1, ids[-1][:, None])[:, 0])
        shape = latents.shape[:-1]
        return torch.cat(ids).view(shape), torch.cat(log_probs).view(shape) if with_log_probs else None

"""YAN: target encoder, source encoder, flow network with velocity experts, token decoder (arXiv:2604.15009).

Follow one batch: `encode_target` gives x_1, `encode_source` gives what the flow needs of the source, `forward` gives
the velocities of all experts and the gate at (x_t, t), and `decoder` reads tokens off latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from yan_core.blocks import FlowBlock, KeyValues, TimeEmbedding
from yan_core.config import ModelConfig
from yan_core.latents import TokenDecoder, TokenEncoder
from yan_core.moe import ExpertHeads, Gate


@dataclass(frozen=True)
class Source:
    """What the flow needs of an encoded source, computed once a request.

    Attributes:
        keys_values: For each flow block its cross-attention's keys and values, or None.
        mean: Mean source latent over real tokens, [batch, d_model].
    """

    keys_values: tuple[KeyValues | None, ...]
    mean: Tensor

    def repeat(self, times: int) -> Source:
        """The same sources several times over along the batch."""
        return Source(tuple(kv and kv.repeat(times) for kv in self.keys_values), self.mean.repeat(times, 1))


@dataclass(frozen=True)
class TimeStep:
    """A time, embedded: [batch, d_model], and each flow block's modulations at it."""

    embedding: Tensor
    modulations: tuple[tuple[Tensor, ...], ...]


class FlowNetwork(nn.Module):
    """The trunk on x_t, the expert heads and the gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.positions = nn.Embedding(config.max_positions, config.d_model)
        # Not small: at t = 0 a token is told from its neighbours by its position alone, under noise of unit scale.
        nn.init.normal_(self.positions.weight, std=0.5)
        self.time = TimeEmbedding(config.d_model)
        self.blocks = nn.ModuleList(
            FlowBlock(
                config.d_model,
                config.num_heads,
                config.ffn_multiple,
                config.dropout,
                cross_attention=i % config.cross_attention_every == 0,
            )
            for i in range(config.flow_blocks)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.experts = ExpertHeads(config.num_experts, config.d_model, config.ffn_multiple)
        self.gate = Gate(config)

    @property
    def _blocks(self) -> list[FlowBlock]:
        return cast(list[FlowBlock], list(self.blocks))  # a ModuleList forgets what it holds

    def source(self, latents: Tensor, mask: Tensor) -> Source:
        """Project source latents [batch, length, d_model] with padding mask [batch, length]."""
        keep = mask[..., None].to(latents.dtype)
        mean = (latents * keep).sum(1) / keep.sum(1).clamp_min(1)
        projected = tuple(
            None if block.cross_attention is None else block.cross_attention.project(latents, mask)
            for block in self._blocks
        )
        return Source(projected, mean)

    def at(self, t: Tensor) -> TimeStep:
        """Embed times [batch]."""
        embedding = self.time(t)
        return TimeStep(embedding, tuple(block.modulations(embedding) for block in self._blocks))

    def trunk(self, x_t: Tensor, step: TimeStep, source: Source, mask: Tensor | None) -> Tensor:
        """Features [batch, length, d_model] at (x_t, t). One call is one function evaluation (NFE)."""
        x = x_t + self.positions.weight[: x_t.shape[1]]
        for block, modulations, projected in zip(self.blocks, step.modulations, source.keys_values, strict=True):
            x = block(x, modulations, projected, mask)
        return self.norm(x)


class YanModel(nn.Module):
    """The whole model."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        """Build it with fresh weights from PyTorch's global generator.

        Args:
            config: Architecture.
            vocab_size: Number of token ids.
        """
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.target_encoder = TokenEncoder(vocab_size, config, config.target_encoder)
        self.source_encoder = None if config.share_encoder else TokenEncoder(vocab_size, config, config.source_encoder)
        self.flow = FlowNetwork(config)
        self.decoder = TokenDecoder(vocab_size, config)

    def encode_target(self, ids: Tensor, mask: Tensor) -> Tensor:
        """x_1 of target ids [batch, length] with padding mask [batch, length]: [batch, length, d_model]."""
        return self.target_encoder(ids, mask)

    def encode_source(self, ids: Tensor, mask: Tensor) -> Source:
        """What the flow needs of source ids [batch, length] with padding mask [batch, length]."""
        encoder = self.target_encoder if self.source_encoder is None else self.source_encoder
        return self.flow.source(encoder(ids, mask), mask)

    def forward(self, x_t: Tensor, t: Tensor, source: Source, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Velocities of every expert, and the gate.

        Args:
            x_t: Points on the path, [batch, length, d_model].
            t: Times in [0, 1], [batch].
            source: From `encode_source`.
            mask: True for real target tokens, [batch, length]; None: all are.

        Returns:
            Velocities [batch, length, num_experts, d_model] and gate logits [batch, length, num_experts].
        """
        step = self.flow.at(t)
        features = self.flow.trunk(x_t, step, source, mask)
        return self.flow.experts(features), self.flow.gate(features, source.mean, step.embedding)

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters; without `embeddings`, token embeddings, positions and the vocabulary head are left out."""
        total = sum(p.numel() for p in self.parameters())
        if embeddings:
            return total
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return total - tables - sum(p.numel() for p in self.decoder.head.parameters())


def build_model(config: ModelConfig, vocab_size: int, seed: int) -> YanModel:
    """A model with fresh weights that depend on `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return YanModel(config, vocab_size)

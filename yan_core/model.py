"""YAN: target encoder, source encoder, flow network with velocity experts, token decoder (arXiv:2604.15009).

Follow one batch: `encode_target` gives x_1, `encode_source` gives what the flow needs of the source, `flow.trunk` the
features at (x_t, t) of which `flow.experts` and `flow.gate` make velocities and choice, and `decoder` reads tokens off
latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, overload

import torch
from torch import Tensor, nn

from yan_core.blocks import FlowBlock, KeyValues, TimeEmbedding, run_block
from yan_core.config import BaselineConfig, ModelConfig
from yan_core.latents import TokenDecoder, TokenEncoder
from yan_core.moe import ExpertHeads, Gate
from yan_core.noise import RowDraws
from yan_core.path import velocity_to

if TYPE_CHECKING:
    from yan_core.baselines import Baseline


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

    def dropped(self) -> Source:
        """No source at all, in the same shape: what a row with an empty source mask gives."""
        return Source(tuple(kv and kv.hidden() for kv in self.keys_values), torch.zeros_like(self.mean))

    def beside(self, other: Source) -> Source:
        """These rows and then those of `other`."""
        pairs = zip(self.keys_values, other.keys_values, strict=True)
        return Source(tuple(a and b and a.beside(b) for a, b in pairs), torch.cat([self.mean, other.mean]))


@dataclass(frozen=True)
class TimeStep:
    """Times, embedded: [batch, d_model] or [1, d_model], and each flow block's modulations at them, alike."""

    embedding: Tensor
    modulations: tuple[tuple[Tensor, ...], ...]

    def beside(self, other: TimeStep) -> TimeStep:
        """These rows and then those of `other`."""
        pairs = zip(self.modulations, other.modulations, strict=True)
        modulations = tuple(tuple(torch.cat(two) for two in zip(a, b, strict=True)) for a, b in pairs)
        return TimeStep(torch.cat([self.embedding, other.embedding]), modulations)

    def rows(self) -> list[TimeStep]:
        """Each row by itself."""
        return [
            TimeStep(self.embedding[i : i + 1], tuple(tuple(m[i : i + 1] for m in ms) for ms in self.modulations))
            for i in range(len(self.embedding))
        ]


class FlowNetwork(nn.Module):
    """The trunk on x_t, the expert heads and the gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether the blocks' activations are computed again in the backward pass."""
        self.positions = nn.Embedding(config.max_positions, config.d_model)
        # Not small: at t = 0 a token is told from its neighbours by its position alone, under noise of unit scale.
        nn.init.normal_(self.positions.weight, std=0.5)
        self.latent_in = nn.Linear(config.latent_dim, config.d_model) if config.latent_dim else nn.Identity()
        self.guess_in = nn.Linear(config.latent_width, config.d_model, bias=False) if config.self_conditioning else None
        if self.guess_in is not None:
            nn.init.zeros_(self.guess_in.weight)
        self.time = TimeEmbedding(config.d_model)
        self.blocks = nn.ModuleList(
            FlowBlock(config, cross_attention=i % config.cross_attention_every == 0) for i in range(config.flow_blocks)
        )
        self.norm = nn.LayerNorm(config.d_model)
        self.experts = ExpertHeads(
            config.num_experts, config.d_model, config.ffn_multiple * config.d_model, config.latent_width
        )
        self.gate = Gate(config)

    @property
    def _blocks(self) -> list[FlowBlock]:
        return cast(list[FlowBlock], list(self.blocks))  # a ModuleList forgets what it holds

    def source(self, latents: Tensor, mask: Tensor) -> Source:
        """Project source latents [batch, length, d_model] with padding mask [batch, length]."""
        keep = mask[..., None].to(latents.dtype)
        mean = (latents * keep).sum(1) / keep.sum(1).clamp_min(1)
        return Source(tuple(block.project_source(latents, mask) for block in self._blocks), mean)

    def at(self, t: Tensor) -> TimeStep:
        """Embed times t [batch]; a single one holds for rows in any number."""
        embedding = self.time(t)
        return TimeStep(embedding, tuple(block.modulations(embedding) for block in self._blocks))

    def trunk(
        self,
        x_t: Tensor,
        step: TimeStep,
        source: Source,
        mask: Tensor | None,
        guess: Tensor | None = None,
        draws: RowDraws | None = None,
    ) -> Tensor:
        """Features at (x_t, t). One call is one function evaluation (NFE).

        Args:
            x_t: Points, [batch, length, latent_dim].
            step: From `at`.
            source: From `source`.
            mask: True for real target tokens, [batch, length]; None: all are.
            guess: Estimate of x_1 from an earlier pass, shaped like x_t, for self-conditioning (Chen et al. 2022,
                arXiv:2208.04202); None: there is none yet.
            draws: For dropout, in training.

        Returns:
            [batch, length, d_model].
        """
        x = self.latent_in(x_t) + self.positions.weight[: x_t.shape[1]]
        if guess is not None and self.guess_in is not None:
            x = x + self.guess_in(guess)
        of_blocks = zip(self.blocks, step.modulations, source.keys_values, strict=True)
        for i, (block, modulations, projected) in enumerate(of_blocks):
            draw = None if draws is None else draws.at(i)
            x = run_block(block, self.recompute, x, modulations, projected, mask, draw)
        return self.norm(x)

    def velocity(self, outputs: Tensor, x_t: Tensor, t: Tensor | float) -> Tensor:
        """Velocity that an expert's output means at (x_t, t): the output itself, or towards it where it is an endpoint.

        Args:
            outputs: Of an expert, [batch, length, latent_dim].
            x_t: Where it was asked, same shape.
            t: Time below 1, [batch] or one number.
        """
        return outputs if self.config.prediction == "velocity" else velocity_to(outputs, x_t, t)


class LengthHead(nn.Module):
    """Mean source latent -> logits of the target's length, for models that write no filling (model.length)."""

    def __init__(self, d_model: int, max_length: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.GELU(), nn.Linear(d_model, max_length))

    def forward(self, source_mean: Tensor) -> Tensor:
        """[batch, d_model] -> [batch, max_length]; entry i is length i + 1."""
        return self.mlp(source_mean)


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
        self.target_encoder = TokenEncoder(vocab_size, config, config.target_encoder, config.latent_dim)
        self.source_encoder = None if config.share_encoder else TokenEncoder(vocab_size, config, config.source_encoder)
        self.flow = FlowNetwork(config)
        self.decoder = TokenDecoder(vocab_size, config)
        self.length_head = None if config.length == "fill" else LengthHead(config.d_model, config.max_positions)

    def encode_target(self, ids: Tensor, mask: Tensor, draws: RowDraws | None = None) -> Tensor:
        """x_1 of target ids [batch, length] with padding mask [batch, length]: [batch, length, latent_dim]."""
        return self.target_encoder(ids, mask, draws)

    def encode_source(self, ids: Tensor, mask: Tensor, draws: RowDraws | None = None) -> Source:
        """What the flow needs of source ids [batch, length] with padding mask [batch, length]."""
        encoder = self.target_encoder if self.source_encoder is None else self.source_encoder
        return self.flow.source(encoder(ids, mask, draws), mask)

    def forward(
        self, x_t: Tensor, t: Tensor, source: Source, mask: Tensor | None = None, guess: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocities of every expert, and the gate.

        Args:
            x_t: Points on the path, [batch, length, latent_dim].
            t: Times in [0, 1], below 1 with model.prediction=endpoint, [batch].
            source: From `encode_source`.
            mask: True for real target tokens, [batch, length]; None: all are.
            guess: Estimate of x_1 for self-conditioning, shaped like x_t; None: there is none yet.

        Returns:
            Velocities [batch, length, num_experts, latent_dim] and gate logits [batch, length, num_experts].
        """
        step = self.flow.at(t)
        features = self.flow.trunk(x_t, step, source, mask, guess)
        outputs = self.flow.experts(features)
        if self.config.prediction == "endpoint":
            outputs = (outputs - x_t[:, :, None]) / (1 - t)[:, None, None, None]
        return outputs, self.flow.gate(features, source.mean, step.embedding)

    def recompute(self, on: bool) -> None:
        """Whether to compute the blocks' activations again in the backward pass instead of keeping them."""
        for module in (self.target_encoder, self.source_encoder, self.flow):
            if module is not None:
                module.recompute = on

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters; without `embeddings`, token embeddings, positions and the vocabulary head are left out."""
        total = sum(p.numel() for p in self.parameters())
        if embeddings:
            return total
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        return total - tables - sum(p.numel() for p in self.decoder.head.parameters())


@overload
def build_model(config: ModelConfig, vocab_size: int, seed: int) -> YanModel: ...
@overload
def build_model(config: ModelConfig | BaselineConfig, vocab_size: int, seed: int) -> YanModel | Baseline: ...
def build_model(config: ModelConfig | BaselineConfig, vocab_size: int, seed: int) -> YanModel | Baseline:
    """A model with fresh weights that depend on `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, ModelConfig):
            return YanModel(config, vocab_size)
        from yan_core.baselines import build_baseline

        return build_baseline(config, vocab_size)

"""Masked diffusion (LLaDA, MDLM): a bidirectional Transformer that fills masked places, the surest ones first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yan_core.baselines import Baseline
from yan_core.batching import EOS, MASK, Batch
from yan_core.blocks import Attention, RowDropout, feed_forward
from yan_core.config import BaselineConfig
from yan_core.noise import RowDraws, Stream, fold, gumbel, uniform


class _Block(nn.Module):
    """Pre-norm bidirectional Transformer block; unlike `blocks.EncoderBlock` it takes no mask where none is needed."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.d_model)
        self.attention = Attention(config.d_model, config.num_heads, rotary=True)
        self.norm_ffn = nn.LayerNorm(config.d_model)
        self.ffn = feed_forward(config.d_model, 4)
        self.dropout = RowDropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, draws: RowDraws | None = None) -> Tensor:
        """[batch, length, d_model] in and out; mask [batch, length] or None."""
        x = x + self.dropout(self.attention(self.norm_attention(x), mask=mask), draws and draws.at(0))
        return x + self.dropout(self.ffn(self.norm_ffn(x)), draws and draws.at(1))


class MaskedDiffusion(Baseline):
    """A bidirectional Transformer over target and source.

    Source: LLaDA, arXiv:2502.09992 (objective, and unmasking by confidence); MDLM, arXiv:2406.07524. Every step is one
    pass over source and target; nothing is kept between passes, since every token sees every other one.
    """

    def __init__(self, config: BaselineConfig, vocab_size: int, mask_id: int = MASK) -> None:
        """Build it with fresh weights from PyTorch's global generator.

        Args:
            config: Width and depth.
            vocab_size: Number of token ids.
            mask_id: The id that stands for a masked place; it is never an answer.
        """
        super().__init__(config, vocab_size)
        self.mask_id = mask_id
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.part = nn.Embedding(2, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.part.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(
        self, target_ids: Tensor, source_ids: Tensor, source_mask: Tensor | None, draws: RowDraws | None = None
    ) -> Tensor:
        """Logits of the target's tokens: [batch, length, vocab].

        Args:
            target_ids: int64, partly mask_id, [batch, length].
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, [batch, source_length]; None: all are.
            draws: For dropout, in training.
        """
        length = target_ids.shape[1]
        target, source = self.part.weight
        # The target first: padding then stands at the end, and the rotary positions do not depend on it.
        x = torch.cat([self.embedding(target_ids) + target, self.embedding(source_ids) + source], 1)
        mask = None
        if source_mask is not None:
            mask = torch.cat([torch.ones_like(target_ids, dtype=torch.bool), source_mask], 1)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, draws and draws.at(i))
        return self.head(self.norm(x[:, :length]))

    def losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of masked target tokens, divided by the share masked, else 0; nats, [batch, length].

        The share t ~ U(0.001, 1) of a row and its masked places follow from the row's key.

        Args:
            batch: Source and target ids with their masks, [batch, source_length] and [batch, length], and keys [batch].

        Source: LLaDA, arXiv:2502.09992.
        """
        t = 0.001 + 0.999 * uniform(batch.keys, Stream.TIME, (1,))
        masked = (uniform(batch.keys, Stream.CORRUPTION, (batch.target_ids.shape[1],)) < t) & batch.target_mask
        given = batch.target_ids.masked_fill(masked, self.mask_id)
        logits = self(given, batch.source_ids, batch.source_mask, RowDraws(batch.keys))
        cross_entropy = F.cross_entropy(logits.transpose(1, 2).float(), batch.target_ids, reduction="none")
        return cross_entropy * masked / t

    @torch.no_grad()
    def unmask(
        self,
        target_ids: Tensor,
        source_ids: Tensor,
        source_mask: Tensor | None,
        count: int | Tensor,
        never: int | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """One pass: fill those masked places of each row whose likeliest token, or the drawn one, is the likeliest.

        Args:
            target_ids: int64, partly mask_id, [batch, length].
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, [batch, source_length]; None: all are.
            count: Places to fill in each row, or of each row, int64, [batch]; all that are masked where they are fewer.
            never: A token that is not to be written.
            keys: Of each row in this pass, to draw tokens, int64, [batch]; None: the likeliest.

        Returns:
            Target ids with up to `count` fewer masks a row, [batch, length].
        """
        logits = self(target_ids, source_ids, source_mask).float()
        for unwanted in (self.mask_id, never):
            if unwanted is not None:
                logits[..., unwanted] = -torch.inf
        noise = 0.0 if keys is None else gumbel(keys, Stream.TOKEN, tuple(logits.shape[1:]))
        ids = (logits + noise).argmax(-1)
        masked = target_ids == self.mask_id
        chosen = logits.gather(-1, ids[..., None])[..., 0]
        confidence = (chosen - logits.logsumexp(-1)).masked_fill(~masked, -torch.inf)
        rank = confidence.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        most = count[:, None] if isinstance(count, Tensor) else count
        return torch.where(masked & (rank < most), ids, target_ids)

    @torch.no_grad()
    def generate(
        self,
        source_ids: Tensor,
        source_mask: Tensor | None,
        length: int,
        steps: int | None = None,
        lengths: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Target ids in `steps` passes (None: as many as tokens), about equally many tokens a pass: [batch, length].

        Args:
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, [batch, source_length]; None: all are.
            length: Places.
            steps: Passes.
            lengths: Each text's number of tokens, where it is told, [batch]; what is after it is end-of-text.
            keys: See `Baseline.answer`, [batch].

        Raises:
            ValueError: If steps is not in [1, length].
        """
        steps = length if steps is None else steps
        if not 1 <= steps <= length:
            raise ValueError(f"steps must be in [1, length={length}], got {steps}")
        ids = source_ids.new_full((len(source_ids), length), self.mask_id)
        if lengths is not None:
            ids = ids.masked_fill(torch.arange(length, device=ids.device) >= lengths[:, None], EOS)
        never = None if lengths is None else EOS
        masked = (ids == self.mask_id).sum(-1)
        for i in range(steps):
            count = (i + 1) * masked // steps - i * masked // steps
            ids = self.unmask(ids, source_ids, source_mask, count, never, None if keys is None else fold(keys, i))
        return ids

    @torch.no_grad()
    def answer(
        self,
        source_ids: Tensor,
        source_mask: Tensor,
        length: int,
        num_steps: int,
        lengths: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """See `Baseline.answer`, [batch, length]; more steps than places are as many as places."""
        steps = min(num_steps, length)
        return self.generate(source_ids, source_mask, length, steps, lengths, keys), steps

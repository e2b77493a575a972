"""What YAN is measured against: an autoregressive decoder (GPT-2) and masked diffusion (LLaDA, MDLM), of any size.

Both fill `length` places after a source and have a loss, so that they can be trained on the same batches as YAN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yan_core.batching import EOS, MASK, Batch
from yan_core.blocks import Attention, feed_forward
from yan_core.noise import Stream, uniform

if TYPE_CHECKING:
    from transformers import StaticCache


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Width and depth of a plain Transformer: attention of 4 and a feed-forward layer of 8 d_model^2 weights a block.

    Attributes:
        d_model: Width.
        num_blocks: Depth.
        num_heads: Attention heads.
    """

    d_model: int
    num_blocks: int
    num_heads: int

    @property
    def num_parameters(self) -> int:
        """Weights of the blocks: embeddings, biases and norms left out."""
        return 12 * self.num_blocks * self.d_model**2

    @staticmethod
    def of_size(num_parameters: int) -> DecoderShape:
        """The shape within 5 % of so many parameters whose width is nearest to 64 times its depth, as in GPT-2 small.

        Heads are 64 wide, or the width is a multiple of 8 and there is one head where the model is tiny.
        """
        step = 64 if num_parameters >= 1e6 else 8

        def nearest(blocks: int) -> DecoderShape:
            width = max(step, step * round(math.sqrt(num_parameters / (12 * blocks)) / step))
            return DecoderShape(d_model=width, num_blocks=blocks, num_heads=max(1, width // 64))

        shapes = [nearest(blocks) for blocks in range(1, 65)]
        error = {shape: abs(shape.num_parameters / num_parameters - 1) for shape in shapes}
        close = [shape for shape in shapes if error[shape] <= max(0.05, min(error.values()))]
        return min(close, key=lambda shape: abs(math.log(shape.d_model / (64 * shape.num_blocks))))


class ARDecoder(nn.Module):
    """GPT-2 by `transformers`: the source, then the target, one token a pass."""

    def __init__(self, shape: DecoderShape, vocab_size: int, max_positions: int) -> None:
        """Build it with fresh weights from PyTorch's global generator.

        Args:
            shape: Width and depth.
            vocab_size: Number of token ids.
            max_positions: Longest source and target together.

        Raises:
            ImportError: If `transformers` is not installed.
        """
        super().__init__()
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            remedy = "in the folder of YAN's pyproject.toml: pip install -e '.[baselines]'"
            raise ImportError(f"the autoregressive baseline needs transformers; {remedy}") from error

        self.gpt2: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=max_positions,
                n_embd=shape.d_model,
                n_layer=shape.num_blocks,
                n_head=shape.num_heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=EOS,
                eos_token_id=EOS,
            )
        )

    def forward(self, source_ids: Tensor, source_mask: Tensor | None, target_ids: Tensor) -> Tensor:
        """Logits of each target token from the source and the target before it: [batch, length, vocab].

        Args:
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, which come first, [batch, source_length]; None: all are.
            target_ids: int64, [batch, length].
        """
        before = target_ids[:, :-1]
        ids, mask, positions = source_ids, None, None
        if source_mask is not None:
            ids, mask = pad_left(source_ids, source_mask)
            mask = torch.cat([mask, torch.ones_like(before, dtype=torch.bool)], 1)
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        ids = torch.cat([ids, before], 1)
        return self.gpt2(
            ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=target_ids.shape[1]
        ).logits

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the target's tokens, nats a token, a scalar.

        Args:
            batch: Source and target ids with their masks, [batch, source_length] and [batch, length].
        """
        logits = self(batch.source_ids, batch.source_mask, batch.target_ids)
        cross_entropy = F.cross_entropy(logits.transpose(1, 2).float(), batch.target_ids, reduction="none")
        return (cross_entropy * batch.target_mask).sum() / batch.target_mask.sum().clamp_min(1)

    @torch.no_grad()
    def generate(self, source_ids: Tensor, source_mask: Tensor | None, length: int) -> Tensor:
        """Greedy target ids with a cache of keys and values, all `length` of them: [batch, length].

        Args:
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, which come first, [batch, source_length]; None: all are.
            length: Tokens to generate; the text ends at the first end-of-text token.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.gpt2.config)
        ids, mask, positions = source_ids, None, None
        if source_mask is not None:
            ids, mask = pad_left(source_ids, source_mask)
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        out: list[Tensor] = []
        for _ in range(length):
            ids = self.advance(ids, cache, mask, positions)
            out.append(ids)
            if mask is not None and positions is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                positions = positions[:, -1:] + 1
        return torch.cat(out, 1)

    def advance(self, ids: Tensor, cache: Any, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Read ids [batch, new] after what the cache holds, and give the likeliest next one: [batch, 1].

        Args:
            ids: int64, [batch, new].
            cache: Of `transformers`; it is added to.
            mask: True for real tokens among the cached and new ones, [batch, cached + new]; None: all are.
            positions: Positions of the new ids, [batch, new]; None: they follow the cached ones.
        """
        out = self.gpt2(
            ids, past_key_values=cache, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def static_cache(self, batch: int, positions: int) -> StaticCache:
        """An allocated cache of fixed size, whose steps can be compiled and captured."""
        from transformers import StaticCache

        config, weight = self.gpt2.config, self.gpt2.lm_head.weight
        cache = StaticCache(config=config, max_cache_len=positions)
        cache.early_initialization(batch, config.n_head, config.n_embd // config.n_head, weight.dtype, weight.device)
        return cache


def pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of ids and mask, both [batch, length], from behind the real tokens to before them."""
    length = ids.shape[1]
    index = (torch.arange(length, device=ids.device) + mask.sum(-1, keepdim=True)) % length
    return ids.gather(1, index), mask.gather(1, index)


class _Block(nn.Module):
    """Pre-norm bidirectional Transformer block; unlike `blocks.EncoderBlock` it takes no mask where none is needed."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(d_model)
        self.attention = Attention(d_model, num_heads, rotary=True)
        self.norm_ffn = nn.LayerNorm(d_model)
        self.ffn = feed_forward(d_model, 4)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[batch, length, d_model] in and out; mask [batch, length] or None."""
        x = x + self.attention(self.norm_attention(x), mask=mask)
        return x + self.ffn(self.norm_ffn(x))


class MaskedDiffusion(nn.Module):
    """A bidirectional Transformer that fills masked places, the surest ones first.

    Source: LLaDA, arXiv:2502.09992 (objective, and unmasking by confidence); MDLM, arXiv:2406.07524. Every step is one
    pass over source and target; nothing is kept between passes, since every token sees every other one.
    """

    def __init__(self, shape: DecoderShape, vocab_size: int, mask_id: int = MASK) -> None:
        """Build it with fresh weights from PyTorch's global generator.

        Args:
            shape: Width and depth.
            vocab_size: Number of token ids.
            mask_id: The id that stands for a masked place; it is never an answer.
        """
        super().__init__()
        self.mask_id = mask_id
        self.embedding = nn.Embedding(vocab_size, shape.d_model)
        self.part = nn.Embedding(2, shape.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.part.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(shape.d_model, shape.num_heads) for _ in range(shape.num_blocks))
        self.norm = nn.LayerNorm(shape.d_model)
        self.head = nn.Linear(shape.d_model, vocab_size, bias=False)

    def forward(self, target_ids: Tensor, source_ids: Tensor, source_mask: Tensor | None) -> Tensor:
        """Logits of the target's tokens: [batch, length, vocab].

        Args:
            target_ids: int64, partly mask_id, [batch, length].
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, [batch, source_length]; None: all are.
        """
        length = target_ids.shape[1]
        target, source = self.part.weight
        # The target first: padding then stands at the end, and the rotary positions do not depend on it.
        x = torch.cat([self.embedding(target_ids) + target, self.embedding(source_ids) + source], 1)
        mask = None
        if source_mask is not None:
            mask = torch.cat([torch.ones_like(target_ids, dtype=torch.bool), source_mask], 1)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, :length]))

    def loss(self, batch: Batch) -> Tensor:
        """Cross-entropy of masked target tokens, divided by the share masked, nats a target token, a scalar.

        The share t ~ U(0.001, 1) of a row and its masked places follow from the row's key.

        Args:
            batch: Source and target ids with their masks, [batch, source_length] and [batch, length], and keys [batch].

        Source: LLaDA, arXiv:2502.09992.
        """
        t = 0.001 + 0.999 * uniform(batch.keys, Stream.TIME, (1,))
        masked = (uniform(batch.keys, Stream.CORRUPTION, (batch.target_ids.shape[1],)) < t) & batch.target_mask
        logits = self(batch.target_ids.masked_fill(masked, self.mask_id), batch.source_ids, batch.source_mask)
        cross_entropy = F.cross_entropy(logits.transpose(1, 2).float(), batch.target_ids, reduction="none")
        return (cross_entropy * masked / t).sum() / batch.target_mask.sum().clamp_min(1)

    @torch.no_grad()
    def unmask(self, target_ids: Tensor, source_ids: Tensor, source_mask: Tensor | None, count: int) -> Tensor:
        """One pass: fill those masked places of each row whose likeliest token is the likeliest.

        Args:
            target_ids: int64, partly mask_id, [batch, length].
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, [batch, source_length]; None: all are.
            count: Places to fill in each row, at most as many as are masked.

        Returns:
            Target ids with `count` fewer masks a row, [batch, length].
        """
        logits = self(target_ids, source_ids, source_mask).float()
        logits[..., self.mask_id] = -torch.inf
        best, ids = logits.max(-1)
        confidence = (best - logits.logsumexp(-1)).masked_fill(target_ids != self.mask_id, -torch.inf)
        places = confidence.topk(count, dim=-1).indices
        return target_ids.scatter(1, places, ids.gather(1, places))

    @torch.no_grad()
    def generate(self, source_ids: Tensor, source_mask: Tensor | None, length: int, steps: int | None = None) -> Tensor:
        """Target ids in `steps` passes (None: as many as tokens), about equally many tokens a pass: [batch, length].

        Raises:
            ValueError: If steps is not in [1, length].
        """
        steps = length if steps is None else steps
        if not 1 <= steps <= length:
            raise ValueError(f"steps must be in [1, length={length}], got {steps}")
        ids = source_ids.new_full((len(source_ids), length), self.mask_id)
        for i in range(steps):
            ids = self.unmask(ids, source_ids, source_mask, (i + 1) * length // steps - i * length // steps)
        return ids

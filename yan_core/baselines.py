"""What YAN is measured against: GPT-2, BART and masked diffusion (masked_diffusion.py), of any size.

Each is trained on the same batches as YAN, and fills the same places after a source.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yan_core.batching import EOS, PAD, Batch
from yan_core.config import BaselineConfig, SamplingConfig
from yan_core.noise import Stream, fold, gumbel

if TYPE_CHECKING:
    from transformers import StaticCache


class Baseline(nn.Module, ABC):
    """A model that answers sources by its own means."""

    def __init__(self, config: BaselineConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size

    @abstractmethod
    def losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of each target token, nats, [batch, length], at padding without meaning.

        Args:
            batch: Source and target ids with their masks, [batch, source_length] and [batch, length], and keys [batch].
        """

    @abstractmethod
    def answer(
        self,
        source_ids: Tensor,
        source_mask: Tensor,
        length: int,
        num_steps: int,
        lengths: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Target ids [batch, length] and the passes they took; a text ends at its first end-of-text token.

        Args:
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, which come first, [batch, source_length].
            length: Most tokens of an answer.
            num_steps: Passes of a model that may choose them; the others take one a token.
            lengths: Each answer's number of tokens, where it is told, int64, [batch].
            keys: Of each row, to draw each token from its distribution, int64, [batch]; None: greedy, the likeliest. Of
                what masked diffusion draws it keeps the surest, pass by pass, so that over several passes the likelier
                come more often than they would.
        """

    def num_parameters(self, embeddings: bool = True) -> int:
        """Parameters; without `embeddings`, token embeddings, positions and the vocabulary head are left out."""
        total = sum(p.numel() for p in self.parameters())
        if embeddings:
            return total
        tables = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Embedding))
        heads = [m for m in self.modules() if isinstance(m, nn.Linear) and m.out_features == self.vocab_size]
        return total - tables - sum(p.numel() for head in heads for p in head.parameters())


def build_baseline(config: BaselineConfig, vocab_size: int) -> Baseline:
    """A baseline with fresh weights from PyTorch's global generator.

    Raises:
        ImportError: If it needs `transformers` and that is not installed.
    """
    if config.family == "masked_diffusion":
        from yan_core.masked_diffusion import MaskedDiffusion

        return MaskedDiffusion(config, vocab_size)
    return (ARDecoder if config.family == "ar" else EncoderDecoder)(config, vocab_size)


def beyond_baselines(sampling: SamplingConfig) -> list[str]:
    """Names of the settings that are for YAN alone; a ranking of one answer asks for nothing."""
    own, usual = vars(sampling), SamplingConfig()
    return [f.name for f in fields(usual) if f.name != "ranking" and own[f.name] != getattr(usual, f.name)]


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        remedy = "in the folder of YAN's pyproject.toml: pip install -e '.[baselines]'"
        raise ImportError(f"the autoregressive baselines need transformers; {remedy}") from error


def _attend_plainly(model: Any, plainly: bool) -> None:
    """Plain attention to train on a CPU, as YAN does, whose operations PyTorch can count; the fused one elsewhere."""
    wanted = "eager" if plainly else "sdpa"
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)


def next_token(logits: Tensor, place: int, lengths: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
    """The token at a place, likeliest or drawn, int64, [batch, 1].

    Args:
        logits: [batch, vocab].
        place: Of the token in its text.
        lengths: Each text's number of tokens, where it is told, [batch]: the end of text is there and nowhere else.
        keys: See `Baseline.answer`, [batch].
    """
    if lengths is not None:
        over = (place >= lengths)[:, None]
        is_end = torch.arange(logits.shape[-1], device=logits.device) == EOS
        logits = logits.masked_fill(is_end != over, -torch.inf)
    if keys is not None:
        logits = logits.float() + gumbel(fold(keys, place), Stream.TOKEN, (logits.shape[-1],))
    return logits.argmax(-1, keepdim=True)


class ARDecoder(Baseline):
    """GPT-2 by `transformers`: the source, then the target, one token a pass."""

    def __init__(self, config: BaselineConfig, vocab_size: int) -> None:
        """Build it with fresh weights from PyTorch's global generator.

        Args:
            config: Width, depth, longest source and target together.
            vocab_size: Number of token ids.

        Raises:
            ImportError: If `transformers` is not installed.
        """
        super().__init__(config, vocab_size)
        transformers = _transformers()
        self.gpt2: Any = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocab_size,
                n_positions=config.max_positions,
                n_embd=config.d_model,
                n_layer=config.num_blocks,
                n_head=config.num_heads,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=0.0,
                bos_token_id=EOS,
                eos_token_id=EOS,
                tie_word_embeddings=False,  # YAN has a head of its own too
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
        ids, mask, positions = self.prompt(source_ids, source_mask)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(before, dtype=torch.bool)], 1)
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        ids = torch.cat([ids, before], 1)
        return self.gpt2(
            ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=target_ids.shape[1]
        ).logits

    @staticmethod
    def prompt(source_ids: Tensor, source_mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The source and an end-of-text token, which tells it from the target, with the padding before them.

        Args:
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, which come first, [batch, source_length]; None: all are.

        Returns:
            Ids, their mask and positions, [batch, source_length + 1]; None where there was no mask.
        """
        end = torch.full_like(source_ids[:, :1], EOS)
        if source_mask is None:
            return torch.cat([source_ids, end], 1), None, None
        ids, mask = pad_left(source_ids, source_mask)
        mask = torch.cat([mask, torch.ones_like(end, dtype=torch.bool)], 1)
        return torch.cat([ids, end], 1), mask, (mask.long().cumsum(-1) - 1).clamp_min(0)

    def losses(self, batch: Batch) -> Tensor:
        """See `Baseline.losses`, [batch, length]."""
        _attend_plainly(self.gpt2, not batch.source_ids.is_cuda)
        logits = self(batch.source_ids, batch.source_mask, batch.target_ids)
        return F.cross_entropy(logits.transpose(1, 2).float(), batch.target_ids, reduction="none")

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
        """See `Baseline.answer`, [batch, length]; it stops when all texts of the batch have ended."""
        ids = self.generate(source_ids, source_mask, length, lengths, to_the_end=False, keys=keys)
        return F.pad(ids, (0, length - ids.shape[1]), value=EOS), ids.shape[1]

    @torch.no_grad()
    def generate(
        self,
        source_ids: Tensor,
        source_mask: Tensor | None,
        length: int,
        lengths: Tensor | None = None,
        to_the_end: bool = True,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Target ids with a cache of keys and values: [batch, length].

        Args:
            source_ids: int64, [batch, source_length].
            source_mask: True for real tokens, which come first, [batch, source_length]; None: all are.
            length: Tokens to generate; the text ends at the first end-of-text token.
            lengths: Each text's own number of tokens, where it is told, int64, [batch].
            to_the_end: Whether to go on when all texts have ended; else there may be fewer tokens.
            keys: See `Baseline.answer`, [batch].
        """
        _attend_plainly(self.gpt2, False)
        cache = _transformers().DynamicCache(config=self.gpt2.config)
        ids, mask, positions = self.prompt(source_ids, source_mask)
        out: list[Tensor] = []
        ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for place in range(length):
            ids = self.advance(ids, cache, mask, positions, place, lengths, keys)
            out.append(ids)
            ended |= ids == EOS
            if not to_the_end and bool(ended.all()):
                break
            if mask is not None and positions is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                positions = positions[:, -1:] + 1
        return torch.cat(out, 1)

    def advance(
        self,
        ids: Tensor,
        cache: Any,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        place: int = 0,
        lengths: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Read ids [batch, new] after what the cache holds, and give the next one: [batch, 1].

        Args:
            ids: int64, [batch, new].
            cache: Of `transformers`; it is added to.
            mask: True for real tokens among the cached and new ones, [batch, cached + new]; None: all are.
            positions: Positions of the new ids, [batch, new]; None: they follow the cached ones.
            place: Of the next token in its text; it matters where lengths are told or tokens drawn.
            lengths: Each text's number of tokens, where it is told, [batch].
            keys: See `Baseline.answer`, [batch].
        """
        out = self.gpt2(
            ids, past_key_values=cache, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
        )
        return next_token(out.logits[:, -1], place, lengths, keys)

    def static_cache(self, batch: int, positions: int) -> StaticCache:
        """An allocated cache of fixed size, whose steps can be compiled and captured."""
        config, weight = self.gpt2.config, self.gpt2.lm_head.weight
        cache = _transformers().StaticCache(config=config, max_cache_len=positions)
        cache.early_initialization(batch, config.n_head, config.n_embd // config.n_head, weight.dtype, weight.device)
        return cache


class EncoderDecoder(Baseline):
    """BART by `transformers`: the source read in both directions, the target one token a pass."""

    def __init__(self, config: BaselineConfig, vocab_size: int) -> None:
        """Build it with fresh weights from PyTorch's global generator.

        Args:
            config: Width, depth of each half, longest source or target.
            vocab_size: Number of token ids.

        Raises:
            ImportError: If `transformers` is not installed.
        """
        super().__init__(config, vocab_size)
        transformers = _transformers()
        halves = {
            f"{half}_{name}": value
            for half in ("encoder", "decoder")
            for name, value in (
                ("layers", config.num_blocks),
                ("attention_heads", config.num_heads),
                ("ffn_dim", 4 * config.d_model),
            )
        }
        self.bart: Any = transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=vocab_size,
                max_position_embeddings=config.max_positions,
                d_model=config.d_model,
                dropout=config.dropout,
                pad_token_id=PAD,
                bos_token_id=EOS,
                eos_token_id=EOS,
                decoder_start_token_id=EOS,
                forced_eos_token_id=None,
                tie_word_embeddings=False,  # YAN has a head and a source encoder of its own too
                **halves,
            )
        )
        del self.bart.model.shared  # encoder and decoder have tables of their own

    def losses(self, batch: Batch) -> Tensor:
        """See `Baseline.losses`, [batch, length]."""
        _attend_plainly(self.bart, not batch.source_ids.is_cuda)
        before = F.pad(batch.target_ids[:, :-1], (1, 0), value=EOS)
        logits = self.bart(
            batch.source_ids, attention_mask=batch.source_mask.long(), decoder_input_ids=before, use_cache=False
        ).logits
        return F.cross_entropy(logits.transpose(1, 2).float(), batch.target_ids, reduction="none")

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
        """See `Baseline.answer`, [batch, length]; it stops when all texts of the batch have ended."""
        _attend_plainly(self.bart, False)
        transformers, config = _transformers(), self.bart.config
        mask = source_mask.long()
        encoded = self.bart.get_encoder()(source_ids, attention_mask=mask, return_dict=True)
        own, cross = transformers.DynamicCache(config=config), transformers.DynamicCache(config=config)
        cache = transformers.EncoderDecoderCache(own, cross)
        ids = torch.full_like(source_ids[:, :1], EOS)
        out: list[Tensor] = []
        ended = torch.zeros_like(ids, dtype=torch.bool)
        while len(out) < length and not bool(ended.all()):
            logits = self.bart(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            ids = next_token(logits, len(out), lengths, keys)
            out.append(ids)
            ended |= ids == EOS
        return F.pad(torch.cat(out, 1), (0, length - len(out)), value=EOS), len(out)


def pad_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding of ids [batch, length] and mask [batch, length] from behind the real tokens to before them."""
    length = ids.shape[1]
    index = (torch.arange(length, device=ids.device) + mask.sum(-1, keepdim=True)) % length
    return ids.gather(1, index), mask.gather(1, index)

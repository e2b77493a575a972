"""A small model and small batches for tests. Nothing here leans on a default or on the initialisation."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from yan_core.batching import Batch, autoencoder_batch, task_batch
from yan_core.config import AutoencoderLossConfig, EncoderConfig, FlowLossConfig, ModelConfig
from yan_core.model import YanModel, build_model
from yan_core.noise import Stream, normal, uniform
from yan_core.path import beta_times
from yan_core.tokenization import Tokenizer

VOCAB = 29
LENGTH = 9
SCOPES = ("token", "segment", "sequence")

CONFIG = ModelConfig(
    d_model=16,
    num_heads=2,
    ffn_multiple=2,
    dropout=0.0,
    max_positions=40,
    target_encoder=EncoderConfig(num_blocks=1, positions=("rotary", "start")),
    source_encoder=EncoderConfig(num_blocks=1, conv_kernel=3, positions=("rotary", "start", "end")),
    share_encoder=False,
    decoder_blocks=1,
    flow_blocks=2,
    cross_attention_every=1,
    num_experts=3,
    expert_scope="sequence",
    segment_length=4,
    gate_temperature=1.0,
    init_noise=1.0,
)

LOSS = FlowLossConfig(
    fill_weight=1.0,
    sigma=1.0,
    likelihood="joint",
    expert_draw="posterior",
    time_alpha=1.0,
    time_beta=1.0,
    weight_flow=1.0,
    weight_end=1.0,
    weight_ce=1.0,
    weight_gate=0.0,
    weight_balance=0.01,
    weight_entropy=0.0,
    source_mask_share=0.0,
)
STAGE_1 = AutoencoderLossConfig(latent_noise=0.5, clean_share=0.3, weight_l2=0.1, weight_mmd=0.2, mmd_tokens=12)


def tiny_config(**changes: Any) -> ModelConfig:
    """CONFIG with changes."""
    return replace(CONFIG, **changes)


def randomize(model: YanModel, seed: int = 0) -> YanModel:
    """Give every parameter a random value, so that no zero of an initialisation hides a mistake.

    Cross-attention and experts get large ones: an answer that hardly depends on its source, but on the noise alone,
    would hide mistakes in reading the source.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        fan_in = parameter.shape[-2] if parameter.ndim == 3 else parameter.shape[-1]
        std = 0.3 if parameter.ndim == 1 else fan_in**-0.5
        if parameter.ndim > 1 and ("cross_attention" in name or "experts" in name):
            std *= 3
        with torch.no_grad():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_model(seed: int = 0, **changes: Any) -> YanModel:
    """A random model of CONFIG with changes, in evaluation mode."""
    return randomize(build_model(tiny_config(**changes), VOCAB, seed), seed).eval()


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Rows of ordinary token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def tiny_batch(rows: int = 4, seed: int = 0, loss: FlowLossConfig = LOSS) -> Batch:
    """Pairs of different lengths, targets filled to LENGTH."""
    sources = random_rows([3 + (5 * i) % 8 for i in range(rows)], seed)
    targets = random_rows([1 + (3 * i) % (LENGTH - 1) for i in range(rows)], seed + 1)
    return task_batch(sources, targets, torch.arange(rows) + 100 * seed, loss, LENGTH)


def row_of(batch: Batch, i: int) -> Batch:
    """One row of a batch as a batch of its own."""
    return Batch(**{name: value[i : i + 1] for name, value in vars(batch).items()})


def pad_right(ids: Tensor, mask: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """The same rows with more padding."""
    fill = torch.full((len(ids), extra), Tokenizer.pad_id)
    return torch.cat([ids, fill], 1), torch.cat([mask, torch.zeros_like(fill, dtype=torch.bool)], 1)


def partly_masked(batch: Batch) -> Batch:
    """The batch with some target places that do not count."""
    lengths = torch.tensor([LENGTH, 4, 6, 1]).repeat(len(batch.keys) // 4)[:, None]
    return replace(batch, target_mask=torch.arange(LENGTH) < lengths)


def scopes_of(scope: str) -> list[slice]:
    width = {"token": 1, "segment": 4, "sequence": LENGTH}[scope]
    return [slice(i, min(i + width, LENGTH)) for i in range(0, LENGTH, width)]


def drawn(model: YanModel, batch: Batch, config: FlowLossConfig) -> tuple[torch.Tensor, ...]:
    """x_0, x_1, t, x_t, u_t, written out."""
    x_1 = model.encode_target(batch.target_ids, batch.target_mask)
    x_0 = model.config.init_noise * normal(batch.keys, Stream.SOURCE_NOISE, tuple(x_1.shape[1:]))
    t = beta_times(uniform(batch.keys, Stream.TIME, ()), config.time_alpha, config.time_beta)
    return x_0, x_1, t, (1 - t)[:, None, None] * x_0 + t[:, None, None] * x_1, x_1 - x_0


def autoencoder_rows() -> Batch:
    return autoencoder_batch(random_rows([7, 3, 5, 1]), torch.arange(4), STAGE_1)

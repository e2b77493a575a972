"""The ways to write a text that `pipelines.benchmarks.sampler` times, and the least work that each must do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from yan_core.baselines import ARDecoder
from yan_core.config import NUM_STEPS, BaselineConfig, ModelConfig, RunConfig, from_dict
from yan_core.graphs import captured
from yan_core.masked_diffusion import MaskedDiffusion
from yan_core.model import YanModel, build_model
from yan_core.noise import Stream, fold, normal, uniform
from yan_core.sampler import sample

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = ("5m", "50m", "200m")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLADA_8B = BaselineConfig(d_model=4096, num_blocks=32, num_heads=32)
"""LLaDA's width and depth (arXiv:2502.09992). Our blocks hold 6.4B parameters where its gated ones hold 7.0B, so this
opponent is about 8 % faster than the real one."""
LLADA_VOCAB = 126_464

OURS = ("ours", "ours compiled", "ours graph", "ours compiled graph")
CONTESTANTS = ("naive", *OURS, "AR", "AR compiled", "MDM", "MDM compiled", "LLaDA 8B shape")
GPU_ONLY = ("ours graph", "ours compiled graph", "AR compiled", "LLaDA 8B shape")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One block of the table: a model and the requests it gets.

    Attributes:
        size: Name of the size.
        model: Architecture.
        vocab_size: Token ids.
        batch: Requests at once.
        length: Tokens to generate a request.
        source_length: Tokens of each source.
        num_steps: Euler steps of ours.
        precision: `fp32` or `bf16`.
        device: Where it runs.
    """

    size: str
    model: ModelConfig
    vocab_size: int
    batch: int
    length: int
    source_length: int = 128
    num_steps: int = NUM_STEPS
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return PRECISIONS[self.precision]


# --- contestants ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive(
    model: YanModel, source_ids: Tensor, source_mask: Tensor, length: int, seeds: Tensor, num_steps: int = NUM_STEPS
) -> tuple[Tensor, Tensor]:
    """The sampler without its savings: ids and experts as `yan_core.sampler.sample` gives them, same arguments.

    A gate pass of its own and then `num_steps` Euler steps; the source projected to keys and values anew, times
    embedded for every row, and all K heads computed, at every pass; logits of every token at once. The source is
    encoded once, as any sampler would do.
    """
    config, batch, device = model.config, len(source_ids), source_ids.device
    encoder = model.target_encoder if model.source_encoder is None else model.source_encoder
    latents = encoder(source_ids, source_mask)
    dtype = next(model.parameters()).dtype
    keys = fold(seeds.to(device), 0)
    grid = torch.linspace(0, 1, num_steps + 1, device=device)
    x = config.init_noise * normal(keys, Stream.SOURCE_NOISE, (length, config.d_model))
    x = x.to(dtype)  # [batch, length, d_model]

    _, gate = model(x, grid[0].expand(batch), model.flow.source(latents, source_mask))
    width = {"token": 1, "segment": config.segment_length, "sequence": length}[config.expert_scope]
    scopes = torch.stack([part.mean(1) for part in gate.split(width, dim=1)], dim=1)  # [batch, scopes, num_experts]
    cumulative = scopes.float().softmax(-1).cumsum(-1)
    draws = uniform(keys, Stream.EXPERT, (scopes.shape[1],))
    drawn = (cumulative < draws[..., None]).sum(-1).clamp_max(config.num_experts - 1)
    expert = drawn.repeat_interleave(width, dim=1)[:, :length]  # [batch, length]

    index = expert[:, :, None, None].expand(-1, -1, 1, config.d_model)
    for t in grid[:-1]:
        velocities, _ = model(x, t.expand(batch), model.flow.source(latents, source_mask))
        x = x + velocities.gather(2, index).squeeze(2) / num_steps
    return model.decoder(x).argmax(-1), expert


def size_config(size: str) -> RunConfig:
    """The shipped config `size_<size>.yaml`."""
    return from_dict(RunConfig, yaml.safe_load((CONFIGS / f"size_{size}.yaml").read_text()))


def _fresh(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> Any:
    """A model made on its device: the 8B one would take minutes and twice the memory by way of the CPU."""
    with torch.device("meta"):
        model = build()
    model = model.to(dtype).to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=1)
def yan_model(config: ModelConfig, vocab_size: int, device: str, dtype: torch.dtype) -> YanModel:
    """Ours, with the weights of seed 0."""
    return build_model(config, vocab_size, seed=0).to(device, dtype).eval().requires_grad_(False)


@lru_cache(maxsize=1)
def ar_model(num_parameters: int, vocab_size: int, positions: int, device: str, dtype: torch.dtype) -> ARDecoder:
    """A GPT-2 of about that many parameters without embeddings."""
    model = ARDecoder(BaselineConfig.of_size(num_parameters, max_positions=positions), vocab_size)
    return model.to(device, dtype).eval().requires_grad_(False)


@lru_cache(maxsize=2)
def mdm_model(shape: BaselineConfig, vocab_size: int, device: str, dtype: torch.dtype) -> MaskedDiffusion:
    """Masked diffusion of a shape."""
    return _fresh(lambda: MaskedDiffusion(shape, vocab_size), device, dtype)


@lru_cache(maxsize=8)
def parameters_of(config: ModelConfig, vocab_size: int) -> int:
    """Ours, without embeddings, positions and vocabulary head."""
    with torch.device("meta"):
        return YanModel(config, vocab_size).num_parameters(embeddings=False)


def contestant(name: str, cell: Cell, passes: int | None = None) -> Callable[[], Tensor]:
    """A call that answers the cell's requests: token ids [batch, length].

    Args:
        name: One of CONTESTANTS.
        cell: Model and requests.
        passes: Masked diffusion: stop after so many of its `length` equal passes.
    """
    generator = torch.Generator().manual_seed(0)
    source_ids = torch.randint(4, cell.vocab_size, (cell.batch, cell.source_length), generator=generator)
    source_ids = source_ids.to(cell.device)
    if name == "naive" or name in OURS:
        return _yan(name, cell, source_ids)
    if name.startswith("AR"):
        size = parameters_of(cell.model, cell.vocab_size)
        positions = 1 + cell.source_length + max(cell.model.max_positions, cell.length)
        decoder = ar_model(size, cell.vocab_size, positions, cell.device, cell.dtype)
        if name == "AR compiled":
            return _ar_compiled(decoder, source_ids, cell.length)
        return lambda: decoder.generate(source_ids, None, cell.length)
    diffusion = mdm_model(*_mdm_shape(name, cell), cell.device, cell.dtype)
    start = source_ids.new_full((cell.batch, cell.length), diffusion.mask_id)
    unmask = diffusion.unmask if name == "MDM" else torch.compile(diffusion.unmask, dynamic=False)

    def one_pass(ids: Tensor, source: Tensor) -> Tensor:
        return unmask(ids, source, None, 1)

    step = one_pass if name == "MDM" else captured(one_pass, (start, source_ids))

    def all_passes() -> Tensor:
        ids = start
        for _ in range(passes or cell.length):
            ids = step(ids, source_ids)
        return ids

    return all_passes


def _yan(name: str, cell: Cell, source_ids: Tensor) -> Callable[[], Tensor]:
    model = yan_model(cell.model, cell.vocab_size, cell.device, cell.dtype)
    inputs = (source_ids, torch.ones_like(source_ids, dtype=torch.bool), torch.arange(cell.batch, device=cell.device))

    def ids(source_ids: Tensor, source_mask: Tensor, seeds: Tensor) -> Tensor:
        if name == "naive":
            return naive(model, source_ids, source_mask, cell.length, seeds, cell.num_steps)[0]
        return sample(model, source_ids, source_mask, cell.length, seeds, cell.num_steps).ids

    call = ids
    if name == "ours compiled" and cell.device != "cpu":
        call = torch.compile(ids, dynamic=False, mode="reduce-overhead")
    elif "compiled" in name:
        call = torch.compile(ids, dynamic=False)
    if "graph" in name:
        call = captured(call, inputs)
    return lambda: call(*inputs)


def _ar_compiled(decoder: ARDecoder, source_ids: Tensor, length: int) -> Callable[[], Tensor]:
    """Static cache; the reading of the source and the step compiled, and each a CUDA graph."""
    source_ids, _, _ = decoder.prompt(source_ids, None)
    batch, source_length = source_ids.shape
    cache = decoder.static_cache(batch, source_length + max(length, 8))  # capturing takes a few steps
    advance = torch.compile(decoder.advance, dynamic=False)

    def read(ids: Tensor) -> Tensor:
        cache.reset()
        return advance(ids, cache)

    reading = captured(read, (source_ids,))
    step = captured(lambda ids: advance(ids, cache), (source_ids[:, :1],))
    out = source_ids.new_empty(batch, length)

    @torch.no_grad()
    def generate() -> Tensor:
        ids = reading(source_ids)
        out[:, :1] = ids
        for i in range(1, length):
            ids = step(ids)
            out[:, i : i + 1] = ids
        return out

    return generate


def _mdm_shape(name: str, cell: Cell) -> tuple[BaselineConfig, int]:
    if name == "LLaDA 8B shape":
        return LLADA_8B, LLADA_VOCAB
    return BaselineConfig.of_size(parameters_of(cell.model, cell.vocab_size)), cell.vocab_size


# --- what must be done at least ---------------------------------------------------------------------------------------


def yan_work(cell: Cell, trunk_passes: int, projections: int, heads: int, weight_heads: int) -> tuple[int, int]:
    """Bytes of weights and floating-point operations of one call; what depends on the grid of times alone is left out.

    Args:
        cell: Model and requests.
        trunk_passes: Passes of the trunk, each with the heads.
        projections: Times that the source's latents become keys and values.
        heads: Expert heads computed for each token.
        weight_heads: Expert heads whose weights are read at each pass.
    """
    c, d = cell.model, cell.model.d_model
    ffn, block = 2 * c.ffn_multiple, 4 + 2 * c.ffn_multiple  # weights in units of d * d, as all that follow
    encoder_blocks = (c.target_encoder if c.share_encoder else c.source_encoder).num_blocks
    cross = math.ceil(c.flow_blocks / c.cross_attention_every)
    source, trunk = encoder_blocks * block + projections * 2 * cross, c.flow_blocks * block + 2 * cross
    gate, decoder = 1, c.decoder_blocks * ffn + cell.vocab_size / d  # the gate's other inputs: one vector a row
    weights = source + trunk_passes * (trunk + weight_heads * ffn) + gate + decoder
    source_tokens, tokens = cell.batch * cell.source_length, cell.batch * cell.length
    linear = source * source_tokens
    linear += (trunk_passes * (trunk + heads * ffn) + gate + decoder) * tokens
    attention = encoder_blocks * source_tokens * cell.source_length
    attention += trunk_passes * tokens * (c.flow_blocks * cell.length + cross * cell.source_length)
    return int(weights * d * d * cell.dtype.itemsize), int(2 * linear * d * d + 4 * attention * d)


def work(name: str, cell: Cell) -> tuple[int, int]:
    """Bytes of weights and operations of one call of a contestant (masked diffusion: of one of its passes)."""
    c = cell.model
    if name == "naive":
        return yan_work(cell, cell.num_steps + 1, cell.num_steps + 1, c.num_experts, c.num_experts)
    if name in OURS:
        one_draw = cell.batch == 1 and c.expert_scope == "sequence"
        return yan_work(cell, cell.num_steps, 1, 1, 1 if one_draw else c.num_experts)
    shape, vocab = _mdm_shape(name, cell)
    weights = shape.num_parameters + vocab * shape.d_model
    seen = cell.batch * (cell.source_length + cell.length)
    flops = 2 * shape.num_parameters * seen + 2 * cell.batch * cell.length * vocab * shape.d_model
    passes = cell.length if name.startswith("AR") else 1
    if passes == 1:
        flops += 4 * seen * (cell.source_length + cell.length) * shape.d_model * shape.num_blocks
    return passes * weights * cell.dtype.itemsize, flops

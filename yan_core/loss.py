"""The two objectives: denoising autoencoder (stage 1) and mixture-of-experts flow matching (stages 2 and 3).

Source: arXiv:2604.15009. The joint likelihood and the posterior draw of the solver's expert are ours: with the paper's
prior draw the losses through the solver push every expert to every target, and the experts become one (EXPERIMENTS).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yan_core.batching import Batch
from yan_core.config import AutoencoderLossConfig, FlowLossConfig
from yan_core.model import YanModel
from yan_core.moe import (
    balance_loss,
    draw_expert,
    gate_entropy,
    gate_log_probs,
    gather_expert,
    scope_length,
    spread,
    sum_scopes,
    velocity_log_likelihood,
)
from yan_core.noise import Stream, normal, uniform
from yan_core.path import beta_times, straight_path
from yan_core.solver import euler, time_grid
from yan_core.tokenization import Tokenizer


@dataclass(frozen=True)
class LossOutput:
    """A loss and its parts by name.

    Attributes:
        total: Weighted sum, a scalar with gradient.
        parts: Unweighted parts and diagnostics, detached scalars.
    """

    total: Tensor
    parts: dict[str, Tensor]


def token_weights(ids: Tensor, mask: Tensor, fill_weight: float) -> Tensor:
    """How much each target token counts: 1 up to the first end-of-text token, `fill_weight` after it, 0 at padding.

    What is generated ends at the first end-of-text token; an answer of one word filled up to fourteen tokens would
    otherwise be a fourteenth of its own loss.

    Args:
        ids: Target ids, [batch, length].
        mask: True for real target tokens, the filling included, [batch, length].
        fill_weight: In [0, 1].

    Returns:
        float32, [batch, length].
    """
    ends = (ids == Tokenizer.eos_id).cumsum(-1)
    after = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], dim=-1) > 0
    return mask * torch.where(after, fill_weight, 1.0)


def weighted_cross_entropy(logits: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Mean cross-entropy, nats a token; logits [batch, length, vocab], ids and weight (or mask) [batch, length]."""
    losses = F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
    return (losses * weight).sum() / weight.sum().clamp_min(1)


def maximum_mean_discrepancy(x: Tensor, y: Tensor, sigmas: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 5.0)) -> Tensor:
    """Squared maximum mean discrepancy of two samples under a sum of RBF kernels.

    Args:
        x: [n, d_model].
        y: [m, d_model].
        sigmas: Kernel widths (arXiv:2604.15009).

    Source: Gretton et al. 2012, JMLR 13, eq. 5 (biased estimate, so never negative).
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.addmm(b.square().sum(-1), a, b.T, alpha=-2) + a.square().sum(-1, keepdim=True)
        # Below exp(-60) a kernel counts for nothing, and a CPU is four times slower on such tiny numbers.
        return torch.stack([(squared * (-0.5 / s**2)).clamp(-60, 0).exp().mean() for s in sigmas]).sum()

    with torch.autocast(x.device.type, enabled=False):
        return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def autoencoder_loss(model: YanModel, batch: Batch, config: AutoencoderLossConfig) -> LossOutput:
    """Stage 1: reconstruct the clean text from the corrupted one through noisy latents.

    Args:
        model: Its target encoder and decoder are used.
        batch: From `autoencoder_batch`.
        config: Weights and noise.
    """
    mask = batch.target_mask
    latents = model.encode_target(batch.source_ids, mask)
    scale = uniform(batch.keys, Stream.LATENT_SCALE, (1, 1)) * config.latent_noise
    noisy = latents + scale * normal(batch.keys, Stream.LATENT_NOISE, tuple(latents.shape[1:])).to(latents.dtype)
    logits = model.decoder(noisy)
    loss_ce = weighted_cross_entropy(logits, batch.target_ids, mask)
    real = latents[mask].float()
    loss_l2 = real.square().mean()
    order = uniform(batch.keys, Stream.MMD, (mask.shape[1],))[mask].argsort()[: config.mmd_tokens]
    prior = normal(batch.keys[:1], Stream.MMD, (len(order), real.shape[1]))[0]
    loss_mmd = maximum_mean_discrepancy(real[order], prior)
    total = loss_ce + config.weight_l2 * loss_l2 + config.weight_mmd * loss_mmd
    right = ((logits.argmax(-1) == batch.target_ids) * mask).sum() / mask.sum()
    parts = {"loss_ce": loss_ce, "loss_l2": loss_l2, "loss_mmd": loss_mmd, "token_accuracy": right}
    return LossOutput(total, {name: value.detach() for name, value in parts.items()})


def flow_loss(model: YanModel, batch: Batch, config: FlowLossConfig, num_steps: int) -> LossOutput:
    """Stages 2 and 3: likelihood of the velocity, and endpoint error and cross-entropy through the solver.

    Args:
        model: All of it is used; what is frozen simply gets no gradient.
        batch: From `infilling_batch` or `task_batch`.
        config: Weights, likelihood and draw.
        num_steps: Euler steps of the solver in this batch.
    """
    mask, length = batch.target_mask, batch.target_ids.shape[1]
    tokens = scope_length(model.config, length)
    weight = token_weights(batch.target_ids, mask, config.fill_weight)
    total_weight = weight.sum().clamp_min(1)
    grid = time_grid(num_steps, batch.keys.device)

    # Draws, and the path from noise to data.
    x_1 = model.encode_target(batch.target_ids, mask)
    x_0 = model.config.init_noise * normal(batch.keys, Stream.SOURCE_NOISE, tuple(x_1.shape[1:])).to(x_1.dtype)
    t = beta_times(uniform(batch.keys, Stream.TIME, ()), config.time_alpha, config.time_beta)
    path = straight_path(x_0, x_1, t)
    source = model.encode_source(batch.source_ids, batch.source_mask)

    # One pass at (x_0, 0) and (x_t, t) together; the former is also the solver's first step.
    velocities, gate_logits = model(
        torch.cat([x_0, path.x_t]), torch.cat([torch.zeros_like(t), t]), source.repeat(2), mask.repeat(2, 1)
    )
    velocities_0, velocities_t = velocities.chunk(2)
    gate_0, gate_t = (gate_log_probs(logits, mask, tokens) for logits in gate_logits.chunk(2))

    # Which expert explains the velocity: log pi_k + log N(u | v_k).
    log_likelihood_t = velocity_log_likelihood(velocities_t, path.u_t, weight, config.sigma, tokens)
    if config.likelihood == "joint":
        log_likelihood_0 = velocity_log_likelihood(velocities_0, path.u_t, weight, config.sigma, tokens)
        gate, log_joint = gate_0, gate_0 + log_likelihood_0 + log_likelihood_t
    else:
        gate, log_joint = gate_t, gate_t + log_likelihood_t
    # Divided by the width after the log-sum-exp: inside it would soften the competition of the experts.
    loss_flow = -log_joint.logsumexp(-1).sum() / (total_weight * x_1.shape[-1])

    responsibility = log_joint.detach().softmax(-1)
    scope_is_real = sum_scopes(mask[..., None].to(gate.dtype), mask, tokens)[..., 0] > 0
    loss_gate = -((responsibility * gate).sum(-1) * scope_is_real).sum() / scope_is_real.sum().clamp_min(1)

    # Solve from x_0 with one expert a scope, drawn and then kept; gradients pass through the solver.
    log_draw = log_joint if config.expert_draw == "posterior" else gate_0
    expert = spread(draw_expert(log_draw, uniform(batch.keys, Stream.EXPERT, log_draw.shape[1:2])), tokens, length)
    steps = [model.flow.at(time.expand(len(t))) for time in grid[1:-1]]

    def velocity(x: Tensor, i: int) -> Tensor:
        if i == 0:
            return gather_expert(velocities_0, expert)
        return model.flow.experts.one(model.flow.trunk(x, steps[i - 1], source, mask), expert)

    endpoint = euler(velocity, x_0, grid)
    loss_end = ((endpoint - x_1).float().square().mean(-1) * weight).sum() / total_weight
    loss_ce = weighted_cross_entropy(model.decoder(endpoint), batch.target_ids, weight)

    loss_balance, entropy = balance_loss(gate_0), gate_entropy(gate_0)
    total = (
        config.weight_flow * loss_flow
        + config.weight_end * loss_end
        + config.weight_ce * loss_ce
        + config.weight_gate * loss_gate
        + config.weight_balance * loss_balance
        - config.weight_entropy * entropy
    )
    parts = {
        "loss_flow": loss_flow,
        "loss_end": loss_end,
        "loss_ce": loss_ce,
        "loss_gate": loss_gate,
        "loss_balance": loss_balance,
        "gate_entropy": entropy,
        "expert_load_max": gate_0.exp().mean((0, 1)).max() * gate_0.shape[-1],
    }
    return LossOutput(total, {name: value.detach() for name, value in parts.items()})


class Objective(nn.Module):
    """A stage's loss as one module, so that DistributedDataParallel can wrap model and loss together."""

    def __init__(self, model: YanModel, config: AutoencoderLossConfig | FlowLossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: Batch, num_steps: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts; `num_steps` is the solver's and without meaning in stage 1."""
        if isinstance(self.config, AutoencoderLossConfig):
            output = autoencoder_loss(self.model, batch, self.config)
        else:
            output = flow_loss(self.model, batch, self.config, num_steps)
        return output.total, output.parts

"""The two objectives: denoising autoencoder (stage 1) and mixture-of-experts flow matching (stages 2 and 3).

Source: arXiv:2604.15009. The joint likelihood and the posterior draw of the solver's expert are ours: with the paper's
prior draw the losses through the solver push every expert to every target, and the experts become one (EXPERIMENTS).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yan_core.baselines import Baseline
from yan_core.batching import Batch
from yan_core.config import AutoencoderLossConfig, FlowLossConfig
from yan_core.counts import Counts, count, count_places, token_weights
from yan_core.model import FlowNetwork, Source, YanModel
from yan_core.moe import (
    balance_loss,
    choose_experts,
    draw_expert,
    even_offsets,
    expert_shares,
    gate_entropy,
    gate_log_probs,
    scope_length,
    spread,
    sum_scopes,
    velocity_log_likelihood,
)
from yan_core.noise import RowDraws, Stream, fold, normal, uniform
from yan_core.parallel import gather, num_workers
from yan_core.path import beta_times, endpoint_of, straight_path
from yan_core.solver import FrozenExpertField, evaluation_times, solve, time_grid

SOURCE, TARGET, PASSES, SECOND_PASS, SOLVER = range(5)
"""Places where dropout draws."""


@dataclass(frozen=True)
class LossOutput:
    """A loss and its parts by name.

    Attributes:
        total: Weighted sum, a scalar with gradient.
        parts: Unweighted parts and diagnostics, detached scalars.
    """

    total: Tensor
    parts: dict[str, Tensor]


def weighted_cross_entropy(logits: Tensor, ids: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Mean cross-entropy, nats a token.

    Args:
        logits: [batch, length, vocab].
        ids: [batch, length].
        weight: Of each token, or a mask, [batch, length].
        count: What the sum is divided by, a scalar; see `Counts`.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
    return (losses * weight).sum() / count


def maximum_mean_discrepancy(x: Tensor, y: Tensor, sigmas: tuple[float, ...] = (0.2, 0.5, 1.0, 2.0, 5.0)) -> Tensor:
    """Squared maximum mean discrepancy of two samples under a sum of RBF kernels.

    Args:
        x: [n, latent_dim].
        y: [m, latent_dim].
        sigmas: Kernel widths (arXiv:2604.15009).

    Source: Gretton et al. 2012, JMLR 13, eq. 5 (biased estimate, so never negative).
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.addmm(b.square().sum(-1), a, b.T, alpha=-2) + a.square().sum(-1, keepdim=True)
        # Below exp(-60) a kernel counts for nothing, and a CPU is four times slower on such tiny numbers.
        return torch.stack([(squared * (-0.5 / s**2)).clamp(-60, 0).exp().mean() for s in sigmas]).sum()

    with torch.autocast(x.device.type, enabled=False):
        return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


def latent_terms(
    latents: Tensor, mask: Tensor, keys: Tensor, mmd_tokens: int, num_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean squared latent, and discrepancy of some real tokens' latents to N(0, I) (arXiv:2604.15009, stage 1).

    Args:
        latents: [batch, length, latent_dim].
        mask: True for real tokens, [batch, length].
        keys: [batch].
        mmd_tokens: Most tokens used for the discrepancy, of all workers together.
        num_tokens: What the sum of squares is divided by, a scalar; see `Counts`.
    """
    real = latents[mask].float()
    chosen, draws = _lowest(real, uniform(keys, Stream.MMD, (mask.shape[1],))[mask], mmd_tokens)
    key = (draws[:1] * 2**31).long()  # the same on every worker
    prior = normal(key, Stream.MMD_PRIOR, tuple(chosen.shape))[0].to(chosen.dtype)
    return real.square().sum() / (num_tokens * real.shape[-1]), maximum_mean_discrepancy(chosen, prior)


def _lowest(vectors: Tensor, draws: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The vectors [n, latent_dim] of the lowest draws [n], of all workers together, and these draws, in their order."""
    order = draws.argsort()[:most]
    vectors, draws = vectors[order], draws[order]
    if num_workers() == 1:
        return vectors, draws
    mine = torch.full((most,), torch.inf, device=draws.device)
    mine[: len(draws)] = draws
    everyone = gather(mine)  # [workers, most]
    kept = everyone.flatten().sort().values[:most]
    kept = kept[kept.isfinite()]
    taken = everyone <= kept[-1]
    widest = int(taken.sum(1).max())
    padded = F.pad(vectors, (0, 0, 0, max(0, widest - len(vectors))))[:widest]
    return gather(padded)[taken[:, :widest]][everyone[taken].argsort()], kept


def autoencoder_loss(
    model: YanModel, batch: Batch, config: AutoencoderLossConfig, counts: Counts | None = None
) -> LossOutput:
    """Stage 1: reconstruct the clean text from the corrupted one through noisy latents.

    Args:
        model: Its target encoder and decoder are used.
        batch: From `autoencoder_batch`; source and target [batch, length].
        config: Weights and noise.
        counts: What the terms are divided by; None: what this batch holds.

    Returns:
        The total, and loss_ce (nats a token), loss_l2, loss_mmd and token_accuracy (a share), all scalars.

    Source: arXiv:2604.15009, stage 1.
    """
    mask, counts = batch.target_mask, counts or count(batch, config, model.config)
    latents = model.encode_target(batch.source_ids, mask, RowDraws(batch.keys).at(TARGET))
    scale = uniform(batch.keys, Stream.LATENT_SCALE, (1, 1)) * config.latent_noise
    noisy = latents + scale * normal(batch.keys, Stream.LATENT_NOISE, tuple(latents.shape[1:])).to(latents.dtype)
    logits = model.decoder(noisy)
    loss_ce = weighted_cross_entropy(logits, batch.target_ids, mask, counts.tokens)
    loss_l2, loss_mmd = latent_terms(latents, mask, batch.keys, config.mmd_tokens, counts.tokens)
    total = loss_ce + config.weight_l2 * loss_l2 + config.weight_mmd * loss_mmd
    right = ((logits.argmax(-1) == batch.target_ids) * mask).sum() / counts.tokens
    parts = {"loss_ce": loss_ce, "loss_l2": loss_l2, "loss_mmd": loss_mmd, "token_accuracy": right}
    return LossOutput(total, {name: value.detach() for name, value in parts.items()})


@dataclass(frozen=True)
class Matching:
    """Flow matching of one batch.

    Attributes:
        endpoint: Where the solver arrives from x_0 with one expert a scope, [batch, length, latent_dim], with gradient.
        terms: Terms of the objective by name, scalars with gradient.
        load_max: Busiest expert's share over the mean share, a scalar.
    """

    endpoint: Tensor
    terms: dict[str, Tensor]
    load_max: Tensor


def match_flow(
    flow: FlowNetwork,
    x_0: Tensor,
    x_1: Tensor,
    t: Tensor,
    source: Source,
    mask: Tensor,
    weight: Tensor,
    keys: Tensor,
    config: FlowLossConfig,
    num_steps: int,
    counts: Counts | None = None,
) -> Matching:
    """Likelihood of the path under the mixture of experts, gate terms, and the endpoint of the solver.

    Args:
        flow: The network.
        x_0: Source noise, [batch, length, latent_dim].
        x_1: Data, same shape.
        t: Times in [0, 1), [batch].
        source: From `flow.source`.
        mask: True for real target tokens, [batch, length].
        weight: How much each token counts; 0 where it is not real, [batch, length].
        keys: Each row's key for random draws, int64, [batch].
        config: Sigma, likelihood, draw.
        num_steps: Euler steps of the solver.
        counts: What the terms are divided by; None: what these rows hold.

    Source: arXiv:2604.15009; joint likelihood, posterior draw, even experts and `top_k` are ours.
    """
    length = mask.shape[1]
    tokens = scope_length(flow.config, length)
    counts, draws = counts or count_places(weight, mask, tokens), RowDraws(keys)
    path = straight_path(x_0, x_1, t)
    goal = path.u_t if flow.config.prediction == "velocity" else x_1
    at_0, at_t = flow.at(torch.zeros_like(t)), flow.at(t)

    # One pass at (x_0, 0), which is also the solver's first step, and one at (x_t, t): together where nothing of the
    # first goes into the second.
    features_t = None
    if flow.config.self_conditioning:
        features_0 = flow.trunk(x_0, at_0, source, mask, draws=draws.at(PASSES))
    else:
        points, steps = torch.cat([x_0, path.x_t]), at_0.beside(at_t)
        apart = RowDraws(torch.cat([keys, fold(keys, 1)])).at(PASSES)
        both = flow.trunk(points, steps, source.repeat(2), mask.repeat(2, 1), draws=apart)
        features_0, features_t = both.chunk(2)
    gate_0 = gate_log_probs(flow.gate(features_0, source.mean, at_0.embedding), mask, tokens)

    # The experts that take part: all, or a few a scope.
    routed = None
    if flow.config.top_k:
        routed = choose_experts(gate_0, uniform(keys, Stream.ROUTING, tuple(gate_0.shape[1:])), flow.config.top_k)

    def among_routed(gate: Tensor) -> Tensor:
        return gate if routed is None else gate.gather(-1, routed).log_softmax(-1)

    def log_likelihood(features: Tensor) -> Tensor:
        if routed is None:
            outputs = flow.experts(features)
        else:
            outputs = flow.experts.chosen(features, spread(routed, tokens, length))
        return velocity_log_likelihood(outputs, goal, weight, config.sigma, tokens)

    scope_is_real = sum_scopes(mask[..., None], mask, tokens)[..., 0] > 0
    says_something = sum_scopes((weight >= 1)[..., None], mask, tokens)[..., 0] > 0  # more than filling

    def evened(log_weights: Tensor) -> Tensor:
        offsets = even_offsets(log_weights, says_something) if config.even_experts else log_weights.new_zeros(1)
        return log_weights - offsets * says_something[..., None]

    uniforms = uniform(keys, Stream.EXPERT, gate_0.shape[1:2])
    prior_0 = among_routed(gate_0)
    joint = config.likelihood == "joint"
    log_0 = log_likelihood(features_0) if joint or features_t is None else None
    if features_t is None:
        assert log_0 is not None
        known = evened((prior_0 + log_0).detach()) if config.expert_draw == "posterior" else prior_0
        guess = _guess(flow, x_0, features_0, _pick(routed, draw_expert(known, uniforms)), tokens)
        kept = uniform(keys, Stream.GUESS, (1, 1)) < 0.5  # half of the rows do without, as at the first step
        features_t = flow.trunk(path.x_t, at_t, source, mask, guess * kept, draws.at(SECOND_PASS))

    # Which expert explains the path: log pi_k + log N(u | v_k).
    log_t = log_likelihood(features_t)
    if joint:
        assert log_0 is not None
        prior, log_joint = prior_0, prior_0 + log_0 + log_t
    else:
        prior = among_routed(gate_log_probs(flow.gate(features_t, source.mean, at_t.embedding), mask, tokens))
        log_joint = prior + log_t
    log_posterior = evened(log_joint.detach())
    responsibility = log_posterior.softmax(-1)
    log_likelihoods = log_joint.logsumexp(-1)
    if config.even_experts:  # the gradient is by the even responsibilities, the figure stays the likelihood
        explained = (responsibility * log_joint).sum(-1)
        log_likelihoods = log_likelihoods.detach() + explained - explained.detach()
    # Divided by the width after the log-sum-exp: inside it would soften the competition of the experts.
    loss_flow = -log_likelihoods.sum() / (counts.weight * x_1.shape[-1])
    loss_gate = -((responsibility * prior).sum(-1) * scope_is_real).sum() / counts.scopes

    # Solve from x_0 with one expert a scope, drawn and then kept; gradients pass through the solver.
    drawn = draw_expert(log_posterior if config.expert_draw == "posterior" else prior_0, uniforms)
    expert = spread(_pick(routed, drawn), tokens, length)
    grid = time_grid(num_steps)
    times = evaluation_times(grid)
    field = FrozenExpertField(flow, source, times, mask, expert=expert, features_0=features_0, draws=draws.at(SOLVER))
    endpoint = solve(field, x_0, grid)
    loss_end = ((endpoint - x_1).float().square().mean(-1) * weight).sum() / counts.weight

    shares = expert_shares(gate_0, scope_is_real)
    terms = {
        "loss_flow": loss_flow,
        "loss_end": loss_end,
        "loss_gate": loss_gate,
        "loss_balance": balance_loss(shares),
        "gate_entropy": gate_entropy(gate_0, scope_is_real, counts.scopes),
    }
    return Matching(endpoint, terms, shares.detach().max() * len(shares))


def _pick(routed: Tensor | None, drawn: Tensor) -> Tensor:
    """The expert that a place among the routed ones stands for, [batch, scopes]."""
    return drawn if routed is None else routed.gather(-1, drawn[..., None])[..., 0]


def _guess(flow: FlowNetwork, x_0: Tensor, features_0: Tensor, expert_BS: Tensor, tokens: int) -> Tensor:
    """Estimate of x_1 from the pass at (x_0, 0), without gradient, [batch, length, latent_dim]."""
    with torch.no_grad():
        output = flow.experts.one(features_0, spread(expert_BS, tokens, x_0.shape[1]))
        return endpoint_of(flow.velocity(output, x_0, 0.0), x_0, 0.0)


def flow_loss(
    model: YanModel, batch: Batch, config: FlowLossConfig, num_steps: int, counts: Counts | None = None
) -> LossOutput:
    """Stages 2 and 3: likelihood of the path, and endpoint error and cross-entropy through the solver.

    Args:
        model: All of it is used; what is frozen simply gets no gradient.
        batch: From `infilling_batch` or `task_batch`; source [batch, source_length], target [batch, length].
        config: Weights, likelihood and draw.
        num_steps: Euler steps of the solver in this batch.
        counts: What the terms are divided by; None: what this batch holds.

    Returns:
        The total, and its unweighted terms by name: loss_flow in nats a token and latent component, loss_end in squared
        latent units, loss_ce in nats a token, loss_gate in nats a scope, loss_length in nats a row; all scalars.

    Raises:
        ValueError: If num_steps is below 1.

    Source: arXiv:2604.15009, stages 2 and 3; joint likelihood, posterior draw and gate term are ours.
    """
    mask, draws = batch.target_mask, RowDraws(batch.keys)
    counts = counts or count(batch, config, model.config)
    weight = token_weights(batch.target_ids, mask, config.fill_weight)
    x_1 = model.encode_target(batch.target_ids, mask, draws.at(TARGET))
    x_0 = model.config.init_noise * normal(batch.keys, Stream.SOURCE_NOISE, tuple(x_1.shape[1:])).to(x_1.dtype)
    t = beta_times(uniform(batch.keys, Stream.TIME, ()), config.time_alpha, config.time_beta)
    source = model.encode_source(batch.source_ids, batch.source_mask, draws.at(SOURCE))
    matching = match_flow(model.flow, x_0, x_1, t, source, mask, weight, batch.keys, config, num_steps, counts)

    terms = dict(matching.terms)
    logits = model.decoder(matching.endpoint)
    terms["loss_ce"] = weighted_cross_entropy(logits, batch.target_ids, weight, counts.weight)
    if model.length_head is not None:
        logits_BL, lengths_B = model.length_head(source.mean).float(), mask.sum(-1).clamp_min(1) - 1
        terms["loss_length"] = F.cross_entropy(logits_BL, lengths_B, reduction="sum") / counts.rows
    if config.weight_l2 or config.weight_mmd:
        terms["loss_l2"], terms["loss_mmd"] = latent_terms(x_1, mask, batch.keys, config.mmd_tokens, counts.tokens)
    output = weigh(terms, config)
    return LossOutput(output.total, {**output.parts, "expert_load_max": matching.load_max})


def weigh(terms: dict[str, Tensor], config: FlowLossConfig) -> LossOutput:
    """Sum terms `loss_<name>` by `flow_loss.weight_<name>`, less the gate's entropy by `weight_entropy`.

    Args:
        terms: Scalars, [], by name.
        config: Weights.
    """
    weights = {
        name: -config.weight_entropy if name == "gate_entropy" else getattr(config, f"weight_{name[len('loss_') :]}")
        for name in terms
    }
    total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    return LossOutput(total, {name: value.detach() for name, value in terms.items()})


def baseline_loss(model: Baseline, batch: Batch, config: FlowLossConfig, counts: Counts | None = None) -> LossOutput:
    """A baseline's own loss, with tokens weighed as in `flow_loss`; filling counts where the model writes it.

    Args:
        model: The baseline.
        batch: From `infilling_batch` or `task_batch`; target [batch, length].
        config: What filling weighs.
        counts: What the sum is divided by; None: what this batch holds.

    Returns:
        The total, and loss_ce in nats a token, the same.
    """
    fill_weight = config.fill_weight if model.config.learns_filling else 0.0
    weight = token_weights(batch.target_ids, batch.target_mask, fill_weight)
    counts = counts or count_places(weight, batch.target_mask, 1)
    loss = (model.losses(batch) * weight).sum() / counts.weight
    return LossOutput(loss, {"loss_ce": loss.detach()})


class Objective(nn.Module):
    """A stage's loss as one module, so that DistributedDataParallel can wrap model and loss together."""

    def __init__(self, model: YanModel | Baseline, config: AutoencoderLossConfig | FlowLossConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def counts(self, batch: Batch) -> Counts:
        """What the terms of a batch's loss are divided by."""
        if isinstance(self.model, Baseline):
            assert isinstance(self.config, FlowLossConfig)
            fill_weight = self.config.fill_weight if self.model.config.learns_filling else 0.0
            return count_places(token_weights(batch.target_ids, batch.target_mask, fill_weight), batch.target_mask, 1)
        return count(batch, self.config, self.model.config)

    def forward(self, batch: Batch, num_steps: int, counts: Counts | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its parts, scalars, of rows [batch, length]; `num_steps` has no meaning in stage 1."""
        if isinstance(self.model, Baseline):
            assert isinstance(self.config, FlowLossConfig)
            output = baseline_loss(self.model, batch, self.config, counts)
        elif isinstance(self.config, AutoencoderLossConfig):
            output = autoencoder_loss(self.model, batch, self.config, counts)
        else:
            output = flow_loss(self.model, batch, self.config, num_steps, counts)
        return output.total, output.parts

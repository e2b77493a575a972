"""Mixture of velocity experts: heads, gate, likelihood, and the draw of one expert.

Shapes: B batch, L length, D d_model on the trunk's side and latent_dim of what an expert gives, K experts, C chosen of
them, F hidden width, S scopes of a row (L tokens, its segments, or 1 for the whole sequence). One draw of an expert
covers a scope.

Source: arXiv:2604.15009 (mixture, token-wise gate). The joint likelihood, the posterior draw and scopes wider than a
token are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yan_core.config import ModelConfig
from yan_core.parallel import gather, num_workers, total


class ExpertHeads(nn.Module):
    """K feed-forward heads D -> F -> D, each a velocity field (or an endpoint) on the trunk's features."""

    def __init__(self, num_experts: int, d_model: int, hidden: int, d_out: int | None = None) -> None:
        super().__init__()
        d_out = d_out or d_model
        self.w_in_KDF = nn.Parameter(torch.empty(num_experts, d_model, hidden))
        self.b_in_KF = nn.Parameter(torch.zeros(num_experts, hidden))
        self.w_out_KFD = nn.Parameter(torch.empty(num_experts, hidden, d_out))
        self.b_out_KD = nn.Parameter(torch.zeros(num_experts, d_out))
        for weight, fan_in in ((self.w_in_KDF, d_model), (self.w_out_KFD, hidden)):
            nn.init.uniform_(weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        self._look_at_device()

    def _look_at_device(self) -> None:
        """Note whether the device multiplies groups without asking the host: Hopper and later."""
        device = self.w_in_KDF.device
        self.has_grouped_kernel = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertHeads:
        super()._apply(fn, recurse)
        self._look_at_device()
        return self

    @property
    def num_experts(self) -> int:
        """K."""
        return self.w_in_KDF.shape[0]

    def forward(self, features_BLD: Tensor) -> Tensor:
        """Outputs of all experts, [batch, length, num_experts, latent_dim]."""
        x_ND = features_BLD.flatten(0, 1)
        h_KNF = F.gelu(torch.baddbmm(self.b_in_KF[:, None], x_ND.expand(self.num_experts, -1, -1), self.w_in_KDF))
        v_KND = torch.baddbmm(self.b_out_KD[:, None], h_KNF, self.w_out_KFD)
        return v_KND.transpose(0, 1).unflatten(0, features_BLD.shape[:2])

    def chosen(self, features_BLD: Tensor, experts_BLC: Tensor) -> Tensor:
        """Outputs of each token's chosen experts, [batch, length, chosen, latent_dim]; equal to `forward` gathered.

        Args:
            features_BLD: Trunk features, [batch, length, d_model].
            experts_BLC: Experts of each token, int64, [batch, length, chosen].
        """
        chosen = experts_BLC.shape[2]
        out = self.one(features_BLD.repeat_interleave(chosen, dim=1), experts_BLC.flatten(1))
        return out.unflatten(1, (-1, chosen))

    def one(self, features_BLD: Tensor, expert_BL: Tensor) -> Tensor:
        """Output of each token's own expert alone, [batch, length, latent_dim]; equal to `forward` gathered.

        Args:
            features_BLD: Trunk features, [batch, length, d_model].
            expert_BL: Expert of each token, int64, [batch, length].
        """
        x_ND, expert_N = features_BLD.flatten(0, 1), expert_BL.flatten()
        if self.num_experts == 1:
            return self._head(x_ND, 0).unflatten(0, features_BLD.shape[:2])
        grouped = x_ND.is_cuda and self._can_group(x_ND)
        if x_ND.is_cuda and not grouped:
            return gather_expert(self(features_BLD), expert_BL)
        counts = [] if grouped else torch.bincount(expert_N, minlength=self.num_experts).tolist()
        if max(counts, default=0) == len(x_ND):
            return self._head(x_ND, counts.index(len(x_ND))).unflatten(0, features_BLD.shape[:2])
        order = expert_N.argsort(stable=True)
        x_ND, sorted_N = x_ND[order], expert_N[order]
        if grouped:
            # No count comes back to the host, so that a CUDA graph can hold this.
            ks = torch.arange(self.num_experts, device=x_ND.device)
            ends_K = torch.searchsorted(sorted_N, ks, right=True).to(torch.int32)
            done_ND = self._grouped(x_ND, sorted_N, ends_K)
        else:
            done_ND = torch.cat([self._head(part, k) for k, part in enumerate(x_ND.split(counts)) if len(part)])
        return torch.empty_like(done_ND).index_copy(0, order, done_ND).unflatten(0, features_BLD.shape[:2])

    def _head(self, x_ND: Tensor, k: int) -> Tensor:
        h_NF = F.gelu(torch.addmm(self.b_in_KF[k], x_ND, self.w_in_KDF[k]))
        return torch.addmm(self.b_out_KD[k], h_NF, self.w_out_KFD[k])

    def _can_group(self, x_ND: Tensor) -> bool:
        """Whether the grouped kernel takes this: bfloat16, rows of a multiple of 16 bytes, a GPU that has it.

        In float32 it would be a loop over experts that waits for the device.
        """
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_ND.dtype
        widths = (*self.w_in_KDF.shape[1:], self.w_out_KFD.shape[2])
        aligned = all(width % 8 == 0 for width in widths)
        return dtype == torch.bfloat16 and aligned and self.has_grouped_kernel

    def _grouped(self, x_ND: Tensor, expert_N: Tensor, ends_K: Tensor) -> Tensor:
        """Heads of tokens sorted by expert in two grouped matrix products; ends_K: each expert's last token, plus 1."""
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x_ND.dtype
        h_NF = F.grouped_mm(x_ND.to(dtype), self.w_in_KDF.to(dtype), offs=ends_K) + self.b_in_KF[expert_N].to(dtype)
        out_ND = F.grouped_mm(F.gelu(h_NF), self.w_out_KFD.to(dtype), offs=ends_K)
        return out_ND + self.b_out_KD[expert_N].to(dtype)


class Gate(nn.Module):
    """Token-wise mixture weights from [trunk feature, mean source latent, time embedding], before the softmax."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.temperature = config.gate_temperature
        self.mlp = nn.Sequential(
            nn.Linear(3 * config.d_model, config.d_model), nn.GELU(), nn.Linear(config.d_model, config.num_experts)
        )

    def forward(self, features: Tensor, source_mean: Tensor, time: Tensor) -> Tensor:
        """Logits of the experts.

        Args:
            features: Of the trunk, [batch, length, d_model].
            source_mean: Mean source latent, [batch, d_model].
            time: Embedded, [batch, d_model].

        Returns:
            [batch, length, num_experts].
        """
        length = features.shape[1]
        context = torch.cat([source_mean, time], dim=-1)[:, None].expand(-1, length, -1)
        return self.mlp(torch.cat([features, context], dim=-1)) / self.temperature


def scope_length(config: ModelConfig, length: int) -> int:
    """Tokens that share one draw of an expert, for rows of `length` tokens."""
    return {"token": 1, "segment": min(config.segment_length, length), "sequence": length}[config.expert_scope]


def sum_scopes(values_BLK: Tensor, weight_BL: Tensor, tokens: int) -> Tensor:
    """Sum over each scope of `tokens` tokens, by their weights or mask: float32, [batch, scopes, num_experts]."""
    values = values_BLK.float() * weight_BL[..., None]  # a sum of 300 ones in bfloat16 is 256
    short = -values.shape[1] % tokens
    return F.pad(values, (0, 0, 0, short)).unflatten(1, (-1, tokens)).sum(2)


def gate_log_probs(logits_BLK: Tensor, mask_BL: Tensor, tokens: int) -> Tensor:
    """Log mixture weights of each scope, from its tokens' mean logits: [batch, scopes, num_experts]."""
    count = sum_scopes(torch.ones_like(logits_BLK[..., :1]), mask_BL, tokens).clamp_min(1)
    return F.log_softmax(sum_scopes(logits_BLK, mask_BL, tokens) / count, dim=-1)


def velocity_log_likelihood(v_BLKD: Tensor, u_BLD: Tensor, weight_BL: Tensor, sigma: float, tokens: int) -> Tensor:
    """log N(u | v_k, sigma^2 I) of each scope, without the normalising constant: [batch, scopes, num_experts].

    Each token counts by its weight; a mask does for weights of 0 and 1.
    """
    squared_BLK = (v_BLKD - u_BLD[:, :, None]).float().square().sum(-1)
    return sum_scopes(squared_BLK, weight_BL, tokens) * (-0.5 / sigma**2)


def choose_experts(log_probs_BSK: Tensor, uniforms_BSK: Tensor, top_k: int) -> Tensor:
    """Draw `top_k` different experts a scope, each next one by its weight among those left.

    Args:
        log_probs_BSK: Log mixture weights, [batch, scopes, num_experts].
        uniforms_BSK: Uniform numbers in (0, 1), [batch, scopes, num_experts].
        top_k: How many, in [1, num_experts].

    Returns:
        int64, [batch, scopes, top_k].

    Source: Kool et al. 2019, arXiv:1903.06059 (Gumbel top-k).
    """
    gumbel = -(-uniforms_BSK.log()).log()
    return (log_probs_BSK.detach() + gumbel).topk(top_k, dim=-1).indices


def draw_expert(log_probs_BSK: Tensor, uniforms_BS: Tensor) -> Tensor:
    """Draw an expert a scope by the inverse of its distribution function.

    Args:
        log_probs_BSK: Log weights, they need not be normalised, [batch, scopes, num_experts].
        uniforms_BS: Uniform numbers in (0, 1), [batch, scopes].

    Returns:
        int64, [batch, scopes].
    """
    cumulative = log_probs_BSK.detach().float().softmax(-1).cumsum(-1)
    drawn = (cumulative < uniforms_BS[..., None] * cumulative[..., -1:]).sum(-1)
    return drawn.clamp_max(log_probs_BSK.shape[-1] - 1)


def spread(expert_BS: Tensor, tokens: int, length: int) -> Tensor:
    """Each scope's expert (or experts) given to its tokens: [batch, scopes, ...] -> [batch, length, ...]."""
    return expert_BS.repeat_interleave(tokens, dim=1)[:, :length]


def gather_expert(v_BLKD: Tensor, expert_BL: Tensor) -> Tensor:
    """The output of each token's expert: [batch, length, latent_dim]."""
    index = expert_BL[:, :, None, None].expand(-1, -1, 1, v_BLKD.shape[-1])
    return v_BLKD.gather(2, index).squeeze(2)


def expert_shares(log_probs_BSK: Tensor, real_BS: Tensor) -> Tensor:
    """Mean mixture weight of each expert over the scopes of all workers that hold a real token, [num_experts].

    Args:
        log_probs_BSK: From `gate_log_probs`, [batch, scopes, num_experts].
        real_BS: True for scopes that hold a real token, [batch, scopes].
    """
    sums = total((log_probs_BSK.exp() * real_BS[..., None]).sum((0, 1)))
    return sums / total(real_BS.sum().float()).clamp_min(1)


def even_offsets(scores_BSK: Tensor, real_BS: Tensor) -> Tensor:
    """What to take from each expert's scores so that the softmax over experts is about even over the scopes of all
    workers, [num_experts], without gradient.

    Each in turn gets the offset at which it has its share against the others, as in an auction, which is quick where
    scores differ by many nats; then Sinkhorn's steps, which are exact where they differ by little. Few scopes an expert
    leave the shares less even.

    Args:
        scores_BSK: Log weights, they need not be normalised, [batch, scopes, num_experts].
        real_BS: True for scopes that count, [batch, scopes].

    Source: ours; evenness over a batch as in Caron et al. 2020, arXiv:2006.09882 (SwAV, by Sinkhorn alone).
    """
    scores_NK = _of_all_workers(scores_BSK.detach()[real_BS])
    rows, experts = scores_NK.shape
    offsets_K = torch.zeros_like(scores_BSK[0, 0])
    if rows == 0 or experts == 1:
        return offsets_K
    own_KK = torch.eye(experts, dtype=torch.bool, device=scores_NK.device)
    for _ in range(8):
        for k in range(experts):
            others_N = (scores_NK - offsets_K).masked_fill(own_KK[k], -torch.inf)
            offsets_K[k] = torch.quantile(scores_NK[:, k] - others_N.logsumexp(-1), 1 - 1 / experts)
    for _ in range(8):
        offsets_K += (scores_NK - offsets_K).log_softmax(-1).logsumexp(0) - math.log(rows / experts)
    return offsets_K


def _of_all_workers(values_NK: Tensor) -> Tensor:
    """Rows of all workers, which may have unlike numbers of them."""
    if num_workers() == 1:
        return values_NK
    counts = gather(torch.tensor([len(values_NK)], device=values_NK.device))[:, 0].tolist()
    everyone = gather(F.pad(values_NK, (0, 0, 0, max(counts) - len(values_NK))))
    return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])


def balance_loss(share_K: Tensor) -> Tensor:
    """KL(share || uniform) of the experts' shares [num_experts], in nats; 0 when they are used alike."""
    return (share_K * (share_K.clamp_min(1e-9).log() + math.log(len(share_K)))).sum()


def gate_entropy(log_probs_BSK: Tensor, real_BS: Tensor, num_scopes: Tensor) -> Tensor:
    """Mean entropy of the gate in nats, a scalar.

    Args:
        log_probs_BSK: From `gate_log_probs`, [batch, scopes, num_experts].
        real_BS: True for scopes that hold a real token, [batch, scopes].
        num_scopes: How many of these there are, a scalar.
    """
    entropy_BS = -(log_probs_BSK.exp() * log_probs_BSK).sum(-1)
    return (entropy_BS * real_BS).sum() / num_scopes

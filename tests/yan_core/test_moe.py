"""Mixture of experts: likelihood, gate, scopes, draws and dispatch, against torch.distributions and plain loops."""

import math

import pytest
import torch
import torch.distributions as D

from tests.yan_core.tiny import tiny_config
from yan_core.moe import (
    ExpertHeads,
    Gate,
    balance_loss,
    draw_expert,
    even_offsets,
    expert_shares,
    gate_entropy,
    gate_log_probs,
    gather_expert,
    scope_length,
    spread,
    sum_scopes,
    velocity_log_likelihood,
)
from yan_core.noise import Stream, uniform

B, L, K, W = 3, 7, 4, 6
MASK = torch.arange(L) < torch.tensor([7, 4, 1])[:, None]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(num_experts: int = K) -> ExpertHeads:
    made = ExpertHeads(num_experts, W, 2 * W)
    for i, parameter in enumerate(made.parameters()):
        parameter.data = 0.5 * randn(*parameter.shape, seed=i)
    return made


def scopes_of(tokens: int) -> list[slice]:
    return [slice(start, min(start + tokens, L)) for start in range(0, L, tokens)]


def test_each_head_is_its_own_feed_forward() -> None:
    made, x = heads(), randn(B, L, W)
    velocities = made(x)
    assert velocities.shape == (B, L, K, W)
    for k in range(K):
        hidden = torch.nn.functional.gelu(x @ made.w_in_KDF[k] + made.b_in_KF[k])
        torch.testing.assert_close(velocities[:, :, k], hidden @ made.w_out_KFD[k] + made.b_out_KD[k])


@pytest.mark.parametrize("num_experts", [1, 2, K])
@pytest.mark.parametrize("chosen", ["random", "first", "last"])
def test_one_equals_forward_gathered(num_experts: int, chosen: str) -> None:
    made, x = heads(num_experts), randn(B, L, W)
    expert = torch.randint(num_experts, (B, L), generator=torch.Generator().manual_seed(1))
    if chosen != "random":
        expert = torch.full_like(expert, 0 if chosen == "first" else num_experts - 1)
    torch.testing.assert_close(made.one(x, expert), gather_expert(made(x), expert))


def test_one_has_the_gradients_of_forward_gathered() -> None:
    made, x = heads(), randn(B, L, W).requires_grad_()
    expert = torch.randint(3, (B, L), generator=torch.Generator().manual_seed(1))  # expert 3 has no token
    leaves = [x, *made.parameters()]
    sparse = torch.autograd.grad(made.one(x, expert).sin().sum(), leaves)
    dense = torch.autograd.grad(gather_expert(made(x), expert).sin().sum(), leaves)
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gather_takes_each_tokens_own_expert() -> None:
    velocities = randn(B, L, K, W)
    expert = torch.randint(K, (B, L), generator=torch.Generator().manual_seed(1))
    gathered = gather_expert(velocities, expert)
    for b in range(B):
        for i in range(L):
            assert torch.equal(gathered[b, i], velocities[b, i, expert[b, i]])


@pytest.mark.parametrize(
    ("scope", "length", "tokens"),
    [("token", 9, 1), ("segment", 9, 4), ("segment", 3, 3), ("sequence", 9, 9), ("sequence", 1, 1)],
)
def test_tokens_of_a_scope(scope: str, length: int, tokens: int) -> None:
    assert scope_length(tiny_config(expert_scope=scope, segment_length=4), length) == tokens


@pytest.mark.parametrize("tokens", [1, 3, L])
def test_sums_over_scopes_leave_padding_out(tokens: int) -> None:
    values = randn(B, L, K)
    sums = sum_scopes(values, MASK, tokens)
    assert sums.shape == (B, math.ceil(L / tokens), K)
    for s, part in enumerate(scopes_of(tokens)):
        expected = torch.stack([values[b, part][MASK[b, part]].sum(0) for b in range(B)])
        torch.testing.assert_close(sums[:, s], expected)


@pytest.mark.parametrize("tokens", [1, 3, L])
def test_gate_averages_logits_over_the_real_tokens_of_a_scope(tokens: int) -> None:
    logits = randn(B, L, K)
    log_probs = gate_log_probs(logits, MASK, tokens)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:2]))
    for s, part in enumerate(scopes_of(tokens)):
        for b in range(B):
            real = logits[b, part][MASK[b, part]]
            mean = real.mean(0) if len(real) else torch.zeros(K)
            torch.testing.assert_close(log_probs[b, s], mean.log_softmax(-1))


@pytest.mark.parametrize("tokens", [1, 3, L])
@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_likelihood_is_the_mixtures_up_to_its_constant(tokens: int, sigma: float) -> None:
    velocities, u, logits = randn(B, L, K, W), randn(B, L, W, seed=1), randn(B, L, K, seed=2)
    log_pi = gate_log_probs(logits, MASK, tokens)
    ours = (log_pi + velocity_log_likelihood(velocities, u, MASK, sigma, tokens)).logsumexp(-1)
    for s, part in enumerate(scopes_of(tokens)):
        for b in range(B):
            real = MASK[b, part]
            count = int(real.sum()) * W
            if count == 0:
                assert ours[b, s] == pytest.approx(0, abs=1e-6)
                continue
            centres = velocities[b, part][real].transpose(0, 1).flatten(1)  # [num_experts, count]
            mixture = D.MixtureSameFamily(
                D.Categorical(logits=log_pi[b, s]), D.Independent(D.Normal(centres, sigma), 1)
            )
            constant = -count * math.log(sigma * math.sqrt(2 * math.pi))
            true = mixture.log_prob(u[b, part][real].flatten())
            torch.testing.assert_close(ours[b, s] + constant, true, atol=1e-4, rtol=1e-5)


def test_permuting_the_experts_changes_no_likelihood() -> None:
    made, x, u, logits = heads(), randn(B, L, W), randn(B, L, W, seed=1), randn(B, L, K, seed=2)
    order = torch.tensor([2, 0, 3, 1])

    def parts(made: ExpertHeads, logits: torch.Tensor) -> list[torch.Tensor]:
        log_pi = gate_log_probs(logits, MASK, 3)
        likelihood = velocity_log_likelihood(made(x), u, MASK, 1.0, 3)
        real = torch.ones(log_pi.shape[:2], dtype=torch.bool)
        return [
            (log_pi + likelihood).logsumexp(-1),
            balance_loss(expert_shares(log_pi, real)),
            gate_entropy(log_pi, real, real.sum()),
        ]

    before = parts(made, logits)
    expert = torch.randint(K, (B, L), generator=torch.Generator().manual_seed(1))
    velocity = made.one(x, order[expert])
    for parameter in made.parameters():
        parameter.data = parameter.data[order]
    for a, b in zip(before, parts(made, logits[..., order]), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(made.one(x, expert), velocity)


def test_experts_are_drawn_as_often_as_their_weight_says() -> None:
    weights = torch.tensor([0.5, 0.0, 0.05, 0.2, 0.25])
    n = 200_000
    uniforms = uniform(torch.tensor([1]), Stream.EXPERT, (n,))
    log_probs = weights.log().expand(1, n, 5)
    drawn = draw_expert(log_probs, uniforms)
    assert drawn.shape == (1, n) and drawn.dtype == torch.int64
    share = torch.bincount(drawn[0], minlength=5) / n
    assert share[1] == 0
    assert ((share - weights).abs() <= 4 * (weights * (1 - weights) / n).sqrt()).all()
    assert torch.equal(draw_expert(log_probs + 7.0, uniforms), drawn)  # need not be normalised


def test_an_expert_is_drawn_by_the_inverse_of_the_distribution_function() -> None:
    log_probs = torch.tensor([0.25, 0.5, 0.25]).log().expand(1, 6, 3)
    uniforms = torch.tensor([[1e-7, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-24]])
    assert draw_expert(log_probs, uniforms).tolist() == [[0, 0, 1, 1, 2, 2]]


def test_draws_carry_no_gradient_and_survive_extreme_weights() -> None:
    log_probs = torch.tensor([[[0.0, -1e5, -3e4]], [[-1e5, -2e5, -1e5 - 80]]]).requires_grad_()
    drawn = draw_expert(log_probs, torch.tensor([[0.999999], [0.999999]]))
    assert drawn.tolist() == [[0], [0]] and not drawn.requires_grad


@pytest.mark.parametrize("tokens", [1, 3, L])
def test_a_scopes_expert_is_given_to_its_tokens(tokens: int) -> None:
    expert = torch.arange(B * math.ceil(L / tokens)).view(B, -1)
    given = spread(expert, tokens, L)
    assert given.shape == (B, L)
    for s, part in enumerate(scopes_of(tokens)):
        assert (given[:, part] == expert[:, s : s + 1]).all()


def test_balance_is_zero_where_experts_are_used_alike_and_log_k_where_one_is_used() -> None:
    def loss(log_probs: torch.Tensor) -> float:
        return float(balance_loss(expert_shares(log_probs, torch.ones(log_probs.shape[:2], dtype=torch.bool))))

    assert loss(torch.full((B, 2, K), 1 / K).log()) == pytest.approx(0, abs=1e-6)
    certain = torch.eye(K)[None].clamp_min(1e-30).log()  # each scope is sure, all experts are used
    assert loss(certain) == pytest.approx(0, abs=1e-6)
    collapsed = torch.tensor([1.0, 1e-30, 1e-30, 1e-30]).log().expand(B, 2, K)
    assert loss(collapsed) == pytest.approx(math.log(K), abs=1e-5)
    weights = torch.tensor([0.7, 0.1, 0.1, 0.1])
    expected = D.kl_divergence(D.Categorical(weights), D.Categorical(torch.full((K,), 1 / K)))
    assert loss(weights.log().expand(B, 2, K)) == pytest.approx(float(expected), abs=1e-6)
    varied = (3 * randn(B, 5, K)).log_softmax(-1)
    mean = D.Categorical(varied.exp().mean((0, 1)))
    expected = D.kl_divergence(mean, D.Categorical(torch.full((K,), 1 / K)))
    assert loss(varied) == pytest.approx(float(expected), abs=1e-6)


def test_entropy_of_the_gate_and_shares_of_the_experts_count_real_scopes_alone() -> None:
    log_probs = randn(B, 5, K).log_softmax(-1)
    real = torch.arange(5) < torch.tensor([5, 3, 1])[:B, None]
    true = D.Categorical(logits=log_probs[real])
    assert float(gate_entropy(log_probs, real, real.sum())) == pytest.approx(float(true.entropy().mean()))
    torch.testing.assert_close(expert_shares(log_probs, real), true.probs.mean(0))


def test_a_long_scope_is_averaged_exactly_in_bfloat16() -> None:
    """A count of 301 is 300 or 302 in bfloat16."""
    logits, mask = randn(1, 301, K).bfloat16(), torch.ones(1, 301, dtype=torch.bool)
    exact = logits.double().mean(1, keepdim=True).log_softmax(-1).float()
    torch.testing.assert_close(gate_log_probs(logits, mask, 301), exact, atol=1e-5, rtol=1e-5)


def test_gate_reads_token_source_and_time() -> None:
    torch.manual_seed(0)
    config = tiny_config()
    gate = Gate(config)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    features, mean, time = randn(B, L, 16), randn(B, 16, seed=1), randn(B, 16, seed=2)
    logits = gate(features, mean, time)
    assert logits.shape == (B, L, config.num_experts)
    assert not torch.allclose(gate(features, mean + 1, time), logits)
    assert not torch.allclose(gate(features, mean, time + 1), logits)
    changed = features.clone()
    changed[1, 2] += 1
    moved = (gate(changed, mean, time) != logits).any(-1)
    assert moved.nonzero().tolist() == [[1, 2]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("used", [[0, 1, 2, 3], [2], [0, 3]], ids=str)
def test_one_head_a_token_equals_all_gathered_on_a_gpu_and_so_do_gradients(dtype: torch.dtype, used: list[int]) -> None:
    """Experts without a token included."""
    made = ExpertHeads(4, 16, 32).to("cuda", dtype)
    x = randn(3, 7, 16).to("cuda", dtype).requires_grad_()
    expert = torch.tensor(used, device="cuda")[torch.arange(21, device="cuda") % len(used)].view(3, 7)
    grads = []
    for out in (made.one(x, expert), gather_expert(made(x), expert)):
        grads.append([out, *torch.autograd.grad(out.float().square().sum(), [x, *made.parameters()])])
    for one, gathered in zip(*grads, strict=True):
        torch.testing.assert_close(one, gathered, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("spread", [0.3, 3.0, 300.0])
@pytest.mark.parametrize("experts", [2, 4, 8])
def test_offsets_make_the_experts_shares_of_a_batch_even(experts: int, spread: float) -> None:
    """However far one expert is ahead on all rows, and however sure each row is."""
    scores = spread * randn(32, 2, experts) + torch.linspace(0, 500, experts)
    real = torch.arange(2) < torch.tensor([1, 2])[torch.arange(32) % 2][:, None]
    offsets = even_offsets(scores, real)
    shares = (scores - offsets).softmax(-1)[real].mean(0)
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(shares, torch.full((experts,), 1 / experts), atol=0.05, rtol=0)
    hidden = scores.masked_fill(~real[..., None], 1e6)
    assert torch.equal(even_offsets(hidden, real), offsets)


def test_rows_that_prefer_different_experts_keep_them() -> None:
    scores = 30.0 * torch.eye(4).repeat(3, 1)[:, None]
    ahead = scores + torch.tensor([7.0, 0.0, -3.0, 100.0])
    responsibility = (ahead - even_offsets(ahead, torch.ones(12, 1, dtype=torch.bool))).softmax(-1)
    torch.testing.assert_close(responsibility, scores.softmax(-1), atol=1e-3, rtol=0)


def test_one_expert_and_no_row_need_no_offset() -> None:
    assert even_offsets(randn(3, 2, 1), torch.ones(3, 2, dtype=torch.bool)).tolist() == [0]
    assert even_offsets(randn(3, 2, 4), torch.zeros(3, 2, dtype=torch.bool)).tolist() == [0] * 4

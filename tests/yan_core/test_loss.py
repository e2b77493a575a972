"""Losses: against plain flow matching and a readable reference, finite differences, and who gets a gradient."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.yan_core.tiny import LENGTH, LOSS, VOCAB, pad_right, random_rows, row_of, tiny_batch, tiny_config, tiny_model
from yan_core.batching import Batch, autoencoder_batch
from yan_core.config import AutoencoderLossConfig, FlowLossConfig
from yan_core.counts import count, token_weights
from yan_core.loss import (
    Objective,
    autoencoder_loss,
    flow_loss,
    latent_terms,
    maximum_mean_discrepancy,
    weighted_cross_entropy,
)
from yan_core.model import YanModel
from yan_core.moe import gate_log_probs, scope_length, velocity_log_likelihood
from yan_core.noise import Stream, normal, uniform
from yan_core.path import beta_times
from yan_core.tokenization import Tokenizer
from yan_core.training import freeze_all_but

SCOPES = ("token", "segment", "sequence")
STAGE_1 = AutoencoderLossConfig(latent_noise=0.5, clean_share=0.3, weight_l2=0.1, weight_mmd=0.2, mmd_tokens=12)


def partly_masked(batch: Batch) -> Batch:
    """The batch with some target places that do not count."""
    lengths = torch.tensor([LENGTH, 4, 6, 1]).repeat(len(batch.keys) // 4)[:, None]
    return replace(batch, target_mask=torch.arange(LENGTH) < lengths)


def drawn(model: YanModel, batch: Batch, config: FlowLossConfig) -> tuple[torch.Tensor, ...]:
    """x_0, x_1, t, x_t, u_t, written out."""
    x_1 = model.encode_target(batch.target_ids, batch.target_mask)
    x_0 = model.config.init_noise * normal(batch.keys, Stream.SOURCE_NOISE, tuple(x_1.shape[1:]))
    t = beta_times(uniform(batch.keys, Stream.TIME, ()), config.time_alpha, config.time_beta)
    return x_0, x_1, t, (1 - t)[:, None, None] * x_0 + t[:, None, None] * x_1, x_1 - x_0


def squared_error(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the components of real tokens."""
    return (a - b).square()[mask].mean()


def scopes_of(scope: str) -> list[slice]:
    width = {"token": 1, "segment": 4, "sequence": LENGTH}[scope]
    return [slice(i, min(i + width, LENGTH)) for i in range(0, LENGTH, width)]


@torch.no_grad()
def reference(model: YanModel, batch: Batch, config: FlowLossConfig, num_steps: int) -> dict[str, float]:
    """The flow loss by loops over rows and scopes, each expert's path solved on its own."""
    x_0, x_1, t, x_t, u = drawn(model, batch, config)
    source = model.encode_source(batch.source_ids, batch.source_mask)
    mask = batch.target_mask
    v_0, gate_0 = model(x_0, torch.zeros_like(t), source, mask)
    v_t, gate_t = model(x_t, t, source, mask)
    flow, gate_loss, expert = 0.0, [], torch.zeros(mask.shape, dtype=torch.int64)
    scopes = scopes_of(model.config.expert_scope)
    uniforms = uniform(batch.keys, Stream.EXPERT, (len(scopes),))
    gates = []
    for b in range(len(mask)):
        for s, part in enumerate(scopes):
            real = mask[b, part]
            if not real.any():
                continue

            def log_pi(gate: torch.Tensor, b=b, part=part, real=real) -> torch.Tensor:
                return gate[b, part][real].mean(0).log_softmax(-1)

            def log_n(v: torch.Tensor, b=b, part=part, real=real) -> torch.Tensor:
                error = (v[b, part] - u[b, part, None])[real].square().sum((0, 2))
                if model.config.prediction == "endpoint":  # of x_1, whose error is (1 - t) times the velocity's
                    error = error * (1.0 if v is v_0 else (1 - t[b]) ** 2)
                return -error / (2 * config.sigma**2)

            gates.append(log_pi(gate_0))
            if config.likelihood == "joint":
                prior, joint = log_pi(gate_0), log_pi(gate_0) + log_n(v_0) + log_n(v_t)
            else:
                prior, joint = log_pi(gate_t), log_pi(gate_t) + log_n(v_t)
            flow -= float(joint.logsumexp(0))
            gate_loss.append(-float((joint.softmax(0) * prior).sum()))
            weights = (joint if config.expert_draw == "posterior" else log_pi(gate_0)).softmax(0)
            below = 0.0
            for k in range(len(weights)):
                below += float(weights[k])
                if uniforms[b, s] <= below:
                    expert[b, part] = k
                    break
    x = x_0
    for i in range(num_steps):
        v, _ = model(x, torch.full_like(t, i / num_steps), source, mask)
        x = x + torch.gather(v, 2, expert[:, :, None, None].expand(-1, -1, 1, x.shape[-1]))[:, :, 0] / num_steps
    mean_gate = torch.stack(gates).exp().mean(0)
    return {
        "loss_flow": flow / (int(mask.sum()) * x.shape[-1]),
        "loss_end": float(squared_error(x, x_1, mask)),
        "loss_ce": float(F.cross_entropy(model.decoder(x)[mask], batch.target_ids[mask])),
        "loss_gate": sum(gate_loss) / len(gate_loss),
        "loss_balance": float((mean_gate * (mean_gate * len(mean_gate)).log()).sum()),
        "gate_entropy": float(torch.stack([-(g.exp() * g).sum() for g in gates]).mean()),
        "expert_load_max": float(mean_gate.max() * len(mean_gate)),
    }


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("likelihood", ["joint", "marginal"])
@pytest.mark.parametrize("expert_draw", ["posterior", "prior"])
@pytest.mark.parametrize(
    "prediction, mixer", [("velocity", "attention"), ("endpoint", "attention"), ("velocity", "mamba")]
)
def test_every_part_equals_the_readable_reference(
    scope: str, likelihood: str, expert_draw: str, prediction: str, mixer: str
) -> None:
    model = tiny_model(expert_scope=scope, init_noise=0.8, prediction=prediction, mixer=mixer)
    batch = partly_masked(tiny_batch())
    config = replace(LOSS, sigma=1.7, likelihood=likelihood, expert_draw=expert_draw, time_alpha=2.0)
    for num_steps in (1, 3):
        parts = flow_loss(model, batch, config, num_steps).parts
        expected = reference(model, batch, config, num_steps)
        assert parts.keys() == expected.keys()
        for name, value in expected.items():
            assert float(parts[name]) == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("likelihood", ["joint", "marginal"])
def test_routing_to_all_experts_is_the_dense_mixture(scope: str, likelihood: str) -> None:
    batch, config = partly_masked(tiny_batch()), replace(LOSS, likelihood=likelihood)
    dense = flow_loss(tiny_model(expert_scope=scope), batch, config, 2).parts
    routed = flow_loss(tiny_model(expert_scope=scope, top_k=3), batch, config, 2).parts
    for name in ("loss_flow", "loss_gate", "loss_balance", "gate_entropy", "expert_load_max"):
        torch.testing.assert_close(routed[name], dense[name])


def test_routing_leaves_the_other_experts_out() -> None:
    """With one sequence of one scope: as a mixture of the routed experts alone, the gate renormalised over them."""
    batch, top_k = row_of(tiny_batch(), 1), 2
    config = replace(LOSS, sigma=30.0, expert_draw="prior")  # wide, so that no routed expert's share is nothing
    model = tiny_model(expert_scope="sequence", top_k=top_k)
    flow_loss(model, batch, config, 2).total.backward()
    grad = model.flow.experts.w_in_KDF.grad
    assert grad is not None
    routed = [k for k in range(3) if grad[k].any()]
    assert len(routed) == top_k
    smaller = tiny_model(expert_scope="sequence", num_experts=top_k)
    state = {
        n: (v[routed] if n.startswith(("flow.experts", "flow.gate.mlp.2")) else v)
        for n, v in model.state_dict().items()
    }
    smaller.load_state_dict(state)
    few, dense = (flow_loss(m, batch, config, 1).parts for m in (model, smaller))
    for name in ("loss_flow", "loss_gate"):
        torch.testing.assert_close(few[name], dense[name])


def test_experts_are_routed_anew_for_other_keys() -> None:
    batch, model = tiny_batch(32), tiny_model(expert_scope="sequence", top_k=2)
    flow_loss(model, batch, LOSS, 1).total.backward()
    grad = model.flow.experts.w_in_KDF.grad
    assert grad is not None and all(grad[k].any() for k in range(3))


def test_self_conditioning_starts_as_if_there_were_none_and_then_uses_the_guess() -> None:
    batch = partly_masked(tiny_batch())
    plain, conditioned = tiny_model(), tiny_model(self_conditioning=True)
    conditioned.load_state_dict({**plain.state_dict(), "flow.guess_in.weight": torch.zeros(16, 16)})
    before, same = (flow_loss(m, batch, LOSS, 3).parts for m in (plain, conditioned))
    torch.testing.assert_close(same, before)
    torch.nn.init.normal_(conditioned.flow.guess_in.weight)  # type: ignore[union-attr]
    after = flow_loss(conditioned, batch, LOSS, 3).parts
    assert not torch.allclose(after["loss_end"], before["loss_end"])
    assert not torch.allclose(after["loss_flow"], before["loss_flow"])
    assert torch.allclose(after["loss_balance"], before["loss_balance"])  # the gate at t = 0 has no guess to read


def test_a_length_head_learns_the_number_of_real_tokens() -> None:
    model, batch = tiny_model(length="predicted"), partly_masked(tiny_batch())
    source = model.encode_source(batch.source_ids, batch.source_mask)
    expected = F.cross_entropy(model.length_head(source.mean), torch.tensor([LENGTH, 4, 6, 1]) - 1)  # type: ignore[misc]
    torch.testing.assert_close(flow_loss(model, batch, LOSS, 1).parts["loss_length"], expected.detach())


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_bfloat16_gives_nearly_the_same_loss_and_finite_gradients(mixer: str) -> None:
    model, batch = tiny_model(mixer=mixer), partly_masked(tiny_batch(16))
    exact = flow_loss(model, batch, LOSS, 3).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = flow_loss(model, batch, LOSS, 3).total
    total.backward()
    assert total.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("sigma", [0.7, 1.0])
@pytest.mark.parametrize("scope", SCOPES)
def test_one_expert_is_plain_flow_matching(sigma: float, scope: str) -> None:
    model = tiny_model(num_experts=1, expert_scope=scope)
    batch = partly_masked(tiny_batch())
    config = replace(LOSS, sigma=sigma)
    x_0, _, t, x_t, u = drawn(model, batch, config)
    source = model.encode_source(batch.source_ids, batch.source_mask)
    v_0, v_t = (model(x, time, source, batch.target_mask)[0][:, :, 0] for x, time in ((x_0, 0 * t), (x_t, t)))
    error_0, error_t = (squared_error(v, u, batch.target_mask) for v in (v_0, v_t))
    marginal = flow_loss(model, batch, replace(config, likelihood="marginal"), 1).parts
    joint = flow_loss(model, batch, replace(config, likelihood="joint"), 1).parts
    torch.testing.assert_close(marginal["loss_flow"], error_t / (2 * sigma**2))
    torch.testing.assert_close(joint["loss_flow"], (error_0 + error_t) / (2 * sigma**2))
    assert float(joint["loss_balance"]) == float(joint["gate_entropy"]) == 0


@pytest.mark.parametrize("scope", SCOPES)
def test_a_large_sigma_is_plain_flow_matching_averaged_over_the_gate(scope: str) -> None:
    model = tiny_model(expert_scope=scope)
    batch = tiny_batch()
    sigma = 60.0
    config = replace(LOSS, sigma=sigma, likelihood="marginal")
    *_, t, x_t, u = drawn(model, batch, config)
    v, gate = model(x_t, t, model.encode_source(batch.source_ids, batch.source_mask), batch.target_mask)
    errors = (v - u[:, :, None]).square().mean(-1)  # [batch, length, num_experts]
    expected = 0.0
    for part in scopes_of(scope):
        weights = gate[:, part].mean(1).softmax(-1)
        expected += (weights[:, None] * errors[:, part]).sum()
    loss = flow_loss(model, batch, config, 1).parts["loss_flow"]
    assert float(loss) * 2 * sigma**2 == pytest.approx(float(expected.detach()) / u[..., 0].numel(), rel=0.01)


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    weights = {"flow": 0.3, "end": 0.7, "ce": 1.1, "gate": 0.9, "balance": 2.0, "entropy": 0.5}
    weights |= {"length": 0.4, "l2": 0.6, "mmd": 0.2}
    config = replace(LOSS, **{f"weight_{name}": weight for name, weight in weights.items()})
    output = flow_loss(tiny_model(length="predicted"), partly_masked(tiny_batch()), config, 2)
    p = {name: float(value) for name, value in output.parts.items()}
    assert not any(value.requires_grad for value in output.parts.values()) and output.total.requires_grad
    entropy = weights.pop("entropy") * p["gate_entropy"]
    expected = sum(weight * p[f"loss_{name}"] for name, weight in weights.items()) - entropy
    assert output.total.item() == pytest.approx(expected, rel=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows() -> None:
    model, batch = tiny_model(), tiny_batch()
    names = ("loss_flow", "loss_end", "loss_ce", "gate_entropy")
    together = flow_loss(model, batch, LOSS, 2).parts
    alone = [flow_loss(model, row_of(batch, i), LOSS, 2).parts for i in range(4)]
    for name in names:
        assert float(together[name]) == pytest.approx(sum(float(p[name]) for p in alone) / 4, rel=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_more_padding_changes_no_part_of_either_loss(scope: str, mixer: str) -> None:
    model = tiny_model(expert_scope=scope, segment_length=4, mixer=mixer, length="predicted")
    batch = partly_masked(tiny_batch())
    source, source_mask = pad_right(batch.source_ids, batch.source_mask, 5)
    target, target_mask = pad_right(batch.target_ids, batch.target_mask, 7)
    wider = Batch(batch.keys, source, source_mask, target, target_mask)
    for name, value in flow_loss(model, batch, LOSS, 3).parts.items():
        torch.testing.assert_close(flow_loss(model, wider, LOSS, 3).parts[name], value, msg=name, atol=1e-5, rtol=1e-4)
    rows = autoencoder_rows()
    target, target_mask = pad_right(rows.target_ids, rows.target_mask, 6)
    wide = Batch(rows.keys, pad_right(rows.source_ids, rows.source_mask, 6)[0], target_mask, target, target_mask)
    # The discrepancy is left out: which tokens it samples depends on the width.
    narrow_parts, wide_parts = (autoencoder_loss(model, b, STAGE_1).parts for b in (rows, wide))
    for name in ("loss_ce", "loss_l2", "token_accuracy"):
        torch.testing.assert_close(wide_parts[name], narrow_parts[name], msg=name, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_a_row_without_a_real_token_adds_nothing_and_spoils_nothing(scope: str, mixer: str) -> None:
    model = tiny_model(expert_scope=scope, mixer=mixer, length="predicted")
    batch = partly_masked(tiny_batch())
    alone = flow_loss(model, batch, LOSS, 2)
    empty = {name: torch.cat([value, torch.zeros_like(value[:1])]) for name, value in vars(batch).items()}
    output = flow_loss(model, Batch(**empty), LOSS, 2)
    for name, value in alone.parts.items():
        if name != "loss_length":  # a mean over rows, which knows no empty ones
            torch.testing.assert_close(output.parts[name], value, msg=name)
    output.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_order_of_the_experts_changes_nothing() -> None:
    """One expert is drawn by its place on [0, 1), so the draw is made certain: sigma so small that one explains all."""
    config = replace(LOSS, sigma=0.05, weight_gate=1.0)
    model, batch, order = tiny_model(), partly_masked(tiny_batch()), torch.tensor([2, 0, 1])
    before = flow_loss(model, batch, config, 3)
    state = model.state_dict()
    permuted = {n: v[order] if n.startswith(("flow.experts", "flow.gate.mlp.2")) else v for n, v in state.items()}
    model.load_state_dict(permuted)
    after = flow_loss(model, batch, config, 3)
    torch.testing.assert_close(after.parts, before.parts)


def test_the_same_keys_give_the_same_loss_and_others_another() -> None:
    model, batch = tiny_model(), tiny_batch()
    first = flow_loss(model, batch, LOSS, 2).total
    torch.manual_seed(5)
    assert torch.equal(flow_loss(model, batch, LOSS, 2).total, first)
    assert not torch.equal(flow_loss(model, replace(batch, keys=batch.keys + 1), LOSS, 2).total, first)


FLOW_WEIGHTS = ("flow", "end", "ce", "balance", "gate", "entropy", "length", "l2", "mmd")
VARIANTS = {
    "marginal": ({}, {"likelihood": "marginal"}),
    "joint": ({}, {}),
    "token": ({"expert_scope": "token"}, {}),
    "segment": ({"expert_scope": "segment"}, {}),
    "endpoint": ({"prediction": "endpoint"}, {}),
    "top_k": ({"top_k": 2}, {}),
    "latent_dim": ({"latent_dim": 6}, {}),
    "mamba": ({"mixer": "mamba"}, {}),
}


def check_slopes(
    model: YanModel, loss: Callable[[], torch.Tensor], same: Callable[[], torch.Tensor] | None = None
) -> None:
    """Compare a loss's gradient with central differences (of `same`), for all parameters, the gate and the heads."""
    model.zero_grad()
    loss().backward()
    generator = torch.Generator().manual_seed(0)
    groups = (model, model.flow.gate, model.flow.experts)
    step = 1e-7  # the directions are long: hundreds of random numbers
    slopes = []
    for group in groups:
        parameters = list(group.parameters())
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        pairs = list(zip(parameters, directions, strict=True))
        slope = sum(float((p.grad * d).sum()) for p, d in pairs if p.grad is not None)
        slopes.append(abs(slope))
        with torch.no_grad():
            values = []
            for shift in (step, -2 * step):
                for p, d in pairs:
                    p += shift * d
                values.append(float((same or loss)()))
            for p, d in pairs:
                p += step * d
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-8)
    assert max(slopes) > 1e-6  # or nothing would have been compared


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("term", [term for term in FLOW_WEIGHTS if term != "gate"])
def test_the_gradient_of_every_term_is_its_slope(term: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # float64 all through
    changes, settings = VARIANTS[variant]
    model = tiny_model(length="predicted", **changes).double()
    batch = partly_masked(tiny_batch())
    weights = {f"weight_{name}": float(name == term) for name in FLOW_WEIGHTS}
    config = replace(LOSS, **{**weights, **settings})
    check_slopes(model, lambda: flow_loss(model, batch, config, 2).total)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("likelihood", ["joint", "marginal"])
def test_the_gradient_of_the_gates_term_is_its_slope(
    scope: str, likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its responsibilities are constants to the gradient, so the differences are taken with them held."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    model, batch = tiny_model(expert_scope=scope).double(), partly_masked(tiny_batch())
    weights = {f"weight_{name}": float(name == "gate") for name in FLOW_WEIGHTS}
    config = replace(LOSS, likelihood=likelihood, **weights)
    mask, tokens = batch.target_mask, scope_length(model.config, LENGTH)
    real = torch.stack([mask[:, part].any(1) for part in scopes_of(scope)], 1)

    def prior_and_joint() -> tuple[torch.Tensor, torch.Tensor]:
        x_0, _, t, x_t, u = drawn(model, batch, config)
        source = model.encode_source(batch.source_ids, batch.source_mask)
        (v_0, gate_0), (v_t, gate_t) = model(x_0, 0 * t, source, mask), model(x_t, t, source, mask)
        gate = gate_0 if likelihood == "joint" else gate_t
        prior = gate_log_probs(gate, mask, tokens)
        joint = prior + velocity_log_likelihood(v_t, u, mask, config.sigma, tokens)
        return prior, joint + (velocity_log_likelihood(v_0, u, mask, config.sigma, tokens) if gate is gate_0 else 0)

    held = prior_and_joint()[1].detach().softmax(-1)

    def by_hand() -> torch.Tensor:
        return -(held * prior_and_joint()[0]).sum(-1)[real].mean()

    check_slopes(model, lambda: flow_loss(model, batch, config, 2).total, by_hand)


@pytest.mark.parametrize("term", ["ce", "l2", "mmd"])
def test_the_gradient_of_the_autoencoders_terms_is_their_slope(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    model, batch = tiny_model().double(), autoencoder_rows()
    config = replace(STAGE_1, weight_l2=50.0 * (term == "l2"), weight_mmd=50.0 * (term == "mmd"))
    check_slopes(model, lambda: autoencoder_loss(model, batch, config).total)


@pytest.mark.parametrize(
    "trains", [("flow",), ("source_encoder", "flow"), ("target_encoder", "decoder"), ("decoder",)], ids="+".join
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(trains: tuple[str, ...]) -> None:
    model = tiny_model()
    freeze_all_but(model, trains)  # type: ignore[arg-type]
    flow_loss(model, tiny_batch(), LOSS, 2).total.backward()
    for name, parameter in model.named_parameters():
        if name.split(".")[0] not in trains:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name


def test_every_loss_reaches_the_experts_and_the_likelihood_reaches_the_gate() -> None:
    weights = ("weight_flow", "weight_end", "weight_ce", "weight_gate", "weight_balance", "weight_entropy")
    reached = {}
    for weight in weights:
        model = tiny_model()
        config = replace(LOSS, **{w: float(w == weight) for w in weights})
        flow_loss(model, tiny_batch(), config, 2).total.backward()
        gate, heads = model.flow.gate.mlp[-1].bias.grad, model.flow.experts.b_out_KD.grad
        reached[weight] = (gate is not None and bool(gate.any()), heads is not None and bool(heads.any()))
    assert reached == {
        "weight_flow": (True, True),
        "weight_end": (False, True),
        "weight_ce": (False, True),
        "weight_gate": (True, False),
        "weight_balance": (True, False),
        "weight_entropy": (True, False),
    }


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("likelihood", ["joint", "marginal"])
def test_the_gates_own_loss_pulls_the_gate_as_the_likelihood_does(scope: str, likelihood: str) -> None:
    """d(-log sum_k pi_k N_k) / d log pi_k = -responsibility_k, so the two differ in scale alone."""
    batch = partly_masked(tiny_batch())
    pulls = []
    for weight in ("weight_flow", "weight_gate"):
        model = tiny_model(expert_scope=scope)
        weights = dict.fromkeys(("weight_flow", "weight_end", "weight_ce", "weight_gate", "weight_balance"), 0.0)
        config = replace(LOSS, likelihood=likelihood, **{**weights, weight: 1.0})
        flow_loss(model, batch, config, 1).total.backward()
        pulls.append(torch.cat([p.grad.flatten() for p in model.flow.gate.parameters()]))
    real_scopes = sum(int(batch.target_mask[:, part].any(1).sum()) for part in scopes_of(scope))
    scale = int(batch.target_mask.sum()) * 16 / real_scopes
    torch.testing.assert_close(pulls[1], pulls[0] * scale, atol=1e-5, rtol=1e-3)


def test_cross_entropy_counts_real_tokens_alone() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[True, True, True], [True, False, False]])
    torch.testing.assert_close(
        weighted_cross_entropy(logits, ids, mask, mask.sum()), F.cross_entropy(logits[mask], ids[mask])
    )
    empty = replace(tiny_batch(2), target_ids=ids, target_mask=mask & False)
    for config in (LOSS, STAGE_1):
        none = count(empty, config, tiny_config())
        assert float(weighted_cross_entropy(logits, ids, mask & False, none.weight)) == 0


def test_a_token_counts_fully_up_to_the_first_end_of_text() -> None:
    end, pad = Tokenizer.eos_id, Tokenizer.pad_id
    ids = torch.tensor([[7, end, end, end], [end, end, 9, pad], [7, 8, 9, 5]])
    mask = ids != pad
    expected = torch.tensor([[1, 1, 0.1, 0.1], [1, 0.1, 0.1, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(token_weights(ids, mask, 0.1), expected)


def test_every_part_of_the_loss_counts_the_filling_by_its_weight() -> None:
    model, batch = tiny_model(num_experts=1), tiny_batch()
    config = replace(LOSS, fill_weight=0.25, likelihood="marginal")
    weight = token_weights(batch.target_ids, batch.target_mask, 0.25)
    assert 0 < int((weight == 0.25).sum()) < weight.numel()
    x_0, x_1, t, x_t, u = drawn(model, batch, config)
    source = model.encode_source(batch.source_ids, batch.source_mask)
    v_0, v_t = (model(x, time, source, batch.target_mask)[0][:, :, 0] for x, time in ((x_0, 0 * t), (x_t, t)))
    losses = {
        "loss_flow": (v_t - u).square().mean(-1) / (2 * config.sigma**2),
        "loss_end": (x_0 + v_0 - x_1).square().mean(-1),
        "loss_ce": F.cross_entropy(model.decoder(x_0 + v_0).transpose(1, 2), batch.target_ids, reduction="none"),
    }
    parts = flow_loss(model, batch, config, num_steps=1).parts
    for name, loss in losses.items():
        torch.testing.assert_close(parts[name], ((loss * weight).sum() / weight.sum()).detach(), msg=name)


def test_mean_discrepancy_is_zero_for_the_same_sample_and_grows_with_the_distance() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    y = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    assert float(maximum_mean_discrepancy(x, x)) == pytest.approx(0, abs=1e-5)
    values = [float(maximum_mean_discrepancy(x, y + shift)) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values) and 0 <= values[0] < 0.1 < values[2]


def test_mean_discrepancy_of_two_points_in_closed_form() -> None:
    x, y = torch.zeros(1, 3), torch.tensor([[3.0, 0.0, 4.0]])
    expected = sum(2 - 2 * math.exp(-25 / (2 * s**2)) for s in (0.5, 2.0))
    assert float(maximum_mean_discrepancy(x, y, (0.5, 2.0))) == pytest.approx(expected, rel=1e-6)


def test_mean_discrepancy_of_two_samples_equals_the_sum_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=generator), 2 + torch.randn(7, 3, generator=generator)

    def kernel(a: torch.Tensor, b: torch.Tensor, sigma: float) -> float:
        pairs = [math.exp(-float((p - q).square().sum()) / (2 * sigma**2)) for p in a for q in b]
        return sum(pairs) / len(pairs)

    expected = sum(kernel(x, x, s) + kernel(y, y, s) - 2 * kernel(x, y, s) for s in (0.7, 3.0))
    assert float(maximum_mean_discrepancy(x, y, (0.7, 3.0))) == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(maximum_mean_discrepancy(x, y, (0.7, 3.0))) == pytest.approx(expected, rel=1e-5)


def test_the_discrepancy_is_that_of_the_tokens_with_the_lowest_draws() -> None:
    keys, mask = torch.arange(2), torch.ones(2, 5, dtype=torch.bool)
    latents = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    draws = uniform(keys, Stream.MMD, (5,)).flatten()
    lowest = draws.argsort()[:3]
    prior = normal((draws[lowest[:1]] * 2**31).long(), Stream.MMD_PRIOR, (3, 4))[0]
    squares, discrepancy = latent_terms(latents, mask, keys, 3, torch.tensor(20.0))
    assert float(squares) == pytest.approx(float(latents.square().sum()) / 80)
    assert float(discrepancy) == pytest.approx(float(maximum_mean_discrepancy(latents.view(10, 4)[lowest], prior)))


def autoencoder_rows() -> Batch:
    return autoencoder_batch(random_rows([7, 3, 5, 1]), torch.arange(4), STAGE_1)


def test_autoencoder_loss_equals_its_parts_by_hand() -> None:
    model, batch = tiny_model(), autoencoder_rows()
    output = autoencoder_loss(model, batch, STAGE_1)
    mask = batch.target_mask
    latents = model.encode_target(batch.source_ids, mask)
    scale = STAGE_1.latent_noise * uniform(batch.keys, Stream.LATENT_SCALE, (1, 1))
    logits = model.decoder(latents + scale * normal(batch.keys, Stream.LATENT_NOISE, (7, 16)))
    ce = F.cross_entropy(logits[mask], batch.target_ids[mask])
    p = {name: float(value) for name, value in output.parts.items()}
    assert p.keys() == {"loss_ce", "loss_l2", "loss_mmd", "token_accuracy"}
    assert p["loss_ce"] == pytest.approx(ce.item(), rel=1e-5)
    assert p["loss_l2"] == pytest.approx(latents[mask].square().mean().item(), rel=1e-5)
    assert p["token_accuracy"] == pytest.approx(float((logits.argmax(-1) == batch.target_ids)[mask].float().mean()))
    assert p["loss_mmd"] > 0
    expected = p["loss_ce"] + 0.1 * p["loss_l2"] + 0.2 * p["loss_mmd"]
    assert output.total.item() == pytest.approx(expected, rel=1e-5)


def test_the_autoencoders_accuracy_is_the_share_of_right_tokens() -> None:
    model, batch = tiny_model(), autoencoder_rows()
    scale = STAGE_1.latent_noise * uniform(batch.keys, Stream.LATENT_SCALE, (1, 1))
    latents = model.encode_target(batch.source_ids, batch.target_mask)
    written = model.decoder(latents + scale * normal(batch.keys, Stream.LATENT_NOISE, (7, 16))).argmax(-1)
    target = torch.where(torch.arange(7) % 2 == 0, written, (written + 1) % VOCAB)
    share = float((torch.arange(7) % 2 == 0).expand(4, 7)[batch.target_mask].float().mean())
    output = autoencoder_loss(model, replace(batch, target_ids=target), STAGE_1)
    assert float(output.parts["token_accuracy"]) == pytest.approx(share) and 0.3 < share < 0.9


def test_the_autoencoders_dropout_follows_from_the_keys() -> None:
    model, batch = tiny_model(dropout=0.3).train(), autoencoder_rows()
    found = []
    for keys in (batch.keys, batch.keys, batch.keys + 7):
        torch.manual_seed(len(found))
        found.append(autoencoder_loss(model, replace(batch, keys=keys), replace(STAGE_1, latent_noise=0.0)).total)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_autoencoder_without_noise_is_deterministic_reconstruction() -> None:
    model, batch = tiny_model(), autoencoder_rows()
    quiet = replace(STAGE_1, latent_noise=0.0)
    first = autoencoder_loss(model, batch, quiet).parts["loss_ce"]
    other = replace(batch, keys=batch.keys + 7)
    assert torch.equal(autoencoder_loss(model, other, quiet).parts["loss_ce"], first)
    assert not torch.equal(autoencoder_loss(model, other, STAGE_1).parts["loss_ce"], first)


def test_autoencoder_loss_trains_encoder_and_decoder_and_nothing_else() -> None:
    model = tiny_model()
    autoencoder_loss(model, autoencoder_rows(), STAGE_1).total.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"target_encoder", "decoder"}


def test_objective_picks_the_stage_by_its_config() -> None:
    model = tiny_model()
    total, parts = Objective(model, STAGE_1)(autoencoder_rows(), 3)
    assert torch.equal(total, autoencoder_loss(model, autoencoder_rows(), STAGE_1).total) and "loss_mmd" in parts
    total, parts = Objective(model, LOSS)(tiny_batch(), 3)
    assert torch.equal(total, flow_loss(model, tiny_batch(), LOSS, 3).total) and "loss_flow" in parts
    assert model.decoder.head.out_features == VOCAB

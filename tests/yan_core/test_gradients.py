"""Gradients of the losses: by finite differences, and who gets one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.yan_core.tiny import (
    LENGTH,
    LOSS,
    SCOPES,
    STAGE_1,
    autoencoder_rows,
    drawn,
    partly_masked,
    scopes_of,
    tiny_batch,
    tiny_model,
)
from yan_core.loss import (
    autoencoder_loss,
    flow_loss,
)
from yan_core.model import YanModel
from yan_core.moe import gate_log_probs, scope_length, velocity_log_likelihood
from yan_core.training import freeze_all_but

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

"""Losses: against plain flow matching and a readable reference, and what counts in them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.yan_core.tiny import (
    LENGTH,
    LOSS,
    SCOPES,
    STAGE_1,
    VOCAB,
    autoencoder_rows,
    drawn,
    pad_right,
    partly_masked,
    row_of,
    scopes_of,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from yan_core.batching import EOS, Batch
from yan_core.config import BaselineConfig, FlowLossConfig
from yan_core.counts import count, token_weights
from yan_core.loss import (
    Objective,
    autoencoder_loss,
    flow_loss,
    weighted_cross_entropy,
)
from yan_core.model import YanModel, build_model
from yan_core.noise import Stream, uniform
from yan_core.tokenization import Tokenizer


def squared_error(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean squared error over the components of real tokens."""
    return (a - b).square()[mask].mean()


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


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("prediction", ["velocity", "endpoint"])
def test_the_guess_in_training_is_the_one_that_the_solver_makes_on_its_first_step(
    prediction: str, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(self_conditioning=True, prediction=prediction, expert_scope="segment", top_k=top_k)
    guesses = []
    trunk = model.flow.trunk

    def watched(x, step, source, mask, guess=None, draws=None):
        guesses.append(guess)
        return trunk(x, step, source, mask, guess, draws)

    monkeypatch.setattr(model.flow, "trunk", watched)
    batch = partly_masked(tiny_batch(rows=12))
    flow_loss(model, batch, replace(LOSS, expert_draw="prior"), 2)  # training and solver then draw the same experts
    first, in_training, of_solver = guesses
    kept = in_training.flatten(1).any(1)
    assert first is None and 0 < int(kept.sum()) < 12
    torch.testing.assert_close(in_training[kept], of_solver[kept])
    guesses.clear()
    flow_loss(model, batch, replace(LOSS, expert_draw="posterior"), 2)
    assert not torch.allclose(guesses[1][kept], in_training[kept])  # by the expert that explains the path so far


def test_dropout_in_the_source_follows_from_the_keys() -> None:
    batch, model, read = partly_masked(tiny_batch()), tiny_model(dropout=0.3).train(), []
    assert model.source_encoder is not None
    model.source_encoder.register_forward_hook(lambda module, inputs, latents: read.append(latents))
    for i, keys in enumerate((batch.keys, batch.keys, batch.keys + 7)):
        torch.manual_seed(i)
        flow_loss(model, replace(batch, keys=keys), LOSS, 1)
    assert torch.equal(read[0], read[1]) and not torch.allclose(read[0], read[2])


def test_even_experts_all_learn_where_one_is_ahead_in_every_row() -> None:
    model, batch = tiny_model(expert_scope="segment"), partly_masked(tiny_batch(rows=24))
    with torch.no_grad():
        model.flow.experts.b_out_KD[1:] += 5.0  # the first alone is anywhere near
    grads = {}
    for even in (False, True):
        model.zero_grad()
        config = replace(LOSS, even_experts=even, weight_end=0.0, weight_ce=0.0, weight_gate=1.0, weight_balance=0.0)
        output = flow_loss(model, batch, config, 1)
        output.total.backward()
        grad = model.flow.experts.w_in_KDF.grad
        assert grad is not None
        grads[even] = [float(part.norm()) for part in grad]
    assert max(grads[False][1:]) < 1e-3 * grads[False][0]
    assert min(grads[True]) > 0.05 * max(grads[True])


@pytest.mark.parametrize("even", [False, True])
def test_the_solver_too_draws_even_experts(even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the guess of self-conditioning before it."""
    model, batch = tiny_model(self_conditioning=True), partly_masked(tiny_batch(rows=48))
    with torch.no_grad():
        model.flow.experts.b_out_KD[1:] += 5.0
    one, drawn = model.flow.experts.one, []

    def watched(features: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.bincount(expert[:, 0], minlength=3).tolist())
        return one(features, expert)

    monkeypatch.setattr(model.flow.experts, "one", watched)
    flow_loss(model, batch, replace(LOSS, even_experts=even), 1)
    guess, solver = drawn
    assert all(min(counts) >= 10 for counts in (guess, solver)) if even else guess == solver == [48, 0, 0]


def test_even_experts_are_even_over_what_says_something_and_not_over_filling() -> None:
    """Else one expert could have all words, and the others all that fills short answers up."""
    model = tiny_model(expert_scope="token")
    ids = torch.full((16, LENGTH), EOS)
    ids[:, :2] = 5
    batch = replace(tiny_batch(rows=16), target_ids=ids, target_mask=torch.ones(16, LENGTH, dtype=torch.bool))
    config = replace(LOSS, even_experts=True, fill_weight=0.1)
    seen = []

    def watched(scores: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        seen.append(counted)
        return torch.zeros(3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yan_core.loss.even_offsets", watched)
        flow_loss(model, batch, config, 1)
    assert seen[0].tolist() == [[True] * 3 + [False] * (LENGTH - 3)] * 16  # two words and the end of the text


@pytest.mark.parametrize("changes", [{}, {"self_conditioning": True}, {"num_experts": 1}])
def test_even_experts_change_no_likelihood_and_nothing_for_one_expert(changes: dict[str, Any]) -> None:
    model, batch = tiny_model(**changes), partly_masked(tiny_batch())
    usual, even = (flow_loss(model, batch, replace(LOSS, even_experts=even), 2).parts for even in (False, True))
    if not model.config.self_conditioning:  # where the guess is another expert's
        torch.testing.assert_close(even["loss_flow"], usual["loss_flow"])
    if model.config.num_experts == 1:
        torch.testing.assert_close(even, usual)
    else:
        assert not torch.allclose(even["loss_gate"], usual["loss_gate"])


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


def test_objective_picks_the_stage_by_its_config() -> None:
    model = tiny_model()
    total, parts = Objective(model, STAGE_1)(autoencoder_rows(), 3)
    assert torch.equal(total, autoencoder_loss(model, autoencoder_rows(), STAGE_1).total) and "loss_mmd" in parts
    total, parts = Objective(model, LOSS)(tiny_batch(), 3)
    assert torch.equal(total, flow_loss(model, tiny_batch(), LOSS, 3).total) and "loss_flow" in parts
    assert model.decoder.head.out_features == VOCAB


def test_objective_divides_by_the_counts_that_it_is_given() -> None:
    """A part of a step's rows is divided by the whole step's counts."""
    model, baseline = tiny_model(), build_model(BaselineConfig(d_model=16, num_blocks=1, num_heads=1), VOCAB, seed=0)
    for objective, batch in (
        (Objective(model, STAGE_1), autoencoder_rows()),
        (Objective(model, LOSS), tiny_batch()),
        (Objective(baseline, LOSS), tiny_batch()),
    ):
        counts = objective.counts(batch)
        total, parts = objective(batch, 3)
        same, _ = objective(batch, 3, counts)
        _, less = objective(batch, 3, counts.divided(2))
        assert torch.equal(total, same)
        name = "loss_flow" if "loss_flow" in parts else "loss_ce"
        torch.testing.assert_close(less[name], 2 * parts[name])
    weight = torch.tensor([[1.0, 1.0, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    filled = replace(
        tiny_batch(rows=2),
        target_ids=torch.tensor([[5, EOS, EOS, EOS], [5, 6, 7, 8]]),
        target_mask=weight > 0,
    )
    config = replace(LOSS, fill_weight=0.25)
    assert Objective(model, config).counts(filled).weight.item() == weight.sum()
    assert Objective(baseline, config).counts(filled).weight.item() == 3  # it does not write what is after the end
    mdm = build_model(BaselineConfig(family="masked_diffusion", d_model=16, num_blocks=1, num_heads=1), VOCAB, seed=0)
    assert Objective(mdm, config).counts(filled).weight.item() == weight.sum()

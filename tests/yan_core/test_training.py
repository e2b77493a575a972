"""One optimizer step: its schedule, what learns and decays, and what a bad loss leaves untouched."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.yan_core.tiny import LOSS, random_rows, tiny_batch, tiny_model
from yan_core.batching import Batch, autoencoder_batch
from yan_core.config import AutoencoderLossConfig, OptimConfig
from yan_core.loss import Objective
from yan_core.training import (
    NonFiniteLoss,
    build_optimizer,
    draw_solver_steps,
    freeze_all_but,
    learning_rate,
    parts_of,
    set_training_mode,
    train_step,
)

PARTS = ("target_encoder", "decoder", "source_encoder", "flow")
OPTIM = OptimConfig(lr=1e-3, warmup_steps=0, decay="constant", weight_decay=0.1, beta2=0.98, clip_norm=1.0)
STAGE_1 = AutoencoderLossConfig()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_warm_up_rises_linearly_to_the_peak() -> None:
    config = replace(OPTIM, lr=2.0, warmup_steps=4)
    assert [learning_rate(step, 100, config) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(0, 100, replace(OPTIM, lr=2.0)) == 2.0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_falls_from_the_peak_to_two_percent(decay: str) -> None:
    config = replace(OPTIM, lr=2.0, warmup_steps=10, decay=decay)
    rates = [learning_rate(step, 110, config) for step in range(10, 111)]
    assert rates[0] == pytest.approx(2.0) and rates[-1] == pytest.approx(0.04)
    assert all(a > b for a, b in zip(rates, rates[1:], strict=False))
    assert rates[50] == pytest.approx(1.02)
    quarter = 0.75 if decay == "linear" else (1 + 0.5**0.5) / 2
    assert rates[25] == pytest.approx(2.0 * (0.02 + 0.98 * quarter))


def test_constant_stays_and_a_run_of_warm_up_alone_works() -> None:
    assert learning_rate(10_000, 100, OPTIM) == OPTIM.lr
    assert learning_rate(5, 5, replace(OPTIM, warmup_steps=5, decay="cosine")) == OPTIM.lr


def test_parts_make_up_the_whole_model() -> None:
    model = tiny_model()
    owned = [p for modules in parts_of(model).values() for module in modules for p in module.parameters()]
    assert len(owned) == len({id(p) for p in owned}) == len(list(model.parameters()))
    assert parts_of(tiny_model(share_encoder=True))["source_encoder"] == []


@pytest.mark.parametrize("trains", [("flow",), ("target_encoder", "decoder"), PARTS], ids="+".join)
def test_the_named_parts_alone_learn_and_drop_out(trains: tuple[str, ...]) -> None:
    model = tiny_model(dropout=0.5).train()
    freeze_all_but(model, ("decoder",))
    freeze_all_but(model, trains)  # type: ignore[arg-type]
    set_training_mode(model, trains)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] in trains), name
    for name, module in model.named_modules():
        if name:
            assert module.training == (name.split(".")[0] in trains), name


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_weight_decay_is_on_matrices_alone(mixer: str) -> None:
    model = tiny_model(mixer=mixer)
    freeze_all_but(model, ("source_encoder", "flow"))
    optimizer = build_optimizer(model, OPTIM)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = 0
    for name, parameter in model.named_parameters():
        if name.split(".")[0] not in ("source_encoder", "flow"):
            assert id(parameter) not in decay_of, name
            continue
        is_bias = "bias" in name or name.split(".")[-1].startswith("b_")
        plain = parameter.ndim == 1 or is_bias or id(parameter) in tables or name.endswith("A_log")
        matrices += not plain
        assert decay_of[id(parameter)] == (0.0 if plain else OPTIM.weight_decay), name
    assert matrices > 10
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay_of)
    assert all(group["betas"] == (0.9, 0.98) and group["lr"] == 1e-3 for group in optimizer.param_groups)


def test_solver_steps_are_drawn_evenly_and_alike_on_every_worker() -> None:
    choices = (1, 2, 5)
    drawn = [draw_solver_steps(choices, 0, step) for step in range(1200)]
    assert drawn[:50] == [draw_solver_steps(choices, 0, step) for step in range(50)]
    assert drawn[:50] != [draw_solver_steps(choices, 1, step) for step in range(50)]
    assert all(abs(drawn.count(choice) / 1200 - 1 / 3) < 0.05 for choice in choices)
    assert draw_solver_steps((4,), 9, 9) == 4


def stage_1_batch() -> Batch:
    return autoencoder_batch(random_rows([7, 3, 5, 6]), torch.arange(4), STAGE_1)


@pytest.mark.parametrize("stage", ["autoencoder", "flow"])
def test_steps_on_a_fixed_batch_lower_its_loss(stage: str) -> None:
    model = tiny_model()
    trains = ("target_encoder", "decoder") if stage == "autoencoder" else ("source_encoder", "flow")
    freeze_all_but(model, trains)  # type: ignore[arg-type]
    objective = Objective(model, STAGE_1 if stage == "autoencoder" else LOSS)
    batch = stage_1_batch() if stage == "autoencoder" else tiny_batch()
    optimizer = build_optimizer(model, OPTIM)
    before = weights_of(model)
    losses = [float(train_step(objective, batch, optimizer, 2, 1e-3, 1.0)["loss"]) for _ in range(12)]
    assert losses[1] < losses[0] and losses[-1] < 0.95 * losses[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is (name.split(".")[0] not in trains), name


def test_a_step_uses_the_learning_rate_it_is_given() -> None:
    def moved(lr: float) -> float:
        model = tiny_model()
        before = weights_of(model)
        train_step(Objective(model, LOSS), tiny_batch(), build_optimizer(model, OPTIM), 2, lr, 1.0)
        return float((model.decoder.head.bias.detach() - before["decoder.head.bias"]).abs().max())

    assert moved(0.0) == 0
    assert moved(2e-3) == pytest.approx(2 * moved(1e-3), rel=1e-2)


def test_what_a_step_reports() -> None:
    model = tiny_model()
    objective = Objective(model, LOSS)
    reported = train_step(objective, tiny_batch(), build_optimizer(model, OPTIM), 2, 1e-3, 1e-3)
    total, parts = Objective(tiny_model(), LOSS)(tiny_batch(), 2)
    assert reported.keys() == {"loss", "grad_norm", *parts}
    assert torch.equal(reported["loss"], total)
    assert not any(value.requires_grad for value in reported.values())
    clipped = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(reported["grad_norm"]) > 1 and float(clipped) == pytest.approx(1e-3, rel=1e-3)


def test_the_gradient_of_an_earlier_step_is_forgotten() -> None:
    def third(noise: float) -> torch.Tensor:
        model = tiny_model()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, noise)
        train_step(Objective(model, LOSS), tiny_batch(), build_optimizer(model, OPTIM), 2, 1e-3, 1.0)
        return model.decoder.head.weight

    assert torch.equal(third(0.0), third(5.0))


def test_two_runs_are_equal() -> None:
    def run() -> dict[str, torch.Tensor]:
        model = tiny_model()
        optimizer = build_optimizer(model, OPTIM)
        for step in range(3):
            train_step(Objective(model, LOSS), tiny_batch(seed=step), optimizer, 1 + step, 1e-3, 1.0)
        return weights_of(model)

    first, second = run(), run()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_as_they_were(bad: float) -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OPTIM)
    train_step(Objective(model, LOSS), tiny_batch(), optimizer, 2, 1e-3, 1.0)
    before, moments = weights_of(model), [s["exp_avg"].clone() for s in optimizer.state.values()]

    def objective(batch: Batch, num_steps: int, counts: None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, parts = Objective(model, LOSS)(batch, num_steps)
        return total * bad, {**parts, "loss_odd": torch.tensor(bad)}

    with pytest.raises(NonFiniteLoss, match=r"weights stay as they were.*optim\.lr") as caught:
        train_step(objective, tiny_batch(), optimizer, 2, 1e-3, 1.0)
    assert f"loss_odd={bad:.4g}" in str(caught.value) and "loss_flow=" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
    assert torch.isfinite(train_step(Objective(model, LOSS), tiny_batch(), optimizer, 2, 1e-3, 1.0)["loss"])


def test_bfloat16_is_near_float32() -> None:
    losses = []
    for bf16 in (False, True):
        model = tiny_model()
        step = train_step(Objective(model, LOSS), tiny_batch(), build_optimizer(model, OPTIM), 2, 1e-3, 1.0, bf16)
        losses.append(float(step["loss"]))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.1)

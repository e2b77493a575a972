"""Solver: closed forms, order, and an exact count of function evaluations."""

import math

import pytest
import torch

from tests.yan_core.tiny import random_rows, tiny_model
from yan_core.batching import pad_rows
from yan_core.moe import scope_length
from yan_core.solver import FrozenExpertField, euler, time_grid


def x_0() -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_grid_is_uniform_from_zero_to_one() -> None:
    assert time_grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert time_grid(1).tolist() == [0, 1]
    for steps in (0, -1):
        with pytest.raises(ValueError, match=rf"num_steps must be >= 1, got {steps}"):
            time_grid(steps)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_exact_on_a_constant_field(num_steps: int) -> None:
    field = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(euler(lambda x, i: field, x_0(), time_grid(num_steps)), x_0() + field)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_eulers_own_closed_form_on_a_linear_field(num_steps: int) -> None:
    a = -1.3
    end = euler(lambda x, i: a * x, x_0(), time_grid(num_steps))
    torch.testing.assert_close(end, (1 + a / num_steps) ** num_steps * x_0(), atol=1e-6, rtol=1e-6)


def test_order_is_one() -> None:
    a = 0.9
    errors = [
        float((euler(lambda x, i: a * x, x_0(), time_grid(n)) - math.exp(a) * x_0()).abs().max())
        for n in (16, 32, 64, 128)
    ]
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(3)]
    assert all(abs(order - 1) < 0.05 for order in orders)


def test_velocity_is_asked_once_a_step_at_the_steps_start_even_on_an_uneven_grid() -> None:
    grid, asked = torch.tensor([0.0, 0.1, 0.4, 1.0]), []

    def velocity(x: torch.Tensor, i: int) -> torch.Tensor:
        asked.append(i)
        return 2 * grid[i].double() * torch.ones_like(x)

    end = euler(velocity, torch.zeros(1, 1, 1, dtype=torch.float64), grid)
    assert asked == [0, 1, 2]
    assert float(end) == pytest.approx(0.3 * 0.2 + 0.6 * 0.8, rel=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
@pytest.mark.parametrize("scope", ["token", "segment", "sequence"])
def test_one_trunk_pass_a_step_and_one_expert_for_all_of_them(num_steps: int, scope: str) -> None:
    model = tiny_model(expert_scope=scope)
    passes = []
    model.flow.norm.register_forward_hook(lambda *_: passes.append(1))
    source = model.encode_source(*pad_rows(random_rows([5, 2]), 0))
    length = 9
    tokens = scope_length(model.config, length)
    uniforms = torch.rand(2, -(-length // tokens), generator=torch.Generator().manual_seed(0))
    grid = time_grid(num_steps)
    field = FrozenExpertField(model, source, grid, uniforms, mask=None)
    assert field.nfe == 0 and field.expert is None
    seen = []

    def velocity(x: torch.Tensor, i: int) -> torch.Tensor:
        v = field(x, i)
        seen.append(field.expert)
        return v

    with torch.no_grad():
        euler(velocity, torch.randn(2, length, 16), grid)
    assert field.nfe == len(passes) == num_steps
    assert all(torch.equal(expert, seen[0]) for expert in seen)
    assert seen[0].shape == (2, length)
    for start in range(0, length, tokens):
        assert (seen[0][:, start : start + tokens] == seen[0][:, start : start + 1]).all()


def test_field_is_the_chosen_experts_velocity() -> None:
    model = tiny_model(expert_scope="token")
    source = model.encode_source(*pad_rows(random_rows([5, 2]), 0))
    x, grid = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)), time_grid(2)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    field = FrozenExpertField(model, source, grid, torch.rand(2, 6, generator=torch.Generator().manual_seed(1)), mask)
    for i in (0, 1):
        ours = field(x, i)
        all_velocities, _ = model(x, torch.full((2,), i / 2), source, mask)
        expert = field.expert
        assert expert is not None and len(expert.unique()) > 1
        for b, j in mask.nonzero().tolist():
            torch.testing.assert_close(ours[b, j], all_velocities[b, j, expert[b, j]], atol=1e-5, rtol=1e-4)

"""Solver: closed forms, order, and an exact count of function evaluations."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from tests.yan_core.tiny import random_rows, tiny_model
from yan_core.batching import pad_rows
from yan_core.config import Method, SamplingConfig
from yan_core.moe import scope_length
from yan_core.noise import RowDraws
from yan_core.solver import FrozenExpertField, evaluation_times, solve, time_grid, trunk_passes

METHODS = get_args(Method)


def x_0() -> torch.Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_grid_is_uniform_from_zero_to_one() -> None:
    assert time_grid(4) == [0, 0.25, 0.5, 0.75, 1]
    assert time_grid(1) == [0, 1]
    for steps in (0, -1):
        with pytest.raises(ValueError, match=rf"num_steps must be >= 1, got {steps}"):
            time_grid(steps)


def uneven_grid(num_steps: int) -> list[float]:
    return [t**1.5 for t in time_grid(num_steps)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("grid", [time_grid, uneven_grid])
def test_exact_on_a_constant_field(method: Method, num_steps: int, grid: Callable[[int], list[float]]) -> None:
    field = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(solve(lambda x, i: field, x_0(), grid(num_steps), method), x_0() + field)


@pytest.mark.parametrize("method, factor", [("euler", lambda z: 1 + z), ("midpoint", lambda z: 1 + z + z * z / 2)])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_each_methods_own_closed_form_on_a_linear_field(
    method: Method, factor: Callable[[float], float], num_steps: int
) -> None:
    a = -1.3
    for same in (method, "heun") if method == "midpoint" else (method,):  # both of order 2: the same polynomial
        end = solve(lambda x, i: a * x, x_0(), time_grid(num_steps), same)
        torch.testing.assert_close(end, factor(a / num_steps) ** num_steps * x_0(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
@pytest.mark.parametrize("grid", [time_grid, uneven_grid])
def test_order(method: Method, order: int, grid: Callable[[int], list[float]]) -> None:
    """On dx/dt = (1 + 2t) x, whose solution is exp(t + t^2) x_0: the time that is asked for matters too."""

    def error(num_steps: int) -> float:
        times = evaluation_times(grid(num_steps), method)
        end = solve(lambda x, i: (1 + 2 * times[i]) * x, x_0(), grid(num_steps), method)
        return float((end - math.exp(2) * x_0()).abs().max())

    orders = [math.log2(error(n) / error(2 * n)) for n in (32, 64, 128)]
    assert all(abs(found - order) < 0.1 for found in orders), orders


@pytest.mark.parametrize("method", METHODS)
def test_velocity_is_asked_at_the_evaluation_times_in_order(method: Method) -> None:
    grid, asked = [0.0, 0.1, 0.4, 1.0], []
    times = evaluation_times(grid, method)

    def velocity(x: torch.Tensor, i: int) -> torch.Tensor:
        asked.append(i)
        return torch.ones_like(x)

    solve(velocity, torch.zeros(1, 1, 1), grid, method)
    assert asked == list(range(len(times)))
    expected = {
        "euler": [0.0, 0.1, 0.4],
        "midpoint": [0.0, 0.05, 0.1, 0.25, 0.4, 0.7],
        "heun": [0.0, 0.1, 0.1, 0.4, 0.4, 1.0],
    }
    assert times == pytest.approx(expected[method])


@pytest.mark.parametrize("grid", [[0.0], [0.0, 0.5, 0.5, 1.0], [1.0, 0.0]])
def test_a_grid_that_does_not_increase_is_refused(grid: list[float]) -> None:
    with pytest.raises(ValueError, match="a time grid must increase"):
        evaluation_times(grid)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="one of euler, midpoint, heun, got 'rk4'"):
        evaluation_times(time_grid(2), "rk4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "method, guidance_scale, per_step", [("euler", 1.0, 1), ("midpoint", 1.0, 2), ("heun", 2.5, 4)]
)
@pytest.mark.parametrize("num_steps", [1, 3, 8])
@pytest.mark.parametrize("scope", ["token", "segment", "sequence"])
def test_trunk_passes_are_counted_and_one_expert_serves_them_all(
    num_steps: int, scope: str, method: Method, guidance_scale: float, per_step: int
) -> None:
    model = tiny_model(expert_scope=scope)
    passes = []  # of rows, in units of the batch
    model.flow.norm.register_forward_hook(lambda _, __, out: passes.append(len(out) // 2))
    source = model.encode_source(*pad_rows(random_rows([5, 2]), 0))
    length = 9
    tokens = scope_length(model.config, length)
    uniforms = torch.rand(2, -(-length // tokens), generator=torch.Generator().manual_seed(0))
    grid = time_grid(num_steps)
    times = evaluation_times(grid, method)
    field = FrozenExpertField(model.flow, source, times, None, uniforms=uniforms, guidance_scale=guidance_scale)
    assert field.nfe == 0 and field.expert is None
    seen = []

    def velocity(x: torch.Tensor, i: int) -> torch.Tensor:
        v = field(x, i)
        seen.append(field.expert)
        return v

    with torch.no_grad():
        solve(velocity, torch.randn(2, length, 16), grid, method)
    assert field.nfe == sum(passes) == num_steps * per_step
    assert trunk_passes(num_steps, SamplingConfig(method=method, guidance_scale=guidance_scale)) == field.nfe
    assert all(torch.equal(expert, seen[0]) for expert in seen)
    assert seen[0].shape == (2, length)
    for start in range(0, length, tokens):
        assert (seen[0][:, start : start + tokens] == seen[0][:, start : start + 1]).all()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_field_s_real_tokens_do_not_feel_the_padding(guidance_scale: float) -> None:
    model = tiny_model(expert_scope="sequence")
    source = model.encode_source(*pad_rows(random_rows([5, 2]), 0))
    x, times = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)), evaluation_times(time_grid(2))
    mask, uniforms = torch.arange(9).expand(2, -1) < 6, torch.tensor([[0.2], [0.7]])
    padded = FrozenExpertField(model.flow, source, times, mask, uniforms=uniforms, guidance_scale=guidance_scale)
    short = FrozenExpertField(model.flow, source, times, None, uniforms=uniforms, guidance_scale=guidance_scale)
    for i in (0, 1):
        torch.testing.assert_close(padded(x, i)[:, :6], short(x[:, :6], i), atol=1e-5, rtol=1e-4)


def test_dropout_of_the_solver_s_passes_follows_from_the_rows_keys() -> None:
    model = tiny_model(dropout=0.3, num_experts=1).train()
    source = model.encode_source(*pad_rows(random_rows([5, 2]), 0), RowDraws(torch.tensor([1, 2])))
    x, times = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)), evaluation_times(time_grid(2))
    found = []
    for keys in ([1, 2], [1, 2], [3, 4]):
        torch.manual_seed(len(found))
        expert, draws = torch.zeros(2, 6, dtype=torch.long), RowDraws(torch.tensor(keys))
        found.append(FrozenExpertField(model.flow, source, times, None, expert=expert, draws=draws)(x, 1))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_field_is_the_chosen_experts_velocity() -> None:
    model = tiny_model(expert_scope="token")
    source = model.encode_source(*pad_rows(random_rows([5, 2]), 0))
    x, grid = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)), time_grid(2)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    uniforms = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    field = FrozenExpertField(model.flow, source, evaluation_times(grid), mask, uniforms=uniforms)
    for i in (0, 1):
        ours = field(x, i)
        all_velocities, _ = model(x, torch.full((2,), i / 2), source, mask)
        expert = field.expert
        assert expert is not None and len(expert.unique()) > 1
        for b, j in mask.nonzero().tolist():
            torch.testing.assert_close(ours[b, j], all_velocities[b, j, expert[b, j]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_point_of_the_way_is_shown_and_what_the_watcher_raises_ends_it(method: Method) -> None:
    points: list[tuple[int, torch.Tensor]] = []
    end = solve(lambda x, i: -x, x_0(), time_grid(3), method, lambda step, x: points.append((step, x)))
    assert [step for step, _ in points] == [1, 2, 3] and points[-1][1] is end
    shorter = solve(lambda x, i: -x, x_0(), [0, 1 / 3], method)
    torch.testing.assert_close(points[0][1], shorter)

    def stop(step: int, x: torch.Tensor) -> None:
        raise KeyError(step)

    with pytest.raises(KeyError, match="1"):
        solve(lambda x, i: -x, x_0(), time_grid(3), method, stop)

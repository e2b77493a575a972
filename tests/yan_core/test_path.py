"""The straight path from noise to data, and its times."""

import math
from collections.abc import Callable

import pytest
import torch

from yan_core.path import beta_times, endpoint_of, straight_path, velocity_to

GRID = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
CELL = 1 / 8192


def ends() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5, 4, generator=generator)


def test_noise_at_zero_and_data_at_one() -> None:
    x_0, x_1 = ends()
    assert torch.equal(straight_path(x_0, x_1, torch.zeros(3)).x_t, x_0)
    assert torch.equal(straight_path(x_0, x_1, torch.ones(3)).x_t, x_1)


def test_points_have_the_latents_precision_whatever_that_of_times() -> None:
    x_0, x_1 = (x.bfloat16() for x in ends())
    sample = straight_path(x_0, x_1, torch.full((3,), 0.5))
    assert sample.x_t.dtype == sample.u_t.dtype == torch.bfloat16


def test_each_row_is_at_its_own_time() -> None:
    x_0, x_1 = ends()
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t = straight_path(x_0, x_1, t).x_t
    torch.testing.assert_close(x_t[1], 0.75 * x_0[1] + 0.25 * x_1[1])
    assert torch.equal(x_t[0], x_0[0]) and torch.equal(x_t[2], x_1[2])


def test_velocity_is_the_derivative_of_the_point() -> None:
    x_0, x_1 = ends()
    t = torch.tensor([0.1, 0.5, 0.9])
    sample = straight_path(x_0, x_1, t)
    jacobian = torch.autograd.functional.jacobian(lambda t: straight_path(x_0, x_1, t).x_t, t)  # [3, 5, 4, 3]
    torch.testing.assert_close(jacobian.diagonal(dim1=0, dim2=3).movedim(-1, 0), sample.u_t)
    assert jacobian.count_nonzero() == sample.u_t.count_nonzero()  # a row moves with its own time alone


def test_velocity_and_endpoint_are_one_another_at_each_rows_time_and_at_one_for_all() -> None:
    x_0, x_1 = ends()
    for t in (torch.tensor([0.0, 0.25, 0.9]), 0.75):
        path = straight_path(x_0, x_1, torch.as_tensor(t).expand(3))
        torch.testing.assert_close(endpoint_of(path.u_t, path.x_t, t), x_1)
        torch.testing.assert_close(velocity_to(x_1, path.x_t, t), path.u_t)


def test_shapes_that_disagree_are_refused() -> None:
    x_0, x_1 = ends()
    with pytest.raises(ValueError, match=r"x_0 \(3, 4, 4\), x_1 \(3, 5, 4\) and t \(3,\) do not fit"):
        straight_path(x_0[:, 1:], x_1, torch.zeros(3))
    with pytest.raises(ValueError, match=r"t \(2,\)"):
        straight_path(x_0, x_1, torch.zeros(2))


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1, 1), (2, 2), (2, 5), (1, 3), (0.5, 0.5), (0.3, 1), (1, 0.1), (0.1, 4), (30, 2), (5000, 5000)]
)
def test_times_have_the_moments_of_their_beta_distribution(alpha: float, beta: float) -> None:
    times = beta_times(GRID.float(), alpha, beta).double()
    true = torch.distributions.Beta(torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64))
    assert float(times.min()) >= 0 and float(times.max()) <= 1
    assert abs(float(times.mean() - true.mean)) < CELL
    assert abs(float(times.std() - true.stddev)) < CELL
    assert (times.diff() >= 0).all()


@pytest.mark.parametrize(
    ("alpha", "beta", "quantile"),
    [
        (1, 1, lambda u: u),
        (3, 1, lambda u: u ** (1 / 3)),
        (0.1, 1, lambda u: u**10),
        (1, 0.2, lambda u: 1 - (1 - u) ** 5),
        (1, 4, lambda u: 1 - (1 - u) ** 0.25),
        (0.5, 0.5, lambda u: torch.sin(math.pi * u / 2) ** 2),
    ],
)
def test_times_are_the_quantiles_within_a_cell(
    alpha: float, beta: float, quantile: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    uniforms = GRID.float().double()
    assert float((beta_times(GRID.float(), alpha, beta) - quantile(uniforms)).abs().max()) < CELL


def test_uniform_times_are_exact_and_shapes_are_kept() -> None:
    uniforms = GRID[:6].float().view(2, 3)
    assert torch.equal(beta_times(uniforms, 1.0, 1.0), uniforms)
    assert beta_times(uniforms, 2.0, 1.0).shape == (2, 3)
    assert beta_times(torch.tensor(0.5), 2.0, 2.0).item() == pytest.approx(0.5, abs=CELL)

"""Counter-based noise: a function of (key, stream, index) alone, and as good as random."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from yan_core.noise import RowDraws, Stream, fold, normal, uniform

N = 1_000_000
KEY = torch.tensor([12345])
MANY = {
    "indices of one key": lambda: uniform(KEY, Stream.TIME, (N,))[0],
    "consecutive keys": lambda: uniform(torch.arange(N), Stream.TIME, ()),
    "keys that differ above bit 32": lambda: uniform(torch.arange(N) << 32, Stream.TIME, ()),
    "folded keys": lambda: uniform(fold(torch.zeros(N, dtype=torch.int64), torch.arange(N)), Stream.TIME, ()),
    "a batch": lambda: uniform(torch.arange(1000), Stream.EXPERT, (1000,)).flatten(),
}


def kolmogorov_distance(sample: Tensor) -> float:
    """Greatest distance between the distribution function of a sample and the uniform one."""
    ordered = sample.double().sort().values
    rank = torch.arange(len(ordered), dtype=torch.float64) / len(ordered)
    return max(float((ordered - rank).max()), float((rank - ordered).max()) + 1 / len(ordered))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])


@pytest.mark.parametrize("draw", MANY.values(), ids=MANY.keys())
def test_uniform_over_a_million_draws(draw: Callable[[], Tensor]) -> None:
    sample = draw()
    assert sample.dtype == torch.float32 and sample.shape == (N,)
    assert 0 < float(sample.min()) and float(sample.max()) < 1
    assert kolmogorov_distance(sample) < 1.95 / math.sqrt(N)  # p = 0.001
    assert abs(correlation(sample[:-1], sample[1:])) < 4 / math.sqrt(N)
    pairs = (sample[: N // 2] * 16).long() * 16 + (sample[N // 2 :] * 16).long()
    expected = N / 2 / 256
    chi_squared = float(((torch.bincount(pairs, minlength=256) - expected) ** 2 / expected).sum())
    assert chi_squared < 330.5  # p = 0.001 at 255 degrees of freedom


def test_uniform_never_reaches_one() -> None:
    # With 24 bits and a half added, this very draw was rounded to 1.
    assert float(uniform(torch.tensor([14]), Stream.TIME, (329_881,))[0, -1]) < 1


@pytest.mark.parametrize("keys", [KEY, torch.arange(1000)], ids=["one key", "a batch"])
def test_normal_moments_and_distribution(keys: Tensor) -> None:
    sample = normal(keys, Stream.SOURCE_NOISE, (N // len(keys),)).flatten().double()
    assert torch.isfinite(sample).all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((sample**power).mean()) - moment) < 4 * math.sqrt(variance / N)
    assert kolmogorov_distance(torch.distributions.Normal(0.0, 1.0).cdf(sample)) < 1.95 / math.sqrt(N)
    assert 4.2 < float(sample.abs().max()) < 6.5


def test_a_longer_first_axis_only_appends() -> None:
    keys = torch.tensor([3, 4])
    for draw in (uniform, normal):
        short = draw(keys, Stream.SOURCE_NOISE, (5, 8))
        long = draw(keys, Stream.SOURCE_NOISE, (11, 8))
        assert short.shape == (2, 5, 8)
        assert torch.equal(long[:, :5], short)


def test_a_row_does_not_depend_on_its_batch_or_on_the_order_of_calls() -> None:
    keys = torch.tensor([9, 2**62 + 5, 0, -1])
    together = normal(keys, Stream.EXPERT, (3, 4))
    for i in (2, 0, 3, 1):
        torch.manual_seed(i)
        assert torch.equal(normal(keys[i : i + 1], Stream.EXPERT, (3, 4))[0], together[i])


def test_a_scalar_draw_and_an_empty_one() -> None:
    assert uniform(torch.arange(3), Stream.TIME, ()).shape == (3,)
    assert uniform(torch.arange(3), Stream.TIME, (0, 2)).shape == (3, 0, 2)
    assert torch.equal(uniform(KEY, Stream.TIME, ()), uniform(KEY, Stream.TIME, (4,))[:, 0])


def test_streams_are_independent() -> None:
    assert len({int(stream) for stream in Stream}) == len(Stream)
    draws = torch.stack([uniform(KEY, stream, (20_000,))[0] for stream in Stream])
    off_diagonal = torch.corrcoef(draws) - torch.eye(len(draws))
    assert float(off_diagonal.abs().max()) < 4 / math.sqrt(20_000)


def test_keys_that_differ_in_one_bit_are_independent() -> None:
    for base in (0, 123_456_789_012_345):
        keys = torch.tensor([base, *(base ^ (1 << bit) for bit in range(63))])
        draws = uniform(keys, Stream.SOURCE_NOISE, (20_000,))
        off_diagonal = torch.corrcoef(draws) - torch.eye(len(keys))
        assert float(off_diagonal.abs().max()) < 5 / math.sqrt(20_000)


def test_fold_gives_new_keys_in_range() -> None:
    keys = torch.arange(2000)
    folded = torch.cat([fold(keys, value) for value in (0, 1, 2**33, -1)])
    assert folded.dtype == torch.int64
    assert int(folded.min()) >= 0 and int(folded.max()) < 2**32
    assert len(folded.unique()) > 7990  # 8,000 random 32-bit numbers collide 0.007 times
    assert torch.equal(fold(keys, torch.full_like(keys, 7)), fold(keys, 7))
    assert torch.equal(fold(keys, torch.arange(2000))[5:6], fold(keys[5:6], 5))


def test_fold_sees_every_bit_of_key_and_value() -> None:
    zero = torch.tensor([0])
    bits = [1 << bit for bit in range(63)]
    assert len({int(fold(torch.tensor([bit]), 5)) for bit in [0, *bits]}) == 64
    assert len({int(fold(zero, bit)) for bit in [0, *bits]}) == 64


def test_draws_stay_what_they_were() -> None:
    # A served answer and a resumed run depend on these numbers; a change of them is a breaking change.
    assert (uniform(KEY, Stream.TIME, (3,))[0] * 2**23 - 0.5).tolist() == [7102648, 7217765, 1099638]
    expected = torch.tensor([[-0.487262, 0.303968, -0.291329]])
    torch.testing.assert_close(normal(KEY, Stream.SOURCE_NOISE, (3,)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same() -> None:
    keys = torch.tensor([9, 2**62 + 5, 0, -1])
    assert torch.equal(uniform(keys.cuda(), Stream.TIME, (1000,)).cpu(), uniform(keys, Stream.TIME, (1000,)))
    on_gpu, on_cpu = (normal(k, Stream.TIME, (1000,)).cpu() for k in (keys.cuda(), keys))
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_it_is_told_everywhere_alike(share: float) -> None:
    kept = RowDraws(torch.arange(64)).kept((64, 64), share).float()
    spread = math.sqrt(share * (1 - share))
    assert float(kept.mean()) == pytest.approx(1 - share, abs=5 * spread / 512)
    for axes in ((0, 1), (0, 2), (1, 2)):
        assert float((kept.mean(axes) - (1 - share)).abs().max()) < 5 * spread / 64


def test_what_dropout_keeps_is_uncorrelated_between_rows_tokens_channels_and_places() -> None:
    here = RowDraws(torch.arange(64)).kept((64, 64), 0.5).float()
    there = RowDraws(torch.arange(64)).at(0).kept((64, 64), 0.5).float()
    assert abs(correlation(here.flatten(), there.flatten())) < 0.01
    for axis in range(3):
        for shift in (1, 2, 32):
            assert abs(correlation(here.flatten(), here.roll(shift, axis).flatten())) < 0.01


def test_what_dropout_keeps_of_a_row_depends_on_its_key_and_the_place_alone() -> None:
    draws = RowDraws(torch.tensor([7, 8, 9])).at(2)
    alone = RowDraws(torch.tensor([9])).at(2)
    assert torch.equal(draws.kept((5, 8), 0.3)[2], alone.kept((11, 8), 0.3)[0, :5])
    assert RowDraws(KEY).at(1).at(2).place != RowDraws(KEY).at(2).at(1).place

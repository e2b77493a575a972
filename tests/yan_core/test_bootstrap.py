"""Confidence intervals: they cover the truth as often as they say, and are the same each time."""

import numpy as np
import pytest

from yan_core.bootstrap import Interval, Scores, bootstrap, paired_difference


def interval(values, **how) -> Interval:
    return bootstrap({"x": Scores.of_means(values)}, **how)["x"]


def test_an_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = interval(values, num_samples=4000)
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_truth_is_inside_19_times_of_20() -> None:
    generator = np.random.default_rng(1)
    found = [interval(generator.random(80) < 0.3, num_samples=300, seed=i) for i in range(300)]
    inside = np.mean([i.low <= 0.3 <= i.high for i in found])
    assert 0.90 <= inside <= 0.98


def test_the_seed_decides_and_nothing_else() -> None:
    values = np.random.default_rng(2).random(50)
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values)
    beside = bootstrap({"y": Scores.of_means(1 - values), "x": Scores.of_means(values)})
    assert vars(beside["x"]) == pytest.approx(vars(interval(values)))


def test_rows_that_are_all_right_or_all_wrong_leave_as_much_doubt_as_they_are_few() -> None:
    """Clopper and Pearson's: of so few rows with a true share of the lower end, all are right once in 40 times."""
    right, wrong = interval([1.0] * 5), interval([0.0] * 5)
    assert (right.value, right.high) == (1, 1) and right.low**5 == pytest.approx(0.025)
    assert (wrong.value, wrong.low, wrong.high) == (0, 0, pytest.approx(1 - right.low))
    assert interval([1.0] * 604).low == pytest.approx(0.9939, abs=1e-4)
    assert interval([0.5] * 5) == Interval(0.5, 0.5, 0.5)


def test_a_paired_difference_is_surer_than_two_intervals() -> None:
    generator = np.random.default_rng(3)
    hard = generator.random(300)
    first = (hard + 0.03 + 0.02 * generator.normal(size=300)).tolist()
    found, second = paired_difference(first, hard.tolist()), interval(hard)
    assert found.low > 0 and found.value == pytest.approx(0.03, abs=0.01)
    assert second.high - second.low > 10 * (found.high - found.low)
    back = paired_difference(hard.tolist(), first)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_a_metric_of_sums_is_taken_over_each_sample() -> None:
    """exp of a mean over tokens, not over rows."""
    statistics = np.array([[1.0, 1.0], [30.0, 10.0], [4.0, 2.0]])
    scores = Scores(statistics, lambda sums: np.exp(sums[..., 0] / sums[..., 1]))
    assert scores.value == pytest.approx(np.exp(35 / 13))
    found = bootstrap({"x": scores})["x"]
    assert np.exp(1) <= found.low < found.value < found.high <= np.exp(3)


def test_other_rows_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"numbers of rows \[1, 2\]"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"at least one; got numbers of rows \[0\]"):
        interval([])

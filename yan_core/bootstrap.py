"""How sure a figure is: bootstrap confidence intervals over rows, of one system and of the difference of two.

Rows are drawn anew with replacement. Rows of one document (questions on one passage) are not independent of each other;
intervals over them are then narrower than they should be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_SAMPLES = 1_000
"""Samples drawn; the ends of an interval then move by a few hundredths of its width from seed to seed."""

DRAWN_AT_ONCE = 4_000_000
"""Rows drawn at a time, over all samples."""

LEVEL = 0.95
"""Confidence level of every interval."""


@dataclass(frozen=True)
class Scores:
    """What a metric says of each row, in a form that can be added up over any choice of rows.

    A mean is the sum of scores over the number of rows; a corpus metric such as BLEU is a function of counts. Both
    follow from the sums of the rows' statistics.

    Attributes:
        statistics: float64, [rows, num_statistics].
        combine: Sums of statistics, [..., num_statistics] -> the metric, [...].
    """

    statistics: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of_means(cls, scores: Sequence[float] | np.ndarray) -> Scores:
        """Scores whose metric is their mean."""
        values = np.asarray(scores, np.float64)
        return cls(np.stack([values, np.ones_like(values)], axis=1), _ratio)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.statistics)

    @property
    def value(self) -> float:
        """The metric over all rows."""
        return float(self.combine(self.statistics.sum(0)))

    @property
    def rows(self) -> list[float]:
        """The metric of each row alone."""
        return self.combine(self.statistics).tolist()

    def of_rows(self, chosen: Sequence[int]) -> Scores:
        """The same metric over some of the rows."""
        return Scores(self.statistics[list(chosen)], self.combine)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """First statistic over the second; not a number where that is 0."""
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Interval:
    """A figure and where it lies with a confidence of LEVEL.

    Attributes:
        value: The figure over all rows.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def bootstrap(scores: Mapping[str, Scores], num_samples: int = NUM_SAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Percentile bootstrap of metrics over the rows that they share.

    Args:
        scores: By the metric's name, each of the same rows, >= 1.
        num_samples: Samples of rows.
        seed: Of the draws: the same one gives the same intervals.

    Raises:
        ValueError: If there is no row, or the numbers of rows differ.

    Where every row has 1, or every row 0, all samples are alike and would leave no doubt: there the interval is the
    exact one of a share.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13; Clopper and Pearson 1934.
    """
    samples = _samples(list(scores.values()), num_samples, seed)
    found = {name: _interval(s.value, drawn) for (name, s), drawn in zip(scores.items(), samples, strict=True)}
    return found | {name: exact for name, s in scores.items() if (exact := _of_a_clean_sweep(s))}


def paired_difference(
    first: Scores | Sequence[float],
    second: Scores | Sequence[float],
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> Interval:
    """First system's metric less the second's, both over the same rows in each sample.

    If the interval leaves 0 out, the systems differ at that level of confidence.

    Args:
        first: Of each row; of a list the metric is the mean.
        second: Of the same rows in the same order.
        num_samples: Samples of rows.
        seed: Of the draws.

    Raises:
        ValueError: If there is no row, or the numbers of rows differ.

    Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation (paired bootstrap).
    """
    a, b = (s if isinstance(s, Scores) else Scores.of_means(s) for s in (first, second))
    of_a, of_b = _samples([a, b], num_samples, seed)
    return _interval(a.value - b.value, of_a - of_b)


def _samples(systems: Sequence[Scores], num_samples: int, seed: int) -> list[np.ndarray]:
    """Each system's metric over each sample of the rows, [num_samples]."""
    counts = sorted({len(s) for s in systems})
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"a bootstrap needs the same rows for all, at least one; got numbers of rows {counts}")
    statistics = np.concatenate([s.statistics for s in systems], axis=1)
    generator, sums, left = np.random.default_rng(seed), [], num_samples
    while left:
        some = min(left, max(1, DRAWN_AT_ONCE // counts[0]))
        # How often each row is in each sample.
        drawn = generator.multinomial(counts[0], np.full(counts[0], 1 / counts[0]), size=some)
        sums.append(drawn @ statistics)
        left -= some
    ends = np.cumsum([s.statistics.shape[1] for s in systems])[:-1]
    parts = np.split(np.concatenate(sums), ends, axis=1)
    return [s.combine(part) for s, part in zip(systems, parts, strict=True)]


def _of_a_clean_sweep(scores: Scores) -> Interval | None:
    """The interval of a mean whose rows are all 1, or all 0; None for any other metric or rows."""
    first, value = scores.statistics[:, 0], scores.value
    if scores.combine is not _ratio or value not in (0.0, 1.0) or (first != value).any():
        return None
    doubt = 1 - ((1 - LEVEL) / 2) ** (1 / len(scores))
    return Interval(1.0, 1 - doubt, 1.0) if value else Interval(0.0, 0.0, doubt)


def _interval(value: float, samples: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(samples, [tail, 1 - tail]).tolist()
    return Interval(value, low, high)

"""Which rows make which batch: a function of the prepared shards, the seed and the step alone. No Ray, no torch.

The rows of all epochs stand in one long line, each epoch's in an order of its own. The next `pool_batches` batches of
that line are a pool. A pool is cut into `lanes`; each lane sorts its rows by length and cuts them into one piece a
batch, and the pool's i-th batch is the i-th piece of every lane. So a batch holds rows of like length, and it is the
same batch however many workers share the lanes, and after whatever restart.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from yan_core.config import DataConfig, RunConfig, StageConfig

FRAGMENT_ROWS = 1024
"""Most neighbouring rows that stay together when an epoch is shuffled; small data are shuffled row by row."""

FRAGMENTS = 65_536
"""Data of fewer rows than this are shuffled row by row, and so on in proportion up to FRAGMENT_ROWS."""


@dataclass(frozen=True)
class Shard:
    """A file of prepared rows.

    Attributes:
        path: The file.
        rows: Rows in it.
        epochs: How often an epoch reads it; of 0.5, half of it, and the other half in the next epoch.
    """

    path: str
    rows: int
    epochs: float = 1.0


class Sharded(Protocol):
    """Data in shards."""

    def shards(self, stage: str) -> list[Shard]:
        """Shards that a stage trains on."""
        ...


@dataclass(frozen=True)
class Position:
    """Where a training stands.

    Attributes:
        stage: Name of the stage.
        fingerprint: Hash of what the stage's result depends on; another one is another training.
        step: Optimizer steps of the stage that are done.
        epoch: Which reading of the data goes on, from 0.
        position: Rows of that epoch that are done with.
    """

    stage: str
    fingerprint: str
    step: int
    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class RowSlice:
    """Some rows of one fragment.

    Attributes:
        path: The shard's file.
        places: Their places in that file, int64, [rows].
        ids: Their numbers among all rows of the stage, int64, [rows]; what is read twice in an epoch has two.
        epoch: Which reading of the data this is, from 0.
    """

    path: str
    places: np.ndarray
    ids: np.ndarray
    epoch: int


@dataclass(frozen=True)
class _Epoch:
    """An epoch's fragments in its order, which reading of each this is, and where each one ends in the epoch."""

    fragments: np.ndarray
    reading: np.ndarray
    ends: np.ndarray


class RowOrder:
    """The line of rows of all epochs."""

    def __init__(self, shards: Sequence[Shard], seed: int) -> None:
        """Describe it.

        Args:
            shards: All files of a stage.
            seed: Of the order.
        """
        self.shards, self.seed = list(shards), seed
        self.rows = np.array([shard.rows for shard in shards], np.int64)
        self.all_once = all(shard.epochs == 1 for shard in shards)
        total = int(self.rows.sum())
        self.fragment_rows = min(FRAGMENT_ROWS, max(1, total // FRAGMENTS))
        self.row_ends, self.fragment_ends = self.rows.cumsum(), (-(-self.rows // self.fragment_rows)).cumsum()
        self._starts = [0]

    def _fragments(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, first row in it and number of rows of fragments."""
        shard = np.searchsorted(self.fragment_ends, numbers, side="right")
        before = np.concatenate([[0], self.fragment_ends])[shard]
        start = (numbers - before) * self.fragment_rows
        return shard, start, np.minimum(self.fragment_rows, self.rows[shard] - start)

    @lru_cache(maxsize=2)  # noqa: B019 - one object a process, as long-lived as the process
    def _epoch(self, epoch: int) -> _Epoch:
        everything, readings = np.arange(int(self.fragment_ends[-1])), np.zeros(int(self.fragment_ends[-1]), np.int64)
        if not self.all_once:
            # Each fragment has its own phase, so that half of them come in each epoch and not all in every second one.
            phase = np.random.default_rng([self.seed, 1 << 32]).random(len(everything))
            often = np.array([shard.epochs for shard in self.shards])[self._fragments(everything)[0]]
            times = (np.floor(often * (epoch + 1) + phase) - np.floor(often * epoch + phase)).astype(np.int64)
            everything = np.repeat(everything, times)
            readings = np.arange(len(everything)) - np.repeat(times.cumsum() - times, times)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(everything))
        return _Epoch(everything[order], readings[order], self._fragments(everything[order])[2].cumsum())

    def epoch_at(self, position: int) -> tuple[int, int]:
        """The epoch that a place in the line is in, and the rows of that epoch before it."""
        if self.all_once:
            return divmod(position, int(self.row_ends[-1]))
        while self._starts[-1] <= position:
            ends = self._epoch(len(self._starts) - 1).ends
            self._starts.append(self._starts[-1] + (int(ends[-1]) if len(ends) else 0))
        epoch = bisect_right(self._starts, position) - 1
        return epoch, position - self._starts[epoch]

    @property
    def num_rows(self) -> int:
        """Rows of an epoch; of the first one, where epochs differ."""
        ends = self._epoch(0).ends
        return int(ends[-1]) if len(ends) else 0

    def slices(self, start: int, stop: int) -> list[RowSlice]:
        """The rows from `start` to before `stop` of the line, in order."""
        found = []
        while start < stop:
            number, at = self.epoch_at(start)
            epoch = self._epoch(number)
            k = int(np.searchsorted(epoch.ends, at, side="right"))
            fragment, reading = int(epoch.fragments[k]), int(epoch.reading[k])
            (shard,), (first,), (count,) = self._fragments(epoch.fragments[k : k + 1])
            before = int(epoch.ends[k] - count)
            until = min(int(epoch.ends[k]), at + stop - start)
            within = np.arange(count)
            if count > 1:
                rng = np.random.default_rng([self.seed, number, fragment, reading])
                within = rng.permutation(count)
            places = first + within[at - before : until - before]
            ids = reading * int(self.row_ends[-1]) + self.row_ends[shard] - self.rows[shard] + places
            found.append(RowSlice(self.shards[shard].path, places, ids, number))
            start += until - at
        return found


@dataclass(frozen=True)
class Pool:
    """Batches that are sorted by length together.

    Attributes:
        number: Which pool of the stage, from 0.
        first_step: Optimizer step, from 0, of the first of `batches`.
        batches: Which of its batches are used, the shortest being number 0, in the order they are used in.
    """

    number: int
    first_step: int
    batches: np.ndarray


class StageOrder:
    """The batches of a stage."""

    def __init__(self, rows: RowOrder, settings: StageConfig, data: DataConfig) -> None:
        self.rows, self.settings = rows, settings
        self.lanes = num_lanes(settings, data)
        self.lane_rows = settings.batch_size // self.lanes  # in each batch
        # A pool longer than an epoch would put a row twice into one batch.
        self.pool_batches = max(1, min(data.pool_batches, rows.num_rows // settings.batch_size))
        # First steps of the pools of the curriculum, and of the first one after it; from there on all are of one size.
        self._starts = [0]
        while self._starts[-1] < settings.curriculum_steps:
            self._starts.append(self._starts[-1] + self.kept_batches(self._starts[-1]))

    def kept_batches(self, step: int) -> int:
        """How many of a pool's batches, the shortest first, are used when its first one is at `step`."""
        until = self.settings.curriculum_steps
        return self.pool_batches if step >= until else math.ceil(self.pool_batches * (step + 1) / until)

    def first_step(self, pool: int) -> int:
        """Optimizer step of a pool's first batch."""
        beyond = pool - (len(self._starts) - 1)
        return self._starts[pool] if beyond < 0 else self._starts[-1] + beyond * self.pool_batches

    def pool_at(self, step: int) -> int:
        """Number of the pool that gives a step's batch."""
        if step < self._starts[-1]:
            return bisect_right(self._starts, step) - 1
        return len(self._starts) - 1 + (step - self._starts[-1]) // self.pool_batches

    def pool_left(self, step: int) -> int:
        """Number of the first pool that has batches from a step on; `num_pools` where none is left."""
        return self.pool_at(step) if step < self.settings.max_steps else self.num_pools

    @property
    def num_pools(self) -> int:
        """Pools of the stage."""
        return self.pool_at(self.settings.max_steps - 1) + 1 if self.settings.max_steps else 0

    def pool(self, number: int, step: int = 0) -> Pool:
        """A pool, or what is left of it from a step within it on."""
        at = self.first_step(number)
        used = np.random.default_rng([self.rows.seed, number]).permutation(self.kept_batches(at))
        return Pool(number, max(at, step), used[max(0, step - at) : self.settings.max_steps - at])

    def pools(self, step: int = 0) -> Iterator[Pool]:
        """The stage's pools from optimizer step `step` on; of the first one, what is left of it."""
        return (self.pool(number, step) for number in range(self.pool_left(step), self.num_pools))

    def lane(self, pool: int, lane: int) -> tuple[int, int]:
        """Where a lane of a pool begins and ends in the line of rows."""
        size = self.pool_batches * self.lane_rows
        start = (pool * self.lanes + lane) * size
        return start, start + size

    def pick(self, lengths: np.ndarray, batches: np.ndarray) -> np.ndarray:
        """Rows of a lane that make its piece of each of some batches.

        Args:
            lengths: Length of each row of the lane, [pool_batches * lane_rows].
            batches: Numbers of batches, the shortest being 0.

        Returns:
            Places in `lengths`, [len(batches) * lane_rows].
        """
        return np.argsort(lengths, kind="stable").reshape(self.pool_batches, self.lane_rows)[batches].ravel()

    def cursor(self, step: int) -> dict[str, int]:
        """Where reading goes on at a step: epoch, and rows of it that are done with (of whole pools)."""
        epoch, position = self.rows.epoch_at(self.lane(self.pool_left(step), 0)[0])
        return {"epoch": epoch, "position": position}


def num_lanes(settings: StageConfig, data: DataConfig) -> int:
    """Lanes of a stage: data.lanes, or as many of them as divide its batch evenly."""
    return math.gcd(settings.batch_size, data.lanes)


def stage_order(data: Sharded, stage: str, config: RunConfig) -> StageOrder:
    """The batches of a stage."""
    return StageOrder(RowOrder(data.shards(stage), config.seed), getattr(config.stages, stage), config.data)

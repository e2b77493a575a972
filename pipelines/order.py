"""Which rows make which batch: a function of the prepared shards, the seed and the step alone. No Ray, no torch.

The rows of all epochs stand in one long line, each epoch's in an order of its own. The next `pool_batches` batches of
that line are a pool. A pool is cut into `lanes`; each lane sorts its rows by length and cuts them into one piece a
batch, and the pool's i-th batch is the i-th piece of every lane. So a batch holds rows of like length, and it is the
same batch however many workers share the lanes, and after whatever restart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from yan_core.config import DataConfig, StageConfig

FRAGMENT_ROWS = 1024
"""Rows that are read together, a row group of a shard; an epoch shuffles fragments, and the rows within each."""


@dataclass(frozen=True)
class Piece:
    """Some rows of one fragment.

    Attributes:
        path: The shard's file.
        places: Their places in that file, int64, [rows].
        ids: Their numbers among all rows of the stage, int64, [rows].
        epoch: Which reading of the data this is, from 0.
    """

    path: str
    places: np.ndarray
    ids: np.ndarray
    epoch: int


class RowOrder:
    """The line of rows of all epochs."""

    def __init__(self, shards: Sequence[tuple[str, int]], seed: int) -> None:
        """Describe it.

        Args:
            shards: File and number of rows of each shard.
            seed: Of the order.
        """
        self.paths, self.seed = [path for path, _ in shards], seed
        self.rows = np.array([rows for _, rows in shards], np.int64)
        self.row_ends, self.fragment_ends = self.rows.cumsum(), (-(-self.rows // FRAGMENT_ROWS)).cumsum()
        self.num_rows = int(self.rows.sum())

    def _fragments(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard, first row in it and number of rows of fragments."""
        shard = np.searchsorted(self.fragment_ends, numbers, side="right")
        before = np.concatenate([[0], self.fragment_ends])[shard]
        start = (numbers - before) * FRAGMENT_ROWS
        return shard, start, np.minimum(FRAGMENT_ROWS, self.rows[shard] - start)

    @lru_cache(maxsize=4)  # noqa: B019 - one object a process, as long-lived as the process
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Fragments in an epoch's order, and where each one ends in it."""
        order = np.random.default_rng([self.seed, epoch]).permutation(int(self.fragment_ends[-1]))
        return order, self._fragments(order)[2].cumsum()

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The rows from `start` to before `stop` of the line, in order."""
        found = []
        while start < stop:
            epoch, at = divmod(start, self.num_rows)
            order, ends = self._epoch(epoch)
            k = int(np.searchsorted(ends, at, side="right"))
            (shard,), (first,), (count,) = self._fragments(order[k : k + 1])
            before = int(ends[k] - count)
            until = min(int(ends[k]), at + stop - start)
            rng = np.random.default_rng([self.seed, epoch, int(order[k])])
            places = first + rng.permutation(count)[at - before : until - before]
            ids = self.row_ends[shard] - self.rows[shard] + places
            found.append(Piece(self.paths[shard], places, ids, epoch))
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

    def kept_batches(self, step: int) -> int:
        """How many of a pool's batches, the shortest first, are used when its first one is at `step`."""
        until = self.settings.curriculum_steps
        return self.pool_batches if step >= until else math.ceil(self.pool_batches * (step + 1) / until)

    def pools(self, step: int = 0) -> list[Pool]:
        """The stage's pools from optimizer step `step` on; of the first one, what is left of it."""
        found, at, number = [], 0, 0
        while at < self.settings.max_steps:
            kept = self.kept_batches(at)
            used = np.random.default_rng([self.rows.seed, number]).permutation(kept)[: self.settings.max_steps - at]
            if at + len(used) > step:
                found.append(Pool(number, max(at, step), used[max(0, step - at) :]))
            at, number = at + len(used), number + 1
        return found

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
        left = self.pools(step)
        done = self.lane(left[0].number if left else self.pools()[-1].number + 1, 0)[0]
        epoch, position = divmod(done, self.rows.num_rows)
        return {"epoch": epoch, "position": position}


def num_lanes(settings: StageConfig, data: DataConfig) -> int:
    """Lanes of a stage: data.lanes, or as many of them as divide its batch evenly."""
    return math.gcd(settings.batch_size, data.lanes)

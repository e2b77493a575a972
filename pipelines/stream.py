"""Prepared shards -> one Ray Data stream of rows for all stages of a training, from the step where it stands.

A block of the stream is what one worker reads of one pool (see order.py), or of a run of them: the rows of its lanes,
batch after batch. The blocks of a round, one a worker, hold equally many rows, so that Ray Data, which gives the next
block to the worker that has had fewest, deals them out in turn. A restart, on as many workers as there then are, opens
the stream where the training stands and reads nothing that is done with. No torch here: its readers start sooner so.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from pipelines.order import Pool, StageOrder, stage_order
from pipelines.prepare import Prepared
from yan_core.config import RunConfig

IDS = pa.list_(pa.int32())


MOST_BLOCKS = 8_192
"""Blocks of a stage's stream at which they begin to hold several pools: Ray Data takes a millisecond to plan each."""

LEAST_ROUNDS = 64
"""Rounds of blocks that a long stage has at least, so that a block stays small though there are many workers."""

FILLING = -1
"""`step` of the rows that fill a block up: where the lanes do not go into the workers, some have one lane less."""


@dataclass(frozen=True)
class StageStream:
    """What is left of a stage, dealt out to workers.

    Attributes:
        stage: Its name.
        order: Its batches.
        step: Optimizer steps that are done.
        workers: How many share each batch.
    """

    stage: str
    order: StageOrder
    step: int = 0
    workers: int = 1

    @property
    def first_pool(self) -> int:
        """The pool that the next batch comes from; after the last step one behind the last."""
        return self.order.pool_left(self.step)

    @property
    def pools_per_block(self) -> int:
        """Pools of a block."""
        left = self.order.num_pools - self.first_pool
        return -(-left // max(MOST_BLOCKS // self.workers, LEAST_ROUNDS)) or 1

    @property
    def num_blocks(self) -> int:
        """Blocks of the stream: a multiple of the workers."""
        left = self.order.num_pools - self.first_pool
        return -(-left // self.pools_per_block) * self.workers

    def pools(self, round_: int) -> list[Pool]:
        """Those of a round of blocks, from 0; of the first one, what is left of it."""
        first = self.first_pool + round_ * self.pools_per_block
        last = min(first + self.pools_per_block, self.order.num_pools)
        return [self.order.pool(number, self.step) for number in range(first, last)]


def lanes_of(rank: int, lanes: int, workers: int) -> range:
    """The lanes that a worker takes of each batch."""
    return range(rank, lanes, workers)


@lru_cache(maxsize=64)
def _open(path: str) -> tuple[pq.ParquetFile, np.ndarray]:
    """A shard, and where each of its row groups ends."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    return file, np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])


@lru_cache(maxsize=1024)
def _row_group(path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    return _open(path)[0].read_row_group(group, columns=list(columns), use_threads=False)


def read_rows_of(places: Sequence[tuple[str, np.ndarray]], columns: Sequence[str]) -> pa.Table:
    """Rows of Parquet files, by file and places in it; row groups that were read lately are not read again."""
    tables, start_of, taken, rows = [], {}, [], 0
    for path, wanted in places:
        ends = _open(path)[1]
        groups = np.searchsorted(ends, wanted, side="right")
        for group in np.unique(groups).tolist():
            if (path, group) not in start_of:
                tables.append(_row_group(path, group, tuple(columns)))
                start_of[path, group] = rows - (int(ends[group]) - tables[-1].num_rows)
                rows += tables[-1].num_rows
        taken.append(wanted + np.array([start_of[path, group] for group in groups.tolist()], np.int64))
    return pa.concat_tables(tables).take(np.concatenate(taken)).combine_chunks()


class ReadShare:
    """Number of a block -> a worker's rows of some pools, batch after batch, and in each lane after lane.

    Columns: `source` (empty but in fine-tuning) and `target`, token ids; `row` and `epoch`, which random draws follow
    from; `stage`, `step` and `rank`, by which a worker sees that it got what is its.
    """

    def __init__(self, streams: Sequence[StageStream]) -> None:
        self.streams = list(streams)
        self.first = np.cumsum([0, *(s.num_blocks for s in streams)]).tolist()

    def __call__(self, numbers: pa.Table) -> pa.Table:
        """Read one block, or several."""
        return pa.concat_tables([self.read(n) for n in numbers.column("id").to_pylist()])

    def read(self, number: int) -> pa.Table:
        """Read one block."""
        index = bisect_right(self.first, number) - 1
        stream = self.streams[index]
        round_, rank = divmod(number - self.first[index], stream.workers)
        lanes = lanes_of(rank, stream.order.lanes, stream.workers)
        pools = stream.pools(round_)
        table = pa.concat_tables([_read_pool(stream, pool, lanes, rank) for pool in pools])
        widest = len(lanes_of(0, stream.order.lanes, stream.workers))
        missing = (widest - len(lanes)) * stream.order.lane_rows * sum(len(pool.batches) for pool in pools)
        return pa.concat_tables([table, _filling(table, missing)]) if missing else table


def _read_pool(stream: StageStream, pool: Pool, lanes: range, rank: int) -> pa.Table:
    """A worker's rows of one pool."""
    order, task = stream.order, stream.stage == "finetune"
    columns = ["source", "target"] if task else ["target"]
    of_lanes = [order.rows.slices(*order.lane(pool.number, lane)) for lane in lanes]
    slices = [part for of_lane in of_lanes for part in of_lane]
    rows = read_rows_of([(s.path, s.places) for s in slices], columns)
    epoch = np.concatenate([np.full(len(s.ids), s.epoch, np.int32) for s in slices])
    ids = np.concatenate([s.ids for s in slices])
    lengths = np.diff(rows.column(columns[0]).combine_chunks().offsets.to_numpy()).reshape(len(lanes), -1)
    size = lengths.shape[1]
    picked = np.stack([i * size + order.pick(of_lane, pool.batches) for i, of_lane in enumerate(lengths)])
    picked = picked.reshape(len(lanes), len(pool.batches), -1).swapaxes(0, 1).ravel()  # by batch, then by lane
    rows = rows.take(picked)
    steps = np.arange(pool.first_step, pool.first_step + len(pool.batches), dtype=np.int32)
    return pa.table(
        {
            "stage": pa.array([stream.stage] * len(picked)),
            "step": np.repeat(steps, len(lanes) * order.lane_rows),
            "rank": np.full(len(picked), rank, np.int32),
            "epoch": epoch[picked],
            "row": ids[picked],
            "source": rows.column("source") if task else pa.array([[]] * len(picked), IDS),
            "target": rows.column("target"),
        }
    )


def _filling(like: pa.Table, count: int) -> pa.Table:
    """Rows that belong to no step."""
    columns = {name: like.column(name).take(np.zeros(count, np.int64)) for name in ("stage", "rank", "epoch", "row")}
    nothing = pa.array([[]] * count, IDS)
    columns |= {"step": np.full(count, FILLING, np.int32), "source": nothing, "target": nothing}
    return pa.table(columns).select(like.column_names)


def open_stream(
    prepared: Prepared, config: RunConfig, stages: Sequence[str], step: int = 0, workers: int = 1
) -> ray.data.Dataset:
    """The lazy stream of all rows that stages will read, in order.

    Args:
        prepared: The data.
        config: The run.
        stages: Names of the stages that are left.
        step: Optimizer steps of the first of them that are done.
        workers: How many share each batch; at most the stages' lanes.
    """
    streams = [
        StageStream(stage, stage_order(prepared, stage, config), 0 if i else step, workers)
        for i, stage in enumerate(stages)
    ]
    num_blocks = sum(s.num_blocks for s in streams)
    numbers = ray.data.range(num_blocks, override_num_blocks=max(1, num_blocks))
    # A block that Ray Data cut in two would go to two workers.
    numbers.context.target_max_block_size = None
    return numbers.map_batches(ReadShare(streams), batch_format="pyarrow", batch_size=None)

"""Prepared shards -> one Ray Data stream of rows for all stages of a training, from the step where it stands.

A block of the stream is one lane of one pool (see order.py), so that a restart reads nothing that is done with, and the
round of blocks over the workers is the same each time. No torch here: its readers start sooner so.
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


@dataclass(frozen=True)
class StageStream:
    """What is left of a stage.

    Attributes:
        stage: Its name.
        order: Its batches.
        pools: Those still to be read, what is left of the first one included.
    """

    stage: str
    order: StageOrder
    pools: list[Pool]

    @property
    def num_blocks(self) -> int:
        """Blocks of the stream."""
        return len(self.pools) * self.order.lanes


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


class ReadLane:
    """Number of a block -> the rows of one lane of one pool, batch after batch.

    Columns: `source` (empty but in fine-tuning) and `target`, token ids; `row` and `epoch`, which random draws follow
    from; `stage`, `step` and `lane`, by which a worker sees that it got what is its.
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
        stream, order = self.streams[index], self.streams[index].order
        which, lane = divmod(number - self.first[index], order.lanes)
        pool = stream.pools[which]
        task = stream.stage == "finetune"
        columns = ["source", "target"] if task else ["target"]
        pieces = order.rows.pieces(*order.lane(pool.number, lane))
        rows = read_rows_of([(p.path, p.places) for p in pieces], columns)
        epoch = np.concatenate([np.full(len(p.ids), p.epoch, np.int32) for p in pieces])
        ids = np.concatenate([p.ids for p in pieces])
        lengths = np.diff(rows.column(columns[0]).combine_chunks().offsets.to_numpy())
        picked = order.pick(lengths, pool.batches)
        rows = rows.take(picked)
        steps = np.repeat(
            np.arange(pool.first_step, pool.first_step + len(pool.batches), dtype=np.int32), order.lane_rows
        )
        constant = np.ones(len(picked), np.int32)
        return pa.table(
            {
                "stage": pa.array([stream.stage] * len(picked)),
                "step": steps,
                "lane": lane * constant,
                "epoch": epoch[picked],
                "row": ids[picked],
                "source": rows.column("source") if task else pa.array([[]] * len(picked), IDS),
                "target": rows.column("target"),
            }
        )


def open_stream(prepared: Prepared, config: RunConfig, stages: Sequence[str], step: int = 0) -> ray.data.Dataset:
    """The lazy stream of all rows that stages will read, in order.

    Args:
        prepared: The data.
        config: The run.
        stages: Names of the stages that are left.
        step: Optimizer steps of the first of them that are done.
    """
    streams = []
    for i, stage in enumerate(stages):
        order = stage_order(prepared, stage, config)
        streams.append(StageStream(stage, order, order.pools(step if i == 0 else 0)))
    num_blocks = sum(s.num_blocks for s in streams)
    numbers = ray.data.range(num_blocks, override_num_blocks=max(1, num_blocks))
    # A block that Ray Data cut in two would go to two workers.
    numbers.context.target_max_block_size = None
    return numbers.map_batches(ReadLane(streams), batch_format="pyarrow", batch_size=None)

"""A worker's share of the stream of rows -> the batches of each step, corrupted and padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from ray.data.collate_fn import ArrowBatchCollateFn

from pipelines.batches import as_rows, make_batch
from pipelines.order import num_lanes, stage_order
from pipelines.prepare import Prepared
from pipelines.stream import FILLING, ReadShare, StageStream, lanes_of
from yan_core.batching import Batch
from yan_core.config import RunConfig, StageConfig
from yan_core.training import TrainingFailed


class _AsTable(ArrowBatchCollateFn):
    """A block as it is."""

    def __call__(self, table: pa.Table) -> list[pa.Table]:
        """In a list, or Ray Data would look for tensors in it."""
        return [table]


class StageBatches:
    """One worker's part of each step's batch, from its part of the stream."""

    def __init__(self, blocks: Iterator[pa.Table], config: RunConfig, rank: int = 0, workers: int = 1) -> None:
        """Read a stream.

        Args:
            blocks: What this worker gets of the blocks of `open_stream`: every `workers`-th from the `rank`-th on.
            config: The run.
            rank: This worker's number.
            workers: How many workers share a step's batch.
        """
        self.blocks, self.config, self.rank, self.workers = blocks, config, rank, workers

    def stage(self, stage: str, step: int) -> Iterator[Batch]:
        """The batches of a stage from a step on, one a step; the stream must stand there.

        Raises:
            TrainingFailed: If it does not, which is a fault of the stream and not of the data.
        """
        settings: StageConfig = getattr(self.config.stages, stage)
        lanes = num_lanes(settings, self.config.data)
        own = len(lanes_of(self.rank, lanes, self.workers))
        in_batch = own * settings.batch_size // lanes
        while step < settings.max_steps:
            block = next(self.blocks, None)
            if block is None:
                raise TrainingFailed(f"stage {stage} ran out of rows at step {step}: prepare the data again")
            found = tuple(block.column(name)[0].as_py() for name in ("stage", "step", "rank"))
            if found != (stage, step, self.rank):
                raise TrainingFailed(
                    f"the stream of rows is out of order: expected stage, step, rank {(stage, step, self.rank)}, "
                    f"got {found}; start again from the last checkpoint"
                )
            rows = _columns(block)
            for start in range(0, int((rows["step"] != FILLING).sum()), in_batch):
                part = {name: values[start : start + in_batch] for name, values in rows.items()}
                yield make_batch(self.config, stage, part, groups=own)
                step += 1


def _columns(block: pa.Table) -> dict[str, np.ndarray]:
    """Columns of a block; those of token ids as arrays of arrays."""
    found = {name: np.array(block.column(name).to_numpy()) for name in ("epoch", "row", "step")}  # writable
    for name in ("source", "target"):
        array = block.column(name).combine_chunks()
        found[name] = as_rows(array.values.to_numpy(), array.offsets.to_numpy())
    return found


def open_blocks(shard: Any) -> Iterator[pa.Table]:
    """This worker's blocks, from `ray.train.get_dataset_shard`."""
    for (block,) in shard.iter_torch_batches(batch_size=None, collate_fn=_AsTable(), prefetch_batches=2):
        yield block


def stage_batches(config: RunConfig, prepared: Prepared, stage: str, step: int = 0) -> Iterator[Batch]:
    """The batches of a stage from a step on, read in this process."""
    read = ReadShare([StageStream(stage, stage_order(prepared, stage, config), step)])
    blocks = (read.read(number) for number in range(read.first[-1]))
    return StageBatches(blocks, config).stage(stage, step)

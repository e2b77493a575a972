"""A worker's share of the stream of rows -> the batches of each step, corrupted and padded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from ray.data.collate_fn import ArrowBatchCollateFn

from pipelines.order import num_lanes
from yan_core.batching import Batch, autoencoder_batch, infilling_batch, task_batch
from yan_core.config import RunConfig, StageConfig
from yan_core.noise import fold
from yan_core.training import TrainingFailed

T = TypeVar("T")


def row_keys(seed: int, epochs: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Keys for the random draws of rows, int64, [rows]: from the seed, the epoch and the row's number alone."""
    return fold(fold(torch.as_tensor(rows, dtype=torch.int64), seed), torch.as_tensor(epochs, dtype=torch.int64))


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
        in_batch = settings.batch_size // lanes
        while step < settings.max_steps:
            round_ = []
            for lane in range(self.rank, lanes, self.workers):
                block = next(self.blocks, None)
                if block is None:
                    raise TrainingFailed(f"stage {stage} ran out of rows at step {step}: prepare the data again")
                found = tuple(block.column(name)[0].as_py() for name in ("stage", "step", "lane"))
                if found != (stage, step, lane):
                    raise TrainingFailed(
                        f"the stream of rows is out of order: expected stage, step, lane {(stage, step, lane)}, "
                        f"got {found}; start again from the last checkpoint"
                    )
                round_.append(_columns(block))
            for i in range(len(round_[0]["step"]) // in_batch):
                part = slice(i * in_batch, (i + 1) * in_batch)
                rows = {name: np.concatenate([r[name][part] for r in round_]) for name in round_[0]}
                yield self._batch(stage, rows, groups=len(round_))
                step += 1

    def _batch(self, stage: str, rows: dict[str, np.ndarray], groups: int) -> Batch:
        config = self.config
        keys = row_keys(config.seed, rows["epoch"], rows["row"])
        sources, targets = list(rows["source"]), list(rows["target"])
        if stage == "autoencoder":
            return autoencoder_batch(targets, keys, config.autoencoder_loss, groups)
        fill = config.model.length == "fill" or config.baseline is not None
        if stage == "flow":
            return infilling_batch(targets, keys, config.flow_loss, fill, groups)
        longest = config.data.max_target_tokens
        return task_batch(sources, targets, keys, config.flow_loss, longest, fill)


def _columns(block: pa.Table) -> dict[str, np.ndarray]:
    """Columns of a block; those of token ids as arrays of arrays."""
    found = {name: block.column(name).to_numpy() for name in ("epoch", "row", "step")}
    for name in ("source", "target"):
        array = block.column(name).combine_chunks()
        values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
        found[name] = np.empty(len(array), object)
        found[name][:] = [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return found


def open_blocks(shard: Any) -> Iterator[pa.Table]:
    """This worker's blocks, from `ray.train.get_dataset_shard`."""
    for (block,) in shard.iter_torch_batches(batch_size=None, collate_fn=_AsTable(), prefetch_batches=2):
        yield block


def ahead(batches: Iterator[T], depth: int = 4) -> Iterator[T]:
    """The same, made by a thread of its own up to `depth` batches ahead of their use; an error comes in its place."""
    end: Any = object()
    maker = ThreadPoolExecutor(1)
    try:
        ready = deque(maker.submit(next, batches, end) for _ in range(depth))
        while (batch := ready.popleft().result()) is not end:
            ready.append(maker.submit(next, batches, end))
            yield batch
    finally:
        maker.shutdown(wait=False, cancel_futures=True)

"""Prepared shards -> a Ray Data stream -> the batches of a stage.

A worker takes a pool of several batches at a time from its stream, sorts the pool by length and cuts it into batches,
so that a batch holds rows of like length and little padding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data.collate_fn import ArrowBatchCollateFn

from pipelines.prepare import Prepared
from yan_core.batching import Batch, autoencoder_batch, infilling_batch, task_batch
from yan_core.config import RunConfig
from yan_core.noise import fold

POOL_BATCHES = 8
"""Batches sorted by length together."""


def open_stage(prepared: Prepared, stage: str, config: RunConfig) -> ray.data.Dataset:
    """The lazy stream of all rows a stage will read: its files epoch after epoch, in a new, seeded order each time.

    One stream for all epochs, since ending one and starting the next costs Ray Data seconds (EXPERIMENTS, 2026-11-23).
    """
    settings = getattr(config.stages, stage)
    epochs = math.ceil(settings.max_steps * settings.batch_size / prepared.num_rows(stage)) + 1
    files = prepared.files(stage)
    order = [i for epoch in range(epochs) for i in np.random.default_rng([config.seed, epoch]).permutation(len(files))]
    columns = ["source", "target"] if stage == "finetune" else ["target"]
    return ray.data.read_parquet([files[i] for i in order], columns=columns)


def _rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    array = column.combine_chunks()
    values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
    return [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def row_keys(rows: list[np.ndarray], seed: int, epoch: int) -> torch.Tensor:
    """A key a row from its content, the seed and the epoch: where the row is read makes no difference."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=7).digest() for row in rows]
    keys = torch.tensor([int.from_bytes(d, "little") for d in digests], dtype=torch.int64)
    return fold(fold(keys, seed), epoch)


class StageCollate(ArrowBatchCollateFn):
    """A pool of rows -> a list of batches of a stage, as dictionaries of tensors."""

    def __init__(self, config: RunConfig, stage: str, workers: int, epoch_rows: int, first_step: int = 0) -> None:
        """Make it for one worker.

        Args:
            config: The run.
            stage: Stage name.
            workers: Number of workers that share a step's batch.
            epoch_rows: Rows of an epoch over all workers.
            first_step: Steps done before, where an interrupted run goes on.
        """
        self.config, self.stage, self.workers, self.epoch_rows = config, stage, workers, epoch_rows
        self.step_rows = getattr(config.stages, stage).batch_size
        self.rows_before = first_step * self.step_rows

    def __call__(self, table: pa.Table) -> list[dict[str, torch.Tensor]]:
        """Sort by length, cut, corrupt, pad."""
        rows = {name: _rows(table.column(name)) for name in table.column_names}
        lengths = np.array([len(r) for r in rows["source" if "source" in rows else "target"]])
        order = np.argsort(lengths, kind="stable")
        size = self.step_rows // self.workers
        epoch = self.rows_before // self.epoch_rows
        whole = len(order) // size
        batches = []
        # The same order of lengths on every worker: they wait for each other at every step.
        for i in np.random.default_rng([self.config.seed, self.rows_before]).permutation(whole):
            chosen = order[i * size : (i + 1) * size]
            batches.append(vars(self._batch({name: [r[j] for j in chosen] for name, r in rows.items()}, epoch)))
        self.rows_before += len(order) * self.workers
        return batches

    def _batch(self, rows: dict[str, list[np.ndarray]], epoch: int) -> Batch:
        config = self.config
        keys = row_keys(rows["source" if "source" in rows else "target"], config.seed, epoch)
        if self.stage == "autoencoder":
            return autoencoder_batch(rows["target"], keys, config.autoencoder_loss)
        if self.stage == "flow":
            return infilling_batch(rows["target"], keys, config.flow_loss)
        return task_batch(rows["source"], rows["target"], keys, config.flow_loss, config.data.max_target_tokens)


def stage_batches(
    shard: Any, config: RunConfig, stage: str, workers: int, epoch_rows: int, first_step: int
) -> Iterator[Batch]:
    """This worker's batches, from the start of its stream on.

    Args:
        shard: From `ray.train.get_dataset_shard`.
        config: The run.
        stage: Stage name.
        workers: Number of workers that share a step's batch.
        epoch_rows: Rows of an epoch over all workers.
        first_step: Steps done before; a restarted worker reads its stream from the start, in another order.
    """
    pools = shard.iter_torch_batches(
        batch_size=getattr(config.stages, stage).batch_size // workers * POOL_BATCHES,
        collate_fn=StageCollate(config, stage, workers, epoch_rows, first_step),
        local_shuffle_buffer_size=config.data.shuffle_buffer,
        local_shuffle_seed=config.seed + first_step,
        prefetch_batches=1,
    )
    for pool in pools:
        for tensors in pool:
            yield Batch(**tensors)

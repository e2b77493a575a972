"""Prepared shards -> a Ray Data stream -> the batches of a stage.

A worker takes a pool of several batches at a time from its stream, sorts the pool by length and cuts it into batches,
so that a batch holds rows of like length and little padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import FileShuffleConfig
from ray.data.collate_fn import ArrowBatchCollateFn

from pipelines.prepare import Prepared
from yan_core.batching import Batch, autoencoder_batch, infilling_batch, task_batch
from yan_core.config import RunConfig
from yan_core.noise import fold

POOL_BATCHES = 8
"""Batches sorted by length together."""


def open_stage(prepared: Prepared, stage: str, config: RunConfig) -> ray.data.Dataset:
    """The lazy stream of a stage's rows; files come in a new, seeded order each epoch."""
    columns = ["source", "target"] if stage == "finetune" else ["target"]
    return ray.data.read_parquet(prepared.files(stage), columns=columns, shuffle=FileShuffleConfig(seed=config.seed))


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

    def __init__(self, config: RunConfig, stage: str, batch_size: int, epoch: int) -> None:
        self.config, self.stage, self.batch_size, self.epoch = config, stage, batch_size, epoch

    def __call__(self, table: pa.Table) -> list[dict[str, torch.Tensor]]:
        """Sort by length, cut, corrupt, pad."""
        rows = {name: _rows(table.column(name)) for name in table.column_names}
        lengths = np.array([len(r) for r in rows["source" if "source" in rows else "target"]])
        order = np.argsort(lengths, kind="stable")
        batches = []
        # The same order of lengths on every worker: they wait for each other at every step.
        whole = len(order) // self.batch_size
        for i in np.random.default_rng([self.config.seed, self.epoch, whole]).permutation(whole):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            batches.append(vars(self._batch({name: [r[j] for j in chosen] for name, r in rows.items()})))
        return batches

    def _batch(self, rows: dict[str, list[np.ndarray]]) -> Batch:
        config, keyed = self.config, rows["source" if "source" in rows else "target"]
        keys = row_keys(keyed, config.seed, self.epoch)
        if self.stage == "autoencoder":
            return autoencoder_batch(rows["target"], keys, config.autoencoder_loss)
        if self.stage == "flow":
            return infilling_batch(rows["target"], keys, config.flow_loss)
        return task_batch(rows["source"], rows["target"], keys, config.flow_loss, config.data.max_target_tokens)


def stage_batches(shard: Any, config: RunConfig, stage: str, workers: int, epoch: int, skip: int) -> Iterator[Batch]:
    """One epoch of this worker's batches.

    Args:
        shard: From `ray.train.get_dataset_shard`.
        config: The run.
        stage: Stage name.
        workers: Number of workers that share a step's batch.
        epoch: Counted from 0; seeds the order and every draw.
        skip: Batches at the start that an interrupted run has seen already.
    """
    batch_size = getattr(config.stages, stage).batch_size // workers
    # A new iterator each epoch: one made outside the loop is exhausted after the first (ray#58936).
    pools = shard.iter_torch_batches(
        batch_size=batch_size * POOL_BATCHES,
        collate_fn=StageCollate(config, stage, batch_size, epoch),
        local_shuffle_buffer_size=config.data.shuffle_buffer,
        local_shuffle_seed=config.seed + epoch,
        prefetch_batches=1,
    )
    for pool in pools:
        for tensors in pool:
            if skip > 0:
                skip -= 1
            else:
                yield Batch(**tensors)

"""A worker's share of the stream of rows -> the batches of a stage.

A worker takes a pool of several batches at a time from its stream, sorts the pool by length and cuts it into batches,
so that a batch holds rows of like length and little padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from ray.data.collate_fn import ArrowBatchCollateFn

from pipelines.stream import POOL_BATCHES, kept_batches
from yan_core.batching import Batch, autoencoder_batch, infilling_batch, task_batch
from yan_core.config import RunConfig, StageConfig
from yan_core.noise import fold


def _rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    array = column.combine_chunks()
    values, offsets = array.values.to_numpy(), array.offsets.to_numpy()
    return [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def row_keys(rows: list[np.ndarray], seed: int, epochs: np.ndarray, places: np.ndarray) -> torch.Tensor:
    """A key a row from its content, its place in its shard, the seed and the epoch: which worker reads it makes no
    difference. The place tells equal rows apart, such as one label a thousand times over.
    """
    digests = [hashlib.blake2b(row.tobytes(), digest_size=7).digest() for row in rows]
    keys = torch.tensor([int.from_bytes(d, "little") for d in digests], dtype=torch.int64)
    keys = fold(fold(keys, seed), torch.as_tensor(epochs, dtype=torch.int64))
    return fold(keys, torch.as_tensor(places, dtype=torch.int64))


class StageCollate(ArrowBatchCollateFn):
    """A pool of rows -> a list of batches of a stage, as dictionaries of tensors."""

    def __init__(self, config: RunConfig, stage: str, workers: int, skip_steps: int = 0) -> None:
        """Make it for one worker.

        Args:
            config: The run.
            stage: Stage name.
            workers: Number of workers that share a step's batch.
            skip_steps: Batches at the start of the stream to pass over.
        """
        self.config, self.stage, self.skip = config, stage, skip_steps
        self.settings: StageConfig = getattr(config.stages, stage)
        self.batch_size = self.settings.batch_size // workers
        self.pools = self.step = 0

    def __call__(self, table: pa.Table) -> list[dict[str, torch.Tensor]]:
        """Sort by length, cut, corrupt, pad."""
        kept = kept_batches(table.num_rows // self.batch_size, self.step, self.settings.curriculum_steps)
        # The same order of lengths on every worker: they wait for each other at every step.
        places = np.random.default_rng([self.config.seed, self.pools]).permutation(kept)
        self.pools, self.step = self.pools + 1, self.step + kept
        skipped = min(self.skip, kept)
        self.skip -= skipped
        if skipped == kept:
            return []
        epochs, in_shard = table.column("epoch").to_numpy(), table.column("place").to_numpy()
        rows = {name: _rows(table.column(name)) for name in ("source", "target") if name in table.column_names}
        order = np.argsort([len(r) for r in rows["source" if "source" in rows else "target"]], kind="stable")
        chosen = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in places[skipped:]]
        return [
            vars(self._batch({n: [r[j] for j in c] for n, r in rows.items()}, epochs[c], in_shard[c])) for c in chosen
        ]

    def _batch(self, rows: dict[str, list[np.ndarray]], epochs: np.ndarray, in_shard: np.ndarray) -> Batch:
        config = self.config
        keys = row_keys(rows["source" if "source" in rows else "target"], config.seed, epochs, in_shard)
        if self.stage == "autoencoder":
            return autoencoder_batch(rows["target"], keys, config.autoencoder_loss)
        fill = config.model.length == "fill"
        if self.stage == "flow":
            return infilling_batch(rows["target"], keys, config.flow_loss, fill)
        longest = config.data.max_target_tokens
        return task_batch(rows["source"], rows["target"], keys, config.flow_loss, longest, fill)


def stage_batches(shard: Any, config: RunConfig, stage: str, workers: int, skip_steps: int) -> Iterator[Batch]:
    """This worker's batches.

    Args:
        shard: From `ray.train.get_dataset_shard`.
        config: The run.
        stage: Stage name.
        workers: Number of workers that share a step's batch.
        skip_steps: Steps done before a restart; as many batches at the start of the stream are passed over.
    """
    pools = shard.iter_torch_batches(
        batch_size=getattr(config.stages, stage).batch_size // workers * POOL_BATCHES,
        collate_fn=StageCollate(config, stage, workers, skip_steps),
        local_shuffle_buffer_size=config.data.shuffle_buffer,
        local_shuffle_seed=config.seed,
        prefetch_batches=1,
    )
    for pool in pools:
        for tensors in pool:
            yield Batch(**tensors)

"""Prepared shards -> one Ray Data stream of rows, epoch after epoch. No torch here: its readers start sooner so."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from pipelines.prepare import Prepared
from yan_core.config import RunConfig, StageConfig

POOL_BATCHES = 8
"""Batches that a worker sorts by length together."""


def kept_batches(whole: int, step: int, curriculum_steps: int) -> int:
    """How many of a pool's `whole` batches, the shortest first, are used at a step."""
    if step >= curriculum_steps:
        return whole
    return max(1, math.ceil(whole * (step + 1) / curriculum_steps)) if whole else 0


def batches_read(settings: StageConfig) -> int:
    """Batches a stage reads for its steps: more than it has steps where a curriculum leaves long rows out."""
    step = pools = 0
    while step < settings.max_steps:
        step += kept_batches(POOL_BATCHES, step, settings.curriculum_steps)
        pools += 1
    return pools * POOL_BATCHES


class ReadShard:
    """(path, epoch) -> the rows of a prepared shard, each with its epoch and its place in the shard."""

    def __init__(self, columns: list[str]) -> None:
        self.columns = columns

    def __call__(self, shards: pa.Table) -> pa.Table:
        """Read the shards of one block."""
        tables = []
        for shard in shards.to_pylist():
            table = pq.read_table(shard["path"], columns=self.columns)
            table = table.append_column("epoch", pa.array(np.full(table.num_rows, shard["epoch"], np.int32)))
            tables.append(table.append_column("place", pa.array(np.arange(table.num_rows, dtype=np.int32))))
        return pa.concat_tables(tables)


def open_stage(prepared: Prepared, stage: str, config: RunConfig) -> ray.data.Dataset:
    """The lazy stream of all rows a stage will read: its shards epoch after epoch, in a new, seeded order each time.

    One stream for all epochs: to end one and begin the next costs Ray Data seconds, and `read_parquet` would read a
    file that is named twice only once (EXPERIMENTS, 2026-11-23).
    """
    settings = getattr(config.stages, stage)
    # Each worker's last, partial pool of an epoch is not lost but joins the next one; one epoch more is room for that.
    epochs = math.ceil(batches_read(settings) * settings.batch_size / prepared.num_rows(stage)) + 1
    files = prepared.files(stage)
    shards = [
        {"path": files[i], "epoch": epoch}
        for epoch in range(epochs)
        for i in np.random.default_rng([config.seed, epoch]).permutation(len(files))
    ]
    columns = ["source", "target"] if stage == "finetune" else ["target"]
    listed = ray.data.from_items(shards, override_num_blocks=len(shards))
    return listed.map_batches(ReadShard(columns), batch_format="pyarrow", batch_size=1)

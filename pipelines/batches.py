"""Rows of a step -> its batch, corrupted and padded; wherever the rows come from. No Ray, no Arrow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from pipelines.order import Sharded
from yan_core.batching import Batch, autoencoder_batch, infilling_batch, task_batch
from yan_core.config import RunConfig
from yan_core.noise import fold
from yan_core.tokenization import Tokenizer

T = TypeVar("T")


class TrainingData(Sharded, Protocol):
    """What a training in one process needs of its data: prepared shards, or a pack of them."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the rows."""
        ...

    def batches(self, config: RunConfig, stage: str, step: int = 0) -> Iterator[Batch]:
        """The batches of a stage from a step on, one a step."""
        ...


def row_keys(seed: int, epochs: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    """Keys for the random draws of rows, int64, [rows]: from the seed, the epoch and the row's number alone."""
    return fold(fold(torch.as_tensor(rows, dtype=torch.int64), seed), torch.as_tensor(epochs, dtype=torch.int64))


def make_batch(config: RunConfig, stage: str, rows: Mapping[str, np.ndarray], groups: int) -> Batch:
    """The batch of one step.

    Args:
        config: The run.
        stage: `autoencoder`, `flow` or `finetune`.
        rows: `source` and `target`, arrays of token ids; `epoch` and `row`, which random draws follow from; [rows].
        groups: Equal parts of the rows, in order, that are looked at alone; see `autoencoder_batch`.
    """
    keys = row_keys(config.seed, rows["epoch"], rows["row"])
    sources, targets = list(rows["source"]), list(rows["target"])
    if stage == "autoencoder":
        return autoencoder_batch(targets, keys, config.autoencoder_loss, groups)
    fill = config.model.length == "fill" or config.baseline is not None
    if stage == "flow":
        return infilling_batch(targets, keys, config.flow_loss, fill, groups)
    places = config.data.max_target_tokens
    if config.baseline is not None and not config.baseline.learns_filling:
        places = min(places, 1 + max(map(len, targets)))  # what is behind the ends of all would be computed for nothing
    return task_batch(sources, targets, keys, config.flow_loss, places, fill)


def as_rows(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Token ids of all rows one after the other -> an array of arrays, one a row.

    Args:
        values: Token ids, [num_tokens].
        offsets: Where each row begins, and the end of the last one, [rows + 1].
    """
    found = np.empty(len(offsets) - 1, object)
    found[:] = [values[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    return found


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

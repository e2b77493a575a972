"""Prepared data as one small folder that is read without Ray and Arrow, to train where only yan_core can be installed.

A pack holds the token ids of all shards, the validation rows as text, the tokenizer and the resolved config. Its
batches are those of the prepared data, row by row.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from pipelines.batches import as_rows, make_batch
from pipelines.folders import recorded
from pipelines.order import Pool, Shard, StageOrder, stage_order
from yan_core.batching import Batch
from yan_core.config import RunConfig, from_dict
from yan_core.files import atomic_folder, code_commit, write_file
from yan_core.tokenization import Tokenizer

if TYPE_CHECKING:
    from pipelines.prepare import Prepared

IDS, ABOUT, TOKENIZER = "ids.safetensors.xz", "pack.json", "tokenizer.json"

COLUMNS = {"flow": ("target",), "finetune": ("source", "target")}
"""Columns of token ids of each part."""


class PackError(ValueError):
    """There is no pack, or it would be too large."""


@dataclass(frozen=True)
class Packed:
    """A pack.

    Attributes:
        folder: Holds it.
        about: `config`, `shards` of each stage, `validation` rows, `commit`.
    """

    folder: Path
    about: dict[str, Any]

    @cached_property
    def config(self) -> RunConfig:
        """The run that the data were prepared for."""
        return from_dict(RunConfig, self.about["config"])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer trained on this corpus."""
        return Tokenizer.from_json((self.folder / TOKENIZER).read_text(encoding="utf-8"))

    @cached_property
    def sha256(self) -> str:
        """Hash of all that is in it."""
        digest = hashlib.sha256()
        for name in (IDS, ABOUT, TOKENIZER):
            digest.update((self.folder / name).read_bytes())
        return digest.hexdigest()

    @cached_property
    def _ids(self) -> dict[str, np.ndarray]:
        return safetensors.numpy.load(lzma.decompress((self.folder / IDS).read_bytes()))

    @cached_property
    def _rows(self) -> dict[tuple[str, str], np.ndarray]:
        """Part and column -> token ids of each row, [rows] of arrays."""
        names = [(part, column) for part, columns in COLUMNS.items() for column in columns]
        return {
            (part, column): as_rows(self._ids[f"{part}.{column}"], self._ids[f"{part}.{column}.offsets"])
            for part, column in names
        }

    @cached_property
    def _first(self) -> dict[str, int]:
        """Number of each shard's first row in its part."""
        found, at = {}, dict.fromkeys(COLUMNS, 0)
        for shard in self.shards("autoencoder"):
            part = shard.path.split("/")[0]
            found[shard.path], at[part] = at[part], at[part] + shard.rows
        return found

    def shards(self, stage: str) -> list[Shard]:
        """Shards that a stage trains on; their paths are names."""
        return [Shard(*values) for values in self.about["shards"][stage]]

    def batches(self, config: RunConfig, stage: str, step: int = 0) -> Iterator[Batch]:
        """The batches of a stage from a step on, one a step."""
        order = stage_order(self, stage, config)
        for pool in order.pools(step):
            lanes = [self._lane(stage, order, pool, lane) for lane in range(order.lanes)]
            for i in range(len(pool.batches)):
                part = slice(i * order.lane_rows, (i + 1) * order.lane_rows)
                rows = {name: np.concatenate([lane[name][part] for lane in lanes]) for name in lanes[0]}
                yield make_batch(config, stage, rows, groups=order.lanes)

    def _lane(self, stage: str, order: StageOrder, pool: Pool, lane: int) -> dict[str, np.ndarray]:
        """Rows of one lane of one pool, batch after batch; as `stream.ReadShare` reads them."""
        slices = order.rows.slices(*order.lane(pool.number, lane))
        columns = COLUMNS["finetune" if stage == "finetune" else "flow"]

        def column(name: str) -> np.ndarray:
            of_slices = [self._rows[s.path.split("/")[0], name][self._first[s.path] + s.places] for s in slices]
            return np.concatenate(of_slices)

        rows = {name: column(name) for name in columns}
        rows["epoch"] = np.concatenate([np.full(len(s.ids), s.epoch, np.int32) for s in slices])
        rows["row"] = np.concatenate([s.ids for s in slices])
        picked = order.pick(np.array([len(ids) for ids in rows[columns[0]]]), pool.batches)
        return {"source": np.empty(len(picked), object), **{name: values[picked] for name, values in rows.items()}}


def open_pack(folder: Path) -> Packed:
    """A pack written earlier.

    Raises:
        PackError: If there is none.
    """
    missing = [name for name in (IDS, ABOUT, TOKENIZER) if not (folder / name).is_file()]
    if missing:
        raise PackError(f"{folder} is no pack, it has no {missing[0]}: make one with `quality_gpu pack`")
    return Packed(folder, json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def pack(prepared: Prepared, config: RunConfig, folder: Path, most_bytes: int) -> Packed:
    """Write a pack of prepared data.

    Args:
        prepared: The data.
        config: The run that they were prepared for.
        folder: Where to; a pack there is replaced.
        most_bytes: What it may take.

    Raises:
        PackError: If it takes more; says what to do.
    """
    import pyarrow.parquet as pq

    stages = {stage: prepared.shards(stage) for stage in ("autoencoder", "flow", "finetune")}
    ids: dict[str, np.ndarray] = {}
    kind = np.uint16 if prepared.manifest["vocab_size"] <= 1 << 16 else np.int32
    for part, columns in COLUMNS.items():
        table = [pq.read_table(shard.path, columns=list(columns)) for shard in stages[part]]
        for column in columns:
            arrays = [t.column(column).combine_chunks() for t in table]
            ids[f"{part}.{column}"] = np.concatenate([a.flatten().to_numpy() for a in arrays]).astype(kind)
            lengths = np.concatenate([a.value_lengths().to_numpy() for a in arrays])
            ids[f"{part}.{column}.offsets"] = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    about = {
        "commit": code_commit(),
        "config": recorded(config),
        "shards": {
            stage: [[Path(s.path).relative_to(prepared.folder).as_posix(), s.rows, s.epochs] for s in shards]
            for stage, shards in stages.items()
        },
        "validation": prepared.validation(config.evaluation.max_rows),
    }
    with atomic_folder(folder) as scratch:
        # Windows of the corpus and the task's sources are often the same text, and rows on one passage repeat it.
        (scratch / IDS).write_bytes(lzma.compress(safetensors.numpy.save(ids)))
        write_file(scratch / ABOUT, json.dumps(about))
        write_file(scratch / TOKENIZER, prepared.tokenizer.to_json())
        size = sum(file.stat().st_size for file in scratch.iterdir())
        if size > most_bytes:
            rows = {part: len(ids[f"{part}.target.offsets"]) - 1 for part in COLUMNS}
            raise PackError(
                f"the pack takes {size / 1e6:.1f} MB of the {most_bytes / 1e6:g} MB allowed, for {rows['finetune']} "
                f"rows and {rows['flow']} windows: name fewer training files in data.datasets.{config.data.dataset}"
                ".train, lower data.max_source_tokens, or allow more with --limit-mb"
            )
    return open_pack(folder)

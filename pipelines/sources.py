"""Data sets by name -> lazy Ray Datasets of rows, whatever the format."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from pipelines import world
from yan_core.config import DataConfig, DatasetConfig, unknown_name

BUILT_IN = {
    "world": DatasetConfig(format="world"),
    "world_stories": DatasetConfig(format="world_stories"),
}
"""Data sets that are there without being named in a config."""


class DataError(ValueError):
    """The data a config names are missing, empty or not as described."""


def find_dataset(data: DataConfig, name: str) -> DatasetConfig:
    """The data set of a name.

    Raises:
        ValueError: If there is none; offers the nearest.
    """
    known = {**BUILT_IN, **data.datasets}
    if name not in known:
        raise ValueError(unknown_name("data.dataset", name, list(known)))
    return known[name]


def locate(data: DataConfig, where: str) -> str:
    """A path of a data set below data.root; absolute paths and URLs stay as they are."""
    if "://" in where or os.path.isabs(where):
        return where
    if "://" in data.root:
        return f"{data.root.rstrip('/')}/{where}"
    return os.path.join(data.root, where)


def files_of(data: DataConfig, dataset: DatasetConfig, where: str) -> list[str]:
    """Files that a path, folder or glob names; URLs are left for Ray Data to open.

    Raises:
        DataError: If there is none.
    """
    if not where:
        raise DataError("a data set of files needs both `train` and `validation` paths; one of them is empty")
    path = locate(data, where)
    if "://" in path:
        return [path]
    if os.path.isdir(path):
        found = sorted(f for f in glob.glob(os.path.join(path, "**", "*"), recursive=True) if os.path.isfile(f))
    else:
        found = sorted(glob.glob(path))
    if not found:
        raise DataError(
            f"no file at {os.path.abspath(path)} (data.root={data.root!r}, {where!r}). "
            "Set --data.root to the folder that holds the data, or correct the data set's path."
        )
    return found


def _world_rows(dataset: DatasetConfig, split: str, seed: int) -> ray.data.Dataset:
    config = world.WorldConfig(seed=seed, kinds=dataset.kinds or world.KINDS)
    tell = world.stories if dataset.format == "world_stories" else world.examples
    count = dataset.num_train if split == "train" else dataset.num_validation

    def draw(ids: pa.Table) -> pa.Table:
        places = ids["id"].to_pylist()
        return pa.Table.from_pylist(list(tell(config, places[0], places[-1] + 1, split)))

    return ray.data.range(count, override_num_blocks=max(1, count // 8192)).map_batches(
        draw, batch_format="pyarrow", batch_size=1024
    )


def _huggingface_rows(data: DataConfig, dataset: DatasetConfig, split: str) -> ray.data.Dataset:
    import datasets

    if not dataset.path:
        raise DataError("a huggingface data set needs `path`: a name on the hub or a local folder")
    local = locate(data, dataset.path)
    name = local if os.path.exists(local) else dataset.path
    try:
        stream = datasets.load_dataset(name, dataset.config_name, split=split, streaming=True)
    except (OSError, ValueError) as error:  # unreachable hub, no such data set, no such split
        raise DataError(f"cannot open the Hugging Face data set {name!r}, split {split!r}: {error}") from error
    features = (stream.features or {}).items()
    labels = {column: f.names for column, f in features if isinstance(f, datasets.ClassLabel)}
    shards = [{"shard": i, "num_shards": stream.num_shards} for i in range(stream.num_shards)]
    # Not ray.data.from_huggingface: it asks the hub for a data set called like a local folder, and would take it.
    listed = ray.data.from_items(shards, override_num_blocks=len(shards))
    return listed.map_batches(_ReadHuggingFace(stream, labels), batch_format="pyarrow", batch_size=1)


class _ReadHuggingFace:
    """One shard of a streamed Hugging Face data set -> its rows, a table at a time; labels by name, not by number."""

    def __init__(self, stream: Any, labels: dict[str, list[str]]) -> None:
        self.stream, self.labels = stream, labels

    def __call__(self, shards: pa.Table) -> Iterator[pa.Table]:
        for shard in shards.to_pylist():
            part = self.stream.shard(shard["num_shards"], shard["shard"])
            for table in part.with_format("arrow").iter(batch_size=1024):
                for column, names in self.labels.items():
                    ids = table[column].to_pylist()
                    named = pa.array([names[i] if i is not None and i >= 0 else None for i in ids], pa.string())
                    table = table.set_column(table.column_names.index(column), column, named)
                yield table


def read_rows(data: DataConfig, name: str, split: str, seed: int) -> ray.data.Dataset:
    """Open a data set lazily; nothing is read yet but a schema.

    Args:
        data: Where the data are.
        name: A built-in data set or one of data.datasets.
        split: `train` or `validation`.
        seed: Of the built-in world.

    Returns:
        Rows under their own column names, filtered by the data set's `where`.

    Raises:
        DataError: If a file is missing or cannot be read.
        ValueError: If the name is unknown.
    """
    dataset = find_dataset(data, name)
    where = dataset.train if split == "train" else dataset.validation
    if dataset.format in ("world", "world_stories"):
        rows = _world_rows(dataset, split, seed)
    elif dataset.format == "huggingface":
        rows = _huggingface_rows(data, dataset, where or split)
    else:
        rows = read_files(dataset, files_of(data, dataset, where))
    return filtered(rows, dataset, name)


def read_files(dataset: DatasetConfig, files: list[str]) -> ray.data.Dataset:
    """Open files of a data set's format lazily.

    Raises:
        DataError: If their columns cannot be read.
    """
    readers = {
        "parquet": ray.data.read_parquet,
        "jsonl": lambda paths: ray.data.read_json(paths, lines=True),
        "csv": ray.data.read_csv,
        "text": ray.data.read_text,
    }
    try:
        rows = readers.get(dataset.format, ray.data.read_parquet)(files)
        schema = rows.schema()
    except Exception as error:  # Ray wraps what any reader raises, so no narrower class names it
        where = _first_broken_line(files) if dataset.format == "jsonl" else ""
        raise DataError(
            f"cannot read {where or files[0]} as {dataset.format}: {reason_of(error)}. Mend it, or take it out"
        ) from error
    columns = list(schema.names) if schema is not None else []
    if not columns:
        raise DataError(f"{files[0]} is empty: name a file with rows under `train` and `validation` of the data set")
    return rows


def _first_broken_line(files: list[str]) -> str:
    """`file, line n` of the first line of local files that is no JSON; empty if there is none."""
    for file in filter(os.path.isfile, files):
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    json.loads(line.strip() or "null")
                except ValueError:
                    return f"{file}, line {number},"
    return ""


def filtered(rows: ray.data.Dataset, dataset: DatasetConfig, name: str) -> ray.data.Dataset:
    """The rows that the data set's `where` lets through.

    Raises:
        DataError: If the filter names a column that is not there.
    """
    for column, value in dataset.where.items():
        schema = rows.schema()
        if schema is not None and column not in schema.names:
            raise DataError(unknown_name(f"data.datasets.{name}.where", column, list(schema.names)))
        rows = rows.map_batches(_Equals(column, value), batch_format="pyarrow", batch_size=None)
    return rows


class _Equals:
    """Row filter that can travel to workers."""

    def __init__(self, column: str, value: str) -> None:
        self.column, self.value = column, value

    def __call__(self, table: pa.Table) -> pa.Table:
        return table.filter(pc.field(self.column).cast(pa.string()) == self.value)


def reason_of(error: BaseException) -> str:
    """What went wrong, in a line: the last `SomeError: ...` of a text that Ray has put tracebacks and advice into."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Invalid): ", line)]
    return (raised or lines or [type(error).__name__])[-1][:300]


def fields_of(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A row with its columns renamed to template fields: `columns` maps field -> column."""
    return {**row, **{field: row[column] for field, column in columns.items() if column in row}}

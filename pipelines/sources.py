"""Data sets by name -> pieces, and a piece -> its rows a thousand at a time, whatever the format.

A piece is what one task reads and what an interrupted `yan prepare` goes on at: a file, some row groups of a Parquet
file, a shard of a Hugging Face data set, or a stretch of the built-in world.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import world
from pipelines.listing import READ_ERRORS, DataError, UnreadableFile, files_of, locate, open_store, reason_of
from yan_core.config import DataConfig, DatasetConfig, unknown_name

BUILT_IN = {
    "world": DatasetConfig(format="world"),
    "world_stories": DatasetConfig(format="world_stories"),
}
"""Data sets that are there without being named in a config."""

ROWS_AT_ONCE = 1024
"""Rows that are read and tokenised together."""

PIECE_ROWS = 65_536
"""About as many rows of a Parquet file, or of the world, make a piece."""


@dataclass(frozen=True)
class Piece:
    """A part of a data set.

    Attributes:
        where: File or URL, `shard n` of a Hugging Face data set, or `world`.
        start: First row group, shard or example.
        stop: The one after the last; 0 where the whole file is meant.
    """

    where: str
    start: int = 0
    stop: int = 0


@dataclass
class Rows:
    """Some rows of a piece.

    Attributes:
        numbers: Each row's number in its file, from 0.
        rows: The rows under their own column names.
        bad: What could not be read as a row, with `row_number` and `reason`.
        filtered: How many rows the data set's `where` left out.
    """

    numbers: list[int]
    rows: list[dict[str, Any]]
    bad: list[dict[str, Any]] = field(default_factory=list)
    filtered: int = 0


@dataclass(frozen=True)
class Source:
    """A split of a data set, ready to be read anywhere.

    Attributes:
        name: The data set's name.
        dataset: Its description.
        pieces: What it consists of, in order.
        read: Piece -> its rows, before the filter.
        columns: Columns of the first piece that can be read, what is inside them as `a.b` (see `value_at`); of rows
            without a schema, those of the first thousand. Empty where a format has none before it is read.
    """

    name: str
    dataset: DatasetConfig
    pieces: list[Piece]
    read: Callable[[Piece], Iterator[Rows]]
    columns: list[str]

    def rows(self, piece: Piece) -> Iterator[Rows]:
        """Rows of a piece that the data set's `where` lets through.

        Raises:
            UnreadableFile: If its file is damaged or gone.
        """
        try:
            for batch in self.read(piece):
                kept = [i for i, row in enumerate(batch.rows) if self._wanted(row)]
                left_out = len(batch.rows) - len(kept)
                if left_out:
                    batch = Rows([batch.numbers[i] for i in kept], [batch.rows[i] for i in kept], batch.bad, left_out)
                yield batch
        except READ_ERRORS as error:
            raise UnreadableFile(f"cannot read {piece.where} as {self.dataset.format}: {reason_of(error)}") from error

    def has(self, column: str) -> bool:
        """Whether a column is there; true where none is known."""
        return not self.columns or column in self.columns

    def named_columns(self) -> str:
        """The columns for a message, of many the first."""
        return ", ".join(self.columns[:40]) + (", ..." if len(self.columns) > 40 else "")

    def check_columns(self) -> None:
        """Refuse a `where` or a `document` that names a column which is not there.

        Raises:
            DataError: Names the nearest.
        """
        for column in self.dataset.where:
            if not self.has(column):
                raise DataError(unknown_name(f"data.datasets.{self.name}.where", column, self.columns))
        if self.dataset.document and not self.has(self.dataset.document):
            raise DataError(unknown_name(f"data.datasets.{self.name}.document", self.dataset.document, self.columns))

    def _wanted(self, row: dict[str, Any]) -> bool:
        return all(str(value_at(row, column)) == value for column, value in self.dataset.where.items())


def find_dataset(data: DataConfig, name: str) -> DatasetConfig:
    """The data set of a name.

    Raises:
        ValueError: If there is none; offers the nearest.
    """
    known = {**BUILT_IN, **data.datasets}
    if name not in known:
        used = {"data.dataset": data.dataset, "data.corpus": data.corpus}
        key = next((key for key, value in used.items() if value == name), "data.mixture")
        raise ValueError(unknown_name(key, name, list(known)))
    return known[name]


def open_source(data: DataConfig, name: str, split: str, seed: int) -> Source:
    """List the pieces of a data set; of Parquet files the metadata is read, of others the first lines.

    Args:
        data: Where the data are.
        name: A built-in data set or one of data.datasets.
        split: `train` or `validation`.
        seed: Of the built-in world.

    Raises:
        DataError: If a file is missing, empty or not of its format.
        ValueError: If the name is unknown.
    """
    dataset = find_dataset(data, name)
    where = dataset.train if split == "train" else dataset.validation
    if dataset.held_out and not where:
        where, split = dataset.train, "train"  # the same rows: which of them are held out follows from their documents
    if dataset.format in ("world", "world_stories"):
        source = _open_world(name, dataset, split, seed)
    elif dataset.format == "huggingface":
        source = _open_huggingface(data, name, dataset, where or split)
    else:
        source = open_files(name, dataset, files_of(data, dataset, where))
    source.check_columns()
    return source


def open_files(name: str, dataset: DatasetConfig, files: list[str]) -> Source:
    """List the pieces of files of a data set's format.

    Raises:
        DataError: If all are empty, or the first one is not of its format.
    """
    if dataset.format == "parquet":
        pieces = [piece for file in files for piece in _parquet_pieces(file)]
        read: Callable[[Piece], Iterator[Rows]] = _read_parquet
    else:
        pieces = [Piece(file) for file in files]
        read = READERS[dataset.format]
    columns: list[str] = []
    for piece in pieces:
        try:
            columns = _columns_of(piece, dataset.format, read)
        except READ_ERRORS as error:
            if len(pieces) == 1 or dataset.format != "parquet":
                raise DataError(
                    f"cannot read {piece.where} as {dataset.format}: {reason_of(error)}. Mend it, or take it out"
                ) from error
            continue  # the task that reads it sets it aside
        if columns:
            break
    if not columns:
        raise DataError(f"{files[0]} is empty: name a file with rows under `train` and `validation` of the data set")
    return Source(name, dataset, pieces, read, columns)


def _columns_of(piece: Piece, kind: str, read: Callable[[Piece], Iterator[Rows]]) -> list[str]:
    if kind == "parquet":
        with _open(piece.where) as file:
            return list(_schema_names(pq.read_schema(file)))
    first = next((batch for batch in read(piece) if batch.rows), None)
    return list(dict.fromkeys(name for row in first.rows for name in _row_names(row))) if first else []


def _schema_names(fields: Iterable[pa.Field], above: str = "") -> Iterator[str]:
    """Names of columns and of what is inside them, as `value_at` takes them."""
    for column in fields:
        yield f"{above}{column.name}"
        kind = column.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            yield from _schema_names(kind, f"{above}{column.name}.")


def _row_names(value: Any, above: str = "") -> Iterator[str]:
    """The same of a row without a schema."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            for name, inside in entry.items():
                yield f"{above}{name}"
                yield from _row_names(inside, f"{above}{name}.")


def _open(path: str) -> pa.NativeFile:
    store, inside = open_store(path)
    return store.open_input_file(inside)


@contextmanager
def _text(path: str) -> Iterator[io.TextIOWrapper]:
    """A text file, which may be compressed (.gz, .bz2, .zst)."""
    store, inside = open_store(path)
    with (
        store.open_input_stream(inside) as stream,
        io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="") as text,
    ):
        yield text


NO_UTF_8 = "no UTF-8"


def _is_utf_8(text: str) -> bool:
    """Whether no byte of what was read from a file stands for itself."""
    return text.isascii() or not re.search("[\udc80-\udcff]", text)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines of a text file without their ends."""
    with _text(path) as text:
        for number, line in enumerate(text):
            yield number, line.rstrip("\r\n")


def _parquet_pieces(file: str) -> list[Piece]:
    """Neighbouring row groups of about PIECE_ROWS rows in all; the whole file, where its metadata cannot be read."""
    try:
        with _open(file) as opened:
            metadata = pq.read_metadata(opened)
    except READ_ERRORS:
        return [Piece(file)]
    pieces, start, rows = [], 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= PIECE_ROWS or group == metadata.num_row_groups - 1:
            pieces.append(Piece(file, start, group + 1))
            start, rows = group + 1, 0
    return pieces


def _read_parquet(piece: Piece) -> Iterator[Rows]:
    with _open(piece.where) as opened, pq.ParquetFile(opened) as file:
        if piece.stop > file.num_row_groups:  # rewritten since it was listed
            raise pa.ArrowInvalid(f"it has {file.num_row_groups} row groups in place of {piece.stop}")
        rows = [file.metadata.row_group(g).num_rows for g in range(piece.stop or file.num_row_groups)]
        number = sum(rows[: piece.start])
        for groups in _runs(rows, piece.start):  # a reader of many row groups holds some memory of each
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, use_threads=False):
                yield Rows(list(range(number, number + batch.num_rows)), batch.to_pylist())
                number += batch.num_rows


def _runs(rows: list[int], start: int) -> Iterator[list[int]]:
    """Neighbouring row groups from `start` on that together have at least ROWS_AT_ONCE rows, or are the last ones."""
    run, held = list[int](), 0
    for group in range(start, len(rows)):
        run.append(group)
        held += rows[group]
        if held >= ROWS_AT_ONCE:
            yield run
            run, held = [], 0
    if run:
        yield run


def _chunks(rows: Iterator[tuple[int, dict[str, Any] | str]]) -> Iterator[Rows]:
    """Numbered rows, or reasons why one is none -> some at a time."""
    chunk = Rows([], [])
    for number, row in rows:
        if isinstance(row, str):
            chunk.bad.append({"row_number": number, "reason": row})
        else:
            chunk.numbers.append(number)
            chunk.rows.append(row)
        if len(chunk.rows) + len(chunk.bad) == ROWS_AT_ONCE:
            yield chunk
            chunk = Rows([], [])
    if chunk.rows or chunk.bad:
        yield chunk


def _read_jsonl(piece: Piece) -> Iterator[Rows]:
    def rows() -> Iterator[tuple[int, dict[str, Any] | str]]:
        for number, line in _lines(piece.where):
            if not line.strip():
                continue
            if not _is_utf_8(line):
                yield number, NO_UTF_8
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield number, f"no JSON: {error}"
                continue
            yield number, row if isinstance(row, dict) else f"a row must be a JSON object, got {line[:100]}"

    return _chunks(rows())


def _read_csv(piece: Piece) -> Iterator[Rows]:
    def rows() -> Iterator[tuple[int, dict[str, Any] | str]]:
        with _text(piece.where) as text:
            csv.field_size_limit(sys.maxsize)
            reader = csv.reader(text)
            header = next(reader, [])
            for number, values in enumerate(reader):
                if not all(map(_is_utf_8, values)):
                    yield number, NO_UTF_8
                elif len(values) == len(header):
                    yield number, dict(zip(header, values, strict=True))
                elif values:
                    yield number, f"{len(values)} values in a row of {len(header)} columns"

    return _chunks(rows())


def _read_text(piece: Piece) -> Iterator[Rows]:
    return _chunks((n, {"text": line} if _is_utf_8(line) else NO_UTF_8) for n, line in _lines(piece.where))


READERS: dict[str, Callable[[Piece], Iterator[Rows]]] = {"jsonl": _read_jsonl, "csv": _read_csv, "text": _read_text}
"""Format of files of lines -> what reads a file of it."""


def _open_world(name: str, dataset: DatasetConfig, split: str, seed: int) -> Source:
    kinds = dataset.kinds or world.KINDS
    config = world.WorldConfig(seed=seed, kinds=kinds, max_events=dataset.max_events)
    stories = dataset.format == "world_stories"
    count = dataset.num_train if split == "train" else dataset.num_validation
    pieces = [Piece("world", i, min(i + 8192, count)) for i in range(0, count, 8192)]
    columns = list(next(iter((world.stories if stories else world.examples)(config, 0, 1, split))))
    return Source(name, dataset, pieces, _ReadWorld(config, split, stories), columns)


@dataclass(frozen=True)
class _ReadWorld:
    """A stretch of the built-in world -> its rows."""

    config: world.WorldConfig
    split: str
    stories: bool

    def __call__(self, piece: Piece) -> Iterator[Rows]:
        tell = world.stories if self.stories else world.examples
        for start in range(piece.start, piece.stop, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, piece.stop)
            yield Rows(list(range(start, stop)), list(tell(self.config, start, stop, self.split)))


def _open_huggingface(data: DataConfig, name: str, dataset: DatasetConfig, split: str) -> Source:
    import datasets

    if not dataset.path:
        raise DataError("a huggingface data set needs `path`: a name on the hub or a local folder")
    local = locate(data, dataset.path)
    path = local if os.path.exists(local) else dataset.path
    try:
        stream = datasets.load_dataset(path, dataset.config_name, split=split, streaming=True)
    except (OSError, ValueError) as error:  # unreachable hub, no such data set, no such split
        raise DataError(f"cannot open the Hugging Face data set {path!r}, split {split!r}: {error}") from error
    features = stream.features or {}
    labels = {column: f.names for column, f in features.items() if isinstance(f, datasets.ClassLabel)}
    pieces = [Piece(f"{path} ({split})", i, i + 1) for i in range(stream.num_shards)]
    columns = list(_schema_names(stream.features.arrow_schema)) if stream.features else []
    return Source(name, dataset, pieces, _ReadHuggingFace(stream, labels), columns)


class _ReadHuggingFace:
    """One shard of a streamed Hugging Face data set -> its rows; labels by name, not by number."""

    def __init__(self, stream: Any, labels: dict[str, list[str]]) -> None:
        self.stream, self.labels = stream, labels

    def __call__(self, piece: Piece) -> Iterator[Rows]:
        number = 0
        part = self.stream.shard(self.stream.num_shards, piece.start)
        for table in part.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
            for column, names in self.labels.items():
                ids = table[column].to_pylist()
                named = pa.array([names[i] if i is not None and i >= 0 else None for i in ids], pa.string())
                table = table.set_column(table.column_names.index(column), column, named)
            yield Rows(list(range(number, number + table.num_rows)), table.to_pylist())
            number += table.num_rows


def value_at(row: dict[str, Any], column: str) -> Any:
    """A column's value, or what it holds inside: `document.summary.text`; of a list, that of each entry; else None."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if isinstance(value, list):
            value = [entry.get(name) if isinstance(entry, dict) else None for entry in value]
        else:
            value = value.get(name) if isinstance(value, dict) else None
    return value


def fields_of(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A row with its columns renamed to template fields: `columns` maps field -> column, see `value_at`."""
    found = {
        field: value_at(row, column) for field, column in columns.items() if {column, column.split(".")[0]} & row.keys()
    }
    return {**row, **found}

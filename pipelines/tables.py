"""Files of rows -> Arrow tables of one schema, some rows at a time and in order; no row is lost on the way.

Columns keep their types. JSON values of a column that fit no common type are kept as JSON text. A row that cannot be
read or kept has its place still, with the reason and with nulls. No Ray, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.listing import READ_ERRORS, UnreadableFile, open_store, reason_of
from pipelines.sources import READERS, ROWS_AT_ONCE, Piece, Rows

NOT_KEPT = (pa.ArrowException, ValueError, TypeError, OverflowError)
"""What Arrow raises on values that a type does not hold: half a surrogate pair, an integer of 70 bits, a mixture."""


@dataclass(frozen=True)
class Scan:
    """What a file holds.

    Attributes:
        rows: How many rows.
        types: Type of each column; None where its values have no common one.
    """

    rows: int
    types: dict[str, pa.DataType | None]


@dataclass(frozen=True)
class Part:
    """Some neighbouring rows.

    Attributes:
        table: What is written of them, [rows] of the input's schema.
        rows: The columns that were asked for, as they were read: a number stays one where its column is kept as text.
        reasons: Why a row cannot be used, or empty.
    """

    table: pa.Table
    rows: list[dict[str, Any]]
    reasons: list[str]


def scan(kind: str, file: str) -> Scan:
    """Count a file's rows and find its columns; of Parquet the metadata tell, other files are read.

    Raises:
        UnreadableFile: If it is damaged or gone.
    """
    try:
        if kind == "parquet":
            store, path = open_store(file)
            with store.open_input_file(path) as opened, pq.ParquetFile(opened) as found:
                return Scan(found.metadata.num_rows, {field.name: field.type for field in found.schema_arrow})
        rows, types = 0, {}
        for batch in READERS[kind](Piece(file)):
            rows += len(batch.rows) + len(batch.bad)
            for name in dict.fromkeys(name for row in batch.rows for name in row):
                found = pa.string()
                if kind == "jsonl":
                    found = _type_of([row.get(name) for row in batch.rows])
                types[name] = common_type([types.get(name, pa.null()), found])
        return Scan(rows, types)
    except READ_ERRORS as error:
        raise UnreadableFile(f"cannot read {file} as {kind}: {reason_of(error)}. Mend it, or take it out") from error


def _type_of(values: Sequence[Any]) -> pa.DataType | None:
    """The type of JSON values; those that Arrow cannot hold at all do not count. None: there is none."""
    try:
        found: pa.DataType | None = pa.array(values).type
    except NOT_KEPT:
        types: list[pa.DataType | None] = [pa.null()]
        for value in values:
            try:
                types.append(pa.array([value]).type)
            except NOT_KEPT:
                continue
        found = common_type(types)
    return found if found is not None and _writable(found) else None


def _writable(kind: pa.DataType) -> bool:
    """Parquet has no struct without fields."""
    if pa.types.is_list(kind):
        return _writable(kind.value_type)
    return not pa.types.is_struct(kind) or (kind.num_fields > 0 and all(_writable(f.type) for f in kind.fields))


def common_type(types: Sequence[pa.DataType | None]) -> pa.DataType | None:
    """The type that holds the values of all of some types; None where there is none, or one of them is None."""
    if any(kind is None for kind in types):
        return None
    try:
        schemas = [pa.schema([("column", kind)]) for kind in types]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


@dataclass(frozen=True)
class Input:
    """Rows of some files, one after the other.

    Attributes:
        kind: Format of the files.
        files: In order.
        counts: Rows of each.
        schema: Columns of any of them; where a file lacks one, it is null.
        as_json: Columns that are kept as JSON text.
    """

    kind: str
    files: list[str]
    counts: list[int]
    schema: pa.Schema
    as_json: frozenset[str]

    @classmethod
    def of(cls, kind: str, files: list[str], scans: Sequence[Scan]) -> Input:
        """Rows of scanned files.

        Raises:
            UnreadableFile: If a column of Parquet files has types that do not go together.
        """
        fields, as_json = [], set()
        for name in dict.fromkeys(name for found in scans for name in found.types):
            having = [(file, s.types[name]) for file, s in zip(files, scans, strict=True) if name in s.types]
            merged = common_type([t for _, t in having])
            if merged is None and kind == "parquet":
                one, other = next((a, b) for a in having for b in having if common_type([a[1], b[1]]) is None)
                raise UnreadableFile(
                    f"column {name!r} is {one[1]} in {one[0]} and {other[1]} in {other[0]}: give them one type, or "
                    "answer the files in several calls"
                )
            if merged is None:
                as_json.add(name)
            null = merged is None or pa.types.is_null(merged)
            fields.append(pa.field(name, pa.string() if null and kind != "parquet" else merged))
        return cls(kind, files, [found.rows for found in scans], pa.schema(fields), frozenset(as_json))

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(self.counts)

    def place(self, row: int) -> tuple[str, int]:
        """The file of a row, and its number there, from 0."""
        for file, count in zip(self.files, self.counts, strict=True):
            if row < count:
                return file, row
            row -= count
        raise AssertionError("a row after the last one")

    def parts(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Part]:
        """Rows from `start` to before `stop`.

        Args:
            start: First row, counted over all files.
            stop: The one after the last.
            columns: Those that are wanted as Python values too.

        Raises:
            UnreadableFile: If a file is damaged, or gone since it was scanned.
        """
        before = 0
        for file, count in zip(self.files, self.counts, strict=True):
            first, last = max(0, start - before), min(count, stop - before)
            before += count
            if first < last:
                read = self._parquet if self.kind == "parquet" else self._lines
                try:
                    yield from read(file, first, last, columns)
                except READ_ERRORS as error:
                    raise UnreadableFile(f"cannot read {file} as {self.kind}: {reason_of(error)}") from error

    def _parquet(self, file: str, first: int, last: int, columns: Sequence[str]) -> Iterator[Part]:
        store, path = open_store(file)
        with store.open_input_file(path) as opened, pq.ParquetFile(opened) as found:
            groups, at, skipped = [], 0, 0
            for group in range(found.num_row_groups):
                end = at + found.metadata.row_group(group).num_rows
                if end <= first:
                    skipped = end
                elif at < last:
                    groups.append(group)
                at = end
            at = skipped
            for batch in found.iter_batches(ROWS_AT_ONCE, row_groups=groups, use_threads=False):
                cut = batch.slice(max(0, first - at), max(0, min(last, at + batch.num_rows) - max(first, at)))
                at += batch.num_rows
                if cut.num_rows:
                    table = self._fitted(pa.Table.from_batches([cut]))
                    yield Part(table, *_values(table.select(columns)))

    def _fitted(self, table: pa.Table) -> pa.Table:
        """A table of one file with the columns and types of all."""
        arrays = [
            table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in self.schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _lines(self, file: str, first: int, last: int, columns: Sequence[str]) -> Iterator[Part]:
        at = 0
        for batch in READERS[self.kind](Piece(file)):
            rows, reasons = _in_order(batch)
            begin, end = max(0, first - at), max(0, last - at)
            at += len(rows)
            if rows[begin:end]:
                yield self._part(rows[begin:end], reasons[begin:end], columns)
            if at >= last:
                return

    def _part(self, rows: list[dict[str, Any]], reasons: list[str], columns: Sequence[str]) -> Part:
        kept = [{name: self._kept(name, value) for name, value in row.items()} for row in rows]
        wanted = [{name: row[name] for name in columns if name in row} for row in rows]
        try:
            return Part(pa.Table.from_pylist(kept, self.schema), wanted, reasons)
        except NOT_KEPT:  # by one of them, which shall not take the others with it
            tables, reasons = [], list(reasons)
            for i, row in enumerate(kept):
                try:
                    tables.append(pa.Table.from_pylist([row], self.schema))
                except NOT_KEPT as error:
                    tables.append(pa.Table.from_pylist([{}], self.schema))
                    reasons[i] = f"cannot be kept: {reason_of(error)}"
            return Part(pa.concat_tables(tables), wanted, reasons)

    def _kept(self, name: str, value: Any) -> Any:
        as_text = name in self.as_json and value is not None and not isinstance(value, str)
        return json.dumps(value, ensure_ascii=False) if as_text else value


def _values(table: pa.Table) -> tuple[list[dict[str, Any]], list[str]]:
    """A table's rows, and why one cannot be read, or empty."""
    try:
        return table.to_pylist(), [""] * table.num_rows
    except UnicodeDecodeError:  # Parquet writers may put any bytes where text should be
        rows, reasons = [], []
        for i in range(table.num_rows):
            try:
                rows += table.slice(i, 1).to_pylist()
                reasons.append("")
            except UnicodeDecodeError as error:
                rows.append({})
                reasons.append(f"no UTF-8 text: {error}")
        return rows, reasons


def _in_order(batch: Rows) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and those that could not be read as one between them, with the reasons."""
    if not batch.bad:
        return batch.rows, [""] * len(batch.rows)
    found = [(number, row, "") for number, row in zip(batch.numbers, batch.rows, strict=True)]
    found += [(bad["row_number"], {}, bad["reason"]) for bad in batch.bad]
    found.sort(key=lambda entry: entry[0])
    return [row for _, row, _ in found], [reason for _, _, reason in found]

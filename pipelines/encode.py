"""A piece of a data set -> shards of token ids, or of text: what one task of `yan prepare` does.

A task reads and writes a thousand rows at a time, in a folder of its own whose files are moved to their places when all
are written. What it did is written last, in a record; a piece with a record is not done again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.documents import clean, document_key, document_of, split_of, task_fields, text_column, unread_path
from pipelines.listing import UnreadableFile
from pipelines.sources import Piece, Rows, Source, value_at
from yan_core.config import DataConfig
from yan_core.files import sha256_file, write_file
from yan_core.tasks import Task
from yan_core.tokenization import Tokenizer

IDS = pa.list_(pa.int32())
SCHEMAS = {
    "finetune": pa.schema([("source", IDS), ("target", IDS)]),
    "flow": pa.schema([("target", IDS)]),
    "text": pa.schema(
        [("source", pa.string()), ("target", pa.string()), ("answers", pa.list_(pa.string())), ("kind", pa.string())]
    ),
}
"""Columns of the shards of task pairs, of windows of plain text, and of rows that stay text."""

ROW_GROUP = 256
"""Rows of a row group: what a training reads at the least to get one row."""


@dataclass
class Record:
    """What became of a piece.

    Attributes:
        files: Shards written, below the prepared folder: rows, bytes and SHA-256 of each.
        usable: Rows that can be used, whatever split they fall into or are left out for.
        rows: Rows written of each part (`finetune`, `flow`, `validation`, `test`).
        tokens: Tokens written.
        bad: Rows set aside because they cannot be used.
        first_bad: Reason and row of the first of these.
        filtered: Rows that the data set's `where` leaves out.
        dropped: Rows left out on purpose, by reason.
        cut_rows: Sources that were cut to data.max_source_tokens.
        cut_tokens: Tokens cut off them.
        unreadable: Why the piece's file cannot be read, or empty.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    usable: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    bad: int = 0
    first_bad: dict[str, Any] = field(default_factory=dict)
    filtered: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut_rows: int = 0
    cut_tokens: int = 0
    unreadable: str = ""

    @classmethod
    def of(cls, values: dict[str, Any]) -> Record:
        """One from its plain values."""
        return cls(**{**values, "rows": Counter(values["rows"]), "dropped": Counter(values["dropped"])})

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """One that was written earlier; None if there is none."""
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None


@lru_cache(maxsize=2)
def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_json(text)


class ShardWriter:
    """Writes rows of one part of a piece to shards of at most `rows_per_shard` rows."""

    def __init__(self, folder: Path, part: str, stem: str, schema: pa.Schema, rows_per_shard: int) -> None:
        self.folder, self.part, self.stem, self.schema, self.limit = folder, part, stem, schema, rows_per_shard
        self.writer: pq.ParquetWriter | None = None
        self.path, self.files, self.rows, self.total = Path(), {}, 0, 0
        self.held: list[pa.Table] = []
        self.num_held = 0

    def add(self, table: pa.Table) -> None:
        """Take some rows."""
        self.held.append(table)
        self.num_held += table.num_rows
        self.total += table.num_rows
        while self.num_held >= ROW_GROUP:
            self._flush(self.num_held // ROW_GROUP * ROW_GROUP)

    def _flush(self, rows: int) -> None:
        table = pa.concat_tables(self.held)
        if self.writer is None:
            self.path = self.folder / self.part / f"{self.stem}-{len(self.files):04d}.parquet"
            self.path.parent.mkdir(parents=True, exist_ok=True)
            ids = [f"{c.name}.list.element" for c in self.schema if c.type == IDS]  # half the time, and smaller
            self.writer = pq.ParquetWriter(
                self.path,
                self.schema,
                compression="zstd",
                write_page_checksum=True,
                use_dictionary=not ids,
                use_byte_stream_split=ids,  # type: ignore[arg-type]  # columns too, which its stubs do not know
            )
        rows = min(rows, self.limit - self.rows)
        self.writer.write_table(table.slice(0, rows), row_group_size=ROW_GROUP)
        self.rows += rows
        self.held, self.num_held = [table.slice(rows)], self.num_held - rows
        if self.rows == self.limit:
            self._end()

    def _end(self) -> None:
        if self.writer is not None:
            self.writer.close()
            name = self.path.relative_to(self.folder).as_posix()
            self.files[name] = {
                "rows": self.rows,
                "bytes": self.path.stat().st_size,
                "sha256": sha256_file(self.path),
            }
            self.writer, self.rows = None, 0

    def close(self) -> dict[str, dict[str, Any]]:
        """Write the rest; gives what was written."""
        while self.num_held:
            self._flush(self.num_held)
        self._end()
        return self.files


def lists(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Stretches of an array of token ids as an array of lists."""
    offsets = np.concatenate([[0], lengths.cumsum()])
    places = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values[places]))


@dataclass(frozen=True)
class Encode:
    """Does a piece of one split of a data set.

    Attributes:
        source: The data set.
        split: `train`, `validation` or `corpus`.
        task: Template of the rows; None: they are plain text.
        data: Lengths, cleaning.
        tokenizer: Its JSON.
        folder: Where shards, records and the quarantine go, and where dedup.py left the duplicates' numbers.
        kept_out: Sorted keys of documents that must not be here, as those of the other split, [num] uint64.
        threads: Threads of the tokenizer.
    """

    source: Source
    split: str
    task: Task | None
    data: DataConfig
    tokenizer: str
    folder: Path
    kept_out: np.ndarray
    threads: int = 1

    @property
    def name(self) -> str:
        """What its files are called by."""
        return f"{self.split}-{self.source.name}"

    def record_path(self, number: int) -> Path:
        """Where a piece's record is."""
        return self.folder / "records" / f"{self.name}-{number:06d}.json"

    def duplicates_path(self, number: int) -> Path:
        """Where the numbers of a piece's duplicate rows are, if it has any."""
        return self.folder / "duplicates" / f"{self.name}-{number:06d}.npy"

    def __call__(self, number: int) -> Record:
        """Do a piece, unless its record says that it is done."""
        done = Record.read(self.record_path(number))
        if done is not None:
            return done
        os.environ.setdefault("RAYON_NUM_THREADS", str(self.threads))  # of the tokenizer, before its first use
        scratch = self.folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{self.name}-{number:06d}-", dir=scratch) as own:
            record = self._write(number, Path(own))
            for file in (file for file in Path(own).rglob("*") if file.is_file()):
                place = self.folder / file.relative_to(own)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
        record.first_bad = json.loads(json.dumps(record.first_bad, default=str))  # dates, bytes
        if not record.unreadable:  # else it is read again by the next call
            write_file(self.record_path(number), json.dumps(vars(record)))
        return record

    def _write(self, number: int, folder: Path) -> Record:
        """Write a piece's shards, and the rows that are set aside, to a folder."""
        piece, record = self.source.pieces[number], Record()
        stem = f"{self.source.name}-{number:06d}"
        writers: dict[str, ShardWriter] = {}

        def writer(part: str, schema: str) -> ShardWriter:
            if part not in writers:
                writers[part] = ShardWriter(folder, part, stem, SCHEMAS[schema], self.data.rows_per_shard)
            return writers[part]

        quarantine = folder / "quarantine" / self.split / f"{stem}.jsonl"
        path = self.duplicates_path(number)
        duplicates = set(np.load(path).tolist()) if path.is_file() else set()
        do = self._windows if self.task is None else self._pairs
        try:
            unread = unread_path(self.folder, self.name, number)
            if unread.is_file():  # by a pass before: what it did not see must not get in here
                raise UnreadableFile(unread.read_text(encoding="utf-8"))
            for batch in self.source.rows(piece):
                bad = [{**b, "row": None} for b in batch.bad] + do(batch, duplicates, record, writer)
                record.filtered += batch.filtered
                record.usable += len(batch.rows) + len(batch.bad) - len(bad)
                if bad:
                    record.bad += len(bad)
                    record.first_bad = record.first_bad or {"file": piece.where, **bad[0]}
                    set_aside(quarantine, piece, bad)
        except UnreadableFile as error:
            record.unreadable = str(error)
            set_aside(quarantine, piece, [{"row_number": None, "reason": record.unreadable, "row": None}])
        for part, shards in writers.items():
            record.files |= shards.close()
            record.rows[part] += shards.total
        return record

    def plain(self, row: dict[str, Any]) -> tuple[str, str]:
        """A row of a corpus: its text in its normal form, and why it is left out, or empty.

        Raises:
            ValueError: If it has no text.
        """
        column = text_column(self.source, self.data)
        text = value_at(row, column)
        if not isinstance(text, str):
            raise ValueError(f"{column!r} must be text, got {text!r:.80} ({type(text).__name__})")
        text, config = clean(text, self.data.clean), self.data.clean
        if not text.strip():
            return text, "blank"
        if len(text) < config.min_chars:
            return text, "too short"
        if config.max_chars and len(text) > config.max_chars:
            return text, "too long"
        return text, self._of_other_split(row, text)

    def pair(self, row: dict[str, Any]) -> tuple[dict[str, Any], str, str, str]:
        """A row of the task: its fields, source and target, and why it is not trained on, or empty.

        Raises:
            ValueError: If it cannot be used; the message says which field.
        """
        assert self.task is not None
        fields = task_fields(row, self.source, self.task, self.data.clean)
        source, target = self.task.pair(fields)
        return fields, source, target, self._of_other_split(row, fields[self.task.document])

    def _of_other_split(self, row: dict[str, Any], text: str) -> str:
        dataset = self.source.dataset
        if not dataset.held_out and not len(self.kept_out):
            return ""
        key = document_of(row, self.source, text)
        if dataset.held_out and split_of(key, dataset.held_out) != "train":
            return "held out"
        keys = {key, document_key(text)} if dataset.document else {key}  # under another name it is the same text
        return "in validation" if any(map(self._is_kept_out, keys)) else ""

    def _is_kept_out(self, key: int) -> bool:
        place = int(np.searchsorted(self.kept_out, np.uint64(key)))
        return place < len(self.kept_out) and int(self.kept_out[place]) == key

    def _windows(
        self, batch: Rows, duplicates: set[int], record: Record, writer: Callable[[str, str], ShardWriter]
    ) -> list[dict[str, Any]]:
        """Plain texts -> windows of token ids; gives the rows that are no text."""
        bad, texts = [], []
        for number, row in zip(batch.numbers, batch.rows, strict=True):
            try:
                text, reason = self.plain(row)
            except ValueError as error:
                bad.append({"row_number": number, "reason": str(error), "row": row})
                continue
            reason = reason or ("duplicate" if number in duplicates else "")
            if reason:
                record.dropped[reason] += 1
            else:
                texts.append(text)
        self._write_windows(texts, record, writer)
        return bad

    def _write_windows(self, texts: list[str], record: Record, writer: Callable[[str, str], ShardWriter]) -> None:
        size = self.data.window_tokens
        values, offsets = _tokenizer(self.tokenizer).encode_arrays(texts, self.threads)
        lengths = np.diff(offsets)
        counts = -(-lengths // size)  # windows of each text
        within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        starts = np.repeat(offsets[:-1], counts) + within * size
        record.tokens += len(values)
        if len(starts):
            windows = lists(values, starts, np.minimum(size, np.repeat(offsets[1:], counts) - starts))
            writer("flow", "flow").add(pa.table({"target": windows}, SCHEMAS["flow"]))

    def _pairs(
        self, batch: Rows, duplicates: set[int], record: Record, writer: Callable[[str, str], ShardWriter]
    ) -> list[dict[str, Any]]:
        """Rows -> the task's pairs; gives the unusable ones."""
        assert self.task is not None
        bad, kept = [], []
        texts: dict[str, list[dict[str, Any]]] = {}
        for number, row in zip(batch.numbers, batch.rows, strict=True):
            try:
                fields, source, target, reason = self.pair(row)
            except ValueError as error:
                bad.append({"row_number": number, "reason": str(error), "row": row})
                continue
            if self.split != "train":
                part = self._held_out_part(row, fields[self.task.document])
                if part:
                    texts.setdefault(part, []).append(_as_text(fields, source, target, self.task))
                continue
            reason = reason or ("duplicate" if number in duplicates else "")
            if reason:
                record.dropped[reason] += 1
            else:
                kept.append((number, row, source, target))
        for part, rows in texts.items():
            writer(part, "text").add(pa.Table.from_pylist(rows, SCHEMAS["text"]))
        return bad + self._write_pairs(kept, record, writer)

    def _held_out_part(self, row: dict[str, Any], document: str) -> str:
        """The part that a row which is not trained on belongs to; empty: none."""
        dataset = self.source.dataset
        if not dataset.held_out:
            return self.split
        part = split_of(document_of(row, self.source, document), dataset.held_out)
        return "" if part == "train" else part

    def _write_pairs(
        self,
        entries: list[tuple[int, dict[str, Any], str, str]],
        record: Record,
        writer: Callable[[str, str], ShardWriter],
    ) -> list[dict[str, Any]]:
        """Encode pairs and write them; gives the rows whose target is too long."""
        assert self.task is not None
        tokenizer, limit, longest = _tokenizer(self.tokenizer), self.data.max_target_tokens, self.data.max_source_tokens
        sources, source_offsets = tokenizer.encode_arrays([e[2] for e in entries], self.threads)
        targets, target_offsets = tokenizer.encode_arrays([e[3] for e in entries], self.threads)
        target_lengths, cut = np.diff(target_offsets), np.maximum(0, np.diff(source_offsets) - longest)
        fits = target_lengths <= limit
        bad = []
        for i in np.flatnonzero(~fits).tolist():
            reason = f"target has {target_lengths[i]} tokens, data.max_target_tokens={limit}"
            bad.append({"row_number": entries[i][0], "reason": reason, "row": entries[i][1]})
        if not fits.any():
            return bad
        starts, cut = (source_offsets[:-1] + (cut if self.task.keep == "end" else 0))[fits], cut[fits]
        lengths = np.diff(source_offsets)[fits] - cut
        record.cut_rows += int((cut > 0).sum())
        record.cut_tokens += int(cut.sum())
        record.tokens += int(lengths.sum() + target_lengths[fits].sum())
        columns = {
            "source": lists(sources, starts, lengths),
            "target": lists(targets, target_offsets[:-1][fits], target_lengths[fits]),
        }
        writer("finetune", "finetune").add(pa.table(columns, SCHEMAS["finetune"]))
        if not self.data.corpus and not self.data.mixture and self.source.dataset.format != "world":
            self._write_windows([entries[i][2] for i in np.flatnonzero(fits)], record, writer)
        return bad


def _as_text(fields: dict[str, Any], source: str, target: str, task: Task) -> dict[str, Any]:
    kind = str(fields.get("kind") or "")
    return {"source": source, "target": target, "answers": task.answers(fields), "kind": kind}


def text_row(fields: dict[str, Any], task: Task) -> dict[str, Any]:
    """A row's source, target, every right answer and kind of question, as text.

    Raises:
        ValueError: If the template cannot be filled in.
    """
    return _as_text(fields, *task.pair(fields), task)


def set_aside(path: Path, piece: Piece, bad: list[dict[str, Any]]) -> None:
    """Append unusable rows with file, row and reason to a file of the quarantine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as out:  # halves of characters
        for entry in bad:
            out.write(json.dumps({"file": piece.where, **entry}, default=str, ensure_ascii=False) + "\n")

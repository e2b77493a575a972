"""A row -> its texts in their normal form, the document that it belongs to, and the split which that falls into."""

from __future__ import annotations

import re
import sys
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipelines.listing import UnreadableFile
from pipelines.sources import Source, fields_of, value_at
from yan_core.config import CleanConfig, DataConfig
from yan_core.files import atomic_folder, write_file
from yan_core.tasks import Task


def clean(text: str, config: CleanConfig) -> str:
    """A text in its normal form: ends of lines as line feeds, no control characters, no white space around it."""
    if not config.unicode:
        return text
    if not text.isascii():
        text = unicodedata.normalize(config.unicode, text)
    if not text.replace("\n", "").replace("\t", "").isprintable():  # sooner than the expression
        text = _unseen().sub(lambda found: _BREAKS.get(found[0], ""), text.replace("\r\n", "\n"))
    return text.strip()


_BREAKS = dict.fromkeys("\r\v\f\x85", "\n") | dict.fromkeys("\x1c\x1d\x1e\x1f", " ")
"""Control characters that stand between words."""

_KEPT = "\n\t\u200c\u200d"
"""Line feed and tab, and the joiners that Persian, Indic scripts and emoji are written with."""


@lru_cache(maxsize=1)
def _unseen() -> re.Pattern[str]:
    """Control and format characters, surrogates and private ones, without those that are kept."""
    codes = range(sys.maxunicode + 1)
    unseen = (c for c in codes if unicodedata.category(chr(c)) in ("Cc", "Cf", "Cs", "Co") and chr(c) not in _KEPT)
    runs = (list(run) for _, run in groupby(enumerate(unseen), lambda pair: pair[1] - pair[0]))
    return re.compile("[" + "".join(rf"\U{run[0][1]:08x}-\U{run[-1][1]:08x}" for run in runs) + "]")


def task_fields(row: dict[str, Any], source: Source, task: Task, config: CleanConfig) -> dict[str, Any]:
    """A row under its template fields, its texts in their normal form."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(entry) for entry in value]
        return clean(value, config) if isinstance(value, str) else value

    fields = fields_of(row, source.dataset.columns)
    used = {name for name in (*task.fields, *task.source_fields, task.references) if name in fields}
    return {**fields, **{name: cleaned(fields[name]) for name in used}}


def text_column(source: Source, data: DataConfig) -> str:
    """Column of a corpus that holds the text."""
    return source.dataset.columns.get("text", data.corpus_column)


def text_key(text: str) -> int:
    """64-bit hash of a text; white space does not count. Each text of a corpus gets one, so it has to be fast."""
    text = text if text.isascii() else "".join(text.split())  # which knows other white space too, and is slow
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass").translate(None, b" \t\n\r\v\f"))


def document_key(text: str) -> int:
    """64-bit hash of a document's name or text; white space and case do not count."""
    return text_key(text.lower())


def document_of(row: dict[str, Any], source: Source, text: str) -> int:
    """Key of the document that a row belongs to; `text` where no column names it."""
    column = source.dataset.document
    named = value_at(row, column) if column else None
    return document_key(text if named is None else str(named))


def split_of(key: int, held_out: float) -> str:
    """The split that a document falls into, by its key alone: `train`, `validation` or `test`."""
    place = key / 2**64
    return "validation" if place < held_out else "test" if place < 2 * held_out else "train"


def unread_path(folder: Path, name: str, number: int) -> Path:
    """Where a pass leaves why it could not read a piece; the passes after it leave the piece out too."""
    return folder / "unread" / f"{name}-{number:06d}.txt"


@dataclass(frozen=True)
class KeepOut:
    """Writes the keys of what a piece of the held-out rows keeps out of the training: documents, and all their texts.

    Attributes:
        source: The rows; an unreadable file's are left out.
        task: Their template.
        config: Of the texts' normal form.
        held_out: Share of the rows' documents that is held out; 0: all of them are.
        folder: Where `keys` is written.
    """

    source: Source
    task: Task
    config: CleanConfig
    held_out: float
    folder: Path

    def path(self, number: int) -> Path:
        """Where a piece's keys are."""
        return self.folder / "keys" / f"{self.source.name}-{number:06d}"

    def __call__(self, number: int) -> None:
        """Do a piece, unless it is done."""
        path, unread = self.path(number), unread_path(self.folder, f"validation-{self.source.name}", number)
        if path.is_dir() and not unread.is_file():
            return
        unread.unlink(missing_ok=True)
        documents: set[int] = set()
        texts: set[int] = set()
        try:
            for batch in self.source.rows(self.source.pieces[number]):
                for row in batch.rows:
                    self._add(row, documents, texts)
        except UnreadableFile as error:
            write_file(unread, str(error))  # the encoding sets the file aside
        with atomic_folder(path) as folder:
            for name, keys in (("documents", documents), ("texts", texts)):
                np.save(folder / f"{name}.npy", np.array(sorted(keys), np.uint64))

    def _add(self, row: dict[str, Any], documents: set[int], texts: set[int]) -> None:
        fields = task_fields(row, self.source, self.task, self.config)
        try:
            self.task.pair(fields)
            key = document_of(row, self.source, fields[self.task.document])
        except ValueError:  # an unusable row, which is set aside when it is encoded
            if self.held_out:
                return
        else:
            if self.held_out and split_of(key, self.held_out) == "train":
                return
            documents |= {key, document_key(fields[self.task.document])}
        texts |= {document_key(text) for text in fields.values() if isinstance(text, str) and text}

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted keys of the documents of all pieces, and of their texts, uint64, [documents] and [texts]."""
        paths = [self.path(number) for number in range(len(self.source.pieces))]
        none = np.zeros(0, np.uint64)
        documents, texts = (
            np.unique(np.concatenate([none, *(np.load(path / f"{name}.npy") for path in paths)]))
            for name in ("documents", "texts")
        )
        return documents, texts

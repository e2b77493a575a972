"""What `yan prepare` refuses and how it says so: columns, settings without effect, rows and files of no use."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipelines.documents import text_column
from pipelines.encode import Encode, Record
from pipelines.listing import DataError
from pipelines.sources import Source
from yan_core.config import CleanConfig, DataConfig
from yan_core.tasks import Task


def check_fields(source: Source, task: Task) -> None:
    """Refuse rows that lack a field of the task."""
    columns = source.dataset.columns
    for field in task.fields:
        column = columns.get(field, field)
        answers = columns.get(task.references, task.references) if field == task.target else ""
        if not source.has(column) and not (answers and source.has(answers)):
            raise DataError(
                f"data set {source.name!r} has no column {column!r} for field {field!r} of task {task.name!r}; "
                f"it has {source.named_columns()}. Map it: data.datasets.{source.name}.columns.{field}=<column>"
            )


def check_corpus(source: Source, data: DataConfig) -> None:
    """Refuse a corpus without its column of text."""
    column = text_column(source, data)
    if not source.has(column):
        raise DataError(
            f"data set {source.name!r} has no column {column!r} (data.corpus_column); it has {source.named_columns()}"
        )


def check_clean(config: CleanConfig, corpora: Sequence[Source]) -> None:
    """Refuse settings that are about texts of a corpus where the task's own rows are the corpus."""
    if corpora:
        return
    asked = [f"data.clean.min_chars={config.min_chars}"] if config.min_chars > 1 else []
    asked += [f"data.clean.max_chars={config.max_chars}"] if config.max_chars else []
    asked += ["data.clean.duplicates=near"] if config.duplicates == "near" else []
    if asked:
        raise DataError(
            f"{', '.join(asked)} would do nothing: it is about texts of a corpus, and here the task's own rows are the "
            "corpus. Name one in data.corpus or data.mixture, or leave the setting out (duplicates: exact is for both)"
        )


def check_counts(name: str, split: str, good: int, bad: int, first: dict[str, Any], allowed: float, where: str) -> None:
    """Stop where more rows than allowed are unusable, or there is none.

    Args:
        name: The data set's.
        split: Which rows, for the message.
        good: Usable ones.
        bad: Unusable ones.
        first: The first of these: file, row number, reason and row.
        allowed: Share of rows.
        where: Where the others are.

    Raises:
        DataError: Says how many, and the first.
    """
    if bad and bad > allowed * (good + bad):
        share = math.ceil(1000 * bad / (good + bad)) / 1000
        remedy = f", or let them be set aside with --data.bad_rows_allowed {share:g}" if good else ""
        row = f"; {json.dumps(first['row'], default=str, ensure_ascii=False)[:300]}" if first.get("row") else ""
        raise DataError(
            f"{bad} of {good + bad} {split} rows of {name!r} cannot be used (data.bad_rows_allowed={allowed:g}). The "
            f"first, row {first['row_number'] + 1} of {first['file']}: {first['reason']}{row}. {where}"
            f"Mend the data{remedy}"
        )
    if good == 0:
        raise DataError(f"data set {name!r} gave no {split} row: it is empty, or its filter `where` matches none")


PART_OF = {"train": "finetune", "validation": "validation", "corpus": "flow"}
"""Split of a job -> the part that its usable rows go to, the held-out ones apart."""


def check_records(job: Encode, records: Sequence[Record], so_far: bool = False) -> None:
    """Stop where more rows or files than allowed are unusable."""
    allowed, name, part = job.data.bad_rows_allowed, job.source.name, PART_OF[job.split]
    unreadable, pieces = [r.unreadable for r in records if r.unreadable], len(job.source.pieces)
    if len(unreadable) > allowed * pieces:
        remedy = ", or let such files be set aside with --data.bad_rows_allowed" if pieces > 1 else ""
        raise DataError(f"{unreadable[0]}. Mend it, or take it out{remedy}")
    dropped = sum((r.dropped for r in records), Counter())
    bad, usable = sum(r.bad for r in records), sum(r.usable for r in records)
    first = next((r.first_bad for r in records if r.first_bad), {})
    where = f"All of them are in {job.folder / 'quarantine' / job.split}. "
    unread = pieces - len(records)
    where += f"{unread} of {pieces} pieces were not read any more. " if unread else ""
    check_counts(name, job.split, usable, bad, first, allowed, where)
    if not so_far and not any(r.rows[part] for r in records):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        raise DataError(
            f"no {job.split} row of {name!r} is left ({reasons}): name other files for `validation`, or the column "
            f"that tells documents apart in data.datasets.{name}.document, or see data.clean"
        )


class Watch:
    """Ends a preparation whose end is known: more rows or files than allowed are unusable already."""

    PIECES = 8
    """Pieces of a data set from which its size is told by those that are done."""

    def __init__(self, jobs: Sequence[Encode]) -> None:
        self.jobs = jobs
        self.done: list[list[Record]] = [[] for _ in jobs]
        self.rows, self.bad, self.unreadable = [0] * len(jobs), [0] * len(jobs), [0] * len(jobs)

    def __call__(self, number: int, said: dict[str, Any]) -> None:
        record, job = Record.of(said), self.jobs[number]
        self.done[number].append(record)
        self.rows[number] += record.usable + record.bad
        self.bad[number] += record.bad
        self.unreadable[number] += bool(record.unreadable)
        allowed, pieces = job.data.bad_rows_allowed, len(job.source.pieces)
        likely = self.rows[number] / len(self.done[number]) * pieces  # rows in all
        told = len(self.done[number]) >= self.PIECES or not allowed
        if self.unreadable[number] > allowed * pieces or (told and self.bad[number] > 2 * allowed * likely):
            check_records(job, self.done[number], so_far=True)

"""Rows of files -> shards of answers: what readers and actors of `yan generate` do.

A reader cuts the input into stretches of `rows_per_shard` rows, whatever files these are in, and fills in the task's
template. An actor answers a stretch, rows of like length together, and writes it as a shard. The seed of a row follows
from its place in the input, so that its answer is the same in any batch and on any worker.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources import fields_of
from pipelines.tables import Input
from yan_core.config import NUM_STEPS, SamplingConfig
from yan_core.files import sha256_file, write_file
from yan_core.tasks import Task

if TYPE_CHECKING:
    from yan_core.generator import Generation

ANSWERS = pa.schema([("answer", pa.string()), ("error", pa.string()), ("tokens", pa.int32())])
"""What a shard has beside the input's columns: the answer, or why there is none, and the answer's number of tokens."""

SHARD = "part-{:06d}.parquet"
"""Name of a shard by its number."""

SEEDS = 2**32
"""Rows that each seed has seeds of its own for."""


def kept_names(names: Sequence[str]) -> list[str]:
    """Names that the input's columns have in a shard: one called `answer` becomes `input_answer`."""
    kept = []
    for name in names:
        if name in ANSWERS.names:
            name = f"input_{name}"
            while name in names:
                name = f"input_{name}"
        kept.append(name)
    return kept


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What answers depend on beside the model and the rows."""

    num_steps: int = NUM_STEPS
    """Solver steps."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Solver, guidance and candidates."""
    seed: int = 0
    """The n-th row of the input, from 0, is answered with the seed `seed * 2**32 + n`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Template field -> column, where the names differ, as in a data set of a config."""
    rows_per_shard: int = 1024
    """Rows of an output file, which is also what a worker does at a time."""
    use_gpu: bool = False
    """One GPU a worker, in bfloat16; else one CPU core, in float32."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be in [0, 2**31), got {self.seed}")


@dataclass(frozen=True)
class Read:
    """Numbers of shards -> the rows of each, in a block of its own.

    Attributes:
        rows: All of the input.
        task: Gives the template.
        settings: Columns, and rows of a shard.
    """

    rows: Input
    task: Task
    settings: Settings

    def __call__(self, asked: pa.Table) -> Iterator[pa.Table]:
        """Read the shards of each span that is asked for."""
        for span in asked["shards"].to_pylist():
            for number, (table, prompts, reasons) in self.shards(span):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                # A row of its own, or Ray would put several shards into a block, or cut one in two.
                columns = {
                    "shard": [number],
                    "prompts": [prompts],
                    "reasons": [reasons],
                    "table": pa.array([sink.getvalue().to_pybytes()], pa.large_binary()),
                }
                yield pa.table(columns)

    def shards(self, span: Sequence[int]) -> Iterator[tuple[int, tuple[pa.Table, list[str], list[str]]]]:
        """Table, prompts and reasons (one of them is empty) of each shard of a rising span, and its number.

        What lies between the shards of a span is read, and left out.
        """
        size, number, wanted = self.settings.rows_per_shard, span[0], set(span)
        tables: list[pa.Table] = []
        prompts: list[str] = []
        reasons: list[str] = []
        columns = self._columns()
        for part in self.rows.parts(number * size, (span[-1] + 1) * size, columns):
            tables.append(part.table)
            for row, reason in zip(part.rows, part.reasons, strict=True):
                try:
                    prompts.append("" if reason else self.task.prompt(fields_of(row, self.settings.columns)))
                except ValueError as error:
                    prompts.append("")
                    reason = str(error)
                reasons.append(reason)
            while len(prompts) >= size:
                held = pa.concat_tables(tables)
                if number in wanted:
                    yield number, (held.slice(0, size), prompts[:size], reasons[:size])
                number, tables, prompts, reasons = number + 1, [held.slice(size)], prompts[size:], reasons[size:]
        if prompts:
            yield number, (pa.concat_tables(tables), prompts, reasons)

    def _columns(self) -> list[str]:
        """Columns that the template is filled in from."""
        named = [self.settings.columns.get(name, name) for name in self.task.source_fields]
        found = [name if name in self.rows.schema.names else name.split(".")[0] for name in named]
        return list(dict.fromkeys(found))


def like_length(prompts: Sequence[str], places: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of places of prompts, those of like length in one."""
    order = sorted(places, key=lambda i: len(prompts[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Answer:
    """An actor: rows of a shard -> the shard's file, and a record of it."""

    def __init__(self, model: Path, folder: Path, records: Path, settings: Settings, batch_size: int) -> None:
        """Load the model and answer once.

        Args:
            model: Its folder.
            folder: Where the shards go.
            records: Where a record of each goes.
            settings: How rows are answered.
            batch_size: Rows of a batch.

        Raises:
            ValueError: If this model cannot answer anything with these settings.
        """
        os.environ.setdefault("RAYON_NUM_THREADS", "1")  # of the tokenizer: a worker has one core
        import torch

        import yan_core

        torch.set_num_threads(1)
        self.folder, self.records, self.settings, self.batch_size = folder, records, settings, batch_size
        device, dtype = ("cuda", torch.bfloat16) if settings.use_gpu else ("cpu", torch.float32)
        self.generator = yan_core.load(model, device, dtype, use_graphs=settings.use_gpu)
        self.broken = torch.AcceleratorError
        self._generate(["?"], [0])

    def __call__(self, asked: pa.Table) -> pa.Table:
        """Answer a shard and write it."""
        began_s = time.time()
        (number,), (prompts,), (reasons,) = (asked[name].to_pylist() for name in ("shard", "prompts", "reasons"))
        with pa.ipc.open_stream(asked["table"][0].as_buffer()) as stream:
            table = stream.read_all()
        table = table.rename_columns(kept_names(table.column_names))
        name, first = SHARD.format(number), number * self.settings.rows_per_shard
        found = self._answer(prompts, reasons, first)
        answered = {i: answer for i, answer in enumerate(found) if not isinstance(answer, str)}
        columns = {
            "answer": [answered[i].text if i in answered else None for i in range(len(found))],
            "error": [None if i in answered else found[i] for i in range(len(found))],
            "tokens": [len(answered[i].tokens) if i in answered else None for i in range(len(found))],
        }
        for column in ANSWERS:
            table = table.append_column(column, pa.array(columns[column.name], column.type))
        self._write(name, table)
        failed = [i for i in range(len(found)) if i not in answered]
        record = {
            "rows": table.num_rows,
            "failed": len(failed),
            "first_failed": [first + failed[0], found[failed[0]]] if failed else None,
            "tokens": sum(len(answer.tokens) for answer in answered.values()),
            "sources_cut": sum(answer.source_tokens_cut > 0 for answer in answered.values()),
            "bytes": (self.folder / name).stat().st_size,
            "sha256": sha256_file(self.folder / name),
        }
        write_file(self.records / f"{name}.json", json.dumps(record))
        worker = f"{socket.gethostname()}:{os.getpid()}"
        said = {"name": name, "record": record, "worker": worker, "began_s": began_s, "ended_s": time.time()}
        return pa.table({"said": [json.dumps(said)]})

    def _answer(self, prompts: list[str], reasons: list[str], first: int) -> list[Generation | str]:
        """The answer to each prompt, or the reason why there is none; rows of like length share a batch."""
        found: list[Generation | str] = list(reasons)
        for places in like_length(prompts, [i for i, reason in enumerate(reasons) if not reason], self.batch_size):
            seeds = [self.settings.seed * SEEDS + first + i for i in places]
            for i, answer in zip(places, self._try([prompts[i] for i in places], seeds), strict=True):
                found[i] = answer
        return found

    def _try(self, prompts: list[str], seeds: list[int]) -> Sequence[Generation | str]:
        try:
            return self._generate(prompts, seeds)
        except self.broken:  # a lost GPU is no row's fault: nothing would be answered after it
            raise
        except Exception as error:  # whatever one row did, its neighbours get their answers
            if len(prompts) == 1:
                return [f"{type(error).__name__}: {str(error).strip()[:300]}"]
        return [self._try([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]

    def _generate(self, prompts: list[str], seeds: list[int]) -> list[Generation]:
        how = self.settings
        return self.generator.generate(prompts, how.num_steps, seeds=seeds, sampling=how.sampling)

    def _write(self, name: str, table: pa.Table) -> None:
        """Write a shard whole or not at all."""
        scratch = self.folder / f".{name}.{os.getpid()}.part"
        with scratch.open("wb") as out:
            pq.write_table(table, out, compression="zstd")
            out.flush()
            os.fsync(out.fileno())
        scratch.replace(self.folder / name)

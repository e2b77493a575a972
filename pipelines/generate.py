"""Ray Data: files of rows -> answers in Parquet shards, in the order of the rows. Nothing is done twice.

Shard n holds rows [n * rows_per_shard, (n + 1) * rows_per_shard) of the input. A shard is done when its record is there
(see answer.py); the same call goes on with those that are missing. The manifest comes last: a folder that has one is
complete.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions

from pipelines.answer import ANSWERS, SHARD, Answer, Read, Settings, kept_names
from pipelines.cluster import ray_session
from pipelines.folders import difference, read_inputs, run_lock
from pipelines.listing import ENDINGS, DataError, format_of, list_files, open_store, reason_of
from pipelines.tables import Input, scan
from yan_core.checkpoint import read_config
from yan_core.config import unknown_name
from yan_core.files import atomic_folder, code_commit, sha256_file, write_file
from yan_core.tasks import Task, get_task

MANIFEST = "_manifest.json"
"""Beside the shards: readers of a folder of Parquet files leave out what begins with an underscore or a dot."""

UNFINISHED = "_unfinished"
"""Folder of a job that has not ended: a copy of its model, what it was asked for, and a record of each shard."""

SPAN = 64
"""Shards that a reader of Parquet files reads in one go; other files, where none can begin midway, are read in one."""

WORKERS_PER_READER = 16
"""A reader fills templates some hundred times as fast as a worker answers on a CPU."""

EVERY_S = 5.0
"""Seconds between lines of progress."""


class GenerateError(ValueError):
    """Answers cannot be made, or not in this folder."""


def generate(
    model: Path,
    inputs: Sequence[str],
    output: Path,
    settings: Settings | None = None,
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = lambda line: None,
    on_shard: Callable[[dict[str, Any]], None] = lambda said: None,
) -> dict[str, Any]:
    """Answer every row of some files; goes on where an earlier call was interrupted.

    Args:
        model: Model folder.
        inputs: Files, folders, globs or URLs of Parquet, JSONL, CSV or text files, which are read in this order.
        output: Folder of the shards, the manifest, and nothing else; like the inputs, every node must see it.
        settings: What answers depend on; None: the defaults.
        batch_size: Rows that a worker answers at once.
        num_workers: Workers, each with a core or a GPU; None: as many as the cluster has.
        fresh: Drop what earlier calls left in `output`.
        say: Takes progress lines.
        on_shard: Takes what an actor says of each shard it has done.

    Returns:
        The manifest.

    Raises:
        GenerateError: If the output folder holds anything else, such as answers made from other inputs or settings.
        DataError: If an input is missing, damaged or lacks a column.
        CheckpointError: If there is no whole model.
    """
    settings = settings or Settings()
    task = get_task(read_config(model)["details"]["task"])
    for name in settings.columns:
        if name not in task.source_fields:
            raise GenerateError(unknown_name("columns", name, list(task.source_fields)))
    kind, files = _files(inputs)
    asked = _asked(model, files, settings)
    output = output.absolute()
    _check_output(output)
    with run_lock(output, instead="--output"):
        if fresh:
            _clear(output)
        manifest = read_inputs(output / MANIFEST)
        before = manifest["asked"] if manifest else read_inputs(output / UNFINISHED / "asked.json")
        if before is not None and before != asked:
            raise GenerateError(
                f"{output} holds answers made from other inputs or settings ({difference(before, asked)}): "
                "name another --output, or drop them with --fresh"
            )
        done = _done(output, manifest)
        if manifest and len(done) == len(manifest["shards"]):
            say(f"done before, nothing changed: {manifest['rows']} rows in {output}")
            return manifest
        write_file(output / UNFINISHED / "asked.json", json.dumps(asked, indent=2))
        (output / MANIFEST).unlink(missing_ok=True)
        for name, record in done.items():
            write_file(_record(output, name), json.dumps(record))
        copy = output / UNFINISHED / "model"
        if not copy.is_dir():  # a run may put another model in its place while this one answers
            with atomic_folder(copy) as scratch:
                shutil.copytree(model, scratch, dirs_exist_ok=True)
        with ray_session(num_workers or 1, 1):
            rows = _scan(kind, files)
            _check_columns(rows, task, settings)
            for said in _answer(rows, task, settings, output, done, batch_size, num_workers, say):
                done[said["name"]] = said["record"]
                on_shard(said)
        manifest = _manifest(rows, done, asked)
        write_file(output / MANIFEST, json.dumps(manifest, indent=2))
        shutil.rmtree(output / UNFINISHED)
        return manifest


# --- what is asked for, and what is there -----------------------------------------------------------------------------


def _files(inputs: Sequence[str]) -> tuple[str, list[str]]:
    """Format of the inputs, and their files in order; one that is named twice is read once."""
    files: list[str] = []
    for where in inputs:
        found = list_files(where)
        if not found:
            raise DataError(f"no file at {where if '://' in where else os.path.abspath(where)} (--input)")
        files += [file if "://" in file else os.path.abspath(file) for file in found]
    files = list(dict.fromkeys(files))
    kinds = {file: format_of(file) for file in files}
    for file, kind in kinds.items():
        if kind is None:
            raise DataError(f"{file}: its ending tells no format (--input); known are {', '.join(ENDINGS)}")
    if len(set(kinds.values())) > 1:
        one, other = next((a, b) for a in files for b in files if kinds[a] != kinds[b])
        raise DataError(f"{one} and {other} are of different formats (--input): answer them in two calls")
    return str(kinds[files[0]]), files


def _asked(model: Path, files: Sequence[str], settings: Settings) -> dict[str, Any]:
    """All that the answers depend on; files are known by size and time, later versions of this code do not count."""
    inputs = {}
    for number, file in enumerate(files):
        store, path = open_store(file)
        info = store.get_file_info(path)
        inputs[file] = {"number": number, "bytes": info.size, "modified_ns": info.mtime_ns}
    names = ("config.json", "model.safetensors", "tokenizer.json")
    hashes = {name: sha256_file(model / name) for name in names}
    return {"inputs": inputs, "model_sha256": hashes, "settings": asdict(settings)}


def _check_output(folder: Path) -> None:
    ours = any((folder / name).exists() for name in (MANIFEST, UNFINISHED))
    others = sorted(p.name for p in folder.iterdir() if p.name != ".lock") if folder.is_dir() and not ours else []
    if others:
        raise GenerateError(
            f"{folder} holds {others[0]}{' and others' if others[1:] else ''}, which `yan generate` has not written: "
            "name another --output, one that is empty or not there yet"
        )


def _clear(folder: Path) -> None:
    """Drop what earlier calls wrote; last what tells that it was theirs."""
    for shard in folder.glob("part-*.parquet"):
        shard.unlink()
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def _record(folder: Path, name: str) -> Path:
    return folder / UNFINISHED / "records" / f"{name}.json"


def _done(folder: Path, manifest: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """Records of the shards that are there in full, by name."""
    if manifest:
        records = manifest["shards"]
    else:
        files = sorted(_record(folder, "").parent.glob("part-*.json"))
        records = {file.stem: record for file in files if (record := read_inputs(file)) is not None}
    there = {file.name: file.stat().st_size for file in folder.glob("part-*.parquet")}
    return {name: record for name, record in records.items() if there.get(name) == record["bytes"]}


def _scan(kind: str, files: list[str]) -> Input:
    """Count the rows of all files, and find their columns, beside each other on the cluster."""
    count = ray.remote(scan)
    try:
        rows = Input.of(kind, files, ray.get([count.remote(kind, file) for file in files]))
    except ray.exceptions.RayTaskError as error:
        raise DataError(reason_of(error)) from error
    if not rows.num_rows:
        raise DataError(f"{files[0]}{' and all others' if files[1:] else ''} (--input): there is no row")
    return rows


def _check_columns(rows: Input, task: Task, settings: Settings) -> None:
    for name in task.source_fields:
        column = settings.columns.get(name, name)
        if not {column, column.split(".")[0]} & set(rows.schema.names):
            raise DataError(
                f"{rows.files[0]} has no column {column!r} for field {name!r} of task {task.name!r}; it has "
                f"{', '.join(rows.schema.names)}. Map it: --columns {name}=COLUMN"
            )


# --- the work ---------------------------------------------------------------------------------------------------------


def _spans(missing: Sequence[int], kind: str) -> list[list[int]]:
    size = SPAN if kind == "parquet" else len(missing)
    return [list(missing[start : start + size]) for start in range(0, len(missing), size)]


def _num_workers(asked: int | None, use_gpu: bool) -> int:
    """Workers asked for; else one for each GPU or core of the cluster, a local one's spare logical CPUs left out."""
    there = ray.cluster_resources()
    if use_gpu and not there.get("GPU"):
        raise GenerateError("--use-gpu: Ray finds no GPU; leave it out, or name a cluster with GPUs by RAY_ADDRESS")
    cores = min(int(there.get("CPU", 1)), len(ray.nodes()) * (os.cpu_count() or 1))
    return asked or int(there["GPU"] if use_gpu else cores)


def _answer(
    rows: Input,
    task: Task,
    settings: Settings,
    output: Path,
    done: Mapping[str, Any],
    batch_size: int,
    num_workers: int | None,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Answer the shards that are not done; gives what an actor says of each, with a line of progress now and then."""
    size = settings.rows_per_shard
    missing = [n for n in range(-(-rows.num_rows // size)) if SHARD.format(n) not in done]
    if not missing:
        return
    workers = min(_num_workers(num_workers, settings.use_gpu), len(missing))
    finished, failed = (sum(record[name] for record in done.values()) for name in ("rows", "failed"))
    renamed = ", ".join(
        f"{old!r} is kept as {new!r}"
        for old, new in zip(rows.schema.names, kept_names(rows.schema.names), strict=True)
        if old != new
    )
    before = f", {finished} of them done before" if finished else ""
    say(f"{rows.num_rows} rows{before}; workers that start: {workers}")
    if renamed:
        say(f"  column {renamed}")
    answer = (output / UNFINISHED / "model", output, _record(output, "").parent, settings, batch_size)
    stream = _stream(Read(rows, task, settings), answer, _spans(missing, rows.kind), workers)
    progress = _Progress(rows.num_rows, finished, failed, say)
    try:
        for row in stream.iter_rows():
            said = json.loads(row["said"])
            progress.add(said["record"])
            yield said
    except (ray.exceptions.RayError, ray.exceptions.UserCodeException) as error:
        raise GenerateError(
            f"no more answers: {reason_of(error)}. {progress.rows} of {rows.num_rows} rows are done; "
            "once that is mended, the same command goes on from there"
        ) from error


def _stream(read: Read, answer: tuple[Any, ...], spans: Sequence[list[int]], workers: int) -> ray.data.Dataset:
    """Spans of shards -> readers -> actors, each of whom has a next shard at hand -> what they say of each."""
    asked = [{"shards": span} for span in spans]
    stream = ray.data.from_items(asked, override_num_blocks=len(asked))
    stream.context.target_max_block_size = 1  # what is read of a shard is given on at once, and not with the next one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of max_task_retries, for which there is no other way yet
        # Readers take no core of their own: with workers on all of them they would wait for ever.
        return stream.map_batches(
            read,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,
            concurrency=1 + workers // WORKERS_PER_READER,
        ).map_batches(
            Answer,
            fn_constructor_args=answer,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=1 if read.settings.use_gpu else None,
            concurrency=workers,
            max_task_retries=3,  # of a worker that dies; not for ever, as a row may be what kills it
        )


class _Progress:
    """A line now and then."""

    def __init__(self, total: int, rows: int, failed: int, say: Callable[[str], None]) -> None:
        """Begin with what was done before."""
        self.total, self.rows, self.failed, self.say = total, rows, failed, say
        self.first: tuple[int, float] | None = None
        self.said_s = time.perf_counter()

    def add(self, record: dict[str, Any]) -> None:
        """Count a shard."""
        now = time.perf_counter()
        self.rows, self.failed = self.rows + record["rows"], self.failed + record["failed"]
        if self.first is None:
            self.first = self.rows, now  # the rate leaves the start out
        elif now - self.said_s >= EVERY_S and self.rows < self.total:
            self.said_s = now
            rate = (self.rows - self.first[0]) / (now - self.first[1])
            left_s = (self.total - self.rows) / rate
            self.say(f"  {self.rows}/{self.total} rows, {self.failed} failed, {rate:.0f} rows/s, left {left_s:.0f}s")


def _manifest(rows: Input, done: Mapping[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What is in a complete folder.

    Raises:
        GenerateError: If rows are missing.
    """
    shards = dict(sorted(done.items()))
    total = {name: sum(r[name] for r in shards.values()) for name in ("rows", "failed", "tokens", "sources_cut")}
    if total["rows"] != rows.num_rows:
        raise GenerateError(
            f"{total['rows']} rows were answered, the inputs had {rows.num_rows} at first: they changed meanwhile. "
            "Answer them again with --fresh"
        )
    first = next((record["first_failed"] for record in shards.values() if record["first_failed"]), None)
    failure = dict(zip(("file", "row_number"), rows.place(first[0]), strict=True), error=first[1]) if first else None
    kept = kept_names(rows.schema.names)
    columns = {name: str(kind) for name, kind in zip(kept, rows.schema.types, strict=True)}
    columns |= {column.name: str(column.type) for column in ANSWERS}
    about = {"first_failed": failure, "commit": code_commit(), "columns": columns, "asked": asked}
    return {**total, **about, "shards": shards}

"""Ray Data: rows -> (source, target) -> token ids -> Parquet shards, one folder a stage.

`flow` holds windows of plain text, `finetune` the task's pairs; the autoencoder reads the targets of both. `validation`
and `test` stay text, since evaluation goes through the tokenizer as a user does. Each piece of a data set is a task
(see encode.py); an interrupted preparation goes on at the pieces that have no record yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions

from pipelines.checks import Watch, check_clean, check_corpus, check_counts, check_fields, check_records
from pipelines.dedup import Sign, mark_duplicates, pairs_of
from pipelines.documents import KeepOut, clean, task_fields, text_column
from pipelines.encode import SCHEMAS, Encode, Record, text_row
from pipelines.listing import ENDINGS, DataError, UnreadableFile, format_of, reason_of, sizes_of
from pipelines.order import Shard
from pipelines.pieces import do_pieces
from pipelines.sources import Source, find_dataset, open_files, open_source, value_at
from yan_core.config import DataConfig, RunConfig, to_dict
from yan_core.files import sha256_file, write_file
from yan_core.tasks import Task, get_task
from yan_core.tokenization import Tokenizer

if TYPE_CHECKING:
    from yan_core.batching import Batch

PARTS = ("flow", "finetune", "validation", "test")
"""Folders of shards."""


@dataclass(frozen=True)
class Prepared:
    """Prepared data of a run.

    Attributes:
        folder: Holds a folder for each of PARTS, `tokenizer.json`, `manifest.json` and `quarantine`.
        manifest: Shards with their checksums, counts, what was dropped and why, and the tokenizer's hash.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer trained on this corpus."""
        return Tokenizer.from_json((self.folder / "tokenizer.json").read_text(encoding="utf-8"))

    def is_whole(self) -> bool:
        """Whether every shard is there in its full size, and the tokenizer unchanged."""
        try:
            sizes = {name: (self.folder / name).stat().st_size for name in self.manifest["files"]}
            tokenizer = sha256_file(self.folder / "tokenizer.json")
            expected = {name: file["bytes"] for name, file in self.manifest["files"].items()}
        except (OSError, KeyError, TypeError):
            return False
        return sizes == expected and tokenizer == self.manifest["tokenizer_sha256"]

    def shards(self, stage: str) -> list[Shard]:
        """Shards that a stage trains on."""
        found, epochs = [], self.manifest.get("mixture", {})
        for part in ("flow", "finetune") if stage == "autoencoder" else (stage,):
            for name, file in self.manifest["files"].items():
                if name.startswith(f"{part}/"):
                    often = epochs.get(file["source"], 1.0) if part == "flow" else 1.0
                    found.append(Shard(str(self.folder / name), file["rows"], often))
        return found

    def batches(self, config: RunConfig, stage: str, step: int = 0) -> Iterator[Batch]:
        """The batches of a stage from a step on, one a step, read in this process."""
        from pipelines.loader import stage_batches  # brings torch, which tokenising workers do without

        return stage_batches(config, self, stage, step)

    def num_rows(self, stage: str) -> int:
        """Rows that a stage trains on."""
        rows = self.manifest["rows"]
        return rows["flow"] + rows["finetune"] if stage == "autoencoder" else rows[stage]

    def validation(self, max_rows: int, skip: int = 0) -> list[dict[str, Any]]:
        """Validation rows, the first ones after `skip`: source, target, answers, kind."""
        return (
            pq.read_table(self.folder / "validation", page_checksum_verification=True).slice(skip, max_rows).to_pylist()
        )


def corpora_of(data: DataConfig) -> list[str]:
    """Names of the data sets of plain text; none where the task's own rows are the corpus."""
    if data.mixture:
        return list(data.mixture)
    if not data.corpus and find_dataset(data, data.dataset).format == "world":
        return ["world_stories"]
    return [data.corpus] if data.corpus else []


LEAST_OF_A_PIECE = 256
"""Rows that a vocabulary's sample takes from a piece at the least: of very many pieces it takes none from some."""


def _train_tokenizer(config: RunConfig, pairs: Source, corpora: Sequence[Source]) -> Tokenizer:
    """A vocabulary from tokenizer.sample_rows rows of each data set, as many of each piece, in a seeded order."""
    task, limit = get_task(config.data.task), config.tokenizer.sample_rows

    def rows(source: Source) -> Iterator[dict[str, Any]]:
        left, order = limit, np.random.default_rng(config.seed).permutation(len(source.pieces)).tolist()
        taken = dict.fromkeys(order, 0)  # rows of each piece that may have more
        while left and taken:
            order = list(taken)
            for place, number in enumerate(order):  # one is open at a time: each holds memory
                if not left:
                    return
                share, before = min(left, max(LEAST_OF_A_PIECE, -(-left // (len(order) - place)))), left
                read = (row for batch in source.rows(source.pieces[number]) for row in batch.rows)
                try:
                    for row in itertools.islice(read, taken[number], taken[number] + share):
                        left -= 1
                        yield row
                except UnreadableFile:  # set aside, and counted, when it is encoded
                    pass
                taken[number] += before - left
                if before - left < share:
                    del taken[number]

    def texts() -> Iterator[str]:
        for source in corpora:
            found = (value_at(row, text_column(source, config.data)) for row in rows(source))
            yield from (clean(text, config.data.clean) for text in found if isinstance(text, str))
        for row in rows(pairs):
            yield from task.texts(task_fields(row, pairs, task, config.data.clean))

    read = texts()
    first = next(read, None)
    if first is None:
        raise DataError(
            f"data set {pairs.name!r} gave no usable train row: it is empty, its filter `where` matches none, "
            f"or no row has text in {', '.join(task.fields)}"
        )
    tokenizer = Tokenizer.train(itertools.chain([first], read), config.tokenizer)
    pa.default_memory_pool().release_unused()  # some 300 MB, which would be held until the last piece is done
    return tokenizer


def given_tokenizer(config: RunConfig) -> dict[str, str]:
    """Hashes of what the tokenizer is taken from; empty where it is trained here.

    Raises:
        CheckpointError: If a folder named holds no whole model.
        ValueError: If the model to start from has another tokenizer than the one named.
    """
    from yan_core.checkpoint import read_config  # brings torch, which tokenising workers do without

    started = read_config(config.init_from)["sha256"] if config.init_from else {}
    if not config.tokenizer.path:
        return started
    named = read_config(config.tokenizer.path)["sha256"]["tokenizer.json"]
    if started and started["tokenizer.json"] != named:
        raise ValueError(
            f"tokenizer.path={config.tokenizer.path} and init_from={config.init_from} have different tokenizers, and a "
            "model keeps its own: leave tokenizer.path out"
        )
    return {"tokenizer.json": named}


def _inputs(config: RunConfig, sources: Sequence[Source]) -> str:
    """What the pieces' records depend on; another one makes them worthless."""
    pieces = [[source.name, *vars(piece).values()] for source in sources for piece in source.pieces]
    known = sizes_of(sorted({piece.where for source in sources for piece in source.pieces}))
    data = {k: v for k, v in to_dict(config.data).items() if k not in ("pool_batches", "lanes", "bad_rows_allowed")}
    kept = [field.name for field in dataclasses.fields(Record)]  # of another version's records
    given = [config.init_from, given_tokenizer(config)]
    values = [data, to_dict(config.tokenizer), config.seed, given, pieces, known, kept]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _mixture(data: DataConfig, rows: Counter[str]) -> dict[str, float]:
    """How often an epoch reads each data set of the corpus."""
    if not any(part.share for part in data.mixture.values()):
        return {name: part.epochs for name, part in data.mixture.items()}
    wanted = {name: part.share / max(1, rows[name]) for name, part in data.mixture.items()}
    return {name: value / min(wanted.values()) for name, value in wanted.items()}


def cpus_of_a_task(nodes: Sequence[float], here: int, pieces: int) -> tuple[int, float]:
    """Threads of a task, so that few pieces keep a cluster busy and each fits on a node, and logical CPUs of a thread.

    Args:
        nodes: Logical CPUs of each node that lives.
        here: Cores of this machine: a Ray of its own has more logical CPUs than there are cores, see `ray_session`.
        pieces: Tasks.
    """
    of_core = max(1.0, nodes[0] / here) if len(nodes) == 1 else 1.0
    most = int(max(nodes, default=1) / of_core)
    return max(1, min(most, int(sum(nodes) / of_core) // pieces)), of_core


def prepare(config: RunConfig, folder: Path, say: Callable[[str], None] = lambda line: None) -> Prepared:
    """Read, check, clean, tokenise and write a run's data.

    Args:
        config: Data, task, tokenizer and lengths.
        folder: Where the result appears when it is complete; an earlier one is replaced. What is done so far is below
            `<folder>.unfinished`, from which the same call goes on; each state of settings and files has its own place.
        say: Takes progress lines.

    Raises:
        DataError: If data are missing, empty or have more unusable rows than allowed.
    """
    data, task = config.data, get_task(config.data.task)
    pairs = open_source(data, data.dataset, "train", config.seed)
    held_out = open_source(data, data.dataset, "validation", config.seed + 1)
    for source in (pairs, held_out):
        check_fields(source, task)
    corpora = [open_source(data, name, "train", config.seed) for name in corpora_of(data)]
    for source in corpora:
        check_corpus(source, data)
    check_clean(data.clean, corpora)

    unfinished = folder.with_name(f"{folder.name}.unfinished")
    work = unfinished / _inputs(config, [pairs, held_out, *corpora])[:16]
    others = [left for left in unfinished.glob("*") if left != work]
    if others:
        say("  what an interrupted preparation left was made from other data or settings: it is done again")
    for left in others:
        shutil.rmtree(left, ignore_errors=True)  # a task of it may still write there
    tokenizer_file = work / "tokenizer.json"
    if tokenizer_file.is_file():
        tokenizer = Tokenizer.from_json(tokenizer_file.read_text(encoding="utf-8"))
    elif given := config.tokenizer.path or config.init_from:
        from yan_core.checkpoint import from_pretrained  # brings torch, which tokenising workers do without

        tokenizer = from_pretrained(given)[1]
    else:
        started = time.perf_counter()
        tokenizer = _train_tokenizer(config, pairs, corpora)
        say(f"  tokenizer: {tokenizer.vocab_size} tokens, trained in {time.perf_counter() - started:.1f} s")
    write_file(tokenizer_file, tokenizer.to_json())

    share = 0.0 if pairs.dataset.validation else pairs.dataset.held_out  # of the training rows themselves
    keep_out = KeepOut(held_out, task, data.clean, share, work.resolve())
    everything = [pairs, held_out, *corpora]
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    threads, of_core = cpus_of_a_task(nodes, os.cpu_count() or 1, sum(len(s.pieces) for s in everything))
    every_s = max(1.0, config.log_every_s)

    def encode(source: Source, split: str, template: Task | None, keys: np.ndarray) -> Encode:
        return Encode(source, split, template, data, tokenizer.to_json(), work.resolve(), keys, threads)

    try:
        if corpora or not share or pairs.dataset.document:
            if len(held_out.pieces) > 1:
                do_pieces([keep_out], [len(held_out.pieces)], of_core, say, every_s)
            else:
                keep_out(0)  # sooner than a task
            documents, texts = keep_out.read()
        else:
            documents = texts = np.zeros(0, np.uint64)
        none = np.zeros(0, np.uint64)
        kept_texts = np.union1d(documents, texts)  # a text of the corpus may be one of the passages
        own = documents if pairs.dataset.document or not share else none  # else the document's key says all
        jobs = [encode(pairs, "train", task, own), encode(held_out, "validation", task, none)]
        jobs += [encode(source, "corpus", None, kept_texts) for source in corpora]
        if data.clean.duplicates != "keep":
            signs = [Sign(job) for job in (jobs[0], *jobs[2:])]
            do_pieces(signs, [len(sign.encode.source.pieces) for sign in signs], of_core, say, every_s)
            found = [mark_duplicates(group, _compare) for group in (signs[:1], signs[1:]) if group]
            say(f"  {sum(found)} duplicates")
        said = do_pieces(jobs, [len(job.source.pieces) for job in jobs], threads * of_core, say, every_s, Watch(jobs))
    except (ray.exceptions.RayError, ray.exceptions.UserCodeException) as error:
        reason = reason_of(error)
        if "No space left on device" in reason:
            reason = f"no space left in {folder}: free some, then give the same command again; whole pieces are kept"
        raise DataError(f"the data cannot be prepared: {reason}") from error
    records = [[Record.of(values) for values in of_job] for of_job in said]
    for job, of_job in zip(jobs, records, strict=True):
        check_records(job, of_job)

    every = [record for of_job in records for record in of_job]
    rows = Counter({part: 0 for part in PARTS})
    for record in every:
        rows.update(record.rows)
    if rows["flow"] == 0:
        names = ", ".join(s.name for s in corpora) or pairs.name
        raise DataError(f"the corpus {names} has no text in column {data.corpus_column!r}")
    files = {name: {**about, "source": _source_of(name)} for record in every for name, about in record.files.items()}
    of_source = Counter({s.name: 0 for s in corpora})
    for name, about in files.items():
        if name.startswith("flow/"):
            of_source[about["source"]] += about["rows"]
    manifest = {
        "files": dict(sorted(files.items())),
        "schema": {part: str(SCHEMAS[part if part in SCHEMAS else "text"]) for part in PARTS},
        "rows": dict(rows),
        "tokens": sum(r.tokens for r in every),
        "bad_rows": {job.split: sum(r.bad for r in of_job) for job, of_job in zip(jobs, records, strict=True)},
        "unreadable_files": sum(bool(r.unreadable) for r in every),
        "filtered": {job.split: sum(r.filtered for r in of_job) for job, of_job in zip(jobs, records, strict=True)},
        "dropped": dict(sum((r.dropped for r in every), Counter())),
        "mixture": _mixture(data, of_source),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": sha256_file(tokenizer_file),
        "sources_cut": sum(r.cut_rows for r in every),
        "source_tokens_cut": sum(r.cut_tokens for r in every),
    }
    for scratch in ("records", "keys", "unread", "signatures", "duplicates", "scratch"):
        shutil.rmtree(work / scratch, ignore_errors=True)
    write_file(work / "manifest.json", json.dumps(manifest, indent=2))
    old = folder.with_name(f"{folder.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)  # of one that was killed between the next two lines
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    for left in (old, unfinished):
        shutil.rmtree(left, ignore_errors=True)
    return open_prepared(folder)


def _source_of(name: str) -> str:
    """The data set that a shard comes from."""
    found = re.fullmatch(r"[a-z]+/(.+)-\d{6}-\d{4,}\.parquet", name)
    assert found is not None
    return found[1]


def _compare(paths: list[Path], columns: int) -> list[np.ndarray]:
    compare = ray.remote(pairs_of)
    return ray.get([compare.remote(paths, column) for column in range(columns)])


def open_prepared(folder: Path) -> Prepared:
    """Prepared data written earlier.

    Raises:
        DataError: If there are none.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise DataError(f"no prepared data in {folder}: run `yan prepare` with the same config first")
    return Prepared(folder, json.loads(manifest.read_text(encoding="utf-8")))


def read_text_rows(config: RunConfig, path: str, counts: Counter[str] | None = None) -> list[dict[str, Any]]:
    """Rows of one file as source, target, answers and kind, through the config's data set and template.

    Args:
        config: Its data set gives columns and row filter, its task the template.
        path: A file with the data set's columns; its ending tells the format, where it has one.
        counts: Takes what became of the file's rows: `rows_filtered` by the data set's `where`, `rows_unusable`.

    Raises:
        DataError: If the file is missing, cannot be used or has more unusable rows than allowed.
    """
    data, task = config.data, get_task(config.data.task)
    dataset = find_dataset(data, data.dataset)
    if not Path(path).is_file():
        raise DataError(f"--data: no file at {path}")
    of_files = dataset.format in ENDINGS.values()
    kind = format_of(path) or (dataset.format if of_files else "parquet")
    source = open_files(data.dataset, dataclasses.replace(dataset, format=kind), [path])
    source.check_columns()
    check_fields(source, task)
    good: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    filtered = 0
    for batch in (batch for piece in source.pieces for batch in source.rows(piece)):
        filtered += batch.filtered
        bad += [{"file": path, **b, "row": None} for b in batch.bad]
        for number, row in zip(batch.numbers, batch.rows, strict=True):
            try:
                good.append(text_row(task_fields(row, source, task, data.clean), task))
            except ValueError as error:
                bad.append({"file": path, "row_number": number, "reason": str(error), "row": row})
    check_counts(data.dataset, "evaluation", len(good), len(bad), bad[0] if bad else {}, data.bad_rows_allowed, "")
    if counts is not None:
        counts.update(rows_filtered=filtered, rows_unusable=len(bad))
    return good

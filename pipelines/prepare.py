"""Ray Data: rows -> (source, target) -> token ids -> Parquet shards, one folder a stage.

`flow` holds windows of plain text, `finetune` the task's pairs; the autoencoder reads the targets of both. `validation`
stays text, since evaluation goes through the tokenizer as a user does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
import ray.exceptions

from pipelines.order import FRAGMENT_ROWS
from pipelines.sources import DataError, fields_of, filtered, find_dataset, read_files, read_rows, reason_of
from yan_core.config import DataConfig, DatasetConfig, RunConfig
from yan_core.files import atomic_folder, sha256_file
from yan_core.tasks import Task, get_task
from yan_core.tokenization import Tokenizer

PAIR_SCHEMA = pa.schema(
    [("source", pa.list_(pa.int32())), ("target", pa.list_(pa.int32())), ("source_cut", pa.int32())]
)
WINDOW_SCHEMA = pa.schema([("target", pa.list_(pa.int32()))])
TEXT_SCHEMA = pa.schema(
    [("source", pa.string()), ("target", pa.string()), ("answers", pa.list_(pa.string())), ("kind", pa.string())]
)


@dataclass(frozen=True)
class Prepared:
    """Prepared data of a run.

    Attributes:
        folder: Holds `flow`, `finetune`, `validation`, `tokenizer.json` and `manifest.json`.
        manifest: Counts, lengths and the tokenizer's hash.
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

    def shards(self, stage: str) -> list[tuple[str, int]]:
        """Parquet files that a stage trains on and their rows."""
        names = ("flow", "finetune") if stage == "autoencoder" else (stage,)
        files = self.manifest["files"].items()
        return [(str(self.folder / f), about["rows"]) for n in names for f, about in files if f.startswith(f"{n}/")]

    def num_rows(self, stage: str) -> int:
        """Rows that a stage trains on."""
        rows = self.manifest["rows"]
        return rows["flow"] + rows["finetune"] if stage == "autoencoder" else rows[stage]

    def validation(self, max_rows: int) -> list[dict[str, Any]]:
        """The first validation rows: source, target, answers, kind."""
        return pq.read_table(self.folder / "validation").slice(0, max_rows).to_pylist()


def corpus_of(data: DataConfig) -> str:
    """Name of the data set of plain text; empty where the task's own rows are the corpus."""
    if not data.corpus and find_dataset(data, data.dataset).format == "world":
        return "world_stories"
    return data.corpus


@lru_cache(maxsize=2)
def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_json(text)


class Quarantine:
    """Sets unusable rows aside, in files of their own."""

    def __init__(self, quarantine: str) -> None:
        self.quarantine = quarantine

    def set_aside(self, bad: list[dict[str, Any]]) -> None:
        """Write unusable rows with their reasons to the quarantine folder."""
        if bad:
            path = Path(self.quarantine) / f"{uuid.uuid4().hex}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as out:
                out.writelines(json.dumps(b, default=str, ensure_ascii=False) + "\n" for b in bad)


class RowReader(Quarantine):
    """Turns rows into template fields and sets the unusable ones aside."""

    def __init__(self, task: Task, dataset: DatasetConfig, quarantine: str) -> None:
        super().__init__(quarantine)
        self.task, self.dataset = task, dataset

    def pairs(self, rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Source, target and fields of each usable row."""
        bad = []
        for row in rows:
            fields = fields_of(row, self.dataset.columns)
            try:
                yield (*self.task.pair(fields), fields)
            except ValueError as error:
                bad.append({"reason": str(error), "row": row})
        self.set_aside(bad)


class EncodePairs(RowReader):
    """Rows -> token ids of source and target."""

    def __init__(self, task: Task, dataset: DatasetConfig, quarantine: str, data: DataConfig, tokenizer: str) -> None:
        super().__init__(task, dataset, quarantine)
        self.data, self.tokenizer = data, tokenizer

    def __call__(self, table: pa.Table) -> pa.Table:
        """One block of rows."""
        pairs = list(self.pairs(table.to_pylist()))
        tokenizer = _tokenizer(self.tokenizer)
        sources = tokenizer.encode_batch([p[0] for p in pairs], self.data.max_source_tokens, self.task.keep)
        targets = tokenizer.encode_batch([p[1] for p in pairs])
        limit = self.data.max_target_tokens
        fits = [len(t.ids) <= limit for t in targets]
        self.set_aside(
            [
                {"reason": f"target has {len(t.ids)} tokens, data.max_target_tokens={limit}", "row": p[2]}
                for p, t, fit in zip(pairs, targets, fits, strict=True)
                if not fit
            ]
        )
        return pa.table(
            {
                "source": list(itertools.compress([s.ids for s in sources], fits)),
                "target": list(itertools.compress([t.ids for t in targets], fits)),
                "source_cut": list(itertools.compress([s.num_cut for s in sources], fits)),
            },
            schema=PAIR_SCHEMA,
        )


class KeepText(RowReader):
    """Rows -> source, target, every right answer and the kind of question, as text."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """One block of rows."""
        rows = []
        for source, target, fields in self.pairs(table.to_pylist()):
            answers = fields.get("answers")
            answers = [str(a) for a in answers] if isinstance(answers, list) and answers else [target]
            rows.append({"source": source, "target": target, "answers": answers, "kind": str(fields.get("kind") or "")})
        return pa.Table.from_pylist(rows, schema=TEXT_SCHEMA)


class EncodeWindows(Quarantine):
    """Plain texts -> windows of token ids. Blank texts, as between paragraphs, are passed over."""

    def __init__(self, column: str, tokenizer: str, window_tokens: int, quarantine: str) -> None:
        super().__init__(quarantine)
        self.column, self.tokenizer, self.window_tokens = column, tokenizer, window_tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        """One block of rows."""
        values = table.column(self.column).to_pylist()
        texts = [t for t in values if isinstance(t, str) and t.strip()]
        self.set_aside(
            [
                {"reason": f"{self.column!r} must be text, got {t!r} ({type(t).__name__})", "row": {self.column: t}}
                for t in values
                if not isinstance(t, str)
            ]
        )
        size = self.window_tokens
        encodings = _tokenizer(self.tokenizer).encode_batch(texts)
        windows = [e.ids[i : i + size] for e in encodings for i in range(0, len(e.ids), size)]
        return pa.table({"target": windows}, schema=WINDOW_SCHEMA)


class SourceTexts(RowReader):
    """Rows -> the source's text, the corpus of a run that names no other."""

    def __call__(self, table: pa.Table) -> pa.Table:
        """One block of rows."""
        return pa.table(
            {"text": [p[0] for p in self.pairs(table.to_pylist())]}, schema=pa.schema([("text", pa.string())])
        )


def _check_fields(rows: ray.data.Dataset, task: Task, dataset: DatasetConfig, name: str) -> None:
    schema = rows.schema()
    columns = list(schema.names) if schema is not None else []
    for field in task.fields:
        column = dataset.columns.get(field, field)
        if columns and column not in columns:
            raise DataError(
                f"data set {name!r} has no column {column!r} for field {field!r} of task {task.name!r}; "
                f"it has {', '.join(columns)}. Map it: data.datasets.{name}.columns.{field}=<column>"
            )


def _quarantined(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    return [json.loads(line) for f in files for line in f.read_text(encoding="utf-8").splitlines()]


def _check_counts(name: str, split: str, good: int, bad: list[dict[str, Any]], allowed: float) -> None:
    if bad and len(bad) > allowed * (good + len(bad)):
        first = bad[0]
        share = math.ceil(1000 * len(bad) / (good + len(bad))) / 1000
        remedy = f", or let them be set aside with --data.bad_rows_allowed {share:g}" if good else ""
        raise DataError(
            f"{len(bad)} of {good + len(bad)} {split} rows of {name!r} cannot be used "
            f"(data.bad_rows_allowed={allowed:g}). The first: {first['reason']}; row "
            f"{json.dumps(first['row'], default=str, ensure_ascii=False)[:300]}. Mend the data{remedy}"
        )
    if good == 0:
        raise DataError(f"data set {name!r} gave no {split} row: it is empty, or its filter `where` matches none")


def _train_tokenizer(config: RunConfig, corpus: ray.data.Dataset, column: str, pairs: ray.data.Dataset) -> Tokenizer:
    limit = config.tokenizer.sample_rows
    dataset, task = find_dataset(config.data, config.data.dataset), get_task(config.data.task)

    def texts() -> Iterator[str]:
        for row in corpus.limit(limit).iter_rows():
            if isinstance(row[column], str):
                yield row[column]
        for row in pairs.limit(limit).iter_rows():
            fields = fields_of(row, dataset.columns)
            yield from (fields[f] for f in task.fields if isinstance(fields.get(f), str))

    read = texts()
    first = next(read, None)
    if first is None:
        raise DataError(
            f"data set {config.data.dataset!r} gave no usable train row: it is empty, its filter `where` matches none, "
            f"or no row has text in {', '.join(task.fields)}"
        )
    return Tokenizer.train(itertools.chain([first], read), config.tokenizer)


def _write(rows: ray.data.Dataset, folder: Path, data: DataConfig, shuffle_seed: int | None) -> int:
    if shuffle_seed is not None:
        rows = rows.random_shuffle(seed=shuffle_seed)
    folder.mkdir()
    rows.write_parquet(str(folder), max_rows_per_file=data.rows_per_shard, row_group_size=FRAGMENT_ROWS)
    return sum(pq.read_metadata(f).num_rows for f in folder.glob("*.parquet"))


@contextmanager
def _ray_errors_explained(name: str) -> Iterator[None]:
    """Say what a task of Ray Data stumbled over, without its traceback."""
    try:
        yield
    except (ray.exceptions.RayError, ray.exceptions.UserCodeException) as error:
        raise DataError(f"data set {name!r} cannot be read to its end: {reason_of(error)}. Mend that file") from error


def prepare(config: RunConfig, folder: Path) -> Prepared:
    """Read, check, tokenise and write a run's data.

    Args:
        config: Data, task, tokenizer and lengths.
        folder: Where the result appears when it is complete; an earlier one is replaced.

    Raises:
        DataError: If data are missing, empty or have more unusable rows than allowed; nothing is left behind.
    """
    data, task = config.data, get_task(config.data.task)
    dataset = find_dataset(data, data.dataset)
    pairs = read_rows(data, data.dataset, "train", config.seed)
    _check_fields(pairs, task, dataset, data.dataset)
    held_out = read_rows(data, data.dataset, "validation", config.seed + 1)
    _check_fields(held_out, task, dataset, data.dataset)

    with _ray_errors_explained(data.dataset), atomic_folder(folder) as scratch:
        quarantine = {split: scratch / "quarantine" / split for split in ("train", "validation", "corpus")}
        corpus_name, column = corpus_of(data), data.corpus_column
        if corpus_name:
            corpus = read_rows(data, corpus_name, "train", config.seed)
            schema = corpus.schema()
            if schema is not None and column not in schema.names:
                raise DataError(
                    f"data set {corpus_name!r} has no column {column!r} (data.corpus_column); "
                    f"it has {', '.join(schema.names)}"
                )
        else:
            column = "text"
            corpus = pairs.map_batches(
                SourceTexts(task, dataset, str(quarantine["corpus"])), batch_format="pyarrow", batch_size=1024
            )
        if config.init_from:
            from yan_core.checkpoint import from_pretrained  # brings torch, which tokenising workers do without

            tokenizer = from_pretrained(config.init_from)[1]
        else:
            tokenizer = _train_tokenizer(config, corpus, column, pairs)
        text = tokenizer.to_json()
        (scratch / "tokenizer.json").write_text(text, encoding="utf-8")

        seed = config.seed if data.shuffle else None
        kept = held_out.map_batches(
            KeepText(task, dataset, str(quarantine["validation"])), batch_format="pyarrow", batch_size=1024
        )
        rows = {"validation": _write(kept, scratch / "validation", data, None)}
        encoded = pairs.map_batches(
            EncodePairs(task, dataset, str(quarantine["train"]), data, text), batch_format="pyarrow", batch_size=1024
        )
        rows["finetune"] = _write(encoded, scratch / "finetune", data, seed)
        bad = {}
        for split, stage in (("train", "finetune"), ("validation", "validation")):
            found = _quarantined(quarantine[split])
            _check_counts(data.dataset, split, rows[stage], found, data.bad_rows_allowed)
            bad[split] = len(found)
        windows = corpus.map_batches(
            EncodeWindows(column, text, data.window_tokens, str(quarantine["corpus"])),
            batch_format="pyarrow",
            batch_size=1024,
        )
        rows["flow"] = _write(windows, scratch / "flow", data, seed)
        if corpus_name:  # else the rows of the task itself, counted above
            found = _quarantined(quarantine["corpus"])
            _check_counts(corpus_name, "corpus", max(1, rows["flow"]), found, data.bad_rows_allowed)
            bad["corpus"] = len(found)
        if rows["flow"] == 0:
            raise DataError(f"the corpus {corpus_name or data.dataset!r} has no text in column {column!r}")
        cut = pq.read_table(scratch / "finetune", columns=["source_cut"]).column("source_cut").to_numpy()
        shards = sorted(p for part in ("flow", "finetune", "validation") for p in (scratch / part).glob("*.parquet"))
        manifest = {
            "files": {
                p.relative_to(scratch).as_posix(): {
                    "bytes": p.stat().st_size,
                    "rows": pq.read_metadata(p).num_rows,
                    "sha256": sha256_file(p),
                }
                for p in shards
            },
            "rows": rows,
            "bad_rows": bad,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": sha256_file(scratch / "tokenizer.json"),
            "sources_cut": int((cut > 0).sum()),
            "source_tokens_cut": int(cut.sum()),
        }
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    """Prepared data written earlier.

    Raises:
        DataError: If there are none.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise DataError(f"no prepared data in {folder}: run `yan prepare` with the same config first")
    return Prepared(folder, json.loads(manifest.read_text(encoding="utf-8")))


def read_text_rows(config: RunConfig, path: str) -> list[dict[str, Any]]:
    """Rows of one file as source, target, answers and kind, through the config's data set and template.

    Args:
        config: Its data set gives columns and row filter, its task the template.
        path: A file with the data set's columns; its ending tells the format, where it has one.

    Raises:
        DataError: If the file is missing, cannot be used or has more unusable rows than allowed.
    """
    data, task = config.data, get_task(config.data.task)
    dataset = find_dataset(data, data.dataset)
    if not Path(path).is_file():
        raise DataError(f"--data: no file at {path}")
    endings: dict[str, Any] = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv"}
    of_files = dataset.format in endings.values()
    kind = endings.get(Path(path).suffix, dataset.format if of_files else "parquet")
    rows = filtered(read_files(dataclasses.replace(dataset, format=kind), [path]), dataset, data.dataset)
    _check_fields(rows, task, dataset, data.dataset)
    with tempfile.TemporaryDirectory() as scratch:
        kept = rows.map_batches(KeepText(task, dataset, scratch), batch_format="pyarrow", batch_size=1024).take_all()
        _check_counts(data.dataset, "evaluation", len(kept), _quarantined(Path(scratch)), data.bad_rows_allowed)
    return kept

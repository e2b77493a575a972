"""Tokens a second of the whole of `yan prepare`, against the tokenizer alone on the same cores.

    python -m pipelines.benchmarks.ingest --megabytes 400

The corpus is made up: words of a Zipf distribution, in sentences. `yan prepare` begins with Parquet files and ends with
a manifest: it learns a vocabulary, which takes as long for a small corpus as for a large one and is told apart, and
reads, cleans, tokenises and writes. The bare tokenizer gets the same texts from memory (of a large corpus the first
BARE_MEGABYTES), a thousand at a time, and nothing is done with what it gives.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmarks.machine import RESULTS, leave
from yan_core.files import code_commit

TEXT_BYTES = 2000
"""About the length of a text."""


WARM_MEGABYTES = 8.0
"""What is read first, so that processes and their imports are there."""

BARE_MEGABYTES = 200.0
"""Most that the bare tokenizer is given: it has all of it in memory."""


def words(seed: int, count: int = 20_000) -> np.ndarray:
    """Made-up words of 2 to 10 letters."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvkjxqz"))
    weights = 1 / np.arange(1, len(letters) + 1)
    lengths = rng.integers(2, 11, count)
    return np.array(["".join(rng.choice(letters, n, p=weights / weights.sum())) for n in lengths], object)


def texts(megabytes: float, seed: int = 0) -> Iterator[list[str]]:
    """Texts of about that size in all, some at a time."""
    vocabulary, rng = words(seed), np.random.default_rng(seed)
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    weights /= weights.sum()
    left = megabytes * 1e6
    while left > 0:
        drawn = vocabulary[rng.choice(len(vocabulary), (256, TEXT_BYTES // 6), p=weights)]
        batch = [" ".join(row).capitalize() + "." for row in drawn]
        left -= sum(map(len, batch))
        yield batch


def write_corpus(folder: Path, megabytes: float, files: int) -> None:
    """Write it to so many Parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        with pq.ParquetWriter(folder / f"{i:04d}.parquet", pa.schema([("text", pa.string())])) as out:
            for batch in texts(megabytes / files, seed=i):
                out.write_table(pa.table({"text": batch}))


class PeakMemory:
    """Most memory of this process and all below it, shared memory apart, while the block runs."""

    def __enter__(self) -> PeakMemory:
        self.peak_bytes, self.stopped = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stopped.wait(0.5):
            self._look()

    def _look(self) -> None:
        here, total = psutil.Process(), 0
        for process in [here, *here.children(recursive=True)]:
            try:
                memory = process.memory_info()
                total += memory.rss - memory.shared
            except psutil.Error:
                continue
        self.peak_bytes = max(self.peak_bytes, total)

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._look()  # a block may be shorter than the time between two looks


def bare(corpus: Path, tokenizer: str) -> float:
    """Tokens a second of the tokenizer alone, with all cores."""
    from pipelines.sources import ROWS_AT_ONCE
    from yan_core.tokenization import Tokenizer

    backend = Tokenizer.from_json(tokenizer).backend
    read: list[str] = []
    left = BARE_MEGABYTES * 1e6
    for file in sorted(corpus.glob("*.parquet")):
        for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
            if left > 0:
                read += batch.column("text").to_pylist()
                left -= batch.nbytes
    backend.encode_batch_fast(read[:ROWS_AT_ONCE], add_special_tokens=False)
    started, tokens = time.perf_counter(), 0
    for start in range(0, len(read), ROWS_AT_ONCE):
        found = backend.encode_batch_fast(read[start : start + ROWS_AT_ONCE], add_special_tokens=False)
        tokens += sum(len(encoding) for encoding in found)
    return tokens / (time.perf_counter() - started)


@dataclass(frozen=True)
class Ingest:
    """What `yan prepare` did with a corpus.

    Attributes:
        tokens: Tokens written.
        seconds: From the call to the manifest.
        vocabulary_s: Of these, for the vocabulary.
        peak_bytes: Most memory of all processes, the object store apart.
        tokenizer: Its JSON.
    """

    tokens: int
    seconds: float
    vocabulary_s: float
    peak_bytes: int
    tokenizer: str


def ingest(corpus: Path, folder: Path, vocab_size: int) -> Ingest:
    """Prepare a corpus beside a few rows of a task."""
    from pipelines.prepare import prepare
    from yan_core.config import RunConfig, from_dict

    datasets = {"corpus": {"train": str(corpus)}, "few": {"format": "world", "kinds": ["where"], "num_train": 64}}
    data: dict[str, Any] = {
        "dataset": "few",
        "corpus": "corpus",
        "datasets": datasets,
        "window_tokens": 256,
        "rows_per_shard": 65_536,
    }
    data["max_target_tokens"] = 32
    settings = {"data": data, "model": {"max_positions": 512}, "tokenizer": {"kind": "bpe", "vocab_size": vocab_size}}
    config, vocabulary_s = from_dict(RunConfig, settings), 0.0

    def say(line: str) -> None:
        nonlocal vocabulary_s
        print(line, flush=True)
        if " tokenizer: " in line:
            vocabulary_s = time.perf_counter() - started

    with PeakMemory() as memory:
        started = time.perf_counter()
        prepared = prepare(config, folder, say)
        seconds = time.perf_counter() - started
    tokens, tokenizer = prepared.manifest["tokens"], prepared.tokenizer.to_json()
    return Ingest(tokens, seconds, vocabulary_s, memory.peak_bytes, tokenizer)


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its figures and write them to results/."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.ingest", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=400.0, help="size of the corpus")
    parser.add_argument("--files", type=int, default=8, help="files of the corpus")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the byte-pair encoding")
    parser.add_argument("--folder", type=Path, help="where the corpus and the shards go; default: a temporary folder")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose ingest.jsonl gets a line")
    chosen = parser.parse_args(args)

    from pipelines.cluster import ray_session

    with tempfile.TemporaryDirectory() as scratch:
        root = chosen.folder or Path(scratch)
        corpus = root / "corpus"
        write_corpus(corpus, chosen.megabytes, chosen.files)
        write_corpus(root / "warm_corpus", WARM_MEGABYTES, 2)
        cores = os.cpu_count() or 1
        with ray_session(1, 1):
            ingest(root / "warm_corpus", root / "warm", chosen.vocab_size)
            done = ingest(corpus, root / "prepared", chosen.vocab_size)
        alone = bare(corpus, done.tokenizer)
    whole, rest = done.tokens / done.seconds / alone, done.tokens / (done.seconds - done.vocabulary_s) / alone
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "cores": cores,
        "megabytes": chosen.megabytes,
        "files": chosen.files,
        "vocab_size": chosen.vocab_size,
        "tokens": done.tokens,
        "seconds": done.seconds,
        "vocabulary_s": done.vocabulary_s,
        "tokens_per_s_bare": alone,
        "ratio": rest,
        "ratio_with_vocabulary": whole,
        "peak_bytes_beyond_object_store": done.peak_bytes,
    }
    print(
        f"yan prepare: {done.tokens / 1e6:.0f}M tokens in {done.seconds:.1f} s, {done.vocabulary_s:.1f} s of them for "
        f"the vocabulary; bare tokenizer {alone / 1e6:.2f}M tok/s: {whole:.2f} of it, {rest:.2f} without the vocabulary"
    )
    print(f"peak memory beyond the object store: {done.peak_bytes / 1e9:.2f} GB for {chosen.megabytes:g} MB of text")
    leave(report, chosen.results, "ingest", chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Tokens a second of the whole of `yan prepare`, against the tokenizer alone on the same cores.

    python -m pipelines.benchmarks.ingest --megabytes 400

The corpus is made up: words of a Zipf distribution, in paragraphs. `yan prepare` begins with Parquet files and ends
with a manifest: it learns a vocabulary from at most tokenizer.sample_rows rows, which is told apart, and reads, cleans,
tokenises and writes. Ray runs already, and has prepared a small corpus. The bare tokenizer gets the same texts from
memory (of a large corpus the first BARE_MEGABYTES), a thousand at a time, and nothing is done with what it gives. As a
machine's speed drifts by more than is looked for here, they take turns of some seconds: while the bare tokenizer runs,
the tasks that tokenise are stopped. Where other work runs beside, CPU seconds (of Ray's processes too) tell more.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.benchmarks.machine import RESULTS, describe, leave
from yan_core.files import code_commit

TEXT_BYTES = 2000
"""About the length of a text."""

SMALL_MEGABYTES = 8.0
"""What is prepared first, so that Ray's processes and their imports are there; its time is told."""

BARE_MEGABYTES = 200.0
"""Most that the bare tokenizer is given: it has all of it in memory."""

OURS_S, BARE_S = 6.0, 2.0
"""Seconds of a turn of `yan prepare` and of the bare tokenizer."""


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
        batch = ["\n".join(" ".join(part).capitalize() + "." for part in np.array_split(row, 4)) for row in drawn]
        left -= sum(map(len, batch))
        yield batch


def write_corpus(folder: Path, megabytes: float, files: int) -> None:
    """Write it to so many Parquet files."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        with pq.ParquetWriter(folder / f"{i:04d}.parquet", pa.schema([("text", pa.string())])) as out:
            for batch in texts(megabytes / files, seed=i):
                out.write_table(pa.table({"text": batch}))


class Usage:
    """Most memory of this process and all below it, shared memory apart, and their CPU seconds, while a block runs."""

    def __init__(self, others: Container[int] = ()) -> None:
        """Processes below this one that do not count."""
        self.others = others

    def __enter__(self) -> Usage:
        self.peak_bytes, self.stopped = 0, threading.Event()
        self.of: dict[str, int] = {}
        self.cpu: dict[int, float] = {}  # of those that ended, what they had when they were last seen
        self.kinds: dict[int, str] = {}
        self._look()
        self.cpu_before = dict(self.cpu)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.stopped.wait(0.5):
            self._look()

    def _look(self) -> None:
        here, held = psutil.Process(), Counter[str]()
        for process in [here, *here.children(recursive=True)]:
            if process.pid in self.others:
                continue
            try:
                memory, name = process.memory_info(), "driver" if process == here else _kind(process.cmdline())
                times = process.cpu_times()
            except psutil.Error:
                continue
            held[name] += memory.rss - memory.shared
            self.cpu[process.pid] = times.user + times.system
            if name != "ray::IDLE":  # what it did before is what it is
                self.kinds[process.pid] = name
            self.kinds.setdefault(process.pid, name)
        if held.total() > self.peak_bytes:
            self.peak_bytes, self.of = held.total(), dict(held.most_common())

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()
        self._look()  # a block may be shorter than the time between two looks

    @property
    def cpu_s(self) -> float:
        """CPU seconds so far."""
        return sum(self.cpu.values()) - sum(self.cpu_before.values())

    @property
    def cpu_of(self) -> dict[str, float]:
        """CPU seconds so far of each kind of process, most first."""
        used: dict[str, float] = {}
        for pid, seconds in self.cpu.items():
            used[self.kinds[pid]] = used.get(self.kinds[pid], 0.0) + seconds - self.cpu_before.get(pid, 0.0)
        return {kind: round(used[kind], 1) for kind in sorted(used, key=lambda k: -used[k]) if used[kind] >= 0.1}


def _kind(command: list[str]) -> str:
    """What a process below the driver is: a task or idle worker of Ray by its own name, else its program."""
    first = command[0] if command else ""
    if first.startswith("ray::"):
        return first.split("(")[0]
    scripts = [part for part in command[1:3] if part.endswith(".py")]
    return os.path.basename(scripts[0] if scripts else first)


class Bare:
    """The tokenizer alone, with all cores, in turns with `yan prepare`; in a process of its own, see `beside`.

    Attributes:
        turns: Seconds, CPU seconds and tokens of each of its turns.
    """

    def __init__(self, corpus: Path) -> None:
        self.texts: list[str] = []
        self.turns: list[tuple[float, float, int]] = []
        self.next = 0
        left = BARE_MEGABYTES * 1e6
        for file in sorted(corpus.glob("*.parquet")):
            for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
                if left > 0:
                    self.texts += batch.column("text").to_pylist()
                    left -= batch.nbytes

    def start(self, tokenizer: str) -> None:
        """Take a tokenizer's JSON, and use it once."""
        from yan_core.tokenization import Tokenizer

        self.backend = Tokenizer.from_json(tokenizer).backend
        self._some()

    def _some(self) -> int:
        from pipelines.sources import ROWS_AT_ONCE

        texts = self.texts[self.next : self.next + ROWS_AT_ONCE]
        self.next = (self.next + ROWS_AT_ONCE) % len(self.texts) if len(texts) == ROWS_AT_ONCE else 0
        return sum(map(len, self.backend.encode_batch_fast(texts, add_special_tokens=False)))

    def turn(self, tasks: Sequence[psutil.Process] = ()) -> None:
        """Tokenise for BARE_S; processes that are given are stopped while it does."""
        for process in tasks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        started, cpu_before, tokens = time.perf_counter(), time.process_time(), 0
        try:
            while time.perf_counter() - started < BARE_S:
                tokens += self._some()
        finally:
            for process in tasks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
        self.turns.append((time.perf_counter() - started, time.process_time() - cpu_before, tokens))


def beside(channel: Connection, corpus: Path, unfinished: Path) -> None:
    """Say that it is ready, take turns with the parent's tasks until a tokenizer comes, and one more; send all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # tasks that it has stopped go on
    bare = Bare(corpus)
    channel.send(None)
    tokenizer = ""
    while not channel.poll(0 if tokenizer else 0.1):
        for file in unfinished.glob("*/tokenizer.json") if not tokenizer else ():
            tokenizer = file.read_text(encoding="utf-8")
            bare.start(tokenizer)
        if tokenizer and not channel.poll(OURS_S):
            tasks = _tokenising(psutil.Process(os.getppid()))
            if tasks:
                bare.turn(tasks)
    told = channel.recv()
    if not tokenizer:
        bare.start(told)
    during = list(bare.turns)
    bare.turn()
    channel.send((during, bare.turns))


def _tokenising(driver: psutil.Process) -> list[psutil.Process]:
    """Tasks of Ray Data below a driver."""
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if _kind(process.cmdline()) == "ray::MapBatches":
                found.append(process)
    return found


@dataclass(frozen=True)
class Ingest:
    """What `yan prepare` did with a corpus.

    Attributes:
        tokens: Tokens written.
        seconds: From the call to the manifest, those apart in which its tasks were stopped.
        vocabulary_s: Of these, for the vocabulary.
        cpu_s: CPU seconds of all processes.
        vocabulary_cpu_s: Of these, for the vocabulary.
        peak_bytes: Most memory of all processes, the object store apart.
        peak_of: What each kind of process held of it.
        cpu_of: CPU seconds of each kind of process.
        tokens_per_s_bare: Of the tokenizer alone, in its turns.
        tokens_per_cpu_s_bare: The same a CPU second.
        turns: How many these were.
    """

    tokens: int
    seconds: float
    vocabulary_s: float
    cpu_s: float
    vocabulary_cpu_s: float
    peak_bytes: int
    peak_of: dict[str, int]
    cpu_of: dict[str, float]
    tokens_per_s_bare: float
    tokens_per_cpu_s_bare: float
    turns: int


def ingest(corpus: Path, folder: Path, vocab_size: int) -> Ingest:
    """Prepare a corpus beside a few rows of a task, in turns with the tokenizer alone."""
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
    config, vocabulary_s, vocabulary_cpu_s = from_dict(RunConfig, settings), 0.0, 0.0

    def say(line: str) -> None:
        nonlocal vocabulary_s, vocabulary_cpu_s
        print(line, flush=True)
        if " tokenizer: " in line:
            vocabulary_s, vocabulary_cpu_s = time.perf_counter() - started, time.process_time() - cpu_before

    context = multiprocessing.get_context("spawn")
    channel, theirs = context.Pipe()
    process = context.Process(target=beside, args=(theirs, corpus, folder.with_name(f"{folder.name}.unfinished")))
    process.start()
    theirs.close()
    try:
        channel.recv()
        with Usage({process.pid}) as usage:
            started, cpu_before = time.perf_counter(), time.process_time()
            prepared = prepare(config, folder, say)
            seconds = time.perf_counter() - started
        channel.send(prepared.tokenizer.to_json())
        during, turns = channel.recv()
    finally:
        process.terminate()
        process.join()
    seconds -= sum(stopped_s for stopped_s, *_ in during)
    bare_s, bare_cpu_s, bare_tokens = np.sum(turns, 0).tolist()
    return Ingest(
        tokens=prepared.manifest["tokens"],
        seconds=seconds,
        vocabulary_s=vocabulary_s,
        cpu_s=usage.cpu_s,
        vocabulary_cpu_s=vocabulary_cpu_s,
        peak_bytes=usage.peak_bytes,
        peak_of=usage.of,
        cpu_of=usage.cpu_of,
        tokens_per_s_bare=bare_tokens / bare_s,
        tokens_per_cpu_s_bare=bare_tokens / bare_cpu_s,
        turns=len(turns),
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its figures and write them to results/."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.ingest", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=400.0, help="size of the corpus")
    parser.add_argument("--files", type=int, default=8, help="files of the corpus")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the byte-pair encoding")
    parser.add_argument("--folder", type=Path, help="where the corpus and the shards go; default: a temporary folder")
    parser.add_argument("--turns", type=int, default=2, help="how often each has its turn")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose ingest.jsonl gets a line")
    chosen = parser.parse_args(args)

    from pipelines.cluster import ray_session

    os.environ.setdefault("RAY_worker_niceness", "0")  # as the bare tokenizer has; by default Ray gives its workers 15
    turns: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = chosen.folder or Path(scratch)
        corpus = root / "corpus"
        write_corpus(corpus, chosen.megabytes, chosen.files)
        write_corpus(root / "small_corpus", SMALL_MEGABYTES, 2)
        for _ in range(chosen.turns):
            with ray_session(1, 1):
                first = ingest(root / "small_corpus", root / "small", chosen.vocab_size)
                done = ingest(corpus, root / "prepared", chosen.vocab_size)
            alone, alone_cpu = done.tokens_per_s_bare, done.tokens_per_cpu_s_bare
            turn = {
                "tokens": done.tokens,
                "first_s": first.seconds,
                "seconds": done.seconds,
                "vocabulary_s": done.vocabulary_s,
                "tokens_per_s_bare": alone,
                "turns_of_bare": done.turns,
                "ratio": done.tokens / (done.seconds - done.vocabulary_s) / alone,
                "ratio_with_vocabulary": done.tokens / done.seconds / alone,
                "cpu_s": done.cpu_s,
                "cpu_s_of": done.cpu_of,
                "vocabulary_cpu_s": done.vocabulary_cpu_s,
                "tokens_per_cpu_s_bare": alone_cpu,
                "cpu_ratio": done.tokens / (done.cpu_s - done.vocabulary_cpu_s) / alone_cpu,
                "cpu_ratio_with_vocabulary": done.tokens / done.cpu_s / alone_cpu,
                "load_average": os.getloadavg()[0],
                "peak_bytes_beyond_object_store": done.peak_bytes,
                "peak_bytes_of": done.peak_of,
            }
            turns.append(turn)
            print(
                f"yan prepare: {done.tokens / 1e6:.1f}M tokens in {done.seconds:.1f} s, {done.vocabulary_s:.1f} s of "
                f"them for the vocabulary; bare tokenizer {alone / 1e6:.2f}M tok/s\n"
                f"  of its rate {turn['ratio']:.2f}, with the vocabulary {turn['ratio_with_vocabulary']:.2f}; of its "
                f"tokens a CPU second {turn['cpu_ratio']:.2f}, with the vocabulary "
                f"{turn['cpu_ratio_with_vocabulary']:.2f}; {SMALL_MEGABYTES:g} MB before it: {first.seconds:.1f} s\n"
                f"  CPU seconds: {', '.join(f'{kind} {seconds:g}' for kind, seconds in done.cpu_of.items())}",
                flush=True,
            )
    peak = max(turns, key=lambda turn: turn["peak_bytes_beyond_object_store"])
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(torch.device("cpu")),
        "megabytes": chosen.megabytes,
        "files": chosen.files,
        "vocab_size": chosen.vocab_size,
        "tokens": turns[0]["tokens"],
        "turns": turns,
        **{
            name: statistics.median(turn[name] for turn in turns)
            for name in ("ratio", "ratio_with_vocabulary", "cpu_ratio", "cpu_ratio_with_vocabulary")
        },
        "peak_bytes_beyond_object_store": peak["peak_bytes_beyond_object_store"],
    }
    held = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in peak["peak_bytes_of"].items())
    print(f"peak memory beyond the object store for {chosen.megabytes:g} MB of text, in GB of 1e9 bytes: ", end="")
    print(f"{report['peak_bytes_beyond_object_store'] / 1e9:.2f} ({held})")
    leave(report, chosen.results, "ingest", chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Rows a second of `yan generate`, from Parquet to Parquet, against the bare sampler on the same rows.

    python -m pipelines.benchmarks.generate

An untrained model of a shipped size answers made-up questions. The bare sampler is `TextGenerator.generate` alone on
the batches that the workers make, from memory, in two ways: in as many processes of one thread as there are workers,
and in one process of as many threads; the faster one counts. All take turns. The steady state is the time in which
every worker is at work, waits between its shards included; what the start costs is told apart.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipelines.answer import Settings, like_length
from pipelines.benchmarks.decoders import SIZES, size_config
from pipelines.benchmarks.ingest import words
from pipelines.benchmarks.machine import RESULTS, describe, leave
from yan_core.files import code_commit

Batch = tuple[list[str], list[int]]
"""Prompts and seeds."""

BAR = 0.9
"""Least share of the bare sampler's rows a second."""


def make_rows(count: int) -> list[dict[str, str]]:
    """Made-up questions: a context of 8 to 48 words and a question of 4."""
    rng, vocabulary = np.random.default_rng(0), words(0)
    weights = 1 / np.arange(1, len(vocabulary) + 1)
    weights /= weights.sum()

    def text(length: int) -> str:
        return " ".join(rng.choice(vocabulary, length, p=weights)).capitalize()

    return [{"context": f"{text(int(rng.integers(8, 49)))}.", "question": f"{text(4)}?"} for _ in range(count)]


def make_model(folder: Path, size: str, target_tokens: int, tiny: bool) -> None:
    """Save an untrained model of a size, with a tokenizer of its vocabulary."""
    from yan_core.checkpoint import save_pretrained
    from yan_core.model import build_model
    from yan_core.tokenization import Tokenizer

    config = size_config(size)
    architecture, vocabulary = config.model, config.tokenizer
    if tiny:
        architecture = replace(architecture, d_model=20, flow_blocks=1, num_experts=2)
        vocabulary = replace(vocabulary, vocab_size=300)
    texts = (text for row in make_rows(4096) for text in row.values())
    tokenizer = Tokenizer.train(texts, vocabulary)
    details = {"task": "question_answering", "max_source_tokens": 128, "max_target_tokens": target_tokens}
    save_pretrained(folder, build_model(architecture, tokenizer.vocab_size, seed=0), tokenizer, details)


def _bare(model: Path, batches: Sequence[Batch], num_steps: int, threads: int, barrier: Any) -> tuple[float, float]:
    """One process of the bare sampler: when it began and ended."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import yan_core

    torch.set_num_threads(threads)
    generator = yan_core.load(model)
    generator.generate(batches[0][0], num_steps)
    barrier.wait(600)
    began_s = time.time()
    for prompts, seeds in batches:
        generator.generate(prompts, num_steps, seeds=seeds)
    return began_s, time.time()


def bare(model: Path, batches: Sequence[Batch], num_steps: int, processes: int, threads: int) -> float:
    """Rows a second of the sampler in some processes of some threads, once their models are loaded and warm."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, mp_context=context) as pool:
        barrier = manager.Barrier(processes)
        parts = [batches[i::processes] for i in range(processes)]
        jobs = [pool.submit(_bare, model, part, num_steps, threads, barrier) for part in parts]
        times = [job.result() for job in jobs]
    rows = sum(len(prompts) for prompts, _ in batches)
    return rows / (max(ended for _, ended in times) - min(began for began, _ in times))


def steady(said: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Rows a second while every worker is at work, and when that begins.

    Args:
        said: What actors said of the shards they did: `worker`, `began_s`, `ended_s` and the rows of `record`.

    Raises:
        ValueError: If there is no such time.
    """
    workers = {s["worker"] for s in said}
    begin = max(min(s["began_s"] for s in said if s["worker"] == w) for w in workers)
    end = min(max(s["ended_s"] for s in said if s["worker"] == w) for w in workers)
    if begin >= end:
        raise ValueError("the workers were never at work together: more --rows, or fewer --rows-per-shard")
    rows = 0.0
    for s in said:
        inside = max(0.0, min(end, s["ended_s"]) - max(begin, s["began_s"]))
        rows += s["record"]["rows"] * inside / (s["ended_s"] - s["began_s"])
    return rows / (end - begin), begin


def product(
    model: Path, rows: Path, output: Path, settings: Settings, batch_size: int, workers: int
) -> dict[str, float]:
    """Rows a second of `yan generate`, steady and with the start of Ray and workers, and the seconds of the start."""
    from pipelines.generate import generate

    said: list[dict[str, Any]] = []
    called_s = time.time()
    manifest = generate(
        model, [str(rows)], output, settings, batch_size=batch_size, num_workers=workers, on_shard=said.append
    )
    all_s = time.time() - called_s
    rate, begun_s = steady(said)
    return {"rows_per_s": rate, "rows_per_s_with_start": manifest["rows"] / all_s, "start_s": begun_s - called_s}


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its figures and write them to results/."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.generate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--rows", type=int, default=8192, help="rows to answer in a turn")
    parser.add_argument("--rows-per-shard", type=int, default=Settings.rows_per_shard, help="rows of an output file")
    parser.add_argument("--batch-size", type=int, default=64, help="rows answered at once")
    parser.add_argument("--num-steps", type=int, default=Settings.num_steps, help="solver steps")
    parser.add_argument("--target-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1, help="workers of one thread each")
    parser.add_argument("--turns", type=int, default=3, help="how often each has its turn")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose generate.jsonl gets a line")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tests: a model of seconds
    chosen = parser.parse_args(args)
    settings = Settings(num_steps=chosen.num_steps, rows_per_shard=chosen.rows_per_shard)
    workers, about = chosen.num_workers, describe(torch.device("cpu"))
    turns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model, file = Path(scratch) / "model", Path(scratch) / "rows.parquet"
        make_model(model, chosen.size, chosen.target_tokens, chosen.tiny)
        rows = make_rows(chosen.rows)
        pq.write_table(pa.Table.from_pylist(rows), file)
        prompts = [f"{row['context']} {row['question']}" for row in rows]
        shards = [
            range(i, min(i + chosen.rows_per_shard, len(rows))) for i in range(0, len(rows), chosen.rows_per_shard)
        ]
        places = [batch for shard in shards for batch in like_length(prompts, shard, chosen.batch_size)]
        batches = [([prompts[i] for i in batch], batch) for batch in places]
        for turn in range(chosen.turns):
            found = product(model, file, Path(scratch) / f"turn{turn}", settings, chosen.batch_size, workers)
            found["bare_rows_per_s_processes"] = bare(model, batches, chosen.num_steps, workers, 1)
            found["bare_rows_per_s_threads"] = bare(model, batches, chosen.num_steps, 1, workers)
            fastest = max(found["bare_rows_per_s_processes"], found["bare_rows_per_s_threads"])
            found |= {
                name.replace("rows_per_s", "ratio"): found[name] / fastest
                for name in ("rows_per_s", "rows_per_s_with_start")
            }
            turns.append(found)
            print({name: round(value, 3) for name, value in found.items()}, flush=True)
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    options = {name: value for name, value in vars(chosen).items() if name not in ("json", "results")}
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": about,
        "options": options,
        **medians,
        "turns": turns,
    }
    print(
        f"yan generate {medians['rows_per_s']:.0f} rows/s, with a start of {medians['start_s']:.1f} s "
        f"{medians['rows_per_s_with_start']:.0f}; bare sampler {medians['bare_rows_per_s_processes']:.0f} in {workers} "
        f"processes, {medians['bare_rows_per_s_threads']:.0f} in one of {workers} threads"
    )
    met = "met   " if medians["ratio"] >= BAR else "MISSED"
    print(f"{met}  share of the bare sampler, steady: {medians['ratio']:.3f} (bar: {BAR})")
    if about["load_average"] > 0.5:
        print(f"the machine was not idle before this began (load {about['load_average']:.1f}): ratios are noisy")
    leave(report, chosen.results, "generate", chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Jobs over the pieces of data sets: Ray Data gives each piece to a task and takes what the task says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray.data

from pipelines.encode import Record


class _Do:
    """(which job, number of a piece) -> what the job says of it, as JSON."""

    def __init__(self, jobs: Sequence[Callable[[int], Any]]) -> None:
        self.jobs = list(jobs)

    def __call__(self, asked: pa.Table) -> pa.Table:
        said = []
        for row in asked.to_pylist():
            done = self.jobs[row["job"]](row["piece"])
            said.append(json.dumps(vars(done) if isinstance(done, Record) else None))
        return pa.table({"job": asked.column("job"), "said": said})


def do_pieces(
    jobs: Sequence[Callable[[int], Any]],
    counts: Sequence[int],
    cpus: float,
    say: Callable[[str], None],
    every_s: float,
    watch: Callable[[int, Any], None] = lambda job, said: None,
) -> list[list[Any]]:
    """Run jobs over their pieces on the cluster, with a line now and then.

    Args:
        jobs: Each takes the number of a piece.
        counts: Pieces of each job.
        cpus: Logical CPUs that a task takes.
        say: Takes the lines.
        every_s: Seconds between them.
        watch: Told what a job said of a piece as it comes; what it raises ends the work.

    Returns:
        What each job said of its pieces, in any order.
    """
    asked = [{"job": j, "piece": n} for j, count in enumerate(counts) for n in range(count)]
    if not asked:
        return [[] for _ in jobs]
    stream = ray.data.from_items(asked, override_num_blocks=len(asked)).map_batches(
        _Do(jobs), batch_format="pyarrow", batch_size=1, num_cpus=cpus
    )
    found: list[list[Any]] = [[] for _ in jobs]
    started = said_at = time.perf_counter()
    for done, row in enumerate(stream.iter_rows(), start=1):
        found[row["job"]].append(json.loads(row["said"]))
        watch(row["job"], found[row["job"]][-1])
        now = time.perf_counter()
        if now - said_at >= every_s and done < len(asked):
            said_at = now
            rows = sum(sum(r["rows"].values()) for records in found for r in records if r)
            tokens = sum(r["tokens"] for records in found for r in records if r)
            left_s = (now - started) / done * (len(asked) - done)
            rate = tokens / (now - started)
            say(f"  {done}/{len(asked)} pieces, {rows} rows, {rate / 1000:.0f}k tok/s, left {left_s:.0f}s")
    return found

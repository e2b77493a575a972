"""What `yan plan` predicts for one and two workers on this machine, against what they take.

    python -m pipelines.benchmarks.scaling

The constants are measured too: the rate of matrix products with one thread, the share of it that a bare training step
(no Ray) reaches with as many processes at once as there are workers and with a worker's part of the batch, and what
gloo takes for an all-reduce. Ray Train runs the same steps with one and two workers.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.benchmarks.machine import RESULTS, describe, leave, matmul_rate
from pipelines.benchmarks.ray_overhead import run_config, with_ray, without_ray
from pipelines.plan import HARDWARE, Job, communicate_s, make_plan, num_parameters, row_flops
from yan_core.config import RunConfig
from yan_core.files import code_commit


def _all_reduce(rank: int, port: int, numbers: int, found: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    times = []
    for values in (torch.ones(numbers), torch.ones(8)):
        taken = []
        for _ in range(12):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(values)
            taken.append(time.perf_counter() - started)
        times.append(sorted(taken)[len(taken) // 2])
    if rank == 0:
        found.put(times)
    dist.destroy_process_group()


def all_reduce_s(numbers: int) -> tuple[float, float]:
    """Median seconds of an all-reduce between two processes: of so many float32 numbers, and of eight."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_all_reduce, (port, numbers, found), nprocs=2)  # type: ignore[attr-defined]
    large, small = found.get()
    return large, small


def _bare(rank: int, config: RunConfig, prepared: Path, first: int, last: int, found: Any) -> None:
    torch.set_num_threads(1)
    found.put(without_ray(config, prepared, first, last))


def bare_step_s(config: RunConfig, prepared: Path, first: int, last: int, processes: int) -> float:
    """Mean seconds of a step of a plain loop, the slowest of so many that run at once."""
    found = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_bare, (config, prepared, first, last, found), nprocs=processes)  # type: ignore[attr-defined]
    return max(found.get() for _ in range(processes)) / (last - first)


def seen_tokens(config: RunConfig, prepared: Path, steps: int) -> float:
    """Mean number of places of a source in the batches of the first steps, padding included."""
    from pipelines.prepare import open_prepared

    batches = open_prepared(prepared).batches(config, "finetune")
    widths = [next(batches).source_ids.shape[1] for _ in range(steps)]
    return sum(widths) / len(widths)


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its figures and write them to results/."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.scaling", description=__doc__)
    parser.add_argument("--steps", type=int, default=120, help="training steps of a run")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a step over all workers")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose scaling.jsonl gets a line")
    chosen = parser.parse_args(args)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the plain loops have; by default Ray gives its workers 15
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base, hardware = None, HARDWARE["h200"]
        for workers in (1, 2):
            config = run_config(Path(scratch), chosen.steps, chosen.batch_size, f"workers{workers}", workers)
            first, last, seconds, _ = with_ray(config, Path(scratch))
            job = Job.of(config, 1e9, workers)
            prepared = Path(scratch) / config.name / "prepared"
            if base is None:
                source = round(seen_tokens(config, prepared, last))
                base = (source, json.loads((prepared / "manifest.json").read_text())["vocab_size"])
            job = Job(**{**vars(job), "source_tokens": base[0], "vocab_size": base[1]})
            part = chosen.batch_size // workers
            alone = run_config(Path(scratch), chosen.steps, part, f"bare{workers}")
            bare_s = bare_step_s(alone, prepared, first, last, workers)
            _, learning = num_parameters(job)
            large, small = all_reduce_s(int(learning))
            hardware = type(hardware)(
                flops_per_s=rate,
                efficiency=part * sum(row_flops(job)) / (bare_s * rate),
                memory_bytes=1e12,
                workers_per_node=8,
                node_bytes_per_s=2 * 4 * learning * 0.5 / max(1e-9, large - small),
                network_bytes_per_s=1e9,
                latency_s=small / 2,
            )
            print(
                f"{workers} at once: bare step of {part} rows {1000 * bare_s:.1f} ms, {hardware.efficiency:.0%} of "
                f"{rate / 1e9:.1f} GFLOP/s; all-reduce of {learning / 1e6:.1f}M numbers {1000 * large:.1f} ms, "
                f"of eight {1000 * small:.2f} ms"
            )
            plan = make_plan(job, hardware)
            measured = seconds / (last - first)
            row = {
                "workers": workers,
                "bare_ms": 1000 * bare_s,
                "predicted_ms": 1000 * plan.step_s,
                "measured_ms": 1000 * measured,
            }
            row |= {
                "error": plan.step_s / measured - 1,
                "communicate_ms": 1000 * communicate_s(job, hardware, *reversed(num_parameters(job))),
            }
            rows.append(row)
            print({name: round(value, 3) for name, value in row.items()}, flush=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(torch.device("cpu")),
        "hardware_of_two": vars(hardware),
        "rows": rows,
    }
    leave(report, chosen.results, "scaling", chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

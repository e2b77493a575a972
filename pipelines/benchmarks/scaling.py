"""What `yan plan` predicts for one and two workers on this machine, against what they take.

    python -m pipelines.benchmarks.scaling

The constants are measured on one model and batch: the rate of matrix products with one thread, the share of it that a
bare training step (no Ray) reaches with as many processes at once as there are workers, what gloo takes for an
all-reduce, how fast a core reads, and how fast a checkpoint is copied and written. What is predicted, and then run by
Ray Train with one and two workers, is another model, and another batch of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.benchmarks.machine import RESULTS, describe, leave, matmul_rate
from pipelines.benchmarks.ray_overhead import MODEL, run_config, with_ray, without_ray
from pipelines.cluster import ray_session
from pipelines.plan import Hardware, Job, make_plan, num_parameters, row_flops
from pipelines.prepare import prepare
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


def read_rate(config: RunConfig, prepared: Path, steps: int) -> float:
    """Tokens a second that one core reads, sorts, corrupts and pads."""
    from pipelines.prepare import open_prepared

    batches = open_prepared(prepared).batches(config, "finetune")
    next(batches)
    started = time.perf_counter()
    tokens = sum(next(batches).num_tokens for _ in range(steps))
    return tokens / (time.perf_counter() - started)


def checkpoint_rates(folder: Path, megabytes: int = 200) -> tuple[float, float]:
    """Bytes a second at which weights are copied aside, and written, hashed and sealed."""
    from pipelines.checkpoints import Checkpoints
    from pipelines.order import Position

    weights = {str(i): torch.ones(megabytes * 2**20 // 32) for i in range(8)}
    size = sum(w.numel() * 4 for w in weights.values())
    started = time.perf_counter()
    copied = {name: w.clone() for name, w in weights.items()}
    copy_s = time.perf_counter() - started
    started = time.perf_counter()
    place = Checkpoints(str(folder / "checkpoints"))
    place.write("checkpoint_0", Position("finetune", "f", 0), lambda to: torch.save(copied, to / "weights"))
    return size / copy_s, size / (time.perf_counter() - started)


def calibrate(folder: Path, steps: int, batch_size: int, processes: int) -> Hardware:
    """This machine's constants, from bare loops of the 5M model."""
    config = run_config(folder, steps, batch_size, f"bare{processes}")
    prepared = folder / "prepared"
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    bare_s = bare_step_s(config, prepared, steps // 4, steps, processes)
    job = as_seen(Job.of(config, 1e9, 1), config, prepared, steps)
    _, learning = num_parameters(job)
    large, small = all_reduce_s(int(learning))
    copy, write = checkpoint_rates(folder)
    return Hardware(
        flops_per_s=rate,
        efficiency=batch_size * sum(row_flops(job)) / (bare_s * rate),
        memory_bytes=1e12,
        workers_per_node=8,
        node_bytes_per_s=2 * 4 * learning * 0.5 / max(1e-9, large - small),
        network_bytes_per_s=1e9,
        latency_s=small / 2,
        overlap=0.0,
        copy_bytes_per_s=copy,
        storage_bytes_per_s=write,
        tokens_per_core_s=read_rate(config, prepared, steps // 2),
        cores=1.0,
    )


def as_seen(job: Job, config: RunConfig, prepared: Path, steps: int) -> Job:
    """A job with the vocabulary and the lengths of the batches that there are."""
    vocab_size = json.loads((prepared / "manifest.json").read_text())["vocab_size"]
    return replace(job, source_tokens=round(seen_tokens(config, prepared, steps)), vocab_size=vocab_size)


SMALL = {"d_model": 96, "num_heads": 3, "decoder_blocks": 1, "flow_blocks": 4, "num_experts": 4}
"""A model of another width and depth than the one that is measured."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its figures and write them to results/."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.scaling", description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps of a run")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a worker, and of the bare loops")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose scaling.jsonl gets a line")
    chosen = parser.parse_args(args)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the plain loops have; by default Ray gives its workers 15
    rows: list[dict[str, Any]] = []
    constants: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, steps = Path(scratch), chosen.steps
        with ray_session(1, 1):
            prepare(run_config(folder, steps, chosen.batch_size, "data"), folder / "prepared")
        for workers in (1, 2):
            hardware = calibrate(folder, steps, chosen.batch_size, workers)
            constants[f"{workers} at once"] = vars(hardware)
            print(f"{workers} at once:", {name: float(f"{v:.4g}") for name, v in vars(hardware).items()}, flush=True)
            for name, model, rows_each in (("5M", MODEL, 2 * chosen.batch_size), ("small", SMALL, chosen.batch_size)):
                batch_size = rows_each * workers
                config = run_config(folder, steps, batch_size, f"{name}{workers}", workers, model)
                first, last, seconds, _ = with_ray(config, folder)
                job = as_seen(Job.of(config, 1e9, workers), config, folder / config.name / "prepared", last)
                plan, measured_s = make_plan(job, hardware), seconds / (last - first)
                row = {
                    "model": name,
                    "workers": workers,
                    "rows_of_a_worker": rows_each,
                    "predicted_ms": 1000 * plan.step_s,
                    "measured_ms": 1000 * measured_s,
                    "error": plan.step_s / measured_s - 1,
                    "communicate_ms": 1000 * plan.communicate_s,
                    "read_ms": 1000 * plan.read_s,
                }
                rows.append(row)
                print({k: v if isinstance(v, str) else round(v, 3) for k, v in row.items()}, flush=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(torch.device("cpu")),
        "hardware": constants,
        "rows": rows,
    }
    leave(report, chosen.results, "scaling", chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

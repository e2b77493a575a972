"""What `yan plan` predicts for one and two workers on this machine, against what they take.

    python -m pipelines.benchmarks.scaling
    python -m pipelines plan --constants OUT ...

The constants are measured with one model: by bare loops (no Ray) with two sizes of batch, alone and two at once; by
gloo's all-reduce; by reading, copying and writing; by one worker of Ray Train, for what Ray's processes keep busy; and
by killing one, for the time back. What is predicted, and then run by Ray Train, is other batches, another model and two
workers. No constant is taken from what is predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipelines.benchmarks.machine import RESULTS, describe, leave, matmul_rate, quartiles
from pipelines.benchmarks.ray_overhead import MODEL, START_S, run_config
from pipelines.cluster import ray_session
from pipelines.plan import Hardware, Job, block_passes, make_plan, num_parameters, row_flops
from pipelines.prepare import prepare
from yan_core.config import RunConfig
from yan_core.files import code_commit, write_file
from yan_core.training import draw_solver_steps


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


@dataclass(frozen=True)
class Stretch:
    """Steps after `first` to `last`, and their seconds."""

    first: int
    last: int
    seconds: float


def quiet(stretches: Sequence[Stretch], predicted_s: Callable[[Stretch], float]) -> float:
    """What stretches of a second or two take, as a multiple of what is predicted for them: the first quartile.

    Not the mean, as whatever else runs on the machine only ever adds.
    """
    return quartiles([s.seconds / predicted_s(s) for s in stretches])[0]


def _bare(rank: int, config: RunConfig, prepared: Path, found: Any) -> None:
    from pipelines.plain import train_plainly
    from pipelines.prepare import open_prepared
    from yan_core.model import build_model

    torch.set_num_threads(1)
    data, times = open_prepared(prepared), {0: time.perf_counter()}
    model = build_model(config.model, data.tokenizer.vocab_size, config.seed)

    def stamp(step: int, _: object) -> bool:
        times[step] = time.perf_counter()
        return True

    train_plainly(model, config, data, "finetune", stamp)
    stretches, first = [], 2
    for step in range(3, len(times)):
        if times[step] - times[first] > 1.0:
            stretches.append(Stretch(first, step, times[step] - times[first]))
            first = step
    found.put(stretches)


def bare_steps(config: RunConfig, prepared: Path, processes: int) -> list[Stretch]:
    """Stretches of plain loops, so many at once."""
    found = mp.get_context("spawn").SimpleQueue()
    running: Any = mp.spawn(_bare, (config, prepared, found), nprocs=processes, join=False)  # type: ignore[attr-defined]
    stretches = [stretch for _ in range(processes) for stretch in found.get()]
    while not running.join():
        pass
    return stretches


def ray_steps(config: RunConfig) -> list[Stretch]:
    """Stretches of a training by Ray Train, the first START_S seconds left out."""
    import mlflow

    from pipelines.run import run

    result = run(replace(config, log_every_s=1.0), publish=False)
    client = mlflow.MlflowClient(result.tracking_uri)
    history = sorted(
        (m.step, m.value / 1000) for m in client.get_metric_history(result.run_id, "finetune/perf/step_ms")
    )
    stretches = [Stretch(a, b, (b - a) * step_s) for (a, _), (b, step_s) in pairwise([(0, 0.0), *history])]
    ends = accumulate(stretch.seconds for stretch in stretches)
    return [stretch for stretch, end in zip(stretches, ends, strict=True) if end > START_S]


def as_seen(config: RunConfig, prepared: Path, workers: int = 1) -> Callable[[Stretch], Job]:
    """Stretch -> a training with its solver steps, the vocabulary and the mean width of sources."""
    from pipelines.prepare import open_prepared

    found, job = open_prepared(prepared), Job.of(config, 1e9, workers)
    widths = [batch.source_ids.shape[1] for batch in islice(found.batches(config, "finetune"), 50)]
    job = replace(job, vocab_size=found.manifest["vocab_size"], source_tokens=round(statistics.mean(widths)))
    choices = config.flow_loss.solver_steps

    def of(stretch: Stretch) -> Job:
        drawn = [draw_solver_steps(choices, config.seed, step) for step in range(stretch.first, stretch.last)]
        return replace(job, solver_steps=statistics.mean(drawn))

    return of


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


class Beside:
    """CPU cores that are kept busy beside the workers of a training, while it computes: by Ray and by others.

    Ray's are those of all processes below this one, of this one, and what a worker takes beyond a core. The first
    START_S seconds of training are left out.
    """

    def __enter__(self) -> Beside:
        self.ticks: list[tuple[float, float, float]] = []  # seconds, CPU seconds of Ray, CPU seconds of others
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        before, busy, at = self._look(), busy_s(), time.perf_counter()
        while not self.stopped.wait(1.0):
            now, now_busy, then, at = self._look(), busy_s(), at, time.perf_counter()
            taken = {who: cpu_s - before[who] for who, cpu_s in now.items() if who in before}
            workers = [cpu_s for (_, of_worker), cpu_s in taken.items() if of_worker]
            ours, computing = sum(taken.values()), sum(min(cpu_s, at - then) for cpu_s in workers)
            if computing > 0.3 * (at - then):
                self.ticks.append((at - then, ours - computing, max(0.0, now_busy - busy - ours)))
            before, busy = now, now_busy

    def _look(self) -> dict[tuple[int, bool], float]:
        here, found = psutil.Process(), {}
        for process in [here, *here.children(recursive=True)]:
            try:
                times = process.cpu_times()
                found[process.pid, is_worker(process)] = times.user + times.system
            except psutil.Error:
                continue
        return found

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    @property
    def cores(self) -> tuple[float, float]:
        """Means of Ray's and of others'; 0 where the training was too short to tell."""
        ticks = self.ticks[int(START_S) :]
        seconds = max(1e-9, sum(s for s, _, _ in ticks))
        return sum(ray_s for _, ray_s, _ in ticks) / seconds, sum(others_s for _, _, others_s in ticks) / seconds


def busy_s() -> float:
    """CPU seconds that this machine's cores have been busy since it started."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is a worker of Ray Train."""
    return any("RayTrainWorker" in part for part in process.cmdline())


def restart_s(folder: Path, batch_size: int) -> float:
    """Seconds from the death of a worker, killed after a checkpoint, to the end of the first new step."""
    import mlflow

    from pipelines.run import run

    config = run_config(folder, 40, batch_size, "killed")
    scaling = replace(config.scaling, checkpoint_every_s=2.0, max_failures=1)
    config, killed_at = replace(config, log_every_s=0.0, scaling=scaling), []

    def kill() -> None:
        while not list((folder / "killed" / "checkpoints").rglob("checkpoint_*/checkpoint.json")):
            time.sleep(0.1)
        for process in psutil.Process().children(recursive=True):
            if is_worker(process):
                killed_at.append(time.time())
                process.kill()

    threading.Thread(target=kill, daemon=True).start()
    result = run(config, publish=False)
    history = mlflow.MlflowClient(result.tracking_uri).get_metric_history(result.run_id, "finetune/perf/step_ms")
    return min(m.timestamp / 1000 for m in history if m.timestamp / 1000 > killed_at[0]) - killed_at[0]


def calibrate(folder: Path, steps: int, batch_size: int) -> Hardware:
    """This machine's constants but those of Ray, from bare loops of the 5M model."""
    prepared, rate = folder / "prepared", matmul_rate(torch.device("cpu"), torch.float32)

    def mean_step(rows: int, processes: int) -> tuple[float, float]:
        """Seconds and operations of a step with mean solver steps."""
        config = run_config(folder, steps, rows, "bare")
        job = as_seen(config, prepared)
        stretches = bare_steps(config, prepared, processes)

        def flops(stretch: Stretch) -> float:
            return rows * sum(row_flops(job(stretch))) * (stretch.last - stretch.first)

        whole = Stretch(0, steps, 0.0)
        return quiet(stretches, flops) * flops(whole) / steps, flops(whole) / steps

    (full_s, full), (part_s, part) = mean_step(batch_size, 1), mean_step(batch_size // 4, 1)
    both_s, _ = mean_step(batch_size, 2)
    fixed_s = max(0.0, full_s - full * (full_s - part_s) / (full - part))  # of no rows at all
    config = run_config(folder, steps, batch_size, "bare")
    job = as_seen(config, prepared)(Stretch(0, steps, 0.0))
    _, learning = num_parameters(job)
    large, small = all_reduce_s(int(learning))
    copy, write = checkpoint_rates(folder)
    return Hardware(
        flops_per_s=rate,
        efficiency=full / (full_s - fixed_s) / rate,
        memory_bytes=psutil.virtual_memory().total / 2,
        workers_per_node=2,
        node_bytes_per_s=2 * 4 * learning * 0.5 / max(1e-9, large - small),
        network_bytes_per_s=1e9,
        latency_s=small / 2,
        overlap=0.0,
        block_s=fixed_s / block_passes(job),
        crowding=min(1.0, (full_s - fixed_s) / (both_s - fixed_s)),
        copy_bytes_per_s=copy,
        storage_bytes_per_s=write,
        tokens_per_core_s=read_rate(config, prepared, steps // 2),
        cores=1.0,
        shared_cores=float(os.cpu_count() or 1),
        restart_s=restart_s(folder, batch_size),
    )


SMALL = {"d_model": 96, "num_heads": 3, "decoder_blocks": 1, "flow_blocks": 4, "num_experts": 4}
"""A model of another width and depth than the one that is measured."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its figures and write them to results/."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.scaling", description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps of a run")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a worker, and of the bare loops")
    parser.add_argument("--constants", type=Path, metavar="OUT", help="write the constants here, for `yan plan`")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose scaling.jsonl gets a line")
    chosen = parser.parse_args(args)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the plain loops have; by default Ray gives its workers 15
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, steps, of_worker = Path(scratch), chosen.steps, chosen.batch_size
        with ray_session(1, 1):
            prepare(run_config(folder, steps, of_worker, "data"), folder / "prepared")
        hardware = calibrate(folder, steps, of_worker)
        print({name: float(f"{v:.4g}") for name, v in vars(hardware).items()}, flush=True)
        for name, model, rows_each, workers in (
            ("5M", MODEL, of_worker, 1),  # what the constants were measured with, and where Ray's are
            ("5M", MODEL, 2 * of_worker, 1),
            ("small", SMALL, of_worker, 1),
            ("5M", MODEL, of_worker, 2),
            ("small", SMALL, of_worker, 2),
        ):
            config = run_config(folder, steps, rows_each * workers, f"run{len(rows)}", workers, model)
            with Beside() as beside:
                stretches = ray_steps(config)
            rays, others = beside.cores
            if not rows:
                hardware = replace(hardware, ray_cores=rays)
            # What others take is no constant: it is measured in each run, and taken from the cores as Ray's is.
            busy = replace(hardware, ray_cores=min(hardware.ray_cores + others, hardware.shared_cores - 0.1))
            job = as_seen(config, folder / config.name / "prepared", workers)

            def predicted_s(stretch: Stretch, job: Callable[[Stretch], Job] = job, hardware: Hardware = busy) -> float:
                return make_plan(job(stretch), hardware).step_s * (stretch.last - stretch.first)

            plan = make_plan(job(Stretch(0, steps, 0.0)), busy)
            measured_s = plan.step_s * quiet(stretches, predicted_s)
            row = {
                "model": name,
                "workers": workers,
                "rows_of_a_worker": rows_each,
                "predicted_ms": 1000 * plan.step_s,
                "measured_ms": 1000 * measured_s,
                "predicted_alone_ms": 1000 * make_plan(job(Stretch(0, steps, 0.0)), hardware).step_s,
                "others_cores": others,
                "error": plan.step_s / measured_s - 1,
                "compute_ms": 1000 * plan.compute_s,
                "communicate_ms": 1000 * plan.communicate_s,
                "read_ms": 1000 * plan.read_s,
                "stretches": len(stretches),
                "load_average": os.getloadavg()[0],
            }
            rows.append(row)
            print({k: v if isinstance(v, str) else round(v, 3) for k, v in row.items()}, flush=True)
    if chosen.constants:
        write_file(chosen.constants, json.dumps(vars(hardware), indent=1) + "\n")
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(torch.device("cpu")),
        "hardware": vars(hardware),
        "rows": rows,
    }
    leave(report, chosen.results, "scaling", chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

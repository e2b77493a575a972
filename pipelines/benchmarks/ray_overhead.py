"""What Ray Data and Ray Train cost a training step: the product's path against a plain loop over the same batches.

    python -m pipelines.benchmarks.ray_overhead

One worker with one thread fine-tunes the 5M model on the built-in world; the same steps run in a process without Ray,
with the same reading, batches, loss and optimizer. As a machine's speed drifts by more than is looked for here, they
take turns of some seconds: while one runs, the other is stopped. MLflow and checkpoints are on with Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from pipelines.benchmarks.machine import RESULTS, describe, leave
from yan_core.config import RunConfig, from_dict
from yan_core.files import code_commit

MODEL = {"d_model": 160, "num_heads": 5, "decoder_blocks": 1, "flow_blocks": 3, "num_experts": 8}
"""That of size_5m.yaml."""


TURN_S = 4.0
"""Seconds until the other goes on."""

WORKER_S = 300.0
"""Longest that Ray Train may take to have its worker."""

START_S = 10.0
"""Seconds of the start that are left out: beside the first steps the worker imports MLflow, once in a training."""


def run_config(
    folder: Path, steps: int, batch_size: int, name: str, workers: int = 1, model: dict[str, Any] = MODEL
) -> RunConfig:
    """A fine-tune of that many steps from fresh weights."""
    settings = {
        "name": name,
        "runs_dir": str(folder),
        "data": {"max_target_tokens": 14},
        "model": model,
        "stages": {
            "autoencoder": {"max_steps": 0},
            "flow": {"max_steps": 0},
            "finetune": {"max_steps": steps, "batch_size": batch_size},
        },
        "scaling": {"num_workers": workers},
    }
    return from_dict(RunConfig, settings)


class Turns:
    """Lets a plain loop and a training by Ray run in turns of some seconds; called after each step of the loop.

    Attributes:
        times: After each step of the loop, the seconds that it ran by then.
        stops: From when to when the process of Ray's worker was stopped, in Unix time.
    """

    def __init__(self, worker: psutil.Process) -> None:
        """Stop the worker."""
        self.worker, self.times, self.stops = worker, dict[int, float](), list[tuple[float, float]]()
        self.ran = 0.0
        self._stop()

    def _stop(self) -> None:
        self.began, self.since = time.time(), time.perf_counter()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.worker.suspend()

    def go_on(self) -> None:
        """Let the worker run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.worker.resume()
        self.stops.append((self.began, time.time()))

    def __call__(self, step: int, _: object) -> bool:
        own = time.perf_counter() - self.since
        self.times[step] = self.ran + own
        if own > TURN_S:
            self.ran += own
            self.go_on()
            time.sleep(own)
            self._stop()
        return True


def beside(config: RunConfig) -> tuple[dict[int, float], list[tuple[float, float]]]:
    """A training without Ray in turns with the one by Ray, from when that has its worker; see `Turns`.

    Raises:
        RuntimeError: If the process that called has no worker of Ray Train below it within WORKER_S.
    """
    from pipelines.plain import train_plainly
    from pipelines.prepare import open_prepared
    from yan_core.model import build_model

    torch.set_num_threads(1)
    until = time.monotonic() + WORKER_S
    while not (found := _workers(psutil.Process(os.getppid()))):
        if time.monotonic() > until:
            raise RuntimeError(f"Ray Train had no worker within {WORKER_S:g} s")
        time.sleep(0.5)
    prepared = open_prepared(Path(config.runs_dir) / config.name / "prepared")
    model = build_model(config.model, prepared.tokenizer.vocab_size, config.seed)
    time.sleep(START_S)
    turns = Turns(found[0])
    try:
        train_plainly(model, config, prepared, "finetune", turns)
    finally:
        turns.go_on()
    return turns.times, turns.stops


def _workers(driver: psutil.Process) -> list[psutil.Process]:
    """Ray Train's workers below a driver."""
    found = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def one_turn(config: RunConfig) -> dict[str, float]:
    """Milliseconds of the same steps with and without Ray, the first START_S seconds of Ray's left out."""
    import mlflow

    from pipelines.run import run

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        plainly = pool.submit(beside, config)
        result = run(config, publish=False)
        times, stops = plainly.result()
    client = mlflow.MlflowClient(result.tracking_uri)

    def history(name: str) -> list[tuple[int, float, float]]:
        found = client.get_metric_history(result.run_id, f"finetune/perf/{name}")
        return sorted((m.step, m.timestamp / 1000, m.value) for m in found)

    return compare(history("step_ms"), [share for *_, share in history("data_wait_share")], times, stops)


def compare(
    told: Sequence[tuple[int, float, float]],
    wait_shares: Sequence[float],
    times: Mapping[int, float],
    stops: Sequence[tuple[float, float]],
) -> dict[str, float]:
    """What one turn says.

    Args:
        told: What Ray's worker told at the end of each interval: step, Unix time, milliseconds a step, stops included.
        wait_shares: Share of each interval spent waiting for data.
        times: Seconds that the plain loop ran by the end of each step.
        stops: From when to when Ray's worker was stopped, in Unix time.
    """

    def ran_s(a: float, b: float) -> float:
        return b - a - sum(max(0.0, min(b, end) - max(a, begin)) for begin, end in stops)

    begun = next(i for i, (_, at, _) in enumerate(told) if ran_s(told[0][1], at) >= START_S)
    first, since, _ = told[begun]
    last, until, _ = told[-1]
    intervals = zip(told[begun:], told[begun + 1 :], wait_shares[begun + 1 :], strict=False)
    wait_s = sum(share * (b[0] - a[0]) * b[2] / 1000 for a, b, share in intervals)
    ours_s, bare_s = ran_s(since, until), times[last] - times[first]
    ms = {"ray_ms": 1000 * ours_s / (last - first), "bare_ms": 1000 * bare_s / (last - first)}
    return {**ms, "overhead": ours_s / bare_s - 1, "data_wait_share": wait_s / ours_s, "steps": last - first}


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its figures and write them to results/."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.ray_overhead", description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="training steps of a turn")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of a step")
    parser.add_argument("--turns", type=int, default=3, help="how often each has its turn")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose ray_overhead.jsonl gets a line")
    chosen = parser.parse_args(args)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("RAY_worker_niceness", "0")  # as the bare loop has; by default Ray gives its workers 15
    turns: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(chosen.turns):
            config = run_config(Path(scratch), chosen.steps, chosen.batch_size, f"turn{turn}")
            turns.append(one_turn(config))
            print({name: round(value, 4) for name, value in turns[-1].items()}, flush=True)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(torch.device("cpu")),
        "turns": turns,
        "overhead": statistics.median(t["overhead"] for t in turns),
        "data_wait_share": statistics.median(t["data_wait_share"] for t in turns),
    }
    print(f"overhead of the Ray path: {report['overhead']:.1%} of a step; data wait {report['data_wait_share']:.1%}")
    leave(report, chosen.results, "ray_overhead", chosen.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

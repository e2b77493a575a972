"""What Ray Data and Ray Train cost a training step: the product's path against a plain loop over the same batches.

    python -m pipelines.benchmarks.ray_overhead

One worker with one thread fine-tunes the 5M model on the built-in world; then the same steps run in this process, with
the same reading, batches, loss and optimizer, and without Ray. Both take turns. MLflow and checkpoints are on with Ray.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipelines.benchmarks.machine import RESULTS, describe, leave
from yan_core.config import RunConfig, from_dict
from yan_core.files import code_commit

MODEL = {"d_model": 160, "num_heads": 5, "decoder_blocks": 1, "flow_blocks": 3, "num_experts": 8}
"""That of size_5m.yaml."""


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


def with_ray(config: RunConfig, folder: Path) -> tuple[int, int, float, float]:
    """First and last step of what was timed, seconds between them, and the share of them spent waiting for data.

    The first START_S seconds of training are left out.
    """
    import mlflow

    from pipelines.run import run

    result = run(config, publish=False)
    client = mlflow.MlflowClient(result.tracking_uri)

    def history(name: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in client.get_metric_history(result.run_id, f"finetune/perf/{name}"))

    per_step, waits = history("step_ms"), dict(history("data_wait_share"))
    seconds = wait = 0.0
    while len(per_step) > 2 and per_step[0][0] * per_step[0][1] < 1000 * START_S:
        per_step = per_step[1:]
    for (before, _), (step, ms) in zip(per_step, per_step[1:], strict=False):
        seconds += (step - before) * ms / 1000
        wait += waits[step] * (step - before) * ms / 1000
    return per_step[0][0], per_step[-1][0], seconds, wait / seconds


def without_ray(config: RunConfig, prepared_folder: Path, first: int, last: int) -> float:
    """Seconds of the steps after `first` up to `last`, in this process."""
    from pipelines.plain import train_plainly
    from pipelines.prepare import open_prepared
    from yan_core.model import build_model

    prepared, times = open_prepared(prepared_folder), {}
    model = build_model(config.model, prepared.tokenizer.vocab_size, config.seed)

    def stamp(step: int, _: object) -> bool:
        times[step] = time.perf_counter()
        return True

    train_plainly(model, config, prepared, "finetune", stamp, steps=last)
    return times[last] - times[first]


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
            first, last, ours_s, wait = with_ray(config, Path(scratch))
            bare_s = without_ray(config, Path(scratch) / config.name / "prepared", first, last)
            ms = {"ray_ms": 1000 * ours_s / (last - first), "bare_ms": 1000 * bare_s / (last - first)}
            turns.append({**ms, "overhead": ours_s / bare_s - 1, "data_wait_share": wait, "steps": last - first})
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

"""`yan demo geometry`: what experts are for, shown on points in the plane.

The product's own flow network, loss and solver on sequences of one token whose latents are two numbers and whose source
is empty: what it learns can be seen. Two trainings (the paper's and ours) with several numbers of experts, measured at
several numbers of solver steps by the sliced Wasserstein distance to points held out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.arguments import UsageError
from pipelines.geometry.flows import SOLVER_STEPS, TRAININGS, Job, Settings, Trained, fresh_model, train_all
from pipelines.geometry.pictures import picture_of_distances, picture_of_points
from pipelines.geometry.points import DATA_SETS
from pipelines.geometry.results import floors, nested, shares, table, with_mean
from yan_core.config import (
    RunConfig,
    TrackingConfig,
    to_dict,
)
from yan_core.files import code_commit, write_file
from yan_core.model import FlowNetwork


def parse_options(args: Sequence[str]) -> argparse.Namespace:
    """Options of `yan demo geometry`."""
    own = Settings()
    parser = argparse.ArgumentParser(
        prog="yan demo geometry",
        description="Mixture-of-experts flow matching on points in the plane: trainings, experts and solver steps.",
    )
    for option, default, known in (("data-sets", own.data_sets, DATA_SETS), ("trainings", own.trainings, TRAININGS)):
        text = f"default: all of {', '.join(known)}"
        parser.add_argument(f"--{option}", nargs="+", metavar="NAME", default=default, help=text)
    counts = f"numbers of experts; default: {' '.join(map(str, own.experts))}"
    parser.add_argument("--experts", nargs="+", type=int, metavar="K", default=own.experts, help=counts)
    parser.add_argument("--steps", type=int, default=own.updates, help="optimizer steps of each training")
    parser.add_argument("--seed", type=int, default=own.seed, help="of weights, points and noise")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--out", default="runs/geometry", help="folder for figures and pictures")
    parser.add_argument("--tracking-uri", default="", help="MLflow store; default: as `yan run` has it")
    return parser.parse_args(list(args))


def main(args: Sequence[str]) -> int:
    """Train, measure, draw; print a table and log to one MLflow run.

    Args:
        args: See `yan demo geometry --help`.

    Raises:
        UsageError: If an option names something unknown or is out of range.
    """
    chosen = parse_options(args)
    try:
        settings = Settings(
            data_sets=tuple(chosen.data_sets),
            trainings=tuple(chosen.trainings),
            experts=tuple(chosen.experts),
            updates=chosen.steps,
            seed=chosen.seed,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if chosen.processes < 1:
        raise UsageError(f"--processes must be >= 1, got {chosen.processes}")
    run_demo(settings, Path(chosen.out), chosen.tracking_uri, chosen.processes)
    return 0


def run_demo(settings: Settings, out: Path, tracking_uri: str = "", processes: int = 1) -> dict[str, Any]:
    """Do the whole demo; returns what results.json holds."""
    from pipelines.tracking import Tracker, check_tracking

    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    config = RunConfig(
        name="geometry", runs_dir=str(out.parent), seed=settings.seed, tracking=TrackingConfig(uri=tracking_uri)
    )
    check_tracking(config)
    tracker = Tracker.start(config, None)
    try:
        tracker.tag("commit", code_commit())
        tracker.params({name: value for name, value in to_dict(settings).items() if not isinstance(value, dict)})
        results = _measure_and_draw(settings, out, tracker, processes, started)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.finish("FINISHED")
    print(f"{time.perf_counter() - started:.0f} s in all; figures and pictures: {out}  MLflow run: {tracker.run_id}")
    return results


def _measure_and_draw(settings: Settings, out: Path, tracker: Any, processes: int, started: float) -> dict[str, Any]:
    """Everything between the start of the MLflow run and its end."""
    trained: list[Trained] = []
    total = len(settings.jobs)
    print(
        f"{total} trainings of {settings.updates} steps, {processes} at a time; distance at {SOLVER_STEPS} solver steps"
    )
    for done in train_all(settings, processes):
        trained.append(done)
        job = done.job
        for num_steps, value in done.distances.items():
            tracker.metrics({_metric(job): value}, step=num_steps)
        values = "".join(f"{v:>7.3f}" for v in done.distances.values())
        name = f"{job.data_set:<12} {job.training:<6} K = {job.num_experts:<2}"
        print(f"[{len(trained):>2}/{total}] {name} {done.seconds:>4.0f} s {values}", flush=True)

    distances, floor = with_mean(trained, settings), floors(settings)
    for job, row in distances.items():
        if job.data_set == "mean":
            for num_steps, value in row.items():
                tracker.metrics({_metric(job): value}, step=num_steps)
    tracker.metrics({f"geometry/{name}/floor": value for name, value in floor.items()}, step=0)
    own, of_plain = shares(distances), shares(distances, of_plain=True)
    few, many = min(settings.experts), max(settings.experts)
    lines = [
        *table(distances, floor),
        *_share_lines(f"distance with K = {many} over the same training's with K = {few}", own),
        *_share_lines(f"distance with K = {many} over plain's: one expert, no loss through the solver", of_plain),
    ]
    print("\n".join(["", *lines, ""]), flush=True)

    results = {
        "config": to_dict(settings),
        "sliced_wasserstein": nested(distances),
        "floor": floor,
        "share_of_fewest_experts": own,
        "share_of_plain": of_plain,
        "training_seconds": {_metric(done.job).split("/", 1)[1].rsplit("/", 1)[0]: done.seconds for done in trained},
        "seconds": time.perf_counter() - started,
        "processes": processes,
        "commit": code_commit(),
    }
    write_file(out / "table.txt", "\n".join(lines) + "\n")
    write_file(out / "results.json", json.dumps(results, indent=2))
    files = [out / "table.txt", out / "results.json"]
    weights = {done.job: done.weights for done in trained}
    for data_set in dict.fromkeys(settings.data_sets):
        flows = {job: _flow_of(job, weights[job], settings) for job in _pictured(data_set, settings)}
        files.append(out / f"{data_set}.png")
        picture_of_points(data_set, flows, settings).savefig(files[-1], dpi=110)
    files.append(out / "distances.png")
    picture_of_distances(distances, floor).savefig(files[-1], dpi=110)
    for file in files:
        tracker.file(file)
    return results


def _metric(job: Job) -> str:
    return f"geometry/{job.data_set}/{job.training}/K{job.num_experts}/sliced_wasserstein"


def _share_lines(title: str, found: dict[str, dict[str, dict[int, float]]]) -> list[str]:
    rows = [(name, training, row) for name, by_training in found.items() for training, row in by_training.items()]
    lines = [
        f"{name:<12} {training:<9}     " + "".join(f"{row[n]:>7.2f}" for n in SOLVER_STEPS)
        for name, training, row in rows
    ]
    return ["", title, *lines] if rows else []


def _pictured(data_set: str, settings: Settings) -> list[Job]:
    """The first training with fewest experts, then every training with most."""
    jobs = [job for job in settings.jobs if job.data_set == data_set]
    mixed = [job for job in jobs if job.training != "plain"] or jobs
    few, many = min(job.num_experts for job in mixed), max(job.num_experts for job in mixed)
    first = next(job for job in mixed if job.num_experts == few)
    return list(dict.fromkeys([first, *(job for job in mixed if job.num_experts == many)]))


def _flow_of(job: Job, weights: dict[str, np.ndarray[Any, Any]], settings: Settings) -> FlowNetwork:
    flow = fresh_model(settings, job.num_experts).flow
    flow.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return flow.eval()

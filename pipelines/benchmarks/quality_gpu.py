"""Quality of YAN and of what it is measured against at 50M parameters, on a machine with a GPU and with yan_core alone.

    python -m pipelines.benchmarks.quality_gpu pack --config pipelines/configs/squad.yaml \
        --config pipelines/configs/size_50m_gpu.yaml --name squad_50m --data.root ../shared/data --output packs/squad
    python -m pipelines.benchmarks.quality_gpu run --shards packs/squad --output runs/squad_50m --minutes 9

`pack` wants the whole environment and no GPU; it prepares the data as `yan prepare` does and packs them into a small
folder. `run` trains and measures the contestants of `yan compare` one after the other, each for the same floating-point
operations on the same rows in the same order, and leaves a report that `python -m pipelines.results` reads. It ends in
time with status 75 where something is left; the same command goes on, from the step where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.batches import TrainingData
from pipelines.benchmarks.machine import describe
from pipelines.compute import training_flops
from pipelines.contestants import (
    CONTESTANTS,
    Contestant,
    entered,
    entry,
    flow_parameters,
    measure_speeds,
    merged,
    report_of,
    with_compute,
    with_steps,
)
from pipelines.evaluation import Quality, evaluate_model
from pipelines.order import Position
from pipelines.packed import Packed, PackError, open_pack, pack
from pipelines.plain import OnStep, plain_state, train_on
from pipelines.progress import say
from pipelines.results import headline, markdown
from pipelines.state import STAGES
from yan_core.checkpoint import from_pretrained
from yan_core.config import RunConfig, from_dict, to_dict
from yan_core.files import atomic_folder, clear_leftovers, write_file
from yan_core.metrics import installed
from yan_core.model import build_model
from yan_core.tasks import get_task

SAY_EVERY_S = 10.0
"""Seconds between lines of progress."""


# --- what a contestant is to do ---------------------------------------------------------------------------------------


def compared(packed: Packed, share: float, compile_loss: bool) -> RunConfig:
    """The run compared: the packed one with a share of its steps, in one process."""
    values = to_dict(packed.config)
    for name, stage in values["stages"].items():
        if stage["max_steps"]:
            values["stages"][name] = with_steps(stage, math.ceil(share * stage["max_steps"]))
    return from_dict(RunConfig, merged(values, {"scaling": {"num_workers": 1, "compile": compile_loss}}))


def fingerprint(contestant: Contestant, config: RunConfig, packed: Packed) -> str:
    """Hash of all that a contestant's figures depend on, besides the machine."""
    inputs = {"pack": packed.sha256, "config": to_dict(config), "contestant": dataclasses.asdict(contestant)}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def planned(
    name: str,
    contestant: Contestant,
    config: RunConfig,
    packed: Packed,
    folder: Path,
    budget: Callable[[], dict[str, float]],
) -> tuple[RunConfig, float]:
    """A contestant's own run, with the steps of its stages, and the floating-point operations of its training.

    What its folder holds of another pack or of other settings is deleted.

    Args:
        name: The contestant's.
        contestant: What it is.
        config: The run compared.
        packed: The rows.
        folder: Keeps the plan: to count operations takes a minute on a slow processor.
        budget: Gives the floating-point operations of each stage of the run compared.
    """
    file, inputs = folder / "plan.json", fingerprint(contestant, config, packed)
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["inputs"] == inputs:
            return from_dict(RunConfig, found["config"]), found["flops"]
        say(f"{name}: the pack or the settings have changed, it is trained anew")
    shutil.rmtree(folder, ignore_errors=True)
    own, spent = entered(name, contestant, config, flow_parameters(config, packed.tokenizer.vocab_size)), budget()
    if not contestant.is_the_run_compared:
        own = with_compute(own, packed, spent)
        spent = training_flops(own, packed)
    flops = sum(spent.values())
    write_file(file, json.dumps({"inputs": inputs, "config": to_dict(own), "flops": flops}))
    return own, flops


# --- training ---------------------------------------------------------------------------------------------------------


def train(name: str, config: RunConfig, data: TrainingData, folder: Path, device: torch.device, until: float) -> bool:
    """Train a contestant's stages, from where it stands.

    Args:
        name: The contestant's.
        config: Its run.
        data: The rows.
        folder: Gets a model folder for each stage, and where the time ends `<stage>.unfinished`.
        device: Where to.
        until: When to end, in seconds of `time.perf_counter`.

    Returns:
        Whether all stages are done.
    """
    before: Path | None = None
    for stage in STAGES:
        steps, done, saved = getattr(config.stages, stage).max_steps, folder / stage, folder / f"{stage}.unfinished"
        if not steps:
            continue
        if not done.is_dir():
            if before is None:
                model = build_model(config.architecture, data.tokenizer.vocab_size, config.seed)
            else:
                model = from_pretrained(before)[0]
            position = saved / "position.json"
            checkpoint = (saved, Position(**json.loads(position.read_text()))) if saved.is_dir() else None
            state = plain_state(model.to(device), config, data, stage, checkpoint)
            started = time.perf_counter()
            on_step = progress(f"{name} {stage}", state.step, steps, until)
            train_on(state, data.batches(config, stage, state.step), on_step)
            _add_seconds(folder, time.perf_counter() - started)
            if state.step < steps:
                with atomic_folder(saved) as scratch:
                    state.snapshot()(scratch)
                    write_file(scratch / "position.json", json.dumps(vars(state.position)))
                return False
            state.save_model(done, state.result())
            shutil.rmtree(saved, ignore_errors=True)
        before = done
    return True


def progress(what: str, first: int, steps: int, until: float) -> OnStep:
    """Shows a line of progress now and then, and ends the training in time.

    Args:
        what: Begins each line.
        first: Steps that are done.
        steps: Steps of the stage.
        until: When to end, in seconds of `time.perf_counter`.
    """
    started = said = time.perf_counter()

    def on_step(step: int, metrics: dict[str, torch.Tensor]) -> bool:
        nonlocal said
        now = time.perf_counter()
        if now - said >= SAY_EVERY_S or step == steps:
            said, rate = now, (step - first) / (now - started)
            left = f"{rate:.1f} steps/s, left {(steps - step) / rate:.0f} s"
            say(f"  {what} {step}/{steps} loss {float(metrics['loss']):.3f} {left}")
        return now < until

    return on_step


def _add_seconds(folder: Path, seconds: float) -> None:
    write_file(folder / "seconds", str(_seconds(folder) + seconds))


def _seconds(folder: Path) -> float:
    """How long a contestant was trained in all."""
    file = folder / "seconds"
    return float(file.read_text()) if file.is_file() else 0.0


# --- the comparison ---------------------------------------------------------------------------------------------------


def measured(
    name: str, contestant: Contestant, config: RunConfig, flops: float, packed: Packed, folder: Path, device: str
) -> dict[str, Any]:
    """A trained contestant's part of the report."""
    rows, task = packed.about["validation"], get_task(config.data.task)
    model = folder / [stage for stage in STAGES if getattr(config.stages, stage).max_steps][-1]
    task = dataclasses.replace(task, metrics=installed(task.metrics))

    def show(q: Quality) -> None:
        say(f"  {name} {q.num_steps} steps: {q.metric} {q.value:.4f} (told the length: {q.oracle_value:.4f})")

    quality = evaluate_model(model, rows, config.evaluation, device, show, task=task)
    counts = [q.num_steps for q in quality]
    sources, sampling = [row["source"] for row in rows], {name: config.evaluation.sampling}
    speeds = measure_speeds({name: (model, counts)}, sources, sampling, device, turns=1)
    return entry(contestant, config, model, quality, speeds[name], flops, _seconds(folder))


def run(
    packed: Packed,
    output: Path,
    minutes: float,
    contestants: Sequence[str] = tuple(CONTESTANTS),
    share: float = 1.0,
    compile_loss: bool = False,
) -> bool:
    """Train and measure contestants, from where an earlier call stopped.

    Args:
        packed: The rows, and the run compared.
        output: Gets `<contestant>.json` of each one that is done, `report.json` and `report.md` of all of them, and a
            folder of each one's training.
        minutes: Time after which to save and leave; a measurement that has begun by then is finished.
        contestants: Names of CONTESTANTS.
        share: Of the steps of the run compared.
        compile_loss: Whether to compile the loss with torch.compile.

    Returns:
        Whether all of them are done.
    """
    until = time.perf_counter() + 60 * minutes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, done = compared(packed, share, compile_loss), True
    budget = functools.cache(lambda: training_flops(config, packed))
    for name in contestants:
        contestant, folder = CONTESTANTS[name], output / name
        if name not in results(config, packed, output):
            own, flops = planned(name, contestant, config, packed, folder, budget)
            steps = {stage: getattr(own.stages, stage).max_steps for stage in STAGES}
            say(f"{contestant.label}: {flops / 1e12:.1f} TFLOPs, steps {steps}")
            clear_leftovers(folder)
            if not train(name, own, packed, folder, device, until) or time.perf_counter() >= until:
                say(f"time is up at {name}: the same command goes on")
                done = False
                break
            found = measured(name, contestant, own, flops, packed, folder, str(device))
            result = {"inputs": fingerprint(contestant, config, packed), "machine": describe(device), "entry": found}
            write_file(output / f"{name}.json", json.dumps(result))
            publish(config, packed, output, device)
    if results(config, packed, output):
        publish(config, packed, output, device)
        say("\n" + (output / "report.md").read_text(encoding="utf-8"))
    return done


def results(config: RunConfig, packed: Packed, output: Path) -> dict[str, dict[str, Any]]:
    """What was found of the contestants that are done, by name."""
    found = {}
    for name, contestant in CONTESTANTS.items():
        file = output / f"{name}.json"
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            if result["inputs"] == fingerprint(contestant, config, packed):
                found[name] = result
    return found


def publish(config: RunConfig, packed: Packed, output: Path, device: torch.device) -> None:
    """Write the report of the contestants that are done."""
    found = results(config, packed, output)
    entries = {name: result["entry"] for name, result in found.items()}
    report = report_of(config, packed.about["validation"], packed.tokenizer, device, entries)
    devices = dict.fromkeys(result["machine"]["device"] for result in found.values())
    report["machine"]["device"] = " and ".join(devices)
    write_file(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_file(output / "report.md", markdown(report) + "\n" + headline(report))


# --- the command ------------------------------------------------------------------------------------------------------


def _pack(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.quality_gpu pack")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--limit-mb", type=float, default=40.0, help="megabytes that the pack may take")
    chosen, settings = parser.parse_known_args(args)
    from pipelines.arguments import parse_config
    from pipelines.cluster import ray_session
    from pipelines.run import prepare_step, run_lock

    config = parse_config("quality_gpu pack", settings)
    if config.baseline is not None or config.init_from or config.evaluation.keep != "last":
        raise PackError("the run compared must be of a YAN with fresh weights and evaluation.keep=last")
    folder = Path(config.runs_dir) / config.name
    with run_lock(folder), ray_session(config.scaling.max_workers, config.scaling.cpus_per_worker):
        prepared = prepare_step(config, folder)
    packed = pack(prepared, config, chosen.output, int(chosen.limit_mb * 1e6))
    size = sum(file.stat().st_size for file in chosen.output.iterdir()) / 1e6
    say(f"pack: {chosen.output}, {size:.1f} MB, {len(packed.about['validation'])} validation rows")
    return 0


def _run(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.quality_gpu run")
    parser.add_argument("--shards", type=Path, required=True, help="folder that `pack` wrote")
    parser.add_argument("--output", type=Path, required=True, help="folder of trainings, results and report")
    parser.add_argument("--minutes", type=float, required=True, help="time to train; what is measured then is finished")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="default: all")
    parser.add_argument("--share", type=float, default=1.0, help="share of the packed run's steps, for less time")
    parser.add_argument("--compile", action="store_true", help="compile the loss with torch.compile")
    chosen = parser.parse_args(args)
    packed = open_pack(chosen.shards)
    done = run(packed, chosen.output, chosen.minutes, chosen.contestants, chosen.share, chosen.compile)
    return 0 if done else os.EX_TEMPFAIL


def main(argv: Sequence[str] | None = None) -> int:
    """`pack` or `run`; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {"pack": _pack, "run": _run}
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.quality_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, help="`pack --help` and `run --help` say more")
    try:
        return commands[parser.parse_args(args[:1]).command](args[1:])
    except PackError as error:
        print(f"quality_gpu: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

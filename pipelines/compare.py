"""`yan compare`: YAN and what it is measured against, trained on the same rows for the same compute, in one table.

Each contestant is a run of its own, `<name>-<contestant>`, that shares the data of the run compared: the same rows in
the same order, the same tokenizer, about as many parameters, and as many floating-point operations of training. What is
there already is not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from pipelines.arguments import UsageError, parse_config
from pipelines.cluster import ray_session
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
)
from pipelines.folders import difference, read_inputs, run_lock
from pipelines.plain import device_of
from pipelines.progress import say
from pipelines.publish import rows_that_choose
from pipelines.results import markdown, pictures
from pipelines.run import TRAINED, prepare_step, run, with_architecture_of_start
from pipelines.tracking import Tracker, check_tracking
from yan_core.checkpoint import read_config
from yan_core.config import RunConfig, to_dict, unknown_name
from yan_core.files import atomic_folder, write_file
from yan_core.model import build_model

SETTINGS_OF_A_VARIANT = ("label", "settings", "compute")

KEPT = ("data", "tokenizer", "seed", "name", "runs_dir")
"""What all contestants have in common."""


def share_prepared(config: RunConfig, own: RunConfig) -> None:
    """Give a contestant's run the prepared data of the run compared, so that they are not made again."""
    source, target = (Path(c.runs_dir) / c.name for c in (config, own))
    inputs = (source / "prepared.inputs.json").read_text(encoding="utf-8")
    recorded = target / "prepared.inputs.json"
    if recorded.is_file() and recorded.read_text(encoding="utf-8") == inputs:
        return
    with atomic_folder(target / "prepared") as scratch:
        shutil.copytree(source / "prepared", scratch, dirs_exist_ok=True)
    write_file(recorded, inputs)


def check_start(name: str, own: RunConfig, config: RunConfig) -> None:
    """Refuse a contestant whose trained model differs from the run compared in more than its training.

    Args:
        name: The contestant's.
        own: Its run.
        config: The run compared.

    Raises:
        UsageError: If it has another tokenizer, or another architecture than its variant says.
    """
    tokenizer = read_config(own.init_from)["sha256"]["tokenizer.json"]
    if not config.tokenizer.path or read_config(config.tokenizer.path)["sha256"]["tokenizer.json"] != tokenizer:
        raise UsageError(
            f"{name}: init_from={own.init_from} has another tokenizer than the run compared, which all share; give "
            f"--tokenizer.path {own.init_from}"
        )
    said, is_so = to_dict(own.architecture), to_dict(with_architecture_of_start(own).architecture)
    if said != is_so:
        raise UsageError(
            f"{name}: init_from={own.init_from} is of another architecture ({difference(said, is_so)}); give it to the "
            "run compared too, or say it in the variant"
        )


def compare(config: RunConfig, contestants: Mapping[str, Contestant], arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Train what is missing, measure all, and leave report, table and pictures in `runs/<name>/compare` and MLflow.

    Args:
        config: The run compared.
        contestants: By name.
        arguments: Of the command, for the report.

    Returns:
        The report, as it is written to `report.json`.
    """
    folder = Path(config.runs_dir) / config.name
    with ray_session(config.scaling.max_workers, config.scaling.cpus_per_worker):
        with run_lock(folder):
            prepared = prepare_step(config, folder)
        vocab = prepared.manifest["vocab_size"]
        size = flow_parameters(config, vocab)
        budget = training_flops(config, prepared)
        say(f"compare: {sum(budget.values()) / 1e12:.1f} TFLOPs of training and {size / 1e6:.2f}M parameters each")
        runs, configs = {}, {}
        for name, contestant in contestants.items():
            own = entered(name, contestant, config, size)
            if not contestant.is_the_run_compared:
                own = with_compute(own, prepared, {stage: contestant.compute * of for stage, of in budget.items()})
                share_prepared(config, own)
            say(f"\n{contestant.label}: {own.stages.finetune.max_steps} steps of fine-tuning")
            configs[name], runs[name] = own, run(own)
    counted = {name: (result.model, [q.num_steps for q in result.quality]) for name, result in runs.items()}
    sampling = {name: own.evaluation.sampling for name, own in configs.items()}
    rows = prepared.validation(config.evaluation.max_rows, rows_that_choose(config))
    device = str(device_of(config.scaling.use_gpu))
    say("\nspeed: all contestants in turns")
    speeds = measure_speeds(counted, [row["source"] for row in rows], sampling, device)
    entries = {}
    for name, result in runs.items():
        own = configs[name]
        took = read_inputs(Path(own.runs_dir) / own.name / TRAINED) or {}
        flops = sum(training_flops(own, prepared).values())
        entries[name] = entry(
            contestants[name], own, result.model, result.quality, speeds[name], flops, took.get("seconds")
        )
    report = report_of(config, rows, prepared.tokenizer, torch.device(device), entries, arguments)
    publish(report, config, folder / "compare")
    return report


def publish(report: dict[str, Any], config: RunConfig, folder: Path) -> None:
    """Write report, table and pictures, and put them into an MLflow run of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "report.json", json.dumps(report, indent=1) + "\n")
    table = markdown(report)
    write_file(folder / "report.md", table)
    tracker = Tracker.start(dataclasses.replace(config, name=f"{config.name}-compare"), None)
    tracker.text(json.dumps(report, indent=1), "report.json")
    tracker.text(table, "report.md")
    tracker.tag("commit", report["commit"])
    for name, of in report["contestants"].items():
        for quality in of["quality"]:
            tracker.metrics({f"{name}/{quality['metric']}": quality["value"]}, step=quality["num_steps"])
    for file, figure in pictures(report).items():
        figure.savefig(folder / file, dpi=120)
        tracker.figure(figure, file)
    tracker.finish("FINISHED")
    say(f"\n{table}\ncompare: {folder}, MLflow run {tracker.run_id}")


# --- the command ------------------------------------------------------------------------------------------------------


def read_variants(path: str) -> dict[str, Contestant]:
    """Contestants of a YAML file: name -> `label`, `settings` (nested or dotted) that differ, `compute` as a multiple.

    Raises:
        UsageError: If the file is not there or holds something else.
    """
    if not Path(path).is_file():
        raise UsageError(f"--variants: no file {path!r}")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not values:
        raise UsageError(f"--variants {path}: must map names to `label`, `settings` and `compute`")
    found = {}
    for name, value in values.items():
        unknown = set(value) - set(SETTINGS_OF_A_VARIANT) if isinstance(value, dict) else {"?"}
        compute = value.get("compute", 1.0) if isinstance(value, dict) else 1.0
        positive = isinstance(compute, int | float) and compute > 0
        if unknown or not isinstance(value.get("settings", {}), dict) or not positive:
            raise UsageError(
                f"--variants {path}: {name} must have `label`, `settings` and `compute` (a multiple above 0), "
                f"got {value!r}"
            )
        settings: dict[str, Any] = {}
        for key, setting in value.get("settings", {}).items():
            for part in reversed(str(key).split(".")):
                setting = {part: setting}
            settings = merged(settings, setting)
        kept = [key for key in KEPT if key in settings]
        if kept or name in CONTESTANTS:
            raise UsageError(
                f"--variants {path}: {name} must have a name of its own and leave {', '.join(KEPT)} as they are in the "
                f"run compared; got {', '.join(kept) or 'the name of a contestant'}"
            )
        found[str(name)] = Contestant(str(value.get("label", name)), settings, float(compute))
    return found


def main(args: Sequence[str]) -> int:
    """`yan compare`."""
    parser = argparse.ArgumentParser(prog="yan compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML of the run compared; dotted overrides may follow")
    parser.add_argument(
        "--contestants", nargs="+", metavar="NAME", help=f"of {', '.join(CONTESTANTS)} and the variants; default: all"
    )
    parser.add_argument("--variants", help="YAML of more contestants: name -> label, settings")
    chosen, overrides = parser.parse_known_args(args)
    config = parse_config("compare", ["--config", chosen.config, *overrides])
    if config.baseline is not None:
        raise UsageError("--config must be of a YAN, which the contestants are made to match; leave `baseline` out")
    if config.init_from:
        raise UsageError(
            "init_from: the run compared begins with fresh weights; give the model's tokenizer as `tokenizer.path` and "
            "`init_from` to a variant (pipelines/configs/variants/pretraining.yaml)"
        )
    known = {**CONTESTANTS, **(read_variants(chosen.variants) if chosen.variants else {})}
    names = chosen.contestants or list(known)
    for name in names:
        if name not in known:
            raise UsageError(unknown_name("--contestants", name, list(known)))
    check_tracking(config)
    for name in names:  # what does not fit is found before anything is trained
        own = entered(name, known[name], config, 1_000_000)
        with torch.device("meta"):
            build_model(own.architecture, vocab_size=8, seed=0)  # it may need what is not installed
        if own.init_from:
            check_start(name, own, config)
    compare(config, {name: known[name] for name in names}, args)
    return 0

"""The main job: prepare -> autoencoder -> flow -> fine-tune -> evaluate -> register, each step done once.

A step's result carries the inputs it was made from. When they are unchanged the step is left out; when they differ, the
first differing setting is named and the step and all after it are done again.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines import world
from pipelines.card import evidence
from pipelines.cluster import progress_lines, ray_session
from pipelines.evaluation import Quality, evaluate_model
from pipelines.folders import difference, flat, read_inputs, run_lock
from pipelines.pictures import draw_paths, draw_usage, follow, straightness
from pipelines.prepare import Prepared, corpora_of, open_prepared, prepare
from pipelines.sources import files_of, find_dataset, locate
from pipelines.state import STAGES, StageJob
from pipelines.tracking import Tracker, check_tracking
from pipelines.train import train_stages
from yan_core.card import model_card
from yan_core.checkpoint import CheckpointError, from_pretrained, read_config
from yan_core.config import BaselineConfig, ModelConfig, RunConfig, from_dict, to_dict
from yan_core.files import atomic_folder, code_commit, write_file
from yan_core.tasks import get_task


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        model: Model folder.
        quality: Figures at each number of steps.
        registered: `models:/name@alias`, or empty when nothing was registered.
        tracking_uri: MLflow store.
        run_id: MLflow run.
        seconds: Time of each step that was done, in seconds.
    """

    model: Path
    quality: list[Quality]
    registered: str
    tracking_uri: str
    run_id: str
    seconds: dict[str, float]


def say(line: str) -> None:
    """Show a line of progress."""
    print(line, flush=True)


# --- what a step was made from -------------------------------------------------------------------------------------


def data_inputs(config: RunConfig) -> dict[str, Any]:
    """What prepared data depend on: settings, and size and time of local files.

    Files in the cloud, data sets on a hub and later versions of this code are taken to be unchanged.

    Raises:
        ValueError: If a data set, a task or a model to start from is not there.
    """
    data = config.data
    get_task(data.task)
    files = {}
    names = [data.dataset, *corpora_of(data)]
    for name in names:
        dataset = find_dataset(data, name)
        if dataset.format == "huggingface" and os.path.isdir(folder := locate(data, dataset.path)):
            for path in sorted(glob.glob(os.path.join(folder, "**", "*"), recursive=True)):
                files[path] = [os.path.getsize(path), os.stat(path).st_mtime_ns]
        if dataset.format in ("parquet", "jsonl", "csv", "text"):
            for where in (dataset.train, dataset.validation):
                for path in files_of(data, dataset, where) if where else []:
                    if "://" not in path:
                        files[path] = [os.path.getsize(path), os.stat(path).st_mtime_ns]
    settings = {k: v for k, v in to_dict(data).items() if k not in ("datasets", "pool_batches", "lanes")}
    used = {name: to_dict(find_dataset(data, name)) for name in names}
    simulated = any(dataset["format"].startswith("world") for dataset in used.values())
    built_in = hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest() if simulated else ""
    return {
        "data": settings,
        "datasets": used,
        "files": files,
        "tokenizer": to_dict(config.tokenizer),
        "seed": config.seed,
        "world": built_in,
        "init_from": read_config(config.init_from)["sha256"] if config.init_from else {},
    }


def with_architecture_of_start(config: RunConfig) -> RunConfig:
    """The config with the architecture of the model it starts from, which is kept; unchanged where it starts afresh."""
    if not config.init_from:
        return config
    found = read_config(config.init_from)
    if ("baseline" in found) != (config.baseline is not None):
        kind = "a baseline" if "baseline" in found else "YAN"
        raise ValueError(f"init_from={config.init_from} is {kind}, and the config's section `baseline` says otherwise")
    if config.baseline is not None:
        return dataclasses.replace(config, baseline=from_dict(BaselineConfig, found["baseline"], "baseline"))
    return dataclasses.replace(config, model=from_dict(ModelConfig, found["model"], "model"))


def stage_inputs(config: RunConfig, stage: str, before: str) -> dict[str, Any]:
    """What a stage's model depends on, the step before included."""
    values = to_dict(config)
    loss = "autoencoder_loss" if stage == "autoencoder" else "flow_loss"
    architecture = {"model": values["model"]} if config.baseline is None else {"baseline": values["baseline"]}
    inputs = {
        "stages": {stage: values["stages"][stage]},
        **architecture,
        loss: values[loss],
        "data": {name: values["data"][name] for name in ("pool_batches", "lanes", "max_target_tokens")},
        "seed": config.seed,
        "before": before,
    }
    if stage == "finetune" and config.evaluation.keep == "best":
        inputs["evaluation"] = values["evaluation"]  # it chooses the weights
    return inputs


def fingerprint(inputs: dict[str, Any]) -> str:
    """Short hash of inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def up_to_date(name: str, recorded: Path, inputs: dict[str, Any], whole: bool) -> bool:
    """Decide whether a step's result can stay, and say why."""
    old = read_inputs(recorded)
    if old == inputs and whole:
        say(f"{name}: done before, inputs unchanged")
        return True
    if old is None:
        reason = "not done yet"
    elif old != inputs:
        reason = f"inputs changed ({difference(old, inputs)})"
    else:
        reason = "its result is damaged or gone"
    say(f"{name}: {reason}")
    return False


def _data_are_whole(folder: Path) -> bool:
    try:
        return open_prepared(folder).is_whole()
    except ValueError:
        return False


def _model_is_whole(folder: Path) -> bool:
    try:
        read_config(folder)
    except CheckpointError:
        return False
    return True


# --- the steps ------------------------------------------------------------------------------------------------------


def prepare_step(config: RunConfig, folder: Path) -> Prepared:
    """Prepare the data unless they are there and up to date."""
    inputs = data_inputs(config)
    recorded = folder / "prepared.inputs.json"
    if up_to_date("prepare", recorded, inputs, _data_are_whole(folder / "prepared")):
        return open_prepared(folder / "prepared")
    recorded.unlink(missing_ok=True)
    prepared = prepare(config, folder / "prepared", say)
    write_file(recorded, json.dumps(inputs, indent=2))
    rows, bad = prepared.manifest["rows"], sum(prepared.manifest["bad_rows"].values())
    say(
        f"  {rows['finetune']} training rows, {rows['validation']} validation rows, {rows['flow']} corpus windows; "
        f"vocabulary {prepared.manifest['vocab_size']}; {bad} bad rows set aside; "
        f"{prepared.manifest['sources_cut']} sources cut to {config.data.max_source_tokens} tokens"
    )
    return prepared


def record_data(config: RunConfig, prepared: Prepared, tracker: Tracker) -> None:
    """What was prepared, and what was left out and why, in MLflow."""
    manifest = prepared.manifest
    counts = {f"data/rows/{part}": rows for part, rows in manifest["rows"].items()}
    counts |= {f"data/dropped/{reason}": rows for reason, rows in manifest["dropped"].items()}
    counts |= {f"data/filtered/{split}": rows for split, rows in manifest.get("filtered", {}).items()}
    counts |= {f"data/bad_rows/{split}": rows for split, rows in manifest["bad_rows"].items()}
    counts |= {"data/tokens": manifest["tokens"], "data/unreadable_files": manifest["unreadable_files"]}
    tracker.metrics(counts, step=0)
    sums = "".join(file["sha256"] for file in manifest["files"].values())
    for name in (config.data.dataset, *corpora_of(config.data)):
        dataset = find_dataset(config.data, name)
        source = dataset.path or (locate(config.data, dataset.train) if dataset.train else f"built-in {name}")
        tracker.dataset(name, hashlib.sha256(sums.encode()).hexdigest()[:12], source, manifest["rows"])


TRAINED = "trained.json"
"""In a run's folder: how long its training took in all, however often it was interrupted."""


def _add_seconds(file: Path, of: str, seconds: float) -> None:
    """Add to the seconds that a training, known by its fingerprint, has taken."""
    before = read_inputs(file) or {}
    earlier = before["seconds"] if before.get("fingerprint") == of else 0.0
    write_file(file, json.dumps({"fingerprint": of, "seconds": earlier + seconds}))


def train_steps(
    config: RunConfig, folder: Path, prepared: Prepared, tracker: Tracker | None, seconds: dict[str, float]
) -> Path:
    """Train the stages that are not up to date; returns the last stage's model folder."""
    before = fingerprint(data_inputs(config))
    model = str(Path(config.init_from).resolve()) if config.init_from else ""
    jobs = []
    for stage in STAGES:
        if getattr(config.stages, stage).max_steps == 0:
            say(f"{stage}: left out (stages.{stage}.max_steps=0)")
            continue
        inputs = stage_inputs(config, stage, before)
        before = fingerprint(inputs)
        output, record = (folder / "stages" / stage).resolve(), (folder / "stages" / f"{stage}.inputs.json").resolve()
        if not up_to_date(stage, record, inputs, _model_is_whole(output)):
            record.unlink(missing_ok=True)
            jobs.append(StageJob(stage, inputs, before, model, str(output), str(record)))
        model = str(output)
    if before == fingerprint(data_inputs(config)):
        raise ValueError("every stage has max_steps=0: nothing to train")
    if jobs:
        started = time.perf_counter()
        say(f"training: {config.scaling.max_workers} workers start")
        try:
            with progress_lines() as board:
                train_stages(config, jobs, prepared, folder / "checkpoints", board, tracker)
        finally:
            seconds["training"] = time.perf_counter() - started
            _add_seconds(folder / TRAINED, jobs[-1].fingerprint, seconds["training"])
        say(f"training: done in {seconds['training']:.0f} s")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Path(model)


def rows_that_choose(config: RunConfig) -> int:
    """Validation rows that the weights are chosen by, which would flatter them: the evaluation leaves them out."""
    return config.evaluation.rows_while_training if config.evaluation.keep == "best" else 0


def evaluate_step(config: RunConfig, prepared: Prepared, model: Path, tracker: Tracker) -> list[Quality]:
    """Measure the model at each number of steps and record figures, examples and a picture."""
    how = config.evaluation
    rows = prepared.validation(how.max_rows, rows_that_choose(config))
    say(f"evaluate: {len(rows)} validation rows, own length")

    def show(q: Quality) -> None:
        kinds = "".join(f"  {k} {v:.3f}" for k, v in q.by_kind.items())
        low, high = q.intervals[q.metric]
        oracle = f" [{low:.3f}, {high:.3f}]  (told the length: {q.oracle_value:.4f})"
        say(
            f"  {q.num_steps} steps: {q.metric} {q.value:.4f}{oracle}{kinds}  ({q.latency_ms_batch_1:.1f} ms a request)"
        )

    device = "cuda" if config.scaling.use_gpu and torch.cuda.is_available() else "cpu"
    quality = evaluate_model(model, rows, how, device, on_done=show)
    for q in quality:
        named = {f"eval/{name}": value for name, value in q.metrics.items()}
        named["eval/latency_ms"] = q.latency_ms_batch_1
        tracker.metrics(named | {f"eval/{q.metric}/{k}": v for k, v in q.by_kind.items()}, step=q.num_steps)
    middle = quality[len(quality) // 2]
    tracker.table([{**e, "num_steps": str(middle.num_steps)} for e in middle.examples], "examples.json")
    tracker.quality_picture({q.num_steps: q.value for q in quality}, middle.metric, config.name)
    if config.baseline is None:
        journey = follow(model, rows[:64])
        tracker.figure(draw_usage(journey), "experts_by_position.png")
        tracker.figure(draw_paths(journey), "paths.png")
        tracker.metrics({"eval/straightness": straightness(journey)}, step=0)
    return quality


def run(config: RunConfig, publish: bool = True, fresh: bool = False) -> RunResult:
    """Do everything from raw rows to a registered model; go on where an interrupted run stopped.

    Args:
        config: The run.
        publish: Whether to evaluate and register the result too.
        fresh: Whether to forget what an earlier run left in the folder.

    Raises:
        ValueError: If the config or the data cannot be used.
        TrainingFailed: If a stage gave up.
    """
    folder = Path(config.runs_dir) / config.name
    seconds: dict[str, float] = {}
    config = with_architecture_of_start(config)
    final = fingerprint(_final_inputs(config))  # finds most mistakes of a config before anything starts
    check_tracking(config)
    with run_lock(folder, fresh), ray_session(config.scaling.max_workers, config.scaling.cpus_per_worker):
        started = time.perf_counter()
        prepared = prepare_step(config, folder)
        seconds["prepare"] = time.perf_counter() - started
        choosing, rows = rows_that_choose(config), prepared.manifest["rows"]["validation"]
        if choosing >= rows:
            raise ValueError(
                f"evaluation.keep=best chooses by the first {choosing} validation rows (rows_while_training) "
                f"and there are {rows}: none would be left to evaluate; lower that number or add rows"
            )

        state = read_inputs(folder / "run.json") or {}
        # Another config is another MLflow run: its parameters are written once.
        tracker = Tracker.start(config, state.get("run_id") if state.get("final") == final else None)
        say(f"MLflow run: {tracker.run_id} at {tracker.uri}")
        state = {"run_id": tracker.run_id, "final": final, "finished": False}
        write_file(folder / "run.json", json.dumps(state))
        resolved = json.dumps(to_dict(config), indent=2)
        write_file(folder / "config.json", resolved)
        tracker.text(resolved, "config.json")
        tracker.params(flat(to_dict(config)))
        tracker.tag("commit", code_commit())
        record_data(config, prepared, tracker)
        monitor = tracker.system_metrics()
        try:
            last = train_steps(config, folder, prepared, tracker, seconds)
            if publish:
                result = _publish(config, folder, prepared, last, tracker, final, seconds)
            else:
                result = RunResult(last, [], "", tracker.uri, tracker.run_id, seconds)
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
            raise
        finally:
            monitor.finish()
        write_file(folder / "run.json", json.dumps({**state, "finished": publish}))
        tracker.finish("FINISHED")
    return result


def _final_inputs(config: RunConfig) -> dict[str, Any]:
    before = fingerprint(data_inputs(config))
    for stage in STAGES:
        if getattr(config.stages, stage).max_steps:
            before = fingerprint(stage_inputs(config, stage, before))
    return {"model": before, "evaluation": to_dict(config.evaluation), "tracking": to_dict(config.tracking)}


def _publish(
    config: RunConfig,
    folder: Path,
    prepared: Prepared,
    last: Path,
    tracker: Tracker,
    final: str,
    seconds: dict[str, float],
) -> RunResult:
    """Evaluate the last stage's model, put it at runs/<name>/model and register it, unless that was done."""
    model, recorded = folder / "model", folder / "model.inputs.json"
    done = read_inputs(recorded)
    started = time.perf_counter()
    if done is not None and done["final"] == final and _model_is_whole(model):
        say("evaluate, register: done before, inputs unchanged")
        quality, registered = [Quality(**q) for q in done["quality"]], done["registered"]
    else:
        recorded.unlink(missing_ok=True)
        quality = evaluate_step(config, prepared, last, tracker)
        with atomic_folder(model) as scratch:
            shutil.copytree(last, scratch, dirs_exist_ok=True)
            weights, tokenizer, _ = from_pretrained(scratch)
            known = evidence(config, prepared.manifest, quality)
            card = model_card(config.name, read_config(scratch), tokenizer, weights.num_parameters(), known)
            (scratch / "README.md").write_text(card, encoding="utf-8")
        name = config.tracking.model_name or f"yan-{config.name}"
        version = tracker.register(model, name, config.tracking.alias)
        registered = f"models:/{name}@{config.tracking.alias}"
        say(f"register: {registered} is version {version}")
        values = {"final": final, "registered": registered, "quality": [vars(q) for q in quality]}
        write_file(recorded, json.dumps(values, indent=2))
        seconds["evaluate"] = time.perf_counter() - started
    return RunResult(model, quality, registered, tracker.uri, tracker.run_id, seconds)

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

from pipelines import world
from pipelines.cluster import progress_lines, ray_session
from pipelines.evaluation import Quality, check_models
from pipelines.folders import difference, read_inputs, recorded, run_lock
from pipelines.listing import files_of, identities, locate
from pipelines.prepare import Prepared, corpora_of, given_tokenizer, open_prepared, prepare
from pipelines.progress import say
from pipelines.publish import (
    begin_tracking,
    end_tracking,
    measure,
    record_start,
    register,
    rows_that_choose,
    save_with_card,
    send_unsent,
)
from pipelines.sources import find_dataset
from pipelines.state import STAGES, StageJob, check_stages
from pipelines.tracking import Tracker, check_tracking
from pipelines.train import train_stages
from yan_core.checkpoint import CheckpointError, read_config
from yan_core.config import BaselineConfig, ModelConfig, RunConfig, from_dict, to_dict
from yan_core.files import write_file
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


# --- what a step was made from -------------------------------------------------------------------------------------


def data_inputs(config: RunConfig) -> dict[str, Any]:
    """What prepared data depend on: settings, and local files as `identities` knows them.

    Files in the cloud, data sets on a hub and later versions of this code are taken to be unchanged.

    Raises:
        ValueError: If a data set, a task or a model to start from is not there.
    """
    data = config.data
    get_task(data.task)
    files = list[str]()
    names = [data.dataset, *corpora_of(data)]
    for name in names:
        dataset = find_dataset(data, name)
        if dataset.format == "huggingface" and os.path.isdir(folder := locate(data, dataset.path)):
            files += filter(os.path.isfile, glob.glob(os.path.join(folder, "**", "*"), recursive=True))
        if dataset.format in ("parquet", "jsonl", "csv", "text"):
            for where in (dataset.train, dataset.validation):
                files += [path for path in (files_of(data, dataset, where) if where else []) if "://" not in path]
    settings = {k: v for k, v in to_dict(data).items() if k not in ("datasets", "pool_batches", "lanes")}
    used = {name: to_dict(find_dataset(data, name)) for name in names}
    simulated = any(dataset["format"].startswith("world") for dataset in used.values())
    built_in = hashlib.sha256(Path(world.__file__).read_bytes()).hexdigest() if simulated else ""
    return {
        "data": settings,
        "datasets": used,
        "files": identities(sorted(files)),
        "tokenizer": {key: value for key, value in to_dict(config.tokenizer).items() if key != "path"},
        "seed": config.seed,
        "world": built_in,
        "init_from": given_tokenizer(config),
    }


def _start_of_training(config: RunConfig) -> str:
    """Fingerprint of the data, and of the model to start from, which is among them unless the tokenizer is named."""
    both = config.init_from and config.tokenizer.path
    return fingerprint(data_inputs(config) | ({"start": read_config(config.init_from)["sha256"]} if both else {}))


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
        inputs["evaluation"] = {name: values["evaluation"][name] for name in CHOOSING}
    return inputs


def fingerprint(inputs: dict[str, Any]) -> str:
    """Short hash of inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def up_to_date(name: str, record: Path, inputs: dict[str, Any], whole: bool) -> bool:
    """Decide whether a step's result can stay, and say why."""
    old = read_inputs(record)
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
    record = folder / "prepared.inputs.json"
    if up_to_date("prepare", record, inputs, _data_are_whole(folder / "prepared")):
        return open_prepared(folder / "prepared")
    record.unlink(missing_ok=True)
    prepared = prepare(config, folder / "prepared", say)
    write_file(record, json.dumps(inputs, indent=2))
    rows, bad = prepared.manifest["rows"], sum(prepared.manifest["bad_rows"].values())
    say(
        f"  {rows['finetune']} training rows, {rows['validation']} validation rows, {rows['flow']} corpus windows; "
        f"vocabulary {prepared.manifest['vocab_size']}; {bad} bad rows set aside; "
        f"{prepared.manifest['sources_cut']} sources cut to {config.data.max_source_tokens} tokens"
    )
    return prepared


CHOOSING = ("num_steps", "batch_size", "sampling", "every_steps", "rows_while_training", "keep")
"""What the choice of the best weights depends on, of the evaluation's settings."""
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
    before = _start_of_training(config)
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
    if jobs:
        started = time.perf_counter()
        say(f"training: workers start: {config.scaling.max_workers}")
        try:
            with progress_lines() as board:
                train_stages(config, jobs, prepared, folder / "checkpoints", board, tracker)
        finally:
            seconds["training"] = time.perf_counter() - started
            _add_seconds(folder / TRAINED, jobs[-1].fingerprint, seconds["training"])
        say(f"training: done in {seconds['training']:.0f} s")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return Path(model)


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
    check_stages(config)
    final = fingerprint(_final_inputs(config))  # finds most mistakes of a config before anything starts
    if fresh or _known_run(folder, final) is None:
        check_models(config.evaluation)
        check_tracking(config)  # a run that is known to MLflow goes on without it
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

        # Another config is another MLflow run: its parameters are written once.
        tracker = begin_tracking(config, _known_run(folder, final))
        state = {"run_id": tracker.run_id, "final": final, "finished": False}
        write_file(folder / "run.json", json.dumps(state))
        write_file(folder / "config.json", json.dumps(recorded(config), indent=2))
        monitor = record_start(config, prepared, tracker)
        try:
            last = train_steps(config, folder, prepared, tracker, seconds)
            send_unsent(tracker, folder)
            model, quality, registered = last, list[Quality](), ""
            if publish:
                started = time.perf_counter()
                model, quality, registered = _publish(config, folder, prepared, last, tracker, final)
                seconds["evaluate"] = time.perf_counter() - started
            write_file(folder / "run.json", json.dumps({**state, "finished": publish}))
        except BaseException as error:
            end_tracking(tracker, "KILLED" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "FAILED")
            raise
        finally:
            if monitor is not None:
                monitor.finish()
        end_tracking(tracker, "FINISHED")
    return RunResult(model, quality, registered, tracker.uri, tracker.run_id, seconds)


def _known_run(folder: Path, final: str) -> str | None:
    """The MLflow run of an earlier call with the same config."""
    state = read_inputs(folder / "run.json") or {}
    return state.get("run_id") if state.get("final") == final else None


def _final_inputs(config: RunConfig) -> dict[str, Any]:
    before = _start_of_training(config)
    for stage in STAGES:
        if getattr(config.stages, stage).max_steps:
            before = fingerprint(stage_inputs(config, stage, before))
    return {"model": before, "evaluation": to_dict(config.evaluation), "tracking": to_dict(config.tracking)}


def _publish(
    config: RunConfig, folder: Path, prepared: Prepared, last: Path, tracker: Tracker, final: str
) -> tuple[Path, list[Quality], str]:
    """Evaluate the last stage's model, put it at runs/<name>/model and register it, each unless that was done.

    Returns:
        The model's folder, its figures, and its name in the registry.
    """
    model, record = folder / "model", folder / "model.inputs.json"
    done = read_inputs(record)
    if done is None or done["final"] != final or not _model_is_whole(model):
        record.unlink(missing_ok=True)
        quality = measure(config, prepared, last)
        save_with_card(config, prepared, last, model, quality)
        done = {"final": final, "registered": "", "quality": [vars(q) for q in quality]}
        write_file(record, json.dumps(done, indent=2))
    elif done["registered"]:
        say("evaluate, register: done before, inputs unchanged")
    else:
        say("evaluate: done before, inputs unchanged")
    quality = [Quality(**q) for q in done["quality"]]
    if not done["registered"]:
        done["registered"] = register(config, prepared, model, quality, tracker)
        write_file(record, json.dumps(done, indent=2))
    return model, quality, done["registered"]

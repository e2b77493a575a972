"""What MLflow is told of a run: where it begins, what its data and its model are, and the model itself.

MLflow may be away. A run that it knows goes on without it; what a training measures waits in metrics_buffer.py; and
where it does not come back for the end, the model is in its folder and the same command tells it then.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.util
import torch

from pipelines.card import evidence
from pipelines.cluster import progress_lines
from pipelines.evaluation import Quality, evaluate_model
from pipelines.folders import flat, recorded
from pipelines.listing import locate, reason_of
from pipelines.metrics_buffer import UNSENT, MetricsBuffer
from pipelines.pictures import draw_paths, draw_usage, follow, straightness
from pipelines.prepare import Prepared, corpora_of, open_prepared
from pipelines.progress import say
from pipelines.sources import find_dataset
from pipelines.tracking import STORE_ERRORS, Tracker, TrackingError, patiently, tracking_uri
from yan_core.card import model_card
from yan_core.checkpoint import from_pretrained, read_config
from yan_core.config import RunConfig
from yan_core.files import atomic_folder, code_commit, without_password


def begin_tracking(config: RunConfig, known: str | None) -> Tracker:
    """The MLflow run of a training; one that was begun earlier goes on though MLflow does not answer.

    Args:
        config: The run.
        known: Id of the MLflow run of an earlier call with the same config.

    Raises:
        TrackingError: If there is none yet and MLflow does not answer.
    """
    try:
        tracker = Tracker.start(config, known)
    except STORE_ERRORS as error:
        uri = tracking_uri(config)
        silent = f"MLflow at {without_password(uri)} does not answer ({reason_of(error)})"
        if known is None:
            raise TrackingError(silent) from error
        say(f"{silent}: the run goes on, and it is told later")
        return Tracker(uri, known)
    say(f"MLflow run: {tracker.run_id} at {without_password(tracker.uri)}")
    return tracker


def record_start(config: RunConfig, prepared: Prepared, tracker: Tracker) -> Any:
    """Record settings, code and data; gives a monitor of this machine's load, or None where MLflow does not answer."""
    try:
        settings = recorded(config)
        tracker.params(flat(settings))
        tracker.tag("commit", code_commit())
        _record_data(config, prepared, tracker)
        tracker.text(json.dumps(settings, indent=2), "config.json")
        return tracker.system_metrics()
    except STORE_ERRORS as error:
        say(f"MLflow: {reason_of(error)}; the run goes on, and the same command records its settings")
        return None


def send_unsent(tracker: Tracker, folder: Path) -> None:
    """Send what earlier trainings of a run's folder could not, each to its own MLflow run, if MLflow answers."""
    for file in sorted(folder.glob(UNSENT.format("*"))):
        run_id = file.name.removeprefix(UNSENT.partition("{")[0]).removesuffix(".jsonl")
        to = tracker if run_id == tracker.run_id else Tracker(tracker.uri, run_id)
        left = MetricsBuffer(lambda to=to: to, file).close()
        say(f"MLflow: {left} values of the training are still in {file}" if left else "MLflow: sent the rest")


def end_tracking(tracker: Tracker, status: str) -> None:
    """Mark the run `FINISHED`, `FAILED` or `KILLED`, if MLflow answers."""
    try:
        tracker.finish(status)
    except STORE_ERRORS as error:
        say(f"MLflow: {reason_of(error)}; there the run is not marked {status}")


def _record_data(config: RunConfig, prepared: Prepared, tracker: Tracker) -> None:
    """What was prepared, and what was left out and why."""
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


def rows_that_choose(config: RunConfig) -> int:
    """Validation rows that the weights are chosen by, which would flatter them: the evaluation leaves them out."""
    return config.evaluation.rows_while_training if config.evaluation.keep == "best" else 0


def measure(config: RunConfig, prepared: Prepared, model: Path) -> list[Quality]:
    """Quality of a model at each number of steps, shown as it comes.

    Where the workers have GPUs and this process, on a cluster's head, has none, it is measured on one of theirs.
    """
    if not config.scaling.use_gpu or torch.cuda.is_available():
        return _measured(config, prepared.folder, model, say)
    needs = {"num_gpus": 1, "num_cpus": config.scaling.cpus_per_worker}
    say("evaluate: on a node of the workers', once it has a GPU free")
    with progress_lines() as board:
        task: Any = ray.remote(**needs)(_measured)
        return ray.get(task.remote(config, prepared.folder.resolve(), model.resolve(), board))


def _measured(config: RunConfig, prepared: Path, model: Path, to: Any) -> list[Quality]:
    """As `measure`, in this process; `to` takes lines, a function or a `ProgressBoard`."""
    tell = to if callable(to) else to.add.remote
    how = config.evaluation
    rows = open_prepared(prepared).validation(how.max_rows, rows_that_choose(config))
    device = "cuda" if config.scaling.use_gpu and torch.cuda.is_available() else "cpu"
    where = f", on {device} of {ray.util.get_node_ip_address()}" if config.scaling.use_gpu else ""
    tell(f"evaluate: {len(rows)} validation rows, own length{where}")

    def show(q: Quality) -> None:
        kinds = "".join(f"  {k} {v:.3f}" for k, v in q.by_kind.items())
        low, high = q.intervals[q.metric]
        oracle = f" [{low:.3f}, {high:.3f}]  (told the length: {q.oracle_value:.4f})"
        tell(
            f"  {q.num_steps} steps: {q.metric} {q.value:.4f}{oracle}{kinds}  ({q.latency_ms_batch_1:.1f} ms a request)"
        )

    return evaluate_model(model, rows, how, device, on_done=show)


def save_with_card(config: RunConfig, prepared: Prepared, trained: Path, model: Path, quality: list[Quality]) -> None:
    """Copy a trained model to the folder `model`, with a card that tells its data and figures."""
    with atomic_folder(model) as scratch:
        shutil.copytree(trained, scratch, dirs_exist_ok=True)
        weights, tokenizer, _ = from_pretrained(scratch)
        known = evidence(config, prepared.manifest, quality)
        card = model_card(config.name, read_config(scratch), tokenizer, weights.num_parameters(), known)
        (scratch / "README.md").write_text(card, encoding="utf-8")


def register(config: RunConfig, prepared: Prepared, model: Path, quality: list[Quality], tracker: Tracker) -> str:
    """Record figures, examples and pictures, and register the model; gives `models:/name@alias`.

    Raises:
        TrackingError: If MLflow does not answer for a while, or refuses.
    """
    name = config.tracking.model_name or f"yan-{config.name}"
    steps: list[Callable[[], Any]] = []
    for q in quality:
        named = {f"eval/{metric}": value for metric, value in q.metrics.items()}
        named |= {"eval/latency_ms": q.latency_ms_batch_1, **{f"eval/{q.metric}/{k}": v for k, v in q.by_kind.items()}}
        steps.append(lambda named=named, step=q.num_steps: tracker.metrics(named, step=step))
    middle = quality[len(quality) // 2]
    examples = [{**e, "num_steps": str(middle.num_steps)} for e in middle.examples]
    steps.append(lambda: tracker.table(examples, "examples.json"))
    steps.append(lambda: tracker.quality_picture({q.num_steps: q.value for q in quality}, middle.metric, config.name))
    if config.baseline is None:
        journey = follow(model, prepared.validation(64, rows_that_choose(config)))
        steps.append(lambda: tracker.figure(draw_usage(journey), "experts_by_position.png"))
        steps.append(lambda: tracker.figure(draw_paths(journey), "paths.png"))
        steps.append(lambda: tracker.metrics({"eval/straightness": straightness(journey)}, step=0))
    try:
        for step in steps:
            patiently(step)
        version = patiently(lambda: tracker.register(model, name, config.tracking.alias))
    except STORE_ERRORS as error:
        raise TrackingError(
            f"MLflow at {without_password(tracker.uri)} does not take the result ({reason_of(error)}): the model is "
            f"whole in {model}; the same command sends its figures and registers it when MLflow answers"
        ) from error
    registered = f"models:/{name}@{config.tracking.alias}"
    say(f"register: {registered} is version {version}")
    return registered

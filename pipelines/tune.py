"""`yan tune`: a search over settings of a run with Ray Tune. Trials that fall behind are ended early (ASHA).

The data are prepared once; each trial trains all stages in a process of its own, and is measured on validation rows
while it fine-tunes. Source of the scheduler: Li et al. 2018, arXiv:1810.05934.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipelines.arguments import UsageError, parse_config
from pipelines.cluster import quiet_ray, ray_session
from pipelines.evaluation import answer_rows, score_rows
from pipelines.folders import flat, run_lock
from pipelines.plain import device_of, plain_state, train_on
from pipelines.prepare import Prepared, open_prepared
from pipelines.progress import say
from pipelines.run import prepare_step, with_architecture_of_start
from pipelines.state import STAGES, StageState, model_details
from pipelines.tracking import STORE_ERRORS, Tracker, check_tracking
from yan_core.checkpoint import from_pretrained
from yan_core.config import RunConfig, from_dict, to_dict, unknown_name
from yan_core.files import write_file
from yan_core.generator import TextGenerator
from yan_core.model import build_model
from yan_core.tasks import get_task


def _value(text: str) -> Any:
    """What a text means in JSON, where 1e-2 is a number as it is not in YAML; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


KINDS = {
    "uniform": lambda low, high: tune.uniform(float(low), float(high)),
    "loguniform": lambda low, high: tune.loguniform(float(low), float(high)),
    "randint": lambda low, high: tune.randint(int(low), int(high)),
    "choice": lambda *values: tune.choice([_value(value) for value in values]),
}
"""How a setting is drawn."""


def parse_search(texts: Sequence[str], config: RunConfig) -> dict[str, Any]:
    """`key=kind:a,b` -> what Ray Tune draws from, by dotted key.

    Raises:
        UsageError: If one cannot be read, or names what the prepared data depend on.
    """
    space = {}
    for text in texts:
        key, _, how = text.partition("=")
        kind, _, values = how.partition(":")
        if kind not in KINDS or not values:
            raise UsageError(f"--search {text!r} must be KEY=KIND:VALUES with KIND one of {', '.join(KINDS)}")
        known = list(flat(to_dict(config)))
        if key not in known:
            raise UsageError(unknown_name("--search", key, known))
        if key.split(".")[0] not in ("model", "autoencoder_loss", "flow_loss", "stages"):
            raise UsageError(f"--search {key}: only model, losses and stages can be searched; data are prepared once")
        try:
            space[key] = KINDS[kind](*values.split(","))
        except (TypeError, ValueError) as error:
            raise UsageError(f"--search {text!r}: {error}") from error
    return space


def with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The config with some settings by dotted key."""
    values = to_dict(config)
    for key, value in settings.items():
        *path, name = key.split(".")
        section = values
        for part in path:
            section = section[part]
        section[name] = value
    return from_dict(RunConfig, values)


def trial(settings: dict[str, Any], config: dict[str, Any], prepared: str, every: int, parent: tuple[str, str]) -> None:
    """Train with some settings and report quality every so many steps of the fine-tuning."""
    quiet_ray()
    chosen = with_settings(from_dict(RunConfig, config), settings)
    data = open_prepared(Path(prepared))
    name = tune.get_context().get_trial_id()
    tracker = Tracker.child(*parent, name)
    with suppress(*STORE_ERRORS):  # MLflow may be away for a while: the search is Tune's
        tracker.params(settings)
    device = device_of(chosen.scaling.use_gpu)
    if chosen.init_from:
        model = from_pretrained(chosen.init_from)[0].to(device)
    else:
        model = build_model(chosen.architecture, data.tokenizer.vocab_size, chosen.seed).to(device)
    # Of the weights that a stage would leave, which may be averages over its steps.
    generator = TextGenerator(copy.deepcopy(model).eval(), data.tokenizer, model_details(chosen))
    rows, metric = data.validation(chosen.evaluation.max_rows), get_task(chosen.data.task).metric
    status = "KILLED"  # by the scheduler, unless it comes to its end
    try:
        for stage in STAGES:
            last = getattr(chosen.stages, stage).max_steps
            if not last:
                continue
            state = plain_state(model, chosen, data, stage)

            def after(step: int, metrics: dict[str, Any], state: StageState = state, last: int = last) -> bool:
                if state.job.stage == "finetune" and (step % every == 0 or step == last):
                    generator.model.load_state_dict(state.result())
                    answers = [answer_rows(generator, rows, n, chosen.evaluation) for n in chosen.evaluation.num_steps]
                    quality = fmean(score_rows(generator, metric, rows, each) for each in answers)
                    with suppress(*STORE_ERRORS):
                        tracker.metrics({"tune/quality": quality, "tune/loss": float(metrics["loss"])}, step)
                    tune.report({"quality": quality, "step": step})
                return True

            train_on(state, data.batches(chosen, stage), after)
            model.load_state_dict(state.result())
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        with suppress(*STORE_ERRORS):
            tracker.finish(status)


def search(
    config: RunConfig, space: dict[str, Any], folder: Path, prepared: Prepared, tracker: Tracker, chosen: Any
) -> tune.ResultGrid:
    """Run the trials."""
    last = config.stages.finetune.max_steps
    every = max(1, last // chosen.reports)
    resources = {"CPU": config.scaling.cpus_per_worker, **({"GPU": 1} if config.scaling.use_gpu else {})}
    fixed = tune.with_parameters(
        trial,
        config=to_dict(config),
        prepared=str(prepared.folder.resolve()),
        every=every,
        parent=(tracker.uri, tracker.run_id),
    )
    tuner = tune.Tuner(
        tune.with_resources(fixed, resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="quality",
            mode="max",
            num_samples=chosen.trials,
            max_concurrent_trials=chosen.at_once or None,
            scheduler=ASHAScheduler(
                time_attr="step", max_t=last, grace_period=every, reduction_factor=chosen.reduction
            ),
        ),
        run_config=tune.RunConfig(name="trials", storage_path=str(folder.resolve()), verbose=0),
    )
    return tuner.fit()


def record_best(grid: tune.ResultGrid, file: Path, tracker: Tracker) -> dict[str, Any]:
    """Show the ten best trials and record the best one; gives its settings.

    Raises:
        UsageError: If no trial came to a result.
    """
    found = [
        (r.metrics["quality"], r.metrics["step"], r.config or {}) for r in grid if r.metrics and "quality" in r.metrics
    ]
    if not found:
        raise UsageError(f"no trial came to a result; the first error: {next(iter(grid.errors), 'none')}")
    found.sort(key=lambda result: -result[0])
    for quality, step, settings in found[:10]:
        shown = "  ".join(f"{key}={value}" for key, value in settings.items())
        say(f"  quality {quality:.4f} at step {step:>6}  {shown}")
    quality, _, best = found[0]
    write_file(file, json.dumps({"settings": best, "quality": quality}))
    tracker.metrics({"tune/best_quality": quality}, step=0)
    tracker.params({f"best.{key}": value for key, value in best.items()})
    return best


def main(args: Sequence[str]) -> int:
    """`yan tune`."""
    parser = argparse.ArgumentParser(prog="yan tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML of the run")
    parser.add_argument(
        "--search",
        action="append",
        required=True,
        metavar="KEY=KIND:VALUES",
        help="what to draw, such as stages.finetune.optim.lr=loguniform:1e-4,1e-2 or model.dropout=choice:0,0.1",
    )
    parser.add_argument("--trials", type=int, default=16, help="how many settings are drawn")
    parser.add_argument("--at-once", type=int, default=0, help="most trials at a time; 0: as many as fit the cluster")
    parser.add_argument("--reports", type=int, default=8, help="how often a trial is measured, and may be ended")
    parser.add_argument("--reduction", type=float, default=3.0, help="of so many trials one goes on at each rung")
    chosen, overrides = parser.parse_known_args(args)
    if min(chosen.trials, chosen.reports) < 1 or chosen.reduction <= 1:
        raise UsageError("--trials and --reports must be >= 1 and --reduction > 1")
    config = with_architecture_of_start(parse_config("tune", ["--config", chosen.config, *overrides]))
    space = parse_search(chosen.search, config)
    if config.init_from and any(key.startswith(("model.", "baseline.")) for key in space):
        raise UsageError(f"init_from={config.init_from} says what the model is: nothing of `model` can be searched")
    check_tracking(config)
    folder = Path(config.runs_dir) / config.name
    with run_lock(folder), ray_session(config.scaling.max_workers, config.scaling.cpus_per_worker):
        prepared = prepare_step(config, folder)
        if config.init_from:  # a trial has a working directory of its own
            config = dataclasses.replace(config, init_from=str(Path(config.init_from).resolve()))
        tracker = Tracker.start(config, None)
        tracker.params({"search": " ".join(chosen.search), "trials": chosen.trials})
        say(f"tune: {chosen.trials} trials; each is a run below {tracker.run_id} in MLflow")
        status = "FAILED"
        try:
            grid = search(config, space, folder / "tune", prepared, tracker, chosen)
            best = record_best(grid, folder / "tune" / "best.json", tracker)
            status = "FINISHED"
        finally:
            tracker.end_children()  # a trial that the scheduler ends cannot say so itself
            tracker.finish(status)
    options = " ".join(f"--{key} {value}" for key, value in best.items())
    say(f"the best of them: yan run --config {chosen.config} {options}")
    return 0

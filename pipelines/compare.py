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
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

import yan_core
from pipelines.benchmarks.machine import describe
from pipelines.cli import UsageError, parse_config
from pipelines.cluster import ray_session
from pipelines.compute import step_flops, training_flops
from pipelines.folders import read_inputs, run_lock
from pipelines.plain import device_of
from pipelines.prepare import Prepared
from pipelines.results import markdown, pictures
from pipelines.run import TRAINED, RunResult, prepare_step, rows_that_choose, run, say
from pipelines.speed import measure_speed
from pipelines.state import STAGES
from pipelines.tracking import Tracker, check_tracking
from yan_core.config import BaselineConfig, RunConfig, SamplingConfig, from_dict, to_dict, unknown_name
from yan_core.files import atomic_folder, code_commit, write_file
from yan_core.model import build_model

SETTINGS_OF_A_VARIANT = ("label", "settings")

KEPT = ("data", "tokenizer", "seed", "name", "runs_dir", "init_from")
"""What all contestants have in common."""


@dataclass(frozen=True)
class Contestant:
    """One of the models compared.

    Attributes:
        label: What it is called in tables and pictures.
        settings: What its run has other than the run compared, nested as in a YAML file.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The baseline's family; empty: it is a YAN."""
        return (self.settings.get("baseline") or {}).get("family", "")


CONTESTANTS: dict[str, Contestant] = {
    "yan": Contestant("YAN"),
    "plain": Contestant("YAN, one expert (plain flow matching)", {"model": {"num_experts": 1, "top_k": 0}}),
    "ar": Contestant("autoregressive decoder (GPT-2)", {"baseline": {"family": "ar"}}),
    "encoder_decoder": Contestant("encoder-decoder (BART)", {"baseline": {"family": "encoder_decoder"}}),
    "masked_diffusion": Contestant("masked diffusion (LLaDA, MDLM)", {"baseline": {"family": "masked_diffusion"}}),
}
"""Contestants that are always known; a file of variants adds more."""


# --- equal means ------------------------------------------------------------------------------------------------------


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with nested changes."""
    out = dict(values)
    for key, value in changes.items():
        inner = out.get(key)
        both = isinstance(value, Mapping) and isinstance(inner, Mapping)
        out[key] = merged(inner, value) if both and isinstance(inner, Mapping) else value
    return out


def flow_parameters(config: RunConfig, vocab_size: int) -> int:
    """Parameters of the run's model, token embeddings, positions and vocabulary head left out."""
    with torch.device("meta"):
        return build_model(config.architecture, vocab_size, 0).num_parameters(embeddings=False)


def entered(name: str, contestant: Contestant, config: RunConfig, size: int) -> RunConfig:
    """The contestant's run, with as many steps as the run compared has.

    Args:
        name: The contestant's.
        contestant: What it is.
        config: The run compared.
        size: Parameters for a baseline.
    """
    if not contestant.settings:
        return config
    changes = merged(contestant.settings, {"name": f"{config.name}-{name}", "tracking": {"model_name": ""}})
    if contestant.family:
        longest = config.data.max_source_tokens + config.data.max_target_tokens + 1
        depth = config.model.source_encoder.num_blocks + config.model.flow_blocks
        shape = BaselineConfig.of_size(
            size,
            contestant.family,  # type: ignore[arg-type]  # checked by `from_dict` below
            # As deep as YAN's way from the source to an answer: one block alone cannot follow a story.
            least_blocks=depth // 2 if contestant.family == "encoder_decoder" else depth,
            dropout=config.model.dropout,
            max_positions=max(longest, 2 * config.data.window_tokens + 1),
        )
        heads = [n for n in range(1, config.model.num_heads + 1) if shape.d_model % (2 * n) == 0]
        shape = dataclasses.replace(shape, num_heads=max(shape.num_heads, *heads))  # no fewer than YAN has
        changes = merged({"baseline": to_dict(shape)}, changes)
        most = config.data.max_target_tokens
        steps = [1] if contestant.family != "masked_diffusion" else sorted({1, 2, 3, 4, 8, most} & {*range(most + 1)})
        whole = {"trains": ["flow"]}
        stages = {"autoencoder": {"max_steps": 0}, "flow": whole, "finetune": whole}
        how = {"num_steps": steps, "sampling": to_dict(SamplingConfig())}
        changes = merged(changes, {"stages": stages, "evaluation": how})
    return from_dict(RunConfig, merged(to_dict(config), changes))


def with_compute(config: RunConfig, prepared: Prepared, budget: Mapping[str, float]) -> RunConfig:
    """The run with as many steps in each stage as the budget of floating-point operations allows.

    Args:
        config: A contestant's run.
        prepared: The data.
        budget: Operations of each stage; what is meant for a stage that the contestant has not goes to its last one.
    """
    values = to_dict(config)
    stages = values["stages"]
    missing = sum(flops for stage, flops in budget.items() if not stages[stage]["max_steps"])
    last = [stage for stage in STAGES if stages[stage]["max_steps"]][-1]
    for stage, flops in budget.items():
        if not stages[stage]["max_steps"]:
            continue
        flops += missing if stage == last else 0.0
        # Twice: with more steps, a stage that grows its rows spends more on each.
        for _ in range(2):
            each = step_flops(from_dict(RunConfig, values), prepared, stage)
            stages[stage]["max_steps"] = max(1, round(flops / each))
    return from_dict(RunConfig, values)


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


# --- speed ------------------------------------------------------------------------------------------------------------


def measure_speeds(
    models: Mapping[str, tuple[Path, Sequence[int]]],
    sources: Sequence[str],
    sampling: Mapping[str, SamplingConfig],
    device: str = "cpu",
    turns: int = 3,
) -> dict[str, dict[int, dict[str, float | None]]]:
    """Speed of every model at every number of steps, all taking turns, so that a noisy machine hits them alike.

    Args:
        models: By contestant: folder, and numbers of steps.
        sources: Texts to answer.
        sampling: How each contestant's answers are drawn, as in the evaluation.
        device: Where they run.
        turns: How often each has its turn.

    Returns:
        By contestant and number of steps: medians of a `Speed`'s attributes, and `nfe`, the median number of passes of
        a request alone.
    """
    loaded = {name: yan_core.load(folder, device) for name, (folder, _) in models.items()}
    cells = [(name, steps) for name, (_, counts) in models.items() for steps in counts]
    found: dict[tuple[str, int], list[dict[str, float | None]]] = {cell: [] for cell in cells}
    for _ in range(turns):
        for name, steps in cells:
            passes = []

            def answer(texts: Sequence[str], name: str = name, steps: int = steps, passes: list = passes) -> list[int]:
                answers = loaded[name].generate(texts, steps, **vars(sampling[name]))
                if len(texts) == 1:
                    passes.append(answers[0].nfe)
                return [len(a.tokens) for a in answers]

            found[name, steps].append({**vars(measure_speed(answer, sources)), "nfe": statistics.median(passes)})
    medians = {cell: {key: _median([turn[key] for turn in of]) for key in of[0]} for cell, of in found.items()}
    return {name: {steps: medians[name, steps] for steps in counts} for name, (_, counts) in models.items()}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(config: RunConfig, contestants: Mapping[str, Contestant]) -> dict[str, Any]:
    """Train what is missing, measure all, and leave report, table and pictures in `runs/<name>/compare` and MLflow.

    Args:
        config: The run compared.
        contestants: By name.

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
            if contestant.settings:
                own = with_compute(own, prepared, budget)
                share_prepared(config, own)
            say(f"\n{contestant.label}: {own.stages.finetune.max_steps} steps of fine-tuning")
            configs[name], runs[name] = own, run(own)
    counted = {name: (result.model, [q.num_steps for q in result.quality]) for name, result in runs.items()}
    sampling = {name: own.evaluation.sampling for name, own in configs.items()}
    rows = prepared.validation(config.evaluation.max_rows, rows_that_choose(config))
    device = str(device_of(config.scaling.use_gpu))
    say("\nspeed: all contestants in turns")
    speeds = measure_speeds(counted, [row["source"] for row in rows], sampling, device)
    report = {
        "name": config.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(torch.device(device)),
        "data": config.data.dataset,
        "task": config.data.task,
        "rows": len(rows),
        "vocab_size": vocab,
        "contestants": {
            name: entry(contestants[name], configs[name], runs[name], speeds[name], prepared) for name in contestants
        },
    }
    report = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN
    publish(report, config, folder / "compare")
    return report


def entry(
    contestant: Contestant,
    config: RunConfig,
    result: RunResult,
    speeds: Mapping[int, dict[str, float | None]],
    prepared: Prepared,
) -> dict[str, Any]:
    """A contestant's part of the report."""
    model = yan_core.load(result.model).model
    return {
        "label": contestant.label,
        "settings": contestant.settings,
        "family": contestant.family or "yan",
        "parameters": model.num_parameters(),
        "parameters_without_embeddings": model.num_parameters(embeddings=False),
        "training_flops": sum(training_flops(config, prepared).values()),
        "training_steps": {stage: getattr(config.stages, stage).max_steps for stage in STAGES},
        "training_s": (read_inputs(Path(config.runs_dir) / config.name / TRAINED) or {}).get("seconds"),
        "quality": [dataclasses.asdict(q) for q in result.quality],
        "speed": {str(steps): speed for steps, speed in speeds.items()},
    }


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
    """Contestants of a YAML file: name -> `label` and `settings`, nested or dotted, that differ from the run compared.

    Raises:
        UsageError: If the file is not there or holds something else.
    """
    if not Path(path).is_file():
        raise UsageError(f"--variants: no file {path!r}")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict) or not values:
        raise UsageError(f"--variants {path}: must map names to `label` and `settings`")
    found = {}
    for name, value in values.items():
        unknown = set(value) - set(SETTINGS_OF_A_VARIANT) if isinstance(value, dict) else {"?"}
        if unknown or not isinstance(value.get("settings", {}), dict):
            raise UsageError(f"--variants {path}: {name} must have `label` and `settings`, got {value!r}")
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
        found[str(name)] = Contestant(str(value.get("label", name)), settings)
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
        raise UsageError("init_from: every contestant begins with fresh weights; leave it out")
    known = {**CONTESTANTS, **(read_variants(chosen.variants) if chosen.variants else {})}
    names = chosen.contestants or list(known)
    for name in names:
        if name not in known:
            raise UsageError(unknown_name("--contestants", name, list(known)))
    check_tracking(config)
    for name in names:  # a setting that does not fit is found before anything is trained
        entered(name, known[name], config, 1_000_000)
    compare(config, {name: known[name] for name in names})
    return 0

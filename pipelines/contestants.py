"""The models that are compared: what each of them is, equal means for all, and its part of the report. No Ray."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import yan_core
from pipelines.batches import TrainingData
from pipelines.benchmarks.machine import describe
from pipelines.compute import step_flops
from pipelines.evaluation import Quality, best_constant
from pipelines.folders import recorded
from pipelines.speed import measure_speed
from pipelines.state import STAGES
from yan_core.checkpoint import read_config
from yan_core.config import BaselineConfig, RunConfig, SamplingConfig, from_dict, to_dict
from yan_core.files import code_commit, without_password
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer


@dataclass(frozen=True)
class Contestant:
    """One of the models compared.

    Attributes:
        label: What it is called in tables and pictures.
        settings: What its run has other than the run compared, nested as in a YAML file.
        compute: Its compute of training, as a multiple of that of the run compared.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    compute: float = 1.0

    @property
    def is_the_run_compared(self) -> bool:
        """Whether it differs in nothing."""
        return not self.settings and self.compute == 1.0

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
    if contestant.is_the_run_compared:
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


def with_steps(stage: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """A stage's settings with so many steps, of which warm-up and curriculum take the share that they took."""
    share = steps / stage["max_steps"]
    warmup = {"warmup_steps": math.ceil(share * stage["optim"]["warmup_steps"])}
    curriculum = math.ceil(share * stage["curriculum_steps"])
    return {**stage, "max_steps": steps, "curriculum_steps": curriculum, "optim": {**stage["optim"], **warmup}}


def with_compute(config: RunConfig, data: TrainingData, budget: Mapping[str, float]) -> RunConfig:
    """The run with as many steps in each stage as the budget of floating-point operations allows; see `with_steps`.

    Args:
        config: A contestant's run.
        data: The rows.
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
        given = stages[stage]
        # Twice: with more steps, a stage that grows its rows spends more on each.
        for _ in range(2):
            each = step_flops(from_dict(RunConfig, values), data, stage)
            stages[stage] = with_steps(given, max(1, round(flops / each)))
    return from_dict(RunConfig, values)


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
                answers = loaded[name].generate(texts, steps, sampling=sampling[name])
                if len(texts) == 1:
                    passes.append(answers[0].nfe)
                return [len(a.tokens) for a in answers]

            found[name, steps].append({**vars(measure_speed(answer, sources)), "nfe": statistics.median(passes)})
    medians = {cell: {key: _median([turn[key] for turn in of]) for key in of[0]} for cell, of in found.items()}
    return {name: {steps: medians[name, steps] for steps in counts} for name, (_, counts) in models.items()}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# --- the report -------------------------------------------------------------------------------------------------------


def entry(
    contestant: Contestant,
    config: RunConfig,
    model: Path,
    quality: Sequence[Quality],
    speeds: Mapping[int, dict[str, float | None]],
    training_flops: float,
    training_s: float | None,
) -> dict[str, Any]:
    """A contestant's part of the report.

    Args:
        contestant: What it is.
        config: The run that trained it.
        model: Its model folder.
        quality: Its figures at each number of steps.
        speeds: By number of steps, as `measure_speeds` gives them.
        training_flops: Floating-point operations of its training.
        training_s: Seconds of its training, where they are known.
    """
    trained = yan_core.load(model).model
    return {
        "commit": read_config(model)["commit"],
        "label": contestant.label,
        "settings": contestant.settings,
        "compute": contestant.compute,
        "family": contestant.family or "yan",
        "parameters": trained.num_parameters(),
        "parameters_without_embeddings": trained.num_parameters(embeddings=False),
        "training_flops": training_flops,
        "training_steps": {stage: getattr(config.stages, stage).max_steps for stage in STAGES},
        "training_s": training_s,
        "quality": [dataclasses.asdict(q) for q in quality],
        "speed": {str(steps): speed for steps, speed in speeds.items()},
    }


def report_of(
    config: RunConfig,
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    device: torch.device,
    contestants: Mapping[str, dict[str, Any]],
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """The report, ready for JSON.

    Args:
        config: The run compared.
        rows: Validation rows.
        tokenizer: What all share.
        device: Where the models were measured.
        contestants: By name, their `entry`.
        arguments: Of the command.
    """
    metric = next(iter(contestants.values()))["quality"][0]["metric"]
    report = {
        "name": config.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(device),
        "data": config.data.dataset,
        "task": config.data.task,
        "rows": len(rows),
        "constant": best_constant(metric, rows, tokenizer.normalize),
        "vocab_size": tokenizer.vocab_size,
        "arguments": [without_password(argument) for argument in arguments],
        "config": recorded(config),
        "contestants": contestants,
    }
    return json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no NaN

"""What a run tells in its model's card: the data, with counts, and the figures of the evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluation import Quality
from pipelines.listing import locate
from pipelines.prepare import corpora_of
from pipelines.sources import find_dataset
from yan_core.card import Evidence
from yan_core.config import RunConfig, to_dict
from yan_core.files import code_commit
from yan_core.metrics import scale
from yan_core.tasks import get_task

WHERE = ("runs_dir", "log_every_s", "scaling", "tracking")
"""Settings that tell where a run was made and tracked: they change no weight, and addresses are nobody's business."""


def evidence(config: RunConfig, manifest: Mapping[str, Any], quality: Sequence[Quality]) -> Evidence:
    """The run's part of the card.

    Args:
        config: The resolved config.
        manifest: Of the prepared data.
        quality: The evaluation's figures, one entry for each number of steps.
    """
    settings = {name: value for name, value in to_dict(config).items() if name not in WHERE}
    settings.pop("baseline" if config.baseline is None else "model")
    hub = [of for name in _names(config) if (of := _hub_name(config, name))]
    metadata = {
        **({"datasets": hub} if hub else {}),
        "metrics": list(get_task(config.data.task).metrics),
        "model-index": [{"name": config.name, "results": [_result(config, quality)]}],
    }
    return Evidence(metadata, _data(config, manifest), _figures(config, quality), settings)


def _names(config: RunConfig) -> list[str]:
    return list(dict.fromkeys([config.data.dataset, *corpora_of(config.data)]))


def _hub_name(config: RunConfig, name: str) -> str:
    """Name of a data set on the Hugging Face hub; empty where it is from elsewhere."""
    dataset = find_dataset(config.data, name)
    on_hub = dataset.format == "huggingface" and not os.path.isdir(locate(config.data, dataset.path))
    return dataset.path if on_hub else ""


def _origin(config: RunConfig, name: str) -> str:
    dataset = find_dataset(config.data, name)
    if dataset.format.startswith("world"):
        return f"`{name}`, YAN's built-in simulated stories"
    where = " ".join(part for part in (dataset.path or dataset.train, dataset.config_name) if part)
    return f"`{name}` ({dataset.format}: `{where}`)"


def _data(config: RunConfig, manifest: Mapping[str, Any]) -> str:
    rows, stages = manifest["rows"], config.stages
    lines = [f"Task rows: {rows['finetune']:,} training pairs of {_origin(config, config.data.dataset)}."]
    if stages.autoencoder.max_steps or stages.flow.max_steps:
        corpora = ", ".join(_origin(config, name) for name in corpora_of(config.data)) or "the texts of the task's rows"
        lines.append(f"Corpus: {rows['flow']:,} windows of up to {config.data.window_tokens} tokens of {corpora}.")
    if config.init_from:
        lines.append(f"It was trained on from the model `{config.init_from}`, which has seen data of its own.")
    lines.append(f"Tokens prepared: {manifest['tokens']:,}; vocabulary: {manifest['vocab_size']:,}.")
    left_out = {**manifest["dropped"], "unusable": sum(manifest["bad_rows"].values())}
    told = ", ".join(f"{reason} {count:,}" for reason, count in left_out.items() if count)
    lines.append(f"Rows left out: {told or 'none'}; sources cut to fit: {manifest['sources_cut']:,}.")
    return "\n".join(f"- {line}" for line in lines)


def _figures(config: RunConfig, quality: Sequence[Quality]) -> str:
    metrics = [name for name in quality[0].metrics if not name.endswith("_oracle_length")]
    a_pass_a_token = config.baseline is not None and config.baseline.family != "masked_diffusion"
    lines = [
        f"On {len(quality[0].rows):,} validation rows of `{config.data.dataset}`, in points of 100 (perplexity as it "
        f"is), with 95 % bootstrap intervals over rows; by the run that trained it, at commit {code_commit()}.",
        "",
        "| " + " | ".join(["steps", "passes", *(name.replace("_", " ") for name in metrics)]) + " |",
        "|" + "---:|" * (2 + len(metrics)),
    ]
    for q in quality:
        shown = [f"{scale(name) * q.metrics[name]:.1f} {_interval(name, q.intervals[name])}" for name in metrics]
        lines.append("| " + " | ".join(["" if a_pass_a_token else str(q.num_steps), str(q.nfe), *shown]) + " |")
    return "\n".join(lines)


def _interval(metric: str, ends: Sequence[float]) -> str:
    return f"[{scale(metric) * ends[0]:.1f}, {scale(metric) * ends[1]:.1f}]"


def _result(config: RunConfig, quality: Sequence[Quality]) -> dict[str, Any]:
    """The main metric at each number of steps, as the hub's `model-index` lists figures."""
    name, metric = config.data.dataset, quality[0].metric
    return {
        "task": {"type": get_task(config.data.task).pipeline_tag, "name": config.data.task},
        "dataset": {"type": _hub_name(config, name) or name, "name": name, "split": "validation"},
        "metrics": [
            {"type": metric, "value": round(q.value, 4), "name": f"{metric} at num_steps={q.num_steps}"}
            for q in quality
        ],
    }

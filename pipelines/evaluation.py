"""Quality and speed of one saved model on fixed rows, at any number of solver steps.

Quality is measured with the model's own length of an answer and, beside it, told the length of the right one. Only
answers are scored; the seed of a row is its place, so that evaluating twice gives the same figures.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import yan_core
from pipelines.speed import Speed, measure_speed
from yan_core.baselines import Baseline
from yan_core.bootstrap import Scores, bootstrap
from yan_core.config import EvaluationConfig, SamplingConfig
from yan_core.diversity import diversity
from yan_core.files import code_commit
from yan_core.metrics import is_valid_label, score
from yan_core.tasks import Task, get_task
from yan_core.tokenization import MASK

WHOLE_TEXT = ("token_f1", "rouge_l")
"""Metrics that are given of the whole text too, where the answer is a part of it: it flatters, as most was copied."""

Measure = Callable[[list[str], list[str], list[list[str]]], Scores]
"""What comes before each answer, the answers, and the right ones of each -> scores."""


@dataclass(frozen=True)
class Quality:
    """Figures of one model at one number of solver steps.

    Attributes:
        num_steps: Solver steps.
        nfe: Trunk passes an answer; equal to num_steps with Euler's method and no guidance.
        metric: Name of `value`, the task's main metric.
        value: The metric, in [0, 1], the model choosing the length of its answers.
        by_kind: The same for each kind of question, where rows have kinds.
        oracle_value: The same where the model is told the length of the (first) right answer.
        latency_ms_batch_1: Median time of one request alone, text to text.
        examples: Source, target and answer of some rows.
        metrics: Every metric by name, and as `<name>_oracle_length` where the model was told the length.
        intervals: Lower and upper end of the 95 % interval of each of `metrics`.
        counts: Generated tokens, sources cut (and their tokens), answers that are no label.
        speed: Attributes of a `Speed`.
        rows: `metric` of each row, to compare two models row by row.
    """

    num_steps: int
    nfe: int
    metric: str
    value: float
    by_kind: dict[str, float]
    oracle_value: float
    latency_ms_batch_1: float
    examples: list[dict[str, str]]
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    speed: dict[str, float | None] = field(default_factory=dict)
    rows: list[float] = field(default_factory=list)


def generate_rows(
    generator: yan_core.TextGenerator,
    rows: Sequence[Mapping[str, Any]],
    num_steps: int,
    config: EvaluationConfig,
    seeds: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    max_tokens: int | None = None,
    do_sample: bool = False,
) -> list[yan_core.Generation]:
    """Answer every row, those of like length in a batch; the seeds keep each answer the same in any order.

    Args:
        generator: The model, in evaluation mode.
        rows: Each with a `source`.
        num_steps: Solver steps.
        config: Batch size, and how answers are sampled.
        seeds: Of each row; None: its place in `rows`.
        lengths: Each answer's number of tokens, where the model is to be told; None: it finds its own.
        max_tokens: Longest answer; None: what the model was trained for.
        do_sample: Whether a baseline draws its tokens, by the seeds; YAN draws in any case.
    """
    seeds = range(len(rows)) if seeds is None else seeds
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["source"]))
    found: dict[int, yan_core.Generation] = {}
    for start in range(0, len(order), config.batch_size):
        places = order[start : start + config.batch_size]
        done = generator.generate(
            [rows[i]["source"] for i in places],
            num_steps,
            max_tokens,
            seeds=[seeds[i] for i in places],
            lengths=[lengths[i] for i in places] if lengths is not None else None,
            do_sample=do_sample,
            sampling=config.sampling,
        )
        found.update(zip(places, done, strict=True))
    return [found[i] for i in range(len(rows))]


def answer_rows(
    generator: yan_core.TextGenerator,
    rows: Sequence[Mapping[str, Any]],
    num_steps: int,
    config: EvaluationConfig,
    seeds: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> list[str]:
    """The answers' texts of `generate_rows`."""
    return [found.text for found in generate_rows(generator, rows, num_steps, config, seeds, lengths)]


def score_rows(
    generator: yan_core.TextGenerator, metric: str, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]
) -> float:
    """A metric of answers to rows, each with its right `answers`; in [0, 1].

    A model that writes lower case alone is scored in lower case.
    """
    references = [[generator.tokenizer.normalize(a) for a in row["answers"]] for row in rows]
    return score(metric, answers, references).value


def score_answers(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    normalize: Callable[[str], str] = lambda text: text,
    extras: Mapping[str, Measure] | None = None,
) -> dict[str, Scores]:
    """Every metric of a task, for the answers of any system.

    Args:
        task: Names the metrics.
        rows: Each with its `source` and its right `answers`, any of which counts.
        answers: One a row.
        normalize: What the system cannot write is taken out of sources and right answers, such as upper case.
        extras: More metrics by name.
    """
    sources = [normalize(row["source"]) for row in rows]
    references = [[normalize(a) for a in row["answers"]] for row in rows]
    found = {metric: score(metric, answers, references) for metric in task.metrics}
    if all(MASK in source for source in sources):
        texts = [task.whole(source, answer) for source, answer in zip(sources, answers, strict=True)]
        right = [[task.whole(source, r) for r in rs] for source, rs in zip(sources, references, strict=True)]
        whole = [metric for metric in WHOLE_TEXT if metric in task.metrics]
        found |= {f"{metric}_whole_text": score(metric, texts, right) for metric in whole}
    before = [source.split(MASK)[0] for source in sources]
    return found | {name: measure(before, list(answers), references) for name, measure in (extras or {}).items()}


def best_constant(
    metric: str, rows: Sequence[Mapping[str, Any]], normalize: Callable[[str], str] = lambda text: text
) -> dict[str, Any]:
    """The best of the 50 commonest right answers, given to every row: what a model that reads nothing could reach.

    It is chosen knowing the rows, so that what does not beat it has learnt nothing from the sources.

    Args:
        metric: How answers are scored.
        rows: Each with its right `answers`.
        normalize: See `score_answers`.

    Returns:
        `answer`, `metric` and `value`.
    """
    common = Counter(normalize(row["answers"][0]) for row in rows).most_common(50)
    references = [[normalize(a) for a in row["answers"]] for row in rows]
    values = {answer: score(metric, [answer] * len(rows), references).value for answer, _ in common}
    best = max(values, key=lambda answer: values[answer])
    return {"answer": best, "metric": metric, "value": values[best]}


def check_models(config: EvaluationConfig) -> None:
    """Look whether the models that measure are there, before anything is trained.

    Raises:
        ValueError: If one is not.
    """
    from yan_core.model_metrics import check_folder

    for name in ("bertscore_model", "perplexity_model"):
        folder = getattr(config, name)
        try:
            if folder:
                check_folder(folder)
        except ValueError as error:
            raise ValueError(f"evaluation.{name}: {error}") from error


def _measures(config: EvaluationConfig, device: str) -> dict[str, Measure]:
    """The metrics that models give."""
    found: dict[str, Measure] = {}
    if config.bertscore_model:
        from yan_core.model_metrics import BertScore

        bert_score = BertScore(config.bertscore_model, device)
        found["bertscore"] = lambda before, answers, references: bert_score(answers, references)
    if config.perplexity_model:
        from yan_core.model_metrics import Perplexity

        perplexity = Perplexity(config.perplexity_model, device)
        found["perplexity"] = lambda before, answers, references: perplexity(before, answers)
    return found


def evaluate_model(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    config: EvaluationConfig,
    device: str = "cpu",
    on_done: Callable[[Quality], None] | None = None,
    task: Task | None = None,
) -> list[Quality]:
    """Answer every row at each number of steps, score it and time it.

    Args:
        folder: Model folder.
        rows: `source`, `answers` (any counts as right; case does not count where the tokenizer lower-cases) and
            optionally `kind`.
        config: Numbers of solver steps, batch size, how answers are sampled, and what else is measured.
        device: Where the model runs.
        on_done: Called after each number of steps.
        task: Names the metrics; None: the model's own task.

    Raises:
        ValueError: If there is no row, or no model in a folder that the config names.
    """
    if not rows:
        raise ValueError("nothing to evaluate: no row is left after the filter")
    others = _measures(config, device)
    generator = yan_core.load(folder, device)
    task, normalize = task or get_task(generator.details["task"]), generator.tokenizer.normalize
    results = []
    encoded = generator.tokenizer.encode_batch([r["answers"][0] for r in rows])
    true_lengths = [min(max(1, len(e.ids)), generator.max_target_tokens) for e in encoded]
    for steps in config.num_steps:
        own = generate_rows(generator, rows, steps, config)
        answers = [found.text for found in own]
        told = answer_rows(generator, rows, steps, config, lengths=true_lengths)
        scores = score_answers(task, rows, answers, normalize, others)
        of_told = score_answers(task, rows, told, normalize, others)
        if config.diversity:
            greedy = isinstance(generator.model, Baseline)
            drawn = [] if greedy else [answers]
            for candidate in range(len(drawn), config.diversity):
                seeds = range(candidate * len(rows), (candidate + 1) * len(rows))
                found = generate_rows(generator, rows, steps, config, seeds, do_sample=True)
                drawn.append([answer.text for answer in found])
            scores |= diversity(list(zip(*drawn, strict=True)))
            if greedy:
                of_drawn = score_answers(task, rows, drawn[0], normalize)[task.metric]
                scores[f"{task.metric}_drawn"] = of_drawn
        by_kind = {}
        for kind in sorted({r["kind"] for r in rows if r.get("kind")}):
            by_kind[kind] = scores[task.metric].of_rows([i for i, r in enumerate(rows) if r["kind"] == kind]).value
        every = scores | {f"{name}_oracle_length": found for name, found in of_told.items()}
        intervals = bootstrap(every)
        speed = _speed(generator, [r["source"] for r in rows], steps, config.sampling)
        quality = Quality(
            num_steps=steps,
            nfe=own[0].nfe,
            metric=task.metric,
            value=scores[task.metric].value,
            by_kind=by_kind,
            oracle_value=of_told[task.metric].value,
            latency_ms_batch_1=speed.latency_ms_p50,
            examples=[
                {"source": r["source"], "target": " | ".join(r["answers"]), "answer": a}
                for r, a in list(zip(rows, answers, strict=True))[:10]
            ],
            metrics={name: found.value for name, found in intervals.items()},
            intervals={name: [found.low, found.high] for name, found in intervals.items()},
            counts=_counts(task, rows, own, normalize),
            speed=vars(speed),
            rows=scores[task.metric].rows,
        )
        results.append(quality)
        if on_done is not None:
            on_done(quality)
    return results


def _counts(
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    found: Sequence[yan_core.Generation],
    normalize: Callable[[str], str],
) -> dict[str, int]:
    counts = {
        "generated_tokens": sum(len(f.tokens) for f in found),
        "sources_cut": sum(f.source_tokens_cut > 0 for f in found),
        "source_tokens_cut": sum(f.source_tokens_cut for f in found),
    }
    if "accuracy" in task.metrics:
        valid = is_valid_label([f.text for f in found], [[normalize(a) for a in row["answers"]] for row in rows])
        counts["invalid_labels"] = valid.count(False)
    return counts


def _speed(
    generator: yan_core.TextGenerator, sources: Sequence[str], num_steps: int, sampling: SamplingConfig
) -> Speed:
    def answer(batch: Sequence[str]) -> list[int]:
        return [len(found.tokens) for found in generator.generate(batch, num_steps, sampling=sampling)]

    return measure_speed(answer, sources)


def summary(
    quality: Quality, num_rows: int, folder: Path, data: str, counts: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """What `yan evaluate --json` writes.

    Args:
        quality: The figures.
        num_rows: Rows that were scored.
        folder: Model folder.
        data: File of the rows.
        counts: What became of the file's rows.
    """
    by_kind = {f"{quality.metric}/{k}": v for k, v in quality.by_kind.items()}
    times = dict(quality.speed)
    latency = {"batch_1_p50": times.pop("latency_ms_p50"), "batch_1_p95": times.pop("latency_ms_p95")}
    found = {
        "metric": quality.metric,
        "metrics": {**quality.metrics, **by_kind},
        "intervals": quality.intervals,
        "counts": {"rows": num_rows, **quality.counts, **(counts or {})},
        "latency_ms": latency,
        "speed": times,
        "num_steps": quality.num_steps,
        "nfe": quality.nfe,
        "length": "own",
        "model": str(folder),
        "data": data,
        "commit": code_commit(),
        "machine": {
            "cpu": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "precision": "float32",
        },
    }
    return json.loads(json.dumps(found), parse_constant=lambda _: None)  # JSON has no NaN

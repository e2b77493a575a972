"""Quality of one saved model on fixed rows, at any number of solver steps, with no oracle of the answer's length."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import yan_core
from yan_core.config import EvaluationConfig
from yan_core.files import code_commit
from yan_core.metrics import score
from yan_core.tasks import get_task


@dataclass(frozen=True)
class Quality:
    """Figures of one model at one number of solver steps.

    Attributes:
        num_steps: Solver steps.
        nfe: Trunk passes an answer; equal to num_steps with Euler's method and no guidance.
        metric: Name of `value`.
        value: The metric, in [0, 1], the model choosing the length of its answers.
        by_kind: The same for each kind of question, where rows have kinds.
        oracle_value: The same where the model is told the length of the (first) right answer.
        latency_ms_batch_1: Median time of one request alone, text to text.
        examples: Source, target and answer of some rows.
    """

    num_steps: int
    nfe: int
    metric: str
    value: float
    by_kind: dict[str, float]
    oracle_value: float
    latency_ms_batch_1: float
    examples: list[dict[str, str]]


def answer_rows(
    generator: yan_core.TextGenerator,
    rows: Sequence[Mapping[str, Any]],
    num_steps: int,
    config: EvaluationConfig,
    seeds: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> list[str]:
    """Answer every row, those of like length in a batch; the seeds keep each answer the same in any order.

    Args:
        generator: The model, in evaluation mode.
        rows: Each with a `source`.
        num_steps: Solver steps.
        config: Batch size, and how answers are sampled.
        seeds: Of each row; None: its place in `rows`.
        lengths: Each answer's number of tokens, where the model is to be told; None: it finds its own.
    """
    seeds = range(len(rows)) if seeds is None else seeds
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["source"]))
    answers = [""] * len(rows)
    for start in range(0, len(order), config.batch_size):
        places = order[start : start + config.batch_size]
        done = generator.generate(
            [rows[i]["source"] for i in places],
            num_steps,
            seeds=[seeds[i] for i in places],
            lengths=[lengths[i] for i in places] if lengths is not None else None,
            **vars(config.sampling),
        )
        for place, generation in zip(places, done, strict=True):
            answers[place] = generation.text
    return answers


def score_rows(
    generator: yan_core.TextGenerator, metric: str, rows: Sequence[Mapping[str, Any]], answers: Sequence[str]
) -> float:
    """A metric of answers to rows, each with its right `answers`; in [0, 1].

    A model that writes lower case alone is scored in lower case.
    """
    references = [[generator.tokenizer.normalize(a) for a in row["answers"]] for row in rows]
    return score(metric, answers, references).value


def evaluate_model(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    config: EvaluationConfig,
    device: str = "cpu",
    on_done: Callable[[Quality], None] | None = None,
) -> list[Quality]:
    """Answer every row at each number of steps and score it.

    The seed of a row is its place in `rows`, so evaluating twice gives the same figures.

    Args:
        folder: Model folder.
        rows: `source`, `answers` (any counts as right; case does not count where the tokenizer lower-cases) and
            optionally `kind`.
        config: Numbers of solver steps, batch size, and how answers are sampled.
        device: Where the model runs.
        on_done: Called after each number of steps.

    Raises:
        ValueError: If there is no row.
    """
    if not rows:
        raise ValueError("nothing to evaluate: no row is left after the filter")
    generator = yan_core.load(folder, device)
    metric = get_task(generator.details["task"]).metric
    results = []
    encoded = generator.tokenizer.encode_batch([r["answers"][0] for r in rows])
    true_lengths = [min(max(1, len(e.ids)), generator.max_target_tokens) for e in encoded]
    for steps in config.num_steps:
        answers = answer_rows(generator, rows, steps, config)
        told = answer_rows(generator, rows, steps, config, lengths=true_lengths)
        kinds = sorted({r["kind"] for r in rows if r.get("kind")})
        by_kind = {}
        for kind in kinds:
            chosen = [i for i, r in enumerate(rows) if r["kind"] == kind]
            by_kind[kind] = score_rows(generator, metric, [rows[i] for i in chosen], [answers[i] for i in chosen])
        latency_ms, nfe = _latency_ms(generator, [r["source"] for r in rows[:20]], steps, vars(config.sampling))
        quality = Quality(
            num_steps=steps,
            nfe=nfe,
            metric=metric,
            value=score_rows(generator, metric, rows, answers),
            by_kind=by_kind,
            oracle_value=score_rows(generator, metric, rows, told),
            latency_ms_batch_1=latency_ms,
            examples=[
                {"source": r["source"], "target": " | ".join(r["answers"]), "answer": a}
                for r, a in list(zip(rows, answers, strict=True))[:10]
            ],
        )
        results.append(quality)
        if on_done is not None:
            on_done(quality)
    return results


def _latency_ms(
    generator: yan_core.TextGenerator, sources: Sequence[str], num_steps: int, how: dict[str, Any]
) -> tuple[float, int]:
    """Median time of a request alone, in milliseconds, and its trunk passes."""
    times, nfe = [], 0
    for source in sources:
        started = time.perf_counter()
        nfe = generator.generate([source], num_steps, **how)[0].nfe
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times), nfe


def summary(quality: Quality, num_rows: int, folder: Path, data: str) -> dict[str, Any]:
    """What `yan evaluate --json` writes."""
    oracle = {f"{quality.metric}_oracle_length": quality.oracle_value}
    by_kind = {f"{quality.metric}/{k}": v for k, v in quality.by_kind.items()}
    return {
        "metrics": {quality.metric: quality.value, **by_kind, **oracle},
        "counts": {"rows": num_rows},
        "latency_ms": {"batch_1_p50": quality.latency_ms_batch_1},
        "num_steps": quality.num_steps,
        "nfe": quality.nfe,
        "length": "own",
        "model": str(folder),
        "data": data,
        "commit": code_commit(),
        "machine": {"cpu": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }

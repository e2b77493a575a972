"""Metrics of answers against references; every figure in [0, 1], the more the better.

Only the answer is compared with the right answers: no source, header or label stands in either. Any of several
references counts, the best one.
"""

from __future__ import annotations

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from yan_core.bootstrap import Scores
from yan_core.config import unknown_name

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Scores]
"""Answers, and the right answers of each -> scores of the rows."""

REMEDY = "in the folder of YAN's pyproject.toml: pip install -e '.[pipelines]'"


def scale(metric: str) -> float:
    """What a figure is multiplied by where people read it: 100, points; perplexity alone is no share of anything."""
    return 1.0 if metric.startswith("perplexity") else 100.0


def score(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score answers by a metric of METRICS.

    Args:
        metric: Its name.
        answers: One a row.
        references: The right answers of each row, any of which counts; with none an answer is wrong.

    Raises:
        ValueError: If the lengths differ, there is nothing to score or no such metric.
        ImportError: If the library that it needs is not installed.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"got {len(answers)} answers for {len(references)} lists of references; need the same, >= 1")
    if metric not in METRICS:
        raise ValueError(unknown_name("metric", metric, list(METRICS)))
    return METRICS[metric](answers, references)


# --- of one answer and one reference ----------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Text with single spaces between words, for comparison."""
    return " ".join(text.split())


def normalize_squad(text: str) -> str:
    """Text in lower case without punctuation and articles, single spaces between words.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250; the order of the official script (evaluate-v1.1.py).
    """
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if an answer equals its reference, spacing aside, else 0."""
    return float(normalize_answer(answer) == normalize_answer(reference))


def squad_em(answer: str, reference: str) -> float:
    """1 if an answer equals its reference after `normalize_squad`, else 0."""
    return float(normalize_squad(answer) == normalize_squad(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words of an answer to those of its reference, as they are written; two blank texts have 1."""
    a, b = Counter(answer.split()), Counter(reference.split())
    if not a and not b:
        return 1.0
    return 2 * (a & b).total() / (a.total() + b.total())


def squad_f1(answer: str, reference: str) -> float:
    """Token F1 after `normalize_squad`, SQuAD's own.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250. Two texts that are blank after it have 1, not 0 as in its script.
    """
    return token_f1(normalize_squad(answer), normalize_squad(reference))


def best_of_references(compare: Callable[[str, str], float]) -> Metric:
    """The metric that is the mean over rows of an answer's score by its best reference."""

    def metric(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
        pairs = zip(answers, references, strict=True)
        return Scores.of_means([max((compare(answer, r) for r in rs), default=0.0) for answer, rs in pairs])

    return metric


# --- n-gram overlap by kept libraries ---------------------------------------------------------------------------------


@lru_cache(maxsize=3)
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f"ROUGE needs rouge-score; {REMEDY}", name=error.name) from error
    return RougeScorer([kind], use_stemmer=False)


def rouge(kind: str) -> Metric:
    """ROUGE F1 by the rouge-score library: lower case, words of letters and digits, no stemming.

    Args:
        kind: `rouge1`, `rouge2` or `rougeL` (longest common subsequence).

    Source: Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries.
    """
    return best_of_references(lambda answer, reference: _rouge_scorer(kind).score(reference, answer)[kind].fmeasure)


def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError(f"BLEU needs sacrebleu; {REMEDY}", name=error.name) from error
    return BLEU


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """BLEU-4 of the corpus by sacreBLEU (13a tokens, case counts, exponential smoothing, effective order), over 100.

    Effective order leaves out the orders of n-grams that no answer is long enough for; with it texts of two words have
    a BLEU, and long ones the usual figure.

    Source: Papineni et al. 2002; Post 2018, arXiv:1804.08771.
    """
    made = _sacrebleu()(effective_order=True)
    found = [made.sentence_score(a, list(rs) or [""]) for a, rs in zip(answers, references, strict=True)]
    statistics = np.array([[*f.counts, *f.totals, f.sys_len, f.ref_len] for f in found], np.float64)
    return Scores(statistics, _bleu_of_sums)


def _bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """BLEU, [...], of counts of right n-grams and of all n-grams, orders 1 to 4, and of the lengths, [..., 10]."""
    compute = _sacrebleu().compute_bleu
    counts = sums.reshape(-1, 10).round().astype(int).tolist()
    values = [compute(c[:4], c[4:8], c[8], c[9], "exp", effective_order=True).score / 100 for c in counts]
    return np.minimum(1, values).reshape(sums.shape[:-1])


# --- labels -----------------------------------------------------------------------------------------------------------


def is_valid_label(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each answer is one of the labels, which are all right answers of all rows, spacing aside."""
    labels = {normalize_answer(r) for rs in references for r in rs}
    return [normalize_answer(answer) in labels for answer in answers]


def macro_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Mean over the labels of a label's F1; an answer that is no label is wrong, and counts for none.

    The labels are those that are right somewhere; of a row with several right answers the first is its label, unless
    another one was answered.
    """
    given = [normalize_answer(answer) for answer in answers]
    right = [[normalize_answer(r) for r in rs] for rs in references]
    wanted = [g if g in rs else rs[0] if rs else None for g, rs in zip(given, right, strict=True)]
    labels = sorted({label for label in wanted if label is not None})
    statistics = np.array(
        [
            [(g == x) + (w == x) for x in labels] + [g == x == w for x in labels]
            for g, w in zip(given, wanted, strict=True)
        ],
        np.float64,
    )

    def combine(sums: np.ndarray) -> np.ndarray:
        both, hits = np.split(sums, 2, axis=-1)  # answers and rows of a label together; right answers
        there = both > 0  # a label that a sample does not have is no part of its mean
        values = np.divide(2 * hits, both, out=np.zeros_like(both), where=there)
        return values.sum(-1) / np.maximum(1, there.sum(-1))

    return Scores(statistics, combine)


METRICS: dict[str, Metric] = {
    "exact_match": best_of_references(exact_match),
    "squad_em": best_of_references(squad_em),
    "token_f1": best_of_references(token_f1),
    "squad_f1": best_of_references(squad_f1),
    "accuracy": best_of_references(exact_match),
    "macro_f1": macro_f1,
    "rouge_1": rouge("rouge1"),
    "rouge_2": rouge("rouge2"),
    "rouge_l": rouge("rougeL"),
    "bleu": bleu,
}
"""Metrics by the names that tasks give."""

LIBRARIES = {"rouge_1": "rouge_score", "rouge_2": "rouge_score", "rouge_l": "rouge_score", "bleu": "sacrebleu"}
"""What metrics need beside NumPy."""


def installed(metrics: Sequence[str]) -> tuple[str, ...]:
    """Those of some metrics whose libraries are there."""
    return tuple(m for m in metrics if m not in LIBRARIES or importlib.util.find_spec(LIBRARIES[m]) is not None)

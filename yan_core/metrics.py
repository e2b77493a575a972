"""Pure functions from answers and references to figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence


def normalize_answer(text: str) -> str:
    """Text with single spaces between words, for comparison."""
    return " ".join(text.split())


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of answers that equal one of their references, spacing aside; in [0, 1].

    Raises:
        ValueError: If the lengths differ or there is nothing to score.
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"got {len(answers)} answers for {len(references)} lists of references; need the same, >= 1")
    right = [
        normalize_answer(a) in {normalize_answer(r) for r in rs} for a, rs in zip(answers, references, strict=True)
    ]
    return sum(right) / len(right)


def token_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 of the words of each answer to those of its best reference; in [0, 1].

    Raises:
        ValueError: As `exact_match`.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250 (SQuAD), without its dropping of articles and punctuation.
    """
    exact_match(answers, references)  # checks the lengths
    return sum(max((_f1(a, r) for r in rs), default=0.0) for a, rs in zip(answers, references, strict=True)) / len(
        answers
    )


def _f1(answer: str, reference: str) -> float:
    a, b = Counter(answer.split()), Counter(reference.split())
    if not a and not b:
        return 1.0
    return 2 * (a & b).total() / (a.total() + b.total())


METRICS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "exact_match": exact_match,
    "accuracy": exact_match,
    "token_f1": token_f1,
}
"""Metrics by the name that a task gives."""

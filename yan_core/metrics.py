"""Pure functions from answers and references to figures."""

from __future__ import annotations

from collections.abc import Sequence


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

"""Figures from answers and references."""

import pytest

from yan_core.metrics import exact_match, normalize_answer


def test_share_of_answers_that_equal_a_reference() -> None:
    answers = ["kitchen", "the  garden ", "Office", ""]
    references = [["kitchen"], ["a", "the garden"], ["office"], ["hallway"]]
    assert exact_match(answers, references) == 0.5
    assert exact_match(["a"], [["a"]]) == 1.0
    assert exact_match(["a"], [[]]) == 0.0
    assert exact_match([" "], [[""]]) == 1.0


def test_normalising_changes_spaces_alone() -> None:
    assert normalize_answer("  The\tred \n Apple. ") == "The red Apple."


def test_nothing_to_score_or_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 answers for 0 lists"):
        exact_match([], [])
    with pytest.raises(ValueError, match="got 1 answers for 2 lists"):
        exact_match(["a"], [["a"], ["b"]])

"""Figures from answers and references."""

import pytest

from yan_core.metrics import METRICS, exact_match, normalize_answer, token_f1
from yan_core.tasks import TASKS


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


def test_token_f1_is_of_the_best_reference() -> None:
    assert token_f1(["the red apple"], [["a pear", "red apple"]]) == pytest.approx(2 * 2 / 5)
    assert token_f1(["a a b"], [["a b b"]]) == pytest.approx(2 / 3)  # a word counts as often as both have it
    assert token_f1(["", "x", "x"], [[""], [""], []]) == pytest.approx(1 / 3)


def test_every_task_is_scored_by_a_metric_there_is() -> None:
    assert {task.metric for task in TASKS.values()} <= set(METRICS)

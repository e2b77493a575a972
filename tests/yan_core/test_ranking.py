"""Choosing among candidates: votes, token F1 and confidence, against readable loops."""

from collections import Counter

import pytest
import torch

from yan_core.ranking import best_of, mean_confidence, minimum_bayes_risk
from yan_core.tokenization import Tokenizer

END = Tokenizer.eos_id


def f1(a: list[int], b: list[int]) -> float:
    common = sum((Counter(a) & Counter(b)).values())
    return 1.0 if not a and not b else 2 * common / (len(a) + len(b))


def text(row: list[int]) -> list[int]:
    return row[: row.index(END)] if END in row else row


@pytest.mark.parametrize("seed", range(5))
def test_bayes_risk_is_the_mean_token_f1(seed: int) -> None:
    candidates = torch.randint(END, END + 4, (3, 6, 5), generator=torch.Generator().manual_seed(seed))
    scores = minimum_bayes_risk(candidates)
    for b, rows in enumerate(candidates.tolist()):
        for i, row in enumerate(rows):
            expected = sum(f1(text(row), text(other)) for other in rows) / len(rows)
            assert float(scores[b, i]) == pytest.approx(expected, rel=1e-5)


def test_answers_of_one_word_are_voted_on() -> None:
    candidates = torch.tensor([[[9, END], [7, END], [8, END], [7, END]]])
    assert best_of(candidates, minimum_bayes_risk(candidates)).tolist() == [[7, END]]


def test_confidence_counts_up_to_the_first_end_of_text() -> None:
    candidates = torch.tensor([[[9, END, END, 8], [9, 8, 7, 6], [END, 1, 1, 1]]])
    log_probs = -torch.tensor([[[1.0, 3.0, 50.0, 50.0], [1.0, 2.0, 3.0, 4.0], [0.5, 9.0, 9.0, 9.0]]])
    assert mean_confidence(candidates, log_probs).tolist() == [[-2.0, -2.5, -0.5]]


def test_confidence_in_a_text_of_known_length_counts_its_own_tokens_and_the_length() -> None:
    """What was read off the places behind the text says nothing about it."""
    candidates = torch.tensor([[[9, END, END, END], [9, 8, 7, 6]]])
    log_probs = -torch.tensor([[[1.0, 50.0, 50.0, 50.0], [1.0, 2.0, 3.0, 4.0]]])
    places = torch.arange(4) < torch.tensor([1, 4])[:, None]
    assert mean_confidence(candidates, log_probs, places[None]).tolist() == [[-1.0, -2.5]]
    with_length = mean_confidence(candidates, log_probs, places[None], torch.tensor([[-3.0, -0.5]]))
    assert with_length.tolist() == [[(-1 - 3) / 2, pytest.approx((-10 - 0.5) / 5)]]


def test_the_first_of_equals_is_taken() -> None:
    values = torch.tensor([[[1], [2], [3]], [[4], [5], [6]]])
    assert best_of(values, torch.tensor([[0.5, 0.9, 0.9], [1.0, 1.0, 1.0]])).tolist() == [[2], [4]]

"""How different several answers are."""

import pytest

from yan_core.diversity import distinct_n, diversity, self_bleu


def test_shares_of_different_n_grams() -> None:
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(["a", "b"], 2) == 0


def test_self_bleu_goes_from_0_of_different_texts_to_1_of_equal_ones() -> None:
    assert self_bleu(["one two three four five"] * 3) == 1
    assert self_bleu(["one two three four", "five six seven eight"]) == 0
    assert 0 < self_bleu(["one two three four", "one two three five"]) < 1
    assert self_bleu(["", ""]) == 1


def test_figures_are_means_over_rows() -> None:
    found = diversity([["a b", "a b"], ["a b", "c d"]])
    assert {name: scores.value for name, scores in found.items()} == {
        "self_bleu": 0.5,
        "distinct_1": 0.75,
        "distinct_2": 0.75,
        "distinct_answers": 0.75,
    }
    with pytest.raises(ValueError, match="two candidates"):
        diversity([["a"]])

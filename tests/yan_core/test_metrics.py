"""Figures from answers and references."""

import random

import pytest

from yan_core.metrics import METRICS, is_valid_label, normalize_answer, normalize_squad, score


def value(metric: str, answers: list[str], references: list[list[str]]) -> float:
    return score(metric, answers, references).value


def random_answers(rows: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    draw = random.Random(seed)
    words = "the a cat dog sat on mat big red house runs fast.".split()

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 12)))

    references = [[text() for _ in range(draw.randint(1, 3))] for _ in range(rows)]
    return [draw.choice(rs) if draw.random() < 0.4 else text() for rs in references], references


def test_share_of_answers_that_equal_a_reference() -> None:
    answers = ["kitchen", "the  garden ", "Office", ""]
    references = [["kitchen"], ["a", "the garden"], ["office"], ["hallway"]]
    for metric in ("exact_match", "accuracy"):
        assert score(metric, answers, references).rows == [1, 1, 0, 0]
        assert value(metric, answers, references) == 0.5
    assert value("exact_match", ["a"], [[]]) == 0.0
    assert value("exact_match", [" "], [[""]]) == 1.0


def test_normalising_changes_spaces_alone_or_what_squad_says() -> None:
    assert normalize_answer("  The\tred \n Apple. ") == "The red Apple."
    assert normalize_squad("  The\tred \n Apple, an OTHER a.b") == "red apple other ab"
    assert normalize_squad("Anthem theatre") == "anthem theatre"


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_to_score_or_different_lengths_are_refused(metric: str) -> None:
    with pytest.raises(ValueError, match="got 0 answers for 0 lists"):
        score(metric, [], [])
    with pytest.raises(ValueError, match="got 1 answers for 2 lists"):
        score(metric, ["a"], [["a"], ["b"]])


def test_an_unknown_metric_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'rouge_l'"):
        score("rouge_L", ["a"], [["a"]])


def test_token_f1_is_of_the_best_reference() -> None:
    assert value("token_f1", ["the red apple"], [["a pear", "red apple"]]) == pytest.approx(2 * 2 / 5)
    assert value("token_f1", ["a a b"], [["a b b"]]) == pytest.approx(2 / 3)  # as often as both have it
    assert value("token_f1", ["", "x", "x"], [[""], [""], []]) == pytest.approx(1 / 3)


def test_squads_figures_are_of_normalised_texts() -> None:
    assert value("squad_em", ["The Kitchen.", "a kitchen"], [["kitchen"], ["kitchens"]]) == 0.5
    assert value("squad_f1", ["The red, apple!"], [["an Apple"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", METRICS)
def test_right_answers_have_1_and_answers_without_a_common_word_0(metric: str) -> None:
    right = ["one two three four five", "six seven eight nine"]
    assert value(metric, right, [[r, "another"] for r in right]) == pytest.approx(1)
    assert value(metric, ["ten eleven twelve thirteen", ""], [[r] for r in right]) == 0


def test_rouge_of_a_worked_example() -> None:
    # "the cat sat" in "the cat was on the mat": bigram "the cat"; longest common subsequence "the cat".
    answer, reference = "The cat sat", "the cat was on the mat"
    assert value("rouge_1", [answer], [[reference]]) == pytest.approx(2 * 2 / (3 + 6))
    assert value("rouge_2", [answer], [[reference]]) == pytest.approx(2 * 1 / (2 + 5))
    assert value("rouge_l", [answer], [["x", reference]]) == pytest.approx(2 * 2 / (3 + 6))


def test_bleu_is_sacrebleus() -> None:
    import sacrebleu

    answers, references = random_answers(200)
    references = [rs[:1] for rs in references]
    expected = sacrebleu.corpus_bleu(answers, [[rs[0] for rs in references]]).score / 100
    assert value("bleu", answers, references) == pytest.approx(expected)
    sentence = sacrebleu.sentence_bleu(answers[0], references[0], use_effective_order=True).score / 100
    assert score("bleu", answers, references).rows[0] == pytest.approx(sentence)
    assert value("bleu", ["two words"], [["two words"]]) == 1  # shorter than four words


def test_an_invalid_label_is_wrong_and_counted() -> None:
    answers = ["World", "Sprots", "World", "Sports ", "World"]
    references = [["World"], ["Sports"], ["Sports"], ["Sports"], ["Business"]]
    assert is_valid_label(answers, references) == [True, False, True, True, True]
    assert value("accuracy", answers, references) == 2 / 5
    # World: 1 of 3 answers right, 1 of 1 row; Sports: 1 of 1 and 1 of 3; Business: none.
    assert value("macro_f1", answers, references) == pytest.approx((2 / 4 + 2 / 4 + 0) / 3)


def test_macro_f1_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with MLflow")
    draw = random.Random(1)
    right = draw.choices("abcd", [8, 4, 2, 1], k=300)
    answers = [label if draw.random() < 0.7 else draw.choice("abcd") for label in right]
    expected = metrics.f1_score(right, answers, average="macro")
    assert value("macro_f1", answers, [[label] for label in right]) == pytest.approx(expected)


@pytest.mark.parametrize("metric", METRICS)
def test_a_figure_of_some_rows_is_that_of_the_metric_on_them(metric: str) -> None:
    answers, references = random_answers(60, seed=2)
    chosen = list(range(0, 60, 3))
    some = score(metric, answers, references).of_rows(chosen)
    expected = value(metric, [answers[i] for i in chosen], [references[i] for i in chosen])
    assert len(some) == 20 and len(some.rows) == 20
    if metric == "macro_f1":  # labels of the other rows may be answered
        expected = pytest.approx(expected, abs=0.2)
    assert some.value == expected

"""Task templates: a row becomes (source, target), or a message names the field at fault."""

from typing import Any

import pytest

from yan_core.tasks import TASKS, get_task
from yan_core.tokenization import MASK

ROW = {"context": "Mary is here.", "question": "Where is {Mary}?", "answer": "here", "more": 3}


def test_question_answering_pair() -> None:
    assert get_task("question_answering").pair(ROW) == ("Mary is here. Where is {Mary}?", "here")


def test_classification_pair() -> None:
    assert get_task("classification").pair({"text": "Stocks fell", "label": "Business"}) == ("Stocks fell", "Business")


def test_the_question_survives_a_source_that_is_too_long() -> None:
    assert get_task("question_answering").keep == "end"
    assert get_task("classification").keep == "start"


@pytest.mark.parametrize("name", ["question_answering", "classification"])
def test_fields_are_what_a_row_must_have(name: str) -> None:
    task = TASKS[name]
    assert task.name == name and task.metric
    assert task.fields[-1] == task.target
    row = {field: f"<{field}>" for field in task.fields}
    source, target = task.pair(row)
    assert all(row[field] in source for field in task.fields[:-1]) and target == row[task.target]


@pytest.mark.parametrize("field", ["context", "question", "answer"])
@pytest.mark.parametrize(
    ("value", "pattern"),
    [(None, "must be text, got None"), (3, r"must be text, got 3 \(int\)"), ("", "is blank"), (" \n", "is blank")],
)
def test_an_unusable_field_is_named(field: str, value: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"^field '{field}' {pattern}"):
        get_task("question_answering").pair({**ROW, field: value})


def test_a_missing_field_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="field 'question' is missing; the row has answer, context"):
        get_task("question_answering").pair({"context": "a", "answer": "b"})


def test_an_unknown_task_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"data\.task: unknown name 'clasification'; did you mean 'classification'\?"):
        get_task("clasification")


def test_infilling_hides_one_run_of_words_and_the_answer_is_what_was_hidden() -> None:
    task = get_task("infilling")
    assert task.fields == ("text",)
    lengths, starts = [], []
    for i in range(600):
        text = " ".join(f"w{i}_{j}" for j in range(12))
        source, answer = task.pair({"text": text})
        assert source.count(MASK) == 1 and source.replace(MASK, answer) == text
        assert task.pair({"text": text}) == (source, answer)
        lengths.append(len(answer.split()))
        starts.append(source.split().index(MASK))
    assert all(abs(lengths.count(n) / 600 - 1 / 3) < 0.07 for n in (1, 2, 3))
    assert min(starts) == 0 and max(starts) >= 10


def test_infilling_leaves_at_least_one_word_and_refuses_a_single_one() -> None:
    for i in range(50):
        source, answer = get_task("infilling").pair({"text": f"two words{i}"})
        assert len(source.split()) == 2 and len(answer.split()) == 1
    with pytest.raises(ValueError, match="field 'text' has one word"):
        get_task("infilling").pair({"text": "one"})

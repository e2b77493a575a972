"""Task templates: a row becomes (source, target), or a message names the field at fault."""

import json
from pathlib import Path
from typing import Any

import pytest

from yan_core.metrics import METRICS
from yan_core.tasks import TASKS, get_task
from yan_core.tokenization import MASK

ROW = {"context": "Mary is here.", "question": "Where is {Mary}?", "answer": "here", "more": 3}


def text_pair(task: str, text: str) -> tuple[str, str]:
    return get_task(task).pair({"text": text})


def test_question_answering_pair() -> None:
    assert get_task("question_answering").pair(ROW) == ("Mary is here. Where is {Mary}?", "here")


def test_classification_and_summarisation_pairs() -> None:
    assert get_task("classification").pair({"text": "Stocks fell", "label": "Business"}) == ("Stocks fell", "Business")
    assert get_task("summarisation").pair({"text": "A long text.", "summary": "Short."}) == ("A long text.", "Short.")


def test_what_matters_survives_a_source_that_is_too_long() -> None:
    kept = {name: task.keep for name, task in TASKS.items()}
    assert kept["question_answering"] == kept["last_word"] == kept["continuation"] == "end"
    assert kept["classification"] == kept["summarisation"] == "start"


@pytest.mark.parametrize("name", ["question_answering", "classification", "summarisation"])
def test_fields_are_what_a_row_must_have(name: str) -> None:
    task = TASKS[name]
    assert task.name == name and task.metric
    assert task.fields[-1] == task.target
    row = {field: f"<{field}>" for field in task.fields}
    source, target = task.pair(row)
    assert all(row[field] in source for field in task.fields[:-1]) and target == row[task.target]


def test_tasks_are_named_as_in_the_table_and_scored_by_metrics_there_are() -> None:
    table = (Path(__file__).parents[2] / "docs" / "TASKS.md").read_text(encoding="utf-8")
    for name, task in TASKS.items():
        assert task.name == name and set(task.metrics) <= set(METRICS)
        assert f"| `{name}` |" in table and ", ".join(f"`{metric}`" for metric in task.metrics) in table


def test_examples_of_the_page_are_what_the_templates_make() -> None:
    page = (Path(__file__).parents[2] / "docs" / "TASKS.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in page.split("```json\n")[1].split("```")[0].splitlines()]
    assert [row["task"] for row in rows] == list(TASKS)
    for row in rows:
        assert list(TASKS[row.pop("task")].pair(row)) == row["->"]


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
    with pytest.raises(ValueError, match="field 'answer' is missing, and so is 'answers'; the row has context, quest"):
        get_task("question_answering").pair({"context": "a", "question": "b"})


def test_an_unknown_task_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"data\.task: unknown name 'clasification'; did you mean 'classification'\?"):
        get_task("clasification")


# --- several right answers --------------------------------------------------------------------------------------------


def test_of_a_list_of_right_answers_the_first_is_trained_on_and_any_counts() -> None:
    task, row = get_task("question_answering"), {"context": "a", "question": "b", "answers": ["two men", "two"]}
    assert task.pair(row) == ("a b", "two men")
    assert task.answers(row) == ["two men", "two"]
    assert task.answers({**row, "answer": None}) == ["two men", "two"]
    assert task.answers({**row, "answer": "a pair"}) == ["a pair", "two men", "two"]
    assert task.answers({**row, "answer": "two", "answers": None}) == ["two"]
    assert sorted(task.texts(row)) == ["a", "b", "two", "two men"]


@pytest.mark.parametrize(
    "answers, pattern",
    [([], "list of at least one text"), ("two", "list of at least one"), (["a", " "], "blank"), (["a", 2], "got 2")],
)
def test_a_list_of_answers_that_is_none_is_refused(answers: Any, pattern: str) -> None:
    with pytest.raises(ValueError, match=f"^field 'answers' must .*{pattern}"):
        get_task("question_answering").pair({"context": "a", "question": "b", "answers": answers})


def test_another_tasks_answers_are_none_of_this_ones() -> None:
    """Rows of NarrativeQA hold answers to questions, which are no right answers of a hidden span."""
    row = {"text": "a long summary of a story", "question": "who?", "answers": ["nobody"]}
    task = get_task("infilling")
    assert task.answers(row) == [task.pair(row)[1]]


# --- parts of one text ------------------------------------------------------------------------------------------------


def test_infilling_hides_one_run_of_words_and_the_answer_is_what_was_hidden() -> None:
    task = get_task("infilling")
    assert task.fields == ("text",)
    lengths, starts = [], []
    for i in range(600):
        text = " ".join(f"w{i}_{j}" for j in range(12))
        source, answer = task.pair({"text": text})
        assert source.count(MASK) == 1 and task.whole(source, answer) == text
        assert task.pair({"text": text}) == (source, answer)
        lengths.append(len(answer.split()))
        starts.append(source.split().index(MASK))
    assert all(abs(lengths.count(n) / 600 - 1 / 3) < 0.07 for n in (1, 2, 3))
    assert min(starts) == 0 and max(starts) >= 10


def test_infilling_leaves_at_least_one_word_and_refuses_a_single_one() -> None:
    for i in range(50):
        source, answer = text_pair("infilling", f"two words{i}")
        assert len(source.split()) == 2 and len(answer.split()) == 1
    with pytest.raises(ValueError, match="field 'text' has one word"):
        text_pair("infilling", "one")


def test_of_a_long_text_the_words_around_the_mask_are_read() -> None:
    words = [f"w{i}" for i in range(1000)]
    places = set()
    for variant in range(20):
        source, answer = get_task("infilling").pair({"text": " ".join(words), "variant": f"question {variant}"})
        shown = source.split()
        assert len(shown) <= 64 + 1 + 64 and MASK in shown
        assert get_task("infilling").whole(source, answer) in " ".join(words)
        places.add(answer)
    assert len(places) == 20


@pytest.mark.parametrize(
    "text, source, word",
    [
        ("She went home.", "She went", "home"),
        ("She went home", "She went", "home"),
        ('He said "Hello there!"', 'He said "Hello', "there"),
        ('He whispered "hello..."', 'He whispered "', "hello"),
        ("it was a fine movie .", "it was a fine", "movie"),
        ("They don't know who's-who?!", "They don't know", "who's-who"),
        ("It cost $5.50.", "It cost $", "5.50"),
        ("Il est allé à l'école.", "Il est allé à", "l'école"),
    ],
)
def test_the_last_word_is_asked_for_without_its_punctuation(text: str, source: str, word: str) -> None:
    assert text_pair("last_word", text) == (source, word)


@pytest.mark.parametrize("text", ["one", "one .", "... !", "__ -- one"])
def test_a_last_word_needs_another_one_before(text: str) -> None:
    if text == "__ -- one":  # what stands before it need not be a word
        assert text_pair("last_word", text) == ("__ --", "one")
    else:
        with pytest.raises(ValueError, match="fewer than two words"):
            text_pair("last_word", text)


def test_a_continuation_is_the_second_half_of_the_sentences() -> None:
    assert text_pair("continuation", 'A b. C d! "E f?" G h.') == ("A b. C d!", '"E f?" G h.')
    assert text_pair("continuation", "A b. C d.\nE f.") == ("A b. C d.", "E f.")
    assert text_pair("continuation", "one sentence of five words") == ("one sentence of", "five words")
    with pytest.raises(ValueError, match="has one word"):
        text_pair("continuation", "one")


def test_a_continuation_ends_with_a_sentence_where_that_fits() -> None:
    sentences = [" ".join(["word"] * 14) + f" {i}." for i in range(8)]
    source, target = text_pair("continuation", " ".join(sentences))
    assert source == " ".join(sentences[:4]) and target == " ".join(sentences[4:6])  # 30 words; 45 are too many
    source, target = text_pair("continuation", "Start. " + "word " * 60)
    assert source == "Start." and target == " ".join(["word"] * 40)


def test_a_prompt_needs_no_answer_and_is_the_source_of_the_pair() -> None:
    question = {name: ROW[name] for name in ("context", "question")}
    assert get_task("question_answering").prompt(question) == get_task("question_answering").pair(ROW)[0]
    assert get_task("classification").prompt({"text": "Stocks fell"}) == "Stocks fell"
    with pytest.raises(ValueError, match="field 'question' is missing"):
        get_task("question_answering").prompt({"context": "Mary is here."})


def test_a_prompt_of_a_text_is_the_text_as_it_stands() -> None:
    for name in ("last_word", "continuation"):
        assert get_task(name).prompt({"text": "One. Two  three."}) == "One. Two three."
        with pytest.raises(ValueError, match="field 'text' is blank"):
            get_task(name).prompt({"text": " "})


def test_infilling_wants_one_mask_and_reads_the_words_around_it() -> None:
    task = get_task("infilling")
    words = [str(i) for i in range(200)]
    source, _ = task.pair({"text": " ".join(words)})
    assert task.prompt({"text": source}) == source
    long = " ".join([*words, f"{MASK},", *words])
    assert task.prompt({"text": long}) == " ".join([*words[-64:], MASK, ",", *words[:63]])
    assert task.prompt({"text": f"She went{MASK}  home"}) == f"She went {MASK} home"
    for text, count in (("no hole", 0), (f"{MASK} and {MASK}", 2)):
        with pytest.raises(ValueError, match=f"must have <mask> once, where words are missing, got it {count} times"):
            task.prompt({"text": text})

"""Scores of a saved model on given rows."""

import random
import shutil
from dataclasses import replace

import pytest
import torch

import yan_core
from pipelines.evaluation import evaluate_model, summary
from tests.yan_core.tiny import tiny_config, tiny_model
from yan_core.checkpoint import save_pretrained
from yan_core.config import BaselineConfig, EvaluationConfig, SamplingConfig, TokenizerConfig
from yan_core.model import build_model
from yan_core.tasks import get_task
from yan_core.tokenization import Tokenizer

TWO_STEPS = EvaluationConfig(num_steps=(2,))
TEXTS = ["Mary went to the Kitchen", "Where is Mary?", "John took the Ball"]
DETAILS = {"task": "question_answering", "max_source_tokens": 16, "max_target_tokens": 4}


@pytest.fixture(params=[False, True], ids=["cased", "lowercase"])
def model_folder(request, tmp_path):
    """A random model whose tokenizer keeps or lowers the case, and whether it lowers it."""
    tokenizer = Tokenizer.train(TEXTS, TokenizerConfig(lowercase=request.param))
    model = build_model(tiny_model().config, tokenizer.vocab_size, seed=0)
    save_pretrained(tmp_path / "model", model, tokenizer, DETAILS)
    return tmp_path / "model", request.param


def rows_with_own_answers(folder, change):
    """Rows whose reference is what the model answers, changed."""
    generator = yan_core.load(folder)
    rows = [{"source": f"{text} {i}", "kind": "ab"[i % 2]} for i, text in enumerate(TEXTS * 4)]
    for i, row in enumerate(rows):
        row["answers"] = ["no", change(generator.generate([row["source"]], 2, seeds=i)[0].text)]
    return rows


def test_case_counts_unless_the_tokenizer_lowers_it(model_folder):
    folder, lowercase = model_folder
    rows = rows_with_own_answers(folder, str.swapcase)
    with_case = [row for row in rows if row["answers"][1].lower() != row["answers"][1].upper()]
    (quality,) = evaluate_model(folder, rows, replace(TWO_STEPS, batch_size=5))
    expected = 1 if lowercase else 1 - len(with_case) / len(rows)
    assert with_case and quality.value == pytest.approx(expected)


def test_a_row_keeps_its_seed_in_any_batch_and_kinds_have_their_own_figure(model_folder):
    folder, _ = model_folder
    rows = rows_with_own_answers(folder, str)
    for batch_size in (1, 5, 64):
        (quality,) = evaluate_model(folder, rows, replace(TWO_STEPS, batch_size=batch_size))
        assert quality.value == 1 and quality.by_kind == {"a": 1.0, "b": 1.0}
    rows[0]["answers"] = ["something else"]
    (quality,) = evaluate_model(folder, rows, TWO_STEPS)
    wrong, right = rows[0]["kind"], {"a": "b", "b": "a"}[rows[0]["kind"]]
    assert quality.by_kind[wrong] < quality.value < quality.by_kind[right] == 1
    written = summary(quality, len(rows), folder, "rows.parquet")
    assert written["metrics"]["exact_match"] == quality.value and written["counts"]["rows"] == len(rows)
    assert written["metrics"][f"exact_match/{wrong}"] == quality.by_kind[wrong]
    low, high = written["intervals"]["exact_match"]
    assert low < quality.value < high == 1


@pytest.mark.parametrize("length", ["fill", "predicted"])
def test_a_model_is_scored_with_its_own_lengths_and_with_the_true_ones(tmp_path, length):
    tokenizer = Tokenizer.train(TEXTS, TokenizerConfig())
    config = tiny_config(length=length)
    save_pretrained(tmp_path / "model", build_model(config, tokenizer.vocab_size, seed=0), tokenizer, DETAILS)
    generator = yan_core.load(tmp_path / "model")
    rows = [{"source": text, "answers": [""]} for text in TEXTS]
    for i, row in enumerate(rows):  # the reference is what it says when told to say one token
        row["answers"] = [generator.generate([row["source"]], 2, seeds=i, lengths=[1])[0].text]
    (quality,) = evaluate_model(tmp_path / "model", rows, TWO_STEPS)
    own = [generator.generate([row["source"]], 2, seeds=i)[0].text for i, row in enumerate(rows)]
    assert quality.oracle_value == 1
    assert quality.value == sum(a == r["answers"][0] for a, r in zip(own, rows, strict=True)) / 3 < 1
    written = summary(quality, 3, tmp_path, "rows.parquet")["metrics"]
    task = get_task("question_answering")
    assert set(written) == {*task.metrics, *(f"{m}_oracle_length" for m in task.metrics)}
    assert (written["exact_match"], written["exact_match_oracle_length"]) == (quality.value, 1.0)


def test_trunk_passes_are_reported_as_they_are(model_folder):
    folder, _ = model_folder
    rows = rows_with_own_answers(folder, str)
    guided = SamplingConfig(guidance_scale=2.0, method="midpoint")
    three = EvaluationConfig(num_steps=(3,))
    (plain,), (dear,) = (evaluate_model(folder, rows, how) for how in (three, replace(three, sampling=guided)))
    assert (plain.nfe, dear.nfe) == (3, 12)


def test_evaluating_twice_gives_the_same_quality_to_the_last_digit(model_folder):
    folder, _ = model_folder
    rows = [{"source": f"{text} {i}", "answers": ["kitchen", "Mary went"]} for i, text in enumerate(TEXTS * 4)]
    found = []
    for seed in (0, 1):  # nothing may depend on the process's own generators
        torch.manual_seed(seed)
        random.seed(seed)
        (quality,) = evaluate_model(folder, rows, replace(TWO_STEPS, batch_size=5, diversity=3))
        found.append((quality.metrics, quality.intervals, quality.counts, quality.examples))
    assert found[0] == found[1]


def test_several_answers_a_row_tell_how_they_differ(model_folder):
    folder, _ = model_folder
    rows = [{"source": text, "answers": ["x"]} for text in TEXTS]
    (quality,) = evaluate_model(folder, rows, replace(TWO_STEPS, diversity=3))
    generator = yan_core.load(folder)
    shares = []
    for i, row in enumerate(rows):
        texts = {generator.generate([row["source"]], 2, seeds=i + k * len(rows))[0].text for k in range(3)}
        shares.append(len(texts) / 3)
    assert quality.metrics["distinct_answers"] == pytest.approx(sum(shares) / 3)
    assert {"self_bleu", "distinct_1", "distinct_2"} <= set(quality.intervals)
    with pytest.raises(ValueError, match="0 or >= 2"):
        replace(TWO_STEPS, diversity=1)


def test_a_baseline_answers_greedily_and_draws_for_its_diversity(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, TokenizerConfig())
    shape = BaselineConfig(d_model=16, num_blocks=1, num_heads=1)
    save_pretrained(tmp_path / "model", build_model(shape, tokenizer.vocab_size, seed=0), tokenizer, DETAILS)
    loaded = yan_core.load(tmp_path / "model")
    drawn = [
        [loaded.generate([t], 2, seeds=i + 3 * k, do_sample=True)[0].text for k in range(3)]
        for i, t in enumerate("abc")
    ]
    greedy = [loaded.generate([text], 2)[0].text for text in "abc"]
    assert len({*greedy, *sum(drawn, [])}) > 4
    # What is drawn for the first row is right there, what is likeliest in the two others.
    rows = [{"source": t, "answers": [a]} for t, a in zip("abc", [drawn[0][0], greedy[1], greedy[2]], strict=True)]
    (quality,) = evaluate_model(tmp_path / "model", rows, replace(TWO_STEPS, diversity=3))
    assert quality.metrics["exact_match"] == pytest.approx(2 / 3)
    assert quality.metrics["exact_match_drawn"] == pytest.approx(1 / 3)
    assert quality.metrics["distinct_answers"] == pytest.approx(sum(len({*texts}) / 3 for texts in drawn) / 3)


def test_local_models_measure_where_the_config_names_them(model_folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra baselines")
    folder, _ = model_folder
    judge = tmp_path / "judge"
    shutil.copytree(folder, judge)  # for its tokenizer, which AutoTokenizer reads
    shape = {
        "vocab_size": yan_core.load(folder).tokenizer.vocab_size,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
    }
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(judge)
    rows = [{"source": text, "answers": ["the kitchen"]} for text in TEXTS]
    how = replace(TWO_STEPS, perplexity_model=str(judge), bertscore_model=str(judge))
    (quality,) = evaluate_model(folder, rows, how)
    assert quality.metrics["perplexity"] > 1 and 0 < quality.metrics["bertscore"] <= 1
    (without,) = evaluate_model(folder, rows, TWO_STEPS)
    assert quality.metrics.keys() - without.metrics.keys() == {
        *("perplexity", "bertscore", "perplexity_oracle_length", "bertscore_oracle_length")
    }


def test_labels_that_are_none_and_sources_that_are_cut_are_counted(tmp_path):
    tokenizer = Tokenizer.train([*TEXTS, "Sports World"], TokenizerConfig())
    model = build_model(tiny_model().config, tokenizer.vocab_size, seed=0)
    save_pretrained(tmp_path / "model", model, tokenizer, {**DETAILS, "task": "classification"})
    rows = [{"source": text, "answers": ["World"]} for text in [*TEXTS, " ".join(["Mary"] * 20)]]
    (quality,) = evaluate_model(tmp_path / "model", rows, TWO_STEPS)
    answers = [example["answer"] for example in quality.examples]
    counts = summary(quality, 4, tmp_path, "x.jsonl", {"rows_filtered": 7})["counts"]
    assert (counts["rows"], counts["rows_filtered"]) == (4, 7)
    assert counts["invalid_labels"] == sum(answer != "World" for answer in answers)
    assert (counts["sources_cut"], counts["source_tokens_cut"]) == (1, 4)
    assert set(quality.metrics) >= {"accuracy", "macro_f1", "accuracy_oracle_length"}


def test_nothing_to_score_is_an_error(model_folder):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_model(model_folder[0], [], TWO_STEPS)

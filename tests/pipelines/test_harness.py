"""lm-evaluation-harness: its requests, and docs/HARNESS.md's task files through its own command line, offline."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import yan_core
from pipelines.cli import main
from pipelines.evaluation import evaluate_model
from pipelines.world import WorldConfig, examples
from tests.yan_core.tiny import randomize, tiny_config
from yan_core.checkpoint import read_config, save_pretrained
from yan_core.config import EvaluationConfig, SamplingConfig, TokenizerConfig
from yan_core.model import build_model
from yan_core.tasks import get_task
from yan_core.tokenization import Tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `harness`")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from pipelines.harness import YanLM  # noqa: E402

ROOT = Path(__file__).parents[2]
ROWS = list(examples(WorldConfig(seed=7), 0, 30, "validation"))
TEXTS = [row["context"] for row in ROWS]
PAIRS = [get_task("infilling").pair({"text": text}) for text in TEXTS]


def save(folder: Path, task: str, lowercase: bool = False) -> Path:
    """A random model whose answers depend on the source."""
    tokenizer = Tokenizer.train([*TEXTS, *(row["question"] for row in ROWS)], TokenizerConfig(lowercase=lowercase))
    model = randomize(build_model(tiny_config(max_positions=256), tokenizer.vocab_size, seed=0))
    details = {"task": task, "max_source_tokens": 200, "max_target_tokens": 6}
    save_pretrained(folder, model, tokenizer, details)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> SimpleNamespace:
    base = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        answering=save(base / "answering", "question_answering"),
        filling=save(base / "filling", "infilling"),
        lower=save(base / "lower", "question_answering", lowercase=True),
    )


def ask(context: str, doc: int = 0, task: str = "t", **settings) -> Instance:
    return Instance("generate_until", {}, (context, settings), 0, (task, doc, 1))


def direct(folder: Path, sources: list[str], **how) -> list[str]:
    """What the generator says to sources, the seed of each its place."""
    return [g.text for g in yan_core.load(folder).generate(sources, seeds=list(range(len(sources))), **how)]


def test_the_harness_finds_it_by_name():
    assert get_model("yan") is YanLM


@pytest.mark.parametrize("batch_size", [1, 7, "64"])
def test_answers_are_the_generators_own_in_any_batch(folders, batch_size):
    model = YanLM(pretrained=str(folders.answering), num_steps=2, batch_size=batch_size, device="cuda:0")
    answers = model.generate_until([ask(text, i, until=["\n"]) for i, text in enumerate(TEXTS)])
    assert answers == direct(folders.answering, TEXTS, num_steps=2)
    assert len(set(answers)) > 10


def test_how_answers_are_sampled_can_be_named(folders):
    how = {"num_candidates": 3, "method": "midpoint", "ranking": "confidence"}
    model = YanLM(pretrained=str(folders.answering), batch_size=64, **how)
    answers = model.generate_until([ask(text, i) for i, text in enumerate(TEXTS)])
    sampling = SamplingConfig(**how)  # type: ignore[arg-type]
    assert answers == direct(folders.answering, TEXTS, sampling=sampling) != direct(folders.answering, TEXTS)


def test_the_seed_follows_from_the_document_and_not_from_what_else_is_asked(folders):
    model = YanLM(pretrained=str(folders.answering), batch_size=4, seed=5)
    every = [ask(TEXTS[0], i) for i in range(20)]
    answers = model.generate_until(every)
    assert model.generate_until(every[::-3]) == answers[::-3] and len(set(answers)) > 5
    expected = yan_core.load(folders.answering).generate([TEXTS[0]] * 20, seeds=list(range(5, 25)))
    assert answers == [g.text for g in expected]
    repeated = model.generate_until([every[0]] * 10)
    assert repeated[0] == answers[0] and len(set(repeated)) > 3
    assert model.generate_until([every[0]] * 10) == repeated


def test_limits_are_kept_and_no_more_is_written_than_was_trained(folders):
    model = YanLM(pretrained=str(folders.answering), batch_size=8)
    limits = [2, 5, 500, None] * 5
    settings = [{} if limit is None else {"max_gen_toks": limit} for limit in limits]
    answers = model.generate_until([ask(TEXTS[i], i, **settings[i]) for i in range(20)])
    for i, (limit, answer) in enumerate(zip(limits, answers, strict=True)):
        expected = model.generator.generate([TEXTS[i]], max_tokens=min(limit or 6, 6), seeds=i)[0]
        assert answer == expected.text and len(expected.tokens) <= (limit or 6)


def test_an_answer_ends_before_the_first_stop_string_in_its_own_case(folders):
    answers = direct(folders.lower, TEXTS)
    i = next(i for i, answer in enumerate(answers) if len(set(answer.split()[:2])) == 2)
    first, second = answers[i].split()[:2]
    model = YanLM(pretrained=str(folders.lower))
    for until, left in (([f" {second.upper()}"], first), ([f" {second}", first[1:].upper(), ""], first[0])):
        assert model.generate_until([ask(TEXTS[i], i, until=until)]) == [left]


def test_a_mask_is_filled_in_and_a_long_text_read_around_it(folders):
    sources = [masked for masked, _ in PAIRS]
    model = YanLM(pretrained=str(folders.filling), batch_size=8)
    assert model.generate_until([ask(s, i) for i, s in enumerate(sources)]) == direct(folders.filling, sources)
    before, after, far = (" ".join([word] * count) for word, count in (("Mary", 64), ("went", 64), ("John", 300)))
    assert model.generate_until([ask(f"{far} {before} <mask> {after} {far}")]) == direct(
        folders.filling, [f"{before} <mask> {after}"]
    )


@pytest.mark.parametrize(
    "kind, context, message",
    [
        (
            "answering",
            "Mary went to <mask>.",
            "answers question_answering and fills in no <mask>; document 3 of task t",
        ),
        ("filling", "Mary went.", "fills in one <mask>; document 3 of task t has 0"),
        ("filling", "<mask> went to <mask>.", "fills in one <mask>; document 3 of task t has 2"),
    ],
)
def test_a_mask_where_there_is_none_to_fill_in_is_refused(folders, kind, context, message):
    model = YanLM(pretrained=str(getattr(folders, kind)))
    with pytest.raises(ValueError, match=message):
        model.generate_until([ask("Mary went.", 0) if kind == "answering" else ask("a <mask>", 0), ask(context, 3)])


def test_likelihoods_are_refused_and_the_way_out_is_named(folders):
    model = YanLM(pretrained=str(folders.answering))
    for method in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(ValueError, match=r"piqa: .*cannot be computed.*generate_until.*--perplexity-model"):
            method([Instance("loglikelihood", {}, ("a", "b"), 0, ("piqa", 0, 1))])


@pytest.mark.parametrize(
    "args, message",
    [
        ({}, "model_args.pretrained is missing"),
        ({"pretrained": "nowhere"}, "not a YAN model"),
        ({"pretrained": "x", "num_step": 2}, r"model_args.num_step: unknown name 'num_step'; did you mean 'num_steps'"),
        ({"pretrained": "x", "num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"pretrained": "x", "batch_size": "auto"}, "model_args.batch_size must be of type int, got 'auto'"),
        ({"pretrained": "x", "method": "rk4"}, "model_args.method must be one of 'euler'"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        YanLM(**args)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The files that docs/HARNESS.md speaks of, its own among them."""
    text = (ROOT / "docs" / "HARNESS.md").read_text(encoding="utf-8")
    for name in ("tasks", "mine"):
        (tmp_path / name).mkdir()
    for yaml in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / "tasks" / f"{yaml.split()[1]}.yaml").write_text(yaml)
    (tmp_path / "mine" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine" / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (python,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    exec(python, {})
    return tmp_path


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "pipelines.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "--model", "yan"]) == 1
    assert "pip install -e '.[harness]'" in capsys.readouterr().err


def test_question_answering_through_the_command_line(workplace, folders):
    sources = [get_task("question_answering").pair(row)[0] for row in ROWS]
    answers = direct(folders.answering, sources, num_steps=2)
    # A random model is never right: let a third of its answers be.
    asked = [{**row, "answer": answers[i]} if i % 3 == 0 else row for i, row in enumerate(ROWS)]
    (workplace / "mine" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    command = [sys.executable, "-m", "pipelines", "lm-eval", "--model", "yan", "--include_path", "tasks"]
    command += ["--model_args", f"pretrained={folders.answering},num_steps=2", "--batch_size", "8", "--tasks", "where"]
    done = subprocess.run(
        [*command, "--output_path", "out", "--log_samples"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "exact_match" in done.stdout, done.stderr[-3000:]
    (samples,), (results,) = workplace.glob("out/*/samples_where_*.jsonl"), workplace.glob("out/*/results_*.json")
    said = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    assert [row["resps"][0][0] for row in said] == answers
    rows = [{"source": s, "answers": [row["answer"]]} for s, row in zip(sources, asked, strict=True)]
    (quality,) = evaluate_model(folders.answering, rows, EvaluationConfig(num_steps=(2,)))
    found = json.loads(results.read_text())
    assert found["results"]["where"]["exact_match,none"] == pytest.approx(quality.value) and 0 < quality.value < 1
    assert found["config"]["model_sha"] == read_config(folders.answering)["sha256"]["model.safetensors"]


def evaluate(task: str, folder: Path, **settings) -> dict[str, Any]:
    manager = TaskManager(include_path="tasks", include_defaults=False)
    args = {"pretrained": str(folder), "num_steps": 2}
    found = lm_eval.simple_evaluate("yan", args, [task], batch_size=8, task_manager=manager, **settings)
    assert found is not None
    return cast(dict[str, Any], found)


def test_infilling_through_the_harness(workplace, folders):
    found = evaluate("fill", folders.filling)
    said = sorted(found["samples"]["fill"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in said] == direct(folders.filling, [m for m, _ in PAIRS], num_steps=2)
    assert [sample["target"] for sample in said] == [answer for _, answer in PAIRS]
    assert found["results"]["fill"]["exact_match,none"] == 0


def test_a_task_of_likelihoods_is_refused(workplace, folders):
    (workplace / "tasks" / "choose.yaml").write_text(
        "{task: choose, dataset_path: json, dataset_kwargs: {data_files: {test: mine/validation.jsonl}},"
        ' test_split: test, output_type: multiple_choice, doc_to_text: "{{context}}", doc_to_choice: [a, b],'
        " doc_to_target: 0}"
    )
    with pytest.raises(ValueError, match="choose: `yan` writes answers and scores none"):
        evaluate("choose", folders.answering, limit=2)

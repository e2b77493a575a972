"""Quality in the midst of a stage, and the weights that had the best of it."""

from pathlib import Path

import pytest
import torch

import yan_core
from pipelines.checkpoints import Checkpoints
from pipelines.evaluation import evaluate_model
from pipelines.order import RowOrder, Shard, StageOrder
from pipelines.state import StageJob, StageState
from pipelines.validation import BEST, Validation
from yan_core.config import RunConfig, TokenizerConfig, from_dict, to_dict
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

SOURCES = ["Mary went to the kitchen", "Where is Mary?", "John took the ball", "Who has it?"]


class Heard:
    """A reporter that remembers."""

    def __init__(self):
        self.lines, self.figures, self.samples = [], [], []

    def say(self, line):
        self.lines.append(line)

    def record(self, quality):
        self.figures.append(quality)

    def show_samples(self, samples):
        self.samples.append(samples)

    def leave_out(self, seconds):
        assert seconds > 0


@pytest.fixture
def config(tiny_config) -> RunConfig:
    values = to_dict(tiny_config)
    values["evaluation"] |= {"every_steps": 2, "keep": "best", "num_steps": [1, 2]}
    return from_dict(RunConfig, values)


def state_of(config: RunConfig, tmp_path: Path, seed: int = 0, fingerprint: str = "f") -> StageState:
    tokenizer = Tokenizer.train(SOURCES, TokenizerConfig())
    model = build_model(config.model, tokenizer.vocab_size, seed)
    job = StageJob("finetune", {}, fingerprint, "", str(tmp_path / "out"), str(tmp_path / "record"))
    order = StageOrder(RowOrder([Shard("a", 100)], seed=0), config.stages.finetune, config.data)
    return StageState(config, job, model, tokenizer, order)


def rows_answered_by(folder: Path) -> list[dict]:
    """Rows whose right answer is what a model says at two steps."""
    generator = yan_core.load(folder)
    return [{"source": s, "answers": [generator.generate([s], 2, seeds=i)[0].text]} for i, s in enumerate(SOURCES)]


@pytest.fixture
def good_and_bad(config, tmp_path):
    """A state with weights that answer all rows rightly at two steps, those weights, others, and the rows."""
    state = state_of(config, tmp_path)
    good = state.result()
    bad = build_model(config.model, state.tokenizer.vocab_size, 5).state_dict()
    state.save_model(tmp_path / "good", good)
    return state, good, bad, rows_answered_by(tmp_path / "good")


def look_at(state: StageState, validation: Validation, weights: dict, step: int) -> Heard:
    state.model.load_state_dict(weights)
    state.step = step
    heard = Heard()
    validation.look(heard)
    return heard


def test_it_measures_what_an_evaluation_of_the_result_would(config, tmp_path, good_and_bad):
    state, good, _, rows = good_and_bad
    state.model.train()
    heard = look_at(state, Validation(state, rows, Checkpoints(str(tmp_path / "c")), 0), good, 2)
    expected = {q.num_steps: q.value for q in evaluate_model(tmp_path / "good", rows, config.evaluation)}
    assert expected[2] == 1
    (figures,) = heard.figures
    assert figures == pytest.approx(
        {"exact_match_1_steps": expected[1], "exact_match_2_steps": 1.0, "exact_match": (expected[1] + 1) / 2}
    )
    assert heard.samples[0][0] == {
        "source": SOURCES[0],
        "target": rows[0]["answers"][0],
        "answer": rows[0]["answers"][0],
    }
    assert "exact_match" in heard.lines[0] and "the best so far" in heard.lines[0] and state.model.training


def test_the_best_weights_are_kept_over_later_ones_and_restarts(config, tmp_path, good_and_bad):
    state, good, bad, rows = good_and_bad
    checkpoints = Checkpoints(str(tmp_path / "c"))
    validation = Validation(state, rows, checkpoints, 0)
    look_at(state, validation, bad, 2)
    assert "the best so far" in look_at(state, validation, good, 4).lines[0]
    assert checkpoints.names(BEST) == [f"{BEST}00000004"]
    again = Validation(state, rows, checkpoints, 0)  # as after a restart
    assert "the best so far" not in look_at(state, again, bad, 6).lines[0]
    assert "the best so far" not in look_at(state, again, good, 8).lines[0]
    kept = again.best_weights()
    assert kept is not None and all(torch.equal(kept[name], good[name]) for name in good)


def test_the_best_of_another_stage_or_a_damaged_one_does_not_count(config, tmp_path, good_and_bad, caplog):
    state, good, _, rows = good_and_bad
    checkpoints = Checkpoints(str(tmp_path / "c"))
    look_at(state, Validation(state, rows, checkpoints, 0), good, 2)
    other = state_of(config, tmp_path, fingerprint="another")
    assert Validation(other, rows, checkpoints, 0).best_weights() is None
    weights = tmp_path / "c" / f"{BEST}00000002" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    validation = Validation(state, rows, checkpoints, 0)
    assert validation.best < 0 and validation.best_weights() is None
    assert "model.safetensors is damaged" in caplog.text


def test_measured_every_so_many_steps_and_at_the_end(config, tmp_path, good_and_bad):
    state, *_, rows = good_and_bad
    validation = Validation(state, rows, Checkpoints(str(tmp_path / "c")), 0)
    due = []
    for state.step in range(1, config.stages.finetune.max_steps + 1):
        due += [state.step] if validation.due() else []
    assert due == [2, 4, 6, 8, 10, 12]


def test_averaged_weights_are_those_measured(config, tmp_path, good_and_bad):
    *_, good, bad, rows = good_and_bad
    values = to_dict(config)
    values["stages"]["finetune"]["optim"]["ema_decay"] = 0.9
    state = state_of(from_dict(RunConfig, values), tmp_path)
    assert state.average is not None
    state.average.weights = {name: value.clone() for name, value in good.items()}
    validation = Validation(state, rows, Checkpoints(str(tmp_path / "c")), 0)
    assert look_at(state, validation, bad, 2).figures[0]["exact_match_2_steps"] == 1
    kept = validation.best_weights()
    assert kept is not None and all(torch.equal(kept[name], good[name]) for name in good)

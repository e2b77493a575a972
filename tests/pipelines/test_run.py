"""What is done again and what is not; one process at a time."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import listing
from pipelines.folders import difference, run_lock
from pipelines.prepare import _inputs
from pipelines.run import _start_of_training, data_inputs, fingerprint, run, stage_inputs, up_to_date
from pipelines.state import check_stages
from pipelines.stream import lanes_of
from tests.yan_core.tiny import tiny_config
from yan_core.checkpoint import save_pretrained
from yan_core.config import RunConfig, TokenizerConfig, from_dict
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

DETAILS = {"task": "infilling", "max_source_tokens": 8, "max_target_tokens": 4}


def changed(config: RunConfig, section: str, **values) -> RunConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def test_a_stage_depends_on_its_own_settings_and_the_stage_before():
    base = RunConfig()
    other = changed(base, "stages", finetune=dataclasses.replace(base.stages.finetune, max_steps=7))
    assert stage_inputs(base, "flow", "x") == stage_inputs(other, "flow", "x")
    assert fingerprint(stage_inputs(base, "finetune", "x")) != fingerprint(stage_inputs(other, "finetune", "x"))
    assert fingerprint(stage_inputs(base, "finetune", "x")) != fingerprint(stage_inputs(base, "finetune", "y"))


@pytest.mark.parametrize(
    "section, values",
    [("tokenizer", {"lowercase": True}), ("data", {"window_tokens": 8}), ("data", {"max_source_tokens": 8})],
)
def test_prepared_data_depend_on_tokenizer_and_lengths(section, values):
    assert data_inputs(RunConfig()) != data_inputs(changed(RunConfig(), section, **values))


def test_what_only_says_where_or_how_often_changes_nothing():
    base = RunConfig()
    for other in (dataclasses.replace(base, log_every_s=1.0), dataclasses.replace(base, runs_dir="elsewhere")):
        assert data_inputs(base) == data_inputs(other)
        assert stage_inputs(base, "flow", "x") == stage_inputs(other, "flow", "x")


def test_what_is_measured_changes_no_weights_and_how_they_are_chosen_does():
    base = changed(RunConfig(), "evaluation", keep="best", every_steps=10)
    more = changed(base, "evaluation", diversity=8, perplexity_model="gpt2")
    assert stage_inputs(base, "finetune", "x") == stage_inputs(more, "finetune", "x")
    for other in ({"every_steps": 20}, {"rows_while_training": 7}, {"num_steps": (3,)}, {"keep": "last"}):
        assert stage_inputs(base, "finetune", "x") != stage_inputs(
            changed(base, "evaluation", **other), "finetune", "x"
        )


def test_a_model_that_measures_and_is_not_there_is_told_before_anything_starts(tmp_path):
    config = changed(dataclasses.replace(RunConfig(), runs_dir=str(tmp_path)), "evaluation", bertscore_model="nowhere")
    with pytest.raises(ValueError, match="evaluation.bertscore_model: no model at nowhere: name a folder"):
        run(config)
    assert list(tmp_path.iterdir()) == []


def test_workers_that_would_make_unlike_numbers_of_passes_are_told_before_anything_starts(tmp_path):
    """Of 16 rows in 8 lanes three workers have 6, 6 and 4."""
    stages = {stage: {"max_steps": 1, "batch_size": 16} for stage in ("autoencoder", "flow", "finetune")}
    values = {"runs_dir": str(tmp_path), "stages": stages, "scaling": {"num_workers": [1, 3], "accumulation": 5}}
    with pytest.raises(
        ValueError, match="accumulation=5 must be at most 4, .*autoencoder.batch_size=16 where 3 share its 8 lanes"
    ):
        run(from_dict(RunConfig, values))
    assert list(tmp_path.iterdir()) == []
    assert [len(lanes_of(rank, 8, 3)) * 2 for rank in range(3)] == [6, 6, 4]
    check_stages(from_dict(RunConfig, values | {"scaling": {"num_workers": 2, "accumulation": 50}}))  # 8 passes each


def test_a_run_that_trains_nothing_is_told_before_anything_starts(tmp_path):
    stages = {stage: {"max_steps": 0} for stage in ("autoencoder", "flow", "finetune")}
    with pytest.raises(ValueError, match="every stage has max_steps=0: nothing to train"):
        run(from_dict(RunConfig, {"runs_dir": str(tmp_path), "stages": stages}))
    assert list(tmp_path.iterdir()) == []


def test_a_changed_file_is_noticed_and_one_that_was_fetched_again_is_not(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"context": "a", "question": "b", "answer": "c"}\n')
    datasets = {"own": {"format": "jsonl", "train": str(file), "validation": str(file)}}
    config = from_dict(RunConfig, {"data": {"dataset": "own", "datasets": datasets}})
    before = data_inputs(config)
    os.utime(file, ns=(1, 1))
    assert data_inputs(config) == before
    file.write_text(file.read_text().replace("c", "d"))
    assert "rows.jsonl" in difference(before, data_inputs(config))
    file.write_text(file.read_text() * 2)
    assert "rows.jsonl" in difference(before, data_inputs(config))
    monkeypatch.setattr(listing, "HASHED_BYTES", 10)
    before = data_inputs(config)
    os.utime(file, ns=(2, 2))
    assert "rows.jsonl" in difference(before, data_inputs(config))  # too much to be read through: its time counts


def a_model(folder: Path, seed: int, words: str = "a b c") -> str:
    tokenizer = Tokenizer.train([words], TokenizerConfig())
    save_pretrained(folder, build_model(tiny_config(), tokenizer.vocab_size, seed).eval(), tokenizer, DETAILS)
    return str(folder)


def test_data_depend_on_the_tokenizer_given_and_training_on_the_weights_too(tmp_path):
    """Whatever the folder is called: what is in it counts, in what an interrupted preparation goes on from too."""
    start = a_model(tmp_path / "start", 0)
    named = changed(RunConfig(), "tokenizer", path=start)
    begun, both = dataclasses.replace(RunConfig(), init_from=start), dataclasses.replace(named, init_from=start)
    configs = {"named": named, "begun": begun, "both": both}

    def seen() -> dict[str, tuple[dict, str, str]]:
        return {name: (data_inputs(of), _inputs(of, []), _start_of_training(of)) for name, of in configs.items()}

    first = seen()
    assert first["named"][0] == first["both"][0]  # so that `yan compare` shares them
    a_model(tmp_path / "start", 1)
    weights = seen()
    assert weights["named"] == first["named"] and weights["both"][0] == first["both"][0]
    assert weights["both"][2] != first["both"][2] and weights["begun"][2] != first["begun"][2]
    a_model(tmp_path / "start", 1, "a b c d")
    words = seen()
    for name in configs:
        assert all(new != old for new, old in zip(words[name], weights[name], strict=True)), name
    other = changed(begun, "tokenizer", path=a_model(tmp_path / "other", 0, "x y"))
    with pytest.raises(ValueError, match="have different tokenizers, and a model keeps its own: leave tokenizer.path"):
        data_inputs(other)


def test_the_decision_names_the_setting(tmp_path, capsys):
    recorded = tmp_path / "flow.inputs.json"
    inputs = {"stages": {"flow": {"optim": {"lr": 1.0}}}, "before": "a"}
    assert not up_to_date("flow", recorded, inputs, True)
    recorded.write_text(json.dumps(inputs))
    assert up_to_date("flow", recorded, inputs, True)
    assert not up_to_date("flow", recorded, inputs, False)
    assert not up_to_date("flow", recorded, {**inputs, "stages": {"flow": {"optim": {"lr": 2.0}}}}, True)
    assert not up_to_date("flow", recorded, {**inputs, "before": "b"}, True)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "flow: not done yet"
    assert shown[1] == "flow: done before, inputs unchanged"
    assert "damaged or gone" in shown[2]
    assert "stages.flow.optim.lr: 1.0 -> 2.0" in shown[3]
    assert "the step before it was redone" in shown[4]


def test_a_fresh_start_empties_its_own_folder_alone(tmp_path):
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        (folder / "stages").mkdir(parents=True)
        (folder / "run.json").write_text("{}")
    with run_lock(ours, fresh=True):
        assert [p.name for p in ours.iterdir()] == [".lock"]
    assert (other / "run.json").is_file()


def test_what_a_killed_run_left_half_written_is_cleared_up(tmp_path):
    for name in (".model.999.part", ".flow.999.old", ".autoencoder.999.old", "autoencoder"):
        (tmp_path / "stages" / name).mkdir(parents=True)
    (tmp_path / ".run.json.999.part").write_text("{")
    with run_lock(tmp_path):
        # `flow` was being replaced and comes back; the new `autoencoder` was in its place already.
        assert sorted(p.name for p in (tmp_path / "stages").iterdir()) == ["autoencoder", "flow"]
        assert [p.name for p in tmp_path.glob(".*.part")] == []


def test_the_built_in_stories_are_an_input_wherever_they_are_used(tmp_path):
    more = from_dict(RunConfig, {"data": {"datasets": {"world_stories": {"format": "world_stories", "num_train": 7}}}})
    assert "num_train" in difference(data_inputs(RunConfig()), data_inputs(more))


def test_mistakes_of_a_config_are_found_before_anything_starts(tmp_path):
    for data in ({"dataset": "wrold"}, {"task": "clasification"}):
        with pytest.raises(ValueError, match="did you mean"):
            run(from_dict(RunConfig, {"runs_dir": str(tmp_path / "runs"), "data": data}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "key, data",
    [("dataset", {"dataset": "wrold"}), ("corpus", {"corpus": "wrold"}), ("mixture", {"mixture": {"wrold": {}}})],
)
def test_a_data_set_that_there_is_not_is_told_by_the_key_that_names_it(key, data):
    with pytest.raises(ValueError, match=rf"^data.{key}: unknown name 'wrold'; did you mean 'world'"):
        data_inputs(from_dict(RunConfig, {"data": data}))


def test_two_runs_in_one_folder_are_refused_and_the_other_is_named(tmp_path):
    with run_lock(tmp_path):
        code = f"import pathlib, pipelines.folders as r\nwith r.run_lock(pathlib.Path({str(tmp_path)!r})): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is working in" in done.stderr and done.returncode != 0
    with run_lock(tmp_path):  # free again
        pass

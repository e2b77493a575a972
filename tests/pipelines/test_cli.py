"""The `yan` command: configs, overrides, and one-screen messages for mistakes."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines.arguments import UsageError, parse_config
from pipelines.cli import COMMANDS, main
from yan_core.config import RunConfig, from_dict, to_dict

CONFIGS = sorted((Path(__file__).parents[2] / "pipelines" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_is_named_after_its_file(path):
    config = parse_config("run", ["--config", str(path)])
    assert config.name == path.stem
    assert from_dict(RunConfig, to_dict(config)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_hold_only_what_differs_from_the_defaults(path):
    def same(values, defaults, where):
        for key, value in values.items():
            default = defaults.get(key) if isinstance(defaults, dict) else None
            if isinstance(value, dict) and key != "datasets":
                yield from same(value, default or {}, f"{where}{key}.")
            elif value == default and f"{where}{key}" != "name":
                yield f"{where}{key}"

    assert list(same(yaml.safe_load(path.read_text()), to_dict(RunConfig()), "")) == []


def test_overrides_win_over_the_file_and_keep_their_types(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: a\nstages: {flow: {optim: {lr: 0.5}}}\nevaluation: {num_steps: [1, 2]}\n")
    config = parse_config("run", ["--config", str(file), "--stages.flow.optim.lr", "3e-4", "--scaling.num_workers=1"])
    assert (config.name, config.stages.flow.optim.lr, config.scaling.num_workers) == ("a", 3e-4, 1)
    assert config.evaluation.num_steps == (1, 2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("nmae: x", r"nmae: unknown name 'nmae'; did you mean 'name'\?"),
        ("model: {d_modle: 64}", r"model\.d_modle: unknown name .* did you mean 'd_model'\?"),
        ("data: {datasets: {a: {formt: csv}}}", r"data\.datasets\.a\.formt: .* did you mean 'format'\?"),
        ("data: {datasets: {a: {colums: {}}}}", r"data\.datasets\.a\.colums: .* did you mean 'columns'\?"),
        ("model: {d_model: wide}", "model.d_model"),
        ("model: {d_model: 10}", "multiple of"),
        (
            "stages: {flow: {batch_size: 5}}",
            r"is more than the lanes of stage flow, 1, .*stages.flow.batch_size=5 and data.lanes=8",
        ),
        ("data: {datasets: {a: {format: xml}}}", r"^data\.datasets\.\*\.format: must be one of 'world', .*, got xml"),
        ("data: {datasets: {a: {held_out: 0.7}}}", r"^data\.datasets\.a\.held_out must be in \[0, 0\.5\), got 0\.7"),
        ("stages: {flow: {max_steps: -1}}", r"^stages\.flow\.max_steps must be >= 0, got -1"),
        ("evaluation: {sampling: {num_candidates: 0}}", r"^evaluation\.sampling\.num_candidates must be >= 1, got 0"),
    ],
)
def test_a_wrong_config_names_the_key_and_what_is_allowed(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_config("run", ["--config", str(file)])


@pytest.mark.parametrize("key, meant", [("rl", "lr"), ("warmup_step", "warmup_steps")])  # the second: how it begins
def test_a_wrong_override_offers_the_nearest_key(key, meant):
    with pytest.raises(UsageError, match=rf"Did you mean stages.flow.optim.{meant}\?"):
        parse_config("run", [f"--stages.flow.optim.{key}", "1"])


@pytest.mark.parametrize(
    "args, message",
    [
        (["--seed", "x"], "seed: must be of type int, got x"),
        (["--scaling.num_workers", "x"], "scaling.num_workers: must be one of int, tuple[int, int], got x"),
        (
            ["--data.datasets", "{a: {formt: csv}}"],
            "data.datasets.*.formt: unknown name 'formt'; did you mean 'format'? Allowed: columns, config_name, "
            "document, format, held_out, kinds, max_events, num_train, num_validation, path, train, validation, where",
        ),
        (["--evaluation.keep", "bst"], "evaluation.keep: must be one of 'last', 'best', got bst"),
    ],
)
def test_a_value_of_another_type_is_told_in_plain_words(args, message):
    with pytest.raises(UsageError) as caught:
        parse_config("run", args)
    assert str(caught.value) == message


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("model: [1\nseed: 2\n")
    with pytest.raises(UsageError, match=rf"--config {file} must be YAML: [\s\S]*bad.yaml\", line 2"):
        parse_config("run", ["--config", str(file)])


@pytest.mark.parametrize(
    "text, got", [("", "nothing"), ("# name: mine\n", "nothing"), ("- name\n- mine\n", "a list: ")]
)
def test_a_file_without_settings_is_named_with_what_it_may_hold(tmp_path, text, got):
    file = tmp_path / "empty.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=rf"--config {file} must hold settings by their keys.*`name: mine`, got {got}"):
        parse_config("run", ["--config", str(file)])


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UsageError, match=rf"--config {tmp_path} is a folder: name a YAML file"):
        parse_config("run", ["--config", str(tmp_path)])


def test_a_missing_config_lists_the_shipped_ones():
    with pytest.raises(UsageError, match=r"no file 'nowhere.yaml'.*world.yaml"):
        parse_config("run", ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["rnu"], 2, "did you mean run"),
        (["run", "--nmae", "x"], 2, "Did you mean name"),
        (["evaluate", "--model", "nowhere", "--config", str(CONFIGS[0]), "--data", "x"], 1, "not a YAN model"),
        (["serve", "--model", "nowhere"], 1, "not a YAN model"),
        (
            ["serve", "--model", "m", "--num-replicas", "0"],
            2,
            "--num-replicas must be >= 1 without --max-replicas, got 0",
        ),
        (["serve", "--model", "m", "--num-steps", "10000"], 2, "--num-steps must be less than or equal to "),
        (["run"], 2, "which run? --config FILE says it (shipped: "),
        (["train", "--seed", "2"], 2, "or --name NAME with the defaults"),
        (
            ["prepare", "--name", "world", "--runs_dir", "/dev/null"],
            1,
            "/dev/null/world cannot be made and written to: Not a directory",
        ),
        (
            ["plan", "--config", str(CONFIGS[0]), "--gpus", "1", "--tokens", "1", "--constants", "nowhere.json"],
            2,
            "--constants nowhere.json cannot be read: No such file",
        ),
    ],
)
def test_mistakes_end_in_a_short_message_and_an_exit_code(capsys, args, code, message):
    assert main(args) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) < 25


def test_a_full_disk_is_told_with_what_to_do(capsys, monkeypatch):
    def fill(args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/model")

    monkeypatch.setitem(COMMANDS, "config", ("", fill))
    assert main(["config"]) == 1
    said = "yan config: no space left for runs/model: free some, then give the same command again\n"
    assert capsys.readouterr().err == said


def test_the_version_is_told(capsys):
    assert main(["--version"]) == 0
    assert re.match(r"yan \S+, commit \S+, sources [0-9a-f]{12}, in /", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    done = subprocess.run([sys.executable, "-m", "pipelines", command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_importing_the_command_loads_neither_ray_nor_mlflow():
    code = "import sys, pipelines.cli; print([m for m in ('ray', 'mlflow', 'serve') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.ray
def test_a_broken_line_of_jsonl_is_named_on_one_screen(tmp_path):
    row = '{"context": "Mary went to the kitchen.", "question": "Where is Mary?", "answer": "kitchen"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 3 + row[:40])
    own = {"format": "jsonl", "train": "rows.jsonl", "validation": "rows.jsonl"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"dataset": "own", "datasets": {"own": own}}}))
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "prepare", "--config", "c.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "row 4 of ./rows.jsonl: no JSON" in done.stderr
    assert len((done.stdout + done.stderr).splitlines()) < 5

"""A checkpoint of training: what it brings back, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from pipelines.train import StageJob, StageState
from yan_core.checkpoint import CheckpointError
from yan_core.config import RunConfig
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

JOB = StageJob(stage="finetune", inputs={}, fingerprint="f", init_from="", output="", record="")


def fresh_state(config: RunConfig, seed: int) -> StageState:
    tokenizer = Tokenizer.train(["Mary went to the kitchen."], config.tokenizer)
    return StageState(config, JOB, build_model(config.model, tokenizer.vocab_size, seed), tokenizer)


def update(state: StageState) -> None:
    """One optimizer step on a gradient that the weights alone decide."""
    for parameter in state.model.parameters():
        parameter.grad = parameter.detach().sin() if parameter.requires_grad else None
    state.optimizer.step()
    state.step += 1


@pytest.fixture
def saved(tiny_config: RunConfig, tmp_path: Path) -> tuple[StageState, Path]:
    state = fresh_state(tiny_config, seed=0)
    update(state)
    state.save(tmp_path)
    return state, tmp_path


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(saved, tiny_config):
    state, folder = saved
    restored = fresh_state(tiny_config, seed=1)
    restored.restore(folder)
    assert restored.step == 1
    for either in (state, restored):
        update(either)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, restored.model.state_dict()[name]), name


@pytest.mark.parametrize("name", ["optimizer.pt", "model/model.safetensors"])
def test_a_damaged_checkpoint_is_refused_by_name(saved, tiny_config, name):
    _, folder = saved
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        fresh_state(tiny_config, seed=1).restore(folder)


def test_a_checkpoint_says_where_it_was_taken(saved):
    position = json.loads((saved[1] / "position.json").read_text())
    assert (position["stage"], position["fingerprint"], position["step"]) == ("finetune", "f", 1)

"""A training in one process: it is that of one worker of Ray Train, step by step."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from pipelines import state as state_module
from pipelines import worker
from pipelines.batches import make_batch
from pipelines.order import RowOrder, Shard, StageOrder
from pipelines.plain import train_on
from pipelines.reporter import Reporter
from pipelines.state import StageJob, StageState
from yan_core.batching import Batch
from yan_core.config import RunConfig, from_dict, to_dict
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer
from yan_core.training import NonFiniteLoss

CPU, STEPS = torch.device("cpu"), 4
TOKENIZER = Tokenizer.train(["Mary went to the kitchen. Where is she?"], RunConfig().tokenizer)


def config_of(tiny_config: RunConfig, **changes) -> RunConfig:
    values = to_dict(tiny_config)
    values["stages"]["finetune"] |= {"max_steps": STEPS, "batch_size": 8}
    values["stages"]["autoencoder"]["max_steps"] = 0
    values["stages"]["finetune"]["optim"] |= {"ema_decay": 0.5, "warmup_steps": 2, "max_skipped": 1}
    for key, value in changes.items():
        values[key] = {**(values[key] or {}), **value}
    return from_dict(RunConfig, values)


def state_of(config: RunConfig) -> StageState:
    order = StageOrder(RowOrder([Shard("a", 100)], seed=0), config.stages.finetune, config.data)
    model = build_model(config.architecture, TOKENIZER.vocab_size, 0)
    return StageState(config, StageJob("finetune", {}, "f", "", "", ""), model, TOKENIZER, order)


def batches_of(config: RunConfig) -> list[Batch]:
    draws, found = np.random.default_rng(0), []
    for step in range(STEPS):
        ids = [draws.integers(4, TOKENIZER.vocab_size, length) for length in draws.integers(2, 7, 16)]
        rows = {"source": np.empty(8, object), "target": np.empty(8, object)}
        rows["source"][:], rows["target"][:] = ids[:8], ids[8:]
        number = np.arange(8) + 8 * step
        found.append(make_batch(config, "finetune", {**rows, "epoch": np.zeros_like(number), "row": number}, 1))
    return found


def by_worker(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> StageState:
    """What rank 0 of a training by Ray does between the start of Ray Train and its checkpoint."""
    monkeypatch.setattr(worker, "save_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(worker.Clock, "LOOK_EVERY_S", math.inf)
    state = state_of(config)
    nowhere = worker.Checkpoints("")
    worker.train_one_stage(state, nowhere, iter(batches_of(config)), Reporter(state, None, None), 0, CPU, None)
    return state


def by_plain(config: RunConfig) -> tuple[StageState, list[int]]:
    state, seen = state_of(config), []
    train_on(state, iter(batches_of(config)), lambda step, metrics: seen.append(step) or True)
    return state, seen


def same(one: StageState, other: StageState) -> bool:
    pairs = [(one.model.state_dict(), other.model.state_dict()), (one.result(), other.result())]
    return all(torch.equal(value, b[name]) for a, b in pairs for name, value in a.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scaling": {"accumulation": 2}, "flow_loss": {"even_experts": True}, "model": {"dropout": 0.1}},
        {"baseline": {"d_model": 16, "num_blocks": 1, "num_heads": 1, "dropout": 0.5}, "scaling": {"accumulation": 2}},
    ],
    ids=["plain", "accumulation", "baseline"],
)
def test_a_training_in_one_process_has_the_updates_of_a_worker(tiny_config, monkeypatch, changes):
    if "baseline" in changes:
        pytest.importorskip("transformers", reason="the extra `baselines` is not installed")
    config = config_of(tiny_config, **changes)
    state, seen = by_plain(config)
    assert seen == [1, 2, 3, 4] and state.step == STEPS
    assert not same(state, state_of(config))
    assert same(state, by_worker(config, monkeypatch))


def test_passes_over_parts_of_a_batch_are_taken_into_account(tiny_config):
    """Each part is evened by itself; see flow_loss.even_experts."""
    whole = config_of(tiny_config, flow_loss={"even_experts": True})
    cut = dataclasses.replace(whole, scaling=dataclasses.replace(whole.scaling, accumulation=2))
    assert not same(by_plain(whole)[0], by_plain(cut)[0])


def test_a_step_without_a_finite_gradient_is_left_out_by_both_and_too_many_end_both(tiny_config, monkeypatch):
    config = config_of(tiny_config)
    real, calls = state_module.train_step, []

    def failing(*args):
        calls.append(None)
        if len(calls) in bad:
            raise NonFiniteLoss("not finite.")
        return real(*args)

    monkeypatch.setattr(state_module, "train_step", failing)
    bad = {2}
    state, seen = by_plain(config)
    assert (seen, state.step, state.skipped) == ([1, 3, 4], 4, 0)
    calls.clear()
    assert same(state, by_worker(config, monkeypatch))
    bad = {2, 3}
    calls.clear()
    with pytest.raises(NonFiniteLoss, match=r"^not finite\.$"):
        by_plain(config)
    calls.clear()
    monkeypatch.setattr(worker.Checkpoints, "write", lambda *_: None)
    with pytest.raises(NonFiniteLoss, match=r"^stage finetune, step 3, 2 in a row: not finite\. Model, "):
        by_worker(config, monkeypatch)

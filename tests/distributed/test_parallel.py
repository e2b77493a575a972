"""Several workers against one that has the whole batch: two processes of gloo, no Ray."""

import os
import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.yan_core.tiny import LOSS, random_rows, tiny_batch, tiny_model
from yan_core.batching import Batch, autoencoder_batch
from yan_core.config import AutoencoderLossConfig, FlowLossConfig, OptimConfig
from yan_core.loss import Objective
from yan_core.sharding import full_copy, is_shard, restore_optimizer, shard
from yan_core.training import WeightAverage, build_optimizer, freeze_all_but, train_step

pytestmark = pytest.mark.distributed

STAGE_1 = AutoencoderLossConfig(mmd_tokens=20, weight_l2=0.1, weight_mmd=1.0)
FLOW = replace(LOSS, weight_gate=0.5, weight_balance=1.0, weight_entropy=0.3, fill_weight=0.3, weight_l2=0.1)
LOSSES: dict[str, tuple[FlowLossConfig | AutoencoderLossConfig, dict]] = {
    "autoencoder": (STAGE_1, {"dropout": 0.2}),
    "sequence": (replace(FLOW, weight_mmd=1.0, mmd_tokens=30), {}),
    "even": (replace(FLOW, even_experts=True), {"expert_scope": "segment"}),
    "token": (FLOW, {"expert_scope": "token", "dropout": 0.2, "self_conditioning": True}),
    "segment": (replace(FLOW, likelihood="marginal"), {"expert_scope": "segment", "num_experts": 4, "top_k": 2}),
    "lengths": (FLOW, {"length": "predicted", "prediction": "endpoint", "dropout": 0.1}),
    "unbalanced": (replace(FLOW, weight_balance=0.0), {"dropout": 0.2}),
}
STEPS = 50


def make_batch(config: FlowLossConfig | AutoencoderLossConfig, step: int) -> Batch:
    """Seven rows of different lengths, the longest ones all at the end: one worker of two gets four of them."""
    if isinstance(config, AutoencoderLossConfig):
        rows = random_rows([2, 3, 4, 5, 9, 8, 9], seed=step)
        return autoencoder_batch(rows, torch.arange(7) + 100 * step, config)
    return tiny_batch(7, seed=step, loss=config)


def train(
    name: str, rank: int, workers: int, how: str, recompute: bool = False, parts: int = 1, steps: int = STEPS
) -> dict[str, Tensor]:
    """Some steps on this worker's rows: the losses and the weights they lead to."""
    config, changes = LOSSES[name]
    model = tiny_model(**changes)
    if isinstance(config, AutoencoderLossConfig):
        freeze_all_but(model, ("target_encoder", "decoder"))
    model.recompute(recompute)
    model.train()
    objective = Objective(model, config)
    wrapped: torch.nn.Module = objective
    if how == "fsdp":
        shard(objective)
    elif workers > 1:
        wrapped = DistributedDataParallel(objective)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1))
    for group in optimizer.param_groups:
        group["eps"] = 0.1  # a key's bias has no gradient but rounding, of which AdamW would make full steps
    average = WeightAverage(model, 0.9)
    losses, norms = [], []
    for step in range(steps):
        if how == "fsdp" and step == 2:  # as after a restart
            restore_optimizer(optimizer, full_copy(optimizer.state_dict()))
        batch = make_batch(config, step).split(workers)[rank]
        counts = objective.counts(batch).of_all_workers()
        metrics = train_step(wrapped, batch, optimizer, 1 + step % 3, 1e-2, 1.0, counts=counts, parts=parts)
        average.update(model, step)
        loss = metrics["loss"].clone()
        if workers > 1:
            dist.all_reduce(loss)
        losses.append(loss / workers)
        norms.append(metrics["grad_norm"])
        assert not is_shard(norms[-1])  # a report adds it up over the workers
    return {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        **full_copy(model.state_dict()),
        **{f"ema/{k}": v for k, v in full_copy(average.weights).items()},
    }


def work(rank: int, port: int, folder: str, name: str, how: str, parts: int) -> None:
    """What a process of two does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = train(name, rank, 2, how, parts=parts)
    if rank == 0:
        torch.save(found, os.path.join(folder, "found.pt"))
    dist.destroy_process_group()


def of_two_workers(folder: str, name: str, how: str, parts: int = 1) -> dict[str, Tensor]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, folder, name, how, parts), nprocs=2)  # type: ignore[attr-defined]
    return torch.load(os.path.join(folder, "found.pt"), weights_only=True)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Losses to 1e-5 of their size. The norm of large gradients that nearly cancel is the roughest of all figures.
        atol, rtol = {"losses": (0, 1e-5), "norms": (0, 1e-3)}.get(key, (2e-5, 0))
        torch.testing.assert_close(found[key], value, atol=atol, rtol=rtol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "unbalanced"])
def test_two_workers_train_as_one(name: str, tmp_path) -> None:
    """Losses, weights and their averages, though one worker has more rows than the other, and longer ones."""
    alone = train(name, 0, 1, "ddp")
    assert_same(of_two_workers(str(tmp_path), name, "ddp"), alone)
    assert float((alone["losses"] - alone["losses"][0]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["autoencoder", "token"])
def test_sharded_workers_train_as_one(name: str, tmp_path) -> None:
    assert_same(of_two_workers(str(tmp_path), name, "fsdp"), train(name, 0, 1, "ddp"))


@pytest.mark.parametrize("name", ["autoencoder", "token", "lengths"])
def test_recomputed_activations_change_nothing(name: str) -> None:
    assert_same(train(name, 0, 1, "ddp", recompute=True, steps=4), train(name, 0, 1, "ddp", steps=4))


@pytest.mark.parametrize("change", [{}, {"likelihood": "marginal"}])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """All terms but the balance, which looks at the mean gate of what it is given."""
    config, changes = LOSSES["unbalanced"]
    monkeypatch.setitem(LOSSES, "parts", (replace(config, **change), changes))
    assert_same(train("parts", 0, 1, "ddp", parts=4, steps=4), train("parts", 0, 1, "ddp", steps=4))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_workers_that_cut_their_batch_in_parts_train_as_one_that_does_not(how: str, tmp_path) -> None:
    assert_same(of_two_workers(str(tmp_path), "unbalanced", how, parts=2), train("unbalanced", 0, 1, "ddp"))

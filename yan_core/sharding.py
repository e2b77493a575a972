"""Models that are sharded over the workers (FSDP2), and whole copies of them."""

from __future__ import annotations

import sys
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from yan_core.blocks import EncoderBlock, FlowBlock
from yan_core.loss import Objective

T = TypeVar("T")


def shard(objective: Objective) -> None:
    """Shard a model and its loss over the workers in place: each block by itself, and the rest together.

    Source: Zhao et al. 2023, arXiv:2304.11277, in the form of PyTorch's `fully_shard`.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for module in objective.modules():
        if isinstance(module, (EncoderBlock, FlowBlock)):
            fully_shard(cast(Any, module))
        if isinstance(module, FlowBlock):  # it is asked for these before its forward pass
            for method in ("modulations", "project_source"):
                register_fsdp_forward_method(module, method)
    fully_shard(cast(Any, objective))


def is_shard(value: object) -> bool:
    """Whether this is a worker's shard of a tensor."""
    # What makes shards takes a second to import, in every worker: where it was not imported, there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def shard_like(value: Tensor, shard: Tensor) -> Tensor:
    """A whole `value` [...] as this worker's shard of it; the value itself where `shard`, [...] alike, is whole."""
    if not is_shard(shard):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, cast(Any, shard).device_mesh, cast(Any, shard).placements)


def full_copy(value: T) -> T:
    """Nested dictionaries and lists, every tensor copied to the CPU, whole; with shards, every worker must call it."""
    if is_shard(value):
        return cast(T, cast(Any, value).full_tensor().detach().cpu())
    if isinstance(value, Tensor):
        return cast(T, value.detach().to("cpu", copy=True))
    if isinstance(value, dict):
        return cast(T, {k: full_copy(v) for k, v in value.items()})
    return cast(T, [full_copy(v) for v in value]) if isinstance(value, (list, tuple)) else value


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's `full_copy`, each worker its shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        for name, value in values.items():
            if value.shape == parameter.shape and value.ndim:
                values[name] = shard_like(value, parameter)
    optimizer.load_state_dict(state)

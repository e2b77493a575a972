"""Models that are sharded over the workers (FSDP2), and whole copies of them."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

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


def full_copy(value: T) -> T:
    """Nested dictionaries and lists, every tensor copied to the CPU, whole; with shards, every worker must call it."""
    if isinstance(value, DTensor):
        return cast(T, value.full_tensor().detach().cpu())
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
        if isinstance(parameter, DTensor):
            for name, value in values.items():
                if value.shape == parameter.shape and value.ndim:
                    values[name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    optimizer.load_state_dict(state)

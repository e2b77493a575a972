"""CUDA graphs: a function of fixed shapes recorded once and replayed, so that launching its kernels costs nothing.

A request's few passes are hundreds of short kernels; at batch 1 a GPU waits for the host between them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Function = Callable[..., Tensor]
"""Tensors of fixed shapes in, one tensor out, without asking the device for a value."""


def captured(function: Function, examples: tuple[Tensor, ...]) -> Function:
    """A CUDA graph of a function; on a CPU the function itself.

    The result copies its arguments in, replays, and gives the same output tensor each time, which the next call
    overwrites.

    Args:
        function: See `Function`.
        examples: Arguments of the shapes to be met, such as token ids [batch, length].
    """
    if not examples[0].is_cuda:
        return function
    held = tuple(value.clone() for value in examples)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):  # compile, tune and allocate outside the capture
            function(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # What other threads do meanwhile, such as to draw with the version before, neither fails nor goes into it.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), torch.no_grad():
        out = function(*held)

    def replay(*values: Tensor) -> Tensor:
        for kept, value in zip(held, values, strict=True):
            kept.copy_(value)
        graph.replay()
        return out

    return replay


class GraphCache:
    """Captured functions by key, the least recently used ones dropped."""

    def __init__(self, capacity: int = 64) -> None:
        """Keep at most `capacity` graphs; each holds its memory on the device. A server's usual shapes are about 36."""
        self.capacity = capacity
        self._kept: OrderedDict[Hashable, Function] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def call(self, key: Hashable, function: Function, *values: Tensor) -> Tensor:
        """Call a function by its graph, captured when `key` and these shapes are new.

        Args:
            key: All that the function depends on besides its arguments.
            function: See `Function`.
            values: Its arguments, of any shape, such as token ids [batch, length].

        Returns:
            A tensor of the caller's own, shaped as the function gives it.
        """
        key = (key, *(tuple(value.shape) for value in values))
        if key not in self._kept:
            if len(self._kept) >= self.capacity:
                self._kept.popitem(last=False)
            self._kept[key] = captured(function, values)
        self._kept.move_to_end(key)
        return self._kept[key](*values).clone()

"""Counter-based random numbers: every draw is a function of (key, stream, index), never of the order of calls.

A row keeps its noise wherever it lands in a batch, on whichever worker, at whatever padding; a served request keeps its
answer in any company. Integer hashing in int64 runs the same on every device.

Source of the mixer: C. Wellons, "Prospecting for Hash Functions" (`lowbias32`), 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


class Stream(IntEnum):
    """What a draw is for; draws of different streams are independent."""

    SOURCE_NOISE = 1
    TIME = 2
    EXPERT = 3
    LATENT_SCALE = 4
    LATENT_NOISE = 5
    CORRUPTION = 6
    FILL = 7
    SOURCE_MASK = 8
    MMD = 9
    CLEAN = 10
    SOLVER_STEPS = 11
    ROUTING = 12
    SOURCE_DROP = 13
    GUESS = 14
    DROPOUT = 15
    MMD_PRIOR = 16
    TOKEN = 17


def _mix(x: Tensor) -> Tensor:
    x = x & _MASK  # a tensor of our own, so that the rest needs no memory but the shifted copies
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16)


def fold(keys: Tensor, value: int | Tensor) -> Tensor:
    """Derive new keys from keys and a number (an epoch, a seed, a stream).

    Args:
        keys: int64, [batch].
        value: A number, or one per key, [batch].

    Returns:
        int64 keys in [0, 2**32), [batch].
    """
    high = (keys >> 32) & _MASK
    value_low = value & _MASK
    value_high = (value >> 32) & _MASK
    mixed = _mix(_mix(keys) + _mix(high + 0x9E3779B9) * 3)
    return _mix(_mix(mixed ^ value_low) + value_high * 5 + 0x85EBCA6B)


def uniform(keys: Tensor, stream: Stream, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers in (0, 1), float32.

    Args:
        keys: One key per row, int64, [batch].
        stream: What the draw is for.
        shape: Shape of one row's draw. A longer first axis only appends: the first numbers stay as they were.

    Returns:
        [batch, *shape].
    """
    count = math.prod(shape)
    index = torch.arange(count, device=keys.device, dtype=torch.int64)
    row = fold(keys, int(stream))[:, None]
    # 23 bits, [batch, count]: with 24 the half added is rounded, and one draw in 2**24 is exactly 1.
    bits = _mix(_mix(index[None, :] * 0x9E3779B1 + row) ^ (row >> 7)) >> 9
    return ((bits.to(torch.float32) + 0.5) * 2.0**-23).reshape(len(keys), *shape)


def normal(keys: Tensor, stream: Stream, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32, [batch, *shape], by Box-Muller; arguments as `uniform`."""
    pair = uniform(keys, stream, (*shape, 2))
    radius = torch.sqrt(-2.0 * torch.log(pair[..., 0]))
    return radius * torch.cos(2.0 * math.pi * pair[..., 1])


def gumbel(keys: Tensor, stream: Stream, shape: tuple[int, ...]) -> Tensor:
    """Standard Gumbel numbers, float32, [batch, *shape]; arguments as `uniform`.

    The argmax of logits plus these is a draw from their softmax.
    """
    return -torch.log(-torch.log(uniform(keys, stream, shape)))


@dataclass(frozen=True)
class RowDraws:
    """Where random numbers are drawn inside a network: the rows' keys, and a place in it.

    Attributes:
        keys: int64, [batch].
        place: Number that stands for the place.
    """

    keys: Tensor
    place: int = 0

    def at(self, number: int) -> RowDraws:
        """A place within this one."""
        return RowDraws(self.keys, (self.place * 1_000_003 + number + 1) & 0x7FFFFFFF)

    def kept(self, shape: tuple[int, int], drop_share: float) -> Tensor:
        """Draw what dropout keeps.

        Two rounds of mixing in int32: in int64 and with `uniform`'s four it took a training step half as long again.

        Args:
            shape: length and width. A longer length only appends.
            drop_share: Probability of False, in [0, 1).

        Returns:
            bool, [batch, length, width].
        """
        length, width = shape
        device = self.keys.device
        token = fold(fold(self.keys, int(Stream.DROPOUT)), self.place)[:, None]
        token = _mix(token + torch.arange(length, device=device) * 0x9E3779B1)
        channel = _mix(torch.arange(width, device=device) * 0x85EBCA6B + 1)
        bits = (token - 2**31).to(torch.int32)[..., None] ^ (channel - 2**31).to(torch.int32)
        bits = bits.mul_(0x7FEB352D)  # wraps around
        bits = bits.bitwise_xor_(bits >> 15).mul_(-2073254261)  # 0x846CA68B
        return bits >= int(drop_share * 2**32) - 2**31

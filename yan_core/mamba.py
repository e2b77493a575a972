"""Bidirectional Mamba: a selective scan in each direction, by mamba-ssm's kernels on a GPU, else in plain PyTorch."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

# The plain scan takes the batch in blocks of rows, whose four [rows, length, d_state, d_inner] tensors hold at most so
# many numbers each; one row is always taken. On a CPU they stay in the cache: of 2^15 to 2^24, 2^19 trained fastest at
# most lengths. On a GPU this bounds the memory, to 512 MiB.
_BLOCK_NUMBERS = {"cpu": 2**19, "cuda": 2**25}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
) -> Tensor:
    """Scan a sequence with a state whose decay, input and output depend on the token.

    With dt = softplus(delta + delta_bias): h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t, and y_t = C_t h_t + D u_t, times
    silu(z_t) where z is given. The state before the first token is zero.

    mamba-ssm's kernel does it for CUDA tensors where it is installed (float64, which it does not know, aside); anything
    else takes `selective_scan_plain`. Both compute in float32 at least.

    Args:
        u: Inputs, [batch, length, d_inner].
        delta: Step sizes before their softplus, shaped like u.
        A: Rates, all negative, [d_inner, d_state].
        B: Input weights, [batch, length, d_state].
        C: Output weights, shaped like B.
        D: Skip weights, [d_inner].
        z: Gates before their silu, shaped like u; None: no gates.
        delta_bias: Added to delta, [d_inner]; None: nothing.

    Returns:
        y, shaped like u and of its type.

    Source: Gu & Dao 2023, arXiv:2312.00752, sec. 3.2 and algorithm 2; the arguments are `selective_scan_fn`'s of
    mamba-ssm, with the length before the channels.
    """
    kernel = _mamba_ssm_kernel() if u.is_cuda and u.dtype != torch.float64 else None
    if kernel is None:
        return selective_scan_plain(u, delta, A, B, C, D, z, delta_bias)
    return _scan_by_kernel(kernel, u, delta, A, B, C, D, z, delta_bias)


@cache
def _mamba_ssm_kernel() -> Callable[..., Tensor] | None:
    """mamba-ssm's scan, or None where the package or its compiled kernels are missing."""
    try:
        # The compiled part by name: from mid-2026 on mamba-ssm installs and imports without it, and fails when called.
        import selective_scan_cuda  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]
    except ImportError as error:  # so fails a kernel compiled for another torch, too
        log.warning(
            "No mamba-ssm kernel (%s): the plain scan runs instead. Remedy: "
            "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation -e '.[mamba]'",
            error,
        )
        return None
    return selective_scan_fn


def _scan_by_kernel(
    kernel: Callable[..., Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> Tensor:
    """Call `selective_scan_fn`, which has the length last, wants one type for u, delta, B, C, z and float32 weights."""
    tokens = [None if x is None else x.to(u.dtype).transpose(1, 2) for x in (u, delta, B, C, z)]
    weights = [None if x is None else x.float() for x in (A, D, delta_bias)]
    y = kernel(tokens[0], tokens[1], weights[0], tokens[2], tokens[3], weights[1], tokens[4], weights[2], True)
    return y.transpose(1, 2)


def selective_scan_plain(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
) -> Tensor:
    """The kernel's twin in plain PyTorch, on any device, [batch, length, d_inner]; arguments as `selective_scan`."""
    with torch.autocast(u.device.type, enabled=False):
        wide_u, dt = _wide(u), _wide(delta)
        dt = F.softplus(dt if delta_bias is None else dt + _wide(delta_bias))
        y = _Scan.apply(dt, dt * wide_u, _wide(A).t().contiguous(), _wide(B), _wide(C))
        y = torch.addcmul(y, wide_u, _wide(D))
        return (y if z is None else y * F.silu(_wide(z))).to(u.dtype)


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least: a decay of 0.999 is 1 in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Scan(torch.autograd.Function):
    """y_t = C_t h_t with h_t = exp(dt_t A) h_(t-1) + B_t v_t, for A [d_state, d_inner] and v = dt u.

    States [batch, length, d_state, d_inner] are d_state times the size of anything else. So the backward pass computes
    them again instead of keeping them, and both passes work through blocks of rows in the same few buffers: on a CPU
    fresh memory for every product took longer than the products. d_inner is the last axis since d_state is too short
    to vectorise over.
    """

    @staticmethod
    def forward(ctx: Any, dt: Tensor, v: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        ctx.save_for_backward(dt, v, A, B, C)
        y = torch.empty_like(v)
        for rows, (a, h) in _blocks(2, dt, A):
            torch.mul(dt[rows, :, None], A, out=a).exp_()
            torch.mul(B[rows, ..., None], v[rows, :, None], out=h)
            _scan_(a, h)
            y[rows] = (C[rows, :, None] @ h).squeeze(2)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dt, v, A, B, C = ctx.saved_tensors
        dy, dA = dy.contiguous(), torch.zeros_like(A)
        d_dt, dv, dB, dC = (torch.empty_like(x) for x in (dt, v, B, C))
        with torch.autocast(dt.device.type, enabled=False):
            for rows, (a, h, g, spare) in _blocks(4, dt, A):
                torch.mul(dt[rows, :, None], A, out=a).exp_()
                torch.mul(B[rows, ..., None], v[rows, :, None], out=h)
                _scan_(spare.copy_(a), h)
                # g_t, the gradient of h_t, is C_t dy_t + a_(t+1) g_(t+1): the same scan from the end.
                torch.mul(C[rows, ..., None], dy[rows, :, None], out=g)
                _scan_back_(spare.copy_(a)[:, 1:], g)
                # A row times a matrix: on a CPU ten times as fast as h @ dy[..., None].
                dC[rows] = (dy[rows, :, None] @ h.transpose(2, 3)).squeeze(2)
                dB[rows] = (v[rows, :, None] @ g.transpose(2, 3)).squeeze(2)
                dv[rows] = (B[rows, :, None] @ g).squeeze(2)
                # The gradient of dt_t A is a_t h_(t-1) g_t, and zero at the first token, which has no state before it.
                d_exponent = g.mul_(a)
                d_exponent[:, 1:].mul_(h[:, :-1])
                d_exponent[:, :1] = 0
                d_dt[rows] = torch.mul(d_exponent, A, out=spare).sum(2)
                dA += torch.mul(d_exponent, dt[rows, :, None], out=spare).sum((0, 1))
        return d_dt, dv, dA, dB, dC


def _blocks(buffers: int, dt: Tensor, A: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut the batch of dt [batch, length, d_inner] into blocks of rows.

    Yields:
        Rows and `buffers` uninitialised tensors for their states, [buffers, rows, length, d_state, d_inner], which are
        the same memory for every block.
    """
    batch, length = dt.shape[:2]
    numbers = _BLOCK_NUMBERS.get(dt.device.type, _BLOCK_NUMBERS["cpu"])
    rows = min(batch, max(1, numbers // max(1, length * A.numel())))
    memory = dt.new_empty(buffers, rows, length, *A.shape)
    for start in range(0, batch, max(1, rows)):
        yield slice(start, start + rows), memory[:, : batch - start]


def _scan_(a: Tensor, h: Tensor) -> None:
    """Add a_t h_(t-1) to h_t in place, in order of t, over axis 1, in 3 log2(length) operations.

    Every second position takes up the one before it, so that a half as long scan over those positions remains; the
    others then take up their neighbours. It multiplies decays and never divides by them, so none is too strong. The
    work is that of a loop over t; a Hillis-Steele scan does log2(length) times as much.

    Args:
        a: [rows, length, ...]; a_0 is not used. It is overwritten.
        h: Inputs, which become states; shaped like a.

    Source: Brent & Kung 1982, "A regular layout for parallel adders".
    """
    length = h.shape[1]
    if length < 2:
        return
    odd, even = slice(1, None, 2), slice(0, length - 1, 2)
    h[:, odd].addcmul_(a[:, odd], h[:, even])
    _scan_(a[:, odd].mul_(a[:, even]), h[:, odd])
    h[:, 2::2].addcmul_(a[:, 2::2], h[:, 1 : length - 1 : 2])


def _scan_back_(a: Tensor, g: Tensor) -> None:
    """Add a_t g_(t+1) to g_t in place, from the last t to the first; `_scan_` in a mirror.

    Args:
        a: [rows, length - 1, ...]: one for each position but the last. It is overwritten.
        g: Inputs, which become sums; [rows, length, ...].
    """
    length = g.shape[1]
    if length < 2:
        return
    first = length % 2  # pairs are counted from the end
    early, late = slice(first, None, 2), slice(first + 1, None, 2)
    g[:, early].addcmul_(a[:, early], g[:, late])
    _scan_back_(a[:, early][:, :-1].mul_(a[:, late]), g[:, early])
    rest, after = slice(1 - first, length - 1, 2), slice(2 - first, None, 2)
    g[:, rest].addcmul_(a[:, rest], g[:, after])


class MambaScan(nn.Module):
    """One direction: Mamba's mixer up to its last projection, with the parameters of mamba-ssm's `Mamba`.

    Source: Gu & Dao 2023, arXiv:2312.00752, fig. 3 and sec. 3.6; names, shapes and initial values from mamba-ssm,
    `mamba_ssm/modules/mamba_simple.py`.
    """

    def __init__(self, d_model: int, d_state: int, conv_kernel: int, expand: int) -> None:
        super().__init__()
        d_inner, dt_rank = expand * d_model, math.ceil(d_model / 16)
        self.sizes = [dt_rank, d_state, d_state]
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, conv_kernel, groups=d_inner, padding=conv_kernel - 1)
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        with torch.no_grad():
            # The bias starts where its softplus is log-uniform in [0.001, 0.1].
            dt = torch.empty(d_inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))

    def _convolve(self, x: Tensor) -> Tensor:
        """Causal depthwise convolution, [batch, length, d_inner] in and out."""
        # As a sum of shifted products, which a CPU trains two to three times as fast as either convolution of torch.
        length, (kernel,), out = x.shape[1], self.conv1d.kernel_size, self.conv1d.bias
        assert out is not None
        before = F.pad(x, (0, 0, kernel - 1, 0))
        for k, weight in enumerate(self.conv1d.weight[:, 0].unbind(1)):
            out = torch.addcmul(out, before[:, k : k + length], weight)
        return out.to(x.dtype)  # autocast keeps the sum in float32

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Scan from the first token to the last.

        Args:
            x: [batch, length, d_model], zero at padding.
            keep: False at padding, [batch, length, 1]; None: there is none.

        Returns:
            [batch, length, d_inner].
        """
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self._convolve(u))
        if keep is not None:
            # Padding before the text then leaves the state at zero, and `in_proj` has no bias, so the convolution sees
            # there what it sees before a first token: nothing. To the text it is as if it began at the first place.
            u = u.masked_fill(~keep, 0)
        dt, B, C = self.x_proj(u).split(self.sizes, dim=-1)
        delta = F.linear(dt, self.dt_proj.weight)  # its bias is added in the scan, in float32
        return selective_scan(u, delta, -_wide(self.A_log).exp(), B, C, self.D, z, self.dt_proj.bias)


class BidirectionalMamba(nn.Module):
    """What a block has in place of self-attention: one scan forward, one backward, concatenated and projected.

    Its cost grows with the length, not with its square. On a GPU with mamba-ssm its kernels do the scans; parameters
    and outputs are the same without them.

    Args:
        d_model: Width of a token.
        d_state: Numbers of state a channel.
        conv_kernel: Width of the causal convolution before each scan, in tokens.
        expand: Channels of a scan, as a multiple of d_model.

    Raises:
        ValueError: If an argument is below 1.

    Source: arXiv:2604.15009 (bidirectional trunk), Gu & Dao 2023, arXiv:2312.00752 (each direction).
    """

    def __init__(self, d_model: int, d_state: int = 16, conv_kernel: int = 4, expand: int = 2) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "conv_kernel": conv_kernel, "expand": expand}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.forward_scan = MambaScan(d_model, d_state, conv_kernel, expand)
        self.backward_scan = MambaScan(d_model, d_state, conv_kernel, expand)
        self.out_proj = nn.Linear(2 * expand * d_model, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mix tokens in both directions; padded tokens neither give nor receive.

        Args:
            x: [batch, length, d_model].
            mask: True for real tokens, which come before the padding, [batch, length]; None: all are real.

        Returns:
            [batch, length, d_model], zero at padding.

        Raises:
            ValueError: If the shapes disagree.
        """
        if x.ndim != 3 or x.shape[-1] != self.out_proj.out_features:
            raise ValueError(f"x must be [batch, length, {self.out_proj.out_features}], got {list(x.shape)}")
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask must be [batch, length] = {list(x.shape[:2])}, got {list(mask.shape)}")
        keep = None if mask is None else mask[..., None]
        if keep is not None:
            x = x.masked_fill(~keep, 0)
        forward = self.forward_scan(x, keep)
        backward = self.backward_scan(x.flip(1), None if keep is None else keep.flip(1)).flip(1)
        out = self.out_proj(torch.cat([forward, backward], dim=-1))
        return out if keep is None else out.masked_fill(~keep, 0)

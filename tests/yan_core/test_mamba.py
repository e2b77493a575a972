"""Mamba: the scan is its recurrence, padding leaks in neither direction, parameters are mamba-ssm's."""

import copy
import importlib.util
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yan_core import mamba
from yan_core.mamba import BidirectionalMamba, selective_scan, selective_scan_plain

LENGTHS = torch.tensor([9, 4, 1, 0])
MASK = torch.arange(9) < LENGTHS[:, None]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def scan_inputs(
    length: int, batch: int = 3, d_inner: int = 6, d_state: int = 4, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Everything `selective_scan` takes, with rates and biases as a fresh layer has them."""
    return {
        "u": randn(batch, length, d_inner, seed=1, dtype=dtype),
        "delta": randn(batch, length, d_inner, seed=2, dtype=dtype),
        "A": -torch.arange(1, d_state + 1, dtype=dtype).repeat(d_inner, 1),
        "B": randn(batch, length, d_state, seed=3, dtype=dtype),
        "C": randn(batch, length, d_state, seed=4, dtype=dtype),
        "D": randn(d_inner, seed=5, dtype=dtype),
        "z": randn(batch, length, d_inner, seed=6, dtype=dtype),
        "delta_bias": randn(d_inner, seed=7, dtype=dtype) - 4,
    }


def recurrence(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """The definition, token by token."""
    dt, state, outputs = F.softplus(delta + delta_bias), torch.zeros_like(A), []
    for t in range(u.shape[1]):
        state = (dt[:, t, :, None] * A).exp() * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, dim=1) * F.silu(z)


def layer(d_model: int = 8, seed: int = 0) -> BidirectionalMamba:
    """A layer with rates, steps and skips away from their start, where many are equal."""
    torch.manual_seed(seed)
    made = BidirectionalMamba(d_model, d_state=4)
    with torch.no_grad():
        for scan in (made.forward_scan, made.backward_scan):
            scan.dt_proj.bias.add_(3)
            for parameter in (scan.A_log, scan.D):
                parameter.add_(torch.randn_like(parameter) / 4)
    return made


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 53, 515])
def test_the_scan_is_its_recurrence(length: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = scan_inputs(length, dtype=dtype)
    out = selective_scan(**inputs)
    assert out.dtype == dtype
    torch.testing.assert_close(out, recurrence(**inputs), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shift", [-12.0, 0.0, 12.0, 60.0], ids=lambda shift: f"delta{shift:+.0f}")
def test_the_scan_holds_from_no_decay_to_total_decay(shift: float) -> None:
    inputs = scan_inputs(640)
    inputs["delta"] = inputs["delta"] * 4 + shift
    expected = recurrence(**{name: x.double() for name, x in inputs.items()})
    # Sums of hundreds of terms of this size: the error is counted against the largest.
    error = (selective_scan(**inputs) - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error < 1e-5


def test_gates_and_bias_may_be_left_out() -> None:
    inputs = scan_inputs(5)
    gates, bias = inputs.pop("z"), inputs.pop("delta_bias")
    torch.testing.assert_close(
        selective_scan(**inputs, z=gates, delta_bias=torch.zeros(6)), selective_scan(**inputs) * F.silu(gates)
    )
    inputs["delta"] = inputs["delta"] + bias
    torch.testing.assert_close(
        selective_scan(**inputs) * F.silu(gates), recurrence(**inputs, z=gates, delta_bias=0 * bias)
    )


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_gradients_of_the_scan(length: int) -> None:
    inputs = scan_inputs(length, batch=2, d_inner=3, d_state=2, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(selective_scan, tensors)


def test_gradients_over_a_long_sequence_are_the_recurrence_s() -> None:
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(129).items()}
    weight = randn(3, 129, 6, seed=8)
    expected = torch.autograd.grad((recurrence(**inputs) * weight).sum(), list(inputs.values()))
    found = torch.autograd.grad((selective_scan(**inputs) * weight).sum(), list(inputs.values()))
    for name, a, b in zip(inputs, found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_rows_may_be_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(5, batch=7).items()}
    results = []
    for rows in (7, 3, 1):
        monkeypatch.setitem(mamba._BLOCK_NUMBERS, "cpu", rows * 5 * 6 * 4)
        out = selective_scan(**inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_the_kernel_is_handed_its_own_layout() -> None:
    def kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        assert delta_softplus and all(x.dtype == torch.bfloat16 for x in (u, delta, B, C, z))
        assert all(x.dtype == torch.float32 for x in (A, D, delta_bias))
        u, delta, B, C, z = (x.float().transpose(1, 2) for x in (u, delta, B, C, z))
        return recurrence(u, delta, A, B, C, D, z, delta_bias).transpose(1, 2).bfloat16()

    inputs = scan_inputs(7)
    inputs["u"] = inputs["u"].bfloat16()
    out = mamba._scan_by_kernel(kernel, **inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, selective_scan_plain(**inputs), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("missing", ["mamba_ssm", "selective_scan_cuda"])
def test_without_the_package_or_its_compiled_part_there_is_no_kernel(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with caplog.at_level(logging.WARNING):
        assert mamba._mamba_ssm_kernel.__wrapped__() is None
    assert ".[mamba]" in caplog.text


def test_parameters_are_those_of_mamba_ssm() -> None:
    official = {  # mamba_ssm.modules.mamba_simple.Mamba(d_model=40, d_state=16, d_conv=4, expand=2), less out_proj
        "in_proj.weight": (160, 40),
        "conv1d.weight": (80, 1, 4),
        "conv1d.bias": (80,),
        "x_proj.weight": (35, 80),
        "dt_proj.weight": (80, 3),
        "dt_proj.bias": (80,),
        "A_log": (80, 16),
        "D": (80,),
    }
    expected = {
        f"{scan}.{name}": shape for scan in ("forward_scan", "backward_scan") for name, shape in official.items()
    }
    state = BidirectionalMamba(40).state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == expected | {"out_proj.weight": (40, 160)}


def test_initial_values_are_those_of_mamba_ssm() -> None:
    torch.manual_seed(0)
    scan = BidirectionalMamba(512).forward_scan
    torch.testing.assert_close(scan.A_log.exp(), torch.arange(1.0, 17.0).expand(1024, 16))
    assert torch.equal(scan.D, torch.ones(1024))
    steps = F.softplus(scan.dt_proj.bias.detach())
    assert 0.00099 < float(steps.min()) < 0.0012 and 0.085 < float(steps.max()) < 0.1001
    assert abs(float(steps.log().mean()) - float(torch.tensor(0.01).log())) < 0.15
    assert 0.9 * 32**-0.5 < float(scan.dt_proj.weight.detach().abs().max()) <= 32**-0.5


def test_a_direction_is_mamba_s_mixer() -> None:
    scan, x = layer().forward_scan, randn(2, 7, 8)
    inner = F.linear(x, scan.in_proj.weight).transpose(1, 2)  # [batch, 2 * d_inner, length], as mamba-ssm has it
    u, z = inner.chunk(2, dim=1)
    u = F.silu(F.conv1d(u, scan.conv1d.weight, scan.conv1d.bias, padding=3, groups=16)[..., :7]).transpose(1, 2)
    dt, B, C = F.linear(u, scan.x_proj.weight).split([1, 4, 4], dim=-1)
    delta = F.linear(dt, scan.dt_proj.weight)
    expected = recurrence(u, delta, -scan.A_log.exp(), B, C, scan.D, z.transpose(1, 2), scan.dt_proj.bias)
    torch.testing.assert_close(scan(x, None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("t", [0, 4, 8])
def test_one_direction_sees_the_past_and_the_other_the_future(t: int) -> None:
    made = layer()
    for unseen, seen in ((slice(16, 32), range(t + 1)), (slice(0, 16), range(t, 9))):
        one_way = copy.deepcopy(made)
        with torch.no_grad():
            one_way.out_proj.weight[:, unseen] = 0  # [forward, backward] are concatenated
        x = randn(1, 9, 8).requires_grad_()
        one_way(x, None)[:, t].sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum(-1)[0].nonzero()[:, 0].tolist() == list(seen)


def test_swapped_directions_reverse_the_output_of_a_reversed_row() -> None:
    made, x = layer(), randn(2, 9, 8)
    swapped = BidirectionalMamba(8, d_state=4)
    swapped.forward_scan.load_state_dict(made.backward_scan.state_dict())
    swapped.backward_scan.load_state_dict(made.forward_scan.state_dict())
    with torch.no_grad():
        swapped.out_proj.weight.copy_(made.out_proj.weight.roll(16, dims=1))
    torch.testing.assert_close(swapped(x.flip(1), None).flip(1), made(x, None), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("filling", [0.0, 50.0, float("nan")])
def test_what_stands_in_padding_changes_nothing(filling: float) -> None:
    made, x = layer(), randn(4, 9, 8)
    out = made(x, MASK)
    assert torch.equal(made(x.masked_fill(~MASK[..., None], filling), MASK), out)
    assert not out[~MASK].any()


def test_how_much_padding_there_is_changes_nothing() -> None:
    made, x = layer(), randn(4, 9, 8)
    out = made(x, MASK)
    for row, length in enumerate(LENGTHS[:3].tolist()):
        alone = x[row : row + 1, :length]
        for padding in (0, 1, 2, 30):
            mask = torch.arange(length + padding)[None] < length
            padded = made(F.pad(alone, (0, 0, 0, padding), value=7.0), mask)
            torch.testing.assert_close(padded[0, :length], out[row, :length], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(made(alone, None)[0], out[row, :length], atol=1e-6, rtol=1e-5)


def test_padding_takes_no_part_in_gradients() -> None:
    made, x = layer(), randn(4, 9, 8)
    gradients = []
    for filling in (0.0, 50.0):
        made.zero_grad()
        a = x.masked_fill(~MASK[..., None], filling).requires_grad_()
        made(a, MASK).square().sum().backward()
        assert a.grad is not None and not a.grad[~MASK].any()
        assert a.grad[:3].abs().sum((1, 2)).all()
        gradients.append([p.grad for p in made.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], atol=0, rtol=0)


def test_a_row_of_nothing_but_padding_is_harmless() -> None:
    made, x = layer(), randn(2, 5, 8).requires_grad_()
    out = made(x, torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(out, torch.zeros(2, 5, 8))
    out.square().sum().backward()
    assert x.grad is not None and not x.grad.any()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


def test_the_scan_and_its_gradients_are_float32_under_autocast() -> None:
    inputs = {name: x.requires_grad_() for name, x in scan_inputs(300).items()}

    def run() -> list[Tensor]:
        out = selective_scan(**inputs)
        return [out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))]

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(), expected, atol=0, rtol=0)


def test_a_layer_is_stable_under_bf16_autocast() -> None:
    made, x = layer(), randn(2, 257, 8)
    out = made(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        low = made(x, None)
    low.float().square().mean().backward()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), out, atol=0.05, rtol=0.05)
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in made.parameters())


def test_a_layer_in_float64_has_right_gradients() -> None:
    made, x = layer(4).double(), randn(2, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: made(a, MASK[:2, :4]), [x])


@pytest.mark.parametrize(
    "x, mask, message",
    [
        (randn(2, 5, 7), None, r"x must be \[batch, length, 8\], got \[2, 5, 7\]"),
        (randn(5, 8), None, r"x must be \[batch, length, 8\], got \[5, 8\]"),
        (randn(2, 5, 8), MASK[:2], r"mask must be \[batch, length\] = \[2, 5\], got \[2, 9\]"),
    ],
)
def test_wrong_shapes_are_named(x: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer()(x, mask)


@pytest.mark.parametrize("name", ["d_model", "d_state", "conv_kernel", "expand"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        BidirectionalMamba(**({"d_model": 8} | {name: 0}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [1, 5, 130, 2100])
def test_the_plain_scan_on_a_gpu_is_the_recurrence(length: int) -> None:
    inputs = scan_inputs(length)
    out = selective_scan_plain(**{name: x.cuda() for name, x in inputs.items()})
    torch.testing.assert_close(out.cpu(), recurrence(**inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm (extra `mamba`)")
@pytest.mark.parametrize("length", [1, 5, 130, 2100])
def test_the_kernel_and_its_twin_agree(length: int) -> None:
    assert mamba._mamba_ssm_kernel() is not None
    inputs = {name: x.cuda().requires_grad_() for name, x in scan_inputs(length, d_inner=16).items()}
    results = []
    for scan in (selective_scan, selective_scan_plain):
        out = scan(**inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(inputs.values()))])
    for name, by_kernel, plain in zip(("y", *inputs), *results, strict=True):
        # The kernel is compiled with fast exponentials and adds gradients up in no fixed order.
        error = (by_kernel - plain).abs().max() / plain.abs().max().clamp_min(1)
        assert error < (1e-5 if name == "y" else 1e-4), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="needs mamba-ssm (extra `mamba`)")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_layer_answers_the_same_with_and_without_the_kernel(dtype: torch.dtype, tolerance: float) -> None:
    made, x = layer(), randn(4, 9, 8)
    expected = made(x, MASK)
    made, x, mask = made.cuda(), x.cuda(), MASK.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = made(x, mask)
    torch.testing.assert_close(out.float().cpu(), expected, atol=tolerance, rtol=tolerance)

"""Building blocks: padding neither gives nor receives, positions are relative, both attentions agree."""

import pytest
import torch
import torch.nn.functional as F

from tests.yan_core.tiny import tiny_config
from yan_core.blocks import (
    Attention,
    EncoderBlock,
    FlowBlock,
    KeyValues,
    ShortConv,
    TimeEmbedding,
    attend,
    modulate,
    rotary_angles,
    rotate,
    time_features,
)
from yan_core.noise import RowDraws

LENGTHS = torch.tensor([7, 3, 1, 0])
MASK = torch.arange(7) < LENGTHS[:, None]
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(mask: torch.Tensor | None) -> tuple[torch.Tensor, KeyValues]:
    return randn(4, 2, 5, 8, seed=1), KeyValues(randn(4, 2, 7, 8, seed=2), randn(4, 2, 7, 8, seed=3), mask)


def fill_padding(x: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
    return x.masked_fill(~mask[..., None], value)


@pytest.mark.parametrize("masked", [True, False])
def test_the_fused_attention_and_the_plain_one_agree(masked: bool) -> None:
    query, context = qkv(MASK if masked else None)
    with torch.enable_grad():
        plain = attend(query, context)
    with torch.no_grad():
        fused = attend(query, context)
    torch.testing.assert_close(plain, fused)


@pytest.mark.parametrize("grad", [True, False], ids=["plain", "fused"])
def test_attention_is_a_softmax_over_real_keys(grad: bool) -> None:
    query, context = qkv(MASK)
    with torch.set_grad_enabled(grad):
        out = attend(query, context)
    for row, length in enumerate(LENGTHS[:3].tolist()):
        keys, values = context.keys[row, :, :length], context.values[row, :, :length]
        weights = (query[row] @ keys.transpose(-1, -2) / 8**0.5).softmax(-1)
        torch.testing.assert_close(out[row], weights @ values)


@pytest.mark.parametrize("grad", [True, False], ids=["plain", "fused"])
def test_a_row_with_no_real_key_gives_zeros(grad: bool) -> None:
    query, context = qkv(MASK)
    with torch.set_grad_enabled(grad):
        assert torch.equal(attend(query, context)[3], torch.zeros(2, 5, 8))


def test_gradients_of_a_masked_row_are_zero_and_finite() -> None:
    query, context = qkv(MASK)
    tensors = [x.requires_grad_() for x in (query, context.keys, context.values)]
    attend(query, context).square().sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
        assert not tensor.grad[3].any()
    assert not context.values.grad.transpose(1, 2)[~MASK].any()  # type: ignore[union-attr]


def test_repeated_keys_and_values_serve_a_repeated_batch() -> None:
    query, context = qkv(MASK)
    twice = attend(query.repeat(2, 1, 1, 1), context.repeat(2))
    assert torch.equal(twice[:4], twice[4:])
    torch.testing.assert_close(twice[:4], attend(query, context))
    assert context.repeat(1) is context
    assert qkv(None)[1].repeat(3).mask is None


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    query, key = randn(1, 1, 1, 8, seed=1).expand(1, 1, 12, 8), randn(1, 1, 1, 8, seed=2).expand(1, 1, 12, 8)
    angles = rotary_angles(12, 8, CPU)
    scores = (rotate(query, angles) @ rotate(key, angles).transpose(-1, -2))[0, 0]
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert len({round(float(scores.diagonal(d)[0]), 4) for d in range(-11, 12)}) == 23


def test_rotation_keeps_lengths_and_the_first_position() -> None:
    x = randn(2, 3, 6, 8)
    turned = rotate(x, rotary_angles(6, 8, CPU))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_angles_cached_in_inference_mode_serve_training() -> None:
    with torch.inference_mode():
        rotary_angles(13, 6, CPU)
    x = randn(1, 1, 13, 6).requires_grad_()
    rotate(x, rotary_angles(13, 6, CPU)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("rotary", [True, False])
def test_attention_without_positions_does_not_see_the_order(rotary: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, rotary)
    x, order = randn(1, 7, 16), torch.tensor([3, 1, 0, 6, 5, 2, 4])
    same = torch.allclose(attention(x)[:, order], attention(x[:, order]), atol=1e-5)
    assert same is not rotary


def test_rotary_attention_does_not_see_where_a_text_begins() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, rotary=True)
    x, mask = randn(2, 9, 16), torch.arange(9).expand(2, 9) >= 3
    torch.testing.assert_close(attention(x, mask=mask)[:, 3:], attention(x[:, 3:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gain, sees_itself", [(0.0, False), (3.0, True)])
def test_a_matching_start_lets_each_token_attend_to_its_like(gain: float, sees_itself: bool) -> None:
    torch.manual_seed(0)
    attention = Attention(64, 4, rotary=False)
    if gain:
        attention.start_matching(gain)
    words = randn(12, 64)
    x = torch.cat([words, words])[None]  # every word twice
    scores = attention._heads(attention.query(x)) @ attention.project(x, None).keys.transpose(-1, -2)
    twin = scores[..., :12, 12:].mean(1)[0].argmax(-1)
    assert (twin == torch.arange(12)).all() == sees_itself


@pytest.mark.parametrize("conv_kernel", [0, 3])
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("grad", [True, False], ids=["plain", "fused"])
def test_padding_gives_nothing_to_real_tokens(conv_kernel: int, rotary: bool, grad: bool) -> None:
    torch.manual_seed(0)
    block = EncoderBlock(tiny_config(), conv_kernel, rotary)
    x = randn(4, 7, 16)
    with torch.set_grad_enabled(grad):
        out = block(x, MASK)
        assert torch.equal(block(fill_padding(x, MASK, 50.0), MASK)[MASK], out[MASK])
        for row, length in enumerate(LENGTHS[:3].tolist()):
            alone = block(x[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool))
            torch.testing.assert_close(out[row, :length], alone[0], atol=1e-5, rtol=1e-5)
        assert torch.isfinite(out).all()


def test_convolution_is_local_and_gives_nothing_to_padding() -> None:
    torch.manual_seed(0)
    conv = ShortConv(6, 3)
    x = randn(4, 7, 6)
    out = conv(x, MASK)
    assert out.shape == x.shape
    assert torch.equal(out[~MASK], x[~MASK])
    changed = x.clone()
    changed[:, 3] += 1
    moved = (conv(changed, MASK) - out).abs().sum(-1)[0] > 0
    assert moved.tolist() == [False, False, True, True, True, False, False]


def test_time_features_are_distinct_and_plain_at_zero() -> None:
    features = time_features(torch.linspace(0, 1, 101), 16)
    assert features.shape == (101, 16)
    assert torch.equal(features[0], torch.tensor([0.0] * 8 + [1.0] * 8))
    distance = torch.cdist(features, features) + 9 * torch.eye(101)
    assert float(distance.min()) > 0.1
    assert TimeEmbedding(16)(torch.tensor([0.5, 1.0])).shape == (2, 16)


def test_modulation_scales_and_shifts_each_row() -> None:
    x, zero = randn(2, 3, 4), torch.zeros(2, 4)
    assert torch.equal(modulate(x, zero, zero), x)
    scale, shift = randn(2, 4, seed=1), randn(2, 4, seed=2)
    torch.testing.assert_close(modulate(x, scale, shift)[1, 2], x[1, 2] * (1 + scale[1]) + shift[1])


@pytest.mark.parametrize("cross_attention", [True, False])
def test_flow_block_uses_time_source_and_padding(cross_attention: bool) -> None:
    torch.manual_seed(0)
    block = FlowBlock(tiny_config(), cross_attention).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, time, latents = randn(4, 7, 16), randn(4, 16, seed=1), randn(4, 7, 16, seed=2)
    cross = block.cross_attention
    assert (cross is not None) == cross_attention

    def run(x: torch.Tensor, time: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        source = None if cross is None else cross.project(latents, MASK)
        return block(x, block.modulations(time), source, MASK)[MASK]

    out = run(x, time, latents)
    assert torch.equal(run(fill_padding(x, MASK, 9.0), time, fill_padding(latents, MASK, 9.0)), out)
    assert not torch.allclose(run(x, time + 1, latents), out)
    assert torch.allclose(run(x, time, latents + randn(16, seed=5)), out) is not cross_attention


def test_each_sublayer_of_a_flow_block_has_its_own_modulation() -> None:
    torch.manual_seed(0)
    block = FlowBlock(tiny_config(), cross_attention=True).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, source = randn(1, 7, 16), block.cross_attention.project(randn(1, 4, 16, seed=3), None)
    zero = tuple(torch.zeros(1, 16) for _ in range(6))
    plain = block(x, zero, source, None)
    outputs = [block(x, (*zero[:i], randn(1, 16, seed=9), *zero[i + 1 :]), source, None) for i in range(6)]
    assert all(not torch.allclose(out, plain) for out in outputs)
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


def test_dropout_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    block = EncoderBlock(tiny_config(dropout=0.5), 0, True)
    x, one, other = randn(4, 7, 16), RowDraws(torch.arange(4)), RowDraws(torch.arange(4, 8))
    assert not torch.equal(block.train()(x, MASK, one)[MASK], block(x, MASK, other)[MASK])
    assert torch.equal(block.eval()(x, MASK, one)[MASK], block(x, MASK)[MASK])
    with pytest.raises(ValueError, match="dropout in training needs the rows' keys"):
        block.train()(x, MASK)


def test_dropout_of_a_row_follows_from_its_key_whatever_the_batch_and_its_padding() -> None:
    torch.manual_seed(0)
    block = EncoderBlock(tiny_config(dropout=0.5), 3, True).train()
    x, keys = randn(4, 7, 16), torch.arange(4)
    together = block(x, MASK, RowDraws(keys))
    for i in range(4):
        longer, mask = F.pad(x[i : i + 1], (0, 0, 0, 3)), F.pad(MASK[i : i + 1], (0, 3))
        alone = block(longer, mask, RowDraws(keys[i : i + 1]))[0, :7]
        torch.testing.assert_close(alone[MASK[i]], together[i][MASK[i]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_on_a_gpu_agrees_with_the_plain_one() -> None:
    query, context = qkv(MASK)
    on_gpu = attend(query.cuda(), KeyValues(context.keys.cuda(), context.values.cuda(), MASK.cuda()))
    torch.testing.assert_close(on_gpu.cpu(), attend(query, context), atol=1e-4, rtol=1e-4)

"""The whole model: weights from a seed, shapes, sources computed once, and what padding may not change."""

import pytest
import torch

from tests.yan_core.tiny import VOCAB, pad_right, random_rows, tiny_config, tiny_model
from yan_core.batching import pad_rows
from yan_core.model import YanModel, build_model

SOURCE = pad_rows(random_rows([6, 2, 4]), 0)
TARGET_MASK = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_model(tiny_config(), VOCAB, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = build_model(tiny_config(), VOCAB, seed=3), build_model(tiny_config(), VOCAB, seed=4)
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert not torch.equal(other.decoder.head.weight, first.decoder.head.weight)


def test_forward_gives_all_experts_and_the_gate() -> None:
    model = tiny_model()
    velocities, gate = model(randn(3, 5, 16), torch.tensor([0.0, 0.5, 1.0]), model.encode_source(*SOURCE))
    assert velocities.shape == (3, 5, 3, 16) and gate.shape == (3, 5, 3)


def test_velocity_and_gate_depend_on_point_time_and_source() -> None:
    model = tiny_model()
    x, t, source = randn(3, 5, 16), torch.full((3,), 0.3), model.encode_source(*SOURCE)
    other = model.encode_source(SOURCE[0].flip(1), SOURCE[1])
    for changed in ((x + randn(16, seed=5), t, source), (x, t + 0.1, source), (x, t, other)):
        for a, b in zip(model(x, t, source), model(*changed), strict=True):
            assert not torch.allclose(a, b, atol=1e-3)


def test_rows_and_padding_do_not_change_each_other() -> None:
    model = tiny_model()
    x, t = randn(3, 5, 16), torch.tensor([0.0, 0.4, 1.0])
    together = model(x, t, model.encode_source(*SOURCE), TARGET_MASK)
    for i in range(3):
        source = model.encode_source(*pad_right(SOURCE[0][i : i + 1], SOURCE[1][i : i + 1], 4))
        length = int(TARGET_MASK[i].sum())
        alone = model(x[i : i + 1, :length], t[i : i + 1], source)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a[0], b[i, :length], atol=1e-5, rtol=1e-4)


def test_source_mean_is_over_real_tokens() -> None:
    model = tiny_model()
    latents = model.source_encoder(*SOURCE)  # type: ignore[misc]
    mean = model.encode_source(*SOURCE).mean
    torch.testing.assert_close(mean[1], latents[1, :2].mean(0))
    torch.testing.assert_close(mean[0], latents[0].mean(0))


def test_an_empty_source_is_no_source_and_no_nan() -> None:
    model = tiny_model()
    source = model.encode_source(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool))
    assert torch.equal(source.mean, torch.zeros(1, 16))
    for out in model(randn(1, 5, 16), torch.zeros(1), source):
        assert torch.isfinite(out).all()


def test_a_repeated_source_serves_a_repeated_batch() -> None:
    model = tiny_model()
    x, t, source = randn(6, 5, 16), torch.rand(6), model.encode_source(*SOURCE)
    for twice, first in zip(model(x, t, source.repeat(2)), model(x[:3], t[:3], source), strict=True):
        torch.testing.assert_close(twice[:3], first)


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [True] * 4), (2, [True, False] * 2), (3, [True, False, False, True])]
)
def test_cross_attention_in_every_nth_block(every: int, expected: list[bool]) -> None:
    model = tiny_model(flow_blocks=4, cross_attention_every=every)
    assert [kv is not None for kv in model.encode_source(*SOURCE).keys_values] == expected
    assert model(randn(3, 5, 16), torch.zeros(3), model.encode_source(*SOURCE))[0].shape == (3, 5, 3, 16)


def test_a_shared_encoder_is_the_target_encoder() -> None:
    model = tiny_model(share_encoder=True)
    assert model.source_encoder is None
    latents = model.encode_target(*SOURCE)
    torch.testing.assert_close(model.encode_source(*SOURCE).mean[1], latents[1, :2].mean(0))
    assert model.num_parameters() < tiny_model().num_parameters()


def test_gate_temperature_divides_the_logits() -> None:
    hot, cold = tiny_model(gate_temperature=2.0), tiny_model()
    x, t = randn(3, 5, 16), torch.zeros(3)
    torch.testing.assert_close(hot(x, t, hot.encode_source(*SOURCE))[1], cold(x, t, cold.encode_source(*SOURCE))[1] / 2)


def test_number_of_parameters() -> None:
    model = tiny_model()
    tables = [name for name in model.state_dict() if "embedding" in name or "from_" in name or "positions" in name]
    assert len(tables) == 2 + 3 + 1  # target: tokens, start; source: tokens, start, end; flow: positions
    outside = sum(model.state_dict()[name].numel() for name in tables) + VOCAB * 17
    assert model.num_parameters() == sum(v.numel() for v in model.state_dict().values())
    assert model.num_parameters(embeddings=False) == model.num_parameters() - outside


def test_more_experts_cost_heads_alone() -> None:
    def count(num_experts: int) -> int:
        model: YanModel = tiny_model(num_experts=num_experts)
        return model.num_parameters()

    assert count(4) - count(3) == 16 * 32 + 32 + 32 * 16 + 16 + 16 + 1  # one head, and one row of the gate

"""Token encoder and decoder: unit scale, positions, padding, and argmax without all logits."""

import pytest
import torch

from tests.yan_core.tiny import VOCAB, pad_right, random_rows, tiny_config, tiny_model
from yan_core.batching import pad_rows
from yan_core.config import EncoderConfig
from yan_core.latents import TokenEncoder, highest
from yan_core.model import YanModel

ROWS = random_rows([8, 3, 1])


def encoder_of(*positions: str, conv_kernel: int = 0) -> TokenEncoder:
    config = EncoderConfig(num_blocks=2, positions=positions, conv_kernel=conv_kernel, embed_std=0.5)
    torch.manual_seed(0)
    return TokenEncoder(VOCAB, tiny_config(), config).eval()


def test_latents_have_unit_scale() -> None:
    model = tiny_model()
    ids, mask = pad_rows(ROWS, 0)
    latents = model.encode_target(ids, mask)[mask]
    torch.testing.assert_close(latents.mean(-1), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.var(-1, unbiased=False), torch.ones(12), atol=1e-3, rtol=0)


@pytest.mark.parametrize("positions", [(), ("rotary",), ("start",), ("end",), ("rotary", "start", "end")])
@pytest.mark.parametrize("conv_kernel", [0, 3])
def test_latents_do_not_depend_on_padding_or_company(positions: tuple[str, ...], conv_kernel: int) -> None:
    encoder = encoder_of(*positions, conv_kernel=conv_kernel)
    ids, mask = pad_rows(ROWS, 0)
    together = encoder(ids, mask)
    assert torch.isfinite(together).all()
    for i, row in enumerate(ROWS):
        alone = encoder(*pad_right(*pad_rows([row], 0), 5))
        torch.testing.assert_close(alone[0, : len(row)], together[i, : len(row)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("positions", "sees"), [((), False), (("rotary",), True), (("start",), True), (("end",), True)]
)
def test_each_kind_of_position_shows_the_order(positions: tuple[str, ...], sees: bool) -> None:
    encoder = encoder_of(*positions)
    ids, mask = pad_rows(ROWS[:1], 0)
    turned = encoder(ids.flip(1), mask).flip(1)
    assert torch.allclose(encoder(ids, mask), turned, atol=1e-4) is not sees


def test_end_positions_count_from_the_last_real_token() -> None:
    encoder = encoder_of("end")
    rows = [[5, 6, 7, 8], [5, 6]]
    ids, mask = pad_rows(rows, 0)
    seen: list[torch.Tensor] = []
    encoder.from_end.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    encoder(ids, mask)
    assert seen[0][0].tolist() == [3, 2, 1, 0]
    assert seen[0][1, :2].tolist() == [1, 0]


@pytest.mark.parametrize("positions", ["start", "end"])
def test_more_tokens_than_positions_are_refused(positions: str) -> None:
    encoder = encoder_of(positions)
    longest = torch.full((1, 40), 5)
    assert encoder(longest, longest > 0).shape == (1, 40, 16)
    with pytest.raises(ValueError, match=r"41 tokens are more than model\.max_positions=40"):
        encoder(torch.full((1, 41), 5), torch.ones(1, 41, dtype=torch.bool))


def test_decoder_reads_each_token_by_itself() -> None:
    model = tiny_model()
    latents = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    logits = model.decoder(latents)
    assert logits.shape == (2, 6, VOCAB)
    torch.testing.assert_close(model.decoder(latents[1, 2]), logits[1, 2])


@pytest.mark.parametrize("tokens_at_once", [1, 5, 12, 1000])
@pytest.mark.parametrize("logits_at_once", [1, 7, 12 * VOCAB, 10_000])
def test_reading_in_blocks_equals_the_argmax_over_all_logits(tokens_at_once: int, logits_at_once: int) -> None:
    model: YanModel = tiny_model()
    latents = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    ids, log_probs = model.decoder.read(latents, True, tokens_at_once, logits_at_once)
    expected = model.decoder(latents).log_softmax(-1).max(-1)
    assert torch.equal(ids, expected.indices) and ids.shape == (2, 6)
    assert log_probs is not None
    torch.testing.assert_close(log_probs, expected.values)
    again, none = model.decoder.read(latents, False, tokens_at_once, logits_at_once)
    assert none is None and torch.equal(again, ids)


def test_of_equal_logits_the_first_is_read() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.zero_()[5:].fill_(1.0)
    for logits_at_once in (4, 20, 1000):
        assert (model.decoder.read(torch.randn(2, 2, 16), logits_at_once=logits_at_once)[0] == 5).all()


@pytest.mark.parametrize("vocab", [3, 256, 511, 512, 700, 1024])
def test_the_highest_logit_is_the_first_of_equals(vocab: int) -> None:
    logits = torch.randint(0, vocab // 2, (50, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    logits[0], logits[1, -1], logits[2, 0] = -torch.inf, torch.inf, torch.inf
    top, index = highest(logits)
    for row, value, place in zip(logits.tolist(), top.tolist(), index.tolist(), strict=True):
        assert value == max(row) and place == row.index(max(row))


def test_reading_never_holds_more_logits_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held = tiny_model(), []
    plain = model.decoder._read_block
    monkeypatch.setattr(
        model.decoder, "_read_block", lambda x, s, b, *a: held.append(len(x) * min(b, VOCAB - s)) or plain(x, s, b, *a)
    )
    model.decoder.read(torch.zeros(3, 7, 16), tokens_at_once=4, logits_at_once=44)
    assert max(held) <= 44 and sum(held) == 21 * VOCAB

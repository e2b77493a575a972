"""The autoencoder's loss and the discrepancy of its latents, against both written out."""

import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.yan_core.tiny import (
    STAGE_1,
    VOCAB,
    autoencoder_rows,
    tiny_model,
)
from yan_core.loss import (
    autoencoder_loss,
    latent_terms,
    maximum_mean_discrepancy,
)
from yan_core.noise import Stream, normal, uniform


def test_mean_discrepancy_is_zero_for_the_same_sample_and_grows_with_the_distance() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    y = torch.randn(200, 4, generator=torch.Generator().manual_seed(1))
    assert float(maximum_mean_discrepancy(x, x)) == pytest.approx(0, abs=1e-5)
    values = [float(maximum_mean_discrepancy(x, y + shift)) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values) and 0 <= values[0] < 0.1 < values[2]


def test_mean_discrepancy_of_two_points_in_closed_form() -> None:
    x, y = torch.zeros(1, 3), torch.tensor([[3.0, 0.0, 4.0]])
    expected = sum(2 - 2 * math.exp(-25 / (2 * s**2)) for s in (0.5, 2.0))
    assert float(maximum_mean_discrepancy(x, y, (0.5, 2.0))) == pytest.approx(expected, rel=1e-6)


def test_mean_discrepancy_of_two_samples_equals_the_sum_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=generator), 2 + torch.randn(7, 3, generator=generator)

    def kernel(a: torch.Tensor, b: torch.Tensor, sigma: float) -> float:
        pairs = [math.exp(-float((p - q).square().sum()) / (2 * sigma**2)) for p in a for q in b]
        return sum(pairs) / len(pairs)

    expected = sum(kernel(x, x, s) + kernel(y, y, s) - 2 * kernel(x, y, s) for s in (0.7, 3.0))
    assert float(maximum_mean_discrepancy(x, y, (0.7, 3.0))) == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(maximum_mean_discrepancy(x, y, (0.7, 3.0))) == pytest.approx(expected, rel=1e-5)


def test_the_discrepancy_is_that_of_the_tokens_with_the_lowest_draws() -> None:
    keys, mask = torch.arange(2), torch.ones(2, 5, dtype=torch.bool)
    latents = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    draws = uniform(keys, Stream.MMD, (5,)).flatten()
    lowest = draws.argsort()[:3]
    prior = normal((draws[lowest[:1]] * 2**31).long(), Stream.MMD_PRIOR, (3, 4))[0]
    squares, discrepancy = latent_terms(latents, mask, keys, 3, torch.tensor(20.0))
    assert float(squares) == pytest.approx(float(latents.square().sum()) / 80)
    assert float(discrepancy) == pytest.approx(float(maximum_mean_discrepancy(latents.view(10, 4)[lowest], prior)))


@pytest.mark.parametrize("most", [3, 8, 40])
@pytest.mark.parametrize("rows", [1, 2])
def test_several_workers_choose_the_tokens_that_one_would(
    rows: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers played by threads, of unlike numbers of rows; tests/distributed has real ones."""
    latents = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([[5], [2], [4], [3]])
    keys, count = torch.tensor([3, 14, 15, 92]), torch.tensor(14.0)
    squares, discrepancy = latent_terms(latents, mask, keys, most, count)
    barrier, given = threading.Barrier(2, timeout=60), {}

    def gather(value: torch.Tensor) -> torch.Tensor:
        given[threading.current_thread().name] = value
        barrier.wait()
        both = torch.stack([given["0"], given["1"]])
        barrier.wait()
        return both

    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def work(name: str, part: slice) -> None:
        found[name] = latent_terms(latents[part], mask[part], keys[part], most, count)

    monkeypatch.setattr("yan_core.loss.num_workers", lambda: 2)
    monkeypatch.setattr("yan_core.loss.gather", gather)
    threads = [
        threading.Thread(target=work, args=("0", slice(rows)), name="0"),
        threading.Thread(target=work, args=("1", slice(rows, None)), name="1"),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found["0"][0] + found["1"][0], squares)
    for _, of_worker in found.values():
        torch.testing.assert_close(of_worker, discrepancy)


@pytest.mark.parametrize("latent_dim", [0, 8])
def test_autoencoder_loss_equals_its_parts_by_hand(latent_dim: int) -> None:
    model, batch = tiny_model(latent_dim=latent_dim), autoencoder_rows()
    width = latent_dim or 16
    output = autoencoder_loss(model, batch, STAGE_1)
    mask = batch.target_mask
    latents = model.encode_target(batch.source_ids, mask)
    scale = STAGE_1.latent_noise * uniform(batch.keys, Stream.LATENT_SCALE, (1, 1))
    logits = model.decoder(latents + scale * normal(batch.keys, Stream.LATENT_NOISE, (7, width)))
    ce = F.cross_entropy(logits[mask], batch.target_ids[mask])
    p = {name: float(value) for name, value in output.parts.items()}
    assert p.keys() == {"loss_ce", "loss_l2", "loss_mmd", "token_accuracy"}
    assert p["loss_ce"] == pytest.approx(ce.item(), rel=1e-5)
    assert p["loss_l2"] == pytest.approx(latents[mask].square().mean().item(), rel=1e-5)
    assert p["token_accuracy"] == pytest.approx(float((logits.argmax(-1) == batch.target_ids)[mask].float().mean()))
    _, mmd = latent_terms(latents, mask, batch.keys, STAGE_1.mmd_tokens, mask.sum())
    assert p["loss_mmd"] == pytest.approx(mmd.item()) and mmd > 0 and STAGE_1.mmd_tokens < mask.sum()
    expected = p["loss_ce"] + 0.1 * p["loss_l2"] + 0.2 * p["loss_mmd"]
    assert output.total.item() == pytest.approx(expected, rel=1e-5)


def test_the_autoencoders_accuracy_is_the_share_of_right_tokens() -> None:
    model, batch = tiny_model(), autoencoder_rows()
    scale = STAGE_1.latent_noise * uniform(batch.keys, Stream.LATENT_SCALE, (1, 1))
    latents = model.encode_target(batch.source_ids, batch.target_mask)
    written = model.decoder(latents + scale * normal(batch.keys, Stream.LATENT_NOISE, (7, 16))).argmax(-1)
    target = torch.where(torch.arange(7) % 2 == 0, written, (written + 1) % VOCAB)
    share = float((torch.arange(7) % 2 == 0).expand(4, 7)[batch.target_mask].float().mean())
    output = autoencoder_loss(model, replace(batch, target_ids=target), STAGE_1)
    assert float(output.parts["token_accuracy"]) == pytest.approx(share) and 0.3 < share < 0.9


def test_the_autoencoders_dropout_follows_from_the_keys() -> None:
    model, batch = tiny_model(dropout=0.3).train(), autoencoder_rows()
    found = []
    for keys in (batch.keys, batch.keys, batch.keys + 7):
        torch.manual_seed(len(found))
        found.append(autoencoder_loss(model, replace(batch, keys=keys), replace(STAGE_1, latent_noise=0.0)).total)
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_autoencoder_without_noise_is_deterministic_reconstruction() -> None:
    model, batch = tiny_model(), autoencoder_rows()
    quiet = replace(STAGE_1, latent_noise=0.0)
    first = autoencoder_loss(model, batch, quiet).parts["loss_ce"]
    other = replace(batch, keys=batch.keys + 7)
    assert torch.equal(autoencoder_loss(model, other, quiet).parts["loss_ce"], first)
    assert not torch.equal(autoencoder_loss(model, other, STAGE_1).parts["loss_ce"], first)


def test_autoencoder_loss_trains_encoder_and_decoder_and_nothing_else() -> None:
    model = tiny_model()
    autoencoder_loss(model, autoencoder_rows(), STAGE_1).total.backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"target_encoder", "decoder"}

"""Baselines: a cache that changes nothing, a diffusion that fills every place, and losses that can be learned from."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

import yan_core
from tests.yan_core.tiny import VOCAB, pad_right, random_rows, tiny_batch
from yan_core.baselines import ARDecoder, Baseline, EncoderDecoder, next_token, pad_left
from yan_core.batching import EOS, Batch, pad_rows
from yan_core.checkpoint import save_pretrained
from yan_core.config import BaselineConfig, FlowLossConfig, RunConfig, SamplingConfig, TokenizerConfig, from_dict
from yan_core.loss import baseline_loss
from yan_core.masked_diffusion import MaskedDiffusion
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

SHAPE = BaselineConfig(d_model=16, num_blocks=2, num_heads=2, max_positions=40)
LENGTHS = [7, 1, 12, 4]
SOURCES = pad_rows(random_rows(LENGTHS), 0)


def loss_of(model: Baseline, batch: Batch) -> torch.Tensor:
    return (model.losses(batch) * batch.target_mask).sum() / batch.target_mask.sum()


def ar() -> ARDecoder:
    pytest.importorskip("transformers", reason="the extra `baselines` is not installed")
    torch.manual_seed(0)
    model = ARDecoder(SHAPE, VOCAB).eval()
    for parameter in model.parameters():  # fresh GPT-2 weights are so small that it repeats one token
        torch.nn.init.normal_(parameter, std=0.5) if parameter.ndim == 2 else None
    return model


def mdm() -> MaskedDiffusion:
    torch.manual_seed(0)
    model = MaskedDiffusion(dataclasses.replace(SHAPE, family="masked_diffusion"), VOCAB).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("size", [5e6, 50e6, 200e6])
def test_a_shape_matches_its_size_in_gpt_2s_proportions(size: float) -> None:
    shape = BaselineConfig.of_size(int(size))
    assert abs(shape.num_parameters / size - 1) < 0.05
    assert 32 <= shape.d_model / shape.num_blocks <= 128
    assert shape.d_model == 64 * shape.num_heads


@pytest.mark.parametrize("size", range(1_000_000, 5_000_000, 97_001))
def test_a_small_shape_is_not_deep_and_narrow(size: int) -> None:
    shape = BaselineConfig.of_size(size, least_blocks=4)
    assert abs(shape.num_parameters / size - 1) < 0.05
    assert 32 <= shape.d_model / shape.num_blocks <= 128


@pytest.mark.parametrize("family", ["ar", "encoder_decoder", "masked_diffusion"])
def test_there_is_a_shape_of_every_size(family) -> None:
    for size in range(20_000, 1_500_000, 7_001):
        shape = BaselineConfig.of_size(size, family)
        assert abs(shape.num_parameters / size - 1) < 0.25
        assert shape.d_model // shape.num_heads >= min(64, shape.d_model)


def test_shapes_count_the_weights_of_the_blocks() -> None:
    matrices = {id(p): p.numel() for p in mdm().blocks.parameters() if p.ndim == 2}
    assert sum(matrices.values()) == SHAPE.num_parameters
    assert sum(p.numel() for p in ar().gpt2.transformer.h.parameters() if p.ndim == 2) == SHAPE.num_parameters


@torch.no_grad()
def greedy_without_a_cache(model: ARDecoder, ids: list[int], length: int) -> list[int]:
    ids = [*ids, EOS]  # between source and target
    for _ in range(length):
        ids = [*ids, int(model.gpt2(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[-length:]


def test_greedy_with_a_cache_equals_recomputing_and_padding_does_not_matter() -> None:
    model = ar()
    ids = model.generate(*SOURCES, 9)
    wider = model.generate(*pad_right(*SOURCES, 5), 9)
    assert torch.equal(wider, ids)
    for i, n in enumerate(LENGTHS):
        row = SOURCES[0][i, :n].tolist()
        assert ids[i].tolist() == greedy_without_a_cache(model, row, 9)
        assert model.generate(torch.tensor([row]), None, 9)[0].tolist() == ids[i].tolist()
    assert len(ids.unique()) > 5


@torch.no_grad()
def test_a_static_cache_gives_the_same_and_can_be_used_again() -> None:
    model, ids = ar(), SOURCES[0][2:3]
    cache = model.static_cache(1, ids.shape[1] + 10)
    for _ in range(2):
        cache.reset()
        out = [model.advance(torch.nn.functional.pad(ids, (0, 1), value=EOS), cache)]
        for _ in range(8):
            out.append(model.advance(out[-1], cache))
        assert torch.equal(torch.cat(out, 1), model.generate(ids, None, 9))


@torch.no_grad()
def test_logits_of_the_whole_target_are_those_met_in_generation() -> None:
    model = ar()
    ids = model.generate(*SOURCES, 9)
    assert torch.equal(model(*SOURCES, ids).argmax(-1), ids)


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"need transformers; .*pip install -e '\.\[baselines\]'"):
        ARDecoder(SHAPE, VOCAB)


def test_pad_left() -> None:
    ids, mask = pad_left(torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([[True, True, False], [True, True, True]]))
    assert ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert mask.tolist() == [[False, True, True], [True, True, True]]


@pytest.mark.parametrize("steps", [*range(1, 8), None])
def test_masked_diffusion_fills_every_place_in_as_many_passes_as_asked(steps: int | None) -> None:
    model, passes = mdm(), []
    model.norm.register_forward_hook(lambda *_: passes.append(1))
    ids = model.generate(*SOURCES, 7, steps)
    assert ids.shape == (4, 7)
    assert not (ids == model.mask_id).any()
    assert len(passes) == (steps or 7)


def test_masked_diffusion_keeps_what_is_filled_and_fills_the_surest() -> None:
    model = mdm()
    start = torch.full((4, 7), model.mask_id)
    start[:, 2] = 9
    after = model.unmask(start, *SOURCES, 2)
    assert (after[:, 2] == 9).all()
    assert ((after != model.mask_id).sum(-1) == 3).all()
    with torch.no_grad():
        probs = model(start, *SOURCES).index_fill(-1, torch.tensor(model.mask_id), -torch.inf).softmax(-1)
    sure = probs.max(-1).values.index_fill(1, torch.tensor(2), 0)
    for i in range(4):
        filled = {j for j in range(7) if after[i, j] != model.mask_id} - {2}
        assert filled == set(sure[i].topk(2).indices.tolist())
        assert all(after[i, j] == probs[i, j].argmax() for j in filled)


def test_masked_diffusion_does_not_depend_on_padding_or_company() -> None:
    model = mdm()
    ids = model.generate(*SOURCES, 7)
    assert torch.equal(model.generate(*pad_right(*SOURCES, 5), 7), ids)
    for i, n in enumerate(LENGTHS):
        assert torch.equal(model.generate(SOURCES[0][i : i + 1, :n], None, 7)[0], ids[i])


@pytest.mark.parametrize("steps", [0, 8])
def test_masked_diffusion_refuses_steps_out_of_range(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps must be in \[1, length=7\], got {steps}"):
        mdm().generate(*SOURCES, 7, steps)


@pytest.mark.parametrize("make", [ar, mdm])
def test_losses_fall(make) -> None:
    model, batch = make(), tiny_batch()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim == 2 else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_diffusion_loss_is_the_cross_entropy_of_masked_places_over_their_share() -> None:
    """With equal logits every masked place costs log(vocab), and dividing by t makes up for the places left out."""
    model, batch = mdm(), tiny_batch(400)
    torch.nn.init.zeros_(model.head.weight)
    assert loss_of(model, batch).item() == pytest.approx(math.log(VOCAB), rel=0.15)


def bart() -> EncoderDecoder:
    pytest.importorskip("transformers", reason="the extra `baselines` is not installed")
    torch.manual_seed(0)
    model = EncoderDecoder(dataclasses.replace(SHAPE, family="encoder_decoder"), VOCAB).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim == 2 else None
    torch.nn.init.normal_(model.bart.model.decoder.embed_positions.weight, std=4.0)  # else it repeats one token
    return model


@pytest.mark.parametrize("make", [ar, bart, mdm])
def test_answers_do_not_depend_on_padding_or_company(make) -> None:
    model = make()
    ids, _ = model.answer(*SOURCES, 9, 9)
    assert ids.shape == (4, 9)
    assert torch.equal(model.answer(*pad_right(*SOURCES, 5), 9, 9)[0], ids)
    for i, n in enumerate(LENGTHS):
        alone, mask = SOURCES[0][i : i + 1, :n], SOURCES[1][i : i + 1, :n]
        assert until_end(model.answer(alone, mask, 9, 9)[0]) == until_end(ids[i : i + 1])


def until_end(ids: torch.Tensor) -> list[int]:
    (row,) = ids.tolist()
    return row[: row.index(EOS)] if EOS in row else row


@pytest.mark.parametrize("make", [ar, bart, mdm])
def test_a_told_length_is_kept(make) -> None:
    told = torch.tensor([1, 9, 4, 6])
    ids, _ = make().answer(*SOURCES, 9, 4, told)
    assert (ids == EOS).tolist() == (torch.arange(9) >= told[:, None]).tolist()


@pytest.mark.parametrize("make", [ar, bart, mdm])
def test_drawn_answers_are_of_their_keys_and_depend_on_no_padding_or_company(make) -> None:
    model, keys, told = make(), torch.tensor([3, 2**40, 5, 3]), torch.tensor([1, 9, 4, 6])
    ids, _ = model.answer(*SOURCES, 9, 9, told, keys)
    assert (ids == EOS).tolist() == (torch.arange(9) >= told[:, None]).tolist()
    assert torch.equal(model.answer(*pad_right(*SOURCES, 5), 9, 9, told, keys)[0], ids)
    for i, n in enumerate(LENGTHS):
        alone, mask = SOURCES[0][i : i + 1, :n], SOURCES[1][i : i + 1, :n]
        assert torch.equal(model.answer(alone, mask, 9, 9, told[i : i + 1], keys[i : i + 1])[0], ids[i : i + 1])
    assert not torch.equal(model.answer(*SOURCES, 9, 9, told, keys + 1)[0], ids)
    assert not torch.equal(model.answer(*SOURCES, 9, 9, told)[0], ids)


def test_each_place_and_each_pass_has_noise_of_its_own() -> None:
    flat, keys = torch.zeros(200, 50), torch.arange(200)
    first, second = next_token(flat, 0, keys=keys), next_token(flat, 1, keys=keys)
    assert float((first == second).float().mean()) < 0.1  # by chance 1 in 50
    model = mdm()
    with torch.no_grad():
        model.head.weight.zero_()
    ids, _ = model.answer(*(value[:1].expand(200, -1) for value in SOURCES), 4, 4, torch.full((200,), 4), keys)
    assert all(float((ids[:, i] == ids[:, j]).float().mean()) < 0.15 for i in range(4) for j in range(i))


@pytest.mark.parametrize("make", [ar, bart, mdm])
def test_drawn_tokens_are_as_frequent_as_probable(make) -> None:
    model, draws = make(), 4000
    ids, mask = (value[:1].expand(draws, -1) for value in SOURCES)
    found, _ = model.answer(ids, mask, 1, 1, None, torch.arange(draws))
    shares = torch.bincount(found[:, 0], minlength=VOCAB) / draws
    if isinstance(model, MaskedDiffusion):
        logits = model(torch.full((1, 1), model.mask_id), ids[:1], mask[:1])[0, 0].float()
        logits[model.mask_id] = -torch.inf
        expected = logits.softmax(-1)
    else:  # a token's cross-entropy is its probability, and nothing is before it
        targets = torch.arange(VOCAB)[:, None]
        keys = torch.zeros(VOCAB, dtype=torch.long)
        batch = Batch(keys, ids[:VOCAB], mask[:VOCAB], targets, torch.ones_like(targets, dtype=torch.bool))
        expected = (-model.losses(batch)[:, 0]).exp()
    assert expected.max() < 0.9  # else it would say little
    assert (shares - expected[: len(shares)]).abs().max() < 4 * (0.25 / draws) ** 0.5


@torch.no_grad()
def test_an_encoder_decoder_with_a_cache_writes_what_it_writes_without() -> None:
    model = bart()
    ids, passes = model.answer(*SOURCES, 9, 0)
    shifted = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=EOS)
    logits = model.bart(SOURCES[0], attention_mask=SOURCES[1].long(), decoder_input_ids=shifted).logits.argmax(-1)
    for row, again in zip(ids.tolist(), logits.tolist(), strict=True):
        last = row.index(EOS) if EOS in row else 8
        assert row[: last + 1] == again[: last + 1]
    assert passes <= 9 and len(ids.unique()) >= 3


@pytest.mark.parametrize("make", [ar, bart])
def test_autoregression_takes_a_pass_a_token_and_stops_at_the_end(make) -> None:
    model = make()
    ids, passes = model.answer(*SOURCES, 9, 0, torch.tensor([2, 3, 1, 2]))
    assert passes == 4  # the longest and its end
    assert (ids[:, 4:] == EOS).all()


@pytest.mark.parametrize("make", [ar, bart, mdm])
def test_sizes_leave_embeddings_and_vocabulary_out(make) -> None:
    model = make()
    matrices = model.config.num_parameters
    assert matrices <= model.num_parameters(embeddings=False) < 1.2 * matrices
    assert model.num_parameters() - model.num_parameters(embeddings=False) >= 2 * VOCAB * 16


def test_filling_is_no_part_of_an_autoregressive_loss() -> None:
    """What is after the first end of a text does not count; for masked diffusion, which writes it, it does."""
    for model, counts in ((ar(), False), (mdm(), True)):
        batch = tiny_batch()
        batch = dataclasses.replace(batch, target_mask=torch.ones_like(batch.target_mask))
        target = batch.target_ids.clone()
        target[:, 2:] = EOS
        plain = baseline_loss(model, dataclasses.replace(batch, target_ids=target), FlowLossConfig(fill_weight=0.5))
        target[:, 3:] = 7
        other = baseline_loss(model, dataclasses.replace(batch, target_ids=target), FlowLossConfig(fill_weight=0.5))
        assert (plain.total.item() != pytest.approx(other.total.item())) == counts


@pytest.mark.parametrize("make", [ar, bart, mdm])
def test_a_baseline_is_saved_loaded_and_answers_texts(make, tmp_path: Path) -> None:
    model, tokenizer = make(), Tokenizer.train(["a b c d e f"], TokenizerConfig(kind="word"))
    model = build_model(model.config, tokenizer.vocab_size, seed=1).eval()
    details = {"task": "question_answering", "max_source_tokens": 20, "max_target_tokens": 8}
    save_pretrained(tmp_path / "model", model, tokenizer, details)
    loaded = yan_core.load(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.model.parameters(), strict=True))
    answers = loaded.generate(["a b c", "b"], num_steps=3)
    assert [a.tokens for a in answers] == [a.tokens for a in loaded.generate(["a b c", "b"], num_steps=3)]
    assert all(1 <= a.nfe <= 8 for a in answers)
    drawn = [loaded.generate(["a b c"], num_steps=3, seeds=seed, do_sample=True)[0].tokens for seed in range(20)]
    assert len({*map(tuple, drawn)}) > 5  # else it is no draw
    assert drawn[3] == loaded.generate(["b", "a b c"], num_steps=3, seeds=[0, 3], do_sample=True)[1].tokens
    with pytest.raises(ValueError, match="num_candidates are for YAN alone"):
        loaded.generate(["a"], sampling=SamplingConfig(num_candidates=2))
    with pytest.raises(ValueError, match=r"max_tokens must be in \[1, 19\]"):
        loaded.generate(["a"], max_tokens=20)


def test_a_config_refuses_what_a_baseline_has_not() -> None:
    with pytest.raises(ValueError, match="autoencoder.max_steps must be 0 with a baseline"):
        from_dict(RunConfig, {"baseline": {}})
    stages = {"autoencoder": {"max_steps": 0}}
    with pytest.raises(ValueError, match=r"baseline.max_positions=100 is below .* together, 113"):
        from_dict(RunConfig, {"baseline": {"max_positions": 100}, "stages": stages})
    with pytest.raises(ValueError, match="strategy must be ddp"):
        from_dict(RunConfig, {"baseline": {}, "stages": stages, "scaling": {"strategy": "fsdp"}})
    with pytest.raises(ValueError, match="evaluation.sampling is for YAN"):
        from_dict(RunConfig, {"baseline": {}, "stages": stages, "evaluation": {"sampling": {"num_candidates": 2}}})
    with pytest.raises(ValueError, match="stages.finetune.trains must name flow"):
        from_dict(RunConfig, {"baseline": {}, "stages": {**stages, "finetune": {"trains": ["source_encoder"]}}})


@pytest.mark.parametrize("make", [ar, bart, mdm])
def test_every_weight_learns(make) -> None:
    """One without a gradient would stop a training over several workers."""
    model = make().train()
    loss_of(model, tiny_batch(16)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_source_is_told_from_a_target() -> None:
    """`A` + `B` and `A B` + nothing are not the same to an autoregressive decoder."""
    model, batch = ar(), tiny_batch(1)
    source, target = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[7, 8, 9]])

    def loss_of_9(source_ids: torch.Tensor, target_ids: torch.Tensor) -> float:
        masks = {f"{side}_mask": ids > 0 for side, ids in (("source", source_ids), ("target", target_ids))}
        given = dataclasses.replace(batch, source_ids=source_ids, target_ids=target_ids, **masks)
        return model.losses(given)[0, -1].item()

    assert loss_of_9(source, target[:, 2:]) != pytest.approx(loss_of_9(source[:, :2], target), abs=1e-3)


def test_a_source_of_no_token_is_read_alike_in_training_and_generation() -> None:
    model, nothing = ar(), torch.zeros(1, 3, dtype=torch.int64)
    mask = nothing > 0
    ids = model.generate(nothing, mask, 5)
    with torch.no_grad():
        assert torch.equal(model(nothing, mask, ids).argmax(-1), ids)


def test_told_a_length_masked_diffusion_spreads_the_places_it_has_over_its_passes() -> None:
    model, left = mdm(), []
    model.register_forward_pre_hook(lambda _, args: left.append((args[0] == model.mask_id).sum(-1).tolist()))
    model.answer(*SOURCES, 24, 3, torch.tensor([3, 24, 6, 1]))
    assert left == [[3, 24, 6, 1], [2, 16, 4, 1], [1, 8, 2, 1]]

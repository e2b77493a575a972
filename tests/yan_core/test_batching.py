"""Batches: span infilling keeps the text recoverable, and a row's corruption is the row's own."""

from collections.abc import Callable

import pytest
import torch

from tests.yan_core.tiny import LOSS, random_rows
from yan_core.batching import Batch, autoencoder_batch, infill_spans, infilling_batch, pad_rows, task_batch
from yan_core.config import AutoencoderLossConfig, FlowLossConfig
from yan_core.tokenization import Tokenizer

PAD, EOS, MASK = Tokenizer.pad_id, Tokenizer.eos_id, Tokenizer.mask_id
STAGE_1 = AutoencoderLossConfig(clean_share=0.0, mask_share=0.15, max_span=3)
STAGE_2 = FlowLossConfig(corpus_mask_share=0.15, corpus_max_span=3)


def counting_rows(lengths: list[int]) -> list[list[int]]:
    """Rows in which token 10 + i stands at place i."""
    return [list(range(10, 10 + n)) for n in lengths]


def spans_of(corrupted: list[int], length: int) -> list[int]:
    """Lengths of the masked spans of a counting row, asserting that the rest is in order with one mask a gap."""
    spans = []
    place = 0
    previous_masked = False
    for token in [*corrupted, 10 + length]:
        if token == MASK:
            assert not previous_masked
        else:
            gap = token - 10 - place
            assert gap > 0 if previous_masked else gap == 0
            spans += [gap] * (gap > 0)
            place = token - 10 + 1
        previous_masked = token == MASK
    return spans


def test_rows_are_padded_to_the_longest_or_to_a_length() -> None:
    ids, mask = pad_rows([[5, 6, 7], [], [8]], PAD)
    assert ids.tolist() == [[5, 6, 7], [PAD] * 3, [8, PAD, PAD]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    ids, mask = pad_rows([[5], []], EOS, length=2)
    assert ids.tolist() == [[5, EOS], [EOS, EOS]] and mask.tolist() == [[True, False], [False, False]]
    assert ids.dtype == torch.int64
    assert pad_rows([[]], PAD)[0].shape == (1, 1)


@pytest.mark.property
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("max_span", [1, 3, 6])
def test_every_row_loses_a_span_and_can_be_put_together_again(share: float, max_span: int) -> None:
    lengths = [1 + i % 20 for i in range(400)]
    ids, mask = pad_rows(counting_rows(lengths), PAD)
    corrupted, left = infill_spans(ids, mask, torch.arange(400), share, max_span)
    assert corrupted.shape == left.shape == ids.shape
    for row, row_left, length in zip(corrupted, left, lengths, strict=True):
        count = int(row_left.sum())
        assert row_left[:count].all() and (row[count:] == PAD).all()
        spans = spans_of(row[:count].tolist(), length)
        assert spans
        if share == 0.0:
            assert len(spans) == 1 and spans[0] <= max_span
        if share == 1.0 and max_span == 1:
            assert row[:count].tolist() == [MASK]


@pytest.mark.parametrize(("share", "max_span"), [(0.12, 3), (0.08, 1), (0.15, 5), (0.3, 2)])
def test_the_share_of_masked_tokens_is_near_the_one_asked_for(share: float, max_span: int) -> None:
    ids, mask = pad_rows(counting_rows([500] * 100), PAD)
    corrupted, left = infill_spans(ids, mask, torch.arange(100), share, max_span)
    kept = (left & (corrupted != MASK)).sum()
    masked = 1 - float(kept) / mask.sum()
    assert 0.85 * share - 0.005 < masked < share * 1.05


def test_lengths_of_spans_are_uniform() -> None:
    ids, mask = pad_rows(counting_rows([400] * 200), PAD)
    corrupted, left = infill_spans(ids, mask, torch.arange(200), 0.01, 4)
    spans = [s for row, n in zip(corrupted.tolist(), left.sum(1).tolist(), strict=True) for s in spans_of(row[:n], 400)]
    counts = torch.bincount(torch.tensor(spans), minlength=5)[1:5] / len(spans)
    assert len(spans) > 250 and float((counts - 0.25).abs().max()) < 0.1


def test_the_one_sure_span_starts_anywhere() -> None:
    ids, mask = pad_rows(counting_rows([5] * 2000), PAD)
    corrupted, _ = infill_spans(ids, mask, torch.arange(2000), 0.0, 1)
    places = (corrupted == MASK).int().argmax(1)
    assert float((torch.bincount(places, minlength=5) / 2000 - 0.2).abs().max()) < 0.04


def test_masking_does_not_change_its_arguments() -> None:
    ids, mask = pad_rows(counting_rows([6, 3]), PAD)
    before = ids.clone(), mask.clone()
    infill_spans(ids, mask, torch.arange(2), 0.5, 3)
    assert torch.equal(ids, before[0]) and torch.equal(mask, before[1])


@pytest.mark.parametrize("make", [autoencoder_batch, infilling_batch], ids=lambda make: make.__name__)
def test_the_corruption_of_a_row_does_not_depend_on_its_batch(make: Callable[..., Batch]) -> None:
    lengths = [6, 11, 1, 15, 4]
    rows, keys = counting_rows(lengths), torch.arange(5) + 1000
    config = STAGE_1 if make is autoencoder_batch else STAGE_2
    together = make(rows, keys, config)
    for i in (3, 0, 4):
        alone = make(rows[i : i + 1], keys[i : i + 1], config)
        tokens = [
            [t for t in batch.source_ids[j].tolist() if t not in (PAD, EOS)] for batch, j in ((together, i), (alone, 0))
        ]
        assert tokens[0] == tokens[1]


def test_corruption_differs_by_row_and_by_key() -> None:
    rows = counting_rows([60] * 3)
    one = infilling_batch(rows, torch.tensor([1, 2, 1]), STAGE_2).source_ids
    assert torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])


def test_autoencoder_targets_are_the_clean_text_then_end_of_text() -> None:
    lengths = [6, 12, 3] * 60
    rows = counting_rows(lengths)
    batch = autoencoder_batch(rows, torch.arange(180), STAGE_1)
    assert batch.target_ids.shape == (180, 12)
    assert torch.equal(batch.source_mask, batch.target_mask)
    real = batch.target_mask.sum(1)
    for i, row in enumerate(rows):
        n = int(real[i])
        assert len(row) <= n and batch.target_mask[i, :n].all()
        assert batch.target_ids[i, :n].tolist() == row + [EOS] * (n - len(row))
        assert (batch.target_ids[i, n:] == PAD).all()
        source = batch.source_ids[i]
        spans_of([t for t in source.tolist() if t not in (PAD, EOS)], len(row))
        assert MASK in source
        text = int(((source != EOS) & (source != PAD)).sum())
        assert (source[text:n] == EOS).all() and (source[n:] == PAD).all()
    assert {int(n) for n, length in zip(real, lengths, strict=True) if length == 3} == set(range(3, 13))


def test_clean_rows_are_their_own_source() -> None:
    rows = counting_rows([8] * 500)
    for share in (0.0, 0.4, 1.0):
        batch = autoencoder_batch(rows, torch.arange(500), AutoencoderLossConfig(clean_share=share))
        clean = (batch.source_ids == batch.target_ids).all(1)
        assert float(clean.float().mean()) == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)


def test_infilling_pairs_a_masked_text_with_the_whole_one() -> None:
    lengths = [6, 12, 3]
    batch = infilling_batch(counting_rows(lengths), torch.arange(3), STAGE_2)
    assert batch.target_mask.all()
    for i, n in enumerate(lengths):
        assert batch.target_ids[i].tolist() == list(range(10, 10 + n)) + [EOS] * (12 - n)
        count = int(batch.source_mask[i].sum())
        assert spans_of(batch.source_ids[i, :count].tolist(), n)
        assert (batch.source_ids[i, count:] == PAD).all()


def test_task_targets_are_filled_with_end_of_text() -> None:
    batch = task_batch([[5, 6, 7], [8]], [[9], [10, 11]], torch.arange(2), LOSS, target_length=4)
    assert batch.source_ids.tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch.source_mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.target_ids.tolist() == [[9, EOS, EOS, EOS], [10, 11, EOS, EOS]]
    assert batch.target_mask.all()


def test_source_tokens_are_masked_at_their_share_and_by_their_key() -> None:
    config = FlowLossConfig(source_mask_share=0.25)
    rows = counting_rows([50] * 200)
    batch = task_batch(rows, rows, torch.arange(200), config, 50)
    hidden = batch.source_ids == MASK
    assert float(hidden.float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(batch.source_ids[~hidden], batch.target_ids[~hidden])
    alone = task_batch(rows[:1], rows[:1], torch.arange(1), config, 50)
    longer = task_batch([rows[0], [*rows[0], 7, 8]], rows[:2], torch.tensor([0, 9]), config, 50)
    assert torch.equal(alone.source_ids[0], batch.source_ids[0])
    assert torch.equal(longer.source_ids[0, :50], batch.source_ids[0])
    short = task_batch([*rows[:3], [*rows[0], *rows[0]]], rows[:4], torch.arange(4), config, 50)
    assert (short.source_ids[~short.source_mask] == PAD).all() and int((~short.source_mask).sum()) == 150


def test_batch_moves_and_counts() -> None:
    batch = task_batch(random_rows([3, 5]), random_rows([2, 2]), torch.arange(2), LOSS, 4)
    assert batch.num_tokens == 2 * 5 + 2 * 4
    moved = batch.to(torch.device("cpu"))
    assert all(torch.equal(getattr(moved, name), value) for name, value in vars(batch).items())


def test_targets_of_their_own_length_have_no_filling() -> None:
    batch = task_batch([[7, 8], [9]], [[5, 6, 7], []], torch.arange(2), FlowLossConfig(), 8, fill=False)
    assert batch.target_ids.tolist() == [[5, 6, 7], [EOS, PAD, PAD]]
    assert batch.target_mask.tolist() == [[True] * 3, [True, False, False]]
    text = infilling_batch([[5, 6, 7, 8], [9, 4]], torch.arange(2), FlowLossConfig(), fill=False)
    assert text.target_mask.sum(-1).tolist() == [4, 2] and not (text.target_ids == EOS).any()


def test_some_rows_lose_their_whole_source_and_the_others_nothing() -> None:
    rows = [[5, 6, 7]] * 2000
    config = FlowLossConfig(source_drop_share=0.1)
    batch = task_batch(rows, [[4]] * 2000, torch.arange(2000), config, 1)
    kept = batch.source_mask.sum(-1)
    assert set(kept.tolist()) == {0, 3}
    assert abs(float((kept == 0).float().mean()) - 0.1) < 0.02

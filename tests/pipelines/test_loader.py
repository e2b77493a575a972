"""Prepared rows -> batches."""

import numpy as np
import pyarrow as pa
import torch

from pipelines.loader import StageCollate, row_keys
from yan_core.config import RunConfig, from_dict
from yan_core.tokenization import Tokenizer


def pool(lengths):
    rows = [list(range(4, 4 + n)) for n in lengths]
    return pa.table({"source": pa.array(rows, pa.list_(pa.int32())), "target": pa.array(rows, pa.list_(pa.int32()))})


def collate(batch_size):
    settings = {"stages": {"finetune": {"batch_size": batch_size}}, "scaling": {"num_workers": 1}}
    return StageCollate(from_dict(RunConfig, settings), "finetune", workers=1, epoch_rows=100)


def test_a_pool_gives_batches_of_like_length_and_every_row_once():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 33)).tolist()
    batches = collate(8)(pool(lengths))
    seen = [b["source_mask"].sum(-1).tolist() for b in batches]
    assert sorted(sum(seen, [])) == list(range(1, 33))
    assert all(max(s) - min(s) == 7 for s in seen)


def test_a_pool_that_was_sliced_keeps_its_rows():
    whole = pool([1, 2, 3, 4, 5, 6])
    (batch,) = collate(4)(whole.slice(2))
    assert sorted(batch["source_mask"].sum(-1).tolist()) == [3, 4, 5, 6]


def test_draws_of_a_row_follow_from_content_seed_and_epoch_only():
    rows = [np.array([4, 5, 6], dtype=np.int32), np.array([7], dtype=np.int32)]
    keys = row_keys(rows, seed=1, epoch=2)
    assert torch.equal(row_keys(rows[::-1], 1, 2), keys.flip(0))
    assert not torch.equal(row_keys(rows, 1, 3), keys)
    assert not torch.equal(row_keys(rows, 2, 2), keys)


def test_targets_of_a_task_are_filled_with_end_of_text():
    (batch,) = collate(4)(pool([2, 2, 2, 2]))
    assert batch["target_ids"].shape == (4, RunConfig().data.max_target_tokens)
    assert (batch["target_ids"][:, 2:] == Tokenizer.eos_id).all()
    assert batch["target_mask"].all()

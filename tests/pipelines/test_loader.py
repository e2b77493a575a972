"""Prepared rows -> batches."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.cluster import ray_session
from pipelines.loader import StageCollate, row_keys
from pipelines.prepare import Prepared
from pipelines.stream import batches_read, open_stage
from yan_core.config import RunConfig, from_dict
from yan_core.tokenization import Tokenizer


def pool(lengths):
    rows = [list(range(4, 4 + n)) for n in lengths]
    epoch = pa.array([0] * len(rows), pa.int32())
    ids = pa.array(rows, pa.list_(pa.int32()))
    place = pa.array(range(len(rows)), pa.int32())
    return pa.table(
        {"epoch": epoch, "place": place, "source": ids, "target": pa.array([r[:2] for r in rows], pa.list_(pa.int32()))}
    )


def collate(batch_size, skip=0):
    settings = {"stages": {"finetune": {"batch_size": batch_size}}, "scaling": {"num_workers": 1}}
    return StageCollate(from_dict(RunConfig, settings), "finetune", workers=1, skip_steps=skip)


def test_a_pool_gives_batches_of_like_length_and_every_row_once():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 33)).tolist()
    batches = collate(8)(pool(lengths))
    seen = [b["source_mask"].sum(-1).tolist() for b in batches]
    assert sorted(sum(seen, [])) == list(range(1, 33))
    assert all(max(s) - min(s) == 7 for s in seen)


def test_a_curriculum_begins_with_the_shortest_rows_and_goes_on_alike_after_a_restart():
    settings = {"stages": {"finetune": {"batch_size": 4, "curriculum_steps": 8, "max_steps": 20}}}
    config = from_dict(RunConfig, settings)

    def longest(skip):
        stage = StageCollate(config, "finetune", workers=1, skip_steps=skip)
        pools = [stage(pool(range(1, 33))) for _ in range(5)]
        return [int(b["source_mask"].sum(-1).max()) for batches in pools for b in batches], [len(b) for b in pools]

    seen, counts = longest(skip=0)
    assert counts == [1, 2, 4, 8, 8]
    assert seen[0] == 4 and sorted(seen[1:3]) == [4, 8] and max(seen[3:7]) == 16 and max(seen[7:15]) == 32
    assert longest(skip=6)[0] == seen[6:]
    assert batches_read(config.stages.finetune) == 40


def test_a_pool_that_was_sliced_keeps_its_rows():
    whole = pool([1, 2, 3, 4, 5, 6])
    (batch,) = collate(4)(whole.slice(2))
    assert sorted(batch["source_mask"].sum(-1).tolist()) == [3, 4, 5, 6]


def test_draws_of_a_row_follow_from_content_place_seed_and_epoch_only():
    places = np.array([0, 1])
    rows = [np.array([4, 5, 6], dtype=np.int32), np.array([7], dtype=np.int32)]
    epochs = np.array([2, 2])
    keys = row_keys(rows, 1, epochs, places)
    assert torch.equal(row_keys(rows[::-1], 1, epochs, places[::-1].copy()), keys.flip(0))
    assert not (row_keys(rows, 1, epochs + 1, places) == keys).any()
    assert not (row_keys(rows, 2, epochs, places) == keys).any()
    equal = row_keys([rows[0]] * 5, 1, np.zeros(5), np.arange(5))
    assert len(set(equal.tolist())) == 5  # equal rows, such as one label many times, are noised differently


def test_batches_done_before_a_restart_are_passed_over():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 30, 64)]
    whole, resumed = collate(8), collate(8, skip=11)
    first, second = whole(pool(lengths)), whole(pool(lengths))
    assert resumed(pool(lengths)) == []
    left = resumed(pool(lengths))
    assert len(first) == 8 and len(left) == 5
    assert all(torch.equal(a["source_ids"], b["source_ids"]) for a, b in zip(left, second[3:], strict=True))


@pytest.mark.ray
def test_every_row_is_streamed_once_an_epoch(tmp_path):
    """`read_parquet` would have read a file named twice only once."""
    folder = tmp_path / "finetune"
    folder.mkdir()
    for shard in range(3):
        ids = pa.array([[shard * 10 + i] for i in range(10)], pa.list_(pa.int32()))
        pq.write_table(pa.table({"source": ids, "target": ids}), folder / f"{shard}.parquet")
    settings = {"stages": {"finetune": {"max_steps": 12, "batch_size": 5}}, "scaling": {"num_workers": 1}}
    prepared = Prepared(tmp_path, {"rows": {"finetune": 30}})
    with ray_session(1, 1):
        rows = open_stage(prepared, "finetune", from_dict(RunConfig, settings)).take_all()
    assert sorted((r["epoch"], r["source"][0]) for r in rows) == [(e, i) for e in range(4) for i in range(30)]


def test_targets_of_a_task_are_filled_with_end_of_text():
    (batch,) = collate(4)(pool([2, 2, 2, 2]))
    assert batch["target_ids"].shape == (4, RunConfig().data.max_target_tokens)
    assert (batch["target_ids"][:, 2:] == Tokenizer.eos_id).all()
    assert batch["target_mask"].all()

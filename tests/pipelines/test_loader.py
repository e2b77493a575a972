"""Shards -> stream -> the batches of each worker."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
import torch

import pipelines.stream
from pipelines.batches import ahead, row_keys
from pipelines.cluster import ray_session
from pipelines.loader import StageBatches
from pipelines.order import RowOrder, Shard, StageOrder, stage_order
from pipelines.prepare import Prepared
from pipelines.state import StageJob
from pipelines.stream import ReadShare, StageStream, read_rows_of
from pipelines.worker import DealtStream, TrainingStream
from yan_core.config import DataConfig, RunConfig, StageConfig, from_dict, to_dict
from yan_core.files import write_file
from yan_core.tokenization import Tokenizer
from yan_core.training import TrainingFailed

ROWS = {"flow": 150, "finetune": 230}
SETTINGS = {
    "stages": {stage: {"max_steps": 20, "batch_size": 16} for stage in ("autoencoder", "flow", "finetune")},
    "data": {"pool_batches": 4, "lanes": 4},
    "scaling": {"num_workers": 1},
}
CONFIG = from_dict(RunConfig, SETTINGS)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """Rows of 1 to 30 tokens, the first two of which tell which row it is, in shards of 100 rows."""
    folder, files = tmp_path_factory.mktemp("prepared"), {}
    rng = np.random.default_rng(0)
    for part, rows in ROWS.items():
        (folder / part).mkdir()
        ids = [[10 + i // 100, 10 + i % 100, *rng.integers(200, 300, rng.integers(0, 29))] for i in range(rows)]
        for start in range(0, rows, 100):
            cut = pa.array(ids[start : start + 100], pa.list_(pa.int32()))
            targets = pa.array([r[:2] for r in ids[start : start + 100]], pa.list_(pa.int32()))
            table = pa.table({"target": cut} if part == "flow" else {"source": cut, "target": targets})
            name = f"{part}/{start}.parquet"
            pq.write_table(table, folder / name, row_group_size=30)
            files[name] = {"rows": len(cut), "source": "own"}
    return Prepared(folder, {"rows": ROWS, "files": files})


def blocks(prepared, config, stages, step=0, workers=1):
    """The stream of `open_stream` without Ray."""
    left = [
        StageStream(stage, stage_order(prepared, stage, config), 0 if i else step, workers)
        for i, stage in enumerate(stages)
    ]
    read = ReadShare(left)
    return [read.read(n) for n in range(read.first[-1])]


def batches(prepared, config, stage, step=0, workers=1):
    """Each step's batch of each worker."""
    stream = blocks(prepared, config, [stage], step, workers)
    of_worker = [StageBatches(iter(stream[r::workers]), config, r, workers).stage(stage, step) for r in range(workers)]
    return list(zip(*of_worker, strict=True))


def rows_of(batch):
    """Which rows a batch holds, by the tokens that tell."""
    return [tuple(ids[:2].tolist()) for ids in batch.target_ids]


def test_rows_are_read_by_their_places_whatever_the_row_groups(prepared):
    one, other = (shard.path for shard in prepared.shards("finetune")[:2])
    whole, second = (pq.read_table(path, columns=["source"]) for path in (one, other))
    wanted = [(one, np.array([99, 0, 31])), (other, np.array([5])), (one, np.array([30, 30, 64]))]
    expected = pa.concat_tables([(whole if path == one else second).take(places) for path, places in wanted])
    assert read_rows_of(wanted, ["source"]) == expected


@pytest.mark.parametrize("stage", ["autoencoder", "flow", "finetune"])
def test_each_row_of_an_epoch_comes_once(prepared, stage):
    stream = blocks(prepared, CONFIG, [stage])
    seen = [pair for block in stream for pair in zip(block["epoch"].to_pylist(), block["row"].to_pylist(), strict=True)]
    total = sum(ROWS.values()) if stage == "autoencoder" else ROWS[stage]
    assert len(seen) == len(set(seen)) == 20 * 16
    whole_epochs = len(seen) // total
    for epoch in range(whole_epochs):
        assert sorted(row for e, row in seen if e == epoch) == list(range(total))


def test_a_step_has_the_same_rows_and_draws_however_many_workers_share_it(prepared):
    one, two, three, four = (batches(prepared, CONFIG, "flow", workers=workers) for workers in (1, 2, 3, 4))
    for alone, *others in zip(one, two, three, four, strict=True):
        expected = sorted(zip(alone[0].keys.tolist(), rows_of(alone[0]), strict=True))
        for shared in others:
            assert sorted(k for b in shared for k in zip(b.keys.tolist(), rows_of(b), strict=True)) == expected
    assert [[len(b.keys) for b in shares[0]] for shares in (one, two, three, four)] == [
        [16],
        [8, 8],
        [8, 4, 4],
        [4] * 4,
    ]
    corrupted = {int(k): s.tolist() for k, s in zip(one[3][0].keys, one[3][0].source_ids, strict=True)}
    for half in two[3]:
        for key, source in zip(half.keys, half.source_ids, strict=True):
            short = source.tolist()
            assert corrupted[int(key)][: len(short)] == short  # padded differently at most


@pytest.mark.parametrize("most", [1, pipelines.stream.MOST_BLOCKS])
@pytest.mark.parametrize("step", [1, 4, 7, 19])
def test_after_a_restart_the_batches_are_those_that_were_left(prepared, step, most, monkeypatch):
    whole = batches(prepared, CONFIG, "finetune")
    monkeypatch.setattr(pipelines.stream, "MOST_BLOCKS", most)
    monkeypatch.setattr(pipelines.stream, "LEAST_ROUNDS", 2)
    rest = batches(prepared, CONFIG, "finetune", step)
    assert len(rest) == 20 - step
    for (before,), (after,) in zip(whole[step:], rest, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(vars(before).values(), vars(after).values(), strict=True))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("steps", [18, 20])
def test_after_a_stage_that_ended_the_next_one_has_all_its_batches(prepared, steps, workers):
    """A checkpoint at a stage's last step, in the middle of a pool or at its end."""
    stages = {stage: {"max_steps": steps, "batch_size": 16} for stage in SETTINGS["stages"]}
    config = from_dict(RunConfig, {**SETTINGS, "stages": stages})
    rest = blocks(prepared, config, ["flow", "finetune"], steps, workers)
    whole = blocks(prepared, config, ["finetune"], workers=workers)
    assert len(rest) == len(whole) and all(map(pa.Table.equals, rest, whole))
    assert list(stage_order(prepared, "flow", config).pools(steps)) == []


def test_a_batch_holds_rows_of_like_length(prepared):
    def spread(pool_batches):
        config = from_dict(RunConfig, {**SETTINGS, "data": {"pool_batches": pool_batches, "lanes": 1}})
        lengths = [b.source_mask.sum(-1).float() for (b,) in batches(prepared, config, "finetune")]
        return float(torch.stack([ln.max() - ln.min() for ln in lengths]).mean())

    assert spread(14) < 5 < 25 < spread(1)


def test_a_block_that_came_to_the_wrong_worker_is_noticed(prepared):
    stream = blocks(prepared, CONFIG, ["flow"], workers=2)
    stream[0], stream[1] = stream[1], stream[0]
    with pytest.raises(TrainingFailed, match=r"out of order: expected stage, step, rank \('flow', 0, 0\), got"):
        next(StageBatches(iter(stream), CONFIG).stage("flow", 0))


def test_a_stream_that_ends_early_is_noticed(prepared):
    stream = blocks(prepared, CONFIG, ["flow"])[:1]
    with pytest.raises(TrainingFailed, match="stage flow ran out of rows at step 4"):
        list(StageBatches(iter(stream), CONFIG).stage("flow", 0))


def test_draws_of_a_row_follow_from_row_seed_and_epoch_only():
    rows, epochs = np.arange(5), np.full(5, 2)
    keys = row_keys(1, epochs, rows)
    assert torch.equal(row_keys(1, epochs, rows[::-1].copy()), keys.flip(0))
    assert len(set(keys.tolist())) == 5
    assert not (row_keys(1, epochs + 1, rows) == keys).any()
    assert not (row_keys(2, epochs, rows) == keys).any()


def test_targets_of_a_task_are_filled_with_end_of_text(prepared):
    (batch,) = batches(prepared, CONFIG, "finetune")[0]
    assert batch.target_ids.shape == (16, CONFIG.data.max_target_tokens)
    assert (batch.target_ids[:, 2:] == Tokenizer.eos_id).all()
    assert batch.target_mask.all()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("pools", [1, 3])
def test_blocks_of_a_round_hold_equally_many_rows(prepared, workers, pools, monkeypatch):
    """Or Ray Data, which gives a block to whoever has had fewest rows, would deal them out in another order."""
    rounds = -(-5 // pools)  # 20 steps are five pools
    monkeypatch.setattr(pipelines.stream, "MOST_BLOCKS", rounds * workers)
    monkeypatch.setattr(pipelines.stream, "LEAST_ROUNDS", 1)
    stream = blocks(prepared, CONFIG, ["finetune"], workers=workers)
    assert len(stream) == rounds * workers
    for i in range(0, len(stream), workers):
        assert len({block.num_rows for block in stream[i : i + workers]}) == 1


def test_a_long_stage_has_few_blocks_and_small_ones_however_many_workers():
    data, shards = DataConfig(lanes=1024), [Shard("a", 1 << 24)]
    order = StageOrder(RowOrder(shards, 0), StageConfig(batch_size=1024, max_steps=1_000_000), data)
    assert order.num_pools == 125_000
    assert [StageStream("flow", order, workers=workers).num_blocks for workers in (1, 8, 512)] == [
        7813,
        8136,
        32768,
    ]


@pytest.mark.ray
@pytest.mark.parametrize("workers", [2, 3])
def test_ray_data_hands_each_worker_its_blocks_in_order(prepared, workers, tmp_path):
    """All stages in one stream, from where a checkpoint stands, split as Ray Train splits it."""
    stages = ["autoencoder", "flow", "finetune"]
    expected = blocks(prepared, CONFIG, stages, workers=workers)
    write_file(prepared.folder / "manifest.json", json.dumps(prepared.manifest))
    jobs = [StageJob(stage, {}, stage, "", "", "") for stage in stages]
    stream = TrainingStream(to_dict(CONFIG), jobs, str(prepared.folder), str(tmp_path))

    def read(half):
        return [b for b in half.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)]

    with ray_session(1, 1), ThreadPoolExecutor(workers) as pool:
        parts = DealtStream(stream).configure({"training": ray.data.range(1)}, workers)
        got = list(pool.map(read, [part["training"] for part in parts]))
    for rank in range(workers):
        mine = expected[rank::workers]
        assert len(got[rank]) == len(mine)
        assert all(a.to_pylist() == b.to_pylist() for a, b in zip(got[rank], mine, strict=True))


def test_batches_made_ahead_keep_their_order_and_errors():
    def work():
        yield from range(5)
        raise ValueError("no more")

    read = ahead(work(), depth=2)
    assert list(itertools.islice(read, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="no more"):
        next(read)
    assert list(ahead(iter(range(100)))) == list(range(100))


def test_batches_made_ahead_stop_when_nobody_reads():
    made = []

    def work():
        for i in itertools.count():
            made.append(i)
            yield i

    read = ahead(work(), depth=2)
    next(read)
    read.close()
    time.sleep(0.3)
    count = len(made)
    time.sleep(0.3)
    assert len(made) == count < 10

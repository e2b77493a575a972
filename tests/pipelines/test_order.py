"""Which rows make which batch."""

import numpy as np
import pytest

import pipelines.order
from pipelines.order import FRAGMENT_ROWS, RowOrder, Shard, StageOrder, num_lanes
from yan_core.config import DataConfig, StageConfig

SHARDS = [Shard("a", 2 * FRAGMENT_ROWS + 5), Shard("b", 7), Shard("c", FRAGMENT_ROWS)]
NUM_ROWS = sum(shard.rows for shard in SHARDS)


@pytest.fixture(params=["row by row", "in fragments"], autouse=True)
def fragments(request, monkeypatch):
    """Small data are shuffled row by row; with few fragments they are shuffled as large data are."""
    if request.param == "in fragments":
        monkeypatch.setattr(pipelines.order, "FRAGMENTS", 10)


def line(order, start, stop):
    """(epoch, file, place, number) of each row of a part of the line."""
    return [
        (part.epoch, part.path, int(place), int(row))
        for part in order.slices(start, stop)
        for place, row in zip(part.places, part.ids, strict=True)
    ]


def order_of(**settings):
    return StageOrder(RowOrder(SHARDS, seed=3), StageConfig(**settings), DataConfig(pool_batches=32))


def test_every_epoch_holds_each_row_once_in_an_order_of_its_own():
    order = RowOrder(SHARDS, seed=0)
    rows = line(order, 0, 2 * NUM_ROWS)
    first, second = rows[:NUM_ROWS], rows[NUM_ROWS:]
    everything = [(shard.path, place) for shard in SHARDS for place in range(shard.rows)]
    for epoch, seen in enumerate((first, second)):
        assert {e for e, *_ in seen} == {epoch}
        assert sorted((path, place) for _, path, place, _ in seen) == everything
        assert sorted(number for *_, number in seen) == list(range(NUM_ROWS))
    assert [r[1:] for r in first] != [r[1:] for r in second]
    numbers = {(path, place): number for _, path, place, number in first}
    assert all(numbers[path, place] == number for _, path, place, number in second)


@pytest.mark.property
@pytest.mark.parametrize("seed", range(20))
def test_any_part_of_the_line_is_the_same_as_cut_from_the_whole(seed):
    rng = np.random.default_rng(seed)
    order = RowOrder(SHARDS, seed=1)
    start, stop = sorted(rng.integers(0, 3 * NUM_ROWS, 2).tolist())
    assert line(order, start, stop) == line(RowOrder(SHARDS, seed=1), 0, 3 * NUM_ROWS)[start:stop]


def test_another_seed_is_another_order():
    assert line(RowOrder(SHARDS, 0), 0, NUM_ROWS) != line(RowOrder(SHARDS, 1), 0, NUM_ROWS)


def test_pools_from_a_step_on_are_what_is_left_of_all_pools():
    order = order_of(batch_size=16, max_steps=100, curriculum_steps=50)

    def steps(pools):
        return [(p.number, p.first_step + i, int(b)) for p in pools for i, b in enumerate(p.batches)]

    everything = steps(order.pools())
    assert [step for _, step, _ in everything] == list(range(100))
    for step in (0, 1, 17, 99, 100):
        assert steps(order.pools(step)) == everything[step:]
    for number, step, _ in everything:
        assert order.pool_at(step) == number
        assert order.first_step(number) <= step < order.first_step(number + 1)
        assert next(order.pools(step)).number == number
    assert order.num_pools == everything[-1][0] + 1


def test_a_curriculum_uses_the_shortest_batches_of_each_pool_first():
    order = order_of(batch_size=16, max_steps=200, curriculum_steps=64)
    longest = {p.first_step: p.batches.max() for p in order.pools()}
    assert order.pool_batches == 32
    assert all(top <= (step + 1) / 2 for step, top in longest.items() if step < 64)
    assert max(longest.values()) == 31
    assert [order.kept_batches(step) for step in (0, 1, 2, 3, 62, 63, 64)] == [1, 1, 2, 2, 32, 32, 32]


def test_lanes_of_a_pool_are_next_to_each_other_in_the_line_and_cover_it():
    order = order_of(batch_size=16, max_steps=100)
    cuts = [order.lane(pool, lane) for pool in range(3) for lane in range(order.lanes)]
    assert cuts[0][0] == 0
    assert all(before[1] == after[0] for before, after in zip(cuts, cuts[1:], strict=False))
    assert cuts[-1][1] == 3 * order.pool_batches * 16


def test_batch_number_i_is_the_ith_shortest_piece_of_a_lane():
    order = order_of(batch_size=16, max_steps=100)
    lengths = np.random.default_rng(0).permutation(order.pool_batches * order.lane_rows)
    picked = lengths[order.pick(lengths, np.array([5, 0]))]
    assert sorted(picked[:2].tolist()) == [10, 11] and sorted(picked[2:].tolist()) == [0, 1]


def test_rows_of_equal_length_keep_their_order():
    order = order_of(batch_size=160, max_steps=100)
    lengths = np.tile([5, 3], order.pool_batches * order.lane_rows // 2)
    picked = order.pick(lengths, np.arange(order.pool_batches))
    assert picked.tolist() == [*range(1, len(lengths), 2), *range(0, len(lengths), 2)]


def test_a_pool_is_no_longer_than_an_epoch():
    order = StageOrder(RowOrder([Shard("a", 100)], 0), StageConfig(batch_size=32), DataConfig(pool_batches=32))
    assert order.pool_batches == 3
    assert StageOrder(RowOrder([Shard("a", 10)], 0), StageConfig(batch_size=32), DataConfig()).pool_batches == 1


@pytest.mark.parametrize(("batch_size", "lanes", "expected"), [(64, 8, 8), (12, 8, 4), (5, 8, 1), (800, 800, 800)])
def test_lanes_divide_the_batch(batch_size, lanes, expected):
    assert num_lanes(StageConfig(batch_size=batch_size), DataConfig(lanes=lanes)) == expected


def test_the_cursor_names_epoch_and_rows_done():
    order = order_of(batch_size=16, max_steps=1000)
    pool = order.pool_batches * 16
    assert order.cursor(0) == order.cursor(order.pool_batches - 1) == {"epoch": 0, "position": 0}
    assert order.cursor(order.pool_batches) == {"epoch": 0, "position": pool}
    whole = NUM_ROWS // pool + 1
    assert order.cursor(whole * order.pool_batches) == {"epoch": 1, "position": whole * pool - NUM_ROWS}
    assert order.cursor(1000)["epoch"] >= 5
    done = order_of(batch_size=16, max_steps=70).cursor(70)  # the third pool is done with too
    assert done == {"epoch": 0, "position": 3 * pool}


def test_shards_are_read_as_often_as_they_are_told():
    order = RowOrder([Shard("once", 40), Shard("twice", 30, 2.0), Shard("half", 50, 0.5)], seed=0)
    epochs: dict[int, list] = {}
    for epoch, path, place, number in line(order, 0, 900):
        epochs.setdefault(epoch, []).append((path, place, number))
    assert len(epochs) >= 5
    halves = []
    for epoch in range(4):
        rows = epochs[epoch]
        assert len({number for *_, number in rows}) == len(rows)  # what is read twice is drawn for twice
        count = {path: sorted(place for p, place, _ in rows if p == path) for path in ("once", "twice", "half")}
        assert count["once"] == list(range(40))
        assert count["twice"] == sorted([*range(30), *range(30)])
        halves.append(set(count["half"]))
        assert len(count["half"]) == len(halves[-1])
    assert halves[0] | halves[1] == set(range(50)) and not halves[0] & halves[1]
    assert halves[2] == halves[0] and 0 < len(halves[0]) < 50


def test_a_part_of_uneven_epochs_is_the_same_as_cut_from_the_whole():
    shards = [Shard("a", 40), Shard("b", 30, 1.3)]
    whole = line(RowOrder(shards, 0), 0, 400)
    assert line(RowOrder(shards, 0), 130, 290) == whole[130:290]

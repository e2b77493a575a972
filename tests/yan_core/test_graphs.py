"""Recorded functions by shape: kept, reused, dropped. The recording itself needs a GPU."""

import pytest
import torch

from yan_core import graphs
from yan_core.graphs import GraphCache, captured


def test_a_shape_is_captured_once_and_the_least_recently_used_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, ...]] = []

    def capture(function, examples):
        made.append(tuple(examples[0].shape))
        return function

    monkeypatch.setattr(graphs, "captured", capture)
    cache = GraphCache(capacity=2)
    for n in (1, 2, 1, 3, 1, 2):
        assert torch.equal(cache.call("double", lambda x: 2 * x, torch.ones(n)), torch.full((n,), 2.0))
    assert made == [(1,), (2,), (3,), (2,)] and len(cache) == 2
    assert torch.equal(cache.call("triple", lambda x: 3 * x, torch.ones(2)), torch.full((2,), 3.0))


def test_an_answer_is_not_overwritten_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replayed graph gives the same tensor each time."""
    out = torch.zeros(1)

    def capture(function, examples):
        return lambda x: out.copy_(function(x))

    monkeypatch.setattr(graphs, "captured", capture)
    cache = GraphCache()
    first = cache.call(0, lambda x: x + 1, torch.zeros(1))
    cache.call(0, lambda x: x + 1, torch.ones(1))
    assert first.tolist() == [1.0]


@pytest.mark.gpu
def test_a_graph_replays_the_function_on_new_values() -> None:
    values = [torch.randn(64, device="cuda") for _ in range(3)]
    replay = captured(lambda x: (x * 2).cumsum(0), (values[0],))
    for value in values:
        torch.testing.assert_close(replay(value), (value * 2).cumsum(0))

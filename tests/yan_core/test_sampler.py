"""Sampler: equal to a naive one that saves nothing, and the same for a request in any company."""

from collections.abc import Callable

import pytest
import torch

from tests.yan_core.tiny import VOCAB, pad_right, random_rows, tiny_model
from yan_core.batching import pad_rows
from yan_core.model import YanModel
from yan_core.noise import Stream, fold, normal, uniform
from yan_core.sampler import sample

LENGTHS = [7, 1, 12, 4, 9, 2]
SEEDS = torch.tensor([0, 1, 2, 3, 2**40, 5])
SOURCES = pad_rows(random_rows(LENGTHS), 0)


@torch.no_grad()
def naive(model: YanModel, ids: list[int], length: int, seed: int, num_steps: int) -> tuple[list[int], list[int]]:
    """One request: a gate pass of its own, every head at every step, nothing kept between steps, all logits."""
    config = model.config
    row = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)
    key = fold(torch.tensor([seed]), 0)
    x = config.init_noise * normal(key, Stream.SOURCE_NOISE, (length, config.d_model))

    _, gate = model(x, torch.zeros(1), model.encode_source(*row))
    width = {"token": 1, "segment": config.segment_length, "sequence": length}[config.expert_scope]
    expert: list[int] = []
    for scope, start in enumerate(range(0, length, width)):
        weights = gate[0, start : start + width].mean(0).softmax(-1)
        u = float(uniform(key, Stream.EXPERT, (scope + 1,))[0, scope])
        chosen = next((k for k in range(config.num_experts) if u <= float(weights[: k + 1].sum())), -1)
        expert += [chosen] * (min(start + width, length) - start)

    for i in range(num_steps):
        velocities, _ = model(x, torch.full((1,), i / num_steps), model.encode_source(*row))
        x = x + torch.stack([velocities[0, j, expert[j]] for j in range(length)])[None] / num_steps
    return model.decoder(x)[0].argmax(-1).tolist(), expert


@pytest.mark.property
@pytest.mark.parametrize("scope", ["token", "segment", "sequence"])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_naive_sampler(scope: str, num_steps: int, seed: int) -> None:
    model = tiny_model(seed, expert_scope=scope, cross_attention_every=1 + seed % 2, init_noise=0.5 + seed / 2)
    length = 10 - seed
    drawn = sample(model, *SOURCES, length, SEEDS, num_steps)
    for i, n in enumerate(LENGTHS):
        ids, expert = naive(model, SOURCES[0][i, :n].tolist(), length, int(SEEDS[i]), num_steps)
        assert drawn.ids[i].tolist() == ids
        assert drawn.expert[i].tolist() == expert


def test_tiny_models_answers_are_varied() -> None:
    """The comparisons here would say nothing of a model that always gives one answer."""
    drawn = sample(tiny_model(expert_scope="token"), *SOURCES, 10, SEEDS, 3)
    assert len(drawn.ids.unique()) > 5 and len(drawn.expert.unique()) == 3
    assert len({tuple(row) for row in drawn.ids.tolist()}) == len(LENGTHS)
    same_seed = sample(tiny_model(), *SOURCES, 10, torch.zeros(6, dtype=torch.int64), 3)
    assert len({tuple(row) for row in same_seed.ids.tolist()}) == len(LENGTHS)


@pytest.mark.property
@pytest.mark.parametrize("scope", ["token", "segment", "sequence"])
@pytest.mark.parametrize("seed", range(3))
def test_a_request_gives_the_same_ids_alone_and_in_any_company(scope: str, seed: int) -> None:
    model = tiny_model(seed, expert_scope=scope)
    together = sample(model, *SOURCES, 10, SEEDS)
    padded = sample(model, *pad_right(*SOURCES, 9), 10, SEEDS)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    shuffled = sample(model, SOURCES[0][order], SOURCES[1][order], 10, SEEDS[order])
    assert torch.equal(padded.ids, together.ids)
    assert torch.equal(shuffled.ids, together.ids[order])
    for i, n in enumerate(LENGTHS):
        alone = sample(model, SOURCES[0][i : i + 1, :n], SOURCES[1][i : i + 1, :n], 10, SEEDS[i : i + 1])
        assert torch.equal(alone.ids[0], together.ids[i])
        assert torch.equal(alone.expert[0], together.expert[i])


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = tiny_model()
    ids = SOURCES[0].masked_fill(~SOURCES[1], 17)
    assert torch.equal(sample(model, ids, SOURCES[1], 10, SEEDS).ids, sample(model, *SOURCES, 10, SEEDS).ids)


def test_the_seed_alone_makes_the_difference() -> None:
    model = tiny_model()
    torch.manual_seed(0)
    first = sample(model, *SOURCES, 10, SEEDS)
    torch.manual_seed(1)
    again = sample(model, *SOURCES, 10, SEEDS)
    assert torch.equal(again.ids, first.ids) and torch.equal(again.expert, first.expert)
    assert not torch.equal(sample(model, *SOURCES, 10, SEEDS + 100).ids, first.ids)
    one = [part[:1].expand(6, -1) for part in SOURCES]
    assert len({tuple(row) for row in sample(model, *one, 10, SEEDS).ids.tolist()}) == 6
    same = sample(model, *one, 10, torch.full((6,), 3))
    assert len({tuple(row) for row in same.ids.tolist()}) == 1


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_trunk_passes_equal_steps(num_steps: int) -> None:
    model = tiny_model()
    calls = {"trunk": 0, "encoder": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    model.flow.norm.register_forward_hook(count("trunk"))
    model.source_encoder.register_forward_hook(count("encoder"))  # type: ignore[union-attr]
    assert sample(model, *SOURCES, 10, SEEDS, num_steps).nfe == num_steps
    assert calls == {"trunk": num_steps, "encoder": 1}


def test_shapes_and_range_of_what_is_drawn() -> None:
    drawn = sample(tiny_model(), *SOURCES, 10, SEEDS)
    assert drawn.ids.shape == drawn.expert.shape == (6, 10)
    assert 0 <= int(drawn.ids.min()) and int(drawn.ids.max()) < VOCAB
    assert not drawn.ids.requires_grad


def test_the_longest_length_is_allowed_and_no_longer_one() -> None:
    model = tiny_model()
    assert sample(model, *SOURCES, 40, SEEDS).ids.shape == (6, 40)
    assert sample(model, *SOURCES, 1, SEEDS).ids.shape == (6, 1)
    for length in (0, -3, 41):
        with pytest.raises(ValueError, match=rf"length must be in \[1, model\.max_positions=40\], got {length}"):
            sample(model, *SOURCES, length, SEEDS)
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        sample(model, *SOURCES, 10, SEEDS, num_steps=0)

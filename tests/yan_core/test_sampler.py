"""Sampler: equal to a naive one that saves nothing, and the same for a request in any company."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.yan_core.tiny import VOCAB, pad_right, random_rows, tiny_model
from yan_core.batching import pad_rows
from yan_core.config import SamplingConfig
from yan_core.model import YanModel
from yan_core.noise import Stream, fold, normal, uniform
from yan_core.sampler import sample
from yan_core.tokenization import Tokenizer

LENGTHS = [7, 1, 12, 4, 9, 2]
SEEDS = torch.tensor([0, 1, 2, 3, 2**40, 5])
SOURCES = pad_rows(random_rows(LENGTHS), 0)


@torch.no_grad()
def naive(
    model: YanModel,
    ids: list[int],
    length: int,
    seed: int,
    num_steps: int,
    method: str = "euler",
    guidance_scale: float = 1.0,
) -> tuple[list[int], list[int]]:
    """One request: a gate pass of its own, every head at every evaluation, nothing kept between them, all logits."""
    config = model.config
    row = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool)
    key = fold(torch.tensor([seed]), 0)
    x = config.init_noise * normal(key, Stream.SOURCE_NOISE, (length, config.latent_width))

    _, gate = model(x, torch.zeros(1), model.encode_source(*row))
    width = {"token": 1, "segment": config.segment_length, "sequence": length}[config.expert_scope]
    expert: list[int] = []
    for scope, start in enumerate(range(0, length, width)):
        weights = gate[0, start : start + width].mean(0).softmax(-1)
        u = float(uniform(key, Stream.EXPERT, (scope + 1,))[0, scope])
        chosen = next((k for k in range(config.num_experts) if u <= float(weights[: k + 1].sum())), -1)
        expert += [chosen] * (min(start + width, length) - start)

    guess = None

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        nonlocal guess
        found = []
        for seen in (row[1], row[1] & False):
            velocities, _ = model(x, torch.full((1,), t), model.encode_source(row[0], seen), guess=guess)
            found.append(torch.stack([velocities[0, j, expert[j]] for j in range(length)])[None])
        v = found[1] + guidance_scale * (found[0] - found[1])
        guess = x + (1 - t) * v
        return v

    h = 1 / num_steps
    for i in range(num_steps):
        t = i * h
        if method == "euler":
            x = x + h * velocity(x, t)
        elif method == "midpoint":
            x = x + h * velocity(x + h / 2 * velocity(x, t), t + h / 2)
        else:
            first = velocity(x, t)
            x = x + h / 2 * (first + velocity(x + h * first, t + h))
    return model.decoder(x)[0].argmax(-1).tolist(), expert


def assert_equals_naive(model: YanModel, length: int, num_steps: int, **how: Any) -> None:
    drawn = sample(model, *SOURCES, length, SEEDS, num_steps, sampling=SamplingConfig(**how))
    for i, n in enumerate(LENGTHS):
        ids, expert = naive(model, SOURCES[0][i, :n].tolist(), length, int(SEEDS[i]), num_steps, **how)
        assert drawn.ids[i].tolist() == ids
        assert drawn.expert[i].tolist() == expert


@pytest.mark.property
@pytest.mark.parametrize("mixer", ["attention", "mamba"])
@pytest.mark.parametrize("scope", ["token", "segment", "sequence"])
@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_naive_sampler(mixer: str, scope: str, num_steps: int, seed: int) -> None:
    changes = {"cross_attention_every": 1 + seed % 2, "init_noise": 0.5 + seed / 2}
    assert_equals_naive(tiny_model(seed, mixer=mixer, expert_scope=scope, **changes), 10 - seed, num_steps)


@pytest.mark.property
@pytest.mark.parametrize("prediction", ["velocity", "endpoint"])
@pytest.mark.parametrize("self_conditioning", [False, True])
@pytest.mark.parametrize("how", [{}, {"guidance_scale": 2.5}, {"method": "midpoint"}], ids=str)
def test_equals_the_naive_sampler_in_every_mode(prediction: str, self_conditioning: bool, how: dict[str, Any]) -> None:
    model = tiny_model(prediction=prediction, self_conditioning=self_conditioning, expert_scope="segment")
    assert_equals_naive(model, 9, 3, **how)


@pytest.mark.parametrize("latent_dim", [2, 6, 24])
def test_equals_the_naive_sampler_with_latents_of_another_width(latent_dim: int) -> None:
    assert_equals_naive(tiny_model(latent_dim=latent_dim, self_conditioning=True), 9, 3)


def test_equals_the_naive_sampler_by_heun() -> None:
    assert_equals_naive(tiny_model(), 9, 2, method="heun", guidance_scale=0.5)


def test_an_endpoint_has_no_velocity_at_the_end() -> None:
    with pytest.raises(ValueError, match="no velocity at t = 1.*euler or midpoint"):
        sample(tiny_model(prediction="endpoint"), *SOURCES, 9, SEEDS, sampling=SamplingConfig(method="heun"))


def test_one_euler_step_of_an_endpoint_is_the_endpoint() -> None:
    """x_0 + (x_1 - x_0) / (1 - 0): what the expert says, whatever the noise's scale."""
    model = tiny_model(prediction="endpoint", num_experts=1)
    source = model.encode_source(*SOURCES)
    x_0 = model.config.init_noise * normal(fold(SEEDS, 0), Stream.SOURCE_NOISE, (9, 16))
    features = model.flow.trunk(x_0, model.flow.at(torch.zeros(6)), source, None)
    expected = model.decoder(model.flow.experts(features)[:, :, 0]).argmax(-1)
    assert torch.equal(sample(model, *SOURCES, 9, SEEDS, 1).ids, expected)


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


def test_the_first_candidate_is_the_one_drawn_alone_and_the_others_differ() -> None:
    model = tiny_model()
    alone = sample(model, *SOURCES, 10, SEEDS)
    several = sample(model, *SOURCES, 10, SEEDS, sampling=SamplingConfig(num_candidates=4))
    assert alone.scores is None and torch.equal(alone.candidates[:, 0], alone.ids)
    assert several.candidates.shape == (6, 4, 10) and several.nfe == alone.nfe
    assert torch.equal(several.candidates[:, 0], alone.ids)
    assert all(len({tuple(c) for c in row.tolist()}) > 1 for row in several.candidates)


@pytest.mark.parametrize("ranking", ["bayes_risk", "confidence"])
def test_the_best_candidate_is_given_with_its_experts(ranking: Any) -> None:
    model = tiny_model(expert_scope="token")
    drawn = sample(model, *SOURCES, 10, SEEDS, sampling=SamplingConfig(num_candidates=5, ranking=ranking))
    assert drawn.scores is not None and drawn.scores.shape == (6, 5)
    for i, best in enumerate(drawn.scores.argmax(-1).tolist()):
        assert torch.equal(drawn.ids[i], drawn.candidates[i, best])
    places = drawn.scores.argmax(-1)
    assert len(places.unique()) > 1
    again = sample(model, *SOURCES, 10, SEEDS)
    assert torch.equal(drawn.expert[places == 0], again.expert[places == 0])


def test_candidates_do_not_depend_on_the_company() -> None:
    model = tiny_model()
    together = sample(model, *SOURCES, 10, SEEDS, sampling=SamplingConfig(num_candidates=3, ranking="confidence"))
    for i, n in enumerate(LENGTHS):
        alone = sample(
            model,
            SOURCES[0][i : i + 1, :n],
            SOURCES[1][i : i + 1, :n],
            10,
            SEEDS[i : i + 1],
            sampling=SamplingConfig(num_candidates=3, ranking="confidence"),
        )
        assert torch.equal(alone.candidates[0], together.candidates[i]) and torch.equal(alone.ids[0], together.ids[i])


def test_a_predicted_length_leaves_the_rest_of_the_places_alone() -> None:
    model = tiny_model(length="predicted")
    lengths = torch.tensor([10, 3, 1, 7, 2, 5])
    drawn = sample(model, *SOURCES, 10, SEEDS, lengths=lengths)
    outside = torch.arange(10) >= lengths[:, None]
    assert (drawn.ids[outside] == Tokenizer.eos_id).all()
    for i, n in enumerate(lengths.tolist()):  # as if there were no more places
        row = SOURCES[0][i : i + 1], SOURCES[1][i : i + 1]
        alone = sample(model, *row, n, SEEDS[i : i + 1], lengths=lengths[i : i + 1])
        assert torch.equal(drawn.ids[i, :n], alone.ids[0])


def test_without_an_oracle_the_length_head_says_and_each_candidate_takes_another_length() -> None:
    model = tiny_model(length="predicted")
    source = model.encode_source(*SOURCES)
    assert model.length_head is not None
    likely = model.length_head(source.mean)[:, :10].argsort(-1, descending=True) + 1
    own, oracle = sample(model, *SOURCES, 10, SEEDS), sample(model, *SOURCES, 10, SEEDS, lengths=likely[:, 0])
    assert torch.equal(own.ids, oracle.ids)
    several = sample(model, *SOURCES, 10, SEEDS, sampling=SamplingConfig(num_candidates=12, ranking="confidence"))
    assert torch.equal(several.candidates[:, 0], own.ids) and several.candidates.shape == (6, 12, 10)
    second = several.candidates[:, 1]
    assert (second[torch.arange(10) >= likely[:, 1:2]] == Tokenizer.eos_id).all()


def test_a_model_that_fills_its_places_can_be_told_the_length() -> None:
    """The same latents, read without an end before that length and with one after it."""
    model = tiny_model()
    with torch.no_grad():
        model.decoder.head.bias[Tokenizer.eos_id] += 10.0  # ends often
    lengths = torch.tensor([10, 3, 1, 7, 2, 5])
    own, told = sample(model, *SOURCES, 10, SEEDS), sample(model, *SOURCES, 10, SEEDS, lengths=lengths)
    inside = torch.arange(10) < lengths[:, None]
    assert (own.ids[inside] == Tokenizer.eos_id).any()
    assert (told.ids[~inside] == Tokenizer.eos_id).all() and (told.ids[inside] != Tokenizer.eos_id).all()
    word = inside & (own.ids != Tokenizer.eos_id)
    assert word.any() and torch.equal(told.ids[word], own.ids[word])


@pytest.mark.parametrize("length", ["fill", "predicted"])
def test_candidates_are_ranked_by_the_confidence_in_their_own_text(length: Any) -> None:
    """As if each candidate were read by itself, in no more places than it has."""
    model = tiny_model(length=length)
    drawn = sample(model, *SOURCES, 10, SEEDS, sampling=SamplingConfig(num_candidates=4, ranking="confidence"))
    assert drawn.scores is not None
    passed: list[torch.Tensor] = []
    read = model.decoder.read

    def spy(latents: torch.Tensor, **options: Any) -> Any:
        passed.append(latents)
        return read(latents, **options)

    model.decoder.read = spy  # type: ignore[method-assign]
    sample(model, *SOURCES, 10, SEEDS, sampling=SamplingConfig(num_candidates=4, ranking="confidence"))
    log_probs = model.decoder(passed[0]).log_softmax(-1).unflatten(0, (4, 6)).transpose(0, 1)
    source = model.encode_source(*SOURCES)
    for i in range(6):
        for j in range(4):
            row = drawn.candidates[i, j].tolist()
            if length == "fill":
                count = row.index(Tokenizer.eos_id) + 1 if Tokenizer.eos_id in row else 10
                counted = [log_probs[i, j, n, row[n]].item() for n in range(count)]
            else:
                of_lengths = model.length_head(source.mean)[i, :10].log_softmax(-1)  # type: ignore[misc]
                best, order = (value.detach() for value in of_lengths.topk(4))
                counted = [log_probs[i, j, n].max().item() for n in range(int(order[j]) + 1)] + [float(best[j])]
            assert float(drawn.scores[i, j].detach()) == pytest.approx(sum(counted) / len(counted), rel=1e-4), (i, j)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="ranking must be one of bayes_risk, confidence, got 'mbr'"):
        unknown = SamplingConfig(num_candidates=2, ranking="mbr")  # type: ignore[arg-type]
        sample(tiny_model(), *SOURCES, 10, SEEDS, sampling=unknown)
    with pytest.raises(ValueError, match="seeds must be one a source: got 2 for 6 sources"):
        sample(tiny_model(), *SOURCES, 10, SEEDS[:2])
    for grid in ([0.5, 1.0], [0.0, 2.0]):
        with pytest.raises(ValueError, match="a grid must go from 0 to 1"):
            sample(tiny_model(), *SOURCES, 10, SEEDS, grid=grid)
    with pytest.raises(ValueError, match=r"lengths must be in \[1, length=4\]"):
        sample(tiny_model(length="predicted"), *SOURCES, 4, SEEDS, lengths=torch.full((6,), 5))
    with pytest.raises(ValueError, match="num_candidates must be >= 1, got 0"):
        sample(tiny_model(), *SOURCES, 10, SEEDS, sampling=SamplingConfig(num_candidates=0))


def test_any_time_grid_can_be_asked_for() -> None:
    model = tiny_model()
    uneven = sample(model, *SOURCES, 10, SEEDS, grid=(0.0, 0.2, 1.0))
    assert uneven.nfe == 2
    assert torch.equal(
        sample(model, *SOURCES, 10, SEEDS, grid=[0.0, 0.5, 1.0]).ids, sample(model, *SOURCES, 10, SEEDS, 2).ids
    )
    assert not torch.equal(uneven.ids, sample(model, *SOURCES, 10, SEEDS, 2).ids)


@pytest.mark.parametrize("length", ["fill", "predicted"])
def test_the_way_can_be_watched_and_ends_at_the_answer(length: str) -> None:
    model = tiny_model(length=length, expert_scope="token")
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    three = SamplingConfig(num_candidates=3)
    drawn = sample(
        model, *SOURCES, 10, SEEDS, 4, sampling=three, on_step=lambda step, read: seen.append((step, *read()))
    )
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    assert all(torch.equal(experts, drawn.experts) for _, _, experts in seen)
    assert torch.equal(seen[-1][1], drawn.candidates)
    assert not torch.equal(seen[0][1], drawn.candidates)
    assert torch.equal(sample(model, *SOURCES, 10, SEEDS, 4, sampling=three).ids, drawn.ids)
    chosen = (drawn.candidates == drawn.ids[:, None]).all(-1) & (drawn.experts == drawn.expert[:, None]).all(-1)
    assert bool(chosen.any(-1).all())


def test_log_probabilities_are_the_decoders() -> None:
    model = tiny_model()
    passed: list[torch.Tensor] = []
    read = model.decoder.read

    def spy(latents: torch.Tensor, **options: Any) -> Any:
        passed.append(latents)
        return read(latents, **options)

    model.decoder.read = spy  # type: ignore[method-assign]
    drawn = sample(model, *SOURCES, 10, SEEDS, with_log_probs=True)
    assert drawn.log_probs is not None
    expected = model.decoder(passed[0]).log_softmax(-1).max(-1).values
    torch.testing.assert_close(drawn.log_probs[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert sample(model, *SOURCES, 10, SEEDS).log_probs is None

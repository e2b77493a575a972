"""Noise -> solver -> decoder: token ids of a whole batch in a fixed number of trunk passes (arXiv:2604.15009)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from yan_core.config import NUM_STEPS, Ranking, SamplingConfig
from yan_core.model import YanModel
from yan_core.moe import scope_length
from yan_core.noise import Stream, fold, normal, uniform
from yan_core.ranking import best_of, mean_confidence, minimum_bayes_risk
from yan_core.solver import FrozenExpertField, evaluation_times, solve, time_grid
from yan_core.tokenization import Tokenizer

OnStep = Callable[[int, Callable[[], tuple[Tensor, Tensor]]], None]
"""Called after each solver step with the number of steps done, and with a function that has the decoder read the point
reached: token ids and the expert of each token, both [batch, num_candidates, length]."""


@dataclass(frozen=True)
class Sample:
    """What was drawn.

    Attributes:
        ids: Token ids, end-of-text tokens and what follows them included, [batch, length].
        expert: Expert of each token, [batch, length].
        nfe: Trunk passes of each candidate; guidance doubles them.
        candidates: Token ids of all candidates, [batch, num_candidates, length].
        experts: Expert of each of their tokens, same shape.
        log_probs: The decoder's log-probability of each of their tokens, same shape; None: it was not needed.
        scores: What they were ranked by, the higher the better, [batch, num_candidates]; None: there was one.
    """

    ids: Tensor
    expert: Tensor
    nfe: int
    candidates: Tensor
    experts: Tensor
    log_probs: Tensor | None
    scores: Tensor | None


@torch.no_grad()
def sample(
    model: YanModel,
    source_ids: Tensor,
    source_mask: Tensor,
    length: int,
    seeds: Tensor,
    num_steps: int = NUM_STEPS,
    *,
    sampling: SamplingConfig = SamplingConfig(),
    grid: Sequence[float] | None = None,
    lengths: Tensor | None = None,
    with_log_probs: bool = False,
    on_step: OnStep | None = None,
) -> Sample:
    """Draw one target for each source, or the best of several.

    The noise and the expert of a row follow from its own seed alone, so a row's answer does not depend on its company.

    Args:
        model: In evaluation mode.
        source_ids: int64, [batch, source_length].
        source_mask: True for real tokens, [batch, source_length].
        length: Places to fill; the text ends at the first end-of-text token.
        seeds: int64, [batch]. Noise and experts are drawn on the device they are on: drawn on the CPU they are the same
            to the last bit whatever computes the rest.
        num_steps: Solver steps; with Euler's method and no guidance as many trunk passes.
        sampling: Solver, guidance and candidates, of which the first is the one drawn alone.
        grid: Increasing times from 0 to 1, in the place of `num_steps` uniform steps, which then has no meaning.
        lengths: Each row's number of tokens, [batch], where it is known: the answer then neither ends before nor goes
            on after it. None: the model's own, which is at the first end-of-text token, or with
            model.length=predicted what its length head says, the n-th candidate taking the n-th likeliest length.
        with_log_probs: Whether log-probabilities are wanted though nothing is ranked by them.
        on_step: See `OnStep`; what it raises ends the sampling.

    Raises:
        ValueError: If an argument is out of range, or does not fit the model.
    """
    config, num_candidates, ranking = model.config, sampling.num_candidates, sampling.ranking
    if not 1 <= length <= config.max_positions:
        raise ValueError(f"length must be in [1, model.max_positions={config.max_positions}], got {length}")
    if ranking not in get_args(Ranking):
        raise ValueError(f"ranking must be one of {', '.join(get_args(Ranking))}, got {ranking!r}")
    if len(seeds) != len(source_ids):
        raise ValueError(f"seeds must be one a source: got {len(seeds)} for {len(source_ids)} sources")
    grid = time_grid(num_steps) if grid is None else grid
    times = evaluation_times(grid, sampling.method)
    if grid[0] != 0 or grid[-1] != 1:
        raise ValueError(f"a grid must go from 0 to 1, got {list(grid)}")
    if lengths is not None and not bool(((lengths >= 1) & (lengths <= length)).all()):
        raise ValueError(f"lengths must be in [1, length={length}], got {lengths.tolist()}")
    device, batch = source_ids.device, len(seeds)
    # Rows of the batch from here on: all sources with candidate 0, then all with candidate 1, ...
    keys = torch.cat([fold(seeds, candidate) for candidate in range(num_candidates)])
    source = model.encode_source(source_ids, source_mask)
    places, length_log_probs = _text_places(model, source.mean, length, lengths, num_candidates)
    mask = places if model.length_head is not None else None
    source = source.repeat(num_candidates)

    x_0 = config.init_noise * normal(keys, Stream.SOURCE_NOISE, (length, config.latent_width)).to(device)
    scopes = -(-length // scope_length(config, length))
    uniforms = uniform(keys, Stream.EXPERT, (scopes,)).to(device)
    scale = sampling.guidance_scale
    field = FrozenExpertField(model.flow, source, times, mask, uniforms=uniforms, guidance_scale=scale)
    by_confidence = num_candidates > 1 and ranking == "confidence"
    # A model that ends its texts itself is not let to where their lengths are known.
    never = Tokenizer.eos_id if model.length_head is None and lengths is not None else None

    def by_source(rows: Tensor) -> Tensor:
        """[num_candidates * batch, length] -> [batch, num_candidates, length]."""
        return rows.unflatten(0, (num_candidates, batch)).transpose(0, 1)

    def read(x: Tensor, with_log_probs: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Token ids, experts and log-probabilities at a point, each [batch, num_candidates, length]."""
        ids, log_probs = model.decoder.read(x, with_log_probs=with_log_probs, never=never)
        if places is not None:
            ids = ids.masked_fill(~places, Tokenizer.eos_id)
        assert field.expert is not None
        return by_source(ids), by_source(field.expert), None if log_probs is None else by_source(log_probs)

    def step_done(step: int, x: Tensor) -> None:
        if on_step is not None:
            on_step(step, lambda: read(x, False)[:2])

    x_1 = solve(field, x_0.to(model.flow.positions.weight.dtype), grid, sampling.method, step_done)
    candidates, experts, log_probs = read(x_1, with_log_probs or by_confidence)
    if num_candidates == 1:
        return Sample(candidates[:, 0], experts[:, 0], field.nfe, candidates, experts, log_probs, None)
    if ranking == "confidence":
        assert log_probs is not None
        texts = None if places is None else by_source(places)
        scores = mean_confidence(candidates, log_probs, texts, length_log_probs)
    else:
        scores = minimum_bayes_risk(candidates)
    best = best_of(candidates, scores), best_of(experts, scores)
    return Sample(*best, field.nfe, candidates, experts, log_probs, scores)


def _text_places(
    model: YanModel, source_mean: Tensor, length: int, lengths: Tensor | None, num_candidates: int
) -> tuple[Tensor | None, Tensor | None]:
    """Places of each candidate's text, [num_candidates * batch, length], where its length is known before it is read,
    and that length's log-probability where the model chose it, [batch, num_candidates].
    """
    if lengths is None and model.length_head is None:
        return None, None
    if lengths is None:
        assert model.length_head is not None
        log_probs, order = (
            model.length_head(source_mean)[:, :length].float().log_softmax(-1).topk(min(num_candidates, length))
        )
        # More candidates than lengths: the likeliest ones are taken again.
        again = torch.arange(num_candidates, device=order.device) % order.shape[1]
        log_probs, chosen = log_probs[:, again], order[:, again] + 1
    else:
        log_probs, chosen = None, lengths.to(source_mean.device)[:, None].expand(-1, num_candidates)
    return torch.arange(length, device=chosen.device) < chosen.T.reshape(-1, 1), log_probs

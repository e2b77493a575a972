"""Choosing among several candidates of the same answer.

Shapes: [batch, num_candidates, length] token ids; a candidate's text ends before its first end-of-text token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yan_core.tokenization import Tokenizer


def text_mask(candidates: Tensor) -> Tensor:
    """True for tokens before the first end-of-text token: [batch, num_candidates, length] in and out."""
    return (candidates == Tokenizer.eos_id).cumsum(-1) == 0


def minimum_bayes_risk(candidates: Tensor) -> Tensor:
    """Mean token F1 of each candidate to all of them, itself included.

    Args:
        candidates: Token ids, [batch, num_candidates, length].

    Returns:
        [batch, num_candidates].

    Where all candidates are one token long this is a vote. Equal texts have F1 1, empty ones too.

    Source: Kumar and Byrne 2004, Minimum Bayes-Risk Decoding (with token F1 as the gain).
    """
    real = text_mask(candidates)
    # The n-th occurrence of a token in one candidate meets the n-th one in the other: a token and the number of its
    # earlier occurrences name it within its candidate.
    length = candidates.shape[-1]
    equal = (candidates[..., :, None] == candidates[..., None, :]) & real[..., None, :] & real[..., :, None]
    earlier = torch.ones(length, length, dtype=torch.bool, device=candidates.device).tril(-1)
    named = candidates * (length + 1) + (equal & earlier).sum(-1)
    named = torch.where(real, named, -1)
    # One candidate after the other: all pairs at once would hold num_candidates^2 length^2 numbers a row.
    overlap = torch.stack(
        [
            ((named[:, :, :, None] == one[:, None, None, :]) & real[..., None]).any(-1).sum(-1)
            for one in named.unbind(1)
        ],
        dim=-1,
    )
    sizes = real.sum(-1)
    total = sizes[:, :, None] + sizes[:, None, :]
    return torch.where(total == 0, 1.0, 2 * overlap / total.clamp_min(1)).mean(-1)


def mean_confidence(
    candidates: Tensor, log_probs: Tensor, places: Tensor | None = None, length_log_probs: Tensor | None = None
) -> Tensor:
    """Mean log-probability of each candidate's tokens and of its end.

    The end is the first end-of-text token, or the length where that was chosen before the tokens.

    Args:
        candidates: Token ids, [batch, num_candidates, length].
        log_probs: The decoder's, of those tokens, same shape.
        places: True where a candidate has its text, same shape, if its length was known; None: it ends by itself.
        length_log_probs: Log-probability of each candidate's length, [batch, num_candidates], if the model chose it.

    Returns:
        [batch, num_candidates].
    """
    if places is None:
        ends = (candidates == Tokenizer.eos_id).cumsum(-1)
        places = (ends == 0) | ((ends == 1) & (candidates == Tokenizer.eos_id))
    total, count = (log_probs * places).sum(-1), places.sum(-1)
    return total / count if length_log_probs is None else (total + length_log_probs) / (count + 1)


def best_of(values: Tensor, scores: Tensor) -> Tensor:
    """The values of the candidate with the highest score, the first of equals.

    Args:
        values: [batch, num_candidates, length].
        scores: [batch, num_candidates].

    Returns:
        [batch, length].
    """
    # argmax promises no order among equals.
    highest = scores == scores.max(-1, keepdim=True).values
    best = highest.to(torch.int8).cumsum(-1).eq(0).sum(-1)
    return values[torch.arange(len(values), device=values.device), best]

"""Choosing among several candidates of the same answer.

Shapes: [batch, num_candidates, length] token ids; a candidate's text ends before its first end-of-text token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from yan_core.tokenization import Tokenizer


def text_mask(candidates: Tensor) -> Tensor:
    """True for tokens before the first end-of-text token, shaped like `candidates`."""
    return (candidates == Tokenizer.eos_id).cumsum(-1) == 0


def minimum_bayes_risk(candidates: Tensor) -> Tensor:
    """Mean token F1 of each candidate to all of them, itself included: [batch, num_candidates].

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
    overlap = ((named[:, :, None, :, None] == named[:, None, :, None, :]) & real[:, :, None, :, None]).any(-1).sum(-1)
    sizes = real.sum(-1)
    total = sizes[:, :, None] + sizes[:, None, :]
    return torch.where(total == 0, 1.0, 2 * overlap / total.clamp_min(1)).mean(-1)


def mean_confidence(candidates: Tensor, log_probs: Tensor) -> Tensor:
    """Mean log-probability that the decoder gives each candidate's tokens, up to and with its first end-of-text token.

    Args:
        candidates: Token ids, [batch, num_candidates, length].
        log_probs: Of those tokens, same shape.

    Returns:
        [batch, num_candidates].
    """
    ends = (candidates == Tokenizer.eos_id).cumsum(-1)
    counts = (ends == 0) | ((ends == 1) & (candidates == Tokenizer.eos_id))
    return (log_probs * counts).sum(-1) / counts.sum(-1)


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

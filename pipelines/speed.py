"""Speed of a system that answers texts: latency of one request alone, and what a full batch costs by generated token.

Only an answer's own tokens count, up to its first end-of-text token: with the places that a model fills up and nobody
reads it could be as fast as one likes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REQUESTS = 50
"""Requests timed alone, after one that is not."""

BATCH = 64
"""Requests of a full batch."""

BATCHES = 3
"""Full batches timed, after one that is not."""


@dataclass(frozen=True)
class Speed:
    """Times from text to text, and rates of generated tokens.

    Attributes:
        latency_ms_p50: Median time of one request alone.
        latency_ms_p95: Time that 95 % of the requests alone do not exceed.
        tokens_per_s_batch_1: Generated tokens a second, one request after the other.
        tokens_per_s_batch_64: The same in batches of BATCH.
        ms_per_1000_tokens_batch_64: Time of 1,000 generated tokens in batches of BATCH; None where none was generated.
    """

    latency_ms_p50: float
    latency_ms_p95: float
    tokens_per_s_batch_1: float
    tokens_per_s_batch_64: float
    ms_per_1000_tokens_batch_64: float | None


def measure_speed(answer: Callable[[Sequence[str]], Sequence[int]], sources: Sequence[str]) -> Speed:
    """Time a system on some sources, read again from the first where there are too few.

    Args:
        answer: Takes a batch of sources; gives the number of tokens of each answer before its first end-of-text token.
        sources: At least one.

    Raises:
        ValueError: If there is no source.
    """
    if not sources:
        raise ValueError("speed needs at least one source, got none")
    many = [sources[i % len(sources)] for i in range(max(REQUESTS, BATCH * BATCHES))]
    answer(many[:1])
    alone = [_timed(answer, [source]) for source in many[:REQUESTS]]
    times = [seconds for seconds, _ in alone]
    answer(many[:BATCH])
    full = [_timed(answer, many[i * BATCH : (i + 1) * BATCH]) for i in range(BATCHES)]
    seconds, tokens = sum(s for s, _ in full), sum(n for _, n in full)
    return Speed(
        latency_ms_p50=statistics.median(times) * 1000,
        latency_ms_p95=statistics.quantiles(times, n=20, method="inclusive")[-1] * 1000,
        tokens_per_s_batch_1=sum(n for _, n in alone) / sum(times),
        tokens_per_s_batch_64=tokens / seconds,
        ms_per_1000_tokens_batch_64=seconds / tokens * 1e6 if tokens else None,
    )


def _timed(answer: Callable[[Sequence[str]], Sequence[int]], sources: Sequence[str]) -> tuple[float, int]:
    """Seconds that a batch takes, and its generated tokens."""
    started = time.perf_counter()
    counts = answer(sources)
    return time.perf_counter() - started, sum(counts)

"""Speed of a system that answers texts."""

import time

import pytest

from pipelines.speed import BATCH, BATCHES, REQUESTS, measure_speed


def test_times_and_rates_are_of_the_requests_after_the_first():
    calls = []

    def answer(batch):
        calls.append(len(batch))
        time.sleep(0.2 if len(calls) == 1 else 0.001 if len(batch) == 1 else 0.01)
        return [4] * len(batch)

    found = measure_speed(answer, ["a", "b", "c"])
    assert calls == [1] * (1 + REQUESTS) + [BATCH] * (1 + BATCHES)
    assert 1 <= found.latency_ms_p50 <= found.latency_ms_p95 < 100
    assert 0 < found.tokens_per_s_batch_1 <= 4 / 0.001
    assert 0 < found.tokens_per_s_batch_64 <= 4 * BATCH / 0.01
    assert found.ms_per_1000_tokens_batch_64 == pytest.approx(1e6 / found.tokens_per_s_batch_64)


def test_a_few_slow_requests_show_in_the_95th_percentile_alone():
    calls = []

    def answer(batch):
        calls.append(1)
        time.sleep(0.05 if len(calls) % 10 == 0 else 0)
        return [1] * len(batch)

    found = measure_speed(answer, ["a"])
    assert found.latency_ms_p50 < 20 and found.latency_ms_p95 > 40


def test_answers_without_a_token_have_no_time_by_token():
    found = measure_speed(lambda batch: [0] * len(batch), ["a"])
    assert found.ms_per_1000_tokens_batch_64 is None and found.tokens_per_s_batch_64 == 0
    with pytest.raises(ValueError, match="at least one source"):
        measure_speed(lambda batch: [], [])

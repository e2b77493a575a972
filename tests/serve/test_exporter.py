"""What a replica counts, as Ray's exporter is given it."""

import pytest

from serve import exporter as module
from serve.exporter import Exporter
from serve.metrics import Metrics


def test_ray_is_given_what_has_changed_under_its_own_labels(monkeypatch: pytest.MonkeyPatch):
    told: list[tuple[str, float, dict[str, str]]] = []

    class Fake:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tag_keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tuple(tags) == self.tag_keys and "replica" not in tags  # that one Ray adds itself
            told.append((self.name, value, tags))

        inc = set

    monkeypatch.setattr(module.ray_metrics, "Counter", Fake)
    monkeypatch.setattr(module.ray_metrics, "Gauge", Fake)
    metrics = Metrics("one")
    exporter = Exporter(metrics.registry)

    def size() -> int:
        return 3

    metrics.watch_queue("world", size)
    metrics.answered("/v1/generate", 200, 0.5)
    exporter.pass_on()
    route, asked = {"route": "/v1/generate"}, {"route": "/v1/generate", "status": "200"}
    first = [
        ("yan_requests", 1.0, asked),
        ("yan_request_seconds_count", 1.0, route),
        ("yan_request_seconds_sum", 0.5, route),
    ]
    assert sorted(told, key=str) == sorted([*first, ("yan_queue_size", 3.0, {"model": "world"})], key=str)

    told.clear()
    metrics.answered("/v1/generate", 200, 0.25)
    metrics.forget_queue("world", size)
    exporter.pass_on()
    again = [
        ("yan_requests", 1.0, asked),
        ("yan_request_seconds_count", 1.0, route),
        ("yan_request_seconds_sum", 0.25, route),
    ]
    assert sorted(told, key=str) == sorted([*again, ("yan_queue_size", 0.0, {"model": "world"})], key=str)

    told.clear()
    exporter.pass_on()
    assert told == []

"""The figures of all replicas at one place: what each counts, passed on to Ray's exporter."""

from __future__ import annotations

import threading
import time
from typing import Any

from prometheus_client import CollectorRegistry
from ray.serve import metrics as ray_metrics

_Labels = tuple[tuple[str, str], ...]

EXPORT_S = 5.0
"""Seconds between two looks of `Exporter`; Ray's agents take what there is every ten."""


class Exporter:
    """Passes a replica's figures on to Ray's exporter, which knows the replica and its application.

    Sums and counts go as counters: `yan_nfe_total` is `ray_yan_nfe_total` there, and of the histogram `yan_batch_size`
    there are `ray_yan_batch_size_sum_total` and `ray_yan_batch_size_count_total`.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """Nothing is passed on yet."""
        self._registry = registry
        self._counters: dict[str, ray_metrics.Counter] = {}
        self._gauges: dict[str, ray_metrics.Gauge] = {}
        self._counted: dict[tuple[str, _Labels], float] = {}
        self._shown: set[tuple[str, _Labels]] = set()

    def start(self) -> None:
        """Pass on every EXPORT_S seconds, in a thread, as long as the process lives."""

        def go_on() -> None:
            while True:
                time.sleep(EXPORT_S)
                self.pass_on()

        threading.Thread(target=go_on, daemon=True).start()

    def pass_on(self) -> None:
        """Pass on what has changed; a gauge that is gone is 0."""
        gone, self._shown = self._shown, set()
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                labels = tuple((name, value) for name, value in sample.labels.items() if name != "replica")
                if family.type == "gauge":
                    self._show(sample.name, family.documentation, labels, sample.value)
                else:
                    self._count(sample.name.removesuffix("_total"), family.documentation, labels, sample.value)
        for name, labels in gone - self._shown:
            self._gauges[name].set(0.0, tags=dict(labels))

    def _show(self, name: str, text: str, labels: _Labels, value: float) -> None:
        if name not in self._gauges:
            self._gauges[name] = ray_metrics.Gauge(name, text, tag_keys=_keys(labels))
        self._gauges[name].set(value, tags=dict(labels))
        self._shown.add((name, labels))

    def _count(self, name: str, text: str, labels: _Labels, value: float) -> None:
        if name not in self._counters:
            self._counters[name] = ray_metrics.Counter(name, text, tag_keys=_keys(labels))
        before, self._counted[name, labels] = self._counted.get((name, labels), 0.0), value
        if value > before:
            self._counters[name].inc(value - before, tags=dict(labels))


def _keys(labels: _Labels) -> Any:  # Ray's annotation has room for one
    return tuple(name for name, _ in labels)

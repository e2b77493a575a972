"""What a replica counts, in Prometheus' text format.

prometheus_client and not ray.util.metrics: the figures are there the moment they change, without a metrics agent and a
Ray, and they are labelled with the replica. Through a proxy a scrape reaches one replica at a time; where there are
several, Ray's own exporter has those of all of them, see serve/exporter.py.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.engine import Job
from yan_core.generator import Drawn

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Bounds of the histograms of time."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Bounds of the histogram of batch sizes."""


class Metrics:
    """The counters of one replica."""

    def __init__(self, replica: str = "") -> None:
        """All at zero.

        Args:
            replica: Label of every series.
        """
        self.registry = CollectorRegistry()
        self._sizes: dict[str, list[Callable[[], int]]] = {}
        self.replica = replica
        labels = ["replica"]

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(name, text, [*labels, *more], registry=self.registry)

        def histogram(name: str, text: str, bounds: Sequence[float], *more: str) -> Histogram:
            return Histogram(name, text, [*labels, *more], buckets=bounds, registry=self.registry)

        self._requests = counter("yan_requests_total", "Requests answered, by route and status.", "route", "status")
        self._latency = histogram("yan_request_seconds", "Time in the replica, by route.", SECONDS, "route")
        self._batch = histogram("yan_batch_size", "Sources of a batch.", SIZES, "model")
        self._draw = histogram("yan_batch_seconds", "Time that the sampler took for a batch.", SECONDS, "model")
        self._wait = histogram("yan_queue_seconds", "Time a source waited for its batch.", SECONDS, "model")
        self._queue = Gauge("yan_queue_size", "Sources that wait.", [*labels, "model"], registry=self.registry)
        self._nfe = counter("yan_nfe_total", "Trunk passes, one for each candidate of each source.", "model")
        self._tokens = counter("yan_tokens_total", "Tokens read (source) and written (answer).", "model", "kind")
        self._refused = counter("yan_versions_refused_total", "New versions that do not work, by address.", "address")
        self._experts = counter("yan_expert_tokens_total", "Tokens written by each expert.", "model", "expert")

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(self.replica, route, str(status)).inc()
        self._latency.labels(self.replica, route).observe(seconds)

    def watch_queue(self, model: str, size: Callable[[], int]) -> None:
        """Ask for the length of a model's queue whenever metrics are read; two aliases of one version have one each."""
        sizes = self._sizes.setdefault(model, [])
        sizes.append(size)
        self._queue.labels(self.replica, model).set_function(lambda: sum(each() for each in sizes))

    def forget_queue(self, model: str, size: Callable[[], int]) -> None:
        """The model that had this queue is gone; that may be said more than once."""
        sizes = self._sizes.get(model, [])
        if size not in sizes:
            return
        sizes.remove(size)
        if not sizes:
            del self._sizes[model]
            self._queue.remove(self.replica, model)

    def refused(self, address: str) -> None:
        """Count a version that an alias stands for and that does not work."""
        self._refused.labels(self.replica, address).inc()

    def batch(self, model: str, jobs: Sequence[Job], seconds: float) -> None:
        """Count a batch."""
        self._batch.labels(self.replica, model).observe(len(jobs))
        self._draw.labels(self.replica, model).observe(seconds)

    def drawn(self, model: str, source_tokens: int, drawn: Drawn, queue_s: float) -> None:
        """Count the answers of a source."""
        self._wait.labels(self.replica, model).observe(queue_s)
        self._nfe.labels(self.replica, model).inc(drawn.nfe * len(drawn.candidates))
        self._tokens.labels(self.replica, model, "source").inc(source_tokens)
        self._tokens.labels(self.replica, model, "answer").inc(sum(len(c.tokens) for c in drawn.candidates))
        experts = Counts(expert for candidate in drawn.candidates for expert in candidate.experts)
        for expert, count in experts.items():
            self._experts.labels(self.replica, model, str(expert)).inc(count)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

"""Metrics on their way to MLflow: in order, at once, and not lost when it does not answer."""

import threading
import time
from pathlib import Path

import mlflow
import pytest

from pipelines.tracking import MetricsBuffer, Tracker


class Server:
    """A tracking client that answers or not."""

    def __init__(self, up: bool = True, delay_s: float = 0.0) -> None:
        self.up, self.delay_s, self.asked = up, delay_s, threading.Event()
        self.values: list[tuple[str, float, int]] = []

    def log_batch(self, run_id: str, metrics: list[mlflow.entities.Metric]) -> None:
        self.asked.set()
        time.sleep(self.delay_s)
        if not self.up:
            raise mlflow.MlflowException("no answer")
        self.values += [(m.key, m.value, m.step) for m in metrics]


def buffer_to(server: Server, tmp_path: Path, retry_s: float = 0.05) -> MetricsBuffer:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "run")
    tracker.client = server  # type: ignore[assignment]
    return MetricsBuffer(tracker, tmp_path / "unsent.jsonl", retry_s)


def test_every_value_arrives_in_order(tmp_path):
    server = Server()
    buffer = buffer_to(server, tmp_path)
    for step in range(2000):
        buffer.metrics({"loss": step / 2}, step)
    assert buffer.close() == 0
    assert server.values == [("loss", step / 2, step) for step in range(2000)]
    assert not (tmp_path / "unsent.jsonl").exists()


def test_training_does_not_wait_for_a_slow_server(tmp_path):
    server = Server(delay_s=0.5)
    buffer = buffer_to(server, tmp_path)
    started = time.monotonic()
    for step in range(100):
        buffer.metrics({"loss": 1.0}, step)
    assert time.monotonic() - started < 0.4
    assert buffer.close() == 0 and len(server.values) == 100


def test_a_server_that_comes_back_gets_what_it_missed(tmp_path):
    server = Server(up=False)
    buffer = buffer_to(server, tmp_path)
    buffer.metrics({"a": 1.0, "b": 2.0}, 1)
    assert server.asked.wait(5)
    server.up = True
    buffer.metrics({"a": 3.0}, 2)
    assert buffer.close() == 0
    assert server.values == [("a", 1.0, 1), ("b", 2.0, 1), ("a", 3.0, 2)]


def test_what_cannot_be_sent_waits_in_a_file_for_the_next_run(tmp_path):
    down = buffer_to(Server(up=False), tmp_path)
    down.metrics({"a": 1.5}, 1)
    down.metrics({"a": float("nan")}, 2)
    assert down.spool() == 2 and (tmp_path / "unsent.jsonl").is_file()  # as at a checkpoint
    down.metrics({"a": 2.5}, 3)
    assert down.close(timeout_s=0.2) == 3
    server = Server()
    again = buffer_to(server, tmp_path)
    assert again.close() == 0
    assert [(key, step) for key, _, step in server.values] == [("a", 1), ("a", 2), ("a", 3)]
    assert server.values[0][1] == 1.5 and not (tmp_path / "unsent.jsonl").exists()


@pytest.mark.parametrize("up", [True, False])
def test_closing_ends_the_thread(tmp_path, up):
    buffer = buffer_to(Server(up), tmp_path, retry_s=60)
    buffer.metrics({"a": 1.0}, 1)
    started = time.monotonic()
    buffer.close(timeout_s=0.5)
    assert time.monotonic() - started < 5 and not buffer.thread.is_alive()

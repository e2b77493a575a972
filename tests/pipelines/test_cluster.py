"""Which Ray a command uses: that of RAY_ADDRESS, or a local one of its own."""

import tempfile
from pathlib import Path

import pytest
import ray

from pipelines.cluster import ClusterError, ray_session


@pytest.mark.ray
def test_another_cluster_of_the_machine_is_left_alone(monkeypatch):
    """`ray start` leaves its address in a file, and `ray.init` without an address would connect to it."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with tempfile.TemporaryDirectory(prefix="t") as folder:  # short: Ray makes socket names of it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        Path(folder, "ray").mkdir()
        Path(folder, "ray", "ray_current_cluster").write_text("127.0.0.1:1")
        with ray_session(1, 1):
            assert ray.cluster_resources()["CPU"] >= 3


def test_a_ray_that_does_not_come_up_is_started_once_more(monkeypatch):
    outcomes = [Exception("timed out"), None, Exception("timed out"), Exception("traceback\ntimed out again")]

    def init(**settings):
        if error := outcomes.pop(0):
            raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with ray_session(1, 1):
        pass
    with (
        pytest.raises(ClusterError, match="Ray did not start on this machine, tried twice: timed out again"),
        ray_session(1, 1),
    ):
        pass
    assert outcomes == []

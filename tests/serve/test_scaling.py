"""Replicas that come and go with the load. Marked soak: a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.benchmarks.load import Load, closed_loop
from serve.launch import running_server
from serve.schemas import AppArgs
from tests.serve.test_resilience import body, replicas

pytestmark = [pytest.mark.ray, pytest.mark.soak]


def test_replicas_come_and_go_with_the_load(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    """One client, then many, then one: 1 -> 3 -> 1 replicas, and no request fails."""
    args = AppArgs(
        model=str(model_folder),
        num_replicas=1,
        max_replicas=3,
        cpus_per_replica=0.5,
        max_batch_size=4,
        upscale_delay_s=1.0,
        downscale_delay_s=5.0,
    )
    seen: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.25):
            seen.append((time.monotonic(), len(replicas())))

    def until(count: int, load: Callable[[], Load], seconds: float) -> float:
        """Seconds of load until there are so many replicas."""
        begun = time.monotonic()
        while seen[-1][1] != count:
            assert time.monotonic() - begun < seconds, seen
            assert [s for s in load().samples if s.status != 200] == []
        return time.monotonic() - begun

    with running_server(args, port=0) as url:
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            time.sleep(1)
            assert seen[-1][1] == 1
            up_s = until(3, lambda: closed_loop(f"{url}/v1/generate", body, 32, 2.0), 120)
            down_s = until(1, lambda: closed_loop(f"{url}/v1/generate", body, 1, 2.0), 120)
        finally:
            over.set()
            watcher.join()
    with capsys.disabled():
        print(f"\n1 -> 3 replicas in {up_s:.0f} s of load, 3 -> 1 in {down_s:.0f} s without")


def test_no_replica_is_kept_when_nobody_asks_and_the_first_request_starts_one(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
):
    args = AppArgs(model=str(model_folder), num_replicas=0, max_replicas=1, upscale_delay_s=1.0, downscale_delay_s=3.0)
    with running_server(args, port=0) as url:
        begun = time.monotonic()
        while replicas():
            assert time.monotonic() - begun < 60
            time.sleep(0.25)
        gone_s = time.monotonic() - begun
        (first, *others) = closed_loop(f"{url}/v1/generate", body, 1, 10.0).samples
    assert {s.status for s in (first, *others)} == {200} and len(others) > 10
    with capsys.disabled():
        print(f"\n1 -> 0 replicas in {gone_s:.0f} s, the first answer after {first.latency_s:.1f} s")

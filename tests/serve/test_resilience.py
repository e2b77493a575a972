"""What happens to a server under load: a replica is killed, the app is upgraded, an alias moves.

No request fails: 2,000 and more each time. Marked soak: a minute each.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

import serve  # noqa: F401  # chooses HAProxy, before Serve is imported
from pipelines.benchmarks.load import Load, closed_loop
from serve.app import build_app
from serve.launch import running_server
from serve.schemas import AppArgs

pytestmark = [pytest.mark.ray, pytest.mark.soak]

CLIENTS, REQUESTS, NAME = 8, 2000, "yan-tiny@champion"


def body(i: int) -> dict[str, Any]:
    return {"source": f"Mary went. Where is Mary? {i % 10}", "seed": i}


def mixed(i: int) -> dict[str, Any]:
    """Every fourth is longer than HAProxy's buffers by default; every other one names the model as it is listed."""
    long = {"source": "\u0416" * 3000 + " Where is Mary?"} if i % 4 == 0 else {}
    return body(i) | long | ({"model": NAME} if i % 2 else {})


def replicas() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::ServeRepli"):
            found.append(process)
    return found


def retried_so_far() -> tuple[str, float]:
    """Which HAProxy takes requests in, by when it started, and how many of them it has tried again."""
    address = f"http://127.0.0.1:{os.environ['RAY_SERVE_HAPROXY_METRICS_PORT']}/metrics"
    text = urllib.request.urlopen(address, timeout=5).read().decode()
    (started,) = re.findall(r"^haproxy_process_start_time_seconds (\S+)", text, re.M)
    counts = re.findall(r"^haproxy_backend_retry_warnings_total\{[^}]*\} (\S+)", text, re.M)
    assert counts
    return started, sum(map(float, counts))


class Retries(threading.Thread):
    """Counts what HAProxy tries again, four times a second: whenever replicas change another HAProxy takes over and
    begins at 0. What one counts in its last quarter of a second is missed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.before = dict([retried_so_far()])
        self.counts = dict(self.before)

    def run(self) -> None:
        while not self.over.wait(0.25):
            with contextlib.suppress(OSError):  # one goes, the next comes
                self.counts.update([retried_so_far()])

    def total(self) -> int:
        self.over.set()
        self.join()
        return round(sum(self.counts.values()) - sum(self.before.values()))


def under_load(url: str, what: Callable[[], None], seconds: float = 30.0) -> tuple[Load, int]:
    """Requests of eight clients, something that happens after a third of the time, and how many were tried again."""
    retries = Retries()
    retries.start()
    timer = threading.Timer(seconds / 3, what)
    timer.start()
    loads = [closed_loop(f"{url}/v1/generate", mixed, CLIENTS, seconds)]
    timer.join()
    while sum(len(load.samples) for load in loads) < REQUESTS:
        loads.append(closed_loop(f"{url}/v1/generate", mixed, CLIENTS, 5.0))
    load = Load([sample for load in loads for sample in load.samples], sum(load.seconds for load in loads))
    return load, retries.total()


def named(url: str) -> set[str]:
    """The models of twenty answers."""
    request = urllib.request.Request(
        f"{url}/v1/generate", json.dumps(body(0)).encode(), {"Content-Type": "application/json"}
    )
    return {json.load(urllib.request.urlopen(request))["model"] for _ in range(20)}


@pytest.fixture(scope="module")
def registry(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two versions of `yan-tiny`; `champion` is the first."""
    home = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{home}/mlflow.db"
    client = MlflowClient(uri, uri)
    client.create_registered_model("yan-tiny")
    for version in (1, 2):
        files = home / f"version{version}"
        shutil.copytree(model_folder, files / "artifacts" / "model")
        (files / "MLmodel").write_text("flavors: {python_function: {}}\n")
        client.create_model_version("yan-tiny", files.as_uri())
    client.set_registered_model_alias("yan-tiny", "champion", "1")
    return uri


@pytest.fixture(scope="module")
def args(registry: str) -> AppArgs:
    return AppArgs(model=f"models:/{NAME}", tracking_uri=registry, num_replicas=2, cpus_per_replica=0.5, refresh_s=1.0)


@pytest.fixture(scope="module")
def url(args: AppArgs) -> Iterator[str]:
    with running_server(args, port=0) as url:
        yield url


def test_a_replica_that_is_killed_costs_no_request(url: str, capsys: pytest.CaptureFixture[str]):
    before = {p.pid for p in replicas()}
    assert len(before) == 2
    load, retried = under_load(url, lambda: os.kill(min(before), signal.SIGKILL))
    assert [s for s in load.samples if s.status != 200] == []
    deadline = time.monotonic() + 120
    while len(replicas()) < 2 or min(before) in {p.pid for p in replicas()}:
        assert time.monotonic() < deadline, "no new replica"
        time.sleep(0.5)
    with capsys.disabled():
        print(f"\nkilled: {len(load.samples)} requests, 0 failed, {retried} tried again")


def test_an_upgrade_costs_no_request(url: str, args: AppArgs, capsys: pytest.CaptureFixture[str]):
    from ray import serve as ray_serve

    before = {p.pid for p in replicas()}

    def upgrade() -> None:
        ray_serve.run(build_app(args.model_copy(update={"num_steps": 2})), name="yan", route_prefix="/")

    load, retried = under_load(url, upgrade, 45.0)
    assert [s for s in load.samples if s.status != 200] == []
    assert not before & {p.pid for p in replicas()}
    with capsys.disabled():
        print(f"\nupgraded: {len(load.samples)} requests, 0 failed, {retried} tried again")


def test_an_alias_that_moves_costs_no_request(url: str, registry: str, capsys: pytest.CaptureFixture[str]):
    client = MlflowClient(registry, registry)
    load, retried = under_load(url, lambda: client.set_registered_model_alias("yan-tiny", "champion", "2"))
    assert [s for s in load.samples if s.status != 200] == []
    assert named(url) == {"yan-tiny/2"}
    with capsys.disabled():
        print(f"\nalias moved: {len(load.samples)} requests, 0 failed, {retried} tried again")


def test_a_replica_comes_back_though_the_alias_stands_at_a_bad_version(url: str, registry: str, tmp_path: Path):
    """It asks the other one, which goes on with the version before."""
    from ray import serve as ray_serve

    client = MlflowClient(registry, registry)
    before, serving = {p.pid for p in replicas()}, named(url)
    assert len(before) == 2 and len(serving) == 1
    (tmp_path / "artifacts/model").mkdir(parents=True)
    (tmp_path / "MLmodel").write_text("flavors: {python_function: {}}\n")
    bad = client.create_model_version("yan-tiny", tmp_path.as_uri()).version
    client.set_registered_model_alias("yan-tiny", "champion", bad)
    os.kill(min(before), signal.SIGKILL)

    def running() -> int:
        return ray_serve.status().applications["yan"].deployments["yan"].replica_states.get("RUNNING", 0)

    deadline = time.monotonic() + 120
    while len(new := {p.pid for p in replicas()}) < 2 or min(before) in new or running() < 2:
        assert time.monotonic() < deadline, ray_serve.status()
        time.sleep(0.5)
    load = closed_loop(f"{url}/v1/generate", mixed, CLIENTS, 5.0)
    assert {s.status for s in load.samples} == {200}
    assert named(url) == serving

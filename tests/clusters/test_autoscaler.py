"""Ray's autoscaler with its fake provider: nodes come for a training and for replicas, and go when they idle.

`make test-cluster`. The head has no CPU, as in clusters/launcher and clusters/kubernetes; a node of the fake provider
is a raylet of this machine. Ray's own `AutoscalingCluster` needs a file that its wheel lacks, so the config is here.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from tests.clusters.checks import ROOT
from tests.clusters.conftest import asked, free_port, run_shell, wait_until
from tests.serve.conftest import save_tiny

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
HEAD_ID = f"{'f' * 51}00000"
IDLE_S = 9


class Fake:
    """A head with the autoscaler, and what it says of its nodes."""

    def __init__(self, home: Path) -> None:
        self.home, port, dashboard = home, free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(home / "token"),
            "RAY_ADDRESS": f"127.0.0.1:{port}",
            "YAN_API_KEYS_FILE": "",
        }
        (home / "token").write_text("0123456789abcdef0123456789abcdef")
        no_commands = {
            f"{who}{what}_commands": []
            for who, what in (("", "initialization"), ("", "setup"), ("head_", "setup"), ("worker_", "setup"))
        } | {"head_start_ray_commands": [], "worker_start_ray_commands": []}
        config = {
            "cluster_name": "fake",
            "max_workers": 3,
            "provider": {
                "type": "external",  # as `fake_multinode`, Ray looks for a file of defaults that its wheel lacks
                "module": "tests.clusters.fake_nodes.FakeNodes",
                "folder": str(home),
                "head_node_id": HEAD_ID,
                "launch_multiple": True,
                "gcs_address": f"127.0.0.1:{port}",
            },
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
            },
            "head_node_type": "ray.head.default",
            "idle_timeout_minutes": IDLE_S / 60,
            "upscaling_speed": 1.0,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            **no_commands,
        }
        (home / "fake.yaml").write_text(json.dumps(config))
        starting = self.environment | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }
        starting.pop("RAY_ADDRESS")
        options = f"--head --num-cpus 0 --port {port} --dashboard-port {dashboard} --node-ip-address 127.0.0.1"
        options += f" --dashboard-agent-listen-port {free_port()}"  # beside another Ray its usual one is taken
        options += f" --temp-dir {home} --autoscaling-config {home / 'fake.yaml'} --object-store-memory 200000000"
        self.shell(f"ray start {options}", environment=starting)
        self.seen: list[int] = []

    def shell(self, command: str, timeout_s: float = 300, environment: dict[str, str] | None = None) -> str:
        """What a command printed; it must succeed."""
        return run_shell(command, environment or self.environment, timeout_s)

    def workers(self) -> int:
        """Worker nodes that live."""
        token = self.environment["RAY_AUTH_TOKEN_PATH"]
        found = asked(f"{self.address}/nodes?view=summary", Path(token).read_text())["data"]["summary"]
        alive = sum(node["raylet"].get("state") == "ALIVE" for node in found) - 1
        self.seen.append(alive)
        return alive

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count the nodes once a second while a block runs."""
        self.seen, ended = [], threading.Event()

        def watch() -> None:
            while not ended.wait(1):
                self.workers()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def application(self) -> dict[str, Any]:
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        return asked(f"{self.address}/api/serve/applications/", token)["applications"].get("yan", {})

    def end(self) -> None:
        """End what runs from its folder; `ray stop` would end other tests' Ray too."""
        found = [p for p in psutil.process_iter(["cmdline"]) if str(self.home) in " ".join(p.info["cmdline"] or [])]
        for process in found:
            process.kill()
        psutil.wait_procs(found, 30)


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    home = Path(tempfile.mkdtemp(prefix="yan-fake-"))  # sockets' paths must be short
    cluster = Fake(home)
    try:
        wait_until(lambda: cluster.workers() == 0, 60)
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(home, ignore_errors=True)


def test_nodes_come_for_a_training_and_go_after_it(fake: Fake, tiny_settings: dict[str, Any], tmp_path: Path):
    """Each node has one CPU, and there are two workers."""
    data = {**tiny_settings["data"], "datasets": {"small": {"format": "world", "num_train": 400, "num_validation": 40}}}
    scaling = {"num_workers": 2, "cpus_per_worker": 1}
    settings = {**tiny_settings, "data": data, "scaling": scaling, "runs_dir": str(tmp_path / "runs")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    submit = f"submit --address {fake.address} --command train --config {tmp_path / 'config.yaml'}"
    began = time.monotonic()
    with fake.watched():
        said = fake.shell(f"{sys.executable} -m pipelines {submit}", 600)
    trained_s = time.monotonic() - began
    assert re.search(r"^job \S+: SUCCEEDED", said, flags=re.M), said[-2000:]
    assert (tmp_path / "runs/tiny/stages/finetune").is_dir()
    assert 2 <= max(fake.seen) <= 3
    wait_until(lambda: fake.workers() == 0, 120, lambda: fake.seen[-5:])
    gone_s = time.monotonic() - began - trained_s
    print(f"trained in {trained_s:.0f} s on nodes that were not there, which went {gone_s:.0f} s after it")


def replicas_of(application: dict[str, Any]) -> int:
    """Replicas that run."""
    all_of_them = (r for d in application.get("deployments", {}).values() for r in d["replicas"])
    return sum(replica["state"] == "RUNNING" for replica in all_of_them)


def test_nodes_come_for_replicas_and_go_after_them(fake: Fake, tmp_path: Path):
    folder = save_tiny(tmp_path / "tiny" / "model")
    config = yaml.safe_load((ROOT / "clusters/serve/cpu.yaml").read_text())
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["proxy_location"] = "HeadOnly"
    (application,) = config["applications"]
    application["args"] |= {"model": str(folder), "cpus_per_replica": 1}
    file = tmp_path / "serve.yaml"

    def deploy(replicas: int) -> float:
        application["args"]["num_replicas"] = replicas
        file.write_text(yaml.safe_dump(config))
        began = time.monotonic()
        fake.shell(f"serve deploy {file} --address {fake.address}")

        def there() -> bool:
            found = fake.application()
            return found.get("status") == "RUNNING" and replicas_of(found) == replicas == fake.workers()

        wait_until(there, 240, fake.application)
        return time.monotonic() - began

    assert fake.workers() == 0
    times = [deploy(replicas) for replicas in (1, 3, 1)]
    began = time.monotonic()
    fake.shell(f"serve shutdown --yes --address {fake.address}")
    wait_until(lambda: fake.workers() == 0, 120, lambda: fake.seen[-5:])
    to_one, to_three, back = times
    print(
        f"1 replica and its node in {to_one:.0f} s, 3 in {to_three:.0f} s, 1 again in {back:.0f} s, "
        f"none {time.monotonic() - began:.0f} s after the end"
    )


def test_requests_bring_replicas_and_these_bring_nodes(fake: Fake, tmp_path: Path):
    """clusters/serve/gpu.yaml on nodes without GPUs, with shorter delays, and with fewer requests a replica."""
    config = yaml.safe_load((ROOT / "clusters/serve/gpu.yaml").read_text())
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["proxy_location"] = "HeadOnly"
    (application,) = config["applications"]
    folder = save_tiny(tmp_path / "tiny" / "model")
    application["args"] |= {"model": str(folder), "use_gpu": False, "cpus_per_replica": 1}
    scaling = application["deployments"][0]["autoscaling_config"]
    scaling |= {"max_replicas": 3, "target_ongoing_requests": 2, "upscale_delay_s": 1, "downscale_delay_s": 5}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    fake.shell(f"serve deploy {file} --address {fake.address}")

    def have(count: int) -> bool:
        found = fake.application()
        return found.get("status") == "RUNNING" and replicas_of(found) == count == fake.workers()

    try:
        wait_until(lambda: have(1), 240, fake.application)
        ended, answers = threading.Event(), list[int]()

        def ask() -> None:
            while not ended.is_set():
                body = {"source": "Where is Mary?", "num_steps": 64}
                answers.append(requests.post(f"http://127.0.0.1:{port}/v1/generate", json=body, timeout=60).status_code)

        began = time.monotonic()
        callers = [threading.Thread(target=ask) for _ in range(12)]
        for caller in callers:
            caller.start()
        try:
            wait_until(lambda: have(3), 240, fake.application)
        finally:
            ended.set()
            for caller in callers:
                caller.join()
        told = yaml.safe_load(fake.shell(f"serve status --address {fake.address}"))
        assert told["applications"]["yan"]["status"] == "RUNNING"
        up_s, began = time.monotonic() - began, time.monotonic()
        assert set(answers) == {200}
        wait_until(lambda: have(1), 240, fake.application)
        down_s = time.monotonic() - began
    finally:
        fake.shell(f"serve shutdown --yes --address {fake.address}")
    wait_until(lambda: fake.workers() == 0, 120, lambda: fake.seen[-5:])
    print(f"12 callers: 3 replicas on 3 nodes after {up_s:.0f} s; 1 of each {down_s:.0f} s after the last request")

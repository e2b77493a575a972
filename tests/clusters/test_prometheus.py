"""Every panel of the dashboard has an answer from a real Prometheus that scraped a training and a service.

But for GPUs and failed nodes, which are not here.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve import ingress
from tests.clusters.checks import CLUSTERS, ROOT, metrics_of
from tests.clusters.conftest import asked as asked_of
from tests.clusters.conftest import free_port, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]
MONITORING = CLUSTERS / "monitoring"
PANELS = json.loads((MONITORING / "grafana/dashboards/yan.json").read_text())["panels"]
FILLED = re.compile(r" or (on\(\) )?vector\(0\)$")
"""What makes a panel 0 where there is nothing: here it would hide that a figure has another name."""
NOT_HERE = ["autoscaler_recently_failed_nodes", "ray_node_gpus_utilization", "ray_node_gram_used"]
"""No node fails here, and none has a GPU."""
UNDER_LOAD_S = 25.0
"""Ray's agent tells every second here, and Prometheus asks every two: a rate wants some of them."""


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """A process for the length of a block."""
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(90)


def answers(prometheus: str, expression: str, start: float) -> int:
    """Values that are numbers, since some time."""
    query = urllib.parse.urlencode({"query": expression, "start": start, "end": time.time(), "step": 2})
    series = get(f"{prometheus}/api/v1/query_range?{query}")["data"]["result"]
    return sum(not math.isnan(float(value)) for one in series for _, value in one["values"])


def test_every_panel_has_an_answer(tiny_settings: dict[str, Any], tmp_path: Path):
    if not shutil.which("prometheus"):
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    began, python = time.time(), [sys.executable, "-m"]
    with tempfile.TemporaryDirectory(prefix="yan") as home:  # short, for sockets
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        token = Path(home, "auth_token")
        token.write_text("0123456789abcdef" * 2)
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "1000",
            ingress.ENABLED: "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(ingress.SCRIPT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        port, dashboard, serving, asks = (free_port() for _ in range(4))
        ports = {"port": port, "dashboard-port": dashboard, "metrics-export-port": free_port()}
        ports |= {"ray-client-server-port": free_port(), "dashboard-agent-listen-port": free_port()}
        start = [*python, "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=8", f"--temp-dir={home}/r"]
        start += [f"--{name}={value}" for name, value in ports.items()]

        shutil.copy(MONITORING / "rules.yml", tmp_path)
        config = (MONITORING / "prometheus.yml").read_text().replace("/tmp/ray/", f"{home}/r/").replace("10s", "2s")
        (tmp_path / "prometheus.yml").write_text(config)
        prometheus = f"http://127.0.0.1:{asks}"
        watch = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
        watch += [f"--web.listen-address=127.0.0.1:{asks}"]

        world = {"format": "world", "num_train": 400, "num_validation": 40}
        stages = {**tiny_settings["stages"], "finetune": {**tiny_settings["stages"]["finetune"], "max_steps": 400}}
        data = {**tiny_settings["data"], "datasets": {"small": world}}
        scaling = {"num_workers": 1, "checkpoint_every_s": 5.0}
        settings = {**tiny_settings, "data": data, "stages": stages, "scaling": scaling, "runs_dir": str(tmp_path)}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        log = tmp_path / "serve.log"
        with (
            running(start, environment, tmp_path / "ray.log"),
            running(watch, environment, tmp_path / "prometheus.log"),
        ):
            wait_until(lambda: asked_of(f"http://127.0.0.1:{dashboard}/api/version", token.read_text()), 120)
            environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
            train = [*python, "pipelines", "run", "--config", str(tmp_path / "config.yaml")]
            done = subprocess.run(train, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
            assert done.returncode == 0, done.stdout + done.stderr
            serve = [*python, "pipelines", "serve", "--model", str(tmp_path / "tiny/model"), "--port", str(serving)]
            with running(serve, environment, log):
                wait_until(lambda: "ready after" in log.read_text(), 240, log.read_text)
                until, asked = time.monotonic() + UNDER_LOAD_S, 0
                body = json.dumps({"source": "Where is Mary?"}).encode()
                while time.monotonic() < until:
                    url, kind = f"http://127.0.0.1:{serving}/v1/generate", {"Content-Type": "application/json"}
                    with urllib.request.urlopen(urllib.request.Request(url, body, kind), timeout=30) as answer:
                        asked += answer.status == 200
                    with pytest.raises(urllib.error.HTTPError):
                        urllib.request.urlopen(urllib.request.Request(url, b"{}", kind), timeout=30)
                empty = [
                    target["expr"]
                    for panel in PANELS
                    for target in panel.get("targets", [])
                    if not answers(prometheus, FILLED.sub("", target["expr"]), began)
                ]
                status = [*python, "pipelines", "status", "--address", f"http://127.0.0.1:{dashboard}"]
                status += ["--prometheus", prometheus]
                told = subprocess.run(status, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
                counted = "sum(ray_yan_requests_total{route='/v1/generate', status='200', application='yan'})"
                time.sleep(10)  # the exporter's five seconds, the agent's and Prometheus' own
                found = get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': counted})}")["data"]["result"]
    assert [metrics_of(expression) for expression in empty] == [{name} for name in NOT_HERE]
    assert f"\nwaiting requests: yan 0 (Prometheus at {prometheus})\n" in told.stdout, told.stdout + told.stderr
    assert asked > 50 and float(found[0]["value"][1]) == asked

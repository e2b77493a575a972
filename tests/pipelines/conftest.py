"""A Ray head of the test's own."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cluster import ray_session
from tests.clusters.conftest import free_port

ROOT = Path(__file__).parents[2]
ON_A_HEAD = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray on this machine, with one core."""
    with ray_session(1, 1):
        yield


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """Address of a Ray head of the test's own that wants a token, and the environment that has it."""
    with tempfile.TemporaryDirectory(prefix="yan") as home:
        token = Path(home, "auth_token")
        token.write_text("0123456789abcdef" * 2)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        binaries = str(Path(sys.executable).parent)
        # The job's `python` is ours, with its packages; its code is what was uploaded.
        variables |= {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": ""}
        dashboard = free_port()
        ports = {
            "port": free_port(),
            "ray-client-server-port": free_port(),
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": free_port(),
        }
        options = [f"--{name}={port}" for name, port in ports.items()]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=4"]
        log = Path(home, "log")
        with log.open("w") as out:
            ray = subprocess.Popen(
                [
                    *command,
                    *options,
                    "--object-store-memory=200000000",
                    f"--temp-dir={home}/r",
                ],
                env=variables,
                stdout=out,
                stderr=out,
            )
            try:
                address = f"http://127.0.0.1:{dashboard}"
                deadline = time.monotonic() + 180
                while yan(["jobs", "--address", address], variables).returncode:
                    assert ray.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(2)
                yield address, variables
            finally:
                ray.terminate()
                ray.wait(60)


def yan(arguments: list[str], variables: dict[str, str], timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout_s)

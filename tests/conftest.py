"""What every test needs: quiet libraries, and a tiny run on the built-in world.

`make test` runs two processes beside each other: one for whole runs (e2e, distributed), which wait more than they
compute, and one for all else.
"""

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What needs a Ray and has started none fails, in place of having Ray start one that stays for all tests after it.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import pytest  # noqa: E402
import torch  # noqa: E402

from yan_core.config import RunConfig, from_dict  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-skips", action="store_true", help="what is left out, for want of a program, counts as failed"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and session.config.getoption("--no-skips") and (skipped := reporter.stats.get("skipped")):
        reporter.write_line(f"\n--no-skips: {len(skipped)} left out count as failed; -rs says why", red=True)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """README's commands first and what starts a Ray last, since the two must not meet."""
    items.sort(key=lambda item: (item.get_closest_marker("e2e") is None, item.get_closest_marker("ray") is not None))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """README's `ray stop` ends every Ray of the machine: other tests that start one wait for it."""
    if item.get_closest_marker("ray") is None:
        return (yield)
    with (Path(tempfile.gettempdir()) / f"yan-tests-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if item.get_closest_marker("e2e") else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture(autouse=True)
def mlflow_left_as_it_was():
    """A test that points MLflow at a store does so for its whole process, environment included: undone here."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    yield
    if os.environ.get("MLFLOW_TRACKING_URI") != before:
        import mlflow

        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
        mlflow.set_registry_uri(None)  # type: ignore[arg-type]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


@contextmanager
def s3_server() -> Iterator[tuple[str, dict[str, str]]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/yan", method="PUT")).close()
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    yield "s3://yan", {"AWS_ENDPOINT_URL": endpoint, **keys}
    server.stop()


@contextmanager
def google_server() -> Iterator[tuple[str, dict[str, str]]]:
    from tests.clusters.conftest import free_port

    port = free_port()
    command = [sys.executable, "-m", "tests.google_storage", str(port)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 60
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield "gs://anonymous@yan", {"CLOUD_STORAGE_EMULATOR_ENDPOINT": f"http://127.0.0.1:{port}"}
        server.terminate()


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty bucket of a server of its own, for every process started from here; by default S3's."""
    with {"s3": s3_server, "gs": google_server}[getattr(request, "param", "s3")]() as (url, variables):
        before = dict(os.environ)
        os.environ |= variables
        yield url
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_settings() -> dict:
    """Settings of a run of seconds on the built-in world; add `runs_dir`."""
    return {
        "name": "tiny",
        "log_every_s": 0.5,
        "data": {"max_target_tokens": 14, "dataset": "small", "datasets": {"small": {"format": "world"}}},
        "model": {"d_model": 16, "num_heads": 2, "num_experts": 2},
        "stages": {
            "autoencoder": {"max_steps": 12, "batch_size": 16, "trains": ["target_encoder", "decoder"]},
            "flow": {"max_steps": 6, "batch_size": 16},
            "finetune": {"max_steps": 12, "batch_size": 16},
        },
        "evaluation": {"num_steps": [1, 3], "max_rows": 20},
    }


@pytest.fixture
def tiny_config(tiny_settings, tmp_path) -> RunConfig:
    """The tiny run, in a folder of its own, on 400 examples."""
    settings = {**tiny_settings, "runs_dir": str(tmp_path)}
    settings["data"] = {
        **settings["data"],
        "datasets": {
            "small": {"format": "world", "num_train": 400, "num_validation": 40},
            "stories": {"format": "world_stories", "num_train": 200},
        },
        "corpus": "stories",
    }
    return from_dict(RunConfig, settings)

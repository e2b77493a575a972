"""A PostgreSQL of the test's own, and how tests ask a cluster and wait for it."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.checks import ROOT


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def asked(url: str, token: str) -> Any:
    """What an address answers to one who has the token, read as JSON."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def wait_until(holds: Any, timeout_s: float, told: Any = lambda: "") -> None:
    """Wait for what holds at last; it may fail as long as the other side is not there."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if holds():
                return
        except (OSError, ValueError):
            pass  # the tunnel or the head is not there yet
        assert time.monotonic() < deadline, told()
        time.sleep(0.5)


def run_shell(command: str, environment: dict[str, str], timeout_s: float, where: Path = ROOT) -> str:
    """What a command of bash printed, run in the repository or where it is told; it must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=where,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}\n{said[-4000:]}"
    return said


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """USER:PASSWORD@HOST:PORT/NAME of an empty database that asks for the password as PostgreSQL does by default."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not versions:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    home = versions[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="yan-postgresql-"))  # pytest closes its own folders to other users
    user = None
    if os.getuid() == 0:  # PostgreSQL refuses to run as root; the package has made a user
        user = pwd.getpwnam("postgres").pw_uid
        os.chown(folder, user, -1)

    password = "0123456789abcdef"
    secret = folder / "password"
    secret.write_text(password)
    secret.chmod(0o644)
    environment = {**os.environ, "PGPASSWORD": password}

    def call(*command: str) -> None:
        subprocess.run(
            command, check=True, user=user, env=environment, stdout=subprocess.DEVNULL, cwd=folder, timeout=120
        )

    port = free_port()
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    call(str(home / "initdb"), "-D", f"{folder}/data", "-U", "mlflow", "--auth=scram-sha-256", f"--pwfile={secret}")
    call(str(home / "pg_ctl"), "-D", f"{folder}/data", "-l", f"{folder}/log", "-w", "-o", options, "start")
    try:
        call(str(home / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow")
        yield f"mlflow:{password}@127.0.0.1:{port}/mlflow"
    finally:
        call(str(home / "pg_ctl"), "-D", f"{folder}/data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)

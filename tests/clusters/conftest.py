"""A PostgreSQL of the test's own."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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

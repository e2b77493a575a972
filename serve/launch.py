"""Run the app on this machine until told to stop, and leave nothing behind."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import math
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.exceptions
from ray import serve as ray_serve
from ray.serve.exceptions import RayServeException

# Ray brings its own psutil, and its import puts it on the path.
import psutil  # isort: skip # pyright: ignore[reportMissingModuleSource]

from serve.auth import load_keys, refuse_open_server
from serve.ingress import ENABLED, described, private_haproxy
from serve.registry import find_version, is_registered
from serve.schemas import AppArgs
from yan_core.checkpoint import read_config

HOST, PORT = "127.0.0.1", 8000
"""Where a server listens that is not told."""
READY_S = 300.0
"""Longest wait for readiness, by default."""
APP_NAME = "yan"
"""Name of the application in Serve."""
BEHIND_HAPROXY = ("127.0.0.1", "localhost", "0.0.0.0")
"""Hosts at which HAProxy reaches the replicas of its node."""
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
"""Serve's own logs, which go to files of the Ray session."""

RAY_ERRORS = (RuntimeError, OSError, ray.exceptions.RayError, RayServeException)
"""What Ray and Serve raise when a part of theirs does not answer."""


class LaunchError(RuntimeError):
    """The server cannot start; the message is the whole story."""


def serve_blocking(
    args: AppArgs, host: str = HOST, port: int = PORT, ray_address: str | None = None, timeout_s: float = READY_S
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        args: Arguments of the app.
        host: Address to listen on; 0.0.0.0 opens the server to the network, which wants keys.
        port: Port to listen on; 0: any free one.
        ray_address: Ray cluster to serve on; None: RAY_ADDRESS, else a local Ray of its own.
        timeout_s: Longest wait for readiness.

    Raises:
        LaunchError: If it does not get ready.
        ValueError: If the model is missing or damaged, or the address is open to others and there are no keys.
    """

    def stop(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        started = time.monotonic()
        print(f"starting a server for {args.model} ...", flush=True)
        with running_server(args, host, port, ray_address, timeout_s) as url:
            signal.signal(signal.SIGTERM, stop)  # ray.init has put its own in its place
            key = " -H 'Authorization: Bearer KEY'" * bool(load_keys(args.api_keys_file))
            body = json.dumps({"source": "..."})
            print(
                f"ready after {time.monotonic() - started:.0f} s at {url} (Ctrl-C stops it; {url}/docs lists the API; "
                f"behind {described()})\n"
                f"  curl {url}/v1/generate{key} -H 'Content-Type: application/json' -d '{body}'",
                flush=True,
            )
            while True:
                time.sleep(3600)
    except (KeyboardInterrupt, SystemExit):  # the second is what Ray's handler makes of a SIGTERM while it starts
        print("stopped", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_host(host: str) -> None:
    """HAProxy asks the replicas of its node at 127.0.0.1, where they do not listen if the host is another address.

    Raises:
        ValueError: If it would reach none.
    """
    if os.environ.get(ENABLED) == "1" and host not in BEHIND_HAPROXY:
        raise ValueError(
            f"host={host} must be {', '.join(BEHIND_HAPROXY[:-1])} or {BEHIND_HAPROXY[-1]} behind HAProxy; for another "
            f"address {ENABLED}=0 takes Serve's own proxy"
        )


@contextlib.contextmanager
def running_server(
    args: AppArgs, host: str = HOST, port: int = PORT, ray_address: str | None = None, timeout_s: float = READY_S
) -> Iterator[str]:
    """A server for the length of a block; arguments and errors as `serve_blocking`.

    A Ray that this process is connected to already is used, and left running.

    Returns:
        Its base URL, once a generation has worked.
    """
    refuse_open_server(host, load_keys(args.api_keys_file))
    refuse_host(host)
    _check_models(args)
    port = _free_port(host, port)
    _quiet()
    own_ray = not ray.is_initialized()
    own_serve, others = False, _ray_family()
    with private_haproxy():
        try:
            if own_ray:
                _start_ray(args, ray_address)
            _refuse_second_serve()
            own_serve = True
            url = _deploy(args, host, port, timeout_s)
            yield url
        finally:
            with _signals_ignored():
                _stop(own_serve, own_ray, others)


def _check_models(args: AppArgs) -> None:
    for model in (args.model, *args.more_models):
        if is_registered(model):
            find_version(model, args.tracking_uri)
        else:
            read_config(model)


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return probe.getsockname()[1]
        except (OSError, OverflowError) as error:
            number = getattr(error, "errno", None)
            if number == errno.EADDRINUSE:
                raise LaunchError(
                    f"port {port} on {host} is in use: stop what listens there (ss -ltnp 'sport = :{port}' names it) "
                    "or choose another port with --port"
                ) from None
            raise LaunchError(f"cannot listen on host={host} port={port}: {error}") from None


def _quiet() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _start_ray(args: AppArgs, ray_address: str | None) -> None:
    address = ray_address or os.environ.get("RAY_ADDRESS") or "local"
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address != "local":
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LaunchError(f"cannot reach Ray at {address}: {_last_line(str(error))}") from error
        return
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15, which leaves a server what others do not want
    # Behind HAProxy a replica stays half a minute for load balancers to look away; here there are none.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
    # Serve kills a proxy that is not up in 5 s, and on a busy machine every other one after it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # CPUs are logical: two replicas on one core are slow, not impossible. The store holds no data of ours.
    logical = max(os.cpu_count() or 1, math.ceil(args.most_replicas * args.cpus_per_replica))
    start_local_ray(num_cpus=logical, object_store_memory=256 * 2**20, include_dashboard=False, **common)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if args.use_gpu and gpus < args.most_replicas:
        raise LaunchError(
            f"use_gpu=true with {args.most_replicas} replicas needs as many GPUs, Ray sees {gpus} here; have fewer "
            "replicas or set use_gpu=false"
        )


def start_local_ray(**settings: Any) -> None:
    """Start a Ray of this process's own; once more when a busy machine kept the first from coming up in time."""
    for last in (False, True):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray raises no narrower one
            ray.shutdown()
            reason = _last_line(str(error))
            if last:
                raise LaunchError(f"Ray did not start on this machine, tried twice: {reason}") from error
            print(f"Ray did not come up ({reason}); trying once more", flush=True)


def _refuse_second_serve() -> None:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return
    raise LaunchError(
        "this Ray already runs Serve, whose port and applications are not ours to change: add the model with "
        "`serve deploy`, or end the other with `serve shutdown` first"
    )


def _deploy(args: AppArgs, host: str, port: int, timeout_s: float) -> str:
    """Start Serve and the app; gives the base URL once /readyz answers 200."""
    from serve.app import build_app

    deadline = time.monotonic() + timeout_s
    target = ray_serve.RunTarget(build_app(args), name=APP_NAME, logging_config=LOGGING)
    try:
        ray_serve.start(http_options={"host": host, "port": port}, logging_config=LOGGING)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # serve.start has set it to its own
        ray_serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except RAY_ERRORS as error:
        raise LaunchError(f"Ray Serve did not start: {_last_line(str(error))}") from error
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}"
    look_at = 0.0
    while not _answers(f"{url}/readyz"):
        if time.monotonic() >= look_at:  # A status costs the controller more than a request.
            look_at = time.monotonic() + 1
            failed, reason = _failure()
            if failed:
                raise LaunchError(f"the server did not start: {reason}")
        if time.monotonic() > deadline:
            _, reason = _failure()
            raise LaunchError(f"the server was not ready within {timeout_s:.0f} s{reason and ': '}{reason}")
        time.sleep(0.1)
    return url


def _answers(url: str) -> bool:
    """Whether a GET gives 200; asked directly, whatever proxy the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _failure() -> tuple[bool, str]:
    """Whether Serve has given the app up, and the latest reason it names, in one line."""
    try:
        app = ray_serve.status().applications.get(APP_NAME)
    except RAY_ERRORS as error:  # a busy controller answers late
        return False, _last_line(str(error))
    if app is None:
        return False, ""
    messages = [deployment.message for deployment in app.deployments.values()] + [app.message]
    reason = next((_last_line(message) for message in messages if message.strip()), "")
    return app.status == "DEPLOY_FAILED", reason


def _last_line(text: str) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _stop(own_serve: bool, own_ray: bool, others: set[psutil.Process]) -> None:
    """End Serve and, if it is ours, Ray; then every process of theirs that is left, by its id."""
    # Ray's processes are there before it calls itself initialized: a signal may come in between.
    ours = _ray_family() - others if own_ray else set()
    own_serve = own_serve and ray.is_initialized()
    if own_serve:
        ours |= _haproxies()
    # Serve kills its controller while it waits for it, and a thread of Ray's prints a warning about that.
    with contextlib.redirect_stdout(io.StringIO()):
        if own_serve:
            with contextlib.suppress(*RAY_ERRORS):  # first, as with Serve goes HAProxy, and requests under way with it
                ray_serve.delete(APP_NAME)
            ray_serve.shutdown()
        if own_ray:
            ray.shutdown()
    # Ray ends its processes without waiting for them, and HAProxy outlives its manager.
    _, alive = psutil.wait_procs(ours, timeout=5)
    end: tuple[Callable[[psutil.Process], None], ...] = (psutil.Process.terminate, psutil.Process.kill)
    for kill in end:
        for process in alive:
            try:
                kill(process)
            except psutil.NoSuchProcess:
                pass
        _, alive = psutil.wait_procs(alive, timeout=3)


def _ray_family() -> set[psutil.Process]:
    """The processes of a Ray that this process has started, with all below them."""
    home = os.path.dirname(ray.__file__)
    family = set()
    for child in psutil.Process().children():
        try:
            if any(home in word for word in child.cmdline()):
                family |= {child, *child.children(recursive=True)}
        except psutil.Error:
            continue  # It ended.
    return family


def _haproxies() -> set[psutil.Process]:
    """HAProxy processes of the Ray node that this process is connected to, and of no other on the machine."""
    raylet = f"--node_id={ray.get_runtime_context().get_node_id()}"
    found = set()
    for process in psutil.process_iter():
        try:
            if process.name().startswith("haproxy") and any(raylet in above.cmdline() for above in process.parents()):
                found.add(process)
        except psutil.Error:
            continue  # It ended, or it is another user's.
    return found


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """No second Ctrl-C cuts the clean-up short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Joining or starting Ray quietly, and carrying progress lines from workers to the driver's terminal."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def quiet_ray() -> None:
    """Keep Ray's progress bars and routine log lines off the terminal; errors still come as exceptions."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs the traceback of every exception it raises
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.print_on_execution_start = False


@contextmanager
def ray_session(num_workers: int, cpus_per_worker: float) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS or of the job that runs us, else start a local one and stop it at the end.

    A local one gets two logical CPUs more than the workers reserve: Ray Data reads while they train, and with none left
    it would wait for ever.
    """
    quiet_ray()
    if ray.is_initialized():
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    common = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if os.environ.get("RAY_ADDRESS"):
        with _quiet_backend():
            ray.init(**common)
    else:
        logical = max(os.cpu_count() or 1, int(num_workers * cpus_per_worker + 0.999) + 2)
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # its own keeps 40 MB a worker of what it freed
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")  # else it warns of "too many" workers
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # no node is taken from a local session
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # no news of a worker waits for two seconds
        with _quiet_backend():
            _start_local(num_cpus=logical, include_dashboard=False, **common)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init has put its own in its place
    try:
        yield
    finally:
        ray.shutdown()


class ClusterError(RuntimeError):
    """Ray does not start on this machine."""


def _start_local(**settings: Any) -> None:
    """Start a Ray of this process's own; once more when a busy machine kept the first from coming up in time."""
    for last in (False, True):
        try:
            ray.init(address="local", **settings)
            return
        except Exception as error:  # Ray raises no narrower one
            ray.shutdown()
            if last:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
                raise ClusterError(f"Ray did not start on this machine, tried twice: {reason}") from error


@contextmanager
def _quiet_backend() -> Iterator[None]:
    """Around ray.init: its C++ keeps to itself what is no error, such as that an actor's arguments are large.

    It reads its level while it starts, and then says on the terminal that it did; what goes wrong is an exception.
    """
    level = "RAY_BACKEND_LOG_LEVEL"
    if level in os.environ:
        yield
        return
    os.environ[level] = "fatal"
    terminal = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        del os.environ[level]


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Between driver and workers: lines for the terminal one way, a request to stop the other."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stopping = False

    def ask_to_stop(self) -> None:
        """Ask the workers to save a checkpoint and leave."""
        self.stopping = True

    def asked_to_stop(self) -> bool:
        """Whether they were asked to."""
        return self.stopping

    def add(self, line: str) -> None:
        """Leave a line."""
        self.lines.append(line)

    def take(self) -> list[str]:
        """Take the lines left since the last call."""
        lines, self.lines = self.lines, []
        return lines


@contextmanager
def progress_lines(interval_s: float = 1.0) -> Iterator[Any]:
    """A `ProgressBoard` whose lines appear on this terminal, without Ray's actor prefixes."""
    # On the driver's own node: another one may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ProgressBoard.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # by Ray
    stopped = threading.Event()

    def show() -> None:
        try:
            lines = ray.get(board.take.remote())
        except ray.exceptions.RayActorError:  # lines are a courtesy; training goes on without them
            return
        for line in lines:
            print(line, flush=True)

    def watch() -> None:
        while not stopped.wait(interval_s):
            show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stopped.set()
        thread.join()
        show()
        ray.kill(board)

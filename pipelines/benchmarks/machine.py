"""What a benchmark asks of the machine: its name, its measured limits, times taken in turns, peak memory."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from yan_core.files import write_file

T = TypeVar("T")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine's name and state, for the record."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def memory_bandwidth(device: torch.device) -> float:
    """Bytes a second read by a matrix-vector product, as weights are read at batch 1; the best of seven."""
    rows, columns = (2**18, 2**12) if device.type == "cuda" else (2**15, 2**11)  # 4 GB, 256 MB in float32
    matrix, vector = torch.ones(rows, columns, device=device), torch.ones(columns, device=device)
    best = min(seconds(lambda: torch.mv(matrix, vector), device) for _ in range(7))
    return matrix.nbytes / best


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product; the best of seven."""
    size = 8192 if device.type == "cuda" else 1536 if dtype == torch.float32 else 512  # bf16 can be slow on a CPU
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, device) for _ in range(7))
    return 2 * size**3 / best


RESULTS = Path(__file__).parent / "results"
"""Where benchmarks leave a line of JSON a run."""


def leave(report: dict[str, Any], results: Path, name: str, out: Path | None) -> None:
    """Append a report to a benchmark's lines in `results`, and write it to `out` where asked."""
    if out is not None:
        write_file(out, json.dumps(report, indent=1) + "\n")
    results.mkdir(parents=True, exist_ok=True)
    with (results / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(report) + "\n")


def at_its_best(call: Callable[[], T], device: torch.device) -> tuple[Callable[[], T], int, float]:
    """A call with the number of CPU threads it is fastest with: one, or all there are.

    Small operations are often slower with two threads than with one, for some contestants and not for others.

    Returns:
        The call, its threads, and about how long it takes.
    """
    found = []
    everything = torch.get_num_threads()
    for threads in sorted({1, everything}, reverse=True):
        torch.set_num_threads(threads)
        first = seconds(call, device)
        found.append((min([first, *(seconds(call, device) for _ in range(4 if first < 1 else 0))]), threads))
    torch.set_num_threads(everything)
    best_s, best = min(found)

    def at_best() -> T:
        torch.set_num_threads(best)
        try:
            return call()
        finally:
            torch.set_num_threads(everything)

    return at_best, best, best_s


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    first_s: dict[str, float],
    device: torch.device,
    budget_s: float,
    most: int,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time several calls in turns (a, b, c, a, b, c, ...), so that a noisy machine hits all alike.

    Args:
        calls: The contestants, warmed up.
        first_s: About how long each call takes.
        device: Where they run.
        budget_s: Each contestant's share of the time; slow ones get fewer turns, spread over the rounds. Once the sum
            of the shares is spent, as on a machine that has become busy, no further round begins.
        most: Most turns of a contestant.

    Returns:
        Times by name, in seconds, and the reason by name of those that failed.
    """
    turns = {
        name: max(min(most, int(budget_s / first_s[name])), 3 if first_s[name] < budget_s else 1) for name in calls
    }
    rounds = max(turns.values(), default=0)
    end = time.perf_counter() + budget_s * len(calls)
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    for i in range(rounds):
        for name, call in calls.items():
            due = (i + 1) * turns[name] // rounds > i * turns[name] // rounds
            if not due or name in failed:
                continue
            try:
                times[name].append(seconds(call, device))
            except Exception as error:  # one contestant's failure is a result; the others go on
                failed[name] = reason(error)
        if time.perf_counter() > end and all(times[name] or name in failed for name in calls):
            break
    return times, failed


def reason(error: BaseException) -> str:
    """An error on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of a call above what was held before it; None where the system does not tell."""
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/status").exists():
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError:
        pass  # the peak of loading then counts as the call's where it is the higher one
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    # Not ru_maxrss: across fork and exec a child inherits its parent's.
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function of a module in a fresh process, so that memory freed by others does not blur its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()

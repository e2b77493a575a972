"""What the server adds to the sampler, and how it bears load: latency, throughput, overload.

    python -m pipelines.benchmarks.serving                            about 20 minutes
    python -m pipelines.benchmarks.serving --preset bar --json OUT    under 10: what is promised

An untrained model of a shipped size answers made-up questions of mixed lengths through `yan serve`, as users start it.
Measured in the same run: the bare sampler in a process of its own, with as many threads as a replica has and with all;
a Serve deployment that does nothing, without and with pauses as long as an answer takes the sampler, after which every
cache on the way is cold; an autoregressive model of the same size behind the same server. The sampler with one thread,
without pauses and with those that a replica has between two requests of a lone client, has its turns between those of
the server, since a machine's speed drifts. Capacity is what 32 clients in a closed loop get; loads, of two models by
turns, are open loops of Poisson arrivals at multiples of it, and a request's latency counts from when it was due. This
process sends the requests and shares the cores with the server.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from pipelines.benchmarks.decoders import SIZES, size_config
from pipelines.benchmarks.generate import make_model, make_rows
from pipelines.benchmarks.load import Body, Load, closed_loop, open_loop
from pipelines.benchmarks.machine import RESULTS, describe, in_child, leave
from yan_core.files import code_commit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERHEAD_MS, SHARE, P99_RATIO, RECOVERY_S = 2.5, 0.8, 3.0, 10.0
"""What is promised: HTTP's cost for a lone client, throughput against the bare sampler's, and overload."""
PAUSE_S = 0.004
"""About as long as a replica waits between two requests of a lone client."""
TURNS = 4
"""How often the bare sampler and the server have their turns."""
CLIENTS = 32
"""Clients of a closed loop that saturates the server."""
ROWS = 512
"""Different requests; after the last one the first comes again."""


def sources() -> list[str]:
    """Prompts of mixed lengths."""
    return [f"{row['context']} {row['question']}" for row in make_rows(ROWS)]


class Bare:
    """The sampler alone, in this process; the sources are those of the requests."""

    def __init__(self, model: Path, num_steps: int, threads: int) -> None:
        import yan_core

        torch.set_num_threads(threads)
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        self.generator, self.num_steps = yan_core.load(model), num_steps

    def seconds(self, size: int, at_least_s: float, pause_s: float = 0.0) -> list[float]:
        """Of each of some batches, the first apart, with a pause before each."""
        prompts = sources() if size == 1 else sorted(sources(), key=len)  # as the server does: about as long together
        batches = [prompts[i : i + size] for i in range(0, ROWS - size + 1, size)]
        self.generator.generate(batches[0], self.num_steps)
        times: list[float] = []
        while sum(times) < at_least_s:
            time.sleep(pause_s)
            begun = time.perf_counter()
            self.generator.generate(batches[len(times) * 7 % len(batches)], self.num_steps)
            times.append(time.perf_counter() - begun)
        return times


def bare(model: Path, num_steps: int, batch_sizes: Sequence[int], threads: int, seconds: float) -> dict[str, float]:
    """Figures of the sampler alone, in this process."""
    alone = Bare(model, num_steps, threads)
    return figures({size: alone.seconds(size, seconds) for size in batch_sizes})


def figures(times: Mapping[int, Sequence[float]]) -> dict[str, float]:
    """Sources a second by batch size, and `p50_ms` of a batch of one."""
    rates = {str(size): size * len(of) / sum(of) for size, of in times.items()}
    return rates | {"p50_ms": 1000 * sorted(times[1])[len(times[1]) // 2]}


def _start_bare(*arguments: Any) -> None:
    global _bare
    _bare = Bare(*arguments)


def _bare_seconds(size: int, at_least_s: float, pause_s: float = 0.0) -> list[float]:
    return _bare.seconds(size, at_least_s, pause_s)


def in_turns(
    chosen: argparse.Namespace, model: Path, url: str, body: Body, clients: int
) -> tuple[dict[str, float], float, Load, Load]:
    """The bare sampler with one thread, its p50 in ms with pauses, a lone client, and many: in turns, some times over.

    A machine's speed drifts by more than is looked for, and a server that nobody asks takes no time from the sampler.
    """
    sizes, part_s = (1, chosen.max_batch_size), chosen.seconds / TURNS
    times: dict[int, list[float]] = {size: [] for size in sizes}
    paused: list[float] = []
    loads: dict[int, list[Load]] = {1: [], clients: []}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _start_bare, (model, chosen.num_steps, 1)) as pool:
        for _ in range(TURNS):
            paused += pool.submit(_bare_seconds, 1, part_s / 2, PAUSE_S).result()
            for size, count in zip(sizes, loads, strict=True):
                times[size] += pool.submit(_bare_seconds, size, part_s / 2).result()
                loads[count].append(closed_loop(url, body, count, part_s))
    alone, saturated = (
        Load([s for of in turns for s in of.samples], sum(of.seconds for of in turns)) for turns in loads.values()
    )
    return figures(times), figures({1: paused})["p50_ms"], alone, saturated


def make_ar_model(folder: Path, size: str, target_tokens: int) -> None:
    """Save an untrained autoregressive model with as many parameters as YAN of a size has, and its tokenizer."""
    from yan_core.checkpoint import save_pretrained
    from yan_core.config import BaselineConfig
    from yan_core.model import build_model
    from yan_core.tokenization import Tokenizer

    config = size_config(size)
    texts = (text for row in make_rows(4096) for text in row.values())
    tokenizer = Tokenizer.train(texts, config.tokenizer)
    with torch.device("meta"):
        parameters = build_model(config.model, tokenizer.vocab_size, 0).num_parameters(embeddings=False)
    shape = BaselineConfig.of_size(parameters, "ar", least_blocks=4, dropout=0.0, max_positions=128 + target_tokens + 1)
    details = {"task": "question_answering", "max_source_tokens": 128, "max_target_tokens": target_tokens}
    save_pretrained(folder, build_model(shape, tokenizer.vocab_size, seed=0), tokenizer, details)


# --- servers ----------------------------------------------------------------------------------------------------------


class Server:
    """A server in a process of its own; counts its replicas' seconds."""

    def __init__(self, arguments: Sequence[str], port: int, log: Path) -> None:
        """Start it and wait until it answers.

        Raises:
            RuntimeError: If it does not.
        """
        self.log, self.replica_s, self._stopped = log, 0.0, threading.Event()
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        begun = time.perf_counter()
        # In a shell's background SIGINT is ignored, and a child would inherit that: see `stop`.
        hears_interrupts = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        command = [sys.executable, "-m", *arguments]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=env, preexec_fn=hears_interrupts
            )
        while not re.search(r"ready after", log.read_text()):
            if self.process.poll() is not None or time.perf_counter() - begun > 240:
                self.stop()
                raise RuntimeError(f"no server: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.cold_start_s = time.perf_counter() - begun
        self.url = f"http://127.0.0.1:{port}/v1/generate"
        self._counter = threading.Thread(target=self._count, daemon=True)
        self._counter.start()

    def replicas(self) -> list[psutil.Process]:
        """Processes of its replicas."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("ray::ServeRepli"):
                    found.append(process)
        return found

    def _count(self) -> None:
        while not self._stopped.wait(0.5):
            with contextlib.suppress(psutil.Error):
                self.replica_s += 0.5 * len(self.replicas())

    def memory_mb(self) -> float:
        """Memory of its replicas."""
        return sum(process.memory_info().rss for process in self.replicas()) / 1e6

    def stop(self) -> None:
        """End it as a user would."""
        self._stopped.set()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(120)


@contextlib.contextmanager
def server(folder: Path, name: str, arguments: Sequence[str]) -> Iterator[Server]:
    """A server for the length of a block; `PORT` among the arguments stands for a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = Server([a.replace("PORT", str(port)) for a in arguments], port, folder / f"{name}.log")
    try:
        yield started
    finally:
        started.stop()


# --- measurements -----------------------------------------------------------------------------------------------------


def overload(url: str, body: Any, capacity: float, times: float, before_s: float, over_s: float) -> dict[str, Any]:
    """Half of the capacity, then a multiple of it, then half again: errors, latency of what is let in, recovery.

    Returns:
        Besides the loads: `errors_other_than_503`; `p99_ratio`, the 99th percentile in overload over that before it;
        and `recovery_s`, the time after the overload's end until no second's median is above twice the median before.
    """
    half = 0.5 * capacity
    after_s = 2 * RECOVERY_S
    before, over, after = open_loop(url, body, [(half, before_s), (times * capacity, over_s), (half, after_s)])
    usual, worst = before.latency_ms(0.99), over.latency_ms(0.99)
    normal_ms = 2 * (before.latency_ms(0.5) or 0.0)
    ended_s = before_s + over_s
    recovery_s = 0.0
    for second in range(int(after_s)):
        inside = [s for s in after.samples if second <= s.at_s - ended_s < second + 1]
        ok = Load([s for s in inside if s.status == 200], 1.0).latency_ms(0.5)
        if inside and (ok is None or ok > normal_ms or any(s.status != 200 for s in inside)):
            recovery_s = second + 1.0
    every = [*before.samples, *over.samples, *after.samples]
    return {
        "times_capacity": times,
        "errors_other_than_503": sum(s.status not in (200, 503) for s in every),
        "p99_ratio": worst / usual if worst and usual else None,
        "recovery_s": recovery_s,
        "before": before.summary(),
        "over": over.summary(),
        "after": after.summary(),
    }


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of a preset."""
    full = chosen.preset == "full"
    model, ar = folder / "yan-model", folder / "ar-model"
    make_model(model, chosen.size, chosen.target_tokens, chosen.tiny)
    prompts = sources()

    def body(i: int) -> dict[str, Any]:
        return {"source": prompts[i % ROWS], "seed": i}

    sizes = [1, chosen.max_batch_size] if not full else sorted({1, 2, 4, 8, 16, 32, chosen.max_batch_size})
    report: dict[str, Any] = {"bare": {}}
    cores = os.cpu_count() or 1
    for threads in sorted({1, cores} if full else {cores}):
        report["bare"][str(threads)] = in_child(bare, model, chosen.num_steps, sizes, threads, chosen.seconds / 4)

    pause_s = report["bare"][str(cores)]["p50_ms"] / 1000
    with server(folder, "no_op", ["pipelines.benchmarks.no_op", "PORT"]) as no_op:
        closed_loop(no_op.url, body, 1, 1)
        report["no_op"] = {
            "alone": closed_loop(no_op.url, body, 1, chosen.seconds / 4).summary(),
            "alone_with_pauses": closed_loop(no_op.url, body, 1, chosen.seconds / 4, pause_s=pause_s).summary(),
            "saturated": closed_loop(no_op.url, body, CLIENTS, chosen.seconds / 4).summary(),
        }
    told = [report["no_op"][name]["p50_ms"] for name in ("alone", "alone_with_pauses")]
    print(f"no-op deployment: p50 {told[0]:.2f} ms, with the sampler's time between two {told[1]:.2f} ms", flush=True)

    options = ["--num-steps", str(chosen.num_steps), "--max-batch-size", str(chosen.max_batch_size)]
    options += ["--max-queued-requests", str(chosen.max_queued_requests)]
    serve = ["pipelines", "serve", "--port", "PORT", *options]
    with server(folder, "yan", [*serve, "--model", str(model)]) as yan:
        closed_loop(yan.url, body, 1, 2)
        report["cold_start_s"] = yan.cold_start_s
        clients = min(CLIENTS, chosen.max_queued_requests + chosen.max_batch_size)
        same, paused_ms, alone, saturated = in_turns(chosen, model, yan.url, body, clients)
        report["bare"]["1"] = report["bare"].get("1", {}) | same
        report["bare_with_pauses_p50_ms"] = paused_ms
        report["alone"], report["saturated"] = alone.summary(), saturated.summary() | {"clients": clients}
        print("bare sampler:", report["bare"], f"with pauses {paused_ms:.1f} ms", flush=True)
        capacity = report["saturated"]["answers_per_s"]
        print(f"yan serve: p50 {report['alone']['p50_ms']:.1f} ms alone, {capacity:.0f} answers/s", flush=True)
        report["overload"] = overload(yan.url, body, capacity, 2.0, chosen.seconds, chosen.overload_s)
        report["memory_mb"] = yan.memory_mb()
        report["replica_s"] = yan.replica_s
    if full:
        second = folder / "second-model"
        make_model(second, chosen.size, chosen.target_tokens, chosen.tiny)

        def either(i: int) -> dict[str, Any]:
            return body(i) | {"model": ("yan-model", "second-model")[i % 2]}

        with server(folder, "two", [*serve, "--model", str(model), "--more-models", str(second)]) as two:
            closed_loop(two.url, either, 1, 2)
            report["two_models"] = closed_loop(two.url, either, clients, chosen.seconds).summary()
            limit = 2 * (alone.latency_ms(0.99) or 0.0)
            multiples = [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
            loads = open_loop(two.url, either, [(m * capacity, chosen.seconds) for m in multiples], seed=1)
            report["loads"] = [
                {"times_capacity": m, **of.summary(limit)} for m, of in zip(multiples, loads, strict=True)
            ]
    make_ar_model(ar, chosen.size, chosen.target_tokens)
    with server(folder, "ar", [*serve, "--model", str(ar)]) as baseline:
        closed_loop(baseline.url, body, 1, 2)
        report["ar"] = {
            "alone": closed_loop(baseline.url, body, 1, chosen.seconds / 2).summary(),
            "saturated": closed_loop(baseline.url, body, clients, chosen.seconds / 2).summary(),
        }
    report["http_overhead_p50_ms"] = report["alone"]["p50_ms"] - same["p50_ms"]
    report["saturation_share_of_bare"] = capacity / same[str(chosen.max_batch_size)]
    best = max(rate for of in report["bare"].values() for size, rate in of.items() if size != "p50_ms")
    report["saturation_share_of_bare_with_all_cores"] = capacity / best
    return report


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised, and whether it was kept."""
    over = report["overload"]
    found = [
        ("HTTP p50 of a lone client less the bare sampler's, ms", report["http_overhead_p50_ms"], OVERHEAD_MS),
        ("errors other than 503 in overload", over["errors_other_than_503"], 0),
        ("p99 in overload over p99 at half of the capacity", over["p99_ratio"], P99_RATIO),
        ("seconds until all is as before", over["recovery_s"], RECOVERY_S),
    ]
    told = [
        {"bar": bar, "value": value, "most": most, "met": value is not None and value <= most}
        for bar, value, most in found
    ]
    share = report["saturation_share_of_bare"]
    return [*told, {"bar": "throughput over the bare sampler's", "value": share, "least": SHARE, "met": share >= SHARE}]


def picture(report: dict[str, Any]) -> Figure:
    """Latency and answers by load."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    x = [of["times_capacity"] for of in report["loads"]]
    for name in ("p50_ms", "p95_ms", "p99_ms"):
        left.plot(x, [of[name] for of in report["loads"]], marker="o", label=name[:3])
    right.plot(x, [of["goodput_per_s"] for of in report["loads"]], "k:", label="goodput")
    left.set(xlabel="load, times capacity", ylabel="milliseconds", title=f"YAN {report['size']}")
    right.set(ylabel="answers a second within the limit")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    return figure


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its figures and write them to results/."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.serving", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--preset", choices=["full", "bar"], default="full", help="bar: what is promised, in minutes")
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--target-tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--num-steps", type=int, default=3, help="solver steps")
    parser.add_argument("--max-batch-size", type=int, default=8, help="of the server")
    parser.add_argument("--max-queued-requests", type=int, default=8, help="of the server: what bounds waiting")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a measurement")
    parser.add_argument("--overload-s", type=float, default=60.0, help="length of the overload")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose serving.jsonl gets a line")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tests: a model of seconds
    chosen = parser.parse_args(args)
    begun = time.perf_counter()
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(torch.device("cpu")),
        **{k: v for k, v in vars(chosen).items() if k not in ("json", "results", "tiny")},
    }
    with tempfile.TemporaryDirectory() as scratch:
        report |= measure(chosen, Path(scratch))
    report["bars"] = bars(report)
    report["wall_s"] = time.perf_counter() - begun
    for bar in report["bars"]:
        print(
            f"{'met   ' if bar['met'] else 'MISSED'} {bar['bar']}: {bar['value']} ({bar.get('most', bar.get('least'))})"
        )
    leave(report, chosen.results, "serving", chosen.json)
    if "loads" in report:
        picture(report).savefig((chosen.json or chosen.results / "serving.json").with_suffix(".png"), dpi=120)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

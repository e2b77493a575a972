"""Speed of the sampler against a naive one, an autoregressive decoder and masked diffusion of the same size.

    python -m pipelines.benchmarks.sampler                                    # the table, as this machine allows
    python -m pipelines.benchmarks.sampler --preset bar --json OUT            # the two CPU bars, in under 8 minutes
    python -m pipelines.benchmarks.sampler --sizes 200m --batches 1 --lengths 128   # the GPU bars, where there is one

Every model has fresh weights: speed does not depend on what they are. Each contestant fills all `length` places of
every row; "generated tokens" are these, whatever end-of-text tokens are among them. All ratios come from one run in
which the contestants took turns.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.benchmarks import machine
from pipelines.benchmarks.decoders import (
    CONTESTANTS,
    GPU_ONLY,
    OURS,
    PRECISIONS,
    SIZES,
    Cell,
    contestant,
    parameters_of,
    size_config,
    work,
)
from pipelines.benchmarks.machine import RESULTS, leave
from yan_core.files import code_commit, write_file


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The machine's measured rates and what a run may spend.

    Attributes:
        bytes_per_s: Memory bandwidth.
        flops_per_s: Rate of a large matrix product.
        budget_s: Time for each contestant of a cell, warmed up.
        limit_s: Longest call worth waiting for.
        most: Most turns of a contestant.
        memory: Measure peak memory.
    """

    bytes_per_s: float
    flops_per_s: float
    budget_s: float
    limit_s: float
    most: int
    memory: bool = True

    def seconds(self, weight_bytes: int, flops: int) -> float:
        """Least time for that much work."""
        return max(weight_bytes / self.bytes_per_s, flops / self.flops_per_s)


def peak_of(name: str, cell: Cell) -> int | None:
    """Peak memory of one call above the model and what loading left; meant for a fresh process on a CPU."""
    contestant(name, replace(cell, batch=1, length=min(8, cell.length)), passes=1)()  # libraries' own buffers
    return machine.peak_bytes(contestant(name, cell, passes=1), torch.device(cell.device))


def measure(cell: Cell, names: Sequence[str], limits: Limits, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of the table, one a contestant."""
    torch._dynamo.reset()
    device = torch.device(cell.device)
    where = f"{cell.size} batch {cell.batch} length {cell.length}"
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    first_s: dict[str, float] = {}
    ids: dict[str, Tensor] = {}
    for name in names:
        row: dict[str, Any] = {"size": cell.size, "batch": cell.batch, "length": cell.length, "contestant": name}
        rows[name] = row
        floor_s = limits.seconds(*work(name, cell))
        passes = None
        if name.startswith(("MDM", "LLaDA")):  # its passes are alike: where all take too long, some are timed
            passes = max(1, min(cell.length, int(limits.limit_s / (3 * floor_s))))
        if floor_s > limits.limit_s:
            row["failed"] = f"left out: {floor_s:.0f} s a {'pass' if passes else 'call'} at the least"
            continue
        if passes is not None and passes < cell.length:
            row["timed_passes"] = passes
        if name in OURS or name == "naive":
            row["floor_ms"] = 1000 * floor_s
        say(f"{where}: {name}")
        try:
            start = time.perf_counter()
            calls[name] = contestant(name, cell, passes)
            ids[name] = calls[name]().clone()
            first_s[name] = machine.seconds(calls[name], device)
            if device.type == "cpu" and first_s[name] < limits.budget_s / 10:
                calls[name], row["threads"], first_s[name] = machine.at_its_best(calls[name], device)
            row["first_call_s"] = time.perf_counter() - start - first_s[name]
            if limits.memory and device.type == "cuda":
                # A graph's memory is set aside when it is captured, not when it runs.
                graph = "graph" in name or (name.endswith("compiled") and name != "ours compiled")
                row["peak_bytes"] = None if graph else machine.peak_bytes(calls[name], device)
            elif limits.memory and "compiled" not in name:
                row["peak_bytes"] = machine.in_child(peak_of, name, cell)
        except Exception as error:  # one contestant's failure is a result; the others go on
            row["failed"] = machine.reason(error)
            calls.pop(name, None)
    say(f"{where}: {len(calls)} contestants take turns")
    times, failed = machine.take_turns(calls, first_s, device, limits.budget_s, limits.most)
    for name, taken in times.items():
        if name in failed:
            rows[name]["failed"] = failed[name]
            continue
        scale = cell.length / rows[name].get("timed_passes", cell.length)
        low, middle, high = (1000 * scale * value for value in machine.quartiles(taken))
        rows[name] |= {"median_ms": middle, "q1_ms": low, "q3_ms": high, "min_ms": 1000 * scale * min(taken)}
        rows[name]["turns"] = len(taken)
        rows[name]["tokens_per_s"] = 1000 * cell.batch * cell.length / middle
        if "naive" in ids and name in OURS:
            rows[name]["same_tokens_share"] = (ids[name] == ids["naive"]).float().mean().item()
    return compare(list(rows.values()))


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to one cell's rows: speed-up over naive, how much longer than our fastest, how far above the floor."""
    by_name = {row["contestant"]: row for row in rows if "median_ms" in row}
    ours = min((row["median_ms"] for name, row in by_name.items() if name in OURS), default=None)
    for row in by_name.values():
        if "naive" in by_name:
            row["speedup_over_naive"] = by_name["naive"]["median_ms"] / row["median_ms"]
        if ours is not None:
            row["times_ours"] = row["median_ms"] / ours
        if "floor_ms" in row:
            row["times_floor"] = row["median_ms"] / row["floor_ms"]
    return rows


# --- reporting --------------------------------------------------------------------------------------------------------

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("size", "size", "{}"),
    ("batch", "batch", "{}"),
    ("length", "length", "{}"),
    ("contestant", "contestant", "{}"),
    ("ms", "median_ms", "{:.2f}"),
    ("q1", "q1_ms", "{:.2f}"),
    ("q3", "q3_ms", "{:.2f}"),
    ("turns", "turns", "{}"),
    ("threads", "threads", "{}"),
    ("tokens/s", "tokens_per_s", "{:.0f}"),
    ("peak MB", "peak_bytes", "{:.1f}"),
    ("over naive", "speedup_over_naive", "{:.2f}x"),
    ("/ ours", "times_ours", "{:.2f}"),
    ("same tokens", "same_tokens_share", "{:.2%}"),
    ("floor ms", "floor_ms", "{:.2f}"),
    ("/ floor", "times_floor", "{:.1f}"),
)
"""Heading, key of the row, format."""


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, each cell's contestants together."""
    lines = [[heading for heading, _, _ in COLUMNS]]
    for row in rows:
        shown = {**row, "peak_bytes": None if row.get("peak_bytes") is None else row["peak_bytes"] / 1e6}
        lines.append([form.format(shown[key]) if shown.get(key) is not None else "-" for _, key, form in COLUMNS])
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = [
        "  ".join(v.ljust(w) if i in (0, 3) else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    for i, row in enumerate(rows, start=1):
        if "failed" in row:
            text[i] += f"  {row['failed']}"
        elif "timed_passes" in row:
            text[i] += f"  from {row['timed_passes']} of {row['length']} passes"
    return "\n".join(line.rstrip() for line in text)


def bars(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """The issue's bars that these rows can tell about."""
    found: list[dict[str, Any]] = []

    def bar(text: str, value: float, required: float, at_least: bool = True) -> None:
        met = value >= required if at_least else value <= required
        found.append({"bar": text, "value": value, "required": required, "met": met})

    def best(size: str, batch: int, *names: str) -> float | None:
        cell = [r for r in rows if (r["size"], r["batch"], r["length"]) == (size, batch, 128)]
        return min((r["median_ms"] for r in cell if r["contestant"] in names and "median_ms" in r), default=None)

    if device == "cpu":
        for batch, required in ((1, 1.6), (64, 1.8)):
            slow, fast = best("5m", batch, "naive"), best("5m", batch, "ours")
            if slow and fast:
                bar(f"5M, length 128, batch {batch}: times naive", slow / fast, required)
        return found
    fast = best("200m", 1, *OURS)
    if fast:
        bar("200M, length 128, batch 1: ms a request", fast, 2.0, at_least=False)
        for text, required, names in (
            ("AR with cache, compiled", 50.0, ("AR", "AR compiled")),
            ("masked diffusion of equal size", 0.9 * 128 / 3, ("MDM", "MDM compiled")),
        ):
            slow = best("200m", 1, *names)
            if slow:
                bar(f"200M, length 128, batch 1: times {text}", slow / fast, required)
    return found


def bar_preset(
    cell: Cell, memory_length: int, memory_vocab: int, limits: Limits, say: Callable[[str], None]
) -> dict[str, Any]:
    """Naive against ours at batch 1 and 64, and their peak memory at a greater length.

    Args:
        cell: The model; its batch is not looked at.
        memory_length: Length at which peak memory is compared.
        memory_vocab: Vocabulary with which it is compared.
        limits: Rates and budgets.
        say: Takes progress lines.

    Returns:
        `rows`, `speedup_over_naive` (an entry a batch) and `bars`.
    """
    rows, entries = [], []
    for batch in (1, 64):
        cell = replace(cell, batch=batch)
        pair = measure(cell, ("naive", "ours"), replace(limits, memory=False), say)
        long, peaks = replace(cell, length=memory_length, vocab_size=memory_vocab), {}
        for name in ("naive", "ours"):
            say(f"{cell.size} batch {batch} length {memory_length}: peak memory of {name}, in a process of its own")
            peaks[name] = machine.in_child(peak_of, name, long)
        known = peaks["naive"] and peaks["ours"] is not None
        ours = pair[1]
        entries.append(
            {
                "batch": batch,
                "ratio": ours.get("speedup_over_naive"),
                "same_tokens": ours.get("same_tokens_share") == 1,
                "peak_memory_ratio": peaks["ours"] / peaks["naive"] if known else None,
                "length": cell.length,
                "same_tokens_share": ours.get("same_tokens_share"),
                "memory_length": memory_length,
                "vocab_size": cell.vocab_size,
                "memory_vocab_size": memory_vocab,
                "peak_bytes": peaks,
            }
        )
        rows += pair
    found = bars(rows, "cpu")
    ratio = entries[-1]["peak_memory_ratio"]
    if ratio is not None:
        text = f"{cell.size}, length {memory_length}, batch 64, vocabulary {memory_vocab}: peak memory / naive's"
        found.append({"bar": text, "value": ratio, "required": 0.4, "met": ratio < 0.4})
    return {"rows": rows, "speedup_over_naive": entries, "bars": found}


def full_table(
    cells: list[Cell], names: Sequence[str], limits: Limits, say: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """All contestants in all cells; after each cell what is known so far, as `bar_preset` gives it."""
    rows: list[dict[str, Any]] = []
    entries = []
    for cell in cells:
        group = measure(cell, names, limits, say)
        if len(cells) > 1:
            print(table(group), flush=True)
        rows += group
        by_name = {row["contestant"]: row for row in group}
        ours, slow = by_name.get("ours", {}), by_name.get("naive", {})
        if "speedup_over_naive" in ours:
            peaks = ours.get("peak_bytes"), slow.get("peak_bytes")
            entries.append(
                {
                    "batch": cell.batch,
                    "ratio": ours["speedup_over_naive"],
                    "same_tokens": ours["same_tokens_share"] == 1,
                    "peak_memory_ratio": peaks[0] / peaks[1] if peaks[0] is not None and peaks[1] else None,
                    "size": cell.size,
                    "length": cell.length,
                }
            )
        yield {"rows": rows, "speedup_over_naive": entries, "bars": bars(rows, torch.device(cell.device).type)}


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.benchmarks.sampler", description=(__doc__ or "").splitlines()[0]
    )
    gpu = torch.cuda.is_available()
    parser.add_argument("--preset", choices=("bar",), help="bar: naive against ours on the CPU, in under 8 minutes")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES if gpu else SIZES[:1])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128, 512], help="tokens to generate a request")
    parser.add_argument("--source-length", type=int, default=128, help="tokens of each source")
    parser.add_argument("--steps", type=int, default=3, help="Euler steps of ours and of naive")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's, one a core")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="default: all that the device can run")
    parser.add_argument("--budget-s", type=float, default=15.0, help="time for each contestant of a cell, warmed up")
    parser.add_argument("--limit-s", type=float, default=60.0, help="leave out calls that must take longer")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder whose sampler.jsonl gets a line")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # tests: a model of seconds
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> int:
    """Run the benchmark, print its table and write its report."""
    options = parse(args)
    start = time.perf_counter()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # where compiled code breaks off shows in the times
    warnings.filterwarnings("ignore", module="torch._dynamo")

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", flush=True)

    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu" if options.preset == "bar" else options.device)
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "preset": options.preset,
        "precision": precision,
        "source_length": options.source_length,
        "num_steps": options.steps,
        "machine": machine.describe(device),
    }
    say(", ".join(f"{key} {value}" for key, value in report["machine"].items()) + f", {precision}")
    limits = Limits(
        bytes_per_s=machine.memory_bandwidth(device),
        flops_per_s=machine.matmul_rate(device, PRECISIONS[precision]),
        budget_s=options.budget_s,
        limit_s=options.limit_s,
        most=3 if options.tiny else 200 if device.type == "cuda" else 50,
        memory=not options.no_memory,
    )
    report["machine"] |= {"gb_per_s": limits.bytes_per_s / 1e9, "gflop_per_s": limits.flops_per_s / 1e9}
    say(f"memory {limits.bytes_per_s / 1e9:.1f} GB/s, matrix products {limits.flops_per_s / 1e9:.0f} GFLOP/s")

    cells = []
    for size in ("5m",) if options.preset == "bar" else options.sizes:
        config = size_config(size)
        model, vocab = config.model, config.tokenizer.vocab_size
        if options.tiny:
            model, vocab = replace(model, d_model=20, flow_blocks=1, num_experts=2), 64
        report.setdefault("parameters", {})[size] = parameters_of(model, vocab)
        base = Cell(size=size, model=model, vocab_size=vocab, batch=1, length=1, precision=precision)
        base = replace(base, source_length=options.source_length, num_steps=options.steps, device=str(device))
        cells += [replace(base, batch=b, length=n) for n in options.lengths for b in options.batches]

    def write() -> None:
        report["wall_s"] = time.perf_counter() - start
        if options.json:
            write_file(options.json, json.dumps(report, indent=1) + "\n")

    if options.preset == "bar":
        length, memory_length, memory_vocab = (8, 16, 64) if options.tiny else (128, 512, 32_768)
        cell, limits = replace(cells[0], length=length), replace(limits, budget_s=45.0)
        report |= bar_preset(cell, memory_length, memory_vocab, limits, say)
    else:
        names = options.contestants or [n for n in CONTESTANTS if device.type == "cuda" or n not in GPU_ONLY]
        for so_far in full_table(cells, names, limits, say):
            report |= so_far
            write()  # a long run that is stopped leaves what it found
    report["wall_s"] = time.perf_counter() - start
    if options.preset == "bar":
        in_time = report["wall_s"] < 480
        report["bars"].append({"bar": "seconds taken", "value": report["wall_s"], "required": 480.0, "met": in_time})

    print(table(report["rows"]))
    for entry in report["speedup_over_naive"]:
        print(" ".join(f"{key}={value}" for key, value in entry.items()))
    for bar in report["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['bar']}: {bar['value']:.3g} (bar: {bar['required']:.3g})")
    busy = report["machine"]["load_average"]
    if busy > 0.5:
        say(f"the machine was not idle before this began (load {busy:.1f}): times are upper bounds, and ratios noisy")
    say("done")
    write()
    leave(report, options.results, "sampler", None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

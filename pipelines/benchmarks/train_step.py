"""What a training step of the flow costs, dense and sparse mixtures taking turns in one run.

    python -m pipelines.benchmarks.train_step
    python -m pipelines.benchmarks.train_step --d-model 256 --target 128 --json OUT

Fresh weights and random tokens: the cost of a step does not depend on what they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipelines.benchmarks.machine import describe, quartiles, seconds, take_turns
from yan_core.batching import task_batch
from yan_core.config import FlowLossConfig, ModelConfig, OptimConfig
from yan_core.files import code_commit, write_file
from yan_core.loss import Objective
from yan_core.model import build_model
from yan_core.training import build_optimizer, freeze_all_but, train_step

MIXTURES = {"K=1": (1, 0), "K=2": (2, 0), "K=4": (4, 0), "K=16": (16, 0), "K=16 top-2": (16, 2)}
"""Name -> (experts, experts computed a scope; 0: all)."""


def contestant(num_experts: int, top_k: int, options: argparse.Namespace) -> Callable[[], object]:
    """One optimizer step of a model of so many experts, as a call."""
    vocab, device = 4096, torch.device(options.device)
    config = ModelConfig(d_model=options.d_model, num_experts=num_experts, top_k=top_k, expert_scope=options.scope)
    model = build_model(config, vocab, seed=0).to(device)
    freeze_all_but(model, ("source_encoder", "flow"))
    optimizer = build_optimizer(model, OptimConfig())
    generator = torch.Generator().manual_seed(0)
    sources, targets = (
        torch.randint(4, vocab, (options.batch, length), generator=generator).tolist()
        for length in (options.source, options.target)
    )
    loss = FlowLossConfig()
    batch = task_batch(sources, targets, torch.arange(options.batch), loss, options.target).to(device)
    objective, bf16 = Objective(model, loss), device.type == "cuda"
    return lambda: train_step(objective, batch, optimizer, options.num_steps, 1e-4, 1.0, bf16)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of all mixtures and their ratios to dense K = 2."""
    device = torch.device(options.device)
    calls = {name: contestant(*mixture, options) for name, mixture in MIXTURES.items()}
    first = {}
    for name, call in calls.items():
        call()  # warm-up
        first[name] = seconds(call, device)
    times, failed = take_turns(calls, first, device, options.seconds / len(calls), most=200)
    rows = []
    base = quartiles(times["K=2"])[1]
    for name, taken in times.items():
        low, median, high = quartiles(taken)
        rows.append(
            {
                "mixture": name,
                "median_ms": 1000 * median,
                "quartiles_ms": [1000 * low, 1000 * high],
                "turns": len(taken),
                "ratio_to_k2": median / base,
            }
        )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": code_commit(),
        "machine": describe(device),
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "rows": rows,
        "failed": failed,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.benchmarks.train_step", description=__doc__)
    parser.add_argument("--d-model", type=int, default=128, help="width")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step")
    parser.add_argument("--source", type=int, default=64, help="tokens of a source")
    parser.add_argument("--target", type=int, default=32, help="tokens of a target")
    parser.add_argument("--num-steps", type=int, default=3, help="Euler steps of the training solver")
    parser.add_argument("--scope", choices=("token", "segment", "sequence"), default="sequence", help="of an expert")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to measure, all mixtures together")
    parser.add_argument("--json", default=None, help="write the figures to this file")
    options = parser.parse_args(argv)
    result = measure(options)
    print(f"{'mixture':<12} {'median ms':>10} {'quartiles':>17} {'of K = 2':>9}")
    for row in result["rows"]:
        low, high = row["quartiles_ms"]
        print(f"{row['mixture']:<12} {row['median_ms']:>10.1f} {low:>8.1f} {high:>8.1f} {row['ratio_to_k2']:>9.2f}")
    for name, why in result["failed"].items():
        print(f"{name} failed: {why}")
    if options.json:
        write_file(Path(options.json), json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How long and how dear a training is, before it begins: a model of a step's cost and of failures. No Ray, no GPU.

What is computed follows from the architecture (`row_flops`); everything else is a constant that can be measured and
set: docs/SCALING.md says how. Source of the checkpoint interval: Daly 2006, "A higher order estimate of the optimum
checkpoint interval for restart dumps", eq. 37 (first order: Young 1974).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from yan_core.config import ModelConfig, RunConfig, unknown_name


@dataclass(frozen=True)
class Hardware:
    """A cluster's constants, of one worker where not said otherwise.

    Attributes:
        flops_per_s: Peak rate of matrix products in the precision of training.
        efficiency: Share of the peak that a training step reaches (model flops utilisation).
        memory_bytes: Memory of a worker.
        workers_per_node: Workers of a node.
        node_bytes_per_s: Rate of collectives within a node.
        network_bytes_per_s: Rate of collectives between nodes.
        latency_s: Time of the smallest collective.
        block_s: Time of a block's pass, there and back, that does not depend on the rows: starting its operations.
        crowding: Share of the efficiency that is left when all workers of a node compute at once.
        overlap: Share of the backward pass (FSDP: of all computing) that collectives can hide behind; 0 where they take
            the workers' own cores.
        copy_bytes_per_s: Rate at which a checkpoint is copied aside, while training waits.
        storage_bytes_per_s: Rate at which a checkpoint is written, by one worker, while training goes on.
        tokens_per_core_s: Tokens that one CPU core reads and pads in a second.
        cores: CPU cores for reading.
        shared_cores: CPU cores of a node, where workers compute on them, one core each, beside reading and Ray's own
            processes; 0: workers compute on GPUs, and reading has its `cores`.
        ray_cores: Of these, what Ray's own processes and MLflow keep busy.
        failure_hours: Mean time between failures.
        restart_s: Time from a failure to the first new step.
        price_per_hour: Price, in whatever currency.
    """

    flops_per_s: float
    efficiency: float
    memory_bytes: float
    workers_per_node: int
    node_bytes_per_s: float
    network_bytes_per_s: float
    latency_s: float = 30e-6
    overlap: float = 1.0
    block_s: float = 0.0
    crowding: float = 1.0
    copy_bytes_per_s: float = 20e9
    storage_bytes_per_s: float = 2e9
    tokens_per_core_s: float = 300e3
    cores: float = 8.0
    shared_cores: float = 0.0
    ray_cores: float = 0.0
    failure_hours: float = 50_000.0
    restart_s: float = 300.0
    price_per_hour: float = 0.0


HARDWARE = {
    "h200": Hardware(989e12, 0.4, 141e9, 8, 450e9, 50e9, price_per_hour=3.5),
    "h100": Hardware(989e12, 0.4, 80e9, 8, 450e9, 50e9, price_per_hour=2.5),
    "a100": Hardware(312e12, 0.4, 80e9, 8, 300e9, 25e9, price_per_hour=1.5),
}
"""Data-sheet rates (dense bfloat16; NVLink one way; 400 or 200 Gbit/s a GPU). The efficiency, the failures (one in
50,000 hours of a GPU, as in the training of Llama 3, arXiv:2407.21783, sec. 3.3.4) and the prices are assumptions."""


def checked(hardware: Hardware) -> Hardware:
    """The constants as they are.

    Raises:
        ValueError: If one is nonsense.
    """
    for field in fields(Hardware):
        value = getattr(hardware, field.name)
        may_be_zero = field.default == 0 or field.name == "overlap"
        if not (math.isfinite(value) and value > 0 or value == 0 and may_be_zero):
            raise ValueError(f"--{field.name.replace('_', '-')} must be above 0, got {value}")
    if 0 < hardware.shared_cores <= hardware.ray_cores:
        raise ValueError(f"--ray-cores must be below --shared-cores={hardware.shared_cores}, got {hardware.ray_cores}")
    return hardware


def read_constants(file: Path) -> dict[str, float]:
    """Constants of a file, some or all.

    Raises:
        ValueError: If it is no JSON object of them.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--constants {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--constants {file} must be JSON: {error}") from error
    if not isinstance(found, dict) or not all(type(v) in (int, float) for v in found.values()):
        raise ValueError(f"--constants {file} must be a JSON object of numbers by name")
    known = [field.name for field in fields(Hardware)]
    for name in found:
        if name not in known:
            raise ValueError(unknown_name(f"--constants {file}", name, known))
    return found


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        model: Architecture.
        vocab_size: Token ids.
        source_tokens: Tokens of a source.
        target_tokens: Tokens of a target.
        batch_rows: Rows of a step over all workers.
        solver_steps: Mean number of steps of the training solver.
        tokens: Target tokens in all.
        num_workers: Workers.
        strategy: `ddp` or `fsdp`.
        averaged: Whether an average of the weights is kept.
    """

    model: ModelConfig
    vocab_size: int
    source_tokens: int
    target_tokens: int
    batch_rows: int
    solver_steps: float
    tokens: float
    num_workers: int
    strategy: str = "ddp"
    averaged: bool = False

    @classmethod
    def of(cls, config: RunConfig, tokens: float, num_workers: int, vocab_size: int = 0) -> Job:
        """The fine-tuning of a run, on so many tokens and workers."""
        steps = config.flow_loss.solver_steps
        return cls(
            model=config.model,
            vocab_size=vocab_size or config.tokenizer.vocab_size,
            source_tokens=config.data.max_source_tokens,
            target_tokens=config.data.max_target_tokens,
            batch_rows=config.stages.finetune.batch_size,
            solver_steps=sum(steps) / len(steps),
            tokens=tokens,
            num_workers=num_workers,
            strategy=config.scaling.strategy,
            averaged=config.stages.finetune.optim.ema_decay > 0,
        )


def row_flops(job: Job) -> tuple[float, float]:
    """Floating-point operations of one row in a step of stages 2 and 3: forward, and backward.

    The target encoder is frozen and has no backward pass; the decoder is frozen too, but gradients go through it.
    """
    c, d = job.model, job.model.d_model
    ffn, block = 2 * c.ffn_multiple, 4 + 2 * c.ffn_multiple  # multiply-adds a token in units of d * d, as all below
    mixer = block if c.mixer == "attention" else 2 * c.ffn_multiple + 6 * c.mamba.expand
    source, target = job.source_tokens, job.target_tokens
    attends = 1.0 if c.mixer == "attention" else 0.0
    cross = math.ceil(c.flow_blocks / c.cross_attention_every)
    experts = c.top_k or c.num_experts

    def encoder(blocks: int, tokens: int) -> float:
        return blocks * tokens * (mixer * d * d + attends * 2 * tokens * d)

    read = encoder((c.target_encoder if c.share_encoder else c.source_encoder).num_blocks, source)
    read += 2 * cross * source * d * d
    latents = encoder(c.target_encoder.num_blocks, target)
    trunk = target * (c.flow_blocks * (mixer * d * d + attends * 2 * target * d) + cross * (2 * d * d + 2 * source * d))
    # At t = 0, which is the solver's first step too, at t, and for the solver's other steps.
    passes, heads = 1 + job.solver_steps, 2 * experts + job.solver_steps
    flow = passes * trunk + target * (heads * ffn + 4) * d * d
    decoder = target * (c.decoder_blocks * ffn * d * d + job.vocab_size * d)
    forward = 2 * (read + latents + flow + decoder)
    return forward, 2 * (2 * (read + flow) + decoder)


def block_passes(job: Job) -> float:
    """How often a batch goes through a block in a step of stages 2 and 3."""
    c = job.model
    encoders = c.target_encoder.num_blocks + (c.target_encoder if c.share_encoder else c.source_encoder).num_blocks
    return encoders + (1 + job.solver_steps) * c.flow_blocks + c.decoder_blocks


def peak_flops(device_name: str) -> float | None:
    """Peak rate of a GPU by the name that its driver gives, in floating-point operations a second; None: not known."""
    return next((h.flops_per_s for name, h in HARDWARE.items() if name in device_name.lower()), None)


def num_parameters(job: Job) -> tuple[float, float]:
    """All parameters, and those that learn in stages 2 and 3."""
    import torch

    from yan_core.model import YanModel
    from yan_core.training import freeze_all_but

    with torch.device("meta"):
        model = YanModel(job.model, job.vocab_size)
    freeze_all_but(model, ("source_encoder", "flow"))
    everything = sum(p.numel() for p in model.parameters())
    return float(everything), float(sum(p.numel() for p in model.parameters() if p.requires_grad))


@dataclass(frozen=True)
class Plan:
    """What is to be expected.

    Attributes:
        steps: Optimizer steps.
        step_s: Time of a step.
        compute_s: Of which computing, were it alone.
        communicate_s: Of which collectives, were they alone.
        read_s: Of which reading data, were it alone.
        bottleneck: The longest of the three.
        tokens_per_s: Target tokens of all workers.
        tokens_per_s_each: Of one worker.
        reading_cores: CPU cores that read for a worker, so that it does not wait.
        weights_bytes: Memory of a worker for weights, gradients, optimizer and averages; activations come on top.
        weights_fit: Whether that leaves a fifth of a worker's memory free for activations.
        checkpoint_bytes: Size of a checkpoint.
        checkpoint_wait_s: Time that training waits for a checkpoint.
        checkpoint_write_s: Time until it is written.
        checkpoint_every_s: Interval to choose.
        failures: Expected number of failures.
        overhead: Share of the time lost to checkpoints, failures and restarts.
        hours: Time in all.
        cost: Price in all.
    """

    steps: float
    step_s: float
    compute_s: float
    communicate_s: float
    read_s: float
    bottleneck: str
    tokens_per_s: float
    tokens_per_s_each: float
    reading_cores: float
    weights_bytes: float
    weights_fit: bool
    checkpoint_bytes: float
    checkpoint_wait_s: float
    checkpoint_write_s: float
    checkpoint_every_s: float
    failures: float
    overhead: float
    hours: float
    cost: float


def communicate_s(job: Job, hardware: Hardware, learning: float, everything: float) -> float:
    """Time of a step's collectives: an all-reduce of float32 gradients, or FSDP's gathers and scatter."""
    n = job.num_workers
    if n == 1:
        return 0.0
    rate = hardware.node_bytes_per_s if n <= hardware.workers_per_node else hardware.network_bytes_per_s
    moved = 2 * 4 * learning if job.strategy == "ddp" else 4 * (2 * everything + learning)
    return moved * (n - 1) / n / rate + 2 * math.ceil(math.log2(n)) * hardware.latency_s


def shared_step_s(own_s: float, read_s: float, workers: int, hardware: Hardware) -> float:
    """The least time of a step where workers, reading and Ray share a node's cores.

    Where each worker has a core, reading and Ray take what is left, and then time from a worker for which the others
    wait. With more workers than cores all of it is spread over the cores.

    Args:
        own_s: Core seconds of a worker's step.
        read_s: Core seconds of reading for it.
        workers: Workers of the node.
        hardware: `shared_cores` and `ray_cores`.
    """
    free = hardware.shared_cores - workers
    if free >= 0 and hardware.ray_cores < 1 + free:
        return (own_s + workers * read_s) / (1 + free - hardware.ray_cores)
    return workers * (own_s + read_s) / (hardware.shared_cores - hardware.ray_cores)


def make_plan(job: Job, hardware: Hardware) -> Plan:
    """Time, cost and bottleneck of a training, and the checkpoint interval to choose."""
    forward, backward = row_flops(job)
    everything, learning = num_parameters(job)
    rows = job.batch_rows / job.num_workers
    on_node = min(job.num_workers, hardware.workers_per_node)
    alone = 1 - (on_node - 1) / max(1.0, hardware.workers_per_node - 1)  # 1: has the node to itself, 0: it is full
    rate = hardware.flops_per_s * hardware.efficiency * (alone + (1 - alone) * hardware.crowding)
    compute = hardware.block_s * block_passes(job) + rows * (forward + backward) / rate
    collectives = communicate_s(job, hardware, learning, everything)
    read = rows * (job.source_tokens + job.target_tokens) / (hardware.tokens_per_core_s * hardware.cores)
    # Gradients travel while the rest of the backward pass runs; what FSDP gathers, while its blocks compute.
    hidden = hardware.overlap * (rows * backward / rate if job.strategy == "ddp" else compute)
    own = compute - hidden + max(hidden, collectives)
    step = max(own, read)
    if hardware.shared_cores:
        step = max(own, shared_step_s(own, read * hardware.cores, on_node, hardware))
    steps = job.tokens / (job.batch_rows * job.target_tokens)

    shards = job.num_workers if job.strategy == "fsdp" else 1
    averages = 4 * everything if job.averaged else 0.0
    held = (4 * everything + averages + 4 * learning + 8 * learning) / shards
    checkpoint = 4 * everything + averages + 8 * learning
    wait, write = checkpoint / hardware.copy_bytes_per_s, checkpoint / hardware.storage_bytes_per_s
    mean_s = 3600 * hardware.failure_hours / job.num_workers
    every = max(checkpoint_interval(wait, mean_s), write, step)
    overhead = lost_share(every, wait, write, hardware.restart_s, mean_s)
    hours = steps * step / (1 - overhead) / 3600
    return Plan(
        steps=steps,
        step_s=step,
        compute_s=compute,
        communicate_s=collectives,
        read_s=read,
        bottleneck=max((compute, "computing"), (collectives, "the network"), (read, "reading data"))[1],
        tokens_per_s=job.batch_rows * job.target_tokens / step,
        tokens_per_s_each=rows * job.target_tokens / step,
        reading_cores=read * hardware.cores / own,
        weights_bytes=held,
        weights_fit=held < 0.8 * hardware.memory_bytes,
        checkpoint_bytes=checkpoint,
        checkpoint_wait_s=wait,
        checkpoint_write_s=write,
        checkpoint_every_s=every,
        failures=3600 * hours / mean_s,
        overhead=overhead,
        hours=hours,
        cost=hours * job.num_workers * hardware.price_per_hour,
    )


def checkpoint_interval(wait_s: float, mean_s: float) -> float:
    """Daly's interval between checkpoints that stop training for `wait_s`, with failures every `mean_s`."""
    if wait_s >= 2 * mean_s:
        return mean_s
    x = wait_s / (2 * mean_s)
    return math.sqrt(2 * wait_s * mean_s) * (1 + math.sqrt(x) / 3 + x / 9) - wait_s


def lost_share(every_s: float, wait_s: float, write_s: float, restart_s: float, mean_s: float) -> float:
    """Share of the time that does no new work: waiting for checkpoints, and after each failure the way back.

    A failure costs the restart, half an interval on average, and as long as the newest checkpoint took to be written.
    """
    useful = every_s / (every_s + wait_s)
    back = restart_s + every_s / 2 + write_s
    return 1 - useful * max(0.0, 1 - back / mean_s) if back < mean_s else 1.0


def simulate(plan: Plan, hardware: Hardware, num_workers: int, seed: int = 0) -> tuple[float, int]:
    """Play a training with failures at random moments; gives its hours and its failures."""
    rng, mean_s = np.random.default_rng(seed), 3600 * hardware.failure_hours / num_workers
    needed, done, saved, clock, failures = plan.steps * plan.step_s, 0.0, 0.0, 0.0, 0
    next_failure = rng.exponential(mean_s)
    written: list[tuple[float, float]] = []  # (when it is on storage, the work that it holds)
    while done < needed:
        work = min(plan.checkpoint_every_s, needed - done)
        if clock + work + plan.checkpoint_wait_s <= next_failure:
            clock, done = clock + work + plan.checkpoint_wait_s, done + work
            written.append((clock + plan.checkpoint_write_s, done))
            continue
        failures += 1
        saved = max([saved, *(held for at, held in written if at <= next_failure)])
        written, done = [], saved
        clock = next_failure + hardware.restart_s
        next_failure = clock + rng.exponential(mean_s)
    return clock / 3600, failures


def table(plans: dict[str, Plan]) -> str:
    """Plans beside each other, a line a figure."""

    def shown(name: str, value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "NO"
        if not isinstance(value, float):
            return str(value)
        return f"{value / 1e9:,.2f} GB" if name.endswith("_bytes") else f"{value:,.4g}{' s' if _in_s(name) else ''}"

    lines = ["".join([f"{'':<20}", *(f"{name:>18}" for name in plans)])]
    for name in asdict(next(iter(plans.values()))):
        label = name.removesuffix("_bytes").removesuffix("_s" if _in_s(name) else "").replace("_", " ")
        lines.append(f"{label:<20}" + "".join(f"{shown(name, getattr(p, name)):>18}" for p in plans.values()))
    return "\n".join(lines)


def _in_s(name: str) -> bool:
    return name.endswith("_s") and not name.endswith("per_s")


def main(args: Sequence[str]) -> int:
    """`yan plan`."""
    parser = argparse.ArgumentParser(prog="yan plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML of the run")
    parser.add_argument("--gpus", type=int, nargs="+", required=True, metavar="N", help="workers; several are compared")
    parser.add_argument("--tokens", type=float, required=True, help="target tokens in all, such as 1e12")
    parser.add_argument("--rows-per-gpu", type=int, default=None, help="default: the config's batch over all workers")
    parser.add_argument("--hardware", choices=HARDWARE, default="h200", help="constants to start from")
    parser.add_argument(
        "--constants",
        type=Path,
        metavar="FILE",
        help="JSON of constants that were measured, as benchmarks.scaling writes",
    )
    for field in fields(Hardware):
        name = field.name.replace("_", "-")
        parser.add_argument(f"--{name}", type=float, default=None, help=f"default: that of --hardware ({field.name})")
    chosen = parser.parse_args(args)
    from pipelines.arguments import UsageError, parse_config

    if min(chosen.gpus) < 1 or chosen.tokens <= 0:
        raise UsageError("--gpus and --tokens must be above 0")
    config = parse_config("plan", ["--config", chosen.config])
    if config.baseline is not None:
        raise UsageError(f"--config {chosen.config} is of a baseline, {config.baseline.family}; plans are for a YAN")
    given = {f.name: getattr(chosen, f.name) for f in fields(Hardware) if getattr(chosen, f.name) is not None}
    try:
        measured = read_constants(chosen.constants) if chosen.constants else {}
        hardware, plans = checked(replace(HARDWARE[chosen.hardware], **{**measured, **given})), {}
    except ValueError as error:
        raise UsageError(str(error)) from error
    words = 0  # as many as the recipe allows
    if given := config.tokenizer.path or config.init_from:
        from yan_core.checkpoint import read_config

        words = read_config(given)["vocab_size"]
    for gpus in chosen.gpus:
        job = Job.of(config, chosen.tokens, gpus, words)
        if chosen.rows_per_gpu:
            job = replace(job, batch_rows=chosen.rows_per_gpu * gpus)
        if job.batch_rows < gpus:
            raise UsageError(
                f"{gpus} workers share the {job.batch_rows} rows of stages.finetune.batch_size: less than a row each; "
                "name the rows of each with --rows-per-gpu, or have fewer workers"
            )
        plans[f"{gpus} workers"] = make_plan(job, hardware)
    print(table(plans))
    for gpus, (name, plan) in zip(chosen.gpus, plans.items(), strict=True):
        if not plan.weights_fit:
            print(f"{name}: the model does not fit: take --scaling.strategy fsdp, more workers or larger ones")
        if plan.hours < 1e5 and plan.overhead < 0.9:
            hours, failures = simulate(plan, hardware, gpus)
            print(f"{name}: played once with failures at random moments: {hours:,.4g} hours, {failures} failures")
    return 0

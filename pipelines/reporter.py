"""What training says of itself: one line per interval on the driver's terminal, and metrics in MLflow."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from ray.actor import ActorHandle
from torch import Tensor

from pipelines.plan import Job, peak_flops, row_flops
from pipelines.state import StageState
from yan_core.batching import Batch
from yan_core.parallel import num_workers, total

if TYPE_CHECKING:
    from pipelines.metrics_buffer import MetricsBuffer


class Reporter:
    """A stage's progress, averaged over an interval and over the workers; rank 0 shows it."""

    def __init__(self, state: StageState, board: ActorHandle | None, tracker: MetricsBuffer | None) -> None:
        """Begin with a stage.

        Args:
            state: The stage.
            board: Takes progress lines; None: this worker shows none.
            tracker: MLflow run; None: nothing is recorded.
        """
        self.state, self.board, self.tracker = state, board, tracker
        self.total, self.skipped = state.settings.max_steps, 0
        self.job = Job.of(state.config, 0, num_workers(), state.tokenizer.vocab_size)
        device = next(state.model.parameters()).device
        # What row_flops counts is a step of YAN's flow.
        counted = state.config.baseline is None and state.job.stage != "autoencoder" and device.type == "cuda"
        self.peak_flops = peak_flops(torch.cuda.get_device_name(device)) if counted else None
        self.started, self.first_step = time.perf_counter(), state.step
        self._clear()

    def _clear(self) -> None:
        self.since, self.steps = time.perf_counter(), 0
        self.places, self.real, self.wait_s, self.flops = 0, 0, 0.0, 0.0
        self.sums: dict[str, Tensor] = {}

    @property
    def seconds(self) -> float:
        """Time since this stage began or went on."""
        return time.perf_counter() - self.started

    def say(self, line: str) -> None:
        """Show a line on the driver's terminal."""
        if self.board is not None:
            self.board.add.remote(f"  {self.state.job.stage:<11} {line}")

    def add(self, metrics: dict[str, Tensor], batch: Batch, num_steps: int, wait_s: float) -> None:
        """Count one step.

        Args:
            metrics: What it measured.
            batch: As it came from the loader.
            num_steps: Steps of the training solver.
            wait_s: Time that the batch was waited for.
        """
        self.steps, self.wait_s = self.steps + 1, self.wait_s + wait_s
        if self.peak_flops is not None:
            rows, target = batch.target_ids.shape
            job = replace(self.job, source_tokens=batch.source_ids.shape[1], target_tokens=target)
            self.flops += rows * sum(row_flops(replace(job, solver_steps=num_steps)))
        self.places += batch.num_tokens
        self.real += int(batch.source_mask.sum() + batch.target_mask.sum())
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def record(self, quality: dict[str, float]) -> None:
        """Record validation quality at this step."""
        if self.tracker is not None:
            named = {f"{self.state.job.stage}/validation/{name}": value for name, value in quality.items()}
            self.tracker.metrics(named, self.state.step)

    def show_samples(self, samples: list[dict[str, str]]) -> None:
        """Add answers of this step to the table of samples."""
        if self.tracker is not None:
            where = {"stage": self.state.job.stage, "step": str(self.state.step)}
            self.tracker.table([{**where, **sample} for sample in samples], "samples.json")

    def leave_out(self, seconds: float) -> None:
        """Take time off the interval and the stage that was not spent on training."""
        self.since, self.started = self.since + seconds, self.started + seconds

    def keep_unsent(self) -> None:
        """Write metrics that MLflow has not taken yet to their file."""
        if self.tracker is not None:
            self.tracker.spool()

    def due(self) -> bool:
        """Whether the interval is over."""
        return time.perf_counter() - self.since >= self.state.config.log_every_s

    def report(self, lr: float) -> dict[str, float]:
        """Show and record the interval; every worker must call it. Gives its mean metrics."""
        if self.steps == 0:
            return {}
        elapsed = time.perf_counter() - self.since
        counts = (self.places, self.real, self.wait_s, self.flops)
        own = [*self.sums.values(), *(torch.tensor(float(v)) for v in counts)]
        device = next(iter(self.sums.values())).device
        *sums, places, real, wait_s, flops = total(torch.stack([v.float().to(device) for v in own])).tolist()
        workers, steps = num_workers(), self.steps
        means = {name: value / (workers * self.steps) for name, value in zip(self.sums, sums, strict=True)}
        stage, step, rate = self.state.job.stage, self.state.step, places / elapsed
        wait, padding = wait_s / (workers * elapsed), 1 - real / places
        left_s = self.seconds / max(1, step - self.first_step) * (self.total - step)
        parts = " ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in means.items() if k.startswith("loss_"))
        load = f" load x{means['expert_load_max']:.2f}" if "expert_load_max" in means else ""
        skipped = f" skipped {self.skipped}" if self.skipped else ""
        self.say(
            f"{step:>5}/{self.total} loss {means['loss']:.3f} ({parts}) lr {lr:.1e} grad {means['grad_norm']:.2f} "
            f"{rate / 1000:.1f}k tok/s wait {wait:.0%} pad {padding:.0%}{load}{skipped} left {left_s:.0f}s"
        )
        if self.tracker is not None:
            named = {f"{stage}/train/{name}": value for name, value in means.items()}
            named |= {f"{stage}/train/lr": lr, f"{stage}/train/skipped_steps": float(self.skipped)}
            perf = {
                "tokens_per_s": rate,
                "step_ms": 1000 * elapsed / steps,
                "data_wait_share": wait,
                "padding_share": padding,
                "memory_bytes": _memory(device),
            }
            if self.peak_flops is not None:
                perf["mfu"] = flops / (workers * elapsed * self.peak_flops)
            self.tracker.metrics(named | {f"{stage}/perf/{name}": value for name, value in perf.items()}, step)
        self._clear()
        return means


def _memory(device: torch.device) -> float:
    """Most memory that this process has held: of the GPU, or resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

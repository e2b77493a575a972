"""What training says of itself: one line per interval on the driver's terminal, and metrics in MLflow."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from ray.actor import ActorHandle
from torch import Tensor

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
        self.started, self.first_step = time.perf_counter(), state.step
        self._clear()

    def _clear(self) -> None:
        self.since, self.steps = time.perf_counter(), 0
        self.places, self.real, self.wait_s = 0, 0, 0.0
        self.sums: dict[str, Tensor] = {}

    @property
    def seconds(self) -> float:
        """Time since this stage began or went on."""
        return time.perf_counter() - self.started

    def say(self, line: str) -> None:
        """Show a line on the driver's terminal."""
        if self.board is not None:
            self.board.add.remote(f"  {self.state.job.stage:<11} {line}")

    def add(self, metrics: dict[str, Tensor], batch: Batch, wait_s: float) -> None:
        """Count one step: its metrics, its batch as it came from the loader, and the time it was waited for."""
        self.steps, self.wait_s = self.steps + 1, self.wait_s + wait_s
        self.places += batch.num_tokens
        self.real += int(batch.source_mask.sum() + batch.target_mask.sum())
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value

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
        own = [*self.sums.values(), *(torch.tensor(float(v)) for v in (self.places, self.real, self.wait_s))]
        device = next(iter(self.sums.values())).device
        *sums, places, real, wait_s = total(torch.stack([v.float().to(device) for v in own])).tolist()
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
            self.tracker.metrics(named | {f"{stage}/perf/{name}": value for name, value in perf.items()}, step)
        self._clear()
        return means


def _memory(device: torch.device) -> float:
    """Most memory that this process has held: of the GPU, or resident."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

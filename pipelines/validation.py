"""Quality on validation rows while a stage trains, and the weights that had the best of it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.checkpoints import Checkpoints
from pipelines.evaluation import answer_rows, score_rows
from pipelines.reporter import Reporter
from pipelines.state import StageState, model_details
from yan_core.checkpoint import CheckpointError, from_pretrained
from yan_core.files import write_file
from yan_core.generator import TextGenerator
from yan_core.model import build_model
from yan_core.parallel import num_workers, total
from yan_core.tasks import get_task

logger = logging.getLogger(__name__)

BEST = "best_"
"""What the weights that had the best quality so far are named by, beside the checkpoints; the step comes after it."""

NUM_SAMPLES = 8
"""Answers of each measurement that are shown."""


class Validation:
    """Measures the weights that a stage would leave, on rows that the workers share, at each number of steps."""

    def __init__(self, state: StageState, rows: Sequence[dict[str, Any]], checkpoints: Checkpoints, rank: int) -> None:
        """Prepare to measure.

        Args:
            state: The stage, which is left as it is.
            rows: Validation rows: `source`, `answers`.
            checkpoints: Where the best weights are kept.
            rank: This worker's.
        """
        self.state, self.checkpoints, self.rank = state, checkpoints, rank
        self.config = state.config.evaluation
        self.seeds = list(range(rank, len(rows), num_workers()))
        self.rows, self.num_rows = [rows[i] for i in self.seeds], len(rows)
        self.metric = get_task(state.config.data.task).metric
        self.device = next(state.model.parameters()).device
        # A model of its own: that of the stage may be sharded, is in training mode, and has no averaged weights.
        copy = build_model(state.config.architecture, state.tokenizer.vocab_size, state.config.seed).to(self.device)
        self.generator = TextGenerator(copy.eval(), state.tokenizer, model_details(state.config))
        held = self._held()
        self.best = held[0] if held else -1.0

    def due(self) -> bool:
        """Whether quality is to be measured after the step just done."""
        every = self.config.every_steps
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.state.settings.max_steps)

    def look(self, reporter: Reporter) -> None:
        """Measure, show and record; keep the weights if they are the best. Every worker must call it."""
        started = time.perf_counter()
        weights = self.state.result()
        self.generator.model.load_state_dict(weights)
        by_steps, samples = self._measure()
        mean = sum(by_steps.values()) / len(by_steps)
        better = mean > self.best
        if better:
            self.best = mean
            if self.rank == 0 and self.config.keep == "best":
                self._keep(weights)
        shown = " ".join(f"{value:.3f}" for value in by_steps.values())
        at = ", ".join(map(str, by_steps))
        reporter.say(f"{self.metric} {shown} at {at} steps{', the best so far' if better else ''}")
        reporter.record({f"{self.metric}_{n}_steps": value for n, value in by_steps.items()} | {self.metric: mean})
        reporter.show_samples(samples)
        reporter.leave_out(time.perf_counter() - started)

    def _measure(self) -> tuple[dict[int, float], list[dict[str, str]]]:
        right: list[float] = []
        samples: list[dict[str, str]] = []
        middle = self.config.num_steps[len(self.config.num_steps) // 2]
        for num_steps in self.config.num_steps:
            answers = answer_rows(self.generator, self.rows, num_steps, self.config, self.seeds)
            right.append(score_rows(self.generator, self.metric, self.rows, answers) * len(answers) if answers else 0.0)
            if num_steps == middle:
                samples = [
                    {"source": row["source"], "target": " | ".join(row["answers"]), "answer": answer}
                    for row, answer in list(zip(self.rows, answers, strict=True))[:NUM_SAMPLES]
                ]
        sums = total(torch.tensor(right, dtype=torch.float32, device=self.device)).tolist()
        return {n: value / self.num_rows for n, value in zip(self.config.num_steps, sums, strict=True)}, samples

    def _keep(self, weights: dict[str, Tensor]) -> None:
        def fill(folder: Path) -> None:
            self.state.save_model(folder / "model", weights)
            write_file(folder / "quality.json", json.dumps({"quality": self.best}))

        name = f"{BEST}{self.state.step:08d}"
        self.checkpoints.write(name, self.state.position, fill)
        for old in self.checkpoints.names(BEST):
            if old != name:
                self.checkpoints.remove(old)

    def _held(self) -> tuple[float, dict[str, Tensor]] | None:
        """Quality and weights of the best of this stage, which an earlier group of workers may have kept."""
        for name in self.checkpoints.names(BEST) if self.config.keep == "best" else []:
            try:
                position = self.checkpoints.verify(name)
                if position.fingerprint != self.state.job.fingerprint:
                    continue  # of another stage
                with self.checkpoints.fetch(name) as folder:
                    quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))["quality"]
                    return quality, from_pretrained(folder / "model")[0].state_dict()
            except CheckpointError as error:
                logger.warning("%s; it is passed over", error)
        return None

    def best_weights(self) -> dict[str, Tensor] | None:
        """The best weights of the stage; None where none were kept. Every worker must call it."""
        if num_workers() > 1:
            torch.distributed.barrier()  # until rank 0 has written them
        held = self._held()
        return held[1] if held else None

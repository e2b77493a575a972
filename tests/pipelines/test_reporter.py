"""What a stage says of itself."""

from types import SimpleNamespace

import pytest
import torch

from pipelines.plan import Job, row_flops
from pipelines.reporter import Reporter
from tests.yan_core.tiny import tiny_batch, tiny_config
from yan_core.config import RunConfig
from yan_core.model import build_model


class Recorded:
    """A tracker that remembers."""

    def __init__(self):
        self.values = {}

    def metrics(self, values, step):
        self.values = values


def reporter_of(stage: str, tracker: Recorded | None = None, **settings) -> Reporter:
    config = RunConfig(model=tiny_config(max_positions=96), **settings)
    state = SimpleNamespace(
        config=config,
        settings=getattr(config.stages, stage),
        job=SimpleNamespace(stage=stage),
        step=4,
        model=build_model(config.model, 20, seed=0),
        tokenizer=SimpleNamespace(vocab_size=20),
    )
    return Reporter(state, None, tracker)


def test_the_share_of_the_peak_is_what_was_computed_in_the_time_it_took():
    tracker = Recorded()
    reporter = reporter_of("finetune", tracker)
    assert reporter.peak_flops is None  # on a CPU
    reporter.peak_flops = 1e9
    batch = tiny_batch(3)
    for num_steps in (1, 4):
        reporter.add({"loss": torch.tensor(2.0), "grad_norm": torch.tensor(1.0)}, batch, num_steps, 0.0)
    reporter.report(lr=1e-3)
    (rows, source), target = batch.source_ids.shape, batch.target_ids.shape[1]
    computed = sum(
        rows * sum(row_flops(Job(tiny_config(max_positions=96), 20, source, target, rows, n, 0, 1))) for n in (1, 4)
    )
    seconds = 2 * tracker.values["finetune/perf/step_ms"] / 1000
    assert tracker.values["finetune/perf/mfu"] * seconds * 1e9 == pytest.approx(computed)
    assert tracker.values["finetune/train/loss"] == 2


def test_time_left_out_is_neither_of_the_interval_nor_of_the_stage():
    reporter = reporter_of("flow", log_every_s=100)
    reporter.since, reporter.started = reporter.since - 150, reporter.started - 150
    assert reporter.due()
    reporter.leave_out(100)
    assert not reporter.due() and reporter.seconds < 100

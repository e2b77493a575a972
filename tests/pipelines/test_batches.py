"""Rows of a step -> its batch: what each kind of model is given to learn."""

from dataclasses import replace

import numpy as np
import pytest

from pipelines.batches import as_rows, make_batch
from pipelines.contestants import CONTESTANTS, entered
from yan_core.batching import EOS, Batch
from yan_core.config import DataConfig, RunConfig

TARGETS = ([7, 8], [9, 10, 11])


def batch_of(family: str, most: int = 12) -> Batch:
    """The fine-tuning batch of two rows, whose targets have two and three tokens; YAN's where no family is named."""
    rows = {
        "source": as_rows(np.arange(20, 28), np.array([0, 5, 8])),
        "target": as_rows(np.concatenate(TARGETS), np.array([0, 2, 5])),
        "epoch": np.zeros(2, np.int64),
        "row": np.arange(2),
    }
    config = replace(RunConfig(), data=DataConfig(max_target_tokens=most))
    own = entered(family or "yan", CONTESTANTS[family or "yan"], config, 10_000)
    return make_batch(own, "finetune", rows, 1)


@pytest.mark.parametrize("family", ["ar", "encoder_decoder"])
@pytest.mark.parametrize("most", [12, 3])
def test_one_that_writes_no_filling_computes_none(family, most):
    """It learns where answers end; places after the end of the longest would cost operations and teach nothing."""
    batch = batch_of(family, most)
    assert batch.target_ids.tolist() == [[7, 8, EOS, EOS][: min(4, most)], [9, 10, 11, EOS][: min(4, most)]]


@pytest.mark.parametrize("family", ["", "masked_diffusion"])
def test_one_that_writes_all_places_at_once_learns_all(family):
    batch = batch_of(family)
    assert batch.target_ids.tolist() == [list(row) + [EOS] * (12 - len(row)) for row in TARGETS]
    assert batch.target_mask.all()

"""What the pictures show."""

import numpy as np
import pytest
import torch

from pipelines.pictures import Journey, draw_paths, draw_usage, follow, straightness, usage_by_position
from tests.yan_core.tiny import randomize, tiny_config
from yan_core.checkpoint import save_pretrained
from yan_core.config import TokenizerConfig
from yan_core.generator import TextGenerator
from yan_core.model import build_model
from yan_core.tokenization import Tokenizer

ROWS = [{"source": f"Mary is in the {room}. Where is Mary?", "target": room} for room in ("kitchen", "garden")]


@pytest.fixture
def folder(tmp_path):
    tokenizer = Tokenizer.train([r["source"] for r in ROWS], TokenizerConfig())
    model = randomize(build_model(tiny_config(num_experts=3), tokenizer.vocab_size, 0))
    details = {"task": "question_answering", "max_source_tokens": 20, "max_target_tokens": 6}
    save_pretrained(tmp_path / "model", model, tokenizer, details)
    return tmp_path / "model", TextGenerator(model.eval(), tokenizer, details)


def test_the_way_ends_where_the_sampler_arrives(folder):
    """The last points decode to the product's own answers."""
    path, generator = folder
    journey = follow(path, ROWS, num_steps=3)
    answers = generator.generate([r["source"] for r in ROWS], 3, seeds=[0, 1])
    ids, _ = generator.model.decoder.read(journey.points[-1])
    points = journey.points
    assert points.shape[:3] == (4, 2, 6) and journey.expert.shape == (2, 6)
    assert [generator.tokenizer.until_eos(row) for row in ids.tolist()] == [a.tokens for a in answers]
    assert journey.real.sum(-1).tolist() == [2, 2]  # the word and the end of text


def journey_of(points, expert, num_experts=2) -> Journey:
    real = torch.ones(expert.shape, dtype=torch.bool)
    return Journey(points, torch.randn(points.shape[1:]), expert, real, num_experts)


def test_usage_is_a_share_of_each_place():
    expert = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 1], [0, 1, 0]])
    usage = usage_by_position(journey_of(torch.randn(2, 4, 3, 5), expert))
    np.testing.assert_allclose(usage, [[1, 0.25, 0.25], [0, 0.75, 0.75]])


def test_straightness_is_zero_on_a_line_and_half_on_a_right_angle():
    start, end = torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0.0]]])
    expert = torch.zeros(1, 1, dtype=torch.int64)
    line = torch.stack([start, (start + end) / 2, end])
    assert straightness(journey_of(line, expert)) == pytest.approx(0, abs=1e-6)
    bent = torch.stack([start, torch.tensor([[[1.0, 3.0]]]), end])
    assert straightness(journey_of(bent, expert)) == pytest.approx((0 + 3 + 0) / 3 / 2)


def test_pictures_are_drawn(folder, tmp_path):
    journey = follow(folder[0], ROWS)
    for name, draw in (("usage", draw_usage), ("paths", draw_paths)):
        draw(journey).savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 3000

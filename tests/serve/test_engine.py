"""The engine without HTTP: batches, limits, failures."""

import subprocess
import sys

import pytest

from serve.engine import FAILURES_ALLOWED, Engine
from serve.schemas import FieldError, GenerateRequest
from tests.serve.conftest import save_tiny
from yan_core.checkpoint import CheckpointError
from yan_core.config import BaselineConfig
from yan_core.generator import Generation

WORDS = "Mary John went took the apple kitchen garden to . Where is ?".split()


@pytest.fixture(scope="module")
def engine(model_folder):
    return Engine(model_folder, max_batch_size=4, max_source_chars=200)


def requests(count: int) -> list[GenerateRequest]:
    """Requests of different lengths, seeds, steps and limits."""
    return [
        GenerateRequest(
            source=" ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 9)),
            seed=1000 * i,
            num_steps=(None, 1, 5)[i % 3],
            max_tokens=(None, 8)[i % 2],
        )
        for i in range(count)
    ]


def test_ready_only_after_a_generation(model_folder):
    engine = Engine(model_folder, max_batch_size=2)
    assert not engine.ready
    assert engine.warm_up() > 0
    assert engine.ready


def test_a_batch_answers_in_order_as_each_request_alone(engine):
    batch = requests(24)
    together = engine.generate(batch)
    for request, answer in zip(batch, together, strict=True):
        (alone,) = engine.generate([request])
        assert isinstance(answer, Generation)
        assert isinstance(alone, Generation)
        assert answer.tokens == alone.tokens
        assert answer.text == alone.text
        assert answer.nfe == answer.num_steps == (request.num_steps or 3)
        assert len(answer.tokens) <= (request.max_tokens or 4)
    assert len({tuple(answer.tokens) for answer in together}) > 12  # or equality would say little


def test_the_seed_matters(engine):
    answers = engine.generate([GenerateRequest(source="Where is Mary?", seed=seed) for seed in range(16)])
    assert len({answer.text for answer in answers}) > 1


def test_a_long_source_is_cut_and_the_cut_counted(engine):
    (answer,) = engine.generate([GenerateRequest(source="Mary " * 39 + "Mary")])
    assert (answer.source_tokens, answer.source_tokens_cut) == (32, 8)


@pytest.mark.parametrize(
    ("request_", "field", "message"),
    [
        (GenerateRequest(source="a", max_tokens=65), "max_tokens", r"max_tokens must be a whole number in \[1, 64\]"),
        (GenerateRequest(source="a" * 201), "source", "at most 200 characters, got 201"),
    ],
)
def test_limits_of_the_model_spare_the_neighbours(engine, request_, field, message):
    with pytest.raises(FieldError, match=message) as caught:
        engine.check(request_)
    assert caught.value.field == field
    good = GenerateRequest(source="Where is Mary?")
    before, wrong, after = engine.generate([good, request_, good])
    assert isinstance(wrong, FieldError)
    assert before.text == after.text


def test_a_failing_request_spares_its_neighbours(engine, monkeypatch):
    real = engine.generator.generate

    def generate(sources, *rest):
        if "poison" in sources:
            raise RuntimeError("poisoned")
        return real(sources, *rest)

    monkeypatch.setattr(engine.generator, "generate", generate)
    good = GenerateRequest(source="Where is Mary?", seed=5)
    before, wrong, after = engine.generate([good, GenerateRequest(source="poison"), good])
    assert str(wrong) == "poisoned"
    assert before.text == after.text == real(["Where is Mary?"], 3, None, [5])[0].text


def test_an_engine_that_only_fails_is_not_ready(model_folder, monkeypatch):
    engine = Engine(model_folder, max_batch_size=2)
    engine.warm_up()
    real = engine.generator.generate
    request = GenerateRequest(source="Where is Mary?")

    def lost(*rest):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine.generator, "generate", lost)
    for _ in range(FAILURES_ALLOWED):
        assert engine.ready
        engine.generate([request])
    assert not engine.ready
    with pytest.raises(RuntimeError, match="test generation of batch size 1 failed: RuntimeError: device lost"):
        engine.warm_up()
    monkeypatch.setattr(engine.generator, "generate", real)
    engine.generate([request])
    assert engine.ready


def test_requests_that_are_refused_do_not_count_as_failures(model_folder):
    engine = Engine(model_folder, max_batch_size=2)
    engine.warm_up()
    for _ in range(FAILURES_ALLOWED + 1):
        engine.generate([GenerateRequest(source="a", max_tokens=65)])
    assert engine.ready


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a YAN model"):
        Engine(tmp_path)


def test_the_engine_knows_nothing_of_http_ray_or_pipelines():
    code = "import sys, serve.engine; print([m for m in ('ray', 'fastapi', 'mlflow', 'pipelines') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_baseline_is_served_within_its_own_limits(tmp_path):
    """Its positions hold source and answer together; asking for more is refused and does no harm to others."""
    shape = BaselineConfig(family="masked_diffusion", d_model=16, num_blocks=1, max_positions=48)
    engine = Engine(save_tiny(tmp_path / "model", max_source_tokens=32, architecture=shape), max_batch_size=2)
    engine.warm_up()
    for _ in range(FAILURES_ALLOWED + 1):
        with pytest.raises(FieldError, match=r"max_tokens must be a whole number in \[1, 15\], got 16"):
            engine.check(GenerateRequest(source="Where?", max_tokens=16))
        assert isinstance(engine.generate([GenerateRequest(source="Where?", max_tokens=15)])[0], Generation)
    assert engine.ready

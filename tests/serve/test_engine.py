"""The engine without HTTP: batches, limits, failures."""

import subprocess
import sys
from dataclasses import replace

import pytest

import yan_core
from serve.engine import FAILURES_ALLOWED, Cancelled, Engine, Job, Settings
from serve.errors import FieldError
from tests.serve.conftest import TINY, engine_of, save_tiny
from yan_core.checkpoint import CheckpointError
from yan_core.config import BaselineConfig, SamplingConfig
from yan_core.generator import Drawn
from yan_core.tokenization import Encoding

WORDS = "Mary John went took the apple kitchen garden to . Where is ?".split()
PLAIN = Settings(num_steps=3, max_tokens=4)
TWO, MANY = SamplingConfig(num_candidates=2), SamplingConfig(num_candidates=32)


@pytest.fixture(scope="module")
def engine(model_folder):
    return engine_of(model_folder, max_batch_size=4, max_source_chars=200)


def job(engine: Engine, source: str = "Where is Mary?", seed: int = 0, settings: Settings = PLAIN) -> Job:
    return Job(engine.generator.encode([source])[0], seed, settings)


def tokens(answer: Drawn | Exception) -> list[int]:
    assert isinstance(answer, Drawn)
    return answer.candidates[0].tokens


def test_ready_only_after_a_generation(model_folder):
    engine = engine_of(model_folder, max_batch_size=2)
    assert not engine.ready
    assert engine.warm_up(3) > 0
    assert engine.ready


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_batch_answers_in_order_as_each_job_alone(engine, deterministic):
    settings = replace(PLAIN, max_tokens=8, deterministic=deterministic)
    jobs = [
        job(engine, " ".join(WORDS[(i + j) % len(WORDS)] for j in range(1 + i % 9)), 1000 * i, settings)
        for i in range(24)
    ]
    together = [tokens(answer) for answer in engine.draw(jobs)]
    assert together == [tokens(engine.draw([one])[0]) for one in jobs]
    assert len(set(map(tuple, together))) > 12  # or equality would say little


def test_the_seed_matters(engine):
    answers = engine.draw([job(engine, seed=seed) for seed in range(16)])
    assert len({tuple(tokens(answer)) for answer in answers}) > 1


@pytest.mark.parametrize(
    ("source", "change", "field", "message"),
    [
        ("a", {"max_tokens": 65}, "max_tokens", r"max_tokens must be a whole number in \[1, 64\], got 65"),
        ("a" * 201, {}, "source", "at most 200 characters, got 201"),
        (
            "a",
            {"sampling": MANY, "max_tokens": 64},
            "num_candidates",
            "num_candidates: .* take 2080 tokens, .* at most 2000",
        ),
    ],
)
def test_limits_of_the_model(model_folder, source, change, field, message):
    engine = engine_of(model_folder, max_source_chars=200, max_batch_tokens=2000)
    engine.check(["a"], PLAIN)
    with pytest.raises(FieldError, match=message) as caught:
        engine.check([source], replace(PLAIN, **change))
    assert caught.value.param == field


def test_a_solver_that_the_model_cannot_take_is_refused(tmp_path):
    engine = engine_of(save_tiny(tmp_path / "model", architecture=replace(TINY, prediction="endpoint")))
    with pytest.raises(FieldError, match="method must be euler or midpoint"):
        engine.check(["a"], replace(PLAIN, sampling=SamplingConfig(method="heun")))
    engine.check(["a"], replace(PLAIN, sampling=SamplingConfig(method="midpoint")))


def test_every_step_is_shown_to_the_job_that_wants_it(engine):
    seen: list[tuple[int, list[int]]] = []
    wanted, other = (job(engine, settings=replace(PLAIN, follow=True, sampling=TWO), seed=s) for s in (1, 2))
    wanted.on_step = lambda step, candidates: seen.append((step, candidates[1].tokens))
    answer, _ = engine.draw([wanted, other])
    assert [step for step, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == next(c.tokens for c in answer.candidates if c.number == 1)


def test_a_batch_that_nobody_waits_for_stops_at_its_next_step(engine, monkeypatch):
    engine.warm_up(3)
    passes = 0
    trunk = engine.generator.model.flow.trunk

    def counted(*args, **kwargs):
        nonlocal passes
        passes += 1
        jobs[passes % 2].cancelled = True  # by the second pass both are
        return trunk(*args, **kwargs)

    monkeypatch.setattr(engine.generator.model.flow, "trunk", counted)
    jobs = [job(engine, settings=replace(PLAIN, num_steps=64), seed=seed) for seed in range(2)]
    assert [type(answer) for answer in engine.draw(jobs)] == [Cancelled, Cancelled]
    assert passes == 2
    assert engine.ready


def test_by_graphs_every_usual_shape_is_known_before_the_first_request(model_folder):
    engine = engine_of(model_folder, max_batch_size=6)
    engine.generator = yan_core.load(model_folder, use_graphs=True)
    graphs = engine.generator.graphs
    assert graphs is not None
    engine.warm_up(3)
    known = len(graphs)
    assert known == 4 * 2  # 1, 2, 4 or 8 rows of 16 or 32 tokens, of which the model reads as many
    usual = Settings(num_steps=3, max_tokens=engine.generator.max_target_tokens)
    for size in range(1, 7):
        for length in (1, 16, 17, 32):
            engine.draw([Job(Encoding([5] * length, 0), 0, usual)] * size)
    assert len(graphs) == known <= graphs.capacity
    engine.draw([Job(Encoding([5], 0), 0, replace(usual, num_steps=4))])
    assert len(graphs) == known + 1


def test_a_failing_job_spares_its_neighbours(engine, monkeypatch):
    real = engine.generator.draw

    def draw(encodings, *rest, **how):
        if any(encoding.num_cut == 13 for encoding in encodings):
            raise RuntimeError("poisoned")
        return real(encodings, *rest, **how)

    monkeypatch.setattr(engine.generator, "draw", draw)
    good = job(engine, seed=5)
    before, wrong, after = engine.draw([good, Job(Encoding([5], 13), 0, PLAIN), good])
    assert str(wrong) == "poisoned"
    assert tokens(before) == tokens(after) == real([good.encoding], seeds=5)[0].candidates[0].tokens


def test_an_engine_that_only_fails_is_not_ready(model_folder, monkeypatch):
    engine = engine_of(model_folder, max_batch_size=2)
    engine.warm_up(3)
    real = engine.generator.draw

    def lost(*rest, **how):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine.generator, "draw", lost)
    for _ in range(FAILURES_ALLOWED):
        assert engine.ready
        engine.draw([job(engine)])
    assert not engine.ready
    with pytest.raises(RuntimeError, match="test generation of batch size 1 failed: RuntimeError: device lost"):
        engine.warm_up(3)
    monkeypatch.setattr(engine.generator, "draw", real)
    engine.draw([job(engine)])
    assert engine.ready


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a YAN model"):
        engine_of(tmp_path)


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("serve.engine", ("ray", "fastapi", "starlette", "mlflow", "pipelines")),
        ("serve.served_model", ("ray", "fastapi", "starlette", "mlflow", "pipelines")),
        ("serve.routes", ("ray", "mlflow", "pipelines")),
    ],
)
def test_only_the_app_needs_ray_and_the_engine_knows_nothing_of_http(module, never):
    code = f"import sys, {module}; print([m for m in {never!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_baseline_is_served_within_its_own_limits(tmp_path):
    """Its positions hold source and answer together; it answers greedily, and asking it for more is refused."""
    shape = BaselineConfig(family="masked_diffusion", d_model=16, num_blocks=1, max_positions=48)
    engine = engine_of(save_tiny(tmp_path / "model", max_source_tokens=32, architecture=shape), max_batch_size=2)
    engine.warm_up(3)
    with pytest.raises(FieldError, match=r"max_tokens must be a whole number in \[1, 15\], got 16"):
        engine.check(["Where?"], replace(PLAIN, max_tokens=16))
    guided = SamplingConfig(guidance_scale=2.0)
    for change in ({"sampling": TWO}, {"follow": True}, {"sampling": guided}, {"with_log_probs": True}):
        with pytest.raises(FieldError, match="is for YAN alone"):
            engine.check(["Where?"], replace(PLAIN, **change))
    (answer,) = engine.draw([job(engine, settings=replace(PLAIN, max_tokens=15))])
    assert isinstance(answer, Drawn) and answer.candidates[0].experts == []

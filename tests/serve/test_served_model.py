"""A model behind its queue, without HTTP."""

import asyncio

from serve.engine import Settings
from serve.metrics import Metrics
from serve.served_model import Answer, Pools, ServedModel, Step
from tests.serve.conftest import engine_of


def test_the_queue_of_a_version_is_told_while_one_of_its_aliases_is_left(model_folder):
    metrics, pools, line = Metrics("one"), Pools(), b'yan_queue_size{model="quiz/7",replica="one"} 0.0'
    champion, best = (ServedModel("quiz/7", engine_of(model_folder), metrics, 8, pools) for _ in range(2))
    champion.retire()
    champion.retire()
    assert line in metrics.text()
    best.retire()
    assert line not in metrics.text()


def test_steps_of_a_batch_that_fails_and_is_drawn_one_by_one_are_told_once(model_folder, monkeypatch):
    engine = engine_of(model_folder)
    engine.warm_up(3)
    real, pools = engine.generator.draw, Pools()

    def draw(encodings, *rest, on_step, **how):
        def fails(chosen, step, read):
            on_step(chosen, step, read)
            if len(encodings) > 1 and step == 2:
                raise RuntimeError("poisoned")

        return real(encodings, *rest, on_step=fails, **how)

    async def run() -> tuple[list[Step | Answer], list[Answer]]:
        model = ServedModel("tiny", engine, Metrics("one"), 8, pools)
        settings = Settings(num_steps=4, max_tokens=4, follow=True)
        monkeypatch.setattr(engine.generator, "draw", draw)
        followed, other = [await model.ask(["Where is Mary?"], [seed], settings, 30) for seed in (1, 2)]
        news = [one async for one in followed.follow()]
        return news, await other.answers()

    (*steps, answer), (other,) = asyncio.run(run())
    assert [step.number for step in steps if isinstance(step, Step)] == [1, 2, 3, 4]
    for told in (answer, other):
        assert isinstance(told, Answer)
        assert [step.number for step in told.steps] == [1, 2, 3, 4]
        assert told.batch_size == 2  # they were together
    assert answer.steps == steps

"""Loads against a server of the test's own: every request is sent when it is due and counted as what it became."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from aiohttp import web

from pipelines.benchmarks.load import Load, Sample, closed_loop, open_loop
from pipelines.benchmarks.serving import overload


class Counting:
    """Answers after a while; refuses what is more than `room` at once; a body may ask for another status."""

    def __init__(self) -> None:
        self.wait_s, self.room, self.now, self.most, self.seen = 0.02, 1000, 0, 0, 0

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.seen += 1
        if "status" in body:
            return web.json_response({}, status=body["status"])
        if self.now >= self.room:
            return web.json_response({}, status=503)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.wait_s)
        self.now -= 1
        return web.json_response({"text": "", "batch_size": 3, "latency_ms": 2.5, "model": "m"})


@pytest.fixture
def served() -> Iterator[tuple[Counting, str]]:
    counting, loop, ready = Counting(), asyncio.new_event_loop(), threading.Event()
    found: list[str] = []
    app = web.Application()
    app.router.add_post("/", counting.answer)
    runner = web.AppRunner(app)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        found.append("http://{}:{}/".format(*runner.addresses[0]))
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield counting, found[0]
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_clients_of_a_closed_loop_have_one_request_each(served):
    counting, url = served
    load = closed_loop(url, lambda i: {"i": i}, 4, 0.5)
    assert counting.most == 4 and len(load.samples) == counting.seen
    assert load.summary()["statuses"] == {"200": counting.seen} and load.summary()["mean_batch_size"] == 3
    assert load.summary()["server_p50_ms"] == 2.5
    assert min(s.latency_s for s in load.samples) >= 0.02


def test_an_open_loop_does_not_wait_for_answers(served):
    counting, url = served
    counting.wait_s = 0.5
    first, second = open_loop(url, lambda i: {}, [(100, 0.4), (20, 0.5)])
    assert counting.most > 20  # in a closed loop of one client it would be one
    assert 20 <= len(first.samples) <= 60 and 3 <= len(second.samples) <= 20
    assert all(s.at_s < 0.4 for s in first.samples) and all(0.4 <= s.at_s < 0.9 for s in second.samples)


def test_refusals_and_silence_are_counted_apart(served):
    _, url = served
    load = closed_loop(url, lambda i: {"status": 503} if i % 2 else {"status": 500}, 1, 0.5)
    assert set(load.summary()["statuses"]) == {"500", "503"} and load.summary()["p50_ms"] is None
    silent = closed_loop("http://127.0.0.1:9/", lambda i: {}, 1, 0.05)
    assert set(silent.summary()["statuses"]) == {"0"}


def test_quantiles_and_goodput_are_those_of_the_answers():
    load = Load([Sample(0, i / 1000, 200) for i in range(1, 101)] + [Sample(0, 9.0, 503)] * 50, 10.0)
    assert (load.latency_ms(0.5), load.latency_ms(0.99)) == (51, 100)
    told = load.summary(limit_ms=80)
    assert (told["answers_per_s"], told["goodput_per_s"]) == (10.0, 8.0)


def test_an_overload_is_told_by_its_errors_its_latency_and_the_time_after_it(served, monkeypatch):
    counting, url = served
    counting.room = 4  # four at once, 20 ms each: 200 a second
    monkeypatch.setattr("pipelines.benchmarks.serving.RECOVERY_S", 1.0)
    found = overload(url, lambda i: {}, 160.0, 2.0, 2.0, 2.0)
    assert found["errors_other_than_503"] == 0
    assert found["over"]["statuses"]["503"] > 20 and found["p99_ratio"] < 3
    counting.room = 1000
    found = overload(url, lambda i: {"status": 500} if i == 100 else {}, 100.0, 1.0, 1.0, 1.0)
    assert found["errors_other_than_503"] == 1

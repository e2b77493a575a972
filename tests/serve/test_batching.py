"""The queue and its batches, over a sampler that is a stand-in: what is batched, refused, given up, in which order."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from weakref import WeakSet

import pytest

from serve.batching import Batcher, Result, Ticket
from serve.engine import Job, Settings
from serve.errors import Overloaded
from yan_core.generator import Candidate, Drawn
from yan_core.tokenization import Encoding

PLAIN = Settings(num_steps=3, max_tokens=4)


def job(length: int = 5, settings: Settings = PLAIN, seed: int = 0) -> Job:
    return Job(Encoding([7] * length, 0), seed, settings)


class Sampler:
    """Answers a job with its seed; can be held up; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[Job]] = []
        self.free = threading.Event()
        self.free.set()
        self.error: Exception | None = None

    def draw(self, jobs: Sequence[Job]) -> list[Drawn | Exception]:
        self.batches.append(list(jobs))
        assert self.free.wait(10)
        if self.error:
            return [self.error] * len(jobs)
        return [Drawn([Candidate([one.seed], [0], True)], 3) for one in jobs]


@pytest.fixture
def sampler():
    return Sampler()


def batcher(sampler: Sampler, **limits: int) -> Batcher:
    usual = {"max_batch_size": 4, "max_batch_tokens": 1000, "max_queued": 8}
    return Batcher(sampler.draw, ThreadPoolExecutor(1), **{**usual, **limits})


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


async def busy(queue: Batcher, sampler: Sampler) -> Ticket:
    """Hold the sampler up with a first job."""
    sampler.free.clear()
    ticket, before = queue.submit([job()], 10), len(sampler.batches)
    await until(lambda: len(sampler.batches) > before)
    return ticket


def seeds(results: list[Result]) -> list[int]:
    return [result.drawn.candidates[0].tokens[0] for result in results]


def sizes(sampler: Sampler) -> list[int]:
    return [len(batch) for batch in sampler.batches]


def test_a_lone_job_is_drawn_at_once_and_what_comes_meanwhile_goes_together(sampler):
    async def run():
        queue, begun = batcher(sampler), time.perf_counter()
        first = await busy(queue, sampler)
        await asyncio.sleep(time.perf_counter() - begun)  # it is drawn for longer than it can have waited
        tickets = [queue.submit([job(seed=i)], 10) for i in range(6)]
        assert queue.queued == 6
        sampler.free.set()
        assert [seeds(await ticket.results()) for ticket in tickets] == [[i] for i in range(6)]
        (result,) = await first.results()
        assert result.batch_size == 1 and result.draw_s > 0 and result.queue_s < result.draw_s
        assert result.queue_s + result.draw_s <= time.perf_counter() - begun  # the wait ends where the drawing begins
        assert queue.queued == 0

    asyncio.run(run())
    assert sizes(sampler) == [1, 4, 2]


def test_a_full_batch_is_drawn_right_behind_the_one_before_it_and_another_one_may_grow_until_then(sampler):
    async def run():
        queue = batcher(sampler)
        for count, drawn in ((4, 2), (3, 1)):  # a batch has room for four
            before = len(sampler.batches)
            first = await busy(queue, sampler)
            tickets = [queue.submit([job(seed=i)], 10) for i in range(count)]
            await asyncio.sleep(0.01)
            assert queue.queued == count
            sampler.free.set()
            time.sleep(0.2)  # HTTP is at work, so that nobody could hand over a batch
            assert len(sampler.batches) - before == drawn
            for ticket in (first, *tickets):
                await ticket.results()
            assert queue.queued == 0 and not queue.busy

    asyncio.run(run())


def test_jobs_given_up_behind_another_batch_free_their_places(sampler):
    async def run():
        queue = batcher(sampler, max_queued=4)
        first = await busy(queue, sampler)
        tickets = [queue.submit([job(seed=i)], 10) for i in range(4)]
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="4 of at most 4 texts wait"):
            queue.submit([job()], 10)
        for ticket in tickets:
            ticket.close()
        assert queue.queued == 0
        last = queue.submit([job(seed=9)], 10)
        sampler.free.set()
        assert seeds(await first.results()) == [0] and seeds(await last.results()) == [9]
        assert all(one.cancelled for one in sampler.batches[1])

    asyncio.run(run())


def test_jobs_of_one_turn_of_the_loop_go_together(sampler):
    async def run():
        queue = batcher(sampler)
        tickets = [queue.submit([job(seed=i), job(seed=10 + i)], 10) for i in range(2)]
        assert [seeds(await ticket.results()) for ticket in tickets] == [[0, 10], [1, 11]]

    asyncio.run(run())
    assert sizes(sampler) == [4]


def test_a_batch_has_one_way_of_drawing_and_is_of_the_oldest_job_s_bucket_before_others_that_are_near(sampler):
    other = replace(PLAIN, num_steps=5)
    jobs = [job(5), job(40), job(16), job(17), job(64), job(5, other), job(33), job(1)]

    async def run():
        queue = batcher(sampler)
        await busy(queue, sampler)
        tickets = [queue.submit([one], 10) for one in jobs]
        sampler.free.set()
        for ticket in tickets:
            await ticket.results()

    asyncio.run(run())
    lengths = [[len(one.encoding.ids) for one in batch] for batch in sampler.batches[1:]]
    assert lengths == [[5, 16, 1, 17], [40, 64, 33], [5]]
    assert sampler.batches[-1] == [jobs[5]]


def test_at_most_half_of_a_batch_is_padding(sampler):
    # With four places to be written: jobs of 16 + 4, 64 + 4 and 512 + 4 places.
    async def run(*lengths: int):
        queue = batcher(sampler, max_batch_tokens=2000)
        await busy(queue, sampler)
        sampler.batches.clear()
        tickets = [queue.submit([job(length)], 10) for length in lengths]
        sampler.free.set()
        for ticket in tickets:
            await ticket.results()
        return [[len(one.encoding.ids) for one in batch] for batch in sampler.batches]

    assert asyncio.run(run(5, 64)) == [[5, 64]]  # 2 * 68 places, 20 + 68 real
    assert asyncio.run(run(5, 5, 5, 64)) == [[5, 5, 5], [64]]  # 4 * 68 places, 3 * 20 + 68 real
    assert asyncio.run(run(512, 64, 5)) == [[512, 64], [5]]  # 2 * 516 and 516 + 68


def test_a_batch_keeps_within_its_budget_of_tokens_but_for_a_job_that_is_more_by_itself(sampler):
    async def run():
        queue = batcher(sampler, max_batch_tokens=50)  # a job of 5 tokens: 16 with its padding, and 4 to be written
        await busy(queue, sampler)
        tickets = [queue.submit([job(seed=i)], 10) for i in range(5)]
        tickets.append(queue.submit([job(100)], 10))
        sampler.free.set()
        for ticket in tickets:
            await ticket.results()

    asyncio.run(run())
    assert sizes(sampler) == [1, 2, 2, 1, 1]


def test_deterministic_jobs_are_drawn_one_by_one(sampler):
    async def run():
        queue = batcher(sampler)
        ticket = queue.submit([job(settings=replace(PLAIN, deterministic=True), seed=i) for i in range(3)], 10)
        assert seeds(await ticket.results()) == [0, 1, 2]

    asyncio.run(run())
    assert sizes(sampler) == [1, 1, 1]


def test_a_full_queue_refuses_at_once_and_takes_a_request_as_a_whole_or_not(sampler):
    async def run():
        queue = batcher(sampler, max_queued=4)
        await busy(queue, sampler)
        kept = queue.submit([job()] * 3, 10)
        with pytest.raises(Overloaded, match="the queue is full: 3 of at most 4") as caught:
            queue.submit([job()] * 2, 10)
        assert caught.value.status == 503 and caught.value.code == "queue_full"
        assert int(caught.value.headers["Retry-After"]) >= 1
        assert queue.queued == 3
        last = queue.submit([job()], 10)
        sampler.free.set()
        await kept.results()
        await last.results()

    asyncio.run(run())


def test_the_wait_for_other_models_that_share_the_thread_counts(sampler):
    async def run():
        beside, executor = WeakSet[Batcher](), ThreadPoolExecutor(1)
        queue, other = (
            Batcher(sampler.draw, executor, max_batch_size=4, max_batch_tokens=1000, max_queued=8, beside=beside)
            for _ in range(2)
        )
        for each in (queue, other):
            each._learn(1000 / 3)  # a batch takes a thousand seconds
        tickets = [await busy(other, sampler)]
        assert queue.expected_wait_s == pytest.approx(1000, abs=30)
        with pytest.raises(Overloaded, match="longer than this request can wait"):
            queue.submit([job()], 1500)
        tickets += [other.submit([job()], 10_000) for _ in range(8)]
        await until(lambda: other.queued == 8 and len(other._drawing) == 2)
        # One that is drawn and a full one behind it; of one more only where there is one of ours to take turns with.
        assert queue.expected_wait_s == pytest.approx(2000, abs=30)
        tickets.append(queue.submit([job()], 10_000))
        assert queue.expected_wait_s == pytest.approx(4000, abs=30)
        await until(lambda: queue._drawing)
        assert queue._drawing[0].begun is None  # handed over, and behind the other's
        assert queue.expected_wait_s == pytest.approx(3000, abs=30)
        sampler.free.set()
        for ticket in tickets:
            await ticket.results()

    asyncio.run(run())


def test_an_answer_that_would_be_begun_in_time_and_not_done_is_refused(sampler):
    async def run():
        queue, long = batcher(sampler), job(settings=replace(PLAIN, num_steps=64))
        queue._learn(100)
        first = await busy(queue, sampler)
        with pytest.raises(Overloaded, match="longer than this request can wait") as told:
            queue.submit([long], 3000)
        assert told.value.code == "deadline_exceeded"
        one_by_one = replace(PLAIN, deterministic=True)
        with pytest.raises(Overloaded, match="longer than this request can wait"):
            queue.submit([job(settings=one_by_one)] * 8, 2000)
        second = queue.submit([job()], 3000)
        sampler.free.set()
        await first.results()
        await second.results()
        await queue.submit([long], 3000).results()  # a model that is free tries

    asyncio.run(run())


def test_what_would_not_be_done_in_time_is_refused_at_once(sampler):
    async def run():
        queue = batcher(sampler)
        first = await busy(queue, sampler)
        await asyncio.sleep(0.1)
        sampler.free.set()
        await first.results()  # a job takes a tenth of a second
        first = await busy(queue, sampler)
        second = queue.submit([job()], 10)
        assert queue.expected_wait_s > 0.09
        with pytest.raises(Overloaded, match="longer than this request can wait"):
            queue.submit([job()], 0.05)
        sampler.free.set()
        await first.results()
        await second.results()

    asyncio.run(run())


def test_a_wait_is_told_by_batches_and_passes(sampler):
    async def run():
        queue = batcher(sampler, max_queued=50)
        first = await busy(queue, sampler)
        await asyncio.sleep(0.1)
        sampler.free.set()
        (result,) = await first.results()
        pass_s = result.draw_s / 3
        await busy(queue, sampler)
        running_s = queue.expected_wait_s
        assert running_s <= 3 * pass_s
        long = [job(64, replace(PLAIN, max_tokens=64)) for _ in range(5)]  # two batches of 4
        tickets = [queue.submit(long, 10), queue.submit([job(settings=replace(PLAIN, num_steps=10))], 10)]
        assert queue.expected_wait_s == pytest.approx(running_s + (2 * 3 + 10) * pass_s, abs=0.05)
        for ticket in tickets:
            ticket.close()
        assert queue.expected_wait_s <= running_s
        sampler.free.set()

    asyncio.run(run())


def test_a_deadline_ends_the_wait_and_frees_the_place(sampler):
    async def run():
        queue = batcher(sampler)
        await busy(queue, sampler)
        late = queue.submit([job()], 0.02)
        assert queue.queued == 1
        with pytest.raises(Overloaded, match="not done by its deadline") as caught:
            await late.results()
        assert (caught.value.status, caught.value.code) == (503, "deadline_exceeded")
        assert queue.queued == 0
        sampler.free.set()

    asyncio.run(run())
    assert sizes(sampler) == [1]


def test_a_request_that_is_given_up_frees_its_places_and_stops_its_batch(sampler):
    async def run():
        queue = batcher(sampler)
        running = asyncio.create_task((await busy(queue, sampler)).results())
        waiting = asyncio.create_task(queue.submit([job(), job()], 10).results())
        await asyncio.sleep(0)
        assert queue.queued == 2
        for task in (waiting, running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert queue.queued == 0
        assert sampler.batches[0][0].cancelled
        sampler.free.set()
        assert seeds(await queue.submit([job(seed=9)], 10).results()) == [9]

    asyncio.run(run())
    assert sizes(sampler) == [1, 1]


def test_an_error_reaches_the_one_who_asked_and_the_queue_goes_on(sampler):
    async def run():
        queue = batcher(sampler)
        sampler.error = KeyError("broken")
        with pytest.raises(KeyError, match="broken"):
            await queue.submit([job(), job()], 10).results()
        sampler.error = None
        assert seeds(await queue.submit([job(seed=1)], 10).results()) == [1]

    asyncio.run(run())

"""The bounded queue before the model, and the batches made of it.

There is no wait for company: a batch is whatever waits when the model is free, so a lone request starts at once, and
under load batches grow by themselves. One that could not grow any more is made before the model is free, so that it
goes on without asking. Lengths come in buckets, so that shapes are few (CUDA graphs want that). A batch is of the
oldest job's bucket first; what room is left, jobs of other buckets take while at most half of the batch is padding,
since a pass over some more places costs less than a pass of its own. A budget of tokens makes batches of long texts
small.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from weakref import WeakSet

from serve.engine import Job, Kind, Settings
from serve.errors import Overloaded
from yan_core.generator import Drawn

Draw = Callable[[Sequence[Job]], list[Drawn | Exception]]
"""Answers a batch of jobs, in a thread."""
Observe = Callable[[Sequence[Job], float], None]
"""Told of each batch that was drawn, and the seconds it took."""


@dataclass(frozen=True)
class Result:
    """What became of a job.

    Attributes:
        drawn: Its answers.
        queue_s: Time it waited.
        draw_s: Time its batch took.
        batch_size: Jobs of its batch.
    """

    drawn: Drawn
    queue_s: float
    draw_s: float
    batch_size: int


@dataclass(eq=False)
class _Waiting:
    job: Job
    done: asyncio.Future[Result]
    since: float = field(default_factory=time.perf_counter)


@dataclass(eq=False)
class _Drawing:
    entries: list[_Waiting]
    begun: float | None = None
    """When the thread took it up, which first ends what it has of other models."""

    @property
    def nfe(self) -> int:
        """Its trunk passes."""
        return self.entries[0].job.kind.nfe


class Batcher:
    """A queue of one model; all but `Draw` runs on one event loop."""

    def __init__(
        self,
        draw: Draw,
        executor: Executor,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        max_queued: int,
        observe: Observe = lambda jobs, seconds: None,
        beside: WeakSet[Batcher] | None = None,
    ) -> None:
        """Make an empty queue.

        Args:
            draw: See `Draw`; it gives errors back, and raises none.
            executor: Where it runs; of one thread, since batches beside each other would slow each other down.
            max_batch_size: Most jobs of a batch.
            max_batch_tokens: Most tokens of a batch of two jobs or more.
            max_queued: Most jobs that wait.
            observe: See `Observe`.
            beside: The queues of the same executor, which take turns; this one is added once it has work.
        """
        self._draw, self._executor, self._observe = draw, executor, observe
        self.max_batch_size, self.max_batch_tokens, self.max_queued = max_batch_size, max_batch_tokens, max_queued
        self._waiting: dict[_Waiting, None] = {}  # in order of arrival, and any one is taken out at once
        self._drawing: list[_Drawing] = []  # the batch that is drawn, and a full one that comes next
        self._kinds: Counter[Kind] = Counter()  # of those that wait
        self._seconds_per_pass = 0.0
        self._beside = WeakSet[Batcher]() if beside is None else beside

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return len(self._waiting) + sum(not entry.done.done() for batch in self._drawing[1:] for entry in batch.entries)

    @property
    def busy(self) -> bool:
        """Whether there is work."""
        return bool(self._waiting or self._drawing)

    @property
    def expected_wait_s(self) -> float:
        """How long a new job will wait, by the speed of the latest batches: here, and for the turns of other queues.

        By trunk passes and not by tokens: a pass over few tokens takes about as long as one over some more.
        """
        begun_s, waiting_s = self._work_s()
        others = [queue._work_s() for queue in self._beside if queue is not self]
        return begun_s + waiting_s + sum(begun + min(waiting, waiting_s) for begun, waiting in others)

    def _work_s(self) -> tuple[float, float]:
        """How long batches that are made, and what waits for one, will take."""
        totals: dict[Settings, tuple[int, Kind]] = {}  # how many, and the longest of them
        for kind, count in self._kinds.items():
            before, longest = totals.get(kind.settings, (0, kind))
            totals[kind.settings] = before + count, max(kind, longest, key=lambda kind: kind.bucket)
        passes = sum(-(-count // self._capacity(longest)) * longest.nfe for count, longest in totals.values())
        now, made_s = time.perf_counter(), 0.0
        for batch in self._drawing:
            done_s = 0.0 if batch.begun is None else now - batch.begun
            made_s += max(0.0, batch.nfe * self._seconds_per_pass - done_s)
        return made_s, passes * self._seconds_per_pass

    def _capacity(self, kind: Kind) -> int:
        """Most jobs of a batch."""
        if kind.settings.deterministic:
            return 1
        return max(1, min(self.max_batch_size, self.max_batch_tokens // kind.tokens))

    def _queue_is_full(self, wait_s: float) -> Overloaded:
        return Overloaded(
            f"the queue is full: {self.queued} of at most {self.max_queued} texts wait; come again later",
            code="queue_full",
            retry_after_s=max(1, math.ceil(wait_s)),
        )

    def refusal(self) -> Overloaded | None:
        """What a job would be told now that has no room; None: there is some."""
        full = self.queued >= max(1, self.max_queued)
        return self._queue_is_full(self.expected_wait_s) if full else None

    def submit(self, jobs: Sequence[Job], timeout_s: float) -> Ticket:
        """Put jobs of one request into the queue, all of them or none.

        Args:
            jobs: What to draw.
            timeout_s: How long the request can wait for all its answers.

        Raises:
            Overloaded: If the queue is full, or too long to be done in time.
        """
        wait_s = self.expected_wait_s
        queued = self.queued
        if queued and queued + len(jobs) > self.max_queued:
            raise self._queue_is_full(wait_s)
        longest = max((job.kind for job in jobs), key=lambda kind: kind.bucket)
        done_s = wait_s + -(-len(jobs) // self._capacity(longest)) * longest.nfe * self._seconds_per_pass
        if wait_s and done_s > timeout_s:  # a model that is free tries: it may be faster than it was
            raise Overloaded(
                f"the answer would take about {done_s:.1f} s, longer than this request can wait; come again later",
                code="deadline_exceeded",
                retry_after_s=max(1, math.ceil(done_s - timeout_s)),
            )
        self._beside.add(self)  # here and not where it was made, which may have been in another thread
        loop = asyncio.get_running_loop()
        entries = [_Waiting(job, loop.create_future()) for job in jobs]
        self._waiting.update(dict.fromkeys(entries))
        self._kinds.update(job.kind for job in jobs)
        loop.call_soon(self._start)  # not at once: what else arrives in this turn of the loop goes along
        return Ticket(self, entries, loop.time() + timeout_s)

    def _start(self) -> None:
        """Draw the next batch, if there is one and the model is free, or will be and the batch is full."""
        while self._waiting and len(self._drawing) < 2:
            entries, most = self._next()
            if self._drawing and len(entries) < most:
                return
            for entry in entries:
                self._take_out(entry)
            batch = _Drawing(entries)
            self._drawing.append(batch)
            future = asyncio.get_running_loop().run_in_executor(self._executor, self._timed, batch)
            future.add_done_callback(lambda future, batch=batch: self._finish(batch, future))

    def _next(self) -> tuple[list[_Waiting], int]:
        """The oldest job, those of its kind, and then those of the kinds next to it that fit; and how many could."""
        longest = next(iter(self._waiting)).job.kind
        near = math.log2(longest.bucket)
        alike = [entry for entry in self._waiting if entry.job.kind.settings == longest.settings]
        alike.sort(key=lambda entry: abs(math.log2(entry.job.kind.bucket) - near))  # stable: else in order of arrival
        batch: list[_Waiting] = []
        real = 0
        for entry in alike:
            most = max(longest, entry.job.kind, key=lambda kind: kind.bucket)
            tokens = real + entry.job.kind.tokens
            if batch and (len(batch) >= self._capacity(most) or (len(batch) + 1) * most.tokens > 2 * tokens):
                continue
            batch.append(entry)
            longest, real = most, tokens
        return batch, self._capacity(longest)

    def _take_out(self, entry: _Waiting) -> None:
        if entry in self._waiting:
            del self._waiting[entry]
            self._kinds[entry.job.kind] -= 1
            if not self._kinds[entry.job.kind]:
                del self._kinds[entry.job.kind]

    def _timed(self, batch: _Drawing) -> tuple[list[Drawn | Exception], float, float]:
        begun = batch.begun = time.perf_counter()
        return self._draw([entry.job for entry in batch.entries]), begun, time.perf_counter() - begun

    def _finish(self, batch: _Drawing, future: asyncio.Future[tuple[list[Drawn | Exception], float, float]]) -> None:
        self._drawing.remove(batch)
        self._start()  # first, as the model waits and the answers do not
        answers, begun, draw_s = future.result()
        if any(isinstance(answer, Drawn) for answer in answers):  # else it ended early
            self._learn(draw_s / batch.nfe)
        self._observe([entry.job for entry in batch.entries], draw_s)
        for entry, answer in zip(batch.entries, answers, strict=True):
            if entry.done.done():
                continue
            if isinstance(answer, Drawn):
                entry.done.set_result(Result(answer, begun - entry.since, draw_s, len(batch.entries)))
            else:
                entry.done.set_exception(answer)

    def _learn(self, seconds_per_pass: float) -> None:
        """Take a batch into the speed that waits are told by."""
        before = self._seconds_per_pass or seconds_per_pass
        self._seconds_per_pass = before + 0.2 * (seconds_per_pass - before)

    def drop(self, entries: Sequence[_Waiting]) -> None:
        """Forget jobs that nobody waits for; a batch of such jobs alone stops at its next step."""
        for entry in entries:
            entry.job.cancelled = True
            entry.done.cancel()
            self._take_out(entry)


class Ticket:
    """A request's place in the queue."""

    def __init__(self, batcher: Batcher, entries: list[_Waiting], deadline: float) -> None:
        """Made by `Batcher.submit`."""
        self._batcher, self._entries, self._deadline = batcher, entries, deadline

    async def results(self) -> list[Result]:
        """Wait for all answers; where that is cancelled, or takes too long, so is the work.

        Raises:
            Overloaded: If the deadline passes.
            Exception: What went wrong with a job.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                return list(await asyncio.gather(*(entry.done for entry in self._entries)))
        except TimeoutError:
            wait_s = self._batcher.expected_wait_s
            raise Overloaded(
                "the request was not done by its deadline; come again later",
                code="deadline_exceeded",
                retry_after_s=max(1, math.ceil(wait_s)),
            ) from None
        finally:
            self.close()

    def close(self) -> None:
        """Give the place up, if it is still held."""
        self._batcher.drop([entry for entry in self._entries if not entry.done.done() or entry.done.cancelled()])

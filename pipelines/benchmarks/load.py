"""Requests to a server at a chosen rate or from a chosen number of clients, and what became of each."""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

Body = Callable[[int], dict[str, Any]]
"""The JSON body of the i-th request."""
FAILED = 0
"""Status of a request that had no answer."""
TIMEOUT_S = 60.0
"""How long an answer may take."""
REFUSED_S = 0.1
"""How long a client of a closed loop waits after a refusal; at once again, and it would take the server's cores."""


@dataclass(frozen=True)
class Sample:
    """One request.

    Attributes:
        at_s: When it was due, from the start of the load; in a closed loop, when it was sent.
        latency_s: From then until its whole answer was there: what waits in the client counts.
        status: HTTP status; FAILED: none came.
        batch_size: Sources of its batch, where the answer says.
        server_ms: Time it took within the server, where the answer says.
        sample_ms: Time its batch took in the sampler, where the answer says.
    """

    at_s: float
    latency_s: float
    status: int
    batch_size: int = 0
    server_ms: float = 0.0
    sample_ms: float = 0.0


@dataclass(frozen=True)
class Load:
    """All requests of a load.

    Attributes:
        samples: In the order in which they ended.
        seconds: From the first request until the last answer.
    """

    samples: list[Sample]
    seconds: float

    @property
    def good(self) -> list[Sample]:
        """Those with status 200."""
        return [s for s in self.samples if s.status == 200]

    def latency_ms(self, quantile: float) -> float | None:
        """A quantile of the latencies of answers; None: there was none."""
        found = sorted(s.latency_s for s in self.good)
        return 1000 * found[min(len(found) - 1, int(quantile * len(found)))] if found else None

    def summary(self, limit_ms: float | None = None) -> dict[str, Any]:
        """Its figures, ready for JSON.

        Args:
            limit_ms: Goodput counts answers within it.
        """
        good = self.good
        within = [s for s in good if limit_ms is None or 1000 * s.latency_s <= limit_ms]
        sizes = [s.batch_size for s in good if s.batch_size]
        statuses = Counter(s.status for s in self.samples)
        return {
            "requests": len(self.samples),
            "seconds": self.seconds,
            "answers_per_s": len(good) / self.seconds,
            "goodput_per_s": len(within) / self.seconds,
            "goodput_limit_ms": limit_ms,
            "p50_ms": self.latency_ms(0.5),
            "p95_ms": self.latency_ms(0.95),
            "p99_ms": self.latency_ms(0.99),
            "statuses": {str(status): count for status, count in sorted(statuses.items())},
            "mean_batch_size": statistics.mean(sizes) if sizes else None,
            "server_p50_ms": statistics.median(s.server_ms for s in good) if sizes else None,
            "sample_p50_ms": statistics.median(s.sample_ms for s in good) if sizes else None,
        }


def closed_loop(
    url: str, body: Body, clients: int, seconds: float, headers: dict[str, str] | None = None, pause_s: float = 0.0
) -> Load:
    """So many clients, each of which asks again when it has its answer.

    Args:
        url: Where to POST.
        body: Of each request.
        clients: How many.
        seconds: No request begins after that.
        headers: Of each request.
        pause_s: Time each waits between an answer and its next request.
    """

    async def run() -> Load:
        count = 0
        async with _Session(url, headers) as session:
            started = time.perf_counter()
            samples: list[Sample] = []

            async def client() -> None:
                nonlocal count
                while (now := time.perf_counter()) - started < seconds:
                    number, count = count, count + 1
                    samples.append(await session.ask(body(number), started, now))
                    refused = samples[-1].status != 200
                    if pause := max(pause_s, REFUSED_S if refused else 0.0):
                        await asyncio.sleep(pause)

            await asyncio.gather(*(client() for _ in range(clients)))
            return Load(samples, time.perf_counter() - started)

    return asyncio.run(run())


def open_loop(
    url: str, body: Body, phases: Sequence[tuple[float, float]], seed: int = 0, headers: dict[str, str] | None = None
) -> list[Load]:
    """Poisson arrivals that do not wait for answers, at one rate after the other.

    Args:
        url: Where to POST.
        body: Of each request.
        phases: Requests a second and seconds of each; there is no pause between two.
        seed: Of the times of arrival.
        headers: Of each request.

    Returns:
        The load of each phase: the requests that were due in it.
    """
    rng = random.Random(seed)
    due: list[tuple[int, float]] = []
    begin = 0.0
    for phase, (rate, seconds) in enumerate(phases):
        at = begin + rng.expovariate(rate)
        while at < begin + seconds:
            due.append((phase, at))
            at += rng.expovariate(rate)
        begin += seconds

    async def run() -> list[list[Sample]]:
        samples: list[list[Sample]] = [[] for _ in phases]
        async with _Session(url, headers) as session:
            started = time.perf_counter()

            async def one(number: int, phase: int, at: float) -> None:
                samples[phase].append(await session.ask(body(number), started, started + at))

            tasks = []
            for number, (phase, at) in enumerate(due):
                wait = started + at - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                tasks.append(asyncio.create_task(one(number, phase, at)))
            await asyncio.gather(*tasks)
        return samples

    found = asyncio.run(run())
    return [Load(samples, seconds) for samples, (_, seconds) in zip(found, phases, strict=True)]


class _Session:
    """Connections that are kept, as many as there are requests at once.

    HTTP by hand, as `bytes` over asyncio's streams: the client shares the cores with the server that it measures, and
    of what a lone client waited aiohttp in the client took 0.35 ms (EXPERIMENTS, 2026-11-27).
    """

    def __init__(self, url: str, headers: dict[str, str] | None) -> None:
        found = urlsplit(url)
        self._host, self._port = found.hostname or "127.0.0.1", found.port or 80
        told = {"Host": found.netloc, "Content-Type": "application/json"} | (headers or {})
        lines = [f"POST {found.path or '/'} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
        self._head = "\r\n".join([*lines, "Content-Length: "]).encode()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> _Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection[1].close()

    async def ask(self, body: dict[str, Any], started: float, due: float) -> Sample:
        status, told = FAILED, (0.0, 0.0, 0.0)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, found = await self._post(json.dumps(body).encode())
            if status == 200:
                told = (_number(found, "batch_size"), _number(found, "latency_ms"), _number(found, "sample_ms"))
        except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError, ValueError):
            pass
        return Sample(due - started, time.perf_counter() - due, status, int(told[0]), *told[1:])

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._host, self._port)

    async def _post(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of an answer, which has to tell its length."""
        reader, writer = await self._connection()
        kept = False
        try:
            writer.write(b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"\r\ncontent-length: *(\d+)\r\n", head)
            if length is None:
                raise ValueError(f"an answer without its length: {head!r}")
            answer = await reader.readexactly(int(length[1]))
            kept = b"\r\nconnection: close\r\n" not in head
            return int(head.split(b" ", 2)[1]), answer
        finally:
            if kept:
                self._idle.append((reader, writer))
            else:
                writer.close()


def _number(answer: bytes, name: str) -> float:
    """What the JSON of /v1/generate says, without parsing all of it; 0: nothing."""
    found = re.search(rb'"%s":\s*([0-9.e+-]+)' % name.encode(), answer)
    return float(found[1]) if found else 0.0

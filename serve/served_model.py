"""A model behind its queue: text in and text out, with the time that each part took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from serve.batching import Batcher, Result, Ticket
from serve.engine import Engine, Job, Settings
from serve.errors import FieldError
from serve.metrics import Metrics
from yan_core.generator import Candidate
from yan_core.tokenization import Encoding

FEW_CHARS = 500
"""Characters of a request that are turned into tokens at once: 0.5 ms on a slow core, 0.65 by a thread."""
FEW_TOKENS = 128
"""Tokens that are turned into text at once: it takes 16 microseconds, the way to a thread and back 65."""


@dataclass(frozen=True)
class Text:
    """A candidate with its text.

    Attributes:
        text: What it says.
        candidate: Its tokens.
        pieces: What each token adds to the text, where asked for.
    """

    text: str
    candidate: Candidate
    pieces: list[str] | None = None


@dataclass(frozen=True)
class Step:
    """The text after some of the solver's steps.

    Attributes:
        number: Steps done, from 1 on.
        text: What the decoder reads by then.
    """

    number: int
    text: Text


@dataclass(frozen=True)
class Answer:
    """What a source was answered.

    Attributes:
        texts: The candidates, the best first.
        steps: The text of the best after each solver step, where settings.follow.
        source_tokens: Tokens of the source that were read.
        source_tokens_cut: Tokens of the source that were cut off to fit.
        nfe: Trunk passes of each candidate.
        tokenise_s: Time the request's tokenisation took.
        queue_s: Time it waited for the model.
        sample_s: Time its batch took.
        decode_s: Time that turning tokens into text took.
        batch_size: Sources of its batch.
    """

    texts: list[Text]
    steps: list[Step]
    source_tokens: int
    source_tokens_cut: int
    nfe: int
    tokenise_s: float
    queue_s: float
    sample_s: float
    decode_s: float
    batch_size: int


@dataclass(frozen=True)
class Pools:
    """What the models of a replica share.

    Attributes:
        draws: The one thread that draws.
        texts: Threads for tokenizer and decoder where a text is long: the event loop is left to HTTP.
        queues: Of all models, which wait for that one thread.
    """

    draws: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "draw"))
    texts: Executor = field(default_factory=lambda: ThreadPoolExecutor(2, "text"))
    queues: WeakSet[Batcher] = field(default_factory=lambda: WeakSet[Batcher]())


class ServedModel:
    """An engine, its queue and its tokenizer's threads."""

    def __init__(self, name: str, engine: Engine, metrics: Metrics, max_queued: int, pools: Pools) -> None:
        """Join them.

        Args:
            name: What answers call the model.
            engine: Loaded.
            metrics: Where its work is counted.
            max_queued: Most sources that wait.
            pools: The replica's.
        """
        self.name, self.engine, self.metrics, self._texts = name, engine, metrics, pools.texts
        self.created = int(time.time())
        self.batcher = Batcher(
            engine.draw,
            pools.draws,
            max_batch_size=engine.max_batch_size,
            max_batch_tokens=engine.max_batch_tokens,
            max_queued=max_queued,
            observe=lambda jobs, seconds: metrics.batch(name, jobs, seconds),
            beside=pools.queues,
        )
        self._queued: Callable[[], int] = lambda: self.batcher.queued
        metrics.watch_queue(name, self._queued)

    def retire(self) -> None:
        """Another takes its place; what it has begun it ends."""
        self.metrics.forget_queue(self.name, self._queued)

    async def ask(
        self,
        sources: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        timeout_s: float,
        *,
        may_cut: bool = True,
        with_pieces: bool = False,
    ) -> Asked:
        """Tokenise sources and put them into the queue.

        Args:
            sources: Texts as the model's task template makes them.
            seeds: One a source.
            settings: How to draw for them.
            timeout_s: How long all of it may take.
            may_cut: Whether a source that is too long is cut rather than refused.
            with_pieces: Whether each token's part of the text is wanted.

        Raises:
            FieldError: If this model cannot take it.
            Overloaded: If the queue is full.
        """
        self.engine.check(sources, settings)
        begun = time.perf_counter()
        encodings = await self._encode(list(sources))
        tokenise_s = time.perf_counter() - begun
        cut = next((encoding for encoding in encodings if encoding.num_cut), None)
        if cut is not None and not may_cut:
            most = self.engine.generator.max_source_tokens
            raise FieldError(
                "source",
                f"source must have at most {most} tokens, got {len(cut.ids) + cut.num_cut}",
                f"{most} tokens",
                code="context_length_exceeded",
            )
        jobs = [Job(encoding, seed, settings) for encoding, seed in zip(encodings, seeds, strict=True)]
        return Asked(self, jobs, encodings, tokenise_s, timeout_s - tokenise_s, with_pieces)

    async def _encode(self, sources: list[str]) -> list[Encoding]:
        if sum(map(len, sources)) <= FEW_CHARS:
            return self.engine.generator.encode(sources)
        return await self._in_thread(self.engine.generator.encode, sources)

    async def read(self, candidates: Sequence[Candidate], with_pieces: bool) -> list[Text]:
        """The texts of candidates."""
        if not with_pieces and sum(len(found.tokens) for found in candidates) <= FEW_TOKENS:
            return self._read(candidates, with_pieces)
        return await self._in_thread(self._read, candidates, with_pieces)

    def _read(self, candidates: Sequence[Candidate], with_pieces: bool) -> list[Text]:
        tokenizer = self.engine.generator.tokenizer
        return [
            Text(tokenizer.decode(found.tokens), found, tokenizer.pieces(found.tokens) if with_pieces else None)
            for found in candidates
        ]

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._texts, function, *args)


class Asked:
    """A request whose sources are in the queue."""

    def __init__(
        self,
        model: ServedModel,
        jobs: list[Job],
        encodings: list[Encoding],
        tokenise_s: float,
        timeout_s: float,
        with_pieces: bool,
    ) -> None:
        """Made by `ServedModel.ask`.

        Raises:
            Overloaded: If the queue is full.
        """
        self._model, self._encodings, self._tokenise_s, self._with_pieces = model, encodings, tokenise_s, with_pieces
        self._steps: list[list[tuple[int, list[Candidate]]]] = [[] for _ in jobs]
        self._news: asyncio.Queue[tuple[int, list[Candidate]] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for job, steps in zip(jobs, self._steps, strict=True):
            if job.settings.follow:
                job.on_step = self._listener(loop, steps)
        self._ticket: Ticket = model.batcher.submit(jobs, timeout_s)

    def _listener(
        self, loop: asyncio.AbstractEventLoop, steps: list[tuple[int, list[Candidate]]]
    ) -> Callable[[int, list[Candidate]], None]:
        def on_step(step: int, candidates: list[Candidate]) -> None:
            del steps[step - 1 :]  # there where a batch failed and its jobs are drawn once more, one by one
            steps.append((step, candidates))
            loop.call_soon_threadsafe(self._news.put_nowait, (step, candidates))

        return on_step

    async def answers(self) -> list[Answer]:
        """Wait for the answers, in the order of the sources.

        Raises:
            Overloaded: If the deadline passes.
            Exception: What went wrong.
        """
        results = await self._ticket.results()
        return [await self._answer(i, result) for i, result in enumerate(results)]

    async def _answer(self, i: int, result: Result) -> Answer:
        begun = time.perf_counter()
        found = result.drawn.candidates
        best = [candidates[found[0].number] for _, candidates in self._steps[i]]
        texts = await self._model.read([*found, *best], self._with_pieces)
        decode_s = time.perf_counter() - begun
        encoding = self._encodings[i]
        self._model.metrics.drawn(self._model.name, len(encoding.ids), result.drawn, result.queue_s)
        steps = [Step(step, text) for (step, _), text in zip(self._steps[i], texts[len(found) :], strict=True)]
        return Answer(
            texts=texts[: len(found)],
            steps=steps,
            source_tokens=len(encoding.ids),
            source_tokens_cut=encoding.num_cut,
            nfe=result.drawn.nfe,
            tokenise_s=self._tokenise_s,
            queue_s=result.queue_s,
            sample_s=result.draw_s,
            decode_s=decode_s,
            batch_size=result.batch_size,
        )

    async def follow(self) -> AsyncGenerator[Step | Answer, None]:
        """The first candidate of a lone source after each solver step, as soon as it is done; then the answer."""
        answer = asyncio.ensure_future(self.answers())
        answer.add_done_callback(lambda _: self._news.put_nowait(None))
        told = 0
        try:
            while (news := await self._news.get()) is not None:
                step, candidates = news
                if step <= told:
                    continue
                told = step
                (text,) = await self._model.read(candidates[:1], self._with_pieces)
                yield Step(step, text)
            yield (await answer)[0]
        finally:
            answer.cancel()

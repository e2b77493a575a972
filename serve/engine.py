"""Checkpoint and sampler of one model; knows nothing of HTTP."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

import yan_core
from serve.errors import FieldError, must_be
from yan_core.baselines import beyond_baselines
from yan_core.batching import SOURCE_BUCKET, length_bucket
from yan_core.config import SamplingConfig
from yan_core.generator import Candidate, Drawn
from yan_core.model import YanModel
from yan_core.solver import trunk_passes
from yan_core.tokenization import Encoding

logger = logging.getLogger(__name__)

FAILURES_ALLOWED = 3
"""Batches in a row that may fail altogether before the engine calls itself broken (a lost GPU answers nothing more)."""


@dataclass(frozen=True)
class Settings:
    """How to draw; the requests of one batch share them all.

    Attributes:
        num_steps: Solver steps.
        max_tokens: Places of an answer.
        sampling: Solver, guidance and candidates.
        deterministic: Compute each source by itself, so that rounding too is the same in any company.
        follow: Read the text after every solver step.
        with_log_probs: Give the tokens' log-probabilities.
    """

    num_steps: int
    max_tokens: int
    sampling: SamplingConfig = SamplingConfig()
    deterministic: bool = False
    follow: bool = False
    with_log_probs: bool = False


@dataclass(frozen=True)
class Kind:
    """What all jobs of a batch have in common, and what follows from it.

    Attributes:
        settings: How to draw.
        bucket: Length up to which sources are padded at most, in tokens.
    """

    settings: Settings
    bucket: int

    @cached_property
    def tokens(self) -> int:
        """Tokens that a job adds to its batch, padding included."""
        return self.bucket + self.settings.max_tokens * self.settings.sampling.num_candidates

    @cached_property
    def nfe(self) -> int:
        """Trunk passes of a batch."""
        return trunk_passes(self.settings.num_steps, self.settings.sampling)


@dataclass(eq=False)
class Job:
    """One source to draw answers for.

    Attributes:
        encoding: Its token ids.
        seed: Of its noise.
        settings: How to draw.
        on_step: Given the number of steps done and the candidates as they are read by then, where settings.follow;
            called in the thread that draws.
        cancelled: Whether nobody waits for the answer any more.
    """

    encoding: Encoding
    seed: int
    settings: Settings
    on_step: Callable[[int, list[Candidate]], None] | None = None
    cancelled: bool = False

    @cached_property
    def kind(self) -> Kind:
        """Which jobs it can share a batch with: those of the same kind."""
        return Kind(self.settings, length_bucket(len(self.encoding.ids)))


class Cancelled(Exception):
    """Nobody waits for any answer of the batch."""


class Engine:
    """A loaded model that draws answers for batches of sources."""

    def __init__(
        self,
        folder: str | Path,
        *,
        max_batch_size: int,
        max_batch_tokens: int,
        max_source_chars: int,
        device: str = "cpu",
    ) -> None:
        """Load a model.

        Args:
            folder: Written by `yan_core.checkpoint.save_pretrained`.
            max_batch_size: Most sources of a batch.
            max_batch_tokens: Most tokens of a batch, sources with their padding and all candidates together; of a
                request too.
            max_source_chars: Longest source, in characters.
            device: Where the model runs; on a GPU in bfloat16 and by CUDA graphs.

        Raises:
            CheckpointError: If the folder is missing, damaged or of another format.
        """
        on_gpu = torch.device(device).type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.generator = yan_core.load(folder, device, dtype, use_graphs=on_gpu)
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.max_source_chars = max_source_chars
        self._warm = False
        self._failures = 0

    @property
    def ready(self) -> bool:
        """Whether a generation has worked and the latest ones did not all fail."""
        return self._warm and self._failures < FAILURES_ALLOWED

    def warm_up(self, num_steps: int) -> float:
        """Draw once for a lone short source and once for a full batch of long ones; by CUDA graphs, for each shape.

        Args:
            num_steps: Solver steps, as most requests will have them.

        Returns:
            Seconds it took.

        Raises:
            RuntimeError: If a generation fails; its cause is attached.
        """
        started = time.perf_counter()
        settings = Settings(num_steps, self.generator.max_target_tokens)
        for jobs in self._shapes(settings):
            answer = self.draw(jobs)[0]
            if isinstance(answer, Exception):
                raise RuntimeError(
                    f"the model was loaded, but a test generation of batch size {len(jobs)} failed: "
                    f"{type(answer).__name__}: {answer}"
                ) from answer
        self._warm = True
        return time.perf_counter() - started

    def _shapes(self, settings: Settings) -> list[list[Job]]:
        """Batches to warm up with."""
        (long,) = self.generator.encode(["? " * self.generator.max_source_tokens])
        fits = partial(self._fitting, settings=settings)
        if self.generator.graphs is None or not isinstance(self.generator.model, YanModel):
            return [fits(long.ids[:1])[:1], fits(long.ids)]
        lengths = _doubled(SOURCE_BUCKET, len(long.ids))
        full = [fits(long.ids[:length]) for length in lengths]
        return [jobs[:size] for jobs in full for size in _doubled(1, len(jobs))]

    def _fitting(self, ids: list[int], settings: Settings) -> list[Job]:
        """A full batch of one source."""
        job = Job(Encoding(ids, 0), 0, settings)
        return [job] * max(1, min(self.max_batch_size, self.max_batch_tokens // job.kind.tokens))

    def check(self, sources: Sequence[str], settings: Settings) -> None:
        """Refuse what this model cannot do, before any work.

        Args:
            sources: Texts.
            settings: How to draw for them.

        Raises:
            FieldError: Naming the field, as settings do, and what is allowed.
        """
        longest = max(map(len, sources))
        if longest > self.max_source_chars:
            allowed = f"text of at most {self.max_source_chars} characters"
            raise FieldError("source", f"source must be {allowed}, got {longest} characters", allowed)
        most = self.generator.most_tokens
        if settings.max_tokens > most:
            raise must_be("max_tokens", f"a whole number in [1, {most}]", settings.max_tokens)
        model = self.generator.model
        if not isinstance(model, YanModel):
            beyond = beyond_baselines(settings.sampling)
            beyond += ["follow"] * settings.follow + ["with_log_probs"] * settings.with_log_probs
            if beyond:
                field = beyond[0]
                raise FieldError(field, f"{field} is for YAN alone, and this model is a baseline that answers greedily")
        elif model.config.prediction == "endpoint" and settings.sampling.method == "heun":
            raise must_be("method", "euler or midpoint for this model, which has no velocity at t = 1", "heun")
        candidates = settings.sampling.num_candidates
        tokens = len(sources) * (self.generator.max_source_tokens + settings.max_tokens * candidates)
        if tokens > self.max_batch_tokens and (len(sources) > 1 or candidates > 1):
            field = "source" if len(sources) > 1 else "num_candidates"
            raise FieldError(
                field,
                f"{field}: {len(sources)} sources with {candidates} answers of {settings.max_tokens} tokens each "
                f"may take {tokens} tokens, which must be at most {self.max_batch_tokens}",
                f"{self.max_batch_tokens} tokens",
            )

    def draw(self, jobs: Sequence[Job]) -> list[Drawn | Exception]:
        """Answer a batch of jobs, all of the same settings.

        Returns:
            For each job, in order, what was drawn, or what went wrong with it alone; `Cancelled` for all if nobody
            waits for any of them.
        """
        answers = self._draw(jobs)
        if any(isinstance(answer, Drawn) for answer in answers):
            self._failures = 0
        elif not any(isinstance(answer, Cancelled) for answer in answers):
            self._failures += 1
        return answers

    def _draw(self, jobs: Sequence[Job]) -> list[Drawn | Exception]:
        settings = jobs[0].settings
        if all(job.cancelled for job in jobs):  # given up behind the batch before
            return [Cancelled()] * len(jobs)

        def step_done(chosen: list[int], step: int, read: Callable[[], list[list[Candidate]]]) -> None:
            if all(job.cancelled for job in jobs):
                raise Cancelled
            if not settings.follow:
                return
            for i, candidates in zip(chosen, read(), strict=True):
                on_step = jobs[i].on_step
                if on_step is not None and not jobs[i].cancelled:
                    on_step(step, candidates)

        # By CUDA graphs there is no step to stop at, and with a baseline none at all.
        steps = isinstance(self.generator.model, YanModel) and (settings.follow or self.generator.graphs is None)
        try:
            return list(
                self.generator.draw(
                    [job.encoding for job in jobs],
                    settings.num_steps,
                    settings.max_tokens,
                    [job.seed for job in jobs],
                    sampling=settings.sampling,
                    deterministic=settings.deterministic,
                    with_log_probs=settings.with_log_probs,
                    on_step=step_done if steps else None,
                )
            )
        except Cancelled as cancelled:
            return [cancelled] * len(jobs)
        except Exception as error:  # Whatever one request did, its neighbours get their answers.
            if len(jobs) == 1:
                logger.exception("generation failed")
                return [error]
            logger.warning("a batch of %d failed (%s); its requests now run one by one", len(jobs), error)
        return [self._draw([job])[0] for job in jobs]


def _doubled(first: int, last: int) -> list[int]:
    """The first, twice that and so on while it is less than the last, and the last."""
    found: list[int] = []
    while first < last:
        found.append(first)
        first *= 2
    return [*found, last]

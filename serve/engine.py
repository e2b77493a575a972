"""Checkpoint, sampler and batching of one replica; knows nothing of HTTP."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

import yan_core
from serve.schemas import FieldError, GenerateRequest, must_be
from yan_core.generator import Generation

logger = logging.getLogger(__name__)

FAILURES_ALLOWED = 3
"""Batches in a row that may fail altogether before the engine calls itself broken (a lost GPU answers nothing more)."""


class Engine:
    """A loaded model that answers batches of requests."""

    def __init__(
        self,
        folder: str | Path,
        *,
        num_steps: int = 3,
        max_batch_size: int = 32,
        max_source_chars: int = 20_000,
        device: str = "cpu",
    ) -> None:
        """Load a model.

        Args:
            folder: Written by `yan_core.checkpoint.save_pretrained`.
            num_steps: Solver steps of a request that names none.
            max_batch_size: Most requests of a batch.
            max_source_chars: Longest source, in characters.
            device: Where the model runs; on a GPU in bfloat16 and by CUDA graphs.

        Raises:
            CheckpointError: If the folder is missing, damaged or of another format.
        """
        on_gpu = torch.device(device).type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.generator = yan_core.load(folder, device, dtype, use_graphs=on_gpu)
        self.num_steps, self.max_batch_size, self.max_source_chars = num_steps, max_batch_size, max_source_chars
        self.max_tokens = self.generator.most_tokens
        self._warm = False
        self._failures = 0

    @property
    def ready(self) -> bool:
        """Whether a generation has worked and the latest ones did not all fail."""
        return self._warm and self._failures < FAILURES_ALLOWED

    def warm_up(self) -> float:
        """Generate once for a lone short request and once for a full batch of long ones.

        Returns:
            Seconds it took.

        Raises:
            RuntimeError: If a generation fails; its cause is attached.
        """
        started = time.perf_counter()
        longest = "? " * self.generator.max_source_tokens
        for sources in (["?"], [longest[: self.max_source_chars]] * self.max_batch_size):
            answer = self.generate([GenerateRequest(source=source) for source in sources])[0]
            if isinstance(answer, Exception):
                raise RuntimeError(
                    f"the model was loaded, but a test generation of batch size {len(sources)} failed: "
                    f"{type(answer).__name__}: {answer}"
                ) from answer
        self._warm = True
        return time.perf_counter() - started

    def check(self, request: GenerateRequest) -> None:
        """Refuse what this model cannot do, before any work.

        Raises:
            FieldError: Naming the field and what is allowed.
        """
        if len(request.source) > self.max_source_chars:
            allowed = f"text of at most {self.max_source_chars} characters"
            raise FieldError("source", f"source must be {allowed}, got {len(request.source)} characters", allowed)
        if request.max_tokens is not None and request.max_tokens > self.max_tokens:
            raise must_be("max_tokens", f"a whole number in [1, {self.max_tokens}]", request.max_tokens)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation | Exception]:
        """Answer a batch: one generation for each (num_steps, max_tokens) in it.

        Returns:
            For each request, in order, its answer, or what went wrong with it alone.
        """
        answers: list[Generation | Exception] = [RuntimeError("not generated")] * len(requests)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            try:
                self.check(request)
            except FieldError as error:
                answers[i] = error
                continue
            num_steps = self.num_steps if request.num_steps is None else request.num_steps
            max_tokens = self.generator.max_target_tokens if request.max_tokens is None else request.max_tokens
            groups[num_steps, max_tokens].append(i)
        for (num_steps, max_tokens), rows in groups.items():
            found = self._generate_group([requests[i] for i in rows], num_steps, max_tokens)
            for i, answer in zip(rows, found, strict=True):
                answers[i] = answer
        if any(isinstance(answer, Generation) for answer in answers):
            self._failures = 0
        elif groups:
            self._failures += 1
        return answers

    def _generate_group(
        self, requests: list[GenerateRequest], num_steps: int, max_tokens: int
    ) -> list[Generation | Exception]:
        try:
            sources, seeds = [r.source for r in requests], [r.seed for r in requests]
            return list(self.generator.generate(sources, num_steps, max_tokens, seeds))
        except Exception as error:  # Whatever one request did, its neighbours get their answers.
            if len(requests) == 1:
                logger.exception("generation failed")
                return [error]
            logger.warning("a batch of %d failed (%s); its requests now run one by one", len(requests), error)
        return [self._generate_group([request], num_steps, max_tokens)[0] for request in requests]

"""Text in, text out: the sampler with its tokenizer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yan_core.baselines import Baseline
from yan_core.batching import pad_rows
from yan_core.config import Method, Ranking
from yan_core.graphs import GraphCache
from yan_core.model import YanModel
from yan_core.sampler import sample
from yan_core.solver import evaluation_times, time_grid
from yan_core.tasks import get_task
from yan_core.tokenization import Tokenizer

SOURCE_BUCKET = 16
"""Where shapes must be few, sources are padded to a multiple of so many tokens."""


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: The answer.
        tokens: Its token ids, before the first end-of-text token.
        source_tokens: Tokens of the source that were read.
        source_tokens_cut: Tokens of the source that were cut off to fit.
        num_steps: Solver steps.
        nfe: Trunk passes of each candidate.
        finished: Whether the text ended by itself rather than at the limit.
        latency_ms: Time of the whole batch from text to text, in milliseconds.
    """

    text: str
    tokens: list[int]
    source_tokens: int
    source_tokens_cut: int
    num_steps: int
    nfe: int
    finished: bool
    latency_ms: float


class TextGenerator:
    """A loaded model that answers texts."""

    def __init__(
        self, model: YanModel | Baseline, tokenizer: Tokenizer, details: dict[str, Any], use_graphs: bool = False
    ) -> None:
        """Join model, tokenizer and the details they were saved with.

        Args:
            model: In evaluation mode.
            tokenizer: Its tokenizer.
            details: Task and lengths, as `save_pretrained` got them.
            use_graphs: Pad batches to a power of two and sources to a multiple of 16 tokens, and on a GPU replay a CUDA
                graph for each such shape and kind of request.
        """
        self.graphs = GraphCache() if use_graphs else None
        self.model, self.tokenizer, self.details = model, tokenizer, details
        self.task = get_task(details["task"])
        self.max_source_tokens = int(details["max_source_tokens"])
        self.max_target_tokens = int(details["max_target_tokens"])
        self.device = next(model.parameters()).device

    @property
    def most_tokens(self) -> int:
        """Longest answer that may be asked for."""
        positions = self.model.config.max_positions
        return positions - self.max_source_tokens - 1 if isinstance(self.model, Baseline) else positions

    def generate(
        self,
        sources: Sequence[str],
        num_steps: int = 3,
        max_tokens: int | None = None,
        seeds: Sequence[int] | int = 0,
        *,
        method: Method = "euler",
        guidance_scale: float = 1.0,
        num_candidates: int = 1,
        ranking: Ranking = "bayes_risk",
        lengths: Sequence[int] | None = None,
        deterministic: bool = False,
    ) -> list[Generation]:
        """Answer a batch of sources at once.

        Args:
            sources: Texts as the model's task template makes them.
            num_steps: Solver steps, >= 1.
            max_tokens: Longest answer, in tokens, up to the model's max_positions; None: what it was trained for.
            seeds: One seed, or one a source, each in [0, 2**63). The same source and seed give the same answer in any
                batch, but for ties of logits closer than rounding, which differs with a batch's shape.
            method: ODE solver; `midpoint` and `heun` take two trunk passes a step.
            guidance_scale: Classifier-free guidance, 1 is none; other values double the trunk passes.
            num_candidates: Answers drawn for each source in one batch, of which the best is given.
            ranking: `bayes_risk`, the one most like the others, or `confidence`, the one the decoder is surest of.
            lengths: Each answer's number of tokens, where it is known.
            deterministic: Draw the noise on the CPU and compute every source by itself, in a shape that its own length
                decides, so that rounding too is the same in any company. Slower, as nothing is shared.

        Raises:
            ValueError: If an argument is out of range.
        """
        if isinstance(sources, str) or not all(isinstance(source, str) for source in sources):
            raise ValueError(f"sources must be a list of texts, got {sources!r:.80}")
        if not sources:
            return []
        started = time.perf_counter()
        seeds = [seeds] * len(sources) if isinstance(seeds, int) else list(seeds)
        if len(seeds) != len(sources):
            raise ValueError(f"seeds must be one number or one a source: got {len(seeds)} for {len(sources)} sources")
        if any(not 0 <= seed < 2**63 for seed in seeds):
            raise ValueError(f"seeds must be in [0, 2**63), got {min(seeds)} to {max(seeds)}")
        if lengths is not None and len(lengths) != len(sources):
            raise ValueError(f"lengths must be one a source: got {len(lengths)} for {len(sources)} sources")
        places = self.max_target_tokens if max_tokens is None else max_tokens
        encodings = self.tokenizer.encode_batch(sources, self.max_source_tokens, self.task.keep)
        rows: list[list[int]] = []
        how: dict[str, Any] = {
            "num_steps": num_steps,
            "method": method,
            "guidance_scale": guidance_scale,
            "num_candidates": num_candidates,
            "ranking": ranking,
        }
        if isinstance(self.model, Baseline):
            self._check_greedy(places, how)
        graphs = None if deterministic or lengths is not None or isinstance(self.model, Baseline) else self.graphs
        nfe = 0
        for chosen in [[i] for i in range(len(sources))] if deterministic else [list(range(len(sources)))]:
            longest = max(len(encodings[i].ids) for i in chosen)
            padded, device = max(1, longest), self.device
            if deterministic:
                device = torch.device("cpu")  # of the draws
            if deterministic or graphs is not None:
                padded = min(-(-padded // SOURCE_BUCKET) * SOURCE_BUCKET, self.model.config.max_positions)
            ids, mask = pad_rows([encodings[i].ids for i in chosen], Tokenizer.pad_id, padded)
            keys = torch.tensor([seeds[i] for i in chosen])
            if graphs is None:
                told = None if lengths is None else torch.tensor([lengths[i] for i in chosen])
                inputs = ids.to(self.device), mask.to(self.device)
                found, passes = self._write(*inputs, places, keys.to(device), told, how)
            else:
                found = self._replay(graphs, ids, mask, places, keys, how)[: len(chosen)]
                passes = _passes(how)
            rows, nfe = rows + found.tolist(), max(nfe, passes)
        answers = [self.tokenizer.until_eos(row) for row in rows]
        texts = [self.tokenizer.decode(answer) for answer in answers]
        latency_ms = (time.perf_counter() - started) * 1000
        return [
            Generation(
                text=text,
                tokens=answer,
                source_tokens=len(encoding.ids),
                source_tokens_cut=encoding.num_cut,
                num_steps=num_steps,
                nfe=nfe,
                finished=len(answer) < places or getattr(self.model, "length_head", None) is not None,
                latency_ms=latency_ms,
            )
            for text, answer, encoding in zip(texts, answers, encodings, strict=True)
        ]

    def _check_greedy(self, places: int, how: dict[str, Any]) -> None:
        usual = {"method": "euler", "guidance_scale": 1.0, "num_candidates": 1}
        unlike = [name for name, value in usual.items() if how[name] != value]
        if unlike:
            raise ValueError(f"{', '.join(unlike)} are for YAN alone: a baseline answers greedily, got {how}")
        if not 1 <= places <= self.most_tokens or how["num_steps"] < 1:
            raise ValueError(
                f"max_tokens must be in [1, {self.most_tokens}] and num_steps >= 1, got {places} and {how['num_steps']}"
            )

    def _write(
        self, ids: Tensor, mask: Tensor, places: int, seeds: Tensor, lengths: Tensor | None, how: dict[str, Any]
    ) -> tuple[Tensor, int]:
        """Token ids of a batch's answers, [batch, places], and the passes of each."""
        if isinstance(self.model, Baseline):
            told = None if lengths is None else lengths.to(ids.device)
            return self.model.answer(ids, mask, places, how["num_steps"], told)
        return sample(self.model, ids, mask, places, seeds, lengths=lengths, **how).ids, _passes(how)

    def _replay(
        self, graphs: GraphCache, ids: Tensor, mask: Tensor, places: int, seeds: Tensor, how: dict[str, Any]
    ) -> Tensor:
        """Token ids of a batch filled up to a power of two with empty rows, [power of two, places]."""
        extra = 2 ** (len(seeds) - 1).bit_length() - len(seeds)
        filled = F.pad(ids, (0, 0, 0, extra)), F.pad(mask, (0, 0, 0, extra)), F.pad(seeds, (0, extra))

        def draw(ids: Tensor, mask: Tensor, seeds: Tensor) -> Tensor:
            return self._write(ids, mask, places, seeds, None, how)[0]

        return graphs.call((places, *how.values()), draw, *(value.to(self.device) for value in filled))


def _passes(how: dict[str, Any]) -> int:
    """Trunk passes of YAN's sampler."""
    times = evaluation_times(time_grid(how["num_steps"]), how["method"])
    return len(times) * (1 if how["guidance_scale"] == 1.0 else 2)
